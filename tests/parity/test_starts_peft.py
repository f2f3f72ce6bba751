"""Starts of the LoRA family against peft, on llama and on GPT-2's Conv1D layers: the same A and B, the same residual.

Singular vectors have no sign, so that products, or absolute values, are compared.  Where peft is not the oracle, the
paper's formula in float64 is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.incremental_pca import IncrementalPCA
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor, nn

from tests.support.data_case import objective_of, sequence_row
from tests.support.loop_case import ListedRows
from tests.support.peft_case import BASES, TOLERANCE, close
from tunekit.adapters.attach import AttachedAdapter
from tunekit.contracts import Batch
from tunekit.data.batching.steps import BatchSettings, StoredSteps
from tunekit.machine.devices import make_devices
from tunekit.model.load import LoadedModel, load_model
from tunekit.model.quantized import codec
from tunekit.model.quantized.weights import weight_of
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.model import ModelSection
from tunekit.training.initialise import first_steps, initialise_adapter

FAMILIES = ("llama", "gpt2")
RANK, ALPHA, TOKENS = 8, 12, 12
every_family = pytest.mark.parametrize("family", FAMILIES)


def make_windows(rows: int, batch: int) -> StoredSteps:
    """Rows of 12 random ids, the first four of each a prompt."""
    generator = np.random.default_rng(0)
    trained = np.arange(TOKENS) >= 4
    listed = [sequence_row(generator.integers(3, 97, TOKENS).astype(np.int32), trained, f"r:{n}") for n in range(rows)]
    settings = BatchSettings(batch, None, 2, TOKENS, False, False, 0, 1.0, None)
    return StoredSteps(ListedRows(listed), objective_of().rows, settings)


def peft_inputs(steps: StoredSteps, batches: int) -> Iterator[dict[str, Tensor]]:
    """The same micro-batches as transformers takes them."""
    found: list[Batch] = [batch for step in first_steps(steps, batches) for batch in step.batches]
    for batch in found:
        ids, labels = batch.inputs["input_ids"], batch.targets["labels"]
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def without_dropout(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


def loaded(family: str, folder: Path, net: Any = None, **section: Any) -> LoadedModel:
    net = net or BASES[family].make()
    net.save_pretrained(folder)
    model = load_model(ModelSection(name_or_path=str(folder), dtype="float32", **section), device=torch.device("cpu"))
    without_dropout(model.net)
    return model


def targets_of(family: str) -> tuple[str, ...]:
    return (*BASES[family].attention, *BASES[family].feedforward)


def ours(
    family: str, folder: Path, start: Any, steps: StoredSteps | None = None, net: Any = None, **own: Any
) -> AttachedAdapter:
    section = {name: own.pop(name) for name in ("quantization",) if name in own}
    base = loaded(family, folder, net, **section)
    settings = LoraSettings(r=RANK, alpha=float(ALPHA), target_modules=targets_of(family), start=start, **own)
    rows: Any = SimpleNamespace(objective=objective_of(), steps=lambda _: steps or make_windows(2, 1))
    planned: Any = SimpleNamespace(
        adapter=settings,
        model=ModelSection(name_or_path=str(folder), dtype="float32", **section),
        rows=rows,
        batch_settings=None,
    )
    return initialise_adapter(base, planned, seed=0, devices=make_devices(), resumed=None, companions={})[0]


def peft_config(family: str, start: str, **more: Any) -> peft.LoraConfig:
    targets = list(targets_of(family))
    fields = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "task_type": "CAUSAL_LM", **more}
    return peft.LoraConfig(init_lora_weights=start, fan_in_fan_out=family == "gpt2", **fields)


def peft_factors(theirs: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Module name -> A, B and the matrix (O, I) that peft left in the base."""
    found = {}
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            weight = weight_of(module.base_layer)
            assert weight is not None
            pair = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
            found[name.removeprefix("base_model.model.")] = (*pair, weight.read())
    return found


def own_factors(adapter: AttachedAdapter) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Module name -> A, B and W less what they hold of it."""
    found = {}
    for name, layer in adapter.layers.items():
        weight = weight_of(layer.base_layer)
        assert weight is not None
        a, b = layer.A.detach(), layer.B.detach()
        found[name] = a, b, weight.read() - layer.scaling * b @ a
    return found


def compare(adapter: AttachedAdapter, theirs: nn.Module, *, signs: bool, atol: float = TOLERANCE) -> None:
    """B A and the residual of every layer; with `signs`, A and B apart, up to the signs of their vectors."""
    mine, other = own_factors(adapter), peft_factors(theirs)
    assert mine.keys() == other.keys()
    for name, (a, b, residual) in mine.items():
        their_a, their_b, their_residual = other[name]
        if signs:  # a vector turns by the gradient's rounding (9e-7 from float64) over the gap to its neighbour
            for left, right in ((a, their_a), (b, their_b)):
                torch.testing.assert_close(left.abs(), right.abs(), rtol=0, atol=3 * TOLERANCE)
        else:
            torch.testing.assert_close(b @ a, (their_b @ their_a).float(), rtol=0, atol=atol)
            torch.testing.assert_close(residual, their_residual, rtol=0, atol=atol)
        assert (b @ a).abs().max() > 1e-2 or signs


def with_decay(family: str) -> nn.Module:
    """The base with singular values 1, 0.7, 0.49 ... in its adapted matrices.

    How far rounding turns the R-th vector is the rounding over the gap to the next singular value. In random matrices
    some gap is so small that the kernels of two processors disagree by more than the tolerance.
    """
    net = BASES[family].make()
    with torch.no_grad():
        for name, module in net.named_modules():
            if name.endswith(targets_of(family)):
                weight: Any = module.weight
                u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
                weight.copy_(u * 0.7 ** torch.arange(len(s)) @ vh)
    return net


@every_family
@pytest.mark.parametrize("start", ["pissa", {"method": "pissa", "iterations": 4}])
def test_pissa(family: str, start: Any, tmp_path: Path) -> None:
    """The fast decomposition comes to the exact one."""
    theirs = peft.get_peft_model(with_decay(family), peft_config(family, "pissa"))
    compare(ours(family, tmp_path, start, net=with_decay(family)), theirs, signs=False)


def test_olora(tmp_path: Path) -> None:
    """On llama alone: peft decomposes a Conv1D's matrix the wrong way round."""
    theirs = peft.get_peft_model(BASES["llama"].make(), peft_config("llama", "olora"))
    compare(ours("llama", tmp_path, "olora"), theirs, signs=False)


def test_olora_of_a_conv1d(tmp_path: Path) -> None:
    for a, b, residual in own_factors(ours("gpt2", tmp_path, "olora")).values():
        close(b.t() @ b, torch.eye(RANK))
        assert torch.equal(a, a.triu())
        close(b.t() @ residual, (b.t() @ b - ALPHA / RANK * torch.eye(RANK)) @ a)  # Q^T W = R


@pytest.fixture
def exact_eva(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's EVA with an exact decomposition in place of its random sketch."""

    def make(n_components: int, **sketch: Any) -> IncrementalPCA:
        return IncrementalPCA(n_components=n_components, lowrank=False)

    monkeypatch.setattr("peft.tuners.lora.eva.IncrementalPCA", make)


@pytest.mark.usefixtures("exact_eva")
@pytest.mark.parametrize(("family", "whiten"), [("llama", False), ("gpt2", False), ("gpt2", True)])
def test_eva(family: str, whiten: bool, tmp_path: Path) -> None:
    """From one batch, which peft passes over until its components have settled.

    Whitened on GPT-2 alone: where layers share their inputs, peft divides by the same singular values again and again.
    """
    config = peft_config(family, "eva", eva_config=peft.EvaConfig(rho=1.0, whiten=whiten))
    theirs = peft.get_peft_model(BASES[family].make(), config)
    steps = make_windows(8, 8)
    initialize_lora_eva_weights(theirs, list(peft_inputs(steps, 1)), show_progress_bar=False)
    start = {"method": "eva", "batches": 1, "whiten": whiten}
    mine, other = own_factors(ours(family, tmp_path, start, steps)), peft_factors(theirs)
    assert mine.keys() == other.keys()
    for name, (a, b, _) in mine.items():
        # peft has seen the batch twice by then: its singular values are larger by the root of 2
        scale = 2**0.25 if whiten else 1.0
        close(a.abs(), other[name][0].abs() * scale)
        assert not b.any()


@every_family
@pytest.mark.usefixtures("exact_eva")
def test_eva_shares_ranks_as_peft_does(family: str, tmp_path: Path) -> None:
    """Layers with the same inputs have equal shares; which of them takes the last component is not compared."""
    config = peft_config(family, "eva", eva_config=peft.EvaConfig(rho=2.0))
    theirs = peft.get_peft_model(BASES[family].make(), config)
    steps = make_windows(8, 8)
    initialize_lora_eva_weights(theirs, list(peft_inputs(steps, 1)), show_progress_bar=False)
    adapter = ours(family, tmp_path, {"method": "eva", "batches": 1, "rho": 2.0}, steps)
    mine = {name: len(a) for name, (a, _, _) in own_factors(adapter).items()}
    other = {name: len(a) for name, (a, _, _) in peft_factors(theirs).items()}
    assert sum(mine.values()) == sum(other.values()) == RANK * len(peft_factors(theirs))
    assert len(set(mine.values())) > 1
    for group in sorted({name.rpartition(".")[0] for name in mine}):
        inside = [sum(r for n, r in ranks.items() if n.startswith(group)) for ranks in (mine, other)]
        assert abs(inside[0] - inside[1]) <= 1, group
    assert {layer.scaling for layer in adapter.layers.values()} == {ALPHA / RANK}


def test_eva_of_several_batches_is_peft_s_incremental_decomposition(tmp_path: Path) -> None:
    steps = make_windows(6, 2)
    start = {"method": "eva", "batches": 3, "supervised_only": False}
    found = own_factors(ours("llama", tmp_path, start, steps))["model.layers.0.self_attn.q_proj"][0]
    other, inputs = IncrementalPCA(n_components=RANK, lowrank=False), []
    net = BASES["llama"].make()
    net.get_submodule("model.layers.0.self_attn.q_proj").register_forward_hook(lambda m, x, y: inputs.append(x[0]))
    with torch.no_grad():
        for batch in peft_inputs(steps, 3):
            net(**batch)
    for each in inputs:
        other.partial_fit(each.reshape(-1, each.shape[-1]))
    close(found.abs(), other.components_.float().abs())


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="llama does not compute in float64, as peft is asked to"
)
@every_family
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda(family: str, mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("attr") is None:  # peft takes this one name from a package that it does not ask for
        monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    steps, net = make_windows(64, 1), BASES[family].make()
    config = peft_config(family, "corda", corda_config=peft.tuners.lora.config.CordaConfig(corda_method=mode))

    def run_model() -> None:
        for batch in peft_inputs(steps, 64):
            net(input_ids=batch["input_ids"])

    with monkeypatch.context() as wide:  # peft inverts in float32, which costs four digits on 128 inputs
        wide.setattr(torch.Tensor, "float", torch.Tensor.double)
        wide.setattr(torch, "eye", partial(torch.eye, dtype=torch.float64))
        preprocess_corda(net, config, run_model)
    theirs = peft.get_peft_model(net, config)
    start = {"method": "corda", "mode": mode, "batches": 64}
    compare(ours(family, tmp_path, start, steps), theirs, signs=False)


@every_family
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga(family: str, direction: Any, tmp_path: Path) -> None:
    steps, net = make_windows(4, 4), without_dropout(BASES[family].make())
    ga = peft.LoraGAConfig(direction=direction)
    config = peft_config(family, "lora_ga", lora_ga_config=ga)

    def train_step() -> None:
        for batch in peft_inputs(steps, 1):
            net(**batch).loss.backward()

    preprocess_loraga(net, config, train_step)
    gradients = {n: m._peft_loraga_grad for n, m in net.named_modules() if hasattr(m, "_peft_loraga_grad")}
    theirs = peft.get_peft_model(net, config)
    start = {"method": "lora_ga", "batches": 1, "direction": direction, "scale": "peft", "iterations": None}
    adapter = ours(family, tmp_path / "peft", start, steps)
    if family == "gpt2":  # peft's factor is of the inputs there
        with torch.no_grad():
            for name, module in theirs.named_modules():
                if hasattr(module, "lora_B"):
                    shape = module.lora_B["default"].weight.shape[0], module.lora_A["default"].weight.shape[1]
                    module.lora_B["default"].weight.mul_((shape[0] / shape[1]) ** 0.25)
                    assert name
    compare(adapter, theirs, signs=True)
    paper = own_factors(ours(family, tmp_path / "paper", {**start, "scale": "stable"}, steps))
    for name, (a, b, _) in paper.items():
        gradient = gradients[name].double().t() if family == "gpt2" else gradients[name].double()
        u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
        places = {"ArB2r": (range(8), range(8, 16)), "A2rBr": (range(8, 16), range(8))}
        of_a, of_b = places.get(direction, (range(1, 16, 2), range(0, 16, 2)))
        size = gradient.shape[0] ** 0.25 / 16**0.5
        close(a.abs(), (vh[list(of_a)] * size).abs().float())
        close(b.abs(), (u[:, list(of_b)] * size).abs().float())


@pytest.mark.parametrize("quantization", ["nf4", "int8_weight_only"])
def test_loftq(quantization: str, tmp_path: Path) -> None:
    """peft's decomposition of what our packing lost; its own needs a GPU, and takes alpha = r for granted."""
    if quantization == "nf4" and not codec.has_bitsandbytes():
        pytest.skip("bitsandbytes is not installed")  # importorskip would import it, and its import compiles
    net = BASES["llama"].make()
    adapter = ours("llama", tmp_path, "loftq", quantization=quantization)
    for name, layer in adapter.layers.items():
        weight, packed = weight_of(net.get_submodule(name)), weight_of(layer.base_layer)
        assert weight is not None
        assert packed is not None
        assert packed.kind == quantization
        found = _low_rank_decomposition((weight.read() - packed.read()).double(), reduced_rank=RANK)
        close(layer.delta(), (found["L"] @ found["R"]).float())
        lost, left = weight.read() - packed.read(), weight.read() - packed.read() - layer.delta()
        assert left.norm() < 0.9 * lost.norm()
