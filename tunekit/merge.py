"""`tunekit merge`: an adapter or a run goes in; a model folder that needs neither tunekit nor peft comes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunekit.arithmetic.merge import merge_adapter
from tunekit.console import Console
from tunekit.machine.signals import StopSignals
from tunekit.tuned.target import find_target


def merge_verb(adapter: str, output: str, base: str | None, onto: str | None, overrides: Sequence[str]) -> None:
    """Merge and say how far the result is from the running adapter.

    Raises: TunekitError, whose exit code the command line returns.
    """
    console = Console()
    target = find_target(adapter, base, overrides)
    console.info(*target.rewrites)
    with StopSignals(announce=False) as signals, signals.at_once("in the merge; what it had written is removed"):
        result = merge_adapter(target, Path(output), onto)
    difference = result.difference
    console.info(f"merged onto {result.onto}: {result.reason}")
    console.info(
        f"logits differ from the running adapter's by {difference.largest:.3g} at most and {difference.mean:.3g} on "
        f"average (their spread is {difference.spread:.3g}), on {difference.tokens} tokens of {difference.rows}"
    )
    if difference.running_loss is not None:
        console.info(
            f"loss over all these tokens, prompts included: {difference.running_loss:.5f} running, "
            f"{difference.merged_loss:.5f} merged"
        )
    console.info(f"written to {result.folder}")
