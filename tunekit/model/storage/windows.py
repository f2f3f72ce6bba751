"""Finds the size of the sliding window in a model's configuration."""

from collections.abc import Mapping
from typing import Any

# Types whose sliding_window counts only if use_sliding_window is true; its default is false.
ON_REQUEST = frozenset(["qwen2", "qwen2_5_vl_text", "qwen2_moe", "qwen2_vl_text", "qwen3", "qwen3_moe", "smollm3"])


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """The number W of tokens in the sliding window, which includes the current token. None if no layer has a window, or
    if the window covers the model's maximum length. In a row of W + 1 tokens, the last token does not see the first.

    Source: the configuration classes of transformers 5.24.
    """
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        return None
    if not config.get("use_sliding_window", str(config.get("model_type")) not in ON_REQUEST):
        return None
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int) and longest <= window:
        return None
    if isinstance(kinds, list):
        return window if "sliding_attention" in kinds else None
    first, layers = config.get("max_window_layers"), config.get("num_hidden_layers")
    if "use_sliding_window" in config and isinstance(first, int) and isinstance(layers, int) and first >= layers:
        return None  # the layers below the first one see all tokens
    return window
