"""`format: prompt_completion`: a prompt and what follows it."""

DESCRIPTION = "prompt, completion: plain text, or lists of messages; only the completion is trained on"
FIELDS = ("prompt", "completion", "tools")
REQUIRED = ("prompt", "completion")
