"""`format: text`: plain text, every token of it trained on."""

DESCRIPTION = "text: trained on whole, with the end-of-sequence token after it"
FIELDS = ("text",)
REQUIRED = ("text",)
