"""Knowledge distillation: divergences against trl's, runs whose micro-batches, layouts, storages and stops change
nothing, and teachers that cannot teach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import write_tiny_llama
from tests.objectives.test_logprobs import CappedHead, numbers
from tests.support.plans import make_plan
from tests.support.train_case import lose_the_end, losses, records, result_bytes, without_times, write_recipe
from tunekit.companions.base import load_companions
from tunekit.contracts import ModelOutput
from tunekit.errors import ModelError, RecipeError, RunFolderError, TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.memory.streaming import layer_bytes
from tunekit.model.load import load_model
from tunekit.objectives.losses.logprobs import divergence, divergences
from tunekit.recipe.load import load_recipe
from tunekit.train import train_verb
from tunekit.tuned.model import ModelRun

POSITIONS, HIDDEN, WIDE = 11, 6, 10
CPU = torch.device("cpu")


class TeacherHead(nn.Module):
    """Of another width of hidden states than the student's; `unused`: rows that no token has."""

    def __init__(self, dtype: torch.dtype, unused: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers(7, 20, WIDE)[: 17 + unused].to(dtype), requires_grad=False)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_are_trls(beta: float, temperature: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    student, teacher = numbers(1, 1, POSITIONS, 17), 2 * numbers(2, 1, POSITIONS, 17)
    theirs = gkd.generalized_jsd_loss(student, teacher, beta=beta, temperature=temperature, reduction="sum")
    found = divergence(student[0], teacher[0], beta, temperature)
    assert found.sum().item() == pytest.approx(theirs.item(), rel=1e-12)
    assert (divergence(student[0], student[0], beta, temperature).abs() < 1e-12).all()


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_values_and_gradients_in_chunks(trained: bool, beta: float, chunk: int) -> None:
    """Against one pass in float64; the teacher's head has rows that the student's has not."""
    index = torch.tensor([3, 0, 5, 7, 7, 1, 9, 2, 13, 8, 4])
    exact, hidden, taught = CappedHead(torch.float64, trained), numbers(2, 2, 7, HIDDEN), numbers(4, POSITIONS, WIDE)
    hidden.requires_grad_()
    logits = TeacherHead(torch.float64).logits(taught)
    expected = divergence(exact.logits(hidden.reshape(-1, HIDDEN)[index]), logits, beta, 1.5)
    head, ours = CappedHead(torch.float32, trained), hidden.detach().float().requires_grad_()
    parameters = [head.weight] if trained else []
    output, of_teacher = ModelOutput(ours, head, parameters, chunk), TeacherHead(torch.float32, unused=3)
    found = divergences(output, index, taught.float(), of_teacher, beta=beta, temperature=1.5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = numbers(5, POSITIONS)
    wanted = [(ours, hidden), (head.weight, exact.weight)][: 1 + trained]
    gradients = torch.autograd.grad((found * upstream.float()).sum(), [one for one, _ in wanted])
    others = torch.autograd.grad((expected * upstream).sum(), [other for _, other in wanted])
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    assert head.rows <= chunk, "never more logits than a chunk's"
    with torch.no_grad():
        again = divergences(output, index, taught.float(), of_teacher, beta=beta, temperature=1.5)
        torch.testing.assert_close(again, found)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Larger than the student, over the same vocabulary."""
    return write_tiny_llama(tmp_path_factory.mktemp("teacher"), layers=3, hidden=96, seed=5)


def trained(folder: Path, student: Path, teacher: Path, run: str, *overrides: str, **objective: Any) -> Path:
    """One run of a shared recipe."""
    path = folder / "recipe.yaml"
    if not path.exists():
        values = {"method": "distill", "teacher": {"name_or_path": str(teacher), "dtype": "float32"}, **objective}
        write_recipe(folder, student, objective=values, adapter={"dropout": 0.0}, training={"save_steps": 100})
    train_verb(load_recipe(path, [f"output.dir={folder / run}", *overrides]), False, False)
    return folder / run


@pytest.mark.drawn
def test_a_run_learns_and_no_layout_changes_it(tiny_llama: Path, teacher: Path, tmp_path: Path) -> None:
    run = trained(tmp_path, tiny_llama, teacher, "run")
    evaluations = [record["eval"] for record in records(run) if "eval" in record]
    assert evaluations[-1]["loss"] < 0.8 * evaluations[0]["loss"]
    plain = losses(run)
    sizes = ["training.micro_batch_size=3", "training.gradient_accumulation_steps=2"]
    assert losses(trained(tmp_path, tiny_llama, teacher, "three", *sizes)) == pytest.approx(plain, rel=1e-4)
    streamed = trained(tmp_path, tiny_llama, teacher, "streamed", "memory.streaming=host")
    assert losses(streamed) == pytest.approx(plain, rel=1e-6)
    assert result_bytes(streamed) == result_bytes(run)
    planned = make_plan(load_recipe(tmp_path / "recipe.yaml"), device=CPU)[0]
    alone = make_plan(load_recipe(tmp_path / "recipe.yaml", ["objective=sft"]), device=CPU)[0]
    size = sum(parameter.numel() for parameter in _parameters(teacher)) * 4
    assert planned.peak_bytes.weights - alone.peak_bytes.weights == pytest.approx(size, rel=0.05)
    assert not planned.refusals


def _parameters(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).parameters()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_streamed_teacher_teaches_the_same(tier: str, tiny_llama: Path, teacher: Path, tmp_path: Path) -> None:
    """Bit by bit, whatever the teacher's layers wait in; each is copied once for all micro-batches of a step."""
    run = trained(tmp_path, tiny_llama, teacher, "run", "training.save_steps=2")
    whole = result_bytes(run)
    streamed = trained(tmp_path, tiny_llama, teacher, "streamed", f"objective.teacher_streaming={tier}")
    assert result_bytes(streamed) == whole
    assert losses(streamed) == losses(run)
    lose_the_end(run)
    overrides = [f"output.dir={run}", "training.save_steps=2", f"objective.teacher_streaming={tier}"]
    train_verb(load_recipe(tmp_path / "recipe.yaml", overrides), True, False)
    assert result_bytes(run) == whole, "where the teacher waits may change with a resume"
    loaded = load_recipe(tmp_path / "recipe.yaml", [f"objective.teacher_streaming={tier}"])
    planned, prepared = make_plan(loaded, device=CPU)
    resident = make_plan(load_recipe(tmp_path / "recipe.yaml"), device=CPU)[0]
    saved = resident.peak_bytes.weights - planned.peak_bytes.weights
    layers = layer_bytes(load_model(loaded.recipe.objective.teacher, device=CPU))
    assert saved == pytest.approx(layers / 3 if tier == "disk" else -2 * layers / 3, rel=0.25), "two of three in slots"
    assert any("layers are stored" in note and "once per step" in note for note in planned.notes)
    companion: Any = load_companions(prepared.rows.objective, CPU)["objective.teacher"]
    batches = [prepared.rows.objective.rows.collate([[prepared.rows.train[number]]]) for number in range(3)]
    run = ModelRun(companion.model, prepared.rows.objective.rows)
    companion.score(run, batches, lambda output, batch: output.hidden)
    assert companion.model.slots.copies == 3, "its layers"


def test_a_teacher_that_cannot_be_streamed(tiny_llama: Path, teacher: Path, tmp_path: Path) -> None:
    own = {"name_or_path": str(teacher), "trust_remote_code": True}
    path = write_recipe(
        tmp_path, tiny_llama, objective={"method": "distill", "teacher": own, "teacher_streaming": "disk"}
    )
    with pytest.raises(
        RecipeError, match=r"objective\.teacher_streaming: the teacher's layers cannot be streamed from disk: a ba"
    ):
        make_plan(load_recipe(path), device=CPU)


@pytest.mark.drawn
def test_a_resumed_run_equals_the_uninterrupted_one(tiny_llama: Path, teacher: Path, tmp_path: Path) -> None:
    run = trained(tmp_path, tiny_llama, teacher, "run", "training.save_steps=2", "data.packing=true")
    whole, lines = result_bytes(run), records(run)
    lose_the_end(run)
    overrides = [f"output.dir={run}", "training.save_steps=2", "data.packing=true"]
    train_verb(load_recipe(tmp_path / "recipe.yaml", overrides), True, False)
    assert result_bytes(run) == whole
    assert without_times(records(run)) == without_times(lines)
    lose_the_end(run)
    other = write_tiny_llama(tmp_path / "other", layers=3, hidden=96, seed=6)
    with pytest.raises(
        RunFolderError, match=r"objective\.teacher\.name_or_path: changed since the run: its content is different"
    ) as caught:
        train_verb(
            load_recipe(tmp_path / "recipe.yaml", [*overrides, f"objective.teacher.name_or_path={other}"]), True, False
        )
    assert len(caught.value.problems) == 1, "the base is the same, and where the teacher lies says nothing"


@pytest.mark.drawn
def test_a_teacher_teaches_nothing_to_itself_and_no_share_of_it_is_sft(
    tiny_llama: Path, teacher: Path, tmp_path: Path
) -> None:
    itself = trained(tmp_path / "itself", tiny_llama, tiny_llama, "run", "training.max_steps=1", "~training.epochs")
    assert abs(losses(itself)[0]) < 1e-6
    none = trained(tmp_path / "none", tiny_llama, teacher, "run", kd_ratio=0.0)
    assert losses(trained(tmp_path / "none", tiny_llama, teacher, "sft", "objective=sft")) == pytest.approx(
        losses(none), rel=1e-5
    )
    half = losses(trained(tmp_path / "none", tiny_llama, teacher, "half", "objective.kd_ratio=0.5"))[0]
    whole = losses(trained(tmp_path / "none", tiny_llama, teacher, "whole", "objective.kd_ratio=1"))[0]
    assert half == pytest.approx((whole + losses(none)[0]) / 2, rel=1e-5)


@pytest.mark.drawn
def test_the_result_is_evaluated_and_answers(tiny_llama: Path, teacher: Path, tmp_path: Path) -> None:
    """With its recipe against the teacher, as training did; a folder alone by cross entropy."""
    run = trained(tmp_path, tiny_llama, teacher, "run", "evaluation.metrics=[loss, token_accuracy]")
    last = [record["eval"] for record in records(run) if "eval" in record][-1]
    evaluate_verb(str(run), None, None, None, [], str(tmp_path / "eval.json"), [])
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-6)
    (run / "adapter").rename(tmp_path / "moved")
    rows = str(tmp_path / "train.jsonl")
    evaluate_verb(str(tmp_path / "moved"), None, rows, None, [], str(tmp_path / "moved.json"), [])
    assert "perplexity" in json.loads((tmp_path / "moved.json").read_text())


@pytest.mark.parametrize(
    ("teacher_values", "error", "said"),
    [
        ("./absent", ModelError, r"objective.teacher.name_or_path: there is no folder or file"),
        ({"name_or_path": "gpt2-like"}, RecipeError, "tokens have a different id, or no id, in the teacher"),
        ({"name_or_path": "tiny", "quantisation": "nf4"}, RecipeError, "objective.teacher.quantisation: unknown key"),
        (None, RecipeError, "objective.teacher: is required"),
    ],
)
def test_who_cannot_teach(
    teacher_values: Any, error: type[TunekitError], said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    if isinstance(teacher_values, dict) and teacher_values["name_or_path"] == "gpt2-like":
        other = write_tiny_llama(tmp_path / "gpt2-like")
        tokens = json.loads((other / "tokenizer.json").read_text())
        vocabulary = tokens["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (other / "tokenizer.json").write_text(json.dumps(tokens))
    objective = {"method": "distill"} | ({} if teacher_values is None else {"teacher": teacher_values})
    path = write_recipe(tmp_path, tiny_llama, objective=objective)
    with pytest.raises(error, match=said) as caught:
        train_verb(load_recipe(path), False, True)
    assert caught.value.exit_code == 2


def test_the_students_head_cannot_be_streamed(tiny_llama: Path, teacher: Path, tmp_path: Path) -> None:
    objective = {"method": "distill", "teacher": str(teacher)}
    path = write_recipe(tmp_path, tiny_llama, objective=objective, memory={"streamed_head": True})
    with pytest.raises(RecipeError, match=r"memory.streamed_head: the divergence needs"):
        make_plan(load_recipe(path), device=CPU)
