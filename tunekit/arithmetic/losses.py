"""Computes the loss of a base without adapter, and with each of two adapters, on the same rows."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tunekit.adapters.folder.read import attach_adapter_folder
from tunekit.adapters.several import AdapterSet
from tunekit.data.rows import load_evaluation_rows
from tunekit.evaluation.evaluator import adapter_losses
from tunekit.machine.devices import make_devices
from tunekit.recipe.data import DataSection, Source
from tunekit.targets.target import find_target, load_base


def losses_on_rows(folders: Sequence[Path], data: str, base: str | None, *, allow_code: bool = False) -> list[float]:
    """Returns three losses on the same rows: of the base alone, of adapter A and of adapter B. The base is loaded
    once. `allow_code`: the code of a run's base may run."""
    target = find_target(str(folders[0]), base, [], allow_code=allow_code)
    source = Source(path=str(Path(data).resolve()) if Path(data).exists() else data)
    template = None if target.template_file is None else str(target.template_file)
    section = DataSection(train=(source,), eval=(source,), chat_template=template)
    devices = make_devices()
    try:
        target, model, processor, known = load_base(target, devices.device)
        loaded = load_evaluation_rows(section, known, seed=target.seed)
        rows, objective = loaded.evaluation, loaded.objective
        assert rows is not None  # the section asks for them
        adapters, head = AdapterSet(model.net), model.family.head_name(model.net)
        attach = partial(attach_adapter_folder, model.net, head_name=head, base_fingerprint=model.fingerprint)
        for name, folder in zip("AB", folders, strict=True):
            adapters.add(name, partial(attach, folder, shares_base=True))
        losses = adapter_losses(model, adapters, processor, objective, rows, devices, target.evaluation)
    finally:
        devices.close()
    return [losses[name] for name in (None, "A", "B")]
