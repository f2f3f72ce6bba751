"""Divides a net into an embed stage and its layers, so that an engine can run the net layer by layer. An
encoder-decoder has two such stacks.

The embed stage runs the model's own forward, in which a recorder replaces each layer. The model's own code therefore
makes masks and position embeddings, in any version of transformers.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunekit.contracts import LayerCall, SideInput, Stack, Tensors
from tunekit.model.pretrained import text_config
from tunekit.model.transformers_guard import replaced

# Families whose stages are tested to equal the plain forward bit for bit.
PROVEN = frozenset(
    [
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "cohere", "granite", "phi3"),
        *("olmo2", "smollm3", "starcoder2", "mixtral", "gpt_neox", "gpt2", "phi", "opt", "bloom"),
        *("afmoe", "apertus", "arcee", "bamba", "biogpt", "bitnet", "codegen", "cohere2", "ctrl", "cwm", "deepseek_v2"),
        *("deepseek_v3", "diffllama", "dots1", "ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "falcon", "falcon_h1"),
        *("falcon_mamba", "flex_olmo", "glm", "glm4", "glm4_moe", "gpt_bigcode", "gpt_neo", "gpt_neox_japanese"),
        *("gpt_oss", "gptj", "granitemoe", "granitemoehybrid", "granitemoeshared", "helium", "hunyuan_v1_dense"),
        *("hunyuan_v1_moe", "jamba", "jetmoe", "lfm2", "lfm2_moe", "llama4_text", "mamba", "mamba2", "minicpm3"),
        *("ministral", "modernbert-decoder", "mpt", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo3"),
        *("olmoe", "openai-gpt", "persimmon", "qwen2_moe", "qwen3_5_text", "qwen3_moe", "qwen3_next"),
        *(
            "glm4v_text",
            "qwen2_vl_text",
            "qwen2_5_vl_text",
            "qwen3_vl_text",
            "recurrent_gemma",
            "seed_oss",
            "solar_open",
            "stablelm",
            "vaultgemma",
            "xglm",
            "youtu",
        ),
        *("t5", "mt5", "bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot", "whisper", "moonshine"),
    ]
)
# Families whose layers return a tuple or a list, and how many tensors follow the hidden states in it.
ONE_MORE = ("bamba", "bloom", "falcon", "falcon_h1", "gpt_neo", "gpt_neox_japanese", "mpt", "openai-gpt")
SIDE_OUTPUTS = {"t5": 2, "mt5": 2, **dict.fromkeys(ONE_MORE, 1)}
LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")  # settings that skip layers at random


class _LayerRecorder(nn.Module):
    """Replaces a layer in the embed stage. It records the arguments of its call and returns zeros, so that the next
    recorder gets what the model adds between the two layers."""

    def __init__(self, layer: nn.Module, side_outputs: int) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # not a child, so that it is not moved or saved twice
        self.arguments: tuple[object, ...] = ()
        self.keywords: dict[str, object] = {}
        self.hidden: Tensor | None = None
        self.returned: Tensor | None = None
        self.side_outputs = tuple(SideInput() for _ in range(side_outputs))

    def forward(
        self, hidden: Tensor, *arguments: object, **keywords: object
    ) -> Tensor | tuple[Tensor | SideInput, ...]:
        self.hidden, self.arguments, self.keywords = hidden, arguments, keywords
        self.returned = torch.zeros_like(hidden)  # (B, T, D)
        return (self.returned, *self.side_outputs) if self.side_outputs else self.returned

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "layer"), name)


class StageLayer(nn.Module):
    """One layer, called with the arguments that the embed stage recorded. A stack's last layer also applies the final
    norm."""

    finish: Sequence[nn.Module]

    def __init__(self, layer: nn.Module, finish: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layer = layer
        object.__setattr__(self, "finish", finish)  # not part of the layer

    def forward(self, hidden: Tensor, call: LayerCall) -> Tensor:
        arguments = [_value(argument) for argument in call.arguments]
        hidden = hidden if call.added is None else hidden + call.added
        output = self.layer(hidden, *arguments, **{name: _value(argument) for name, argument in call.keywords.items()})
        if isinstance(output, tuple | list):
            output, *others = output
            for side, other in zip(call.side_outputs, others, strict=False):
                if side is not None:
                    side.value = other
        for module in self.finish:
            output = module(output)
        return output


def _value(argument: object) -> object:
    return argument.value if isinstance(argument, SideInput) else argument


def is_proven(net: nn.Module) -> bool:
    """Whether tests prove that nets of this type give the same results if they run layer by layer. False if the
    configuration skips layers at random."""
    config = text_config(net)
    drops = any(getattr(config, name, 0.0) > 0 for name in LAYER_DROPS)
    return config.model_type in PROVEN and not drops


def make_stack(
    net: nn.Module,
    parent: nn.Module,
    attribute: str,
    run: Callable[[Tensors, Tensor | None], object],
    finish: Sequence[nn.Module],
) -> Stack:
    """Make a stack of the layers in `parent.<attribute>`.

    `run(inputs, source)`: calls the model's code that embeds the inputs and passes them to the layers. `finish`: the
    modules after the last layer.
    """
    layers = cast(nn.ModuleList, parent.get_submodule(attribute))

    def embed(inputs: Tensors, source: SideInput | None) -> tuple[Tensor, list[LayerCall]]:
        recorders = [_LayerRecorder(layer, SIDE_OUTPUTS.get(text_config(net).model_type, 0)) for layer in layers]
        with replaced(parent._modules, **{attribute: nn.ModuleList(recorders)}):
            run(inputs, None if source is None else source.value)
        return cast(Tensor, recorders[0].hidden), _calls(recorders, source)

    last = len(layers) - 1
    return Stack(embed, [StageLayer(layer, finish if index == last else ()) for index, layer in enumerate(layers)])


def _calls(recorders: Sequence[_LayerRecorder], source: SideInput | None) -> list[LayerCall]:
    """The recorded call of each layer. An argument that is the encoder's output is replaced by `source`. Side outputs
    that no layer reads become None."""

    def linked(argument: object) -> object:
        return source if source is not None and argument is source.value else argument

    before = [recorders[0].hidden, *(recorder.returned for recorder in recorders[:-1])]
    calls = [
        LayerCall(
            tuple(map(linked, recorder.arguments)),
            {k: linked(v) for k, v in recorder.keywords.items()},
            added=None if recorder.hidden is hidden else recorder.hidden,
        )
        for recorder, hidden in zip(recorders, before, strict=True)
    ]
    read = {id(side) for call in calls for side in call.side_inputs}
    return [
        replace(call, side_outputs=tuple(side if id(side) in read else None for side in recorder.side_outputs))
        for call, recorder in zip(calls, recorders, strict=True)
    ]
