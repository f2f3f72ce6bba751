"""Rows of text and images: which tokens are trained on, how rows are cut, and what is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.image_text_case import image_row, write_image_text, write_images
from tunekit.contracts import EncodeOptions, Objective, Row
from tunekit.data.encoding.images import read_image, read_size
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.reading.first import format_maker
from tunekit.errors import DataError, TunekitError
from tunekit.model.families import make_family
from tunekit.model.images import processor as image_processor
from tunekit.model.images.processor import PROVEN, find_images
from tunekit.model.storage.source import ModelSource
from tunekit.objectives.base import make_objective
from tunekit.objectives.rows.row_images import images_in, pixels_of
from tunekit.objectives.rows.sequences import SequenceRows
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.sft import SftSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_text("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def objective(folder: Path) -> Objective:
    return objective_of(folder)


def objective_of(folder: Path, options: EncodeOptions | None = None) -> Objective:
    processor = make_family("causal").processor(ModelSection(name_or_path=str(folder)))
    return make_objective(SftSettings(), processor, None, options)


def encode(objective: Objective, row: dict[str, Any], place: Path) -> Row:
    example = format_maker("chat", str(place / "train.jsonl"))(row)
    return objective.rows.encode(example, "train.jsonl:7")


def trained_text(objective: Objective, row: Row) -> str:
    rows: Any = objective.rows
    return rows.tokenizer.decode(row.parts["ids"][row.parts["trained"]])


def test_only_answers_are_trained_on(objective: Objective, tmp_path: Path) -> None:
    row = encode(objective, image_row(2, [str(path) for path in write_images(tmp_path, 2)]), tmp_path)
    assert trained_text(objective, row) == "so very very 2<|im_end|>ok<|im_end|>"
    assert [image.stop - image.start for image in images_in(row)] == [
        2 + objective.rows.processor.expansion(image.height, image.width).count("pad")  # type: ignore[attr-defined]
        for image in images_in(row)
    ]


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_an_image_in_an_answer_is_not_trained_on(folder: Path, train_on: str, tmp_path: Path) -> None:
    """Neither are the tokens that mark its start and its end, which the template writes."""
    objective = objective_of(folder, EncodeOptions(train_on=train_on))
    [image] = write_images(tmp_path, 1)
    parts = [{"type": "text", "text": "see"}, {"type": "image", "image": str(image)}]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": parts}]
    row = encode(objective, {"messages": messages}, tmp_path)
    assert trained_text(objective, row).endswith("see<|im_end|>" if train_on == "assistant" else "see<|im_end|>\n")
    assert "<|vision" not in trained_text(objective, row)


def test_a_placeholder_in_a_text_stays_text(objective: Objective, tmp_path: Path) -> None:
    [image] = write_images(tmp_path, 1)
    row = encode(objective, {"messages": image_row(1, [str(image)])["messages"]}, tmp_path)
    spelled = image_row(1, [str(image)])
    spelled["messages"][0]["content"][0]["text"] += "<|image_pad|><|vision_start|>"
    longer = encode(objective, spelled, tmp_path)
    rows: Any = objective.rows
    assert rows._token_types(longer).sum() == rows._token_types(row).sum() > 0
    assert "<|image_pad|><|vision_start|>" in rows.tokenizer.decode(longer.parts["ids"])


def test_rows_hold_no_pixels(objective: Objective, tmp_path: Path) -> None:
    [image] = write_images(tmp_path, 1)
    row = encode(objective, image_row(0, [str(image)]), tmp_path)
    assert sum(part.nbytes for part in row.parts.values()) < 2000
    assert row.parts["image_data"].size == 0
    inside = encode(objective, {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
                                "images": [{"bytes": image.read_bytes(), "path": None}]}, tmp_path)  # fmt: skip
    assert inside.parts["image_data"].tobytes() == image.read_bytes()


def test_a_cut_never_leaves_a_part_of_an_image(objective: Objective, tmp_path: Path) -> None:
    paths, numbers, rows = write_images(tmp_path, 3), np.random.default_rng(0), objective.rows
    whole = [encode(objective, image_row(at, [str(path) for path in paths[:at]]), tmp_path) for at in range(4)]
    for _ in range(300):
        row = whole[numbers.integers(4)]
        stop = int(numbers.integers(1, row.size + 1))
        cut = rows.cut(row, 0, stop)
        images = images_in(cut)
        assert cut.size <= stop
        assert images == images_in(row)[: len(images)]
        types: Any = rows._token_types(cut)  # type: ignore[attr-defined]
        assert types.sum() == sum(types[image.start : image.stop].sum() for image in images)
        at_image = any(image.start < stop < image.stop for image in images_in(row))
        assert cut.size == stop or at_image


def test_two_images_can_share_a_token(objective: Objective, tmp_path: Path) -> None:
    """Two line breaks between two images are one token in Gemma's vocabulary."""
    row = encode(objective, image_row(2, [str(path) for path in write_images(tmp_path, 2)]), tmp_path)
    first, second = images_in(row)
    assert first.stop < second.start
    text = np.frombuffer(json.dumps([asdict(first), asdict(replace(second, start=first.stop - 1))]).encode(), np.uint8)
    sharing = row.with_parts({"images": text})
    for stop in range(1, row.size + 1):
        images = images_in(cut := objective.rows.cut(sharing, 0, stop))
        assert cut.size <= stop
        assert [image.stop <= stop for image in images] == [True] * len(images)


def test_the_texts_of_a_row_have_no_images(objective: Objective, tmp_path: Path) -> None:
    """Merged and exported models are compared on texts."""
    rows: Any = objective.rows
    row = encode(objective, image_row(2, [str(path) for path in write_images(tmp_path, 2)]), tmp_path)
    assert "look 2 and  and <|im_end|>" in rows.tokenizer.decode(rows.text_ids(row))
    plain = encode(objective, image_row(2, []), tmp_path)
    assert rows.text_ids(plain).tolist() == plain.parts["ids"].tolist()


@pytest.mark.parametrize("count", [1_500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_rows_are_cut_between_images(count: int, objective: Objective, tmp_path: Path) -> None:
    """Truncated or split at a random length: images stay whole, and each piece has as many features as places."""
    paths, numbers, rows = write_images(tmp_path, 24), np.random.default_rng(0), objective.rows
    whole = []
    for number in range(24):
        some = [str(path) for path in numbers.choice(paths, number % 4)]
        whole.append(encode(objective, image_row(number, some), tmp_path))
    tokens = [[(image.sha256, image.stop - image.start) for image in images_in(row)] for row in whole]
    for _ in range(count):
        at = int(numbers.integers(24))
        row, size = whole[at], int(numbers.integers(1, 150))
        pieces = [rows.cut(row, 0, size)] if numbers.random() < 0.5 else rows.pieces(row, size)
        found = [(image.sha256, image.stop - image.start) for piece in pieces for image in images_in(piece)]
        assert all(piece.size <= size for piece in pieces)
        assert found == [each for each in tokens[at] if each in found]  # in order, and none is shorter
        for piece in pieces:
            places = sum(rows.processor.expansion(each.height, each.width).count("pad") for each in images_in(piece))  # type: ignore[attr-defined]
            assert rows._token_types(piece).sum() == places  # type: ignore[attr-defined]
            assert piece.parts["image_hashes"].nbytes == 32 * len(images_in(piece))


def test_a_row_with_images_is_split_after_answers(objective: Objective, tmp_path: Path) -> None:
    rows: Any = objective.rows
    row = encode(objective, image_row(2, [str(write_images(tmp_path, 1)[0])]), tmp_path)
    pieces = rows.pieces(row, row.size - 4)
    assert rows.tokenizer.decode(pieces[0].parts["ids"]).endswith("so very very 2<|im_end|>")
    assert trained_text(objective, pieces[1]) == "ok<|im_end|>"
    assert [len(images_in(piece)) for piece in pieces] == [1, 0]
    assert sum(piece.size for piece in pieces) == row.size


def test_an_image_longer_than_a_piece_is_left_out(objective: Objective, tmp_path: Path) -> None:
    row = encode(objective, image_row(2, [str(write_images(tmp_path, 1)[0])]), tmp_path)
    [image] = images_in(row)
    pieces = objective.rows.pieces(row, image.stop - image.start - 1)
    assert not any(images_in(piece) for piece in pieces)
    assert sum(piece.size for piece in pieces) == row.size - (image.stop - image.start)


def test_images_with_bytes_keep_their_bytes_in_each_piece(objective: Objective, tmp_path: Path) -> None:
    first, second = (path.read_bytes() for path in write_images(tmp_path, 2))
    parts = [{"type": "image", "image": {"bytes": data, "path": None}} for data in (first, second)]
    turns = [
        {"role": role, "content": content} for part in parts for role, content in (("user", [part]), ("assistant", "a"))
    ]
    row = encode(objective, {"messages": turns}, tmp_path)
    pieces = objective.rows.pieces(row, row.size - 4)
    assert [piece.parts["image_data"].tobytes() for piece in pieces] == [first, second]


def test_images_shrink_until_the_row_fits(folder: Path, tmp_path: Path) -> None:
    images = [str(path) for path in write_images(tmp_path, 2)]
    whole = encode(objective_of(folder), image_row(2, images), tmp_path)
    short = whole.size - 5
    shrinking = objective_of(folder, EncodeOptions(max_length=short, excess_length="shrink"))
    row = encode(shrinking, image_row(2, images), tmp_path)
    assert row.size <= short
    assert trained_text(shrinking, row) == trained_text(objective_of(folder), whole)
    rows: Any = shrinking.rows
    for image in images_in(row):
        assert image.limit > 0
        assert rows._limited(image.limit).expansion(image.height, image.width).count("pad") <= image.limit
    assert shrinking.rows.notices["rows with smaller images, to fit into data.max_length"] == 1
    impossible = objective_of(folder, EncodeOptions(max_length=30, excess_length="shrink"))
    assert encode(impossible, image_row(2, images), tmp_path).size == whole.size  # it is dropped


def test_images_of_a_fixed_size_do_not_shrink(tmp_path: Path) -> None:
    folder = write_image_text("gemma3", tmp_path / "gemma")
    images = [str(path) for path in write_images(tmp_path, 2)]
    whole = encode(objective_of(folder), image_row(2, images), tmp_path)
    shrinking = objective_of(folder, EncodeOptions(max_length=whole.size - 2, excess_length="shrink"))
    assert encode(shrinking, image_row(2, images), tmp_path).size == whole.size


def test_text_rows_do_not_shrink(tiny_llama: Path) -> None:
    [problem] = objective_of(tiny_llama, EncodeOptions(excess_length="shrink")).rows.problems()
    assert (problem.key, problem.what) == ("data.excess_length", "these rows have no images to make smaller")


def save(path: Path, image: Any, **options: Any) -> Path:
    image.save(path, **options)
    return path


def truncated(path: Path) -> Path:
    save(path, Image.effect_noise((64, 64), 50))
    path.write_bytes(path.read_bytes()[:-600])
    return path


def empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def turned(path: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6
    return save(path, Image.new("RGB", (40, 20), "red"), exif=exif)


BROKEN: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "missing": ("a.png", lambda path: path, "there is no image"),
    "empty": ("a.png", empty, "cannot be read as an image"),
    "truncated": ("a.png", truncated, "cannot be read as an image"),
    "no image": ("a.png", lambda path: Path(__file__), "cannot be read as an image"),
    "bomb": ("a.png", lambda path: save(path, Image.new("1", (20_000, 20_000))), "too many pixels"),
    "narrow": ("a.png", lambda path: save(path, Image.new("RGB", (5000, 20))), "refuses an image of 5000 x 20 pixels"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_one_line_with_its_file(kind: str, objective: Objective, tmp_path: Path) -> None:
    name, make, message = BROKEN[kind]
    path = make(tmp_path / name)
    with pytest.raises(DataError) as caught:
        encode(objective, image_row(0, [str(path)]), tmp_path)
    assert message in str(caught.value)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("frames", [2, 1])
def test_animated_and_tiny_images_drop_the_row(frames: int, objective: Objective, tmp_path: Path) -> None:
    images = [Image.new("L", (20, 20), at * 100) if frames > 1 else Image.new("L", (5, 9)) for at in range(frames)]
    path = save(tmp_path / "a.gif", images[0], save_all=True, append_images=images[1:])
    with pytest.raises(Dropped, match=r"animated|less than 16"):
        encode(objective, image_row(0, [str(path)]), tmp_path)


CONVERTED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "CMYK": (lambda path: save(path.with_suffix(".jpg"), Image.new("CMYK", (40, 30), (9, 8, 7, 6))), "CMYK"),
    "deep": (
        lambda path: save(path, Image.fromarray(np.full((30, 40), 9000, np.uint16))),
        "one deep channel",
    ),
    "transparent": (lambda path: save(path, Image.new("RGBA", (40, 30), (1, 2, 3, 4))), "transparency"),
    "turned": (lambda path: turned(path.with_suffix(".jpg")), "turned upright"),
}


def test_the_header_has_the_upright_size(tmp_path: Path) -> None:
    for make in (*(make for make, _ in CONVERTED.values()), lambda path: write_images(tmp_path, 1)[0]):
        path = str(make(tmp_path / "a.png"))
        assert read_size(path) == read_image(path).shape[:2]


@pytest.mark.parametrize("kind", CONVERTED)
def test_a_conversion_is_counted(kind: str, objective: Objective, tmp_path: Path) -> None:
    make, note = CONVERTED[kind]
    counting = replace(objective, rows=objective.rows.counting())
    row = encode(counting, image_row(0, [str(make(tmp_path / "a.png"))]), tmp_path)
    assert any(note in text for text in counting.rows.notices)
    [image] = images_in(row)
    assert (image.height, image.width) == ((40, 20) if kind == "turned" else (30, 40))


def test_a_template_without_places_for_images_is_refused(folder: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ p.text }}{% endfor %}\n{% endfor %}"
    objective = objective_of(folder, EncodeOptions(template=template))
    with pytest.raises(DataError, match=r"writes 0 placeholders \(<\|image_pad\|>\) for 1 images"):
        encode(objective, image_row(0, [str(write_images(tmp_path, 1)[0])]), tmp_path)


@pytest.mark.parametrize(
    ("model_type", "reason"), [("mllama", "cross-attention layers"), ("llama4", "projects the features"), ("fuyu", "")]
)
def test_other_bases_refuse_images_by_name(
    model_type: str, reason: str, folder: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    row = image_row(0, [str(write_images(tmp_path, 1)[0])])
    with pytest.raises(DataError, match="the base reads text alone"):
        encode(objective_of(tiny_llama), row, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.glob("*.json*"):
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    config |= {"model_type": model_type, "architectures": ["MllamaForConditionalGeneration"]}
    (other / "config.json").write_text(json.dumps(config))
    refusing = objective_of(other)
    assert isinstance(refusing.rows, SequenceRows)
    with pytest.raises(DataError, match=f"rows with images: not supported yet for {model_type}.*{reason}"):
        encode(refusing, row, tmp_path)
    assert model_type not in PROVEN


@pytest.mark.parametrize("package", ["pillow", "torchvision", "transformers"])
def test_another_version_of_a_package_encodes_the_rows_again(
    package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint(**options: Any) -> str:
        return objective_of(folder, EncodeOptions(**options)).rows.media_fingerprint

    before = fingerprint()
    assert fingerprint() == before
    assert fingerprint(image_tokens=4) != before
    monkeypatch.setattr(image_processor, "version", lambda name: "0" if name == package else version(name))
    assert fingerprint() != before


def test_a_changed_image_is_refused(objective: Objective, tmp_path: Path) -> None:
    [path] = write_images(tmp_path, 1)
    row = encode(objective, image_row(0, [str(path)]), tmp_path)
    assert pixels_of(row, images_in(row), 0).shape == (*Image.open(path).size[::-1], 3)
    write_images(tmp_path, 1, seed=1)
    with pytest.raises(TunekitError, match=r"train\.jsonl:7: .*0\.png has changed since its row was encoded"):
        pixels_of(row, images_in(row), 0)
    path.unlink()
    with pytest.raises(TunekitError, match=r"train\.jsonl:7: .*0\.png cannot be read"):
        pixels_of(row, images_in(row), 0)


def test_the_processor_can_be_sent_to_a_process(folder: Path) -> None:
    images = find_images(ModelSource(str(folder), folder))
    assert images is not None
    copy = pickle.loads(pickle.dumps(images))
    assert copy.expansion(40, 50) == images.expansion(40, 50)
    assert copy.fingerprint == images.fingerprint
    assert images.layout == {"pixel_values": "patches", "image_grid_thw": "images"}
    assert images.grid(40, 50) == (3, 4)
    pixels = np.zeros((40, 50, 3), np.uint8)
    alone = images.native(images=[Image.fromarray(pixels)], text=[images.placeholder], return_tensors="pt")
    assert torch.equal(images.inputs(pixels)["pixel_values"], alone["pixel_values"])
