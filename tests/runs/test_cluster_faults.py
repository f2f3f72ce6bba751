"""Faults of a cluster, planted into runs of two processes: every process ends, and a message names the rank and the
fix. Where a step was trained, the run continues from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

import tunekit.train  # noqa: F401 (the forked processes need not import it)
from tests.support.cluster_faults import FAULTS, Fault, run_fault


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_fault_ends_with_the_name_of_the_rank_and_the_fix(fault: Fault, tiny_llama: Path, tmp_path: Path) -> None:
    facts = run_fault(fault, tmp_path, tiny_llama)
    assert tuple(facts["codes"]) == fault.codes, facts
    for text in fault.says:
        assert any(text in message for message in facts["messages"]), facts
    first, second = facts["messages"]
    assert not first or second != f"rank 1: {first}", "an error of all ranks is told once"
    assert facts.get("resumed", [0, 0]) == [0, 0], facts
