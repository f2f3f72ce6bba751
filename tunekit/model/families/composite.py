"""Composite models: a causal language model with parts that read images or audio. Text rows use the language model
alone."""

from collections.abc import Mapping

from torch import nn

from tunekit.contracts import Processor
from tunekit.model.families.family import Family
from tunekit.model.families.structure import base_name
from tunekit.model.parts import composite_classes, leave_out
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.model.unsupported import REASON_OF
from tunekit.recipe.model import ModelSection


class CompositeFamily(Family):
    """The class that config.json names is loaded, so that modules have the names that servers use. Its decoder and its
    head are loaded; its other parts stay on the meta device."""

    precedence = 3
    class_name = "AutoModelForMultimodalLM"
    text = "a language model that also reads images or audio"
    copied = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
    trained_as = "causal"
    task_type = "CAUSAL_LM"

    def recognises(self, architecture: str, config: Mapping[str, object]) -> bool:
        return architecture in composite_classes()

    def obstacle(self, config: Mapping[str, object]) -> str | None:
        text = config.get("text_config")
        if config.get("is_encoder_decoder") or (isinstance(text, dict) and text.get("is_encoder_decoder")):
            return "its language model is an encoder-decoder with parts for images or audio"
        return REASON_OF.get(str(config.get("model_type")))

    def processor(self, section: ModelSection) -> Processor:
        return load_tokenizer(section)

    def leave_out(self, net: nn.Module) -> None:
        leave_out(net, base_name(net), self.head_name(net))


FAMILY = CompositeFamily()
