"""Tokenizers of every kind: no pad, pad == eos, eos 0, no template, special tokens in text, hostile templates."""

from __future__ import annotations

import contextlib
import itertools
import json
import resource
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tunekit.errors import DataError, ModelError
from tunekit.model.text import templates
from tunekit.model.text.tokenizer import LoadedTokenizer, load_tokenizer
from tunekit.recipe.model import ModelSection


def load(folder: Path) -> LoadedTokenizer:
    return load_tokenizer(ModelSection(name_or_path=str(folder)))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> LoadedTokenizer:
    return load(tiny_llama)


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


TEXTS = [
    "plain words",
    "  two  spaces \n and\tlines \r\n",
    "wörld 漢字 🙂 e\u0301",
    "<|im_start|>user\nfake<|im_end|>",
    "",
    "a" * 300,
]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_offsets(tokenizer: LoadedTokenizer, text: str) -> None:
    for special in (True, False):
        ids, offsets = tokenizer.encode_with_offsets(text, special_tokens_in_text=special)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text, special_tokens_in_text=special) == ids
        assert len(ids) == len(offsets)
        covered = sorted({position for start, end in offsets for position in range(start, end)})
        assert covered == list(range(len(text)))
        assert all(first[0] <= second[0] for first, second in itertools.pairwise(offsets))


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, folder: Path, kind: str) -> None:
    """transformers makes a tokenizer of a few tokens from the configuration."""
    AutoConfig.for_model(kind).save_pretrained(tmp_path / "base")
    with pytest.raises(
        ModelError, match=r"base contains no tokenizer \(such as tokenizer\.json\); copy the tokenizer's"
    ):
        load(tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="contains no tokenizer"):
        load(folder)


def test_special_tokens_in_text(tokenizer: LoadedTokenizer) -> None:
    text = "<|im_start|>x<|endoftext|>"
    assert tokenizer.encode(text)[0] == 1
    assert tokenizer.encode(text)[-1] == 0
    plain = tokenizer.encode(text, special_tokens_in_text=False)
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.special_ids.isdisjoint(plain)
    assert tokenizer.encode(text)[0] == 1  # asking for plain text once changes nothing later


def test_special_tokens_go_around_a_text_and_stay_text_in_it(shared: Path) -> None:
    tokenizer = load(shared / "models" / "bart-g2p")
    for encode in (tokenizer.encode_source, tokenizer.encode_answer):
        assert encode("go on") == tokenizer.native("go on")["input_ids"]
        assert encode("") == tokenizer.native("")["input_ids"]
        ids = encode("<s> go </s>")
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids[1:-1])


def test_turn_marker_that_is_not_declared_special(folder: Path) -> None:
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text())
    for token in definition["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(definition))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("additional_special_tokens", None), config.pop("extra_special_tokens", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    plain = load(folder).encode("<|im_start|>x", special_tokens_in_text=False)
    assert 1 not in plain


def test_no_special_token_is_ever_added(tokenizer: LoadedTokenizer, stories: Path) -> None:
    assert tokenizer.encode("x") == tokenizer.native.encode("x", add_special_tokens=False)
    llama = load(stories)
    assert llama.encode("Once upon")[0] != llama.bos_id
    assert llama.decode(llama.encode("Once upon a time")) == "Once upon a time"


def test_pad_is_any_existing_id_and_end_zero_counts(folder: Path) -> None:
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    for eos, pad, expected in [
        ("<|endoftext|>", None, 0),
        ("<|im_end|>", "<|im_end|>", 2),
        ("<|im_end|>", None, 2),
        (None, None, 0),
        ("<|im_end|>", "<|im_start|>", 1),
    ]:
        config_path.write_text(json.dumps(config | {"eos_token": eos, "pad_token": pad}))
        tokenizer = load(folder)
        assert tokenizer.pad_id == expected
        assert tokenizer.vocabulary_size == 259
        assert tokenizer.eos_id == (None if eos is None else {"<|endoftext|>": 0, "<|im_end|>": 2}[eos])


def test_render_is_transformers_own(tokenizer: LoadedTokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    own = tokenizer.native.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.render(messages, add_generation_prompt=True) == own
    assert tokenizer.render(messages, template="{{ messages[0].content }}!") == "hi!"


def test_a_template_of_an_older_processor_is_read(folder: Path, tmp_path: Path) -> None:
    """Its chat_template.json, which no tokenizer of transformers reads; a template of the tokenizer's own wins."""
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    (place / "chat_template.json").write_text(json.dumps({"chat_template": "from the processor"}), encoding="utf-8")
    own = load_tokenizer(ModelSection(name_or_path=str(place))).chat_template
    assert own != "from the processor"
    (place / "chat_template.jinja").unlink()
    assert load_tokenizer(ModelSection(name_or_path=str(place))).chat_template == "from the processor"


def test_no_template_is_said(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    tokenizer = load(folder)
    assert tokenizer.chat_template is None
    with pytest.raises(DataError, match=r"data\.chat_template"):
        tokenizer.render([{"role": "user", "content": "x"}])


BAD_TEMPLATES = {
    "refused": "{{ raise_exception('only users here') }}",
    "syntax": "{% for %}",
    "unsafe": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "undefined": "{{ nothing.at.all }}",
    "memory": "{{ 'a' * 10**11 }}",
}


@pytest.mark.parametrize("name", sorted(BAD_TEMPLATES))
def test_bad_templates_are_errors_of_the_row(tokenizer: LoadedTokenizer, name: str) -> None:
    with pytest.raises(DataError, match="template"):
        tokenizer.render([{"role": "user", "content": "x"}], template=BAD_TEMPLATES[name])


def test_endless_template_is_stopped(tokenizer: LoadedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "LIMIT_SECONDS", 0.2)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    before, start = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(DataError, match="seconds"):
        tokenizer.render([{"role": "user", "content": "x"}], template=loop)
    assert time.monotonic() - start < 5
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_endless_template_is_stopped_in_a_thread_too(
    tokenizer: LoadedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `serve` renders: other requests wait for this thread."""
    monkeypatch.setattr(templates, "LIMIT_SECONDS", 0.2)
    loop = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    with ThreadPoolExecutor(1) as pool:
        rendered = pool.submit(tokenizer.render, [{"role": "user", "content": "x"}], template=loop)
        with pytest.raises(DataError, match="seconds"):
            rendered.result(30)
        assert pool.submit(sys.gettrace).result() is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such limit")
def test_a_template_is_limited_in_memory_in_a_thread_too(
    tokenizer: LoadedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "LIMIT_EXTRA_BYTES", 2**28)
    before = resource.getrlimit(resource.RLIMIT_AS)
    with ThreadPoolExecutor(2) as pool:
        for template, refused in (("{{ ('a' * 2**29)|length }}", True), ("{{ ('a' * 9)|length }}", False)):
            rendered = pool.submit(tokenizer.render, [{"role": "user", "content": "x"}], template=template)
            if refused:
                with pytest.raises(DataError, match="asked for too much memory"):
                    rendered.result(30)
            else:
                assert rendered.result(30) == "9"
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_too_much_output_is_refused(tokenizer: LoadedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "LIMIT_CHARACTERS", 1000)
    with pytest.raises(DataError, match="characters"):
        tokenizer.render([{"role": "user", "content": "x"}], template="{% for a in range(2000) %}a{% endfor %}")


def test_today_does_not_change_the_rows(tokenizer: LoadedTokenizer) -> None:
    template = "{{ strftime_now('%Y-%m-%d') }}"
    assert tokenizer.render([{"role": "user", "content": "x"}], template=template) == "2024-07-26"


def test_lone_surrogate_is_an_error_of_the_row(tokenizer: LoadedTokenizer) -> None:
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("bad \ud800 text")


def test_fingerprint_follows_ids_and_template(folder: Path, tokenizer: LoadedTokenizer) -> None:
    assert load(folder).fingerprint == tokenizer.fingerprint
    (folder / "chat_template.jinja").write_text("other")
    changed = load(folder).fingerprint
    assert changed != tokenizer.fingerprint


def test_saved_files_are_the_bases_own(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder)
    loaded.encode("use it", special_tokens_in_text=False)
    out = tmp_path / "out"
    out.mkdir()
    loaded.save(out)
    names = {path.name for path in out.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_tokenizer_without_tokenizer_json(shared: Path) -> None:
    """gpt2 as vocab.json and merges.txt: transformers makes the fast one."""
    tokenizer = load(shared / "models" / "tokenizers" / "gpt2")
    assert tokenizer.decode(tokenizer.encode(" hello wörld")) == " hello wörld"
    assert tokenizer.eos_id == 50256
    assert tokenizer.vocabulary_size == 50257


def test_unigram_that_would_spell_a_special_token(shared: Path) -> None:
    """Its special tokens are pieces of its model, so that no flag keeps text from becoming one: refused by name."""
    tokenizer = load(shared / "models" / "tokenizers" / "t5")
    with pytest.raises(DataError, match="</s>"):
        tokenizer.encode("a </s> b", special_tokens_in_text=False)
    unknown = tokenizer.encode("x \U0001f9ff y", special_tokens_in_text=False)
    assert tokenizer.native.unk_token_id in unknown


def test_damaged_and_missing_tokenizers_are_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer"):
        load(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load(folder)


def test_code_of_a_tokenizer_never_runs(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    evil = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    path.write_text(json.dumps(config | evil))
    (folder / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    with contextlib.suppress(ModelError):  # transformers may fall back to the plain tokenizer.json
        load(folder)
    assert not (folder / "ran").exists()


def test_token_text(tokenizer: LoadedTokenizer) -> None:
    assert tokenizer.token_text(1) == "<|im_start|>"
    assert tokenizer.token_text(tokenizer.encode(" ")[0]) == " "
    assert tokenizer.token_text(100_000) == "<unused 100000>"


def test_fingerprint_follows_what_is_put_around_a_text(folder: Path, tokenizer: LoadedTokenizer) -> None:
    """A post-processor changes the rows of encoders and the first token of plain text."""
    definition = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    around = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": around},
    }
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    assert load(folder).adds_bos
    assert load(folder).fingerprint != tokenizer.fingerprint
