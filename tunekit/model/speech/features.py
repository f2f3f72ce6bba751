"""Recordings to log-mel features, by the model's own feature extractor."""

import json
import math
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tunekit.contracts import Tokenizer
from tunekit.errors import ModelError
from tunekit.files.cache_folder import hash_of
from tunekit.model.storage.inspection import read_config
from tunekit.model.storage.source import find_source
from tunekit.model.transformers_guard import model_errors, quiet
from tunekit.recipe.model import ModelSection

FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class FeatureExtractor:
    """transformers' extractor, and the folder from which it was read.

    `padded`: whether silence makes recordings equally long; else only those that are share a batch.
    `input_name`: what the net calls features.
    """

    extractor: Any
    folder: Path
    padded: ClassVar[bool] = True
    input_name: ClassVar[str] = "input_features"

    @property
    def rate(self) -> int:
        """Samples a second that the model hears."""
        return int(self.extractor.sampling_rate)

    @property
    def seconds(self) -> float:
        """Of the longest recording that it hears at once."""
        return float(self.extractor.n_samples / self.rate)

    @property
    def frames(self) -> int:
        """Of every recording as the net takes it, silence filling it up."""
        return int(self.extractor.nb_max_frames)

    @property
    def bands(self) -> int:
        """Frequencies of a frame."""
        return int(self.extractor.feature_size)

    def frames_of(self, seconds: float) -> int:
        """Of a recording so long, without those that only fill it up; one at least."""
        return min(max(math.ceil(seconds * self.frames / self.seconds - 1e-9), 1), self.frames)

    def features(self, samples: Tensor) -> NDArray[np.float32]:
        """(frames, bands) log-mel of a recording, without the frames after the first of those that only fill it up.

        Shapes: (samples,) at `rate`.
        """
        made = self.extractor(samples.numpy(), sampling_rate=self.rate, return_tensors="np", truncation=True)
        whole: NDArray[np.float32] = made["input_features"][0].T  # (frames, bands)
        different = np.flatnonzero((whole != whole[-1]).any(axis=1))
        kept = int(different[-1]) + 2 if len(different) else 1
        return np.ascontiguousarray(whole[:kept], dtype=np.float32)

    def filled(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """(bands, all frames) of what `features` kept. Shapes: (frames * bands,)."""
        kept = features.reshape(-1, self.bands)
        whole = np.empty((self.frames, self.bands), dtype=np.float32)
        whole[: len(kept)], whole[len(kept) :] = kept, kept[-1]
        return np.ascontiguousarray(whole.T)

    @property
    def facts(self) -> object:
        """Everything of it that decides features, as plain values."""
        facts = {key: value for key, value in self.extractor.to_dict().items() if key != "mel_filters"}
        return json.loads(json.dumps(facts, default=str))

    def save(self, folder: Path) -> None:
        """Its files, byte for byte."""
        for name in FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)


@dataclass(frozen=True)
class AudioProcessor(FeatureExtractor):
    """Of a classifier: the extractor alone."""

    tokenizer: ClassVar[Tokenizer | None] = None  # it reads no text

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides a row."""
        return hash_of(self.facts)


def load_extractor(section: ModelSection) -> tuple[Any, Path]:
    """The base's extractor, and its folder. Raises: ModelError where it is missing, or of another kind."""
    from transformers import AutoFeatureExtractor

    source = find_source(section, weights=False)
    if source.gguf_file is not None:
        raise ModelError(f"{section.name_or_path} is no speech model", "name a folder", key="model.name_or_path")
    with model_errors(section, "the feature extractor of "), quiet():
        extractor = AutoFeatureExtractor.from_pretrained(
            str(source.folder), local_files_only=True, trust_remote_code=section.trust_remote_code
        )
    if not hasattr(extractor, "nb_max_frames") and read_config(source).get("model_type") != "moonshine":
        what = f"{section.name_or_path} hears by {type(extractor).__name__}, which this version does not know"
        raise ModelError(what, "choose Whisper or Moonshine", key="model.name_or_path")
    return extractor, source.folder
