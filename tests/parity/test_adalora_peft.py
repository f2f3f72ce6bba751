"""AdaLoRA against peft: the cells, twenty steps of ranks given away, and files of adapters that were cut down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support.peft_case import BASES, CHECKS, IDS, close, logits_of, move_from_start, peft_reads, run_cell
from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.folder.read import attach_adapter_folder, load_into, save_adapter_folder
from tunekit.errors import AdapterError
from tunekit.recipe.adapters.adalora import AdaloraSettings

SCHEDULE = {"init_r": 6, "target_r": 3, "tinit": 2, "tfinal": 6, "deltaT": 3, "orth_reg_weight": 0.3}
STEPS = 20
LLAMA = BASES["llama"]


def settings(names: tuple[str, ...], **changes: Any) -> AdaloraSettings:
    return AdaloraSettings(**{"alpha": 9.0, "target_modules": names, **SCHEDULE, **changes})


def config(names: tuple[str, ...], task_type: str | None = None) -> peft.AdaLoraConfig:
    fields = {"lora_alpha": 9, "target_modules": list(names), "total_step": STEPS, **SCHEDULE}
    return peft.AdaLoraConfig(**fields, task_type=task_type)


@pytest.mark.parametrize("family", BASES)
def test_cell(family: str, tmp_path: Path) -> None:
    names = (*BASES[family].attention, *BASES[family].feedforward)
    cell = run_cell(settings(names), config(names), family, tmp_path, spread=0.3)
    assert not cell.failures, cell.failures
    assert tuple(cell.passed) == CHECKS


def plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default", "")


def make_pair() -> tuple[AttachedAdapter, Any]:
    """The same adapter on the same base here and in peft."""
    theirs = peft.get_peft_model(LLAMA.make(), config(LLAMA.attention, "CAUSAL_LM"))  # without a task: no penalty
    ours = attach_adapter(LLAMA.make(), settings(LLAMA.attention), seed=0, head_name="lm_head")
    start = {plain_name(name): tensor.detach() for name, tensor in theirs.named_parameters() if tensor.requires_grad}
    ours.load_state(start, ("trained",))
    return ours, theirs


def penalised(net: nn.Module, step: int) -> Any:
    return net(input_ids=IDS.roll(step, 1), labels=IDS.roll(step, 1))


def test_twenty_steps_of_masks_and_importances() -> None:
    """SGD keeps rounding apart from decisions: Adam would divide by a second moment that is nearly zero."""
    ours, theirs = make_pair()
    allocator = theirs.base_model.rankallocator
    trained = {name: tensor for name, tensor in theirs.named_parameters() if tensor.requires_grad}
    optimizers = [torch.optim.SGD(side, lr=0.3) for side in (list(ours.trained().values()), list(trained.values()))]
    ranks = []
    for step in range(STEPS):
        penalty = ours.penalty()
        assert penalty is not None
        loss = penalised(ours.net, step).loss + penalty
        other = penalised(theirs, step).loss  # peft adds its penalty to it
        torch.testing.assert_close(loss, other, rtol=0, atol=1e-4)
        for value, optimizer in zip((loss, other), optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        ours.after_step(step, STEPS)
        theirs.base_model.update_and_allocate(step)
        for name, tensor in trained.items():
            torch.testing.assert_close(ours.trained()[plain_name(name)], tensor, rtol=1e-4, atol=1e-5)
            for average, kind in ((allocator.exp_avg_ipt, "sensitivity"), (allocator.exp_avg_unc, "uncertainty")):
                if average:  # peft drops them in the end
                    mine = ours.state()[f"{plain_name(name)}.{kind}"]
                    torch.testing.assert_close(
                        mine, average[name.removeprefix("base_model.model.")], rtol=1e-3, atol=1e-8
                    )
        pattern = theirs.base_model.peft_config["default"].rank_pattern
        for layer in ours.layers.values():
            expected = pattern[f"{layer.module_name}.lora_E.default"] if pattern else [True] * 6
            assert layer.kept.tolist() == expected, (step, layer.module_name)
        ranks.append(sum(int(layer.kept.sum()) for layer in ours.layers.values()))
    assert ranks[:3] == [36, 36, 36]
    assert ranks[-7:] == [18] * 7
    assert len(set(ranks)) > 3
    assert len({int(layer.kept.sum()) for layer in ours.layers.values()}) > 1, "the layers all got the same"


def cut_down(kept: list[list[bool]]) -> AttachedAdapter:
    """An adapter at its end, with these ranks left in its layers."""
    ours = attach_adapter(LLAMA.make(), settings(LLAMA.attention), seed=0, head_name="lm_head")
    move_from_start(ours.trained().values(), 0.3)
    for layer, left in zip(ours.layers.values(), kept, strict=True):
        layer.kept.copy_(torch.tensor(left))
        layer.E.data[~layer.kept] = 0
    ours.shared.total_steps.fill_(STEPS)
    return ours


def patterns(*, empty: bool) -> list[list[bool]]:
    kept = [[(layer + triplet) % 3 != 0 for triplet in range(6)] for layer in range(6)]
    return [[False] * 6, *kept[1:]] if empty else kept


@pytest.mark.parametrize("empty", [False, True])
def test_a_file_leaves_out_what_is_gone(tmp_path: Path, empty: bool) -> None:
    ours = cut_down(patterns(empty=empty))
    expected = logits_of(ours.net, LLAMA)
    save_adapter_folder(ours, tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert written["total_step"] == STEPS
    assert list(written["rank_pattern"].values()) == patterns(empty=empty)
    theirs = peft.PeftModel.from_pretrained(LLAMA.make(), str(tmp_path / "a")).eval()
    close(logits_of(theirs, LLAMA), expected)
    read = attach_adapter_folder(LLAMA.make(), tmp_path / "a", head_name="lm_head")
    assert [len(layer.E) for layer in read.layers.values()] == [sum(kept) for kept in patterns(empty=empty)]
    close(logits_of(read.net, LLAMA), expected)
    save_adapter_folder(read, tmp_path / "b", base_name="org/base", base_fingerprint=None, revision=None)
    ours_bytes, again = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert ours_bytes == again
    other = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert other["rank_pattern"] == written["rank_pattern"]


def test_a_file_that_peft_cut_down_is_read(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(LLAMA.make(), config(LLAMA.attention)).eval()
    move_from_start([p for p in theirs.parameters() if p.requires_grad], 0.3)
    names = sorted(name for name, _ in theirs.base_model.model.named_parameters() if "lora_E" in name)
    pattern = dict(zip(names, patterns(empty=False), strict=True))
    theirs.base_model.peft_config["default"].rank_pattern = pattern
    theirs.base_model.rankallocator.mask_using_rank_pattern(theirs.base_model.model, pattern)
    expected = logits_of(theirs, LLAMA)
    theirs.save_pretrained(str(tmp_path))
    read = attach_adapter_folder(LLAMA.make(), tmp_path, head_name="lm_head")
    close(logits_of(read.net, LLAMA), expected)
    assert read.file_tensors().keys() == {plain_name(key) for key in load_file(tmp_path / "adapter_model.safetensors")}


def test_a_triplet_at_work_between_two_changes_is_in_the_file(tmp_path: Path) -> None:
    ours = cut_down(patterns(empty=False))
    layer = next(iter(ours.layers.values()))
    layer.E.data[0] = 0.5  # its ranks 0 and 3 are not kept
    assert layer.rank_pattern() == [True, True, True, False, True, True]
    peft_reads_again = tmp_path / "a"
    save_adapter_folder(ours, peft_reads_again, base_name="org/base", base_fingerprint=None, revision=None)
    read = attach_adapter_folder(LLAMA.make(), peft_reads_again, head_name="lm_head")
    close(logits_of(read.net, LLAMA), logits_of(ours.net, LLAMA))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"model.layers.7.self_attn.q_proj.lora_E": [True] * 6}, "is not an adapted layer"),
        ({"model.layers.0.self_attn.q_proj.lora_E": [True] * 5}, "has 5 entries"),
        ({"model.layers.0.self_attn.q_proj.lora_E": [1] * 6}, "malformed"),
        ({"model.layers.0.self_attn.q_proj.lora_E": [True] * 5 + [False]}, "has shape"),
    ],
)
def test_wrong_rank_patterns_are_refused(tmp_path: Path, pattern: dict[str, list[Any]], message: str) -> None:
    ours = attach_adapter(LLAMA.make(), settings(LLAMA.attention), seed=0, head_name="lm_head")
    save_adapter_folder(ours, tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    (tmp_path / "a" / "tunekit.json").unlink()
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": pattern}))
    with pytest.raises(AdapterError, match=message):
        attach_adapter_folder(LLAMA.make(), tmp_path / "a", head_name="lm_head")


def test_training_goes_on_from_a_folder_of_full_ranks(tmp_path: Path) -> None:
    """Bit for bit. tests/runs/test_adalora_training.py continues a folder with fewer ranks."""
    whole = attach_adapter(LLAMA.make(), settings(LLAMA.attention), seed=1, head_name="lm_head")
    save_adapter_folder(whole, tmp_path / "whole", base_name="org/base", base_fingerprint=None, revision=None)
    again = attach_adapter(LLAMA.make(), settings(LLAMA.attention, tinit=0, beta1=0.5), seed=0, head_name="lm_head")
    load_into(again, tmp_path / "whole")
    assert all(torch.equal(again.state()[name], tensor) for name, tensor in whole.trained().items())


def test_peft_reads_an_untouched_one(tmp_path: Path) -> None:
    peft_reads(settings(LLAMA.attention), LLAMA, tmp_path / "a", 0.3)
