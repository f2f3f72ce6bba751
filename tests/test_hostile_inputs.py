"""Samples of the hostile inputs of scripts/fuzz: each command answers, or refuses in words."""

import os
import sys
from pathlib import Path

import pytest

from tests.support.hostile_run import make_bases, outcomes

SEED = int(os.environ.get("TUNEKIT_TEST_SEED", "0"))


@pytest.mark.skipif(sys.platform != "linux", reason="each command has a forked process, whose memory Linux measures")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_hostile_inputs_are_answered_or_refused_in_words(tmp_path: Path, count: int) -> None:
    all_outcomes = outcomes(tmp_path, make_bases(tmp_path), SEED, range(count))
    bad = [str(outcome) for outcome in all_outcomes if outcome.fault is not None]
    assert not bad, f"scripts/fuzz --seed {SEED}\n" + "\n".join(bad)
