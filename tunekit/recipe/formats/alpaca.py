"""`format: alpaca`: an instruction, optional input, and the output."""

DESCRIPTION = "instruction, input (may be empty or absent), output; system: optional"
FIELDS = ("instruction", "input", "output", "system", "history")
REQUIRED = ("instruction", "output")
