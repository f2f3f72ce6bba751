"""Recipes over pictures, and a DreamBooth step written by hand after diffusers' own script
(examples/dreambooth/train_dreambooth_lora.py), with diffusers, peft and torchvision alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from diffusers import DDPMScheduler
from PIL import Image
from PIL.ImageOps import exif_transpose
from torchvision import transforms

from tests.support import train_case
from tests.support.plans import make_plan
from tests.support.tiny_pipelines import SIZE, loaded_by_diffusers
from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.config import adapter_header, tensors_path
from tunekit.contracts import StepBatches
from tunekit.data.encoding.images import png_bytes
from tunekit.files.tensors import read_tensor
from tunekit.formats.media import Media
from tunekit.model.call import seed_for
from tunekit.model.load import load_model
from tunekit.objectives.losses.noise import generator_for
from tunekit.recipe.load import load_recipe

CPU = torch.device("cpu")
COLOURS = {"blue": (40, 60, 200), "green": (30, 180, 60), "red": (210, 40, 30)}
PROMPT, CLASS_PROMPT = "a photo of sks dog", "a photo of dog"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
OF_TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


def write_photos(folder: Path, count: int = 5, seed: int = 0) -> Path:
    """Photos of plain colours with noise, of different sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(seed)
    for number in range(count):
        shape = (20 + 3 * number, 31 - 2 * number, 3)
        pixels = numbers.integers(0, 60, shape) + numbers.integers(0, 180, (1, 1, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def write_classes(folder: Path, count: int, height: int, width: int) -> Path:
    """One folder a class: noise around a colour, of different sizes."""
    numbers = np.random.default_rng(1)
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for number in range(count):
            pixels = np.array(colour) + numbers.integers(-30, 30, (height + number, width - number, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


def held_picture(seed: int) -> Media:
    """A picture as a PNG file's bytes."""
    pixels = np.random.default_rng(seed).integers(0, 255, (20 + seed, 26 - seed, 3))
    return Media(f"{seed}.png", png_bytes(pixels.astype(np.uint8)))


def write_image_recipe(folder: Path, pipeline: Path, photos: Path, **sections: dict[str, Any]) -> Path:
    """A DreamBooth recipe; sections override what stands here."""
    values: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": str(pipeline), "dtype": "float32"},
        "data": {"train": [{"path": str(photos)}], "eval": [{"path": str(photos)}]},
        "adapter": {"method": "lora", "r": 4, "alpha": 8, "target_modules": ATTENTION},
        "objective": {"method": "dreambooth", "instance_prompt": PROMPT, "resolution": SIZE},
        "training": {
            "learning_rate": 1e-3,
            "scheduler": "constant",
            "warmup_steps": 0,
            "max_steps": 4,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "save_steps": 100,
            "eval_steps": 100,
        },
        "output": {"dir": "run"},
    }
    return train_case.write_sections(folder, values, sections)


def records(run: Path) -> list[dict[str, Any]]:
    """The steps of metrics.jsonl."""
    return [record for record in train_case.records(run) if "loss" in record]


def adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of the adapter of a pipeline, by PEFT's keys."""
    path = tensors_path(folder)
    return {key: read_tensor(path, entry) for key, entry in adapter_header(path).items()}


class ByHand:
    """The script's loop over the rows that a recipe's steps name, with the numbers that tunekit draws."""

    def __init__(self, recipe: Path, photos: Path, kind: str = "sd") -> None:
        self.plan, self.planned = make_plan(load_recipe(recipe, []), device=CPU)
        self.settings: Any = self.planned.rows.objective.loss.settings  # type: ignore[attr-defined]
        self.kind, folder = kind, Path(self.plan.model.name_or_path)
        self.pipeline = loaded_by_diffusers(folder, kind)
        self.scheduler: Any = self.pipeline.scheduler
        if kind != "sd3":
            self.scheduler = DDPMScheduler.from_pretrained(str(folder), subfolder="scheduler")
        self.denoiser = self.pipeline.transformer if kind == "sd3" else self.pipeline.unet
        self.parts = {"transformer" if kind == "sd3" else "unet": self.denoiser}
        if self.settings.train_text_encoder:
            self.parts["text_encoder"] = self.pipeline.text_encoder
        for part in (self.pipeline.vae, self.pipeline.text_encoder, self.denoiser):
            part.requires_grad_(False)
        self.parameters = self._adapted()
        rate = self.plan.recipe["training"]["learning_rate"]
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=rate, weight_decay=0.0)
        self.photos = sorted(photos.iterdir())
        classes = self.settings.class_data_dir
        self.class_photos = sorted(Path(classes).iterdir()) if classes else []

    def _adapted(self) -> dict[str, torch.nn.Parameter]:
        """peft's LoRA with tunekit's first values."""
        settings: Any = self.planned.adapter
        base, found = load_model(self.planned.model, device=CPU), {}
        first = attach_adapter(base.net, settings, seed=0, head_name=None).state()
        for name, part in self.parts.items():
            targets = [each.name.removeprefix(f"{name}.") for each in self.plan.targets if each.name.startswith(name)]
            config = peft.LoraConfig(r=settings.r, lora_alpha=settings.alpha, target_modules=targets)
            peft.inject_adapter_in_model(config, part)
            for own, parameter in part.named_parameters():
                if "lora_" in own:
                    found[f"{name}.{own.replace('.default', '')}"] = parameter
        assert found.keys() == first.keys()
        for name, parameter in found.items():
            parameter.data.copy_(first[name])
        return found

    def _bucket(self, path: Path) -> tuple[int, int]:
        """Of those in the recipe, by aspect ratio; else the square."""
        image, buckets = exif_transpose(Image.open(path)), self.settings.aspect_ratio_buckets or [(SIZE, SIZE)]
        ratios = [(image.height / image.width) / (height / width) for height, width in buckets]
        found: tuple[int, int] = buckets[int(np.argmin([max(ratio, 1 / ratio) for ratio in ratios]))]
        return found

    def _transformed(self, path: Path, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels as the script's DreamBoothDataset makes them, with --center_crop; SDXL's time ids. A bucket that is
        no square is covered as in train_dreambooth_lora_flux2.py, but for rounding as Resize(side) does."""
        image = exif_transpose(Image.open(path))
        scale = max(size[0] / image.height, size[1] / image.width)
        covering = [int(image.height * scale + 1e-9), int(image.width * scale + 1e-9)]
        transform = transforms.Compose(
            [
                transforms.Resize(covering, interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )
        values: torch.Tensor = transform(image if image.mode == "RGB" else image.convert("RGB"))
        corner = [round((whole - seen) / 2.0) for whole, seen in zip(covering, size, strict=True)]
        return values, torch.tensor([image.height, image.width, *corner, *size], dtype=torch.float32)

    def step(self, step: StepBatches) -> tuple[float, float]:
        """One optimizer step over the step's rows, those of each size as one batch; returns its loss and the norm of
        its gradient."""
        seen, places = Counter[int](), list[tuple[int, ...]]()
        for row in (row for batch in step.batches for row in batch.rows):
            places.append((step.seed, step.step, row.number, seen[row.number]))
            seen[row.number] += 1
        sizes = [self._bucket(self.photos[place[2]]) for place in places]
        loss = torch.zeros(())
        for size in set(sizes):
            some = [place for place, own in zip(places, sizes, strict=True) if own == size]
            loss = loss + self._loss_at(size, some) * len(some) / len(places)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach()), float(norm)

    def _loss_at(self, size: tuple[int, int], places: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Of pictures of one size; those of the class are cropped to it."""
        pixels = [self._transformed(self.photos[place[2]], size) for place in places]
        prompts, draws = [PROMPT] * len(places), [(*place, 0) for place in places]
        if self.class_photos:  # one batch of both, the class behind
            count = len(self.class_photos)
            chosen = [self.class_photos[seed_for("class picture", *place) % count] for place in places]
            pixels += [self._transformed(path, size) for path in chosen]
            prompts, draws = [*prompts, *[CLASS_PROMPT] * len(places)], [*draws, *[(*place, 1) for place in places]]
        values, self.time_ids = (torch.stack(each) for each in zip(*pixels, strict=True))
        return self._loss(*self._predicted(values, prompts, draws))

    def _predicted(
        self, pixels: torch.Tensor, prompts: Sequence[str], draws: Sequence[tuple[int, ...]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        vae, scheduler = self.pipeline.vae, self.scheduler
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        shape, shift = posterior.mean.shape[1:], getattr(vae.config, "shift_factor", None) or 0.0
        normal = torch.stack([torch.randn(shape, generator=generator_for("latents", *draw)) for draw in draws])
        latents = (posterior.mean + posterior.std * normal - shift) * vae.config.scaling_factor
        noise = torch.stack([torch.randn(shape, generator=generator_for("noise", *draw)) for draw in draws])
        count, generators = scheduler.config.num_train_timesteps, [generator_for("step", *draw) for draw in draws]
        if self.kind == "sd3":
            uniform = torch.stack([torch.rand((), generator=generator) for generator in generators])
            steps = (uniform * count).long()
            sigmas = scheduler.sigmas[steps].view(-1, 1, 1, 1)
            noisy = (1.0 - sigmas) * latents + sigmas * noise
            embeddings, _, pooled, _ = self.pipeline.encode_prompt(
                list(prompts), None, None, do_classifier_free_guidance=False
            )
            predicted = self.denoiser(
                hidden_states=noisy,
                timestep=scheduler.timesteps[steps],
                encoder_hidden_states=embeddings,
                pooled_projections=pooled,
            ).sample
            return predicted, noise - latents
        steps = torch.stack([torch.randint(0, count, (), generator=generator) for generator in generators])
        noisy = scheduler.add_noise(latents, noise, steps)
        more: dict[str, Any] = {}
        if self.kind == "sdxl":
            embeddings, _, pooled, _ = self.pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
            more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": self.time_ids}
        else:
            tokenizer = self.pipeline.tokenizer
            ids = tokenizer(list(prompts), truncation=True, padding="max_length", max_length=77, return_tensors="pt")
            embeddings = self.pipeline.text_encoder(ids.input_ids)[0]
        predicted = self.denoiser(noisy, steps, embeddings, **more).sample
        is_epsilon = scheduler.config.prediction_type == "epsilon"
        return predicted, noise if is_epsilon else scheduler.get_velocity(latents, noise, steps)

    def _loss(self, predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if not self.class_photos:
            return torch.nn.functional.mse_loss(predicted.float(), target.float(), reduction="mean")
        predicted, prior = torch.chunk(predicted, 2, dim=0)
        target, prior_target = torch.chunk(target, 2, dim=0)
        loss = torch.nn.functional.mse_loss(predicted.float(), target.float(), reduction="mean")
        prior_loss = torch.nn.functional.mse_loss(prior.float(), prior_target.float(), reduction="mean")
        return loss + self.settings.prior_loss_weight * prior_loss
