"""The tokenizer of a GGUF file splits texts where llama.cpp does."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import pre_tokenizers

from tunekit.errors import ModelError
from tunekit.exports.programs.llama_cpp import tokens_of
from tunekit.exports.programs.program import find_program
from tunekit.model.text.gguf_tokenizer import SPACE, SPLITS, UNUSED_MERGE
from tunekit.model.text.tokenizer import LoadedTokenizer, load_tokenizer
from tunekit.recipe.model import ModelSection

MERGES = ["1 2", "3 4", ". b", "Ċ Ċ", "a Ġ"]
BYTES = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES), "xyz", "<s>"]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256)), SPACE, "a", "b", f"{SPACE}a"]
TEXTS = ["1234 a.b", "a\n\n\nb  xyz c", "He'll pay $12.50`!\r\n", "x 你好12, été", "  a", "a b<s> a", ""]


def write(path: Path, kind: str, values: dict[str, Any], merges: Sequence[str] = MERGES) -> Path:
    """A file with a tokenizer and no weights."""
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("context_length", "embedding_length", "block_count", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{name}")(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(kind)
    names = BYTES if kind == "gpt2" else PIECES
    control, number = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    types = [gguf.TokenType.BYTE if name.startswith("<0x") else number for name in names]
    types[names.index("<s>")] = control
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_bos_token_id(names.index("<s>"))
    if kind == "gpt2":
        writer.add_token_merges(merges)
    else:
        writer.add_token_scores([-float(len(PIECES) - at) for at in range(len(PIECES))])
    for name, value in values.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_string
        add(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path: Path) -> LoadedTokenizer:
    return load_tokenizer(ModelSection(name_or_path=str(path)))


@pytest.mark.parametrize(
    ("name", "text", "tokens"),
    [
        ("gpt-2", "12", ["12"]),
        ("smollm", "12", ["1", "2"]),
        ("gpt-2", "1234", ["12", "34"]),
        ("falcon", "1234", ["12", "3", "4"]),
        ("gpt-2", "a.b", ["a", ".", "b"]),
        ("chatglm-bpe", "a.b", ["a", ".b"]),
        (None, "1234", ["12", "3", "4"]),
        ("stablelm2", "xyz", ["x", "y", "z"]),
        ("llama-bpe", "xyz", ["xyz"]),
    ],
)
def test_words_are_split_as_the_file_states(name: str | None, text: str, tokens: list[str], tmp_path: Path) -> None:
    tokenizer = load(write(tmp_path / "base.gguf", "gpt2", {} if name is None else {"pre": name}))
    assert [BYTES[number] for number in tokenizer.encode(text)] == tokens
    assert tokenizer.adds_bos == (name == "llama-bpe")


def test_an_exported_tokenizer_without_merges_is_read(tmp_path: Path) -> None:
    """llama.cpp needs a merge, whose tokens do not exist. Any other merge of unknown tokens is damage."""
    tokenizer = load(write(tmp_path / "m.gguf", "gpt2", {"pre": "gpt-2"}, [UNUSED_MERGE]))
    assert [tokenizer.backend.id_to_token(each) for each in tokenizer.encode("12 .b")] == ["1", "2", "Ġ", ".", "b"]
    with pytest.raises(ModelError, match="out of vocabulary"):
        load(write(tmp_path / "damaged.gguf", "gpt2", {"pre": "gpt-2"}, ["<|a|> <|b|>"]))


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="uses the pre-tokenizer 'other', which tunekit does not know"):
        load(write(tmp_path / "base.gguf", "gpt2", {"pre": "other"}))


@pytest.mark.parametrize(
    ("spaces", "text", "tokens"),
    [
        (True, "a", [f"{SPACE}a"]),
        (True, " a", [SPACE, f"{SPACE}a"]),
        (False, "a", ["a"]),
        (False, "a a", ["a", f"{SPACE}a"]),
    ],
)
def test_a_space_is_in_front_of_pieces_as_the_file_states(
    spaces: bool, text: str, tokens: list[str], tmp_path: Path
) -> None:
    tokenizer = load(write(tmp_path / "base.gguf", "llama", {"add_space_prefix": spaces}))
    assert [PIECES[number] for number in tokenizer.encode(text)] == tokens


def test_the_tokenizer_of_another_model_in_the_folder_is_not_taken(tiny_llama: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "base.gguf", "gpt2", {"pre": "smollm"})
    alone = load(file)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_llama / name, tmp_path / name)
    assert load(file).fingerprint == alone.fingerprint


@pytest.mark.slow
def test_texts_become_the_tokens_of_llama_cpp(tmp_path: Path) -> None:
    program = find_program("llama.cpp")
    if program is None:
        pytest.skip("llama.cpp is not installed: scripts/certify llama.cpp")
    names = [name for names in SPLITS for name in names.split()]
    cases: list[tuple[str, dict[str, Any]]] = [("gpt2", {"pre": name}) for name in names]
    cases += [("gpt2", {}), *(("llama", {"add_space_prefix": value}) for value in (True, False))]
    for kind, values in cases:
        path = write(tmp_path / "base.gguf", kind, values)
        tokenizer = load(path)
        ours = [tokenizer.native(text)["input_ids"] for text in TEXTS]
        assert ours == tokens_of(program, path, TEXTS), values
