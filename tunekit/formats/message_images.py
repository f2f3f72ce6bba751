"""Images of conversations: as parts of a message, or in the column `images`.

A column's images replace bare `{"type": "image"}` parts or `<image>` tags, in order. Without these, they are put before
the text of the first user's turn, as TRL does.
"""

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from tunekit.errors import DataError
from tunekit.formats.example import IMAGE, Message
from tunekit.formats.fields import Fields, check_text, listed, read_json
from tunekit.formats.media import Media

COLUMNS = ("images", "image")
MEDIA_COLUMNS = ("images", "videos", "audios")  # never names of anything else in rows of text
KEYS = ("image", "path", "url", "base64", "image_url", "bytes")  # of a part with an image
KINDS = ("image", "image_url")  # of parts
TAG = "<image>"
HOW = "write a path, a data URL, {bytes, path}, or base64 in a part"


def read_image_part(part: Mapping[str, object], label: str) -> Media | None:
    """The image of a part of a message; None if the part has no image, because the column `images` has it."""
    key = next((key for key in KEYS if part.get(key) is not None), None)
    if key is None:
        return None
    value = part[key]
    if key == "base64":
        return Media("", _decoded(check_text(value, f"{label}.base64"), label))
    return read_image(part if key == "bytes" else value, f"{label}.{key}")


def read_image(value: object, label: str) -> Media:
    """An image: a path, a data URL, the bytes of a file, or a mapping with one of these."""
    if isinstance(value, bytes):
        return Media("", value)
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):
            return Media(str(value.get("path") or ""), value["bytes"])
        return read_image(next((value[key] for key in ("url", "path") if value.get(key)), None), label)
    if not isinstance(value, str) or not value.strip():
        state = "empty" if value is None or value == "" else f"a {type(value).__name__}"
        raise DataError(f"'{label}' must be an image, but it is {state}", HOW)
    if value.startswith("data:"):
        head, _, content = value.partition(",")
        if not head.endswith(";base64"):
            raise DataError(
                f"'{label}' is a data URL that is not base64 ({head[:40]})", "write data:image/png;base64,..."
            )
        return Media("", _decoded(content, label))
    value = value.removeprefix("file://")
    if "://" in value[:10]:
        what = f"'{label}' is the address {value[:60]}, and training reads no images from the network"
        raise DataError(what, "download the image, and write its path")
    return Media(check_text(value, label))


def _decoded(text: str, label: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"'{label}' is not valid base64 ({error})", "write the image's bytes in base64") from None


def refuse_unread(row: Fields, fields: Sequence[str]) -> None:
    """Raises: DataError if the row has media in a column that its format does not read. A path or an address in `image`
    may be a note about the text."""
    unread = {name: row.get(name) for name in (*MEDIA_COLUMNS, "image") if name not in fields}
    name = next(
        (name for name, value in unread.items() if value and not (name == "image" and isinstance(value, str))), None
    )
    if name is not None:
        what = f"the row has '{name}', which its format does not read, so that training would ignore them"
        raise DataError(what, "write conversations with images (format: chat) for objective: sft, or remove the column")


def with_images(messages: tuple[Message, ...], row: Fields) -> tuple[Message, ...]:
    """The messages with the images of the row's columns in their places. Raises: DataError if places and images differ
    in number."""
    column, has_column = _read_columns(row), any(row.get(name) is not None for name in COLUMNS)
    tagged = has_column and any(TAG in message.content for message in messages)
    if not column and not tagged and not any(message.images for message in messages):
        return messages
    if tagged:
        if any(message.images for message in messages):
            raise DataError(f"the row has both {TAG} tags and image parts", "write one of them")
        messages = tuple(
            replace(message, content=message.content.replace(TAG, IMAGE), images=(None,) * message.content.count(TAG))
            for message in messages
        )
    elif column and not any(None in (message.images or ()) for message in messages):
        messages = _before_first_user(messages, len(column))
    places = sum((message.images or ()).count(None) for message in messages)
    if places != len(column):
        what = f"the row has {len(column)} images in its columns, but {places} places for them"
        raise DataError(what, f"write one {TAG} tag or image part for each image")
    rest = iter(column)
    placed = [
        replace(message, images=tuple(next(rest) if image is None else image for image in message.images or ()))
        for message in messages
    ]
    if any(message.content.count(IMAGE) != len(message.images or ()) for message in placed):
        raise DataError("a message contains the private-use character U+E004", "remove it from the text")
    return tuple(placed)


def _before_first_user(messages: tuple[Message, ...], count: int) -> tuple[Message, ...]:
    first = next((at for at, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise DataError(f"the row has {count} images, but no user's turn for them", "add one, or image parts")
    user = messages[first]
    user = replace(user, content=IMAGE * count + user.content, images=(*(None,) * count, *(user.images or ())))
    return (*messages[:first], user, *messages[first + 1 :])


def _read_columns(row: Fields) -> list[Media]:
    filled = [name for name in COLUMNS if row.get(name) not in (None, "", [])]
    if len(filled) > 1:
        raise DataError(f"the row has the columns {listed(filled)}", "keep one")
    return list(_images_in(row[filled[0]], filled[0])) if filled else []


def _images_in(value: object, name: str) -> Iterator[Media]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = read_json(value, name)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        yield from (read_image(image, f"{name}[{index}]") for index, image in enumerate(value))
    else:
        yield read_image(value, name)
