"""Recordings to features and transcripts to ids, as a speech model was trained on them."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tunekit.errors import DataError, ModelError, listed
from tunekit.files.cache_folder import hash_of
from tunekit.model.speech.features import FeatureExtractor, load_extractor
from tunekit.model.storage.source import read_json
from tunekit.model.text.tokenizer import LoadedTokenizer, load_tokenizer
from tunekit.recipe.model import ModelSection
from tunekit.records import JsonObject

NORMALIZER = "normalizer.json"
TIMESTAMP_SECONDS = 0.02
ENGLISH_VOCABULARY = 51_864  # of Whisper's English-only models, where generation_config.json does not say what they are
MOST_SECONDS = 30.0  # of the recordings that Moonshine was trained on (Jeffries et al. 2024)
FRAME_SAMPLES = 64 * 3 * 2  # the strides of its three convolutions
LEAST_SAMPLES = 127 + 64 * (7 - 1) + 64 * 3 * (3 - 1)  # of which they make one frame
WAVE_TOKENS = 194  # of Moonshine's answers, as its own generation settings have it
MOST_SHOWN = 12


@dataclass(frozen=True)
class SpeechProcessor(FeatureExtractor):
    """The model's own feature extractor and tokenizer, and its generation settings.

    `blank`: what a text begins with, as those did that Whisper learned from.
    """

    blank: ClassVar[str] = " "
    tokenizer: LoadedTokenizer
    generation: JsonObject
    multilingual: bool
    longest_answer: int  # tokens that the decoder has positions for

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides a row."""
        texts = [self.multilingual, self.generation.get("lang_to_id"), self.generation.get("no_timestamps_token_id")]
        return hash_of([self.tokenizer.fingerprint, self.facts, texts])

    @property
    def answer_start(self) -> int:
        """The id with which an answer begins."""
        start = self.tokenizer.answer_start_id
        assert start is not None  # load_speech_processor saw to it
        return start

    def text_ids(self, text: str) -> list[int]:
        """Ids of what is said, with a blank before it; what spells a special token stays text."""
        text = text.strip()
        return self.tokenizer.encode(f"{self.blank}{text}", special_tokens_in_text=False) if text else []

    def prefix(self, language: str | None, task: str, timestamps: bool) -> list[int]:
        """Ids with which an answer begins: the start, of multilingual models language and task, and whether no times
        follow.

        Raises: DataError for a language that the model does not know, or where it needs one.
        """
        found = [self.answer_start]
        if self.multilingual:
            if language is None:
                what = "the model writes many languages, and none is named"
                raise DataError(what, "write objective.language, or a column 'language'")
            found += [self._token(f"<|{self.language_code(language)}|>"), self._token(f"<|{task}|>")]
        elif (language is not None and _code(language) != "en") or task != "transcribe":
            what = "the model knows English alone, and transcribes it"
            raise DataError(what, "leave language and task out, or choose a multilingual model")
        return found if timestamps else [*found, self.no_timestamps]

    def language_code(self, language: str) -> str:
        """Of a language by its name, code or token. Raises: DataError naming those that the model knows."""
        code, known = _code(language), self._languages
        if code not in known:
            raise DataError(f"unknown language '{language}'", f"write a name or a code: {listed(known, MOST_SHOWN)}")
        return code

    @cached_property
    def _languages(self) -> list[str]:
        from transformers.models.whisper.tokenization_whisper import LANGUAGES

        tokens = self.generation.get("lang_to_id") or self.tokenizer.backend.get_vocab(with_added_tokens=True)
        return sorted(code for code in LANGUAGES if f"<|{code}|>" in tokens)

    @property
    def no_timestamps(self) -> int:
        """The id that says that no times follow; the ids of times follow it."""
        found = self.generation.get("no_timestamps_token_id")
        return int(found) if found is not None else self._token("<|notimestamps|>")

    def timestamp(self, seconds: float) -> int:
        """The id of a time within a recording."""
        return self.no_timestamps + 1 + round(min(seconds, self.seconds) / TIMESTAMP_SECONDS)

    def _token(self, text: str) -> int:
        found = self.tokenizer.backend.token_to_id(text)
        if found is None:
            raise DataError(f"the model's tokenizer has no token {text}", "choose another base, language or task")
        return int(found)

    def text(self, ids: Sequence[int]) -> str:
        """What is said: ids without special tokens, times as <|1.08|>."""
        first, parts, run = self.no_timestamps + 1, list[str](), list[int]()
        for each in [*ids, first]:
            if each < first:
                run.append(each)
                continue
            time = f"<|{(each - first) * TIMESTAMP_SECONDS:.2f}|>"
            parts, run = [*parts, self.tokenizer.decode(run, skip_special_tokens=True), time], []
        return "".join(parts[:-1]).strip()

    @cached_property
    def normalize(self) -> Callable[[str], str]:
        """What makes spellings of the same words equal, before words are compared: Whisper's own for English where the
        model brings its spellings, else the one for any language."""
        from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

        path = self.folder / NORMALIZER
        return EnglishTextNormalizer(read_json(path)) if path.exists() else BasicTextNormalizer()

    def save(self, folder: Path) -> None:
        """The tokenizer's files and the extractor's, byte for byte."""
        self.tokenizer.save(folder)
        super().save(folder)
        if (self.folder / NORMALIZER).is_file():
            shutil.copyfile(self.folder / NORMALIZER, folder / NORMALIZER)


@dataclass(frozen=True)
class WaveProcessor(SpeechProcessor):
    """Moonshine's: samples as they are. Its encoder normalises over the whole of a recording: silence at its end would
    change it, so that only recordings of equal length share a batch. It writes one language, and no times."""

    padded: ClassVar[bool] = False
    input_name: ClassVar[str] = "input_values"
    blank: ClassVar[str] = ""

    @property
    def seconds(self) -> float:
        return MOST_SECONDS

    @property
    def frames(self) -> int:
        return round(MOST_SECONDS * self.rate / FRAME_SAMPLES)

    @property
    def bands(self) -> int:
        """Samples alone: no frequencies."""
        return 1

    def features(self, samples: Tensor) -> NDArray[np.float32]:
        """(samples, 1), all of them. Raises: DataError for fewer than make a frame."""
        if len(samples) < LEAST_SAMPLES:
            own, least = (count / self.rate for count in (len(samples), LEAST_SAMPLES))
            what = f"the recording lasts {own:.3f} s, and the model hears {least:.3f} s at least"
            raise DataError(what, "leave it out")
        made = self.extractor(samples.numpy(), sampling_rate=self.rate, return_tensors="np")
        return made["input_values"][0].astype(np.float32)[:, None]

    def filled(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """(samples,), nothing having been left out."""
        return features.reshape(-1)

    def prefix(self, language: str | None, task: str, timestamps: bool) -> list[int]:
        """The id with which an answer begins. Raises: DataError for a language, a task or times."""
        if language is not None or task != "transcribe" or timestamps:
            what = "the model transcribes the language that it was trained on, without times"
            raise DataError(what, "leave language, task and timestamps out, or choose Whisper")
        return [self.answer_start]

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def _code(language: str) -> str:
    """Of a language by its name, code or token; what is none of them stays as it is."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    name = language.strip().lower().removeprefix("<|").removesuffix("|>")
    return str(TO_LANGUAGE_CODE.get(name, name))


def load_speech_processor(section: ModelSection) -> SpeechProcessor:
    """The base's extractor, tokenizer and generation settings. Raises: ModelError where one of them is missing."""
    extractor, folder = load_extractor(section)
    tokenizer = load_tokenizer(section)
    if tokenizer.answer_start_id is None:
        what = "the base does not say with which token its answers begin"
        raise ModelError(what, "write decoder_start_token_id into its config.json", key="model.name_or_path")
    path, config = folder / "generation_config.json", read_json(folder / "config.json")
    generation = read_json(path) if path.exists() else {}
    if config["model_type"] == "moonshine":
        longest = int(config.get("max_position_embeddings") or WAVE_TOKENS)
        return WaveProcessor(extractor, folder, tokenizer, generation, False, longest)
    size = config.get("vocab_size")
    known = bool(generation["lang_to_id"]) if "lang_to_id" in generation else size != ENGLISH_VOCABULARY
    multilingual, longest = bool(generation.get("is_multilingual", known)), int(config["max_target_positions"])
    return SpeechProcessor(extractor, folder, tokenizer, generation, multilingual, longest)
