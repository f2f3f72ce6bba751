"""`tunekit merge`: merges an adapter into its base, and writes a model folder that needs neither tunekit nor peft."""

from collections.abc import Sequence
from pathlib import Path

import torch

from tunekit.arithmetic.merge import merge
from tunekit.arithmetic.normalise import find_plain_target
from tunekit.console import Console
from tunekit.errors import InputError
from tunekit.machine.signals import StopSignals

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge_verb(
    adapter: str, output: str, base: str | None, onto: str | None, overrides: Sequence[str], dtype: str | None = None
) -> None:
    """Merge an adapter, and print how much the result differs from the unmerged adapter.

    Raises: TunekitError; the command line returns its exit code.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"{dtype} is unknown", f"choose {', '.join(DTYPES)}", key="--dtype")
    console = Console()
    target = find_plain_target(adapter, base, overrides)
    console.info(*target.notes)
    with StopSignals(announce=False) as signals, signals.at_once("during the merge; the unfinished output was removed"):
        result = merge(target, Path(output), onto, DTYPES.get(dtype or ""))
    difference = result.difference
    tokens = f"{difference.tokens} tokens of " if difference.tokens else ""  # models of images have no tokens
    console.info(f"merged into the {result.onto} weights of the base, written in {result.dtype}: {result.reason}")
    measured = f"(standard deviation of all logits: {difference.spread:.3g}), measured on {tokens}{difference.rows}"
    if difference.written is not None:
        rounding = f", of which rounding the weights causes {difference.rounding:.3g}" if difference.rounding else ""
        console.info(
            f"weights in {result.dtype}, computed in float32: logits differ from the unmerged adapter's logits by "
            f"{difference.written:.3g} at most{rounding} {measured}"
        )
    if difference.written is None or result.computed_in != "float32":
        adds = (
            ""
            if difference.written is None
            else "; if this is more than in the line above, the cause is rounding in this computation"
        )
        console.info(
            f"computed in {result.computed_in}, as the adapter runs here: logits differ by {difference.largest:.3g} at "
            f"most and {difference.mean:.3g} on average {measured}{adds}"
        )
    if difference.running_loss is not None:
        console.info(
            f"mean loss over all of these tokens, including tokens that are not trained on, in {result.computed_in}: "
            f"{difference.running_loss:.5f} with the adapter, {difference.merged_loss:.5f} merged"
        )
    if result.note:
        console.warn(result.note)
    console.info(f"written to {result.folder}")
