"""Compares tunekit's dpo with TRL's DPOTrainer on one core: tokens per CPU second, and memory above the weights.

    scripts/bench/run dpo [--lengths 256,1024] [--steps 3] [--repeats 2] [--only NAME,NAME] [--best NAME]
                      [--venv FOLDER] [--work FOLDER] [--data FILE] [--output FOLDER] [--core N] [--force]

SmolLM2-135M-Instruct in float32, LoRA r16 on all linear layers, 8 pairs to an optimizer step, the same token ids in the
same order from the same initial adapter. Sequences end at the length, as both tools truncate them; pairs whose prompt
leaves no room for either answer are left out. Runs, tokens and memory as in `scripts/bench/run compare`; a token of a
prompt counts once for each of the two answers, on both sides. The time of the reference is counted in the first epoch,
also if TRL computes the reference before its first step. Later epochs of a run that caches the reference do not count
it. Timings count only if the losses of all runs agree within 1e-3. Results are in dpo.json and dpo.md; lengths that are
not measured again keep their results.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from beside.harness import (
    ROWS_PER_STEP,
    Bench,
    best_flags,
    ended,
    facts,
    interleaved,
    keep,
    make_parser,
    memory_above,
    start_on_pairs,
    summary,
)
from beside.watch import MOST_MEMORY

from tunekit.data.rows import load_rows
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.objectives.base import make_objective
from tunekit.objectives.rows.answers import SIDES
from tunekit.recipe.data import DataSection
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.dpo import DpoSettings

FIGURES = {
    "minutes": 30,
    "options": "--force --lengths 256",
    "result": "dpo.json",
    "figures": {
        "defaults": {
            "what": "DPO, 256 tokens, against TRL's defaults",
            "unit": "tokens per CPU second",
            "ours": "256/summary/tunekit, 256/tokens_per_cpu_second/1",
            "theirs": "256/summary/TRL, defaults, 256/tokens_per_cpu_second/1",
        },
        "best": {
            "what": "DPO, 256 tokens, first epoch, against TRL's best flags",
            "unit": "tokens per CPU second",
            "ours": "256/summary/tunekit, 256/tokens_per_cpu_second/1",
            "theirs": "256/summary/TRL, one pair at a time, 256/tokens_per_cpu_second/1",
        },
        "cached": {
            "what": "DPO, 256 tokens, later epochs: both sides have the reference's scores",
            "unit": "tokens per CPU second",
            "ours": "256/summary/tunekit, second epoch, 256/tokens_per_cpu_second/1",
            "theirs": "256/summary/TRL, one pair at a time, precomputed, 256/tokens_per_cpu_second/1",
        },
        "memory": {
            "what": "DPO, 256 tokens, memory above the weights, against TRL's defaults",
            "unit": "MB",
            "divisor": 1e6,
            "ours": "256/summary/tunekit, 256/above_weights_bytes",
            "theirs": "256/summary/TRL, defaults, 256/above_weights_bytes",
        },
    },
}
BETA, WARM_STEPS, SAME = 0.1, 1, 1e-3
DEFAULT_PAIRS = 2  # the micro-batch of a recipe that names none; plan takes fewer pairs at a time on a CPU
PLAIN = {"gradient_checkpointing": False}
ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS_PER_STEP}
CANDIDATES: dict[str, dict] = {  # of TRL's flags for the best speed on a CPU; its padding_free is switched off in 1.16
    "one pair at a time": {"config": {**PLAIN, **ONE_BY_ONE}},
    "one pair at a time, recomputed": {"config": ONE_BY_ONE},
    "two pairs at a time": {
        "config": {**PLAIN, "per_device_train_batch_size": 2, "gradient_accumulation_steps": ROWS_PER_STEP // 2}
    },
    "one pair at a time, precomputed": {"config": {**PLAIN, **ONE_BY_ONE, "precompute_ref_log_probs": True}},
}
PAGE = """# DPO on one CPU core

SmolLM2-135M-Instruct in float32, LoRA r16 on all linear layers, 8 pairs to a step, the same token ids in the same order
from the same initial adapter. One thread.
Made by `scripts/bench/run dpo`; every run's numbers are in [dpo.json](dpo.json).
"""
LENGTH = """## Length {length}

{steps} steps, of which the first does not count. Losses of a step differ by {apart:.1e} at most. {processor}, {date},
load average {load:.2f} before. trl {trl}, peft {peft}, torch {torch}, transformers {transformers}.

"""
NOT_RUN = f"does not run within {MOST_MEMORY:.0%} of this machine's memory"
PLAIN_ROWS = "import tunekit.planning.prepare as prepare\nprepare.shares_prefixes = lambda net, longest: False"
HEAD = (
    "| | tokens per CPU second (least, median, most) | factor of the first line | peak, GB | above the weights, MB "
    "| share of the first line |\n|---|--:|--:|--:|--:|--:|"
)


class Pairs:
    """Runs both sides on rows of one length."""

    def __init__(self, bench: Bench, length: int) -> None:
        self.bench, self.length, self.say, self.initial = bench, length, bench.say, ""

    def ours(self, name: str, micro_batch: int = 1, before: str = "", kept: bool = False, **training: Any) -> dict:
        """Run `tunekit train` once. `kept`: train two epochs with a cached reference, and count only the second
        epoch."""
        steps = self.bench.settings.steps
        file = self.bench.work / f"pairs-{self.length}.jsonl"
        return self.bench.ours(
            f"{name}, {self.length}",
            before=before,
            warm=steps if kept else None,
            model={"dtype": "float32"},
            data={
                "train": [{"path": str(file), "format": "preference"}],
                "max_length": self.length,
                "excess_length": "truncate",
            },
            objective={"method": "dpo", "beta": BETA, "precompute_ref_log_probs": kept},
            training={
                "micro_batch_size": micro_batch,
                "gradient_accumulation_steps": ROWS_PER_STEP // micro_batch,
                **({"max_steps": 2 * steps} if kept else {}),
                **training,
            },
        )

    def theirs(self, name: str, kind: str = "dpo", *, config: dict) -> dict:
        """One run of DPOTrainer."""
        own = {"max_length": self.length, "beta": BETA, "bf16": False, "model_init_kwargs": {"dtype": "float32"}}
        rows = f"ids-{self.length}"
        run = self.bench.theirs(f"{name}, {self.length}", kind, rows=rows, config=own | config, init=self.initial)
        reference, rate = Path(run["place"]) / "reference.json", run["tokens_per_cpu_second"]
        if reference.exists() and rate:
            seconds = float(reference.read_text("utf-8"))
            run["first_epoch_tokens_per_cpu_second"] = run["tokens"][-1] / (run["tokens"][-1] / rate + seconds)
        return run

    def measured(self) -> dict:
        """Measure both sides; TRL also with its fastest flags."""
        self.say(f"length {self.length}: the initial adapter")
        # a warm-up's first step has learning rate 0
        begin = self.ours("initial", max_steps=1, warmup_steps=1, gradient_accumulation_steps=1)
        self.initial = str(Path(begin["place"]) / "run" / "adapter")
        settings, candidates = self.bench.settings, list[dict]()
        best = settings.best
        if best is None:
            self.say("TRL's flags, each once")
            best, candidates = best_flags(self, "dpo", CANDIDATES)  # type: ignore[arg-type]
            best = best.removesuffix(f", {self.length}")
        sides = {
            "tunekit": lambda: self.ours("tunekit", DEFAULT_PAIRS),
            "tunekit, second epoch": lambda: self.ours("tunekit, second epoch", DEFAULT_PAIRS, kept=True),
            "tunekit, two plain rows a pair": lambda: self.ours("tunekit, two plain rows a pair", before=PLAIN_ROWS),
            "TRL, defaults": lambda: self.theirs("TRL, defaults", config={}),
            "TRL, one pair at a time": lambda: self.theirs(
                "TRL, one pair at a time", **CANDIDATES["one pair at a time"]
            ),
            f"TRL, {best}": lambda: self.theirs(f"TRL, {best}", **CANDIDATES[best]),
        }
        runs = interleaved(self.bench, sides)
        imported = memory_above(self.bench, runs, widened=2)
        apart = differences([*candidates, *runs])
        found = {"best_flags": best, "candidates": candidates, "runs": runs, "imported_bytes": imported}
        return {**found, "largest_difference_of_losses": apart, "summary": summary(runs)}


def differences(runs: list[dict]) -> float:
    """The largest difference between the losses of two runs at the same step."""
    curves = [run["losses"] for run in runs if run.get("losses")]
    return max(abs(one - other) for losses in zip(*curves, strict=False) for one in losses for other in losses)


def write_rows(source: Path, bench: Bench, length: int) -> None:
    """Write pairs-N.jsonl, the first pairs that can be trained on, and ids-N.jsonl, their token ids as tunekit encodes
    and cuts them at the length."""
    data = DataSection(
        train=[{"path": str(source), "format": "preference"}], max_length=length, excess_length="truncate"
    )
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(bench.model)))
    objective = make_objective(DpoSettings(unusable_pairs="drop"), tokenizer)
    rows, lines = load_rows(data, objective, seed=0).train, source.read_text("utf-8").splitlines()
    chosen = [rows[number] for number in range(ROWS_PER_STEP * bench.settings.steps)]
    texts = [lines[int(row.origin.rpartition(":")[2]) - 1] for row in chosen]
    (bench.work / f"pairs-{length}.jsonl").write_text("".join(f"{text}\n" for text in texts), "utf-8")
    with (bench.work / f"ids-{length}.jsonl").open("w", encoding="utf-8") as file:
        for row in chosen:
            prompt = int(np.flatnonzero(row.parts["chosen_trained"])[0])
            ids = {"prompt_ids": row.parts["chosen"][:prompt].tolist()}
            for side in SIDES:
                end = int(np.flatnonzero(row.parts[f"{side}_trained"])[-1]) + 1
                ids[f"{side}_ids"] = row.parts[side][prompt:end].tolist()
            file.write(json.dumps(ids) + "\n")


def page(result: dict) -> str:
    """The page of all lengths."""
    lines = [PAGE]
    for length, found in result.items():
        first, ours = next(iter(found["summary"].items()))
        told = {name: found["theirs"].get(name, "?") for name in ("trl", "peft", "torch", "transformers")}
        told |= {"processor": found["hardware"]["processor"], "load": found["load_before"][0]}
        apart = found["largest_difference_of_losses"]
        lines += [LENGTH.format(**{**found, **told, "length": length, "apart": apart}) + HEAD]
        for name, row in found["summary"].items():
            rates, above = row["tokens_per_cpu_second"], row["above_weights_bytes"]
            factor = ours["tokens_per_cpu_second"][1] / rates[1]
            share, mine = ours["above_weights_bytes"] / above, name == first
            cells = [" / ".join(f"{rate:.0f}" for rate in rates), "" if mine else f"{factor:.2f}"]
            cells += [f"{row['peak_bytes'] / 1e9:.2f}", f"{above / 1e6:.0f}", "" if mine else f"{share:.2f}"]
            lines.append(f"| {name.rpartition(', ')[0]} | {' | '.join(cells)} |")
        for run in found["runs"]:
            if "first_epoch_tokens_per_cpu_second" in run:
                rate = run["first_epoch_tokens_per_cpu_second"]
                told_rate = f"{rate:.0f} tokens per CPU second in the first epoch, with the reference"
                lines += ["", f"{run['name'].rpartition(', ')[0]}: {told_rate}."]
        if found["candidates"]:
            lines += ["", "TRL's flags, each once, of which the fastest is above:", ""]
        for run in [*found["candidates"], *(run for run in found["runs"] if "failed" in run)]:
            rate = run.get("tokens_per_cpu_second")
            said = f"{rate:.0f} tokens per CPU second, {run['peak_bytes'] / 1e9:.2f} GB" if rate else NOT_RUN
            lines.append(f"- {run['name']}: {said}")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = make_parser(__doc__, CANDIDATES, steps=3)
    parser.add_argument("--lengths", default="256,1024")
    settings, bench, source = start_on_pairs(parser, WARM_STEPS)
    path = Path(settings.output) / "dpo.json"
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for length in settings.lengths.split(","):
        write_rows(source, bench, int(length))
        found = facts(bench) | Pairs(bench, int(length)).measured()
        if found["largest_difference_of_losses"] > SAME:
            sys.exit(f"losses differ by {found['largest_difference_of_losses']:.1e}: no timing counts")
        for run in [*found["candidates"], *found["runs"]]:
            run.pop("samples", None)  # of memory over time, which no page shows
        kept[length] = found | ended(bench)
        path = keep(bench, kept, "dpo.json")
        path.with_suffix(".md").write_text(page(kept), "utf-8")


if __name__ == "__main__":
    main()
