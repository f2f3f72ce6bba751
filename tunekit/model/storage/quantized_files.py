"""Reads the weights of a folder that stores them quantized as if they were dense. A weight is dequantized only when it
is read, some rows at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from tunekit.errors import ModelError
from tunekit.files.tensors import TensorEntry
from tunekit.model.quantized import checkpoint_formats as formats
from tunekit.model.quantized.four_bit import CHUNK_ELEMENTS
from tunekit.model.storage.mapped_files import MappedFiles

# Endings of numbers about inputs and the key-value cache, which dense weights do not need.
OF_INPUTS = (
    *(".activation_scale", ".input_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale", ".qscale_act"),
    *(".input_zero_point", ".output_zero_point", ".input_global_scale"),
)
AGAIN = "fetch the folder again, or choose the unquantized base"


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix (R, C), or a stack of matrices (E, R, C), that the files store quantized.

    `codes`, `scales`, `zeros`, `divisor`, `stated_shape`: names in the files. The scales are divided by `divisor`.
    `block`: the numbers of rows and columns that share a scale. `rounding`: the dtype in which the program that made
    the file computes; None: the values are rounded only to the dtype of the net. `transposed`: whether the net's
    matrix is (C, R).
    """

    codes: str
    scales: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    numbers: formats.Unpacking
    rounding: torch.dtype | None = None
    transposed: bool = False
    zeros: str | None = None
    unpack_zeros: Callable[[Tensor], Tensor] = formats.plain_numbers
    divisor: str | None = None
    stated_shape: str | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of the scales: the number of blocks in each direction."""
        *stack, rows, columns = self.shape
        return (*stack, ceil(rows / self.block[0]), ceil(columns / self.block[1]))

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape in the net."""
        *stack, rows, columns = self.shape
        return (*stack, columns, rows) if self.transposed else self.shape

    @property
    def stored(self) -> list[str]:
        """The names of all tensors in the files that belong to this weight, first the codes."""
        names = (self.codes, self.scales, self.zeros, self.divisor, self.stated_shape)
        return [name for name in names if name is not None]


class QuantizedFiles(MappedFiles):
    """The tensors of a folder with quantized weights, under the names of the dense weights. `files`: the tensors as
    they are stored. `dtype`: the dtype of the dense weights."""

    mapped = False  # a quantized weight is no view of its file

    def __init__(self, files: MappedFiles, weights: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> None:
        hidden = {name for weight in weights.values() for name in weight.stored}
        headers = {name: entry for name, entry in files.headers.items() if name not in hidden}
        for name, weight in weights.items():
            entry = files.headers[weight.codes]
            headers[name] = TensorEntry(entry.file, dtype, weight.dense_shape, entry.offset_bytes)
        super().__init__(files.folder, {name: entry for name, entry in headers.items() if not name.endswith(OF_INPUTS)})
        self.stored, self.weights = files, weights

    @property
    def extra_bytes(self) -> int:  # type: ignore[override]
        """Memory for reading a weight in addition to the weight: its scales and zero points, and some of its rows."""
        kept = (sum(self.stored.headers[name].size_bytes for name in each.stored[1:]) for each in self.weights.values())
        return 4 * max(kept) + 8 * 4 * CHUNK_ELEMENTS  # a stored byte becomes a float32 number

    def view(self, name: str) -> Tensor:
        """The tensor as a view of its file; a quantized weight as a dense copy."""
        return self.read(name) if name in self.weights else super().view(name)

    def read_into(self, name: str, target: Tensor, skipped: int = 0) -> None:
        """Copy the dense tensor into `target` (same shape, any strides and dtype), some rows at a time."""
        weight = self.weights.get(name)
        if weight is None:
            super().read_into(name, target, skipped)
            return
        if not target.numel():
            return
        scales, zeros = self._scales(weight), self._zeros(weight)
        for index, matrix in enumerate(target if len(weight.shape) == 3 else [target]):
            of_matrix = scales[index], None if zeros is None else zeros[index]
            self._read_matrix(weight, index, matrix.t() if weight.transposed else matrix, *of_matrix)

    def _read_matrix(
        self, weight: QuantizedWeight, index: int, target: Tensor, scales: Tensor, zeros: Tensor | None
    ) -> None:
        """Dequantize the matrix number `index` of a stack into `target` (R, C). `scales`, `zeros`: of its blocks."""
        rows, columns = weight.shape[-2:]
        entry = self.stored.headers[weight.codes]
        width = prod(entry.shape) // prod(weight.shape[:-1])  # codes in a row
        step = max(1, CHUNK_ELEMENTS // columns)
        for first in range(0, rows, step):
            part = target[first : first + step]
            codes = torch.empty(len(part), width, dtype=entry.dtype)
            self.stored.read_into(weight.codes, codes, (index * rows + first) * width)
            blocks = torch.arange(first, first + len(part)) // weight.block[0]
            of_rows = scales[blocks], None if zeros is None else zeros[blocks]
            values = formats.dequantized(weight.numbers(codes), *of_rows, weight.block[1])
            part.copy_(values if weight.rounding is None else values.to(weight.rounding))

    def _scales(self, weight: QuantizedWeight) -> Tensor:
        """The scales of each matrix in a stack, (E, blocks of rows, blocks of columns) float32."""
        if weight.stated_shape is not None:
            stated = tuple(self.stored.read(weight.stated_shape).tolist())
            if stated != weight.shape:
                what = f"the tensor {weight.stated_shape} states the shape {list(stated)}, but {weight.codes} contains"
                raise self._refuse(weight.stated_shape, f"{what} {list(weight.shape)}")
        scales = formats.scale_values(self.stored.read(weight.scales))
        if weight.divisor is not None:
            scales = scales / self.stored.read(weight.divisor)
        if not bool(torch.isfinite(scales).all()):
            raise self._refuse(weight.scales, f"the tensor {weight.scales} contains a scale that is NaN or infinite")
        return scales.reshape(-1, *weight.grid[-2:]).expand(prod(weight.shape[:-2]), -1, -1)

    def _zeros(self, weight: QuantizedWeight) -> Tensor | None:
        if weight.zeros is None:
            return None
        *_, rows, columns = weight.grid  # the packed zero points may end with unused bits
        return weight.unpack_zeros(self.stored.read(weight.zeros)).reshape(-1, rows, columns)

    def _refuse(self, name: str, what: str) -> ModelError:
        return ModelError(what, AGAIN, file=str(self.folder / self.stored.headers[name].file))
