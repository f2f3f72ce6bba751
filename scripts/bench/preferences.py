"""Measures DPO after supervised tuning: on the same adapter, on the merged model, and without supervised tuning.
Held-out pairs in five folds.

    scripts/bench/run preferences [--folds 5] [--page] [--work FOLDER] [--output FOLDER] [--core N]

SmolLM2-135M-Instruct. Every pair is held out once; 32 pairs of the other folds train. Supervised tuning (SFT) sees the
chosen answers of the same 32 pairs, so all ways have the same data. Every run is one real `tunekit train` in a fresh
process on one core with one thread. A finished fold is in preferences.json, and is never measured again. --page: only
write the page, preferences.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from beside.harness import FOLDER, REPOSITORY, find_base, hardware
from beside.prepare import write_base
from beside.tasks import Split, pair_task, pairs
from beside.units import Results, write_parts
from beside.watch import ENVIRONMENT, watch
from objectives import wilson

WAYS = {"continued": "SFT, then DPO on its adapter", "alone": "DPO alone", "merged": "SFT, merged, then DPO"}
PAIRS, LENGTH = 32, 160  # that train a fold; tokens of a prompt with either answer
TRAINING = {"micro_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 5e-4, "epochs": 1}
SPLITS = pairs("preferences", words=60, rows=PAIRS)
DPO = replace(
    pair_task("DPO", {"method": "dpo", "beta": 0.1}, before_training=False),
    data={"max_length": LENGTH, "excess_length": "truncate"},
    training={**TRAINING, "scheduler": "linear"},
)
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's, by the number of folds
Recipe = dict[str, Any]


def train(recipe: Recipe, place: Path, core: int) -> tuple[Path, Recipe]:
    """Train a recipe; returns the run's folder and the results in its files."""
    place.mkdir(parents=True, exist_ok=True)
    recipe = {**recipe, "output": {"dir": str(place / "run")}}
    (place / "recipe.yaml").write_text(json.dumps(recipe, indent=1), "utf-8")  # JSON is YAML
    argv = [sys.executable, "-m", "tunekit", "train", str(place / "recipe.yaml"), "--overwrite"]
    log = place / "run" / "metrics.jsonl"
    used = watch(argv, log, place / "output.txt", core=core, environment={"PYTHONPATH": str(REPOSITORY)})
    evaluations = [
        record["eval"] for record in map(json.loads, log.read_text("utf-8").splitlines()) if "eval" in record
    ]
    return place / "run", {**(evaluations or [{}])[-1], "cpu_seconds": used["cpu_seconds"]}


def merge(run: Path, output: Path, core: int) -> Path:
    """The merged model of a run."""
    shutil.rmtree(output, ignore_errors=True)
    argv = [sys.executable, "-m", "tunekit", "merge", str(run), "--output", str(output)]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(["taskset", "-c", str(core), *argv], env=environment, check=True)
    return output


def fold_results(split: Split, base: Path, work: Path, core: int) -> Recipe:
    """Four runs over the pairs of one fold."""
    place = work / "preferences" / split.name
    place.mkdir(parents=True, exist_ok=True)
    chosen = [{"messages": row["prompt"] + row["chosen"]} for row in split.train]
    write_parts(place, train=split.train, held=split.held, chosen=chosen)
    dpo = DPO.recipe(base, place, split.seed)
    data = {**dpo["data"], "train": [{"path": str(place / "chosen.jsonl")}], "eval": None}
    supervised, result = train({**dpo, "data": data, "objective": {"method": "sft"}}, place / "sft", core)
    recipes = {
        "continued": {**dpo, "adapter": {**dpo["adapter"], "init_from": str(supervised / "adapter")}},
        "merged": {**dpo, "model": {"name_or_path": str(merge(supervised, place / "model", core))}},
        "alone": dpo,
    }
    found = {"rows": [len(split.train), len(split.held)], "sft": result, "baselines": split.baselines}
    for way, recipe in recipes.items():
        _, found[way] = train(recipe, place / way, core)
        print(f"{time.strftime('%H:%M:%S')} {split.name} {way}: {json.dumps(found[way])}", flush=True)
    shutil.rmtree(place / "model")
    return {**found, "processor": hardware()["processor"], "date": time.strftime("%Y-%m-%d")}


HEAD = """# DPO after supervised tuning

Made by `scripts/bench/run preferences`; every fold is in [preferences.json](preferences.json). SmolLM2-135M-Instruct,
LoRA r16 on all linear layers, one thread of a CPU ({processors}). {folds} of 5 folds, {held} held-out pairs with
prompts of fewer than 60 words; {pairs} pairs of the other folds train, cut at {length} tokens: 8 steps of 4 pairs at
{rate}, falling linearly, beta 0.1. Supervised tuning (SFT): as many steps over the chosen answers of the same pairs.
Held-out rows decided nothing.

Accuracy: the policy prefers the chosen answer more than its reference does, which is the model at step 0 of DPO: the
base, or the base with the supervised adapter. Interval: 95 % (Wilson), of all held-out pairs. Difference from the first
line: mean of the folds, 95 % (Student's t).

| way | accuracy | interval | folds | difference | margin of rewards | log-probability of chosen, rejected | CPU s |
|---|--:|---|---|---|--:|---|--:|
"""


def page(folds: dict[str, Recipe]) -> str:
    """The table of what is finished."""
    own, metric = list(folds.values()), "rewards_accuracies"
    held = sum(fold["rows"][1] for fold in own)

    def mean(way: str, key: str) -> float:
        return sum(fold[way][key] * fold["rows"][1] for fold in own) / held

    lines = []
    for way, told in WAYS.items():
        low, high = wilson(mean(way, metric), held)
        apart = [fold[way][metric] - fold["continued"][metric] for fold in own]
        cells = [told, f"**{mean(way, metric):.3f}**", f"{low:.2f} to {high:.2f}"]
        cells += [", ".join(f"{fold[way][metric]:.2f}" for fold in own)]
        cells += ["" if way == "continued" else difference(apart), f"{mean(way, 'rewards_margins'):.3f}"]
        cells += [f"{mean(way, 'logps_chosen'):.1f}, {mean(way, 'logps_rejected'):.1f}"]
        cells += [f"{mean(way, 'cpu_seconds'):.0f}"]
        lines.append(f"| {' | '.join(cells)} |\n")
    longer = sum(fold["baselines"]["longer answer"] * fold["rows"][1] for fold in own) / held
    seconds = statistics.mean(fold["sft"]["cpu_seconds"] for fold in own)
    lines.append(f"\nThe chosen answer is the longer one of {longer:.3f}. SFT took {seconds:.0f} CPU seconds.")
    lines.append(" Differences whose interval contains 0 tell nothing, and one fold has none.\n")
    facts = {"folds": len(own), "held": held, "pairs": PAIRS, "length": LENGTH, "rate": TRAINING["learning_rate"]}
    processors = " and ".join(sorted({fold["processor"] for fold in own}))
    return HEAD.format(processors=processors, **facts) + "".join(lines)


def difference(apart: list[float]) -> str:
    """The mean over the folds, with its interval if there are several folds."""
    middle = statistics.mean(apart)
    if len(apart) == 1:
        return f"{middle:+.3f}"
    wide = T_95[len(apart)] * statistics.stdev(apart) / len(apart) ** 0.5
    return f"{middle:+.3f} ({middle - wide:+.2f} to {middle + wide:+.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=int, default=5, help="of the five, how many")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--work", default=str(REPOSITORY / ".cache" / "bench"))
    parser.add_argument("--output", default=str(FOLDER / "results"))
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    settings = parser.parse_args()
    output, work = Path(settings.output), Path(settings.work).resolve()
    results = Results(output / "preferences.json")
    if not settings.page:
        if not (work / "model" / "model.safetensors").exists():
            write_base(find_base(), work / "model")
        shared = Path(os.environ.get("TUNEKIT_SHARED", "")) / "data"
        for split in SPLITS(shared, 0, settings.folds):
            if split.name not in results.units:
                results.add(split.name, fold_results(split, work / "model", work, settings.core))
                (output / "preferences.md").write_text(page(results.units), "utf-8")
    (output / "preferences.md").write_text(page(results.units), "utf-8")


if __name__ == "__main__":
    main()
