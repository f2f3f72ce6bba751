"""`tunekit train` on a real model with every adapter method there is, through nothing but the recipe's `adapter:`.

The methods are the files of recipe/adapters/, so that a new one is tried here without being listed. Of each: the loss
ends below that of the same run at learning rate 0, every trained tensor changed, a resume from the middle gives the
same bytes, gradient checkpointing gives the same bytes, the last checkpoint of an adapter exports the same bytes, and
eval and generate work from the result's folder alone.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.train_case import losses
from tunekit.adapter import export_checkpoint_verb
from tunekit.evaluate import evaluate_verb
from tunekit.generate import generate_verb
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading.names import known_names
from tunekit.train import train_verb

STEPS = 2
RATE = 2e-3
# What a model of 64 x 64, 32 x 64 and 172 x 64 matrices needs in place of a method's defaults, and its learning rate.
SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 6, "target_r": 5},
    "c3a": {"block_size": 4},
    "cpt": {"token_ids": [1, 403, 407, 261], "token_types": [1, 2, 3, 4]},
    "delora": {"r": 8, "delora_lambda": 1},
    "miss": {"r": 8},
    "shira": {"r": 8},
    "vera": {"r": 32},
    "road": {"group_size": 4},
    "vblora": {"vector_length": 4, "num_vectors": 32},
    "randlora": {"r": 8, "alpha": 160},
    "fourierft": {"n_frequency": 200},
}
RATES = {"c3a": 0.1}
TEXTS = (
    "Once upon a time there was a little dog named Tim.",
    "Lily went to the park and saw a big red ball.",
    "The sun was warm and the birds sang in the trees.",
    "Tom was sad because his toy car was broken.",
)


def with_biases(stories: Path, folder: Path) -> Path:
    """The same model with biases of 0 in its attention: BitFit trains biases alone, and a llama has none."""
    shutil.copytree(stories, folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    folder.chmod(0o755)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "attention_bias": True}), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    ends = tuple(f"self_attn.{name}_proj.weight" for name in "qkvo")
    biases = {
        name.removesuffix("weight") + "bias": torch.zeros(len(tensor))
        for name, tensor in weights.items()
        if name.endswith(ends)
    }
    save_file({**weights, **biases}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_recipe(folder: Path, model: Path, method: str) -> Path:
    """Four rows, all of them in every step, so that the losses of steps and runs can be compared."""
    folder.mkdir()
    rows = [{"text": text} for text in TEXTS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {"train": "rows.jsonl", "packing": False},
        "adapter": {"method": method, **SETTINGS.get(method, {})},
        "training": {
            "learning_rate": RATES.get(method, RATE),
            "scheduler": "constant",
            "warmup_steps": 0,
            "max_steps": STEPS,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "save_steps": 1,
            "keep_checkpoints": STEPS,
        },
        "memory": {"gradient_checkpointing": False},
        "output": {"dir": "whole"},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def train(recipe: Path, name: str, *overrides: str, resume: bool = False) -> Path:
    """The run's folder."""
    run = recipe.parent / name
    train_verb(load_recipe(recipe, [f"output.dir={run}", *overrides]), resume, False)
    return run


def result_of(run: Path) -> Path:
    """The folder of the result: a model where the base itself was trained."""
    return next(run / name for name in ("adapter", "model") if (run / name).is_dir())


def result_bytes(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(result_of(run).iterdir())}


def trained(run: Path) -> dict[str, torch.Tensor]:
    """The trained tensors of the last checkpoint, which holds each group's in one buffer."""
    folder = run / "checkpoints" / f"step-{STEPS:06d}"
    tensors = load_file(folder / "tensors.safetensors")
    layout = json.loads((folder / "state.json").read_text("utf-8"))["facts"]["layout"]
    return {
        name: tensors[f"group{number}.weights"][start : start + math.prod(shape)]
        for number, group in enumerate(layout)
        for name, (start, *shape) in group.items()
    }


def cut_back(run: Path, to: Path) -> Path:
    """The run as it was when it died after its first step."""
    shutil.copytree(
        run, to, ignore=shutil.ignore_patterns("adapter", "model", "report.*", "status.json", "step-00000[2-9]")
    )
    return to


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", known_names("adapters"))
def test_a_method_trains(method: str, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = with_biases(stories, tmp_path / "base") if method == "bitfit" else stories
    recipe = write_recipe(tmp_path / "recipe", model, method)
    whole = train(recipe, "whole")
    still = train(recipe, "still", "training.learning_rate=0")
    assert len(losses(whole)) == len(losses(still)) == STEPS
    assert losses(whole)[-1] < losses(still)[-1]
    after, before = trained(whole), trained(still)
    assert after
    assert [name for name in after if torch.equal(after[name], before[name])] == []

    cut_back(whole, recipe.parent / "resumed")
    assert result_bytes(train(recipe, "resumed", resume=True)) == result_bytes(whole)
    recomputed = train(recipe, "recomputed", "memory.gradient_checkpointing=true")
    assert result_bytes(recomputed) == result_bytes(whole)

    alone = Path(shutil.copytree(result_of(whole), tmp_path / "alone"))
    base = None if (alone / "config.json").exists() else str(model)
    if base is not None:
        exported = recipe.parent / "exported"
        export_checkpoint_verb(f"{whole}@last", None, str(exported / "adapter"))
        assert result_bytes(exported) == result_bytes(whole)
    evaluate_verb(str(alone), base, str(recipe.parent / "rows.jsonl"), None, [], str(tmp_path / "eval.json"), [])
    measured = json.loads((tmp_path / "eval.json").read_text("utf-8"))
    assert measured["loss"] < losses(still)[0]
    capsys.readouterr()
    generate_verb(str(alone), base, [TEXTS[0][:20]], None, ["evaluation.max_new_tokens=4"])
    assert capsys.readouterr().out.strip()
    assert math.isfinite(measured["perplexity"])
