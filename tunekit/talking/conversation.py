"""Answers conversations token by token, with a base and any number of its adapters.

The keys and values of a conversation are cached for its next turn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from pathlib import Path

from tunekit.adapters.folder.read import attach_adapter_folder
from tunekit.adapters.several import AdapterSet
from tunekit.contracts import GREEDY, Sampling
from tunekit.data.rendering.render import Renderer, too_long
from tunekit.errors import InputError
from tunekit.formats.example import Message
from tunekit.model.call import calling, current_call
from tunekit.model.text.continuation import Continuation, States
from tunekit.model.text.decoder import Decoder, decoding
from tunekit.model.text.generation import find_stop_ids
from tunekit.model.text.vocabulary import check_vocabulary
from tunekit.records import TextFacts
from tunekit.targets.target import LoadedTarget

BASE = "base"  # the name of the base without an adapter
UNFINISHED = "�"  # the character that stands for an incomplete multi-byte character


@dataclass(frozen=True)
class Request:
    """One conversation to answer. `stop`: texts that end the answer and are not part of it.

    `prompt`: the ids of the conversation, if `Speaker.prompt_ids` was already called.
    """

    messages: Sequence[Message]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop: Sequence[str] = ()
    prompt: Sequence[int] = ()


@dataclass(frozen=True)
class Reply:
    """An answer, and why it ended: "stop" (an end token or a stop text) or "length" (the maximum of tokens)."""

    text: str
    prompt_tokens: int
    new_tokens: int
    reason: str


OnText = Callable[[int, str], bool]  # (index of the request, new text of its answer, may be "") -> whether to continue
OnEnd = Callable[[int, Reply], None]  # (index of the request, its complete answer)


@dataclass
class Speaker:
    """Answers with one base and any of its adapters; one call at a time."""

    target: LoadedTarget
    adapters: AdapterSet
    default: str  # the name that answers by default: BASE, or the target's own adapter
    template: str | None
    stop_ids: frozenset[int]  # the tokens that end an answer
    states: dict[str, States] = field(default_factory=dict)  # of each name's last conversation

    @property
    def names(self) -> list[str]:
        """The base's name and those of the adapters."""
        return [BASE, *self.adapters.adapters]

    def add(self, name: str, folder: Path) -> None:
        """Add an adapter. Raises: AdapterError if the folder has no adapter of this base."""
        if name == BASE:
            raise InputError(f"'{BASE}' is the name of the base itself", "give the adapter another name")
        base = self.target.model.base
        attach = partial(attach_adapter_folder, base.net, folder, head_name=base.family.head_name(base.net))
        self.adapters.add(name, partial(attach, base_fingerprint=base.fingerprint, device=base.device))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to its next answer.

        One thread at a time may call this, also while another one answers.
        Raises: DataError if the template refuses the conversation, or no position is left for an answer.
        """
        facts = self._facts
        ids = Renderer(self.target.tokenizer, "assistant", self.template).turns(messages, facts.positions)
        check_vocabulary(self.target.tokenizer, facts.vocabulary_size, max(ids))
        if facts.positions is not None and len(ids) >= facts.positions:
            raise too_long(f"{len(ids):,}", facts.positions)
        return ids

    def answer(
        self,
        requests: Sequence[Request],
        name: str,
        on_text: OnText = lambda row, text: True,
        on_end: OnEnd = lambda row, reply: None,
    ) -> list[Reply]:
        """Answer conversations side by side, each as if it were alone.

        Raises: InputError for an unknown name; DataError if a conversation is too long or the template refuses it.
        """
        replies: dict[int, Reply] = {}

        def end(row: int, reply: Reply) -> None:
            replies[row] = reply
            on_end(row, reply)

        requests = [replace(each, prompt=each.prompt or self.prompt_ids(each.messages)) for each in requests]
        tokens = max(self.columns(request, name) for request in requests)
        with self.answering(len(requests), tokens) as answers:
            for row, request in enumerate(requests):
                answers.put(request, name, partial(on_text, row), partial(end, row), keeps_states=len(requests) == 1)
            while answers.is_busy:
                answers.step()
        return [replies[row] for row in range(len(requests))]

    @contextmanager
    def answering(self, slots: int, tokens: int) -> Iterator[Answers]:
        """A block in which up to `slots` requests are answered at once, each with up to `tokens` keys and values. One
        block at a time."""
        base = self.target.model.base
        with decoding(base.net):
            yield Answers(
                self, Decoder(base, self.target.tokenizer.pad_id, slots=slots, tokens=tokens, using=self._using)
            )

    def columns(self, request: Request, name: str) -> int:
        """The keys and values that the answer to a request with a prompt needs at most."""
        return self.continuation(request, name).columns

    def continuation(self, request: Request, name: str) -> Continuation:
        """What the decoder continues for a request with a prompt. Raises: InputError for an unknown name."""
        if name not in self.names:
            raise InputError(f"there is no adapter '{name}'", f"there are: {', '.join(self.names)}")
        model, room = replace(self.target.model, adapter=self.adapters.adapters.get(name)), self._room(request.prompt)
        changes_inputs = model.adapter is not None and model.adapter.model_adapter is not None
        return Continuation(
            request.prompt,
            int(min(room, request.max_new_tokens)),
            request.sampling,
            self.stop_ids,
            adapter=name,
            adapt=model.adapt_inputs if changes_inputs else None,
            virtual_tokens=model.virtual_tokens,
        )

    def _room(self, prompt: Sequence[int]) -> float:
        """The maximum number of tokens of an answer; an encoder's prompt takes no positions of the answer."""
        return (self._facts.positions or inf) - (0 if self.target.model.base.family.reads_source else len(prompt))

    @property
    def _facts(self) -> TextFacts:
        facts = self.target.model.base.text
        assert facts is not None  # make_speaker checked it
        return facts

    @contextmanager
    def _using(self, name: str | None) -> Iterator[None]:
        """A block in which this adapter answers."""
        bypassed = name is None or name == BASE
        with calling(replace(current_call(), bypassed=True)) if bypassed else self.adapters.using(str(name)):
            yield


class Answers:
    """The requests that are being answered. A request that joins changes no other answer."""

    def __init__(self, speaker: Speaker, decoder: Decoder) -> None:
        self.speaker, self.decoder = speaker, decoder
        self._running: dict[int, _Answer] = {}

    @property
    def is_busy(self) -> bool:
        """Whether an answer has not ended."""
        return self.decoder.is_busy

    def put(
        self,
        request: Request,
        name: str,
        on_text: Callable[[str], bool],
        on_end: Callable[[Reply], None],
        *,
        keeps_states: bool = False,
    ) -> int:
        """Answer a request that has a prompt, as soon as a slot is free; returns its handle.

        `keeps_states`: keep the keys and values of this conversation for its next turn.
        Raises: InputError for an unknown name.
        """
        speaker = self.speaker
        wanted = speaker.continuation(request, name)
        if keeps_states:
            wanted = replace(wanted, states=speaker.states.pop(name, None), keeps_states=not wanted.virtual_tokens)
        handle = self.decoder.add(wanted)
        writer = _Writer(speaker.target.tokenizer.decode, request, speaker.stop_ids)
        self._running[handle] = _Answer(name, writer, on_text, on_end)
        return handle

    def step(self) -> None:
        """Write the next token of each answer."""
        for token in self.decoder.step():
            answer = self._running[token.handle]
            is_read = answer.on_text(answer.writer.add(token.id))
            if token.reason or answer.writer.ended or not is_read:
                self._end(token.handle, token.states)

    def cancel(self, handle: int) -> None:
        """End an answer whose reader has left; `on_end` is not called."""
        self._running.pop(handle, None)
        self.decoder.cancel(handle)

    def _end(self, handle: int, states: States | None) -> None:
        answer = self._running.pop(handle)
        states = self.decoder.cancel(handle) or states
        if states is not None:
            self.speaker.states[answer.name] = states
        writer = answer.writer
        if remainder := writer.finish():
            answer.on_text(remainder)
        answer.on_end(Reply(writer.written, len(writer.request.prompt), len(writer.ids), writer.reason))


@dataclass
class _Answer:
    """One answer while it is generated."""

    name: str
    writer: _Writer
    on_text: Callable[[str], bool]
    on_end: Callable[[Reply], None]


class _Writer:
    """The text of an answer while it is generated: only complete characters, and no part of a stop text."""

    def __init__(self, decode: Callable[..., str], request: Request, stop_ids: Collection[int]) -> None:
        self.decode, self.request, self.stop_ids = decode, request, stop_ids
        self.ids: list[int] = []
        self.written, self.ended, self.reason = "", False, "length"

    def add(self, token: int) -> str:
        """The text that this token completes."""
        if token in self.stop_ids:
            self.ended, self.reason = True, "stop"
            return ""
        self.ids.append(token)
        self.ended = len(self.ids) >= self.request.max_new_tokens
        text = self._text()
        if matches := [text.index(stop) for stop in self.request.stop if stop in text]:
            self.ended, self.reason = True, "stop"
            return self._show(text[: min(matches)])
        held = max((_overlap(text, stop) for stop in self.request.stop), default=0)
        return "" if text.endswith(UNFINISHED) else self._show(text[: len(text) - held])

    def finish(self) -> str:
        """The text that was held back, unless it is a stop text."""
        cut = self.reason == "stop" and any(stop in self._text() for stop in self.request.stop)
        return "" if cut else self._show(self._text())

    def _text(self) -> str:
        return str(self.decode(self.ids, skip_special_tokens=True))

    def _show(self, text: str) -> str:
        more = text[len(self.written) :]
        self.written += more
        return more


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of the text that are the beginning of the stop text."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def make_speaker(loaded: LoadedTarget, name: str = "adapter") -> Speaker:
    """A speaker with the target's own adapter, if it has one. Raises: InputError if the target cannot chat."""
    model, template = loaded.model, loaded.target.chat_template
    if not model.base.family.answers or not model.base.family.reads_ids:
        does = "does not read" if model.base.family.answers else "does not generate"
        what = f"{model.base.facts.name_or_path} is {model.base.family.text}, which {does} text"
        raise InputError(what, "use `tunekit generate`, which prints labels, scores, transcripts or images")
    if template is None and loaded.tokenizer.chat_template is None:
        how = "use `tunekit generate`, or set data.chat_template in its recipe"
        raise InputError("the tokenizer has no chat template, so there are no turns to chat in", how)
    adapter, name = model.adapter, "adapter" if name == BASE else name
    adapters = AdapterSet(model.base.net)
    if adapter is not None:
        adapters.add(name, lambda: adapter)
    stop_ids = frozenset(find_stop_ids(model.base, loaded.tokenizer, template))
    return Speaker(loaded, adapters, BASE if adapter is None else name, template, stop_ids)


def name_of(target: str) -> str:
    """The name under which its adapter is served: the folder's name; for a run's adapter, the run's name."""
    path = Path(os.path.abspath(target))
    return path.parent.name if path.name == "adapter" else path.name


def add_folders(speaker: Speaker, folders: Sequence[str]) -> None:
    """Add each adapter folder under its own name; for a run its adapter; for another folder all adapters in it.

    Raises: InputError if there is none; AdapterError if one does not fit the base.
    """
    for folder_name in folders:
        path = Path(folder_name).expanduser().absolute()
        candidates = [(name_of(folder_name), path), (path.name, path / "adapter")]
        if path.is_dir():
            entries = sorted(entry for entry in path.iterdir() if entry.is_dir())
            candidates += [(entry.name, place) for entry in entries for place in (entry, entry / "adapter")]
        adapters = [(name, place) for name, place in candidates if (place / "adapter_config.json").exists()]
        if not adapters:
            what = f"{folder_name} contains no adapter (adapter_config.json)"
            raise InputError(what, "name an adapter folder, a run folder, or a folder of adapters")
        for name, place in adapters if adapters[0][1] not in (path, path / "adapter") else adapters[:1]:
            speaker.add(name, place)
