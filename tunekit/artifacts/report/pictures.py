"""The pictures that a run's evaluations drew: a run folder goes in; what a page shows of them comes out, small enough
that the page stays one file."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunekit.artifacts.run import PICTURES

NAME = re.compile(r"step-(\d{6,})-(\d+)\.png")
SIDE, QUALITY = 384, 85  # of what a page holds: pixels, JPEG's percent


def picture_name(step: int, number: int) -> str:
    """Of a file in the run folder."""
    return f"{PICTURES}/step-{step:06d}-{number}.png"


def drawn(run: Path) -> dict[int, list[Path]]:
    """Step -> its pictures, in the order of their prompts."""
    found: dict[int, dict[int, Path]] = {}
    for path in (run / PICTURES).glob("*.png"):
        match = NAME.fullmatch(path.name)
        if match:
            found.setdefault(int(match[1]), {})[int(match[2])] = path
    return {step: [each for _, each in sorted(found[step].items())] for step in sorted(found)}


def before_and_after(run: Path, prompts: Sequence[str], exported: int | None) -> list[dict[str, Any]]:
    """For each prompt the pictures of the first evaluation and of the exported weights: {prompt, shown: [{title,
    path}]}."""
    found = drawn(run)
    if not found:
        return []
    steps = list(dict.fromkeys([min(found), exported if exported in found else max(found)]))
    titles = {step: "before training" if step == 0 else f"step {step:,}" for step in steps}
    return [
        {
            "prompt": prompt,
            "shown": [{"title": titles[step], "path": found[step][at]} for step in steps if at < len(found[step])],
        }
        for at, prompt in enumerate(prompts)
    ]


def shown_pictures(run: Path, recipe: Mapping[str, Any], exported: int | None) -> Iterator[dict[str, Any]]:
    """What a section of the page is made of, where there are pictures."""
    prompts = recipe.get("objective", {}).get("validation_prompts") or ()
    rows = before_and_after(run, prompts, exported)
    for row in rows:
        row["shown"] = [{**each, "source": inlined(each["path"])} for each in row["shown"]]
    if rows:
        text = f"Always from the same noise. Those of every evaluation are in {PICTURES}/, as they were drawn."
        yield {"text": [text], "pictures": rows}


def inlined(picture: Path | NDArray[np.uint8]) -> str:
    """A small JPEG of a picture, a file or pixels (H, W, 3), as a data address."""
    from PIL import Image

    stream = io.BytesIO()
    with Image.open(picture) if isinstance(picture, Path) else Image.fromarray(picture) as image:
        image.thumbnail((SIDE, SIDE))
        image.convert("RGB").save(stream, format="JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
