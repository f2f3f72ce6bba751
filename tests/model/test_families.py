"""Family, head and stages against the plain forward of many architectures, random and tiny."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tunekit.errors import ModelError
from tunekit.model.families.causal import FAMILY

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}
OLD = {"num_key_value_heads": None}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": HEADS,
    "gemma": HEADS,
    "gemma2": {**HEADS, "final_logit_softcapping": 3.0, "sliding_window": 4},
    "gemma3_text": {**HEADS, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "starcoder2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": {},
    "gpt2": {},
    "phi": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {},
}


def make_net(model_type: str, **changes: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**SHAPE, **MODELS[model_type], **changes})
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # larger than the usual start, so that a missing cap or scale shows
        for parameter in net.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5)
    return net.eval().requires_grad_(False)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=sorted(MODELS))
def net(request: pytest.FixtureRequest) -> nn.Module:
    return make_net(request.param)


IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(11)[None].repeat(2, 1)


def test_head_of_hidden_equals_the_nets_own_logits(net: nn.Module) -> None:
    family = FAMILY
    hidden = family.hidden(net, {"input_ids": IDS, "position_ids": POSITIONS})
    logits = family.head(net).logits(hidden.reshape(-1, hidden.shape[-1]))
    own = net(input_ids=IDS, use_cache=False).logits
    assert logits.dtype == torch.float32
    assert own.std() > 0.05
    torch.testing.assert_close(logits.reshape(own.shape), own, rtol=1e-6, atol=1e-6)


def test_structure_is_found(net: nn.Module) -> None:
    family = FAMILY
    layers = family.layers(net)
    assert len(layers) == 3
    assert all(net.get_submodule(name) is layer for name, layer in layers)
    head, embedding = family.head_name(net), family.embedding_name(net)
    assert net.get_submodule(str(head)) is net.get_output_embeddings()
    assert net.get_submodule(str(embedding)) is net.get_input_embeddings()
    assert family.tied(net) == bool(net.config.tie_word_embeddings)


def test_stages_equal_the_plain_forward_bit_for_bit(net: nn.Module) -> None:
    family = FAMILY
    stages = family.stages(net)
    assert stages is not None
    # two packed rows: positions restart, and no mask is given
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None].repeat(2, 1)
    inputs = {"input_ids": IDS, "position_ids": positions}
    (stack,) = stages.stacks
    hidden, calls = stack.embed(inputs, None)
    for layer, call in zip(stack.layers, calls, strict=True):
        hidden = layer(hidden, call)
    assert torch.equal(hidden, family.hidden(net, inputs))
    assert len(family.layers(net)) == 3  # the net's own layers are back in place


def test_soft_cap_is_not_left_out() -> None:
    net = make_net("gemma2", final_logit_softcapping=0.5)
    family = FAMILY
    hidden = family.hidden(net, {"input_ids": IDS})
    assert family.head(net).logits(hidden[0]).abs().max() <= 0.5


def test_wrapped_head_takes_part() -> None:
    """An adapter around the head changes the logits, and is found under the head's name."""

    class Wrapper(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x) + 1.0  # type: ignore[no-any-return]

    net: Any = make_net("llama")
    family = FAMILY
    hidden = family.hidden(net, {"input_ids": IDS})[0]
    before = family.head(net).logits(hidden)
    net.lm_head = Wrapper(net.lm_head)
    assert family.head_name(net) == "lm_head"
    torch.testing.assert_close(family.head(net).logits(hidden), before + 1.0)


def test_net_without_layers_is_refused() -> None:
    net: Any = make_net("llama")
    net.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="no list of its 7 layers"):
        FAMILY.layers(net)


def test_learned_positions_are_told_from_other_tables() -> None:
    family = FAMILY
    assert [family.learned_positions(make_net(kind)) for kind in ("gpt2", "opt", "llama", "bloom")] == [
        64,
        64,
        None,
        None,
    ]
    net: Any = make_net("llama")
    net.model.kinds = nn.Embedding(3, 32)  # no table of positions, though not of tokens either
    assert family.learned_positions(net) is None
