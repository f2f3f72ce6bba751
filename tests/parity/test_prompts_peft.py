"""Prompts against peft: the same vectors give the same logits and gradients, and files are read both ways.

peft puts virtual tokens before each row too, and leaves their logits in: they are cut off here. Its classes for tasks
do it, so that every family needs its task.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.peft_case import BASES, HARMLESS_WARNINGS, IDS, Base, Cell, close, move_from_start, peft_refuses
from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.folder.read import attach_adapter_folder, load_into, save_adapter_folder
from tunekit.adapters.method import load_method
from tunekit.errors import AdapterError
from tunekit.recipe.adapters.cpt import CptSettings
from tunekit.recipe.adapters.multitask_prompt import MultitaskPromptSettings
from tunekit.recipe.adapters.p_tuning import PTuningSettings
from tunekit.recipe.adapters.prompt import PromptSettings

LENGTH, TASK, SPREAD = 5, 1, 0.2
NO_MERGE = {"merged": "a prompt is no change of a weight"}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "mixtral": "CAUSAL_LM", "bert": "SEQ_CLS"}
TASKS |= {"t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}
IDS_OF_CONTEXT, TYPES = (7, 3, 50, 12, 9, 61, 8), (1, 2, 2, 3, 4, 0, 5)
Made = tuple[Any, peft.PeftConfig]


def prompt(family: str) -> Made:
    theirs = peft.PromptTuningConfig(num_virtual_tokens=LENGTH, num_transformer_submodules=1)
    return PromptSettings(num_virtual_tokens=LENGTH, modules_to_save=heads(family)), theirs


def p_tuning(family: str) -> Made:
    fields: dict[str, Any] = {"num_virtual_tokens": LENGTH, "encoder_hidden_size": 24, "num_transformer_submodules": 1}
    return PTuningSettings(**fields, modules_to_save=heads(family)), peft.PromptEncoderConfig(**fields)


def p_tuning_lstm(family: str) -> Made:
    fields: dict[str, Any] = {"num_virtual_tokens": LENGTH, "encoder_hidden_size": 12, "num_transformer_submodules": 1}
    fields |= {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2}
    return PTuningSettings(**fields, modules_to_save=heads(family)), peft.PromptEncoderConfig(**fields)


def multitask_prompt(family: str) -> Made:
    sides = 2 if TASKS[family] == "SEQ_2_SEQ_LM" else 1
    fields: dict[str, Any] = {"num_virtual_tokens": LENGTH, "num_tasks": 3, "num_ranks": 2}
    fields["num_transformer_submodules"] = sides
    ours = MultitaskPromptSettings(**fields, task=TASK, modules_to_save=heads(family))
    return ours, peft.MultitaskPromptTuningConfig(**fields)


def cpt(family: str) -> Made:
    fields: dict[str, Any] = {"opt_projection_epsilon": 9.0, "opt_projection_format_epsilon": 0.2}
    ours = CptSettings(token_ids=IDS_OF_CONTEXT, token_types=TYPES, **fields)
    ids, types = list(IDS_OF_CONTEXT), list(TYPES)
    task = TASKS[family]
    return ours, peft.CPTConfig(cpt_token_ids=ids, cpt_tokens_type_mask=types, task_type=task, **fields)


CASES: dict[str, Callable[[str], Made]] = {
    "prompt": prompt,
    "p_tuning": p_tuning,
    "p_tuning lstm": p_tuning_lstm,
    "multitask_prompt": multitask_prompt,
    "cpt": cpt,
}
STATE_NAMES = {"prompt": {"embedding.weight": "prompt_embeddings"}}
STATE_NAMES["multitask_prompt"] = STATE_NAMES["prompt"]


def heads(family: str) -> tuple[str, ...]:
    """peft trains a classifier's head along with a prompt, unasked."""
    return ("classifier",) if family == "bert" else ()


@dataclass
class Pair:
    """One method on one family, in both libraries."""

    case: str
    family: str
    base: Base = field(init=False)
    settings: Any = field(init=False)
    config: peft.PeftConfig = field(init=False)

    def __post_init__(self) -> None:
        self.base = BASES[self.family]
        self.settings, self.config = CASES[self.case](self.family)
        self.config.task_type = TASKS[self.family]

    @property
    def multitask(self) -> bool:
        return bool(self.settings.method == "multitask_prompt")

    def ours(self) -> AttachedAdapter:
        return attach_adapter(self.base.make(), self.settings, seed=1, head_name=self.base.head_name)

    def our_logits(self, attached: AttachedAdapter) -> Tensor:
        task = {"task_ids": torch.full((len(IDS),), TASK)} if self.multitask and attached.settings.task != TASK else {}
        logits: Tensor = attached.net(**attached.inputs({**self.base.inputs, **task})).logits
        return attached.outputs(logits)

    def their_logits(self, theirs: Any) -> Tensor:
        inputs: dict[str, Tensor] = dict(self.base.inputs)
        if self.multitask:
            inputs["task_ids"] = torch.full((len(IDS),), TASK)
            if "decoder_input_ids" in inputs:  # peft looks for embeddings alone there
                inputs["decoder_inputs_embeds"] = theirs.word_embeddings(inputs.pop("decoder_input_ids"))
        logits: Tensor = theirs(**inputs).logits
        before_tokens = TASKS[self.family] == "CAUSAL_LM" or (self.multitask and self.family != "bert")
        return logits[:, theirs.active_peft_config.num_virtual_tokens :] if before_tokens else logits

    def state_name(self, name: str) -> str:
        """Our name of one of peft's parameters."""
        own = (
            name.replace("prompt_encoder.default.", "")
            .replace("base_model.", "")
            .replace("modules_to_save.default.", "")
        )
        return STATE_NAMES.get(self.settings.method, {}).get(own, own)


def gradients(logits: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Of a fixed sum of logits."""
    total = (logits * torch.linspace(-1, 1, logits.shape[-1])).sum()
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


@pytest.mark.parametrize("family", [family for family in TASKS if family in BASES])
@pytest.mark.parametrize("case", CASES)
def test_cell(case: str, family: str, tmp_path: Path) -> None:
    if case == "cpt" and TASKS[family] != "CAUSAL_LM":
        peft_refuses("cpt", family, "peft has it for decoder-only models alone", lambda: cpt(family))
        return
    pair = Pair(case, family)
    cell = Cell(method=pair.settings.method, family=family, row=case, refused=dict(NO_MERGE))
    theirs = peft.get_peft_model(pair.base.make(), pair.config).eval()
    trained = {pair.state_name(name): p for name, p in theirs.named_parameters() if p.requires_grad}
    move_from_start(trained.values(), SPREAD)
    expected = pair.their_logits(theirs).detach()  # CPT's forward also brings its parameters within their bounds
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = pair.ours()
    plain: Tensor = pair.base.make()(**pair.base.inputs).logits

    def same_logits() -> None:
        ours.load_state({name: p.detach() for name, p in trained.items()}, ("trained",))
        assert (expected - plain).abs().max() > 1e-3, "the adapter changes nothing"
        close(pair.our_logits(ours), expected)

    def same_gradients() -> None:
        assert ours.trained().keys() == trained.keys()
        left = gradients(pair.our_logits(ours), ours.trained())
        right = gradients(pair.their_logits(theirs), trained)
        for name, gradient in left.items():
            assert gradient.abs().max() > 0, f"{name} gets no gradient"
            scale = max(1.0, float(gradient.abs().max()))
            torch.testing.assert_close(gradient / scale, right[name] / scale, rtol=0, atol=1e-5)

    cell.check("forward", same_logits)
    cell.check("gradients", same_gradients)
    cell.check("written", lambda: peft_reads(pair, tmp_path / "ours"))
    cell.check("read", lambda: tunekit_reads(pair, tmp_path / "theirs", expected))
    assert not cell.failures, cell.failures


def peft_reads(pair: Pair, folder: Path) -> None:
    """A file written here computes the same in peft, which finds nothing to warn of."""
    ours = pair.ours()
    move_from_start(ours.trained().values(), SPREAD)
    task_type = TASKS[pair.family]
    save_adapter_folder(ours, folder, base_name="org/base", base_fingerprint="f", revision=None, task_type=task_type)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(pair.base.make(), str(folder)).eval()
    said = [str(w.message) for w in caught if not any(text in str(w.message) for text in HARMLESS_WARNINGS)]
    assert not said, said
    close(pair.their_logits(theirs), pair.our_logits(ours))


def tunekit_reads(pair: Pair, folder: Path, expected: Tensor) -> None:
    """A file of peft's is read tensor for tensor, and computes the same."""
    read = attach_adapter_folder(pair.base.make(), folder, head_name=pair.base.head_name)
    tensors = load_file(folder / "adapter_model.safetensors")
    held = {part.file_key(name): tensor for part in read.parts() for name, tensor in part.file_tensors().items()}
    assert held.keys() == tensors.keys()
    assert all(torch.equal(held[key], tensor) for key, tensor in tensors.items())
    close(pair.our_logits(read), expected)


@pytest.mark.parametrize("case", CASES)
def test_every_field_of_pefts_configuration_is_written(case: str) -> None:
    pair = Pair(case, "llama")
    theirs = peft.get_peft_model(pair.base.make(), pair.config)
    fields = theirs.peft_config["default"].to_dict()
    ours = pair.ours()
    config = {**load_method(pair.settings.method).peft.write(pair.settings), **ours.parts()[0].file_fields()}
    absent = load_method(pair.settings.method).peft.absent
    assert {name for name in config if name not in absent} == fields.keys()
    for name in ("token_dim", "num_layers", "num_attention_heads", "num_virtual_tokens", "num_transformer_submodules"):
        assert config[name] == fields[name], name


def test_a_prompt_for_both_halves_stands_before_the_encoder_alone(tmp_path: Path) -> None:
    """peft's default for an encoder-decoder: twice the vectors, of which its prompt tuning uses the first half."""
    base = BASES["t5"]
    config = peft.PromptTuningConfig(num_virtual_tokens=LENGTH, task_type="SEQ_2_SEQ_LM")
    theirs = peft.get_peft_model(base.make(), config).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    read = attach_adapter_folder(base.make(), tmp_path / "theirs", head_name=base.head_name)
    assert read.state()["prompt_embeddings"].shape[0] == 2 * LENGTH
    close(read.outputs(read.net(**read.inputs(base.inputs)).logits), theirs(**base.inputs).logits)


def test_a_mask_and_token_types_are_those_of_peft() -> None:
    """Padding on the right, as in training, and a second segment."""
    pair = Pair("prompt", "bert")
    theirs = peft.get_peft_model(pair.base.make(), pair.config).eval()
    ours = pair.ours()
    with torch.no_grad():
        ours.trained()["prompt_embeddings"].copy_(theirs.prompt_encoder["default"].embedding.weight)
    mask, types = torch.ones_like(IDS), torch.zeros_like(IDS)
    mask[1, 7:] = 0
    types[:, 5:] = 1
    inputs = {"input_ids": IDS, "attention_mask": mask, "token_type_ids": types}
    close(ours.net(**ours.inputs(inputs)).logits, theirs(**inputs).logits)


@pytest.mark.parametrize(
    ("chosen", "init"), [(2, "EXACT_SOURCE_TASK"), ("average", "AVERAGE_SOURCE_TASKS"), ("none", "ONLY_SOURCE_SHARED")]
)
def test_a_prompt_goes_on_from_the_tasks_of_another(chosen: Any, init: str, tmp_path: Path) -> None:
    """As peft starts from a file of three tasks; what it draws anew for "none" is drawn here by the run's seed."""
    pair = Pair("multitask_prompt", "llama")
    source = pair.ours()
    move_from_start(source.trained().values(), SPREAD)
    save_adapter_folder(source, tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    path = str(tmp_path / "a" / "adapter_model.safetensors")
    config = peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=LENGTH,
        num_ranks=2,
        task_type="CAUSAL_LM",
        prompt_tuning_init=init,
        prompt_tuning_init_state_dict_path=path,
        prompt_tuning_init_task=2,
    )
    theirs = peft.get_peft_model(pair.base.make(), config).prompt_encoder["default"]
    fields: dict[str, Any] = {"num_virtual_tokens": LENGTH, "num_ranks": 2, "init_from": "a"}
    settings = MultitaskPromptSettings(**fields, init_from_tasks=chosen)
    ours = attach_adapter(pair.base.make(), settings, seed=1, head_name="lm_head")
    drawn = {name: tensor.clone() for name, tensor in ours.state().items()}
    load_into(ours, tmp_path / "a")
    state = ours.state()
    close(state["prompt_embeddings"], theirs.embedding.weight)
    for name in ("prefix_task_cols", "prefix_task_rows"):
        close(state[name], drawn[name] if chosen == "none" else getattr(theirs, name))


def test_a_task_that_a_folder_lacks_is_refused(tmp_path: Path) -> None:
    pair = Pair("multitask_prompt", "llama")
    save_adapter_folder(pair.ours(), tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    fields: dict[str, Any] = {"num_virtual_tokens": LENGTH, "num_ranks": 2, "init_from": "a"}
    for chosen, message in ((3, "so there is no task 3"), ("all", "num_tasks is 3 in the folder")):
        settings = MultitaskPromptSettings(**fields, init_from_tasks=chosen)
        with pytest.raises(AdapterError, match=message):
            load_into(attach_adapter(pair.base.make(), settings, seed=1, head_name="lm_head"), tmp_path / "a")


def test_a_row_of_a_task_that_is_not_there_is_refused() -> None:
    pair = Pair("multitask_prompt", "llama")
    with pytest.raises(AdapterError, match="there are 3 tasks"):
        pair.ours().inputs({"input_ids": IDS, "task_ids": torch.tensor([0, 3])})
