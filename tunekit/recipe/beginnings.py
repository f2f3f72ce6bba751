"""What a first recipe says for data that are not texts: the model to begin with, its layers and its learning rate.

The values are those of the recipes that tunekit brings: speech-lora, audio-classify-lora, image-classify-lora and
dreambooth-lora.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Beginning:
    """Of one objective; `said`: beside the model; `objective` and `training`: pairs of a line and the comment beside
    it."""

    model: str
    said: str
    targets: str
    learning_rate: str
    objective: Sequence[tuple[str, str]] = ()
    training: Sequence[tuple[str, str]] = ()


BEGINNINGS = {
    "speech": Beginning(
        "openai/whisper-tiny",
        "a folder or a hub name, of Whisper's kind",
        "[q_proj, v_proj]",
        "1e-3",
        (("  language: english", "of all rows; leave it out with a model of English alone (.en)"),),
    ),
    "audio_classify": Beginning(
        "openai/whisper-tiny", "a folder or a hub name, of Whisper", "[q_proj, v_proj]", "1e-3"
    ),
    "image_classify": Beginning(
        "google/vit-base-patch16-224-in21k",
        "a folder or a hub name, of an image classifier",
        "[q_proj, v_proj]",
        "5e-3",
    ),
    "dreambooth": Beginning(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "the folder of a pipeline, or a hub name",
        "[to_q, to_k, to_v, to_out.0]",
        "1e-4",
        (("  instance_prompt: a photo of sks thing", "name what it is, and keep the rare word sks"),),
        (("  scheduler: constant", ""), ("  warmup_steps: 0", ""), ("  max_steps: 500", "")),
    ),
}
