"""GGUF files as a base: read by transformers, unpacked to dense weights, and parsed only once."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from tunekit.model.storage.source import ModelSource
from tunekit.model.transformers_guard import replaced


def gguf_arguments(source: ModelSource) -> dict[str, Any]:
    """Arguments with which transformers unpacks all weights, because packed GGUF blocks cannot be trained or merged."""
    import transformers

    settings = getattr(transformers, "GgufConfig", None)  # older versions always unpack
    arguments: dict[str, Any] = {"gguf_file": source.gguf_file}
    return arguments if settings is None else arguments | {"quantization_config": settings(dequantize=True)}


@contextmanager
def parsed_once(name_or_path: str) -> Iterator[None]:
    """Cache the parsed file and its table of names inside the block, because transformers requests both repeatedly.

    Parsing SmolLM2's file takes more than two seconds, most of them for the strings of its tokenizer.
    """
    if not name_or_path.lower().endswith(".gguf"):
        yield
        return
    import gguf

    cached = {name: lru_cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with replaced(vars(gguf), **cached):
        yield
