"""A GGUF file for llama.cpp and programs that build on it: a LoRA adapter, or a whole model in any ggml type."""

import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tunekit.arithmetic.merge import choose_onto
from tunekit.arithmetic.merge_output import collect_changes
from tunekit.arithmetic.on_base import attach_without_weights
from tunekit.contracts import Array
from tunekit.errors import Problem
from tunekit.exports.compare import compare_parts, difference_of_tokens
from tunekit.exports.format import Certificate, Evidence, Exported, Options, Questions
from tunekit.exports.llama_cpp.activations import column_squares
from tunekit.exports.llama_cpp.adapter import adapter_problems, write_adapter
from tunekit.exports.llama_cpp.converter import (
    ConvertedModel,
    Converter,
    Placed,
    has_mmproj,
    imported,
    knows,
    make_model,
    placements,
    text_architecture,
)
from tunekit.exports.llama_cpp.fixed import fixed_problems
from tunekit.exports.llama_cpp.metadata import limit_notes, right_up_to
from tunekit.exports.llama_cpp.stream import write_model
from tunekit.exports.llama_cpp.texts import around, sample_texts, token_notes
from tunekit.exports.llama_cpp.types import FILE_TYPES, FLOATS
from tunekit.exports.plain_or_merged import quantization_note
from tunekit.exports.programs.llama_cpp import answers, tokens_of
from tunekit.exports.programs.program import Program
from tunekit.exports.programs.versions import CONVERTER, CONVERTER_VERSION
from tunekit.files.work_folder import temporary_folder, work_folder
from tunekit.model.families import make_family
from tunekit.model.quantized.weights import layer_kind
from tunekit.model.storage.converted import StoredPieces
from tunekit.model.storage.model_folder import copy_other_files
from tunekit.model.storage.rewrite import Changes, Rewriter
from tunekit.model.storage.source import read_json
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.recipe.model import ModelSection
from tunekit.targets.exportable import Exportable

TAKES = frozenset({"adapter", "model"})
OPTIONS = frozenset({"type", "merged", "imatrix"})
SUFFIX, PROGRAM = ".gguf", "llama.cpp"
ROWS, TOKENS = 64, 512  # of the importance matrix
ROW_TEXTS = 4  # of the certificate's rows, whose tokens are compared
POOLINGS = ("mean", "cls", "lasttoken")  # of embedding models
STORED = {torch.float64: "F32", torch.float32: "F32", torch.float16: "F16"}  # all others as BF16


def problems(exportable: Exportable, options: Options) -> list[Problem]:
    """Reasons not to write: an unsupported type or architecture, or changes that a GGUF adapter cannot hold."""
    wrong = []
    if options.type is not None and options.type not in FILE_TYPES:
        wrong.append(Problem(f"{options.type} is unknown", f"choose {', '.join(FILE_TYPES)}", key="--type"))
    if options.imatrix and options.type in (None, *FLOATS):
        wrong.append(
            Problem(
                f"--imatrix needs a quantized type{f', but {options.type} is not quantized' if options.type else ''}",
                "add --type Q4_K_M",
                key="--imatrix",
            )
        )
    family = make_family(exportable.family)
    if family.objectives != "causal" and not family.headless:
        what = f"{exportable.family} models are not converted"
        return [*wrong, Problem(what, "choose another --to", key="--to")]
    with imported() as converter:
        architecture = text_architecture(converter, exportable.config)
        if not knows(converter, architecture):
            what = (
                f"llama.cpp's converter ({CONVERTER} {CONVERTER_VERSION}) does not know the architecture {architecture}"
            )
            return [*wrong, Problem(what, "choose another --to")]
    wrong += fixed_problems(exportable.config)
    pooling = None if exportable.objective is None else exportable.objective.facts.get("pooling")
    if pooling is not None and (len(pooling) > 1 or pooling[0] not in POOLINGS):
        what = f"llama.cpp pools by {', '.join(POOLINGS)}, but the model pools by {' and '.join(pooling)}"
        wrong.append(Problem(what, "choose another --to"))
    if exportable.objective is not None and "dense" in exportable.objective.facts:
        wrong.append(Problem("the file would lack the model's dense layers", "choose another --to"))
    if writes_adapter(exportable, options):
        wrong += adapter_problems(exportable)
    return wrong


def writes_adapter(exportable: Exportable, options: Options) -> bool:
    """Whether to write only an adapter: the target is an adapter, and neither --merged nor --type is given. The file of
    an embedding model states its pooling, so it is always a whole model."""
    merged = options.merged or make_family(exportable.family).headless
    return exportable.kind == "adapter" and not merged and options.type is None


def write(exportable: Exportable, path: Path, evidence: Evidence, options: Options) -> Exported:
    """Write the file. The tensors of a whole model are written one after the other."""
    if writes_adapter(exportable, options):
        facts, base, how = write_adapter(exportable, path), "base.gguf", ""
        if exportable.gguf_file is not None and not _is_quantized_here(exportable):
            base = shlex.quote(str(exportable.folder / exportable.gguf_file))
        else:
            kind = exportable.target.model.quantization if _is_quantized_here(exportable) else None
            what = "" if kind is None else f" (with the {kind} weights of the training)"
            how = f"; write base.gguf{what} with: {_base_command(exportable)}"
        how = f"run it with: llama-server -m {base} --lora {path}{how}"
        remedy = "the base.gguf below has the weights of the training"
        error = quantization_note(exportable, remedy) if _is_quantized_here(exportable) else ()
        notes = [*limit_notes(exportable.config), *_part_notes(exportable)]
        return Exported(path, "adapter", (*notes, *_base_notes(exportable, facts), *error, how))
    squares, notes = None, [*limit_notes(exportable.config), *_part_notes(exportable), *token_notes(exportable)]
    if options.imatrix:
        rows, described = evidence.rows(ROWS, TOKENS)
        squares = column_squares(exportable.target, rows)
        notes.append(f"the importance matrix was measured on {described}")
    types, unmeasured = _write_model(exportable, path, options.type, squares)
    if unmeasured:
        notes.append(f"the importance matrix lacks {unmeasured[0]} ({len(unmeasured)} such matrices)")
    counts = Counter(types.values()).most_common()
    notes.append(f"tensors by type: {', '.join(f'{count} {name}' for name, count in counts)}")
    return Exported(path, exportable.whole, (*notes, f"run it with: llama-server -m {path}"))


def _part_notes(exportable: Exportable) -> Iterator[str]:
    """A note on the parts of a composite model that read images or audio: llama.cpp reads them from another file."""
    if make_family(exportable.family).trained_as is None:
        return
    with imported() as converter:
        has_file = has_mmproj(converter, exportable.config)
    what = "the base's own mmproj file stays valid for llama-server (--mmproj FILE): they are unchanged"
    none = f"llama.cpp's converter writes no mmproj file for {exportable.architecture}, so that it reads text only"
    yield f"the file has the language model, without the parts that read images or audio; {what if has_file else none}"


def _is_quantized_here(exportable: Exportable) -> bool:
    """Whether the training quantized the base's weights, so that no file of the base has the values of the training."""
    return exportable.target.model.quantization not in ("none", "kept")


def _base_notes(exportable: Exportable, facts: Mapping[str, object]) -> tuple[str, ...]:
    """A note about metadata that the base's GGUF file must have; empty if there is none, or if the file has it."""
    if exportable.gguf_file is not None:
        with imported() as converter:
            fields = converter.gguf.GGUFReader(exportable.folder / exportable.gguf_file).fields
            stated = {name: field.contents() for name, field in fields.items() if name in facts}
        facts = {name: value for name, value in facts.items() if not _equal(stated.get(name), value)}
    if not facts:
        return ()
    listed = ", ".join(f"{name} = {value}" for name, value in facts.items())
    how = f"`{_base_command(exportable)}` writes such a file"
    return (f"the base's GGUF file must state {listed}, which llama.cpp's converter leaves out; {how}",)


def _base_command(exportable: Exportable) -> str:
    """The command that writes the base's GGUF file, as `write_base` does."""
    section, quantized = exportable.target.model, _is_quantized_here(exportable)
    default = ModelSection(name_or_path=section.name_or_path)
    names = ("revision", *(("dtype", "quantization", "double_quantization") if quantized else ()))
    changed = [name for name in names if getattr(section, name) != getattr(default, name)]
    keys = [f"model.{name}={_text(getattr(section, name))}" for name in changed]
    return shlex.join(["tunekit", "export", section.name_or_path, *keys, "--to", "gguf", "--output", "base.gguf"])


def _text(value: str | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else value


def _equal(stated: object, value: object) -> bool:
    """Whether a value of a GGUF file equals `value`, up to the rounding to float32."""
    if isinstance(stated, float) and isinstance(value, int | float):
        return math.isclose(stated, value, rel_tol=1e-6)
    return stated == value


def write_base(exportable: Exportable, path: Path) -> None:
    """Write the base without its adapter. The weights keep the base's type."""
    _write_model(exportable.without_adapter, path, None, None)


@torch.no_grad()
def _write_model(
    exportable: Exportable, path: Path, file_type: str | None, squares: Mapping[str, Array] | None
) -> tuple[dict[str, str], list[str]]:
    """Write the base with the adapter's changes. Returns the type of each tensor, and the names of the quantized
    tensors of layers that `squares` lacks. By default the weights keep the base's type, which is exact for a base
    without an adapter (but float64 becomes F32)."""
    rewriter, changes = _rewriter(exportable)
    with _files(exportable, rewriter, changes) as folder, imported() as converter:
        architecture = text_architecture(converter, exportable.config)
        file_type = file_type or _stored_type(converter, exportable, rewriter)
        model = make_model(converter, folder, architecture, rewriter.outputs(changes), around(exportable))
        make = partial(make_model, converter, folder, architecture, {})
        imatrix = None if squares is None else _by_tensor(make, rewriter, squares)
        types = write_model(converter, model, path, file_type, imatrix)
    missing = [name for name, kind in types.items() if kind not in FLOATS and name.startswith("blk.")]
    return types, [name for name in missing if imatrix is not None and name not in imatrix]


def _stored_type(converter: Converter, exportable: Exportable, rewriter: Rewriter) -> str:
    """The GGUF type that the base's weights have, or BF16 if this type is not in FLOATS."""
    if exportable.gguf_file is None:
        return STORED.get(rewriter.base_dtype(), "BF16")
    tensors = converter.gguf.GGUFReader(exportable.folder / exportable.gguf_file).tensors
    kind: str = max(tensors, key=lambda tensor: tensor.n_elements).tensor_type.name
    return kind if kind in FLOATS else "BF16"


def _rewriter(exportable: Exportable) -> tuple[Rewriter, Changes]:
    """A reader of the base's weights in float32, and the adapter's changes to them."""
    target, objective = exportable.target, exportable.objective
    onto, _ = choose_onto(target, None)
    section = target.model if objective is None else objective.section(target.model, target.seed)
    rewriter = Rewriter(section, onto, torch.float32)
    if target.adapter is None:
        return rewriter, Changes({}, {})
    return rewriter, collect_changes(attach_without_weights(target.adapter, section, rewriter))


def _by_tensor(
    make: Callable[[], ConvertedModel], rewriter: Rewriter, squares: Mapping[str, Array]
) -> dict[str, Array]:
    """The column importance, (I,) or (E, I), by the name of the file's tensor. As in llama.cpp, only tensors of layers
    are included."""
    shapes, values, transposed = {}, {}, []
    for module_name, importance in squares.items():
        name = f"{module_name}.weight"
        if importance.ndim == 2:  # fused experts: in the base's files, each expert has its own matrix
            matrices = StoredPieces(rewriter.net, module_name, ()).matrices() or {}
            for stored, (expert, rows, columns) in matrices.items():
                shapes[stored], values[stored] = (len(rows), len(columns)), importance[expert][columns.numpy()]
        elif name in rewriter.names:
            stored, rows_first = rewriter.tensors.older.get(name, name), rewriter.tensors.meta[name].shape
            if layer_kind(rewriter.modules[module_name]) == "conv1d":
                transposed.append(stored)
                rows_first = rows_first[::-1]
            shapes[stored], values[stored] = (rows_first[0], rows_first[1]), importance
    placed = placements(make, shapes, transposed=transposed)
    return {name: _in_order(tensor, values) for name, tensor in placed.items() if name.startswith("blk.")}


def _in_order(tensor: Placed, values: Mapping[str, Array]) -> Array:
    """The column importance of one tensor, in the file's order of columns: (I,), or (E, I) for E experts."""
    orders = np.atleast_2d(tensor.columns)
    parts = [values[source][order] for source, order in zip(tensor.sources, orders, strict=True)]
    return np.stack(parts) if tensor.columns.ndim > 1 else parts[0]


@contextmanager
def _files(exportable: Exportable, rewriter: Rewriter, changes: Changes) -> Iterator[Path]:
    """A temporary folder with the files of the merged model, except for its weights."""
    target, objective = exportable.target, exportable.objective
    with temporary_folder() as name:
        folder = Path(name) / Path(target.model.name_or_path).name
        folder.mkdir()
        config = json.dumps(rewriter.configuration(changes))  # some have Infinity, which write_json refuses
        (folder / "config.json").write_text(config, "utf-8")
        answering = None if objective is None else objective.answering
        copy_other_files(target.model, exportable.folder, exportable.processor, target.chat_template, folder, answering)
        if not target.model.trust_remote_code:
            _remove_code(folder)
        if (folder / "tokenizer.model").is_file():
            _name_added_tokens(folder)
        yield folder


def _remove_code(folder: Path) -> None:
    """Remove the names of custom model classes: the converter would download and run their code without asking."""
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        values = read_json(path) if path.is_file() else {}
        if values.pop("auto_map", None) is not None:
            path.write_text(json.dumps(values), "utf-8")


def _name_added_tokens(folder: Path) -> None:
    """Copy the added tokens to tokenizer_config.json: sentencepiece's file lacks them, and transformers 5 writes
    them to tokenizer.json alone."""
    path = folder / "tokenizer_config.json"
    added = {str(token["id"]): token for token in read_json(folder / "tokenizer.json").get("added_tokens", ())}
    path.write_text(json.dumps({**read_json(path), "added_tokens_decoder": added}), "utf-8")


def certify(
    written: Exported, exportable: Exportable, program: Program, questions: Callable[[], Questions], options: Options
) -> Certificate:
    """Compare llama.cpp's answers with torch's. For an adapter, its base is first written to a temporary file."""
    if written.what != "adapter":
        return certify_files(written, exportable, program, written.path, questions(), options)
    with work_folder(written.path) as folder:
        base = folder / "base.gguf"
        write_base(exportable, base)
        certificate = certify_files(written, exportable, program, base, questions(), options)
    kind = exportable.target.model.quantization
    note = f"the base file has the {kind} weights of the training" if _is_quantized_here(exportable) else ""
    return replace(certificate, note=note)


def certify_files(
    written: Exported, exportable: Exportable, program: Program, base: Path, compared: Questions, options: Options
) -> Certificate:
    """Compare llama.cpp's log-probabilities and token ids with torch's. `base`: the GGUF
    file of the base, if the export is an adapter. Rows are cut to the length up to which llama.cpp is correct."""
    name, limit = f"{written.what} {options.type or ''}".strip(), right_up_to(exportable.config)
    if limit is not None:
        compared = compared.cut(limit[0])
    parts = compare_parts(written, base, compared, partial(answers, program), name)
    tokenizer = exportable.processor.tokenizer
    assert isinstance(tokenizer, LoadedTokenizer)
    rows = [row[1:] if row[0] == tokenizer.bos_id else row for row in compared.rows[:ROW_TEXTS]]  # it is put in front
    texts = [*sample_texts(exportable), *map(tokenizer.decode, rows)]
    expected = [tokenizer.native(text, truncation=False, verbose=False)["input_ids"] for text in texts]
    file = base if written.what == "adapter" else written.path
    warning = difference_of_tokens(texts, expected, tokens_of(program, file, texts))
    return Certificate(PROGRAM, program.version, compared.described, parts, warning=warning)
