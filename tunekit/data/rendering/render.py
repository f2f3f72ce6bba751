"""Renders examples as ids with loss weights. The spans of the messages decide which tokens are trained on.

A conversation is rendered completely, rendered again up to each assistant turn (turns.py finds the spans), and
tokenized with offsets. Data that spells a special token stays text: only the template makes control tokens.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tunekit.basics import JsonObject
from tunekit.contracts import Tokenizer
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.rendering.control import ControlTokens, encode_trusted
from tunekit.data.rendering.expansion import ImageTexts, expanded
from tunekit.data.rendering.kept import KeptReasoning
from tunekit.data.rendering.reasoning import REASONING, reads_field, split_reasoning, without_reasoning
from tunekit.data.rendering.turns import TurnFinder, TurnSpan, answer_indices, last_answer
from tunekit.errors import DataError, LengthError
from tunekit.formats.example import IMAGE, ChatExample, Example, Message, TextExample, question_turns

Weights = NDArray[np.float32]  # (T,)

EMPTY_ANSWER = "empty answer"
EMPTY_TEXT = "empty text"
NO_ANSWER = "no answer to train on"
NO_WEIGHT = "sample_weight 0"
HAS_SYSTEM = "rows with a system message at the beginning; give the model one in use too (--system TEXT)"
NO_TEMPLATE = "rows encoded as a plain prompt and answer, because the tokenizer has no chat template"
EOS_ADDED = "rows that got an end-of-sequence token, because the chat template does not end the last turn"
SPELLED = (
    "warning: rows whose text contains a special token; it stays text, because only a chat template makes special "
    "tokens; write conversations as messages (format chat)"
)
_PROBE = "\ue003tunekit\ue003"
_RESPONSE, _RESPONSE_END = "<tool_response>", "</tool_response>"
PIECE_CHARACTERS = 8192  # of a piece whose tokens are counted
CUT_TOKENS = 16  # that cutting can add to a piece
UNSAID = ("name", "tool_call_id", "tool_calls")  # fields that a template may ignore; turns.py checks tool_calls
WEIGHTS_UNREAD = "warning: rows whose messages have a weight, or train: false, which data.train_on: all ignores"
AS_GIVEN = "rows whose earlier answers the chat template rewrites; each answer is trained on in its original form"
MERGED_BOUNDARY = "rows whose first answer token also contains the end of the prompt; this token is trained on"


TokenRange = tuple[int, int]  # first, stop


class Rendered(NamedTuple):
    """The ids of a row, their loss weights, and the tokens of each image's expansion."""

    ids: list[int]
    weights: Weights
    images: list[TokenRange]


@dataclass
class Renderer:
    """Renders examples for one tokenizer, one template and one `train_on`. `notices`: counts of notes for the user;
    `reasoning`: what happens to the reasoning of answers (data.reasoning)."""

    tokenizer: Tokenizer
    train_on: str
    template: str | None = None
    notices: Counter[str] = field(default_factory=Counter)
    reasoning: str = "template"

    def __post_init__(self) -> None:
        self._control = ControlTokens(self.tokenizer)
        self._turns = TurnFinder(self.tokenizer, self._control, self.template, self.notices)
        self._written = self.template or self.tokenizer.chat_template or ""
        self._kept = KeptReasoning(self._turns, self._control, self._written)
        self._keeps = self.reasoning in ("train", "mask")
        self._image_texts: tuple[str, str] | None = None

    @property
    def has_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self.template is not None or self.tokenizer.chat_template is not None

    def sequence(self, example: Example) -> tuple[list[int], Weights]:
        """The ids of a row and their loss weights: 0 for tokens that are not trained on, else 1 or the row's
        weight.

        Raises: Dropped if nothing can be trained on; DataError if the row is wrong.
        """
        return self.with_images(example, None)[:2]

    def with_images(self, example: Example, images: ImageTexts | None) -> Rendered:
        """Like `sequence`, for a conversation with images. Tokens of images are never trained on."""
        example, places = self._readable(example), list[TokenRange]()
        if isinstance(example, ChatExample):
            ids, weights, places = self._chat_sequence(example, images)
        elif isinstance(example, TextExample):
            ids, weights = self._plain_sequence("", example.text, EMPTY_TEXT)
        else:
            ids, weights = self._plain_sequence(example.prompt, example.completion, EMPTY_ANSWER)
        if not example.weight:
            raise Dropped(NO_WEIGHT)
        return Rendered(ids, weights * np.float32(example.weight), places)

    def as_given(self, example: Example) -> list[Example]:
        """The example, split if needed, so that each answer of a conversation is trained on as the row has it.

        Some templates rewrite earlier answers when more turns follow. Then the conversation becomes one example per
        answer, which ends with this answer and trains on it only. Other examples are returned unchanged.
        """
        if not isinstance(example, ChatExample) or not self.has_template:
            return [example]
        wanted = answer_indices(example.messages, self.train_on)
        if len(wanted) < 2 or not self._turns.rewrites(example, wanted):
            return [example]
        context = [replace(message, weight=0.0) for message in example.messages]
        self.notices[AS_GIVEN] += 1
        return [
            replace(example, messages=(*context[:index], example.messages[index]), without_template=None)
            for index in wanted
        ]

    def reasoning_left_out(self, example: Example) -> list[int]:
        """The indices of the messages whose reasoning the chat template leaves out; empty unless data.reasoning is
        template. Raises: DataError if the template refuses the conversation."""
        if not isinstance(example, ChatExample) or not self.has_template or self.reasoning != "template":
            return []
        reasoning = [split_reasoning(message).reasoning.strip() for message in example.messages]
        text = self._turns.render(example.messages, example.tools) if any(reasoning) else ""
        return [index for index, thought in enumerate(reasoning) if thought not in text]

    def prompt(self, example: Example) -> tuple[list[int], str] | None:
        """The ids before the last answer (the prompt for generation), and the answer's text; None for plain text."""
        source = self.source(example)
        if source is None:
            return None
        text, ids, answer = source
        return (self.plain(text) if ids is None else ids), answer

    def source(self, example: Example) -> tuple[str, list[int] | None, str] | None:
        """(text, ids, answer): the prompt of the last answer, and the answer's text; None if there is no answer.

        For a conversation, `text` is "". For other examples, `text` is the prompt's text, and `ids` is None.
        """
        example = self._readable(example)
        if isinstance(example, ChatExample):
            index = last_answer(example)
            return None if index is None else ("", self._turns_before(example, index), example.messages[index].content)
        if isinstance(example, TextExample) or not example.completion:
            return None
        prompt, completion = self._begun(example.prompt)[1], self._unended(example.completion)
        self._count_spelled(prompt + completion)
        return prompt, None, completion

    def question(self, text: str, system: str | None = None) -> list[int]:
        """The ids of a user's turn after an optional system message, up to the start of the answer. Without a template,
        the ids of the text alone."""
        return self.turns(question_turns(text, system)) if self.has_template else self.plain(text)

    def turns(
        self, messages: Sequence[Message], most: int | None = None, tools: tuple[JsonObject, ...] | None = None
    ) -> list[int]:
        """The ids of a conversation, up to the start of its next answer.

        Raises: DataError if there is no template; LengthError if the conversation certainly has more than `most`
        tokens.
        """
        return self._turns_before(ChatExample(tuple(messages), tools), len(messages), most)

    def plain(self, text: str, most: int | None = None, *, special_tokens_in_text: bool = False) -> list[int]:
        """The ids of a text without a template and without an end-of-sequence token.

        Raises: LengthError if the text certainly has more than `most` tokens.
        """
        if most is not None:
            self._check_length(text, most)
        begin, text = self._begun(text)
        return begin + self.tokenizer.encode(text, special_tokens_in_text=special_tokens_in_text)

    def _readable(self, example: Example) -> Example:
        """The example, without reasoning if data.reasoning is drop, and without Hermes' tags around the results of
        tools if the template writes these tags itself. If the tokenizer has no chat template, a conversation
        becomes a plain prompt and answer."""
        if isinstance(example, ChatExample) and self.reasoning == "drop":
            example = replace(example, messages=without_reasoning(example.messages))
        if isinstance(example, ChatExample) and _RESPONSE in self._written:
            example = replace(example, messages=tuple(map(_unwrapped, example.messages)))
        if self.has_template or not isinstance(example, ChatExample) or example.without_template is None:
            return example
        self.notices[NO_TEMPLATE] += 1
        return replace(example.without_template, weight=example.weight)

    def _begun(self, text: str) -> tuple[list[int], str]:
        """The beginning-of-sequence token, if the tokenizer adds one, and the text with this token stripped."""
        bos = self.tokenizer.bos_id
        if bos is None or not self.tokenizer.adds_bos:
            return [], text
        return [bos], text.removeprefix(self.tokenizer.decode([bos]))

    def _unended(self, text: str) -> str:
        """The text, with an end-of-sequence token at its end removed."""
        eos = self.tokenizer.eos_id
        return text if eos is None else text.removesuffix(self.tokenizer.decode([eos]))

    def _count_spelled(self, text: str) -> None:
        if self._control.spelled_in(text):
            self.notices[SPELLED] += 1

    def _turns_before(self, example: ChatExample, index: int, most: int | None = None) -> list[int]:
        """The ids of the turns before turn `index`, with the template's generation prompt."""
        if self._keeps:
            written = (split_reasoning(message).written(self._written) for message in example.messages)
            example = replace(example, messages=tuple(written))
        self._need_template(example.messages)
        if most is not None and index > most:  # each turn has at least one token
            raise too_long(f"more than {most:,}", most)
        messages, tools = example.messages[:index], example.tools
        header = self._turns.answer_header(messages, tools)
        text = self._turns.render(messages, tools, add_generation_prompt=True) + header
        if most is not None:
            self._check_length(text, most)
        neutral = self._turns.render_neutral(messages, tools, add_generation_prompt=True) + header
        return encode_trusted(text, neutral, self.tokenizer, self._control)[0]

    def _check_length(self, text: str, most: int) -> None:
        """Raises: LengthError if the text certainly has more than `most` tokens.

        The text is tokenized in pieces, because a tokenizer blocks all other threads. Cutting can add up to
        CUT_TOKENS tokens to a piece, so this number is subtracted from each piece.
        """
        count = 0
        for start in range(0, len(text), PIECE_CHARACTERS):
            piece = text[start : start + PIECE_CHARACTERS]
            count += max(0, len(self.tokenizer.encode(piece)) - CUT_TOKENS)
            if count > most:
                raise too_long(f"more than {most:,}", most)

    def _refuse_images(self) -> None:
        """Raises: DataError with the reason why a conversation with images cannot be rendered."""
        images = self.tokenizer.images
        what = "the row has images, but the base reads text alone" if images is None else images.obstacle
        how = "use a base that reads images, such as Qwen/Qwen2.5-VL-3B-Instruct, or remove the images"
        if what is None:
            what = "the row has images, which only objective: sft reads so far, and only to compute losses"
            how = "write objective: sft, without generation in evaluations; or remove the images"
        raise DataError(what, how)

    def _need_template(self, messages: Sequence[Message], images: ImageTexts | None = None) -> None:
        """Raises: DataError if there is no template, if the messages have fields that the template does not read, or if
        they have images whose texts are not given."""
        if images is None and any(message.images for message in messages):
            self._refuse_images()
        written, key = self.template or self.tokenizer.chat_template, "data.chat_template"
        if written is None:
            raise DataError(
                "a conversation needs a chat template, which the tokenizer lacks", "set it to a Jinja file", key=key
            )
        for name in dict.fromkeys(name for message in messages for name in message.extra):
            if name in UNSAID or reads_field(written, name):
                continue
            other = next((other for other in REASONING if name in REASONING and reads_field(written, other)), None)
            by_option = " (data.reasoning: drop removes it, train keeps it)" if name in REASONING else ""
            how = f"remove the field{by_option}, or give another template"
            how = f"the template reads '{other}': rename the field" if other else how
            raise DataError(f"the chat template does not read '{name}' of a message", how, key=key)

    def _chat_sequence(
        self, example: ChatExample, images: ImageTexts | None
    ) -> tuple[list[int], Weights, list[TokenRange]]:
        rendered = (split_reasoning(message).rendered(self._written) for message in example.messages)
        self._need_template(tuple(rendered) if self._keeps else example.messages, images)
        self.notices.update([HAS_SYSTEM] if example.messages[0].role == "system" else [])
        finder = self._kept if self._keeps else self._turns
        conversation = finder.find(example, self.train_on)
        if not conversation.spans and self.train_on != "all":
            raise Dropped(EMPTY_ANSWER if conversation.empty_answers else NO_ANSWER)
        expansions = list[TurnSpan]()
        if images is not None:
            conversation, expansions = expanded(conversation, images, self._around_image(images.placeholder))
        text = conversation.text
        ids, offsets = encode_trusted(text, conversation.neutral, self.tokenizer, self._control)
        eos = self.tokenizer.eos_id
        ends = {*self._control.ids, eos}
        if self.train_on == "all":
            answers = [each for each in example.messages[example.prompt_turns :] if each.role == "assistant"]
            self.notices.update([WEIGHTS_UNREAD] if any(each.weight != 1 for each in answers) else [])
            backwards = zip(reversed(ids), reversed(offsets), strict=True)
            last = next((each for each, place in backwards if each in ends or text[slice(*place)].strip()), eos)
            if eos is not None and example.messages[-1].role == "assistant" and last not in ends:
                self.notices[EOS_ADDED] += 1
                ids = [*ids, eos]
            weights = self._masked(np.ones(len(ids), dtype=np.float32), conversation.reasoning, offsets)
            return ids, weights, _without(weights, expansions, offsets)
        spans = [self._turns.close(span, text, ids, offsets) for span in conversation.spans]
        weights = np.zeros(len(ids), dtype=np.float32)  # (T,)
        for span, weight in zip(spans, conversation.weights, strict=True):
            marks = mark_spans(offsets, [span])
            if any(ids[place] not in ends for place in np.flatnonzero(marks)):  # else the answer has no text
                weights[marks] = weight
        weights = self._masked(weights, conversation.reasoning, offsets)
        places = _without(weights, expansions, offsets)
        if not weights.any():
            raise Dropped(EMPTY_ANSWER)
        if eos is not None and conversation.ends_open(spans, ids[-1], self._control, eos):
            self.notices[EOS_ADDED] += 1
            ids, weights = [*ids, eos], np.append(weights, weights.dtype.type(conversation.weights[-1]))
        return ids, weights, places

    def _around_image(self, placeholder: str) -> tuple[str, str]:
        """The texts that the template writes before and after the placeholder of an image, such as a token that marks
        the image's start. Empty for a template that moves images."""
        if self._image_texts is None:
            try:
                text = self._turns.render([Message("user", f"{_PROBE}{IMAGE}{_PROBE}", images=(None,))], None)
            except DataError:
                text = ""
            pieces = text.split(_PROBE)
            before, found, after = pieces[1].partition(placeholder) if len(pieces) == 3 else ("", "", "")
            self._image_texts = (before, after) if found else ("", "")
        return self._image_texts

    def _masked(self, weights: Weights, spans: Sequence[TurnSpan], offsets: Sequence[tuple[int, int]]) -> Weights:
        """The weights, with 0 for tokens of the spans if data.reasoning is mask."""
        for span in spans if self.reasoning == "mask" else ():
            inside = [at for at, (start, end) in enumerate(offsets) if span.start <= start and end <= span.end]
            weights[inside] = 0
        return weights

    def _plain_sequence(self, prompt: str, trained_text: str, empty: str) -> tuple[list[int], Weights]:
        """Ids and loss weights of a prompt and a text to train on, without a template.

        The beginning-of-sequence and end-of-sequence tokens are added, unless the text begins or ends with them.
        The end-of-sequence token is trained on. Other special tokens that the text spells stay text.
        `empty`: the reason for dropping the row if nothing is left to train on.
        """
        if not trained_text:
            raise Dropped(empty)
        whole = prompt + trained_text
        begin, text = self._begun(whole)
        start = 0 if self.train_on == "all" else max(0, len(prompt) - len(whole) + len(text))
        text = self._unended(text)
        self._count_spelled(text)
        ids, offsets = self.tokenizer.encode_with_offsets(text, special_tokens_in_text=False)
        trained = np.ones(len(ids), dtype=np.bool_)  # (T,)
        if start:
            filled = fill_gaps(offsets)
            trained = mark_spans(filled, [TurnSpan(start, len(text))])
            if any(first < start < end for first, end in filled):
                self.notices[MERGED_BOUNDARY] += 1
        if text[start:] and not trained.any():  # the tokenizer removes the whole text
            raise Dropped(empty)
        end = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        return [*begin, *ids, *end], np.concatenate([[0] * len(begin), trained, [1] * len(end)]).astype(np.float32)


def _without(weights: Weights, expansions: Sequence[TurnSpan], offsets: Sequence[tuple[int, int]]) -> list[TokenRange]:
    """The tokens that contain a character of each expansion. Their weights are set to 0."""
    places = list[TokenRange]()
    for span in expansions:
        inside = np.flatnonzero(mark_spans(offsets, [span]))
        places.append((int(inside[0]), int(inside[-1]) + 1))
        weights[inside] = 0
    return places


def too_long(tokens: str, most: int) -> LengthError:
    """The error for a conversation that is too long. `tokens`: its number of tokens, in words. `most`: the maximum."""
    what = f"the conversation has {tokens} tokens, but the model reads at most {most:,}"
    return LengthError(what, "shorten the conversation, or start a new one")


def _unwrapped(message: Message) -> Message:
    """The message; a tool's result without the tags in which Hermes' data sets write it."""
    inner = message.content.strip()
    if message.role != "tool" or not (inner.startswith(_RESPONSE) and inner.endswith(_RESPONSE_END)):
        return message
    return replace(message, content=inner.removeprefix(_RESPONSE).removesuffix(_RESPONSE_END).strip("\n"))


def fill_gaps(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets without gaps, so that they cover the text: some tokenizers leave leading spaces out of the offsets."""
    filled: list[tuple[int, int]] = []
    last = 0
    for start, end in offsets:
        filled.append((min(start, last), max(end, last)) if start >= last else (start, end))
        last = max(last, end)
    return filled


def mark_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[TurnSpan]) -> NDArray[np.bool_]:
    """(T,) True for each token that contains a character of a span. Spans are in order and do not overlap."""
    marks = np.zeros(len(offsets), dtype=np.bool_)  # (T,)
    starts = np.array([start for start, _ in offsets], dtype=np.int64)  # (T,)
    ends = np.array([end for _, end in offsets], dtype=np.int64)  # (T,)
    for span in spans:
        inside = (ends > span.start) & (starts < span.end)
        empty = (ends == starts) & (starts >= span.start) & (starts < span.end)
        marks |= inside | empty
    return marks
