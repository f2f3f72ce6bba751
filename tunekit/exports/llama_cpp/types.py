"""The ggml type of each tensor of a GGUF file, chosen as llama.cpp's quantizer chooses it.

Source: llama.cpp, src/llama-quant.cpp. A file type such as Q4_K_M gives most matrices one type. The matrices that lose
most precision get more bits: the output projection, attention values, and some of the down projections.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import libgguf

from tunekit.errors import InputError

# file type -> the type of most of its matrices
FILE_TYPES = {
    **{name: name for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q1_0", "NVFP4")},
    **{name: name for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")},
    **{name: name for name in ("Q2_K", "Q6_K", "TQ1_0", "TQ2_0")},
    **{f"Q{bits}_K_{size}": f"Q{bits}_K" for bits in (3, 4, 5) for size in "SM"},
    "Q2_K_S": "Q2_K",
    "Q3_K_L": "Q3_K",
    "MXFP4_MOE": "MXFP4",
    "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S",
    "IQ3_XS": "IQ3_S",
    "IQ3_M": "IQ3_S",
}
FLOATS = ("F32", "F16", "BF16")
# the type of matrices whose rows are not a multiple of 256 numbers
FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
ABOUT_2_BITS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
# types that are useless without an importance matrix; Q2_K only in a file of type Q2_K_S
NEED_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
# parts of the names of tensors that are small, or not matrices of a product
KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid|altup|laurel|per_layer_model_proj|^position_embd\.weight"
    r"|^token_types\.weight|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj|time_mix_(first|[wvag][012]|decay_w)"
    r"|time_mix_lerp_fused|attn_rel_b|\.position_embd|\.rel_pos|\.patch_|^(sam|a\.rvq|mm\.a)\."
)
# the part of a tensor's name -> its category; the first that fits
CATEGORIES = {
    "attn_qkv.weight": "qkv",
    "attn_kv_b.weight": "kv",
    "attn_v.weight": "v",
    "attn_k.weight": "k",
    "attn_q.weight": "q",
    "attn_output.weight": "attention output",
    "ffn_up": "up",
    "ffn_gate": "gate",
    "ffn_down": "down",
}
VALUES = ("v", "qkv", "kv")


@dataclass(frozen=True)
class Structure:
    """Properties of the model, besides names and shapes, that decide the types. `queries_per_key`: attention heads per
    key-value head of the first layer. `experts`: 0 for a dense model."""

    architecture: str  # as in the file, such as llama
    layers: int
    queries_per_key: int
    experts: int

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp treats the model as a model of 70 billion parameters, because of its number of layers."""
        grouped = self.queries_per_key > 1 or self.architecture == "qwen2"
        return self.layers == 80 and grouped and self.architecture in ("llama", "qwen2")


def choose_types(
    file_type: str, shapes: Mapping[str, Sequence[int]], structure: Structure, weighted: Collection[str] | None
) -> dict[str, str]:
    """The type of every tensor, by name. `shapes`: (..., O, I). `weighted`: the names of the tensors in the importance
    matrix; None without this matrix.

    Raises: InputError if no suitable type exists for a matrix, or if the type needs an importance matrix.
    """
    choice = _Choice(file_type, shapes, structure, weighted)
    return {name: choice.of(name, shapes[name]) for name in sorted(shapes, key=_layer_and_name)}


def _layer_and_name(name: str) -> tuple[int, str]:
    """A sort key for llama.cpp's order of tensors, in which the layers of each category of tensors are counted."""
    match = re.match(r"blk\.(\d+)\.", name)
    return (-1 if match is None else int(match[1])), name


def category_of(name: str) -> str:
    """The category of a tensor, on which its type depends; empty if it is in no category."""
    if name in EMBEDDINGS:
        return "embedding"
    if name == "output.weight":
        return "output"
    return next((category for part, category in CATEGORIES.items() if part in name), "")


class _Choice:
    """Chooses the types of the tensors in llama.cpp's order. It counts the passed tensors of some categories, because
    later types depend on these counts."""

    def __init__(
        self,
        file_type: str,
        shapes: Mapping[str, Sequence[int]],
        structure: Structure,
        weighted: Collection[str] | None,
    ) -> None:
        self.file_type, self.structure, self.weighted = file_type, structure, weighted or ()
        self.imatrix = weighted is not None
        self.tied = "output.weight" not in shapes
        self.value_count = sum(category_of(name) in VALUES for name in shapes)
        self.passed = dict.fromkeys(("values", "down", "gate", "up"), 0)

    def of(self, name: str, shape: Sequence[int]) -> str:
        """The type of a tensor."""
        if len(shape) < 2 or not name.endswith("weight") or KEPT.search(name):
            return "F32"
        default = FILE_TYPES[self.file_type]
        if default in FLOATS:
            return default
        chosen = self._fitting(name, self._preferred(name, category_of(name), shape) or default, shape[-1])
        needs = chosen in NEED_IMATRIX or (chosen == "Q2_K" and self.file_type == "Q2_K_S")
        if needs and name not in self.weighted and category_of(name) not in ("embedding", "output"):
            what = f"{self.file_type} gives {name} the type {chosen}, which is unusable without an importance matrix"
            how = "choose a type such as Q4_K_M" if self.imatrix else "add --imatrix, or choose a type such as Q4_K_M"
            raise InputError(what, how, key="--type")
        return chosen

    def _fitting(self, name: str, wanted: str, columns: int) -> str:
        """The wanted type if its blocks fit rows of `columns` values; else a type that fits them."""
        if columns % block_size(wanted) == 0:
            return wanted
        if wanted not in FALLBACKS:
            what = f"{name} has rows of {columns} numbers, and {wanted} needs a multiple of {block_size(wanted)}"
            raise InputError(what, "choose F16, BF16 or F32", key="--type")
        return FALLBACKS[wanted] if columns % block_size(FALLBACKS[wanted]) == 0 else "F16"

    def _preferred(self, name: str, category: str, shape: Sequence[int]) -> str | None:
        """The type of a tensor whose category gets a special type; None: the file type's default."""
        if category == "output" or (self.tied and category == "embedding"):
            return self._output(shape[-1])
        if self.file_type == "MXFP4_MOE":
            return "MXFP4" if len(shape) > 2 and shape[0] > 1 else "Q8_0"
        if category == "embedding":
            return self._embedding()
        if self.file_type in ABOUT_2_BITS:
            return self._about_2_bits(category)
        if category in VALUES:
            return self._values()
        if category == "down":
            return self._down(name)
        if category == "attention output":
            return self._attention_output()
        if category in ("k", "q"):
            if category == "k" and self.structure.experts == 8:
                return "Q8_0"
            return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(self.file_type)
        if category in ("gate", "up"):
            layer = self._layer(name, category)
            middle = self.structure.layers // 8 <= layer < 7 * self.structure.layers // 8
            return "IQ3_XXS" if self.file_type == "IQ3_XS" and middle else None
        return None

    def _output(self, columns: int) -> str | None:
        default = FILE_TYPES[self.file_type]
        if self.file_type == "MXFP4_MOE" or self.structure.architecture == "falcon" or columns % block_size(default):
            return "Q8_0"
        if self.file_type in (*ABOUT_2_BITS, "IQ3_XXS"):
            return "Q5_K"
        return None if default == "Q8_0" else "Q6_K"

    def _embedding(self) -> str | None:
        if self.file_type in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
            return "Q2_K"
        if self.file_type in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
            return "IQ3_S"
        return "Q4_K" if self.file_type in ("TQ1_0", "TQ2_0") else None

    def _about_2_bits(self, category: str) -> str | None:
        larger = self.file_type in ("IQ2_S", "IQ2_M")
        if category in VALUES:
            self.passed["values"] += 1
            if self.structure.queries_per_key >= 4 or self.structure.experts >= 4:
                return "Q4_K"
            return "IQ3_S" if larger else "Q2_K"
        if category == "k" and self.structure.experts == 8:
            return "Q4_K"
        if category == "down":
            self.passed["down"] += 1
            first = self.passed["down"] <= self.structure.layers // 8
            return ("IQ3_S" if larger else "Q2_K") if first else None
        if category == "attention output":
            if self.structure.experts == 8:
                return "Q5_K"
            return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(self.file_type)
        return None

    def _values(self) -> str | None:
        """The type of the attention's value projections, which lose most precision."""
        index, kind = self.passed["values"], self.file_type
        grouped = self.structure.queries_per_key >= 4
        self.passed["values"] += 1
        chosen = {
            "Q2_K": "Q4_K" if grouped else "Q3_K",
            "Q2_K_S": "Q4_K" if grouped else None,
            "IQ3_XXS": "Q4_K" if grouped else None if self.imatrix else "IQ3_S",
            "IQ3_XS": "Q4_K" if grouped else None,
            "IQ3_S": "Q4_K" if grouped else None,
            "IQ3_M": "Q4_K",
            "Q3_K_M": "Q5_K" if index < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "IQ4_NL": "Q5_K" if grouped else None,
            "IQ4_XS": "Q5_K" if grouped else None,
            "Q4_K_M": "Q6_K" if self._more_bits(index, self.value_count) else None,
            "Q5_K_M": "Q6_K" if self._more_bits(index, self.value_count) else None,
            "Q4_K_S": "Q5_K" if index < 4 else None,
        }.get(kind)
        if self.structure.is_70b and (chosen or FILE_TYPES[kind]) in ("Q3_K", "Q4_K"):
            chosen = "Q5_K"
        return "Q8_0" if self.structure.experts == 8 else chosen

    def _down(self, name: str) -> str | None:
        """The type of down projections."""
        layer, layers, kind = self._layer(name, "down"), self.structure.layers, self.file_type
        falcon, more, first = (
            self.structure.architecture == "falcon",
            self._more_bits(layer, layers),
            layer < layers // 8,
        )
        return {
            "Q2_K": "Q3_K",
            "Q2_K_S": "Q4_K" if first else None,
            "IQ3_XXS": None if self.imatrix else "Q4_K" if first else "Q3_K",
            "Q3_K_M": "Q5_K" if layer < layers // 16 else "Q3_K" if falcon and not more else "Q4_K",
            "IQ3_M": "Q4_K" if first or (self.structure.experts == 8 and more) else None,
            "Q3_K_L": "Q4_K" if falcon else "Q5_K",
            "Q4_K_M": (
                ("Q6_K" if layer < layers // 16 else "Q5_K" if more else None) if falcon else "Q6_K" if more else None
            ),
            "IQ4_NL": "Q5_K" if first and not self.imatrix else None,
            "IQ4_XS": "Q5_K" if first and not self.imatrix else None,
            "Q5_K_M": "Q6_K" if more else None,
            "Q4_K_S": "Q5_K" if first and not falcon else None,
            "Q4_0": "Q4_1" if first and self.imatrix else None,
            "Q5_0": "Q5_1" if first and self.imatrix else None,
        }.get(kind)

    def _attention_output(self) -> str | None:
        kind = self.file_type
        if self.structure.architecture == "falcon":
            return "Q4_K" if kind == "Q3_K_L" else None
        if self.structure.experts == 8:
            small = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M")
            return "Q5_K" if kind in (*small, "IQ4_NL", "IQ4_XS") else None
        chosen = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
        return chosen.get(kind)

    def _layer(self, name: str, category: str) -> int:
        """The layer of a tensor. It is read from the name in a mixture of experts; otherwise the tensors of the
        category are counted."""
        counted = self.passed[category]
        self.passed[category] += 1
        return _layer_and_name(name)[0] if self.structure.experts > 1 else counted

    def _more_bits(self, layer: int, layers: int) -> bool:
        """Whether the layer is in the first or last eighth of the layers, or is every third layer between them."""
        return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def block_size(ggml_type: str) -> int:
    """The number of values that one block of the type holds."""
    return int(libgguf.GGML_QUANT_SIZES[libgguf.GGMLQuantizationType[ggml_type]][0])
