"""Conversion of a model folder by CTranslate2, and log-probabilities of the result."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from ctranslate2 import Generator
from ctranslate2.converters import TransformersConverter


class FullConverter(TransformersConverter):  # type: ignore[misc]
    """CTranslate2's converter, extended. It also writes two numbers of Llama 3's position scaling (`rope`), which
    CTranslate2 reads."""

    rope: dict[str, Any] | None = None

    def _load(self) -> object:
        spec, rope = super()._load(), self.rope
        if rope is not None:
            factor, length = np.float32(rope["factor"]), np.int32(rope["original_max_position_embeddings"])
            for layer in spec.decoder.layer:  # whose class refuses new names
                object.__setattr__(layer.self_attention, "rotary_scaling_factor", factor)
                object.__setattr__(layer.self_attention, "original_max_position_embeddings", length)
        return spec


def complete(path: Path, epsilon: float | None) -> None:
    """Add the epsilon of norms to a converted config.json, and empty names for special tokens that the tokenizer
    lacks. Without these names, CTranslate2 cannot read the file."""
    config = json.loads(path.read_text("utf-8"))
    config |= {name: "" for name, value in config.items() if value is None and name.endswith("_token")}
    if epsilon is not None:
        config["layer_norm_epsilon"] = epsilon
    path.write_text(json.dumps(config, indent=2), "utf-8")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Convert a model and return nothing, or return all log-probabilities of rows, as the request says."""
    if "output" in request:
        converter = FullConverter(request["model"], copy_files=request["files"], low_cpu_mem_usage=True)
        converter.rope = request["rope"]
        converter.convert(request["output"], quantization=request["type"])
        complete(Path(request["output"]) / "config.json", request["epsilon"])
        return {}
    generator = Generator(request["model"], device="cpu", compute_type="default")
    return {
        f"values.{index}": np.array(generator.forward_batch([row], return_log_probs=True))[0]
        for index, row in enumerate(request["rows"])
    }
