"""Wraps a loaded model for lm-eval: log-probabilities of continuations and of whole texts, and generated answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tunekit.contracts import GREEDY, Objective, Progress, Sampling, no_progress
from tunekit.errors import DataError, InputError
from tunekit.evaluation.continuations import continuation_scores
from tunekit.evaluation.scores import undisturbed
from tunekit.machine.devices import Devices
from tunekit.model.families import text_config
from tunekit.model.text.generation import generate_texts, model_end_ids
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.records import JsonObject
from tunekit.tuned.model import TunedModel

LENGTH_KEYS = ("n_positions", "max_position_embeddings", "n_ctx")  # of configurations; lm-eval reads the same keys
LONGEST, UNLIMITED = 2048, 10**18  # tokens, if neither configuration nor tokenizer states a length, as in lm-eval
NEW_TOKENS = 256  # of one answer, if the task states no number, as in lm-eval
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # in order of priority
CONTINUED = (
    "CONTINUE_FINAL_MESSAGE_TAG "  # marks the end of a message that is continued; transformers has the same text
)
SAMPLING_NAMES = {"until", "do_sample", "temperature", "top_p", "top_k", *LENGTH_NAMES}


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A causal language model with its adapter, as lm-eval calls it. Requests and results are the same as in lm-eval's
    class HFLM."""

    backend = "causal"

    def __init__(
        self,
        model: TunedModel,
        tokenizer: LoadedTokenizer,
        objective: Objective,
        devices: Devices,
        batch_size: int,
        progress: Progress = no_progress,
        template: str | None = None,
    ) -> None:
        """Wrap a loaded model. `template`: a chat template that replaces the tokenizer's own."""
        super().__init__()
        self.model, self.text, self.objective, self.devices = model, tokenizer, objective, devices
        self.batch_size, self.progress = batch_size, progress
        self.tokenizer, self.template = tokenizer.native, template

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return int(self.text.eos_id or 0)

    @property
    def prefix_token_id(self) -> int:
        """The id that is put before a text that has no context."""
        return self.eot_token_id if self.text.bos_id is None else self.text.bos_id

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer in lm-eval's cache of requests. tunekit does not use this cache."""
        return self.text.fingerprint

    @property
    def max_length(self) -> int:
        """The number of tokens that the model can read."""
        config = text_config(self.model.base.net)
        lengths = [value for key in LENGTH_KEYS if (value := getattr(config, key, None)) is not None]
        stated = int(self.tokenizer.model_max_length)
        return int(next(iter(lengths), stated if stated < UNLIMITED else LONGEST)) - self.model.virtual_tokens

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """The token ids of a text. By default, the tokenizer's special tokens are added, unless the text already begins
        with them."""
        bos = self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and string.startswith(bos):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The text of the chat template, which lm-eval writes into its results."""
        return self.template or self.text.chat_template or ""

    def apply_chat_template(self, chat_history: list[JsonObject], add_generation_prompt: bool = True) -> str:
        """The messages as one text. Without a generation prompt, the answer continues the last message.

        If the template refuses a system message, the conversation is rendered without it, as in HFLM.
        """
        try:
            return self._rendered(chat_history, add_generation_prompt)
        except DataError:
            others = [message for message in chat_history if message["role"] != "system"]
            if others == chat_history:
                raise
            return self._rendered(others, add_generation_prompt)

    def _rendered(self, messages: list[JsonObject], starts_answer: bool) -> str:
        if starts_answer:
            return self.text.render(messages, add_generation_prompt=True, template=self.template)
        last = JsonObject(messages[-1], content=f"{messages[-1]['content']}{CONTINUED}")
        text = self.text.render([*messages[:-1], last], template=self.template)
        place = text.rfind(CONTINUED.strip())
        if place < 0:
            raise DataError("the chat template drops the given start of an answer", "choose a different chat template")
        return text[:place] if text[place:].startswith(CONTINUED) else text[:place].rstrip()  # as transformers does

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        """The score of each continuation. A context that is too long loses its first tokens.

        Raises: InputError for a continuation that has too many tokens, or none (it would have the highest score).
        """
        room = self.max_length + 1  # the last token of a continuation is only predicted
        lengths = [len(end) for *_, end in requests]
        if wrong := [length for length in lengths if not 0 < length < room]:
            what = f"a task has a continuation of {wrong[0]} tokens, but the model needs 1 to {self.max_length}"
            raise InputError(what, "remove this document from the task")
        pairs = [(context[-max(1, room - len(end)) :], end) for _, context, end in requests]
        return continuation_scores(
            self.model, self.objective, pairs, self.devices, batch_size=self.batch_size, progress=self.progress
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text. Long texts are divided into windows that do not overlap."""
        windows = list[tuple[object, list[int], list[int]]]()
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            parts = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            mine = [(None, *make_disjoint_window(part)) for part in parts]
            windows += mine
            counts.append(len(mine))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request, up to the first stop text in the answer."""
        groups = defaultdict[str, list[int]](list)
        for number, request in enumerate(requests):
            groups[repr(request.args[1])].append(number)
        answers = dict[int, str]()
        for numbers in groups.values():
            self.progress("answers written", len(answers), len(requests))
            texts = [requests[number].args[0] for number in numbers]
            answers |= zip(numbers, self._answers(texts, requests[numbers[0]].args[1]), strict=True)
        return [answers[number] for number in range(len(requests))]

    def _answers(self, texts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        """The answers to requests with equal settings of lm-eval. Raises: InputError for a setting that this class does
        not support."""
        unknown = sorted(set(settings) - SAMPLING_NAMES)
        if unknown:
            raise InputError(
                f"a task has unsupported generation_kwargs: {', '.join(unknown)}",
                "remove them from the task's YAML file",
            )
        count = next((int(settings[name]) for name in LENGTH_NAMES if settings.get(name) is not None), NEW_TOKENS)
        room = self.max_length - count
        if room < 1:
            what = f"a task requests {count} new tokens, but the model has only {self.max_length} positions"
            raise InputError(what, "lower max_gen_toks in the task")
        until = [] if settings.get("until") is None else settings["until"]
        ends = [until] if isinstance(until, str) else list(until)
        if "" in ends:
            raise InputError("a task has an empty text in its generation_kwargs.until", "remove it in the task")
        prompts, stops = [self.tok_encode(text)[-room:] for text in texts], _StopTexts(self.text, ends)
        stop_ids = [self.eot_token_id, *model_end_ids(self.model.base)]
        with undisturbed(self.model):
            produced = generate_texts(
                self.model.base,
                self.text,
                prompts,
                max_new_tokens=count,
                batch_size=self.batch_size,
                sampling=sampling_of(settings),
                stop_ids=stop_ids,
                adapt=self.model.adapt_inputs,
                virtual_tokens=self.model.virtual_tokens,
                keep_stop=True,  # as in HFLM, an end that is an ordinary token is part of the answer
                ends=stops.ended,
            )
        return [stops.cut(self.text.decode(ids, skip_special_tokens=True)) for ids in produced]


def sampling_of(settings: Mapping[str, Any]) -> Sampling:
    """The sampling settings that a task states. Without settings, decoding is greedy."""
    temperature = float(settings.get("temperature") or 0.0)
    if not settings.get("do_sample", temperature > 0):
        return GREEDY
    return Sampling(temperature or 1.0, float(settings.get("top_p") or 1.0), int(settings.get("top_k") or 0))


class _StopTexts:
    """Ends an answer when its text contains a stop text."""

    def __init__(self, tokenizer: LoadedTokenizer, texts: Sequence[str]) -> None:
        self.tokenizer, self.texts = tokenizer, [text for text in texts if text]

    def ended(self, ids: Sequence[int]) -> bool:
        """Whether an answer with these ids contains a stop text. A stop text may be the name of a special token."""
        text = self.tokenizer.decode(ids) if self.texts else ""
        return any(stop in text for stop in self.texts)

    def cut(self, text: str) -> str:
        """The part of the text before the first stop text."""
        for stop in self.texts:
            text = text.split(stop)[0]
        return text
