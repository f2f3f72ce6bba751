"""The rows of a source go in; what is doubtful in each, by kind and line, comes out."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

from tunekit.data.looking.similar import RowSignature, SimilarityIndex, signed
from tunekit.data.reading.first import format_maker, open_rows
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.sound import SILENCE, opened
from tunekit.errors import DataError, holds_secret
from tunekit.formats.audio_label import AudioLabelExample
from tunekit.formats.example import ChatExample, CompletionExample
from tunekit.formats.image import ImageExample
from tunekit.formats.image_label import ImageLabelExample
from tunekit.formats.labels import LabelExample
from tunekit.formats.transcript import TranscriptExample
from tunekit.recipe.data import Source

RARE = 0.02  # share of the rows that another writing has at most, to be remarked on
EMAIL = re.compile(r"\b[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}\b")
KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")
GARBLED = re.compile("\ufffd|Ã[\u0080-\u00bf]|â€[\u0080-\u2122\u0153]|Â[\u00a0-\u00bf]")  # UTF-8 misread
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
MARKUP = re.compile(r"(?m)<\|im_start\|>|<\|start_header_id\|>|\[INST\]|<start_of_turn>|^### (?:Instruction|Response)")
PATTERNS = (  # kind, what is looked for, and a text without which it cannot be there
    ("garbled", GARBLED, ("\ufffd", "Ã", "â€", "Â")),
    ("control", CONTROLS, ("",)),
    ("markup", MARKUP, ("<|", "[INST", "<start_of", "###")),
    ("email", EMAIL, ("@",)),
    ("secret", KEY, ("-----BEGIN", "AKIA", "ASIA")),
)
LENGTHS = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
MOST_BROKEN = 1000  # things wrong with lines that are told apart
FileExample = TranscriptExample | AudioLabelExample | ImageExample | ImageLabelExample  # of a row that names a file
SAMPLES_AT_ONCE = 1 << 20
CHARACTERS_OF_A_TOKEN = 3.5  # where no tokenizer has been asked

KINDS = {  # of findings: what it is, in the words of the table
    "broken": "rows that cannot be read",
    "empty": "rows with nothing to learn",
    "exact": "rows that repeat an earlier one",
    "contrary": "rows that repeat an earlier one with another label",
    "near": "rows nearly equal to an earlier one",
    "leak": "training rows that are evaluation rows too, or nearly",
    "garbled": "rows with characters of a wrong encoding",
    "control": "rows with control characters",
    "script": "rows in another writing than the others",
    "roles": "conversations whose turns are out of order",
    "markup": "rows whose text spells a chat template: probably another format",
    "secret": "rows with an access token, a password or a private key",
    "email": "rows with e-mail addresses",
    "long": "rows longer than data.max_length by a guess",
}


@dataclass
class Found:
    """Findings of one file, by kind: the lines of the rows, and what the first one says."""

    name: str
    rows: int = 0
    lines: dict[str, list[int]] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    sizes: Counter[int] = field(default_factory=Counter)  # rows by the lower end of their length in tokens, guessed
    scripts: dict[str, list[int]] = field(default_factory=dict)  # lines of the rows in each writing
    passed: list[dict[str, Any]] = field(default_factory=list)  # only where they are asked for

    def add(self, kind: str, line: int, what: str = "") -> None:
        """One row with a finding."""
        self.lines.setdefault(kind, []).append(line)
        self.first.setdefault(kind, what)


def look_at_rows(
    source: Source, example: str, limit: int, seen: SimilarityIndex, held: SimilarityIndex | None, keep: bool
) -> Found:
    """Every row of one source. `held`: the evaluation rows, where these are to train on."""
    found, problems = Found(Path(source.path).name), Problems(MOST_BROKEN)
    rows, _, format_name, _ = open_rows(source, example, problems)
    make_example = format_maker(format_name, source.path)
    for row in rows:
        found.rows += 1
        text = "\n".join(_texts(row.values))
        before, made = sum(map(len, found.lines.values())), None
        try:
            made = make_example(row.values)
            characters = len(text) - _of_the_shorter(row.values)
            for kind, what in _doubts(made, text, characters, row.line, limit, found):
                found.add(kind, row.line, what)
        except DataError as error:
            found.add("broken", row.line, error.problems[0].what)
        label = getattr(made, "label", None)
        mine = _signed(made, text)
        leaked, like = None if held is None else held.like(mine), seen.like(mine)
        if leaked is not None:
            found.add("leak", row.line, f"as line {leaked[2]} of {leaked[1]}")
        if like is not None:
            kind, place = like[0], f"as line {like[2]}" + ("" if like[1] == found.name else f" of {like[1]}")
            if like[3] != label:
                kind = "contrary" if kind == "exact" else kind
                place += f", where it is {like[3]}, not {label}"
            found.add(kind, row.line, place)
        else:
            seen.add(mine, found.name, row.line, label)
        if keep and sum(map(len, found.lines.values())) == before:
            found.passed.append(row.values)
    for problem in problems.shown:
        for line in [problem.line or 0, *problems.others.get(problem, [])]:
            found.rows += 1
            found.add("broken", line, problem.what)
    return found


def _signed(made: object, text: str) -> RowSignature:
    """How a row is compared: by what it says; one that names a file by the file's bytes and what is said of them."""
    if not isinstance(made, FileExample):
        return signed(made.text if isinstance(made, LabelExample) else text)
    media = made.audio if isinstance(made, TranscriptExample | AudioLabelExample) else made.image
    try:
        content = Path(media.path).read_bytes() if media.data is None else media.data
    except (OSError, ValueError):  # another finding says so
        content = media.path.encode(errors="surrogateescape")
    return RowSignature(hash((sha256(content).digest(), getattr(made, "text", None))))


def _of_the_shorter(values: dict[str, Any]) -> int:
    """Characters of the shorter answer of a pair, which is a sequence of its own; 0 where there is one answer."""
    if "rejected" not in values:
        return 0
    return min(sum(map(len, _texts(values.get(side)))) for side in ("chosen", "rejected"))


def _doubts(made: object, text: str, characters: int, line: int, limit: int, found: Found) -> Iterator[tuple[str, str]]:
    """The kinds of findings in one row, and what was found; `characters`: of its longest sequence."""
    if isinstance(made, FileExample):
        yield from _doubts_of_file(made)
        return
    size = int(characters / CHARACTERS_OF_A_TOKEN)
    found.sizes[max(low for low in LENGTHS if low <= size)] += 1
    if size > limit:
        yield "long", f"about {size:,} tokens"
    found.scripts.setdefault(_script(text), []).append(line)
    for kind, pattern, marks in PATTERNS:
        match = pattern.search(text) if any(mark in text for mark in marks) else None
        if match is not None:
            yield kind, match[0] if kind == "email" else "[secret]" if kind == "secret" else repr(match[0])
    if any(mark in text for mark in ("_", "sk-", "glpat-", "://")) and holds_secret(text):
        yield "secret", "[secret]"
    if isinstance(made, ChatExample) and all(each.empty for each in made.messages if each.role == "assistant"):
        yield "empty", "no answer"
    elif isinstance(made, ChatExample):
        wrong = _turns(made)
        if wrong:
            yield "roles", wrong
    elif isinstance(made, CompletionExample) and not made.completion.strip():
        yield "empty", "no answer"


def _doubts_of_file(made: FileExample) -> Iterator[tuple[str, str]]:
    """What is wrong with the recording or the image that a row names. Raises: DataError where it cannot be read."""
    if not isinstance(made, TranscriptExample | AudioLabelExample):
        from tunekit.data.encoding.images import read_image  # with torch behind it
        from tunekit.data.encoding.outcomes import Dropped

        try:
            read_image(made.image.path if made.image.data is None else made.image.data)
        except Dropped as error:
            yield "broken", str(error)
        return
    with opened(made.audio) as sound:
        starts = range(0, sound.samples, SAMPLES_AT_ONCE)
        loudest = max(float(abs(sound.read(start, start + SAMPLES_AT_ONCE)).max()) for start in starts)
    if isinstance(made, TranscriptExample) and not made.text.strip():
        yield "empty", "no transcript"
    elif loudest < SILENCE:
        yield "empty", "a silent recording"


def _turns(example: ChatExample) -> str:
    """What is wrong with the order of turns; "" where nothing is."""
    roles = [message.role for message in example.messages if message.role not in ("tool", "function")]
    if "system" in roles[1:]:
        return "a system prompt that is not first"
    spoken = [role for role in roles if role not in ("system", "developer")]
    if not spoken or spoken[0] == "assistant":
        return "an answer that nobody asked for"
    if any(a == b == "assistant" for a, b in pairwise(spoken)):
        calls = any(message.extra.get("tool_calls") for message in example.messages)
        return "" if calls else "two answers in a row"
    if any(a == b == "user" for a, b in pairwise(spoken)):
        return "two questions in a row"
    return "a last question without an answer" if spoken[-1] != "assistant" else ""


def _texts(value: object) -> Iterator[str]:
    """Every text in a row, but for names of roles."""
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
    """That of most of the first letters; "" where there are few."""
    if text.isascii():
        return "LATIN"
    counts = Counter(_writing(letter) for letter in text[:400] if letter.isalpha())
    return counts.most_common(1)[0][0] if counts else ""


def add_other_scripts(found: Found) -> None:
    """Rows in a writing that hardly any other row has; a finding, but no reason for --fix to leave them out."""
    for script, lines in found.scripts.items():
        if script and len(lines) < RARE * found.rows:
            for line in lines:
                found.add("script", line, script.lower())
