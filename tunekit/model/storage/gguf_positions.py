"""Reads the settings of the rotary position embedding in a GGUF file: base frequency, width and scaling."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from tunekit.model.storage.gguf_facts import GgufFacts

THETA = 10000.0  # llama.cpp's base of frequencies where the file states none
FACTORS = "rope_freqs.weight"  # llama.cpp divides the frequency of each pair of numbers by its factor
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
LOW, HIGH, CONTEXT = 1.0, 4.0, 8192  # of all models by Meta whose files have such factors
CLOSE = 1e-4  # relative; the file has its factors in float32
SCALING = "rope.scaling."
# settings of a scaling that are read here; a file with another one is refused
KNOWN = ("type", "factor", "original_context_length", "attn_factor", "finetuned")
YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}


def read_positions(facts: GgufFacts, config: PreTrainedConfig) -> None:
    """Write the file's rotary embedding settings into the configuration. transformers reads only some of these
    settings.

    Raises: ModelError for a rotary embedding that transformers does not compute.
    Source: llama_model_base::load_hparams of llama.cpp, and its converter.
    """
    stated = getattr(config, "rope_parameters", None) or {}
    full, sliding = stated.get("full_attention", stated), stated.get("sliding_attention")
    if "rope_theta" in full:
        _set(full, "rope_theta", facts.settings.get("rope.freq_base", THETA))
        _set_width(facts, config, full)
    if sliding:
        _set(sliding, "rope_theta", facts.settings.get("rope.freq_base_swa", THETA))
    read_scaling(facts, config)


def _set(parameters: dict[str, Any], name: str, stated: object) -> None:
    """Set a parameter to the number in the file, unless the parameter already has this value in float32."""
    value = float(str(stated))
    if not math.isclose(parameters.get(name) or 0.0, value, rel_tol=1e-6):
        parameters[name] = value


def _set_width(facts: GgufFacts, config: PreTrainedConfig, parameters: dict[str, Any]) -> None:
    """Write into `parameters` how many dimensions of each head the rotary embedding rotates."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(str(facts.settings.get("rope.dimension_count", width)))
    if "partial_rotary_factor" in parameters:
        if int(width * parameters["partial_rotary_factor"]) != rotated:
            parameters["partial_rotary_factor"] = rotated / width
    elif rotated != width:
        raise facts.refuse(f"the file rotates {rotated} of {width} dimensions of a head, but transformers rotates all")


def read_scaling(facts: GgufFacts, config: PreTrainedConfig) -> None:
    """Write the file's scaling of positions into the configuration.

    Raises: ModelError for a scaling that transformers does not compute.
    """
    kind = str(facts.settings.get(f"{SCALING}type", "none"))
    factors = {name for name in facts.tensors if name.startswith("rope_f")}
    if kind == "none" and not factors:
        return
    scaling: dict[str, Any] | None = None
    if kind in ("linear", "yarn") and not factors:
        scaling = _stated(facts, kind)
    elif kind == "none" and factors == {FACTORS}:
        numbers = _numbers(facts, FACTORS)
        if torch.equal(numbers, torch.ones_like(numbers)):
            return
        scaling = _llama3(config, numbers)
    elif factors == {LONG, SHORT} and kind in ("none", "longrope") and config.model_type == "phi3":
        scaling = _longrope(facts, config)
    if scaling is None or not getattr(config, "rope_parameters", None):
        what = kind if kind != "none" else ", ".join(sorted(factors))
        raise facts.refuse(f"the file scales positions ({what}) in a way that transformers does not read")
    rope = config.rope_parameters
    rope.get("full_attention", rope).update(scaling)


def _stated(facts: GgufFacts, kind: str) -> dict[str, Any] | None:
    """The parameters of a linear or yarn scaling. None if the file has a setting that transformers does not support."""
    values: dict[str, Any] = {
        name.removeprefix(SCALING): value for name, value in facts.settings.items() if name.startswith(SCALING)
    }
    if values.keys() - {*KNOWN, *YARN, "yarn_attn_factor"} or "factor" not in values:
        return None
    parameters = {"rope_type": kind, "factor": values["factor"]}
    if kind == "linear":
        return parameters
    if "original_context_length" not in values or ("yarn_attn_factor" in values and "attn_factor" not in values):
        return None
    parameters["original_max_position_embeddings"] = values["original_context_length"]
    parameters |= {YARN[name]: values[name] for name in YARN.keys() & values.keys()}
    if "attn_factor" in values:  # llama.cpp multiplies it by yarn's own factor
        parameters["attention_factor"] = values["attn_factor"] * (0.1 * math.log(values["factor"]) + 1.0)
    return parameters


def _longrope(facts: GgufFacts, config: PreTrainedConfig) -> dict[str, Any]:
    """The parameters of Phi-3's scaling, which uses different factors for short and for long texts."""
    context = facts.settings.get(f"{SCALING}original_context_length", config.max_position_embeddings)
    config.original_max_position_embeddings = context
    parameters: dict[str, Any] = {"rope_type": "longrope", "original_max_position_embeddings": context}
    parameters |= {"long_factor": _numbers(facts, LONG).tolist(), "short_factor": _numbers(facts, SHORT).tolist()}
    if f"{SCALING}attn_factor" in facts.settings:
        parameters["attention_factor"] = facts.settings[f"{SCALING}attn_factor"]
    return parameters


def _numbers(facts: GgufFacts, name: str) -> Tensor:
    """A tensor of the file, float32."""
    import gguf

    return torch.from_numpy(gguf.quants.dequantize(facts.tensors[name].data, facts.tensors[name].tensor_type).copy())


def _llama3(config: PreTrainedConfig, factors: Tensor) -> dict[str, Any] | None:
    """Find the parameters of Llama 3's scaling that give the `factors` (D/2,), float32; None if there are none."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if "rope_theta" not in (getattr(config, "rope_parameters", None) or {}):
        return None
    theta, factor = float(config.rope_parameters["rope_theta"]), float(factors.max())
    plain = theta ** -(torch.arange(len(factors), dtype=torch.float32) / len(factors))  # (D/2,) radians per position
    for context in _contexts(plain, factors, factor):
        parameters: dict[str, object] = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": LOW,
            "high_freq_factor": HIGH,
            "original_max_position_embeddings": context,
        }
        candidate = copy.deepcopy(config)
        candidate.rope_parameters = parameters
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](candidate, torch.device("cpu"))
        if scaled.shape == plain.shape and torch.allclose(scaled, plain / factors, rtol=CLOSE, atol=0):
            return parameters
    return None


def _contexts(plain: Tensor, factors: Tensor, factor: float) -> Iterator[int]:
    """Yield candidates for the original context length from which Llama 3's scaling computed these factors.

    For medium wavelengths the factor is 1 / ((1 - s) / F + s) with s = (context / wavelength - LOW) / (HIGH - LOW).
    """
    yield CONTEXT
    for frequency, number in zip(plain.tolist(), factors.tolist(), strict=True):
        if 1 < number < factor:
            s = (1 / number - 1 / factor) / (1 - 1 / factor)
            yield round(2 * math.pi / frequency * (LOW + s * (HIGH - LOW)))
