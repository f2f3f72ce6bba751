"""The states of a run's adapter at the checkpoints that were not deleted, on one loaded base."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.folder.config import read_adapter_config
from tunekit.adapters.folder.read import load_into
from tunekit.adapters.method import starts_as_base
from tunekit.adapters.starts.start import initialise_all
from tunekit.artifacts.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from tunekit.artifacts.manifest import checkpoint_name
from tunekit.contracts import Objective
from tunekit.errors import RunFolderError, TunekitError
from tunekit.model.load import LoadedModel
from tunekit.records import Target
from tunekit.targets.export import STEP_0, adapter_state
from tunekit.targets.reference import load_reference
from tunekit.targets.target import LoadedTarget, TargetSpec, load_base, load_target
from tunekit.tuned.network import prepare_network
from tunekit.tuned.originals import originals

BASE_BACK = "put the run's base back in its place"


@dataclass(frozen=True)
class RunState:
    """A state of the adapter: its step, its learning rate (0 if unknown), and a function that loads it."""

    step: int
    rate: float
    load: Callable[[], None] = field(default=lambda: None)


def checkpoint_steps(target: TargetSpec) -> list[int]:
    """The steps of the run's checkpoints that `load_states` uses, in order. Empty if the run trained the whole model:
    its checkpoints contain no adapter."""
    if target.run is None or target.recipe is None or target.recipe.adapter.trains_base:
        return []
    return sorted(step for step, _ in list_checkpoints(target.run / "checkpoints"))


def refuse_damaged_states(target: TargetSpec) -> None:
    """Raises: RunFolderError if a checkpoint is damaged. This is checked before hours of work on the others."""
    for step in checkpoint_steps(target):
        assert target.run is not None
        try:
            load_checkpoint(target.run / "checkpoints" / checkpoint_name(step))
        except RunFolderError as error:
            how = "restore it from a copy, or remove its folder: then only the other checkpoints are used"
            raise RunFolderError(error.problems[0].what, how) from error


def load_states(
    target: TargetSpec, device: torch.device, rates: Mapping[int, float], objective: Objective | None = None
) -> tuple[LoadedTarget, list[RunState]]:
    """Load the run's base once, and return it with the states of the run's adapter, in the order of their steps.
    Without checkpoints, the only state is the run's result. `rates`: the learning rate of each step. `objective`: the
    objective that has learned from the run's rows; with it, the base has the same new head as before training.

    Raises: RunFolderError if a checkpoint is damaged, or if it belongs to a different adapter or base.
    """
    steps, objective = checkpoint_steps(target), None if target.adapter is None else objective  # a whole model has one
    if not steps or target.run is None:
        loaded = load_target(target, device, objective)
        load_reference(loaded)
        return loaded, [RunState(max(rates, default=0), 0.0)]
    folders = dict(list_checkpoints(target.run / "checkpoints"))
    last = load_checkpoint(folders[steps[-1]])
    if last.facts.get("export") is None:
        what = f"{last.path} was written by an older tunekit, which did not state the adapter's layers"
        raise RunFolderError(what, "remove the folder 'checkpoints'; then only the run's result is used")
    spec, base, processor, objective = load_base(target, device, target.choice, objective)
    if base.fingerprint != last.facts["fingerprint"]["base"]:
        what = f"the run was trained on a different base than {spec.model.name_or_path} (their fingerprints differ)"
        raise RunFolderError(what, BASE_BACK)
    model = prepare_network(base, target.choice, lambda: _attach(base, spec, last))
    loaded = LoadedTarget(spec, model, processor, objective)
    load_reference(loaded)
    adapter = model.adapter
    assert adapter is not None

    def loader(step: int) -> Callable[[], None]:
        def load() -> None:
            saved = load_checkpoint(folders[step])
            adapter.load_state(adapter_state(saved.tensors, saved.facts["layout"]))

        return load

    return loaded, [RunState(step, rates.get(step, 0.0), loader(step)) for step in steps]


def _attach(base: LoadedModel, target: TargetSpec, saved: Checkpoint) -> AttachedAdapter:
    """Attach the adapter of a checkpoint to its base. Its tensors have their initial values if the base alone is not
    the policy at step 0; otherwise they have no values."""
    facts = saved.facts["export"]
    assert target.recipe is not None
    settings = type(target.recipe.adapter).model_validate(facts["settings"])
    settings = settings.model_copy(update={"init_from": target.recipe.adapter.init_from})
    targets: Sequence[Target] = [Target(**each) for each in facts["targets"]]
    return attach_adapter(
        base.net,
        settings,
        seed=target.seed,
        head_name=base.family.head_name(base.net),
        device=base.device,
        targets=list(targets),
        loads_state=starts_as_base(settings, exported=True),
    )


def knows_step_0(target: TargetSpec) -> bool:
    """Whether `keep_step_0` will know the policy at step 0, decided from the run's files."""
    if target.adapter is None or target.recipe is None:
        return False
    settings = target.recipe.adapter
    facts = read_adapter_config(target.adapter).objective or {}
    if starts_as_base(settings, exported=True) or facts.keys() >= STEP_0.keys():
        return True
    if not checkpoint_steps(target):
        return False  # the result does not contain all tensors
    if settings.init_from is None:
        start = settings.initialisation  # a streamed base is not in memory to be decomposed
        return start is None or start.looks_at != "original" or target.choice.streaming == "off"
    try:
        read_adapter_config(Path(settings.init_from)).check_files()
    except TunekitError:
        return False
    return True


def keep_step_0(loaded: LoadedTarget) -> bool:
    """Store the adapter's state at step 0 in the model, unless the base alone is the policy at step 0. Call this before
    a state is loaded. Returns whether the policy at step 0 is known."""
    model, target = loaded.model, loaded.target
    if not knows_step_0(target):
        return False
    assert target.recipe is not None
    assert model.adapter is not None
    settings, start = target.recipe.adapter, target.recipe.adapter.initialisation
    if model.reference_state is not None or starts_as_base(settings, exported=True):
        return True
    if settings.init_from is not None:
        try:
            load_into(model.adapter, Path(settings.init_from), base_fingerprint=model.base.fingerprint)
        except TunekitError:
            return False
    elif start is not None and start.looks_at == "original":
        initialise_all(model.adapter.layers, target.seed, originals(model.adapter, target.model))
    model.keep_reference()
    return True
