"""LoRA with biases of its own, and with tied weights kept tied: what peft writes is read, and peft reads ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.arithmetic.test_merge import write_base
from tests.support.peft_case import BASES, HEADS, SIZES, close, logits_of, move_from_start
from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.read import attach_adapter_folder, save_adapter_folder
from tunekit.arithmetic.lora_folder import read_lora_folder
from tunekit.arithmetic.merge import merge
from tunekit.errors import AdapterError
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.targets.target import find_target

EMBEDDING_RANK = {
    "rank_pattern": {"embed_tokens": 2}
}  # peft's head then has two ranks: of its tensors, and of its scaling


def make(tied: bool) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=HEADS, tie_word_embeddings=tied)).eval()


@pytest.mark.parametrize(
    ("tied", "fields"),
    [
        (False, {"target_modules": ["q_proj", "up_proj"], "lora_bias": True}),
        (True, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        (True, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
        (True, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
        (True, {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}),
        (True, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True, **EMBEDDING_RANK}),
        (True, {"target_modules": ["lm_head"], "ensure_weight_tying": True, "use_rslora": True, **EMBEDDING_RANK}),
        (True, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5], "ensure_weight_tying": True}),
        (False, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_peft_writes_is_read(tied: bool, fields: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(make(tied), peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **fields)).eval()
    move_from_start([p for p in theirs.parameters() if p.requires_grad], 0.1)
    theirs.save_pretrained(str(tmp_path))
    net = make(tied)
    attached = attach_adapter_folder(net, tmp_path, head_name="lm_head")
    close(logits_of(net, BASES["llama"]), logits_of(theirs, BASES["llama"]))
    if "rank_pattern" in fields:
        with pytest.raises(AdapterError, match=r"'lm_head' .* do not have rank 3; peft ties .* merge this adapter"):
            read_lora_folder(tmp_path)
    if "lora_bias" in fields:
        attached.detach()
        for name, layer in attached.layers.items():
            weight, bias = layer.merged(net.get_submodule(name).weight, None)
            plain = torch.nn.Linear(*weight.shape[::-1])
            plain.weight.data, plain.bias.data = weight.detach(), bias.detach()
            net.set_submodule(name, plain)
        close(logits_of(net, BASES["llama"]), logits_of(theirs, BASES["llama"]))


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_keeps_weights_tied_is_merged(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", tie_word_embeddings=True)
    fields: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}
    net: Any = LlamaForCausalLM.from_pretrained(base)
    theirs = peft.get_peft_model(net, peft.LoraConfig(r=3, task_type="CAUSAL_LM", **fields)).eval()
    move_from_start([p for p in theirs.parameters() if p.requires_grad], 0.1)
    theirs.save_pretrained(str(tmp_path / "a"))
    result = merge(find_target(str(tmp_path / "a"), str(base), ["model.dtype=float32"]), tmp_path / "merged")
    assert result.difference.largest < 1e-4
    merged: Any = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    close(logits_of(merged, BASES["llama"]), logits_of(theirs, BASES["llama"]))


def test_peft_reads_a_bias_of_ours(tmp_path: Path) -> None:
    net = make(False)
    attached = attach_adapter(net, LoraSettings(r=3, lora_bias=True), seed=0, head_name="lm_head")
    move_from_start(attached.trained().values(), 0.1)
    save_adapter_folder(attached, tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    theirs = peft.PeftModel.from_pretrained(make(False), str(tmp_path / "a")).eval()
    close(logits_of(theirs, BASES["llama"]), logits_of(net, BASES["llama"]))
