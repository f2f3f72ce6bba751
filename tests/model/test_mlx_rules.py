"""What mlx-lm computes otherwise than transformers, from the configuration alone."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from tunekit.model.storage import mlx_lm
from tunekit.model.storage.portable import ModelFiles, portable
from tunekit.model.storage.programs import Finding, readings
from tunekit.model.storage.windows import sliding_window

FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "max_position_embeddings": 512}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "long_factor": [2.0], "original_max_position_embeddings": 64}
BOTH_ROPES = {name: {"rope_type": "default", "rope_theta": theta} for name, theta in ((FULL, 5e4), (SLIDING, 5e5))}
PATTERN = [SLIDING, SLIDING, SLIDING, FULL]


def files(kind: str, **values: Any) -> ModelFiles:
    return ModelFiles({"model_type": kind, **SIZES, "rope_theta": 1e4, **values}, {}, {}, None, {}, {})


def findings(model: ModelFiles) -> list[Finding]:
    return [finding for each in readings(model) if each.program == "mlx-lm" for finding in each.findings]


def yarn(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": {**YARN, **values}}


# type, its values, and what remains in a mended copy
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "activation": ("llama", {"hidden_act": "gelu"}, "layers use silu instead of hidden_act gelu"),
    "of gemma": ("gemma2", {"hidden_activation": "silu"}, "layers use gelu instead of hidden_activation silu"),
    "scaling": (
        "mixtral",
        {"rope_parameters": {**YARN, "rope_type": "linear"}},
        "the linear scaling in rope_parameters is ignored",
    ),
    "attention factor": ("llama", yarn(attention_factor=0.8), "attention factor 1.139 instead of 0.8"),
    "one mscale": ("llama", yarn(mscale=2.0), "attention factor 1.277 instead of 1.139"),
    "truncate": ("llama", yarn(truncate=False), "limits of yarn's frequencies are rounded"),
    "null": ("llama", yarn(beta_fast=None), "beta_fast in rope_parameters is null"),
    "original length": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "original_max_position_embeddings 4096 instead of 512",
    ),
    "two frequencies": (
        "olmo3",
        {"rope_parameters": BOTH_ROPES, "layer_types": PATTERN},
        "one rope_theta, but rope_parameters has 50000.0 and 500000.0",
    ),
    "share of a head": ("glm", {"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
    "layers": ("gemma3_text", {"layer_types": [FULL, SLIDING, FULL, SLIDING]}, "layer_types cannot be computed"),
    "no full layer": ("gpt_oss", {"layer_types": [SLIDING]}, "a layer with full attention, but layer_types has none"),
    "required": ("minimax", {}, "minimax needs shared_intermediate_size, rotary_dim"),
    "other package": ("olmo", {}, "olmo needs d_model"),
    "experts": ("gpt_oss", {"layer_types": PATTERN}, "reads only weights in the format mxfp4"),
    "width": ("gpt_neox", {"rotary_emb_base": 1e4, "intermediate_size": 128}, "always uses 4 times hidden_size"),
    "biases": ("phimoe", {"attention_bias": True}, "lm_head_bias is False"),
    "soft caps": ("gemma2", {"attn_logit_softcapping": None}, "needs soft caps"),
    "of a part": (
        "llava",
        {"text_config": {"model_type": "mistral", "hidden_act": "relu"}},
        "instead of text_config.hidden_act relu",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_mlx_computes_wrongly_is_found_and_no_copy_mends_it(name: str) -> None:
    kind, values, what = WRONG[name]
    model = files(kind, **values)
    for each in (model, portable(model)):
        assert [(finding.mendable, finding.limit) for finding in findings(each) if what in finding.what] == [
            (False, False)
        ]


# type, its values, a part of the finding, and the keys that a copy has in addition
MENDED: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "experts": (
        "qwen3_moe",
        {"num_local_experts": 8},
        "qwen3_moe needs num_experts, head_dim",
        {"num_experts": 8, "head_dim": 16},
    ),
    "lfm2": ("lfm2", {}, "lfm2 needs block_dim", {"block_dim": 64}),
    "apertus": (
        "apertus",
        {},
        "mlp_bias, post_norm, qk_norm",
        {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    ),
    "letters": (
        "exaone4",
        {"layer_types": PATTERN, "sliding_window_pattern": 4, "head_dim": 16},
        "needs letters",
        {"sliding_window_pattern": "LLLG"},
    ),
    "period": (
        "gemma3_text",
        {"layer_types": PATTERN},
        "one of every 6 layers has full attention, but layer_types has one of every 4",
        {"sliding_window_pattern": 4},
    ),
}


@pytest.mark.parametrize("name", MENDED)
def test_a_copy_has_the_keys_that_follow_from_the_others(name: str) -> None:
    kind, values, what, added = MENDED[name]
    model = files(kind, **values)
    mended = portable(model)
    assert [finding.mendable for finding in findings(model) if what in finding.what] == [True]
    assert not findings(mended)
    assert mended.config.items() >= added.items()


LIMITS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "mistral": (
        "mistral",
        {"sliding_window": 200},
        "results are right up to 200 tokens: mlx-lm ignores the sliding window",
    ),
    "gemma2": (
        "gemma2",
        {"sliding_window": 200},
        "results are right up to 200 tokens: mlx-lm ignores the sliding window",
    ),
    "longer than any text": ("mistral", {"sliding_window": 512}, None),
    "qwen2": ("qwen2", {"sliding_window": 200, "use_sliding_window": True}, "results are right up to 200 tokens"),
    "not used": ("qwen2", {"sliding_window": 200, "use_sliding_window": False}, None),
    "not asked for": ("qwen3", {"sliding_window": 200}, None),
    "no layer": ("qwen2", {"sliding_window": 200, "use_sliding_window": True, "max_window_layers": 4}, None),
    "layers": ("mistral", {"sliding_window": 200, "layer_types": [FULL] * 4}, None),
    "a window of its own": ("olmo3", {"sliding_window": 200, "layer_types": PATTERN}, None),
    "long factors": (
        "phi3",
        {"rope_scaling": {**LONG, "short_factor": [1.0]}},
        "results are right only above 64 tokens",
    ),
    "same factors": ("phi3", {"rope_scaling": {**LONG, "short_factor": [2.0]}}, None),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_lengths_for_which_mlx_is_right(name: str) -> None:
    kind, values, what = LIMITS[name]
    stated = findings(portable(files(kind, **values)))
    assert [(finding.mendable, finding.limit) for finding in stated] == ([] if what is None else [(False, True)])
    assert what is None or stated[0].what.startswith(what)


def test_yarn_that_mlx_computes_is_no_finding() -> None:
    for values in ({}, {"attention_factor": 1.1386}, {"mscale": 0.7, "mscale_all_dim": 0.7}, {"beta_fast": 8.0}):
        assert not findings(portable(files("llama", **yarn(**values))))


def test_odd_values_have_no_window() -> None:
    for value in (None, True, 0, -1, "200", [200], 4.5):
        assert sliding_window({"sliding_window": value}) is None


FILES = """
import importlib, inspect, json
from mlx_lm.utils import MODEL_REMAPPING
required, windows = {}, {}
for kind in KINDS:
    if kind == "olmo":  # needs a package of its own
        continue
    name = kind.removesuffix("_text").replace("qwen3_vl_moe", "qwen3_moe")
    file = MODEL_REMAPPING.get(name, name)
    code = importlib.import_module(f"mlx_lm.models.{file}")
    values = inspect.signature(code.ModelArgs).parameters
    required[kind] = [key for key, value in values.items() if value.default is inspect.Parameter.empty]
    windows[kind] = "sliding_window" in inspect.getsource(code)
print(json.dumps([required, windows]))
"""


@pytest.mark.slow
def test_the_tables_are_those_of_the_files() -> None:
    """Of mlx-lm's llama, which reads mistral too, only layer_types asks for a window."""
    python = os.environ.get("TUNEKIT_MLX")
    if python is None:
        pytest.skip("no environment: TUNEKIT_MLX=ENV/bin/python")
    script = f"KINDS = {sorted(mlx_lm.REQUIRED.keys() | mlx_lm.WINDOWLESS)!r}" + FILES
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", script], env=env, capture_output=True, text=True, check=True)
    required, windows = json.loads(done.stdout.splitlines()[-1])
    for kind, keys in mlx_lm.REQUIRED.items():
        assert kind == "olmo" or set(keys.split()) <= set(required[kind])
    assert {kind for kind in mlx_lm.WINDOWLESS if windows[kind]} == {"mistral"}
