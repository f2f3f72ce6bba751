"""Rules about other programs: a finding where a program is wrong, none where it is right, and none after mending."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunekit.model.storage import supported
from tunekit.model.storage.portable import ModelFiles, make_portable, portable, read_model_files
from tunekit.model.storage.programs import PARTIAL, THETA, readings

ROPE = {"rope_type": "default", "rope_theta": 5e4}
IDS = {"<pad>": 0, "</s>": 2, "<|im_end|>": 3}
OLD = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 5e4, "eos_token_id": 2}
TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
RIGHT = ModelFiles(OLD, TOKENIZER, {"eos_token_id": 2}, None, {}, IDS)
BOTH = {"transformers 4", "ONNX (optimum)"}
WRONG_THETA = "the model is computed with rope_theta 10000.0 instead of 50000.0"


def config(**changes: Any) -> ModelFiles:
    return replace(RIGHT, config={**{key: value for key, value in OLD.items() if key != "rope_theta"}, **changes})


def tokenizer(template: str | None = None, **changes: Any) -> ModelFiles:
    return replace(RIGHT, tokenizer={**TOKENIZER, **changes}, template=template)


def typed(kind: str, architecture: str, **changes: Any) -> ModelFiles:
    return config(model_type=kind, architectures=[architecture], **changes)


# files -> the programs that read them wrongly, a part of the reason, and whether a copy mends it
CASES: dict[str, tuple[ModelFiles, set[str], str, bool]] = {
    "rope": (config(rope_parameters=ROPE), {*BOTH, "mlx-lm", "Ollama"}, WRONG_THETA, True),
    "rope of a part": (
        typed("llava", "LlavaForConditionalGeneration", text_config={"model_type": "llama", "rope_parameters": ROPE}),
        {"transformers 4", "mlx-lm"},  # optimum has no llava
        "text_config.rope_parameters is not read, so " + WRONG_THETA,
        True,
    ),
    "scaling": (
        config(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
        {*BOTH, "mlx-lm", "Ollama"},
        "computed without rope_scaling",
        True,
    ),
    "required": (typed("granite", "GraniteForCausalLM", rope_parameters=ROPE), {"mlx-lm"}, "granite needs", True),
    "no default": (
        typed("qwen2", "Qwen2ForCausalLM", rope_parameters={**ROPE, "rope_theta": 1e6}),
        {"Ollama"},
        "with rope_theta 0.0 instead of 1000000.0",
        True,
    ),
    "sliding": (
        typed(
            "gemma3_text",
            "Gemma3ForCausalLM",
            rope_parameters={"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 5e3}},
        ),
        {*BOTH, "mlx-lm", "Ollama"},
        "with rope_local_base_freq 10000.0 instead of 5000.0",
        True,
    ),
    "infinity": (
        typed("mamba2", "Mamba2ForCausalLM", hidden_size=8, time_step_limit=[0.0, {"__float__": "Infinity"}]),
        {"transformers 4"},  # optimum has no mamba2
        "time_step_limit",
        True,
    ),
    "packed": (
        config(rope_theta=5e4, quantization_config={"quant_method": "bitsandbytes"}),
        {"mlx-lm", "llama.cpp's converter"},
        "--onto dequantized",
        False,
    ),
    "class": (tokenizer(tokenizer_class="TokenizersBackend"), BOTH, "class TokenizersBackend", True),
    "newer class": (tokenizer(tokenizer_class="Siglip2Tokenizer"), BOTH, "class Siglip2Tokenizer", False),
    "list": (tokenizer(extra_special_tokens=["<x>"]), BOTH, "extra_special_tokens is a list", True),
    "padding": (tokenizer(pad_token=None), {*BOTH, "transformers 5"}, "has no pad_token", True),
    "template": (tokenizer("{{ new }}"), {"Ollama"}, "it is in chat_template.jinja", True),
    "other template": (
        tokenizer("{{ new }}", chat_template="{{ old }}"),
        {"Ollama", "llama.cpp's converter"},
        "although chat_template.jinja has a different one",
        True,
    ),
    "endless": (
        replace(RIGHT, generation={"temperature": 0.6}),
        {*BOTH, "transformers 5"},
        "generation_config.json has no eos_token_id",
        True,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_reading_is_found_and_mended(name: str) -> None:
    files, programs, reason, mendable = CASES[name]
    found = [finding for each in readings(files) for finding in each.findings if reason in finding.what]
    assert {finding.program for finding in found} == programs
    assert {finding.mendable for finding in found} == {mendable}
    mended = [finding for each in readings(portable(files)) for finding in each.findings]
    assert [finding.what for finding in mended] == ([] if mendable else [finding.what for finding in found])
    assert portable(portable(files)) == portable(files)


SAME = {**ROPE, "rope_theta": 1e4}
EITHER = {"full_attention": {"rope_theta": 1.6e5}, "sliding_attention": {"rope_theta": 1e4}}
UNHARMED = {
    "older keys": RIGHT,
    "their default": typed("mistral", "MistralForCausalLM", rope_parameters=SAME),
    "a default that is not 10000": typed("mixtral", "-", rope_parameters={**ROPE, "rope_theta": 1e6}),
    "defaults of two types of layers": typed("modernbert", "-", rope_parameters=EITHER),
    "of a share of the head": typed("gpt_neox", "-", rope_parameters={**SAME, "partial_rotary_factor": 0.25}),
    "one template twice": tokenizer("{{ one }}", chat_template="{{ one }}"),
    "only the tokenizer's template": tokenizer(chat_template="{{ one }}"),
    "derived settings": replace(RIGHT, generation={"_from_model_config": True}),
    "no settings": replace(RIGHT, generation={}),
    "the tokens in their older file": replace(tokenizer(pad_token=None), special={"pad_token": {"content": "<pad>"}}),
    "no text": ModelFiles({"model_type": "vit", "architectures": ["ViTModel"]}, {}, {}, None, {}, {}),
}


@pytest.mark.parametrize("name", UNHARMED)
def test_no_finding_where_a_program_is_right(name: str) -> None:
    found = [finding for each in readings(UNHARMED[name]) for finding in each.findings]
    assert [finding for finding in found if (name, finding.program) != ("of a share of the head", "mlx-lm")] == []


def test_a_model_that_a_program_does_not_know_is_no_finding() -> None:
    files = typed("new-model", "NewForCausalLM", rope_parameters=ROPE, auto_map={"AutoModel": "code.Model"})
    by_program = {each.program: each for each in readings(files)}
    assert all(not each.findings for each in by_program.values())
    known = {name for name, each in by_program.items() if each.unsupported is None}
    assert known == {"vLLM"}
    assert "does not run the folder's own code" in str(by_program["transformers 4"].unsupported)


@pytest.mark.parametrize(
    ("outer", "inner", "unknown"),
    [
        ("SmolVLMForConditionalGeneration", ["VLlama3ForCausalLM"], None),
        ("SmolVLMForConditionalGeneration", None, "SmolVLMForConditionalGeneration"),
        ("LlavaForConditionalGeneration", ["NewForCausalLM"], "NewForCausalLM"),
        ("LlavaForConditionalGeneration", [], None),
    ],
)
def test_llama_cpp_reads_a_composite_model_by_its_text_part(outer: str, inner: object, unknown: str | None) -> None:
    files = typed("any", outer, text_config={"architectures": inner})
    (reading,) = (each for each in readings(files) if each.program == "llama.cpp's converter")
    assert reading.unsupported == (unknown and f"does not know the architecture {unknown}")


def test_odd_values_are_no_fault_of_doctor() -> None:
    odd: list[Any] = [None, 5, "x", [], [1], {}, {"content": 5}, [{"name": 1}], {"1": 2}, True, float("nan")]
    keys = ("model_type", "architectures", "rope_parameters", "rope_scaling", "rope_theta", "text_config", "dtype")
    others = ("tokenizer_class", "pad_token", "eos_token", "chat_template", "extra_special_tokens", "eos_token_id")
    for value in odd:
        for key in (*keys, *others, "pad_token_id", "quantization_config", "full_attention"):
            for base in (OLD, {**OLD, "rope_parameters": ROPE}):
                nested = {**base, "rope_parameters": {**ROPE, key: value}, "text_config": {key: value}}
                for values in ({**base, key: value}, nested):
                    files = ModelFiles(values, {**TOKENIZER, key: value}, {key: value}, "t", {key: value}, IDS)
                    readings(portable(files))


def test_files_of_a_folder(tmp_path: Path) -> None:
    """The tokens' ids come from the tokenizer's configuration as transformers 4 writes it, else from tokenizer.json."""
    (tmp_path / "config.json").write_text(json.dumps(OLD))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 7, "content": "</s>"}, 3, {"id": 1}]}))
    assert read_model_files(tmp_path).ids == {"</s>": 7}
    decoder = {"added_tokens_decoder": {"9": {"content": "</s>"}, "x": {"content": "y"}, "4": 4}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(decoder))
    assert read_model_files(tmp_path).ids == {"</s>": 9}
    make_portable(tmp_path)
    files = read_model_files(tmp_path)
    assert files.tokenizer["pad_token"] == "</s>"
    assert files.generation == {"eos_token_id": 2, "pad_token_id": 9}


def test_new_generation_settings_keep_those_of_the_configuration() -> None:
    files = replace(RIGHT, config={**OLD, "max_length": 60, "num_beams": 4, "hidden_size": 8}, generation={})
    assert portable(files).generation == {"eos_token_id": 2, "pad_token_id": 0, "max_length": 60, "num_beams": 4}


def test_several_templates_stay() -> None:
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "old"}]
    alone = tokenizer(chat_template=named)
    assert portable(alone) == replace(alone, generation={"eos_token_id": 2, "pad_token_id": 0}, config=OLD)
    mended = portable(tokenizer("new", chat_template=named)).tokenizer["chat_template"]
    assert mended == [{"name": "default", "template": "new"}, named[0]]


SOURCES = {
    "TUNEKIT_TRANSFORMERS4": """
import inspect, json
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
theta, share = {}, {}
for name in CONFIG_MAPPING_NAMES:
    values = inspect.signature(CONFIG_MAPPING[name].__init__).parameters
    shares = (("partial_rotary_factor", share), ("rotary_pct", share))
    for key, into in (("rope_theta", theta), ("rotary_emb_base", theta), *shares):
        if key in values and values[key].default is not None:
            into[name] = values[key].default
print(json.dumps([sorted(CONFIG_MAPPING_NAMES), theta, share]))
""",
    "TUNEKIT_MLX": """
import importlib, inspect, json, pkgutil
import mlx_lm.models
from mlx_lm.utils import MODEL_REMAPPING
theta, names = {}, sorted(MODEL_REMAPPING)
for module in pkgutil.iter_modules(mlx_lm.models.__path__):
    if module.name == "olmo":  # needs a package of its own
        continue
    code = importlib.import_module(f"mlx_lm.models.{module.name}")
    if hasattr(code, "ModelArgs"):
        names.append(module.name)
        values = inspect.signature(code.ModelArgs).parameters
        if "rope_theta" in values and "rope_parameters" not in inspect.getsource(code):
            default = values["rope_theta"].default
            theta[module.name] = None if default is inspect.Parameter.empty else default
print(json.dumps([names, theta, {}]))
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("variable", SOURCES)
def test_the_names_and_defaults_are_those_of_the_programs(variable: str) -> None:
    python = os.environ.get(variable)
    if python is None:
        pytest.skip(f"no environment: {variable}=ENV/bin/python; see test_portable.py")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", SOURCES[variable]], env=env, capture_output=True, text=True, check=True)
    names, theta, share = json.loads(done.stdout.splitlines()[-1])
    if variable == "TUNEKIT_MLX":
        assert supported.MLX_LM - {"olmo"} == set(names)
        assert {name for name, value in theta.items() if value is None} <= supported.MLX_LM_NEEDS_THETA
        assert {name: value for name, value in theta.items() if value is not None}.items() <= (
            supported.MLX_LM_OWN_THETA.items()
        )
    else:
        assert set(names) == supported.TRANSFORMERS_4
        assert {name: supported.TRANSFORMERS_4_THETA.get(name, THETA) for name in theta} == theta
        # a factor of 4 in the one of images, and none of rotary embeddings
        assert {name: PARTIAL.get(name, 1.0) for name in share if name != "efficientloftr"} == {
            name: value for name, value in share.items() if name != "efficientloftr"
        }
