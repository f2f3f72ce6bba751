"""Samples of the hostile inputs of scripts/fuzz: each command answers, or refuses in words."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.hostile_run import make_bases, outcomes

FUZZ = Path(__file__).parent.parent / "scripts" / "fuzz"
SEED = int(os.environ.get("TUNEKIT_TEST_SEED", "0"))


LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="Linux measures the memory of the forked process of a command"
)


@LINUX
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_hostile_inputs_are_answered_or_refused_in_words(tmp_path: Path) -> None:
    all_outcomes = outcomes(tmp_path, make_bases(tmp_path), SEED, range(10))
    bad = [str(outcome) for outcome in all_outcomes if outcome.fault is not None]
    assert not bad, f"scripts/fuzz --seed {SEED}\n" + "\n".join(bad)


@LINUX
@pytest.mark.slow
def test_two_hundred_hostile_inputs() -> None:
    """In a new process: malloc keeps freed blocks in a process that has run many tests, and its forks inherit them."""
    command = [sys.executable, str(FUZZ), "--seed", str(SEED), "--count", "200"]
    fuzz = subprocess.run(command, capture_output=True, text=True)
    assert fuzz.returncode == 0, fuzz.stdout
