"""Token classifiers: an encoder or a decoder with one row of logits per token."""

from torch import Tensor, nn

from tunekit.contracts import NamedModules, Processor, Tensors
from tunekit.model.families.family import Family
from tunekit.model.families.heads import scores_tokens
from tunekit.model.families.stacks import stacks_of
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.recipe.model import ModelSection


class TokenClassifierFamily(Family):
    """Tokens -> logits (B, T, C), C labels."""

    endings = ("ForTokenClassification",)
    class_name = "AutoModelForTokenClassification"
    text = "a token classifier"
    task_type = "TOKEN_CLS"
    answers = False
    labelled = True

    def processor(self, section: ModelSection) -> Processor:
        return load_tokenizer(section)

    def reads_rows(self, net: nn.Module) -> bool:
        """Always true: the modules after the last layer, such as dropout, differ from net to net, so only the net
        itself can call its head."""
        return True

    def layers(self, net: nn.Module) -> NamedModules:
        return stacks_of(net).layers(net)

    def logits(self, net: nn.Module, inputs: Tensors) -> Tensor:
        """Logits (B, T, C). A decoder gets position ids, which separate packed rows, but no mask, because padding
        comes last. An encoder gets no position ids, because some encoders do not number positions from 0."""
        omitted = "attention_mask" if scores_tokens(net) else "position_ids"
        return super().logits(net, {name: value for name, value in inputs.items() if name != omitted})

    def scores(self, net: nn.Module, inputs: Tensors) -> Tensor:
        """(T, C) float32."""
        return super().scores(net, inputs)[0]


FAMILY = TokenClassifierFamily()
