"""The images that a run's evaluations generated. Pages embed them, so that a page is a single file."""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunekit.artifacts.report.sections import PictureRow
from tunekit.artifacts.run import PICTURES

NAME = re.compile(r"step-(\d{6,})-(\d+)\.png")
SIDE, QUALITY = 384, 85  # of images in a page: pixels per side, quality of the JPEG


def picture_name(step: int, number: int) -> str:
    """The name of an image's file in the run folder."""
    return f"{PICTURES}/step-{step:06d}-{number}.png"


def drawn(run: Path) -> dict[int, list[Path]]:
    """The paths of the generated images, for each step, in the order of their prompts."""
    pictures: dict[int, dict[int, Path]] = {}
    for path in (run / PICTURES).glob("*.png"):
        match = NAME.fullmatch(path.name)
        if match:
            pictures.setdefault(int(match[1]), {})[int(match[2])] = path
    return {step: [each for _, each in sorted(pictures[step].items())] for step in sorted(pictures)}


def before_and_after(run: Path, prompts: Sequence[str], exported: int | None) -> list[PictureRow]:
    """For each prompt, the image of the first evaluation and the image generated with the exported weights."""
    pictures = drawn(run)
    if not pictures:
        return []
    steps = dict.fromkeys([min(pictures), exported if exported in pictures else max(pictures)])
    titles = {step: "before training" if step == 0 else f"step {step:,}" for step in steps}
    return [
        PictureRow(prompt, [(titles[step], pictures[step][at]) for step in steps if at < len(pictures[step])])
        for at, prompt in enumerate(prompts)
    ]


def inlined(picture: Path | NDArray[np.uint8]) -> str:
    """A small JPEG of an image, as a data URL. `picture`: a PNG file, or pixels (H, W, 3). Raises: ValueError for a
    damaged file."""
    from PIL import Image

    stream = io.BytesIO()
    try:
        with Image.open(picture, formats=["PNG"]) if isinstance(picture, Path) else Image.fromarray(picture) as image:
            image.thumbnail((SIDE, SIDE))
            image.convert("RGB").save(stream, format="JPEG", quality=QUALITY)
    except Exception as error:  # PIL's decoders raise errors of every kind
        raise ValueError(f"{picture} cannot be read as PNG ({error})") from error
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
