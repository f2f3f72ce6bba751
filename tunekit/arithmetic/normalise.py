"""Converts adapters of tunekit or PEFT to plain low-rank pairs that other programs can read. The conversion is exact
unless a rank is given.

Programs read different formats: many ignore rsLoRA and patterns, some require the same rank in all layers, and few read
methods other than LoRA.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.adapters.expert_parameters import EVERYTHING, ParameterAdapter
from tunekit.adapters.folder.config import CONFIG_NAME, read_adapter_config
from tunekit.arithmetic.lora_folder import PREFIX, LoraFolder, plain_lora_method
from tunekit.arithmetic.low_rank import LowRank
from tunekit.arithmetic.moved_starts import read_started_lora, start_of, untouched_updates
from tunekit.arithmetic.nearest_lora import NotLowRank, RankLoss, layer_updates
from tunekit.arithmetic.on_base import attach_to_base
from tunekit.arithmetic.write import base_of, write_lora
from tunekit.errors import AdapterError
from tunekit.files.work_folder import temporary_folder
from tunekit.model.storage.converted import StoredPieces
from tunekit.records import with_article
from tunekit.targets.target import TargetSpec, base_override, find_target

MERGE = "merge it instead"


@dataclass(frozen=True)
class PlainAdapter:
    """An adapter as low-rank updates B A in float32, without scaling: s = 1, alpha = rank.

    `pairs`: the updates by module name. If transformers renames a module, the name in the base's files is used. Each
    expert of a fused parameter is a module, such as model.layers.0.mlp.experts.3.gate_proj.
    `rest`: all other trained tensors, by PEFT's key: copies of modules, rows of embeddings, biases, added rows. A
    format that cannot hold these tensors must refuse the adapter.
    `embedding`, `head`: the base's module names; `tied`: whether the two share a matrix. An update of one of them never
    changes the other.
    `conv1d`: whether modules of the base store their matrices (I, O).
    `losses`: the error of each update of a layer; 0 unless a rank was given.
    """

    pairs: Mapping[str, LowRank]
    rest: Mapping[str, Tensor] = field(default_factory=dict)
    embedding: str | None = None
    head: str | None = None
    tied: bool = False
    conv1d: bool = False
    losses: Mapping[str, RankLoss] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The highest rank; 0 without pairs."""
        return max((pair.rank for pair in self.pairs.values()), default=0)

    @property
    def tied_pairs(self) -> list[str]:
        """Which of the two modules, embedding and head, the adapter changes if the base ties them. Otherwise empty."""
        return [name for name in (self.embedding, self.head) if self.tied and name is not None and name in self.pairs]

    @property
    def experts(self) -> list[str]:
        """The names of the adapted modules that are experts of a mixture."""
        return [name for name in self.pairs if ".experts." in name]

    def padded(self, rank: int | None = None) -> "PlainAdapter":
        """The same adapter with all pairs padded with zeros to the same rank. By default, this is the highest rank."""
        size = self.rank if rank is None else rank
        return replace(self, pairs={name: pair.padded(size) for name, pair in self.pairs.items()})


def find_plain_target(name: str, base: str | None, overrides: Sequence[str]) -> TargetSpec:
    """Finds the model and adapter that the argument TARGET names, as find_target does. If the initialisation of a PEFT
    adapter moved weights of the base, as PiSSA does, the adapter is first converted to plain LoRA in a temporary
    folder.

    Raises: InputError as find_target does; AdapterError if the initialisation cannot be computed again.
    """
    folder = Path(name).expanduser()
    start = start_of(folder) if (folder / CONFIG_NAME).is_file() else None
    if start is None:
        return find_target(name, base, overrides)
    lora = read_started_lora(folder, start)
    try:
        updates, _ = untouched_updates(lora, start, None, base_override(base))
    except AdapterError as error:
        wrong = error.problems[0]
        how = f"convert it first: tunekit adapter convert {name} --initial DIR --output PLAIN"
        raise AdapterError(wrong.what, how, file=wrong.file, key=wrong.key) from error
    holder = temporary_folder()
    plain = Path(holder.name) / "adapter"
    write_lora(plain, base_of([lora.config], base), lora, updates)
    return replace(find_target(str(plain), base, overrides), holder=holder)


def normalise(target: TargetSpec, rank: int | None = None) -> PlainAdapter:
    """The target's adapter as low-rank pairs. Without `rank` they are exact; with `rank` they are the nearest pairs of
    at most this rank.

    `target`: with the model section of its objective. Raises: NotLowRank if no rank was given and there is no exact
    low-rank form, so that only a merged model computes the same; AdapterError for prompts, which do not change weights.
    """
    assert target.adapter is not None
    config = read_adapter_config(target.adapter)
    attached, rewriter = attach_to_base(target.adapter, target.model)
    if attached.model_adapter is not None:
        method = with_article(config.settings.method)
        what = f"{method} adapter does not change weights, so no other program can load it"
        raise AdapterError(what, "use it with tunekit", file=config.file)
    updates, losses, others, _ = layer_updates(attached, config, rewriter.trained_on, rank)
    for name, rows in attached.added_rows.items():
        others.setdefault(f"{PREFIX}{name}.weight", rows)
    older = rewriter.tensors.older

    def renamed(name: str | None) -> str | None:
        return name and older.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")

    pairs = {str(renamed(name)): update for name, update in updates.items()}
    for name, adapter in attached.parameters.items():
        pairs |= _parameter_pairs(adapter, rewriter.net, name, older.get(name, name), config.file)
    conv1d = any(target.kind == "conv1d" for target in attached.targets)
    return PlainAdapter(
        dict(sorted(pairs.items())),
        others,
        renamed(rewriter.embedding),
        renamed(rewriter.head),
        rewriter.tied,
        conv1d,
        losses,
    )


@torch.no_grad()
def _parameter_pairs(
    adapter: ParameterAdapter[Any], net: nn.Module, name: str, stored_name: str, file: str
) -> dict[str, LowRank]:
    """The low-rank pairs of an adapted parameter: one pair for a matrix (O, I), or one pair for each module of an
    expert in the base's files.

    Raises: NotLowRank if the base's files store all experts in one tensor, so that no module can be named.
    """
    factors = adapter.factors(EVERYTHING)
    if factors is None:
        raise NotLowRank(f"the update of '{name}' has no low-rank form", MERGE, file=file)
    left, right = factors  # (E, P, R), (E, R, Q); of a matrix (P, R), (R, Q)
    if left.dim() == 2:
        return {stored_name.removesuffix(".weight"): LowRank(right.contiguous(), left.contiguous(), 1.0)}
    matrices = None if adapter.target.transposed else StoredPieces(net, name, ()).matrices()
    if matrices is None:
        what = f"the base's files do not store each expert of '{name}' as a separate module (O, I)"
        raise NotLowRank(what, MERGE, file=file)
    return {
        key.removesuffix(".weight"): LowRank(
            right[expert][:, columns].contiguous(), left[expert][rows].contiguous(), 1.0
        )
        for key, (expert, rows, columns) in matrices.items()
    }


def write_plain(output: Path, target: TargetSpec, plain: PlainAdapter) -> int:
    """Write a PEFT folder with these pairs, all padded to one rank. Returns its size in bytes. `rest` is not
    written."""
    assert target.adapter is not None
    config, method = read_adapter_config(target.adapter), plain_lora_method()
    lora = LoraFolder(replace(config, method=method, settings=method.peft.settings()), {}, {}, None, plain.conv1d)
    return write_lora(output, base_of([config], target.model.name_or_path), lora, plain.padded().pairs)
