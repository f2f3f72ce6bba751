"""Image classifiers by architecture: published nets made tiny, each cell against transformers and peft.

Vision towers of CLIP and SigLIP are bases as they are saved with their text towers.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForImageClassification, Siglip2ImageProcessor, ViTImageProcessor

from tests.objectives.test_image_classify import trained, write
from tests.support.classifier_case import check_each_reads_the_other, close
from tests.support.image_case import COLOURS, records, write_classes
from tests.support.plans import make_plan
from tunekit.errors import InputError
from tunekit.recipe.load import load_recipe
from tunekit.targets.target import find_target, load_target

CPU = torch.device("cpu")
SIDE, STEPS = 32, 10
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VIT = SIZES | {"image_size": SIDE, "patch_size": 8}
TEXT = SIZES | {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
MOBILE = {"depth_multiplier": 0.25, "image_size": SIDE, "classifier_dropout_prob": 0.0}
EFFICIENT = {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320, "image_size": SIDE}
CONVOLUTIONS = ("efficientnet", "resnet", "mobilenet_v2")  # without a linear layer besides the head
NETS: dict[str, tuple[str, dict[str, Any]]] = {  # the class that was saved, and its configuration
    "clip": ("CLIPModel", {"vision_config": VIT, "text_config": TEXT, "projection_dim": 16}),
    "siglip": ("SiglipModel", {"vision_config": VIT, "text_config": TEXT}),
    "convnext": ("ConvNextModel", STAGES | {"num_stages": 2}),
    "convnextv2": ("ConvNextV2Model", STAGES | {"num_stages": 2}),
    "beit": ("BeitForMaskedImageModeling", VIT | {"hidden_dropout_prob": 0.0, "drop_path_rate": 0.0}),
    "dinov2": ("Dinov2Model", {key: value for key, value in VIT.items() if key != "intermediate_size"}),
    "swin": (
        "SwinModel",
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
        | {"patch_size": 2, "image_size": SIDE, "drop_path_rate": 0.0},
    ),
    "efficientnet": ("EfficientNetModel", EFFICIENT | {"dropout_rate": 0.0, "drop_connect_rate": 0.0}),
    "resnet": ("ResNetModel", STAGES | {"embedding_size": 8}),
    "mobilenet_v2": ("MobileNetV2Model", MOBILE),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("pictures"), count=4, height=34, width=40)


def write_net(folder: Path, name: str) -> Path:
    """The net with random values and running statistics."""
    kind, values = NETS[name]
    torch.manual_seed(0)
    net = getattr(transformers, kind)(CONFIG_MAPPING[name](**values))
    for own, buffer in net.named_buffers():
        if own.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.1, 0.5)
    net.save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def recipe_of(folder: Path, base: Path, pictures: Path, method: str) -> Path:
    plain = {"random_resized_crop": False, "random_flip": False}
    recipe = write(folder, base, pictures, objective=plain, training={"max_steps": STEPS})
    if method == "full":
        values = json.loads(recipe.read_text("utf-8"))
        recipe.write_text(json.dumps(values | {"adapter": {"method": "full"}}), encoding="utf-8")
    return recipe


def classifier(folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net: nn.Module = AutoModelForImageClassification.from_pretrained(folder, num_labels=3, dtype=torch.float32)
    return net.eval()


def pixels_of(base: Path, pictures: Path) -> Tensor:
    own = ViTImageProcessor.from_pretrained(base)
    return torch.cat([own(Image.open(file), return_tensors="pt")["pixel_values"] for file in files_of(pictures)])


def files_of(pictures: Path) -> list[Path]:
    return sorted(pictures.rglob("*.png"))


def theirs_of(net: nn.Module, recipe: Path, base: Path, pictures: Path) -> list[float]:
    """Losses of a plain loop over the rows of the recipe's steps."""
    _, prepared = make_plan(load_recipe(str(recipe), []))
    pixels, labels, found = pixels_of(base, pictures), sorted(COLOURS), []
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for step in prepared.rows.steps(prepared.batch_settings).after(0):
        rows = [row.number for batch in step.batches for row in batch.rows]
        answers = torch.tensor([labels.index(files_of(pictures)[row].parent.name) for row in rows])
        loss = torch.nn.functional.cross_entropy(net(pixel_values=pixels[rows]).logits, answers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], 1.0)
        found.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return found


def start_of(folder: Path, base: Path, pictures: Path, method: str) -> Path:
    """The run after a step whose rate is 0."""
    recipe = recipe_of(folder / "start", base, pictures, method)
    overrides = [f"output.dir={folder / 'first'}", "training.max_steps=1", "training.warmup_steps=1"]
    from tunekit.train import train_verb

    train_verb(load_recipe(str(recipe), overrides), False, False)
    return folder / "first"


@torch.no_grad()
def logits_of(net: nn.Module, pixels: Tensor) -> Tensor:
    logits: Tensor = net(pixel_values=pixels).logits
    return logits


def logits_of_target(folder: Path, base: Path | None, pixels: Tensor) -> Tensor:
    loaded = load_target(find_target(str(folder), None if base is None else str(base), ["model.dtype=float32"]), CPU)
    return logits_of(loaded.model.base.net, pixels)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", NETS)
def test_every_net_trains_as_transformers_and_peft_do_and_each_reads_the_other(
    name: str, method: str, pictures: Path, tmp_path: Path
) -> None:
    base = write_net(tmp_path / "base", name)
    recipe = recipe_of(tmp_path, base, pictures, method)
    if method == "lora" and name in CONVOLUTIONS:
        with pytest.raises(InputError, match="the base has no linear layer; write method: full"):
            make_plan(load_recipe(str(recipe), []))
        return
    plan, prepared = make_plan(load_recipe(str(recipe), []))
    statistics = any("running_mean" in own for own in classifier(base).state_dict())
    assert any("running statistics" in note for note in plan.notes) is statistics
    first, run = start_of(tmp_path, base, pictures, method), trained(recipe, tmp_path / "run")
    ours, pixels = [record["loss"] for record in records(run)], pixels_of(base, pictures)
    if method == "full":
        assert ours == pytest.approx(theirs_of(classifier(first / "model"), recipe, base, pictures), abs=1e-5)
        close(logits_of(classifier(run / "model"), pixels), logits_of_target(run, None, pixels))
        return
    targets, settings = [target.name for target in plan.targets], prepared.adapter
    saved = list(settings.modules_to_save)  # type: ignore[attr-defined]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=saved)
    theirs = peft.get_peft_model(classifier(base), config).eval()
    peft.set_peft_model_state_dict(theirs, peft.load_peft_weights(str(first / "adapter")))
    assert ours == pytest.approx(theirs_of(theirs, recipe, base, pictures), abs=1e-5)
    check_each_reads_the_other(
        theirs,
        run,
        base,
        tmp_path,
        classifier,
        ours=lambda adapter: logits_of_target(adapter, base, pixels),
        logits=lambda net: logits_of(net, pixels),
    )


def test_a_net_that_reads_patches_of_any_number_is_refused_by_name(tmp_path: Path, pictures: Path) -> None:
    config = CONFIG_MAPPING["siglip2"](vision_config=SIZES | {"patch_size": 8, "num_patches": 16}, text_config=TEXT)
    transformers.Siglip2Model(config).save_pretrained(tmp_path / "base")
    Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"Siglip2ImageProcessor must return tensors \(3, H, W\) of one size"):
        make_plan(load_recipe(str(recipe_of(tmp_path, tmp_path / "base", pictures, "lora")), []))
