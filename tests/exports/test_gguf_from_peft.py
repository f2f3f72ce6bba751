"""GGUF files of adapters that peft wrote: bases in several files and 16-bit types, and vocabularies that grew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.arithmetic.test_merge import write_base
from tests.exports.test_gguf import evidence, exportable, interleaved, read
from tunekit.exports import gguf
from tunekit.exports.format import Options

PATTERNS = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}
ADDED = 3  # tokens of a vocabulary that grew


def write_adapter(base: Path, folder: Path, added: int = 0, **settings: Any) -> dict[str, np.ndarray]:
    """An adapter with random values; returns the merged weights as peft computes them in float32."""
    net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if added:
        net.resize_token_embeddings(net.config.vocab_size + added, mean_resizing=False)
    model: Any = get_peft_model(net, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert isinstance(model, PeftModel)
    model.save_pretrained(folder)
    return {name: tensor.numpy() for name, tensor in model.merge_and_unload().state_dict().items()}  # type: ignore[operator]


@pytest.mark.parametrize(("dtype", "stored"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_a_base_in_several_files_of_16_bits(installed: None, tmp_path: Path, dtype: torch.dtype, stored: str) -> None:
    base = write_base(tmp_path / "base", "llama", dtype)
    net = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    (base / "model.safetensors").unlink()
    net.save_pretrained(base, max_shard_size="60KB")
    assert len(list(base.glob("model-*.safetensors"))) > 2
    merged = write_adapter(base, tmp_path / "adapter", **PATTERNS)
    gguf.write(exportable(tmp_path / "adapter"), tmp_path / "exact.gguf", evidence(), Options(type="F32"))
    gguf.write(exportable(tmp_path / "adapter"), tmp_path / "own.gguf", evidence(), Options(merged=True))
    (tensors, _), (own, _) = read(tmp_path / "exact.gguf"), read(tmp_path / "own.gguf")
    layer = "model.layers.1."
    expected = {
        "blk.1.attn_q.weight": interleaved(merged[f"{layer}self_attn.q_proj.weight"], 4),
        "blk.1.attn_v.weight": merged[f"{layer}self_attn.v_proj.weight"],
        "blk.1.attn_output.weight": merged[f"{layer}self_attn.o_proj.weight"],
        "blk.1.ffn_down.weight": merged[f"{layer}mlp.down_proj.weight"],
        "output.weight": merged["lm_head.weight"],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(tensors[name][0], values, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(own[name][0], values, rtol=2**-8, atol=1e-6, err_msg=name)
        assert own[name][1] == stored


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_grew(installed: None, tmp_path: Path, tied: bool) -> None:
    base = write_base(tmp_path / "base", "llama", tie_word_embeddings=tied)
    merged = write_adapter(base, tmp_path / "adapter", ADDED, **PATTERNS)
    target = exportable(tmp_path / "adapter")
    assert any("cannot hold" in str(problem) for problem in gguf.problems(target, Options()))
    gguf.write(target, tmp_path / "model.gguf", evidence(), Options(type="F32"))
    tensors, facts = read(tmp_path / "model.gguf")
    np.testing.assert_allclose(tensors["token_embd.weight"][0], merged["model.embed_tokens.weight"], atol=2e-6)
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    np.testing.assert_allclose(head[0], merged["lm_head.weight"], atol=2e-6)
    assert len(facts["tokenizer.ggml.tokens"]) == len(facts["tokenizer.ggml.token_type"]) == len(head[0]) == 270 + ADDED
