"""Adapter folders: reproducible bytes, strict reading, and a list of malformed folders each refused by name."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tunekit.adapters.folder.read
from tests.support.peft_case import move_from_start
from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.folder.read import attach_adapter_folder, load_into, read_adapter_config, save_adapter_folder
from tunekit.errors import AdapterError, ResourceError
from tunekit.recipe.adapters.lora import LoraSettings

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
CONFIG, TENSORS, PICKLE, FACTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "tunekit.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def make_llama() -> nn.Module:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **heads)).eval()


def make_adapter(net: nn.Module | None = None, **values: Any) -> AttachedAdapter:
    settings = LoraSettings(**{"r": 4, "alpha": 6, "target_modules": ("q_proj", "v_proj"), **values})
    attached = attach_adapter(net or make_llama(), settings, seed=1, head_name="lm_head")
    move_from_start(attached.trained().values(), 0.2)
    return attached


def save(attached: AttachedAdapter, folder: Path, base_name: str = "org/base") -> Path:
    save_adapter_folder(attached, folder, base_name=base_name, base_fingerprint="abc", revision="r1")
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder by tunekit."""
    return save(make_adapter(), tmp_path_factory.mktemp("good") / "adapter")


def copy_as_peft(good: Path, folder: Path) -> Path:
    """The same folder as peft would leave it: without tunekit.json, so that no hash stops a change."""
    folder.mkdir()
    for name in (CONFIG, TENSORS):
        (folder / name).write_bytes((good / name).read_bytes())
    return folder


# Writing


def test_every_field_that_peft_writes_is_written(good: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    peft.get_peft_model(make_llama(), peft.LoraConfig(**fields)).save_pretrained(str(tmp_path))
    theirs = json.loads((tmp_path / CONFIG).read_text())
    ours = json.loads((good / CONFIG).read_text())
    assert ours.keys() == theirs.keys()
    theirs |= {"base_model_name_or_path": "org/base", "revision": "r1", "peft_version": ours["peft_version"]}
    theirs["target_modules"].sort()
    assert json.dumps(theirs, sort_keys=True) == json.dumps(ours, sort_keys=True)  # 0.0 is not 0 here
    assert load_file(good / TENSORS).keys() == load_file(tmp_path / TENSORS).keys()


SCRIPT = """
import sys, torch
from pathlib import Path
from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.read import save_adapter_folder
from tunekit.recipe.adapters.lora import LoraSettings
names = [f"block{i}.{own}" for i in range(3) for own in ("q_proj", "k_proj", "up_proj", "x.y_proj")]
net = torch.nn.Module()
for name in names:
    parent = net
    for part in name.split(".")[:-1]:
        if part not in dict(parent.named_children()):
            parent.add_module(part, torch.nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(name.split(".")[-1], torch.nn.Linear(8, 8))
settings = LoraSettings(r=4, exclude_modules=("block2.q_proj",), rank_pattern={"block1.q_proj": 2, "q_proj": 3})
attached = attach_adapter(net, settings, seed=1, head_name=None)
save_adapter_folder(attached, Path(sys.argv[1]), base_name="a/b", base_fingerprint=None, revision=None)
"""


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
        subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / seed)], check=True, env=environment)
    for name in (CONFIG, TENSORS, FACTS):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_a_local_base_has_its_absolute_path_for_peft_and_its_relative_one_in_our_facts(tmp_path: Path) -> None:
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    folder = save(make_adapter(init_from=str(tmp_path / "earlier")), run / "adapter", str(base))
    assert str(tmp_path) not in (folder / FACTS).read_text()
    assert json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] == str(base.resolve())
    assert json.loads((folder / FACTS).read_text())["base"]["path"] == "../../../models/base"
    assert read_adapter_config(folder).base_location() == str(base.resolve())
    os.rename(base, tmp_path / "gone")
    assert read_adapter_config(folder).base_location() is None


def test_what_the_folder_says_of_itself(good: Path) -> None:
    config = read_adapter_config(good)
    assert config.settings == LoraSettings(r=4, alpha=6, target_modules=("q_proj", "v_proj"))
    assert (config.base_location(), config.revision, config.base_fingerprint) == ("org/base", "r1", "abc")
    assert config.quantization == "none"


def test_an_adapter_folder_is_replaced_whole_and_others_never(tmp_path: Path) -> None:
    folder = save(make_adapter(), tmp_path / "adapter")
    first = (folder / TENSORS).read_bytes()
    save(make_adapter(r=2), folder)
    assert (folder / TENSORS).read_bytes() != first
    assert sorted(os.listdir(tmp_path)) == ["adapter"]
    for left_over in (".adapter.part-1", ".adapter.part-2.old"):  # of a killed process
        (tmp_path / left_over).mkdir()
        (tmp_path / left_over / TENSORS).write_bytes(b"1234")
    (tmp_path / ".adapter.part-3").mkdir()
    (tmp_path / ".adapter.part-3" / "notes.txt").write_text("mine")
    save(make_adapter(), folder)
    assert sorted(os.listdir(tmp_path)) == [".adapter.part-3", "adapter"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match=r"contains other files \(notes\.txt\)"):
        save(make_adapter(), folder)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterError, match="exists and is not a folder"):
        save(make_adapter(), tmp_path / "file")


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(make_adapter(), tmp_path / "adapter")
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def fail(kind: str, path: Path, action: Callable[[], Any]) -> Any:
        if kind == "write" and path.name == CONFIG:
            raise OSError(28, "No space left on device")
        return action()

    monkeypatch.setattr("tunekit.files.durable.perform", fail)
    with pytest.raises(ResourceError, match="no room"):
        save(make_adapter(r=2), folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    assert sorted(os.listdir(tmp_path)) == ["adapter"]


# Reading what is good


def test_half_precision_files_are_read_exactly(good: Path, tmp_path: Path) -> None:
    for number, dtype in enumerate((torch.float16, torch.bfloat16)):
        folder = copy_as_peft(good, tmp_path / str(number))
        halves = {name: tensor.to(dtype) for name, tensor in load_file(folder / TENSORS).items()}
        save_file(halves, folder / TENSORS)
        state = attach_adapter_folder(make_llama(), folder, head_name="lm_head").trained()
        for name, tensor in halves.items():
            own = state[name.removeprefix("base_model.model.")]
            assert own.dtype == torch.float32
            assert torch.equal(own, tensor.float())


def test_fields_without_effect_are_read_over(good: Path, tmp_path: Path) -> None:
    folder = copy_as_peft(good, tmp_path / "a")
    harmless = {
        "auto_mapping": {"base_model_class": "X", "parent_library": "os"},
        "runtime_config": {"ephemeral_gpu_offload": True},
        "peft_version": "9.9",
        "fan_in_fan_out": True,
        "init_lora_weights": "gaussian",
        "exclude_modules": [],
        "a_later_feature": None,
        "another": False,
        "inference_mode": False,
    }
    change_config(folder, **harmless)
    attach_adapter_folder(make_llama(), folder, head_name="lm_head")


def test_a_pickle_beside_safetensors_is_never_opened(good: Path, tmp_path: Path) -> None:
    folder = copy_as_peft(good, tmp_path / "a")
    os.mkfifo(folder / PICKLE)  # opening it would wait for ever
    attach_adapter_folder(make_llama(), folder, head_name="lm_head")


def test_a_meta_base_takes_a_real_adapter(good: Path) -> None:
    with torch.device("meta"):
        net = make_llama()
    attached = attach_adapter_folder(net, good, head_name="lm_head", device=torch.device("cpu"))
    assert not any(tensor.is_meta for tensor in attached.state().values())


def test_init_from_continues_only_the_same_adapter(good: Path) -> None:
    attached = make_adapter(dropout=0.1)
    expected = make_adapter().state()
    load_into(attached, good)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in attached.state().items())
    for values, words in (
        ({"r": 2}, "has rank 4 and alpha 6.0 in the folder, but 2 and 6.0 in the recipe"),
        ({"alpha": 7}, "but 4 and 7.0 in the recipe"),
        ({"use_rslora": True}, "use_rslora is False in the folder, but True in the recipe"),
        ({"target_modules": ("q_proj",)}, "v_proj is adapted in the folder but not in the recipe"),
        ({"target_modules": ("q_proj", "v_proj", "k_proj")}, "k_proj is adapted in the recipe but not in the folder"),
    ):
        with pytest.raises(AdapterError, match=words):
            load_into(make_adapter(**values), good)


# Reading what is not


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def write_header(folder: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_text(folder: Path, old: str, new: str) -> None:
    path = folder / CONFIG
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def link(folder: Path, name: str) -> None:
    os.rename(folder / name, folder / "elsewhere")
    os.symlink(folder / "elsewhere", folder / name)


def instead(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    (folder / name).unlink()
    make(folder / name)


class Bomb:
    def __reduce__(self) -> Any:
        return (os.system, ("touch exploded",))


NORM = "base_model.model.model.norm.weight"
SHAPED = {Q0: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}
Damage = Callable[[Path], object]
CONFIG_DAMAGE: dict[str, tuple[Damage, str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "adapter_config.json: is missing"),
    "config is a link": (lambda f: link(f, CONFIG), "is a link"),
    "config is a fifo": (lambda f: instead(f, CONFIG, os.mkfifo), "not a regular file"),
    "config is a folder": (lambda f: instead(f, CONFIG, os.mkdir), "not a regular file"),
    "config is not utf-8": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe{}"), "not valid JSON"),
    "config is empty": (lambda f: (f / CONFIG).write_bytes(b""), "not valid JSON"),
    "config is a list": (
        lambda f: (f / CONFIG).write_text("[]"),
        "does not contain a JSON object; copy the file again",
    ),
    "deep nesting": (lambda f: (f / CONFIG).write_text('{"r":' + "[" * 100_000 + "]" * 100_000 + "}"), "nested too"),
    "NaN literal": (lambda f: edit_text(f, '"lora_dropout": 0', '"lora_dropout": NaN'), "literal NaN"),
    "infinite number": (lambda f: edit_text(f, '"lora_alpha": 6', '"lora_alpha": 1e999'), "infinite"),
    "5000 digits": (lambda f: edit_text(f, '"r": 4', '"r": ' + "9" * 5000), "number of 5000 digits"),
    "duplicate key": (lambda f: edit_text(f, '"r": 4', '"r": 4, "r": 8'), "the key 'r' appears twice"),
    "huge config": (lambda f: (f / CONFIG).write_bytes(b" " * (17 * 2**20)), "at most"),
    "no type": (lambda f: change_config(f, peft_type=None), "adapters of type None"),
    "another type": (lambda f: change_config(f, peft_type="POLY"), "peft_type: adapters of type POLY"),
    "type is a list": (lambda f: change_config(f, peft_type=["LORA"]), "peft_type"),
    "rank bomb": (lambda f: change_config(f, r=10**9), "1000000000 is too large|malformed"),
    "rank zero": (lambda f: change_config(f, r=0), "r: malformed"),
    "rank is a text": (lambda f: change_config(f, r="4"), "r: malformed"),
    "rank is true": (lambda f: change_config(f, r=True), "r: malformed"),
    "alpha is negative": (lambda f: change_config(f, lora_alpha=-1), "lora_alpha: malformed"),
    "no targets": (lambda f: change_config(f, target_modules=None), "target_modules: malformed"),
    "targets are numbers": (lambda f: change_config(f, target_modules=[1]), "target_modules: malformed"),
    "targets match nothing": (lambda f: change_config(f, target_modules=["xyz"]), "the base has no layer"),
    "hostile target": (lambda f: change_config(f, target_modules="((((a|a)*)*)*)*" * 9 + "!"), "target_modules"),
    "hostile rank": (lambda f: change_config(f, rank_pattern={"(.*.*)*" * 9 + "!": 2}), "rank_pattern.*too many"),
    "list for a mapping": (lambda f: change_config(f, rank_pattern=[]), "rank_pattern.*malformed.*dictionary"),
    "text for a mapping": (lambda f: change_config(f, alpha_pattern=""), "alpha_pattern.*malformed.*dictionary"),
    "mapping for a list": (lambda f: change_config(f, target_modules={}), "target_modules.*malformed"),
    "text for a list": (lambda f: change_config(f, layers_to_transform=""), "layers_to_transform.*malformed"),
    "rivals": (lambda f: change_config(f, alpha_pattern={"q_proj": 1, "self_attn.q_proj": 2}), "both match"),
    "DoRA": (lambda f: change_config(f, use_dora=True), "lora_magnitude_vector' is missing"),
    "modules to save": (
        lambda f: change_config(f, modules_to_save=["lm_head"]),
        r"'base_model\.model\.lm_head\.weight' is missing",
    ),
    "bias": (lambda f: change_config(f, bias="some"), "bias"),
    "lora_bias": (lambda f: change_config(f, lora_bias=True), r"lora_B\.bias' is missing"),
    "layers": (lambda f: change_config(f, layers_to_transform=[0]), r"layers\.1\..*is not a tensor of this adapter"),
    "parameters": (lambda f: change_config(f, target_parameters=["experts.down_proj"]), "target_parameters"),
    "tokens": (lambda f: change_config(f, trainable_token_indices=[1]), "trainable_tokens_delta. is missing"),
    "PiSSA": (lambda f: change_config(f, init_lora_weights="pissa"), "init_lora_weights: .*pissa"),
    "aLoRA": (lambda f: change_config(f, alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "unknown field": (lambda f: change_config(f, a_later_feature=3), "a_later_feature: .*3"),
    "other task": (lambda f: change_config(f, task_type="DANCING"), "task_type: .*DANCING"),
    "base is a list": (lambda f: change_config(f, base_model_name_or_path=[1]), "base_model_name_or_path"),
    "facts are no JSON": (lambda f: (f / FACTS).write_text("{"), "tunekit.json.*not valid JSON"),
    "newer facts": (lambda f: (f / FACTS).write_text('{"format_version": 99}'), "format version 99; update"),
    "only a pickle": (
        lambda f: (os.remove(f / TENSORS), (f / PICKLE).write_bytes(pickle.dumps(Bomb()))),
        "adapter_model.bin: is a pickle",
    ),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "contains no adapter_model.safetensors"),
}
HEADER_DAMAGE: dict[str, tuple[Damage, str]] = {
    "tensors are a link": (lambda f: link(f, TENSORS), "is a link"),
    "dangling link": (lambda f: instead(f, TENSORS, lambda p: os.symlink("/nowhere", p)), "is a link"),
    "tensors are a fifo": (lambda f: instead(f, TENSORS, os.mkfifo), "not a regular file"),
    "tensors are a folder": (lambda f: instead(f, TENSORS, os.mkdir), "not a regular file"),
    "empty": (lambda f: (f / TENSORS).write_bytes(b""), "truncated"),
    "lfs pointer": (lambda f: (f / TENSORS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git-lfs"),
    "web page": (lambda f: (f / TENSORS).write_bytes(b"<!DOCTYPE html><html></html>"), "web page"),
    "pickle in disguise": (lambda f: (f / TENSORS).write_bytes(pickle.dumps(Bomb()) + b" " * 40), "is a pickle"),
    "header of 2^63": (lambda f: (f / TENSORS).write_bytes(struct.pack("<Q", 2**63) + b"{}"), "truncated or not"),
    "header is no JSON": (lambda f: write_header(f, b"{{{{"), "not valid JSON"),
    "header twice the key": (lambda f: write_header(f, b'{"a": 1, "a": 1}'), "appears twice"),
    "entry malformed": (lambda f: write_header(f, {"a": {"dtype": "F32"}}), "entry 'a' is malformed"),
    "negative size": (
        lambda f: write_header(f, {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}),
        "malformed",
    ),
    "shape bomb": (lambda f: write_header(f, SHAPED, b"1234"), "malformed"),
    "unknown dtype": (
        lambda f: write_header(f, {"a": {"dtype": "F3", "shape": [], "data_offsets": [0, 4]}}),
        "unknown type F3",
    ),
    "truncated": (lambda f: os.truncate(f / TENSORS, (f / TENSORS).stat().st_size - 4), "truncated"),
    "extra bytes": (lambda f: (f / TENSORS).open("ab").write(b"1234"), "extra bytes"),
    "missing tensor": (lambda f: change_tensors(f, lambda t: t.pop(Q0)), "q_proj.lora_A.weight' is missing"),
    "missing half": (
        lambda f: change_tensors(f, lambda t: [t.pop(name) for name in list(t) if "layers.1" in name]),
        "layers.1.* is missing",
    ),
    "extra tensor": (
        lambda f: change_tensors(f, lambda t: t.update({Q0[:-7]: t[Q0].clone()})),
        "is not a tensor of this",
    ),
    "other shape": (lambda f: change_tensors(f, lambda t: t.update({Q0: torch.zeros(3, 32)})), r"shape \[3, 32\], exp"),
    "transposed": (lambda f: change_tensors(f, lambda t: t.update({Q0: t[Q0].T.contiguous()})), r"shape \[32, 4\]"),
    "integers": (lambda f: change_tensors(f, lambda t: t.update({Q0: t[Q0].to(torch.int8)})), "has type I8"),
    "base weight": (
        lambda f: change_tensors(f, lambda t: t.update({NORM: torch.zeros(32)})),
        "norm.weight' is not a tensor of this adapter .it would overwrite a weight of the base",
    ),
    "base layer": (
        lambda f: change_tensors(f, lambda t: t.update({Q0.replace("lora_A", "base_layer"): torch.zeros(32, 32)})),
        "would overwrite",
    ),
    "no prefix": (
        lambda f: change_tensors(f, lambda t: t.update({Q0[17:]: t.pop(Q0)})),
        "lacks the prefix base_model.model.",
    ),
    "rank changed": (lambda f: change_config(f, r=8), r"shape \[4, 32\], expected \[8, 32\]"),
    "targets changed": (lambda f: change_config(f, target_modules=["q_proj", "k_proj"]), "k_proj.*is missing"),
}


def refuse(folder: Path, words: str) -> None:
    net = make_llama()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(AdapterError) as caught:
        attach_adapter_folder(net, folder, head_name="lm_head")
    message = str(caught.value)
    assert re.search(words, message, re.DOTALL), message
    assert str(folder) in message
    assert all(problem.file and len(str(problem)) < 1200 for problem in caught.value.problems)
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


DAMAGE = {**CONFIG_DAMAGE, **HEADER_DAMAGE}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_malformed_folder_is_refused_unread(
    name: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, words = DAMAGE[name]
    folder = copy_as_peft(good, tmp_path / "a")
    damage(folder)

    def never(*_: object, **__: object) -> None:
        pytest.fail("tensor data was read, or a tensor made")

    monkeypatch.setattr(tunekit.adapters.folder.read, "read_tensor", never)
    monkeypatch.setattr(tunekit.adapters.folder.read, "attach_adapter", never)
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    refuse(folder, words)
    assert time.process_time() - start < 5
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_tensors_are_refused(value: float, good: Path, tmp_path: Path) -> None:
    folder = copy_as_peft(good, tmp_path / "a")
    change_tensors(folder, lambda tensors: tensors[Q0].__setitem__((1, 2), value))
    refuse(folder, "q_proj.lora_A.weight contains NaN or infinity")


def test_a_changed_file_and_another_base_are_refused(good: Path, tmp_path: Path) -> None:
    folder = save(make_adapter(), tmp_path / "a")
    change_tensors(folder, lambda tensors: tensors[Q0].add_(1))
    refuse(folder, "is different from the file that tunekit wrote")
    (folder / FACTS).unlink()
    attach_adapter_folder(make_llama(), folder, head_name="lm_head")
    with pytest.raises(AdapterError, match="was trained on a different base"):
        attach_adapter_folder(make_llama(), good, head_name="lm_head", base_fingerprint="other")
    with pytest.raises(AdapterError, match="was trained on a different base"):
        load_into(make_adapter(), good, base_fingerprint="other")
    attach_adapter_folder(make_llama(), good, head_name="lm_head", base_fingerprint="abc")


def test_a_base_with_other_sizes_is_refused(good: Path) -> None:
    with torch.device("meta"):
        net = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 64}, num_attention_heads=4))
    with pytest.raises(AdapterError, match=r"expected \[4, 64\]"):
        attach_adapter_folder(net, good, head_name="lm_head")


def test_copies_of_embeddings_must_equal_the_bases_own(tmp_path: Path) -> None:
    folder = copy_as_peft(save(make_adapter(target_modules=("embed_tokens", "q_proj")), tmp_path / "o"), tmp_path / "a")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    own = make_llama().get_input_embeddings().weight.detach()
    change_tensors(folder, lambda tensors: tensors.update({key: own.clone()}))
    attach_adapter_folder(make_llama(), folder, head_name="lm_head")
    attach_adapter_folder(make_llama().to(torch.bfloat16), folder, head_name="lm_head")
    with torch.device("meta"):
        meta = make_llama()
    cpu = torch.device("cpu")
    with pytest.raises(AdapterError, match="which cannot be compared"):
        attach_adapter_folder(meta, folder, head_name="lm_head", device=cpu)
    attach_adapter_folder(meta, folder, head_name="lm_head", device=cpu, base_weight=lambda name: own)
    change_tensors(folder, lambda tensors: tensors[key].add_(1))
    refuse(folder, "contains a changed copy of the base's weight of 'model.embed_tokens'")
    change_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(100, 32)}))
    refuse(folder, "contains 3 new rows of 'model.embed_tokens' but none of the head")


def test_a_folder_that_is_none(tmp_path: Path, good: Path) -> None:
    os.symlink(good, tmp_path / "link")
    for folder in (tmp_path / "absent", good / CONFIG, tmp_path / "link"):
        with pytest.raises(AdapterError, match="is not an adapter folder"):
            read_adapter_config(folder)
