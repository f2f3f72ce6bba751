"""Attention within documents: packed rows against the same rows alone, layer kinds, gradients, recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.model.test_families import HEADS, MODELS, make_net
from tunekit.memory.offload import prepare_layers
from tunekit.model.attention.cpu_kernel import attend_causally
from tunekit.model.attention.documents import (
    PRODUCTS,
    PROVEN,
    VARLEN,
    DocumentMask,
    attend_per_document,
    shares_prefixes,
    takes_documents,
)
from tunekit.model.attention.segments import Segments, find_segments
from tunekit.model.call import Call, calling
from tunekit.model.families.causal import FAMILY

CPU = torch.device("cpu")
LENGTHS = ((9, 1, 5), (3, 12))  # documents of two rows: longer and shorter than a window of 4, and of one token
IDS = torch.randint(3, 97, (2, 15), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.tensor([[p for length in row for p in range(length)] for row in LENGTHS])
OTHERS: dict[str, dict[str, Any]] = {
    "gpt_oss": {**HEADS, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def make(model_type: str, **changes: Any) -> Any:
    net = make_net(model_type, **changes) if model_type in MODELS else other(model_type)
    attend_per_document(net, CPU, torch.float32)
    return net


def other(model_type: str) -> Any:
    MODELS[model_type] = OTHERS[model_type]
    try:
        return make_net(model_type)
    finally:
        del MODELS[model_type]


def hidden(net: Any, ids: torch.Tensor, positions: torch.Tensor, segments: Segments | None) -> torch.Tensor:
    with calling(Call(segments=segments)):
        return FAMILY.hidden(net, {"input_ids": ids, "position_ids": positions})


def test_segments_are_where_positions_restart() -> None:
    assert find_segments(POSITIONS) == Segments(LENGTHS)
    assert Segments(LENGTHS).longest == 12
    assert Segments(LENGTHS).boundaries() == [0, 9, 10, 15, 18, 30]
    assert not Segments(LENGTHS).single
    assert find_segments(torch.arange(4).repeat(2, 1)) == Segments(((4,), (4,)))
    assert find_segments(torch.arange(4).repeat(2, 1)).single


@pytest.mark.parametrize("model_type", sorted({*MODELS, *OTHERS}))
def test_packed_documents_equal_documents_alone(model_type: str) -> None:
    net = make(model_type)
    per_document = str(net.config._attn_implementation).endswith("_per_document")
    assert per_document or model_type not in PROVEN
    if model_type == "bloom":  # its attention is not transformers' table's, and it takes no positions
        assert not per_document
        return
    packed = hidden(net, IDS, POSITIONS, find_segments(POSITIONS))
    if model_type not in ("gpt_oss", "opt"):  # transformers makes their masks without positions: packed rows leak
        torch.testing.assert_close(packed, hidden(net, IDS, POSITIONS, None), rtol=1e-5, atol=1e-5)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            ids = IDS[row : row + 1, start : start + length]
            alone = hidden(net, ids, torch.arange(length)[None], None)
            torch.testing.assert_close(packed[row, start : start + length], alone[0], rtol=1e-5, atol=1e-5)
            start += length


SHARED = torch.tensor([[*range(9), *range(6, 11), *range(2, 7), *range(3)], [*range(5), *range(2, 9), *range(10)]])
BEHIND = torch.randint(3, 97, SHARED.shape, generator=torch.Generator().manual_seed(5))
ALONE = [(0, [*range(6), *range(9, 14)], 6), (0, [0, 1, *range(14, 19)], 2), (1, [0, 1, *range(5, 12)], 2)]


def test_a_document_that_begins_at_a_position_shares_what_is_before_it() -> None:
    found = find_segments(SHARED)
    assert found == Segments(((9, 5, 5, 3), (5, 7, 10)), ((0, 6, 2, 0), (0, 2, 0)))
    assert found.key_lengths(0) == (9, 11, 7, 3)
    assert found.longest == 11
    assert found.key_boundaries() == [0, 9, 20, 27, 30, 35, 44, 54]
    assert found.key_indices(1).tolist() == [*range(5), 0, 1, *range(5, 22)]
    assert find_segments(torch.arange(3, 7)[None]) == Segments(((4,),)), "there is nothing before it"


@pytest.mark.sampled(12)
@pytest.mark.parametrize("plain", [False, True], ids=["products", "each document"])
@pytest.mark.parametrize("model_type", sorted(PROVEN))
def test_documents_that_share_a_beginning_equal_documents_alone(model_type: str, plain: bool) -> None:
    """In values, and in the gradient of what they share."""
    net = make(model_type)
    if not shares_prefixes(net, 11):
        windows = model_type in ("gemma2", "gemma3_text", "gpt_oss")
        assert windows, "the others have no window, or a longer one"
        return
    if plain:
        net.config._attn_implementation = "sdpa_per_document"
    weight = net.get_input_embeddings().weight.requires_grad_(True)
    out = hidden(net, BEHIND, SHARED, find_segments(SHARED))
    scales = torch.arange(out.shape[-1])
    for row, places, shared in ALONE:
        alone = hidden(net, BEHIND[row : row + 1, places], torch.arange(len(places))[None], None)[0, shared:]
        found = out[row, places[shared:]]
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
        ours, theirs = (
            torch.autograd.grad((each * scales).sum(), weight, retain_graph=True)[0] for each in (found, alone)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_long_documents_of_a_row_go_to_torchs_kernel_and_the_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make("llama")
    expected = hidden(net, IDS, POSITIONS, find_segments(POSITIONS))
    seen: list[tuple[int, ...]] = []

    def attend(query: Any, key: Any, value: Any, lengths: tuple[int, ...], scale: float) -> torch.Tensor:
        seen.append(lengths)
        return attend_causally(query, key, value, lengths, scale)

    monkeypatch.setattr("tunekit.model.attention.documents.attend_causally", attend)
    monkeypatch.setattr("tunekit.model.attention.documents.MAX_TOKENS", 8)
    found = hidden(net, IDS, POSITIONS, find_segments(POSITIONS))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert set(seen) == {(1,), (5,), (3,)}, "not those of 9 and of 12 tokens"


def test_no_layer_gets_a_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    net = make("llama")
    for layer in net.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, inputs, named: seen.append(named["attention_mask"]), with_kwargs=True
        )
    hidden(net, IDS, POSITIONS, find_segments(POSITIONS))
    assert len(seen) == 3
    assert all(isinstance(mask, DocumentMask) and mask.allowed is None for mask in seen)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("checkpointed", [0, 2])
def test_gradients_equal_those_of_the_dense_mask(model_type: str, checkpointed: int) -> None:
    found = []
    for segments in (find_segments(POSITIONS), None):
        net = make(model_type).train()
        prepare_layers([layer for _, layer in FAMILY.layers(net)], checkpointed)
        weights = [net.model.layers[0].self_attn.q_proj.weight, net.model.layers[2].self_attn.v_proj.weight]
        for weight in weights:
            weight.requires_grad_(True)
        out = hidden(net, IDS, POSITIONS, segments)  # the backward pass runs outside the call
        found.append(torch.autograd.grad((out * torch.arange(out.shape[-1])).sum(), weights))
    for ours, dense in zip(*found, strict=True):
        assert dense.abs().max() > 0
        torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-5 * float(dense.abs().max()))


def test_a_net_whose_layers_take_the_mask_apart_keeps_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunekit.model.attention import documents as attention

    monkeypatch.setattr(attention, "PROVEN", frozenset())
    monkeypatch.setattr(attention, "_accepts_documents", {})
    net = make_net("llama")
    attend_per_document(net, CPU, torch.float32)
    assert net.config._attn_implementation == PRODUCTS, "tried without values, and found to work"

    def forward(self: Any, hidden_states: Any, attention_mask: Any = None, **named: Any) -> Any:
        return plain(self, hidden_states, attention_mask=attention_mask[:, :, :, :], **named)

    kind: Any = type(net.model.layers[0])
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", forward)
    monkeypatch.setattr(attention, "_accepts_documents", {})
    net = make_net("llama")
    attend_per_document(net, CPU, torch.float32)
    assert net.config._attn_implementation == "sdpa"


def test_on_cuda_half_precision_takes_one_kernel_for_all_documents() -> None:
    from torch.nn.attention import varlen

    assert varlen is not None
    net = make_net("llama")
    attend_per_document(net, torch.device("cuda"), torch.bfloat16)
    assert net.config._attn_implementation == VARLEN
    out = hidden(net.to("meta", torch.bfloat16), IDS.to("meta"), POSITIONS.to("meta"), find_segments(POSITIONS))
    assert (out.shape, out.device.type) == ((2, 15, 32), "meta"), "shapes only: no GPU is needed"
    out = hidden(net, BEHIND.to("meta"), SHARED.to("meta"), find_segments(SHARED))
    assert (out.shape, out.device.type) == ((2, 22, 32), "meta"), "with more keys than queries"
    other = make_net("llama")
    attend_per_document(other, torch.device("cuda"), torch.float32)
    assert other.config._attn_implementation == "sdpa_per_document"


@pytest.mark.parametrize(
    ("capability", "head", "takes"), [((8, 0), 8, True), ((7, 5), 8, False), ((9, 0), 12, False), ((8, 9), 264, False)]
)
def test_the_kernel_is_asked_only_where_it_runs(
    capability: tuple[int, int], head: int, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ampere or newer, and heads of a multiple of 8 up to 256 numbers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = make_net("llama", head_dim=head).config
    assert takes_documents(torch.device("cuda", 0), config) == takes
    assert not takes_documents(CPU, config)


def test_a_torch_that_wants_every_head_of_keys_gets_them() -> None:
    from tunekit.model.attention.documents import _with_all_heads

    seen: list[Any] = []
    query, key, value = torch.randn(6, 4, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    _with_all_heads(lambda *given, **named: seen.append((given, named)), query, key, value, 5, enable_gqa=True, scale=1)
    (_, keys, values, five), named = seen[0]
    assert torch.equal(keys, key[:, [0, 0, 1, 1]])
    assert torch.equal(values, value[:, [0, 0, 1, 1]])
    assert (five, named) == (5, {"scale": 1})
