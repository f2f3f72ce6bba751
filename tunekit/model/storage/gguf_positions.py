"""The scaling of positions that a GGUF file states and transformers does not read from it."""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from tunekit.errors import ModelError
from tunekit.model.storage.source import ModelSource

KEY = "model.name_or_path"
FACTORS = "rope_freqs.weight"  # llama.cpp divides the frequency of each pair of numbers by its factor
LOW, HIGH, CONTEXT = 1.0, 4.0, 8192  # of all models by Meta whose files have such factors
CLOSE = 1e-4  # relative; the file has its factors in float32


def read_scaling(source: ModelSource, config: PreTrainedConfig) -> None:
    """Give the configuration of a GGUF file its scaling of positions.

    Raises: ModelError for a scaling that is not Llama 3's, because the net would compute without it.
    Source: `rope_freqs` and `rope.scaling` in llama.cpp's llama_model and converter.
    """
    import gguf

    path = source.folder / str(source.gguf_file)
    reader = gguf.GGUFReader(str(path))
    fields, factors = reader.fields, {each.name: each for each in reader.tensors if each.name.startswith("rope_f")}
    kind = fields.get(f"{fields['general.architecture'].contents()}.rope.scaling.type")
    stated = "none" if kind is None else str(kind.contents())
    if stated != "none" or factors.keys() - {FACTORS}:
        raise _refusal(source, "longrope" if stated == "none" else stated)
    if FACTORS not in factors:
        return
    numbers = torch.from_numpy(gguf.quants.dequantize(factors[FACTORS].data, factors[FACTORS].tensor_type).copy())
    if torch.equal(numbers, torch.ones_like(numbers)):
        return
    parameters = _llama3(config, numbers)
    if parameters is None:
        raise _refusal(source, FACTORS)
    config.rope_parameters = parameters


def _refusal(source: ModelSource, scaling: str) -> ModelError:
    what = f"{source.name_or_path} scales positions ({scaling}), which transformers does not read from a GGUF file"
    return ModelError(what, "name the model's folder instead of the file", key=KEY)


def _llama3(config: PreTrainedConfig, factors: Tensor) -> dict[str, object] | None:
    """Llama 3's parameters that lead to these factors (D/2,), float32; None if there are none."""
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
    """The lengths of the original context that the factors may come from.

    Between two wavelengths the factor is 1 / ((1 - s) / F + s) with s = (context / wavelength - LOW) / (HIGH - LOW).
    """
    yield CONTEXT
    for frequency, number in zip(plain.tolist(), factors.tolist(), strict=True):
        if 1 < number < factor:
            s = (1 / number - 1 / factor) / (1 - 1 / factor)
            yield round(2 * math.pi / frequency * (LOW + s * (HIGH - LOW)))
