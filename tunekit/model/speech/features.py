"""Log-mel features of recordings, by the model's own feature extractor."""

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
    """A model's feature extractor from transformers, and its folder.

    `padded`: whether all recordings are padded with silence to one length. If not, only recordings of equal length can
    share a batch.
    `input_name`: the name of the argument with which the net receives the features.
    """

    extractor: Any
    folder: Path
    padded: ClassVar[bool] = True
    input_name: ClassVar[str] = "input_features"

    @property
    def rate(self) -> int:
        """The model's sampling rate, in samples per second."""
        return int(self.extractor.sampling_rate)

    @property
    def seconds(self) -> float:
        """The maximum length of a recording, in seconds."""
        return float(self.extractor.n_samples / self.rate)

    @property
    def frames(self) -> int:
        """The number of frames of a padded recording."""
        return int(self.extractor.nb_max_frames)

    @property
    def bands(self) -> int:
        """Frequency bands of a frame."""
        return int(self.extractor.feature_size)

    def frames_of(self, seconds: float) -> int:
        """The number of frames of a recording of this length, without padding; at least 1."""
        return min(max(math.ceil(seconds * self.frames / self.seconds - 1e-9), 1), self.frames)

    def features(self, samples: Tensor) -> NDArray[np.float32]:
        """Compute the log-mel features (frames, bands) of a recording. Only the first frame of the padding is included,
        because all frames of the padding are equal.

        Shapes: samples (samples,), at the sampling rate `rate`.
        """
        extracted = self.extractor(samples.numpy(), sampling_rate=self.rate, return_tensors="np", truncation=True)
        padded: NDArray[np.float32] = extracted["input_features"][0].T  # (frames, bands)
        different = np.flatnonzero((padded != padded[-1]).any(axis=1))
        count = int(different[-1]) + 2 if len(different) else 1
        return np.ascontiguousarray(padded[:count], dtype=np.float32)

    def padded_features(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Restore the padding of `features`. Shapes: (frames * bands,) -> (bands, all frames)."""
        stored = features.reshape(-1, self.bands)
        padded = np.empty((self.frames, self.bands), dtype=np.float32)
        padded[: len(stored)], padded[len(stored) :] = stored, stored[-1]
        return np.ascontiguousarray(padded.T)

    @property
    def facts(self) -> object:
        """All settings of the extractor that affect features, as JSON values."""
        facts = {key: value for key, value in self.extractor.to_dict().items() if key != "mel_filters"}
        return json.loads(json.dumps(facts, default=str))

    def save(self, folder: Path) -> None:
        """Copy the extractor's files."""
        for name in FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)


@dataclass(frozen=True)
class AudioProcessor(FeatureExtractor):
    """The processor of an audio classifier: the feature extractor alone."""

    tokenizer: ClassVar[Tokenizer | None] = None  # there is no text

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that affects an encoded row."""
        return hash_of(self.facts)


def load_extractor(section: ModelSection) -> tuple[Any, Path]:
    """The base's extractor and its folder. Raises: ModelError if the extractor is missing or unsupported."""
    from transformers import AutoFeatureExtractor

    source = find_source(section, weights=False)
    if source.gguf_file is not None:
        raise ModelError(f"{section.name_or_path} is not a speech model", "name a folder", key="model.name_or_path")
    with model_errors(section, "the feature extractor of "), quiet():
        extractor = AutoFeatureExtractor.from_pretrained(
            str(source.folder), local_files_only=True, trust_remote_code=section.trust_remote_code
        )
    if not hasattr(extractor, "nb_max_frames") and read_config(source).get("model_type") != "moonshine":
        what = f"{section.name_or_path} uses the feature extractor {type(extractor).__name__}, which is not supported"
        raise ModelError(what, "choose Whisper or Moonshine", key="model.name_or_path")
    return extractor, source.folder
