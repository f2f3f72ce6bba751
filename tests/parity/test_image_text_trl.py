"""Rows with images against TRL's collator, which runs the processor itself: ids, labels, types, pixels and grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from tests.support.image_text_case import VISION_TOKENS, write_image_text
from tunekit.contracts import Objective
from tunekit.data.encoding.images import png_bytes
from tunekit.data.reading.first import format_maker
from tunekit.model.families import make_family
from tunekit.objectives.base import make_objective
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.sft import SftSettings

ROWS = pytest.mark.parametrize("rows", [40, pytest.param(500, marks=pytest.mark.slow)])
WORDS = ["a", "cat", "<b>", "über", "\n\n", "  two", "say:", "1,5", "<|im_end", "😀"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_text("qwen2_5_vl", tmp_path_factory.mktemp("qwen"), marked=True)


@pytest.fixture(scope="module")
def objective(folder: Path) -> Objective:
    processor = make_family("causal").processor(ModelSection(name_or_path=str(folder)))
    return make_objective(SftSettings(), processor)


def random_turns(numbers: np.random.Generator, images: list[Any], turns: int) -> list[dict[str, Any]]:
    """A conversation whose texts have places for these images, or plain texts: TRL puts the images first then."""
    texts = ["".join(numbers.choice(WORDS, numbers.integers(1, 6))).strip() or "x" for _ in range(turns)]
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)
    ]
    if numbers.random() < 0.5:
        return messages
    for message in messages:
        message["content"] = [{"type": "text", "text": message["content"]}]
    for _ in images:
        parts = messages[numbers.integers(turns)]["content"]
        parts.insert(numbers.integers(len(parts) + 1), {"type": "image"})
    return messages


def random_images(numbers: np.random.Generator) -> list[np.ndarray]:
    sizes = numbers.integers(16, 130, (numbers.integers(4), 2))
    return [numbers.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def check(objective: Objective, ours: dict[str, Any], format_name: str, theirs: dict[str, Any], images: Any) -> int:
    """Compare one row with TRL's batch of this row. Returns the number of trained tokens."""
    rows: Any = objective.rows
    row = rows.encode(format_maker(format_name)(ours), "rows:1")
    assert theirs["input_ids"][0].tolist() == row.parts["ids"].tolist()
    assert theirs["attention_mask"].all()
    labels = np.where(row.parts["trained"], row.parts["ids"], -100)
    markers = torch.isin(theirs["input_ids"], torch.tensor(rows.tokenizer.encode("".join(VISION_TOKENS[:3]))))
    assert theirs["labels"].masked_fill(markers, -100)[0].tolist() == labels.tolist()  # TRL trains on them in answers
    if images:
        inputs = [rows.processor.inputs(image) for image in images]
        for name in ("pixel_values", "image_grid_thw"):
            assert torch.equal(torch.cat([each[name] for each in inputs]), theirs[name])
        assert theirs["mm_token_type_ids"][0].tolist() == rows._token_types(row).tolist()
    return int(row.supervised)


@ROWS
def test_conversations_equal_trls(rows: int, folder: Path, objective: Objective) -> None:
    processor, numbers = AutoProcessor.from_pretrained(folder), np.random.default_rng(0)
    processor.tokenizer.pad_token = "<|endoftext|>"
    collate = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    trained = 0
    for _ in range(rows):
        images = random_images(numbers)
        messages = random_turns(numbers, images, 2 * int(numbers.integers(1, 3)))
        batch = collate([{"messages": messages, "images": [Image.fromarray(image) for image in images]}])
        row = {"messages": messages, "images": [{"bytes": png_bytes(image), "path": None} for image in images]}
        trained += check(objective, row, "chat", batch, images)
    assert trained > 5 * rows


@ROWS
def test_prompts_and_completions_equal_trls(rows: int, folder: Path, objective: Objective) -> None:
    """But for the line break that the template writes after the last turn, which TRL trains on."""
    processor, numbers = AutoProcessor.from_pretrained(folder), np.random.default_rng(1)
    processor.tokenizer.pad_token = "<|endoftext|>"
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    for _ in range(rows):
        images = random_images(numbers)
        prompt = random_turns(numbers, images, 1)
        answer = [{"role": "assistant", "content": "yes"}]
        pixels = [Image.fromarray(image) for image in images]
        batch = collate([{"prompt": prompt, "completion": list(answer), "images": pixels}])
        batch["labels"][0, -1] = -100
        sources = [{"bytes": png_bytes(image), "path": None} for image in images]
        check(
            objective, {"prompt": prompt, "completion": answer, "images": sources}, "prompt_completion", batch, images
        )
