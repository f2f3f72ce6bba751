"""What llama.cpp needs of a tokenizer.json where its converter does not know the tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any

from tunekit.errors import ModelError

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# the steps that split a text into words, each with its options -> llama.cpp's name
PRE_TOKENIZERS: dict[tuple[tuple[str | None, Any], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", QWEN2_WORDS), ("ByteLevel", False)): "qwen2",
}
# llama.cpp refuses a byte-level tokenizer without merges. This one never applies: merges begin with single characters.
UNUSED_MERGE = "<|left|> <|right|>"


def named_pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the step that splits texts into words. Raises: ModelError if it has none."""
    if not tokenizer["model"].get("merges"):
        return "gpt-2"  # without merges it does not matter where texts are split
    steps = tuple(_step(part) for part in _parts(tokenizer, "pre_tokenizer"))
    if steps in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[steps]
    what = f"llama.cpp has no name for this tokenizer's pre-tokenizer ({', '.join(str(kind) for kind, _ in steps)})"
    raise ModelError(what, "it would split texts differently; choose another --to")


def _step(part: Mapping[str, Any]) -> tuple[str | None, Any]:
    kind = part.get("type")
    if kind == "ByteLevel" and part.get("add_prefix_space"):
        return kind, "with a space in front"
    options = {
        "ByteLevel": part.get("use_regex", True),
        "Digits": part.get("individual_digits"),
        "Split": (part.get("pattern") or {}).get("Regex") if part.get("behavior") == "Isolated" else None,
    }
    return kind, options.get(str(kind))


def merge_scores(tokenizer: Mapping[str, Any], tokens: Sequence[bytes]) -> list[float]:
    """The score of each token, so that llama.cpp, which merges to the token with the highest score first, merges in the
    order of tokenizer.json."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(tokenizer["model"]["merges"]):
        ranks.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), rank)
    return [-float(ranks.get(token.decode("utf-8", "replace"), len(ranks))) for token in tokens]


def puts_space_first(tokenizer: Mapping[str, Any]) -> bool:
    """Whether texts get a space in front before they are split."""
    return any(part.get("type") == "Prepend" for part in _parts(tokenizer, "normalizer")) or any(
        part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never"
        for part in _parts(tokenizer, "pre_tokenizer")
    )


def check_normalizer(tokenizer: Mapping[str, Any], space: str | None = None) -> None:
    """Raises: ModelError for changes of a text before it is split, which llama.cpp does not make. It replaces spaces by
    `space` in a tokenizer of pieces; most texts are in the form NFC anyway."""
    for part in _parts(tokenizer, "normalizer"):
        kind = part.get("type")
        replaced = (part.get("pattern"), part.get("content")) == ({"String": " "}, space)
        if kind not in (None, "NFC", *(["Prepend"] if space else [])) and not (kind == "Replace" and replaced):
            what = f"this tokenizer changes texts before it splits them ({kind}), which llama.cpp does not"
            raise ModelError(what, "choose another --to")


def _parts(tokenizer: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The steps of a tokenizer's normalizer or pre-tokenizer."""
    step = tokenizer.get(name) or {}
    return list(step.get(f"{name.replace('_', '')}s", [step]))
