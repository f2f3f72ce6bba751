"""Layers whose matrix the model's own code reads: found, kept dense by packing, merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.architectures.tiny import make_tiny, write_tiny
from tunekit.model.load import load_model
from tunekit.model.quantized.weights import packed_layers
from tunekit.model.storage.rewrite import Rewriter
from tunekit.model.uncalled import skipped_modules, uncalled_layers
from tunekit.recipe.model import ModelSection

IDS = torch.arange(3, 20)[None]


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        *[("mamba", {"dt_proj"}), ("jamba", {"dt_proj"}), ("bloom", set()), ("llama", set())],
        ("gemma3n_text", {"prediction_coefs", "correction_coefs"}),
    ],
)
def test_they_are_read_from_the_code(model_type: str, expected: set[str]) -> None:
    with torch.device("meta"):
        net = make_tiny(model_type)
    assert {name.rpartition(".")[2] for name in uncalled_layers(dict(net.named_modules()))} == expected


@pytest.mark.parametrize("model_type", ["mamba", "jamba", "rwkv", "gemma3n_text", "hunyuan_v1_moe"])
def test_a_packed_model_computes(model_type: str, tmp_path: Path) -> None:
    folder = write_tiny(model_type, tmp_path / "model")
    section = ModelSection(name_or_path=str(folder), dtype="float32", quantization="nf4")
    model = load_model(section, device=torch.device("cpu"))
    packed = packed_layers(model.net)
    assert packed
    assert not {name for name in packed if name.endswith("dt_proj")}
    logits = model.family.logits(model.net, {"input_ids": IDS})
    plain = make_tiny(model_type)(input_ids=IDS, use_cache=False).logits
    assert 0 < (logits - plain).abs().mean() < 0.5 * plain.std()
    rewriter = Rewriter(section, "dequantized")
    assert {name for name in rewriter.modules if rewriter.is_packed(name)} == set(packed)


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("mllama", ["model.language_model.layers.1"]),
        ("deepseek_v32", ["model.layers.0.self_attn.indexer", "model.layers.1.self_attn.indexer"]),
        ("llama", []),
    ],
)
def test_modules_that_text_does_not_train_are_found(model_type: str, expected: list[str]) -> None:
    with torch.device("meta"):
        net = make_tiny(model_type)
    assert [name for name in skipped_modules(net) if "vision" not in name] == expected
