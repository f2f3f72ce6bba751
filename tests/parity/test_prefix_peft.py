"""Prefix tuning and LLaMA-Adapter against peft: the checks of every cell that peft supports too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

from tests.support import peft_case
from tests.support.peft_case import (
    BASES,
    IDS,
    SPREAD,
    VOCABULARY,
    Base,
    Cell,
    close,
    gradients_of,
    logits_of,
    move_from_start,
    peft_reads,
    peft_refuses,
    run_cell,
    tunekit_reads,
)
from tunekit.adapters.attach import attach_adapter
from tunekit.errors import ModelError
from tunekit.recipe.adapters.llama_adapter import LlamaAdapterSettings
from tunekit.recipe.adapters.prefix import PrefixSettings

NO_MERGE = {"merged": "keys and values are no change of a weight"}
IN_FILES = "prompt_embeddings"
LENGTH = 3


def make_bart() -> nn.Module:
    """Positions from a table, which its decoder looks up by itself."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    layers = {"encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(**sizes, **layers, init_std=SPREAD, max_position_embeddings=64, forced_eos_token_id=None)
    net: nn.Module = BartForConditionalGeneration(config).eval()
    return net


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft reads a prefix for what a task makes of it, so that encoder-decoders need theirs."""
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :7] + 40}
    bart = Base(make_bart, "lm_head", "SEQ_2_SEQ_LM", (), (), (), inputs)
    monkeypatch.setitem(BASES, "t5", replace(BASES["t5"], task_type="SEQ_2_SEQ_LM"))
    monkeypatch.setitem(BASES, "bart", bart)
    plain = peft_case.file_key
    monkeypatch.setattr(peft_case, "file_key", lambda name, tensors: _key(name, tensors, plain))


def _key(name: str, tensors: dict[str, torch.Tensor], plain: Callable[..., str]) -> str:
    return IN_FILES if name.startswith("prompt_encoder.") and IN_FILES in tensors else plain(name, tensors)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral", "bart"])
def test_prefix(family: str, tmp_path: Path) -> None:
    ours = PrefixSettings(num_virtual_tokens=LENGTH, init="random")
    theirs = peft.PrefixTuningConfig(num_virtual_tokens=LENGTH)
    cell = run_cell(ours, theirs, family, tmp_path, refused=NO_MERGE)
    assert not cell.failures, cell.failures


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral", "bart"])
@pytest.mark.parametrize("row", ["projection"])
def test_prefix_with_a_projection(row: str, family: str, tmp_path: Path) -> None:
    """Encoders tensor by tensor; files hold what they make, and are read as that."""
    base, cell = BASES[family], Cell(method="prefix", row=row, family=family, refused=dict(NO_MERGE))
    settings = PrefixSettings(num_virtual_tokens=LENGTH, prefix_projection=True, encoder_hidden_size=10)
    fields = {"num_virtual_tokens": LENGTH, "prefix_projection": True, "encoder_hidden_size": 10}
    theirs = peft.get_peft_model(base.make(), peft.PrefixTuningConfig(task_type=base.task_type, **fields)).eval()
    encoder = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    move_from_start(encoder.values(), 0.2)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours = attach_adapter(base.make(), settings, seed=1, head_name=base.head_name)
    expected, plain = logits_of(theirs, base).detach(), logits_of(base.make(), base)

    def same_logits() -> None:
        ours.load_state({name.replace(".default", ""): tensor for name, tensor in encoder.items()})
        assert (expected - plain).abs().max() > 1e-3
        close(logits_of(ours.net, base), expected)
        torch.testing.assert_close(ours.file_tensors()[IN_FILES], tensors[IN_FILES], rtol=0, atol=1e-6)

    def same_gradients() -> None:
        left, right = gradients_of(ours.net, ours.trained(), base), gradients_of(theirs, encoder, base)
        for name, gradient in right.items():
            scale = max(1.0, float(gradient.abs().max()))
            close(left[name.replace(".default", "")] / scale, gradient / scale)

    cell.check("forward", same_logits)
    cell.check("gradients", same_gradients)
    cell.check("written", lambda: peft_reads(settings, base, tmp_path / "ours", 0.2))
    cell.check("read", lambda: tunekit_reads(tmp_path / "theirs", base, tensors, expected))
    assert not cell.failures, cell.failures


def test_a_classifier_of_bert_is_refused() -> None:
    """By peft too, on the releases of transformers of which BERT has no cache to pass keys and values in."""
    base = BASES["bert"]

    def of_peft() -> None:
        config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=LENGTH)
        logits_of(peft.get_peft_model(base.make(), config), base)

    for row in ("", "projection") if Version(transformers.__version__) >= Version("5.24") else ():
        peft_refuses(
            "prefix", "bert", "peft passes keys and values as a cache, which BERT has none of", of_peft, row=row
        )
    with pytest.raises(ModelError, match=r"bert .*has no causal self-attention.*adapter\.method|adapter\.method.*bert"):
        attach_adapter(base.make(), PrefixSettings(init="random"), seed=0, head_name="classifier")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("row", ["all layers", "upper layer"])
def test_llama_adapter(row: str, family: str, tmp_path: Path) -> None:
    layers = 2 if row == "all layers" else 1
    ours = LlamaAdapterSettings(adapter_len=LENGTH, adapter_layers=None if layers == 2 else 1)
    theirs = peft.AdaptionPromptConfig(adapter_len=LENGTH, adapter_layers=layers)
    cell = run_cell(ours, theirs, family, tmp_path, refused={"merged": "attention to trained tokens is no weight"})
    assert not cell.failures, cell.failures


@pytest.mark.parametrize("family", ["t5", "bert", "mixtral", "bart"])
@pytest.mark.parametrize("row", ["all layers", "upper layer"])
def test_llama_adapter_is_refused_where_peft_refuses_it(row: str, family: str) -> None:
    base = BASES[family]
    config: Any = peft.AdaptionPromptConfig(task_type=base.task_type, adapter_len=LENGTH, adapter_layers=1)
    reason = "peft defines it for llama, mistral and gpt2"
    peft_refuses("llama_adapter", family, reason, lambda: peft.get_peft_model(base.make(), config), row=row)
    with pytest.raises(ModelError, match=f"{family} has no LLaMA-Adapter"):
        attach_adapter(base.make(), LlamaAdapterSettings(), seed=0, head_name=base.head_name)
