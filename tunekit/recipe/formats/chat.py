"""`format: chat`: OpenAI messages."""

DESCRIPTION = "messages: a list of {role, content}, as OpenAI's API has them; tools: optional tool definitions"
FIELDS = ("messages", "tools")
REQUIRED = ("messages",)
