"""DreamBooth from recipe to files: against diffusers' script by hand, resumed, in micro-batches, drawn and merged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.image_case import (
    ATTENTION,
    CLASS_PROMPT,
    OF_TEXT,
    ByHand,
    adapter_tensors,
    records,
    write_image_recipe,
    write_photos,
)
from tests.support.plans import make_plan
from tests.support.tiny_pipelines import SIZE, loaded_by_diffusers, saved_pipeline
from tests.support.train_case import check_a_resume, lose_the_end
from tunekit.adapter import adopt_verb
from tunekit.artifacts.report.plan_page import facts, memory_rows, target_rows
from tunekit.companions.pipeline import ClassImages
from tunekit.contracts import EncodeOptions
from tunekit.errors import InputError
from tunekit.evaluate import evaluate_verb
from tunekit.export import export_verb
from tunekit.generate import generate_verb
from tunekit.merge import merge_verb
from tunekit.model.families.pipeline.processor import load_processor
from tunekit.objectives.dreambooth import make
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.dreambooth import DreamboothSettings
from tunekit.recipe.recipe import make_objective_settings
from tunekit.train import train_verb

STEPS = 20


def trained(recipe: Path, run: Path, *overrides: str, resume: bool = False) -> Path:
    train_verb(load_recipe(recipe, [f"output.dir={run}", *overrides]), resume, False)
    return run


def with_prior(folder: Path, weight: float = 0.7) -> dict[str, Any]:
    """Settings of prior preservation, with three pictures of the class."""
    classes = write_photos(folder / "classes", 3, seed=9)
    return {
        "class_prompt": CLASS_PROMPT,
        "class_data_dir": str(classes),
        "num_class_images": 3,
        "prior_loss_weight": weight,
    }


@pytest.mark.parametrize(
    ("prediction", "prior", "text"),
    [
        ("epsilon", False, False),
        pytest.param("v_prediction", True, False, marks=pytest.mark.slow),
        pytest.param("epsilon", True, True, marks=pytest.mark.slow),
        pytest.param("v_prediction", False, True, marks=pytest.mark.slow),
    ],
)
def test_20_steps_equal_diffusers_script_by_hand(
    tmp_path: Path, shared: Path, prediction: str, prior: bool, text: bool
) -> None:
    photos = shared / "data" / "dreambooth_dog" / "instance"
    pipeline = saved_pipeline(tmp_path / "sd", "sd", prediction)
    objective = {"train_text_encoder": text, **(with_prior(tmp_path) if prior else {})}
    adapter = {"target_modules": [*ATTENTION, *OF_TEXT]} if text else {}
    training = {"max_steps": STEPS}
    recipe = write_image_recipe(tmp_path, pipeline, photos, objective=objective, adapter=adapter, training=training)
    hand = ByHand(recipe, photos)
    steps = hand.planned.rows.steps(hand.planned.batch_settings)
    losses, norms = zip(*map(hand.step, steps.after(0)), strict=True)
    run = trained(recipe, tmp_path / "run")
    ours = records(run)
    assert [record["loss"] for record in ours] == pytest.approx(losses, abs=1e-5)
    assert [record["grad_norm"] for record in ours] == pytest.approx(norms, rel=1e-3)
    assert len(losses) == STEPS
    found = adapter_tensors(run / "adapter")
    assert any(name.startswith("base_model.model.text_encoder.") for name in found) == text
    for name, parameter in hand.parameters.items():
        assert torch.allclose(found[f"base_model.model.{name}"], parameter.detach(), atol=2e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_10_steps_of_other_pipelines_equal_diffusers_scripts_by_hand(tmp_path: Path, photos: Path, kind: str) -> None:
    pipeline = saved_pipeline(tmp_path / kind, kind)
    recipe = write_image_recipe(tmp_path, pipeline, photos, objective=with_prior(tmp_path), training={"max_steps": 10})
    hand = ByHand(recipe, photos, kind)
    steps = hand.planned.rows.steps(hand.planned.batch_settings)
    losses, norms = zip(*map(hand.step, steps.after(0)), strict=True)
    ours = records(trained(recipe, tmp_path / "run"))
    assert [record["loss"] for record in ours] == pytest.approx(losses, abs=1e-5)
    assert [record["grad_norm"] for record in ours] == pytest.approx(norms, rel=1e-3)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_pipeline(tmp_path_factory.mktemp("pipeline") / "sd", "sd")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


VARIED = {"center_crop": False, "random_flip": True, "noise_offset": 0.1, "snr_gamma": 5.0}


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, pipeline: Path, photos: Path) -> None:
    objective = {**VARIED, **with_prior(tmp_path), "train_text_encoder": True}
    adapter = {"target_modules": [*ATTENTION, *OF_TEXT], "dropout": 0.1}
    training = {"max_steps": 6, "save_steps": 3, "keep_checkpoints": 3, "gradient_accumulation_steps": 2}
    recipe = write_image_recipe(tmp_path, pipeline, photos, objective=objective, adapter=adapter, training=training)
    check_a_resume(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_equal_one_batch(tmp_path: Path, pipeline: Path, photos: Path, size: int) -> None:
    runs = []
    for rows in (4, size):
        training = {"micro_batch_size": rows, "gradient_accumulation_steps": 4 // rows, "max_steps": 3}
        objective = {**VARIED, **with_prior(tmp_path / str(rows))}
        recipe = write_image_recipe(tmp_path / str(rows), pipeline, photos, objective=objective, training=training)
        runs.append(trained(recipe, tmp_path / str(rows) / "run"))
    one, several = (records(run) for run in runs)
    assert [record["loss"] for record in several] == pytest.approx([record["loss"] for record in one], abs=1e-6)
    assert [record["grad_norm"] for record in several] == pytest.approx(
        [record["grad_norm"] for record in one], rel=1e-4
    )


@pytest.mark.slow
def test_100_steps_lower_the_validation_loss_which_is_always_of_the_same_noise(
    tmp_path: Path, pipeline: Path, photos: Path
) -> None:
    training = {"max_steps": 100, "learning_rate": 3e-3, "micro_batch_size": 5, "eval_steps": 50}
    adapter = {"r": 8, "target_modules": "all-linear"}
    objective = {"validation_prompts": ["a sks dog"], "num_inference_steps": 2}
    recipe = write_image_recipe(tmp_path, pipeline, photos, training=training, adapter=adapter, objective=objective)
    run = trained(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval"]["loss"] for line in lines if "eval" in line]
    assert losses[-1] < losses[1] < losses[0] - 0.01
    evaluate_verb(str(run), None, None, None, (), str(tmp_path / "eval.json"), [])
    assert json.loads((tmp_path / "eval.json").read_text())["loss"] == pytest.approx(losses[-1], abs=1e-6)
    names = sorted(path.name for path in (run / "pictures").iterdir())
    assert names == ["step-000000-0.png", "step-000050-0.png", "step-000100-0.png"]
    pixels = [np.asarray(Image.open(run / "pictures" / name)) for name in names]
    assert pixels[0].shape == (SIZE, SIZE, 3)
    assert not np.array_equal(pixels[0], pixels[-1])
    page = (run / "report.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 2
    assert "tokens per second" not in page
    assert "pixels per second" in page
    assert "before training" in page
    text = (run / "report.md").read_text()
    assert "## Images" in text
    assert "step-000100-0.png" in text
    assert 'pipeline.load_lora_weights("adapter")' in text
    assert not [word for word in ("logits", "Packing", "PeftModel") if word in text]


@pytest.mark.drawn
def test_a_calibrated_initialisation_looks_at_class_pictures_too(tmp_path: Path, pipeline: Path, photos: Path) -> None:
    """They are made before it: the base draws the same ones as for any other start."""
    classes, objective = tmp_path / "classes", {"num_inference_steps": 1, **with_prior(tmp_path)}
    (classes / "2.png").unlink()
    recipe = write_image_recipe(
        tmp_path, pipeline, photos, objective=objective, adapter={"start": "eva"}, training={"max_steps": 1}
    )
    run = trained(recipe, tmp_path / "run", "~data.eval")
    drawn = classes / "class-00000.png"
    first = drawn.read_bytes()
    drawn.unlink()
    trained(recipe, tmp_path / "plain", "~data.eval", "adapter.start=default")
    assert drawn.read_bytes() == first
    assert records(run)[0]["loss"] > 0
    assert any(float(each.abs().max()) > 0 for key, each in adapter_tensors(run / "adapter").items() if "lora_B" in key)


def test_ranks_look_for_missing_class_pictures_before_any_of_them_draws(tmp_path: Path) -> None:
    """Else a late rank counts pictures of another one, and draws more than are missing."""
    settings = {"class_prompt": CLASS_PROMPT, "class_data_dir": str(tmp_path), "num_class_images": 3}
    write_photos(tmp_path, 1)
    found: Any = ClassImages(DreamboothSettings.model_validate(settings))
    drawn, met = list[list[int]](), list[int]()

    def gather(local: list[Any]) -> list[Any]:
        met.append(len(drawn))
        if len(met) == 1:  # the other rank is faster
            (tmp_path / "class-00000.png").write_bytes(b"")
        return local

    found._draw = lambda run, prompt, numbers, keep: drawn.append(list(numbers))
    found._draw_missing(SimpleNamespace(gather=gather), writes=True)
    assert drawn == [[0, 1]]
    assert met == [0, 1]


def test_a_dry_run_writes_no_class_pictures(tmp_path: Path, pipeline: Path, photos: Path) -> None:
    (classes := tmp_path / "classes").mkdir()
    prior = {"class_prompt": CLASS_PROMPT, "class_data_dir": str(classes), "num_class_images": 50}
    recipe = write_image_recipe(tmp_path, pipeline, photos, objective={"num_inference_steps": 1, **prior})
    train_verb(load_recipe(recipe, [f"output.dir={tmp_path / 'run'}"]), False, True)
    assert not any(classes.iterdir())


@pytest.mark.slow
def test_the_base_draws_the_class_pictures_that_are_missing(tmp_path: Path, pipeline: Path, photos: Path) -> None:
    classes = tmp_path / "classes"
    objective = {
        "class_prompt": CLASS_PROMPT,
        "class_data_dir": str(classes),
        "num_class_images": 3,
        "num_inference_steps": 2,
    }
    recipe = write_image_recipe(tmp_path, pipeline, photos, objective=objective, training={"max_steps": 1})
    trained(recipe, tmp_path / "run")
    drawn = {path.name: path.read_bytes() for path in sorted(classes.iterdir())}
    assert list(drawn) == [f"class-{number:05d}.png" for number in range(3)]
    (classes / "class-00001.png").unlink()
    trained(recipe, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in sorted(classes.iterdir())} == drawn


@pytest.mark.slow
def test_a_result_is_drawn_with_and_merged(
    tmp_path: Path, pipeline: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = {"num_inference_steps": 25, "train_text_encoder": True}
    adapter = {"target_modules": [*ATTENTION, *OF_TEXT]}
    training = {"max_steps": 3, "learning_rate": 0.05}
    recipe = write_image_recipe(tmp_path, pipeline, photos, objective=objective, adapter=adapter, training=training)
    run = trained(recipe, tmp_path / "run")
    merge_verb(str(run), str(tmp_path / "merged"), None, None, [])
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["largest_logit_difference"] < 1e-4
    capsys.readouterr()
    pictures = []
    for target in (run, run / "adapter", f"{run}@last", tmp_path / "merged", pipeline):
        given = ["model.dtype=float32"]
        generate_verb(str(target), None, ["a sks dog"], None, given, seed=7, output=str(tmp_path / "drawn"))
        found = json.loads(capsys.readouterr().out)
        assert found["seed"] == 7
        pictures.append(np.asarray(Image.open(found["picture"])).astype(int))
    first, adapter_alone, last, merged, untuned = pictures
    assert np.array_equal(first, adapter_alone)
    assert np.array_equal(first, last)
    assert np.abs(first - merged).max() <= 1
    assert np.abs(first - untuned).mean() > 5
    theirs = loaded_by_diffusers(tmp_path / "merged", "sd")
    generator = torch.Generator("cpu").manual_seed(7)
    picture = theirs("a sks dog", num_inference_steps=25, generator=generator, output_type="np").images[0]
    assert np.abs(np.round(picture * 255) - merged).max() <= 1
    with pytest.raises(InputError, match="the model reads texts, not files"):
        generate_verb(str(run), None, None, str(photos), [], output=str(tmp_path / "drawn"))
    plan = make_plan(load_recipe(str(recipe), []))[0]
    assert {"to_out.0", "to_q"} <= {row[0] for row in target_rows(plan)}
    assert " x to_out.0" in " ".join(plan.notes)
    with pytest.raises(InputError, match="--top-p has no effect"):
        generate_verb(str(run), None, ["a sks dog"], None, [], top_p=0.5)


@pytest.mark.drawn
def test_a_layer_that_sdxl_never_reads_gets_no_adapter(tmp_path: Path, photos: Path) -> None:
    objective, adapter = {"train_text_encoder": True}, {"target_modules": [*ATTENTION, *OF_TEXT]}
    recipe = write_image_recipe(
        tmp_path,
        saved_pipeline(tmp_path / "sdxl", "sdxl"),
        photos,
        objective=objective,
        adapter=adapter,
        training={"max_steps": 2},
    )
    run = trained(recipe, tmp_path / "run")  # where every tensor must get a gradient
    found = [re.search(r"(text_encoder\w*)\..*layers\.(\d)", key) for key in adapter_tensors(run / "adapter")]
    layers = sorted({(each[1], int(each[2])) for each in found if each})
    assert layers == [("text_encoder", 0), ("text_encoder", 1), *(("text_encoder_2", number) for number in range(3))]


@pytest.mark.drawn
def test_other_class_images_refuse_a_resume(tmp_path: Path, pipeline: Path, photos: Path) -> None:
    training = {"max_steps": 2, "save_steps": 1}
    recipe = write_image_recipe(tmp_path, pipeline, photos, objective=with_prior(tmp_path), training=training)
    run = trained(recipe, tmp_path / "run")
    lose_the_end(run)
    write_photos(tmp_path / "classes", 3, seed=10)
    with pytest.raises(InputError, match="class_data_dir: changed since the run: its content is different"):
        trained(recipe, run, resume=True)
    write_photos(tmp_path / "classes", 3, seed=9)
    trained(recipe, run, resume=True)


@pytest.mark.drawn
def test_files_that_are_no_images_are_told_of(tmp_path: Path, pipeline: Path) -> None:
    folder, objective = write_photos(tmp_path / "photos", 2), with_prior(tmp_path)
    (folder / "IMG_1.HEIC").write_bytes(b"no format that is read")
    (tmp_path / "classes" / "notes.txt").write_text("neither is this")
    notes = make_plan(load_recipe(str(write_image_recipe(tmp_path, pipeline, folder, objective=objective)), []))[
        0
    ].notes
    told = "warning: photos: 1 file is not read, because the format is not supported: IMG_1.HEIC"
    assert f"{told}; convert .heic to .png or .jpg" in notes
    assert "classes: 1 file is not read, because the format is not supported: notes.txt" in notes
    assert not [note for note in notes if "evaluation rows" in note or "both in" in note]  # measured on purpose
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "1.heic").write_bytes(b"x")
    recipe = write_image_recipe(tmp_path, pipeline, tmp_path / "raw", data={"eval": None})
    with pytest.raises(InputError, match=r"no recordings and no images \(raw: 1 file is not read.*convert \.heic"):
        make_plan(load_recipe(str(recipe), []))


@pytest.mark.drawn
def test_a_plan_of_images_says_nothing_of_texts(tmp_path: Path, pipeline: Path, photos: Path) -> None:
    recipe = write_image_recipe(tmp_path, pipeline, photos, training={"micro_batch_size": 4})
    plan = make_plan(load_recipe(str(recipe), []))[0]
    named = [row[0] for row in memory_rows(plan, None)]
    assert named[:4] == ["weights", "adapter", "optimizer", "activations"]
    assert "logits" not in named
    assert facts(plan)["attention"] == "sdpa"
    assert facts(plan)["packing"] is None


def test_a_text_encoder_that_no_target_lies_in_is_refused(tmp_path: Path, pipeline: Path, photos: Path) -> None:
    recipe = write_image_recipe(tmp_path, pipeline, photos, objective={"train_text_encoder": True})
    plan = make_plan(load_recipe(str(recipe), []))[0]
    assert [
        (each.key, "the text_encoder should be trained, but adapter" in each.message) for each in plan.refusals
    ] == [("adapter.target_modules", True)]


def test_prompts_that_are_nowhere_are_said_to_be(tmp_path: Path, pipeline: Path) -> None:
    for name in ("folder", "image.png", "prompts.txt"):
        with pytest.raises(InputError, match=f"{name}: there is no such file or folder; check the path"):
            generate_verb(str(pipeline), None, None, str(tmp_path / name), [])


def test_what_is_predicted_is_kept_with_the_adapter(tmp_path: Path, pipeline: Path, photos: Path) -> None:
    recipe = write_image_recipe(tmp_path, pipeline, photos, objective={"prediction_type": "v_prediction"})
    objective: Any = make_plan(load_recipe(str(recipe), []))[1].rows.objective
    again: Any = make(
        make_objective_settings({"method": "dreambooth"}),
        load_processor(ModelSection(name_or_path=str(pipeline))),
        objective.facts,
        EncodeOptions(),
    )
    for each in (objective, again):
        assert each.loss.schedule.prediction == each.answering.processor.prediction == "v_prediction"


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"resolution": 18}, "objective.resolution: 18 is not a multiple of 4"),
        ({"weighting_scheme": "mode"}, "objective.weighting_scheme: applies to flow matching"),
        ({"cache_latents": True, "random_flip": True}, "objective.cache_latents: images cannot be cached"),
        ({"class_prompt": "a dog"}, "prior preservation needs class_prompt"),
        ({"instance_prompt": None}, "the image has no 'text'"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_key(
    tmp_path: Path, pipeline: Path, photos: Path, objective: dict[str, Any], message: str
) -> None:
    recipe = write_image_recipe(tmp_path, pipeline, photos, objective=objective)
    with pytest.raises(InputError, match=message):
        make_plan(load_recipe(str(recipe), []))


@pytest.mark.drawn
def test_bad_pictures_are_counted_or_named(tmp_path: Path, pipeline: Path) -> None:
    folder = write_photos(tmp_path / "photos", 2)
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    recipe = write_image_recipe(tmp_path, pipeline, folder, data={"eval": None})
    plan, planned = make_plan(load_recipe(str(recipe), []))
    assert planned.rows.counts.dropped_reasons == {"animated image": 1, "less than 16 pixels on a side": 1}
    assert plan.rows.training.trained == 2
    (folder / "broken.png").write_text("no picture")
    with pytest.raises(InputError, match=r"photos:3: .*broken\.png cannot be read as an image"):
        make_plan(load_recipe(str(recipe), []))
    (tmp_path / "empty").mkdir()
    recipe = write_image_recipe(tmp_path, pipeline, tmp_path / "empty", data={"eval": None})
    with pytest.raises(InputError, match="no recordings and no images"):
        make_plan(load_recipe(str(recipe), []))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_files_of_other_programs_become_the_same_adapter(
    tmp_path: Path, pipeline: Path, photos: Path, form: str
) -> None:
    objective, adapter = {"train_text_encoder": True}, {"target_modules": [*ATTENTION, *OF_TEXT], "r": 2, "alpha": 6}
    recipe = write_image_recipe(
        tmp_path, pipeline, photos, objective=objective, adapter=adapter, training={"max_steps": 1, "warmup_steps": 0}
    )
    run = trained(recipe, tmp_path / "run")
    file = run / "adapter" / "pytorch_lora_weights.safetensors"
    if form == "kohya":
        file = tmp_path / "kohya.safetensors"
        export_verb(str(run), "kohya", str(file), None)
    adopt_verb(str(file), str(pipeline), str(tmp_path / "adopted"))
    ours, theirs = (adapter_tensors(folder) for folder in (run / "adapter", tmp_path / "adopted"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    config = json.loads((tmp_path / "adopted" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 6)
    for wrong in ((str(tmp_path), "kohya"), (str(pipeline), "kohya"), (str(run), "gguf")):
        with pytest.raises(InputError):
            export_verb(*wrong, str(tmp_path / "new.safetensors"), None)
