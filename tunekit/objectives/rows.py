"""What objectives share, and those over text: rows of token ids, answers by generation, and nothing to prepare.

Comes in: settings and a processor.  Goes out: RowObjective or TextObjective, which an objective's file makes whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tunekit.contracts import GREEDY, Batch, Gather, Objective, Processor, Row, Rows, Sampling, Tokenizer, Told, Window
from tunekit.data.encoding.encode import EncodeOptions
from tunekit.data.rendering.render import Renderer
from tunekit.files.cache_folder import hash_of
from tunekit.model.text.generation import generate_texts
from tunekit.recipe.bases.section import ObjectiveSettings
from tunekit.recipe.model import ModelSection


class TextEncoder:
    """A RowEncoder whose prompts are those of a Renderer."""

    def __init__(self, tokenizer: Tokenizer, options: EncodeOptions) -> None:
        self.tokenizer, self.train_on = tokenizer, options.train_on
        self.notices: Counter[str] = Counter()
        self.renderer = Renderer(tokenizer, options.train_on, options.template, self.notices)

    def examples(self, example: Any) -> Sequence[Any]:
        """One row an example."""
        return [example]

    def prompt(self, example: Any) -> tuple[list[int], str] | None:
        """Ids up to the last answer, as generation starts from them, and the answer's text; None for running text."""
        return self.renderer.prompt(example)

    def question(self, text: str) -> list[int]:
        """A user's turn where there is a chat template, else a text to go on with."""
        return self.renderer.question(text)

    def shown(self, asked: Sequence[int]) -> str:
        """The text of ids."""
        return self.tokenizer.decode(asked)


class RowObjective:
    """An Objective over rows of any kind: units are what its rows count as supervised."""

    packable = False
    metrics: Sequence[str] = ("loss",)
    logged: Sequence[str] = ()
    facts: Mapping[str, Any] = {}
    repeats = 1
    generation: Mapping[str, Any] = {}
    complete = True
    notes: Sequence[str] = ()

    def __init__(self, settings: ObjectiveSettings, processor: Processor | Tokenizer) -> None:
        self.name, self.family, self.example = settings.method, settings.family, settings.example
        self.reference = settings.reference
        self.fingerprint = hash_of([settings.model_dump(mode="json"), processor.fingerprint])

    def normalized(self, text: str) -> str:
        """As it is."""
        return text

    def section(self, model: ModelSection, seed: int = 0) -> ModelSection:
        """The base as it is."""
        return model

    def informed(self, rows: Sequence[Rows], template: str | None = None) -> Objective:
        """Rows tell it nothing."""
        return self  # type: ignore[return-value]

    def held_out(self) -> Objective:
        """Evaluation rows are measured as training rows are."""
        return self  # type: ignore[return-value]

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """The whole: a part of a picture shows something else; rows of text are cut."""
        return row

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """One row: pictures are all seen at one size; rows of text are laid end to end."""
        return [next(rows)]

    def laid_out(self, end_to_end: bool, shares_prefixes: bool = False) -> Objective:
        """Rows are laid out as they are asked for."""
        return self  # type: ignore[return-value]

    def shared(self, row: Row) -> int:
        """Every token is computed."""
        return 0

    def begin(self, model: object, rows: Sequence[Rows], told: Told) -> Mapping[str, str]:
        """Nothing is made before the first step."""
        return {}

    def parts_beside(self, model: object) -> list[nn.Module]:
        """Nothing is needed beside the net."""
        return []

    def rehearse(self, model: object, batch: Batch) -> None:
        """Nothing is made beside the steps."""

    def pictures(self, model: object, told: Told) -> list[NDArray[np.uint8]]:
        """None are drawn."""
        return []

    def prepare(self, model: object, window: Window, gather: Gather = list) -> Window:
        """Nothing to prepare."""
        return window

    def measuring(self, model: object, rows: Rows, batches: Iterable[Batch], gather: Gather) -> Objective:
        """Evaluation rows are measured one by one."""
        return self  # type: ignore[return-value]

    def units(self, batch: Batch) -> Tensor:
        """(1,) float64: what the batch's rows count as supervised."""
        return torch.tensor([float(batch.supervised)], dtype=torch.float64)


class TextObjective(RowObjective):
    """An Objective over rows of text."""

    metrics: Sequence[str] = ("loss", "perplexity")

    def __init__(self, settings: ObjectiveSettings, tokenizer: Tokenizer) -> None:
        super().__init__(settings, tokenizer)
        self.tokenizer = tokenizer

    def answer(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        batch_size: int,
        template: str | None = None,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """The continuation of each prompt."""
        found = generate_texts(
            model.base,
            self.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            adapt=model.adapted,
            virtual_tokens=model.virtual_tokens,
            template=template,
            sampling=sampling,
        )
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in found]


def put_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a whole text."""
    inner, whole = tokenizer.encode("a"), tokenizer.encode_source("a")
    starts = [at for at in range(len(whole)) if whole[at : at + len(inner)] == inner]
    return (whole[: starts[0]], whole[starts[0] + len(inner) :]) if inner and starts else ([], [])


def fill_with(rows: Iterator[Row], size: int, objective: Objective) -> list[Row]:
    """Rows one after the other until they are so large together, the last of them cut."""
    found: list[Row] = []
    while size:
        row = next(rows)
        found.append(objective.cut(row, 0, min(size, row.size)))
        size -= found[-1].size
    return found
