"""Speech models that hear and write: Whisper and what is built like it, an encoder of recordings and a decoder of text.

Comes in: a net as transformers builds it.  Goes out: `SpeechFamily`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tunekit.contracts import Processor
from tunekit.model.families.seq2seq import Seq2SeqFamily
from tunekit.recipe.model import ModelSection

INPUTS = ("input_features", "input_values")
SAMPLES = 16_000  # of a recording that a net is tried on


@dataclass(frozen=True)
class SpeechFamily(Seq2SeqFamily):
    """Log-mel features (input_features (B, M, F)) or samples (input_values (B, N)) in, with the tokens of the answer so
    far (decoder_input_ids); hidden states are the decoder's, a head (D) -> (V).

    The encoder is called directly: SpecAugment of transformers, which draws from numpy's global generator, never acts.
    """

    name: str = "speech"
    task_type: str | None = None  # PEFT's class for encoder-decoders asks for input_ids
    text: str = "a speech model"
    reads_ids: bool = False
    ids: str | None = "decoder_input_ids"

    def auto_class(self) -> Any:
        from transformers import AutoModelForSpeechSeq2Seq

        return AutoModelForSpeechSeq2Seq

    def processor(self, section: ModelSection) -> Processor:
        from tunekit.model.speech.processor import load_speech_processor

        return load_speech_processor(section)

    def learned_positions(self, net: nn.Module) -> int | None:
        """Of the decoder, where it learned them: its answers can be no longer."""
        return getattr(net.config, "max_target_positions", None)

    def inputs_of(self, ids: torch.Tensor, beside: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """What the net is called with for one row of ids (1, T), the recording being the first of `beside`."""
        assert beside is not None
        recording = {name: values[:1] for name, values in beside.items() if name in INPUTS}
        return {**recording, "decoder_input_ids": ids}

    def trial_inputs(self, net: nn.Module) -> dict[str, torch.Tensor]:
        """Seeded noise for a recording, and the first ids for its answer."""
        config: Any = net.config
        ids = torch.arange(min(16, config.vocab_size))[None]
        if net.main_input_name == "input_values":
            return {"input_values": torch.randn(1, SAMPLES, generator=seeded()), "decoder_input_ids": ids}
        return {"input_features": noise_features(net), "decoder_input_ids": ids}


def noise_features(net: nn.Module) -> torch.Tensor:
    """(1, M, F) seeded noise, as large as the features of a recording."""
    config: Any = net.config
    return torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions, generator=seeded())


def seeded() -> torch.Generator:
    """Of noise that is the same at every call."""
    return torch.Generator().manual_seed(0)
