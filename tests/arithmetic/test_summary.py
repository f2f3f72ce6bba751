"""`tunekit adapter show`: folders of every method, ours and peft's, told without a base; what cannot be read at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters.test_folder import CONFIG, FACTS, PICKLE, Q0, TENSORS, copy_as_peft, make_adapter, make_llama, save
from tests.contract.test_layer_contract import METHODS, attach, make_base
from tests.support.peft_case import BASES, move_from_start
from tests.test_cli import run
from tunekit.adapters.attach import attach_adapter
from tunekit.arithmetic.summary import split_name, summarise_adapter
from tunekit.errors import AdapterError
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.reading.names import settings_class


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_adapter(rank_pattern={"v_proj": 2}), tmp_path_factory.mktemp("good") / "adapter")


def change(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))
    return folder


def change_tensor(folder: Path, key: str, action: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    tensors = load_file(folder / TENSORS)
    save_file(tensors | {key: action(tensors[key])}, folder / TENSORS)
    return folder


def test_a_lora_is_told_layer_by_layer(good: Path) -> None:
    summary = summarise_adapter(good)
    attached = make_adapter(rank_pattern={"v_proj": 2})
    assert (summary.method, summary.base, summary.revision, summary.fingerprint) == ("lora", "org/base", "r1", "abc")
    assert summary.ranks == {2: 2, 4: 2}
    assert summary.parameters == sum(p.numel() for p in attached.trained().values())
    assert summary.tensor_bytes == (good / TENSORS).stat().st_size
    assert (summary.dead, summary.not_finite, summary.faults) == ([], [], [])
    for layer in summary.layers:
        adapted = attached.layers[layer.name]
        assert layer.rank == adapted.target.r
        update, _ = adapted.merged(torch.zeros(adapted.target.out_features, adapted.target.in_features), None)
        assert layer.update_norm == pytest.approx(float(update.norm()), rel=1e-5)
        norms = [float(tensor.detach().norm()) for tensor in adapted.state().values()]
        assert layer.norm == pytest.approx(math.hypot(*norms), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_ours_is_told(method: str, tmp_path: Path) -> None:
    attached = attach(make_base("dense"), method)
    move_from_start(attached.trained().values(), 0.2, seed=6)
    summary = summarise_adapter(save(attached, tmp_path / "adapter"))
    held = {name for name, (_, slot) in attached.slots().items() if slot.kind != "resume"}
    assert len(summary.tensors) == len(held)
    assert (summary.faults, summary.not_finite) == ([], [])
    assert "layer" in {layer.name for layer in summary.layers}
    numbers = [t for t in attached.state(("trained", "saved")).values() if t.is_floating_point()]
    assert summary.parameters == sum(t.numel() for t in numbers)


def test_the_module_ends_where_the_methods_own_name_begins() -> None:
    assert split_name(Q0) == ("model.layers.0.self_attn.q_proj", "lora_A.weight")
    assert split_name("base_model.vblora_vector_bank") == ("", "vblora_vector_bank")
    assert split_name("base_model.model.lm_head.weight") == ("lm_head", "weight")
    assert split_name("base_model.model.h.0.base_layer.bias") == ("h.0", "base_layer.bias")
    assert split_name("prompt_embeddings") == ("", "prompt_embeddings")


def peft_configs() -> dict[str, Any]:
    peft = pytest.importorskip("peft")
    layers = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
    prompt = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    return {
        "lora": peft.LoraConfig(**layers, r=4),
        "pissa": peft.LoraConfig(**layers, r=4, init_lora_weights="pissa"),
        "adalora": peft.AdaLoraConfig(**layers, total_step=10),
        "loha": peft.LoHaConfig(**layers),
        "ia3": peft.IA3Config(**layers, feedforward_modules=[]),
        "boft": peft.BOFTConfig(**layers, boft_block_size=4),
        "prompt_tuning": peft.PromptTuningConfig(**prompt),
        "prefix_tuning": peft.PrefixTuningConfig(**prompt),
        "p_tuning": peft.PromptEncoderConfig(**prompt, encoder_hidden_size=8),
    }


NAMES = ["lora", "pissa", "adalora", "loha", "ia3", "boft", "prompt_tuning", "prefix_tuning", "p_tuning"]


@pytest.mark.parametrize("name", NAMES)
def test_every_folder_of_peft_is_told(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft_configs()[name]
    peft.get_peft_model(make_llama(), config).save_pretrained(str(tmp_path))
    summary = summarise_adapter(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    assert summary.peft_type == config.peft_type.value
    assert {t.name for t in summary.tensors} == set(tensors)
    assert summary.parameters == sum(t.numel() for t in tensors.values())
    for tensor in summary.tensors:
        assert tensor.norm == pytest.approx(float(tensors[tensor.name].norm()), rel=1e-5)
        assert tensor.zero == (not tensors[tensor.name].any())
    if name == "lora":
        assert len(summary.dead) == 4  # every B, which has not been trained
        assert {layer.update_norm for layer in summary.layers} == {0.0}
    if name == "pissa":
        assert "init_lora_weights" in summary.faults[0]


@pytest.mark.parametrize(
    ("method", "settings", "ranks"),
    [
        ("vera", {"target_modules": ["layers.0.self_attn.q_proj"]}, {4: 1}),
        ("loha", {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 2}}, {2: 2, 4: 2}),
        ("loha", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {4: 2}),
    ],
)
def test_ranks_are_counted_by_adapted_layers(
    method: str, settings: dict[str, Any], ranks: dict[int, int], tmp_path: Path
) -> None:
    made = settings_class("adapters", method)(r=4, **settings)
    attached = attach_adapter(BASES["llama"].make(), made, seed=1, head_name="lm_head")
    assert summarise_adapter(save(attached, tmp_path / "adapter")).ranks == ranks


def test_dead_and_not_finite_tensors_are_told(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_as_peft(good, tmp_path / "adapter")
    dead = Q0.replace("layers.0", "layers.1")
    change_tensor(folder, dead, torch.zeros_like)
    change_tensor(folder, Q0, lambda t: t.index_fill(0, torch.tensor([1]), math.nan))
    assert run(monkeypatch, "adapter", "show", str(folder), "--json", str(tmp_path / "out.json")) == 0
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["dead"] == [dead]
    assert told["not_finite"] == [Q0]
    layer = next(layer for layer in told["layers"] if layer["name"] == "model.layers.0.self_attn.q_proj")
    assert (layer["norm"], layer["update_norm"]) == (None, None)
    out, err = capsys.readouterr()
    assert f"1 all-zero tensors (at their initial value, or no longer trained): {dead}" in out
    assert f"1 tensors with NaN or infinity: {Q0}" in out
    assert f"this adapter cannot be loaded: {Q0} contains NaN or infinity" in err


def test_a_run_stands_for_its_result(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_as_peft(good, tmp_path / "adapter")
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "adapter", "show", str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    method = next(number for number, line in enumerate(lines) if "method" in line)
    assert "lora (peft type LORA)" in lines[method]  # module names are folded where the terminal is narrow
    layers = next(number for number, line in enumerate(lines) if "layers.0.self_attn" in line)
    assert method < layers < 20  # the summary is first, and short


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"r": 10**9}, None),
        ({"new_field": 1}, "new_field"),
        ({"peft_type": "NOVEL"}, "NOVEL"),
        ({"peft_type": ["x"]}, "not supported"),
        ({"base_model_name_or_path": 3}, "must be a text"),
        ({"alpha_pattern": {"q_proj": 8, ".*q_proj": 9}}, "different values"),
        ({"alpha_pattern": {"((.*)*)*z": 8}}, "alpha_pattern"),
        ({"target_modules": None}, "target_modules"),
    ],
)
def test_a_configuration_that_would_be_refused_is_a_fault(
    fields: dict[str, Any], fault: str | None, good: Path, tmp_path: Path
) -> None:
    summary = summarise_adapter(change(copy_as_peft(good, tmp_path / "adapter"), **fields))
    assert len(summary.tensors) == 8
    assert (fault is None and not summary.faults) or fault in " ".join(summary.faults)


def test_a_changed_file_is_a_fault(good: Path, tmp_path: Path) -> None:
    folder = copy_as_peft(good, tmp_path / "adapter")
    (folder / FACTS).write_bytes((good / FACTS).read_bytes())
    change_tensor(folder, Q0, lambda t: t + 1)
    assert summarise_adapter(folder).faults == [f"{TENSORS} is not the file that tunekit wrote"]


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), "is missing"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), f"contains no {TENSORS}"),
    "pickle": (lambda folder: (folder / TENSORS).rename(folder / PICKLE), "is a pickle"),
    "not JSON": (lambda folder: (folder / CONFIG).write_text("{"), "is not valid JSON"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[]"), "does not contain a JSON object"),
    "deep": (lambda folder: (folder / CONFIG).write_text('{"a":' * 100_000), "nested too deeply"),
    "truncated": (lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-5]), "truncated"),
    "empty": (lambda folder: (folder / TENSORS).write_bytes(b""), "truncated"),
    "huge header": (lambda folder: (folder / TENSORS).write_bytes(b"\xff" * 8 + b"{}"), "truncated"),
    "pointer": (lambda folder: (folder / TENSORS).write_text("version https://git-lfs.github.com"), "git-lfs"),
    "link": (
        lambda folder: ((folder / TENSORS).rename(folder / "x"), (folder / TENSORS).symlink_to(folder / "x")),
        "is a link",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_refused_by_name(name: str, good: Path, tmp_path: Path) -> None:
    folder = copy_as_peft(good, tmp_path / "adapter")
    action, words = BROKEN[name]
    action(folder)
    with pytest.raises(AdapterError, match=words):
        summarise_adapter(folder)


def test_no_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "adapter", "show", str(tmp_path / "none")) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path / 'none'}: is not an adapter folder; name a folder that contains adapter_config.json"
    ]


def test_experts_have_no_rank_of_their_tensors(tmp_path: Path) -> None:
    base = BASES["mixtral"]
    settings = LoraSettings(r=2, target_modules=("q_proj",), target_parameters=("gate_up_proj", "down_proj"))
    attached = attach_adapter(base.make(), settings, seed=1, head_name=base.head_name)
    summary = summarise_adapter(save(attached, tmp_path / "adapter"))
    told = {layer.name: (layer.rank, layer.update_norm) for layer in summary.layers}
    assert told["model.layers.0.self_attn.q_proj"] == (2, 0.0)
    assert told["model.layers.0.mlp.experts"] == (None, None)
    assert summary.parameters == sum(p.numel() for p in attached.trained().values())
    assert summary.ranks == {2: 2}
