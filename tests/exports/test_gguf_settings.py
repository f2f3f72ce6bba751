"""Settings of a base that llama.cpp fixes or ignores: what is refused, what is written, and how far a file is right."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.arithmetic.test_merge import write_base
from tests.exports.test_gguf import adapter_of, evidence, exportable, read
from tunekit.errors import ModelError
from tunekit.exports import gguf
from tunekit.exports.compare import difference_of_tokens
from tunekit.exports.format import Options
from tunekit.exports.llama_cpp.adapter import adapter_problems
from tunekit.exports.llama_cpp.converter import converting
from tunekit.exports.llama_cpp.fixed import fixed_problems, group_size
from tunekit.exports.llama_cpp.metadata import complete_facts, limit_notes, right_up_to
from tunekit.exports.llama_cpp.texts import around, sample_texts, token_notes
from tunekit.exports.llama_cpp.vocabulary import added_kinds, check_normalizer, file_name, space_scheme, strips_as_phi3
from tunekit.exports.questions import make_questions

FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"model_type": "gpt2", "reorder_and_upcast_attn": True}, None),  # the same numbers
        ({"model_type": "bloom", "apply_residual_connection_post_layernorm": True}, "post_layernorm"),
        ({"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": [0, 1, 1, 1]}, "no_rope_layers"),
        ({"model_type": "smollm3", "num_hidden_layers": 4}, None),
        ({"model_type": "gemma2", "layer_types": [FULL, SLIDING], "num_hidden_layers": 2}, "layer_types"),
        ({"model_type": "gemma2", "layer_types": [SLIDING, FULL], "num_hidden_layers": 2}, None),
        ({"model_type": "gemma2", "attn_logit_softcapping": None}, "attn_logit_softcapping"),
        ({"model_type": "gemma3_text", "layer_types": [FULL, SLIDING], "num_hidden_layers": 2}, "layer_types"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "attention_bias": True}}, "bias"),
        ({"model_type": "exaone4", "num_hidden_layers": 4, "sliding_window": 32}, "sliding_window"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        ({"model_type": "llama", "attention_bias": True, "mlp_bias": True}, None),
        ({"model_type": "starcoder2", "use_bias": False}, "use_bias"),
        ({"model_type": "gpt_neox", "attention_bias": False}, "attention_bias"),
        ({"model_type": "cohere", "use_qk_norm": True}, "use_qk_norm"),
        ({"model_type": "falcon", "bias": True}, "bias"),
        ({"model_type": "afmoe"}, "mup_enabled"),
        ({"model_type": "afmoe", "mup_enabled": True, "num_hidden_layers": 4}, None),
        ({"model_type": "afmoe", "mup_enabled": True, "layer_types": [SLIDING, FULL] * 16}, "layer_types"),
        ({"model_type": "llama4_text"}, None),
        ({"model_type": "llama4_text", "attention_chunk_size": 32}, "attention_chunk_size"),
        ({"model_type": "gemma3n_text"}, None),
        ({"model_type": "gemma3n_text", "hidden_size_per_layer_input": 16}, "hidden_size_per_layer_input"),
        ({"model_type": "qwen3_moe"}, "norm_topk_prob"),  # False where config.json does not state it
        ({"model_type": "llama", "rope_parameters": YARN | {"beta_fast": 4.0}}, "beta_fast"),
        ({"model_type": "llama", "rope_parameters": YARN | {"truncate": False}}, "truncate"),
        ({"model_type": "llama", "rope_parameters": YARN | {"beta_fast": 32, "attention_factor": 0.7}}, None),
        ({"model_type": "olmo3", "rope_scaling": None, "rope_theta": 5e4}, "rope_theta"),
    ],
)
def test_what_llama_cpp_would_compute_in_another_way_is_refused(config: dict[str, Any], named: str | None) -> None:
    problems = [str(problem) for problem in fixed_problems(config)]
    assert len(problems) == (named is not None)
    assert all(str(named) in problem and "llama.cpp computes with" in problem for problem in problems)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"model_type": "mistral", "sliding_window": 32}, 32),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 512, "max_position_embeddings": 512}, None),
        ({"model_type": "phi3", "sliding_window": 2047, "pad_token_id": 0}, 2047),
        ({"model_type": "qwen2", "sliding_window": 32}, None),  # use_sliding_window is False
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}, 32),
        ({"model_type": "gemma2", "sliding_window": 32}, None),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, 2048),
    ],
)
def test_the_length_up_to_which_a_file_is_right(config: dict[str, Any], length: int | None) -> None:
    limit = right_up_to(config)
    assert (limit and limit[0]) == length


@pytest.mark.parametrize(
    ("kind", "changes", "facts"),
    [
        ("mistral", {"sliding_window": 32}, {"llama.context_length": 32}),
        ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {"rope.freq_base": 500.0}),
        (
            "gpt_neox",
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        ),
        (
            "gemma3_text",
            {"head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": [SLIDING, FULL]},
            {"attention.sliding_window_pattern": 2},
        ),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 0.7}}, {"rope.scaling.attn_factor": 0.614776}),
        ("llama", {"vocab_size": 300}, {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False}),
    ],
)
def test_facts_that_the_converter_leaves_out_are_written(
    installed: None, kind: str, changes: dict[str, Any], facts: dict[str, Any], tmp_path: Path
) -> None:
    target = exportable(write_base(tmp_path / "base", kind, **changes))
    written = gguf.write(target, tmp_path / "model.gguf", evidence(), Options(type="F32"))
    _, stated = read(tmp_path / "model.gguf")
    for name, value in facts.items():
        key = next(key for key in stated if key.endswith(name))
        assert stated[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)
    assert any("right for up to 32 tokens" in note for note in written.notes) == (kind == "mistral")


def test_the_rounded_bounds_of_gpt_oss_are_noted() -> None:
    rope = YARN | {"truncate": False}
    (note,) = limit_notes({"model_type": "gpt_oss", "rope_parameters": rope})
    assert "rounds the bounds of yarn" in note
    assert list(limit_notes({"model_type": "gpt_oss", "rope_parameters": YARN})) == []


def test_a_scaling_that_the_converter_does_not_write_is_refused() -> None:
    writer: Any = SimpleNamespace(arch="gptneox", tensors=[{}], kv_data=[{"gptneox.rope.freq_base": 1e4}])
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = scaling | {"original_max_position_embeddings": 32, "rope_theta": 1e4}
    with pytest.raises(ModelError, match="does not write the llama3 scaling"):
        complete_facts(writer, {"model_type": "gpt_neox", "rope_parameters": rope})


def test_the_groups_of_layers_with_windows() -> None:
    assert group_size([SLIDING, SLIDING, FULL, SLIDING]) == 3
    assert group_size([FULL, FULL]) == 1
    assert group_size([SLIDING, SLIDING]) == 3
    assert group_size([SLIDING, FULL, FULL]) is None


def test_an_error_of_the_converter_is_one_of_the_model() -> None:
    def fail(error: Exception) -> None:
        with converting():
            raise error

    with pytest.raises(ModelError, match=r"cannot convert this model: KeyError: 'rotary_pct'; choose another --to"):
        fail(KeyError("rotary_pct"))
    with pytest.raises(ModelError, match="AssertionError: raise error"):
        fail(AssertionError())
    with pytest.raises(OSError, match="full"):
        fail(OSError(28, "full"))
    with pytest.raises(MemoryError):
        fail(MemoryError())


@pytest.mark.parametrize(
    ("normalizer", "space", "refused"),
    [
        ({"type": "Lowercase"}, None, True),
        ({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}, None, True),
        ({"type": "NFC"}, None, False),
        (None, None, False),
        ({"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}, "\u2581", False),
        ({"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}, None, True),
        ({"type": "Prepend", "prepend": "\u2581"}, "\u2581", False),
    ],
)
def test_changes_of_texts_that_llama_cpp_does_not_make(normalizer: Any, space: str | None, refused: bool) -> None:
    with pytest.raises(ModelError, match=r"which llama\.cpp does not") if refused else nullcontext():
        check_normalizer({"normalizer": normalizer}, space)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_where_a_tokenizer_of_pieces_puts_a_space(scheme: str) -> None:
    steps = {"type": "Sequence", "pretokenizers": [{"type": "Metaspace", "prepend_scheme": scheme}]}
    assert space_scheme({"normalizer": None, "pre_tokenizer": steps}) == scheme
    assert space_scheme({"normalizer": {"type": "Prepend"}, "pre_tokenizer": None}) == "always"
    assert space_scheme({"normalizer": None, "pre_tokenizer": None}) == "never"


@pytest.mark.drawn
def test_the_type_of_a_gguf_base_is_kept(installed: None, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", torch.bfloat16)
    for kind in ("F32", "F16", "BF16"):
        gguf.write(exportable(base), base / f"{kind}.gguf", evidence(), Options(type=kind))
        gguf.write(exportable(base / f"{kind}.gguf"), tmp_path / f"{kind}.gguf", evidence(), Options())
        assert read(tmp_path / f"{kind}.gguf")[0]["blk.0.attn_q.weight"][1] == kind


def test_a_base_that_cannot_be_read_is_not_said_to_be_mergeable(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(target: object) -> None:
        raise ModelError("the weights are a pickle", "convert it to safetensors in a sandbox")

    monkeypatch.setattr("tunekit.exports.llama_cpp.adapter.normalise", refuse)
    target: Any = SimpleNamespace(target=None)
    (problem,) = adapter_problems(target)
    assert problem.how == "convert it to safetensors in a sandbox"


def test_other_tokens_are_named() -> None:
    assert difference_of_tokens(["a", "b"], [[1], [2]], [[1], [2]]) == ""
    text = difference_of_tokens(["a", "bcd"], [[1], [2, 3, 4]], [[1], [2, 5]])
    assert text == "the program reads 1 of 2 texts as other tokens; 'bcd' becomes [5] and not [3, 4] from token 1 on"
    assert "from token 1 on" in difference_of_tokens(["a"], [[1]], [[1, 2]])


def test_questions_are_cut_to_the_length_that_is_right(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "mistral", sliding_window=140, max_position_embeddings=512)
    questions = make_questions(exportable(base))
    assert max(map(len, questions.rows)) == max(map(len, questions.expected)) == 148
    assert max(map(len, questions.cut(10).rows)) == max(map(len, questions.cut(10).expected)) == 10
    assert max(map(len, make_questions(exportable(base), past_window=False).rows)) <= 128


def test_an_adapter_alone_states_what_the_base_s_file_must_have(installed: None, tmp_path: Path) -> None:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    for kind, stated in (("gpt_neox", "gptneox.rope.freq_base = 500.0"), ("llama", "")):
        base = write_base(tmp_path / kind / "base", kind, **rope)
        target = exportable(adapter_of(base, tmp_path / kind / "adapter"))
        notes = "\n".join(gguf.write(target, tmp_path / kind / "adapter.gguf", evidence(), Options()).notes)
        assert ("must state" in notes) == bool(stated)
        assert stated in notes


def test_the_facts_of_a_gguf_base_are_read(installed: None, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    gguf.write(exportable(base), base / "base.gguf", evidence(), Options(type="F32"))
    target: Any = SimpleNamespace(folder=base, gguf_file="base.gguf", target=exportable(base).target)
    assert gguf._base_notes(target, {"llama.context_length": 128, "llama.rope.freq_base": 10000.0}) == ()
    (note,) = gguf._base_notes(target, {"llama.context_length": 128, "llama.rope.freq_base": 10001.0})
    assert "must state llama.rope.freq_base = 10001.0, which llama.cpp" in note
    assert "--to gguf --output base.gguf` writes such a file" in note


def change_tokenizer(base: Path, **changes: Any) -> None:
    file = base / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


def added(content: str, number: int, **flags: bool) -> dict[str, Any]:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": number, "content": content, **dict.fromkeys(names, False), **flags}


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip", "normalized", None])
def test_added_tokens_that_llama_cpp_finds_elsewhere_are_named(tmp_path: Path, flag: str | None) -> None:
    base = write_base(tmp_path / "base", "llama")
    tokens = json.loads((base / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    new = added("<new>", 262, **({flag: True} if flag else {}))
    change_tokenizer(base, added_tokens=[*tokens, new], normalizer={"type": "Prepend", "prepend": "_"})
    notes = list(token_notes(exportable(base)))
    assert [("'<new>' (1 such tokens)" in note) for note in notes] == ([True] if flag else [])
    assert any("a <new> b<new>c" in text for text in sample_texts(exportable(base)))


@pytest.mark.parametrize("opens", [True, False])
def test_a_space_in_front_of_texts_alone(tmp_path: Path, opens: bool) -> None:
    """llama.cpp knows a space after every special token, or none. The right one depends on the conversations."""
    base = write_base(tmp_path / "base", "llama")
    change_tokenizer(base, pre_tokenizer={"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"})
    token = json.loads((base / "tokenizer.json").read_text("utf-8"))["added_tokens"][0]["content"]
    (base / "chat_template.jinja").write_text(f"{token if opens else ''}{{{{ messages[0]['content'] }}}}", "utf-8")
    assert around(exportable(base)).space is not opens
    (note,) = token_notes(exportable(base))
    assert ("outside a conversation" if opens else "after each special token") in note


def test_spaces_after_tokens_are_removed_by_the_name_of_phi_3() -> None:
    tokens = [added("<unk>", 0), added("<s>", 1), added("</s>", 2, rstrip=True), added("<|endoftext|>", 3)]
    phi = {"model": {"vocab": {}}, "added_tokens": [*tokens, added("<|user|>", 4, rstrip=True)]}
    assert strips_as_phi3(phi)
    assert not strips_as_phi3(phi | {"added_tokens": [*tokens, added("<|user|>", 4)]})
    assert not strips_as_phi3(phi | {"added_tokens": tokens[:2]})
    assert "phi-3" in file_name("Phi 3 mini", strips=True).lower()
    assert "phi-3" not in file_name("my-phi-3", strips=False).lower()
    assert "phi3" not in file_name("my-Phi3", strips=False).lower()


def test_added_tokens_of_the_vocabulary_are_searched_for() -> None:
    tokens = [added("<s>", 0, special=True), added("ily", 1), added("\u2581\u2581", 2), added("<a>", 3, special=True)]
    assert added_kinds({"added_tokens": [*tokens, added("<0x0A>", 4)]}, [3, 1, 1, 4, 6]) == {1: 4, 3: 3}
