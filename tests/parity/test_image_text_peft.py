"""Rows with images against transformers + peft by hand: the processor's own padded batch, in the served class."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

from tests.support.image_text_case import TOKENS, write_image_rows, write_image_text
from tests.support.train_case import records, train, write_recipe
from tunekit.adapters.folder.config import tensors_path
from tunekit.contracts import IGNORED

STEPS, RATE = 10, 1e-3
ROWS = 4 * STEPS
ADAPTED = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(autouse=True)
def without_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package num2words, which SmolVLM's processor needs for videos alone, is not installed."""
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str)


def peft_model(folder: Path, adapter: Path) -> Any:
    """peft's model with random values in both factors, saved as the adapter from which the run starts."""
    net = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32)
    entries = rf"model\.(language_model|text_model)\..*({'|'.join(ADAPTED)})"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=entries, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(net, config)
    model.save_pretrained(str(adapter))
    return model


def processed(processor: Any, rows: list[dict[str, Any]], folder: Path) -> dict[str, torch.Tensor]:
    """The processor's own batch, padded, with labels."""
    if type(processor).__name__ == "PaliGemmaProcessor":
        return by_hand(processor, rows, folder)
    conversations = [
        [
            {"role": message["role"], "content": [_part(part, folder) for part in parts]}
            for message in row["messages"]
            for parts in [message["content"] if isinstance(message["content"], list) else [message["content"]]]
        ]
        for row in rows
    ]
    kwargs = {"padding": True, "padding_side": "right", "add_special_tokens": False, "return_mm_token_type_ids": True}
    render = partial(processor.apply_chat_template, conversations, tokenize=True, return_dict=True)
    batch = render(return_tensors="pt", processor_kwargs=dict(kwargs))
    # apart, because Idefics 3's processor fails to make tensors of it
    masks = render(return_assistant_tokens_mask=True, processor_kwargs=dict(kwargs))["assistant_masks"]
    trained = torch.tensor(masks).bool() & batch["attention_mask"].bool()
    types = batch.get("mm_token_type_ids", batch.get("token_type_ids"))
    batch["labels"] = batch["input_ids"].masked_fill(~trained | (types != 0), IGNORED)
    return dict(batch)


def by_hand(processor: Any, rows: list[dict[str, Any]], folder: Path) -> dict[str, torch.Tensor]:
    """The batch for PaliGemma, whose processor has no conversations: tokens before the first answer have type 0."""
    tokenizer, ids, labels = processor.tokenizer, list[list[int]](), list[list[int]]()
    image = processor.image_token * processor.image_seq_length
    for row in rows:
        ids.append([])
        labels.append([])
        for message in row["messages"]:
            parts = message["content"] if isinstance(message["content"], list) else [message["content"]]
            texts = [_part(part, folder).get("text", image) for part in parts]
            pieces = [f"<|im_start|>{message['role']}\n", "".join(texts) + "<|im_end|>", "\n"]
            for at, piece in enumerate(pieces):
                new = tokenizer.encode(piece, add_special_tokens=False)
                ids[-1] += new
                labels[-1] += new if at == 1 and message["role"] == "assistant" else [IGNORED] * len(new)
    padded = [torch.nn.utils.rnn.pad_sequence([torch.tensor(each) for each in some], True, value)
              for some, value in ((ids, 0), (labels, IGNORED))]  # fmt: skip
    batch = {"input_ids": padded[0], "labels": padded[1], "token_type_ids": (padded[1] >= 0).long().cummax(1).values}
    batch["attention_mask"] = torch.tensor([[at < len(each) for at in range(padded[0].shape[1])] for each in ids])
    paths = [part["image"] for row in rows for part in row["messages"][0]["content"] if "image" in part]
    pixels = [processor.image_processor(Image.open(folder / path), return_tensors="pt") for path in paths]
    return batch | ({"pixel_values": torch.cat([each["pixel_values"] for each in pixels])} if pixels else {})


def _part(part: Any, folder: Path) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "path": str(folder / part["image"])} if part["type"] == "image" else part


@pytest.mark.sampled(2)
@pytest.mark.parametrize("model_type", TOKENS)
def test_ten_steps_equal_peft_on_the_processors_batch(model_type: str, tmp_path: Path) -> None:
    folder = write_image_text(model_type, tmp_path / "model", marked=True)
    model = peft_model(folder, tmp_path / "adapter")
    training = {"epochs": None, "max_steps": STEPS, "gradient_accumulation_steps": 2, "scheduler": "constant"}
    training |= {"learning_rate": RATE, "warmup_ratio": 0.0, "weight_decay": 0.0}
    sections = {"data": {"eval": None, "shuffle": False, "max_length": 512}, "training": training}
    adapter = {"init_from": str(tmp_path / "adapter"), "alpha": 8, "dropout": 0.0, "target_modules": list(ADAPTED)}
    path = write_recipe(tmp_path, folder, adapter=adapter, **sections)
    rows = [json.loads(line) for line in write_image_rows(tmp_path, ROWS).read_text().splitlines()]
    run = train(path)

    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.pad_token = "<|endoftext|>"
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0)
    own = [record for record in records(run) if "loss" in record]
    for step, record in enumerate(own):
        batches = [processed(processor, rows[4 * step + at :][:2], tmp_path) for at in (0, 2)]
        count = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        total = torch.zeros(())
        for batch in batches:
            labels = batch.pop("labels")
            logits = model(**batch).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / count
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert record["supervised_tokens"] == count
        assert record["loss"] == pytest.approx(float(total), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    result = load_file(tensors_path(run / "adapter"))
    ours = torch.cat([result[name.replace(".default", "")].flatten() for name in trained])
    theirs = torch.cat([tensor.detach().flatten() for tensor in trained.values()])
    assert float((ours - theirs).norm()) < 1e-5 * float(theirs.norm())
