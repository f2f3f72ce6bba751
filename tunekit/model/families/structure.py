"""Finds modules of a net by its structure and by declared names, never by class names. All families use this."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tunekit.errors import ModelError
from tunekit.model.attention.documents import known_documents
from tunekit.model.parts import is_composite
from tunekit.model.pretrained import as_pretrained, config_of
from tunekit.model.pretrained import text_config as text_config

MIXED_DTYPES = ("expected scalar type", "to have the same dtype", "must have the same dtype")  # in torch's errors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.utils import ModelOutput


def is_decoder(net: nn.Module) -> bool:
    """Whether a token of the net sees earlier tokens only."""
    return any(getattr(module, "is_causal", False) for module in net.modules())


def expert_layout(net: nn.Module) -> str | None:
    """The name of the pattern by which transformers 5 fuses the experts of this model, which older files store
    separately; None if there is no pattern."""
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as PATTERNS
    except ImportError:
        return None
    model_type = getattr(getattr(net, "config", None), "model_type", "")
    return "mixtral" if model_type == "mixtral" else PATTERNS.get(model_type)


def base_name(net: nn.Module) -> str:
    """Module name of the base: the net without its head. This is the module that the net's class declares, or else the
    child module that accepts the net's main input (token ids, recordings or images).

    The declaration is wrong in some models: Llama 4's language model declares the name of a different model, and BART's
    decoder is wrapped in a module without arguments.
    The base of a composite model is its language model. The name is empty if the whole net is the base.
    """
    if is_composite(net):
        return _language_model(net)
    if _is_bare(net):
        return ""
    name = str(getattr(net, "base_model_prefix", ""))
    declared = getattr(net, name, None) if name else None
    inside = declared if isinstance(declared, nn.Module) else net
    main_input = str(getattr(net, "main_input_name", "input_ids"))
    if inside is declared and main_input in accepted_names(inside):
        return name
    candidates = [child_name for child_name, child in inside.named_children() if main_input in accepted_names(child)]
    if len(candidates) == 1:
        return candidates[0] if inside is net else f"{name}.{candidates[0]}"
    if inside is net:
        what = f"{type(net).__name__} has no separate module for the model without its head"
        raise ModelError(what, "choose a causal language model")
    return name


def _is_bare(net: nn.Module) -> bool:
    """Whether the net is a text model without a head, as AutoModel loads it."""
    from transformers import MODEL_MAPPING

    config = getattr(net, "config", None)
    bare = type(net) is MODEL_MAPPING.get(type(config), None)
    return bare and getattr(net, "main_input_name", "") == "input_ids"


def _language_model(net: nn.Module) -> str:
    """Module name of a composite model's decoder, without the output projection that Llama 4's decoder contains."""
    inner = text_net(net)
    decoder = as_pretrained(net).get_decoder() if inner is net else base_of(inner)
    return str(name_of(net, decoder))


def text_net(net: nn.Module) -> nn.Module:
    """The module that computes logits from token ids: the net, or Llama 4's decoder, which contains the head (the
    forward of Llama 4's composite class fails in transformers 5.24)."""
    decoder = as_pretrained(net).get_decoder() if is_composite(net) else net
    return net if name_of(decoder, as_pretrained(net).get_output_embeddings()) is None else decoder


def base_of(net: nn.Module) -> nn.Module:
    """The net without its head."""
    return net.get_submodule(base_name(net))


def accepted_names(module: nn.Module) -> frozenset[str]:
    """Names of the arguments that the module's forward declares. Arguments accepted only by **kwargs are left out."""
    return frozenset(inspect.signature(module.forward).parameters)


def call_accepted(module: nn.Module, inputs: Mapping[str, Tensor | bool | None]) -> ModelOutput:
    """Call the module with those `inputs` that its forward declares, without a cache. The other inputs are ignored."""
    accepted = accepted_names(module)
    arguments = {key: value for key, value in inputs.items() if key in accepted}
    switches = {"use_cache": False} if "use_cache" in accepted else {}
    with known_documents():
        try:
            return module(**arguments, **switches)
        except RuntimeError as error:
            if not any(text in str(error) for text in MIXED_DTYPES):
                raise
            what = f"the code of {type(module).__name__} mixes float32 with the dtype in which it computes ({error})"
            raise ModelError(what, "write model.dtype: float32", key="model.dtype") from error


def modules_with_statistics(net: nn.Module) -> list[nn.Module]:
    """The batch normalisation modules that have running statistics."""
    return [module for module in net.modules() if isinstance(module, _NormBase) and module.running_mean is not None]


def statistics_notes(net: nn.Module) -> list[str]:
    """A note for nets with batch normalisation: it stays in eval mode, unlike in an ordinary training loop."""
    if not modules_with_statistics(net):
        return []
    return ["batch normalisation uses the base's running statistics, which training does not change"]


@contextmanager
def training_mode(net: nn.Module, training: bool) -> Iterator[None]:
    """Context manager: switch the net to train or eval mode, and restore each module's mode afterwards.

    Batch normalisation stays in eval mode and uses the base's running statistics. With batch statistics, a
    row's result would depend on its micro-batch, and an adapter folder could not save the changed statistics.
    """
    before = {module: module.training for module in net.modules()}
    net.train(training)
    for module in modules_with_statistics(net):
        module.eval()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def fixed_parameters(net: nn.Module) -> frozenset[str]:
    """Names of parameters that the model's own class excludes from training, such as computed positions."""
    config: PreTrainedConfig | None = getattr(net, "config", None)
    make: Callable[..., nn.Module] = type(net)
    return frozenset() if config is None else _fixed_by(make, type(config).from_dict, config.to_json_string())


@cache
def _fixed_by(make: Callable[..., nn.Module], read: Callable[..., PreTrainedConfig], config: str) -> frozenset[str]:
    with torch.device("meta"):
        plain = make(read(json.loads(config)))
    return frozenset(name for name, tensor in plain.named_parameters() if not tensor.requires_grad)


def last_hidden(output: ModelOutput | tuple[Tensor, ...]) -> Tensor:
    """(B, T, D) of a base's output."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output.last_hidden_state)


def name_of(net: nn.Module, module: nn.Module | None) -> str | None:
    """The module's name in the net; None if the net does not contain the module."""
    if module is None:
        return None
    return next((name for name, candidate in net.named_modules(remove_duplicate=False) if candidate is module), None)


def find_layers(net: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the ModuleList with as many layers as the configuration declares. If several match, take the list nearest to
    the root. ALBERT's list contains groups of layers that share their weights."""
    config, prefix = text_config(net), base_name(net)
    count = int(getattr(config, "num_hidden_groups", None) or config.num_hidden_layers)
    lists = [
        (name, module)
        for name, module in net.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and name.startswith(f"{prefix}." if prefix else "")
    ]
    if not lists:
        what = f"{type(net).__name__} has no list of its {count} layers"
        raise ModelError(what, "choose a base whose layers are in one list, such as Llama, BERT or ViT")
    return min(lists, key=lambda pair: pair[0].count("."))


def noise_features(net: nn.Module) -> Tensor:
    """Seeded noise (1, M, F) in the shape of a recording's features."""
    config = config_of(net)
    return torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions, generator=seeded_generator())


def seeded_generator() -> torch.Generator:
    """A generator that draws the same noise at every call."""
    return torch.Generator().manual_seed(0)
