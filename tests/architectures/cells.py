"""What is tried with each architecture: every cell passes, is refused by a sentence, or fails.

A model's folder goes in; out come {cell: what happened}, where "" is a pass.
"""

from __future__ import annotations

import json
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.support.plans import make_plan
from tunekit.cli import app
from tunekit.errors import TunekitError
from tunekit.recipe.load import load_recipe

CELLS = ("plan", "train", "eval", "generate", "merge", "peft", "packed", "nf4", "streamed")
ROWS, STEPS, WORDS = 6, 3, ("sing", "of", "the", "wrath", "now")
TOLERANCE = 1e-4  # relative, of a loss in float32
EXIT_INPUT = 2


class Refused(Exception):
    """tunekit said no, with this sentence."""


def run_architecture(model: Path, work: Path) -> dict[str, str]:
    """Every cell of one architecture; `work` is an empty folder."""
    found: dict[str, str] = {}
    trial = Trial(model, work)
    for cell in CELLS:
        needs = "plan" if cell in ("train", "packed", "nf4", "streamed") else "train"
        if cell != "plan" and found[needs]:
            found[cell] = found[needs].partition(":")[0] + f": as {needs}"
            continue
        try:
            getattr(trial, f"try_{cell}")()
            found[cell] = ""
        except Refused as refusal:
            found[cell] = f"refused: {refusal}"
        except TunekitError as error:
            found[cell] = f"refused: {error}"
        except Exception as error:  # whatever any architecture's own code raises
            found[cell] = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return found


class Trial:
    """One architecture's recipe and runs."""

    def __init__(self, model: Path, work: Path) -> None:
        self.model, self.work, self.run = model, work, work / "run"
        self.data, self.recipe = work / "rows.jsonl", work / "recipe.yaml"
        rows = [{"text": " ".join(WORDS[(row + at) % 5] for at in range(3 + 2 * row))} for row in range(ROWS)]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        recipe = {
            "model": {"name_or_path": str(model), "dtype": "float32"},
            "data": {"train": [{"path": str(self.data), "format": "text"}], "max_length": 400},
            "adapter": {"method": "lora", "r": 4},
            "training": {"learning_rate": 0.02, "warmup_steps": 0, "micro_batch_size": 2}
            | {"gradient_accumulation_steps": ROWS // 2, "max_steps": STEPS},
            "output": {"dir": str(self.run)},
        }
        self.recipe.write_text(json.dumps(recipe), encoding="utf-8")
        self.rows: list[Tensor] = []  # (1, T) each

    @cached_property
    def plain_loss(self) -> float:
        """Of the untuned base, by transformers."""
        return self._loss(self._plain())

    @cached_property
    def trained_loss(self) -> float:
        """Of the run's adapter, by `tunekit eval`."""
        out = self.work / "eval.json"
        call("eval", self.run, "--data", self.data, "--format", "text", "--json", out)
        return float(json.loads(out.read_text("utf-8"))["loss"])

    def try_plan(self) -> None:
        """What `tunekit plan` would refuse; the rows stay, as they are encoded."""
        plan, prepared = make_plan(load_recipe(str(self.recipe), []), device=torch.device("cpu"))
        if plan.refusals:
            raise Refused("; ".join(refusal.message for refusal in plan.refusals))
        rows: Any = prepared.rows.train
        self.rows = [torch.as_tensor(rows[number].parts["ids"]).long()[None] for number in range(len(rows))]

    def try_train(self) -> None:
        self._train(self.run)

    def try_packed(self) -> None:
        self._train(self.work / "packed", "data.packing=true")

    def try_streamed(self) -> None:
        self._train(self.work / "streamed", "memory.streaming=disk")

    def try_nf4(self) -> None:
        self._train(self.work / "nf4", "model.quantization=nf4", within=0.2)

    def try_eval(self) -> None:
        assert self.trained_loss != self.plain_loss

    def try_generate(self) -> None:
        assert call("generate", self.run, "--prompt", "sing", "evaluation.max_new_tokens=5") is not None

    def try_merge(self) -> None:
        merged = self.work / "merged"
        call("merge", self.run / "adapter", "--output", merged)
        net = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        close(self._loss(net), self.trained_loss, TOLERANCE)

    def try_peft(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            net = peft.PeftModel.from_pretrained(self._plain(), str(self.run / "adapter")).eval()
        said = [str(each.message) for each in caught if "adapter" in str(each.message)]
        assert not said, said[0]
        close(self._loss(net), self.trained_loss, TOLERANCE)

    def _train(self, run: Path, *overrides: str, within: float = TOLERANCE) -> None:
        """The recipe's steps; the first one's loss is that of transformers."""
        call("train", self.recipe, f"output.dir={run}", *overrides)
        lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
        losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
        assert len(losses) == STEPS, losses
        close(losses[0], self.plain_loss, within)

    def _plain(self) -> nn.Module:
        net: nn.Module = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        return net

    def _loss(self, net: nn.Module) -> float:
        """Of all rows, each of them alone, by the net's own logits."""
        total, count = 0.0, 0
        for ids in self.rows:
            logits = own_logits(net, ids)
            total += float(F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
        return total / count


@torch.no_grad()
def own_logits(net: Any, ids: Tensor) -> Tensor:
    """(1, T, V)."""
    logits: Tensor = net(input_ids=ids, use_cache=False).logits
    return logits


def call(*arguments: object) -> str:
    """`tunekit ARGUMENTS`; what it printed. Raises: Refused where an input is refused."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    if result.exit_code == EXIT_INPUT:
        raise Refused(" ".join(result.stderr.split()))
    if result.exit_code:
        raise RuntimeError(f"exit code {result.exit_code}: {result.stderr or result.exception!r}")
    return result.stdout


def close(ours: float, theirs: float, tolerance: float) -> None:
    assert abs(ours - theirs) <= tolerance * abs(theirs), f"loss {ours:.6f} where {theirs:.6f} is expected"


def table(found: dict[str, dict[str, str]]) -> str:
    """One line an architecture (+ passes, r refused, F fails), each sentence below, and the counts."""
    width = max(map(len, found))
    signs = {name: {cell: sign(value) for cell, value in cells.items()} for name, cells in found.items()}
    lines = [" " * width + "  " + " ".join(CELLS)]
    lines += [f"{name:{width}}  " + " ".join(f"{signs[name][cell]:^{len(cell)}}" for cell in CELLS) for name in found]
    said = {}
    for name, cells in found.items():
        for cell, value in cells.items():
            if value and ": as " not in value:
                said.setdefault(value.replace(name, "*"), []).append(f"{name}/{cell}")
    lines += [f"{', '.join(places)}: {value}" for value, places in sorted(said.items())]
    flat = [each for cells in signs.values() for each in cells.values()]
    counts = {meaning: flat.count(mark) for mark, meaning in (("+", "pass"), ("r", "refused"), ("F", "fail"))}
    return "\n".join([*lines, f"{len(found)} architectures, {len(flat)} cells: {counts}"])


def sign(value: str) -> str:
    return "+" if not value else "r" if value.startswith("refused") else "F"
