"""Upper bounds for the speed of streamed layers, from published bandwidths."""

from tunekit.model.load import LoadedModel
from tunekit.model.quantized.weights import stored_bytes

# Bytes per second of the links that a tier's copies pass: 16 PCIe lanes, less a fifth for the protocol; and NVMe
# drives of each generation at their sequential read speed.
BANDWIDTHS = {
    "host": {"PCIe 3": 12e9, "PCIe 4": 25e9, "PCIe 5": 52e9},
    "disk": {"NVMe of PCIe 3": 3.5e9, "NVMe of PCIe 4": 7e9, "NVMe of PCIe 5": 12e9},
}
WHERE = {"host": "in the host's memory", "disk": "in mapped files"}


def layer_bytes(base: LoadedModel) -> int:
    """Stored bytes of all layers."""
    return sum(stored_bytes(layer) for _, layer in base.family.layers(base.net))


def rates_text(tier: str, tokens: int, layers_bytes: int, copies: int) -> str:
    """The maximum number of tokens per second for each kind of link (PCIe 4, ...), as text. `tier`: where the layers
    are stored, host or disk."""
    return ", ".join(
        f"{max_tokens_per_second(tokens, layers_bytes, bandwidth, copies):,.0f} over {link}"
        for link, bandwidth in BANDWIDTHS[tier].items()
    )


def max_tokens_per_second(tokens: int, layers_bytes: int, bytes_per_second: float, copies: int = 2) -> float:
    """The maximum speed of a pass whose layers are copied to the device: tokens divided by the time of the copies.
    `copies`: how often a pass copies each layer."""
    return bytes_per_second * tokens / (copies * max(layers_bytes, 1))
