"""The processor of speech recognition models, which converts recordings to features, and transcripts to token ids."""

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
# Whisper's English-only models; used if generation_config.json does not state multilinguality
ENGLISH_VOCABULARY = 51_864
MAX_SECONDS = 30.0  # of Moonshine's training recordings (Jeffries et al. 2024)
FRAME_SAMPLES = 64 * 3 * 2  # the product of the strides of Moonshine's three convolutions
MIN_SAMPLES = 127 + 64 * (7 - 1) + 64 * 3 * (3 - 1)  # number of samples that the convolutions need for one frame
WAVE_TOKENS = 194  # maximum length of Moonshine's answers, from its generation settings
MAX_SHOWN = 12


@dataclass(frozen=True)
class SpeechProcessor(FeatureExtractor):
    """The model's own feature extractor, tokenizer and generation settings.

    `blank`: the prefix of every transcript, as in Whisper's training data.
    """

    blank: ClassVar[str] = " "
    tokenizer: LoadedTokenizer
    generation: JsonObject
    multilingual: bool
    longest_answer: int  # positions of the decoder

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that affects an encoded row."""
        texts = [self.multilingual, self.generation.get("lang_to_id"), self.generation.get("no_timestamps_token_id")]
        return hash_of([self.tokenizer.fingerprint, self.facts, texts])

    @property
    def answer_start(self) -> int:
        """The id of the token with which every answer begins."""
        start = self.tokenizer.answer_start_id
        assert start is not None  # load_speech_processor checked it
        return start

    def text_ids(self, text: str) -> list[int]:
        """Ids of a transcript, with `blank` before it. Names of special tokens in the transcript are encoded as plain
        text."""
        text = text.strip()
        return self.tokenizer.encode(f"{self.blank}{text}", special_tokens_in_text=False) if text else []

    def prefix(self, language: str | None, task: str, timestamps: bool) -> list[int]:
        """The first ids of an answer: the start token, the tokens for language and task in a multilingual model, and
        the token <|notimestamps|> unless `timestamps`.

        Raises: DataError for an unknown or missing language.
        """
        ids = [self.answer_start]
        if self.multilingual:
            if language is None:
                what = "the model is multilingual, but no language is given"
                raise DataError(what, "write objective.language, or a column 'language'")
            ids += [self._token(f"<|{self.language_code(language)}|>"), self._token(f"<|{task}|>")]
        elif (language is not None and _code(language) != "en") or task != "transcribe":
            what = "the model can only transcribe English"
            raise DataError(what, "remove language and task, or choose a multilingual model")
        return ids if timestamps else [*ids, self.no_timestamps]

    def language_code(self, language: str) -> str:
        """The code of a language, such as "en". `language`: its name, code or token. Raises: DataError that lists the
        known languages."""
        code, known = _code(language), self._languages
        if code not in known:
            raise DataError(f"unknown language '{language}'", f"write a name or a code: {listed(known, MAX_SHOWN)}")
        return code

    @cached_property
    def _languages(self) -> list[str]:
        from transformers.models.whisper.tokenization_whisper import LANGUAGES

        tokens = self.generation.get("lang_to_id") or self.tokenizer.backend.get_vocab(with_added_tokens=True)
        return sorted(code for code in LANGUAGES if f"<|{code}|>" in tokens)

    @property
    def no_timestamps(self) -> int:
        """The id of the token "no timestamps". The ids of the timestamps follow it."""
        token_id = self.generation.get("no_timestamps_token_id")
        return int(token_id) if token_id is not None else self._token("<|notimestamps|>")

    def timestamp(self, seconds: float) -> int:
        """The id of the token for a time within a recording."""
        return self.no_timestamps + 1 + round(min(seconds, self.seconds) / TIMESTAMP_SECONDS)

    def _token(self, text: str) -> int:
        token_id = self.tokenizer.backend.token_to_id(text)
        if token_id is None:
            raise DataError(f"the model's tokenizer has no token {text}", "choose another base, language or task")
        return int(token_id)

    def text(self, ids: Sequence[int]) -> str:
        """Decode ids to a transcript. Special tokens are left out, and timestamps are written as <|1.08|>."""
        first, parts, run = self.no_timestamps + 1, list[str](), list[int]()
        for token_id in [*ids, first]:
            if token_id < first:
                run.append(token_id)
                continue
            time = f"<|{(token_id - first) * TIMESTAMP_SECONDS:.2f}|>"
            parts, run = [*parts, self.tokenizer.decode(run, skip_special_tokens=True), time], []
        return "".join(parts[:-1]).strip()

    @cached_property
    def normalize(self) -> Callable[[str], str]:
        """A function that normalises spelling before texts are compared. This is Whisper's normaliser for English if
        the model has a file of English spellings, otherwise Whisper's normaliser for all languages."""
        from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

        path = self.folder / NORMALIZER
        return EnglishTextNormalizer(read_json(path)) if path.exists() else BasicTextNormalizer()

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's and the extractor's files."""
        self.tokenizer.save(folder)
        super().save(folder)
        if (self.folder / NORMALIZER).is_file():
            shutil.copyfile(self.folder / NORMALIZER, folder / NORMALIZER)


@dataclass(frozen=True)
class WaveProcessor(SpeechProcessor):
    """The processor of Moonshine, which reads raw samples. Moonshine supports one language and no timestamps.

    Its encoder normalises over the whole recording, so padding would change the result. Therefore only recordings of
    equal length share a batch.
    """

    padded: ClassVar[bool] = False
    input_name: ClassVar[str] = "input_values"
    blank: ClassVar[str] = ""

    @property
    def seconds(self) -> float:
        return MAX_SECONDS

    @property
    def frames(self) -> int:
        return round(MAX_SECONDS * self.rate / FRAME_SAMPLES)

    @property
    def bands(self) -> int:
        """Always 1: samples have no frequency bands."""
        return 1

    def features(self, samples: Tensor) -> NDArray[np.float32]:
        """The normalised samples, (samples, 1). Raises: DataError for a recording that is too short for one frame."""
        if len(samples) < MIN_SAMPLES:
            length, minimum = (count / self.rate for count in (len(samples), MIN_SAMPLES))
            what = f"the recording lasts {length:.3f} s, but the model needs at least {minimum:.3f} s"
            raise DataError(what, "leave this recording out")
        extracted = self.extractor(samples.numpy(), sampling_rate=self.rate, return_tensors="np")
        return extracted["input_values"][0].astype(np.float32)[:, None]

    def padded_features(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """(samples,), without padding."""
        return features.reshape(-1)

    def prefix(self, language: str | None, task: str, timestamps: bool) -> list[int]:
        """The first ids of an answer: only the start token. Raises: DataError if a language, timestamps, or a task
        other than transcribe is requested."""
        if language is not None or task != "transcribe" or timestamps:
            what = "the model only transcribes the language that it was trained on, without timestamps"
            raise DataError(what, "remove language, task and timestamps, or choose Whisper")
        return [self.answer_start]

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def _code(language: str) -> str:
    """The code of a language that is given by its name, code or token. Other texts are returned in lower case."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    name = language.strip().lower().removeprefix("<|").removesuffix("|>")
    return str(TO_LANGUAGE_CODE.get(name, name))


def load_speech_processor(section: ModelSection) -> SpeechProcessor:
    """Load the processor of a base: feature extractor, tokenizer and generation settings. Raises: ModelError if one of
    them is missing."""
    extractor, folder = load_extractor(section)
    tokenizer = load_tokenizer(section)
    if tokenizer.answer_start_id is None:
        what = "the base does not name the token with which its answers begin"
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
