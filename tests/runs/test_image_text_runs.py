"""Whole runs on rows with images: resume, evaluation, merging, and what plan refuses."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.support.image_text_case import TOKENS, image_row, write_image_rows, write_image_text, write_images
from tests.support.plans import make_plan
from tests.support.ranks_case import train_in_ranks
from tests.support.train_case import (
    check_a_resume,
    check_streamed,
    kill_self,
    losses,
    records,
    result_bytes,
    train,
    train_in_child,
    without_times,
    write_recipe,
)
from tunekit.errors import TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.generate import generate_verb
from tunekit.merge import merge_verb
from tunekit.model.families.composite import ImageStack
from tunekit.model.images.features import features_key
from tunekit.model.load import load_model
from tunekit.model.parts import parts_apart
from tunekit.objectives.rows import image_text
from tunekit.preview import preview_verb
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ImageModel
from tunekit.tuned.network import copy_modules

TRAINING = {"epochs": None, "max_steps": 3, "gradient_accumulation_steps": 2, "warmup_ratio": 0.0}


@pytest.fixture(autouse=True)
def without_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package num2words, which SmolVLM's processor needs for videos alone, is not installed."""
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_text("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))


def recipe_of(place: Path, folder: Path, **sections: Any) -> Path:
    data = {"max_length": 400, "image_cache": None, **sections.pop("data", {})}
    path = write_recipe(place, folder, data=data, training=TRAINING | sections.pop("training", {}), **sections)
    write_image_rows(place)
    return path


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "gemma3"])
def test_an_interrupted_run_is_resumed(model_type: str, tmp_path: Path) -> None:
    folder = write_image_text(model_type, tmp_path / "model")
    check_a_resume(recipe_of(tmp_path, folder, training={"max_steps": 4, "save_steps": 2, "keep_checkpoints": 2}))


def test_a_run_killed_while_an_image_is_read_ends_in_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    path = recipe_of(tmp_path, folder, training={"max_steps": 4, "save_steps": 1, "eval_steps": 2})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train_in_child(path, whole).code == 0
    original, calls = image_text.image_features, list[int]()

    def killed(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 12:
            kill_self()
        return original(*arguments)

    ended = train_in_child(path, cut, before=lambda: setattr(image_text, "image_features", killed))
    assert ended.code == -signal.SIGKILL, ended.output
    assert list((cut / "checkpoints").iterdir())
    assert train_in_child(path, cut, resume=True).code == 0
    assert result_bytes(cut) == result_bytes(whole)
    assert without_times(records(cut)) == without_times(records(whole))


def test_a_micro_batch_that_runs_out_of_memory_keeps_its_features(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images go through the tower once."""
    path = recipe_of(tmp_path, folder, adapter={"dropout": 0.0}, training={"micro_batch_size": 4, "eval_steps": 3})
    whole = train(path, f"output.dir={tmp_path / 'whole'}")
    run, features, counts = ImageStack.run, image_text.image_features, list[int]()

    def limited(stack: ImageStack, net: Any, inputs: Any) -> Any:
        if torch.is_grad_enabled() and not inputs["input_ids"].is_meta and len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return run(stack, net, inputs)

    monkeypatch.setattr(image_text, "image_features", lambda *named: counts.append(1) or features(*named))
    train(path, f"output.dir={tmp_path / 'again'}")
    once = len(counts)
    monkeypatch.setattr(ImageStack, "run", limited)
    split = train(path, f"output.dir={tmp_path / 'split'}")
    assert len(counts) == 2 * once
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)
    assert "split" in (split / "report.md").read_text()


@pytest.mark.slow
def test_ranks_that_shard_the_base_have_the_whole_tower(folder: Path, tmp_path: Path) -> None:
    """Also ranks that have no image in a step."""
    path = recipe_of(tmp_path, folder, adapter={"dropout": 0.0}, training={"micro_batch_size": 1})
    alone = train(path, f"output.dir={tmp_path / 'alone'}")
    ended = train_in_ranks(path, tmp_path / "ranks", "memory.sharding=full")
    assert not any(each.code for each in ended), ended
    assert losses(tmp_path / "ranks") == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("model_type", [name for name in TOKENS if name != "gemma4"])  # whose streaming is refused
def test_a_streamed_run_equals_the_resident_one(model_type: str, tmp_path: Path) -> None:
    """Its layers are also recomputed: LLaVA's own forward would keep keys and values, which recomputation doubles."""
    folder = write_image_text(model_type, tmp_path / "model")
    check_streamed(recipe_of(tmp_path, folder, training={"max_steps": 2}), "disk")


def test_micro_batches_change_nothing(folder: Path, tmp_path: Path) -> None:
    """Also rows without images beside rows with two, and batches without images."""
    runs = [
        train(
            recipe_of(
                tmp_path / str(size),
                folder,
                adapter={"dropout": 0.0},
                training={"micro_batch_size": size, "gradient_accumulation_steps": 4 // size},
            )
        )
        for size in (1, 2, 4)
    ]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    assert losses(runs[0]) == pytest.approx(losses(runs[2]), rel=1e-5)


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe_of(tmp_path_factory.mktemp("run"), folder))


def test_a_run_is_evaluated_and_generates_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_verb(str(run), None, None, None, [], str(tmp_path / "eval.json"), [])
    measured = json.loads((tmp_path / "eval.json").read_text())
    last = [record["eval"]["loss"] for record in records(run) if "eval" in record][-1]
    assert measured["loss"] == pytest.approx(last, rel=1e-5)
    generate_verb(str(run), None, ["say 3"], None, [], max_new_tokens=4)
    assert capsys.readouterr().out


def test_a_base_is_evaluated_on_rows_with_images(folder: Path, run: Path, tmp_path: Path) -> None:
    data = str(run.parent / "train.jsonl")
    evaluate_verb(str(folder), None, data, None, [], str(tmp_path / "eval.json"), [])
    assert json.loads((tmp_path / "eval.json").read_text())["rows"] == 10


@pytest.mark.sampled(1)
@pytest.mark.parametrize("model_type", TOKENS)
def test_a_merged_folder_and_the_adapter_in_peft_read_images_alike(model_type: str, tmp_path: Path) -> None:
    """In the class that config.json names, which servers use. The tensors of the tower stay as they are."""
    folder = write_image_text(model_type, tmp_path / "model")
    run = train(recipe_of(tmp_path, folder, data={"eval": None}))
    merge_verb(str(run), str(tmp_path / "merged"), None, None, [])
    before, after = ({k: v for file in place.glob("*.safetensors") for k, v in load_file(file).items()}
                     for place in (folder, tmp_path / "merged"))  # fmt: skip
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all(re.search(r"(language|text)_model|^model\.layers", name) for name in changed)
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    images = [{"type": "image", "path": str(run.parent / "images" / f"{at}.png")} for at in range(2)]
    messages = [{"role": "user", "content": [images[0], {"type": "text", "text": "and"}, images[1]]}]
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt",
                                          processor_kwargs={"return_mm_token_type_ids": True})  # fmt: skip
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    plain = base(**batch).logits.detach()
    model = peft.PeftModel.from_pretrained(base, str(run / "adapter"))
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    for name, tensor in peft.get_peft_model_state_dict(model).items():
        assert torch.equal(saved.pop(name), tensor)
    assert not saved
    adapted = model(**batch).logits
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)(**batch).logits
    assert float((merged - adapted).abs().max()) < 1e-4
    assert float((plain - adapted).abs().max()) > 1e-3


def test_a_limit_of_images_is_kept_by_evaluations_and_by_the_merged_processor(folder: Path, tmp_path: Path) -> None:
    path = recipe_of(tmp_path, folder, data={"image_tokens": 4})
    run = train(path)
    plan = json.loads((run / "plan.json").read_text())
    assert any("an image takes at most 4 tokens" in note and '"longest_edge": 256' in note for note in plan["notes"])
    assert json.loads((run / "adapter" / "tunekit.json").read_text())["objective"]["image_tokens"] == 4
    evaluate_verb(str(run), None, None, None, [], str(tmp_path / "eval.json"), [])
    last = [record["eval"]["loss"] for record in records(run) if "eval" in record][-1]
    assert json.loads((tmp_path / "eval.json").read_text())["loss"] == pytest.approx(last, rel=1e-5)
    evaluate_verb(str(run), None, str(tmp_path / "train.jsonl"), None, [], str(tmp_path / "all.json"), [])
    merge_verb(str(run), str(tmp_path / "merged"), None, None, [])
    places = folder, tmp_path / "merged"
    before, after = (json.loads((place / "processor_config.json").read_text()) for place in places)
    assert after["image_processor"].pop("size") == {"shortest_edge": 64, "longest_edge": 256}
    assert before["image_processor"].pop("size")["longest_edge"] == 1024
    assert before == after
    evaluate_verb(str(tmp_path / "merged"), None, str(tmp_path / "train.jsonl"), None, [], str(tmp_path / "m.json"), [])
    of_run, of_merged = (json.loads((tmp_path / name).read_text()) for name in ("all.json", "m.json"))
    assert of_merged["tokens"] == of_run["tokens"]
    assert of_merged["loss"] == pytest.approx(of_run["loss"], rel=1e-4)
    evaluate_verb(str(folder), None, str(tmp_path / "train.jsonl"), None, [], str(tmp_path / "base.json"), [])
    assert json.loads((tmp_path / "base.json").read_text())["tokens"] > of_run["tokens"]


def test_a_limit_without_images_is_refused(folder: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, folder, data={"max_length": 400, "image_tokens": 4}, training=TRAINING)
    with pytest.raises(TunekitError, match="no row has images that this objective reads, so it has no effect"):
        train(path)


def test_rows_of_text_alone_load_no_tower(folder: Path, tmp_path: Path) -> None:
    plain = train(write_recipe(tmp_path / "plain", folder, data={"max_length": 400}, training=TRAINING))
    plan = json.loads((plain / "plan.json").read_text())
    assert any("left alone and not loaded: model.visual" in note for note in plan["notes"])
    text = tmp_path / "text"  # the same rows, on a base whose tower would spoil whatever it touched
    shutil.copytree(folder, text)
    stored = load_file(folder / "model.safetensors")
    spoiled = {name: tensor * torch.nan if ".visual." in f".{name}" else tensor for name, tensor in stored.items()}
    assert any(tensor.isnan().any() for tensor in spoiled.values())
    save_file(spoiled, text / "model.safetensors", {"format": "pt"})
    other = train(write_recipe(tmp_path / "other", text, data={"max_length": 400}, training=TRAINING))
    assert without_times(records(plain)) == without_times(records(other))


def test_the_tower_is_loaded_frozen_and_counted(folder: Path, tmp_path: Path) -> None:
    section = ImageModel(name_or_path=str(folder), dtype="float32", quantization="nf4")
    base = load_model(section, device=torch.device("cpu"))
    [tower] = parts_apart(base.net, loaded=True).values()
    stored = load_file(folder / "model.safetensors")
    for name, parameter in tower.named_parameters():
        assert torch.equal(parameter, next(tensor for key, tensor in stored.items() if key.endswith(f"visual.{name}")))
        assert not parameter.requires_grad
    size, buffers = (sum(tensor.nbytes for tensor in some) for some in (tower.parameters(), tower.buffers()))
    [shared] = parts_apart(copy_modules(base).net, loaded=True).values()
    assert shared is tower
    paths = recipe_of(tmp_path / "images", folder), write_recipe(tmp_path / "text", folder, training=TRAINING)
    plans = [make_plan(load_recipe(path, []))[0] for path in paths]
    assert plans[0].peak_bytes.weights - plans[1].peak_bytes.weights == size + buffers
    assert plans[0].total_parameters - plans[1].total_parameters == size // 4
    assert any("pixel_values counts patches" in note for note in plans[0].notes)


def test_a_frozen_tower_keeps_nothing_for_the_backward_pass(folder: Path, tmp_path: Path) -> None:
    saved = list[int]()
    original = torch.nn.Module.__call__

    def call(module: Any, *arguments: Any, **keywords: Any) -> Any:
        if type(module).__name__ != "Qwen2_5_VisionTransformerPretrainedModel":
            return original(module, *arguments, **keywords)

        def count(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = original(module, *arguments, **keywords)
        assert not output.pooler_output.requires_grad
        calls.append(1)
        return output

    calls = list[int]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", call)
        train(recipe_of(tmp_path, folder, training={"max_steps": 1}))
    assert calls
    assert saved == []


@pytest.mark.parametrize("model_type", ["qwen3_vl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_features_from_the_cache_give_the_same_bytes(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second epoch on, and in later runs, the tower is not run."""
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    folder = write_image_text(model_type, tmp_path / "model")
    training = {"max_steps": None, "epochs": 2, "eval_steps": 3}
    path, calls = recipe_of(tmp_path, folder, data={"image_cache": "1GiB"}, training=training), list[int]()
    features = image_text.image_features
    monkeypatch.setattr(image_text, "image_features", lambda *given: calls.append(1) or features(*given))
    live = train(path, f"output.dir={tmp_path / 'live'}", "data.image_cache=null")
    without, images = len(calls), len(list((tmp_path / "images").iterdir()))
    cached = train(path, f"output.dir={tmp_path / 'cached'}")
    files = list((tmp_path / "cache" / "images").iterdir())
    assert len(calls) - without == len(files) <= images < without
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    monkeypatch.setattr(image_text, "image_features", None)
    again = train(path, f"output.dir={tmp_path / 'again'}")
    for run in (cached, again):
        assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == (
            live / "adapter" / "adapter_model.safetensors"
        ).read_bytes()
        assert without_times(records(run)) == without_times(records(live))
    notes = json.loads((cached / "plan.json").read_text())["notes"]
    assert any("the features of all images take about" in note for note in notes)


def test_other_weights_of_the_tower_are_not_mixed_up(folder: Path, tmp_path: Path) -> None:
    section = ImageModel(name_or_path=str(folder), dtype="float32")
    keys = []
    for change in (0.0, 1e-6):
        net = load_model(section, device=torch.device("cpu")).net
        [tower] = parts_apart(net, loaded=True).values()
        next(tower.parameters()).data += change
        keys.append(features_key(net, torch.device("cpu"), torch.float32))
    assert keys[0] != keys[1] == features_key(net, torch.device("cpu"), torch.float32)
    assert keys[1] != features_key(net, torch.device("cpu"), torch.bfloat16)


def test_preview_names_images(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preview_verb(load_recipe(recipe_of(tmp_path, folder), []), 8, str(tmp_path / "page.html"))
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert "<image 3x4 = 12 tokens> (" in text or "tokens> (" in text
    assert "<|image_pad|>" not in text
    assert "frozen, and computed once for each image" in text
    assert "data:image/" in (tmp_path / "page.html").read_text()


REFUSED: dict[str, tuple[list[str], str]] = {
    "packing": (["data.packing=true"], "rows with images cannot be packed"),
    "prompt": (["adapter={method: prompt, num_virtual_tokens: 4}"], "prompt adds vectors to the sequence"),
    "prefix": (["adapter={method: prefix, num_virtual_tokens: 4}"], "prefix adds vectors to the sequence"),
    "tower": (["adapter.parts=[tower]"], "rows with images only train the language model so far"),
    "distill": (["objective={method: distill, teacher: MODEL}"], "which only objective: sft reads so far"),
    "generation": (["evaluation.generate=true"], "which only objective: sft reads so far"),
    "stream of rows": (["data.train.0.streaming=true", "data.eval=null"], "streamed rows cannot have images"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_images_do_not_support_is_refused(kind: str, folder: Path, tmp_path: Path) -> None:
    overrides, message = REFUSED[kind]
    path = recipe_of(tmp_path, folder)
    with pytest.raises(TunekitError) as caught:
        train(path, *(text.replace("MODEL", str(folder)) for text in overrides))
    assert message in str(caught.value)


def test_preferences_with_images_are_refused(folder: Path, tmp_path: Path) -> None:
    path = recipe_of(tmp_path, folder, objective={"method": "dpo"})
    [image] = write_images(tmp_path, 1)
    prompt = image_row(0, [str(image)])["messages"][:1]
    sides = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": prompt, **sides}) + "\n")
    with pytest.raises(TunekitError, match="which only objective: sft reads so far"):
        train(path, "data.eval=null")


def test_a_long_row_is_dropped_or_truncated(folder: Path, tmp_path: Path) -> None:
    counts = {}
    for policy in ("drop", "truncate", "split", "shrink"):
        run = train(recipe_of(tmp_path / policy, folder), f"data.excess_length={policy}", "data.max_length=90")
        counts[policy] = json.loads((run / "report.json").read_text())["rows"]
    assert counts["drop"]["dropped"] > counts["shrink"]["dropped"] == 0
    assert counts["truncate"]["truncated"] > 0
    assert counts["split"]["dropped"] == 0
    notes = json.loads((tmp_path / "shrink" / "run" / "plan.json").read_text())["notes"]
    assert any("rows with smaller images, to fit into data.max_length" in note for note in notes)


def test_other_images_are_encoded_again(folder: Path, tmp_path: Path) -> None:
    path = recipe_of(tmp_path, folder)
    first = losses(train(path))
    write_images(tmp_path / "images", 20, seed=5)
    assert losses(train(path, f"output.dir={tmp_path / 'second'}")) != first
