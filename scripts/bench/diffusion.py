"""Compares predicted with measured memory of DreamBooth, for a pipeline of Stable Diffusion 1.4's shape with random
weights: scripts/results/diffusion.md. A GPU is only planned for.

    scripts/bench/run diffusion [--work FOLDER]       4 GB of files; four CPU minutes
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.support.published_pipelines import PARTS, written_pipeline  # noqa: E402
from tunekit.planning import prepared  # noqa: E402
from tunekit.planning.plan import plan  # noqa: E402
from tunekit.planning.prepare import prepare  # noqa: E402
from tunekit.recipe.load import load_recipe  # noqa: E402

GB = 1e9
ROWS = {  # changes of the recipe
    "nothing recomputed": ["memory.gradient_checkpointing=false"],
    "every layer recomputed": ["memory.gradient_checkpointing=true"],
    "in bfloat16": ["memory.gradient_checkpointing=true", "model.dtype=bfloat16"],
}
MEASURED = list(ROWS)[:2]
TITLE = """\
# Memory of DreamBooth

Made by `scripts/bench/run diffusion` on {date}: two steps on Stable Diffusion 1.4's shape with random weights, at 512
pixels, one image per micro-batch, rank 16 on the attention of the UNet, in float32, with one thread. Measured: the
growth of the process, as in its report.

| | on a GPU, planned | on a CPU, planned | on a CPU, measured |
|:--|--:|--:|--:|
"""


def write_base(folder: Path) -> None:
    """The pipeline with random weights."""
    written_pipeline(folder, "sd14")
    for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        kind.from_config(PARTS["sd14"][name]).save_pretrained(folder / name, max_shard_size="20GB")
    CLIPTextModel(CLIPTextConfig(**PARTS["sd14"]["text_encoder"])).save_pretrained(folder / "text_encoder")


def write_recipe(work: Path) -> Path:
    """The recipe. JSON is YAML."""
    values: dict[str, Any] = {
        "model": {"name_or_path": "./base", "dtype": "float32"},
        "data": {"train": [{"path": str(REPOSITORY / "recipes" / "data" / "kite"), "max_rows": 1}]},
        "adapter": {"method": "lora", "r": 16, "alpha": 16, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]},
        "objective": {"method": "dreambooth", "instance_prompt": "a photo of sks kite"},
        "training": {"max_steps": 2, "micro_batch_size": 1, "gradient_accumulation_steps": 1},
        "output": {"dir": "run"},
    }
    (work / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
    return work / "recipe.yaml"


def planned(recipe: Path, changes: list[str], device: str) -> float:
    made, _ = plan(prepare(load_recipe(recipe, changes), torch.device(device)))
    return made.peak_bytes.total / GB


def measured(recipe: Path, changes: list[str]) -> float:
    folder = recipe.parent / f"run-{len(list(recipe.parent.iterdir()))}"
    words = [sys.executable, "-m", "tunekit", "train", str(recipe), *changes, f"output.dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TUNEKIT_DEVICE": "cpu", "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(words, env=environment, check=True)
    return json.loads((folder / "report.json").read_text())["measured_bytes"]["cpu"] / GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path)
    with tempfile.TemporaryDirectory(dir=parser.parse_args().work) as work:
        write_base(Path(work) / "base")
        recipe, lines = write_recipe(Path(work)), []
        prepared.available_bytes = prepared.total_bytes = lambda device: 80 * 2**30  # a GPU that is not here
        for name, changes in ROWS.items():
            figures = [f"{planned(recipe, changes, 'cuda'):.2f} GB", "", ""]
            if name in MEASURED:
                figures[1:] = [f"{planned(recipe, changes, 'cpu'):.2f} GB", f"{measured(recipe, changes):.2f} GB"]
            lines.append(f"| {name} | {' | '.join(figures)} |\n")
            print(lines[-1], end="", flush=True)
    text = TITLE.format(date=datetime.date.today()) + "".join(lines)
    (REPOSITORY / "scripts" / "results" / "diffusion.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
