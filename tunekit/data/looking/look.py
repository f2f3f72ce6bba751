"""Search for doubtful rows in a source. Findings are listed by kind, with their lines."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.data.looking.guess import guessed_tokens
from tunekit.data.looking.similar import RowLabel, RowSignature, SimilarityIndex, signed, signed_pair
from tunekit.data.reading.first import format_maker, open_rows, single_row_maker
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.several import LINES_OF_FILE, file_names, relative_name, row_place
from tunekit.data.reading.sound import SILENCE, opened
from tunekit.errors import DataError, holds_secret
from tunekit.formats.audio_label import AudioLabelExample
from tunekit.formats.embedding import EmbeddingExample
from tunekit.formats.example import ChatExample, CompletionExample, images_of
from tunekit.formats.fields import Fields
from tunekit.formats.image import ImageExample
from tunekit.formats.image_label import ImageLabelExample
from tunekit.formats.labels import LabelExample, of_cell
from tunekit.formats.media import Media
from tunekit.formats.preference import TextOrTurns
from tunekit.formats.transcript import TranscriptExample
from tunekit.formats.unpaired import UnpairedExample
from tunekit.recipe.data import DataSection, Source

if TYPE_CHECKING:  # these import torch
    from tunekit.contracts import RowKind
    from tunekit.data.encoding.outcomes import Outcome
    from tunekit.data.reading.first import MakeExample
    from tunekit.data.reading.lines import RawRow

RARE = 0.02  # a script with a smaller share of the rows is rare, and its rows are a finding
EMAIL = re.compile(r"\b[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}\b")
KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")
GARBLED = re.compile("\ufffd|Ã[\u0080-\u00bf]|â€[\u0080-\u2122\u0153]|Â[\u00a0-\u00bf]")  # UTF-8 misread
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
MARKUP = re.compile(r"(?m)<\|im_start\|>|<\|start_header_id\|>|\[INST\]|<start_of_turn>|^### (?:Instruction|Response)")
PATTERNS = (  # kind, pattern, and a quick test: every match contains one of these texts
    ("garbled", GARBLED, ("\ufffd", "Ã", "â€", "Â")),
    ("control", CONTROLS, ("",)),
    ("markup", MARKUP, ("<|", "[INST", "<start_of", "###")),
    ("email", EMAIL, ("@",)),
    ("secret", KEY, ("-----BEGIN", "AKIA", "ASIA")),
)
LENGTHS = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
KEPT = frozenset({"script", "reasoning", "cut"})  # findings whose rows --fix keeps
MOST_BROKEN = 1000  # maximum number of different problems of unreadable lines
FileExample = TranscriptExample | AudioLabelExample | ImageExample | ImageLabelExample  # examples that name a file
SAMPLES_AT_ONCE = 1 << 20
EXCESS = {  # excess_length -> words
    "drop": "dropped",
    "truncate": "cut",
    "split": "split",
    "error": "an error",
    "shrink": "dropped, because smaller images are not enough",
}

# Training fails with these, evaluation is wrong, or wrong labels or secrets are learned. Other findings are warnings.
ERRORS = ("broken", "contrary", "leak", "secret")
KINDS = {  # kind of finding -> its description in the table
    "broken": "rows that cannot be read",
    "empty": "rows with nothing to learn",
    "exact": "rows that repeat an earlier row",
    "contrary": "rows that repeat an earlier row with a different label",
    "near": "rows that are nearly equal to an earlier row",
    "leak": "training rows that equal, or nearly equal, an evaluation row",
    "garbled": "rows with characters of a wrong encoding",
    "control": "rows with control characters",
    "script": "rows in a script that is rare in the file",
    "roles": "conversations whose turns are out of order",
    "markup": "rows whose text contains chat markup, probably of a different format",
    "secret": "rows with an access token, a password or a private key",
    "email": "rows with e-mail addresses",
    "long": "rows longer than data.max_length",
    "dropped": "rows that training drops",
    "cut": "rows with a text that is cut to the maximum length of a text",
    "reasoning": "conversations with reasoning that the chat template leaves out (data.reasoning: train keeps it)",
}


@dataclass
class Found:
    """The findings in one source. `lines`: kind of finding -> lines of the rows. `first`: kind -> first row's details.
    `files`: the names of the files of a source of several files."""

    name: str
    files: tuple[str, ...] = ()
    kept: frozenset[str] = frozenset()  # kinds of findings whose rows --fix keeps
    rows: int = 0
    lines: dict[str, list[int]] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    sizes: Counter[int] = field(default_factory=Counter)  # lower end of an interval of LENGTHS -> number of rows
    scripts: dict[str, list[int]] = field(default_factory=dict)  # script -> lines of the rows
    format: str = ""  # the format of the rows
    passed: list[dict[str, Any]] = field(default_factory=list)  # rows that --fix keeps; only if `keep` is set

    @property
    def left_out(self) -> dict[str, list[int]]:
        """The findings whose rows --fix leaves out."""
        return {kind: lines for kind, lines in self.lines.items() if kind not in self.kept}

    def place(self, line: int) -> str:
        """The line of a row, as text; with several files, its file and line."""
        return row_place("", self.files, line) if self.files else f"line {line}"

    def add_size(self, tokens: int) -> None:
        """Count one row by its length."""
        self.sizes[max(low for low in LENGTHS if low <= tokens)] += 1

    def add(self, kind: str, line: int, what: str = "") -> None:
        """Add a row with a finding. `what`: the details."""
        self.lines.setdefault(kind, []).append(line)
        self.first.setdefault(kind, what)


def look_at_rows(
    source: Source,
    name: str,
    example: str,
    data: DataSection,
    train_index: SimilarityIndex,
    eval_index: SimilarityIndex | None,
    keep: bool,
    kind: RowKind | None = None,
) -> Found:
    """The findings in all rows of one source.

    `name`: the name of the source. `example`: the kind of the examples. `train_index`: an index of earlier rows; these
    rows are added to it. `eval_index`: an index of the evaluation rows, if these rows are for training. `keep`:
    collect the rows that --fix writes. `kind`: the encoding of rows; None: unknown, so lengths are estimates.
    """
    cuts = data.excess_length in ("truncate", "split")
    files, kept = file_names(source.path), frozenset(KEPT | ({"long"} if cuts else set()))
    findings, problems = Found(name, files, kept), Problems(MOST_BROKEN)
    rows, _, format_name, _ = open_rows(source, example, problems)
    make_example, findings.format = format_maker(format_name, source.path), format_name
    single_row, (rows, encoded) = single_row_maker(format_name), tee(rows)
    for row, outcome in zip(rows, _outcomes(encoded, make_example, kind, source.path), strict=True):
        findings.rows += 1
        doubts = dict[str, str]()  # kind of finding -> details: two patterns can give the same finding
        try:
            parsed, values = make_example(row.values), single_row(row.values)
            if isinstance(parsed, ChatExample) and images_of(parsed):  # values can have the bytes of images
                text = "\n".join(turn.content for turn in parsed.messages)
            else:
                text = "\n".join(_texts(values))
            doubts.update(_doubts(parsed, text, row.line, findings))
            if kind is not None and outcome is not None:
                doubts.update(_fates(outcome, kind, findings))
                if cut := kind.cut_texts(parsed):
                    doubts["cut"] = ", ".join(cut)
                if left_out := kind.reasoning_left_out(parsed):
                    doubts["reasoning"] = ", ".join(f"messages[{index}]" for index in left_out)
            elif not isinstance(parsed, FileExample):
                size = guessed_tokens(text) - _of_the_shorter(values)
                findings.add_size(size)
                if size > data.max_length:
                    doubts["long"] = f"at most about {size:,} tokens"
            doubts.update(_repeats(parsed, text, findings.place(row.line), findings.name, train_index, eval_index))
        except DataError as error:
            doubts["broken"] = error.problems[0].what
        for finding, what in doubts.items():
            findings.add(finding, row.line, what)
        if keep and doubts.keys() <= findings.kept:
            findings.passed.append(row.values)
    for problem in problems.shown:
        number = findings.files.index(relative_name(source.path, Path(problem.file or ""))) + 1 if files else 0
        for line in [problem.line or 0, *problems.others.get(problem, [])]:
            findings.rows += 1
            findings.add("broken", number * LINES_OF_FILE + line, problem.what)
    return findings


def _repeats(
    parsed: object, text: str, place: str, name: str, train_index: SimilarityIndex, eval_index: SimilarityIndex | None
) -> Iterator[tuple[str, str]]:
    """The findings if a row is like an evaluation row or an earlier row. If no earlier row is like it, it is added to
    `train_index`."""
    mine, label = _signed(parsed, text), _label_of(parsed)
    without_negatives = mine
    if isinstance(parsed, EmbeddingExample) and len(parsed.texts) > 2:
        without_negatives = signed_pair(*parsed.texts[:2])
    leaked, like = None if eval_index is None else eval_index.like(without_negatives), train_index.like(mine)
    if leaked is not None:
        yield "leak", f"as {leaked[2]} of {leaked[1]}"
    if like is None:
        train_index.add(mine, name, place, label)
        if without_negatives is not mine:
            train_index.add(without_negatives, name, place, label)
        return
    finding, what = like[0], f"as {like[2]}" + ("" if like[1] == name else f" of {like[1]}")
    if like[3] != label:
        finding = "contrary" if finding == "exact" else finding
        what += f", where the label is {like[3]}, not {label}"
    yield finding, what


def _label_of(parsed: object) -> RowLabel:
    """The label of a row, for comparisons. The order of several names has no meaning; the order of numbers has one."""
    if isinstance(parsed, EmbeddingExample):
        return parsed.scores[0] if len(parsed.scores) == 1 else None  # a teacher's scores are no labels
    label: RowLabel = getattr(parsed, "label", None)
    several = of_cell(label)
    if isinstance(several, list | tuple) and all(isinstance(of_cell(each), str) for each in several):
        return tuple(sorted(several))
    return label


def _signed(parsed: object, text: str) -> RowSignature:
    """The signature of a row, for comparisons: from the row's text, or from its recording or image with its text."""
    if isinstance(parsed, UnpairedExample):  # two answers to one long prompt are not nearly equal
        return signed_pair(_side_text(parsed.prompt), _side_text(parsed.completion))
    if images := images_of(parsed):  # the same question about another image is another row
        assert isinstance(parsed, ChatExample)
        turns = tuple((message.role, message.content) for message in parsed.messages)
        return RowSignature(hash((turns, *map(_content_hash, images))))
    if isinstance(parsed, EmbeddingExample):
        return signed_pair(parsed.texts[0], "\n".join(parsed.texts[1:]))
    if not isinstance(parsed, FileExample):
        if isinstance(parsed, LabelExample):
            return signed(parsed.text) if parsed.second is None else signed_pair(parsed.text, parsed.second)
        return signed(text)
    media = parsed.audio if isinstance(parsed, TranscriptExample | AudioLabelExample) else parsed.image
    return RowSignature(hash((_content_hash(media), getattr(parsed, "text", None))))


def _content_hash(media: Media) -> bytes:
    return sha256(Path(media.path).read_bytes() if media.data is None else media.data).digest()


def _side_text(side: TextOrTurns) -> str:
    """The text of a prompt or an answer."""
    return "\n".join(_texts(side if isinstance(side, str) else [turn.as_dict() for turn in side]))


def _of_the_shorter(values: Fields) -> int:
    """Estimated tokens of the shorter answer of a preference pair; 0 for rows with one answer. They are subtracted from
    the row's length, which counts only the longer answer.
    """
    if "rejected" not in values:
        return 0
    return min(guessed_tokens("\n".join(_texts(values.get(side)))) for side in ("chosen", "rejected"))


def _outcomes(
    rows: Iterator[RawRow], make_example: MakeExample, kind: RowKind | None, path: str
) -> Iterator[Outcome | None]:
    """The encoded rows; None for each row if `kind`, the encoding, is unknown."""
    if kind is None:
        return (None for _ in rows)
    from tunekit.data.encoding.outcomes import SourceEncoder, outcomes  # imports torch

    return outcomes(rows, SourceEncoder(make_example, kind.counting(), path))


def _fates(outcome: Outcome, kind: RowKind, findings: Found) -> Iterator[tuple[str, str]]:
    """The findings (kind, details) if training would cut or drop the row. Raises: DataError if the row is wrong."""
    from tunekit.data.encoding.encode import TOO_LONG, SourceCounts, cut_row
    from tunekit.data.encoding.outcomes import Dropped

    rows, reasons = outcome[1], list[str]()
    if isinstance(rows, DataError):
        raise rows
    if isinstance(rows, Dropped):
        yield "dropped", str(rows)
        return
    size, options = max(kind.layout.length(row.sizes) for row in rows), kind.options
    findings.add_size(size)
    if size > options.max_length:
        yield "long", f"{size:,} tokens: {EXCESS[options.excess_length]}"
    for row in rows if size <= options.max_length or options.excess_length != "error" else ():
        try:
            cut_row(row, kind, SourceCounts())
        except Dropped as reason:
            reasons.append(str(reason))
    if len(reasons) == len(rows) and not reasons[-1].startswith(TOO_LONG):
        yield "dropped", reasons[-1]


def _doubts(parsed: object, text: str, line: int, findings: Found) -> Iterator[tuple[str, str]]:
    """The findings in one row, as pairs of kind and details."""
    if isinstance(parsed, FileExample):
        yield from _doubts_of_file(parsed)
        return
    if images := images_of(parsed):
        yield from _doubts_of_images(images)
    findings.scripts.setdefault(_script(text), []).append(line)
    for kind, pattern, marks in PATTERNS:
        match = pattern.search(text) if any(mark in text for mark in marks) else None
        if match is not None:
            yield kind, match[0] if kind == "email" else "[secret]" if kind == "secret" else repr(match[0])
    if any(mark in text for mark in ("_", "sk-", "glpat-", "://")) and holds_secret(text):
        yield "secret", "[secret]"
    if isinstance(parsed, ChatExample) and all(each.empty for each in parsed.messages if each.role == "assistant"):
        yield "empty", "no answer"
    elif isinstance(parsed, ChatExample):
        wrong = _turns(parsed)
        if wrong:
            yield "roles", wrong
    elif isinstance(parsed, CompletionExample) and not parsed.completion.strip():
        yield "empty", "no answer"


def _doubts_of_images(images: Sequence[Media]) -> Iterator[tuple[str, str]]:
    """Findings in the headers of a conversation's images. Raises: DataError if a header cannot be read."""
    from tunekit.data.encoding.images import read_size  # imports torch
    from tunekit.data.encoding.outcomes import Dropped

    for image in images:
        try:
            read_size(image.path if image.data is None else image.data)
        except Dropped as error:
            yield "dropped", f"{image.name}: {error}"


def _doubts_of_file(parsed: FileExample) -> Iterator[tuple[str, str]]:
    """Findings in the recording or image of a row. Raises: DataError if the file cannot be read."""
    if not isinstance(parsed, TranscriptExample | AudioLabelExample):
        from tunekit.data.encoding.images import read_image  # imports torch
        from tunekit.data.encoding.outcomes import Dropped

        try:
            read_image(parsed.image.path if parsed.image.data is None else parsed.image.data)
        except Dropped as error:
            yield "broken", str(error)
        return
    with opened(parsed.audio) as sound:
        starts = range(0, sound.samples, SAMPLES_AT_ONCE)
        loudest = max(float(abs(sound.read(start, start + SAMPLES_AT_ONCE)).max()) for start in starts)
    if isinstance(parsed, TranscriptExample) and not parsed.text.strip():
        yield "empty", "no transcript"
    elif loudest < SILENCE:
        yield "empty", "a silent recording"


def _turns(example: ChatExample) -> str:
    """The error in the order of a conversation's turns; "" if the order is right."""
    roles = [message.role for message in example.messages if message.role not in ("tool", "function")]
    if "system" in roles[1:]:
        return "a system prompt that is not first"
    spoken = [role for role in roles if role not in ("system", "developer")]
    if not spoken or spoken[0] == "assistant":
        return "an answer without a question"
    if any(a == b == "assistant" for a, b in pairwise(spoken)):
        calls = any(message.extra.get("tool_calls") for message in example.messages)
        return "" if calls else "two answers in a row"
    if any(a == b == "user" for a, b in pairwise(spoken)):
        return "two questions in a row"
    return "a last question without an answer" if spoken[-1] != "assistant" else ""


def _texts(value: object) -> Iterator[str]:
    """All texts in a row, without names of roles and without ids."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in ("role", "from", "id"):
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


@lru_cache(maxsize=4096)
def _writing(letter: str) -> str:
    """The script of a letter by its Unicode name, such as LATIN."""
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0]


def _script(text: str) -> str:
    """The script of most of the first letters of a text; "" for a text without letters."""
    if text.isascii():
        return "LATIN"
    counts = Counter(_writing(letter) for letter in text[:400] if letter.isalpha())
    return counts.most_common(1)[0][0] if counts else ""


def add_other_scripts(findings: Found) -> None:
    """Add a finding for each row in a script that is rare in the file. --fix keeps these rows."""
    for script, lines in findings.scripts.items():
        if script and len(lines) < RARE * findings.rows:
            for line in lines:
                findings.add("script", line, script.lower())
