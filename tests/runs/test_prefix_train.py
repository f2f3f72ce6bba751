"""Prefix tuning and LLaMA-Adapter through the real loop, and from there: generation, folders, resume, other bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.loop_case import KEPT, assert_same_bits, check_four_steps, four_steps
from tests.support.peft_case import move_from_start
from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.folder.read import attach_adapter_folder, load_into, save_adapter_folder
from tunekit.errors import AdapterError
from tunekit.evaluation.probes import packing_leak
from tunekit.model.call import Call, calling
from tunekit.model.load import LoadedModel, load_model
from tunekit.recipe.adapters.llama_adapter import LlamaAdapterSettings
from tunekit.recipe.adapters.prefix import PrefixSettings
from tunekit.recipe.model import ModelSection

TEXT_IDS = tuple(range(40, 46))
METHODS: dict[str, Any] = {
    "text": PrefixSettings(num_virtual_tokens=6, init_ids=TEXT_IDS),
    "random": PrefixSettings(num_virtual_tokens=6, init="random"),
    "projection": PrefixSettings(num_virtual_tokens=6, prefix_projection=True, encoder_hidden_size=12),
    "llama_adapter": LlamaAdapterSettings(adapter_len=5),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", METHODS)
def test_four_steps(name: str, tiny_llama: Path) -> None:
    check_four_steps(tiny_llama, METHODS[name])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["text", "llama_adapter"])
def test_four_steps_on_a_quantized_base(name: str, storage: str, tiny_llama: Path) -> None:
    still = four_steps(tiny_llama, METHODS[name], 0.0, quantization=storage)
    case = four_steps(tiny_llama, METHODS[name], quantization=storage, checkpointed=1)
    still.run()
    case.run()
    assert case.losses[-1] < still.losses[-1]
    assert all(torch.isfinite(tensor).all() for tensor in case.state().values())


def base_and_adapter(folder: Path, name: str) -> tuple[LoadedModel, AttachedAdapter]:
    """An adapter that is not as it starts."""
    base = load_model(ModelSection(name_or_path=str(folder), dtype="float32"), device=torch.device("cpu"))
    attached = attach_adapter(base.net, METHODS[name], seed=0, head_name="lm_head")
    move_from_start(attached.trained().values(), 0.3)
    return base, attached


def logits(base: LoadedModel, ids: Tensor, **more: Any) -> Tensor:
    net: Any = base.net
    with torch.no_grad():
        found: Tensor = net(input_ids=ids, **more).logits
    return found


def test_a_prefix_of_text_starts_as_the_base_behind_that_text(tiny_llama: Path) -> None:
    base = load_model(ModelSection(name_or_path=str(tiny_llama), dtype="float32"), device=torch.device("cpu"))
    ids = torch.arange(60, 84).reshape(2, 12)
    expected = logits(base, torch.cat([torch.tensor([TEXT_IDS, TEXT_IDS]), ids], dim=1))[:, len(TEXT_IDS) :]
    plain = logits(base, ids)
    attach_adapter(base.net, METHODS["text"], seed=0, head_name="lm_head")
    torch.testing.assert_close(logits(base, ids), expected, rtol=0, atol=1e-5)
    with calling(Call(bypassed=True)):
        assert torch.equal(logits(base, ids), plain)


@pytest.mark.parametrize("name", METHODS)
def test_with_a_cache_as_without_one_and_padded_as_alone(name: str, tiny_llama: Path) -> None:
    base, _ = base_and_adapter(tiny_llama, name)
    ids = torch.arange(60, 84).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = logits(base, ids, attention_mask=mask, position_ids=positions, use_cache=False)
    cache, steps, net = None, [], base.net
    with torch.no_grad():
        for first, last in [(0, 5), *((end, end + 1) for end in range(5, 12))]:
            output: Any = net(
                input_ids=ids[:, first:last],
                attention_mask=mask[:, :last],
                position_ids=positions[:, first:last],
                **{KEPT: cache},
                use_cache=True,
            )
            cache = getattr(output, KEPT)
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1)[1], whole[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat(steps, dim=1)[0, 4:], whole[0, 4:], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(base, ids[:1, 4:])[0], whole[0, 4:], rtol=0, atol=1e-5)
    assert cache is not None
    assert cache.get_seq_length() == 12  # of real tokens only


@pytest.mark.parametrize("name", METHODS)
def test_a_folder_alone_generates_and_continues(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    base, attached = base_and_adapter(tiny_llama, name)
    ids = torch.arange(60, 72)[None]
    expected = logits(base, ids)
    save_adapter_folder(attached, tmp_path / "a", base_name=str(tiny_llama), base_fingerprint=None, revision=None)
    other, fresh = base_and_adapter(tiny_llama, name)
    if name == "projection":
        with pytest.raises(AdapterError, match="contains only values computed from the trained tensors"):
            load_into(fresh, tmp_path / "a")
    else:
        load_into(fresh, tmp_path / "a")
        assert_same_bits(fresh.state(), attached.state())
    fresh.detach()
    read = attach_adapter_folder(other.net, tmp_path / "a", head_name="lm_head")
    torch.testing.assert_close(logits(other, ids), expected, rtol=0, atol=1e-6)
    read.detach()
    assert (logits(other, ids) - expected).abs().max() > 1e-3


def test_a_base_in_half_precision_is_prefixed_in_its_own(tiny_llama: Path) -> None:
    case, still = (four_steps(tiny_llama, METHODS["projection"], rate, dtype="bfloat16") for rate in (2e-2, 0.0))
    case.run()
    still.run()
    assert all(parameter.dtype == torch.float32 for parameter in case.adapter.trained().values())
    assert case.losses[-1] < still.losses[-1]


def test_packed_rows_of_a_llama_adapter_are_as_alone(tiny_llama: Path) -> None:
    case = four_steps(tiny_llama, METHODS["llama_adapter"])
    with torch.no_grad():
        for parameter in case.adapter.trained().values():
            parameter.add_(0.5)
    assert packing_leak(case.model, torch.arange(262)) < 1e-5
