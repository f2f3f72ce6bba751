"""A base and its GGUF file compute the same, also with unusual settings; other files are refused by name."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from tests.arithmetic.test_merge import write_base
from tunekit.errors import ModelError
from tunekit.export import export_verb
from tunekit.exports.format import Options
from tunekit.model.load import load_model, make_meta_model
from tunekit.model.quantized.weights import packed_layers, weight_of
from tunekit.model.storage import sidecar
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.recipe.model import ModelSection

CPU = torch.device("cpu")
IDS = torch.arange(3, 103)[None]
FULL, SLIDING = "full_attention", "sliding_attention"
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
YARN = {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0, "original_max_position_embeddings": 32}


def rope(theta: float, **others: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **others}


def partial(share: float) -> dict[str, Any]:
    return {"rope_parameters": rope(500.0, partial_rotary_factor=share), "partial_rotary_factor": share}


LONG = {
    **rope(500.0, partial_rotary_factor=1.0, original_max_position_embeddings=64),
    "rope_type": "longrope",
    "short_factor": [1 + 0.1 * pair for pair in range(8)],
    "long_factor": [2 + 0.3 * pair for pair in range(8)],
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": rope(500.0), "rms_norm_eps": 1e-3, "tie_word_embeddings": False}),
    "llama, wide heads": ("llama", {"head_dim": 32, "tie_word_embeddings": True}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "qwen2, yarn's factor": ("qwen2", {"rope_parameters": YARN | {"attention_factor": 0.7}}),
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen3": ("qwen3", {"head_dim": 32, "rope_parameters": rope(500.0), "tie_word_embeddings": True}),
    "qwen3, linear": ("qwen3", {"head_dim": 16, "rope_parameters": rope(500.0, factor=4.0) | {"rope_type": "linear"}}),
    "qwen3_moe": ("qwen3_moe", {**MOE, "head_dim": 16, "norm_topk_prob": True}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    "gemma2, theta": ("gemma2", {**GEMMA, "rope_parameters": rope(500.0)}),
    "gemma3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 7, "final_logit_softcapping": 2.0}),
    "gemma3, theta": (
        "gemma3_text",
        {**GEMMA, "num_hidden_layers": 7, "rope_parameters": {FULL: rope(700.0), SLIDING: rope(300.0)}},
    ),
    "gemma3, linear": (
        "gemma3_text",
        {
            **GEMMA,
            "layer_types": [SLIDING, FULL],
            "rope_parameters": {FULL: rope(700.0, factor=8.0) | {"rope_type": "linear"}, SLIDING: rope(1e4)},
        },
    ),
    "phi3, partial": ("phi3", {**partial(0.5), "sliding_window": None}),
    "phi3, window": ("phi3", {"sliding_window": 8}),
    "phi3, longrope": (
        "phi3",
        {"sliding_window": None, "original_max_position_embeddings": 64, "rope_parameters": LONG},
    ),
    "starcoder2": (
        "starcoder2",
        {"rope_parameters": rope(500.0), "norm_epsilon": 1e-3, "sliding_window": None, "tie_word_embeddings": False},
    ),
    "stablelm": ("stablelm", {**partial(0.5), "use_qkv_bias": True}),
    "stablelm, parallel": ("stablelm", {**partial(0.25), "use_parallel_residual": True}),
    "nemotron": ("nemotron", {**partial(0.25), "norm_eps": 1e-2}),
    "bloom": ("bloom", {"n_head": 8, "n_layer": 2, "layer_norm_epsilon": 1e-2}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 130}),
    "falcon": ("falcon", {"layer_norm_epsilon": 1e-2, "rope_parameters": rope(500.0)}),
    "falcon, all heads": ("falcon", {"multi_query": False}),
    "falcon 40B": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon 11B": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "mamba": ("mamba", {"intermediate_size": 128, "state_size": 8}),
    "lfm2": ("lfm2", {"rope_parameters": rope(500.0)}),
}


def section(name: Path, quantization: str = "none") -> ModelSection:
    return ModelSection(name_or_path=str(name), dtype="float32", quantization=quantization)


def write_file(folder: Path, kind: str, file_type: str = "F32", **settings: Any) -> Path:
    """A base in folder/base, and its file."""
    base = write_base(folder / "base", kind, **settings)
    export_verb(str(base), "gguf", str(folder / "base.gguf"), options=Options(type=file_type), certify=False)
    return folder / "base.gguf"


@torch.no_grad()
def logits(base: Path, quantization: str = "none") -> torch.Tensor:
    loaded: torch.Tensor = load_model(section(base, quantization), device=CPU).net(input_ids=IDS).logits
    return loaded


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_file_computes_what_the_folder_does(name: str, tmp_path: Path, installed: None) -> None:
    kind, settings = SETTINGS[name]
    file = write_file(tmp_path, kind, **settings)
    assert (logits(file) - logits(tmp_path / "base")).abs().max() < 1e-5
    planned = make_meta_model(section(file), device=CPU)
    assert planned.config.to_dict() == load_model(section(file), device=CPU).config.to_dict()


@pytest.mark.drawn
@pytest.mark.parametrize("kind", ["bloom", "gpt2", "falcon"])
def test_plan_counts_the_layers_that_stay_in_their_blocks(
    kind: str, tmp_path: Path, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of these types are in another order in the file, or its matrices are transposed."""
    shape = {"n_embd": 256, "n_head": 4, "n_layer": 2} if kind == "gpt2" else {"n_head": 4, "n_layer": 2}
    shape |= {"new_decoder_architecture": True, "num_kv_heads": 2} if kind == "falcon" else {}
    file = write_file(tmp_path, kind, "Q4_K_M", hidden_size=256, **shape)
    wanted = section(file, "kept")
    kept, dense = load_model(wanted, device=CPU), load_model(section(file), device=CPU)
    planned = make_meta_model(wanted, device=CPU)
    layers = packed_layers(kept.net)
    assert layers.keys() == packed_layers(planned.net).keys()
    assert len(layers) == 2 * 4
    for name, layer in layers.items():
        weight = weight_of(dense.net.get_submodule(name))
        assert weight is not None
        assert torch.equal(layer.dequantize(torch.float32), weight.read(torch.float32)), name
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sidecar, "MIN_BYTES", 0)
    streamed = load_model(wanted, device=CPU, streamed=True)
    assert streamed.mapped
    for name, layer in packed_layers(streamed.net).items():
        assert torch.equal(layer.get_buffer("packed"), layers[name].get_buffer("packed"))


@pytest.mark.parametrize(
    ("kind", "settings", "what"),
    [
        (
            "mixtral",
            {"num_local_experts": 4, "sliding_window": None},
            r"sets llama\.expert_count, which transformers",
        ),
        ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 48}, r"shapes transformers does not support"),
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 16}, "gpt-oss, whose experts transformers does not read"),
        ("granite", {"logits_scaling": 4.0}, "architecture granite is not supported"),
        ("olmo2", {}, "architecture olmo2 is not supported"),
    ],
)
@pytest.mark.drawn
def test_a_file_that_transformers_cannot_read_is_refused(
    kind: str, settings: dict[str, Any], what: str, tmp_path: Path, installed: None
) -> None:
    file = write_file(tmp_path, kind, **settings)
    with pytest.raises(ModelError, match=what):
        load_model(section(file), device=CPU)


def state(file: Path, key: str, value: bytes, kind: gguf.GGUFValueType) -> None:
    """Give a file a setting: in place of the same one, or before all others. A filler keeps the tensors aligned."""

    def field(name: str, number: int, content: bytes) -> bytes:
        return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", number) + content

    data, added = file.read_bytes(), field(key, kind, value)
    head = added[: -len(value)]
    if (place := data.find(head)) >= 0:
        file.write_bytes(data[:place] + added + data[place + len(added) :])
        return
    version, tensors, count = struct.unpack("<IQQ", data[4:24])
    size = -(len(added) + len(field("f", gguf.GGUFValueType.STRING, struct.pack("<Q", 0)))) % 32
    added += field("f", gguf.GGUFValueType.STRING, struct.pack("<Q", size) + b" " * size)
    file.write_bytes(data[:4] + struct.pack("<IQQ", version, tensors, count + 2) + added + data[24:])


NUMBER, TRUTH = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.BOOL


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory: pytest.TempPathFactory, installed: None) -> Path:
    return write_file(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize(
    ("key", "value", "kind", "what"),
    [
        ("llama.attention.value_length", struct.pack("<I", 8), NUMBER, "keys and values have different widths"),
        ("llama.attention.causal", b"\0", TRUTH, r"sets llama\.attention\.causal"),
        ("llama.attention.causal", b"\1", TRUTH, None),
        ("llama.attention.clamp_kqv", struct.pack("<I", 8), NUMBER, r"sets llama\.attention\.clamp_kqv"),
        ("llama.attention.sliding_window", struct.pack("<I", 8), NUMBER, r"sets llama\.attention\.sliding_window"),
        ("llama.attention.sliding_window_pattern", struct.pack("<I", 2), NUMBER, "sliding_window_pattern"),
        ("llama.expert_count", struct.pack("<I", 0), NUMBER, None),
        (
            "split.count",
            struct.pack("<H", 3),
            gguf.GGUFValueType.UINT16,
            "is only one of 3 parts of a model; join the parts",
        ),
        ("llama.rope.scaling.type", struct.pack("<Q", 7) + b"dynamic", gguf.GGUFValueType.STRING, r"\(dynamic\)"),
    ],
)
def test_a_setting_without_a_place_in_transformers_model_is_named(
    key: str, value: bytes, kind: gguf.GGUFValueType, what: str | None, llama_file: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copy(llama_file, tmp_path / "base.gguf"))
    state(file, key, value, kind)
    if what is None:
        make_meta_model(section(file), device=CPU)
        return
    with pytest.raises(ModelError, match=what):
        make_meta_model(section(file), device=CPU)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.999])
def test_a_file_that_ends_too_early_is_named(share: float, llama_file: Path, tmp_path: Path) -> None:
    data = llama_file.read_bytes()
    (tmp_path / "base.gguf").write_bytes(data[: int(share * len(data))])
    for read in (lambda: load_tokenizer(section(tmp_path / "base.gguf")), lambda: logits(tmp_path / "base.gguf")):
        with pytest.raises(ModelError, match=r"base\.gguf.* the file is damaged, or ends too early"):
            read()
