"""The tool that encoders.py compares with tunekit: transformers' Trainer with peft. Runs in the benchmark's own
environment.

    trainer.py SPECIFICATION      (a JSON file)

Specification: kind (classify, or speech: Whisper), model, init (an adapter folder to start from), dtype, config (fields
of TrainingArguments; None: its default), rows, steps_log, losses. rows is a file of JSON Lines: input_ids and label, or
audio and labels. The published loops are followed: transformers' text classification example, and PEFT's notebook of
Whisper. After each optimizer step a line is added to steps_log, with the number of tokens or of recordings so far.
"""

from __future__ import annotations

import json
import sys
import wave
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

SPECIFICATION = json.loads(Path(sys.argv[1]).read_text("utf-8"))
ROWS = [json.loads(line) for line in Path(SPECIFICATION["rows"]).read_text("utf-8").splitlines()]
RATE = 16_000
STEP = {"count": 0}


class Noting(TrainerCallback):
    """A callback that writes a line to the log after each step."""

    def on_step_end(self, arguments, state, control, **named):  # type: ignore[no-untyped-def]
        with open(SPECIFICATION["steps_log"], "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "tokens": STEP["count"]}) + "\n")


def classifier():  # type: ignore[no-untyped-def]
    """The arguments of a Trainer for text classification."""
    labels = 1 + max(row["label"] for row in ROWS)
    dtype = getattr(torch, SPECIFICATION["dtype"])
    model = AutoModelForSequenceClassification.from_pretrained(
        SPECIFICATION["model"], num_labels=SPECIFICATION.get("labels", labels), dtype=dtype
    )
    pad = DataCollatorWithPadding(AutoTokenizer.from_pretrained(SPECIFICATION["model"]))
    dataset = Dataset.from_dict({name: [row[name] for row in ROWS] for name in ("input_ids", "label")})
    return Trainer, TrainingArguments, model, dataset, pad, {}


def speech():  # type: ignore[no-untyped-def]
    """The arguments of a Seq2SeqTrainer for Whisper. Features are computed before the training, as in PEFT's
    notebook."""
    processor = WhisperProcessor.from_pretrained(SPECIFICATION["model"])
    dtype = getattr(torch, SPECIFICATION["dtype"])
    model = WhisperForConditionalGeneration.from_pretrained(SPECIFICATION["model"], dtype=dtype)
    model.config.use_cache = False
    features = [
        processor.feature_extractor(read(row["audio"]), sampling_rate=RATE).input_features[0].tolist() for row in ROWS
    ]
    dataset = Dataset.from_dict({"input_features": features, "labels": [row["labels"] for row in ROWS]})

    def collate(rows):  # type: ignore[no-untyped-def]
        named = [{"input_features": row["input_features"]} for row in rows]
        batch = processor.feature_extractor.pad(named, return_tensors="pt")
        batch["input_features"] = batch["input_features"].to(dtype)
        longest = max(len(row["labels"]) for row in rows)
        padded = [row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows]
        return {**batch, "labels": torch.tensor(padded)}

    more = {"remove_unused_columns": False, "label_names": ["labels"]}
    return Seq2SeqTrainer, Seq2SeqTrainingArguments, model, dataset, collate, more


def read(path: str) -> np.ndarray:
    """The samples of a 16-bit recording at Whisper's sample rate."""
    with wave.open(path) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32_768


def main() -> None:
    kind, arguments, base, dataset, collate, more = {"classify": classifier, "speech": speech}[SPECIFICATION["kind"]]()
    model = PeftModel.from_pretrained(
        base, SPECIFICATION["init"], is_trainable=True, autocast_adapter_dtype=SPECIFICATION["dtype"] == "float32"
    )
    config = {key: value for key, value in SPECIFICATION["config"].items() if value is not None}

    class Counting(kind):  # type: ignore[misc,valid-type]
        """Counts a batch when it is computed, because batches are made one step ahead."""

        def training_step(self, model, inputs, *others):  # type: ignore[no-untyped-def]
            mask = inputs.get("attention_mask")
            STEP["count"] += len(inputs["labels"]) if mask is None else int(mask.sum())
            return super().training_step(model, inputs, *others)

    trainer = Counting(
        model=model,
        args=arguments(**config, **more),
        train_dataset=dataset,
        data_collator=collate,
        callbacks=[Noting()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    Path(SPECIFICATION["losses"]).write_text(json.dumps(losses), encoding="utf-8")


if __name__ == "__main__":
    main()
