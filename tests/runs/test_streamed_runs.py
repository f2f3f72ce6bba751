"""`memory.streaming` in whole runs: the files that other runs leave, of every kind of base, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import write_tiny_llama
from tests.support.plans import make_plan
from tests.support.train_case import write_recipe
from tunekit.errors import TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.memory.streaming import BANDWIDTHS, gather_on_host, layer_bytes, max_tokens_per_second
from tunekit.model.load import load_model, make_meta_model
from tunekit.planning.prepared import read_resources
from tunekit.planning.tiers import weight_notes
from tunekit.recipe.load import load_recipe
from tunekit.recipe.memory import MemorySection
from tunekit.recipe.model import ModelSection
from tunekit.records import ExecutionSettings
from tunekit.train import train_verb

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("four-layers"), layers=4)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder in which bases of any size are kept."""
    monkeypatch.setattr("tunekit.model.storage.sidecar.MIN_BYTES", 0)
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


def train(recipe: Path, run: Path, *overrides: str, resume: bool = False) -> dict[str, Any]:
    train_verb(load_recipe(recipe, [f"output.dir={run}", *overrides]), resume, False)
    return json.loads((run / "report.json").read_text("utf-8"))  # type: ignore[no-any-return]


def result(run: Path) -> tuple[bytes, list[float]]:
    """The adapter's bytes and the losses of all steps and evaluations."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [line["loss"] if "loss" in line else line["eval"]["loss"] for line in lines]
    return (run / "adapter" / "adapter_model.safetensors").read_bytes(), losses


def plan_of(recipe: Path, *overrides: str) -> Any:
    return make_plan(load_recipe(recipe, overrides), device=CPU)[0]


STORED = (  # and how many files are kept
    (["model.dtype=float32"], 0),  # the base's own files are mapped
    (["model.dtype=bfloat16"], 1),  # they hold another dtype than is computed
    (["model.dtype=bfloat16", "model.quantization=nf4"], 1),
    (["model.quantization=int8_weight_only"], 1),
)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("storage", "files", "tier"),
    [
        pytest.param(*stored, tier, marks=[pytest.mark.slow] if (number + (tier == "host")) % 2 else [])
        for number, stored in enumerate(STORED)
        for tier in ("disk", "host")
    ],
)
def test_a_streamed_run_leaves_the_same_files(
    tmp_path: Path, model: Path, kept: Path, storage: list[str], files: int, tier: str
) -> None:
    recipe = write_recipe(tmp_path / "recipe", model)
    train(recipe, tmp_path / "off", *storage, "memory.streaming=off")
    before = len(list(kept.glob("*"))) if kept.exists() else 0
    train(recipe, tmp_path / "on", *storage, f"memory.streaming={tier}")
    assert result(tmp_path / "on") == result(tmp_path / "off")
    plan = json.loads((tmp_path / "on" / "plan.json").read_text("utf-8"))
    assert (plan["choice"]["streaming"], plan["choice"]["pass_micro_batches"]) == (tier, 3)
    assert (len(list(kept.glob("*"))) if kept.exists() else 0) == max(before, files)


def test_the_layers_weights_are_views_into_files(model: Path, kept: Path) -> None:
    for section in (
        ModelSection(name_or_path=str(model), dtype="float32"),
        ModelSection(name_or_path=str(model), dtype="bfloat16"),
        ModelSection(name_or_path=str(model), dtype="bfloat16", quantization="nf4"),
    ):
        plain, mapped = load_model(section, device=CPU), load_model(section, device=CPU, streamed=True)
        assert len(mapped.mapped) >= 4 * 9
        for (name, ours), (_, theirs) in zip(
            plain.net.state_dict().items(), mapped.net.state_dict().items(), strict=True
        ):
            assert torch.equal(ours, theirs), name


@pytest.mark.drawn
def test_a_resumed_run_goes_on_alike_in_either_way(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe", model)
    train(recipe, tmp_path / "whole", "memory.streaming=disk", "evaluation.patience=null")
    overrides = ("memory.streaming=disk", "training.save_steps=1")
    from tests.support.train_case import in_child

    def work() -> None:
        import os
        import signal

        from tunekit.training.run import Run

        save, saved = Run._save, []

        def stop(run: Any) -> None:
            save(run)
            saved.append(run.state.step)
            if len(saved) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        Run._save = stop
        train(recipe, tmp_path / "run", *overrides)

    ended = in_child(work, tmp_path / "log")
    assert ended.code == -9, ended.output
    train(recipe, tmp_path / "run", *overrides, resume=True)
    assert result(tmp_path / "run")[0] == result(tmp_path / "whole")[0]


@pytest.mark.drawn
def test_a_streamed_run_is_evaluated_alike(tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe", model)
    for tier in ("off", "disk"):
        train(recipe, tmp_path / tier, f"memory.streaming={tier}")
        evaluate_verb(str(tmp_path / tier), None, None, None, [], str(tmp_path / f"{tier}.json"), [])
    assert (tmp_path / "off.json").read_text() == (tmp_path / "disk.json").read_text()


@pytest.mark.drawn
def test_a_budget_too_small_for_the_base_streams_it(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "recipe", model)
    resident = plan_of(recipe, "memory.streaming=off", "memory.gradient_checkpointing=true")
    streamed = plan_of(recipe, "memory.streaming=disk")
    assert streamed.peak_bytes.weights < resident.peak_bytes.weights
    between = (resident.peak_bytes.total + streamed.peak_bytes.total) // 2
    monkeypatch.setattr("tunekit.planning.prepared.available_bytes", lambda device: between)
    plan = plan_of(recipe)
    assert not plan.refusals
    assert plan.choice.streaming == "disk"
    assert any("speed of streaming" in note for note in plan.notes)


def test_a_streamed_run_is_told_how_fast_it_can_be(model: Path) -> None:
    base = make_meta_model(ModelSection(name_or_path=str(model), dtype="float32"), device=CPU)
    choice = ExecutionSettings(1, 4, 64, streaming="disk", pass_micro_batches=4)
    notes = list(weight_notes(MemorySection(), base, read_resources(CPU), choice, tokens=50))
    rate = BANDWIDTHS["disk"]["NVMe of PCIe 3"] * 200 / (2 * layer_bytes(base))  # BW T / (2 b): there and back
    assert f"{rate:,.0f} over NVMe of PCIe 3" in notes[1]
    assert f"{2 * rate:,.0f} over NVMe of PCIe 4" in notes[1]
    assert max_tokens_per_second(1000, 10**9, 25e9) == 12_500
    assert not list(weight_notes(MemorySection(), base, CPU, ExecutionSettings(1, 4, 64), tokens=50))


@pytest.mark.drawn
def test_pass_sizes_fall_until_a_pass_fits(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path / "recipe", model)
    accumulation = "training.gradient_accumulation_steps=4"
    plans = [plan_of(recipe, "memory.streaming=disk", accumulation)]
    assert plans[0].choice.pass_micro_batches == 4
    for expected in (2, 1):
        limit = plans[-1].peak_bytes.total - 1
        monkeypatch.setattr("tunekit.planning.prepared.available_bytes", lambda device, limit=limit: limit)
        plans.append(plan_of(recipe, "memory.streaming=disk", accumulation))
        assert plans[-1].choice.pass_micro_batches == expected
        assert plans[-1].peak_bytes.total < plans[-2].peak_bytes.total


@pytest.mark.drawn
def test_a_disk_too_full_for_the_sidecar_is_said(
    tmp_path: Path, model: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunekit.model.storage.sidecar.SPARE_BYTES", 2**60)
    recipe = write_recipe(tmp_path / "recipe", model)
    with pytest.raises(TunekitError, match="TUNEKIT_CACHE") as caught:
        train(recipe, tmp_path / "run", "memory.streaming=disk", "model.dtype=bfloat16")
    assert caught.value.exit_code == 4


def test_rows_of_an_embedding_are_gathered_where_it_lies() -> None:
    embedding = torch.nn.Embedding(7, 3)
    ids = torch.tensor([[1, 6, 1]])
    expected = embedding(ids)
    gather_on_host(embedding, CPU)
    assert torch.equal(embedding(ids), expected)
