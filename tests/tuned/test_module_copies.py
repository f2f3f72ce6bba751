"""Several runs adapt one loaded base at once, each in modules of its own, and leave the base as it was loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tunekit.adapters.attach import attach_adapter
from tunekit.model.load import LoadedModel, load_model
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.model import ModelSection
from tunekit.records import ExecutionSettings
from tunekit.tuned.network import TensorVersions, copy_modules, prepare_network


@pytest.fixture
def base(tiny_llama: Path) -> LoadedModel:
    return load_model(ModelSection(name_or_path=str(tiny_llama), dtype="float32"), device=torch.device("cpu"))


def test_a_run_in_a_twin_leaves_the_base_and_other_twins_as_they_were(base: LoadedModel) -> None:
    ids, settings = torch.arange(12)[None], LoraSettings(r=4, modules_to_save=("lm_head",))
    before, versions = base.net(ids).logits, TensorVersions(base)
    kinds, attributes = [type(m) for m in base.net.modules()], [set(vars(m)) for m in base.net.modules()]
    twins = [copy_modules(base) for _ in range(2)]
    for seed, twin in enumerate(twins):
        choice = ExecutionSettings(checkpointed_layers=1, mlp_tile_tokens=4)
        net = twin.net
        model = prepare_network(
            twin, choice, lambda net=net: attach_adapter(net, settings, seed=0, head_name="lm_head")
        )  # type: ignore[misc]
        assert model.adapter is not None
        with torch.no_grad():
            for tensor in model.adapter.trained().values():
                tensor.add_(0.1 * (seed + 1))
        net(ids).logits.sum().backward()
        net.train()
        twin.config.use_cache = True
    assert [type(module) for module in base.net.modules()] == kinds
    assert [set(vars(module)) for module in base.net.modules()] == attributes
    assert not any(p.requires_grad or p.grad is not None for p in base.net.parameters())
    assert not base.net.training
    assert base.config.use_cache is False
    assert torch.equal(base.net(ids).logits, before)
    one, two = (twin.net.eval()(ids).logits for twin in twins)
    assert not torch.equal(one, before)
    assert not torch.equal(one, two)
    assert versions.unchanged()


def test_a_twin_has_the_same_tensors(base: LoadedModel) -> None:
    tensors, twins = dict(base.net.named_parameters()), dict(copy_modules(base).net.named_parameters())
    assert all(twins[name] is tensor for name, tensor in tensors.items())


def test_changed_values_are_noticed(base: LoadedModel) -> None:
    versions, parameter = TensorVersions(base), next(base.net.parameters())
    with torch.no_grad():
        parameter.add_(1)
    assert not versions.unchanged()
    versions = TensorVersions(base)
    parameter.data = parameter.data.clone()
    assert not versions.unchanged()
