"""Loads the reference model of a finished run, if the reference is the adapter at step 0 and not the bare base."""

from tunekit.adapters.folder.config import read_adapter_config
from tunekit.artifacts.checkpoint import list_checkpoints, load_checkpoint
from tunekit.errors import InputError
from tunekit.targets.export import REFERENCE_PREFIX, STEP_0, with_prefix
from tunekit.targets.target import LoadedTarget


def load_reference(loaded: LoadedTarget) -> None:
    """Load the adapter's state at step 0 into the model, if the objective compares with this state.

    Raises: InputError if no checkpoint of the adapter's run contains this state, or if the run trained every weight.
    """
    target, model = loaded.target, loaded.model
    whole = target.run is not None and target.recipe is not None and target.recipe.adapter.trains_base
    if whole and loaded.objective.loss.reference:
        what = f"{loaded.objective.name} compares this model with the base at step 0, which the run's result replaces"
        raise InputError(what, f"read the evaluations of the run: tunekit report {target.run}")
    facts = {} if target.adapter is None else read_adapter_config(target.adapter).objective or {}
    if not STEP_0.keys() <= facts.keys() or model.adapter is None:
        return
    checkpoints = [] if target.run is None else list_checkpoints(target.run / "checkpoints")
    saved = with_prefix(load_checkpoint(checkpoints[0][1]).tensors, REFERENCE_PREFIX) if checkpoints else {}
    state = model.adapter.state()
    if any(name not in saved or saved[name].shape != tensor.shape for name, tensor in state.items()):
        name = loaded.objective.name
        what = f"{name} compares this adapter with its state at step 0, which only its run's checkpoints contain"
        raise InputError(what, "name the run, with an unchanged folder 'checkpoints'")
    model.reference_state = {name: saved[name].to(tensor.device) for name, tensor in state.items()}
