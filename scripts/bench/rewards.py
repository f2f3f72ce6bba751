"""Measures GRPO, RLOO, a reward model and distillation on sums: exact answers to held-out questions before and after,
over several seeds.

    scripts/bench/run rewards [--only NAME,NAME] [--seeds 3] [--minutes N] [--page] [--work FOLDER] [--output FOLDER]
                          [--core N]

Questions, answers and the score of an answer are reasoning-gym's (chain_sum: two numbers of one or two digits, added or
subtracted). SmolLM2-135M-Instruct is tuned on 60 answers and merged. GRPO then trains this model on its own samples for
1,000 other questions, in one run per seed. RLOO, and GRPO with a reward model, are short runs that show that they work.
Distillation trains the untuned model with the merged result of the first GRPO run as the teacher; supervised training
on the same rows is measured for comparison. The 300 held-out questions chose nothing: settings were chosen on 150
others.

A unit is one real `tunekit train` in a fresh process on one core with one thread, of about five CPU minutes. It is
written to rewards.json when it is finished, and is never measured again, so a stopped command can be continued.
--minutes N: start no unit after N minutes. --page: only write the page, rewards.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beside.harness import FOLDER, REPOSITORY, find_base
from beside.units import Results, write_parts
from beside.watch import ENVIRONMENT, watch
from objectives import MOST_SECONDS, wilson

ROWS = {"supervised": 60, "taught": 240, "prompts": 1000, "development": 150, "held": 300}  # questions, all different
TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
QUESTION = "State the final answer to the following arithmetic problem: "
CODE = '''"""reasoning-gym's own score of an answer to a sum."""

from reasoning_gym import get_score_answer_fn

SCORE = get_score_answer_fn("chain_sum")


def score(completions, answer):
    pairs = zip(completions, answer, strict=True)
    return [SCORE(said[0]["content"].strip(), {"answer": right, "metadata": {}}) for said, right in pairs]
'''
LORA = {"method": "lora", "r": 16, "alpha": 32}
SAMPLED = {"num_generations": 8, "max_completion_length": 8, "sampling_batch_size": 128}
CURVE_STEPS = 10  # whose rewards are averaged on the page
Recipe = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """One training run. `base`: the unit whose merged result is the start of the run; None: the untuned model."""

    name: str
    told: str
    recipe: Callable[[Bench], Recipe]
    base: str = ""


@dataclass(frozen=True)
class Bench:
    """Where things lie."""

    work: Path
    core: int

    def run_of(self, name: str) -> Path:
        return self.work / "runs" / name

    def merged(self, name: str) -> Path:
        """The merged result of a finished unit."""
        folder = self.work / "merged" / name
        if not folder.exists():
            self._tunekit("merge", self.run_of(name), "--output", folder)
        return folder

    def checked(self, unit: Unit) -> dict[str, Any]:
        """The findings of `tunekit reward check` for the recipe of a unit, without samples."""
        path = self.work / f"{unit.name}-check.json"
        path.unlink(missing_ok=True)
        self._tunekit("reward", "check", self.work / f"{unit.name}.yaml", "--samples", 0, "--json", path, good=(0, 2))
        found = json.loads(path.read_text("utf-8").replace(str(self.work), "work"))
        means = {each["answers"]: each.get("mean") for each in found["answers"]}
        return {"means": means, "findings": found["findings"]}

    def _tunekit(self, *words: object, good: tuple[int, ...] = (0,)) -> None:
        """Run a command in its own process, on the chosen core."""
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
        argv = ["taskset", "-c", str(self.core), sys.executable, "-m", "tunekit", *map(str, words)]
        done = subprocess.run(argv, env=environment, check=False)
        if done.returncode not in good:
            sys.exit(f"tunekit {words[0]} ended with {done.returncode}")

    def rows(self, name: str) -> list[dict[str, str]]:
        return [{"path": str(self.work / f"{name}.jsonl")}]  # type: ignore[list-item]

    def run(self, unit: Unit) -> dict[str, Any]:
        """Train a unit; returns the results in the run's files."""
        base = self.merged(unit.base) if unit.base else find_base()
        usual = {"model": {"name_or_path": str(base)}, "adapter": LORA, "output": {"dir": str(self.run_of(unit.name))}}
        recipe = {**usual, **unit.recipe(self)}
        recipe["training"] = {"eval_steps": 10**6, "save_steps": 10**6, **recipe["training"]}
        path = self.work / f"{unit.name}.yaml"
        path.write_text(json.dumps(recipe, indent=1), "utf-8")  # JSON is YAML
        log = self.run_of(unit.name) / "metrics.jsonl"
        argv = [sys.executable, "-m", "tunekit", "train", str(path), "--overwrite"]
        environment = {"PYTHONPATH": str(REPOSITORY)}
        found = watch(argv, log, self.work / f"{unit.name}.txt", core=self.core, environment=environment)
        if found["cpu_seconds"] > MOST_SECONDS:
            print(f"{unit.name}: {found['cpu_seconds']:.0f} CPU seconds, more than {MOST_SECONDS}", flush=True)
        lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        evaluations = {line["step"]: line["eval"] for line in lines if "eval" in line}
        report = json.loads((self.run_of(unit.name) / "report.json").read_text("utf-8"))
        objective = json.dumps(recipe["objective"]).replace(str(self.work), "work")
        return {
            "unit": unit.name,
            "objective": json.loads(objective),
            "training": recipe["training"],
            "before": evaluations.get(0),
            "after": evaluations[max(evaluations)],
            "rewards": [line["reward"] for line in lines if "reward" in line],
            "zero_spread": [line["frac_reward_zero_std"] for line in lines if "reward" in line],
            "entropy": [line["entropy"] for line in lines if "reward" in line],
            "seconds": report["seconds"],
            "predicted_bytes": report["predicted_bytes"],
            "measured_bytes": report["measured_bytes"],
            "cpu_seconds": found["cpu_seconds"],
            "load": os.getloadavg()[0],
            "date": time.strftime("%Y-%m-%d"),
        }


def write_rows(work: Path) -> None:
    """Write the data files, in which all questions are different, and the pairs of a right and a wrong answer for the
    reward model."""
    import reasoning_gym

    seen: dict[str, str] = {}
    for entry in reasoning_gym.create_dataset("chain_sum", seed=0, size=6000, **TASK):
        seen.setdefault(entry["question"].removeprefix(QUESTION), entry["answer"])
    pairs, start = list(seen.items()), 0
    for name, count in ROWS.items():
        turns = [[_turn("user", q), _turn("assistant", a)] for q, a in pairs[start:][:count]]
        assert len(turns) == count
        write_parts(work, **{name: [{"messages": each} for each in turns]})
        start += count
    draw = random.Random(0)
    wrong = [1, -1, 2, -2, 9, 10, -10, 11, 20, -20]
    judged = [
        {
            "prompt": [_turn("user", q)],
            "chosen": [_turn("assistant", a)],
            "rejected": [_turn("assistant", str(int(a) + draw.choice(wrong)))],
        }
        for q, a in pairs[: ROWS["supervised"] + ROWS["taught"]]
    ]
    write_parts(work, pairs=judged[:-60], held_pairs=judged[-60:])
    (work / "rewards.py").write_text(CODE, "utf-8")


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def supervised(rows: str, objective: Recipe, *, seed: int = 0, **training: Any) -> Callable[[Bench], Recipe]:
    """A recipe that trains on given answers. If the objective has a teacher, it names a unit."""

    def recipe(bench: Bench) -> Recipe:
        method = dict(objective)
        if "teacher" in method:
            method["teacher"] = str(bench.merged(method["teacher"]))
        return {
            "objective": method,
            "data": {"train": bench.rows(rows), "eval": bench.rows("held"), "max_length": 128},
            "training": {"micro_batch_size": 8, "gradient_accumulation_steps": 1, "seed": seed, **training},
            "evaluation": {"metrics": ["loss", "exact_match"], "max_new_tokens": 8, "batch_size": 50},
        }

    return recipe


def sampled(steps: int, *, seed: int = 0, reward_model: str = "", **objective: Any) -> Callable[[Bench], Recipe]:
    """A recipe that trains on the model's own samples."""

    def recipe(bench: Bench) -> Recipe:
        source: Recipe = {"function": str(bench.work / "rewards.py") + ":score", "allow_code": True}
        if reward_model:
            source = {"model": str(bench.run_of(reward_model))}
        training = {"max_steps": steps, "micro_batch_size": 4, "gradient_accumulation_steps": 4, "seed": seed}
        return {
            "objective": {**SAMPLED, **objective, "reward": [source]},
            "data": {"train": bench.rows("prompts"), "eval": bench.rows("held"), "max_length": 128},
            "training": {**training, "learning_rate": 2e-4, "scheduler": "constant"},
            "evaluation": {
                "metrics": ["reward", "exact_match"],
                "max_new_tokens": 8,
                "batch_size": 50,
                "before_training": False,
            },
        }

    return recipe


def judging(bench: Bench) -> Recipe:
    return {
        "objective": {"method": "reward"},
        "data": {"train": bench.rows("pairs"), "eval": bench.rows("held_pairs"), "max_length": 128},
        "training": {"micro_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 5e-4, "epochs": 3},
    }


def units(seeds: int) -> Iterator[Unit]:
    """All units, in the order in which they run."""
    first = {"learning_rate": 1e-3, "epochs": 3}
    yield Unit("start", "supervised, 60 rows", supervised("supervised", {"method": "sft"}, **first))
    for seed in range(seeds):
        yield Unit(f"grpo-{seed}", f"GRPO, seed {seed}", sampled(60, seed=seed, method="grpo"), "start")
    yield Unit("rloo", "RLOO, 20 steps", sampled(20, method="rloo", num_generations=4), "start")
    yield Unit("reward", "reward model, 240 pairs", judging)
    by_model = sampled(15, method="grpo", reward_model="reward")
    yield Unit("grpo-by-reward-model", "GRPO by the reward model alone, 15 steps", by_model, "start")
    taught = {"learning_rate": 5e-4, "epochs": 2}
    distilled = supervised("taught", {"method": "distill", "teacher": "grpo-0"}, **taught)
    yield Unit("distill", "distillation of the untuned model by GRPO's", distilled)
    yield Unit("sft", "supervised, the rows of the distillation", supervised("taught", {"method": "sft"}, **taught))


HEAD = """# What rewards and a teacher teach

Made by `scripts/bench/run rewards`; every unit is in [rewards.json](rewards.json). Sums and differences of two
numbers of one or two digits (reasoning-gym's chain_sum, and its score as reward), SmolLM2-135M-Instruct, LoRA r16 on
all linear layers, one thread of a CPU. Exact: the share of 300 held-out questions whose greedy answer is exactly
right; they decided nothing. Interval: 95 % (Wilson). GRPO: 60 steps of 16 prompts with 8 samples each at temperature
1, of at most 8 tokens, learning rate 2e-4, no KL; GRPO and RLOO begin with the model of the first line.

"""


def page(found: dict[str, dict], constant: float) -> str:
    """What is finished."""
    lines = [
        HEAD,
        "| run | exact before | exact after | interval | loss before, after | CPU s | predicted, MB | measured, MB |",
        "|---|--:|--:|---|---|--:|--:|--:|",
    ]
    for unit in (unit for unit in units(100) if unit.name in found):
        lines.append(_line(unit, found[unit.name], found.get("start")))
    seeds = [unit for name, unit in found.items() if name.startswith("grpo-") and name[5:].isdigit()]
    if seeds and "start" in found:
        after = [unit["after"]["exact_match"] for unit in seeds]
        spread = statistics.stdev(after) if len(after) > 1 else float("nan")
        begun = found["start"]["after"]["exact_match"]
        told = f"GRPO over {len(after)} seeds: {begun:.3f} -> {statistics.mean(after):.3f}"
        told += f", standard deviation {spread:.3f}. One answer to all questions reaches {constant:.3f} at best."
        lines += ["", told, "", "## Mean rewards", ""]
        steps = range(0, max(len(unit["rewards"]) for unit in seeds), CURVE_STEPS)
        lines.append(f"| steps | {' | '.join(str(start + 1) + ' to ' + str(start + CURVE_STEPS) for start in steps)} |")
        lines.append(f"|---|{'--:|' * len(steps)}")
        for name in ("rewards", "zero_spread", "entropy"):
            lines += [_curve(unit, name, steps) for unit in seeds]
        lines += ["", "zero_spread: the share of groups whose rewards are all equal, which teach nothing."]
    if "grpo-by-reward-model" in found:
        by_model = found["grpo-by-reward-model"]
        curve = [statistics.mean(by_model["rewards"][at : at + 5]) for at in (0, 5, 10)]
        accuracy = found["reward"]["after"]["rewards_accuracies"]
        told = ", ".join(f"{value:.3f}" for value in curve)
        lines += [
            "",
            f"The reward model prefers the right answer of {accuracy:.3f} of 60 held-out pairs; mean rewards ",
        ]
        lines[-1] += f"of GRPO by it, over five steps each: {told}. Its completions have "
        lines[-1] += f"{by_model['after']['completions_mean_length']:.2f} tokens on average in the end. "
        means = by_model["check"]["means"]
        worth = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())
        count, best = len(by_model["check"]["findings"]), max(means, key=lambda name: means[name])
        lines[-1] += f"`tunekit reward check` of this recipe has {count} findings; the reward model likes "
        lines[-1] += f"'{best}' best of what is tried there: {worth}."
    return "\n".join(lines) + "\n"


def _line(unit: Unit, one: dict, start: dict | None) -> str:
    after, before = one["after"], one["before"] or (start["after"] if start and unit.base == "start" else {})
    exact = [f"{each['exact_match']:.3f}" if "exact_match" in each else "" for each in (before, after)]
    low, high = wilson(after["exact_match"], ROWS["held"]) if exact[1] else (0.0, 0.0)
    losses = f"{one['before']['loss']:.3f}, {after['loss']:.3f}" if one["before"] else ""
    memory = [f"{max(one[key].values()) / 1e6:.0f}" for key in ("predicted_bytes", "measured_bytes")]
    cells = [unit.told, exact[0], f"**{exact[1]}**" if exact[1] else "", f"{low:.2f} to {high:.2f}" if exact[1] else ""]
    cells += [losses, f"{one['cpu_seconds']:.0f}", *memory]
    return f"| {' | '.join(cells)} |"


def _curve(one: dict, name: str, steps: range) -> str:
    means = [f"{statistics.mean(one[name][at : at + CURVE_STEPS]):.3f}" for at in steps]
    return f"| {one['unit']}, {name} | {' | '.join(means)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of units: start, grpo-0, rloo ...")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--work", default=str(REPOSITORY / ".cache" / "bench" / "rewards"))
    parser.add_argument("--output", default=str(FOLDER / "results"))
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    settings = parser.parse_args()
    output, work, started = Path(settings.output), Path(settings.work).resolve(), time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "rewards.py").exists():
        write_rows(work)
    held = [json.loads(line)["messages"][-1]["content"] for line in (work / "held.jsonl").open(encoding="utf-8")]
    constant = Counter(held).most_common(1)[0][1] / len(held)
    results, bench = Results(output / "rewards.json"), Bench(work, settings.core)
    wanted = set(settings.only.split(",")) if settings.only else None
    for unit in units(settings.seeds) if not settings.page else ():
        late = time.monotonic() - started > settings.minutes * 60
        if unit.name in results.units or (wanted is not None and unit.name not in wanted) or late:
            continue
        found = bench.run(unit)
        if unit.name == "grpo-by-reward-model":
            found["check"] = bench.checked(unit)
        results.add(unit.name, found)
        (output / "rewards.md").write_text(page(results.units, constant), "utf-8")
        told = {name: round(value, 4) for name, value in found["after"].items()}
        print(f"{time.strftime('%H:%M:%S')} {unit.name}: {told}, {found['cpu_seconds']:.0f} CPU s", flush=True)
    (output / "rewards.md").write_text(page(results.units, constant), "utf-8")


if __name__ == "__main__":
    main()
