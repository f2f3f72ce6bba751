"""The minimum of operations and bytes that a step needs, and the time that they take at the card's measured speeds.

This module only computes; it measures nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from shapes import Row


@dataclass(frozen=True)
class Ceilings:
    """The highest speeds of a card. `measured`: False for assumed speeds, which are those of an H100."""

    product_flops: float = 798e12  # bf16, 8192^3
    copy_bytes: float = 3.0e12  # device to device, bytes read and written
    host_bytes: float = 52e9  # pinned host to device
    measured: bool = False

    @classmethod
    def of(cls, found: dict[str, Any]) -> Ceilings:
        """The speeds in a result of ceilings.py."""
        return cls(found["product_flops"], found["copy_bytes"], found["host_to_device_bytes"], True)


@dataclass(frozen=True)
class Size:
    """The size of a model: parameters without embedding and head, parameters of the head, and the sizes for
    attention."""

    body: int
    head: int
    layers: int
    attention_width: int  # heads x size of a head
    of_source: int = 0  # of the body, what an encoder-decoder's source passes: the encoder, and keys and values of it


def flops_per_token(size: Size, row: Row, recomputed_share: float, supervised_share: float) -> float:
    """Operations per token with LoRA: 2 N forward, 2 N for the gradient of the inputs, 2 N more if layers are
    recomputed. Causal attention: 2 L d s forward and 2.5 times that backward. The head counts for supervised tokens,
    and is not recomputed."""
    attention = attention_flops(size, row)
    body = 2.0 * passed_parameters(size, row) * (2.0 + recomputed_share)
    return body + attention * (3.5 + recomputed_share) + 4.0 * size.head * supervised_share


def passed_parameters(size: Size, row: Row) -> float:
    """The number of parameters in the layers that process a token. For an encoder-decoder: the mean over source and
    answer."""
    source = row.source_tokens / row.length
    return size.body if not row.reads_source else source * size.of_source + (1 - source) * (size.body - size.of_source)


def attention_flops(size: Size, row: Row) -> float:
    """Operations of attention per token, forward. Causal attention multiplies with half of the row on average. The
    whole source is attended to: by itself in half of the layers, by the answer in the other half."""
    if not row.reads_source:
        return 2.0 * size.layers * size.attention_width * row.length
    source, answer = row.source_tokens, row.length - row.source_tokens
    scores = source * source + answer * source + answer * answer / 2.0
    return 4.0 * (size.layers / 2.0) * size.attention_width * scores / row.length


def least_flops_per_token(size: Size, row: Row, supervised_share: float) -> float:
    """Operations per token without recomputation. This is the "4N limit" of the tables."""
    return flops_per_token(size, row, 0.0, supervised_share)


def floor_seconds(
    flops: float, layer_bytes: float, head_bytes: float, row: Row, ceilings: Ceilings
) -> dict[str, float]:
    """The minimum seconds of one step, for each possible limit. Streamed weights are copied over the bus twice in each
    pass, and a streamed head twice for each micro-batch."""
    floors = {"products": flops * row.step_tokens / ceilings.product_flops}
    if row.engine == "resident":
        floors["weights"] = 2.0 * layer_bytes * row.micro_batches / ceilings.copy_bytes
    else:
        floors["bus"] = 2.0 * layer_bytes * row.passes / ceilings.host_bytes
    if row.streamed_head:
        crossed = 2.0 * head_bytes * row.micro_batches / ceilings.host_bytes
        floors["bus"] = floors.get("bus", 0.0) + crossed
    return floors


def break_even_tokens(layer_bytes: float, body: float, ceilings: Ceilings) -> float:
    """The number of tokens per step from which the computation takes longer than the copies of streamed layers: b F /
    (3 BW), with b bytes for each parameter of `body` (the layers that process a token).

    Assumes 6 N operations per token, because all layers are recomputed.
    """
    return layer_bytes / body * ceilings.product_flops / (3.0 * ceilings.host_bytes)


def as_json(value: Any) -> dict[str, Any]:
    """A dataclass as plain values."""
    return asdict(value)
