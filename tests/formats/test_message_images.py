"""Images in conversations: where a row has them, and in which order they are read."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from tunekit.data.reading.first import format_maker
from tunekit.errors import DataError
from tunekit.formats.example import IMAGE, ChatExample, images_of

DATA = b"not read here"
CODE = base64.b64encode(DATA).decode()
ANSWER = {"role": "assistant", "content": "a"}


def read(row: dict[str, Any], format_name: str = "chat") -> ChatExample:
    example = format_maker(format_name, "/data/train.jsonl")(row)
    assert isinstance(example, ChatExample)
    return example


def asked(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER]}


PATHS = {
    "image": {"type": "image", "image": "a.png"},
    "path": {"type": "image", "path": "a.png"},
    "url": {"type": "image", "url": "a.png"},
    "file URL": {"type": "image", "url": "file:///data/a.png"},
    "image_url": {"type": "image_url", "image_url": {"url": "a.png"}},
    "image_url as text": {"type": "image_url", "image_url": "a.png"},
    "mapping": {"type": "image", "image": {"bytes": None, "path": "a.png"}},
}


@pytest.mark.parametrize("form", PATHS)
def test_a_path_is_relative_to_the_data_file(form: str) -> None:
    [image] = images_of(read(asked(PATHS[form])))
    assert (image.path, image.data) == (str(Path("/data/a.png")), None)


BYTES = {
    "base64": {"type": "image", "base64": CODE},
    "data URL": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{CODE}"}},
    "mapping": {"type": "image", "image": {"bytes": DATA, "path": "a.png"}},
    "bytes": {"type": "image", "bytes": DATA},
}


@pytest.mark.parametrize("form", BYTES)
def test_bytes_are_taken_as_they_are(form: str) -> None:
    [image] = images_of(read(asked(BYTES[form])))
    assert image.data == DATA


def test_parts_are_put_where_they_are_written() -> None:
    example = read(asked({"type": "text", "text": "x"}, PATHS["path"], {"type": "text", "text": "y"}))
    assert example.messages[0].content == f"x{IMAGE}y"
    kinds = [part["type"] for part in example.messages[0].as_dict()["content"]]
    assert kinds == ["text", "image", "text"]
    assert example.messages[1].as_dict()["content"] == [{"type": "text", "text": "a"}]


SHARES = [{"from": "human", "value": "<image>q<image>"}, {"from": "gpt", "value": "a"}]
COLUMNS: dict[str, tuple[str, dict[str, Any], str]] = {
    "tags": ("chat", {"messages": [{"role": "user", "content": "<image>q<image>"}, ANSWER]}, f"{IMAGE}q{IMAGE}"),
    "sharegpt": ("sharegpt", {"conversations": SHARES}, f"{IMAGE}q{IMAGE}"),
    "before the text": ("chat", {"messages": [{"role": "user", "content": "q"}, ANSWER]}, f"{IMAGE}{IMAGE}q"),
    "bare parts": (
        "chat",
        asked({"type": "image"}, {"type": "text", "text": "q"}, {"type": "image"}),
        f"{IMAGE}q{IMAGE}",
    ),
    "prompt": (
        "prompt_completion",
        {"prompt": [{"role": "user", "content": "q"}], "completion": [ANSWER]},
        f"{IMAGE}{IMAGE}q",
    ),
}


@pytest.mark.parametrize("form", COLUMNS)
@pytest.mark.parametrize("images", [["a.png", "b.png"], [{"bytes": DATA}, "b.png"], '["a.png", "b.png"]'])
def test_a_columns_images_have_places(form: str, images: Any) -> None:
    format_name, row, content = COLUMNS[form]
    example = read({**row, "images": images}, format_name)
    assert example.messages[0].content == content
    assert images_of(example)[1].path == str(Path("/data/b.png"))


def test_a_single_image_may_be_in_the_column_image() -> None:
    assert len(images_of(read({**COLUMNS["before the text"][1], "image": "a.png"}))) == 1


def test_a_tag_without_a_column_stays_text() -> None:
    example = read(COLUMNS["tags"][1])
    assert example.messages[0].as_dict()["content"] == "<image>q<image>"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "more images": ({**COLUMNS["tags"][1], "images": ["a"] * 3}, "3 images in its columns, but 2 places"),
    "fewer images": ({**COLUMNS["tags"][1], "images": ["a"]}, "1 images in its columns, but 2 places"),
    "empty column": ({**COLUMNS["tags"][1], "images": []}, "0 images in its columns, but 2 places"),
    "reasoning": (
        {"messages": [{"role": "assistant", "content": [{"type": "thinking", "thinking": [PATHS["path"]]}]}]},
        "'messages[0].content[0].thinking' has an image",
    ),
    "videos": ({**COLUMNS["tags"][1], "videos": ["a.mp4"]}, "the row has 'videos', which its format does not read"),
    "no image": (asked({"type": "image"}), "0 images in its columns, but 1 places"),
    "both": ({**asked(PATHS["path"], {"type": "text", "text": "<image>"}), "images": ["a"]}, "both <image> tags and"),
    "address": (asked({"type": "image", "url": "https://x.org/a.png"}), "reads no images from the network"),
    "base64": (asked({"type": "image", "base64": "%%%"}), "is not valid base64"),
    "data URL": (asked({"type": "image", "url": "data:image/png,abc"}), "not base64"),
    "number": ({**COLUMNS["tags"][1], "images": [1, 2]}, "'images[0]' must be an image, but it is a int"),
    "null": ({**COLUMNS["tags"][1], "images": [None, "a"]}, "'images[0]' must be an image, but it is empty"),
    "columns": ({**COLUMNS["tags"][1], "images": ["a"], "image": "b"}, "has the columns 'images', 'image'"),
    "no user": ({"messages": [ANSWER], "images": ["a"]}, "no user's turn for them"),
    "video": (asked({"type": "video", "video": "a.mp4"}), "is a 'video' part"),
    "private": ({"messages": [{"role": "user", "content": IMAGE}, ANSWER], "images": ["a"]}, "private-use character"),
}


@pytest.mark.parametrize("form", WRONG)
def test_a_wrong_row_is_refused(form: str) -> None:
    row, message = WRONG[form]
    with pytest.raises(DataError) as caught:
        read(row)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plain_prompts_have_no_places_for_images() -> None:
    with pytest.raises(DataError, match="plain texts"):
        format_maker("prompt_completion")({"prompt": "q", "completion": "a", "images": ["a"]})


UNREAD: dict[str, tuple[str, dict[str, Any]]] = {
    "preference": ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}),
    "unpaired": ("unpaired", {"prompt": "q", "completion": "a", "label": True}),
    "prompt": ("prompt", {"prompt": "q"}),
    "alpaca": ("alpaca", {"instruction": "q", "output": "a"}),
    "text": ("text", {"text": "q"}),
}


@pytest.mark.parametrize("form", UNREAD)
@pytest.mark.parametrize("column", ["images", "image"])
def test_no_format_ignores_images(form: str, column: str) -> None:
    format_name, row = UNREAD[form]
    with pytest.raises(DataError, match=f"the row has '{column}', which its format does not read"):
        format_maker(format_name)({**row, column: {"bytes": DATA, "path": None}})
    format_maker(format_name)({**row, "images": [], "image": "https://x.org/a.png"})
