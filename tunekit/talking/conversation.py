"""Answers conversations token by token, with a base and any number of its adapters.

The keys and values of a conversation are cached for its next turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.folder.config import TEMPLATE_NAME
from tunekit.data.encoding.sources import read_template
from tunekit.data.rendering.render import Renderer, too_long
from tunekit.errors import InputError, LengthError
from tunekit.model.text.continuation import Continuation, NewToken, States
from tunekit.model.text.decoder import PIECE_TOKENS, Decoder, decoding
from tunekit.model.text.draws import Score
from tunekit.model.text.token_bytes import token_bytes
from tunekit.model.text.vocabulary import check_vocabulary
from tunekit.objectives.rows.text import as_source
from tunekit.talking.adapters import BASE, Adapters
from tunekit.talking.answer import AnswerPiece, AnswerWriter, Reply, Request, TokenScore, decoder_after
from tunekit.talking.template import ChatTemplate, make_template
from tunekit.targets.target import LoadedTarget

CACHED_CONVERSATIONS = 4  # whose keys and values are in memory for their next turns
EXTRA_SLOTS = 3  # memory besides the slots, see Speaker.slot_tokens
UNLIMITED_TOKENS = 2**20  # of an answer whose keys and values are not in slots

OnPiece = Callable[[AnswerPiece], bool]  # the next piece of an answer, may be empty -> whether to continue
OnEnd = Callable[[Reply], None]


@dataclass
class Speaker:
    """Generates answers with one base and any of its adapters. Only one call at a time is allowed."""

    target: LoadedTarget
    adapters: Adapters
    default: str  # the name that answers by default: BASE, or the target's own adapter
    template: ChatTemplate  # the target's
    templates: dict[str | None, ChatTemplate]  # of the target and its adapters, by their text
    positions: int | None  # the maximum of tokens of a prompt and its answer
    states: dict[str, tuple[AttachedAdapter | None, States]] = field(default_factory=dict)  # of the last conversations
    cache_limit: int = UNLIMITED_TOKENS  # the maximum of tokens of these conversations

    def prepare(self, request: Request, name: str | None = None) -> Request:
        """Returns the request together with the token ids of its prompt and everything else that generation needs.
        `name`: the model; None: the default model.

        Only one thread at a time may call this, but another thread may generate answers meanwhile.
        Raises: DataError if the chat template refuses the conversation; LengthError if it is too long; InputError for
        tools or a schema that cannot be used.
        """
        template = self.template_of(name or self.default)
        if request.tools and not template.reads_tools:
            raise InputError("'tools' is not supported: the chat template does not read tools", "remove 'tools'")
        if request.echoes and request.top is not None and self._reads_source:
            what = "'logprobs' of the prompt are not supported: the model's encoder does not predict them"
            raise InputError(what, "remove 'echo'")
        shape = template.tool_format if request.tools else None
        allowed = None if request.schema is None else template.grammars.allowed(request.schema)
        if request.required:
            if shape is None:
                what = "'tool_choice' must be none or auto: the chat template does not write tool calls as JSON"
                raise InputError(what, "set 'tool_choice' to 'auto'")
            allowed = template.grammars.allowed_call(shape, request.required)
        prompt = self._prompt_ids(request, template)
        return replace(request, prompt=prompt, stop_ids=template.stop_ids, allowed=allowed, tool_format=shape)

    def template_of(self, name: str) -> ChatTemplate:
        """The chat template for conversations with a model. For an adapter from a folder, it is the template in this
        folder, or else the tokenizer's own template, as if only this adapter were loaded.

        Raises: RecipeError if the file of the template cannot be read.
        """
        place, tokenizer = self.adapters.place(name), self.target.tokenizer
        if place is None:
            return self.template
        text = read_template(place / TEMPLATE_NAME) if (place / TEMPLATE_NAME).exists() else None
        if text is None and tokenizer.chat_template is None:
            return self.template
        if text not in self.templates:
            self.templates[text] = make_template(self.target.model.base, tokenizer, text)
        return self.templates[text]

    def _prompt_ids(self, request: Request, template: ChatTemplate) -> Sequence[int]:
        facts, ids, positions = self.target.model.base.text, list(request.prompt), self.positions
        assert facts is not None  # make_speaker checked it
        if ids and not (min(ids) >= 0 and max(ids) < facts.vocabulary_size):
            raise InputError(
                "'prompt' has ids that are not in the vocabulary", f"the vocabulary has {facts.vocabulary_size} tokens"
            )
        if any(token >= facts.vocabulary_size for token, _ in request.sampling.logit_bias):
            what = "'logit_bias' has ids that are not in the vocabulary"
            raise InputError(what, f"the vocabulary has {facts.vocabulary_size} tokens")
        renderer = Renderer(self.target.tokenizer, "assistant", template.text)
        if request.text is not None:
            ids = renderer.plain(request.text, positions, special_tokens_in_text=True)
        elif not ids:
            ids = renderer.turns(request.messages, positions, tuple(request.tools) or None)
        if not ids:
            raise InputError("the prompt is empty", "write at least one character")
        if self._reads_source and not request.prompt:
            ids = as_source(self.target.tokenizer, ids)
        check_vocabulary(self.target.tokenizer, facts.vocabulary_size, max(ids))
        if positions is not None and len(ids) > positions:
            raise too_long(f"{len(ids):,}", positions)
        return ids

    def answer(
        self, requests: Sequence[Request], name: str, on_text: Callable[[int, str], bool] = lambda row, text: True
    ) -> list[Reply]:
        """Answer several conversations at the same time. Each answer is the same as if it were generated alone.
        `on_text(row, text)` is called with new text, and returns whether to continue.

        Raises: InputError for an unknown name; LengthError if a conversation is too long; DataError if the chat
        template refuses it.
        """
        replies: dict[int, Reply] = {}
        self.adapters.load(name)
        prepared = [self.prepare(request, name) for request in requests]
        columns = max(self.continuation(request, name).columns for request in prepared)
        with self.answering(len(requests), columns) as answers:
            for row, request in enumerate(prepared):
                answers.put(
                    request,
                    name,
                    lambda piece, row=row: on_text(row, piece.text),  # type: ignore[misc]
                    partial(replies.__setitem__, row),
                )
            while answers.is_busy:
                answers.step()
        return [replies[row] for row in range(len(requests))]

    @contextmanager
    def answering(self, slots: int, tokens: int) -> Iterator[Answers]:
        """A context manager that yields Answers. Inside the block, up to `slots` requests are answered at the same
        time, each with up to `tokens` tokens in its key-value cache. Only one such block may be open at a time."""
        base, pad_id = self.target.model.base, self.target.tokenizer.pad_id
        with decoding(base.net):
            decoder = Decoder(base, pad_id, slots=slots, tokens=tokens, using=self.adapters.using_rows)

            def forget(name: str) -> None:
                decoder.forget(name)
                self.states.pop(name, None)  # they hold the adapter in memory

            self.adapters.forget = forget
            yield Answers(self, decoder)

    def slot_tokens(self, slots: int, memory_bytes: int) -> tuple[int, int]:
        """How many tokens of key-value cache each of `slots` requests can have within `memory_bytes`; and the total
        memory of these caches.

        Some more memory is reserved: for prompts that are being computed, for cached conversations, and for a copy of a
        cached conversation that is continued. Prompts that are computed together need at least PIECE_TOKENS tokens.
        """
        base, positions = self.target.model.base, self.positions or UNLIMITED_TOKENS
        with decoding(base.net), self.adapters.using(BASE):
            decoder = Decoder(base, self.target.tokenizer.pad_id, slots=1, tokens=1)
            decoder.add(Continuation([self.target.tokenizer.pad_id], 1))
            decoder.step()
        if not decoder.nbytes:
            return positions, 0
        most, others = memory_bytes // decoder.nbytes, slots + EXTRA_SLOTS - 1
        tokens = min(most // (others + 1), positions)
        tokens = tokens if tokens >= PIECE_TOKENS else max(min((most - PIECE_TOKENS) // others, positions), 0)
        return tokens, (others * tokens + max(tokens, PIECE_TOKENS)) * decoder.nbytes

    def continuation(self, request: Request, name: str, limit: int | None = None) -> Continuation:
        """The input of the decoder for a prepared request. The adapter must be loaded. `limit`: the maximum number of
        tokens in the key-value cache.

        Raises: LengthError if the prompt is longer.
        """
        prompt, attached = request.prompt, self.adapters.loaded(name)
        model = replace(self.target.model, adapter=attached)
        virtual, limits = model.virtual_tokens, [request.max_new_tokens or 1]
        used = virtual + len(prompt) * (not self._reads_source)  # an encoder's prompt takes no positions of the answer
        if self.positions is not None:  # a prompt that is only scored may take all positions
            limits.append(self.positions - used + (not request.max_new_tokens))
        if limit is not None:
            limits.append(limit + 1 - used)
        if min(limits) < 1:
            what = f"the conversation has {len(prompt):,} tokens, which leave no room for an answer"
            raise LengthError(what, "shorten the conversation")
        scored = request.echoes and request.top is not None
        changes_inputs = attached is not None and attached.model_adapter is not None
        return Continuation(
            prompt,
            min(limits),
            request.sampling,
            request.stop_ids,
            allowed=request.allowed,
            top=request.top,
            scores_prompt=scored,
            adapter=name,
            alone=not self.adapters.shares_forwards(name),
            adapt=model.adapt_inputs if changes_inputs else None,
            virtual_tokens=virtual,
        )

    def score(self, token: int, score: Score | None = None) -> TokenScore:
        """The score of a token, with the bytes of tokens instead of their ids."""
        tokenizer = self.target.tokenizer
        top = () if score is None else tuple((token_bytes(tokenizer, other), logprob) for other, logprob in score.top)
        in_text = token not in tokenizer.hidden_ids
        return TokenScore(token_bytes(tokenizer, token), None if score is None else score.logprob, top, in_text)

    def decode_for(self, request: Request) -> Callable[..., str]:
        """Returns the function that decodes the answer. The answer to a text prompt is decoded as the continuation of
        the prompt."""
        decode = self.target.tokenizer.decode
        return decode if request.messages or self._reads_source else decoder_after(decode, request.prompt)

    @property
    def cached_tokens(self) -> int:
        """The number of tokens whose keys and values are cached for next turns of conversations."""
        return sum(len(states.ids) for _, states in self.states.values())

    @property
    def _reads_source(self) -> bool:
        return self.target.model.base.family.reads_source


class Answers:
    """The requests that are being answered at the same time. Adding a request does not change the other answers."""

    def __init__(self, speaker: Speaker, decoder: Decoder) -> None:
        self.speaker, self.decoder = speaker, decoder
        self._running: dict[int, _Answer] = {}

    @property
    def is_busy(self) -> bool:
        """Whether an answer has not ended."""
        return self.decoder.is_busy

    @property
    def free_slots(self) -> int:
        """The number of requests that could start now."""
        return self.decoder.free_slots

    def put(
        self, request: Request, name: str, on_piece: OnPiece, on_end: OnEnd, decode: Callable[..., str] | None = None
    ) -> int:
        """Answer a prepared request as soon as possible; returns its handle. If no other request is running when it
        starts, its keys and values are cached for the next turn. `decode`: decodes the answer; None: see
        `Speaker.decode_for`.

        Raises: InputError for an unknown name; AdapterError if the adapter does not fit the base; AdapterConflict if it
        cannot be in memory together with an adapter that is in use; LengthError for a prompt that is too long.
        """
        adapters, states = self.speaker.adapters, self.speaker.states
        adapters.load(name, {answer.name for answer in self._running.values()})
        wanted = self.speaker.continuation(request, name, self.decoder.tokens)
        if not (self.is_busy or wanted.scores_prompt or wanted.virtual_tokens):
            attached, cached = states.pop(name, (None, None))
            cached = cached if attached is adapters.loaded(name) else None
            wanted = replace(wanted, states=cached, keeps_states=True)
        handle = self.decoder.add(wanted)
        writer = AnswerWriter(decode or self.speaker.decode_for(request), request)
        self._running[handle] = _Answer(name, writer, on_piece, on_end)
        return handle

    def step(self) -> None:
        """Generate the next token of each answer."""
        for token in self.decoder.step():
            answer = self._running[token.handle]
            if answer.is_new:
                self._echo(answer, token)
            score = None if token.score is None else self.speaker.score(token.id, token.score)
            is_read = answer.on_piece(answer.writer.add(token.id, score))
            if token.reason or answer.writer.ended or not is_read:
                self._end(token.handle, token.states)

    def cancel(self, handle: int) -> None:
        """Stop an answer, for example because its client has disconnected. `on_end` is not called."""
        if self._running.pop(handle, None):
            self.decoder.cancel(handle)
        self._free_copies()

    def _echo(self, answer: _Answer, token: NewToken) -> None:
        """Start the answer with the prompt, if the request asks for it."""
        answer.is_new, request = False, answer.writer.request
        if request.echoes:
            decode = self.speaker.target.tokenizer.decode
            text = decode(request.prompt, skip_special_tokens=True) if request.text is None else request.text
            scores = [] if request.top is None else [self.speaker.score(request.prompt[0])]
            following = zip(request.prompt[1:], token.prompt_scores, strict=request.top is not None)
            answer.on_piece(answer.writer.echo(text, [*scores, *(self.speaker.score(*each) for each in following)]))

    def _end(self, handle: int, states: States | None) -> None:
        answer, cache = self._running.pop(handle), self.speaker.states
        states = self.decoder.cancel(handle) or states
        if states is not None:
            cache[answer.name] = self.speaker.adapters.loaded(answer.name), states
            while len(cache) > CACHED_CONVERSATIONS or self.speaker.cached_tokens > self.speaker.cache_limit:
                del cache[next(iter(cache))]
        self._free_copies()
        last = answer.writer.finish()
        if last.text or last.scores:
            answer.on_piece(last)
        answer.on_end(answer.writer.reply())

    def _free_copies(self) -> None:
        """If no answer is being generated, free the copies of LoRA factors that were made for forwards with several
        adapters."""
        if not self._running:
            self.speaker.adapters.free_copies()


@dataclass
class _Answer:
    """One answer while it is generated."""

    name: str
    writer: AnswerWriter
    on_piece: OnPiece
    on_end: OnEnd
    is_new: bool = True


def make_speaker(loaded: LoadedTarget, name: str = "adapter", *, needs_template: bool = True) -> Speaker:
    """Make a speaker. If the target has an adapter, it answers by default. Raises: InputError if the target cannot
    chat."""
    model, template = loaded.model, loaded.target.chat_template
    if not model.base.family.answers or not model.base.family.reads_ids:
        does = "does not read" if model.base.family.answers else "does not generate"
        what = f"{model.base.facts.name_or_path} is {model.base.family.text}, which {does} text"
        how = "use `tunekit generate`, which prints labels, scores, transcripts or images"
        headless = "use `tunekit merge`, which writes a folder for sentence-transformers"
        raise InputError(what, headless if model.base.family.headless else how)
    if needs_template and template is None and loaded.tokenizer.chat_template is None:
        how = "use `tunekit generate`, or set data.chat_template in the recipe"
        raise InputError("the tokenizer has no chat template, which a chat needs", how)
    adapter, name = model.adapter, "adapter" if name == BASE else name
    adapters = Adapters(model.base)
    if adapter is not None:
        adapters.put(name, adapter)
    made = make_template(model.base, loaded.tokenizer, template)
    positions = None if model.base.text is None else model.base.text.positions
    return Speaker(loaded, adapters, BASE if adapter is None else name, made, {template: made}, positions)
