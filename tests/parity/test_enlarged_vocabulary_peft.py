"""Adapters that peft saved after the vocabulary was enlarged: the file holds embedding and head whole."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.conftest import write_tiny_llama
from tests.support.peft_case import close, move_from_start
from tunekit.adapters.folder.config import TENSORS_NAME
from tunekit.adapters.folder.read import attach_adapter_folder
from tunekit.adapters.several import AdapterSet
from tunekit.arithmetic.merge import merge
from tunekit.errors import AdapterError
from tunekit.model.load import load_model
from tunekit.recipe.model import ModelSection
from tunekit.targets.target import find_target

IDS, NEW = torch.tensor([[5, 264, 7, 266, 9]]), 4
CASES = {
    "saved": {"target_modules": ["q_proj"]},
    "adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "copied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_llama(tmp_path_factory.mktemp("base"))
    config = LlamaConfig.from_pretrained(folder)
    config.tie_word_embeddings = request.param
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def adapter_of_peft(base: Path, folder: Path, fields: dict[str, Any]) -> torch.Tensor:
    """Write it; returns its logits."""
    net: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    net.resize_token_embeddings(net.config.vocab_size + NEW)
    theirs = peft.get_peft_model(net, peft.LoraConfig(r=3, task_type="CAUSAL_LM", **fields)).eval()
    move_from_start([p for p in theirs.parameters() if p.requires_grad], 0.1)
    theirs.save_pretrained(str(folder))
    with torch.no_grad():
        logits: torch.Tensor = theirs(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_it_is_read_and_merged(base: Path, case: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    theirs = adapter_of_peft(base, tmp_path / "a", CASES[case])
    if case == "adapted" and "untied" in request.node.name:
        with pytest.raises(AdapterError, match="but none of the head; save the adapter again"):
            attach_adapter_folder(LlamaForCausalLM.from_pretrained(base), tmp_path / "a", head_name="lm_head")
        return
    model = load_model(ModelSection(name_or_path=str(base), dtype="float32"), device=torch.device("cpu"))
    attach_adapter_folder(model.net, tmp_path / "a", head_name="lm_head")
    with torch.no_grad():
        close(model.family.logits(model.net, {"input_ids": IDS}), theirs)
    merge(find_target(str(tmp_path / "a"), str(base), ["model.dtype=float32"]), tmp_path / "merged")
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        close(merged(input_ids=IDS).logits, theirs)


@pytest.mark.filterwarnings("ignore")
def test_the_base_s_own_rows_must_be_the_base_s(base: Path, tmp_path: Path) -> None:
    adapter_of_peft(base, tmp_path / "a", CASES["saved"])
    path = tmp_path / "a" / TENSORS_NAME
    tensors = load_file(path)
    tensors["base_model.model.model.embed_tokens.weight"][3] += 1
    save_file(tensors, path)
    model = load_model(ModelSection(name_or_path=str(base), dtype="float32"), device=torch.device("cpu"))
    with pytest.raises(AdapterError, match="changed copy of the base"):
        attach_adapter_folder(model.net, tmp_path / "a", head_name="lm_head")


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_share_a_base_do_not_change_it(base: Path, tmp_path: Path) -> None:
    adapter_of_peft(base, tmp_path / "a", CASES["saved"])
    net = LlamaForCausalLM.from_pretrained(base)
    several, attach = AdapterSet(net), partial(attach_adapter_folder, net, tmp_path / "a", head_name="lm_head")
    before = net.get_input_embeddings().weight
    with pytest.raises(AdapterError, match="enlarges the vocabulary of the base, which other adapters use too"):
        several.add("first", partial(attach, shares_base=True))
    assert net.get_input_embeddings().weight is before
    several.add("target", attach)
    with pytest.raises(AdapterError, match="'target' has enlarged the vocabulary"):
        several.add("second", attach)
