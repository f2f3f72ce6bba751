"""Encodes text, special tokens and chat templates, with a tokenizer of transformers."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from functools import cached_property
from itertools import pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.contracts import ImageProcessor, Pairing
from tunekit.errors import DataError, ModelError
from tunekit.model.images.processor import find_images
from tunekit.model.storage.gguf_facts import damage_named
from tunekit.model.storage.inspection import check_gguf, read_answer_start
from tunekit.model.storage.source import ModelSource, find_source
from tunekit.model.text.gguf_tokenizer import TOKENIZER, split_as_llama_cpp, tokenizer_folder, without_unused_merge
from tunekit.model.text.templates import render_template
from tunekit.model.transformers_guard import model_errors, quiet
from tunekit.recipe.model import ModelSection
from tunekit.records import JsonObject

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

PROCESSOR_TEMPLATE = "chat_template.json"  # in which older processors keep the template
FILES = (
    *(TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
    *("chat_template.jinja", PROCESSOR_TEMPLATE),
)
# names of files that contain a vocabulary, of all tokenizers in transformers
VOCABULARY = re.compile(r"tokenizer\.json|tekken\.json|.*vocab.*\.(json|txt)|.*\.(model|tiktoken|tokenizer|codes)")
# special tokens around the reasoning of an answer, such as [THINK], <think>, <|START_THINKING|>; Gemma 4: <|channel>
REASONING_TAG = re.compile(r"[<\[].*think.*[>\]]|<\|channel>|<channel\|>", re.IGNORECASE)


class LoadedTokenizer:
    """A tokenizer that never truncates, never pads, and adds no special tokens by itself.

    `native`: the tokenizer of transformers. `backend`: a private copy of its fast tokenizer.
    """

    def __init__(
        self, native: PreTrainedTokenizerBase, source: ModelSource | None, answer_start_id: int | None = None
    ) -> None:
        self.native = native
        self.source = source
        self.answer_start_id = answer_start_id
        self.images: ImageProcessor | None = find_images(source)
        self.backend = _make_backend(native)
        self.bos_id: int | None = native.bos_token_id
        self.eos_id: int | None = native.eos_token_id
        self.adds_bos: bool = self.bos_id is not None and native("a")["input_ids"][:1] == [self.bos_id]
        ids = self.backend.get_vocab(with_added_tokens=True).values()
        self.vocabulary_size: int = max(ids, default=-1) + 1
        # Padding is masked by length, so any existing id works.
        candidates = (native.pad_token_id, self.eos_id, 0)
        self.pad_id: int = next(int(i) for i in candidates if i is not None and i < self.vocabulary_size)
        self.chat_template: str | None = _one_template(native.chat_template)
        added = native.added_tokens_decoder.items()
        self.special_ids = frozenset(
            token_id for token_id, token in added if token.special or _is_marker(token.content)
        )
        tags = {token_id for token_id, token in added if REASONING_TAG.fullmatch(token.content)}
        self.hidden_ids = self.special_ids - tags
        # Text without special tokens can contain the unknown token: unknown characters become that token.
        self.unknown_id: int | None = native.unk_token_id
        if self.unknown_id in (self.bos_id, self.eos_id):
            self.unknown_id = None
        self._forbidden_in_text = self.special_ids - {native.unk_token_id}
        self.fingerprint = self._fingerprint()

    @property
    def tokenizer(self) -> LoadedTokenizer:
        """This object itself, because the processor of a text model is its tokenizer."""
        return self

    def encode(self, text: str, *, special_tokens_in_text: bool = True) -> list[int]:
        """Token ids of `text`, without added special tokens. `special_tokens_in_text` False: names of special tokens in
        the text are encoded as plain text."""
        return self.encode_with_offsets(text, special_tokens_in_text=special_tokens_in_text)[0]

    def encode_with_offsets(
        self, text: str, *, special_tokens_in_text: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of `text`, and for each token its character offsets [start, end) in the text."""
        self.backend.encode_special_tokens = not special_tokens_in_text
        try:
            encoding = self.backend.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeError) as error:
            what = "the text contains a character that is not valid Unicode (a lone surrogate)"
            raise DataError(what, "remove it from the row") from error
        ids: list[int] = encoding.ids
        if not special_tokens_in_text and not self._forbidden_in_text.isdisjoint(ids):
            token = self.token_text(next(token_id for token_id in ids if token_id in self._forbidden_in_text))
            what = f"the text contains the special token {token!r}, which this tokenizer cannot encode as plain text"
            raise DataError(what, "remove the token from the row")
        return ids, encoding.offsets

    def encode_source(self, text: str) -> list[int]:
        """Token ids of a complete text for an encoder, with the special tokens that the tokenizer puts around the
        text."""
        return self._encode_whole(text, "text")

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of a complete answer for a decoder, with special tokens around the answer. These special tokens can
        differ from the tokens around a source, for example to mark a language."""
        return self._encode_whole(text, "text_target")

    @cached_property
    def pairing(self) -> Pairing:
        """The special tokens and token types with which transformers joins two texts to a pair.

        Raises: ModelError for a tokenizer that joins the texts in an unusual order.
        """
        joined = self.native("a", "a", truncation=False, padding=False, verbose=False)
        ids, types, owners = joined["input_ids"], joined.get("token_type_ids"), joined.sequence_ids(0)
        bounds = [0, *(at for text in (0, 1) for at in _range_of(owners, text)), len(ids)]
        if bounds != sorted(bounds):
            what = f"{type(self.native).__name__} joins two texts in an unknown order"
            raise ModelError(what, "write both texts into one column", key="model.name_or_path")
        before, _, between, _, after = (tuple(ids[start:stop]) for start, stop in pairwise(bounds))
        marks = [tuple(types[start:stop]) for start, stop in pairwise(bounds)] if types is not None else []
        return Pairing(before, between, after, tuple(each[:1] if at % 2 else each for at, each in enumerate(marks)))

    def _encode_whole(self, text: str, name: str) -> list[int]:
        """Encode a text, and put the special tokens around it that transformers puts there. Names of special tokens
        inside the text are encoded as plain text. `name`: transformers' argument for the text."""
        ids = self.encode(text, special_tokens_in_text=False)
        plain = {"truncation": False, "padding": False, "verbose": False, "return_special_tokens_mask": True}
        encoding = self.native(**{name: text}, **plain)
        added = encoding["special_tokens_mask"]
        before = list(takewhile(bool, added))
        after = list(takewhile(bool, reversed(added[len(before) :])))
        return [*encoding["input_ids"][: len(before)], *ids, *encoding["input_ids"][len(added) - len(after) :]]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`. `skip_special_tokens`: without special tokens, but with the tags around reasoning, which are
        plain tokens in many tokenizers. Without them, nobody could tell the reasoning from the answer."""
        hidden = self.hidden_ids if skip_special_tokens else ()
        return self.backend.decode([int(i) for i in ids if int(i) not in hidden], skip_special_tokens=False)

    def render(
        self,
        messages: Sequence[JsonObject],
        *,
        tools: Sequence[JsonObject] | None = None,
        add_generation_prompt: bool = False,
        template: str | None = None,
    ) -> str:
        """Apply the chat template (or `template`) to messages. Returns the text.

        Raises: DataError if there is no template, or if the template refuses the messages, takes too long or writes
        too much.
        """
        chosen = template if template is not None else self.chat_template
        if chosen is None:
            raise DataError("the tokenizer has no chat template", "write one in data.chat_template")
        return render_template(self.native, chosen, messages, tools, add_generation_prompt)

    def token_text(self, token_id: int) -> str:
        """One token as readable text. A token that is only a part of a character is written in the tokenizer's
        notation."""
        spelled: str | None = self.backend.id_to_token(int(token_id))
        if spelled is None:
            return f"<unused {token_id}>"
        decoded = self.decode([token_id])
        if not decoded or "\ufffd" in decoded:
            return spelled
        return " " + decoded if spelled.startswith("\u2581") and not decoded.startswith(" ") else decoded

    def with_images(self, images: ImageProcessor) -> LoadedTokenizer:
        """A copy with this image processor."""
        changed = copy(self)
        changed.images = images
        return changed

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder. Files of the base are copied unchanged, unless the base is a GGUF
        file. A limit of the image processor is written into the files that the folder has."""
        if self.images is not None:
            self.images.save(folder)
        if self.source is not None and self.source.gguf_file is None:
            for name in FILES:
                if (self.source.folder / name).is_file():
                    shutil.copyfile(self.source.folder / name, folder / name)
            return
        with quiet():
            self.native.save_pretrained(str(folder))

    def _fingerprint(self) -> str:
        """sha256 of the tokenizer's definition, its special ids and its template."""
        special = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, "control": sorted(self.special_ids)}
        special |= {"adds_bos": self.adds_bos, "around": self.encode_source("a"), "answer": self.encode_answer("a")}
        if self.answer_start_id is not None:
            special["answer_start"] = self.answer_start_id
        parts = [self.backend.to_str(), json.dumps(special, sort_keys=True), self.chat_template or ""]
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def load_tokenizer(section: ModelSection) -> LoadedTokenizer:
    """Load the base's fast tokenizer.

    Raises: ModelError if the base has no tokenizer, or only a slow one, or if the tokenizer is damaged or would run
    remote code.
    """
    from transformers import AutoTokenizer

    source = find_source(section, weights=False)
    arguments: dict[str, Any] = {}
    if source.gguf_file is not None:
        check_gguf(source)
        arguments["gguf_file"] = source.gguf_file
    elif not section.trust_remote_code and not any(VOCABULARY.fullmatch(file.name) for file in source.folder.iterdir()):
        what = f"{source.folder} contains no tokenizer (such as {TOKENIZER})"
        how = "copy the tokenizer's files from the model's page into this folder, or name another base"
        raise ModelError(what, how, key="model.name_or_path")  # transformers would invent one of a few tokens
    reads = tokenizer_folder(source, FILES)
    with damage_named(source), model_errors(section, "the tokenizer of "), quiet(), reads as folder:
        with without_unused_merge() if source.gguf_file is not None else nullcontext():
            native = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=section.trust_remote_code, local_files_only=True, **arguments
            )
        if native.chat_template is None and (folder / PROCESSOR_TEMPLATE).is_file():
            native.chat_template = json.loads((folder / PROCESSOR_TEMPLATE).read_text("utf-8"))["chat_template"]
        if source.gguf_file is not None and not (folder / TOKENIZER).exists():
            split_as_llama_cpp(native, source)
    if getattr(native, "backend_tokenizer", None) is None:
        how = "convert it once with transformers, and save tokenizer.json in the model's folder"
        raise ModelError(f"{section.name_or_path} has only a slow (Python) tokenizer", how, key="model.name_or_path")
    return LoadedTokenizer(native, source, read_answer_start(source, section))


def _make_backend(native: PreTrainedTokenizerBase) -> Tokenizer:
    """Copy the fast tokenizer without truncation, padding and post-processing. Turn markers such as <|user|> are marked
    special.

    The post-processor adds special tokens and trims offsets. Without it, the offsets cover the whole text.
    """
    from tokenizers import Tokenizer

    definition = json.loads(native.backend_tokenizer.to_str())
    definition["truncation"] = definition["padding"] = definition["post_processor"] = None
    for token in definition.get("added_tokens") or []:
        token["special"] = token["special"] or _is_marker(token["content"])
    return Tokenizer.from_str(json.dumps(definition))


def _range_of(owners: Sequence[int | None], text: int) -> tuple[int, int]:
    """The range [first, end) of the tokens that belong to text number `text`; an empty range if it has no tokens.
    `owners`: for each token, the number of the text to which it belongs."""
    places = [at for at, owner in enumerate(owners) if owner == text]
    return (places[0], places[-1] + 1) if places else (len(owners), 0)


def _is_marker(content: str) -> bool:
    """Whether a token looks like a turn marker, <|name|>. Some tokenizers do not declare turn markers as special."""
    return content.startswith("<|") and content.endswith("|>")


def _one_template(template: str | dict[str, str] | None) -> str | None:
    """The template, or if there are several, the template with the name `default`."""
    if isinstance(template, dict):
        chosen = template.get("default")
        return chosen if isinstance(chosen, str) else None
    return template if isinstance(template, str) and template else None
