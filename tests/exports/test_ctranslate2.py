"""`--to ctranslate2`: what it cannot convert, and its own log-probabilities of text and speech models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.arithmetic.test_merge import write_base
from tests.support.programs import needs
from tests.support.train_case import write_recipe
from tunekit.errors import InputError
from tunekit.export import CERTIFICATE, export_verb
from tunekit.exports import ctranslate2 as module
from tunekit.exports import whole_model
from tunekit.exports.format import Options
from tunekit.exports.programs.program import Program
from tunekit.exports.settings import ignored_problems


def test_the_program_is_needed(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_model, "find_program", lambda name: None)
    with pytest.raises(InputError, match=r"is not installed; install it with: python -m .* ctranslate2"):
        export_verb(str(tiny_llama), "ctranslate2", str(tmp_path / "out"))


def test_unknown_types(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both problems at once: the type of the weights, and a model that the converter does not know."""
    monkeypatch.setattr(whole_model, "find_program", lambda name: Program(name, "1", Path()))
    monkeypatch.setattr(module, "MODEL_TYPES", "whisper")
    with pytest.raises(InputError) as error:
        export_verb(str(tiny_llama), "ctranslate2", str(tmp_path / "out"), options=Options(type="Q4_K_M"))
    texts = [str(problem) for problem in error.value.problems]
    assert any("does not read models of type llama" in text for text in texts)
    assert any("--type: Q4_K_M is unknown; choose float32" in text for text in texts)


@pytest.mark.parametrize(
    ("config", "written"),
    [({}, "float32"), ({"dtype": "float64"}, "float32"), ({"dtype": "float16"}, "float16"),
     ({"torch_dtype": "bfloat16"}, "bfloat16")],
)  # fmt: skip
def test_the_weights_keep_their_type_if_the_program_has_it(config: dict[str, str], written: str) -> None:
    exportable: Any = SimpleNamespace(config=config)
    assert module.weight_type(exportable, Options()) == written
    assert module.weight_type(exportable, Options(type="int8")) == "int8"


def test_a_base_that_the_recipe_quantizes(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, model={"quantization": "nf4"})
    with pytest.raises(InputError, match=r"loads the base as nf4, .*; add model\.quantization=none to the command"):
        export_verb(str(recipe), "ctranslate2", str(tmp_path / "out"))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 10000.0}
GEMMA3 = {"head_dim": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": 6}


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (
            "bloom",
            {"apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm is True",
        ),
        (
            "falcon",
            {"activation": "gelu_new"},
            "activation is gelu_new in this base, and CTranslate2 computes with gelu",
        ),
        ("falcon", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rope_theta is 500.0"),
        ("falcon", {"multi_query": False}, "parallel_attn is True"),
        ("gemma", {"hidden_act": "silu"}, "computes with gelu_pytorch_tanh or gelu_new"),
        ("gemma", {"attention_bias": True}, "attention_bias is True"),
        ("gemma3_text", {**GEMMA3, "query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64"),
        ("gemma3_text", {**GEMMA3, "final_logit_softcapping": 5.0}, "final_logit_softcapping is 5.0"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt_bigcode", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is gelu"),
        ("llama", {"head_dim": 32}, "head_dim is 32"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope_type is llama3"),
    ],
)
def test_settings_that_ctranslate2_ignores(kind: str, settings: dict[str, Any], words: str) -> None:
    """In each of these cases CTranslate2 4.8.5 computes other log-probabilities than torch, or its converter fails."""
    shape = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}
    config = {"model_type": kind, **shape, **settings}
    (problem,) = set(ignored_problems("CTranslate2", module.ignored_settings(config)))
    assert words in problem.what
    assert not list(module.ignored_settings({"model_type": kind, **shape, **(GEMMA3 if kind == "gemma3_text" else {})}))


class TestProgram:
    pytestmark = needs("ctranslate2")

    @pytest.mark.parametrize("target", ["tiny_llama", "tuned_run", "tiny_whisper", "speech_run"])
    def test_certificate(self, target: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        path = tmp_path / "out"
        export_verb(str(request.getfixturevalue(target)), "ctranslate2", str(path), certify=True)
        part = json.loads((path / CERTIFICATE).read_text())["certificate"]["parts"]["float32"]
        assert part["largest"] < 1e-4
        assert part["greedy_differences"] == 0
        assert (path / "tokenizer.json").is_file()

    @pytest.mark.sampled(2)
    @pytest.mark.parametrize(
        ("kind", "settings"),
        [
            ("llama", {"rope_parameters": LLAMA3}),  # the converter leaves out its factor
            ("bloom", {"layer_norm_epsilon": 1e-2}),  # ... and the epsilon
            ("gemma3_text", {**GEMMA3, "rms_norm_eps": 1e-2, "sliding_window": 16}),
            ("mistral", {"sliding_window": 16}),
            ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
            ("falcon", {}),
        ],
    )
    def test_settings_that_are_right(
        self, kind: str, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The tokenizer names no unknown token, which CTranslate2 needs; windows are right for texts within them."""
        base, path = write_base(tmp_path / "base", kind, **settings), tmp_path / "out"
        export_verb(str(base), "ctranslate2", str(path), certify=True, overrides=["model.dtype=float32"])
        certificate = json.loads((path / CERTIFICATE).read_text())["certificate"]
        assert certificate["parts"]["float32"]["largest"] < 1e-4
        assert ("right for up to 16 tokens" in capsys.readouterr().out) == ("sliding_window" in settings)

    def test_int8_differs_by_its_rounding(self, tuned_run: Path, tmp_path: Path) -> None:
        path = tmp_path / "out"
        export_verb(str(tuned_run), "ctranslate2", str(path), options=Options(type="int8"), certify=True)
        part = json.loads((path / CERTIFICATE).read_text())["certificate"]["parts"]["int8"]
        assert 1e-3 < part["largest"] < 1
