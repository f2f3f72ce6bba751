"""Compares tunekit with a plain loop of peft and torch's AdamW on fifty rows of multiple choice, paired by seed.

    scripts/bench/run few_rows --model MODEL [--data sentiment,banking] [--seeds 0-9] [--sides 'NAME|NAME']
                          [--schedules constant,cosine] [--minutes N] [--work FOLDER] [--output FOLDER]

A unit is one run of eight epochs at learning rate 5e-4. All sides have the same rows, the same initial adapter and the
same order, and are scored by the same code. A unit is written to few_rows.json when it is finished, and is never
measured again. The rows come from TUNEKIT_SHARED/data. One thread.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from beside.harness import json_text
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from tunekit.data.batching.order import Share, epoch_rows
from tunekit.data.rows import Written
from tunekit.evaluation.choices import Choices, choice_scores, make_questions
from tunekit.formats.example import CompletionExample
from tunekit.machine.devices import make_devices
from tunekit.model.call import seed_for
from tunekit.recipe.load import load_recipe
from tunekit.targets.target import find_target, load_target
from tunekit.train import train_verb
from tunekit.training.step_numbers import last_jump

REPOSITORY = Path(__file__).resolve().parents[2]
RATE, EPOCHS, BATCH, WORDS = 5e-4, 8, 8, 7
EXACT = {"warmup_steps": 0, "max_grad_norm": None, "weight_decay": 0.01}  # as the plain loop has it
SIDES: dict[str, dict] = {  # ours: the recipe's training section, and the dtype; plain: the dtype of the base
    "untuned": {"dtype": "float32"},
    "ours": {"dtype": "auto", "training": {}},
    "ours, float32": {"dtype": "float32", "training": {}},
    "ours, without clipping": {"dtype": "auto", "training": {"max_grad_norm": None}},
    "ours, float32, as the plain loop, but clipped": {
        "dtype": "float32",
        "training": {**EXACT, "max_grad_norm": 1.0},
    },
    "ours, float32, as the plain loop": {"dtype": "float32", "training": EXACT},
    "plain": {"dtype": "float32"},
    "plain, bfloat16 base": {"dtype": "bfloat16"},
}
SCHEDULES = ("constant", "cosine")
REFERENCE = "ours, float32, as the plain loop"
WAYS = ("sum", "sum, no end", "mean_per_token", "calibrated")
T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # of 2 .. 10 values
HEAD = f"""# Fifty rows, an answer from a list

SmolLM2-135M-Instruct, LoRA r16 on all linear layers, fifty training rows of at most {WORDS} words, {EPOCHS} epochs of
batches of {BATCH}, {RATE:g}. Sides of a seed have the same rows, the same initial adapter and the same order. Accuracy
on 150 held-out rows: means over the seeds with their 95 % interval. Difference: of the accuracy by sums from
"{REFERENCE}", paired by seed. Losses: the largest difference of a step's loss from that side. Spikes: runs whose last
step has 50 times the loss of the steps just before. Made by `scripts/bench/run few_rows`.

| data | schedule | side | seeds | {" | ".join(WAYS)} | difference | losses | spikes |
|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"""


def sentiment(data: Path, seed: int) -> tuple[list[dict], list[dict]]:
    """Fifty training rows of a seed, and the first 150 test rows, of at most WORDS words each."""

    def read(name: str) -> list[dict]:
        rows = [json.loads(line) for line in (data / "sentiment_2way" / name).read_text("utf-8").splitlines()]
        return [
            {"prompt": f"{row['text']}\nSentiment:", "completion": f" {row['label']}"}
            for row in rows
            if len(row["text"].split()) <= WORDS
        ]

    return random.Random(seed).sample(read("train.jsonl"), 50), read("test.jsonl")[:150]


def banking(data: Path, seed: int) -> tuple[list[dict], list[dict]]:
    """Five training rows of each of ten intents drawn by seed, and fifteen test rows of each."""
    draw, found = random.Random(seed), []
    for name in ("train.csv", "test.csv"):
        texts: dict[str, list[str]] = {}
        with (data / "banking77" / name).open(encoding="utf-8", newline="") as file:
            for text, label in list(csv.reader(file))[1:]:
                if len(text.split()) <= WORDS:
                    texts.setdefault(label, []).append(text.strip())
        found.append(texts)
    train, test = found
    labels = draw.sample(
        sorted(label for label in train if len(train[label]) > 5 and len(test.get(label, [])) >= 15), 10
    )

    def rows(texts: list[str], label: str) -> list[dict]:
        return [{"prompt": f"{text}\nIntent:", "completion": f" {label.replace('_', ' ')}"} for text in texts]

    few = [row for label in labels for row in rows(draw.sample(train[label], 5), label)]
    return few, [row for label in labels for row in rows(test[label][:15], label)]


DATA = {"sentiment": sentiment, "banking": banking}


def initial_factor(name: str, seed: int, like: torch.Tensor) -> torch.Tensor:
    """The matrix A of tunekit's adapter before step 1. It depends only on the seed and the module's name."""
    a = torch.empty(like.shape)
    torch.nn.init.kaiming_uniform_(
        a, a=math.sqrt(5), generator=torch.Generator("cpu").manual_seed(seed_for("adapter", seed, name))
    )
    return a


def plain_loop(base: str, dtype: str, schedule: str, rows: list[dict], seed: int, place: Path) -> list[float]:
    """Train with peft and AdamW only; writes place/adapter, and returns the loss of each step."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    net = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    net = get_peft_model(net, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in net.named_parameters():
        if "lora_A" in name:
            module = name.removeprefix("base_model.model.").partition(".lora_A")[0]
            parameter.data.copy_(initial_factor(module, seed, parameter))
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=RATE), []
    steps = EPOCHS * math.ceil(len(rows) / BATCH)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 0, steps) if schedule == "cosine" else None
    net.train()
    for epoch in range(EPOCHS):
        order = epoch_rows((Share(0, len(rows)),), seed=seed, epoch=epoch, shuffle=True).tolist()
        for start in range(0, len(order), BATCH):
            texts = []
            for at in order[start : start + BATCH]:
                prompt = tokenizer(rows[at]["prompt"]).input_ids
                answer = tokenizer(rows[at]["completion"], add_special_tokens=False).input_ids
                texts.append((prompt, [*answer, tokenizer.eos_token_id]))
            width = max(len(prompt) + len(answer) for prompt, answer in texts)
            ids, labels = torch.zeros(len(texts), width, dtype=torch.long), torch.full((len(texts), width), -100)
            mask = torch.zeros_like(ids)
            for line, (prompt, answer) in enumerate(texts):
                end = len(prompt) + len(answer)
                ids[line, :end], mask[line, :end] = torch.tensor(prompt + answer), 1
                labels[line, len(prompt) : end] = torch.tensor(answer)
            loss = net(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
            losses.append(loss.item())
    net.save_pretrained(place / "adapter")
    return losses


def ours(base: str, side: dict, schedule: str, seed: int, place: Path) -> list[float]:
    """Run `tunekit train`; writes place/run, and returns the loss of each step."""
    recipe = {
        "model": {"name_or_path": base, "dtype": side["dtype"]},
        "data": {"train": [{"path": str(place / "train.jsonl"), "format": "prompt_completion"}], "max_length": 128},
        "adapter": {"method": "lora", "r": 16, "alpha": 32, "target_modules": "all-linear"},
        "training": {
            "learning_rate": RATE,
            "scheduler": schedule,
            "epochs": EPOCHS,
            "seed": seed,
            "save_steps": 10**6,
            "micro_batch_size": BATCH,
            "gradient_accumulation_steps": 1,
            **side["training"],
        },
        "output": {"dir": str(place / "run")},
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe, indent=1), "utf-8")
    train_verb(load_recipe(place / "recipe.yaml"), resume=False, dry_run=False, overwrite=(place / "run").exists())
    lines = (place / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def scored(base: str, dtype: str, adapter: Path | None, held: list[dict]) -> dict[str, float]:
    """Accuracies on the held-out rows, for four scores of a choice: the sum of its log-probabilities, the mean, the sum
    without the end token, and the calibrated score."""
    target = find_target(str(adapter or base), base if adapter else None, [f"model.dtype={dtype}"])
    loaded = load_target(target, torch.device("cpu"))
    form = "{}\n" + held[0]["prompt"].rpartition("\n")[2]
    chosen = Choices(tuple(sorted({row["completion"].strip() for row in held})), "sum", form)
    rows = [Written("", at, CompletionExample(row["prompt"], row["completion"])) for at, row in enumerate(held, 1)]
    questions = []
    for each in make_questions(rows, chosen, loaded.objective.rows):  # every answer with its end, then without
        endless = (one._replace(scored=(*one.scored[:-1], False)) for one in each.answers)
        questions.append(replace(each, answers=(*each.answers, *endless)))
    twice, right = Choices(chosen.texts * 2, "sum"), torch.tensor([each.right for each in questions[: len(held)]])
    scores = choice_scores(loaded.model, loaded.objective, twice, questions, make_devices(), batch_size=16)
    means, ways = scores / torch.tensor([each.scored for each in questions]), dict[str, torch.Tensor]()
    for way, values in (("sum", scores), ("mean_per_token", means)):
        ways |= zip((way, f"{way}, no end"), values.chunk(2, dim=1), strict=True)
    ways["calibrated"] = ways["sum"] - ways["sum"][len(held) :].log_softmax(1).logsumexp(0)
    return {way: float((values[: len(held)].argmax(1) == right).double().mean()) for way, values in ways.items()}


def run_unit(name: str, data: Path, base: str, work: Path) -> dict:
    """Train one unit and score it. `name`: data, side, schedule and seed, separated by bars."""
    kind, side_name, schedule, seed = name.split("|")
    side, place, started = SIDES[side_name], work / name.replace("|", "-").replace(" ", "_"), time.process_time()
    place.mkdir(parents=True, exist_ok=True)
    few, held = DATA[kind](data, int(seed))
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few), "utf-8")
    losses, adapter = list[float](), None
    if "training" in side:
        losses, adapter = ours(base, side, schedule, int(seed), place), place / "run" / "adapter"
    elif side_name != "untuned":
        losses, adapter = plain_loop(base, side["dtype"], schedule, few, int(seed), place), place / "adapter"
    trained = time.process_time()
    accuracy = scored(base, side["dtype"], adapter, held)
    seconds = [round(trained - started, 1), round(time.process_time() - trained, 1)]
    return {"losses": losses, "accuracy": accuracy, "rows": [len(few), len(held)], "cpu_seconds": seconds}


def interval(values: list[float]) -> str:
    """The mean, and its 95 % interval by Student's t."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    wide = T_QUANTILES[min(len(values), 10) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.3f} ± {wide:.3f}"


def page(units: dict[str, dict]) -> str:
    """The table of the finished units. A difference uses the seeds that both sides have."""
    lines, groups = [HEAD], dict[tuple[str, str, str], dict[str, dict]]()
    for name, unit in units.items():
        kind, side, schedule, seed = name.split("|")
        groups.setdefault((kind, schedule, side), {})[seed] = unit
    for (kind, schedule, side), own in sorted(groups.items()):
        reference = groups.get((kind, schedule, REFERENCE), {})
        both = [] if side == REFERENCE else sorted(own.keys() & reference.keys())
        paired = [own[seed]["accuracy"]["sum"] - reference[seed]["accuracy"]["sum"] for seed in both]
        apart = [
            max(abs(a - b) for a, b in zip(own[seed]["losses"], reference[seed]["losses"], strict=True))
            for seed in both
            if own[seed]["losses"]
        ]
        ways = [interval([unit["accuracy"][way] for unit in own.values()]).removeprefix("+") for way in WAYS]
        spikes = sum(last_jump(unit["losses"]) is not None for unit in own.values())
        cells = [kind, schedule, side, str(len(own)), *ways, interval(paired) if paired else ""]
        cells += [f"{max(apart):.1e}" if apart else "", str(spikes)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default=",".join(DATA))
    parser.add_argument("--sides", default="|".join(SIDES), help="names with a bar between them")
    parser.add_argument("--schedules", default=",".join(SCHEDULES))
    parser.add_argument("--seeds", default="0-9")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--work", default=str(REPOSITORY / ".cache" / "bench" / "few_rows"))
    parser.add_argument("--output", default=str(REPOSITORY / "scripts" / "results"))
    settings = parser.parse_args()
    torch.set_num_threads(1)
    path, started = Path(settings.output) / "few_rows.json", time.monotonic()
    first, _, last = settings.seeds.partition("-")
    for seed in range(int(first), int(last or first) + 1):
        for kind in settings.data.split(","):
            for schedule in settings.schedules.split(","):
                for side in settings.sides.split("|"):
                    name = f"{kind}|{side}|{schedule}|{seed}"
                    units = json.loads(path.read_text("utf-8")) if path.exists() else {}
                    if name in units or time.monotonic() - started > settings.minutes * 60:
                        continue
                    shared = Path(os.environ.get("TUNEKIT_SHARED", "")) / "data"
                    unit = run_unit(name, shared, settings.model, Path(settings.work))
                    path.write_text(json_text({**units, name: unit}) + "\n", "utf-8")
                    path.with_suffix(".md").write_text(page({**units, name: unit}), "utf-8")
                    print(f"{time.strftime('%H:%M:%S')} {name}: {unit['accuracy']['sum']}, {unit['cpu_seconds']} CPU s")


if __name__ == "__main__":
    main()
