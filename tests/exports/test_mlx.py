"""`tunekit export --to mlx`: adapters in mlx-lm's layout, read here by its own formula."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.arithmetic.test_merge import logits_of, merged_logits
from tests.arithmetic.test_normalise import by_peft
from tunekit.errors import InputError
from tunekit.export import export_verb
from tunekit.exports.format import Options
from tunekit.exports.mlx import problems
from tunekit.exports.programs.program import find_program
from tunekit.model.storage.portable import make_portable

pytest.importorskip("peft")
FLOAT32 = ["model.dtype=float32"]
TIED = {"tie_word_embeddings": True}


def fused_as_mlx_does(base: Path, adapter: Path) -> Tensor:
    """The logits of W + scale (lora_b^T lora_a^T), for an embedding E + scale (lora_a lora_b), as mlx_lm.fuse."""
    net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    scale = json.loads((adapter / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    tensors = load_file(adapter / "adapters.safetensors")
    for name in {key.rpartition(".")[0] for key in tensors}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]  # (I, R), (R, O)
        is_gpt2 = net.config.model_type == "gpt2"
        module = net.get_submodule(name.replace("model.", "transformer.", 1) if is_gpt2 else name)
        as_stored = is_gpt2 or isinstance(module, torch.nn.Embedding)  # (I, O), where mlx's Linear is (O, I)
        module.weight.data += scale * (a @ b if as_stored else b.t() @ a.t())
    return logits_of(net)


def adapter_by_peft(folder: Path, model_type: str, *, portable: bool = True, **values: Any) -> Tensor:
    """The folders base/ and adapter/, and PEFT's logits. GPT-2's tensors have the hub's names.

    `portable`: whether mlx-lm reads the base's configuration rightly.
    """
    expected = logits_of(by_peft(folder, model_type, **values))
    if model_type == "gpt2":
        file = folder / "base" / "model.safetensors"
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    if portable:
        make_portable(folder / "base")
    return expected


ADAPTERS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "plain": ("qwen2", {}, ["mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj"]),
    "patterns": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 1}},
        ["mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj"],
    ),
    "one layer": ("llama", {"layers_to_transform": [1], "target_modules": ["q_proj"]}, ["self_attn.q_proj"]),
    "pissa": ("llama", {"init_lora_weights": "pissa", "target_modules": ["q_proj"]}, ["self_attn.q_proj"]),
    "ends": ("qwen2", {"target_modules": ["embed_tokens", "lm_head"]}, ["lm_head", "model.embed_tokens"]),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, ["attn.c_attn"]),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_written_as_mlx_reads_it(name: str, tmp_path: Path) -> None:
    model_type, values, keys = ADAPTERS[name]
    expected = adapter_by_peft(tmp_path, model_type, **values)
    export_verb(str(tmp_path / "adapter"), "mlx", str(tmp_path / "out"), certify=False, overrides=FLOAT32)
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    rank = {"patterns": 9, "pissa": 8}.get(name, 4)
    assert fields["lora_parameters"] == {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys}
    assert (fields["fine_tune_type"], fields["num_layers"]) == ("lora", 2)
    assert fields["model"] == "base"  # no path of this machine
    torch.testing.assert_close(fused_as_mlx_does(tmp_path / "base", tmp_path / "out"), expected, rtol=0, atol=2e-5)


MERGED: dict[str, tuple[str, dict[str, Any], str]] = {
    "tied embedding": ("llama", {"target_modules": ["embed_tokens"], "base": TIED}, "changes only model.embed_tokens"),
    "biases": ("qwen2", {"bias": "lora_only"}, "the adapter trains model.layers.0.self_attn.q_proj.base_layer.bias"),
    "a base that mlx reads wrongly": (
        "qwen2",
        {},
        "rope_parameters is not read, so the model is computed with rope_theta",
    ),
    "a base without n_ctx": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, "gpt2 needs n_ctx"),
    "other names": (
        "gpt_neox",
        {"target_modules": ["query_key_value"], "base": {"intermediate_size": 256}},
        "name the layers of gpt_neox",
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", MERGED)
def test_what_mlx_does_not_hold_is_merged_with_the_reason(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_type, values, reason = MERGED[name]
    expected = adapter_by_peft(tmp_path, model_type, portable="a base" not in name, **values)
    export_verb(str(tmp_path / "adapter"), "mlx", str(tmp_path / "out"), certify=False, overrides=FLOAT32)
    assert reason in " ".join(capsys.readouterr().out.split())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("n_ctx") == config.get("n_positions")  # GPT-2's
    torch.testing.assert_close(merged_logits(tmp_path / "out"), expected, rtol=0, atol=2e-5)


def test_what_mlx_cannot_read_even_merged_is_refused(tmp_path: Path) -> None:
    """mlx-lm's gpt2 and gemma have no head of their own."""
    adapter_by_peft(tmp_path, "gpt2", target_modules=["wte"])
    with pytest.raises(InputError, match="mlx-lm's gpt2 uses its embedding as head"):
        export_verb(str(tmp_path / "adapter"), "mlx", str(tmp_path / "out"), certify=False, overrides=FLOAT32)
    by_peft(tmp_path / "prefix", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(InputError, match=r"reads tensors with names such as h\.0\.attn"):
        export_verb(str(tmp_path / "prefix" / "adapter"), "mlx", str(tmp_path / "out"), certify=False)
    assert not (tmp_path / "out").exists()


def test_code_of_the_base_that_older_mlx_runs_needs_trust() -> None:
    model = SimpleNamespace(trust_remote_code=False)
    base: Any = SimpleNamespace(family="causal", config={"model_file": "evil.py"}, target=SimpleNamespace(model=model))
    (problem,) = problems(base, Options())
    assert "model_file" in problem.what


def test_a_model_that_mlx_computes_otherwise_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another activation is refused; with a window, the length is printed up to which mlx-lm is right."""
    by_peft(tmp_path, "mistral", base={"hidden_act": "gelu"})
    with pytest.raises(
        InputError, match="cannot compute this model: feed-forward layers use silu instead of hidden_act gelu"
    ):
        export_verb(str(tmp_path / "adapter"), "mlx", str(tmp_path / "out"), certify=False, overrides=FLOAT32)
    adapter_by_peft(tmp_path / "window", "mistral", base={"sliding_window": 20})
    for merged in (False, True):
        options, output = Options(merged=merged), tmp_path / f"out{merged}"
        export_verb(
            str(tmp_path / "window" / "adapter"), "mlx", str(output), None, options, certify=False, overrides=FLOAT32
        )
        printed = " ".join(capsys.readouterr().out.split())
        assert "right up to 20 tokens: mlx-lm ignores the sliding window" in printed
        assert (output / "adapter_config.json").exists() != merged


@pytest.mark.slow
@pytest.mark.skipif(find_program("mlx") is None, reason="MLX is not installed: scripts/certify mlx")
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2"])
def test_mlx_computes_what_torch_computes(model_type: str, tmp_path: Path) -> None:
    targets = {"gpt2": ["c_attn", "c_fc"], "phi3": ["qkv_proj", "down_proj"]}
    values = {"target_modules": targets.get(model_type, ["q_proj", "down_proj"]), "rank_pattern": {"layers.0": 2}}
    base = {"num_hidden_layers": 6} if "gemma" in model_type else {}  # with a layer of full attention
    adapter_by_peft(tmp_path, model_type, fan_in_fan_out=model_type == "gpt2", base=base, **values)
    export_verb(str(tmp_path / "adapter"), "mlx", str(tmp_path / "out"), certify=True, overrides=FLOAT32)
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())["certificate"]
    assert certificate["parts"]["base + adapter"]["largest"] < 1e-3
