"""The base classes carry every kind of adapter: one throwaway adapter of each kind, made, trained, saved and read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.support.peft_case import move_from_start
from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.base import LayerAdapter, ModelAdapter, SharedPart, Slot
from tunekit.adapters.expert_parameters import ParameterAdapter
from tunekit.adapters.folder.fields import PeftSide
from tunekit.adapters.folder.read import attach_adapter_folder, save_adapter_folder
from tunekit.adapters.method import Method
from tunekit.model.call import Call, calling
from tunekit.recipe.bases.section import Section
from tunekit.recipe.training import TrainingSection
from tunekit.records import Target

IDS = torch.arange(3, 27).reshape(2, 12)
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


class Settings(Section):
    method: Literal["throwaway"] = "throwaway"
    r: int = 4
    target_modules: str | tuple[str, ...] = ("q_proj", "v_proj")
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()


FIELDS = {"r": ("r", 4), "target_modules": ("target_modules", ("q_proj", "v_proj"))}
PEFT = PeftSide("THROWAWAY", Settings, FIELDS)


class SharedMatrices(SharedPart):
    """VeRA's frozen random A and B, as large as the largest layer, saved once."""

    starts_as_identity = True

    @classmethod
    def slots(cls, settings: Settings, targets: Any) -> dict[str, Slot]:
        inputs, outputs = max(t.in_features for t in targets), max(t.out_features for t in targets)
        a, b = Slot("vera_A", (settings.r, inputs), kind="saved"), Slot("vera_B", (outputs, settings.r), kind="saved")
        return {"A": a, "B": b}

    def initialise(self, generator: torch.Generator) -> None:
        self.A.normal_(generator=generator)
        self.B.normal_(generator=generator)


class Scaled(LayerAdapter):
    """VeRA's layer: y = W x + b * (B (d * (A x)))."""

    @classmethod
    def slots(cls, settings: Settings, target: Target) -> dict[str, Slot]:
        return {
            "d": Slot("vera_lambda_d", (settings.r,), decays=False),
            "b": Slot("vera_lambda_b", (target.out_features,), decays=False),
        }

    def initialise(self, generator: torch.Generator) -> None:
        nn.init.constant_(self.d, 0.1)
        nn.init.zeros_(self.b)

    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.shared.A[:, : self.target.in_features], self.shared.B[: self.target.out_features]

    def adapted(self, x: Tensor) -> Tensor:
        a, b = self.matrices()
        return self.base_layer(x) + self.b * F.linear(self.d * F.linear(x, a), b)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b = self.matrices()
        return weight + self.b[:, None] * (b @ (self.d[:, None] * a)), bias


class Ranked(LayerAdapter):
    """AdaLoRA-like: trained factors, a saved rank mask, importances that only a checkpoint holds; all hooks."""

    @classmethod
    def slots(cls, settings: Settings, target: Target) -> dict[str, Slot]:
        return {
            "A": Slot("ranked_A", (settings.r, target.in_features)),
            "B": Slot("ranked_B", (target.out_features, settings.r), rate="b"),
            "mask": Slot("ranked_mask", (settings.r,), kind="saved", dtype=torch.uint8),
            "importance": Slot("ranked_importance", (settings.r,), kind="resume"),
        }

    def initialise(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.A, generator=generator)
        nn.init.zeros_(self.B)
        self.mask.fill_(1)
        self.importance.zero_()

    def adapted(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + F.linear(F.linear(x, self.A) * self.mask, self.B)

    def penalty(self) -> Tensor:
        return 0.1 * self.A.square().sum()

    def after_backward(self) -> None:
        self.importance += self.A.grad.abs().sum(1)

    def after_step(self, step: int, total_steps: int) -> None:
        if step + 1 == total_steps:
            self.mask[self.importance.argmin()] = 0


class Experts(ParameterAdapter):
    """Low-rank change of each expert's matrix: delta_e = B_e A_e."""

    @classmethod
    def slots(cls, settings: Settings, target: Target) -> dict[str, Slot]:
        experts = target.experts or 0
        return {
            "A": Slot("experts_A", (experts, settings.r, target.in_features)),
            "B": Slot("experts_B", (experts, target.out_features, settings.r)),
        }

    def initialise(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.A, generator=generator)
        nn.init.zeros_(self.B)

    def delta(self, index: Any) -> Tensor:
        return self.B[index] @ self.A[index]


class Prompt(ModelAdapter):
    """Virtual embeddings before the row."""

    starts_as_identity = False

    @classmethod
    def slots(cls, settings: Settings, net: nn.Module) -> dict[str, Slot]:
        return {"prompt": Slot("prompt_embeddings", (settings.r, net.config.hidden_size))}

    def initialise(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.prompt, generator=generator)

    def inputs(self, net: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        embedded = net.get_input_embeddings()(inputs["input_ids"])  # (B, T, D)
        prompt = self.prompt.to(embedded.dtype).expand(len(embedded), -1, -1)
        return {"inputs_embeds": torch.cat([prompt, embedded], dim=1)}

    def outputs(self, hidden: Tensor) -> Tensor:
        return hidden[:, self.settings.r :]


def make_llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)).eval()


def make_mixtral(implementation: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    net = MixtralForCausalLM(MixtralConfig(**SIZES, **heads)).eval()
    net.config._experts_implementation = implementation
    return net


EXPERTS = ("gate_up_proj", "down_proj")
KINDS: dict[str, tuple[Callable[[], nn.Module], Method, Settings]] = {
    "shared": (make_llama, Method(PEFT, layer=Scaled, shared=SharedMatrices), Settings()),
    "three states": (make_llama, Method(PEFT, layer=Ranked), Settings()),
    "copies": (make_llama, Method(PEFT), Settings(modules_to_save=("norm", "lm_head", "input_layernorm"))),
    "experts": (make_mixtral, Method(PEFT, parameter=Experts), Settings(target_parameters=EXPERTS)),
    "prompt": (make_llama, Method(PEFT, model=Prompt), Settings()),
    "layers and copies": (make_llama, Method(PEFT, layer=Ranked), Settings(modules_to_save=("embed_tokens",))),
}


def attach(kind: str, net: nn.Module) -> AttachedAdapter:
    _, method, settings = KINDS[kind]
    return attach_adapter(net, settings, seed=3, head_name="lm_head", method=method)


def logits(net: nn.Module, attached: AttachedAdapter | None) -> Tensor:
    inputs = {"input_ids": IDS}
    hidden = net.model(**(attached.inputs(inputs) if attached else inputs)).last_hidden_state
    return net.lm_head(attached.outputs(hidden) if attached else hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind: str, tmp_path: Path) -> None:
    make, method, _ = KINDS[kind]
    net = make()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plain = logits(net, None)
    attached = attach(kind, net)
    if attached.starts_as_identity():
        torch.testing.assert_close(logits(net, attached), plain, rtol=0, atol=1e-6)
    move_from_start(attached.trained().values(), 0.2)
    changed = logits(net, attached)
    assert (changed - plain).abs().max() > 1e-3
    with calling(Call(bypassed=True)):
        assert torch.equal(logits(net, attached), plain)

    changed.square().sum().backward()
    trained = attached.trained()
    assert trained
    assert {id(p) for p in net.parameters() if p.requires_grad} <= {id(p) for p in trained.values()}
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())

    save_adapter_folder(attached, tmp_path / "a", base_name="org/base", base_fingerprint=None, revision=None)
    other = make()
    read = attach_adapter_folder(other, tmp_path / "a", head_name="lm_head", method=method)
    saved = attached.state(("trained", "saved"))
    assert all(torch.equal(read.state()[name], tensor) for name, tensor in saved.items())
    assert torch.equal(logits(other, read), changed)

    attached.detach()
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(logits(net, None), plain)


def test_shared_matrices_are_one_object_saved_once() -> None:
    net = make_llama()
    attached = attach("shared", net)
    layers = list(attached.layers.values())
    assert len(layers) == 4
    assert all(layer.shared is attached.shared for layer in layers)
    assert [name for name in attached.state() if "vera_A" in name] == ["vera_A"]
    assert "vera_A" not in attached.trained()
    assert not any(decays for _, _, decays in attached.groups(TrainingSection()))


def test_three_kinds_of_state_and_hooks() -> None:
    attached = attach("three states", make_llama())
    layer = attached.layers["model.layers.0.self_attn.q_proj"]
    prefix = "model.layers.0.self_attn.q_proj."
    assert f"{prefix}ranked_importance" not in attached.state(("trained", "saved"))
    assert f"{prefix}ranked_importance" in attached.state()
    assert f"{prefix}ranked_mask" not in attached.trained()
    penalty = attached.penalty()
    assert penalty is not None
    penalty.backward()
    attached.after_backward()
    assert layer.importance.min() > 0
    attached.after_step(0, 2)
    assert layer.mask.sum() == 4
    attached.after_step(1, 2)
    assert layer.mask.sum() == 3
    again = attach("three states", make_llama())
    again.load_state(attached.state())
    assert all(torch.equal(again.state()[name], tensor) for name, tensor in attached.state().items())


def test_groups_name_every_trained_tensor_once() -> None:
    attached = attach("layers and copies", make_llama())
    plain = attached.groups(TrainingSection())
    fast = attached.groups(TrainingSection(loraplus_ratio=16))
    for groups in (plain, fast):
        names = [name for group_names, _, _ in groups for name in group_names]
        assert sorted(names) == list(attached.trained())
    assert {rate for _, rate, _ in plain} == {1.0}
    of_outputs = {name for name in attached.trained() if name.endswith(("lora_B.weight", "ranked_B"))}
    assert {name for names, rate, _ in fast if rate == 16 for name in names} == of_outputs != set()
    assert ("model.embed_tokens.weight",) in [names for names, _, decays in fast if not decays]


def test_copies_are_float32_over_a_bfloat16_base() -> None:
    net = make_llama().to(torch.bfloat16)
    attached = attach("copies", net)
    assert all(parameter.dtype == torch.float32 for parameter in attached.trained().values())
    assert net(input_ids=IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_fused_experts_equal_their_merged_weights(implementation: str) -> None:
    net = make_mixtral(implementation)
    attached = attach("experts", net)
    move_from_start(attached.trained().values(), 0.2)
    running = logits(net, attached)
    assert len(attached.parameters) == 4
    attached.detach()
    with torch.no_grad():
        for adapter in attached.parameters.values():
            adapter.parameter.copy_(adapter.merged(adapter.parameter))
    torch.testing.assert_close(logits(net, None), running, rtol=0, atol=1e-5)
