"""Hostile inputs, made from a seed: recordings, pictures, run folders, other tools' configurations, chat requests.

Each is a folder and the command that reads it, as a user would type it.
"""

import io
import json
import os
import random
import struct
import wave
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from tests.recipe.test_foreign import AXOLOTL
from tests.recipe.test_foreign_tools import TORCHTUNE, UNSLOTH
from tests.support.run_case import write_run
from tests.support.speech_case import write_recipe

SOUNDS = (
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("WAV", "ALAW"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("AIFF", "PCM_24"),
)
PICTURES = ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "TGA", "ICO", "PCX", "JPEG2000")
NAMES = (
    "a b",
    "-rf",
    "\u202egnp.wav",
    "new\nline",
    "\x1b[2Jx",
    "é" * 60,
    "..",
    "a'b\"c",
    "$(id)",
    "%s%n",
    "C:\\x",
    "~",
    "x" * 240,
)
DEEP = "[" * 50_000


@dataclass(frozen=True)
class Bases:
    """Tiny models whose processors read recordings and pictures."""

    whisper: Path
    vit: Path


@dataclass(frozen=True)
class HostileInput:
    """What is wrong, in words, and the command that reads it; `body`: of a request, instead of a command."""

    what: str
    command: tuple[str, ...] = ()
    body: bytes | None = None


def hostile_value(draw: random.Random) -> Any:
    """A value that no file of ours holds."""
    deep: Any = 1
    for _ in range(draw.choice((5, 300, 900))):
        deep = [deep] if draw.random() < 0.5 else {"x": deep}
    numbers = [-1, 0, 10**400, 2**63, -(10**30), 1e308, -0.0, float("nan"), float("inf")]
    texts = ["", "text", "\x1b[31mred", "\u202eevil\u2066", "\ud800", "\0", "../../etc/passwd", "a" * 100_000]
    texts += ["{{ 7*7 }}", "<script>alert(1)</script>"]
    lists = [[], {}, [[]], {"": ""}, ["x"] * 5000, {"step": "one"}, [None, 1, "2"], {str(at): at for at in range(2000)}]
    return draw.choice([None, True, *numbers, *texts, *lists, deep])


def changed_bytes(draw: random.Random, data: bytes) -> tuple[str, bytes]:
    """A file that was damaged in one of the ways that files are."""
    at = draw.randrange(max(len(data), 1))
    size = draw.choice((1, 2, 4, 64))
    ways: list[tuple[str, bytes]] = [
        ("cut short", data[:at]),
        ("empty", b""),
        ("zeros inside", data[:at] + bytes(size) + data[at + size :]),
        ("ones inside", data[:at] + b"\xff" * size + data[at + size :]),
        ("noise inside", data[:at] + draw.randbytes(size) + data[at + size :]),
        ("a header with noise", draw.randbytes(4).join([data[: at % 44], data[at % 44 + 4 :]])),
        ("a piece twice", data[:at] + data[at // 2 : at] + data[at:]),
        ("noise alone", draw.randbytes(500)),
        ("the start and noise", data[: draw.randrange(64)] + draw.randbytes(2000)),
        ("zeros behind it", data + bytes(1_000_000)),
        ("a web page", b"<!DOCTYPE html><html>404</html>"),
        ("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
        ("a shell script", b"#!/bin/sh\ntouch ran\n"),
    ]
    return draw.choice(ways)


def no_file(draw: random.Random, path: Path) -> str:
    """Something else in place of a file."""
    if path.is_file():
        path.unlink()
    kind = draw.choice(("folder", "pipe", "loop", "device", "absent", "unreadable"))
    {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "absent": lambda: None,
        "unreadable": lambda: (path.write_bytes(b"x"), path.chmod(0)),
    }[kind]()
    return f"{kind} instead of the file"


def recording(draw: random.Random, folder: Path, bases: Bases) -> HostileInput:
    """A speech recipe with one recording that is damaged, odd, or not there."""
    kind, subtype = draw.choice(SOUNDS)
    rate, channels = draw.choice((8000, 11025, 16000, 44100, 48000)), draw.choice((1, 1, 2, 6))
    samples = np.random.default_rng(draw.randrange(2**32)).uniform(-0.5, 0.5, (rate // 4, channels))
    stream, path = io.BytesIO(), folder / "sounds" / f"a.{draw.choice(('wav', 'flac', 'mp3', 'ogg'))}"
    soundfile.write(stream, samples, rate, subtype, format=kind)
    data, what, named = stream.getvalue(), f"{kind} {subtype}", ""
    path.parent.mkdir(parents=True)
    way = draw.randrange(6)
    if way == 0:
        odd = draw.choice(
            (1, 99, 4001, 11127, 44099, 47952, 191_999, 767_999, 2**31 - 1, 2**32 - 1, draw.randrange(2**32))
        )
        stream = io.BytesIO()
        soundfile.write(stream, samples, rate, "PCM_16", format="WAV")
        data = stream.getvalue()[:24] + struct.pack("<I", odd) + stream.getvalue()[28:]
        if 100 <= odd <= 768_000:  # as long as the model hears, too
            data = written_wave(np.tile(samples[:, 0], 2 * odd // len(samples) + 1)[: odd * 2], odd)
        what = f"a rate of {odd}"
    elif way == 1:
        fields = {
            "channels": (22, "<H"),
            "block": (32, "<H"),
            "bits": (34, "<H"),
            "data": (40, "<I"),
            "riff": (4, "<I"),
        }
        data = written_wave(samples[:, 0], rate)
        name, (at, form) = draw.choice(list(fields.items()))
        number = draw.choice((0, 1, 255, 1024, 65535, draw.randrange(65536)))
        data = data[:at] + struct.pack(form, number) + data[at + struct.calcsize(form) :]
        what = f"{name} of {number} in its header"
    elif way == 2:
        named = draw.choice((*NAMES, "\0", "", "http://localhost:1/a.wav", "/dev/zero", "/proc/self/mem", "sounds"))
        what = f"a path {named!r}"
    elif way == 3:
        values = np.full((8000, 1), draw.choice((np.nan, np.inf, 1e38, 0.0)), np.float32)
        stream = io.BytesIO()
        soundfile.write(stream, values, 8000, "FLOAT", format="WAV")
        data, what = stream.getvalue(), f"samples of {values[0, 0]}"
    elif way == 4:
        stream = io.BytesIO()  # a minute of silence in some kilobytes
        soundfile.write(
            stream,
            np.zeros((draw.choice((48000, 192_000)) * 20, 8), np.int16),
            draw.choice((48000, 655350)),
            format="FLAC",
        )
        data, what = stream.getvalue(), "a long silence of eight channels"
    else:
        what, data = changed_bytes(draw, data)
    path.write_bytes(data)
    if draw.random() < 0.05:
        what = no_file(draw, path)
    row = {"audio": named or f"sounds/{path.name}", "text": draw.choice(("a", "a", "a", "", "\u202e", "x" * 3000))}
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    recipe = write_recipe(
        folder, bases.whisper, Path("train.jsonl"), data={"excess_length": draw.choice(("drop", "error"))}
    )
    return HostileInput(what, ("preview", str(recipe), "-n", "2"))


def written_wave(samples: np.ndarray, rate: int) -> bytes:
    """A plain WAV file."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return stream.getvalue()


def png(width: int, height: int, *, rows: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG file that claims a size, with right checksums."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + (chunk(b"zTXt", b"x\0\0" + zlib.compress(extra)) if extra else b"")
    return b"\x89PNG\r\n\x1a\n" + data + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def picture(draw: random.Random, folder: Path, bases: Bases) -> HostileInput:
    """An image classifier's recipe with one picture that is damaged, odd, or not there."""
    good = Image.fromarray(np.random.default_rng(draw.randrange(2**32)).integers(0, 255, (24, 40, 3), dtype=np.uint8))
    kind, stream = draw.choice(PICTURES), io.BytesIO()
    good.save(stream, format=kind)
    odd: dict[str, Callable[[], bytes]] = {
        "a claim of 4 gigapixels": lambda: png(65535, 65535),
        "a claim of 150 megapixels": lambda: png(15000, 10000),
        "a picture of 80 megapixels": lambda: png(8000, 10000, rows=bytes(10000 * 24001)),
        "a size of nothing": lambda: png(0, 0),
        "one line": lambda: png(60000, 1, rows=bytes(180001)),
        "a long strip": lambda: png(16, 60000, rows=bytes(60000 * 49)),
        "a text bomb": lambda: png(32, 32, rows=bytes(32 * 97), extra=bytes(100_000_000)),
        "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n{} loop\n",
        "SVG": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "PDF": lambda: b"%PDF-1.7\n1 0 obj<<>>endobj\n",
    }
    path = folder / "photos" / f"a.{draw.choice(('png', 'jpg', 'webp', 'tif'))}"
    path.parent.mkdir(parents=True)
    if draw.random() < 0.35:
        what = draw.choice(list(odd))
        path.write_bytes(odd[what]())
    else:
        what, data = changed_bytes(draw, stream.getvalue())
        what = f"{kind}: {what}"
        path.write_bytes(data)
    if draw.random() < 0.1:
        what = no_file(draw, path)
    named = f"photos/{path.name}"
    if draw.random() < 0.15:
        named = draw.choice((*NAMES, "\0", "", "/dev/zero", "http://localhost:1/a.png", "photos"))
        what = f"a path {named!r}"
    label = draw.choice(("cat", "cat", "cat", "\u202ecat", "", "x" * 5000, 3, None))
    rows = [{"image": named, "label": label}, {"image": named, "label": "dog"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sections = {"objective": {"method": "image_classify"}, "data": {"train": "train.jsonl"}}
    values = {"model": {"name_or_path": str(bases.vit), "dtype": "float32"}, **sections, "output": {"dir": "run"}}
    (folder / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
    return HostileInput(what, ("preview", str(folder / "recipe.yaml"), "-n", "2"))


def run_folder(draw: random.Random, folder: Path, bases: Bases) -> HostileInput:
    """A run folder with a damaged file, next to a whole one."""
    name = draw.choice(("run", "run", *(each for each in NAMES if each not in ("..", "~"))))
    run = write_run(folder / "runs" / name, steps=draw.choice((3, 40)), finished=draw.random() < 0.8)
    write_run(folder / "runs" / "other", seed=1)
    files = ("plan.json", "report.json", "status.json", "environment.json", "metrics.jsonl", "evaluation_rows.json")
    file = run / draw.choice((*files, "recipe.yaml", "pictures/step-000000-0.png", ".lock", "checkpoints"))
    way = draw.randrange(3)
    if file.suffix not in (".json", ".jsonl", ".yaml"):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(draw.choice((png(65535, 65535), png(20, 20), b"%!PS-Adobe", b"")))
        what = f"{file.name} of {file.stat().st_size} bytes"
        if draw.random() < 0.5:
            what = no_file(draw, file)
    elif way == 0 and file.exists():
        what, data = changed_bytes(draw, file.read_bytes())
        file.write_bytes(data)
    elif way == 1 or not file.exists() or file.suffix == ".yaml":
        what = no_file(draw, file)
        if draw.random() < 0.5 and not os.path.lexists(file):
            file.write_text(
                draw.choice((DEEP, "null", "[]", "3", '"text"', "{}", "\n" * 1000, '{"a": NaN}', "9" * 5000))
            )
            what = "other JSON"
    else:
        lines = file.read_text("utf-8").splitlines() if file.suffix == ".jsonl" else [file.read_text("utf-8")]
        at = draw.randrange(len(lines))
        values = json.loads(lines[at])
        what = replace_one(draw, values)
        lines[at] = json.dumps(values)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    paths = (str(run), str(folder / "runs" / "other"))
    commands = [
        ("runs", str(folder / "runs")),
        ("runs", "clean", str(folder / "runs"), "--yes"),
        ("report", paths[0]),
        ("report", *paths, "--html", str(folder / "page.html"), "--csv", str(folder / "out.csv")),
        ("report", *paths[::-1], "--json", "-"),
        ("watch", paths[0]),
        ("eval", paths[0], "--device", "cpu"),
        ("merge", paths[0], "--output", str(folder / "merged")),
    ]
    command = draw.choice(commands)
    return HostileInput(f"{file.name}: {what}", command)


def replace_one(draw: random.Random, values: Any, key: str = "") -> str:
    """Give one value, at any depth, another value, or remove it."""
    while True:
        at = draw.choice(list(values) if isinstance(values, dict) else range(len(values))) if values else None
        if at is None or (isinstance(values, list) and at is None):
            return f"{key} is empty"
        inner, key = values[at], f"{key}.{at}"
        if isinstance(inner, dict | list) and inner and draw.random() < 0.7:
            values = inner
            continue
        if isinstance(values, dict) and draw.random() < 0.2:
            del values[at]
            return f"{key} removed"
        values[at] = hostile_value(draw)
        return f"{key} = {str(values[at])[:40]!r}"


def configuration(draw: random.Random, folder: Path, bases: Bases) -> HostileInput:
    """A configuration of another tool with a line that is wrong."""
    name, text = draw.choice((("axolotl", AXOLOTL), ("torchtune", TORCHTUNE), ("unsloth", UNSLOTH), ("peft", "")))
    path = folder / f"{name}.{'json' if name == 'peft' else draw.choice(('yaml', 'yml'))}"
    if name == "peft":
        values = {
            "peft_type": "LORA",
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["q_proj"],
            "base_model_name_or_path": "b",
        }
        what = replace_one(draw, values)
        text = json.dumps(values)
    lines = text.strip("\n").split("\n")
    at = draw.randrange(len(lines))
    key = lines[at].partition(":")[0]
    value = json.dumps(hostile_value(draw))
    ways = {
        "a value": [*lines[:at], f"{key}: {value}", *lines[at + 1 :]],
        "a line twice": [*lines[:at], lines[at], *lines[at:]],
        "a new key": [*lines, f"{json.dumps(draw.choice(NAMES))}: {value}"],
        "a tag": [*lines[:at], f"{key}: !!python/object/apply:os.system ['touch ran']", *lines[at + 1 :]],
        "a bomb": [
            "a: &a [x,x,x,x,x,x,x,x,x]",
            *(
                f"{c}: &{c} [*{b},*{b},*{b},*{b},*{b},*{b},*{b},*{b}]"
                for b, c in zip("abcdefgh", "bcdefghi", strict=True)
            ),
            *lines,
        ],
        "a loop": ["loop: &x {inner: *x}", *lines],
        "many keys": [*lines, *(f"key_{number}: {number}" for number in range(5000))],
        "deep nesting": [*lines, f"deep: {DEEP}"],
        "two documents": [*lines, "---", *lines],
        "references": [line.replace("out/", "${output_dir}/${output_dir}/${absent}/") for line in lines],
    }
    what = draw.choice(list(ways))
    data = "\n".join(ways[what]).encode("utf-8", "surrogatepass")
    if draw.random() < 0.2:
        what, data = changed_bytes(draw, data)
    if draw.random() < 0.1:
        what, data = "UTF-16", data.decode("utf-8", "replace").encode("utf-16")
    path.write_bytes(data)
    if draw.random() < 0.05:
        what = no_file(draw, path)
    output = ("--output", str(folder / "recipe.yaml")) if draw.random() < 0.5 else ()
    return HostileInput(f"{name}: {what}", ("import", str(path), *output))


def request(draw: random.Random, folder: Path, bases: Bases) -> HostileInput:
    """A body of a chat request."""
    values: dict[str, Any] = {
        "model": "base",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["x"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "n": 1,
        "tools": [],
        "logit_bias": {},
        "response_format": {"type": "text"},
    }
    if draw.random() < 0.4:
        values["messages"].append(
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            }
        )
    what = " and ".join(replace_one(draw, values) for _ in range(draw.choice((1, 1, 2))))
    body = json.dumps(values).encode()
    if draw.random() < 0.2:
        what, body = changed_bytes(draw, body)
    if draw.random() < 0.05:
        what, body = "deep", DEEP.encode()
    return HostileInput(what, body=body)


AREAS: dict[str, Callable[[random.Random, Path, Bases], HostileInput]] = {
    "audio": recording,
    "images": picture,
    "run folders": run_folder,
    "import": configuration,
    "serve": request,
}
