"""Compares tunekit's grpo with TRL's GRPOTrainer on one core: tokens per CPU second of training, and memory above the
weights.

    scripts/bench/run grpo [--prompts 128] [--completions 128] [--steps 3] [--repeats 2] [--only NAME,NAME]
                       [--venv FOLDER] [--work FOLDER] [--data FILE] [--output FOLDER] [--core N] [--force]

SmolLM2-135M-Instruct in float32, LoRA r16 on all linear layers, one prompt with 8 completions to an optimizer step, the
same token ids, rewards and initial adapter. Neither side samples: TRL gets given completions through its
rollout function, and tunekit gets the same completions in place of its own. `scripts/bench/run sampling` compares
sampling. Prompts have about --prompts tokens; completions have between half and one and a half times --completions
tokens. A token of a prompt counts once for each completion, on both sides. Runs and memory are measured as in
`scripts/bench/run compare`. Timings count only if the losses and gradient norms of all runs agree within 1e-3. Results
are in grpo.json and grpo.md; with --only, the results of the other competitors are kept.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from beside.harness import Bench, ended, facts, interleaved, keep, make_parser, start_on_pairs, summary
from beside.harness import memory_above as memory_of

from tunekit.data.rows import load_rows
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.objectives.base import make_objective
from tunekit.recipe.data import DataSection
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.grpo import GrpoSettings

FIGURES = {
    "minutes": 25,
    "options": "--force",
    "result": "grpo.json",
    "figures": {
        "defaults": {
            "what": "GRPO against TRL's defaults",
            "unit": "tokens per CPU second",
            "ours": "summary/tunekit/tokens_per_cpu_second/1",
            "theirs": "summary/TRL, defaults/tokens_per_cpu_second/1",
        },
        "memory": {
            "what": "GRPO, memory above the weights, against TRL's defaults",
            "unit": "MB",
            "divisor": 1e6,
            "ours": "summary/tunekit/above_weights_bytes",
            "theirs": "summary/TRL, defaults/above_weights_bytes",
        },
    },
}
GROUP, WARM_STEPS, SAME = 8, 1, 1e-3
PLAIN = {"gradient_checkpointing": False}
THEIRS = {  # TRL's settings; a step has the same 8 completions in each
    "TRL, defaults": {},
    "TRL, without recomputation": PLAIN,
    "TRL, two at a time, without recomputation": {
        **PLAIN,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": GROUP // 2,
    },
}
RECORDED = """
import json
from pathlib import Path
from tunekit.objectives.losses.samples import SampledLoss
from tunekit.objectives.rows.prompts import Sample

GROUPS = [json.loads(line)["completion_ids"] for line in Path({rows!r}).read_text("utf-8").splitlines()]
SampledLoss.sampled = lambda self, run, window, rows: [
    [Sample(ids, True, str(number)) for number, ids in enumerate(GROUPS[row.number])] for row in rows
]
"""
REWARD = """
def score(completions, rewards):
    return [given[int(said[0]["content"])] for said, given in zip(completions, rewards, strict=True)]
"""
PAGE = """# GRPO on one CPU core

SmolLM2-135M-Instruct in float32, LoRA r16 on all linear layers, one prompt of {prompts} tokens with 8 completions of
{least} to {most} tokens to a step; the same token ids, rewards and initial adapter on both sides, neither of which
samples. One thread. {steps} steps, of which the first does not count. Losses differ by {losses:.1e} at most, gradient
norms by {norms:.1e} of themselves. {processor}, {date}, load average {load:.2f} before. trl {trl}, peft {peft}, torch
{torch}, transformers {transformers}.
Made by `scripts/bench/run grpo`; every run's numbers are in [grpo.json](grpo.json).

"""
HEAD = (
    "| | tokens per CPU second (least, median, most) | factor of the first line | peak, GB | above the weights, MB "
    "| share of the first line |\n|---|--:|--:|--:|--:|--:|\n"
)


def ours(bench: Bench, name: str, **training: object) -> dict:
    """Run `tunekit train` with given completions."""
    rows, code = bench.work / "groups.jsonl", bench.work / "rewards.py"
    longest = max(len(ids) for group in completions_of(rows) for ids in group)
    return bench.ours(
        name,
        before=RECORDED.format(rows=str(rows)),
        model={"dtype": "float32"},
        data={"train": [{"path": str(bench.work / "prompts.jsonl")}], "max_length": 4096},
        objective={
            "method": "grpo",
            "reward": [{"function": f"{code}:score", "allow_code": True}],
            "num_generations": GROUP,
            "max_completion_length": longest,
        },
        training={"micro_batch_size": 1, **training},
    )


def theirs(bench: Bench, name: str, initial: str, **config: object) -> dict:
    """Run GRPOTrainer with given completions."""
    own = {"bf16": False, "model_init_kwargs": {"dtype": "float32"}, "shuffle_dataset": False, "num_generations": GROUP}
    own |= {"max_length": None, "train_sampling_strategy": None, **config}
    return bench.theirs(name, "grpo", rows="groups", config=own, init=initial)


def measured(bench: Bench, kept: list[dict]) -> dict:
    """Run both sides in turns. `kept`: earlier runs; those of a competitor that runs again are dropped."""
    bench.say("the initial adapter")
    begin = ours(bench, "initial", max_steps=1, warmup_steps=1)  # a warm-up's first step has learning rate 0
    initial = str(Path(begin["place"]) / "run" / "adapter")
    sides = {"tunekit": lambda: ours(bench, "tunekit")}
    for name, config in THEIRS.items():
        sides[name] = lambda name=name, config=config: theirs(bench, name, initial, **config)
    runs = interleaved(bench, sides)
    imported = memory_of(bench, runs, widened=2)
    for run in runs:
        run["norms"] = norms_of(run)
    now = {run["name"] for run in runs}
    runs = [*(run for run in kept if run["name"] not in now), *runs]
    order = [*sides]
    runs.sort(key=lambda run: order.index(run["name"]))
    count = [sum(map(len, group)) for group in completions_of(bench.work / "groups.jsonl")]
    return {
        "runs": runs,
        "imported_bytes": imported,
        "completion_tokens": count,
        "largest_difference_of_losses": differences([run["losses"] for run in runs if run.get("losses")]),
        "largest_difference_of_norms": differences([run["norms"] for run in runs if run["norms"]], share=True),
        "summary": summary(runs),
    }


def norms_of(run: dict) -> list[float]:
    """The gradient norm of each step."""
    if "failed" in run:
        return []
    place = Path(run["place"])
    if (place / "norms.json").exists():
        return json.loads((place / "norms.json").read_text("utf-8"))  # type: ignore[no-any-return]
    lines = (place / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["grad_norm"] for line in lines]


def differences(curves: list[list[float]], share: bool = False) -> float:
    """The largest difference between the numbers of two runs at the same step. `share`: the relative difference."""
    every = [(one, other) for values in zip(*curves, strict=True) for one in values for other in values]
    return max(abs(one - other) / (abs(other) if share else 1.0) for one, other in every)


def completions_of(rows: Path) -> list[list[list[int]]]:
    return [json.loads(line)["completion_ids"] for line in rows.read_text("utf-8").splitlines()]


def write_rows(source: Path, bench: Bench, prompt_tokens: int, completion_tokens: int) -> None:
    """Write prompts.jsonl, which tunekit reads, and groups.jsonl: the token ids of the prompts and of their
    completions, which are cut from answers."""
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(bench.model)))
    lines = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    texts = " ".join(str(turn["content"]) for row in lines for turn in row["chosen"])
    answers, draw = tokenizer.native(texts)["input_ids"], np.random.default_rng(0)
    asked, prompts = " ".join(row["prompt"][-1]["content"] for row in lines), list[dict]()
    words = asked.split()
    for number in range(bench.settings.steps):
        rewards = draw.integers(0, 4, GROUP).astype(float).tolist()
        text = " ".join(words[number * prompt_tokens :][: prompt_tokens // 2])
        prompts.append({"prompt": [{"role": "user", "content": text}], "rewards": rewards})
    path = bench.work / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in prompts), "utf-8")
    (bench.work / "rewards.py").write_text(REWARD, "utf-8")
    reward = {"function": f"{bench.work}/rewards.py:score", "allow_code": True}
    objective = make_objective(GrpoSettings.model_validate({"reward": [reward]}), tokenizer)
    rows = load_rows(DataSection(train=[{"path": str(path)}], max_length=4096), objective, seed=0).train
    half = completion_tokens // 2
    with (bench.work / "groups.jsonl").open("w", encoding="utf-8") as file:
        for number, row in enumerate(prompts):
            sizes = draw.integers(half, completion_tokens + half, GROUP).tolist()
            starts = draw.integers(0, len(answers) - completion_tokens - half, GROUP).tolist()
            groups = [answers[at : at + size] for at, size in zip(starts, sizes, strict=True)]
            ids = rows[number].parts["prompt"].tolist()
            file.write(json.dumps({"prompt_ids": ids, "completion_ids": groups, "rewards": row["rewards"]}) + "\n")


def page(found: dict, prompts: int) -> str:
    first, mine = next(iter(found["summary"].items()))
    told = {name: found["theirs"].get(name, "?") for name in ("trl", "peft", "torch", "transformers")}
    told |= {"processor": found["hardware"]["processor"], "load": found["load_before"][0]}
    told |= {"losses": found["largest_difference_of_losses"], "norms": found["largest_difference_of_norms"]}
    half = found["completions"] // 2
    told |= {"prompts": prompts, "least": half, "most": found["completions"] + half}
    lines = [PAGE.format(**{**found, **told}), HEAD]
    for name, row in found["summary"].items():
        rates, above = row["tokens_per_cpu_second"], row["above_weights_bytes"]
        factor = mine["tokens_per_cpu_second"][1] / rates[1]
        cells = [" / ".join(f"{rate:.0f}" for rate in rates), "" if name == first else f"{factor:.2f}"]
        share = "" if name == first else f"{mine['above_weights_bytes'] / above:.2f}"
        cells += [f"{row['peak_bytes'] / 1e9:.2f}", f"{above / 1e6:.0f}", share]
        lines.append(f"| {name} | {' | '.join(cells)} |\n")
    return "".join(lines)


def main() -> None:
    parser = make_parser(__doc__, {name: {} for name in THEIRS}, steps=3)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--completions", type=int, default=128)
    settings, bench, source = start_on_pairs(parser, WARM_STEPS)
    write_rows(source, bench, settings.prompts, settings.completions)
    lengths = [len(json.loads(line)["prompt_ids"]) for line in (bench.work / "groups.jsonl").open(encoding="utf-8")]
    path = Path(settings.output) / "grpo.json"
    earlier = json.loads(path.read_text("utf-8")) if settings.only and path.exists() else {}
    same = earlier.get("completions") == settings.completions and earlier.get("prompt_tokens") == lengths
    kept = earlier["runs"] if same else []
    found = {**facts(bench), "completions": settings.completions, "prompt_tokens": lengths, **measured(bench, kept)}
    worst = max(found["largest_difference_of_losses"], found["largest_difference_of_norms"])
    if worst > SAME:
        sys.exit(f"losses or gradient norms differ by {worst:.1e}: no timing counts")
    for run in found["runs"]:
        run.pop("samples", None)  # of memory over time, which no page shows
    path = keep(bench, found | ended(bench), "grpo.json")
    path.with_suffix(".md").write_text(page(found, round(float(np.mean(lengths)))), "utf-8")


if __name__ == "__main__":
    main()
