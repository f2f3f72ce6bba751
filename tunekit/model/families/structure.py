"""What every family looks up in a net: by structure and declared names, never by class names.

Comes in: a net as transformers builds it.  Goes out: names and modules.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from tunekit.errors import ModelError
from tunekit.model.attention.documents import known_documents


def text_config(net: nn.Module) -> Any:
    """The configuration of the text model."""
    config: Any = net.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def expert_layout(net: nn.Module) -> str | None:
    """The architecture by whose pattern transformers 5 fuses the experts of this one's older files; None: by none."""
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as PATTERNS
    except ImportError:
        return None
    model_type = getattr(getattr(net, "config", None), "model_type", "")
    return "mixtral" if model_type == "mixtral" else PATTERNS.get(model_type)


def base_name(net: nn.Module) -> str:
    """Module name of the net without its head: the declared one, or the one inside it or the net that takes what the
    net does: token ids, recordings or images.

    Llama 4's language model declares the name of another, and a decoder of BART's lies in a shell without arguments.
    """
    name = str(getattr(net, "base_model_prefix", ""))
    declared = getattr(net, name, None) if name else None
    inside = declared if isinstance(declared, nn.Module) else net
    taken = str(getattr(net, "main_input_name", "input_ids"))
    if inside is declared and taken in accepted_names(inside):
        return name
    found = [own for own, child in inside.named_children() if taken in accepted_names(child)]
    if len(found) == 1:
        return found[0] if inside is net else f"{name}.{found[0]}"
    if inside is net:
        raise ModelError(
            f"{type(net).__name__} has no base model apart from its head", "choose a causal language model"
        )
    return name


def accepted_names(module: nn.Module) -> frozenset[str]:
    """Names that the module's forward declares; what it would swallow as **kwargs does not count."""
    return frozenset(inspect.signature(module.forward).parameters)


def call_accepted(module: nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    """The module's output for those of the inputs that it accepts; no cache is made."""
    accepted = accepted_names(module)
    taken = {key: value for key, value in inputs.items() if key in accepted}
    switches = {"use_cache": False} if "use_cache" in accepted else {}
    with known_documents():
        return module(**taken, **switches)


@contextmanager
def training_mode(net: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode inside the block; every module's own mode is put back after it."""
    before = {module: module.training for module in net.modules()}
    net.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def fixed_parameters(net: nn.Module) -> frozenset[str]:
    """Names of parameters that the model's own class keeps as they are, such as computed positions."""
    config: Any = getattr(net, "config", None)
    kinds: tuple[Any, Any] = (type(net), type(config))
    return frozenset() if config is None else _fixed_by(*kinds, config.to_json_string())


@cache
def _fixed_by(kind: Any, config_kind: Any, config: str) -> frozenset[str]:
    with torch.device("meta"):
        plain = kind(config_kind.from_dict(json.loads(config)))
    return frozenset(name for name, tensor in plain.named_parameters() if not tensor.requires_grad)


def last_hidden(output: Any) -> torch.Tensor:
    """(B, T, D) of a base's output."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
    return hidden


def name_of(net: nn.Module, wanted: Any) -> str | None:
    """The name under which a module hangs in the net, also where an adapter has been put around it."""
    if wanted is None:
        return None
    return next((name for name, module in net.named_modules(remove_duplicate=False) if module is wanted), None)
