"""Composite models: a causal language model with parts that read images or audio. Text rows use the language model
alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from tunekit.contracts import Processor, Stages, Tensors
from tunekit.model.families.family import Family
from tunekit.model.families.stacks import OneStack
from tunekit.model.families.structure import accepted_names, base_name
from tunekit.model.images.features import deep_layers, prompts_both_ways
from tunekit.model.parts import composite_classes, parts_apart, set_apart
from tunekit.model.pretrained import as_pretrained, config_of
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.model.unsupported import REASON_OF
from tunekit.recipe.model import ImageModel, ModelSection

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

ONE_TENSOR = ("gemma3", "internvl", "paligemma")  # model types whose features are one tensor, not a list


class ImageStack(OneStack):
    """The language model. Rows with images go through the model's own code, which puts the images' features in the
    places of their tokens, and makes its mask."""

    def stages(self, net: nn.Module) -> Stages | None:
        """None also for a net that adds features of images after its last layer."""
        return super().stages(net) if deep_layers(net) < len(self.layers(net)) else None

    def run(self, net: nn.Module, inputs: Tensors) -> ModelOutput:
        """The output of the language model. Further inputs of rows with images: image_features (N, D), of all images
        in order, beside those for the first layers (N, (1 + layers) D); token_types (B, T), 1 at features;
        answer_types (B, T), 0 before the first answer; rope_positions (3, B, T), if the base has three positions."""
        features = inputs.get("image_features")
        if features is None:
            return super().run(net, inputs)
        if "input_ids" not in inputs:
            raise ValueError("rows with images have no room for an adapter's virtual tokens")
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        pooled, *deep = features.chunk(1 + deep_layers(net), dim=-1)
        images = BaseModelOutputWithPooling(
            pooler_output=pooled if config_of(net).model_type in ONE_TENSOR else [pooled]
        )
        images.deepstack_features = [[layer] for layer in deep]
        base, types = as_pretrained(net).base_model, inputs["token_types"]
        arguments = {"position_ids": inputs.get("rope_positions"), "token_type_ids": types, "mm_token_type_ids": types}
        if prompts_both_ways(net):
            arguments["token_type_ids"] = inputs["answer_types"]
        accepted = {name: value for name, value in arguments.items() if name in accepted_names(base)}
        # LLaVA declares no use_cache, but passes it on
        return base(inputs["input_ids"], mm_encoder_outputs={"image": images}, use_cache=False, **accepted)


class CompositeFamily(Family):
    """The class that config.json names is loaded, so that modules have the names that servers use. Its decoder and its
    head are loaded; its other parts stay on the meta device, unless the rows have images."""

    precedence = 3
    class_name = "AutoModelForMultimodalLM"
    text = "a language model that also reads images or audio"
    copied = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
    trained_as = "causal"
    task_type = "CAUSAL_LM"
    stacks = ImageStack()

    def recognises(self, architecture: str, config: Mapping[str, object]) -> bool:
        return architecture in composite_classes()

    def obstacle(self, config: Mapping[str, object]) -> str | None:
        text = config.get("text_config")
        if config.get("is_encoder_decoder") or (isinstance(text, dict) and text.get("is_encoder_decoder")):
            return "its language model is an encoder-decoder with parts for images or audio"
        return REASON_OF.get(str(config.get("model_type")))

    def processor(self, section: ModelSection) -> Processor:
        return load_tokenizer(section)

    def leave_out(self, net: nn.Module, section: ModelSection) -> None:
        if not isinstance(section, ImageModel):
            set_apart(net, base_name(net), self.head_name(net), loaded=False)

    def set_apart(self, net: nn.Module, section: ModelSection) -> None:
        if isinstance(section, ImageModel):
            set_apart(net, base_name(net), self.head_name(net), loaded=True)

    def frozen_parts(self, net: nn.Module) -> list[nn.Module]:
        return list(parts_apart(net, loaded=True).values())


FAMILY = CompositeFamily()
