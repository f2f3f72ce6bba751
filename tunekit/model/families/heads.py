"""Heads: the modules after the last layer, which map hidden states to float32 logits equal to the model's own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tunekit.errors import ModelError
from tunekit.model.call import seed_for
from tunekit.model.families.structure import base_name
from tunekit.model.pretrained import as_pretrained, config_of, text_config
from tunekit.model.storage.quantized_layouts import open_weights
from tunekit.model.storage.source import find_source
from tunekit.recipe.model import HeadedModel


@dataclass(frozen=True)
class TextHead:
    """logits = cap * tanh(scale * head(h) / cap) + offset; models without a cap or an offset skip that step.

    Shapes: h (N, D) -> (N, V). The module is looked up at each call, so that an adapter around it is included.
    """

    net: nn.Module
    name: str
    scale: float = 1.0
    divisor: float = 1.0
    soft_cap: float | None = None
    offset_name: str | None = None  # name of a buffer (1, V)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V) in float32."""
        logits = self.scaled(self.net.get_submodule(self.name)(hidden).float())  # (N, V)
        return logits if self.offset_name is None else logits + self.net.get_buffer(self.offset_name)

    def scaled(self, logits: Tensor) -> Tensor:
        """Apply the scale and the soft cap to the module's output, for the whole vocabulary or a part of it."""
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits


def make_head(net: nn.Module, name: str) -> TextHead:
    """The head with the scale, divisor, cap and offset of the net's configuration."""
    config = text_config(net)
    scale, divisor = float(getattr(config, "output_multiplier", 1.0)), 1.0  # MuseGlimmer's
    if config.model_type.startswith("cohere"):
        scale = float(getattr(net, "logit_scale", None) or 1.0)  # not the configuration's: Aya Vision ignores it
    elif config.model_type == "falcon_h1":
        scale = float(config.lm_head_multiplier)
    elif scales_tied_head(net):
        scale = float(config.d_model) ** -0.5
    if config.model_type.startswith(("granite", "minicpm3")):
        divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    cap = None
    for field in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        cap = cap if cap is not None else getattr(config, field, None)
    offset = "final_logits_bias" if "final_logits_bias" in dict(net.named_buffers(recurse=False)) else None  # BART
    return TextHead(net, name, scale, divisor, None if cap is None else float(cap), offset)


def scales_tied_head(net: nn.Module) -> bool:
    """Whether logits are multiplied by d_model^-0.5, as T5 and its relatives do only if the head is tied."""
    config = text_config(net)
    tied = config.model_type == "switch_transformers" and config.tie_word_embeddings
    return bool(getattr(config, "scale_decoder_outputs", tied))


def before_projection(net: nn.Module) -> list[nn.Module]:
    """The head's module before the output projection, if the head has one, as in ModernBERT's decoder. A list with zero
    or one module."""
    head, projection = getattr(net, "lm_head", None), as_pretrained(net).get_output_embeddings()
    if not isinstance(head, nn.Module) or projection is None or projection in head.modules():
        return []
    return [head]


def scores_tokens(net: nn.Module) -> bool:
    """Whether the net is a decoder with a classification head `score`, which reads one hidden state at a time."""
    return isinstance(getattr(net, "score", None), nn.Module)


def label_head(net: nn.Module) -> TextHead:
    """The classification head of a decoder: hidden states (N, D) -> scores (N, C). Raises: ModelError for other
    nets."""
    if not scores_tokens(net):
        raise ModelError(f"{type(net).__name__} computes logits once per text, not once per token", "read its logits")
    return TextHead(net, "score")


def label_head_name(net: nn.Module) -> str | None:
    """Name of the module outside the base that outputs one number per label. If several modules do, this is the last of
    them, because an earlier projection may have the same width."""
    labels, base = int(config_of(net).num_labels), base_name(net)
    for name, module in reversed(list(net.named_children())):
        outputs = [getattr(inner, "out_features", None) for inner in module.modules()]
        if name != base and labels in outputs:
            return name
    return None


def modules_after_base(net: nn.Module) -> list[str]:
    """Names of a classifier's modules that have parameters and are outside its base, and of the base's pooler. The
    files of a model that was saved for another task may lack these modules."""
    base = base_name(net)
    names = [name for name, _ in net.named_children() if name != base.partition(".")[0]]
    names += [f"{base}.pooler"] if isinstance(getattr(net.get_submodule(base), "pooler", None), nn.Module) else []
    return [name for name in names if next(net.get_submodule(name).parameters(), None) is not None]


def draw_module(net: nn.Module, name: str, seed: int, dtype: torch.dtype) -> None:
    """Initialise a module of a head as transformers does. The numbers are drawn on the CPU and depend only on the seed
    and the name."""
    drawn = net.get_submodule(name).to_empty(device="cpu").float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for("head", seed, name))
        for module in drawn.modules():
            vars(module)["_is_hf_initialized"] = False
            as_pretrained(net)._init_weights(module)
    drawn.to(dtype)


@torch.no_grad()
def set_row_difference(net: nn.Module, name: str, section: HeadedModel) -> None:
    """Set the only row of a decoder's head to the difference of two rows of the base's output projection, so that its
    score is the difference of two logits. Raises: ModelError if the files have no readable output projection."""
    source, config = find_source(section, weights=True), text_config(net)
    rows = torch.tensor(section.head_rows)
    stored = None if source.gguf_file else open_weights(source.folder)
    projection = next((key for key in ("lm_head.weight", "embed_out.weight") if stored and key in stored.headers), None)
    if stored is not None and projection is not None:
        weight = stored.read(projection)
    elif config.tie_word_embeddings:
        weight = as_pretrained(net).get_input_embeddings().weight
    else:
        what = f"{section.name_or_path} has no output projection from which a reranker's head could start"
        raise ModelError(what, "choose a folder of a causal language model", key="model.name_or_path")
    yes, no = weight[rows.to(weight.device)].float()
    head = make_head(net, name)
    target = net.get_submodule(name).get_parameter("weight")
    target.copy_(((yes - no) * head.scale / head.divisor)[None])


def compute_in_float32(head: nn.Module) -> None:
    """Make the head compute in float32: convert its weights now, and its inputs at each call."""
    head.float().register_forward_pre_hook(lambda _, inputs: tuple(tensor.float() for tensor in inputs))


def set_bias(head: nn.Module, values: Sequence[float]) -> None:
    """Set the bias of the head's last projection, if it has one."""
    projection = [module for module in head.modules() if isinstance(module, nn.Linear)][-1:]
    for module in projection:
        if module.bias is not None:
            module.bias.data = torch.tensor(values).to(module.bias)
