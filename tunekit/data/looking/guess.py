"""The number of tokens of a text where no tokenizer is at hand."""

CHARACTERS_OF_A_TOKEN = 3.5  # of English text


def guessed_tokens(text: str) -> int:
    """At most about so many: ASCII at CHARACTERS_OF_A_TOKEN, every other character one token a byte of its UTF-8 (2 for
    Arabic and Cyrillic, 3 for Chinese and Thai), as a tokenizer spells a script that it has not learnt."""
    plain, whole = len(text.encode("ascii", "ignore")), len(text.encode("utf-8", "surrogatepass"))
    return int(plain / CHARACTERS_OF_A_TOKEN) + whole - plain
