"""Audio classifiers: Whisper's encoder with one row of logits per recording.

Comes in: a net as transformers builds it.  Goes out: `AudioClassifierFamily`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tunekit.contracts import Processor, Stages
from tunekit.model.families.causal import Family
from tunekit.model.families.classifier import ClassifierFamily
from tunekit.model.families.heads import TextHead
from tunekit.model.families.speech import noise_features
from tunekit.recipe.model import ModelSection

PROJECTOR, CLASSIFIER = "projector", "classifier"


@dataclass(frozen=True)
class MeanHead(TextHead):
    """logits = classifier(projector(m)), m the mean of a recording's hidden states: as the net's own, which projects
    each position and takes the mean of that.

    Shapes: m (N, D) -> (N, C).
    """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, C) in float32."""
        return super().logits(self.net.get_submodule(PROJECTOR)(hidden))


@dataclass(frozen=True)
class AudioClassifierFamily(ClassifierFamily):
    """Log-mel features in (input_features (B, M, F)), hidden states of the encoder (B, T, D), a head that reads their
    mean, (D) -> (C), C labels."""

    name: str = "audio_classifier"
    task_type: str | None = None
    text: str = "an audio classifier"
    reads_ids: bool = False
    ids: str | None = None
    unread: tuple[str, ...] = ("model.decoder.", "proj_out.")  # of a base that was saved as one that writes

    def auto_class(self) -> Any:
        from transformers import AutoModelForAudioClassification

        return AutoModelForAudioClassification

    def processor(self, section: ModelSection) -> Processor:
        """Its feature extractor; it reads no text."""
        from tunekit.model.speech.features import load_audio_processor

        return load_audio_processor(section)

    def decoder(self, net: nn.Module) -> bool:
        """Never."""
        return False

    def reads_rows(self, net: nn.Module) -> bool:
        """Never: what the head reads of a recording is the mean of its hidden states."""
        return False

    def layers(self, net: nn.Module) -> list[tuple[str, nn.Module]]:
        """The encoder's; the configuration speaks of a decoder too, which the net has not."""
        return Family.layers(self, net)

    def trained_with(self, net: nn.Module) -> list[str]:
        """Both parts of the head."""
        return [PROJECTOR, CLASSIFIER]

    def head_name(self, net: nn.Module) -> str | None:
        """Of what gives one score a label."""
        return CLASSIFIER

    def head(self, net: nn.Module) -> TextHead:
        return MeanHead(net, CLASSIFIER)

    def logits(self, net: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, C)."""
        return Family.logits(self, net, inputs)

    def trial_inputs(self, net: nn.Module) -> dict[str, torch.Tensor]:
        return {"input_features": noise_features(net)}

    def embedding_name(self, net: nn.Module) -> str | None:
        return None

    def learned_positions(self, net: nn.Module) -> int | None:
        """None that rows are measured by: every recording fills all of them."""
        return None

    def stages(self, net: nn.Module) -> Stages | None:
        """The encoder's layers and its norm."""
        return Family.stages(self, net)
