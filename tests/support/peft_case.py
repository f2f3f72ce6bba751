"""One cell of the parity table: a method's settings and peft's configuration of the same thing, on one small base.

`run_cell(...)` makes the five checks, each from adapters that are not as they start:
forward   same tensors in both: same logits             gradients   of a fixed sum of logits, tensor by tensor
merged    the plain base with the merged weights: same logits as the running adapter
written   peft reads the file written here without a warning: same logits
read      the file that peft wrote is read here: same tensors, same logits

Every `Cell` made while a test runs is put into the parity table (table.py), which any pytest run prints at its end and
a whole run holds: run_cell needs nothing more for that. A test that compares by hand makes its cell itself:
    cell = Cell(method="prompt", family=family); cell.check("forward", compare); assert not cell.failures
Each row needs a cell on every family. What peft refuses too, or mathematics forbids, is said with its reason:
    peft_refuses("prompt", "bert", "peft has no ...", lambda: peft.get_peft_model(...))      the whole cell
    run_cell(..., refused={"merged": "it scales the bias"})                                  some of its checks
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.parity.table import CHECKS as CHECKS
from tests.parity.table import COLUMNS as COLUMNS
from tests.parity.table import FAMILIES as FAMILIES
from tests.parity.table import Cell as Cell
from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.folder.read import attach_adapter_folder, save_adapter_folder
from tunekit.model.quantized.weights import weight_of

TOLERANCE = 1e-5
NO_CONV1D = "peft adapts no Conv1D with this method, and GPT-2 has nothing else"
VOCABULARY, HIDDEN, LAYERS, HEADS = 97, 32, 2, 4
IDS = torch.arange(3, 27).reshape(2, 12)
# What peft says of every adapter of a tied layer, or of GPT-2's Linear head beside its Conv1Ds.
HARMLESS_WARNINGS = ("tie_word_embeddings", "is_gradient_checkpointing", "torch.nn.Linear")
SIZES = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS}
SIZES["initializer_range"] = SPREAD = 0.1  # large enough for a wrong layer to show in the logits


def copied(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The net is made once, and copied for each caller in a third of the time; torch is seeded alike each time."""
    made_once = functools.cache(make)

    @functools.wraps(make)
    def make_copy() -> nn.Module:
        net = copy.deepcopy(made_once())
        torch.manual_seed(0)
        return net

    return make_copy


@copied
def make_llama() -> nn.Module:
    """4 query heads and 2 key heads, so that k_proj and v_proj are not square."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=HEADS, num_key_value_heads=2)).eval()


@copied
def make_gpt2() -> nn.Module:
    """Conv1D layers with biases that are not zero."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}
    sizes["initializer_range"] = SPREAD
    return _with_biases(GPT2LMHeadModel(GPT2Config(**sizes)).eval())


@copied
def make_t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS}
    return T5ForConditionalGeneration(T5Config(**sizes, num_heads=HEADS, decoder_start_token_id=0)).eval()


@copied
def make_bart() -> nn.Module:
    """Learned positions, and biases that are not zero."""
    torch.manual_seed(0)
    stacks = {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": 48}
    sizes = {f"{stack}_{name}": size for stack in ("encoder", "decoder") for name, size in stacks.items()}
    config = BartConfig(**sizes, vocab_size=VOCABULARY, d_model=HIDDEN, max_position_embeddings=64, init_std=SPREAD)
    return _with_biases(BartForConditionalGeneration(config).eval())


@copied
def make_bert() -> nn.Module:
    """A classifier of three labels; biases that are not zero."""
    torch.manual_seed(0)
    config = BertConfig(**SIZES, num_attention_heads=HEADS, max_position_embeddings=64, num_labels=3)
    return _with_biases(BertForSequenceClassification(config).eval())


@copied
def make_mixtral() -> nn.Module:
    """Four experts in fused 3-D parameters."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **heads)).eval()


def _with_biases(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return net


@dataclass(frozen=True)
class Base:
    """One family: its maker, its head, peft's task (None: peft adds no head of its own), and layers worth adapting."""

    make: Callable[[], nn.Module]
    head_name: str
    task_type: str | None
    attention: tuple[str, ...]  # some attention layers, by ending
    feedforward: tuple[str, ...]  # what leads out of the feed-forward block
    norms: tuple[str, ...]
    inputs: dict[str, Tensor] = field(default_factory=lambda: {"input_ids": IDS})


OF_ENCODER_DECODERS = {"input_ids": IDS, "decoder_input_ids": IDS[:, :7] + 40}
BASES: dict[str, Base] = {
    "llama": Base(
        make_llama, "lm_head", "CAUSAL_LM", ("q_proj", "k_proj", "v_proj"), ("down_proj",), ("input_layernorm", "norm")
    ),
    "gpt2": Base(make_gpt2, "lm_head", "CAUSAL_LM", ("c_attn",), ("mlp.c_proj",), ("ln_1", "ln_f")),
    "t5": Base(
        make_t5,
        "lm_head",
        "SEQ_2_SEQ_LM",
        ("q", "k", "v"),
        ("wo",),
        ("layer_norm", "final_layer_norm"),
        OF_ENCODER_DECODERS,
    ),
    "bart": Base(
        make_bart,
        "lm_head",
        "SEQ_2_SEQ_LM",
        ("q_proj", "k_proj", "v_proj"),
        ("fc2",),
        ("final_layer_norm", "layernorm_embedding"),
        OF_ENCODER_DECODERS,
    ),
    "bert": Base(make_bert, "classifier", None, ("query", "value"), ("output.dense",), ("LayerNorm",)),
    "mixtral": Base(make_mixtral, "lm_head", "CAUSAL_LM", ("q_proj", "v_proj"), ("o_proj",), ("input_layernorm",)),
}


def run_cell(
    settings: Any,
    peft_config: Any,
    family: str,
    folder: Path,
    *,
    spread: float = 0.2,
    mergeable: bool = True,
    backward: Callable[[], AbstractContextManager[object]] = nullcontext,
    known_warnings: tuple[str, ...] = (),
    refused: Mapping[str, str] | None = None,
    row: str = "",
    prepare: Callable[[nn.Module], None] = lambda theirs: None,
) -> Cell:
    """All five checks of one (settings, peft configuration, family); `folder` is an empty one.

    `peft_config` gets the family's task_type here.  Trained tensors are moved from their start by `spread` times
    normal numbers.  `refused`: check -> why it is left out; `mergeable` False is short for a method that mathematics
    forbids to merge.  `backward` is entered for the gradients, where peft's own are wrong and need another oracle.
    `known_warnings`: what peft says of its own files of this kind too.  `row`: the name in the table.
    `prepare` gets peft's model as it starts, to freeze there what peft leaves to an optimizer.
    """
    base, cell = BASES[family], Cell(method=settings.method, family=family, row=row)
    cell.refused |= refused or ({} if mergeable else {"merged": "it is no change of a weight and a bias"})
    peft_config.task_type = base.task_type
    theirs = peft.get_peft_model(base.make(), peft_config).eval()
    prepare(theirs)
    move_from_start([p for p in theirs.parameters() if p.requires_grad], spread)
    theirs.save_pretrained(str(folder / "theirs"))
    tensors = load_file(folder / "theirs" / "adapter_model.safetensors")
    ours = attach_adapter(base.make(), settings, seed=1, head_name=base.head_name)
    plain, expected = logits_of(base.make(), base).detach(), logits_of(theirs, base).detach()

    def same_logits() -> None:
        saved = {n: part.file_key(n) for n, (part, slot) in ours.slots().items() if slot.kind != "resume"}
        ours.load_state({name: tensors[key] for name, key in saved.items()}, ("trained", "saved"))
        assert (expected - plain).abs().max() > 1e-3, "the adapter changes nothing"
        close(logits_of(ours.net, base), expected)

    def same_gradients() -> None:
        with backward():
            compare_gradients(ours, theirs, tensors, base)

    checks: dict[str, Callable[[], None]] = {
        "forward": same_logits,
        "gradients": same_gradients,
        "merged": lambda: close(logits_of(merged_net(ours, base), base), expected),
        "written": lambda: peft_reads(settings, base, folder / "ours", spread, known_warnings),
        "read": lambda: tunekit_reads(folder / "theirs", base, tensors, expected),
    }
    for name, action in checks.items():
        if name not in cell.refused:
            cell.check(name, action)
    return cell


def peft_refuses(method: str, family: str, reason: str, refusal: Callable[[], object], *, row: str = "") -> Cell:
    """The cell of a family for which peft refuses the method, which `refusal` shows by raising."""
    cell = Cell(method=method, family=family, row=row)
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=r"(?i)support|target|only"):
        refusal()
    cell.refuse(reason)
    return cell


def move_from_start(parameters: Iterable[nn.Parameter], spread: float, seed: int = 7) -> None:
    """Add normal numbers, the same each time."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)


def logits_of(net: nn.Module, base: Base) -> Tensor:
    """(B, T, V), of a classifier (B, labels)."""
    logits: Tensor = net(**base.inputs).logits
    return logits


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=TOLERANCE)


def gradients_of(net: nn.Module, parameters: dict[str, nn.Parameter], base: Base) -> dict[str, Tensor]:
    """Of a fixed sum of logits, by name."""
    logits = logits_of(net, base)
    total = (logits * torch.linspace(-1, 1, logits.shape[-1])).sum()
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


def compare_gradients(ours: AttachedAdapter, theirs: nn.Module, tensors: dict[str, Tensor], base: Base) -> None:
    """Every trained tensor of one side is one of the other, with the same gradient."""
    slots = ours.slots()
    own = {slots[name][0].file_key(name): parameter for name, parameter in ours.trained().items()}
    other = {file_key(name, tensors): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert own.keys() == other.keys()
    left, right = gradients_of(ours.net, own, base), gradients_of(theirs, other, base)
    # LoKr's factors cancel in a tensor's gradient, and kernels of processors differ in what is left: there alone the
    # scale is that of the whole gradient.
    whole = max(float(gradient.abs().max()) for gradient in left.values()) if ours.settings.method == "lokr" else 1.0
    for key, gradient in left.items():
        assert gradient.abs().max() > 0, f"{key} gets no gradient"
        scale = max(1.0, whole, float(gradient.abs().max()))
        torch.testing.assert_close(
            gradient / scale, right[key] / scale, rtol=0, atol=TOLERANCE, msg=lambda m, k=key: f"{k}: {m}"
        )


def file_key(name: str, tensors: dict[str, Tensor]) -> str:
    """The key in peft's file of one of its parameters: without the adapter's name, and for some without .weight."""
    plain = name.replace(".default", "")
    copy = name.replace(".modules_to_save.default.", ".")
    for key in (plain, plain.removesuffix(".weight"), copy, name.removesuffix(".default")):
        if key in tensors:
            return key
    shared = f"base_model.{plain.rpartition('.')[2]}"  # named after the first layer that holds it
    return shared if shared in tensors else name


def merged_net(ours: AttachedAdapter, base: Base) -> nn.Module:
    """A plain net with every layer's merged weight and bias, every merged parameter and every trained copy."""
    net = base.make()
    with torch.no_grad():
        for name, layer in ours.layers.items():
            module = net.get_submodule(name)
            weight = weight_of(module)
            assert weight is not None
            matrix, bias = layer.merged(weight.read(), weight.bias)
            weight.replace(matrix)
            assert (bias is None) == (weight.bias is None), f"{name} gains or loses a bias"
            if bias is not None:
                module.bias = nn.Parameter(bias)
        for name, adapter in ours.parameters.items():
            parameter = net.get_parameter(name)
            parameter.copy_(adapter.merged(parameter))
        for name, tokens in ours.tokens.items():
            weight = nn.Parameter(tokens.merged(net.get_submodule(name).weight))
            for place in (name, *ours.tied_tokens.get(name, ())):
                net.get_submodule(place).weight = weight
        for name, copy in ours.copies.items():
            for own, tensor in copy.cast_copies().items():
                owner, _, last = f"{name}.{own}".rpartition(".")
                setattr(net.get_submodule(owner), last, nn.Parameter(tensor.clone()))  # a tied partner keeps its own
    return net


def peft_reads(settings: Any, base: Base, folder: Path, spread: float, known_warnings: tuple[str, ...] = ()) -> None:
    """A file written here, from a start of our own, computes the same in peft, which finds nothing to warn of."""
    ours = attach_adapter(base.make(), settings, seed=3, head_name=base.head_name)
    move_from_start(ours.trained().values(), spread)
    save_adapter_folder(
        ours, folder, base_name="org/base", base_fingerprint="f", revision=None, task_type=base.task_type
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(base.make(), str(folder)).eval()
    expected = (*HARMLESS_WARNINGS, *known_warnings)
    said = [str(w.message) for w in caught if not any(text in str(w.message) for text in expected)]
    assert not said, said
    close(logits_of(theirs, base), logits_of(ours.net, base))


def tunekit_reads(folder: Path, base: Base, tensors: dict[str, Tensor], expected: Tensor) -> None:
    """A file of peft's is read tensor for tensor, and computes the same."""
    read = attach_adapter_folder(base.make(), folder, head_name=base.head_name)
    slots, state = read.slots(), read.state(("trained", "saved"))
    keys = {slots[name][0].file_key(name) for name in state}
    repeats = {key for key in tensors if f"base_model.{key.rpartition('.')[2]}" in keys}  # of what layers share
    assert keys == set(tensors) - (repeats - keys)
    for name, tensor in state.items():
        assert torch.equal(tensor, tensors[slots[name][0].file_key(name)].to(tensor.dtype)), name
    close(logits_of(read.net, base), expected)
