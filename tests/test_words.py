"""Plain words: the rules of style that a test can check, in code, messages and pages."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
SITE = REPOSITORY / "scripts" / "site"
SENTENCE_WORDS, PARAGRAPH_CHARACTERS, SHORT_LIFE, PAGE_WORDS = 35, 5 * 125, 3, 1000
BANNED = r"\b(told|said|senseless|sensible|comes in|goes out|goes on|gone on|going on|begun|none of what)\b"
VAGUE = {"found", "told", "said", "given", "kept", "made", "seen", "every", "own", "whole", "rest", "asked"}
WITHOUT_CURE = {  # file -> the errors in it that state no cure of their own
    "tunekit/audit.py": 1,  # one per different byte; the last problem states the cure
    "tunekit/arithmetic/lora_folder.py": 1,  # likewise
    "tunekit/data/reading/problems.py": 1,  # "and 10 more problems"
    "tunekit/model/storage/sidecar.py": 1,  # becomes a note, not an error
    "tunekit/planning/checks.py": 1,  # a refusal's message contains its cure
}
TITLES = (
    "Supervised fine-tuning (SFT)",
    "Text classification",
    "Named entities (token classification)",
    "Classification by multiple choice",
    "Preference tuning (DPO)",
    "Thumbs up and down (KTO)",
    "Reward models",
    "Embedding models",
    "Rerankers",
    "Reinforcement learning (GRPO)",
    "Distillation",
    "Encoder-decoders (T5, BART)",
    "Speech recognition (Whisper)",
    "Audio classification",
    "Image classification",
    "DreamBooth",
)


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Path and syntax tree of all modules."""
    for file in sorted((REPOSITORY / "tunekit").rglob("*.py")):
        yield str(file.relative_to(REPOSITORY)), ast.parse(file.read_text(encoding="utf-8"))


def texts() -> Iterator[tuple[str, str]]:
    """Place and text of all strings of the code, docstrings too. Values in f-strings become X."""
    for file, tree in modules():
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
                yield f"{file}:{node.lineno}", "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                yield f"{file}:{node.lineno}", node.value


def sentences(text: str) -> list[str]:
    """The sentences of a text; lines of lists and tables count as sentences."""
    return re.split(r"(?<=[.;:!?])\s+|\n\s*\n|\n\s*[-`|]|\s{4,}", text)


def error_names(trees: Iterable[ast.Module]) -> set[str]:
    """The names of all classes of errors for users, and Problem. OtherRankError repeats the message of another rank."""
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    names = {"TunekitError"}
    while more := {each.name for each in classes if names & {ast.unparse(base) for base in each.bases}} - names:
        names |= more
    return names - {"OtherRankError"} | {"Problem"}


def without_cure(call: ast.Call, names: set[str]) -> bool:
    """Whether a call creates an error for users, but gives it no cure (its second argument, `how`)."""
    if not isinstance(call.func, ast.Name) or call.func.id not in names:
        return False
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return False  # (what, how) from a function or a constant
    cures = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "how")]
    return not cures or (isinstance(cures[0], ast.Constant) and not cures[0].value)


def test_every_error_states_its_cure() -> None:
    trees = dict(modules())
    names = error_names(trees.values())
    calls = [(file, node) for file, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = [f"{file}:{node.lineno}" for file, node in calls if without_cure(node, names)]
    assert Counter(place.rpartition(":")[0] for place in found) == WITHOUT_CURE, found


def test_banned_words() -> None:
    hits = [f"{place}: {hit[0]}" for place, text in texts() for hit in re.finditer(BANNED, text, re.I)]
    assert hits == []


def test_sentences_are_short() -> None:
    long = [
        f"{place}: {sentence}"
        for place, text in texts()
        for sentence in sentences(text)
        if len(re.findall(r"\w[\w'-]*", sentence)) > SENTENCE_WORDS and " = " not in sentence
    ]
    assert long == []


def test_names_state_their_content() -> None:
    """A vague name may live for a few lines only."""
    vague = []
    for file, tree in modules():
        for function in ast.walk(tree):
            lines: dict[str, list[int]] = {}
            for node in ast.walk(function) if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) else ():
                name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else ""
                if name in VAGUE:
                    lines.setdefault(name, []).append(node.lineno)  # type: ignore[attr-defined]
            vague += [f"{file}:{min(at)} {name}" for name, at in lines.items() if max(at) - min(at) >= SHORT_LIFE]
    assert vague == []


def test_paragraphs_of_pages_are_short() -> None:
    long = []
    for file in [REPOSITORY / "README.md", *sorted((SITE / "pages").rglob("*.md"))]:
        text = re.sub(r"```.*?```|\]\([^)]*\)", "", file.read_text(encoding="utf-8"), flags=re.S)
        for paragraph in re.split(r"\n\s*\n|\n\s*[-|]", text):
            if len(paragraph) > PARAGRAPH_CHARACTERS:
                long.append(f"{file.name}: {paragraph[:80]}")
    assert long == []


def test_pages_are_short() -> None:
    """A page is read, except those of reference, which are looked up, and the one for contributors."""
    long = {}
    for file in sorted((SITE / "pages").rglob("*.md")):
        text = re.sub(r"<!--.*?-->|\]\([^)]*\)", "", file.read_text(encoding="utf-8"), flags=re.S)
        words = len(re.findall(r"\w[\w.\-/:=%',]*", text))
        if words > PAGE_WORDS and file.parent.name != "reference" and file.name != "architecture.md":
            long[file.name] = words
    assert long == {}


def test_tutorials_have_the_titles_of_the_field() -> None:
    nav = yaml.safe_load((SITE / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2])
    tutorials = next(part["Tutorials"] for part in nav if "Tutorials" in part)
    assert tuple(title for entry in tutorials for title in entry) == TITLES
    for title, page in (pair for entry in tutorials for pair in entry.items()):
        assert (SITE / "pages" / page).read_text(encoding="utf-8").splitlines()[0] == f"# {title}"
