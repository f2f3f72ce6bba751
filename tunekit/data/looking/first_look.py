"""A first look at a data file: the objective that fits its rows, their format, and their lengths."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.data.looking.guess import guessed_tokens
from tunekit.data.reading.first import choose_format, columns_meant, format_maker, read_columns
from tunekit.data.reading.folder import MEDIA, is_folder, is_media, passed_over, with_table
from tunekit.data.reading.lines import RawRow
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.several import data_files, is_pattern
from tunekit.data.reading.source import read_source, rename_columns
from tunekit.errors import DataError, TunekitError
from tunekit.files.untrusted import printable
from tunekit.formats.embedding import is_search
from tunekit.formats.example import images_of
from tunekit.formats.label_pairs import ALIASES, names_pair
from tunekit.formats.labels import label_field, of_cell
from tunekit.formats.media import Media
from tunekit.recipe.bases.paths import is_like_path
from tunekit.recipe.bases.section import ObjectiveSettings
from tunekit.recipe.data import Source
from tunekit.recipe.reading.names import facts_of, known_names, objective_class

if TYPE_CHECKING:  # imports torch
    from tunekit.contracts import RowKind

LOOKED_AT, MEASURED = 20_000, 2000  # rows that are read; rows whose tokens are counted
SHOWN_COLUMNS = 6
LABELS_FORMAT, PAIRS_FORMAT = "labels", "label_pairs"
LABEL_NAMES = ("labels", "category", "class", "intent", "sentiment", "target", "topic", "emotion", "tag", "y")
SHARE_KEPT = 0.995  # share of the rows that fit into the proposed length
LONGEST_LABEL, ROWS_OF_A_LABEL = 60, 4  # maximum characters of a label; minimum rows per label, on average
ROWS_NAME = {"audio": "recording", "image": "image", None: "row"}  # medium -> the word for a row
TEXTS_FORMAT = "embedding"  # its columns may also be a question and its answer, or two texts and their label
ANSWERS_FORMAT = "unpaired"  # its only required column, label, is in rows of other formats too
TURNS = ("messages", "conversations", "prompt")  # columns with the turns of a conversation
IMAGE_TOKENS = 1280  # the largest proposed limit of an image: a million pixels, as Qwen2.5-VL counts
TOKEN_SIDE, TOKEN_STEP = 28, 64  # pixels on a side of a token of Qwen2.5-VL; proposed limits are multiples of this
QUESTIONS_FORMAT = "prompt_completion"  # columns with questions and answers are renamed to the fields of this format


RENAME = (
    "rename the fields in the file, or copy a recipe with `tunekit recipes sft-lora --copy mine.yaml`, and map the "
    "columns there: data.train: {path: FILE, columns: {COLUMN: FIELD}}"
)


@dataclass(frozen=True)
class Look:
    """A summary of the rows of a data file."""

    objective: str
    format_name: str
    rows: int
    complete: bool  # whether `rows` counts all rows of the file
    longest: int  # tokens that SHARE_KEPT of the rows do not exceed
    fields: tuple[str, ...]
    columns: Mapping[str, str]  # how the recipe renames columns whose names fit no format
    notes: Sequence[str] = ()  # files of the folder that are not read
    sample: Sequence[Mapping[str, object]] = field(default=(), repr=False)  # rows whose tokens are counted
    image_tokens: int = 0  # the proposed maximum number of tokens of an image; 0 if no conversation has images
    counted: bool = False  # whether the model's tokenizer counted `longest`; else `longest` is an upper estimate

    @property
    def has_images(self) -> bool:
        """Whether conversations have images."""
        return self.image_tokens > 0

    @property
    def settings(self) -> type[ObjectiveSettings]:
        """The settings class of the objective."""
        return objective_class(self.objective)

    def text(self, *, lengths: bool = True) -> str:
        """The look as one line of text. `lengths`: with the number of tokens."""
        unit = ROWS_NAME[self.settings.medium] + ("" if self.rows == 1 else "s")
        about = f"{self.rows:,} {unit}" if self.complete else f"more than {self.rows:,} {unit}"
        sizes = (
            f", {SHARE_KEPT:.1%} of them {'at most' if self.counted else 'at most about'} {self.longest:,} tokens long"
        )
        share = sizes if lengths and not self.settings.medium else ""
        of_images = " with images" if self.has_images else ""
        fields = ", ".join(self.fields)
        return f"{about}{of_images} of format {self.format_name} ({fields}){share}: objective {self.objective}"


def proposed_objectives() -> list[type[ObjectiveSettings]]:
    """The settings classes of the objectives that `look_at` can propose, in the order in which it tries them."""
    known = [each for each in map(objective_class, known_names("objectives")) if each.first_order is not None]
    return sorted(known, key=lambda each: each.first_order or 0)


def look_at(data: str) -> Look | None:
    """A summary of the first rows of a file; None for the name of a hub data set, which is not downloaded.

    Raises: DataError if the file cannot be read or has no known format.
    """
    if not (Path(data).exists() or is_pattern(os.path.abspath(data))):
        if data.count("/") == 1 and not is_like_path(data) and not Path(data).suffix:
            return None
        how = "name your rows: JSONL, JSON, CSV, Parquet, text, a folder of files, or a pattern such as 'data/*.jsonl'"
        raise DataError(f"there is no file {data}", how)
    problems = Problems()
    rows = read_source(Source(path=str(Path(data).absolute())), problems)
    values = [row.values for row in islice(rows, LOOKED_AT + 1)]
    problems.raise_if_any()
    if not values:
        raise DataError("the file contains no rows", "name a file with rows", file=data)
    objective, format_name, columns = _kind(values, data)
    method, inspected = objective.model_fields["method"].default, values[:LOOKED_AT]
    sample = inspected[:: -(-len(inspected) // MEASURED)]
    images = [_image_tokens(row, format_name, data) for row in sample]
    limit = -(-max((tokens for some in images for tokens in some), default=0) // TOKEN_STEP) * TOKEN_STEP
    texts = (sum(map(guessed_tokens, _texts(row))) for row in sample)
    longest = _longest([size + sum(tokens) for size, tokens in zip(texts, images, strict=True)]) + 32
    most = Counter(name for row in inspected for name in row).most_common(6)
    fields = tuple(" ".join(printable(name).split()) for name, _ in most)  # a header can contain line breaks
    notes = [] if format_name == "text" else _folder_notes(data)
    notes += _unread_notes(format_name, {columns.get(name, name) for row in inspected for name in row})
    look = Look(method, format_name, len(inspected), inspected == values, longest, fields, columns, notes, sample)
    return replace(look, image_tokens=limit)


def _image_tokens(row: Mapping[str, object], format_name: str, data: str) -> list[int]:
    """About the number of tokens of each image in a conversation, at most IMAGE_TOKENS. No image for rows that cannot
    be read, which the plan reports."""
    with suppress(DataError):
        if any(name in row for name in TURNS):
            source = str(Path(data).absolute())
            return [_tokens_of(image) for image in images_of(format_maker(format_name, source)(row))]
    return []


def _tokens_of(image: Media) -> int:
    """About the number of tokens of an image, from its header; IMAGE_TOKENS if it cannot be read."""
    from tunekit.data.encoding.images import read_size  # imports torch
    from tunekit.data.encoding.outcomes import Dropped

    with suppress(TunekitError, Dropped, OSError):
        height, width = read_size(image.path if image.data is None else image.data)
        return min(-(-height // TOKEN_SIDE) * -(-width // TOKEN_SIDE), IMAGE_TOKENS)
    return IMAGE_TOKENS


def _unread_notes(format_name: str, columns: Iterable[str]) -> list[str]:
    """A note about columns that the format does not read; a warning if they contain images or recordings."""
    read = read_columns(format_name, columns)
    unread = sorted(printable(name) for name in columns if name not in (*read, "sample_weight"))
    if not unread:
        return []
    media = any(name.removesuffix("s") in (*MEDIA, "video") for name in unread)
    names = ", ".join(f"'{name}'" for name in unread[:SHOWN_COLUMNS])
    return [f"{'warning: ' if media else ''}the format {format_name} does not read {names}"]


def _longest(lengths: Sequence[int]) -> int:
    """The length that SHARE_KEPT of the rows do not exceed."""
    return sorted(lengths)[min(int(len(lengths) * SHARE_KEPT), len(lengths) - 1)]


def measured(look: Look, source: Source, kind: RowKind) -> Look:
    """The summary, with lengths counted by the model's tokenizer. `kind`: the encoding of the rows."""
    from tunekit.data.encoding.outcomes import SourceEncoder  # imports torch

    encoder = SourceEncoder(format_maker(look.format_name, source.path), kind, source.path)
    rows = (RawRow(number, rename_columns(dict(row), source.columns)) for number, row in enumerate(look.sample, 1))
    encoded = [rows for _, rows in map(encoder.outcome, rows) if isinstance(rows, list)]
    lengths = [max(kind.layout.length(row.sizes) for row in rows) for rows in encoded]
    return replace(look, longest=_longest(lengths), counted=True) if lengths else look


def _names(kind: str, value: object) -> bool:
    """Whether a value names a file of this kind ("audio" or "image"), or contains the bytes of such a file."""
    if isinstance(value, Mapping):
        return "bytes" in value and is_media(str(value.get("path") or f"x{MEDIA[kind][0]}"), kind)
    return isinstance(value, str) and is_media(value, kind)


def label_columns(rows: Sequence[Mapping[str, object]]) -> dict[str, int]:
    """Columns that may contain labels, with their numbers of different values. Usual names of labels come first.

    Such a column has few different values. The values are short, and an average value is in several rows. The column
    "text" is excluded, and so are unprintable names, which a recipe cannot contain.
    """
    counts = {}
    for name in (name for name in rows[0] if name != "text" and name.isprintable()):
        short = all(isinstance(row.get(name), str | int) and len(str(row[name])) <= LONGEST_LABEL for row in rows)
        if short and 2 <= (count := len({row[name] for row in rows})) <= len(rows) // ROWS_OF_A_LABEL:
            counts[name] = count
    return dict(sorted(counts.items(), key=lambda each: each[0].lower() not in LABEL_NAMES))


def number_columns(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """The columns that contain only numbers, at least one with a fraction. The column "text" and unprintable names are
    excluded."""
    names = [name for name in rows[0] if name not in ("text", "sample_weight") and name.isprintable()]
    values = {name: [of_cell(row.get(name)) for row in rows] for name in names}
    return [
        name
        for name, column in values.items()
        if any(isinstance(value, float) for value in column)
        and all(isinstance(value, int | float) or str(value).isdecimal() for value in column)
    ]


def _folder_notes(data: str) -> list[str]:
    """The note about unread files, if `data` is a folder without a table."""
    place = Path(data).absolute()
    if not is_folder(with_table(Source(path=str(place))).path):
        return []
    others = passed_over(place, data_files(str(place)))
    return [] if others is None else [others]


def _kind(rows: Sequence[Mapping[str, object]], data: str) -> tuple[type[ObjectiveSettings], str, Mapping[str, str]]:
    """The settings class of the objective that fits the first row, the row's format, and the columns to rename.

    Raises: DataError naming the fields of every format.
    """
    row = rows[0]
    talks = any(isinstance(row.get(name), list) for name in TURNS)  # its images are parts of a conversation
    media = (kind for kind in ("audio", "image") if not talks and any(_names(kind, value) for value in row.values()))
    medium = next(media, None)
    folder, lacks = bool(medium and medium in row), list[str]()
    known = proposed_objectives()
    for objective in known:
        if objective.medium != medium and (objective.medium or folder):  # a folder of files contains no text to learn
            continue
        try:
            name = choose_format("auto", row, objective.example)[0]
            named = isinstance(of_cell(row.get(label_field(row))), str | int) and "label" not in row
            if name == LABELS_FORMAT and named:  # the user must confirm that a column such as category contains labels
                continue
            if name == TEXTS_FORMAT and not is_search(row):
                continue
            if name == ANSWERS_FORMAT:
                format_maker(name)(row)
            return objective, name, {}
        except DataError as error:
            last, lacks = error, [*lacks, error.problems[0].how]
    if columns := columns_meant(row):
        example = facts_of("formats", QUESTIONS_FORMAT).EXAMPLE
        return next(each for each in known if each.example == example), QUESTIONS_FORMAT, columns
    if names_pair(row):
        column = _label_of_pairs(rows, data)
        if column is None:  # two texts that belong together
            example = facts_of("formats", TEXTS_FORMAT).EXAMPLE
            return next(each for each in known if each.example == example), TEXTS_FORMAT, {}
        example = facts_of("formats", PAIRS_FORMAT).EXAMPLE
        return next(each for each in known if each.example == example), PAIRS_FORMAT, {column: "label"}
    texts = [name for name, value in row.items() if name != "label" and isinstance(of_cell(value), str)]
    if medium is None and "label" in row and len(texts) == 1 and texts[0].isprintable():
        example = facts_of("formats", LABELS_FORMAT).EXAMPLE
        return next(each for each in known if each.example == example), LABELS_FORMAT, {texts[0]: "text"}
    raise DataError(last.problems[0].what, "; or ".join(lacks) if folder else RENAME, file=data, line=1)


def _label_of_pairs(rows: Sequence[Mapping[str, object]], data: str) -> str | None:
    """The column with the label of two texts; None if no column may contain labels. Raises: DataError if several
    columns may contain them."""
    columns = [name for name in {**label_columns(rows), **dict.fromkeys(number_columns(rows))} if name not in ALIASES]
    if len(columns) < 2:
        return columns[0] if columns else None
    what = f"the rows have two texts, and {' or '.join(columns)} could be their label"
    raise DataError(what, "rename the column to label", file=data, line=1)


def _texts(value: object) -> Iterator[str]:
    """All texts in a row."""
    if isinstance(value, str) and not value.startswith("data:"):  # the bytes of an image
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(inner)
