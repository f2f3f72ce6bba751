"""plan.json read back.

Comes in: what JSON holds.  Goes out: the Plan it was written from.
"""

from __future__ import annotations

from typing import Any

from tunekit.errors import InputError
from tunekit.records import ModelFacts, PeakBytes, Plan, Refusal, RowCounts, Target


def plan_from_json(value: dict[str, Any]) -> Plan:
    """The Plan that `dataclasses.asdict` and JSON made `value` of.

    Raises: InputError where it is no plan.
    """
    try:
        return Plan(
            **{
                **value,
                "model": ModelFacts(**value["model"]),
                "targets": [Target(**target) for target in value["targets"]],
                "rows": RowCounts(**value["rows"]),
                "eval_rows": None if value["eval_rows"] is None else RowCounts(**value["eval_rows"]),
                "peak_bytes": PeakBytes(**value["peak_bytes"]),
                "refusals": [Refusal(**refusal) for refusal in value["refusals"]],
            }
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"this is no plan of this version ({error})", "make it again with `tunekit plan`") from error
