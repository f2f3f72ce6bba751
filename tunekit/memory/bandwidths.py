"""How fast streamed layers can be copied, by published bandwidths."""

from tunekit.model.load import LoadedModel
from tunekit.model.quantized.weights import stored_bytes

# Bytes a second, of the link that a tier's copies pass: PCIe's 16 lanes less a fifth for its protocol, and the
# sequential reads that NVMe drives of the generation are sold with.
BANDWIDTHS = {
    "host": {"PCIe 3": 12e9, "PCIe 4": 25e9, "PCIe 5": 52e9},
    "disk": {"NVMe of PCIe 3": 3.5e9, "of PCIe 4": 7e9, "of PCIe 5": 12e9},
}
WHERE = {"host": "in the host's memory", "disk": "in mapped files"}


def layer_bytes(base: LoadedModel) -> int:
    """Bytes of all layers as they are stored."""
    return sum(stored_bytes(layer) for _, layer in base.family.layers(base.net))


def rates_text(tier: str, tokens: int, layers_bytes: int, copies: int) -> str:
    """The largest number of tokens a second over each link of a tier."""
    return ", ".join(
        f"{most_tokens_per_second(tokens, layers_bytes, bandwidth, copies):,.0f} over {link}"
        for link, bandwidth in BANDWIDTHS[tier].items()
    )


def most_tokens_per_second(tokens: int, layers_bytes: int, bytes_per_second: float, copies: int = 2) -> float:
    """Tokens of a pass over the time of its copies: BW T / (2 b), if the layers are copied twice."""
    return bytes_per_second * tokens / (copies * max(layers_bytes, 1))
