"""What a run must do at least: operations and bytes, and the time they take at measured ceilings. Arithmetic only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from shapes import Row


@dataclass(frozen=True)
class Ceilings:
    """Rates of a card. `measured` is False for those that a plan assumes (an H100's, of an earlier reading)."""

    product_flops: float = 798e12  # bf16, 8192^3
    copy_bytes: float = 3.0e12  # device to device, bytes read and written
    host_bytes: float = 52e9  # pinned host to device
    measured: bool = False

    @classmethod
    def of(cls, found: dict[str, Any]) -> Ceilings:
        """From what ceilings.py measured."""
        return cls(found["product_flops"], found["copy_bytes"], found["host_to_device_bytes"], True)


@dataclass(frozen=True)
class Size:
    """Of a model: parameters without the embedding and the head, of the head, and what attention needs."""

    body: int
    head: int
    layers: int
    attention_width: int  # heads x size of a head
    of_source: int = 0  # of the body, what an encoder-decoder's source passes: the encoder, and keys and values of it


def flops_per_token(size: Size, row: Row, recomputed_share: float, supervised_share: float) -> float:
    """LoRA: 2 N forward, 2 N for the gradient of the inputs, 2 N more where layers are recomputed; causal attention
    2 L d s forward and 2.5 times that backward. The head counts for supervised tokens, and is not recomputed."""
    attention = attention_flops(size, row)
    body = 2.0 * passed_parameters(size, row) * (2.0 + recomputed_share)
    return body + attention * (3.5 + recomputed_share) + 4.0 * size.head * supervised_share


def passed_parameters(size: Size, row: Row) -> float:
    """Parameters of the layers that a token passes; of an encoder-decoder, the mean over source and answer."""
    source = row.source_tokens / row.length
    return size.body if not row.reads_source else source * size.of_source + (1 - source) * (size.body - size.of_source)


def attention_flops(size: Size, row: Row) -> float:
    """Of a token, forward: products with half of the row, as causal attention needs. A source is seen whole, by itself
    (half of the layers) and by the answer (the other half)."""
    if not row.reads_source:
        return 2.0 * size.layers * size.attention_width * row.length
    source, answer = row.source_tokens, row.length - row.source_tokens
    scores = source * source + answer * source + answer * answer / 2.0
    return 4.0 * (size.layers / 2.0) * size.attention_width * scores / row.length


def least_flops_per_token(size: Size, row: Row, supervised_share: float) -> float:
    """Without any recomputation: what "the 4N limit" means here."""
    return flops_per_token(size, row, 0.0, supervised_share)


def floor_seconds(
    flops: float, layer_bytes: float, head_bytes: float, row: Row, ceilings: Ceilings
) -> dict[str, float]:
    """The least time of one step, by what bounds it; streamed weights cross the bus twice for each pass, a streamed
    head twice for each micro-batch."""
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
    """Tokens of a step from which streaming hides behind the computation: b F / (3 BW), b bytes for each parameter
    of the `body` that a token passes.

    At 6 N operations for each token, all layers recomputed.
    """
    return layer_bytes / body * ceilings.product_flops / (3.0 * ceilings.host_bytes)


def as_json(value: Any) -> dict[str, Any]:
    """A dataclass as plain values."""
    return asdict(value)
