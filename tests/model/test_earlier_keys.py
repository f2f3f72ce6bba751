"""Keys and values before those of the tokens, in families of every kind of position and window: against peft, with and
without a cache, padded and alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tests.parity.test_prefix_peft import make_bart
from tests.support.loop_case import KEPT
from tests.support.peft_case import make_t5
from tunekit.adapters.attach import attach_adapter
from tunekit.errors import ModelError
from tunekit.model.attention.earlier_keys import enter, keys_and_values
from tunekit.model.attention.self_attention import attention_sizes, heads_and_width, self_attentions
from tunekit.model.call import Call, calling
from tunekit.recipe.adapters.prefix import PrefixSettings

LENGTH, WINDOW = 3, 6
IDS = torch.arange(3, 27).reshape(2, 12)
SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED: dict[str, Any] = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.1}


def make_opt() -> Any:
    sizes = SIZES | {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "init_std": 0.1}
    return OPTForCausalLM(OPTConfig(**sizes))


def make_neox() -> Any:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=48, initializer_range=0.1))


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
    "gpt_neox": make_neox,
    "opt": make_opt,
    "mistral in a window": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=WINDOW)),
    "gemma2 with every second layer in one": lambda: Gemma2ForCausalLM(
        Gemma2Config(**GROUPED, head_dim=8, sliding_window=WINDOW, attn_implementation="eager")
    ),
}


def make(family: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def prefixed(net: Any, embeddings: Tensor) -> Any:
    """The net with a prefix as PEFT lays it out: (P, L * 2 * H * D)."""
    places = self_attentions(net)

    def rows(layer: int) -> tuple[Tensor, Tensor]:
        heads, width = places[layer].heads, places[layer].width
        keys, values = embeddings.view(LENGTH, len(places), 2, heads, width)[:, layer].permute(1, 2, 0, 3)
        return keys, values

    enter(net, places, LENGTH, rows)
    return net


def with_peft(family: str) -> tuple[Any, Tensor]:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    theirs = peft.get_peft_model(make(family), config).eval()
    return theirs, theirs.prompt_encoder.default.embedding.weight.detach()


@pytest.fixture(autouse=True)
def quiet_peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft passes the cache under its old name
        yield


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_as_peft_and_padded_as_alone_and_cached_as_whole(family: str) -> None:
    theirs, embeddings = with_peft(family)
    net = prefixed(make(family), embeddings)
    torch.testing.assert_close(net(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=0, atol=1e-5)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = net(input_ids=IDS, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(net(input_ids=IDS[:1, 4:]).logits[0], whole[0, 4:], rtol=0, atol=1e-5)
    cache: Any = None
    steps: list[Tensor] = []
    for first, last in [(0, 5), *((end, end + 1) for end in range(5, 12))]:
        places = {"attention_mask": mask[:, :last], "position_ids": positions[:, first:last]}
        output = net(input_ids=IDS[:, first:last], **places, **{KEPT: cache}, use_cache=True)
        cache, steps = getattr(output, KEPT), [*steps, output.logits]
    cached = torch.cat(steps, dim=1)
    torch.testing.assert_close(cached[1], whole[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(cached[0, 4:], whole[0, 4:], rtol=0, atol=1e-5)
    assert cache is not None
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("family", [name for name in FAMILIES if "window" not in name and "one" not in name])
@torch.no_grad()
def test_a_prefix_of_real_tokens_is_the_row_with_them(family: str) -> None:
    net, plain = make(family), make(family)
    before = IDS[:1, :LENGTH]
    found = keys_and_values(net, self_attentions(net), before)
    assert [keys.shape[1] for keys, _ in found] == [LENGTH, LENGTH]
    enter(net, self_attentions(net), LENGTH, lambda layer: found[layer])
    row = torch.cat([before, IDS[1:, :9]], dim=1)
    torch.testing.assert_close(
        net(input_ids=IDS[1:, :9]).logits, plain(input_ids=row).logits[:, LENGTH:], rtol=0, atol=1e-5
    )
    with calling(Call(bypassed=True)):
        assert torch.equal(net(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_layers_of_one_window_share_a_mask() -> None:
    net = make("gemma2 with every second layer in one")
    net = prefixed(net, torch.randn(LENGTH, 2 * 2 * 2 * 8))
    seen: list[Tensor] = []
    for place in self_attentions(net):
        place.module.register_forward_pre_hook(
            lambda module, inputs, named: seen.append(named["attention_mask"]), with_kwargs=True
        )
    llama = prefixed(make("llama"), torch.randn(LENGTH, 2 * 2 * 2 * 8))
    for place in self_attentions(llama):
        place.module.register_forward_pre_hook(
            lambda module, inputs, named: seen.append(named["attention_mask"]), with_kwargs=True
        )
    for each in (net, llama):
        each(input_ids=IDS)
    assert seen[0] is not seen[1]
    assert seen[2] is seen[3]
    assert seen[2].dtype == torch.float32
    with torch.inference_mode():
        llama(input_ids=IDS)
    llama(input_ids=IDS).logits.sum().backward()  # no tensor of inference mode is left over


@pytest.mark.parametrize("family", ["t5", "bart"])
@torch.no_grad()
def test_an_encoder_decoder_answers_the_same_with_and_without_a_cache(family: str) -> None:
    base: Any = {"t5": make_t5, "bart": make_bart}[family]()
    settings = PrefixSettings(num_virtual_tokens=LENGTH, init="random")
    asked = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    asked["attention_mask"][0, 8:] = 0
    how = {"max_new_tokens": 8, "do_sample": False, "num_beams": 1, "pad_token_id": 0, "eos_token_id": None}
    how |= {"forced_eos_token_id": None, "forced_bos_token_id": None, "decoder_start_token_id": 2}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    plain = base.generate(**asked, **how)
    attach_adapter(base, settings, seed=0, head_name="lm_head")
    with_cache, without = (base.generate(**asked, **how, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    for step, (cached, whole) in enumerate(zip(with_cache.logits, without.logits, strict=True)):
        torch.testing.assert_close(cached, whole, rtol=0, atol=1e-5)
        assert (cached - plain.logits[step]).abs().max() > 1e-2


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "alibi": (
        lambda: FalconForCausalLM(FalconConfig(**SIZES, alibi=True)),
        "falcon .*its positions are an attention bias",
    ),
    "heads of two sizes": (
        lambda: Gemma4ForCausalLM(Gemma4TextConfig(**GROUPED, head_dim=8, global_head_dim=16, sliding_window=WINDOW)),
        "gemma4_text .*not all of its layers have separate keys of one size",
    ),
    "a state": (
        lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**GROUPED, head_dim=8, num_experts=2, moe_intermediate_size=16)),
        "qwen3_next .*it has (layers with linear_attention|no causal self-attention)",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_families_are_refused_by_name(kind: str) -> None:
    make_net, text = REFUSED[kind]
    with torch.device("meta"), pytest.raises(ModelError, match=text):
        self_attentions(make_net())


def test_an_encoder_decoder_has_the_sizes_of_all_its_layers() -> None:
    """Its configuration lists the layers of one stack: plan with generated answers ended with an IndexError."""
    net = make_bart()
    layers = 2 * net.config.num_hidden_layers
    assert attention_sizes(net, layers) == [(net.config.num_attention_heads, *heads_and_width(net.config))] * layers
