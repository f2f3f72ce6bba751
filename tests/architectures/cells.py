"""What is tried with each architecture: every cell passes, is refused by a sentence, or fails.

A model's folder goes in; out come {cell: what happened}, where "" is a pass.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner

from tests.support.plans import make_plan
from tests.support.train_case import lose_the_end, result_bytes
from tunekit.cli import app
from tunekit.errors import TunekitError
from tunekit.model.text.generation import generate_texts
from tunekit.recipe.load import load_recipe
from tunekit.targets.target import find_target, load_target

CELLS = (
    *("plan", "train", "alone", "packed", "eval", "gradient", "resume"),
    *("peft", "merge", "generate", "nf4", "streamed"),
)
OPTIONAL = ("merge", "packed", "nf4", "streamed")  # may be refused in a type that is right
VERDICTS = ("right", "refused", "wrong")
AFTER_PLAN = ("train", "packed", "nf4", "streamed")  # the other cells read the run of the cell train
ROWS, STEPS, WORDS = 6, 3, ("sing", "of", "the", "wrath", "now")
NEW_TOKENS, PROMPTS = 8, (3, 14, 41)  # lengths of the prompts
EXACT, TOLERANCE = (
    1e-5,
    1e-4,
)  # the losses of later steps, after updates: twice the first; relative, of a loss and of a norm in float32
CLOSE = 1e-3  # of a logit
EXIT_INPUT = 2
HEAD = """# Which models

Made by `scripts/models`: a tiny random model of each type that transformers lists for causal language models or for
images and text. **right**: `plan`; three steps of LoRA on all linear layers with losses equal to transformers' (1e-5);
padded rows equal rows alone; the gradient's norm is peft's (1e-4); a resumed run has the same bytes; peft loads the
adapter, and transformers the merged model, on the class of config.json with the same loss; tokens that are sampled
with a cache are those of the forward. merge, packed, nf4 and streamed may be refused. **refused**: by `plan`,
before weights are loaded, with its reason. All on one core of a CPU: {hours:.2f} hours.

| | right | refused | wrong |
|---|--:|--:|--:|
{counts}

An asterisk marks the 60 types that must be right.

| type | result | {columns} | reason |
|---|---|---|---|---|---|---|
"""


class Refused(Exception):
    """tunekit said no, with this sentence."""


def run_cells(model: Path, work: Path) -> Iterator[tuple[str, str]]:
    """Yields every cell of one architecture and what happened; `work` is an empty folder."""
    found: dict[str, str] = {}
    trial = Trial(model, work)
    for cell in CELLS:
        needs = "plan" if cell in AFTER_PLAN else "train"
        if cell != "plan" and found[needs]:
            found[cell] = found[needs].partition(":")[0] + f": as {needs}"
        else:
            found[cell] = _tried(getattr(trial, f"try_{cell}"))
        yield cell, found[cell]


def _tried(work: Callable[[], None]) -> str:
    try:
        work()
    except Refused as refusal:
        return f"refused: {refusal}"
    except TunekitError as error:
        return f"refused: {error}"
    except Exception as error:  # whatever any architecture's own code raises
        return f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return ""


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
        return float(self._loss(self._plain()))

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
        """The loss before the first update is that of transformers."""
        close(self._train(self.run, "training.save_steps=1")[0], self.plain_loss, EXACT)

    def try_alone(self) -> None:
        """The losses are those of rows without padding and without neighbours."""
        keys = ("training.micro_batch_size=1", f"training.gradient_accumulation_steps={ROWS}")
        self._same_losses(self._train(self.work / "alone", *keys), 2 * EXACT)

    def try_packed(self) -> None:
        self._same_losses(self._train(self.work / "packed", "data.packing=true"), 2 * EXACT)

    def try_streamed(self) -> None:
        self._same_losses(self._train(self.work / "streamed", "memory.streaming=disk"), EXACT)

    def try_nf4(self) -> None:
        losses = self._train(self.work / "nf4", "model.quantization=nf4")
        close(losses[0], self.plain_loss, 0.2)

    def try_eval(self) -> None:
        assert self.trained_loss != self.plain_loss

    def try_gradient(self) -> None:
        """The norm of the trained adapter's gradient is that of peft."""
        again = self.work / "again"
        self._train(again, f"adapter.init_from={self.run / 'adapter'}", "training.max_steps=1", steps=1)
        net = self._adapted(is_trainable=True)
        self._loss(net).backward()
        gradients = [each.grad for each in net.parameters() if each.requires_grad and each.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        close(self._records(again)[0]["grad_norm"], float(norm), TOLERANCE)

    def try_resume(self) -> None:
        """A run that lost its last step ends with the same bytes."""
        cut = self.work / "cut"
        shutil.copytree(self.run, cut)
        lose_the_end(cut)
        call("train", self.recipe, f"output.dir={cut}", "training.save_steps=1", "--resume")
        assert result_bytes(cut) == result_bytes(self.run), "the resumed run differs"

    def try_merge(self) -> None:
        """The merged model has the trained loss, and nothing outside of the adapted layers changed."""
        merged = self.work / "merged"
        call("merge", self.run / "adapter", "--output", merged)
        close(float(self._loss(self._plain(merged))), self.trained_loss, EXACT)

    def try_peft(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            net = self._adapted()
        said = [str(each.message) for each in caught if "adapter" in str(each.message)]
        assert not said, said[0]
        close(float(self._loss(net)), self.trained_loss, EXACT)

    def try_generate(self) -> None:
        """Each new token of prompts that are answered together, with a cache, is the most likely one of the whole row
        without a cache."""
        loaded = load_target(find_target(str(self.run), None, []), torch.device("cpu"))
        prompts = [self.rows[-1][0].repeat(2)[:length].tolist() for length in PROMPTS]
        settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "batch_size": len(prompts), "stop_ids": []}
        answers = generate_texts(loaded.model.base, loaded.tokenizer, prompts, **settings)
        net = self._adapted()
        for prompt, answer in zip(prompts, answers, strict=True):
            assert len(answer) == NEW_TOKENS, f"{len(answer)} new tokens"
            logits = own_logits(net, torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1].float()  # (N, V)
            gap = logits.max(-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
            worse = f"a token after {len(prompt)} tokens has a logit that is {float(gap.max()):.2g} below the best"
            assert float(gap.max()) <= CLOSE, worse

    def _train(self, run: Path, *overrides: str, steps: int = STEPS) -> list[float]:
        """The losses of the recipe's steps."""
        call("train", self.recipe, f"output.dir={run}", *overrides)
        losses = [float(record["loss"]) for record in self._records(run)]
        assert len(losses) == steps, losses
        return losses

    def _same_losses(self, losses: list[float], tolerance: float) -> None:
        for ours, theirs in zip(losses, (record["loss"] for record in self._records(self.run)), strict=True):
            close(ours, theirs, tolerance)

    def _records(self, run: Path) -> list[dict[str, Any]]:
        lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
        return [record for record in map(json.loads, lines) if "loss" in record]

    def _plain(self, folder: Path | None = None) -> nn.Module:
        """The class that config.json names, as transformers loads it."""
        folder = folder or self.model
        [name] = json.loads((folder / "config.json").read_text("utf-8"))["architectures"]
        net: nn.Module = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
        return net

    def _adapted(self, **settings: Any) -> nn.Module:
        net: nn.Module = peft.PeftModel.from_pretrained(self._plain(), str(self.run / "adapter"), **settings).eval()
        return net

    def _loss(self, net: nn.Module) -> Tensor:
        """Of all rows, each of them alone, by the net's own logits."""
        total, count = torch.zeros(()), 0
        for ids in self.rows:
            logits = own_logits(net, ids)
            total = total + F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum")
            count += ids.shape[1] - 1
        return total / count


def own_logits(net: Any, ids: Tensor) -> Tensor:
    """(1, T, V)."""
    net = net.base_model.model if isinstance(net, peft.PeftModel) else net
    net = net.language_model if type(net).__name__ == "Llama4ForConditionalGeneration" else net  # its forward fails
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
    assert abs(ours - theirs) <= tolerance * abs(theirs), f"{ours:.7g} where {theirs:.7g} is expected"


class Found(TypedDict, total=False):
    """What was found for a type. `cells`: "" for a pass, else what happened."""

    cells: dict[str, str]
    cpu_seconds: float


def verdict(cells: Mapping[str, str]) -> str:
    """right: the type is trained as transformers computes it. refused: plan says no. wrong: anything else."""
    if cells["plan"].startswith("refused: "):
        return "refused"
    refusable = {cell for cell in OPTIONAL if cells[cell].startswith("refused: ")}
    return "wrong" if any(said for cell, said in cells.items() if cell not in refusable) else "right"


def reason(said: str) -> str:
    """A refusal, without the place in the recipe and the advice."""
    text = said.removeprefix("refused: ").partition("; ")[0]
    return re.sub(r"^(command line: |\S+:\d+: )?[\w.]+: |(\S*/)?model \([\w-]+\) cannot be loaded: |\S*/", "", text)


def table(found: Mapping[str, Found], promised: Collection[str]) -> str:
    """The page scripts/results/models.md."""
    counts, verdicts = list[str](), {name: verdict(row["cells"]) for name, row in found.items()}
    for title, names in (("the 60", promised), ("the others", found.keys() - promised)):
        numbers = Counter(verdicts[name] for name in names if name in found)
        counts.append(f"| {title} | {' | '.join(str(numbers[word]) for word in VERDICTS)} |")
    hours = sum(row.get("cpu_seconds", 0) for row in found.values()) / 3600
    rows = [
        f"| {name}{'*' if name in promised else ''} | {verdicts[name]} | {' | '.join(_shown(row['cells']))} |"
        for name, row in sorted(found.items(), key=lambda pair: (pair[0] not in promised, pair[0]))
    ]
    return HEAD.format(counts="\n".join(counts), hours=hours, columns=" | ".join(OPTIONAL)) + "\n".join(rows) + "\n"


def _shown(cells: Mapping[str, str]) -> Iterator[str]:
    """Yields a cell for each optional feature, and the reason if the type is not right."""
    bad = next((f"{cell}: {said}" for cell, said in cells.items() if said and cell not in OPTIONAL), "")
    for cell in OPTIONAL:
        yield "yes" if not cells[cell] else "" if bad else "no"
    reasons = [reason(cells[cell]) for cell in OPTIONAL if cells[cell] and cell != "streamed"]
    text = reason(cells["plan"]) if cells["plan"].startswith("refused: ") else bad or "; ".join(reasons)
    yield text.replace("|", "\\|")[:300]
