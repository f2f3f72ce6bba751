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


@dataclass(frozen=True)
class SpeechFamily(Seq2SeqFamily):
    """Log-mel features in (input_features (B, M, F)), tokens of the answer so far (decoder_input_ids); hidden states
    are the decoder's, a head (D) -> (V).

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
        """Of the decoder: its answers can be no longer."""
        config: Any = net.config
        return int(config.max_target_positions)

    def inputs_of(self, ids: torch.Tensor, beside: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """What the net is called with for one row of ids (1, T), the recording being the first of `beside`."""
        assert beside is not None
        return {"input_features": beside["input_features"][:1], "decoder_input_ids": ids}

    def trial_inputs(self, net: nn.Module) -> dict[str, torch.Tensor]:
        """Seeded noise for a recording, and the first ids for its answer."""
        config: Any = net.config
        ids = torch.arange(min(16, config.vocab_size))[None]
        return {"input_features": noise_features(net), "decoder_input_ids": ids}


def noise_features(net: nn.Module) -> torch.Tensor:
    """(1, M, F) seeded noise, as large as the features of a recording."""
    config: Any = net.config
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
