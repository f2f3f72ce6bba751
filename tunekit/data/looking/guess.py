"""An estimate of the number of tokens of a text, without a tokenizer."""

CHARACTERS_OF_A_TOKEN = 3.5  # average of English text


def guessed_tokens(text: str) -> int:
    """An upper estimate of the number of a text's tokens. CHARACTERS_OF_A_TOKEN ASCII characters count as one token.
    Any other character counts as one token per byte of UTF-8 (2 for Arabic, 3 for Chinese and Thai), the worst case of
    a byte-level tokenizer.
    """
    ascii_bytes, all_bytes = len(text.encode("ascii", "ignore")), len(text.encode("utf-8", "surrogatepass"))
    return int(ascii_bytes / CHARACTERS_OF_A_TOKEN) + all_bytes - ascii_bytes
