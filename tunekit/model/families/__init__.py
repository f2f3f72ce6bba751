"""The families of models, a small class each: where layers, head and hidden states are, how a net is called.

Comes in: a family's name, found in the base's configuration by model/inspection.py.  Goes out: `Family`.
"""

from __future__ import annotations

from tunekit.model.families.audio_classifier import AudioClassifierFamily
from tunekit.model.families.causal import Family as Family
from tunekit.model.families.classifier import ClassifierFamily
from tunekit.model.families.diffusion import DiffusionFamily
from tunekit.model.families.image_classifier import ImageClassifierFamily
from tunekit.model.families.seq2seq import Seq2SeqFamily
from tunekit.model.families.speech import SpeechFamily
from tunekit.model.families.structure import text_config as text_config
from tunekit.model.families.token_classifier import TokenClassifierFamily

FAMILIES: dict[str, type[Family]] = {
    "causal": Family,
    "seq2seq": Seq2SeqFamily,
    "classifier": ClassifierFamily,
    "token_classifier": TokenClassifierFamily,
    "image_classifier": ImageClassifierFamily,
    "audio_classifier": AudioClassifierFamily,
    "diffusion": DiffusionFamily,
    "speech": SpeechFamily,
}


def make_family(name: str) -> Family:
    """The family of this name; inspection.find_family gives no other."""
    return FAMILIES[name]()
