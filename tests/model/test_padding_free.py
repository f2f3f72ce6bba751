"""Encoder layers without padding: logits and gradients equal those of padded rows, in every proven family."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunekit.model.attention import padding_free
from tunekit.model.attention import real_tokens as real_tokens_file
from tunekit.model.attention.padding_free import PROVEN, _RowAttention, skip_padding
from tunekit.model.attention.real_tokens import TOKENS, RealTokens, real_tokens
from tunekit.model.call import Call, calling
from tunekit.model.dropout import dropout_noise, quicken_dropout

LENGTHS = (5, 1, 9, 9, 3)
CPU = torch.device("cpu")


def make_net(model_type: str) -> Any:
    """A small sequence classifier with drawn weights, in float64."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    if model_type == "distilbert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}
    config = AutoConfig.for_model(model_type, vocab_size=40, num_labels=3, max_position_embeddings=32, **sizes)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float64).eval()


def layers_of(net: Any) -> list[nn.Module]:
    return next(list(module) for module in net.modules() if isinstance(module, nn.ModuleList))


def inputs() -> dict[str, Tensor]:
    """Padded rows; 1 is RoBERTa's padding id, from which it computes positions."""
    ids = torch.ones(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.arange(2, 2 + length) + 5 * row
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def results(net: Any, call: Call) -> list[Tensor]:
    """The logits and the gradients of all parameters."""
    with calling(call):
        logits = net(**inputs()).logits
    logits.square().sum().backward()
    return [logits.detach(), *(each.grad for each in net.parameters() if each.grad is not None)]


@pytest.mark.parametrize("longest", [128, 4])  # in two padded products; row by row
@pytest.mark.parametrize("model_type", sorted(PROVEN))
def test_logits_and_gradients_equal_those_of_padded_rows(
    model_type: str, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(padding_free, "MAX_TOKENS", longest)
    monkeypatch.setattr(real_tokens_file, "MIN_WIDTH_BITS", 3)  # rows of up to 8 tokens, and rows of 9
    padded = results(make_net(model_type), Call())
    net, sizes = make_net(model_type), list[int]()
    skip_padding(net, layers_of(net), CPU)
    layers_of(net)[1].register_forward_pre_hook(lambda layer, arguments: sizes.append(arguments[0].shape[1]))
    unpadded = results(net, Call(real_tokens=real_tokens(inputs())))
    assert sizes == [TOKENS]  # 27 real tokens, filled, in place of 5 rows of 9
    assert len(unpadded) == len(padded)
    for one, other in zip(unpadded, padded, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_a_call_without_real_tokens_computes_padded_rows() -> None:
    net = make_net("bert")
    skip_padding(net, layers_of(net), CPU)
    for one, other in zip(results(net, Call()), results(make_net("bert"), Call()), strict=True):
        torch.testing.assert_close(one, other)


def test_other_devices_and_masks_of_pairs_of_tokens_keep_their_padding() -> None:
    net = make_net("bert")
    skip_padding(net, layers_of(net), torch.device("cuda"))
    assert net.config._attn_implementation == "sdpa"
    assert real_tokens({"attention_mask": torch.ones(1, 1, 3, 3)}) is None
    assert real_tokens({"input_ids": torch.ones(1, 3)}) is None


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_backward_pass_is_the_derivative(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_tokens_file, "MIN_WIDTH_BITS", 1)  # so that the row of three tokens is alone
    real, heads, size = RealTokens((3, 1, 2), 4), 2, 3
    assert [group.lengths for group in real.groups] == [[1, 2], [3]]
    tensors = [torch.randn(8, heads, size, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def attend(*parts: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same elements are dropped in every call
        return _RowAttention.apply(*parts, real, 0.7, dropout)

    assert torch.autograd.gradcheck(attend, tensors)
    assert not attend(*tensors)[6:].any()  # beyond the real tokens


def test_dropout_keeps_the_mean_and_repeats_with_torch_s_seed() -> None:
    x = torch.ones(1000, 1001)
    torch.manual_seed(3)
    noise = dropout_noise(x, 0.1)
    torch.manual_seed(3)
    assert torch.equal(noise, dropout_noise(x, 0.1))
    assert not torch.equal(noise, dropout_noise(x, 0.1))
    assert abs(float((noise == 0).double().mean()) - 0.1) < 5 * 0.3 / 1e3
    assert abs(float(noise.double().mean()) - 1) < 2e-3
    assert float(noise.max()) == pytest.approx(1 / 0.9, rel=1e-4)
    columns = (noise == 0).double().mean(dim=0)  # independent of the place
    assert abs(float(columns.std()) / (0.3 / 1000**0.5) - 1) < 0.2


def test_dropout_is_off_in_eval_mode() -> None:
    net = nn.Sequential(nn.Dropout(0.5))
    quicken_dropout(net)
    x = torch.ones(100)
    assert torch.equal(net.eval()(x), x)
    assert set(net.train()(x).tolist()) == {0.0, 2.0}
