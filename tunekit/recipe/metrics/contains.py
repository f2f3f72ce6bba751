"""`metrics: [contains]`."""

DESCRIPTION = "share of generated answers that contain the reference"
COMPUTED_FROM = "generation"
HIGHER_IS_BETTER = True
