"""GRPO and RLOO: every loss, normaliser, KL and logged number against trl's own trainers; whole runs; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.objectives.sample_case import Case
from tunekit.recipe.objectives.grpo import GrpoSettings
from tunekit.recipe.objectives.rloo import RlooSettings

GRPO: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "clip-higher": {"epsilon": 0.1, "epsilon_high": 0.3, "scale_rewards": "batch"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "beta": 0.1},
    "gspo, cispo": {"loss_type": "cispo", "importance_sampling_level": "sequence", "epsilon_high": 1.02},
    "kl": {"beta": 0.2},
    "kl without the ratio": {"beta": 0.2, "use_bias_correction_kl": False, "loss_type": "grpo"},
    "truncated left out": {"mask_truncated_completions": True, "beta": 0.1},
    "truncated left out of means": {"mask_truncated_completions": True, "loss_type": "grpo"},
}
RLOO: dict[str, dict[str, Any]] = {
    "plain": {"beta": 0.0},
    "kl": {"beta": 0.3, "epsilon": 0.01},
    "normalised": {"beta": 0.05, "normalize_advantages": True, "mask_truncated_completions": True},
}
CASES = [(GrpoSettings, values, name) for name, values in GRPO.items()]
CASES += [(RlooSettings, values, f"rloo, {name}") for name, values in RLOO.items()]
NOT_LOGGED = {  # least and largest of single completions, which are no sums, and trl's own counter
    *("clip_ratio_low_min", "clip_ratio_high_max", "num_tokens", "completions_min_terminated_length"),
    "completions_max_terminated_length",
}


@pytest.mark.parametrize("off_policy", [False, True], ids=["on policy", "off policy"])
@pytest.mark.parametrize(("kind", "values", "name"), CASES, ids=[name for _, _, name in CASES])
def test_losses_gradients_and_what_is_logged_are_trls(
    kind: Any, values: dict[str, Any], name: str, off_policy: bool, tmp_path: Path
) -> None:
    case = Case(tmp_path, kind, values, off_policy)
    expected, theirs = case.theirs()
    (gradient,) = torch.autograd.grad(expected, case.policy.values)
    assert float(gradient.abs().max()) > 1e-3
    for sizes, layout, order in CUTS:
        loss, logged, _ = case.ours(sizes, layout, order)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5, abs=1e-7)
        (found,) = torch.autograd.grad(loss, case.policy.values)
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)
        assert logged == pytest.approx({key: theirs[key] for key in logged}, rel=1e-5, abs=1e-7)
        assert set(theirs) - set(logged) <= NOT_LOGGED


CUTS: list[Any] = [  # micro-batches, layout, order of the prompts
    ((4,), (True, True), (0, 1, 2, 3)),
    ((1, 2, 1), (True, False), (2, 0, 3, 1)),
    ((3, 1), (False, False), (1, 3, 0, 2)),
]
