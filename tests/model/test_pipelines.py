"""Diffusion pipelines: loaded, called and drawn with as diffusers does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from tests.support.tiny_pipelines import KINDS, SIZE, loaded_by_diffusers, saved_pipeline
from tunekit.errors import ModelError
from tunekit.model.families.diffusion import FAMILY, IDS
from tunekit.model.families.pipeline.drawing import Drawing, draw_pictures
from tunekit.model.families.pipeline.parts import PIPELINES, load_net
from tunekit.model.families.pipeline.processor import PipelineProcessor, load_processor
from tunekit.model.families.pipeline.prompts import encode_prompts
from tunekit.model.storage.source import find_source
from tunekit.recipe.model import ModelSection

PROMPTS = ("a photo of sks dog", "")


def loaded(folder: Path, kind: str, *more: str, meta: bool = False) -> tuple[Any, PipelineProcessor]:
    processor = load_processor(ModelSection(name_or_path=str(saved_pipeline(folder / kind, kind))))
    return load_net(processor.folder, [PIPELINES[processor.kind], *more], torch.float32, meta=meta), processor


def ids_of(processor: PipelineProcessor, prompts: tuple[str, ...] = PROMPTS) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(ids) for name, ids in processor.ids(prompts).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_encoded_as_the_pipeline_does(tmp_path: Path, kind: str) -> None:
    net, processor = loaded(tmp_path, kind)
    theirs = loaded_by_diffusers(processor.folder, kind)
    ours = encode_prompts(net, ids_of(processor))
    more = {"sd": ("cpu", 1, False), "sdxl": (None,), "sd3": (None, None)}[kind]
    for place, prompt in enumerate(PROMPTS):
        given = {} if kind == "sd" else {"do_classifier_free_guidance": False}
        found = theirs.encode_prompt(prompt, *more, **given)
        assert torch.allclose(ours["prompt"][place], found[0][0], atol=1e-6)
        if kind != "sd":
            assert torch.allclose(ours["pooled"][place], found[2][0], atol=1e-6)
    assert {name: tuple(value.shape[1:]) for name, value in ours.items()} == processor.embedding_shapes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_denoiser_is_called_as_diffusers_scripts_call_it(tmp_path: Path, kind: str) -> None:
    net, processor = loaded(tmp_path, kind)
    torch.manual_seed(0)
    latents = torch.randn(2, *processor.latent_shape(SIZE, SIZE))
    prompts, times = encode_prompts(net, ids_of(processor)), torch.tensor([3, 700])
    sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * 2)
    inputs = {"latents": latents, "times": times, "sizes": sizes}
    family = FAMILY
    ours = family.logits(net, {**inputs, **prompts})
    part, prompt = net.denoiser, prompts["prompt"]
    if kind == "sd":
        theirs = part(latents, times, prompt).sample
    elif kind == "sdxl":
        added = {"text_embeds": prompts["pooled"], "time_ids": sizes.float()}
        theirs = part(latents, times, prompt, added_cond_kwargs=added).sample
    else:
        theirs = part(
            hidden_states=latents, timestep=times, encoder_hidden_states=prompt, pooled_projections=prompts["pooled"]
        ).sample
    assert torch.equal(ours, theirs)
    by_ids = family.logits(net, {**inputs, **{f"{IDS}{name}": ids for name, ids in ids_of(processor).items()}})
    assert torch.allclose(by_ids, ours, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_those_that_run_in_their_order(tmp_path: Path, kind: str) -> None:
    net, processor = loaded(tmp_path, kind)
    ran: list[str] = []
    layers = FAMILY.layers(net)
    for name, layer in layers:
        assert net.get_submodule(name) is layer
        layer.register_forward_pre_hook(lambda *_given, name=name: ran.append(name), with_kwargs=True)
    prompts = encode_prompts(net, ids_of(processor))
    inputs = {
        "latents": torch.randn(2, *processor.latent_shape(SIZE, SIZE)),
        "times": torch.tensor([3, 700]),
        "sizes": torch.zeros(2, 6),
    }
    FAMILY.logits(net, {**inputs, **prompts})
    assert ran == [name for name, _ in layers]
    assert len(ran) == net.config.num_hidden_layers


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_the_pipeline_and_depend_on_their_own_seed(tmp_path: Path, kind: str) -> None:
    net, processor = loaded(tmp_path, kind, "text_encoder")
    how = Drawing(steps=3, guidance_scale=3.0, height=SIZE, width=SIZE)
    both = draw_pictures(net, processor, [PROMPTS[0], "a cat"], [5, 6], how)
    alone = draw_pictures(net, processor, ["a cat"], [6], how)
    assert np.array_equal(both[1], alone[0])
    assert not np.array_equal(both[0], draw_pictures(net, processor, PROMPTS[:1], [7], how)[0])
    theirs = loaded_by_diffusers(processor.folder, kind)
    picture = theirs(
        PROMPTS[0],
        num_inference_steps=3,
        guidance_scale=3.0,
        height=SIZE,
        width=SIZE,
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="np",
    ).images[0]
    assert np.abs(both[0] - np.round(picture * 255)).max() <= 1


def test_only_trained_parts_are_modules_of_the_net(tmp_path: Path) -> None:
    net, _ = loaded(tmp_path, "sdxl", "text_encoder")
    assert [name for name, _ in net.named_children()] == ["unet", "text_encoder"]
    assert sorted(net.frozen_parts) == ["text_encoder_2", "vae"]
    assert net.trains_text
    assert list(net.text_encoders) == ["text_encoder", "text_encoder_2"]


@pytest.mark.drawn
def test_a_net_without_weights_has_the_same_modules(tmp_path: Path) -> None:
    for kind in KINDS:
        real, meta = (loaded(tmp_path, kind, "text_encoder", meta=meta)[0] for meta in (False, True))
        shapes = [{name: tuple(value.shape) for name, value in net.named_parameters()} for net in (real, meta)]
        assert shapes[0] == shapes[1]
        assert all(value.is_meta for value in meta.parameters())
        assert all(part.dtype == torch.float32 for part in meta.frozen_parts.values())


def test_the_schedule_is_that_of_the_folder(tmp_path: Path) -> None:
    for kind, prediction in (("sd", "epsilon"), ("sdxl", "epsilon"), ("sd3", "flow")):
        processor = loaded(tmp_path, kind)[1]
        assert (processor.prediction, processor.flows) == (prediction, kind == "sd3")
        assert (processor.vae_factor, processor.resolution, processor.multiple) == (2, SIZE, 4)
    v_prediction = PipelineProcessor(saved_pipeline(tmp_path / "v", "sd", "v_prediction"), "StableDiffusionPipeline")
    assert v_prediction.prediction == "v_prediction"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "StableCascadePipeline"}, "StableCascadePipeline cannot be trained"),
        ({"unet": ["evil", "RunMe"]}, "unet is a RunMe"),
        ({"vae": None}, "names no vae"),
    ],
)
def test_what_is_no_pipeline_of_ours_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = saved_pipeline(tmp_path / "sd", "sd")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(ModelError, match=message):
        load_net(folder, ["unet"], torch.float32)


def test_a_damaged_or_incomplete_part_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved_pipeline(tmp_path / "sd", "sd")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("conv_in.weight")
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"lacks weights that its configuration declares \(conv_in.weight\)"):
        load_net(folder, ["unet"], torch.float32)
    file.write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"unet.*cannot be loaded"):
        load_net(folder, ["unet"], torch.float32)
    with pytest.raises(ModelError, match=r"contains no model_index.json"):
        load_processor(ModelSection(name_or_path=str(tmp_path)))


def test_a_pipeline_predicts_what_the_recipe_says_in_its_files_place(tmp_path: Path) -> None:
    pictures, how = [], Drawing(3, 5.0, SIZE, SIZE)
    told = PipelineProcessor(saved_pipeline(tmp_path / "e", "sd"), "StableDiffusionPipeline", "v_prediction")
    own = PipelineProcessor(saved_pipeline(tmp_path / "v", "sd", "v_prediction"), "StableDiffusionPipeline")
    for processor in (told, own, PipelineProcessor(told.folder, told.kind)):
        net = load_net(processor.folder, ["unet"], torch.float32)
        pictures.append(draw_pictures(net, processor, ["a dog"], [3], how)[0])
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    told.save(tmp_path / "merged")
    saved = json.loads((tmp_path / "merged" / "scheduler" / "scheduler_config.json").read_text())
    assert saved["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "EDMEulerScheduler"},
            "EDMEulerScheduler scales noise in a way",
        ),
        ("vae/config.json", {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}, "scaling by latents_mean"),
    ],
)
def test_noise_and_latents_of_another_scale_are_refused(
    tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    processor = PipelineProcessor(saved_pipeline(tmp_path / "sd", "sd"), "StableDiffusionPipeline")
    processor.check()
    path = processor.folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        PipelineProcessor(processor.folder, processor.kind).check()


def test_of_a_hub_s_pipeline_only_the_parts_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved_pipeline(tmp_path / "sd", "sd")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"")
    fetched: set[str] = set()

    def snapshot(name: str, revision: str, allow_patterns: Any, ignore_patterns: Any = ()) -> str:
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        fetched.update(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    section = ModelSection(name_or_path="org/pipeline")
    assert find_source(section, weights=False).folder == folder
    assert not [name for name in fetched if name.endswith(".safetensors")]
    find_source(section, weights=True)
    assert sorted(name for name in fetched if name.endswith(".safetensors")) == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert {"model_index.json", "unet/config.json", "tokenizer/tokenizer.json"} <= fetched
