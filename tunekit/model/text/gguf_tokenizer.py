"""Loads the tokenizer of a GGUF file so that it splits texts in the same way as llama.cpp. transformers reads the
file's tokens and merges, but not all rules that split a text before the merges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.errors import ModelError
from tunekit.files.work_folder import temporary_folder
from tunekit.model.storage.gguf_facts import FOLDER, KEY
from tunekit.model.storage.source import ModelSource
from tunekit.model.transformers_guard import replaced

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

TOKENIZER = "tokenizer.json"
SPACE = "\u2581"  # which stands for a space in the tokens of a tokenizer of pieces
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
DIGIT, DIGITS = r"\p{N}", "[0-9][0-9][0-9]"
SIGNS = r"[\p{P}\$\+<=>\^~\|`]+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
# names of llama.cpp -> expressions, each of which splits the parts that the one before left
SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum modern-bert exaone4": (GPT2,),
    "smollm starcoder refact command-r codeshell exaone minerva-7b": (DIGIT, GPT2),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan grok-2": (QWEN2,),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe glm4 chatglm-bpe": (LLAMA3,),
    "deepseek-v3 hunyuan-dense": DEEPSEEK3,
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", DIGIT),
    "falcon": (SIGNS, GPT2, DIGITS),
    "default": (SIGNS.replace("`", ""), GPT2, r"\p{N}+", DIGITS),
    "bloom poro-chat gpt3-finnish": (BLOOM,),
    "viking": (BLOOM, DIGIT),
}
# a word that is a token needs no merges, and texts begin with the first token unless the file states otherwise
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
OWN_PIECES = ("gemma", "gemma2", "gemma3")  # their pieces have no space in front, as transformers reads them

# llama.cpp refuses a byte-level tokenizer without merges. This one never applies: merges begin with single characters.
UNUSED_MERGE = "<|left|> <|right|>"


@contextmanager
def tokenizer_folder(source: ModelSource, names: Sequence[str]) -> Iterator[Path]:
    """Context manager: the folder from which transformers reads a base's tokenizer. Normally this is the base's folder.

    transformers prefers tokenizer files to the tokenizer in a GGUF file. If such files next to a GGUF file have other
    tokens, this is a temporary folder with only a link to the GGUF file.
    `names`: names of tokenizer files. Raises: ModelError if the link cannot be made.
    """
    alone = source.gguf_file is None or not any((source.folder / name).exists() for name in names)
    if alone or _is_tokenizer_of(source.folder / TOKENIZER, source):
        yield source.folder
        return
    with temporary_folder() as folder:
        try:
            file = source.folder / str(source.gguf_file)
            (Path(folder) / file.name).symlink_to(file.resolve())
        except OSError as error:
            what = f"a link to {source.name_or_path} could not be made in a temporary folder ({error.strerror})"
            raise ModelError(what, FOLDER, key=KEY) from error
        yield Path(folder)


def without_unused_merge() -> AbstractContextManager[None]:
    """Context manager: transformers leaves UNUSED_MERGE out of a GGUF file's merges, because the package tokenizers
    refuses a merge whose parts are not tokens."""
    from transformers.integrations.gguf import gguf_tokenizer_mapping as reader

    read, unused = reader.get_merges, tuple(UNUSED_MERGE.split(" "))

    def get_merges(*values: Any) -> list[tuple[str, ...]]:
        return [merge for merge in read(*values) if merge != unused]

    return replaced(vars(reader), get_merges=get_merges)


def _is_tokenizer_of(path: Path, source: ModelSource) -> bool:
    """Whether the file `path`, a tokenizer.json, exists and has the same tokens as the GGUF file."""
    from tokenizers import Tokenizer
    from transformers.integrations.gguf import get_gguf_tokenizer

    if not path.is_file():
        return False
    tokens = dict(enumerate(get_gguf_tokenizer(str(source.folder / str(source.gguf_file)))[1].get("tokens", ())))
    vocabulary = Tokenizer.from_file(str(path)).get_vocab()
    return all(tokens.get(number) == name for name, number in vocabulary.items())


def split_as_llama_cpp(native: PreTrainedTokenizerBase, source: ModelSource) -> None:
    """Set the rules by which the tokenizer splits a text into words or pieces, as in llama.cpp.

    Raises: ModelError if the file names a splitting method that neither tunekit nor transformers knows.
    Source: llm_tokenizer_bpe, llm_tokenizer_spm_session and llama_vocab::impl::load of llama.cpp.
    """
    from tokenizers import normalizers

    values, backend = _values(source), native.backend_tokenizer
    kind, architecture = (values.get(name) for name in ("tokenizer.ggml.model", "general.architecture"))
    if kind == "llama" and architecture not in OWN_PIECES:
        front = [normalizers.Prepend(SPACE)] if values.get("tokenizer.ggml.add_space_prefix", True) else []
        backend.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", SPACE)])
        backend.pre_tokenizer = None
    if kind != "gpt2":
        return
    name = str(values.get("tokenizer.ggml.pre", "default"))
    steps = next((steps for names, steps in SPLITS.items() if name in names.split()), None)
    if steps is not None:
        backend.pre_tokenizer = _words(steps)
    elif name not in _known_to_transformers():
        what = f"{source.name_or_path} uses the pre-tokenizer {name!r}, which tunekit does not know"
        raise ModelError(what, FOLDER, key=KEY)
    if name in WHOLE_WORDS:
        backend.model.ignore_merges = True
        if "tokenizer.ggml.add_bos_token" not in values:
            native.add_bos_token = native.bos_token is not None


def _words(steps: tuple[str, ...]) -> PreTokenizer:
    """Make a pre-tokenizer that splits a text by the regular expressions `steps`, one after the other. It then encodes
    each word at byte level."""
    from tokenizers import Regex, pre_tokenizers

    splits: Iterator[PreTokenizer] = (pre_tokenizers.Split(Regex(each), "isolated") for each in steps)
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _values(source: ModelSource) -> Mapping[str, Any]:
    """The metadata of the GGUF file by name, without lists such as the tokens."""
    from transformers.integrations.gguf import read_gguf_metadata

    values, _ = read_gguf_metadata(str(source.folder / str(source.gguf_file)))
    return values


def _known_to_transformers() -> Mapping[str, str]:
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    return gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS
