"""LLaMA-Adapter, which PEFT calls adaption prompt: the upper layers attend to trained tokens, in a second attention
beside their own.

y_t = y0_t + W_o gate * softmax(q_t (W_k P)^T / sqrt(D)) (W_v P), with the layer's trained tokens P and the output y0 of
its own attention. Keys of P have no position; queries have theirs. Shapes: P (1, N, hidden); gate (1,). Starts as the
identity: gate = 0. Source: Zhang et al. 2023, eq. 3 to 8, with PEFT's single gate for all heads.

For GPT-2 the output is added without W_o, as in PEFT.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tunekit.adapters.base import ModelAdapter, PeftConfig, Slot, Slots
from tunekit.adapters.folder.fields import MODULES, TRAINED_VALUE, PeftSide
from tunekit.adapters.method import Method
from tunekit.errors import AdapterError, ModelError, Problem, RecipeError
from tunekit.model.attention.self_attention import SelfAttention, parameters_of, self_attentions
from tunekit.model.call import current_call
from tunekit.model.families import text_config
from tunekit.recipe.adapters.llama_adapter import LlamaAdapterSettings

MODULE_NAMES = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}  # for the families that PEFT supports


class FileLlamaAdapterSettings(LlamaAdapterSettings):
    """The settings that a folder contains, with the name of the attention modules that the folder states."""

    _target_modules: str | None = None


class LlamaAdapter(ModelAdapter[LlamaAdapterSettings]):
    """Trained tokens and a gate for each of the upper layers."""

    file_prefix = "base_model.model."

    @classmethod
    def slots(cls, settings: LlamaAdapterSettings, net: nn.Module) -> Slots:
        slots: Slots = {}
        for place in _upper(settings, net):
            shape = (1, settings.adapter_len, int(text_config(net).hidden_size))
            slots[f"prompt_{place.layer}"] = Slot(f"{place.name}.adaption_prompt", shape)
            slots[f"gate_{place.layer}"] = Slot(f"{place.name}.adaption_gate", (1,), decays=False)
        return slots

    def initialise(self, generator: torch.Generator) -> None:
        super().initialise(generator)
        # in PEFT's order, from the top layer down
        for attribute in sorted(self.declared, key=lambda name: -int(name.rpartition("_")[2])):
            if attribute.startswith("prompt"):
                nn.init.normal_(getattr(self, attribute), generator=generator)

    def attach(self, net: nn.Module) -> None:
        self.attention_name = MODULE_NAMES[text_config(net).model_type]
        self.hooks: list[RemovableHandle] = []
        self._projected: dict[int, Tensor] = {}  # layer -> output of its query projection, until its attention ends
        for place in _upper(self.settings, net):
            source = place.module.get_submodule("c_attn" if self.attention_name == "attn" else "q_proj")
            self.hooks.append(source.register_forward_hook(self._query_hook(place.layer)))
            self.hooks.append(place.module.register_forward_hook(self._output_hook(place), with_kwargs=True))

    def _query_hook(self, layer: int) -> Callable[[nn.Module, object, Tensor], None]:
        def store(module: nn.Module, inputs: object, output: Tensor) -> None:
            if not current_call().bypassed:
                self._projected[layer] = output

        return store

    def _output_hook(self, place: SelfAttention) -> Callable[..., tuple[object, ...] | None]:
        names = parameters_of(place.module)

        def add(
            module: nn.Module, positional: Sequence[Any], named: dict[str, Any], output: Sequence[Any]
        ) -> tuple[object, ...] | None:
            if current_call().bypassed:
                return None
            named = dict(zip(names, positional, strict=False)) | named
            return (output[0] + self._prompt_attention(place, named.get("position_embeddings")), *output[1:])

        return add

    def _prompt_attention(self, place: SelfAttention, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """The attention (B, T, hidden) to the layer's trained tokens, which is added to the layer's own attention."""
        module: Any = place.module
        projected = self._projected.pop(place.layer)
        prompt = getattr(self, f"prompt_{place.layer}").to(projected.dtype)
        if self.attention_name == "attn":
            query = projected.chunk(3, dim=-1)[0]
            _, keys, values = module.c_attn(prompt).chunk(3, dim=-1)
            self._projected.pop(place.layer)
        else:
            query, keys, values = projected, module.k_proj(prompt), module.v_proj(prompt)
        query = _split_heads(query, place.width)  # (B, heads, T, D)
        if rotation is not None:
            query = _rotate(query, *rotation)
        groups = query.shape[1] // place.heads
        keys, values = (
            _split_heads(part, place.width).repeat_interleave(groups, dim=1).expand(query.shape[0], -1, -1, -1)
            for part in (keys, values)
        )
        attended = F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(2)
        added = attended * getattr(self, f"gate_{place.layer}").to(attended.dtype)
        return added if self.attention_name == "attn" else module.o_proj(added)

    def file_fields(self) -> PeftConfig:
        return {"target_modules": self.attention_name, "adapter_layers": len(self.declared) // 2}


def _split_heads(projected: Tensor, width: int) -> Tensor:
    """(B, T, heads * D) -> (B, heads, T, D)."""
    return projected.view(*projected.shape[:2], -1, width).transpose(1, 2)


def _rotate(query: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The query (B, heads, T, D) rotated to its positions by cosine and sine (B, T, D)."""
    first, second = query.chunk(2, dim=-1)
    return query * cosine[:, None] + torch.cat([-second, first], dim=-1) * sine[:, None]


def _upper(settings: LlamaAdapterSettings, net: nn.Module) -> list[SelfAttention]:
    """The attention modules of the upper layers that the settings choose.

    Raises: ModelError, RecipeError or AdapterError if the base or the settings do not fit.
    """
    kind = text_config(net).model_type
    if kind not in MODULE_NAMES:
        what = f"{kind} has no LLaMA-Adapter: PEFT defines it for {', '.join(MODULE_NAMES)}"
        raise ModelError(what, "choose another adapter.method, such as prefix or lora", key="adapter.method")
    places, wanted = self_attentions(net), settings.adapter_layers
    file = settings if isinstance(settings, FileLlamaAdapterSettings) else None
    if wanted is not None and wanted > len(places):
        what = f"{wanted} layers are requested, but the base has {len(places)}"
        error = AdapterError if file else RecipeError
        raise error(
            what, "remove this setting to adapt all layers", key="adapter_layers" if file else "adapter.adapter_layers"
        )
    if file and file._target_modules not in (None, MODULE_NAMES[kind]):
        what = f"names modules that are not {kind}'s attention ({MODULE_NAMES[kind]})"
        raise AdapterError(what, "name the right base with --base", key="target_modules")
    if getattr(getattr(places[0].module, "o_proj", None), "bias", None) is not None:
        what = f"{kind}'s o_proj has a bias here, which PEFT's adaption prompt adds twice"
        raise ModelError(what, "choose another adapter.method", key="adapter.method")
    return places if wanted is None else places[-wanted:]


class LlamaAdapterSide(PeftSide[FileLlamaAdapterSettings]):
    """Converts to and from PEFT's fields. The name of the attention modules is compared with the base later."""

    def read(self, config: PeftConfig, file: str) -> FileLlamaAdapterSettings:
        """Returns the settings that correspond to PEFT's fields.

        Raises: AdapterError.
        """
        target = config.get("target_modules")
        settings = super().read({name: value for name, value in config.items() if name != "target_modules"}, file)
        missing = [name for name in ("adapter_len", "adapter_layers") if config.get(name) is None]
        problems = [Problem("is missing", TRAINED_VALUE, file, None, name) for name in missing]
        if target is not None and target not in MODULE_NAMES.values():
            how = f"write {' or '.join(dict.fromkeys(MODULE_NAMES.values()))}, as in the base"
            problems.append(Problem("is not a name of attention modules in PEFT", how, file, None, "target_modules"))
        if problems:
            raise AdapterError.of(problems)
        settings._target_modules = target
        return settings


METHOD = Method(
    peft=LlamaAdapterSide(
        "ADAPTION_PROMPT",
        FileLlamaAdapterSettings,
        fields={"adapter_len": ("adapter_len", 100), "adapter_layers": ("adapter_layers", None)},
        absent=frozenset(MODULES),
    ),
    model=LlamaAdapter,
    unbinding=frozenset({"adapter_layers"}),  # the tensors show the number of layers
)
