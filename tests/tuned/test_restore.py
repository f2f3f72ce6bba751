"""A base is as it was loaded after a run has put an adapter, checkpointing, tiles and kernels into it."""

from __future__ import annotations

from pathlib import Path

import torch

from tunekit.adapters.attach import attach_adapter
from tunekit.model.load import load_model
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.model import ModelSection
from tunekit.records import Choice
from tunekit.tuned.network import prepare_network
from tunekit.tuned.restore import NetworkSnapshot


def test_everything_that_a_run_puts_into_a_base_is_removed(tiny_llama: Path) -> None:
    base = load_model(ModelSection(name_or_path=str(tiny_llama), dtype="float32"), device=torch.device("cpu"))
    net, ids = base.net, torch.arange(12)[None]
    before, kinds = net(ids).logits, [type(module) for module in net.modules()]
    attributes = [set(vars(module)) for module in net.modules()]
    snapshot = NetworkSnapshot(net)
    settings = LoraSettings(r=4, modules_to_save=("lm_head",))
    for _ in range(2):
        choice = Choice(checkpointed_layers=1, mlp_tile_tokens=4)
        model = prepare_network(base, choice, lambda: attach_adapter(net, settings, seed=0, head_name="lm_head"))
        assert [type(module) for module in net.modules()] != kinds
        net(ids).logits.sum().backward()
        net.train()
        net.config.use_cache = True
        assert snapshot.restore()
        assert [type(module) for module in net.modules()] == kinds
        assert [set(vars(module)) for module in net.modules()] == attributes
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in net.parameters())
        assert not net.training
        assert net.config.use_cache is False
        assert torch.equal(net(ids).logits, before)
        assert model.adapter is not None


def test_values_that_were_changed_in_place_are_noticed(tiny_llama: Path) -> None:
    base = load_model(ModelSection(name_or_path=str(tiny_llama), dtype="float32"), device=torch.device("cpu"))
    snapshot = NetworkSnapshot(base.net)
    with torch.no_grad():
        next(base.net.parameters()).add_(1)
    assert not snapshot.restore()
