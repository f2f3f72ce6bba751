"""Writes a copy of a base with changed matrices, one tensor at a time. Changes are computed in float32 and cast
once."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tunekit.contracts import Tensors
from tunekit.errors import ModelError, NumericsError
from tunekit.model.compute import resolve_dtype
from tunekit.model.families.heads import scales_tied_head
from tunekit.model.load import LoadedModel, load_model, make_meta_model
from tunekit.model.pretrained import text_config
from tunekit.model.quantized import codec
from tunekit.model.quantized.weights import layer_kind
from tunekit.model.storage import inspection
from tunekit.model.storage.base_tensors import BaseTensors, LoadedTensors
from tunekit.model.storage.converted import StoredPieces
from tunekit.model.storage.packing import packable_layers
from tunekit.model.storage.quantized_layouts import open_weights, without_settings
from tunekit.model.storage.shards import ShardWriter
from tunekit.model.storage.source import ModelSource, find_source
from tunekit.model.uncalled import uncalled_layers
from tunekit.recipe.model import HeadedModel, ModelSection
from tunekit.records import JsonObject

if TYPE_CHECKING:
    from transformers import GenerationConfig

# (weight (O, I) float32, bias (O,) float32 or None) -> the changed weight and bias
MatrixChange = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Changes:
    """Changes of a base. `layers`: functions that change a layer's weight and bias, by module name. `parameters`:
    functions that change one parameter, by name; they are applied before the change of the layer."""

    layers: Mapping[str, MatrixChange]
    parameters: Mapping[str, Callable[[Tensor], Tensor]]
    vocabulary_size: int | None = None  # None: unchanged

    def changed(self, name: str, stored: Tensor) -> Tensor:
        """The parameter `name` in float32 after its change; `stored` itself if there is no change."""
        change = self.parameters.get(name)
        return stored if change is None else change(stored.float())


class Rewriter:
    """Writes a copy of one base with changes.

    `onto`: the weights that are changed: `full` (the base's own), `dequantized` (packed and unpacked again), or
    `quantized` (like dequantized, and packed again after the change).
    `output_dtype`: the dtype of all written numbers; None: each tensor keeps its dtype.
    `loaded`: the base, if it is already in memory. It is used only if the base's files do not match the net to write.
    """

    def __init__(
        self,
        section: ModelSection,
        onto: str,
        output_dtype: torch.dtype | None = None,
        loaded: LoadedModel | None = None,
    ) -> None:
        self.section, self.onto, self.output_dtype, self.loaded = section, onto, output_dtype, loaded
        device = torch.device("cpu")
        self.compute_dtype = resolve_dtype(section, device)
        self.source: ModelSource = find_source(section, weights=True)
        plain = section.model_copy(update={"quantization": "none"})
        meta = make_meta_model(plain, device=device, all_parts=True)
        self.family, self.net, self.config = meta.family, meta.net, meta.config
        self.new_modules = meta.new_modules
        self.head = self.family.head_name(self.net)
        self.exact_head = self.family.exact_head(self.net)
        self.embedding = self.family.embedding_name(self.net)
        self.tied = self.family.tied(self.net)
        self.scales_tied_head = self.tied and scales_tied_head(self.net)
        self.modules = dict(self.net.named_modules(remove_duplicate=False))
        self.packable_layers = packable_layers(self.net, self.family, self.new_modules)
        self.pieces: dict[str, StoredPieces] = {}  # name in the files -> the changed parameter with this piece
        self.generation_config: GenerationConfig | None = None  # for a base without a generation_config.json
        self.tensors = self._open(plain)
        self.names = frozenset(self.tensors.meta)
        self.aliases = self._find_aliases()
        self._packing = (section.quantization, section.double_quantization)

    def _open(self, plain: ModelSection) -> BaseTensors | LoadedTensors:
        if not self._writes_loaded_net:
            return BaseTensors(self.source.folder, self.net)
        float32_section = plain.model_copy(update={"dtype": "float32"})
        loaded = self.loaded or load_model(float32_section, device=torch.device("cpu"))
        self.generation_config = loaded.generation_config
        if self.loaded is not None and self.source.gguf_file is None:  # write the files' most precise dtype
            stored = {
                entry.dtype
                for entry in open_weights(self.source.folder).headers.values()
                if entry.dtype.is_floating_point
            }
            self.output_dtype = max(stored, key=lambda dtype: dtype.itemsize)
        return LoadedTensors(loaded.net, self.head if self.tied else None, self.base_dtype())

    def base_dtype(self) -> torch.dtype:
        """The dtype of the largest tensor in the base's files; for a GGUF file the compute dtype."""
        if self.source.gguf_file is not None:
            return self.compute_dtype
        entries = [
            entry for entry in open_weights(self.source.folder).headers.values() if entry.dtype.is_floating_point
        ]
        return max(entries, key=lambda entry: math.prod(entry.shape)).dtype

    @property
    def _writes_loaded_net(self) -> bool:
        """Whether the new files are written from the net in memory, because the base's files do not match this net."""
        return self.source.gguf_file is not None or isinstance(self.section, HeadedModel)

    def fingerprint(self) -> str:
        """The base's fingerprint."""
        return inspection.fingerprint(self.source)

    def base_weight(self, module_name: str) -> Tensor:
        """The unchanged matrix (O, I) of a module, from the base."""
        name = f"{module_name}.weight"
        stored = self.tensors.read(self.aliases.get(name, name))
        return stored.t() if layer_kind(self.modules[module_name]) == "conv1d" else stored

    def trained_on(self, module_name: str) -> tuple[Tensor, Tensor | None]:
        """The matrix (O, I) and bias (O,) that training used, in float32. For a packed layer these are the unpacked
        numbers."""
        matrix, bias = self.base_weight(module_name).float(), self._bias(module_name)
        matrix = self._through_packing(matrix) if self.is_packed(module_name) else matrix
        return matrix, None if bias is None else bias.float()

    def _bias(self, module_name: str) -> Tensor | None:
        name = f"{module_name}.bias"
        stored_name = self.aliases.get(name, name)
        return self.tensors.read(stored_name) if stored_name in self.names else None

    def _find_aliases(self) -> dict[str, str]:
        """A mapping from matrices that the files leave out, because they are tied to another module's matrix, to the
        stored name of that matrix."""
        parameters = [
            (f"{name}.{parameter_name}", module, tensor)
            for name, module in self.modules.items()
            for parameter_name, tensor in module.named_parameters(recurse=False)
        ]
        stored = {id(tensor): (name, module) for name, module, tensor in parameters if name in self.names}
        omitted = [entry for entry in parameters if entry[0] not in self.names and id(entry[2]) in stored]
        return {name: stored[id(tensor)][0] for name, module, tensor in omitted if stored[id(tensor)][1] is not module}

    def write(self, folder: Path, changes: Changes) -> None:
        """Write config.json and the weights.

        Raises: ModelError if the base's files lack a changed tensor; NumericsError for NaN or infinity.
        """
        self._check(changes)
        config = self.configuration(changes)
        writer = ShardWriter(folder)
        # Packed layers use the current names of modules.
        older = {} if self.onto == "quantized" else self.tensors.older
        for name, tensor in self._outputs(changes):
            writer.add(older.get(name, name), tensor)
        writer.close()
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if self.generation_config is not None:
            self.generation_config.use_cache = True
            self.generation_config.save_pretrained(str(folder))

    def as_changes(self, tensors: Mapping[str, Tensor]) -> Changes:
        """Changes that replace parameters of the base by `tensors`. A parameter that is stored under several names is
        replaced under all of them."""
        aliases: dict[int, list[str]] = {}
        for name, parameter in self.net.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
        changes: dict[str, Callable[[Tensor], Tensor]] = {}
        for name, tensor in tensors.items():
            names = aliases[id(self.net.get_parameter(name))]
            stored = [alias for alias in names if self.aliases.get(alias, alias) in self.names]
            changes |= dict.fromkeys(stored or [name], partial(_replacement, tensor))
        return Changes({}, changes)

    def _check(self, changes: Changes) -> None:
        """Check that the base has every changed tensor. Raises: ModelError."""
        wanted = [f"{module}.weight" for module in changes.layers] + list(changes.parameters)
        absent = sorted(name for name in wanted if self.aliases.get(name, name) not in self.names)
        for name in [name for name in absent if name in changes.parameters]:
            pieces = StoredPieces(self.net, name, self.names)
            self.pieces |= dict.fromkeys(pieces.names, pieces)
            absent = [other for other in absent if other != name or not pieces.names]
        if absent:
            what = f"the base's files contain no tensor {absent[0]}, which the adapter changes ({len(absent)} missing)"
            how = "the base stores this tensor in a form that cannot be merged; use the adapter without merging it"
            raise ModelError(what, how)

    def unties(self, changes: Changes) -> bool:
        """Whether matrices that are tied in the base differ after the changes."""
        shared = set(self.aliases.values())
        groups = [{stored, *(name for name, its in self.aliases.items() if its == stored)} for stored in shared]
        if self.tied:
            groups.append({f"{self.head}.weight", f"{self.embedding}.weight"})
        touched = {f"{name}.weight" for name in changes.layers} | set(changes.parameters)
        group_changes = [
            {(changes.parameters.get(name), changes.layers.get(name.removesuffix(".weight"))) for name in group}
            for group in groups
            if group & touched
        ]
        return any(len(kinds) > 1 for kinds in group_changes)

    def tie(self, net: nn.Module) -> None:
        """Tie the head of a merged model to its embedding, if the base ties these two."""
        if self.tied and self.head is not None and self.embedding is not None:
            net.get_submodule(self.head).weight = net.get_submodule(self.embedding).weight
        if self.scales_tied_head:
            config = text_config(net)
            config.scale_decoder_outputs = config.tie_word_embeddings = True

    def output_bytes(self, changes: Changes) -> int:
        """The number of bytes that `write` writes, or an upper bound if weights are packed again."""
        more = self.aliases.values() if self.unties(changes) else ()
        names = [*self.names, *more]
        return sum(self.tensors.meta[name].numel() * self.dtype_of_output(name).itemsize for name in names)

    def dtype_of_output(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is written: float32 in a head that predicts numbers, otherwise `output_dtype`, or
        the stored dtype if that is None."""
        if self.exact_head is not None and name.startswith(f"{self.exact_head}."):
            return torch.float32
        stored = self.tensors.meta[self.aliases.get(name, name)].dtype
        return self.output_dtype if self.output_dtype is not None and stored.is_floating_point else stored

    def rounds(self) -> bool:
        """Whether the written dtype is less precise than float32, in which changes are computed."""
        dtypes = {self.dtype_of_output(name) for name in self.names}
        return any(dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize for dtype in dtypes)

    def fill(self, net: nn.Module, changes: Changes) -> None:
        """Fill a float32 net with the numbers that `write` would write, without rounding to the output dtype."""
        output_dtype, self.output_dtype = self.output_dtype, torch.float32
        places = dict(net.named_parameters(remove_duplicate=False))
        for name, tensor in self._outputs(changes):
            if name in places:
                places[name].data = tensor
        for pieces in set(self.pieces.values()):
            places[pieces.parameter].data = changes.changed(pieces.parameter, pieces.join(self.tensors.read))
        for name, stored in () if self.unties(changes) else self.aliases.items():
            places[name].data = places[stored].data
        self.output_dtype = output_dtype

    def configuration(self, changes: Changes) -> JsonObject:
        """The base's configuration, with only those changes that the new weights require."""
        if not self._writes_loaded_net:
            config = without_settings(inspection.read_config(self.source))
        else:
            self.config.use_cache = True
            config = json.loads(self.config.to_json_string()) | {"dtype": str(self.base_dtype())[6:]}
            config.pop("_name_or_path", None)  # a local path
            config = without_settings(config)
            config["architectures"] = [type(self.net).__name__]
        text = config.get("text_config") or config  # both may state a value, and transformers ties if one of them does
        if self.unties(changes):
            config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
            if self.scales_tied_head:
                config["scale_decoder_outputs"] = False  # `_layer` multiplies the head instead
        if changes.vocabulary_size is not None:
            for place in (text, config) if "vocab_size" in config else (text,):
                place["vocab_size"] = changes.vocabulary_size
        if self.output_dtype is not None:
            config["dtype"] = str(self.output_dtype).removeprefix("torch.")
        if self.onto == "quantized":
            config["quantization_config"] = {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "load_in_8bit": False,
                "bnb_4bit_quant_type": self.section.quantization,
                "bnb_4bit_use_double_quant": self.section.double_quantization,
                "bnb_4bit_compute_dtype": str(self.compute_dtype).removeprefix("torch."),
                "bnb_4bit_quant_storage": "uint8",
                "llm_int8_skip_modules": [
                    *dict.fromkeys([*self.family.head_modules(self.net), *self.new_modules]),
                    *sorted(uncalled_layers(self.modules)),
                ],
            }
        return config

    def outputs(self, changes: Changes) -> dict[str, tuple[torch.Size, Callable[[], Tensor]]]:
        """For every tensor that `write` would write, by its name in the files: its shape, and a function that computes
        it.

        Tensors that are computed together, such as a layer's weight and bias, stay in memory until a tensor of a
        different group is requested.
        Raises: ModelError if the base's files lack a changed tensor.
        """
        self._check(changes)
        names = [*self.tensors.meta, *(self.aliases if self.unties(changes) else ())]
        last: Tensors = {}

        def read(name: str) -> Tensor:
            if name not in last:
                last.clear()
                last.update(self._joint_outputs(name, changes))
            return last[name]

        shapes = {name: self.tensors.meta[self.aliases.get(name, name)].shape for name in names}
        if changes.vocabulary_size is not None:
            shapes |= {name: read(name).shape for name in names if name in changes.parameters}
        return {self.tensors.older.get(name, name): (shapes[name], partial(read, name)) for name in names}

    def _outputs(self, changes: Changes) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the new model with its name."""
        done: set[str] = set()
        for name in (*self.tensors.meta, *(self.aliases if self.unties(changes) else ())):
            module_name, _, suffix = name.rpartition(".")
            if name in done or (suffix == "bias" and module_name in changes.layers):
                continue  # a changed layer's bias is written with its weight
            for new_name, tensor in self._joint_outputs(name, changes):
                done.add(new_name)
                yield new_name, tensor

    def _joint_outputs(self, name: str, changes: Changes) -> Iterator[tuple[str, Tensor]]:
        """Yield a tensor of the new model, and all tensors that are computed together with this tensor."""
        module_name, _, suffix = name.rpartition(".")
        if name in self.pieces:
            pieces = self.pieces[name]
            changed = changes.changed(pieces.parameter, pieces.join(self.tensors.read))
            yield from ((piece, self._cast(piece, tensor)) for piece, tensor in pieces.split(changed).items())
        elif suffix == "bias" and module_name in changes.layers:
            yield from self._joint_outputs(f"{module_name}.weight", changes)
        elif suffix == "weight" and (module := self.modules.get(module_name)) is not None and layer_kind(module):
            bias = self._bias(module_name) if module_name in changes.layers else None
            yield from self._layer(module_name, self.tensors.read(self.aliases.get(name, name)), bias, changes)
        else:
            stored = self.tensors.read(self.aliases.get(name, name))
            yield name, self._cast(name, changes.changed(name, stored))

    def is_packed(self, module_name: str) -> bool:
        """Whether the layer was packed in training, so that training used the rounded numbers of the packed layer."""
        return self.section.quantization not in ("none", "kept") and module_name in self.packable_layers

    def _layer(
        self, module_name: str, stored: Tensor, bias: Tensor | None, changes: Changes
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of one layer: its weight, and its bias if the layer changes."""
        name = f"{module_name}.weight"
        packed = self.onto != "full" and self.is_packed(module_name)
        change, stored = changes.layers.get(module_name), changes.changed(name, stored)
        rescaled = self.scales_tied_head and module_name == self.head and self.unties(changes)
        if not packed and change is None and not rescaled:
            yield name, self._cast(name, stored)
            return
        transposed = layer_kind(self.modules[module_name]) == "conv1d"
        matrix = (stored.t() if transposed else stored).float()  # (O, I)
        if packed:
            matrix = self._through_packing(matrix)
        if change is not None:
            had_bias = bias is not None
            matrix, bias = change(matrix, None if bias is None else bias.float())
            if (bias is not None) != had_bias:
                raise ModelError(
                    f"the adapter adds a bias to {module_name}, which has none", "use the adapter without merging"
                )
        if rescaled:  # transformers scales logits only if the head is tied
            matrix = matrix * text_config(self.net).d_model ** -0.5
        if packed and self.onto == "quantized":
            _refuse_non_finite(name, matrix)
            saved = codec.saved_form(matrix.to(self.compute_dtype), *self._packing)
            yield from ((name + suffix, tensor) for suffix, tensor in saved.items())
        else:
            yield name, self._cast(name, matrix.t() if transposed else matrix)
        if bias is not None:
            yield f"{module_name}.bias", self._cast(f"{module_name}.bias", bias)

    def _through_packing(self, matrix: Tensor) -> Tensor:
        """The matrix that training used, (O, I) float32: packed as load_model packs it, then unpacked."""
        packed = codec.pack(matrix.to(self.compute_dtype), *self._packing)
        return codec.unpack(packed, (matrix.shape[0], matrix.shape[1]), self.section.quantization, torch.float32)

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        """Convert a tensor to the dtype in which it is written. No other step rounds the tensor."""
        result = tensor.to(self.dtype_of_output(name))
        if result.is_floating_point():
            _refuse_non_finite(name, result)
        return result


def _replacement(tensor: Tensor, _old: Tensor) -> Tensor:
    """A change that replaces the old tensor by `tensor`."""
    return tensor.detach().float().cpu()


def _refuse_non_finite(name: str, tensor: Tensor) -> None:
    # without a temporary tensor of this size
    if tensor.numel() and not bool(torch.stack(tensor.aminmax()).isfinite().all()):
        raise NumericsError(f"{name} would contain NaN or infinity", "training diverged; nothing was written")
