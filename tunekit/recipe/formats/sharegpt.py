"""`format: sharegpt`: conversations of {from, value}."""

DESCRIPTION = "conversations: a list of {from: human|gpt|system, value}; system and tools: optional"
FIELDS = ("conversations", "system", "tools")
REQUIRED = ("conversations",)
