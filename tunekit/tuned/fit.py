"""Checks whether a model fits an objective and its rows: family, vocabulary and positions."""

from collections.abc import Iterator, Sequence

import numpy as np

from tunekit.contracts import Processor, RowKind, RowLayout, Rows, Tokenizer
from tunekit.errors import ModelError, Problem
from tunekit.model.load import LoadedModel
from tunekit.recipe.recipe import supervised_objective


def check_family(base: LoadedModel, family: str) -> LoadedModel:
    """Check that the base belongs to the family that the objective needs, and return the base.

    Raises: ModelError.
    """
    if base.family.objectives == family:
        return base
    what = f"{base.facts.name_or_path} ({base.facts.model_type}) is {base.family.text}"
    fitting = supervised_objective(base.family.objectives)
    if fitting is not None:
        how = f"write objective: {fitting.method}"
        raise ModelError(f"{what}, but the objective is for a different kind of model", how, key="objective")
    what += ", for which tunekit has no objective (it can only be loaded, adapted and called)"
    raise ModelError(what, "choose a causal language model or an encoder-decoder", key="model.name_or_path")


def row_problems(
    base: LoadedModel,
    processor: Processor,
    kind: RowKind,
    rows: Sequence[Rows],
    virtual_tokens: int = 0,
) -> list[Problem]:
    """The problems of rows that the model cannot read: too long for its positions, or with ids beyond its embedding."""
    tokenizer = processor.tokenizer
    if base.text is None or tokenizer is None:
        return []
    longest = max((longest_tokens(some, kind.layout) for some in rows), default=0) + virtual_tokens
    problems = list(position_problems(base, longest, virtual_tokens))
    for some in rows:
        problems += [] if problems else vocabulary_problems(base, tokenizer, some, kind.layout.token_parts)
    return problems


def longest_tokens(rows: Rows, layout: RowLayout | None = None) -> int:
    """The number of tokens in the longest sequence of the rows. A row can contain several sequences, such as a source
    and an answer, whose positions each start at 0."""
    sizes = np.asarray(rows.sizes)  # (rows, sizes)
    if layout is not None and layout.token_sizes is not None:
        sizes = sizes[:, list(layout.token_sizes)]
    return int(sizes.max(initial=0))


def vocabulary_problems(base: LoadedModel, tokenizer: Tokenizer, rows: Rows, parts: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem if a row contains a token id beyond the model's embedding. `parts`: the parts of a row with token
    ids."""
    assert base.text is not None  # row_problems checked it
    size = base.text.vocabulary_size
    if tokenizer.vocabulary_size <= size or not parts:
        return
    for index in range(len(rows)):
        row = rows[index]
        largest = max(int(row.parts[part].max(initial=0)) for part in parts)
        if largest >= size:
            text = tokenizer.token_text(largest)
            what = f"{row.origin} contains the token {text!r} ({largest}), but the model's embedding ends at {size - 1}"
            yield Problem(what, "use the tokenizer that belongs to the base", key="model.name_or_path")
            return


def position_problems(base: LoadedModel, longest_tokens: int, virtual_tokens: int = 0) -> Iterator[Problem]:
    """Yield a problem if the longest row has more tokens than the model's learned table of positions. `longest_tokens`
    includes the adapter's `virtual_tokens`."""
    table = base.family.learned_positions(base.net)
    if table is not None and longest_tokens > table:
        virtual = f" (including {virtual_tokens} virtual tokens of the adapter)" if virtual_tokens else ""
        what = f"the longest row has {longest_tokens} tokens{virtual}, too many for the model's {table} positions"
        if virtual_tokens >= table:
            yield Problem(what, f"set num_virtual_tokens to less than {table}", key="adapter.num_virtual_tokens")
        else:
            yield Problem(what, f"set data.max_length to at most {table - virtual_tokens}", key="data.max_length")
