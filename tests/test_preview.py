"""preview shows the rows that training sees, marks what is trained on, and its page cannot be broken by the data."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.data.test_render import tiny as tiny
from tests.support.data_case import chat, encode_example, objective_of, write_lines
from tunekit.cli import app
from tunekit.evaluation.row_losses import short_segments
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.preview import AFTER, BETWEEN, FIRST, PROMPT, TRAINED, explain_tokens, preview_verb, segments
from tunekit.recipe.load import load_recipe

EVIL = "</pre><script>alert('x')</script><img src=x onerror=y>&amp;\x1b[31m"


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    rows = [
        {"prompt": EVIL, "completion": "answer"},
        {"prompt": "q", "completion": ""},
        {"prompt": "q", "completion": "z" * 99},
    ]
    write_lines(tmp_path / "d.jsonl", rows)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_llama}\ndata: {{train: d.jsonl, max_length: 90, shuffle: false}}\noutput: {{dir: run}}\n",
        encoding="utf-8",
    )
    return path


def test_segments_and_reasons(tiny: LoadedTokenizer) -> None:
    row = encode_example(chat(("user", "é"), ("assistant", "b"), ("user", "c"), ("assistant", "d")), tiny)
    (part,) = objective_of().rows.spans(row)
    assert segments(part, tiny) == [
        ("<|im_start|>user\né<|im_end|>\n<|im_start|>assistant\n", False),
        ("b<|im_end|>", True),
        ("\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n", False),
        ("d<|im_end|>", True),
        ("\n", False),
    ]
    tokens = explain_tokens(part, tiny)
    reasons = [token.why for token in tokens]
    assert reasons[0] == FIRST
    assert list(dict.fromkeys(reasons)) == [FIRST, PROMPT, TRAINED, BETWEEN, AFTER]
    assert [token.trained for token in tokens] == row.parts["trained"].tolist()


def test_a_long_text_is_shortened_to_whole_tokens_and_characters(tiny: LoadedTokenizer) -> None:
    """The tokens are bytes, of which each letter here has two; an odd number of them would end in half a letter."""
    for length in (499, 500, 501):
        row = encode_example(chat(("user", "q"), ("assistant", f"x{'é' * length}")), tiny)
        (part,) = objective_of().rows.spans(row)
        texts = [text for text, trained in short_segments(part, tiny) if trained]
        first, _, last = texts[0].partition(" [...] ")
        assert first.strip("xé") == last.removesuffix("<|im_end|>").strip("é") == ""
        assert first.startswith("xéé")
        assert 40 < len(first) < 200
    assert short_segments(part, None) == []
    for shift in range(3):  # a blank at the cut is not shown twice
        row = encode_example(chat(("user", "q"), ("assistant", "x" * shift + "ab " * 200 + ".")), tiny)
        (part,) = objective_of().rows.spans(row)
        assert all("  " not in text for text, _ in short_segments(part, tiny))


def test_the_screen_shows_rows_marks_and_counts(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preview_verb(load_recipe(recipe), 5, None)
    shown = capsys.readouterr().out
    assert "format prompt_completion" in shown
    assert "d.jsonl:1: " in shown
    assert "answer<|im_end|>" in "".join(re.findall(r"⟦(.*?)⟧|\[\[(.*?)\]\]", shown)[0])
    assert "\x1b" not in shown
    assert re.search(r"dropped: empty answer\s+1\b", shown)
    assert re.search(r"dropped: longer than max_length\s+1\b", shown)
    assert re.search(r"supervised tokens of an epoch\s+7\b", shown)


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_is_escaped(recipe: Path, tmp_path: Path) -> None:
    preview_verb(load_recipe(recipe), 5, str(tmp_path / "page.html"))
    page = Page()
    page.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert not page.tags & {"script", "img", "link", "iframe", "a"}
    assert EVIL.replace("\x1b", "\\x1b") in page.text
    assert "answer<|im_end|>" in page.text
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.search(r'<span class="t" title="\d+: trained on">', text)
    assert re.search(r'<span class="t s" title="\d+: trained on">&lt;\|im_end\|&gt;</span>', text)
    assert re.search(
        r'<span class="p" title="\d+: not trained on: prompt, or reasoning that data.reasoning masks">', text
    )


def test_a_page_that_cannot_be_written_is_the_user_s_error(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        app(["preview", str(recipe), "--html", str(tmp_path / "absent" / "page.html")])
    assert stopped.value.code == 2
