"""Aspect-ratio buckets of DreamBooth: where images go, steps against diffusers by hand; micro-batches and resumes."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.image_case import CLASS_PROMPT, ByHand, records, write_image_recipe, write_photos
from tests.support.plans import make_plan
from tests.support.tiny_pipelines import SIZE, saved_pipeline
from tests.support.train_case import check_a_resume
from tunekit.errors import InputError
from tunekit.evaluate import evaluate_verb
from tunekit.objectives.dreambooth import CUT
from tunekit.objectives.rows.pictures import PictureRows, bucket_of, fitting_bucket, made_buckets, nearest_bucket
from tunekit.preview import preview_verb
from tunekit.recipe.load import load_recipe
from tunekit.targets.target import find_target, load_target
from tunekit.train import train_verb

BUCKETS = [[16, 24], [24, 16]]  # the five photos: wide, wide, wide, about square (29 x 25), tall
ONE_OF = {"max_steps": 3, "micro_batch_size": 5}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_pipeline(tmp_path_factory.mktemp("pipeline") / "sd", "sd")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def with_prior(folder: Path) -> dict[str, Any]:
    classes = write_photos(folder / "classes", 3, seed=9)
    return {"class_prompt": CLASS_PROMPT, "class_data_dir": str(classes), "num_class_images": 3}


def trained(recipe: Path, run: Path, resume: bool = False) -> Path:
    train_verb(load_recipe(recipe, [f"output.dir={run}"]), resume, False)
    return run


def test_made_buckets_have_about_as_many_pixels_and_sides_the_denoiser_can_halve() -> None:
    found = made_buckets(512, 64)
    assert found[0] == (512, 512)
    assert all(side % 64 == 0 for size in found for side in size)
    assert all((width, height) in found for height, width in found)
    assert all(0.85 < height * width / 512**2 < 1.15 for height, width in found)
    assert len({height / width for height, width in found}) == len(found) == 7


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((600, 600), (512, 512)),
        ((500, 500), (448, 448)),  # too small for 512
        ((300, 200), (256, 128)),
        ((200, 400), (192, 384)),
        ((40, 30), (64, 64)),  # the denoiser takes nothing smaller
    ],
)
def test_auto_enlarges_no_picture(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    sets = [made_buckets(side, 64) for side in range(512, 0, -64)]
    found = fitting_bucket(size, sets)
    assert found == bucket
    assert all(have >= want for have, want in zip(size, found, strict=True)) or found == (64, 64)
    assert fitting_bucket(size, sets[:1]) == nearest_bucket(size, sets[0])  # listed buckets enlarge


@pytest.mark.drawn
def test_small_photos_are_trained_on_as_they_are(tmp_path: Path, pipeline: Path, photos: Path) -> None:
    objective = {"aspect_ratio_buckets": "auto", "resolution": 32}
    recipe = write_image_recipe(tmp_path, pipeline, photos, objective=objective)
    _, planned = make_plan(load_recipe(recipe), device=torch.device("cpu"))
    rows = planned.rows.train
    sizes = [(rows[index].parts["original"], bucket_of(rows[index])) for index in range(len(rows))]
    assert len(sizes) == 5
    assert all(height >= high and width >= wide for (height, width), (high, wide) in sizes)
    assert planned.rows.objective.facts["aspect_ratio_buckets"] == "auto"


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((600, 400), (768, 512)), ((400, 600), (512, 768)), ((1000, 1001), (512, 512)), ((100, 900), (512, 768))],
)
def test_a_picture_goes_to_the_bucket_of_the_nearest_aspect_ratio(
    size: tuple[int, int], bucket: tuple[int, int]
) -> None:
    buckets = ((512, 512), (512, 768), (768, 512))
    assert nearest_bucket(size, buckets) == bucket
    assert nearest_bucket(size[::-1], [each[::-1] for each in buckets]) == bucket[::-1]


@pytest.mark.parametrize(
    ("kind", "prior"),
    [
        pytest.param("sd", False, marks=pytest.mark.slow),
        ("sdxl", True),
        pytest.param("sd3", False, marks=pytest.mark.slow),
    ],
)
def test_steps_over_two_buckets_equal_diffusers_by_hand(tmp_path: Path, photos: Path, kind: str, prior: bool) -> None:
    objective = {"aspect_ratio_buckets": BUCKETS, **(with_prior(tmp_path) if prior else {})}
    training = {"max_steps": 6, "micro_batch_size": 3}
    recipe = write_image_recipe(
        tmp_path, saved_pipeline(tmp_path / kind, kind), photos, objective=objective, training=training
    )
    hand = ByHand(recipe, photos, kind)
    steps = list(hand.planned.rows.steps(hand.planned.batch_settings).after(0))
    kinds = [[len({bucket_of(row) for row in batch.rows}) for batch in step.batches] for step in steps]
    assert {count for each in kinds for count in each} == {1}
    assert any(len(each) == 2 for each in kinds)  # a step of both, although one micro-batch is a step
    losses, norms = zip(*map(hand.step, steps), strict=True)
    ours = records(trained(recipe, tmp_path / "run"))
    assert [record["loss"] for record in ours] == pytest.approx(losses, abs=1e-5)
    assert [record["grad_norm"] for record in ours] == pytest.approx(norms, rel=1e-3)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_step_keeps_its_rows_on_any_number_of_ranks_and_each_micro_batch_is_of_one_bucket(
    tmp_path: Path, pipeline: Path, photos: Path, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps({"image": str(path), "text": "a"}) + "\n" for path in sorted(photos.iterdir())))
    data = {"train": [{"path": str(table), "streaming": streamed}], "eval": None}
    training = {"max_steps": 6, "micro_batch_size": 2, "gradient_accumulation_steps": 2}
    objective = {"aspect_ratio_buckets": BUCKETS}
    recipe = write_image_recipe(tmp_path, pipeline, photos, data=data, objective=objective, training=training)
    planned = make_plan(load_recipe(str(recipe), []))[1]
    for ranks in (1, 3):
        sources = [planned.rows.steps(planned.batch_settings, rank=rank, world=ranks).after(0) for rank in range(ranks)]
        for steps in zip(*sources, strict=True):
            batches = [batch for step in steps for batch in step.batches]
            indices = sorted(index for step in steps for index in step.indices)
            assert indices == list(range(len(batches)))
            assert all(len({bucket_of(row) for row in batch.rows}) == 1 for batch in batches)
            assert all(1 <= len(batch.rows) <= 2 for batch in batches)
            assert len(batches) <= 3  # of four rows in two buckets, in twos
    cut = list(planned.rows.steps(planned.batch_settings).after(0))
    monkeypatch.setattr(PictureRows, "layout", replace(PictureRows.layout, batch_key=None))
    for one, other in zip(cut, planned.rows.steps(planned.batch_settings).after(0), strict=True):
        rows = [sorted(row.number for batch in step.batches for row in batch.rows) for step in (one, other)]
        assert rows[0] == rows[1]


@pytest.mark.slow
@pytest.mark.parametrize("cut", [{"micro_batch_size": 1}, {"micro_batch_size": 2}])
def test_micro_batches_equal_one_batch(tmp_path: Path, pipeline: Path, photos: Path, cut: dict[str, int]) -> None:
    runs = []
    for size in (4, cut["micro_batch_size"]):
        training = {"max_steps": 3, "micro_batch_size": size, "gradient_accumulation_steps": 4 // size}
        varied = {"center_crop": False, "random_flip": True, **with_prior(tmp_path / str(size))}
        objective = {"aspect_ratio_buckets": BUCKETS, **varied}
        recipe = write_image_recipe(tmp_path / str(size), pipeline, photos, objective=objective, training=training)
        runs.append(trained(recipe, tmp_path / str(size) / "run"))
    one, several = (records(run) for run in runs)
    assert [record["loss"] for record in several] == pytest.approx([record["loss"] for record in one], abs=1e-6)
    assert [record["grad_norm"] for record in several] == pytest.approx(
        [record["grad_norm"] for record in one], rel=1e-4
    )


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, pipeline: Path, photos: Path) -> None:
    objective = {"aspect_ratio_buckets": "auto", "center_crop": False, **with_prior(tmp_path)}
    training = {"max_steps": 6, "micro_batch_size": 3, "save_steps": 3, "keep_checkpoints": 3}
    recipe = write_image_recipe(tmp_path, pipeline, photos, objective=objective, training=training)
    check_a_resume(recipe)


@pytest.mark.drawn
def test_evaluation_knows_no_batch_size_and_the_adapters_folder_its_buckets(
    tmp_path: Path, pipeline: Path, photos: Path
) -> None:
    objective = {"aspect_ratio_buckets": BUCKETS, "validation_prompts": ["a dog"], "num_inference_steps": 1}
    training = {"max_steps": 1, "micro_batch_size": 2, "warmup_steps": 0}
    recipe = write_image_recipe(tmp_path, pipeline, photos, objective=objective, training=training)
    run = trained(recipe, tmp_path / "run")
    losses = []
    for size in (1, 2, 5):
        changed = [f"evaluation.batch_size={size}"]
        evaluate_verb(str(run), None, None, None, (), str(tmp_path / "eval.json"), changed)
        losses.append(json.loads((tmp_path / "eval.json").read_text())["loss"])
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)
    target: Any = load_target(find_target(str(run / "adapter"), None, []), torch.device("cpu"))
    assert target.objective.rows.buckets == ((16, 24), (24, 16))
    assert target.objective.facts["resolution"] == SIZE


@pytest.mark.drawn
def test_the_plan_is_of_the_largest_bucket(tmp_path: Path, pipeline: Path, photos: Path) -> None:
    peaks = []
    for buckets in ([[16, 16]], [[16, 16], [36, 24]], [[48, 48]]):
        recipe = write_image_recipe(tmp_path, pipeline, photos, objective={"aspect_ratio_buckets": buckets})
        plan, planned = make_plan(load_recipe(str(recipe), []))
        assert len({bucket_of(row) for row in planned.largest_batch.rows}) == 1
        peaks.append(plan.peak_bytes.total)
        assert (CUT in plan.notes) == (len(buckets) > 1)
    assert peaks[0] < peaks[1] < peaks[2]


def test_preview_tells_the_files_size_and_that_of_its_bucket(
    tmp_path: Path, pipeline: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = {"aspect_ratio_buckets": BUCKETS}
    html = tmp_path / "page.html"
    preview_verb(load_recipe(write_image_recipe(tmp_path, pipeline, photos, objective=objective)), 5, str(html))
    page = html.read_text("utf-8")
    shown = [base64.b64decode(found) for found in re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', page)]
    sizes = sorted(Image.open(io.BytesIO(each)).size for each in shown)
    assert sizes == [(16, 24), (16, 24), (24, 16), (24, 16), (24, 16)]  # as they are trained on
    assert '<pre class="tokens"' not in page
    assert "legend" not in page.partition("</style>")[2]
    told = " ".join(capsys.readouterr().out.split())
    assert "31 x 20 pixels, trained on at 24 x 16" in told
    assert "23 x 32 pixels, trained on at 16 x 24" in told


NO_SIZES = r"must be auto, or a list of \[height, width\] in pixels, such as \[\[512, 512\], \[512, 768\]\], not [^;]+$"


@pytest.mark.parametrize(
    ("kind", "buckets", "message"),
    [
        ("sd", [[16, 18]], r"aspect_ratio_buckets: a side of \[16, 18\] is not a multiple of 4"),
        ("sd", [[16, 32], [24, 48]], r"\[24, 48\] has the same aspect ratio as \[16, 32\]"),
        ("sd3", [[16, 128]], "the denoiser has positions for 64 pixels per side"),
        ("sd", [], NO_SIZES),
        ("sd", [[16]], NO_SIZES),
        ("sd", [[16, "24"]], NO_SIZES),
        ("sd", "all", NO_SIZES.replace("[^;]+$", "'all'")),
        ("sd", [[8, 16]], "has a side outside the range of 16 to 4096 pixels"),
    ],
)
def test_buckets_that_cannot_be_are_refused_by_key(
    tmp_path: Path, photos: Path, kind: str, buckets: Any, message: str
) -> None:
    folder = saved_pipeline(tmp_path / kind, kind)
    recipe = write_image_recipe(tmp_path, folder, photos, objective={"aspect_ratio_buckets": buckets})
    with pytest.raises(InputError, match=message):
        make_plan(load_recipe(str(recipe), []))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"resolution": 68}, r"objective\.resolution: 68 is too large: the denoiser has positions for 64 pixels"),
        (
            {"resolution": 64, "aspect_ratio_buckets": "auto"},
            r"_buckets: \[56, 72\] is too large: the denoiser has positions",
        ),
    ],
)
def test_a_transformer_refuses_more_pixels_than_it_has_positions_for(
    tmp_path: Path, photos: Path, objective: dict[str, Any], message: str
) -> None:
    recipe = write_image_recipe(tmp_path, saved_pipeline(tmp_path / "sd3", "sd3"), photos, objective=objective)
    with pytest.raises(InputError, match=message):
        make_plan(load_recipe(str(recipe), []))


@pytest.mark.parametrize("center", [False, True])
def test_a_picture_is_mirrored_before_it_is_cropped_as_in_diffusers_scripts(
    tmp_path: Path, pipeline: Path, photos: Path, center: bool
) -> None:
    objective: dict[str, Any] = {"random_flip": True, "center_crop": center}
    recipe = write_image_recipe(tmp_path, pipeline, photos, objective=objective, data={"eval": None})
    made: Any = make_plan(load_recipe(str(recipe), []))[1].rows.objective
    whole, mirrored = np.random.default_rng(0).integers(0, 256, (16, 25, 3), np.uint8), 0
    for number in range(20):
        seen, (top, left) = made.loss.view(whole, (16, 16), (0, 1, number, 0))
        assert top == 0
        views = [image[:, left : left + 16] for image in (whole, whole[:, ::-1])]  # the script: train_flip, then crop
        assert any(np.array_equal(seen, view) for view in views)
        mirrored += np.array_equal(seen, views[1])
    assert 0 < mirrored < 20
