"""A base divided among ranks gives the curve of one rank, whatever each rank has to do."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.conftest import write_tiny_llama
from tests.support.plans import make_plan
from tests.support.ranks_case import LAYERS, differences, stop_at, train_in_ranks, write_case
from tests.support.train_case import end_of, free_port, kill_self, start_child, write_recipe
from tunekit.errors import OtherRankError
from tunekit.machine.devices import Devices
from tunekit.machine.memory import peak_host_bytes
from tunekit.memory.copies import Copy
from tunekit.memory.sharding import RankCopier, ShardedBlob, ShardedTable
from tunekit.model.load import make_meta_model
from tunekit.model.quantized.weights import stored_bytes
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.reading.supported import refuse_unsupported
from tunekit.records import Plan

CPU = torch.device("cpu")
SHARDED = "memory.sharding=full"
TOLERANCE = 1e-6


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_shares_of_all_ranks_are_the_whole_unit(world: int) -> None:
    tensors = [torch.randn(7, 5), torch.arange(33, dtype=torch.uint8), torch.randn(()), torch.randn(70).bfloat16()]
    copies, shares = [tensor.clone() for tensor in tensors], []
    for rank in range(world):
        blob = ShardedBlob([tensor.clone() for tensor in tensors], world)
        shares.append(blob.keep_share(rank, CPU, frozenset()))
        assert all(tensor.untyped_storage().nbytes() < 5 for tensor in blob.tensors), "nothing else is kept"
    assert len({len(share) for share in shares}) == 1
    blob.bind(torch.cat(shares))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(blob.tensors, copies, strict=True))


def test_a_rank_reads_a_mapped_file_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the file's pages of a whole table would be in memory beside the share."""
    released: list[torch.Tensor] = []
    monkeypatch.setattr("tunekit.memory.sharding.forget_pages", released.append)
    monkeypatch.setattr("tunekit.memory.sharding.CHUNK_BYTES", 1000)
    table = torch.arange(5000, dtype=torch.int32)
    copy, mapped = table.clone(), frozenset([table.data_ptr()])
    shares = [ShardedBlob([table.view(-1)], 2).keep_share(rank, CPU, mapped) for rank in range(2)]
    assert torch.equal(torch.cat(shares)[: copy.nbytes].view(torch.int32), copy)
    chunks = [part.nbytes for part in released if part.nbytes < copy.nbytes]
    assert max(chunks) == 1000
    assert sum(chunks) == copy.nbytes


class OneRank:
    """Devices of one rank, whose gathering is a copy."""

    world, rank = 1, 0

    def numbers(self, number: int) -> list[int]:
        return [number]

    def gather_shares(self, target: torch.Tensor, share: torch.Tensor) -> list[OneRank]:
        target.copy_(share)
        return [self]

    def wait(self) -> None:
        pass


def test_a_table_is_there_while_it_is_used_only() -> None:
    table = nn.Embedding(11, 4).requires_grad_(False)
    ids, weight = torch.tensor([3, 9]), table.weight.data.clone()
    blob = ShardedBlob([table.weight], 1)
    copier = RankCopier(OneRank(), [blob.keep_share(0, CPU, frozenset())])  # type: ignore[arg-type]
    sharded = ShardedTable(blob, [table], copier)
    for _ in range(2):
        assert torch.equal(table(ids), weight[ids])
        sharded.free()
        assert table.weight.isnan().all()
    with pytest.raises(RuntimeError, match="outside of its slot"):
        blob.bind_source()


def in_two_ranks(work: Callable[[Devices], None], folder: Path) -> None:
    port = free_port()

    def join(rank: int) -> None:
        from accelerate.state import PartialState

        PartialState._reset_state()  # type: ignore[no-untyped-call]
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in values.items()} | {"MASTER_ADDR": "127.0.0.1"})
        signal.alarm(60)

    def run() -> None:
        devices = Devices(CPU)
        work(devices)
        devices.close()

    logs = [folder / str(rank) for rank in range(2)]
    children = [start_child(run, log, partial(join, rank)) for rank, log in enumerate(logs)]
    for child, log in zip(children, logs, strict=True):
        ended = end_of(child, log)
        assert ended.code == 0, ended.output


def test_a_gathered_unit_is_in_memory_once(tmp_path: Path) -> None:
    """gloo's own gathering copies it, which the plan would have to count."""

    def work(devices: Devices) -> None:
        share, target = torch.full((2**25,), devices.rank + 1, dtype=torch.uint8), torch.zeros(2**26, dtype=torch.uint8)
        before = peak_host_bytes()
        for part in devices.gather_shares(target, share):
            part.wait()
        grown = peak_host_bytes() - before
        assert target.view(2, -1).sum(1).tolist() == [2**25, 2**26]
        assert grown < 2**24, grown

    in_two_ranks(work, tmp_path)


def test_ranks_may_need_different_units_and_different_numbers_of_them(tmp_path: Path) -> None:
    """Rank 0 gathers five times, rank 1 twice and in another order; then both exchange a number."""

    def work(devices: Devices) -> None:
        units = [torch.full((64,), 10 * unit + devices.rank, dtype=torch.uint8) for unit in range(3)]
        copier = RankCopier(devices, units)
        devices.before_exchange = copier.help_others
        for unit in ((0, 1, 2, 1, 0), (2, 0))[devices.rank]:
            target = torch.empty(128, dtype=torch.uint8)
            copier.wait(copier.start([(target, units[unit])], None))
            assert target[:64].eq(10 * unit).all()
            assert target[64:].eq(10 * unit + 1).all()
        assert devices.gather([devices.rank]) == [0, 1]
        assert devices.sum(torch.tensor([1.0])).item() == 2

    in_two_ranks(work, tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["adapter.start.method=pissa"], "adapter.start: pissa needs the whole base on one device"),
        (["adapter.start.method=eva"], "adapter.start: eva needs the whole base on one device"),
        (["memory.streaming=disk"], "memory.streaming: disk stores it on the host"),
        (["memory.streamed_head=true"], "memory.streamed_head stores a part of it on the host"),
        (["~adapter", "adapter.method=full"], "full trains the base's own weights"),
        (["~adapter", "adapter.method=prefix"], "the initial values of prefix need the whole base on one device"),
    ],
)
def test_what_needs_the_whole_base_is_refused_by_name(tmp_path: Path, changes: list[str], reason: str) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "so"}\n', encoding="utf-8")
    values = {"model": "org/base", "data": {"train": "train.jsonl"}, "output": {"dir": "run"}, "adapter": {"r": 4}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    problems = refuse_unsupported(load_recipe(path, [SHARDED, *changes]).recipe)
    assert [(problem.key, problem.what) for problem in problems if problem.key == "memory.sharding"] == [
        ("memory.sharding", f"the base cannot be sharded: {reason}")
    ]


def require_same(one: Path, other: Path) -> None:
    largest = differences(one, other)
    relative = {name: value for name, value in largest.items() if "perplexity" not in name}
    assert max(relative.values()) <= 10 * TOLERANCE, largest
    assert largest.get("loss", 0.0) <= TOLERANCE, largest
    mine, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    assert mine.keys() == theirs.keys()
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) <= 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("start", ["loftq", "init_from"])
def test_a_start_from_other_files_is_that_of_one_rank(start: str, tmp_path: Path, shared: Path) -> None:
    recipe, more = write_case("sft", tmp_path, shared), ["model.quantization=nf4"]
    if start == "loftq":
        more.append("adapter.start=loftq")
    else:
        (first,) = train_in_ranks(recipe, tmp_path / "first", *more, "training.seed=5", world=1)
        assert first.code == 0, first.output
        more.append(f"adapter.init_from={tmp_path / 'first'}")
    (one,) = train_in_ranks(recipe, tmp_path / "one", *more, world=1)
    assert one.code == 0, one.output
    ends = train_in_ranks(recipe, tmp_path / "two", *more, SHARDED)
    assert [end.code for end in ends] == [0, 0], ends[0].output + ends[1].output
    require_same(tmp_path / "one", tmp_path / "two")
    whole, divided = (json.loads((tmp_path / name / "report.json").read_text("utf-8")) for name in ("one", "two"))
    assert "base_bytes_of_rank" not in whole
    assert divided["base_bytes"] == whole["base_bytes"]
    assert divided["base_bytes_of_rank"] == pytest.approx(whole["base_bytes"] / 2, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("objective", ["sft", "dpo", "grpo", "seq2seq", "classify"])
def test_two_ranks_with_half_a_base_each_give_the_curve_of_one(
    objective: str, quantization: str, tmp_path: Path, shared: Path
) -> None:
    recipe, more = write_case(objective, tmp_path, shared), f"model.quantization={quantization}"
    (one,) = train_in_ranks(recipe, tmp_path / "one", more, world=1)
    assert one.code == 0, one.output
    ends = train_in_ranks(recipe, tmp_path / "two", more, SHARDED)
    assert [end.code for end in ends] == [0, 0], ends[0].output + ends[1].output
    assert "each of the 2 ranks stores" in ends[0].output
    require_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_run_goes_on_with_four_then_two_then_one_rank(tmp_path: Path, shared: Path) -> None:
    recipe = write_case("sft", tmp_path, shared)
    long = ["training.epochs=3", "training.save_steps=1"]
    (one,) = train_in_ranks(recipe, tmp_path / "one", *long, world=1)
    assert one.code == 0, one.output
    for world, last in ((4, 2), (2, 4), (1, None)):
        ends = train_in_ranks(
            recipe, tmp_path / "many", *long, SHARDED, world=world, resume=world < 4, before=partial(stop_at, last)
        )
        wanted = 0 if last is None else 143
        assert [end.code for end in ends] == [wanted] * world, ends[0].output
    require_same(tmp_path / "one", tmp_path / "many")


def die_after(gatherings: int) -> None:
    """In a rank's process: rank 1 is killed in the middle of a round."""
    start, count = RankCopier.start, itertools.count(1)

    def counted(self: RankCopier, copies: Any, after: Any) -> Copy:
        if os.environ["RANK"] == "1" and next(count) == gatherings:
            kill_self()
        return start(self, copies, after)

    RankCopier.start = counted  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("gatherings", range(1, 100, 5))  # a rank gathers about 100 times
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(gatherings: int, tmp_path: Path, shared: Path) -> None:
    recipe = write_case("sft", tmp_path, shared)
    long = ["training.epochs=3", "training.save_steps=1"]
    (one,) = train_in_ranks(recipe, tmp_path / "one", *long, world=1)
    assert one.code == 0, one.output
    ends = train_in_ranks(recipe, tmp_path / "two", *long, SHARDED, before=partial(die_after, gatherings))
    assert [end.code for end in ends] == [OtherRankError.exit_code, -signal.SIGKILL], ends[0].output
    assert "of 2 is lost: its process has ended" in json.loads((tmp_path / "two" / "status.json").read_text())["reason"]
    resumed = train_in_ranks(recipe, tmp_path / "two", *long, SHARDED, resume=True)
    assert [end.code for end in resumed] == [0, 0], resumed[0].output
    require_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("rows", range(3, 13))
def test_uneven_rows_change_nothing(rows: int, tmp_path: Path, shared: Path) -> None:
    """From fewer rows than ranks in a step to several micro-batches more on one rank; with evaluation and answers."""
    recipe = write_case("sft", tmp_path, shared)
    lines = (tmp_path / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
    more = ["data.eval=0.34", "training.epochs=2", "training.gradient_accumulation_steps=2", "evaluation.batch_size=1"]
    more += ["evaluation.metrics=[exact_match]", "evaluation.max_new_tokens=3", "training.micro_batch_size=1"]
    (one,) = train_in_ranks(recipe, tmp_path / "one", *more, world=1)
    assert one.code == 0, one.output
    ends = train_in_ranks(recipe, tmp_path / "three", *more, SHARDED, world=3)
    assert [end.code for end in ends] == [0, 0, 0], ends[0].output + ends[1].output
    require_same(tmp_path / "one", tmp_path / "three")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, write_tiny_llama(tmp_path / "m", layers=LAYERS), data={"eval": None})


def plan_of(recipe: Path, ranks: int, *overrides: str) -> Plan:
    return make_plan(load_recipe(recipe, overrides), device=CPU, ranks=ranks)[0]


@pytest.mark.drawn
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_plan_states_the_memory_of_one_rank(recipe: Path, ranks: int) -> None:
    resident, sharded = plan_of(recipe, 1), plan_of(recipe, ranks, SHARDED)
    assert not sharded.refusals
    base = make_meta_model(ModelSection(name_or_path=str(recipe.parent / "m"), dtype="float32"), device=CPU)
    layer = stored_bytes(base.net.get_submodule("model.layers.0"))
    table = stored_bytes(base.net.get_submodule("lm_head"))
    expected = stored_bytes(base.net) / ranks + 2 * layer + table
    assert sharded.peak_bytes.weights == pytest.approx(expected, rel=0.01)
    assert resident.peak_bytes.weights > expected
    assert any(note.startswith(f"sharded: each of the {ranks} ranks stores") for note in sharded.notes)


@pytest.mark.drawn
def test_auto_shards_only_a_base_that_does_not_fit(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_of(recipe, 2).choice.streaming == "off"
    resident = plan_of(recipe, 2, "memory.gradient_checkpointing=true").peak_bytes.total
    sharded = plan_of(recipe, 2, SHARDED).peak_bytes.total
    assert sharded < resident
    monkeypatch.setattr("tunekit.planning.prepared.available_bytes", lambda device: (resident + sharded) // 2)
    assert plan_of(recipe, 2).choice.streaming == "ranks"
    assert plan_of(recipe, 2, "memory.sharding=off").choice.streaming == "disk"
    assert plan_of(recipe, 1).choice.streaming == "disk"
    assert any("has no effect" in note for note in plan_of(recipe, 1, SHARDED).notes)
