"""BOFT folders of peft without its CUDA extension, which then computes one factor, whatever its configuration says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tunekit.adapters.folder.read import attach_adapter_folder

peft = pytest.importorskip("peft")


def test_the_factors_are_those_of_the_tensors(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: None)
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["q_proj"])
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    theirs = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "boft_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    theirs.save_pretrained(tmp_path)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
    ours = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    attach_adapter_folder(ours, tmp_path, head_name="lm_head")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=1e-5)
