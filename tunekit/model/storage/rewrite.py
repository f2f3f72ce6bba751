"""A base written anew with some of its matrices changed: tensor by tensor, in float32, with one cast at the end."""

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
from tunekit.model.load import LoadedModel, load_model, make_meta_model
from tunekit.model.quantized import codec
from tunekit.model.quantized.weights import layer_kind
from tunekit.model.storage import inspection
from tunekit.model.storage.converted import StoredPieces, stored_names
from tunekit.model.storage.packing import packable
from tunekit.model.storage.shards import ShardReader, ShardWriter, read_headers
from tunekit.model.storage.source import ModelSource, find_source
from tunekit.model.uncalled import uncalled_layers
from tunekit.recipe.model import HeadedModel, ModelSection
from tunekit.records import JsonObject

if TYPE_CHECKING:
    from transformers import GenerationConfig

# (weight (O, I) float32, bias (O,) float32 or None) -> the same two, changed
MatrixChange = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Changes:
    """What becomes of the base: layers by module name; whole parameters by parameter name, before a layer's change."""

    layers: Mapping[str, MatrixChange]
    parameters: Mapping[str, Callable[[Tensor], Tensor]]
    vocabulary_size: int | None = None  # where it becomes another

    def changed(self, name: str, stored: Tensor) -> Tensor:
        """A whole parameter after its change, float32; as it is stored where there is none."""
        change = self.parameters.get(name)
        return stored if change is None else change(stored.float())


class BaseTensors:
    """The base's tensors under the names of the net's parameters, read one at a time.

    A checkpoint may leave out the base model's prefix, or have the names of an older version. A tensor that is no
    parameter of the net keeps its own name.
    """

    def __init__(self, folder: Path, net: nn.Module) -> None:
        self.reader, renamed = ShardReader(folder), stored_names(net)
        parameters, prefix = frozenset(net.state_dict()), str(getattr(net, "base_model_prefix", ""))
        self.files: dict[str, str] = {}  # net's name -> name in the file
        for name in self.reader:
            candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
            own = next((each for each in candidates if each in parameters), renamed.get(name, name))
            self.files[own] = name
        self.older = {own: name for own, name in self.files.items() if renamed.get(name) == own}
        entries = {own: self.reader.headers[name] for own, name in self.files.items()}
        # name -> shape and dtype of what is written, as a tensor without values
        self.meta = {own: torch.empty(each.shape, dtype=each.dtype, device="meta") for own, each in entries.items()}

    def read(self, name: str) -> Tensor:
        return self.reader.read(self.files[name])


class LoadedTensors:
    """The same of a net in memory, for bases that only transformers can read (GGUF); `dtype` is what is written."""

    def __init__(self, net: nn.Module, tied_head: str | None, dtype: torch.dtype) -> None:
        stored: Tensors = dict(net.state_dict(keep_vars=True))
        stored.pop(f"{tied_head}.weight", None)
        once = {id(tensor): name for name, tensor in reversed(stored.items())}  # of tied ones the first name
        self.tensors = {name: tensor.detach() for name, tensor in stored.items() if once[id(tensor)] == name}
        self.meta = {name: tensor.to("meta") for name, tensor in self.tensors.items()}
        self.meta |= {name: each.to(dtype) for name, each in self.meta.items() if each.is_floating_point()}
        self.older: dict[str, str] = {}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


class Rewriter:
    """One base with its changes. `onto`: full (the base's own weights), dequantized (those that its packed form
    stands for), or quantized (dequantized, changed, and packed again). `written`: the dtype of all numbers that are
    written, in place of each tensor's own. `loaded`: the base, where it is in memory already; asked for only where its
    files are not those of the net that is written."""

    def __init__(
        self, section: ModelSection, onto: str, written: torch.dtype | None = None, loaded: LoadedModel | None = None
    ) -> None:
        self.section, self.onto, self.written, self.loaded = section, onto, written, loaded
        device = torch.device("cpu")
        self.compute_dtype = resolve_dtype(section, device)
        self.source: ModelSource = find_source(section, weights=True)
        plain = section.model_copy(update={"quantization": "none"})
        meta = make_meta_model(plain, device=device)
        self.family, self.net, self.config = meta.family, meta.net, meta.config
        self.new_modules = meta.new_modules
        self.head = self.family.head_name(self.net)
        self.embedding = self.family.embedding_name(self.net)
        self.tied = self.family.tied(self.net)
        self.modules = dict(self.net.named_modules(remove_duplicate=False))
        self.packable = packable(self.net, self.family, self.new_modules)
        self.pieces: dict[str, StoredPieces] = {}  # name in the files -> the changed parameter that it is a piece of
        self.generation_config: GenerationConfig | None = None  # of a base that has no file of that name to copy
        self.tensors = self._open(plain)
        self.names = frozenset(self.tensors.meta)
        self.aliases = self._find_aliases()
        self._packing = (section.quantization, section.double_quantization)

    def _open(self, plain: ModelSection) -> BaseTensors | LoadedTensors:
        if not self._rewritten:
            return BaseTensors(self.source.folder, self.net)
        wide = plain.model_copy(update={"dtype": "float32"})
        loaded = self.loaded or load_model(wide, device=torch.device("cpu"))
        self.generation_config = loaded.generation_config
        if self.loaded is not None and self.source.gguf_file is None:  # as wide as the base's own files
            stored = {each.dtype for each in read_headers(self.source.folder).values() if each.dtype.is_floating_point}
            self.written = max(stored, key=lambda dtype: dtype.itemsize)
        return LoadedTensors(loaded.net, self.head if self.tied else None, self._own_dtype())

    def _own_dtype(self) -> torch.dtype:
        """Of the base's files: that of their largest tensor; of a GGUF file the one that is computed in."""
        if self.source.gguf_file is not None:
            return self.compute_dtype
        entries = [each for each in read_headers(self.source.folder).values() if each.dtype.is_floating_point]
        return max(entries, key=lambda each: math.prod(each.shape)).dtype

    @property
    def _rewritten(self) -> bool:
        """Whether the new files are written from the net in memory: those of the base are no files of this net."""
        return self.source.gguf_file is not None or isinstance(self.section, HeadedModel)

    def fingerprint(self) -> str:
        """The base's fingerprint."""
        return inspection.fingerprint(self.source)

    def base_weight(self, module_name: str) -> Tensor:
        """The base's own matrix (O, I) of a module."""
        name = f"{module_name}.weight"
        stored = self.tensors.read(self.aliases.get(name, name))
        return stored.t() if layer_kind(self.modules[module_name]) == "conv1d" else stored

    def trained_on(self, module_name: str) -> tuple[Tensor, Tensor | None]:
        """The matrix (O, I) and bias (O,), float32, that training saw: of a packed layer what its packed form means."""
        matrix, bias_name = self.base_weight(module_name).float(), f"{module_name}.bias"
        bias = self.tensors.read(bias_name).float() if bias_name in self.names else None
        return self._through_packing(matrix) if self.is_packed(module_name) else matrix, bias

    def _find_aliases(self) -> dict[str, str]:
        """Matrices that the files leave out, since they are another module's: name -> that one's."""
        found = [
            (f"{name}.{own}", module, tensor)
            for name, module in self.modules.items()
            for own, tensor in module.named_parameters(recurse=False)
        ]
        stored = {id(tensor): (name, module) for name, module, tensor in found if name in self.names}
        left_out = [each for each in found if each[0] not in self.names and id(each[2]) in stored]
        return {name: stored[id(tensor)][0] for name, module, tensor in left_out if stored[id(tensor)][1] is not module}

    def write(self, folder: Path, changes: Changes) -> None:
        """Write config.json and the weights.

        Raises: ModelError where the base's files lack a changed tensor; NumericsError for numbers that are not finite.
        """
        self._check(changes)
        config = self._configuration(changes)
        writer = ShardWriter(folder)
        # Packed layers have the names of today's modules.
        older = {} if self.onto == "quantized" else self.tensors.older
        for name, tensor in self._outputs(changes):
            writer.add(older.get(name, name), tensor)
        writer.close()
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if self.generation_config is not None:
            self.generation_config.use_cache = True
            self.generation_config.save_pretrained(str(folder))

    def as_changes(self, tensors: Mapping[str, Tensor]) -> Changes:
        """Parameters of a net that take the place of the base's, each under every name that the files have for it."""
        aliases: dict[int, list[str]] = {}
        for name, parameter in self.net.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
        changes: dict[str, Callable[[Tensor], Tensor]] = {}
        for name, tensor in tensors.items():
            every = aliases[id(self.net.get_parameter(name))]
            stored = [each for each in every if self.aliases.get(each, each) in self.names]
            changes |= dict.fromkeys(stored or [name], partial(_taken, tensor))
        return Changes({}, changes)

    def _check(self, changes: Changes) -> None:
        """Every change must have its tensor."""
        wanted = [f"{module}.weight" for module in changes.layers] + list(changes.parameters)
        absent = sorted(name for name in wanted if self.aliases.get(name, name) not in self.names)
        for name in [name for name in absent if name in changes.parameters]:
            pieces = StoredPieces(self.net, name, self.names)
            self.pieces |= dict.fromkeys(pieces.names, pieces)
            absent = [other for other in absent if other != name or not pieces.names]
        if absent:
            what = f"the base's files hold no tensor {absent[0]}, which the adapter changes ({len(absent)} such)"
            how = "it stores that in another form, into which nothing can be merged: use the adapter with its base"
            raise ModelError(what, how)

    def unties(self, changes: Changes) -> bool:
        """Whether matrices that were one are several afterwards. The same change of all of them keeps them one."""
        shared = set(self.aliases.values())
        groups = [{stored, *(name for name, its in self.aliases.items() if its == stored)} for stored in shared]
        if self.tied:
            groups.append({f"{self.head}.weight", f"{self.embedding}.weight"})
        touched = {f"{name}.weight" for name in changes.layers} | set(changes.parameters)
        made = [
            {(changes.parameters.get(name), changes.layers.get(name.removesuffix(".weight"))) for name in group}
            for group in groups
            if group & touched
        ]
        return any(len(each) > 1 for each in made)

    def output_bytes(self, changes: Changes) -> int:
        """Bytes of the weights that `write` writes (a little less where they are packed again)."""
        more = self.aliases.values() if self.unties(changes) else ()
        names = [*self.names, *more]
        return sum(self.tensors.meta[name].numel() * self.written_dtype(name).itemsize for name in names)

    def written_dtype(self, name: str) -> torch.dtype:
        """In which a tensor is written: the base's own, or the one that was asked for."""
        own = self.tensors.meta[self.aliases.get(name, name)].dtype
        return self.written if self.written is not None and own.is_floating_point else own

    def rounds(self) -> bool:
        """Whether what is written has less precision than the float32 in which it is computed."""
        dtypes = {self.written_dtype(name) for name in self.names}
        return any(dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize for dtype in dtypes)

    def fill(self, net: nn.Module, changes: Changes) -> None:
        """Give a float32 net of the new model what `write` would write, before it is rounded."""
        asked, self.written = self.written, torch.float32
        places = dict(net.named_parameters(remove_duplicate=False))
        for name, tensor in self._outputs(changes):
            if name in places:
                places[name].data = tensor
        for pieces in set(self.pieces.values()):
            places[pieces.parameter].data = changes.changed(pieces.parameter, pieces.join(self.tensors.read))
        for name, stored in () if self.unties(changes) else self.aliases.items():
            places[name].data = places[stored].data
        self.written = asked

    def _configuration(self, changes: Changes) -> JsonObject:
        """The base's configuration; changed only where the new weights differ from it."""
        if not self._rewritten:
            config = inspection.read_config(self.source)
        else:
            self.config.use_cache = True
            config = json.loads(self.config.to_json_string()) | {"dtype": str(self._own_dtype())[6:]}
            for key in ("quantization_config", "_name_or_path"):  # the file's packing, and a path of this machine
                config.pop(key, None)
            config["architectures"] = [type(self.net).__name__]
        if self.unties(changes):
            config["tie_word_embeddings"] = False
        if changes.vocabulary_size is not None:
            config["vocab_size"] = changes.vocabulary_size
        if self.written is not None:
            config["dtype"] = str(self.written).removeprefix("torch.")
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

    def _outputs(self, changes: Changes) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the new model, by name."""
        done: set[str] = set()
        for name in self.tensors.meta:
            module_name, _, suffix = name.rpartition(".")
            if name in done or (suffix == "bias" and module_name in changes.layers):
                continue  # a changed layer's bias comes with its weight
            if name in self.pieces:
                pieces = self.pieces[name]
                done.update(pieces.names)
                whole = changes.changed(pieces.parameter, pieces.join(self.tensors.read))
                yield from ((piece, self._cast(piece, tensor)) for piece, tensor in pieces.split(whole).items())
                continue
            module = self.modules.get(module_name)
            if suffix == "weight" and module is not None and layer_kind(module) is not None:
                bias_name = f"{module_name}.bias"
                changed_bias = module_name in changes.layers and bias_name in self.names
                bias = self.tensors.read(bias_name) if changed_bias else None
                for new_name, tensor in self._layer(module_name, self.tensors.read(name), bias, changes):
                    done.add(new_name)
                    yield new_name, tensor
            else:
                yield name, self._cast(name, changes.changed(name, self.tensors.read(name)))
        for name, stored in self.aliases.items() if self.unties(changes) else ():
            yield from self._layer(name.removesuffix(".weight"), self.tensors.read(stored), None, changes)

    def is_packed(self, module_name: str) -> bool:
        """Whether training saw this layer's matrix packed."""
        return self.section.quantization != "none" and module_name in self.packable

    def _layer(
        self, module_name: str, stored: Tensor, bias: Tensor | None, changes: Changes
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one layer: weight, and bias where the change concerns the layer."""
        name = f"{module_name}.weight"
        packed = self.onto != "full" and self.is_packed(module_name)
        change, stored = changes.layers.get(module_name), changes.changed(name, stored)
        if not packed and change is None:
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
                raise ModelError(f"the adapter adds a bias to {module_name}, which has none", "it cannot be merged")
        if packed and self.onto == "quantized":
            _refuse_non_finite(name, matrix)
            saved = codec.saved_form(matrix.to(self.compute_dtype), *self._packing)
            yield from ((name + suffix, tensor) for suffix, tensor in saved.items())
        else:
            yield name, self._cast(name, matrix.t() if transposed else matrix)
        if bias is not None:
            yield f"{module_name}.bias", self._cast(f"{module_name}.bias", bias)

    def _through_packing(self, matrix: Tensor) -> Tensor:
        """What training read: the matrix packed as load_model packs it, and unpacked; (O, I) float32."""
        packed = codec.pack(matrix.to(self.compute_dtype), *self._packing)
        return codec.unpack(packed, (matrix.shape[0], matrix.shape[1]), self.section.quantization, torch.float32)

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        """The one cast, to the dtype in which the tensor is written."""
        result = tensor.to(self.written_dtype(name))
        if result.is_floating_point():
            _refuse_non_finite(name, result)
        return result


def _taken(tensor: Tensor, _old: Tensor) -> Tensor:
    """A change that does not ask what was there."""
    return tensor.detach().float().cpu()


def _refuse_non_finite(name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise NumericsError(f"{name} would hold NaN or infinity", "training diverged; nothing was written")
