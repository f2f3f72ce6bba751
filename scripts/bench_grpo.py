"""GRPO on sums of two numbers, after a short supervised run: exact answers to held-out questions over several seeds.

usage: scripts/bench grpo --work DIR [--model SmolLM2 folder, .gguf or hub name] [--seeds 3] [--steps 60] [--rows 160]

Questions, answers and the score of an answer are reasoning-gym's (chain_sum; pip install reasoning-gym). The model is
tuned on --rows answers first, and merged; each seed then learns from its own samples of other questions. Reported: the
share of exact greedy answers to held-out questions before and after, the best that one answer to all reaches, and the
mean reward of the first and the last ten steps. What is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
REWARD = '''"""reasoning-gym's own score of an answer to a sum."""

from reasoning_gym import get_score_answer_fn

SCORE = get_score_answer_fn("chain_sum")


def score(completions, answer, **columns):
    pairs = zip(completions, answer, strict=True)
    return [SCORE(said[0]["content"].strip(), {"answer": right, "metadata": {}}) for said, right in pairs]
'''


def write_rows(work: Path, rows: int, prompts: int, held_out: int) -> None:
    """Three files whose questions are all different."""
    import reasoning_gym

    wanted = {"supervised": rows, "prompts": prompts, "test": held_out}
    size = 4 * sum(wanted.values())
    seen: dict[str, str] = {}
    for entry in reasoning_gym.create_dataset("chain_sum", seed=0, size=size, **TASK):
        question = entry["question"].removeprefix("State the final answer to the following arithmetic problem: ")
        seen.setdefault(question, entry["answer"])
    pairs, start = list(seen.items()), 0
    if len(pairs) < sum(wanted.values()):
        sys.exit(f"there are only {len(pairs)} different questions; ask for fewer rows")
    for name, count in wanted.items():
        turns = [
            ({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in pairs[start:][:count]
        ]
        lines = [json.dumps({"messages": list(pair)}) + "\n" for pair in turns]
        (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        start += count
    (work / "rewards.py").write_text(REWARD, encoding="utf-8")


def run(*words: object) -> None:
    """One command of tunekit's, in a process of its own."""
    subprocess.run([sys.executable, "-m", "tunekit", *map(str, words)], check=True)


def trained(work: Path, name: str, recipe: dict[str, Any]) -> Path:
    """The run of a recipe, begun, gone on with or finished already."""
    path = work / f"{name}.json.yaml"
    path.write_text(json.dumps({**recipe, "output": {"dir": f"runs/{name}"}}), encoding="utf-8")
    run("train", path, "--resume")
    return work / "runs" / name


def exact(target: Path, work: Path, name: str) -> float:
    """Share of exact greedy answers to the held-out questions."""
    found = work / f"{name}.json"
    if not found.exists():
        asked = ["evaluation.max_new_tokens=8", "evaluation.batch_size=32"]
        run("eval", target, "--data", work / "test.jsonl", "--metric", "exact_match", *asked, "--json", found)
    return float(json.loads(found.read_text("utf-8"))["exact_match"])


def rewards(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [record["reward"] for record in map(json.loads, lines) if "reward" in record]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    for name, value in (("seeds", 3), ("steps", 60), ("rows", 160), ("prompts", 480), ("held-out", 200), ("group", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--save", action="store_true", help="write scripts/results/grpo.json")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "rewards.py").exists():
        write_rows(work, options.rows, options.prompts, options.held_out)
    lora = {"method": "lora", "r": 16, "alpha": 32}
    first = {
        "model": options.model,
        "data": {"train": "supervised.jsonl", "max_length": 128},
        "adapter": lora,
        "training": {"learning_rate": 1e-3, "epochs": 3, "micro_batch_size": 8, "gradient_accumulation_steps": 1},
    }
    begun, merged = trained(work, "supervised", first), work / "begun"
    if not merged.exists():
        run("merge", begun, "--output", merged)
    answers = [json.loads(line)["messages"][-1]["content"] for line in (work / "test.jsonl").open(encoding="utf-8")]
    found: dict[str, Any] = {
        "model": options.model,
        "steps": options.steps,
        "before": exact(merged, work, "before"),
        "best_constant": Counter(answers).most_common(1)[0][1] / len(answers),
        "seeds": [],
    }
    for seed in range(options.seeds):
        reward = [{"function": "rewards.py:score", "allow_code": True}]
        sampled = {"method": "grpo", "reward": reward, "num_generations": options.group, "max_completion_length": 8}
        steps = {"max_steps": options.steps, "micro_batch_size": 4, "gradient_accumulation_steps": 2, "seed": seed}
        recipe = {
            "model": str(merged),
            "data": {"train": "prompts.jsonl", "max_length": 128},
            "adapter": lora,
            "objective": sampled,
            "training": {**steps, "learning_rate": 2e-4, "scheduler": "constant", "save_steps": 20},
        }
        folder = trained(work, f"grpo-{seed}", recipe)
        worth = rewards(folder)
        after = exact(folder, work, f"after-{seed}")
        found["seeds"].append({"seed": seed, "after": after, "first": fmean(worth[:10]), "last": fmean(worth[-10:])})
        print(json.dumps(found["seeds"][-1]), flush=True)
    after = [each["after"] for each in found["seeds"]]
    found["after"], found["spread"] = fmean(after), stdev(after) if len(after) > 1 else None
    print(json.dumps(found, indent=1))
    if options.save:
        (RESULTS / "grpo.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
