"""A tiny Whisper and sounds of telephone keys, made in process; their texts are the keys' names."""

from __future__ import annotations

import io
import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from tests.support.train_case import write_sections
from tunekit.formats.media import Media
from tunekit.model.storage.builtin import tiny_model_folder

TONES = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "make_tones"))
keys, NAMES, RATE = TONES["keys"], TONES["NAMES"], TONES["RATE"]  # the tiny model hears 16,000 samples a second
SECONDS = 2  # that it hears at once


def held_sound(text: str) -> Media:
    """The tones of a text as a WAV file's bytes."""
    stream = io.BytesIO()
    soundfile.write(stream, keys(text), RATE, format="WAV")
    return Media(f"{text}.wav", stream.getvalue())


def write_sounds(folder: Path, texts: Sequence[str], *, channels: int = 1, rate: int = RATE, **beside: Any) -> Path:
    """The folder, with a WAV file of each text and metadata.jsonl; `beside`: further columns, the same in each row."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, text in enumerate(texts):
        samples = np.repeat(keys(text, rate)[:, None], channels, axis=1)
        soundfile.write(folder / f"{number}.wav", samples, rate)
        lines.append(json.dumps({"file_name": f"{number}.wav", "text": text, **beside}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def texts(count: int) -> list[str]:
    """Texts of one to three keys, the same at every call."""
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(NAMES, generator.integers(1, 4))) for _ in range(count)]


def write_tiny_whisper(folder: Path, *, multilingual: bool = True, **changes: Any) -> Path:
    """Random, of two layers each side, one token a byte, and all the special tokens that Whisper has."""
    from transformers import (
        AutoTokenizer,
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    native = AutoTokenizer.from_pretrained(tiny_model_folder("builtin:tiny-llama"))
    native.chat_template = None
    times = [f"<|{0.02 * number:.2f}|>" for number in range(50 * SECONDS + 1)]
    special = ["<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>", "<|startofprev|>"]
    native.add_special_tokens({"additional_special_tokens": [*special, "<|notimestamps|>"]})
    native.add_tokens(times)
    ids = {token: native.convert_tokens_to_ids(token) for token in [*special, "<|notimestamps|>"]}
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    end = native.eos_token_id
    config = WhisperConfig(
        vocab_size=len(native),
        num_mel_bins=16,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_source_positions=50 * SECONDS,
        max_target_positions=64,
        decoder_start_token_id=ids["<|startoftranscript|>"],
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        suppress_tokens=None,
        **{"begin_suppress_tokens": None, "init_std": 0.2, **sizes, **changes},
    )
    torch.manual_seed(0)
    net = WhisperForConditionalGeneration(config)
    with torch.no_grad():  # large enough for a missing bias or norm to show
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    generation: dict[str, Any] = {
        "is_multilingual": multilingual,
        "max_length": 64,
        "prev_sot_token_id": ids["<|startofprev|>"],
    }
    generation |= {"no_timestamps_token_id": ids["<|notimestamps|>"], "return_timestamps": False}
    generation |= {"decoder_start_token_id": config.decoder_start_token_id, "eos_token_id": end, "pad_token_id": end}
    if multilingual:
        generation |= {"lang_to_id": {token: ids[token] for token in ("<|en|>", "<|de|>")}}
        generation |= {"task_to_id": {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}}
    net.generation_config = GenerationConfig(**generation)
    net.save_pretrained(folder)
    native.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16, chunk_length=SECONDS).save_pretrained(folder)
    return folder


def write_recipe(folder: Path, base: Path, sounds: Path, **sections: Any) -> Path:
    """A recipe over a folder of sounds, its sections changed as said."""
    values: dict[str, Any] = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {"train": str(sounds), "shuffle": False},
        "adapter": {"method": "lora", "r": 4, "alpha": 32},
        "objective": {"method": "speech", "language": "english"},
        "training": {"learning_rate": 2e-3, "max_steps": 3, "micro_batch_size": 4, "gradient_accumulation_steps": 1},
        "output": {"dir": "run"},
    }
    return write_sections(folder, values, sections)
