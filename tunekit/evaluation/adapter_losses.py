"""The loss of a base over some rows, alone and with each of several adapters."""

from __future__ import annotations

from tunekit.adapters.several import AdapterSet
from tunekit.contracts import Objective, Processor, Rows
from tunekit.errors import ModelError
from tunekit.evaluation.evaluator import Evaluator, Queries
from tunekit.machine.devices import Devices
from tunekit.model.load import LoadedModel
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.tuned.fit import row_problems
from tunekit.tuned.model import TunedModel


def adapter_losses(
    model: LoadedModel,
    adapters: AdapterSet,
    processor: Processor,
    objective: Objective,
    rows: Rows,
    devices: Devices,
    settings: EvaluationSection,
) -> dict[str | None, float]:
    """Token-weighted mean loss by adapter; None: the base alone.

    Raises: ModelError where the model cannot look up the rows.
    """
    losses: dict[str | None, float] = {}
    for name in (None, *adapters.adapters):
        adapters.switch(name)
        tuned = TunedModel(model, adapters.adapters.get(name or ""))
        problems = row_problems(model, processor, objective.rows, [rows], tuned.virtual_tokens)
        if problems:
            raise ModelError.of(problems)
        evaluator = Evaluator(tuned, objective, devices, rows, Queries(), settings, metric_names=("loss",))
        losses[name] = evaluator.evaluate().metrics["loss"]
    adapters.switch(None)
    return losses
