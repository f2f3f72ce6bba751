"""Properties of a tokenizer.json that llama.cpp needs, and that its converter cannot find for unknown tokenizers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tunekit.errors import ModelError
from tunekit.model.text.gguf_tokenizer import QWEN2, SPACE

Definition = Mapping[str, Any]  # of a tokenizer, or of one of its steps, as in tokenizer.json
# the steps that split a text into words, each with its options -> llama.cpp's name
PRE_TOKENIZERS: dict[tuple[tuple[str | None, Any], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", QWEN2), ("ByteLevel", False)): "qwen2",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens; no text has unused ones
NEVER_STRIPPED = ("<unk>", "<s>", "<|endoftext|>")


def named_pre_tokenizer(tokenizer: Definition) -> str:
    """llama.cpp's name for the pre-tokenizer, which splits texts into words. Raises: ModelError if llama.cpp has no
    name for it."""
    if not tokenizer["model"].get("merges"):
        return "gpt-2"  # without merges it does not matter where texts are split
    steps = tuple(_step(part) for part in _parts(tokenizer, "pre_tokenizer"))
    if steps in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[steps]
    what = f"llama.cpp has no name for this tokenizer's pre-tokenizer ({', '.join(str(kind) for kind, _ in steps)})"
    raise ModelError(what, "llama.cpp would split texts differently; choose another --to")


def _step(part: Definition) -> tuple[str | None, Any]:
    kind = part.get("type")
    if kind == "ByteLevel" and part.get("add_prefix_space"):
        return kind, "with a space in front"
    options = {
        "ByteLevel": part.get("use_regex", True),
        "Digits": part.get("individual_digits"),
        "Split": (part.get("pattern") or {}).get("Regex") if part.get("behavior") == "Isolated" else None,
    }
    return kind, options.get(str(kind))


def merge_scores(tokenizer: Definition, tokens: Sequence[bytes]) -> list[float]:
    """The score of each token. llama.cpp first makes the merge whose token has the highest score, so these scores give
    the order of merges in tokenizer.json."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(tokenizer["model"]["merges"]):
        ranks.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), rank)
    return [-float(ranks.get(token.decode("utf-8", "replace"), len(ranks))) for token in tokens]


def added_kinds(tokenizer: Definition, kinds: Sequence[int]) -> dict[int, int]:
    """The kinds of the added tokens, by id. A tokenizer searches a text for added tokens before it splits the text. The
    converter marks added tokens that are also in the vocabulary as normal tokens, for which llama.cpp does not search.

    A token with SPACE, the sign for a space, stays normal: texts do not contain it, and llama.cpp would print it.
    """
    return {
        token["id"]: CONTROL if token["special"] else USER_DEFINED
        for token in tokenizer.get("added_tokens", ())
        if kinds[token["id"]] in (NORMAL, USER_DEFINED) and SPACE not in token["content"]
    }


def space_scheme(tokenizer: Definition) -> str:
    """Where texts get a space before they are split. "always": in front of a text and after each added token;
    "first": only in front of a text; "never"."""
    if any(part.get("type") == "Prepend" for part in _parts(tokenizer, "normalizer")):
        return "always"
    steps = [part for part in _parts(tokenizer, "pre_tokenizer") if part.get("type") == "Metaspace"]
    return str(steps[0].get("prepend_scheme", "always")) if steps else "never"


def strips_as_phi3(tokenizer: Definition) -> bool:
    """Whether the tokenizer removes the spaces after all added tokens except NEVER_STRIPPED, as llama.cpp does for a
    model with "phi-3" in its name. The tokens NEVER_STRIPPED must exist."""
    added = {token["content"]: token for token in tokenizer.get("added_tokens", ())}
    names = {*added, *tokenizer["model"]["vocab"]} if isinstance(tokenizer["model"].get("vocab"), Mapping) else {*added}
    strips = all(token["rstrip"] == (name not in NEVER_STRIPPED) for name, token in added.items())
    return strips and {"</s>", *NEVER_STRIPPED} <= names and not any(token["lstrip"] for token in added.values())


def file_name(name: str, *, strips: bool) -> str:
    """The model's name in the file, which contains "phi-3" only if `strips`. llama.cpp then removes spaces after
    tokens."""
    other = re.sub("(?i)phi-?3", "Phi 3", name)
    return f"{other} (phi-3)" if strips else other


def check_normalizer(tokenizer: Definition, space: str | None = None) -> None:
    """Raises: ModelError if the normalizer changes texts in a way that llama.cpp does not. In a sentencepiece
    tokenizer, llama.cpp also replaces spaces by `space`. NFC is allowed, because most texts are in this form anyway."""
    for part in _parts(tokenizer, "normalizer"):
        kind = part.get("type")
        replaced = (part.get("pattern"), part.get("content")) == ({"String": " "}, space)
        if kind not in (None, "NFC", *(["Prepend"] if space else [])) and not (kind == "Replace" and replaced):
            what = f"this tokenizer changes texts before it splits them ({kind}), which llama.cpp does not"
            raise ModelError(what, "choose another --to")


def _parts(tokenizer: Definition, name: str) -> list[Definition]:
    """The steps of a tokenizer's normalizer or pre-tokenizer."""
    step = tokenizer.get(name) or {}
    return list(step.get(f"{name.replace('_', '')}s", [step]))
