"""Plain words: the rules of style that a test can check, in code, messages and pages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = REPOSITORY / "scripts" / "site" / "pages"
SENTENCE_WORDS, PARAGRAPH_CHARACTERS = 35, 5 * 125
BANNED = r"\b(told|said|senseless|sensible|comes in|goes out|goes on|gone on|going on|begun|none of what)\b"
NAMES = {"found", "told", "said", "given", "kept", "made", "seen", "every", "own", "whole", "rest", "asked"}
LIVES = 3  # lines that a name without content may live


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted((REPOSITORY / "tunekit").rglob("*.py")):
        yield file.relative_to(REPOSITORY), ast.parse(file.read_text(encoding="utf-8"))


def docstrings() -> Iterator[tuple[str, str]]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield f"{file}:{getattr(node, 'lineno', 1)}", text


def texts() -> Iterator[tuple[str, str]]:
    """All strings of the code, of f-strings the constant parts together."""
    for file, tree in modules():
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
                yield f"{file}:{node.lineno}", "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                yield f"{file}:{node.lineno}", node.value


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.;:!?])\s+|\n\s*\n|\n\s*[-`|]|\s{4,}", text)


def test_banned_words() -> None:
    wrong = [f"{place}: {hit[0]}" for place, text in texts() for hit in re.finditer(BANNED, text, re.I)]
    assert wrong == []


def test_sentences_are_short() -> None:
    wrong = [
        f"{place}: {sentence}"
        for place, text in texts()
        for sentence in sentences(text)
        if len(re.findall(r"[A-Za-z][a-z']*", sentence)) > SENTENCE_WORDS and " " in sentence
    ]
    assert wrong == []


def test_names_say_what_they_hold() -> None:
    wrong = []
    for file, tree in modules():
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines: dict[str, set[int]] = {}
            for node in ast.walk(function):
                name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else ""
                if name in NAMES:
                    lines.setdefault(name, set()).add(node.lineno)
            wrong += [f"{file}:{min(at)} {name}" for name, at in lines.items() if max(at) - min(at) >= LIVES]
    assert sorted(set(wrong)) == []


def test_paragraphs_are_short() -> None:
    wrong = []
    for file in [REPOSITORY / "README.md", *sorted(PAGES.rglob("*.md"))]:
        text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.S)
        for paragraph in re.split(r"\n\s*\n|\n\s*[-|]", text):
            if len(paragraph) > PARAGRAPH_CHARACTERS:
                wrong.append(f"{file.name}: {len(paragraph)} {paragraph[:60]}")
    assert wrong == []
