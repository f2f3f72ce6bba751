"""Sequence classifiers: an encoder or a decoder with one row of logits per text."""

from torch import Tensor, nn

from tunekit.contracts import NamedModules, Processor, Tensors
from tunekit.errors import ModelError
from tunekit.model.families.causal import CausalFamily
from tunekit.model.families.family import Family
from tunekit.model.families.heads import scores_tokens
from tunekit.model.families.stacks import stacks_of
from tunekit.model.pretrained import config_of
from tunekit.model.storage.sentence_transformers import read_reranker
from tunekit.model.storage.source import find_source, read_json
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.recipe.model import ModelSection
from tunekit.records import JsonObject


class ClassifierFamily(Family):
    """Tokens -> logits (B, C), C labels. The head, which may have several layers, reads one position per row: in a
    decoder, the last token."""

    endings = ("ForSequenceClassification",)
    class_name = "AutoModelForSequenceClassification"
    text = "a sequence classifier"
    task_type = "SEQ_CLS"
    answers = False
    labelled = True

    def processor(self, section: ModelSection) -> Processor:
        return load_tokenizer(section)

    def base_facts(self, section: ModelSection) -> JsonObject:
        """`template`, of a reranker's folder. `answers`: whether the base is a causal language model, which can answer
        yes or no."""
        source = find_source(section, weights=False)
        if source.gguf_file is not None:
            return {"answers": True}
        architectures = read_json(source.folder / "config.json").get("architectures") or [""]
        answers = str(architectures[0]).endswith(CausalFamily.endings)
        return {"answers": answers, **(read_reranker(source.folder) or {})}

    def reads_rows(self, net: nn.Module) -> bool:
        """True for encoders and encoder-decoders: their heads differ from net to net, so only the net itself can call
        its head."""
        return not scores_tokens(net)

    def layers(self, net: nn.Module) -> NamedModules:
        return stacks_of(net).layers(net)

    def logits(self, net: nn.Module, inputs: Tensors) -> Tensor:
        """Logits (B, C). Position ids are not passed, because some encoders do not number positions from 0.

        Raises: ModelError for a decoder without a padding token, or if the net has no token type for the second text of
        a pair.
        """
        config, rows = config_of(net), next(iter(inputs.values())).shape[0]
        if rows > 1 and scores_tokens(net) and getattr(config, "pad_token_id", None) is None:
            what = f"{config.model_type} reads the last token before the padding, but its config names no padding token"
            raise ModelError(what, "write pad_token_id into the base's config.json")
        if "token_type_ids" in inputs and getattr(config, "type_vocab_size", 0) == 1:
            what = (
                f"the tokenizer marks the second text of a pair by token type 1, but {config.model_type} has only "
                "token type 0"
            )
            raise ModelError(what, "use the tokenizer that belongs to the base", key="model.name_or_path")
        return super().logits(net, {name: value for name, value in inputs.items() if name != "position_ids"})


FAMILY = ClassifierFamily()
