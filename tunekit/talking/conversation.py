"""Answers conversations token by token, with a base and any number of its adapters.

The keys and values of a conversation are cached for its next turn.
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
    # by name: ids, and their keys and values
    _caches: dict[str, tuple[Sequence[int], Any]] = field(default_factory=dict)

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

    @torch.no_grad()
    def answer(
        self,
        requests: Sequence[Request],
        name: str,
        on_text: OnText = lambda row, text: True,
        on_end: OnEnd = lambda row, reply: None,
    ) -> list[Reply]:
        """Answer conversations with equal sampling settings as one batch.

        Raises: InputError for an unknown name; DataError if a conversation is too long or the template refuses it.
        """
        if name not in self.names:
            raise InputError(f"there is no adapter '{name}'", f"there are: {', '.join(self.names)}")
        prompts = [request.prompt or self.prompt_ids(request.messages) for request in requests]
        writers = [_Writer(self.target.tokenizer.decode, request, self.stop_ids) for request in requests]
        rooms = [self._room(prompt) for prompt in prompts]
        room = min(rooms)
        if any(limit != room < request.max_new_tokens for limit, request in zip(rooms, requests, strict=True)):

            def alone(row: int) -> Reply:
                text, end = (lambda _, text: on_text(row, text)), (lambda _, reply: on_end(row, reply))
                return self.answer([requests[row]], name, text, end)[0]

            return [alone(row) for row in range(len(requests))]
        replies: dict[int, Reply] = {}

        def end(row: int) -> None:
            writer = writers[row]
            if remainder := writer.finish():
                on_text(row, remainder)
            replies[row] = Reply(writer.written, len(prompts[row]), len(writer.ids), writer.reason)
            on_end(row, replies[row])

        def ends(rows: Sequence[int], tokens: list[int]) -> list[bool]:
            for row, token in zip(rows, tokens, strict=True):
                if row not in replies:
                    more = writers[row].add(token)
                    if not on_text(row, more) or writers[row].ended:
                        end(row)
            return [row in replies for row in rows]

        with self._model_of(name) as model:
            cached, cache = self._caches.pop(name, ((), None)), None  # unusable if this call is interrupted
            if len(prompts) == 1 and not model.virtual_tokens:
                cache = prompt_cache(model.base, *cached, prompts[0])
            produced = generate_texts(
                model.base,
                self.target.tokenizer,
                prompts,
                max_new_tokens=int(min(room, max(request.max_new_tokens for request in requests))),
                batch_size=len(prompts),
                sampling=requests[0].sampling,
                stop_ids=sorted(self.stop_ids),
                adapt=model.adapt_inputs,
                virtual_tokens=model.virtual_tokens,
                ends=ends,
                cache=cache,
            )
        if cache is not None:
            self._caches[name] = ([*prompts[0], *produced[0]][: cache.get_seq_length()], cache)
        for row in range(len(requests)):
            if row not in replies:
                end(row)
        return [replies[row] for row in range(len(requests))]

    def _room(self, prompt: Sequence[int]) -> float:
        """The maximum number of tokens of an answer; an encoder's prompt takes no positions of the answer."""
        return (self._facts.positions or inf) - (0 if self.target.model.base.family.reads_source else len(prompt))

    @property
    def _facts(self) -> TextFacts:
        facts = self.target.model.base.text
        assert facts is not None  # make_speaker checked it
        return facts

    @contextmanager
    def _model_of(self, name: str) -> Iterator[TunedModel]:
        """A block in which the model answers with this adapter, in eval mode."""
        model = replace(self.target.model, adapter=self.adapters.adapters.get(name))
        adapter = nullcontext() if name == BASE else self.adapters.using(name)
        with model.training_mode(False), calling(Call(bypassed=name == BASE)), adapter:
            yield model


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
