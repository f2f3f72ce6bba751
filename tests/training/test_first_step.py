"""What is found at the first step or before it: rows that see each other, trained tensors without a gradient."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.architectures.tiny import write_tiny
from tests.support.train_case import records, write_recipe
from tunekit.errors import AdapterError
from tunekit.model.attention.segments import Segments
from tunekit.recipe.load import load_recipe
from tunekit.train import train_verb
from tunekit.training.engine import _kind

LEAKY = "packed rows attend to each other in llama"


def train(recipe: Path, run: Path, *overrides: str, dry_run: bool = False) -> None:
    train_verb(load_recipe(recipe, [f"output.dir={run}", "adapter.dropout=0", *overrides]), False, dry_run)


@pytest.mark.drawn
@pytest.mark.parametrize("start", ["default", "eva"])
def test_rows_that_see_each_other_are_padded_instead(
    start: str, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Attention that takes a sequence as one document, however its positions restart."""
    recipe, chosen = write_recipe(tmp_path / "recipe", tiny_llama), f"adapter.start={start}"
    train(recipe, tmp_path / "apart", chosen)
    one = lambda position_ids, **_: Segments(tuple((len(row),) for row in position_ids))  # noqa: E731
    monkeypatch.setattr("tunekit.tuned.model.find_segments", one)
    train(recipe, tmp_path / "leaky", chosen)
    assert LEAKY in capsys.readouterr().err
    plan = json.loads((tmp_path / "leaky" / "plan.json").read_text())
    assert "otherwise they are padded" in plan["rows"]["packing_reason"]
    (reaction,) = json.loads((tmp_path / "leaky" / "report.json").read_text())["reactions"]
    assert reaction["probe"].startswith(LEAKY)
    assert (reaction["action"], reaction["step"]) == ("rows are padded instead", 0)
    apart, padded = ([each["loss"] for each in records(tmp_path / run) if "loss" in each] for run in ("apart", "leaky"))
    assert padded == pytest.approx(apart, rel=1e-5)


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("mamba", tmp_path_factory.mktemp("mamba"))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("targets", ["[in_proj, dt_proj]", "[dt_proj]"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_tensor_that_no_gradient_reaches_is_named(tmp_path: Path, mamba: Path, targets: str, dry_run: bool) -> None:
    recipe = write_recipe(tmp_path / "recipe", mamba, rows=5)
    with pytest.raises(AdapterError, match=r"no gradient reaches backbone\.layers\.0\.mixer\.dt_proj\.lora_A\.weight"):
        train(recipe, tmp_path / "run", f"adapter.target_modules={targets}", "memory.streaming=off", dry_run=dry_run)
    assert not list(tmp_path.glob("run/checkpoints/step-*"))


def test_all_linear_leaves_such_layers_out(tmp_path: Path, mamba: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe", mamba, rows=5)
    train(recipe, tmp_path / "run", "training.epochs=1")
    targets = json.loads((tmp_path / "run" / "plan.json").read_text())["targets"]
    assert {target["name"].rpartition(".")[2] for target in targets} == {"in_proj", "x_proj"}, "peft refuses out_proj"


def test_an_expert_without_tokens_is_no_loss() -> None:
    name = "model.layers.{}.mlp.experts.{}.w{}.lora_A.weight"
    assert _kind(name.format(3, 0, 1)) == _kind(name.format(3, 7, 1))
    assert _kind(name.format(3, 0, 1)) not in {_kind(name.format(4, 0, 1)), _kind(name.format(3, 0, 2))}
