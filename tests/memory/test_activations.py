"""Recomputed, waiting on the host, in tiles: against the plain step, over methods, rows and numbers of layers.

Recomputed and waiting equal the plain step bit for bit, dropout included; tiles equal it within 1e-5 (sums over tokens
are taken in another order). The quick tier takes cells in which every pair of values occurs; the whole table is slow.
"""

from __future__ import annotations

import itertools
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.adapters.test_joined_lora import IDS
from tests.conftest import write_tiny_llama
from tests.memory.test_offload import TriedCopies, store_with
from tests.model.test_families import make_net
from tests.support.data_case import objective_of
from tests.support.loop_case import Case, make_case, make_rows
from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.errors import ModelError
from tunekit.memory.offload import BoundaryStore, prepare_layers
from tunekit.memory.tiling import Tiles, tile_layers
from tunekit.model.call import current_call
from tunekit.model.families.causal import FAMILY
from tunekit.model.load import make_meta_model
from tunekit.planning.simulated.tracker import Simulation, StorageTracker
from tunekit.planning.simulation import SimulatedRun
from tunekit.recipe.adapters.dora import DoraSettings
from tunekit.recipe.adapters.ia3 import Ia3Settings
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.adapters.oft import OftSettings
from tunekit.recipe.adapters.prefix import PrefixSettings
from tunekit.recipe.adapters.vera import VeraSettings
from tunekit.recipe.model import ModelSection
from tunekit.recipe.training import TrainingSection
from tunekit.records import ExecutionSettings

SEED = 20240607
LAYERS = 4
WIDTH = {"hidden": 32, "layers": LAYERS}
METHODS: dict[str, Any] = {
    "lora": lambda: LoraSettings(r=4),
    "lora-dropout": lambda: LoraSettings(r=4, dropout=0.2),
    "dora": lambda: DoraSettings(r=4),
    "ia3": lambda: Ia3Settings(),
    "vera": lambda: VeraSettings(r=8, target_modules=["gate_proj", "up_proj"]),
    "oft": lambda: OftSettings(block_size=16),
    "prefix": lambda: PrefixSettings(num_virtual_tokens=3, init="random"),
}
ROWS = ("packed", "padded")
WAYS = ("recomputed", "early", "late", "tiled", "tiled-late")  # early and late: how copies to the host are made
DTYPES = ("float32", "bfloat16")
COUNTS = (1, 3, LAYERS)  # of recomputed layers
Cell = tuple[str, str, str, str, int]


def possible(cell: Cell) -> bool:
    """Prefixes are not packed; in bfloat16 a tile's share is rounded; dropout in tiles has a test of its own."""
    method, rows, way, dtype, _ = cell
    if way.startswith("tiled") and (dtype != "float32" or method == "lora-dropout"):
        return False
    return (method, rows) != ("prefix", "packed")


TABLE = [cell for cell in itertools.product(METHODS, ROWS, WAYS, DTYPES, COUNTS) if possible(cell)]


def pairwise(table: list[Cell], seed: int) -> list[Cell]:
    """Cells of a shuffled table until every pair of two columns' values that occurs in it has occurred."""

    def pairs(cell: Cell) -> set[Any]:
        return {(i, cell[i], j, cell[j]) for i, j in itertools.combinations(range(len(cell)), 2)}

    shuffled = random.Random(seed).sample(table, len(table))
    left, taken = set().union(*map(pairs, shuffled)), []
    while left:
        best = max(shuffled, key=lambda cell: len(pairs(cell) & left))
        taken.append(best)
        left -= pairs(best)
    return taken


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("activations"), **WIDTH)


def start(folder: Path, method: str, rows: str, dtype: str, checkpointed: int, store: BoundaryStore | None) -> Case:
    section = TrainingSection(
        learning_rate=1e-2, micro_batch_size=2, gradient_accumulation_steps=2, epochs=None, max_steps=2,
        warmup_ratio=None,
    )  # fmt: skip
    model = ModelSection(name_or_path=str(folder), dtype=dtype)  # type: ignore[arg-type]
    case = make_case(
        folder, make_rows(9), training=section, adapter=METHODS[method](), model=model, packing=rows == "packed",
        checkpointed=checkpointed, store=store,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for tensor in case.adapter.trained().values():  # off its start: there half of the gradients are 0
        tensor.data.add_(torch.randn(tensor.shape, generator=generator), alpha=0.02)
    return case


def in_tiles(case: Case, tokens: int) -> Case:
    base = case.model.base
    tile_layers(base.family.layers(base.net), tokens, torch.empty(0, base.facts.hidden_size, dtype=base.dtype))
    return case


def first_gradients(case: Case) -> dict[str, Tensor]:
    """Of the first step, by name."""
    step = next(iter(case.steps.after(0)))
    with case.model.training_mode(True):
        case.step(step)
    found = {name: tensor.grad.clone() for name, tensor in case.adapter.trained().items() if tensor.grad is not None}
    case.optimizer.zero_gradients()
    return found


def outcome(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Gradients of the first step, then weights and losses of the run."""
    gradients = first_gradients(case)
    case.run()
    return gradients, {name: tensor.clone() for name, tensor in case.adapter.trained().items()}, case.losses


@cache
def plain(folder: Path, method: str, rows: str, dtype: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    return outcome(start(folder, method, rows, dtype, 0, None))


def compare(folder: Path, cell: Cell) -> None:
    method, rows, way, dtype, checkpointed = cell
    copies = TriedCopies(late=way.endswith("late"))
    case = start(folder, method, rows, dtype, checkpointed, None if way == "recomputed" else store_with(copies))
    if way.startswith("tiled"):
        in_tiles(case, 10)
    ours, theirs = outcome(case), plain(folder, method, rows, dtype)
    assert ours[0].keys() == theirs[0].keys()
    assert all(gradient.abs().max() > 0 for gradient in theirs[0].values())
    if way in ("early", "late") and checkpointed > 1:
        assert copies.events.count("back") == copies.events.count("out") > 0
    if not way.startswith("tiled"):
        assert [name for name, value in theirs[1].items() if not torch.equal(ours[1][name], value)] == []
        assert ours[2] == theirs[2]
        return
    for name, gradient in theirs[0].items():
        assert float((ours[0][name] - gradient).norm() / gradient.norm()) < 1e-5, name
    assert ours[2] == pytest.approx(theirs[2], rel=1e-5)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("cell", pairwise(TABLE, SEED), ids=lambda cell: "-".join(map(str, cell)))
def test_pairs_of_values(cell: Cell, llama: Path) -> None:
    print(f"cells drawn with seed {SEED}")
    compare(llama, cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", TABLE, ids=lambda cell: "-".join(map(str, cell)))
def test_the_whole_table(cell: Cell, llama: Path) -> None:
    compare(llama, cell)


def with_graph(self: Tiles, x: Tensor) -> Tensor:
    """Tiles as autograd itself would differentiate them: same seeds, everything kept."""
    outputs = []
    for index, place in enumerate(self.slices(x)):
        self._seed(current_call(), index)
        outputs.append(self.run(x.reshape(1, -1, x.shape[-1])[:, place]))
    return torch.cat(outputs, dim=1).view(x.shape)


@pytest.mark.parametrize("checkpointed", [0, 2, LAYERS])
def test_dropout_in_tiles_is_that_of_the_forward(
    llama: Path, checkpointed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiled = first_gradients(in_tiles(start(llama, "lora-dropout", "padded", "float32", checkpointed, None), 7))
    untiled = first_gradients(start(llama, "lora-dropout", "padded", "float32", 0, None))
    monkeypatch.setattr(Tiles, "__call__", with_graph)
    expected = first_gradients(in_tiles(start(llama, "lora-dropout", "padded", "float32", 0, None), 7))
    for name, gradient in expected.items():
        assert float((tiled[name] - gradient).norm() / gradient.norm()) < 1e-5, name
    assert not torch.allclose(tiled["model.layers.0.mlp.up_proj.lora_A.weight"],
                              untiled["model.layers.0.mlp.up_proj.lora_A.weight"], rtol=1e-3)  # fmt: skip


def tiled_error(layer: nn.Module, width: int = 8) -> str:
    with pytest.raises(ModelError) as caught:
        tile_layers([("model.layers.0", layer)], 4, torch.empty(0, width))
    assert caught.value.problems[0].key == "memory.mlp_tile_tokens"
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Mixing(nn.Linear):
    """Adds up the tokens before each token."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).cumsum(dim=1)


class WithResidual(nn.Linear):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + residual


class WithScores(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x), x  # type: ignore[return-value]


def layer_with(name: str, mlp: nn.Module) -> nn.Module:
    layer = nn.Module()
    setattr(layer, name, mlp)
    return layer


def test_what_is_not_token_wise_is_refused_by_name() -> None:
    assert "model.layers.0 (Module) has no MLP" in tiled_error(layer_with("attention", nn.Linear(8, 8)))
    assert "model.layers.0.mlp (Mixing) does not compute each token separately" in tiled_error(
        layer_with("mlp", Mixing(8, 8))
    )
    assert "(WithResidual) needs other inputs than hidden states" in tiled_error(layer_with("mlp", WithResidual(8, 8)))
    assert "(WithScores) does not return just hidden states" in tiled_error(layer_with("ffn", WithScores(8, 8)))
    assert "(Linear) does not return just hidden states" in tiled_error(layer_with("mlp", nn.Linear(8, 9)))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "starcoder2", "mixtral", "gpt2", "gpt_neox", "phi"])
@pytest.mark.parametrize("checkpointed", [0, 3])
def test_mlps_of_many_kinds_in_tiles(model_type: str, checkpointed: int) -> None:
    """Fused or not, with biases, without a gate, experts: the same hidden states and gradients."""
    found = []
    for tokens in (None, 4):
        net, attached = adapted(model_type, checkpointed, tokens)
        hidden = FAMILY.hidden(net, {"input_ids": IDS, "position_ids": torch.arange(9).repeat(2, 1)})
        (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
        found.append((hidden.detach(), {name: value.grad for name, value in attached.trained().items()}))
    (hidden, expected), (tiled_hidden, tiled) = found
    torch.testing.assert_close(tiled_hidden, hidden, rtol=1e-5, atol=1e-5)
    for name, gradient in expected.items():
        assert gradient is not None
        assert float((tiled[name] - gradient).norm() / gradient.norm()) < 1e-5, name


def adapted(model_type: str, checkpointed: int, tokens: int | None) -> tuple[Any, AttachedAdapter]:
    net: Any = make_net(model_type)
    attached = attach_adapter(net, LoraSettings(r=3), seed=0, head_name="lm_head")
    generator = torch.Generator().manual_seed(2)
    for parameter in attached.trained().values():
        parameter.data.normal_(0, 0.1, generator=generator)
    layers = FAMILY.layers(net)
    prepare_layers([layer for _, layer in layers], checkpointed)
    net.eval()  # no dropout, which tiles draw otherwise
    for _, layer in layers:
        layer.training = True  # recomputed all the same
    if tokens is not None:
        tile_layers(layers, tokens, torch.empty(0, 32))
    return net, attached


def simulated(folder: Path, device: str = "cpu", layers: int = 0, tokens: int = 480, **memory: Any) -> Simulation:
    """A step of one long row; eager attention, whose memory needs no kernel of the device."""
    section = ModelSection(name_or_path=str(folder), dtype="float32", attention="eager")
    run = SimulatedRun(
        make_meta_model(section, device=torch.device(device)), LoraSettings(r=4), objective_of(),
        TrainingSection(), ExecutionSettings(logits_chunk_tokens=16, checkpointed_layers=layers, **memory),
        torch.device(device),
    )  # fmt: skip
    rows = make_rows(1, shortest=tokens, longest=tokens)
    return run.training_step(objective_of().rows.collate([rows.rows]))


def test_tiles_take_a_tiles_memory() -> None:
    """Peak of one MLP with adapters inside, forward and backward: what grows with the row is its input and output."""
    peaks = {}
    for tile in (None, 64):
        net, attached = adapted("llama", 0, tile)
        mlp = net.model.layers[1].mlp
        for tokens in (512, 1024):
            x = torch.randn(1, tokens, 32, requires_grad=True)
            tracker = StorageTracker(torch.device("cpu"))
            tracker.adopt([*net.parameters(), *net.buffers(), x], "held")
            mlp(x[:, :100]).sum().backward()  # gradients exist
            tracker.adopt([value.grad for value in attached.trained().values() if value.grad is not None], "held")
            tracker.start()
            held = tracker.total
            with tracker:
                mlp(x).backward(torch.ones_like(x))
            peaks[tile, tokens] = tracker.peak_total - held
    row = 512 * 32 * 4
    assert peaks[None, 1024] - peaks[None, 512] > 7 * row, "gate, up and what lies between, 48 wide, beside D wide ones"
    assert peaks[64, 1024] - peaks[64, 512] <= 4 * row + 64, "input, output, and the gradient of each"
    assert peaks[64, 1024] < 0.6 * peaks[None, 1024]


def test_the_simulation_knows_tiles(llama: Path) -> None:
    plain, tiled = simulated(llama), simulated(llama, mlp_tile_tokens=32)
    assert tiled.peak["activations"] < plain.peak["activations"]


@pytest.mark.drawn
def test_what_waits_is_counted_on_the_host_on_a_gpu_and_saves_nothing_on_a_cpu(llama: Path, tmp_path: Path) -> None:
    on_gpu = {way: simulated(llama, "cuda", LAYERS, activation_offload=way) for way in (False, True, "auto")}
    assert on_gpu[True].total == on_gpu[False].total, "of four inputs one stays, two are on their way, one comes back"
    assert on_gpu[True].offloaded == (LAYERS - 1) * 2**16, "in slots of a power of two"
    assert on_gpu["auto"].total == on_gpu[False].total, "so small an input stays"
    assert on_gpu["auto"].offloaded == on_gpu[False].offloaded == 0
    deep = write_tiny_llama(tmp_path, **{**WIDTH, "layers": 2 * LAYERS})
    row = 480 * 32 * 4  # bytes of one layer's input
    held, sent = (simulated(deep, "cuda", 2 * LAYERS, activation_offload=way).total for way in (False, True))
    assert sent == held - LAYERS * row, "of eight inputs those four are held, and no other"
    plain, waiting = (simulated(llama, "cpu", LAYERS, activation_offload=way) for way in ("auto", True))
    assert waiting.total >= plain.total
    assert waiting.offloaded == 0


def test_a_recomputed_layer_has_the_same_dropout_outside_a_step() -> None:
    """A forward that is not seeded stores the generator's state instead."""
    layer = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    plain = layer.forward
    gradients = []
    for checkpointed in (0, 1):
        layer.forward = plain  # type: ignore[method-assign]
        prepare_layers([layer], checkpointed)
        layer.zero_grad()
        x = torch.ones(4, 8, requires_grad=True)
        torch.manual_seed(3)
        y = layer(x)
        torch.manual_seed(11)  # something else draws before the backward pass
        y.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
