"""Loads encoded sources: from the token cache, unless the source or the settings of its encoding changed."""

import hashlib
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from tunekit.contracts import EncodeOptions, RowKind
from tunekit.data.encoding.cache import CODE, PACKAGES, SourceFacts, cached_store
from tunekit.data.encoding.encode import SourceCounts, encode_rows
from tunekit.data.encoding.notes import counted_note, drawn_notes, filled_columns, format_note
from tunekit.data.encoding.outcomes import SourceEncoder, outcomes
from tunekit.data.encoding.store import Part, StoreWriter, TokenStore
from tunekit.data.reading.data_file import content_hash, inspect_file
from tunekit.data.reading.first import format_maker, media_fields, open_rows, raw_digest
from tunekit.data.reading.folder import is_folder, media_folder, names_hash, passed_over
from tunekit.data.reading.lines import RawRow
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.several import data_files, empty_files_note, file_names, files_of
from tunekit.data.reading.source import hub_fingerprint, is_data_set
from tunekit.errors import DataError, Problem, RecipeError, TunekitError
from tunekit.files.cache_folder import code_version, default_cache_folder, hash_of
from tunekit.formats.example import Example, images_of
from tunekit.formats.media import Media, located, read_media
from tunekit.recipe.data import DataSection, Source
from tunekit.recipe.memory import size_bytes
from tunekit.recipe.reading.names import formats_of

LONGEST_TEMPLATE_BYTES = 2**20
IMAGES = "images"  # the part of rows that name images
FACTS = ("format", "reason", "columns", "counts", "notices")  # facts about a source that are stored with its rows


@dataclass(frozen=True)
class EncodedSource:
    """The encoded rows of a source, with their counts and the notices for the user. `files`: the names of its files, if
    it has several."""

    source: Source
    store: TokenStore
    name: str
    counts: SourceCounts
    notices: tuple[str, ...]
    fingerprint: str
    files: tuple[str, ...] = ()

    @property
    def all_rows(self) -> Part:
        """All rows of the source."""
        return Part(self.store, np.arange(len(self.store), dtype=np.int64), self.name, self.files)


def encode_options(data: DataSection) -> EncodeOptions:
    """The data section's options that decide ids, with the template read from its file."""
    template = None if data.chat_template is None else read_template(Path(data.chat_template))
    lengths = data.max_length, data.excess_length
    image_tokens = 0 if data.image_tokens == "auto" else data.image_tokens
    cache_bytes = 0 if data.image_cache is None else size_bytes(data.image_cache)
    answers = data.rewritten_answers, data.reasoning
    return EncodeOptions(data.train_on, template, *lengths, *answers, image_tokens, cache_bytes)


def read_template(path: Path) -> str:
    """The text of a chat template file. Raises: RecipeError if the file cannot be read as a template."""
    try:
        if not path.is_file() or path.stat().st_size > LONGEST_TEMPLATE_BYTES:
            raise RecipeError("not a template file", "name a Jinja file", file=str(path), key="data.chat_template")
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        what = f"the template cannot be read: {error}"
        raise RecipeError(what, "name a Jinja file", file=str(path), key="data.chat_template") from None


def load_sources(
    sources: Sequence[Source], kind: RowKind, cache_dir: Path | None, caller_columns: Container[str] = ()
) -> list[EncodedSource]:
    """All sources, encoded. `caller_columns`: columns that the caller reads; notes do not call them unread.

    Raises: DataError with the problems of all sources.
    """
    folder = cache_dir or default_cache_folder()
    loaded: list[EncodedSource] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            loaded.append(load_source(source, kind, cache_folder=folder, caller_columns=caller_columns))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError.of(problems)
    names = Counter(source.name for source in loaded)
    return [source if names[source.name] == 1 else replace(source, name=source.source.path) for source in loaded]


def load_source(
    source: Source, kind: RowKind, *, cache_folder: Path, caller_columns: Container[str] = ()
) -> EncodedSource:
    """The encoded rows of a source. Raises: DataError listing the wrong rows by file and line."""
    fingerprint = source_fingerprint(source, kind)
    name = Path(source.path).name
    key = hash_of([fingerprint, code_version(CODE, PACKAGES), *_named_places(source, kind)])
    encode = partial(_encode_into, source=source, kind=kind.counting())
    store, facts = cached_store(cache_folder, key, kind.layout, encode, FACTS)
    counts = SourceCounts(**{**facts["counts"], "dropped": Counter(facts["counts"]["dropped"])})
    lead = format_note(name, facts["format"], facts["reason"], facts["columns"], caller_columns)
    others = passed_over(Path(source.path), data_files(source.path)) if is_folder(source.path) else None
    counted = (counted_note(name, number, what) for what, number in facts["notices"].items())
    drawn = drawn_notes(name, source) if counts.read >= (source.max_rows or 0) else ()
    notices = (lead, *([] if others is None else [others]), *empty_files_note(source.path), *drawn, *counted)
    return EncodedSource(source, store, name, counts, notices, fingerprint, file_names(source.path))


def source_fingerprint(source: Source, kind: RowKind) -> str:
    """sha256 of the source's content, of the files that its rows name, and of everything that decides the encoding.

    The source's path is not included.
    """
    path = Path(source.path)
    if is_data_set(source.path):
        content = hub_fingerprint(source)
    elif files := files_of(source.path):
        path, content = files[0], hash_of([content_hash(inspect_file(file).path) for file in files])
    elif is_folder(source.path):
        content = names_hash(path)
    else:
        content = content_hash(inspect_file(path).path)
    suffixes = [] if is_folder(str(path)) else path.suffixes
    facts = [content, suffixes, *encoding_facts(source, kind)]
    media = _images_hash(source, kind) if IMAGES in kind.layout.parts else _media_hash(source, kind.example)
    return hash_of(facts if media is None else [*facts, media])


def _named_places(source: Source, kind: RowKind) -> list[object]:
    """For rows that name images: their parts, and the folder of their paths."""
    return [list(kind.layout.parts), str(media_folder(source.path))] if IMAGES in kind.layout.parts else []


def _images_hash(source: Source, kind: RowKind) -> str | None:
    """sha256 of the images of conversations, in order, and of what makes inputs from them; None if there are none.

    Wrong rows and missing files are skipped here; encoding such a row raises the error.
    """
    rows, _, format_name, _ = open_rows(source, kind.example, Problems())
    make_example, digest, count = format_maker(format_name, source.path), hashlib.sha256(), 0
    for row in rows:
        with suppress(TunekitError, OSError, ValueError):
            for image in images_of(make_example(row.values)):
                count += 1
                digest.update((image_hash(image) + " ").encode())
        digest.update(b";")
    return hash_of([digest.hexdigest(), kind.media_fingerprint]) if count else None


def image_hash(image: Media) -> str:
    """sha256 of the image's file. Raises: OSError."""
    return content_hash(Path(image.path)) if image.data is None else hashlib.sha256(image.data).hexdigest()


def _media_hash(source: Source, example: str) -> str | None:
    """sha256 of the files that the rows name, in order; None if the rows name no files.

    A missing file is skipped here; encoding its row raises the error.
    """
    if not any(media_fields(name) for name in formats_of(example)):
        return None
    rows, _, format_name, _ = open_rows(source, example, Problems())
    fields, folder, digest = media_fields(format_name), media_folder(source.path), hashlib.sha256()
    for row in rows:
        placed = located(row.values, fields, folder)
        for field in fields:
            with suppress(TunekitError, OSError, ValueError):
                named = read_media(placed, field)
                whole = content_hash(Path(named.path)) if named.data is None else hashlib.sha256(named.data).hexdigest()
                digest.update(f"{field} {whole} ".encode())
        digest.update(b";")
    return digest.hexdigest()


def encoding_facts(source: Source, kind: RowKind) -> list[object]:
    """Everything that decides ids, except the content: reading options, kind of rows, tokenizer, encoding options."""
    reading = source.model_dump(mode="json", include={"format", "columns", "max_rows"})
    if source.max_rows is not None and source.draw_seed is not None:
        reading["draw_seed"] = source.draw_seed
    return [reading, kind.fingerprint, asdict(replace(kind.options, image_cache_bytes=0))]


def _encode_into(writer: StoreWriter, source: Source, kind: RowKind) -> SourceFacts:
    problems, counts = Problems(), SourceCounts()
    rows, first, format_name, reason = open_rows(source, kind.example, problems)
    encoder = SourceEncoder(format_maker(format_name, source.path), kind, source.path)
    rows = _with_digests(rows, format_name, writer)
    for piece in encode_rows(outcomes(rows, encoder), kind, name=source.path, problems=problems, counts=counts):
        if not problems.count:
            writer.add(*piece)
    problems.raise_if_any()
    dropped, columns = dict(counts.dropped), filled_columns(first.values)
    values = (format_name, reason, columns, {**vars(counts), "dropped": dropped}, dict(kind.notices))
    return dict(zip(FACTS, values, strict=True))


def _with_digests(rows: Iterable[RawRow], format_name: str, writer: StoreWriter) -> Iterator[RawRow]:
    """The rows. The hash of each is stored when it is read."""
    for row in rows:
        writer.add_raw(raw_digest(row.values, format_name))
        yield row


def read_examples(source: Source, kind: str, numbers: Container[int]) -> Iterator[tuple[int, Example]]:
    """Selected examples of a source, as (line, example). `kind`: the kind of the examples. `numbers`: the indices of
    the selected rows, from 0."""
    problems = Problems()
    rows, _, format_name, _ = open_rows(source, kind, problems)
    make_example = format_maker(format_name, source.path)
    for number, raw in enumerate(rows):
        if number in numbers:
            yield raw.line, make_example(raw.values)
