"""Whether rows fit a model: family, vocabulary, positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tunekit.contracts import EncodedRows, Objective
from tunekit.errors import ModelError, Problem
from tunekit.model.load import LoadedModel
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.recipe.recipe import supervised_objective


def check_family(base: LoadedModel, objective: Objective) -> LoadedModel:
    """The base again, if the objective is one of its family.

    Raises: ModelError.
    """
    if base.family.name == objective.family:
        return base
    article = "an" if base.family.reads_source else "a"
    what = f"{base.name_or_path} ({base.facts.model_type}) is {article} {base.family.text}"
    fitting = supervised_objective(base.family.name)
    if fitting is not None:
        method = fitting.method
        raise ModelError(
            f"{what}, and the objective is for another kind", f"write objective: {method}", key="objective"
        )
    raise ModelError(
        f"{what}, and no objective of this version reads what it computes: it can be loaded, adapted and called",
        "choose a causal language model or an encoder-decoder",
        key="model.name_or_path",
    )


def row_problems(
    base: LoadedModel, tokenizer: LoadedTokenizer, rows: Sequence[EncodedRows], virtual_tokens: int = 0
) -> list[Problem]:
    """Rows that the model cannot take: too long for its positions, or with ids beyond its embedding."""
    if base.family.reads_source and tokenizer.answer_start_id is None:
        what = f"{base.name_or_path} does not say with which token its answers begin"
        return [Problem(what, "write decoder_start_token_id into its config.json", key="model.name_or_path")]
    longest = max((longest_positions(base, some) for some in rows), default=0) + virtual_tokens
    problems = list(position_problems(base, longest, virtual_tokens))
    for some in rows:
        problems += [] if problems else vocabulary_problems(base, tokenizer, some)
    return problems


def longest_positions(base: LoadedModel, rows: EncodedRows) -> int:
    """Positions that the longest row takes; of an encoder-decoder, where each part counts anew, its longest part."""
    lengths = np.asarray(rows.lengths)  # (rows,)
    if not base.family.reads_source:
        return int(lengths.max(initial=0))
    answers = np.asarray(rows.supervised)  # (rows,), as many as positions of the decoder
    return int(np.maximum(lengths - answers - 1, answers).max(initial=0))


def vocabulary_problems(base: LoadedModel, tokenizer: LoadedTokenizer, rows: EncodedRows) -> Iterator[Problem]:
    """Ids in the rows beyond the model's embedding."""
    size = base.facts.vocabulary_size
    if tokenizer.vocabulary_size <= size:
        return
    for index in range(len(rows)):
        row = rows[index]
        largest = int(row.ids.max(initial=0))
        if largest >= size:
            text = tokenizer.token_text(largest)
            what = f"{row.origin} holds the token {text!r} ({largest}), but the model's embedding ends at {size - 1}"
            yield Problem(what, "use the tokenizer that belongs to the base", key="model.name_or_path")
            return


def position_problems(base: LoadedModel, longest_tokens: int, virtual_tokens: int = 0) -> Iterator[Problem]:
    """Rows longer than a learned table of positions, which cannot be looked up at all; `virtual_tokens` of them are the
    adapter's."""
    table = base.family.learned_positions(base.net)
    if table is not None and longest_tokens > table:
        own = f", {virtual_tokens} of them virtual" if virtual_tokens else ""
        what = f"the longest row has {longest_tokens} tokens{own}, and the model's positions end at {table}"
        if virtual_tokens >= table:
            yield Problem(what, f"make the prompt shorter than {table} tokens", key="adapter.num_virtual_tokens")
        else:
            yield Problem(what, f"set data.max_length to at most {table - virtual_tokens}", key="data.max_length")
