"""A base read straight from its files, against from_pretrained bit for bit, on every architecture the tests build."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.architectures.tiny import write_tiny
from tests.model.test_families import MODELS, make_net
from tests.model.test_other_families import MAKERS
from tests.support.plans import make_plan
from tests.support.train_case import write_recipe
from tunekit.errors import ModelError
from tunekit.memory.streaming import base_obstacle
from tunekit.model.families import make_family
from tunekit.model.load import load_model, make_meta_model
from tunekit.model.storage.reading import BaseReader, fill_net, load_generation_config, open_base, unfilled_net
from tunekit.model.storage.source import ModelSource
from tunekit.model.transformers_guard import quiet
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection

KINDS: dict[str, Callable[[], nn.Module]] = {name: lambda name=name: make_net(name) for name in MODELS}
KINDS |= MAKERS
DTYPES = (torch.float32, torch.bfloat16)
ALIGNMENT_BYTES = 64


def auto_class(kind: str) -> Any:
    family = "seq2seq" if kind in ("t5", "bart") else "classifier" if kind in MAKERS else "causal"
    return make_family(family).auto_class()


def both(kind: str, folder: Path, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, BaseReader | None]:
    """from_pretrained's net, an unfilled one, and its reader."""
    from transformers import AutoConfig

    with quiet():
        config = AutoConfig.from_pretrained(str(folder))
        theirs = auto_class(kind).from_pretrained(str(folder), dtype=dtype, attn_implementation="eager")
        ours = unfilled_net(auto_class(kind), config, dtype, "eager")
    return theirs, ours, open_base(ours, ModelSource(str(folder), folder), dtype)


def save(net: Any, folder: Path, **settings: Any) -> Path:
    with quiet():
        net.save_pretrained(folder, **settings)
    return folder


def assert_same(theirs: nn.Module, ours: nn.Module) -> None:
    """Names, values, dtypes, and which names share one tensor."""
    for listed in ("named_parameters", "named_buffers"):
        expected, found = (dict(getattr(net, listed)(remove_duplicate=False)) for net in (theirs, ours))
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", KINDS)
def test_filled_net_is_from_pretraineds_bit_for_bit(kind: str, tmp_path: Path) -> None:
    for stored in DTYPES:
        net = KINDS[kind]().to(stored)
        whole, shards = tmp_path / f"{stored}", tmp_path / f"{stored}-shards"
        save(net, whole)
        save(net, shards, max_shard_size="20KB")
        assert len(list(shards.glob("*.safetensors"))) > 1
        for folder in (whole, shards):
            for dtype in DTYPES:
                theirs, ours, reader = both(kind, folder, dtype)
                assert reader is not None
                assert all(parameter.is_meta for parameter in ours.parameters())
                fill_net(ours, reader)
                assert_same(theirs, ours)
                assert not any(tensor.data_ptr() % ALIGNMENT_BYTES for tensor in ours.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "bart", "bert"])
def test_generation_settings_are_from_pretraineds(kind: str, tmp_path: Path) -> None:
    folder = save(KINDS[kind](), tmp_path)
    for has_file in (True, False):
        if not has_file:
            (folder / "generation_config.json").unlink(missing_ok=True)
        theirs, ours, _ = both(kind, folder, torch.float32)
        with quiet():
            load_generation_config(ours, folder)
        expected = getattr(theirs, "generation_config", None)
        found = getattr(ours, "generation_config", None)
        assert (found is None) == (expected is None)
        assert found is None or found.to_dict() == expected.to_dict()


def test_views_are_the_file_and_reads_are_copies(tmp_path: Path) -> None:
    folder = save(make_net("llama").to(torch.bfloat16), tmp_path)
    stored = load_file(folder / "model.safetensors")
    _, _, reader = both("llama", folder, torch.float32)
    assert reader is not None
    name = "model.layers.1.mlp.down_proj.weight"
    view = reader.view(name)
    assert view.dtype == torch.bfloat16
    assert torch.equal(view, stored[name])
    assert reader.view(name).data_ptr() == view.data_ptr()
    with (folder / "model.safetensors").open("r+b") as file:  # a shared mapping shows what the file holds now
        header = reader.files.headers[name]
        file.seek(header.offset_bytes)
        file.write(b"\x00\x40")
    assert view[0, 0] == 2.0
    copy = reader.read(name, torch.float32)
    assert torch.equal(copy, view.float())
    copy.zero_()
    assert view.any()


def test_a_matrix_is_read_transposed_in_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(make_net("gpt2"), tmp_path)
    _, _, reader = both("gpt2", folder, torch.bfloat16)
    assert reader is not None
    name = "transformer.h.0.attn.c_attn.weight"  # (I, O)
    expected = reader.read(name, torch.bfloat16).t().contiguous()
    monkeypatch.setattr("tunekit.model.storage.mapped_files.CHUNK_BYTES", 300)
    found = torch.empty(expected.shape, dtype=torch.bfloat16)
    reader.read_into(name, found.t())
    assert torch.equal(found, expected)


def test_experts_in_pieces_are_read_into_their_places(tmp_path: Path) -> None:
    folder = save(make_net("mixtral"), tmp_path)
    theirs, _, reader = both("mixtral", folder, torch.float32)
    assert reader is not None
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert not reader.is_mapped(name)
    assert reader.is_mapped("model.norm.weight")
    assert torch.equal(reader.view(name), theirs.get_parameter(name))
    holder = torch.zeros(2, *reader.shape(name))
    reader.read_into(name, holder[1])  # a part of something larger
    assert torch.equal(holder[1], theirs.get_parameter(name))
    assert not holder[0].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_parts_of_a_tensor_are_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    folder = save(make_net("mixtral"), tmp_path)
    _, _, reader = both("mixtral", folder, dtype)
    assert reader is not None
    monkeypatch.setattr("tunekit.model.storage.reading.CHUNK_BYTES", 1000)
    for name in reader.names:
        parts = list(reader.parts(name, dtype))
        assert torch.equal(torch.cat(parts), reader.read(name, dtype).view(-1)), name
        assert max(part.nbytes for part in parts) <= 1000 or name.endswith(("gate_up_proj", "down_proj"))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bert"])
def test_a_prefix_may_be_missing_in_the_files(kind: str, tmp_path: Path) -> None:
    net: Any = KINDS[kind]()
    folder = save(net, tmp_path)
    stored = load_file(folder / "model.safetensors")
    prefix = f"{net.base_model_prefix}."
    save_file({name.removeprefix(prefix): value for name, value in stored.items()}, folder / "model.safetensors")
    theirs, ours, reader = both(kind, folder, torch.float32)
    assert reader is not None
    fill_net(ours, reader)
    assert_same(theirs, ours)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_tied_head_may_be_stored_too_if_it_is_the_same(tmp_path: Path) -> None:
    folder = save(make_net("gemma"), tmp_path)

    def add(stored: dict[str, torch.Tensor]) -> None:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()

    change_tensors(folder, add)
    theirs, ours, reader = both("gemma", folder, torch.float32)
    assert reader is not None
    fill_net(ours, reader)
    assert_same(theirs, ours)
    change_tensors(folder, lambda stored: stored["lm_head.weight"].add_(1))
    assert both("gemma", folder, torch.float32)[2] is None  # from_pretrained leaves them untied


def test_only_the_head_of_a_tied_pair_may_be_stored(tmp_path: Path) -> None:
    folder = save(make_net("gemma"), tmp_path)
    change_tensors(folder, lambda stored: stored.update({"lm_head.weight": stored.pop("model.embed_tokens.weight")}))
    theirs, ours, reader = both("gemma", folder, torch.float32)
    assert reader is not None
    fill_net(ours, reader)
    assert_same(theirs, ours)


def test_computed_buffers_in_old_files_are_passed_over(tmp_path: Path) -> None:
    folder = save(make_net("llama"), tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda stored: stored.update({name: torch.ones(4)}))
    theirs, ours, reader = both("llama", folder, torch.float32)
    assert reader is not None
    fill_net(ours, reader)
    assert_same(theirs, ours)


def drop(stored: dict[str, torch.Tensor]) -> None:
    del stored["model.norm.weight"]


def reshape(stored: dict[str, torch.Tensor]) -> None:
    stored["model.norm.weight"] = stored["model.norm.weight"][:-1].clone()


def rename(stored: dict[str, torch.Tensor]) -> None:
    stored["model.norm.gamma"] = stored.pop("model.norm.weight")


def add(stored: dict[str, torch.Tensor]) -> None:
    stored["model.more.weight"] = torch.ones(3)


def twice(stored: dict[str, torch.Tensor]) -> None:
    stored["norm.weight"] = stored["model.norm.weight"] + 1


@pytest.mark.parametrize("change", [drop, reshape, rename, add, twice])
def test_files_that_do_not_cover_the_net_exactly_are_left_to_from_pretrained(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    from transformers import AutoConfig

    folder = save(make_net("llama"), tmp_path)
    change_tensors(folder, change)
    net = unfilled_net(auto_class("llama"), AutoConfig.from_pretrained(folder), torch.float32, "eager")
    assert open_base(net, ModelSource(str(folder), folder), torch.float32) is None


@pytest.mark.parametrize(
    ("kind", "dtype"), [("t5", torch.float16), ("deepseek_v3", torch.bfloat16), ("afmoe", torch.float16)]
)
def test_what_transformers_keeps_in_float32_is_float32_here_too(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Such as the weights and biases of a router. Otherwise, plan allowed a streamed base that could not be loaded."""
    folder = save(KINDS["t5"](), tmp_path) if kind == "t5" else write_tiny(kind, tmp_path)
    theirs, ours, reader = both(kind, folder, dtype)
    assert reader is not None
    fill_net(ours, reader)
    assert_same(theirs, ours)
    assert torch.float32 in {tensor.dtype for tensor in ours.state_dict().values()}


def test_a_planned_net_has_the_float32_parts_of_the_loaded_one(tmp_path: Path) -> None:
    section = ModelSection(name_or_path=str(write_tiny("deepseek_v3", tmp_path)), dtype="bfloat16")
    planned = make_meta_model(section, device=torch.device("cpu"))
    loaded = load_model(section, device=torch.device("cpu"), streamed=True)
    dtypes = [{name: tensor.dtype for name, tensor in base.net.state_dict().items()} for base in (planned, loaded)]
    assert dtypes[0] == dtypes[1]
    assert torch.float32 in dtypes[0].values()
    assert base_obstacle(planned, section) is None


def test_plan_refuses_to_stream_files_that_only_transformers_can_read(tmp_path: Path, tiny_llama: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_llama, folder)
    change_tensors(folder, add)
    plan, _ = make_plan(load_recipe(write_recipe(tmp_path, folder, memory={"streaming": "disk"})))
    assert [refusal.key for refusal in plan.refusals] == ["memory.streaming"]
    assert "have other names or shapes than the net's parameters" in plan.refusals[0].message


def test_a_file_that_shrinks_meanwhile_is_an_error(tmp_path: Path) -> None:
    folder = save(make_net("llama"), tmp_path)
    _, _, reader = both("llama", folder, torch.float32)
    assert reader is not None
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    last = max(reader.names, key=lambda name: reader.files.headers[name].offset_bytes)
    with pytest.raises(ModelError, match="ends before its last tensor"):
        reader.read(last)


def test_the_configuration_is_left_alone(tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = save(make_net("llama"), tmp_path)
    config = AutoConfig.from_pretrained(folder)
    before = json.dumps(config.to_dict(), sort_keys=True, default=str)
    unfilled_net(auto_class("llama"), config, torch.bfloat16, "eager")
    assert json.dumps(config.to_dict(), sort_keys=True, default=str) == before
    shutil.rmtree(folder)
