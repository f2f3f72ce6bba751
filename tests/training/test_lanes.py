"""Several runs over one base: lane by lane each equals its own run bit for bit; joined, up to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.loop_case import Case, make_case, make_rows
from tunekit.adapters.base import Casts
from tunekit.adapters.kernels.lane_products import LaneProducts
from tunekit.adapters.method import load_method
from tunekit.memory.streaming import layer_weights, make_slots, shared_slots
from tunekit.model.call import Call, calling, current_call
from tunekit.model.load import load_model
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.model import ModelSection
from tunekit.recipe.reading.names import settings_class
from tunekit.recipe.training import TrainingSection
from tunekit.records import Choice, Target
from tunekit.training.engines.together import Together
from tunekit.training.lane import run_lanes
from tunekit.training.loop import loop_steps
from tunekit.tuned.twin import make_twin

CPU = torch.device("cpu")


def training(seed: int, **changes: Any) -> TrainingSection:
    values = {"learning_rate": 1e-2, "max_steps": 3, "epochs": None, "gradient_accumulation_steps": 3, "seed": seed}
    return TrainingSection(**{**values, "scheduler": "constant", "warmup_ratio": 0.0, "micro_batch_size": 2, **changes})


def weights(case: Case) -> Tensor:
    return torch.cat([flat.data.detach() for flat in case.optimizer.groups])


class Lanes:
    """Runs with different adapters, rows and lengths, each alone and all together. `streamed`: from host memory."""

    def __init__(self, model: ModelSection, lanes: list[dict[str, Any]], streamed: bool) -> None:
        self.model, self.lanes, self.streamed = model, lanes, streamed
        self.warnings: list[str] = []

    def alone(self) -> list[Case]:
        cases = [self._case(lane) for lane in self.lanes]
        for case in cases:
            case.run()
        return cases

    def together(self, joined: Choice | None) -> list[Case]:
        base = load_model(self.model, device=CPU)
        if self.streamed:
            base.slots = make_slots(layer_weights(base), CPU, tier="host", mapped=base.mapped, poison=True)
        cases = [self._case(lane, base=make_twin(base)) for lane in self.lanes]
        for case in cases:
            case.model.slots = shared_slots(base)
        run_lanes([loop_steps(case.parts) for case in cases], Together(lambda: base, joined, self.warnings.append))
        assert self.warnings == []
        return cases

    def _case(self, lane: dict[str, Any], **changes: Any) -> Case:
        rows = make_rows(23, seed=lane["rows"])
        streaming = {} if self.streamed else None
        return make_case(
            Path(),
            rows,
            training=lane["training"],
            adapter=lane["adapter"],
            model=self.model,
            end_to_end=True,
            max_length=64,
            streaming=streaming,
            **changes,
        )


def lora(**changes: Any) -> LoraSettings:
    return LoraSettings(**{"r": 4, "alpha": 8.0, **changes})


def lanes_of(adapters: list[Any], *, rows: bool, **changes: Any) -> list[dict[str, Any]]:
    """A lane for each adapter, each with rows and a seed of its own (`rows`), or all with the same."""
    return [
        {"adapter": adapter, "rows": number * rows, "training": training(number * rows, **changes)}
        for number, adapter in enumerate(adapters)
    ]


def test_lane_by_lane_equals_separate_runs(tiny_llama: Path) -> None:
    """Also a method that cannot be joined, dropout, and a lane that ends earlier."""
    dora = settings_class("adapters", "dora").model_validate({"method": "dora", "r": 4})
    lanes = lanes_of([lora(), dora, lora(r=8, dropout=0.2)], rows=True)
    lanes[0]["training"] = training(0, max_steps=2)
    section = ModelSection(name_or_path=str(tiny_llama), dtype="float32", quantization="nf4")
    runs = Lanes(section, lanes, streamed=True)
    for one, other in zip(runs.alone(), runs.together(None), strict=True):
        assert one.losses == other.losses
        assert torch.equal(weights(one), weights(other))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "resident"])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
def test_joined_lanes_agree_with_separate_runs(
    streamed: bool, equal: bool, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lanes of other ranks and modules, with equally many tokens (batched products) and without."""
    adapters = [lora(), lora(r=8, alpha=4.0), lora(r=6, target_modules=["q_proj", "down_proj"])]
    lanes = lanes_of(adapters, rows=not equal)
    lanes[2]["training"] = lanes[2]["training"].model_copy(update={"max_steps": 2})
    section = ModelSection(name_or_path=str(tiny_llama), dtype="float32", quantization="nf4" if streamed else "none")
    runs, lengths, stacks = Lanes(section, lanes, streamed), set(), set()
    forward = LaneProducts.forward

    def noted(self: LaneProducts, x: Tensor) -> Tensor:
        lengths.add(current_call().lanes)
        y = forward(self, x)
        stacks.add(len(self.casts._cache or ()))
        return y

    monkeypatch.setattr(LaneProducts, "forward", noted)
    alone = runs.alone()
    assert not lengths
    joined = runs.together(Choice(streaming="host" if streamed else "off"))
    assert {len(each) for each in lengths} == {2, 3}
    assert max(stacks) == 2 * 7  # two factors of each module of one layer; those of all layers would cost memory
    assert any(len(set(each)) == 1 for each in lengths) == equal
    for one, other in zip(alone, joined, strict=True):
        assert other.losses == pytest.approx(one.losses, rel=1e-5)
        # Adam enlarges the rounding of a gradient near zero: one weight may differ by a hundredth of the rate
        near = torch.isclose(weights(one), weights(other), rtol=1e-3, atol=1e-5)
        assert (~near).sum() <= 1
        assert torch.allclose(weights(one), weights(other), rtol=1e-3, atol=1e-4)


@pytest.mark.drawn
def test_joined_lanes_agree_over_twenty_steps(tiny_llama: Path) -> None:
    lanes = lanes_of([lora(), lora(r=8)], rows=True, max_steps=20, learning_rate=1e-3)
    runs = Lanes(ModelSection(name_or_path=str(tiny_llama), dtype="float32"), lanes, streamed=False)
    for one, other in zip(runs.alone(), runs.together(Choice()), strict=True):
        assert other.losses == pytest.approx(one.losses, rel=1e-5)


@pytest.mark.slow
def test_joined_lanes_in_bfloat16_are_as_near_to_float32_as_separate_runs(tiny_llama: Path) -> None:
    lanes = lanes_of([lora(), lora(r=8), lora(r=2)], rows=True, max_steps=20, learning_rate=1e-3)

    def losses(cases: list[Case]) -> Tensor:
        return torch.tensor([case.losses for case in cases], dtype=torch.float64)

    exact = losses(Lanes(ModelSection(name_or_path=str(tiny_llama), dtype="float32"), lanes, streamed=False).alone())
    runs = Lanes(ModelSection(name_or_path=str(tiny_llama), dtype="bfloat16"), lanes, streamed=False)
    alone, joined = losses(runs.alone()), losses(runs.together(Choice()))
    assert (joined - exact).abs().mean() <= 1.2 * (alone - exact).abs().mean()


@pytest.mark.parametrize("lengths", [(3, 3, 3), (5, 0, 4)], ids=["equal", "unequal"])
def test_grouped_products_equal_a_loop_over_the_runs(lengths: tuple[int, ...]) -> None:
    """Ranks differ, and the second run does not adapt the module."""
    torch.manual_seed(0)
    base, count = nn.Linear(16, 24).requires_grad_(False), sum(lengths)
    layers: list[Any] = [_layer(base, 4), None, _layer(base, 6)]
    module = LaneProducts(base, layers, Casts())
    x, g = torch.randn(1, count, 16, requires_grad=True), torch.randn(1, count, 24)
    with calling(Call(lanes=lengths)):
        y = module(x)
    factors = [factor for layer in (layers[0], layers[2]) for factor in (layer.A, layer.B)]
    grouped = torch.autograd.grad(y, [x, *factors], g)
    parts = torch.split(x, lengths, dim=1)  # type: ignore[no-untyped-call]
    looped = torch.cat(
        [base(part) if layer is None else layer(part) for part, layer in zip(parts, layers, strict=True)], 1
    )
    assert torch.allclose(y, looped, rtol=1e-4, atol=1e-4)  # of numbers up to 50
    for one, other in zip(grouped, torch.autograd.grad(looped, [x, *factors], g), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def _layer(base: nn.Linear, rank: int) -> Any:
    target = Target("layer", "linear", base.in_features, base.out_features, 0, r=rank, alpha=8.0)
    layer = load_method("lora").layer(base, lora(r=rank), target)  # type: ignore[misc]
    for factor in (layer.A, layer.B):
        nn.init.normal_(factor)
    return layer
