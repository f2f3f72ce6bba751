"""Layer by layer against all at once: bit for bit, whatever the method; and what keeps the slots safe."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.architectures.tiny import model_types, write_tiny
from tests.conftest import write_tiny_llama
from tests.model.test_families import MODELS, make_net
from tests.runs.test_every_method_trains import SETTINGS as SMALL_LAYERS
from tests.support.loop_case import Case, make_case, make_rows
from tunekit.errors import TunekitError
from tunekit.memory.blobs import LayerBlob, frozen_tensors
from tunekit.memory.copies import StreamCopier, ThreadCopier, copy_bytes
from tunekit.memory.slots import LayerSlots
from tunekit.memory.streaming import host_memory, make_slots
from tunekit.model.call import Call, calling
from tunekit.model.families.stages import PROVEN
from tunekit.recipe.model import ModelSection
from tunekit.recipe.reading.names import known_names, settings_class
from tunekit.recipe.training import TrainingSection
from tunekit.training.streaming import StreamingEngine

LAYERS = 5
# What small layers need in place of a method's defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    **SMALL_LAYERS,
    "adalora": {"init_r": 6, "target_r": 4, "tinit": 0, "tfinal": 1},
    "cpt": {"token_ids": [1, 40, 47, 26], "token_types": [1, 2, 3, 4]},
    "multitask_prompt": {"num_tasks": 1},
    "prefix": {"init": "random"},
}
# Their trained tensors belong to several layers, whose gradients are then summed in another order.
SHARED = {"vblora"}
WHOLE_MODEL = {"prompt", "p_tuning", "multitask_prompt", "cpt", "prefix", "llama_adapter"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("five-layers"), layers=LAYERS)


def training(**changes: Any) -> TrainingSection:
    values = {"learning_rate": 1e-2, "max_steps": 2, "epochs": None, "gradient_accumulation_steps": 3}
    return TrainingSection(**{**values, "scheduler": "constant", "warmup_ratio": 0.0, **changes})


def adapter(method: str, **changes: Any) -> Any:
    return settings_class("adapters", method).model_validate({"method": method, **SETTINGS.get(method, {}), **changes})


def run(folder: Path, **changes: Any) -> Case:
    case = make_case(folder, make_rows(23), **{"training": training(), **changes})
    before = weights(case).clone()
    case.run()
    assert not torch.equal(weights(case), before)
    return case


def weights(case: Case) -> Tensor:
    return torch.cat([flat.data.detach() for flat in case.optimizer.groups])


def both(folder: Path, streaming: dict[str, Any], **changes: Any) -> tuple[Case, Case]:
    return run(folder, **changes), run(folder, streaming=streaming, **changes)


def same(pair: tuple[Case, Case]) -> bool:
    return pair[0].losses == pair[1].losses and torch.equal(weights(pair[0]), weights(pair[1]))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", sorted(known_names("adapters")))
def test_every_method_trains_alike(folder: Path, method: str) -> None:
    if method == "bitfit":
        pytest.skip("bitfit trains biases, and a llama has none: see the other families")
    if adapter(method).trains_base:
        pytest.skip("a base that is trained itself is never streamed: plan refuses it")
    plain, streamed = both(folder, {"pass_size": 2}, adapter=adapter(method), packing=method not in WHOLE_MODEL)
    if method in SHARED:
        torch.testing.assert_close(weights(plain), weights(streamed), rtol=1e-5, atol=1e-5)
    else:
        assert same((plain, streamed))


def test_a_projected_prefix_trains_alike(folder: Path) -> None:
    """Each layer computes the projection anew, so that its gradients are summed in another order."""
    settings = adapter("prefix", prefix_projection=True)
    plain, streamed = both(folder, {"pass_size": 2}, adapter=settings, training=training(learning_rate=1e-4))
    torch.testing.assert_close(weights(plain), weights(streamed), rtol=1e-5, atol=1e-5)


AXES: dict[str, Sequence[Any]] = {
    "dropout": (0.0, 0.1),
    "packing": (False, True),
    "pass_size": (1, 2, 99),
    "count": (2, 3, 99),
    "tier": ("host", "disk"),
    "quantization": ("none", "nf4", "int8_weight_only"),
    "dtype": ("float32", "bfloat16"),
    "targets": ("all-linear", ["q_proj", "v_proj"], ["down_proj", "lm_head"], ["embed_tokens", "o_proj"]),
    "layers": (None, [2, 4], [4]),
}
SEED = random.randrange(2**32)


def drawn(number: int) -> dict[str, Any]:
    draw = random.Random(f"{SEED}-{number}")
    return {name: draw.choice(values) for name, values in AXES.items()}


def check(folder: Path, chosen: dict[str, Any]) -> None:
    layered = (
        chosen["layers"] is not None and "lm_head" not in chosen["targets"] and "embed" not in chosen["targets"][0]
    )
    settings = adapter(
        "lora",
        r=4,
        dropout=chosen["dropout"],
        target_modules=chosen["targets"],
        **({"layers_to_transform": chosen["layers"]} if layered else {}),
    )
    section = ModelSection(name_or_path=str(folder), dtype=chosen["dtype"], quantization=chosen["quantization"])
    streaming = {name: chosen[name] for name in ("pass_size", "count", "tier")}
    assert same(both(folder, streaming, adapter=settings, model=section, packing=chosen["packing"])), chosen


@pytest.mark.sampled(3)
@pytest.mark.parametrize("number", range(128))
def test_drawn_settings_train_alike(folder: Path, number: int) -> None:
    print(f"seed {SEED}")
    check(folder, drawn(number))


ENCODER_DECODERS = {"bart", "mbart", "pegasus", "marian", "blenderbot", "whisper"}  # test_streaming_seq2seq.py
OTHERS = sorted((PROVEN - set(MODELS) - ENCODER_DECODERS) & model_types().keys())
QUICK = ("falcon", "modernbert-decoder")  # layers that give a tuple; a head of more than its projection


@pytest.mark.sampled(8)
@pytest.mark.parametrize("model_type", [*sorted(MODELS), *QUICK])
def test_every_family_trains_alike(tmp_path: Path, model_type: str) -> None:
    if model_type in MODELS:
        make_net(model_type).save_pretrained(tmp_path)  # type: ignore[operator]
    else:
        write_tiny(model_type, tmp_path, layers=4)
    method = "bitfit" if model_type in ("gpt2", "gpt_neox", "phi", "opt", "bloom", "starcoder2") else "lora"
    rows = make_rows(12, vocabulary=97)
    cases = []
    for streaming in (None, {"pass_size": 2}):
        case = make_case(
            tmp_path, rows, training=training(), streaming=streaming, packing=model_type in {*MODELS} - {"bloom"},
            adapter=adapter("lora", r=4, target_modules="all-linear") if method == "lora" else adapter(method),
        )  # fmt: skip
        case.run()
        cases.append(case)
    assert same((cases[0], cases[1]))
    assert len(set(cases[0].losses)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in OTHERS if name not in QUICK])
def test_every_architecture_trains_alike(tmp_path: Path, model_type: str) -> None:
    test_every_family_trains_alike(tmp_path, model_type)


def test_nothing_is_computed_below_the_lowest_trained_layer(folder: Path) -> None:
    streaming = {"pass_size": 99, "count": 2}
    settings = adapter("lora", r=4, target_modules=["q_proj"], layers_to_transform=[3])
    case = make_case(folder, make_rows(23), training=training(max_steps=1), adapter=settings, streaming=streaming)
    case.run()
    # forward 5 layers; back from layer 4 (still there) to layer 3 (still there); then layer 0 for the next step
    assert case.parts.model.slots.copies == LAYERS + 1  # type: ignore[union-attr]


def test_layers_cross_the_bus_twice_a_pass(folder: Path) -> None:
    case = make_case(folder, make_rows(23), training=training(max_steps=1), streaming={"pass_size": 99, "count": 2})
    case.run()
    slots = case.model.slots
    assert slots is not None
    assert slots.copies == 2 * LAYERS - 2  # the last two are still there at the turn
    twice = make_case(folder, make_rows(23), training=training(max_steps=1), streaming={"pass_size": 2, "count": 2})
    twice.run()
    assert twice.parts.model.slots.copies == 2 * (2 * LAYERS - 2) - 2  # type: ignore[union-attr]


def test_evaluation_finds_each_layer_in_its_slot(folder: Path) -> None:
    from tunekit.evaluation.scores import undisturbed

    plain, streamed = (
        make_case(folder, make_rows(5), training=training(), streaming=streaming) for streaming in (None, {"count": 2})
    )
    ids = torch.arange(3, 20)[None]
    inputs = {"input_ids": ids, "position_ids": torch.arange(17)[None]}
    with undisturbed(plain.model), undisturbed(streamed.model):
        assert torch.equal(plain.model.hidden(inputs), streamed.model.hidden(inputs))


def test_no_more_layers_are_mapped_in_than_there_are_slots(folder: Path) -> None:
    case = make_case(folder, make_rows(23), training=training(), streaming={"count": 2})
    slots = case.model.slots
    assert slots is not None
    seen = []
    for blob in slots.blobs:
        bind = blob.bind
        blob.bind = lambda memory, bind=bind: (bind(memory), seen.append(_bound(slots)))
    case.run()
    assert seen
    assert max(len(each) for each in seen) == 2
    assert all(set(each) <= set(range(LAYERS)) for each in seen)


def _bound(slots: LayerSlots) -> list[int]:
    """Layers whose tensors lie in a slot's memory, by address."""
    spans = [(slot.memory.data_ptr(), slot.memory.data_ptr() + slot.memory.numel()) for slot in slots.slots]
    return [
        number
        for number, blob in enumerate(slots.blobs)
        if any(start <= tensor.data_ptr() < stop for tensor in blob.tensors for start, stop in spans)
    ]


def test_a_layer_that_is_not_mapped_in_gives_no_number(folder: Path) -> None:
    case = make_case(folder, make_rows(5), training=training(), streaming={"count": 2})
    slots = case.model.slots
    assert slots is not None
    with slots.holding(0, 1):
        assert all(torch.isfinite(tensor).all() for tensor in slots.blobs[0].tensors)
        assert all(torch.isnan(tensor).all() for tensor in slots.blobs[4].tensors)
        with (
            pytest.raises(RuntimeError, match="layer 3 was requested while layer 0 is being computed"),
            slots.holding(3),
        ):
            pass


class LateCopier(ThreadCopier):
    """Of one copy it says that it has ended when it has not: it is made after the layer has been computed."""

    def __init__(self, late: int) -> None:
        super().__init__(torch.device("cpu"))
        self.late, self.number = late, 0
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.marks_to_come = 2  # after the wait: of the next layer's poisoned slot, and of the computation itself
        self.waited = False

    def start(self, copies: Any, after: Any) -> Any:
        self.number += 1
        if self.number != self.late:
            return super().start(copies, after)
        self.pending = list(copies)
        return "late"

    def wait(self, copy: Any) -> None:
        if copy == "late":
            self.waited = True
        else:
            super().wait(copy)

    def mark(self) -> None:
        self.marks_to_come -= int(self.waited)
        if self.marks_to_come == 0:
            for target, source in self.pending:
                copy_bytes(target, source)
            self.pending = []


@pytest.mark.parametrize("late", [1, 4, 7])
def test_a_late_copy_is_noticed(folder: Path, late: int) -> None:
    """The check that all others rest on: were a copy not waited for, losses or gradients would not be the same."""
    plain = run(folder, training=training(max_steps=1))
    case = make_case(folder, make_rows(23), training=training(max_steps=1), streaming={"count": 2})
    case.parts.model.slots.copier = LateCopier(late)  # type: ignore[union-attr]
    try:
        case.run()
        noticed = plain.losses != case.losses or not torch.equal(weights(plain), weights(case))
    except TunekitError:
        noticed = True  # NaN
    assert noticed


class SlowCopier(ThreadCopier):
    """Copies take their time: whoever does not wait reads what was there before."""

    def _copy(self, copies: Any) -> None:
        import time

        time.sleep(0.005)
        super()._copy(copies)


def test_slow_copies_change_nothing(folder: Path) -> None:
    plain = run(folder)
    case = make_case(folder, make_rows(23), training=training(), streaming={"count": 3})
    case.parts.model.slots.copier = SlowCopier(torch.device("cpu"))  # type: ignore[union-attr]
    case.run()
    assert same((plain, case))


def test_an_error_in_the_middle_leaves_the_slots_usable(folder: Path) -> None:
    plain = run(folder)
    case = make_case(folder, make_rows(23), training=training(), streaming={"count": 2})
    objective, failing = case.parts.objective, [True]
    whole = objective.loss.loss

    def loss(*given: Any) -> Any:
        if failing:
            failing.clear()
            raise MemoryError
        return whole(*given)

    object.__setattr__(objective.loss, "loss", loss)  # the parts of an objective are frozen
    with pytest.raises(MemoryError):
        case.run()
    case.run()
    assert same((plain, case))


@pytest.mark.parametrize("number", [0, 3])
def test_an_error_in_the_very_first_forward_is_not_what_the_engine_learns_from(folder: Path, number: int) -> None:
    plain = run(folder)
    case = make_case(folder, make_rows(23), training=training(), streaming={"count": 2})
    layer, failing = case.model.base.family.layers(case.model.base.net)[number][1], [True]
    whole = layer.forward

    def forward(*given: Any, **named: Any) -> Any:
        if failing:
            failing.clear()
            raise MemoryError
        return whole(*given, **named)

    layer.forward = forward  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        case.run()
    case.run()
    assert same((plain, case))


def test_tensors_begin_at_multiples_of_64_bytes() -> None:
    tensors = [torch.randn(3), torch.randn(5, 7).to(torch.bfloat16), torch.tensor(2.0), torch.ones(9, dtype=torch.int8)]
    expected = [tensor.clone() for tensor in tensors]
    slots = make_slots([tensors], torch.device("cpu"), tier="host")
    with slots.holding(0):
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
        for tensor, values in zip(tensors, expected, strict=True):
            assert torch.equal(tensor, values)
            assert tensor.dtype == values.dtype


@pytest.mark.parametrize(
    ("sizes", "pieces"), [([832] * 32, [16384, 8192, 2048, 1024, 1024]), ([64, 640, 64], [512, 1024])]
)
def test_layers_share_pinned_pieces_of_powers_of_two(sizes: list[int], pieces: list[int]) -> None:
    """torch rounds each pinned block up to one: for 32 blocks of 832 bytes it would take 32,768."""
    asked: list[int] = []

    class Pinned(StreamCopier):
        def __init__(self) -> None: ...

        def memory(self, size_bytes: int, *, on_host: bool) -> Tensor:
            asked.append(size_bytes)
            return torch.empty(size_bytes, dtype=torch.uint8)

    blocks = list(host_memory(Pinned(), sizes))
    assert [block.numel() for block in blocks] == sizes
    assert all(block.storage_offset() % 64 == 0 for block in blocks)
    spans = sorted((block.data_ptr(), block.data_ptr() + block.numel()) for block in blocks)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert asked[1:] == pieces


def test_a_shared_tensor_lies_in_a_blob_once() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    layer[1].weight = layer[0].weight
    assert len(frozen_tensors(layer)) == 3
    assert LayerBlob(frozen_tensors(layer)).size_bytes == 3 * 64


def test_an_engine_without_stages_says_so(folder: Path) -> None:
    case = make_case(folder, make_rows(5), training=training(), streaming={})
    case.model.base.family = type("Uncut", (), {"stages": lambda self, net: None})()  # type: ignore[assignment]
    assert isinstance(case.parts.engine, StreamingEngine)
    with pytest.raises(TunekitError, match="cannot be computed layer by layer"), calling(Call()):
        case.step(next(case.steps.after(0)))
