"""Answers to conversations, token by token, by a base with none, one or several adapters.

The keys and values of a conversation's beginning are kept for its next turn.
"""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch

from tunekit.adapters.folder.read import attach_adapter_folder
from tunekit.adapters.several import AdapterSet
from tunekit.contracts import GREEDY, Sampling
from tunekit.data.rendering.render import Renderer, too_long
from tunekit.errors import InputError
from tunekit.formats.example import Message
from tunekit.model.call import Call, calling
from tunekit.model.text.generation import find_stop_ids, generate_texts, prompt_cache
from tunekit.model.text.vocabulary import check_vocabulary
from tunekit.records import TextFacts
from tunekit.targets.target import LoadedTarget
from tunekit.tuned.model import TunedModel

BASE = "base"  # the name under which the base answers, without an adapter
UNFINISHED = "�"  # a character of which not all bytes are there yet


@dataclass(frozen=True)
class Request:
    """One conversation to answer. `stop`: texts that end the answer and are not part of it.

    `prompt`: its ids, where they were made before, by `Speaker.prompt_ids`.
    """

    messages: Sequence[Message]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop: Sequence[str] = ()
    prompt: Sequence[int] = ()


@dataclass(frozen=True)
class Reply:
    """An answer, and why it ended: "stop" by itself or a stop text, "length" at its most tokens."""

    text: str
    prompt_tokens: int
    new_tokens: int
    reason: str


OnText = Callable[[int, str], bool]  # (which request, what its answer has more of, "" too) -> whether to go on with it
OnEnd = Callable[[int, Reply], None]  # (which request, its whole answer), as soon as it is whole


@dataclass
class Speaker:
    """Answers by one base with any of its adapters; one call at a time."""

    target: LoadedTarget
    adapters: AdapterSet
    default: str  # BASE, or the name of the target's own adapter
    template: str | None
    stop_ids: frozenset[int]  # the tokens that end an answer
    # per name: ids, and their keys and values
    _kept: dict[str, tuple[Sequence[int], Any]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Whom answers can be asked of."""
        return [BASE, *self.adapters.adapters]

    def add(self, name: str, folder: Path) -> None:
        """One more adapter of the same base. Raises: AdapterError where it is not one."""
        if name == BASE:
            raise InputError(f"'{BASE}' is the base itself", "give the adapter another name")
        base = self.target.model.base
        attach = partial(attach_adapter_folder, base.net, folder, head_name=base.family.head_name(base.net))
        self.adapters.add(name, partial(attach, base_fingerprint=base.fingerprint, device=base.device))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to its next answer.

        One thread at a time may ask, also while another one answers.
        Raises: DataError where the template refuses it, or where it leaves the model no position for an answer.
        """
        facts = self._facts
        ids = Renderer(self.target.tokenizer, "assistant", self.template).turns(messages, facts.positions)
        check_vocabulary(self.target.tokenizer, facts.vocabulary_size, max(ids))
        if facts.positions is not None and len(ids) >= facts.positions:
            raise too_long(f"{len(ids):,}", facts.positions)
        return ids

    @torch.no_grad()
    def answer(
        self,
        requests: Sequence[Request],
        name: str,
        on_text: OnText = lambda row, text: True,
        on_end: OnEnd = lambda row, reply: None,
    ) -> list[Reply]:
        """Answers to conversations of equal sampling, made side by side.

        Raises: InputError for an unknown name; DataError where a conversation is too long or the template refuses it.
        """
        if name not in self.names:
            raise InputError(f"there is no adapter '{name}'", f"there are: {', '.join(self.names)}")
        prompts = [request.prompt or self.prompt_ids(request.messages) for request in requests]
        writers = [_Writer(self.target.tokenizer.decode, request, self.stop_ids) for request in requests]
        rooms = [self._room(prompt) for prompt in prompts]
        room = min(rooms)
        if any(own != room < request.max_new_tokens for own, request in zip(rooms, requests, strict=True)):

            def alone(row: int) -> Reply:
                text, end = (lambda _, text: on_text(row, text)), (lambda _, reply: on_end(row, reply))
                return self.answer([requests[row]], name, text, end)[0]

            return [alone(row) for row in range(len(requests))]
        replies: dict[int, Reply] = {}

        def end(row: int) -> None:
            writer = writers[row]
            if rest := writer.finish():
                on_text(row, rest)
            replies[row] = Reply(writer.written, len(prompts[row]), len(writer.ids), writer.reason)
            on_end(row, replies[row])

        def told(rows: Sequence[int], tokens: list[int]) -> list[bool]:
            for row, token in zip(rows, tokens, strict=True):
                if row not in replies:
                    more = writers[row].add(token)
                    if not on_text(row, more) or writers[row].ended:
                        end(row)
            return [row in replies for row in rows]

        with self._through(name) as model:
            kept, cache = self._kept.pop(name, ((), None)), None  # of no use where this is interrupted
            if len(prompts) == 1 and not model.virtual_tokens:
                cache = prompt_cache(model.base, *kept, prompts[0])
            produced = generate_texts(
                model.base,
                self.target.tokenizer,
                prompts,
                max_new_tokens=int(min(room, max(request.max_new_tokens for request in requests))),
                batch_size=len(prompts),
                sampling=requests[0].sampling,
                stop_ids=sorted(self.stop_ids),
                adapt=model.adapted,
                virtual_tokens=model.virtual_tokens,
                told=told,
                cache=cache,
            )
        if cache is not None:
            self._kept[name] = ([*prompts[0], *produced[0]][: cache.get_seq_length()], cache)
        for row in range(len(requests)):
            if row not in replies:
                end(row)
        return [replies[row] for row in range(len(requests))]

    def _room(self, prompt: Sequence[int]) -> float:
        """The most tokens that an answer to it can have; an encoder's prompt takes none of its answer's positions."""
        return (self._facts.positions or inf) - (0 if self.target.model.base.family.reads_source else len(prompt))

    @property
    def _facts(self) -> TextFacts:
        facts = self.target.model.base.text
        assert facts is not None  # make_speaker saw to it
        return facts

    @contextmanager
    def _through(self, name: str) -> Iterator[TunedModel]:
        """The model as it answers under this name, in eval mode."""
        model = replace(self.target.model, adapter=self.adapters.adapters.get(name))
        adapter = nullcontext() if name == BASE else self.adapters.using(name)
        with model.training_mode(False), calling(Call(bypassed=name == BASE)), adapter:
            yield model


class _Writer:
    """One answer as it grows: whole characters only, nothing of a stop text."""

    def __init__(self, decode: Callable[..., str], request: Request, stop_ids: Collection[int]) -> None:
        self.decode, self.request, self.stop_ids = decode, request, stop_ids
        self.ids: list[int] = []
        self.written, self.ended, self.reason = "", False, "length"

    def add(self, token: int) -> str:
        """What can be shown after this token that could not be before."""
        if token in self.stop_ids:
            self.ended, self.reason = True, "stop"
            return ""
        self.ids.append(token)
        self.ended = len(self.ids) >= self.request.max_new_tokens
        text = self._text()
        if found := [text.index(stop) for stop in self.request.stop if stop in text]:
            self.ended, self.reason = True, "stop"
            return self._show(text[: min(found)])
        held = max((_begins(text, stop) for stop in self.request.stop), default=0)
        return "" if text.endswith(UNFINISHED) else self._show(text[: len(text) - held])

    def finish(self) -> str:
        """What had been held back and is no stop text."""
        cut = self.reason == "stop" and any(stop in self._text() for stop in self.request.stop)
        return "" if cut else self._show(self._text())

    def _text(self) -> str:
        return str(self.decode(self.ids, skip_special_tokens=True))

    def _show(self, text: str) -> str:
        more = text[len(self.written) :]
        self.written += more
        return more


def _begins(text: str, stop: str) -> int:
    """How many last characters of the text begin the stop text."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def make_speaker(loaded: LoadedTarget, name: str = "adapter") -> Speaker:
    """The target's own adapter, where it has one, as one of several. Raises: InputError where it cannot chat."""
    model, template = loaded.model, loaded.target.chat_template
    if not model.base.family.answers or not model.base.family.reads_ids:
        does = "reads" if model.base.family.answers else "gives"
        raise InputError(f"{model.base.facts.name_or_path} is {model.base.family.text}, which {does} no text")
    if template is None and loaded.tokenizer.chat_template is None:
        how = "ask it with `tunekit generate`, or name a template: data.chat_template of its recipe"
        raise InputError("the tokenizer has no chat template, so there are no turns to chat in", how)
    own, name = model.adapter, "adapter" if name == BASE else name
    adapters = AdapterSet(model.base.net)
    if own is not None:
        adapters.add(name, lambda: own)
    stop_ids = frozenset(find_stop_ids(model.base, loaded.tokenizer, template))
    return Speaker(loaded, adapters, BASE if own is None else name, template, stop_ids)


def name_of(target: str) -> str:
    """Under which its adapter is served: its folder's name; that of the run, of a run's adapter."""
    path = Path(os.path.abspath(target))
    return path.parent.name if path.name == "adapter" else path.name


def add_folders(speaker: Speaker, folders: Sequence[str]) -> None:
    """Each adapter folder under its own name; of a run its adapter; of another folder each adapter in it.

    Raises: InputError where there is none; AdapterError where one does not fit the base.
    """
    for given in folders:
        path = Path(given).expanduser().absolute()
        found = [(name_of(given), path), (path.name, path / "adapter")]
        if path.is_dir():
            inside = sorted(entry for entry in path.iterdir() if entry.is_dir())
            found += [(entry.name, place) for entry in inside for place in (entry, entry / "adapter")]
        adapters = [(name, place) for name, place in found if (place / "adapter_config.json").exists()]
        if not adapters:
            what = f"{given} holds no adapter (adapter_config.json)"
            raise InputError(what, "name an adapter, a run, or their folder")
        for name, place in adapters if adapters[0][1] not in (path, path / "adapter") else adapters[:1]:
            speaker.add(name, place)
