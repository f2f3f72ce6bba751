"""Attaches the adapter and initialises it: with default values, from the base's unquantized weights, from data, or from
a trained adapter.

A resumed run restores its values from the checkpoint, so the data is not read again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.base import slot_count
from tunekit.adapters.folder.read import load_into
from tunekit.adapters.method import load_method
from tunekit.adapters.starts.start import initialise_all, start_module
from tunekit.adapters.targets import find_targets
from tunekit.contracts import Companion
from tunekit.machine.devices import Devices
from tunekit.model.load import LoadedModel
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.records import JsonObject, Target
from tunekit.training.calibrate import calibrate
from tunekit.training.planned import Planned
from tunekit.tuned.originals import originals

Layout = Sequence[Mapping[str, Sequence[int]]]  # a checkpoint's layout, for each group: name -> [start, *shape]


def initialise_adapter(
    base: LoadedModel,
    planned: Planned,
    *,
    seed: int,
    devices: Devices,
    resumed: Layout | None,
    companions: Mapping[str, Companion],
) -> tuple[AttachedAdapter, JsonObject | None]:
    """Attach the adapter and initialise it. Returns the adapter and, if the initialisation read data (a calibration),
    its cost.

    `resumed`: the layout of the checkpoint that will be restored later; None for a new run.
    Raises: RecipeError, DataError or ModelError if something that the initialisation needs is missing.
    """
    settings, head_name, start = planned.adapter, base.family.head_name(base.net), planned.adapter.calibration
    attach = partial(attach_adapter, base.net, settings, seed=seed, head_name=head_name, device=base.device)
    facts = None
    if start is None:
        adapter, other = attach(), settings.initialisation
        if other is not None and other.looks_at == "original" and resumed is None:
            initialise_all(adapter.layers, seed, originals(adapter, planned.model))
            _copy_from_main(adapter, devices)
    else:
        targets = find_targets(base.net, settings, head_name=head_name)
        if resumed is not None:
            ranks = {target.name: _resumed_rank(target, resumed) for target in targets}
            adapter = attach(targets=with_ranks(settings, targets, ranks))
        else:
            steps, objective = planned.rows.steps(planned.batch_settings), planned.rows.objective
            evidence, facts = calibrate(base, start, targets, steps, objective, seed=seed, companions=companions)
            share = getattr(start_module(start.method), "share_ranks", None)
            if share is not None:
                targets = with_ranks(settings, targets, devices.from_main(share(start, targets, evidence)))
            adapter = attach(targets=targets)
            initialise_all(adapter.layers, seed, evidence.get)
            _copy_from_main(adapter, devices)
    if settings.init_from is not None and resumed is None:
        load_into(adapter, Path(settings.init_from), base_fingerprint=base.fingerprint)
    return adapter, facts


def with_ranks(settings: AdapterSettings, targets: Sequence[Target], ranks: Mapping[str, int | None]) -> list[Target]:
    """A copy of the targets (adapted layers) with new ranks. `ranks`: the rank by layer name; rank 0 removes the
    target. A target without a rank in `ranks` stays unchanged."""
    layer, start = load_method(settings.method).layer, settings.initialisation
    assert layer is not None
    assert start is not None
    changed: list[Target] = []
    for target in targets:
        rank = ranks.get(target.name)
        if rank is None or rank == target.r or target.r is None:
            changed.append(target)
        elif rank:
            alpha = start_module(start.method).alpha_of(settings, target, rank)
            new = replace(target, r=rank, alpha=alpha)
            changed.append(replace(new, trainable_parameters=slot_count(layer.slots(settings, new).values())))
    return changed


def _resumed_rank(target: Target, layout: Layout) -> int | None:
    """The rank of a layer in a checkpoint; 0 if the checkpoint does not contain this layer. None for a kind of layer
    whose rank no initialisation changes."""
    if target.kind not in ("linear", "conv1d"):
        return None
    shapes = [group[f"{target.name}.lora_B.weight"] for group in layout if f"{target.name}.lora_B.weight" in group]
    return shapes[0][-1] if shapes else 0


def _copy_from_main(adapter: AttachedAdapter, devices: Devices) -> None:
    """Copy the adapter's values from the main rank to all other ranks. Matrix decompositions on two devices may differ
    by a sign."""
    if devices.world == 1:
        return
    with torch.no_grad():
        tensors = list(adapter.state().values())
        for tensor in tensors:
            tensor.mul_(float(devices.is_main))
        devices.sum_in_place(tensors)
