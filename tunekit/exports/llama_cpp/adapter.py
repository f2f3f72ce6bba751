"""Writes a LoRA adapter as a GGUF file: the factors of each layer, with llama.cpp's names and llama.cpp's order of
rows and columns."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tunekit.arithmetic.nearest_lora import NotLowRank
from tunekit.arithmetic.normalise import PlainAdapter, normalise
from tunekit.errors import AdapterError, ModelError, Problem
from tunekit.exports.llama_cpp.converter import (
    Converter,
    Placed,
    added_facts,
    imported,
    make_model,
    placements,
    text_architecture,
)
from tunekit.exports.llama_cpp.stream import write_file
from tunekit.files.work_folder import temporary_folder
from tunekit.model.load import make_meta_model
from tunekit.model.quantized.weights import layer_kind
from tunekit.model.storage.portable import with_older_keys
from tunekit.targets.exportable import Exportable

UNAPPLIED = ("per_layer_model_proj.weight",)  # llama.cpp multiplies by these matrices without an adapter
MERGE = "merge it instead: add --type Q8_0, or F16, Q4_K_M ..."


def adapter_problems(exportable: Exportable) -> list[Problem]:
    """Changes of the adapter that a GGUF adapter cannot hold, or that llama.cpp would not apply."""
    try:
        plain = normalise(exportable.target)
        lost = [*plain.rest, *plain.tied_pairs, *(name for name in plain.pairs if name == plain.embedding)]
        if not lost:  # the converter of some models reads the tokenizer for an embedding
            with imported() as converter:
                placed, _, _ = _placed(converter, exportable, plain)
            written = {source for name, tensor in placed.items() if name not in UNAPPLIED for source in tensor.sources}
            lost = [name for name in plain.pairs if f"{name}.weight" not in written]
    except AdapterError as error:  # a prompt, which cannot be merged either
        return list(error.problems)
    except (NotLowRank, ModelError) as error:
        inexact = isinstance(error, NotLowRank)  # a base that cannot be read cannot be merged either
        return [Problem(each.what, MERGE if inexact else each.how or MERGE, each.file) for each in error.problems]
    lost = list(dict.fromkeys(lost))  # a tied embedding is in two of these
    if not lost:
        return []
    more = f" and {len(lost) - 1} other tensors" if len(lost) > 1 else ""
    return [Problem(f"a GGUF adapter cannot hold the change of {lost[0]}{more}", MERGE)]


def write_adapter(exportable: Exportable, path: Path) -> dict[str, object]:
    """Write the factors in float32, padded to the same rank; alpha = rank, so the scale is 1. Returns metadata that
    the base's GGUF file must have, but that llama.cpp's converter does not write."""
    plain = normalise(exportable.target).padded()
    with imported() as converter:
        placed, architecture, facts = _placed(converter, exportable, plain)
        writer = converter.gguf.GGUFWriter(path, architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(plain.rank))
        for name, tensor in placed.items():
            pairs = [plain.pairs[source.removesuffix(".weight")] for source in tensor.sources]
            rows, columns = np.atleast_2d(tensor.rows), np.atleast_2d(tensor.columns)
            a = np.stack(
                [pair.a.detach().numpy()[:, order] for pair, order in zip(pairs, columns, strict=True)]
            )  # (E, R, I)
            b = np.stack([pair.b.detach().numpy()[order] for pair, order in zip(pairs, rows, strict=True)])  # (E, O, R)
            for suffix, factor in (("lora_a", a), ("lora_b", b)):
                writer.add_tensor(f"{name}.{suffix}", factor if tensor.rows.ndim > 1 else factor[0])
        write_file(converter.gguf, writer, path, [info.tensor for info in writer.tensors[0].values()])
    return facts


def _placed(
    converter: Converter, exportable: Exportable, plain: PlainAdapter
) -> tuple[dict[str, Placed], str, dict[str, object]]:
    """The places of the updates in the file, llama.cpp's name of the architecture, and metadata that the base's file
    must have."""
    meta = make_meta_model(exportable.target.model, device=torch.device("cpu"))
    modules = dict(meta.net.named_modules())
    shapes = {f"{name}.weight": pair.shape for name, pair in plain.pairs.items()}
    transposed = [f"{name}.weight" for name in plain.pairs if name in modules and layer_kind(modules[name]) == "conv1d"]
    with temporary_folder() as name:
        folder = Path(name)
        config = json.dumps(with_older_keys(exportable.config))  # some have Infinity
        (folder / "config.json").write_text(config, "utf-8")
        make = partial(make_model, converter, folder, text_architecture(converter, exportable.config), {})
        name_there = converter.gguf.MODEL_ARCH_NAMES[make().model_arch]
        return placements(make, shapes, transposed=transposed), name_there, added_facts(make)
