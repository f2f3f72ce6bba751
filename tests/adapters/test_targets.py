"""Which layers are adapted: all-linear, lists, expressions, exclusions, patterns, and every way to name nothing."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.targets import concrete_pattern, concrete_targets
from tunekit.adapters.patterns import Patterns
from tunekit.adapters.targets import find_targets, unreached_experts
from tunekit.errors import AdapterError, InputError, RecipeError
from tunekit.files.patterns import compile_pattern
from tunekit.model.quantized.weights import pack_linear
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.records import Target

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4))


def find(net: nn.Module, file: str | None = None, head_name: str | None = "lm_head", **values: Any) -> list[Target]:
    return find_targets(net, LoraSettings(**{"r": 4, **values}), head_name=head_name, file=file)


def names(targets: list[Target]) -> set[str]:
    return {target.name for target in targets}


def test_all_linear_is_every_linear_layer_but_the_head(llama: nn.Module, gpt2: nn.Module) -> None:
    found = find(llama)
    assert [target.name for target in found] == sorted(names(found))
    assert {name.rpartition(".")[2] for name in names(found)} == set(PROJECTIONS)
    assert len(found) == 14
    assert {target.kind for target in find(gpt2)} == {"conv1d"}
    assert len(find(gpt2)) == 8
    assert "lm_head" in names(find(llama, head_name=None))


def test_all_linear_sees_packed_layers() -> None:
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 64}, **HEADS))
    dense = names(find(net))
    for name in dense:
        parent, _, own = name.rpartition(".")
        packed = pack_linear(net.get_submodule(name), "nf4", False, torch.float32)
        setattr(net.get_submodule(parent), own, packed)
    assert names(find(net)) == dense
    assert len(dense) == 14


def test_target_facts(llama: nn.Module, gpt2: nn.Module) -> None:
    target = find(llama, target_modules=("layers.1.self_attn.k_proj",), alpha=8.0)[0]
    assert target == Target("model.layers.1.self_attn.k_proj", "linear", 32, 16, 4 * (32 + 16), 4, 8.0)
    target = find(gpt2, target_modules=("h.0.attn.c_attn",))[0]
    assert (target.kind, target.in_features, target.out_features) == ("conv1d", 32, 96)
    target = find(llama, target_modules=("embed_tokens",))[0]
    assert (target.kind, target.in_features, target.out_features) == ("embedding", 97, 32)


@pytest.mark.parametrize(
    ("entries", "count"),
    [
        (("q_proj",), 2),
        (("self_attn.q_proj", "lm_head"), 3),
        (("model.layers.0.mlp.up_proj",), 1),
        (".*layers\\.1\\.(self_attn|mlp).*", 7),  # containers and activations are passed over
        ("model\\.layers\\.\\d\\.self_attn\\.(q|k)_proj", 4),
        ("(?!.*mlp).*_proj", 8),
    ],
)
def test_lists_and_expressions(llama: nn.Module, entries: str | tuple[str, ...], count: int) -> None:
    assert len(find(llama, target_modules=entries)) == count


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"target_modules": ("q_porj", "v_proj")}, ["'q_porj' matches no module", "did you mean 'q_proj'"]),
        ({"target_modules": ("proj",)}, ["'proj' matches no module", "'q_proj'"]),  # no substrings
        ({"target_modules": ("Q_PROJ", "xyz")}, ["'Q_PROJ'", "'xyz' matches no module", "its layers are"]),
        ({"target_modules": "q_proj|nothing"}, ["'q_proj|nothing' matches no module"]),  # the whole name, not its end
        ({"target_modules": "q_proj"}, ["'q_proj' matches no module", "write a list: [q_proj]"]),
        ({"target_modules": ("self_attn",)}, ["LlamaAttention", "k_proj, o_proj, q_proj, v_proj"]),
        ({"target_modules": ("norm",)}, ["'model.norm' (LlamaRMSNorm)", "remove it"]),
        ({"target_modules": ".*norm"}, ["LlamaRMSNorm"]),
        ({"target_modules": ("all-linear",)}, ["not in a list"]),
        ({"exclude_modules": ".*"}, ["the base has no layer"]),
        ({"exclude_modules": ("up_porj",)}, ["exclude_modules", "'up_porj' matches no module", "'up_proj'"]),
        ({"rank_pattern": {"q_porj": 2}}, ["rank_pattern", "'q_porj' matches no adapted layer", "'q_proj'"]),
        ({"alpha_pattern": {"lm_head": 2.0}}, ["alpha_pattern", "'lm_head' matches no adapted layer"]),
        ({"modules_to_save": ("lm_haed",)}, ["modules_to_save: 'lm_haed' matches no module", "did you mean 'lm_head'"]),
        ({"layers_to_transform": (0, 7)}, ["layers_to_transform: the base has no layer 7", "its layers are 0 to 1"]),
        ({"r": 5, "start": "orthogonal"}, ["adapter.r: start: orthogonal needs an even rank"]),
        ({"r": 17}, ["rank 17 is too large for 'model.layers.0.self_attn.k_proj' (16 x 32)", "at most 16"]),
        ({"rank_pattern": {"v_proj": 99}}, ["rank 99 is too large", "v_proj"]),
    ],
)
def test_what_fits_nothing_is_an_error(llama: nn.Module, values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        find(llama, **values)
    message = str(caught.value)
    assert all(problem.key and problem.key.startswith("adapter.") for problem in caught.value.problems)
    for word in words:
        assert word in message, message


def test_every_problem_is_reported_at_once(llama: nn.Module) -> None:
    with pytest.raises(RecipeError) as caught:
        find(llama, target_modules=("a_proj", "b_proj", "q_proj"), exclude_modules=("c",), rank_pattern={"d": 2})
    assert len(caught.value.problems) == 4


def test_ranks_too_large_are_one_problem(llama: nn.Module) -> None:
    with pytest.raises(RecipeError) as caught:
        find(llama, r=40)
    (problem,) = caught.value.problems
    assert problem.what == "rank 40 is too large for 'model.layers.0.self_attn.k_proj' (16 x 32) and 13 more"
    assert problem.how == "use at most 16, or exclude it with exclude_modules: [k_proj]"


def test_exclusion(llama: nn.Module) -> None:
    kept = find(llama, exclude_modules=("down_proj", "layers.0.mlp.up_proj"))
    assert len(kept) == 11
    assert names(find(llama, exclude_modules=".*mlp.*")) == {n for n in names(find(llama)) if ".mlp." not in n}


@pytest.mark.parametrize("reverse", [False, True])
def test_the_longest_pattern_wins_in_either_order(llama: nn.Module, reverse: bool) -> None:
    entries = [("self_attn.q_proj", 8), ("q_proj", 2), ("layers.1.self_attn.q_proj", 3)]
    pattern = dict(reversed(entries) if reverse else entries)
    alphas = {key: float(value) for key, value in pattern.items()}
    found = find(llama, target_modules=("q_proj",), rank_pattern=pattern, alpha_pattern=alphas)
    assert [(target.r, target.alpha) for target in found] == [(8, 8.0), (3, 3.0)]
    with pytest.raises(AdapterError, match="both match"):  # in a file nobody knows which was meant
        find(llama, file="adapter_config.json", target_modules=("q_proj",), rank_pattern=pattern)


def test_equally_long_patterns_that_differ_are_an_error(llama: nn.Module) -> None:
    with pytest.raises(RecipeError, match="both match"):
        find(llama, rank_pattern={"q_pro.": 2, "q_.roj": 3})


def test_names_inside_fused_experts_say_so() -> None:
    with torch.device("meta"):
        net = MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=4))
    for entry in ("gate_proj", "w1", "gate_up_proj", "experts.down_proj"):
        with pytest.raises(RecipeError, match=r"exists only inside the fused expert parameter 'model\.layers\.0\.mlp"):
            find(net, target_modules=("q_proj", entry))
    settings = LoraSettings(r=4, target_modules=("q_proj",))
    assert unreached_experts(net, settings, find_targets(net, settings, head_name="lm_head")) == []
    settings = LoraSettings(r=4)
    assert len(unreached_experts(net, settings, find_targets(net, settings, head_name="lm_head"))) == 4


def test_experts_that_an_entry_reaches_only_in_part_are_named() -> None:
    with torch.device("meta"):
        config = Qwen2MoeConfig(**SIZES, **HEADS, num_experts=4, moe_intermediate_size=16)
        net = Qwen2MoeForCausalLM(config)
    settings = LoraSettings(r=4, target_modules=("gate_proj",))
    targets = find_targets(net, settings, head_name="lm_head")
    assert all("shared_expert" in target.name for target in targets)
    assert unreached_experts(net, settings, targets) == [f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)]


def test_targets_are_found_again_under_an_adapter() -> None:
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))
    before = find(net)
    attach_adapter(net, LoraSettings(r=4), seed=0, head_name="lm_head")
    assert find(net) == before


HOSTILE = [
    "(a+)+$",
    "(.*a){25}",
    "(a|a)*b",
    "(.*)*x",
    "(" * 40 + "a*" + ")*" * 40 + "x",
    "((((a?){1000}){1000}){1000}){1000}b",
    "(.*?){1000}z",
    "(?:(?:.*.*)*.*)*!",
    r"(?=(.*a)*b).*",
    "a" * 100_001,
    "(" * 4000 + ")" * 4000,
    "a{4294967296}",
    r"(a)\1",
    "(?i)A",
    "((",
]


@pytest.mark.parametrize("pattern", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_hostile_patterns_end_quickly(llama: nn.Module, pattern: str, field: str) -> None:
    value: Any = {pattern: 2} if "pattern" in field else pattern
    start = time.process_time()
    with pytest.raises((InputError, ValidationError)):  # the settings' own, which a recipe's reading turns into words
        find(llama, **{"target_modules": "all-linear", field: value})
    assert time.process_time() - start < 5


def test_many_costly_patterns_share_one_budget() -> None:
    net = nn.Module()
    for number in range(300):
        net.add_module("a" * 60 + str(number), nn.Linear(4, 4))
    start = time.process_time()
    with pytest.raises(RecipeError, match="too many steps"):
        find(net, r=1, rank_pattern={"(.*)" * n + "x" * n: 2 for n in range(20, 320)})
    assert time.process_time() - start < 20


ATOMS = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", "[a-c_]", r"\w", r"[\W\d]", "^", "$", r"\b", ""])


def combined(children: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    quantifiers = st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "*?", "{0,}"])
    return st.one_of(
        st.builds(lambda left, right: left + right, children, children),
        st.builds(lambda left, right: f"(?:{left}|{right})", children, children),
        st.builds(lambda child, quantifier: f"(?:{child}){quantifier}", children, quantifiers),
        st.builds(lambda child: f"(?={child})", children),
        st.builds(lambda child: f"(?!{child})", children),
    )


@settings(max_examples=300, deadline=None)
@given(st.recursive(ATOMS, combined, max_leaves=6), st.text("ab._", max_size=6))
def test_patterns_mean_what_re_says(pattern: str, name: str) -> None:
    try:
        compile_pattern(pattern)
    except ValueError as error:
        assume("too many steps" not in str(error))  # repeats three deep are refused
        raise
    ours = Patterns()
    assert ours.matches(pattern, name) == (re.fullmatch(pattern, name) is not None)
    assert ours.matches_ending(pattern, name) == (re.match(rf"(.*\.)?({pattern})$", name) is not None)


REFUSED = {
    "a{1,3}b{e<=1}": "a brace",
    "(?:foo){i<=1,s<=2}": "a brace",
    "[[:alpha:]]+": "a bracket in a set",
    "(" * 101 + ")" * 101: "nested too deeply",
    r"(q)\1": "back references",
    "(?i)Q_PROJ": "flags",
    "(?i:Q)_proj": "flags",
    "(q)(?(1)_proj)": "conditions",
    "(?P<a>q)(?P=a)": "conditions",
    "((a?){100}){100}": "too many steps",
    "a{1001}": "too many steps",
    "((a*)*)*": "too many steps",
    ".*x" * 17: "too many steps",
    "[a-": "is not a regular expression",
    "(a": "is not a regular expression",
    "a**": "is not a regular expression",
}


@pytest.mark.parametrize("pattern", REFUSED)
def test_patterns_are_refused_by_structure(pattern: str) -> None:
    with pytest.raises(AdapterError, match=REFUSED[pattern]):
        Patterns().matches(pattern, "model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:.*?(?:language|text).*?(?:self_attn|attn).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:\w+\.)*q_proj)",
        r"(?P<stem>[a-z_]+\.)+(?P<layer>\d{1,3})\.(?!mlp)[^.]*\.(?<!x)q_proj",
        "|".join(re.escape(f"model.layers.{layer}.self_attn.q_proj") for layer in range(200)),
    ],
)
def test_everyday_patterns_match(pattern: str) -> None:
    patterns = Patterns()
    assert patterns.matches(pattern, "model.layers.0.self_attn.q_proj")
    assert not patterns.matches(pattern, "model.layers.0.mlp.down_proj")


def test_a_pattern_that_takes_too_long_is_refused_after_its_processor_time() -> None:
    patterns = Patterns(seconds=0.3)
    start = time.process_time()
    with pytest.raises(AdapterError, match="too many steps to match the name 'aaaa"):
        patterns.matches("(a|b|ab|.|..|...)*" * 4 + "[X-Z]", "a" * 60)
    with pytest.raises(AdapterError, match="too many steps"):  # together they have no more
        patterns.matches("(a|b|ab|.|..|...)*" * 4 + "[X-Y]", "a" * 60)
    assert time.process_time() - start < 2


def test_concrete_targets_mean_exactly_the_targets() -> None:
    everything = ["a.q", "b.q", "b.k", "c.a.k", "a.k"]
    assert concrete_targets(["a.q", "b.q"], everything) == ["q"]
    assert concrete_targets(["b.q"], everything) == ["b.q"]
    alone = concrete_targets(["a.k"], everything)  # the list ["a.k"] would also be c.a.k
    assert isinstance(alone, str)
    assert [name for name in everything if re.fullmatch(alone, name)] == ["a.k"]


def test_concrete_patterns_keep_their_meaning_in_any_order() -> None:
    resolved = {"m.0.q": 8, "m.1.q": 3, "m.1.k": 4}
    assert concrete_pattern({"k": 4, "0.q": 8, "1.q": 3}, resolved, 4) == {"0.q": 8, "1.q": 3, "k": 4}
    written = concrete_pattern({"q": 8, "1.q": 3}, resolved, 4)
    assert written == {"^m\\.0\\.q": 8, "^m\\.1\\.q": 3}
    for name, value in resolved.items():
        found = [v for key, v in written.items() if re.match(rf"(.*\.)?({key})$", name)] or [4]
        assert found == [value]
