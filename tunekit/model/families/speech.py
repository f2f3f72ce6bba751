"""Speech recognition models such as Whisper: an encoder of recordings and a decoder of text."""

from collections.abc import Mapping, Set

import torch
from torch import Tensor, nn

from tunekit.contracts import Processor, Tensors
from tunekit.model.families import audio_classifier
from tunekit.model.families.family import Family
from tunekit.model.families.stacks import TWO
from tunekit.model.families.structure import noise_features, seeded_generator
from tunekit.model.pretrained import as_pretrained, config_of
from tunekit.model.speech.processor import load_speech_processor
from tunekit.recipe.model import ModelSection

MODEL_TYPES = ("whisper", "moonshine")
INPUTS = ("input_features", "input_values")
SAMPLES = 16_000  # length of the recording in trial inputs


class SpeechFamily(Family):
    """Inputs: log-mel features (input_features (B, M, F)) or samples (input_values (B, N)), and the tokens of the
    answer so far (decoder_input_ids). The head reads the decoder's hidden states: (D) -> (V).

    The encoder is called directly, so transformers' SpecAugment, which draws from numpy's global generator, never
    runs.
    """

    endings = ("ForConditionalGeneration", "MTModel")
    precedence = 2
    class_name = "AutoModelForSpeechSeq2Seq"
    text = "a speech model"  # no task_type: PEFT's class for encoder-decoders requires input_ids
    reads_ids = False
    ids = "decoder_input_ids"
    reads_source = True
    stacks = TWO

    def recognises(self, architecture: str, config: Mapping[str, object]) -> bool:
        known = config.get("model_type") in MODEL_TYPES
        return known and (not architecture or super().recognises(architecture, config))

    def processor(self, section: ModelSection) -> Processor:
        return load_speech_processor(section)

    def learned_positions(self, net: nn.Module) -> int | None:
        """The number of the decoder's learned positions, which limits the length of answers."""
        return getattr(config_of(net), "max_target_positions", None)

    def inputs_of(self, ids: Tensor, inputs: Mapping[str, Tensor] | None = None) -> Tensors:
        """The net's inputs: the answer `ids` (1, T), and the recording in the first row of the batch `inputs`."""
        assert inputs is not None
        recording = {name: values[:1] for name, values in inputs.items() if name in INPUTS}
        return {**recording, "decoder_input_ids": ids}

    def trial_inputs(self, net: nn.Module) -> Tensors:
        """A test input: seeded noise as the recording, and the first ids of the vocabulary as the answer."""
        ids = torch.arange(min(16, config_of(net).vocab_size))[None]
        if as_pretrained(net).main_input_name == "input_values":
            return {"input_values": torch.randn(1, SAMPLES, generator=seeded_generator()), "decoder_input_ids": ids}
        return {"input_features": noise_features(net), "decoder_input_ids": ids}

    def with_head(self, modules: Set[str]) -> Family:
        """The audio classifier family, if the adapter contains the head of an audio classifier. PEFT's adapter folders
        have no task type for this head."""
        return audio_classifier.FAMILY if set(audio_classifier.FAMILY.head_parts) <= modules else self


FAMILY = SpeechFamily()
