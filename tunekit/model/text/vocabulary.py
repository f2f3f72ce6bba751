"""Checks that the embedding has a row for every token."""

from tunekit.contracts import Tokenizer
from tunekit.errors import ModelError


def check_vocabulary(tokenizer: Tokenizer, embedding_rows: int, largest_used_id: int | None = None) -> None:
    """Check that the embedding has a row for every token id that is used. `largest_used_id`: the largest id in the
    data; None: all ids of the tokenizer count as used.

    Raises: ModelError that names the tokens without a row.
    """
    largest = tokenizer.vocabulary_size - 1 if largest_used_id is None else largest_used_id
    if largest < embedding_rows:
        return
    beyond = range(embedding_rows, tokenizer.vocabulary_size)
    examples = ", ".join(repr(tokenizer.token_text(token_id)) for token_id in beyond[:5])
    missing = f"{len(beyond)} tokens without a row in the model's embedding of {embedding_rows} rows ({examples})"
    how = "use the tokenizer that belongs to the base, or a base whose vocabulary was resized for these tokens"
    raise ModelError(f"the tokenizer has {missing}", how, key="model.name_or_path")
