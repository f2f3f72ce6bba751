"""Encoder-decoders: T5, BART and similar models."""

from collections.abc import Mapping

from torch import Tensor

from tunekit.contracts import Processor, Tensors
from tunekit.model.families.family import Family
from tunekit.model.families.stacks import TWO
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.recipe.model import ModelSection


class Seq2SeqFamily(Family):
    """Inputs: tokens of the source (input_ids, attention_mask) and of the answer so far (decoder_input_ids,
    decoder_attention_mask), or their embeddings. The head reads the decoder's hidden states: (D) -> (V)."""

    endings = ("ForConditionalGeneration", "MTModel")  # MarianMTModel
    precedence = 1
    class_name = "AutoModelForSeq2SeqLM"
    text = "an encoder-decoder"
    task_type = "SEQ_2_SEQ_LM"
    reads_source = True
    stacks = TWO

    def recognises(self, architecture: str, config: Mapping[str, object]) -> bool:
        return super().recognises(architecture, config) if architecture else bool(config.get("is_encoder_decoder"))

    def processor(self, section: ModelSection) -> Processor:
        return load_tokenizer(section)

    def inputs_of(self, ids: Tensor, inputs: Mapping[str, Tensor] | None = None) -> Tensors:
        """Inputs in which the source and the answer have the same ids."""
        return {"input_ids": ids, "decoder_input_ids": ids}


FAMILY = Seq2SeqFamily()
