"""Image classification from recipe to merged model, against transformers, peft and torchvision by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import v2
from transformers import AutoModelForImageClassification, ViTImageProcessor

from tests.support.image_case import COLOURS, records, write_classes
from tests.support.plans import make_plan
from tests.support.tiny_vit import DEVIATION, MEAN, SIDE, write_tiny_vit
from tests.support.train_case import check_a_resume, write_sections
from tunekit.adapters.attach import attach_adapter
from tunekit.data.encoding import augmentation
from tunekit.data.encoding.images import read_image
from tunekit.errors import DataError, InputError
from tunekit.generate import generate_verb
from tunekit.merge import merge_verb
from tunekit.model.call import seed_for
from tunekit.model.families import image_classifier
from tunekit.model.families.image_classifier import PixelProcessor
from tunekit.model.load import load_model
from tunekit.preview import preview_verb
from tunekit.recipe.load import load_recipe
from tunekit.report import report_verb
from tunekit.targets.target import find_target, objective_of
from tunekit.train import train_verb

STEPS = 20


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("pictures"), count=6, height=18, width=24)


def write(folder: Path, model: Path, pictures: Path, **sections: dict[str, Any]) -> Path:
    values: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {"train": [{"path": str(pictures)}], "eval": [{"path": str(pictures)}]},
        "adapter": {"method": "lora", "r": 4, "alpha": 8},
        "objective": {"method": "image_classify"},
        "training": {
            "learning_rate": 1e-3,
            "scheduler": "constant",
            "warmup_steps": 0,
            "max_steps": STEPS,
            "micro_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "eval_steps": 100,
        },
        "output": {"dir": "run"},
    }
    return write_sections(folder, values, sections)


def trained(recipe: Path, run: Path, resume: bool = False) -> Path:
    train_verb(load_recipe(recipe, [f"output.dir={run}"]), resume, False)
    return run


def by_hand(recipe: Path, pictures: Path, augmented: bool) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the same steps with transformers, peft and torchvision."""
    plan, prepared = make_plan(load_recipe(str(recipe), []))
    base = load_model(prepared.model, device=torch.device("cpu"))
    head = {name: value.clone() for name, value in base.net.classifier.state_dict().items()}  # type: ignore[union-attr]
    first = attach_adapter(base.net, prepared.adapter, seed=0, head_name="classifier").state()
    model = AutoModelForImageClassification.from_pretrained(
        plan.model.name_or_path, num_labels=3, ignore_mismatched_sizes=True
    )
    model.classifier.load_state_dict(head)
    targets = [target.name for target in plan.targets]
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=["classifier"])
    )
    for name, parameter in model.named_parameters():
        own = name.removeprefix("base_model.model.").replace(".default", "")
        if "lora_" in name:
            parameter.data.copy_(first[own])
    files = sorted(pictures.rglob("*.png"))
    train = v2.Compose([v2.RandomResizedCrop(SIDE, (0.5, 1.0)), v2.RandomHorizontalFlip()])
    own = ViTImageProcessor.from_pretrained(plan.model.name_or_path)
    labels = sorted(COLOURS)

    def pixels(row: int, seed: int) -> torch.Tensor:
        image = Image.open(files[row])
        if augmented:
            torch.manual_seed(seed)
            image = train(torch.tensor(np.array(image)).permute(2, 0, 1))
        else:
            return own(image, return_tensors="pt")["pixel_values"][0]
        mean, deviation = torch.tensor(MEAN), torch.tensor(DEVIATION)
        return (image.float() / 255.0 - mean[:, None, None]) / deviation[:, None, None]

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    losses, norms = [], []
    for step in prepared.rows.steps(prepared.batch_settings).after(0):
        rows = [row.number for batch in step.batches for row in batch.rows]
        values = torch.stack([pixels(row, seed_for("augmentation", 0, step.step, row, 0)) for row in rows])
        answers = torch.tensor([labels.index(files[row].parent.name) for row in rows])
        loss = torch.nn.functional.cross_entropy(model(pixel_values=values).logits, answers)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)))
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


@pytest.mark.parametrize("augmented", [pytest.param(False, marks=pytest.mark.slow), True])
def test_20_steps_equal_transformers_peft_and_torchvision(
    tmp_path: Path, vit: Path, pictures: Path, augmented: bool
) -> None:
    objective = {} if augmented else {"random_resized_crop": False, "random_flip": False}
    recipe = write(tmp_path, vit, pictures, objective=objective)
    losses, norms = by_hand(recipe, pictures, augmented)
    ours = records(trained(recipe, tmp_path / "run"))
    assert len(losses) == STEPS
    assert [record["loss"] for record in ours] == pytest.approx(losses, abs=1e-5)
    assert [record["grad_norm"] for record in ours] == pytest.approx(norms, rel=1e-3)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, vit: Path, pictures: Path) -> None:
    objective = {"randaugment_ops": 2, "random_erasing": 0.3}
    training = {"max_steps": 4, "save_steps": 2, "keep_checkpoints": 3}
    recipe = write(tmp_path, vit, pictures, objective=objective, training=training)
    check_a_resume(recipe)
    plain = write(tmp_path / "plain", vit, pictures, training=training)
    assert records(trained(plain, tmp_path / "plain" / "run")) != records(tmp_path / "whole")


@pytest.mark.slow
def test_colours_are_learnt_answered_and_merged(
    tmp_path: Path, vit: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"learning_rate": 1e-2, "max_steps": 30, "eval_steps": 30}
    recipe = write(tmp_path, vit, pictures, training=training, evaluation={"metrics": ["loss", "accuracy"]})
    run = trained(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracies = [line["eval"]["accuracy"] for line in lines if "eval" in line]
    assert accuracies[-1] == 1.0 > accuracies[0]
    assert "supervised tokens" not in capsys.readouterr().out
    generate_verb(str(run), None, None, str(pictures / "red"), [])
    answers = [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]
    assert answers == ["red"] * 6
    with pytest.raises(DataError, match="it contains no recording and no image"):
        generate_verb(str(run), None, None, str(pictures), [])  # its folders hold them
    merge_verb(str(run), str(tmp_path / "merged"), None, None, [])
    assert "tokens" not in capsys.readouterr().out
    shutil.copytree(run, tmp_path / "again")
    report_verb([str(run), str(tmp_path / "again")], None, None, None)
    assert "pixels per second" in capsys.readouterr().out
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    processor = ViTImageProcessor.from_pretrained(tmp_path / "merged")
    image = Image.open(pictures / "green" / "0.png").resize((SIDE, SIDE))
    with torch.no_grad():
        scores = model(**processor(image, return_tensors="pt")).logits
    assert model.config.id2label[int(scores.argmax())] == "green"
    assert load_file(run / "adapter" / "adapter_model.safetensors").keys() >= {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }


@pytest.mark.drawn
def test_another_size_is_kept_by_the_adapter_and_the_merged_model(
    tmp_path: Path, vit: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    side = 2 * SIDE  # than the vision transformer has positions for
    settings = {"resolution": side, "random_resized_crop": False}
    recipe = write(tmp_path, vit, pictures, objective=settings, training={"max_steps": 1, "eval_steps": 1})
    run = trained(recipe, tmp_path / "run")
    objective: Any = objective_of(find_target(str(run / "adapter"), None, []), PixelProcessor(vit))
    assert objective.facts["resolution"] == objective.rows.processor.resolution == side
    merge_verb(str(run), str(tmp_path / "merged"), None, None, [])
    saved = json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text())
    assert saved["size"] == {"height": side, "width": side}
    warned = " ".join("".join(capsys.readouterr()).split())
    assert f"trained on images of {side} pixels, but the base has positions for {SIDE} pixels" in warned
    assert "interpolate_pos_encoding=True" in warned


def test_preview_tells_the_size_of_the_file(
    tmp_path: Path, vit: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preview_verb(load_recipe(write(tmp_path, vit, pictures, objective={"random_resized_crop": False})), 18, None)
    told = " ".join(capsys.readouterr().out.split())
    assert all(f"({24 - number} x {18 + number} pixels)" in told for number in range(6))


def test_a_table_names_pictures_and_bad_ones_are_told(tmp_path: Path, vit: Path, pictures: Path) -> None:
    rows = [{"image": str(path), "label": path.parent.name} for path in sorted(pictures.rglob("*.png"))]
    table = tmp_path / "rows.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    recipe = write(tmp_path, vit, table, data={"eval": 0.3})
    plan, prepared = make_plan(load_recipe(str(recipe), []))
    assert len(prepared.rows.train) + len(prepared.rows.evaluation or ()) == len(rows)
    assert not plan.refusals
    table.write_text("\n".join(map(json.dumps, [*rows, {"image": "absent.png", "label": "red"}])))
    with pytest.raises(InputError, match=r"rows\.jsonl:19: there is no image .*absent\.png"):
        make_plan(load_recipe(str(recipe), []))
    listed = write(tmp_path, vit, pictures, objective={"labels": ["red", "green"]})
    with pytest.raises(InputError, match="the label 'blue' is not among the labels"):
        make_plan(load_recipe(str(listed), []))


def hide(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, module, None)


def test_without_a_library_the_extra_is_named(
    tmp_path: Path, vit: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, recipe = next(pictures.rglob("*.png")), write(tmp_path, vit, pictures)
    with monkeypatch.context() as hiding:
        hide("PIL", hiding)
        with pytest.raises(InputError, match=r"images needs pillow, .*; run: pip install 'tunekit\[images\]'"):
            read_image(str(picture))
    hide("torchvision", monkeypatch)
    with pytest.raises(InputError, match=r"augmentation needs torchvision, .*; run: pip install 'tunekit\[images\]'"):
        make_plan(load_recipe(str(recipe)))


@pytest.mark.slow
@pytest.mark.parametrize(("library", "verb"), [("PIL", "plan"), ("PIL", "data check"), ("torchvision", "plan")])
def test_a_command_without_a_library_ends_in_one_line(
    library: str, verb: str, tmp_path: Path, vit: Path, pictures: Path
) -> None:
    hidden = f"import sys; sys.modules[{library!r}] = None; from tunekit.cli import main; main()"
    command = [sys.executable, "-c", hidden, *verb.split(), str(write(tmp_path, vit, pictures))]
    environment = os.environ | {"TUNEKIT_CACHE": str(tmp_path / "cache")}  # whose rows would need no reading
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert re.search(r"\A[^\n]*not installed[^\n]*; run: pip install 'tunekit\[images\]'\n\Z", done.stderr)


def test_a_processor_that_needs_a_library_names_the_extra(
    tmp_path: Path, vit: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = ImportError("Siglip2ImageProcessor requires the Torchvision library but it was not found")
    monkeypatch.setattr("transformers.AutoImageProcessor.from_pretrained", Mock(side_effect=lacking))
    monkeypatch.setattr(image_classifier, "find_spec", lambda name: None if name == "torchvision" else object())
    with pytest.raises(InputError, match=r"not installed: torchvision; .*tunekit\[images\]"):
        make_plan(load_recipe(str(write(tmp_path, vit, pictures))))


def test_images_that_no_step_changes_need_no_torchvision(
    tmp_path: Path, vit: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"random_resized_crop": False, "random_flip": False}
    recipe = write(tmp_path, vit, pictures, objective=plain, training={"max_steps": 1})
    monkeypatch.setattr(augmentation, "transforms", Mock(side_effect=AssertionError))
    trained(recipe, tmp_path / "run")
