"""Measures the recipe that `tunekit init` writes, against a fixed grid of learning rates and steps, and plain
baselines.

    scripts/bench/run defaults --model MODEL [--text-model MODEL] [--sets NAME,NAME] [--sides SIDE,SIDE] [--minutes N]
                               [--label init] [--most-steps N] [--list] [--table] [--work FOLDER] [--output FOLDER]

MODEL: all-MiniLM-L6-v2; --text-model: SmolLM2-135M-Instruct, for the sets of answers. Rows are made from
TUNEKIT_SHARED/data. A setting is chosen by its score on validation rows, and reported by its score on test rows. All
settings learn from the same rows as init's recipe, which keeps a share of the rows for evaluation.

Sides: plain (baselines), short (a few steps, for --list), init (init's recipe unchanged, three seeds), grid (rates
times steps of 16 rows, one seed), best (the two best settings of the grid, two more seeds), head (rates of the head
alone), random (24 random settings).
--label: the name under which init's recipe is recorded, to compare versions. A unit is one line of defaults.jsonl, and
is never measured again, so a stopped command can be continued. --minutes N: start no unit after N minutes.
--most-steps N: leave out the settings of the grid with more steps. --list: the units with their predicted CPU time.
--table: only print the table of what is measured.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from beside.default_sets import SETS, DataSet, Row, baselines, question, score
from beside.harness import REPOSITORY, find_base
from beside.units import parse_options, shared_data, write_parts

Unit = dict[str, Any]
STEPS, LONG_STEPS, ROWS_PER_STEP = (100, 300), 1000, 16  # LONG_STEPS: for the two middle rates, of encoders only
SHORT_STEPS = 10  # of a run that only measures the cost of the others
SEEDS, DRAWS, RANDOM = 3, 10, 24
HEAD_RATES = {1e-4: (1e-3, 1e-2), 3e-4: (3e-3, 1e-2)}  # rate of the adapter -> rates of the head
SIDES = ("plain", "short", "init", "grid", "best", "head", "random")
EVAL_ROWS, EVAL_SHARE = 200, 0.2  # the rows that init's recipe keeps for evaluation, and the other settings too


def grid(data: DataSet) -> list[str]:
    """The sides of the grid, such as `grid 0.001 300`."""
    cells = [(rate, steps) for rate in data.rates for steps in STEPS]
    cells += [(rate, LONG_STEPS) for rate in data.rates[1:3] if data.base == "encoder"]
    return [f"grid {rate:g} {steps}" for rate, steps in cells]


def drawn(name: str, number: str) -> dict[str, dict[str, Any]]:
    """A random setting, wider than the grid."""
    draw = random.Random(f"{name} {number}")
    rank = draw.choice((4, 8, 16, 32, 64))
    training = {
        "learning_rate": float(f"{10 ** draw.uniform(-4.3, -2):.1e}"),
        "max_steps": draw.choice((50, 100, 200, 400, 800, 1500)),
        "micro_batch_size": draw.choice((4, 8, 16, 32)),
        "gradient_accumulation_steps": 1,
        "scheduler": draw.choice(("cosine", "linear", "constant")),
        "warmup_ratio": draw.choice((0.0, 0.03, 0.1)),
    }
    return {"training": training, "adapter": {"r": rank, "alpha": rank * draw.choice((1, 2, 4))}}


def settings_of(name: str, side: str) -> dict[str, dict[str, Any]]:
    """The sections of a side's recipe that differ from the other sides."""
    kind, *values = side.split()
    if kind == "random":
        return drawn(name, values[0])
    rate, steps, *head = map(float, values)
    rows = ROWS_PER_STEP if SETS[name].base == "encoder" else 4
    training = {"micro_batch_size": rows, "gradient_accumulation_steps": ROWS_PER_STEP // rows}
    training |= {"learning_rate": rate, "max_steps": int(steps)}
    return {"training": training | ({"head_learning_rate": head[0]} if head else {})}


def keys_of(name: str, units: dict[str, Unit], label: str) -> Iterator[str]:
    """The names of the set's units, SET|SIDE|SEED. The seeds of the best settings follow the grid."""
    data, cells = SETS[name], [f"{name}|{side}|0" for side in grid(SETS[name])]
    yield from (f"{name}|plain|0", f"{name}|grid {data.rates[1]:g} {SHORT_STEPS}|0")
    if data.has_init:
        yield from (f"{name}|{label}|{seed}" for seed in range(DRAWS if data.draws else SEEDS))
    yield from cells
    if all(key in units for key in cells):
        yield from (f"{name}|{side}|{seed}" for side in best(name, units)[:2] for seed in range(1, SEEDS))
    else:  # for --list, until they are known
        yield from (f"{name}|best {number}|{seed}" for number in (1, 2) for seed in range(1, SEEDS))
    if data.has_head:
        pairs = [(rate, head) for rate, heads in HEAD_RATES.items() for head in heads]
        yield from (f"{name}|head {rate:g} {STEPS[-1]} {head:g}|0" for rate, head in pairs)
    if data.widened:
        yield from (f"{name}|random {number}|0" for number in range(RANDOM))


def best(name: str, units: dict[str, Unit]) -> list[str]:
    """The measured sides of the grid, best first on the validation rows; equal ones, the cheaper first."""
    sides = [side for side in grid(SETS[name]) if f"{name}|{side}|0" in units]
    return sorted(sides, key=lambda side: (-units[f"{name}|{side}|0"]["validation"], int(side.split()[2])))


def side_of(key: str, units: dict[str, Unit], label: str) -> str:
    """The word of --sides that measures this unit."""
    side, seed = key.split("|")[1:]
    kind, steps = side.split()[0], side.split()[-1]
    if kind == "grid":
        return "best" if seed != "0" else "short" if steps == str(SHORT_STEPS) else kind
    return "init" if side == label else kind


def recipe_of(name: str, side: str, seed: int, base: str, place: Path, rows: int) -> dict[str, Any]:
    """The recipe of a setting."""
    data, often = SETS[name], 10**6
    recipe = {
        "model": base,
        "data": {
            "train": str(place / "train.jsonl"),
            "eval": min(max(round(EVAL_ROWS / rows, 2), 0.01), EVAL_SHARE),
            "max_length": 256,
        },
        "objective": data.objective,
        "adapter": data.adapter,
        "training": {"seed": seed, "save_steps": often, "eval_steps": often},
        "evaluation": {"before_training": False},
        "output": {"dir": str(place / "run")},
    }
    for section, values in settings_of(name, side).items():
        recipe[section] = {**recipe[section], **values}
    return recipe


def write_recipe(name: str, side: str, seed: int, base: str, place: Path, rows: int) -> list[str]:
    """Write the unit's recipe to place/recipe.yaml. Returns what the command line adds."""
    from tunekit.init import init_verb

    file = place / "recipe.yaml"
    if len(side.split()) > 1:
        file.write_text(json.dumps(recipe_of(name, side, seed, base, place, rows)), "utf-8")
        return []
    method = SETS[name].adapter["method"]
    init_verb(str(place / "train.jsonl"), str(file), base, method, "none", None)
    return [f"training.seed={seed}", f"output.dir={place / 'run'}"]


def answers_of(data: DataSet, run: Path, rows: Sequence[Row], file: Path) -> list[float]:
    """The score of each row by the run's result."""
    import torch

    from tunekit.generate import answer
    from tunekit.targets.target import find_target, load_target

    overrides = ["evaluation.batch_size=32", "evaluation.max_new_tokens=48"]
    if data.kind == "choice":
        overrides.append(f"evaluation.choices={json.dumps(sorted({row['completion'].strip() for row in rows}))}")
    loaded = load_target(find_target(str(run), None, overrides), torch.device("cpu"))
    if data.kind == "preference":
        return preferred(loaded, file)
    asked = [(row["sentence1"], row["sentence2"]) if "sentence1" in row else question(row) for row in rows]
    system = rows[0]["messages"][0]["content"] if "messages" in rows[0] else None
    said: list[Any] = [text.strip() for text in answer(loaded, asked, system=system)]
    return score(data.kind, list(map(json.loads, said)) if data.kind in ("labels", "number") else said, rows)


def preferred(loaded: Any, file: Path) -> list[float]:
    """For each pair of answers, whether the model prefers the better one: then the loss is below log 2."""
    from tunekit.console import Console
    from tunekit.console.progress import CountProgress
    from tunekit.data.rows import load_evaluation_rows
    from tunekit.evaluate import evaluate_rows
    from tunekit.machine.devices import make_devices
    from tunekit.recipe.data import DataSection
    from tunekit.targets.reference import load_reference

    load_reference(loaded)
    source = [{"path": str(file)}]
    section = DataSection.model_validate({"train": source, "eval": source})
    rows = load_evaluation_rows(section, loaded.objective, seed=0)
    progress = CountProgress(Console(enabled=False))
    losses = evaluate_rows(loaded, rows, ["loss"], make_devices(), section, None, progress).sums.row_losses
    return [float(losses[number] < math.log(2)) for number in range(len(losses))]


def measure(key: str, bases: dict[str, str], place: Path) -> Unit:
    """Measure one unit in this process."""
    from tunekit.recipe.load import load_recipe
    from tunekit.train import train_verb

    name, side, seed = key.split("|")
    data = SETS[name]
    parts = data.parts(shared_data(), int(seed))
    started, clock = time.process_time(), time.monotonic()
    if side == "plain":
        rows = baselines(data.kind, parts["train"], parts["test"])
        return {"baselines": {kind: mean(values) for kind, values in rows.items()}, **line_of(rows), **spent(started)}
    shutil.rmtree(place, ignore_errors=True)
    write_parts(place, **parts)
    with (place / "output.txt").open("w", encoding="utf-8") as output, redirected(output):
        overrides = write_recipe(name, side, int(seed), bases[data.base], place, len(parts["train"]))
        loaded = load_recipe(place / "recipe.yaml", overrides)
        train_verb(loaded, resume=False, dry_run=False)
        train_seconds, share = (
            time.process_time() - started,
            (time.process_time() - started) / (time.monotonic() - clock),
        )
        scores = {
            part: answers_of(data, place / "run", parts[part], place / f"{part}.jsonl")
            for part in ("validation", "test")
        }
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [line["seconds"] for line in lines if "loss" in line]
    plan, training = json.loads((place / "run" / "plan.json").read_text("utf-8")), loaded.recipe.training
    return {
        **{part: mean(values) for part, values in scores.items()},
        "learning_rate": training.learning_rate,
        "steps": plan["steps"],
        "rows_per_step": (training.micro_batch_size or 0) * training.gradient_accumulation_steps,
        "losses": [round(line["loss"], 4) for line in lines if "loss" in line][:: max(1, len(steps) // 20)],
        "step_cpu_seconds": round(share * statistics.fmean(steps), 4),
        "train_cpu_seconds": round(train_seconds, 1),
        **line_of({"test": scores["test"]}),
        **spent(started),
    }


@contextlib.contextmanager
def redirected(output: Any) -> Iterator[None]:
    """A block whose prints go to a file."""
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        yield


def mean(values: Sequence[float]) -> float:
    return round(statistics.fmean(values), 5)


def spent(started: float) -> dict[str, float]:
    """The CPU seconds of the unit."""
    return {"cpu_seconds": round(time.process_time() - started, 1)}


def line_of(scores: dict[str, list[float]]) -> dict[str, Any]:
    """The scores of the test rows, short: right and wrong rows as 1 and 0."""
    return {
        "rows": {
            name: "".join(f"{value:.0f}" for value in values)
            if set(values) <= {0, 1}
            else [round(v, 4) for v in values]
            for name, values in scores.items()
        }
    }


def rows_of(unit: Unit, name: str = "test") -> list[float]:
    """The scores of the test rows."""
    return [float(value) for value in unit["rows"][name]]


def read_units(path: Path) -> dict[str, Unit]:
    """The finished units; a line that was not written to its end is left out."""
    units = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            unit = json.loads(line)
            units[unit.pop("unit")] = unit
    return units


def add_unit(path: Path, key: str, unit: Unit) -> None:
    """Append a unit, which is on the disk before the next one starts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps({"unit": key, **unit}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def predicted(key: str, units: dict[str, Unit], label: str) -> float | None:
    """The CPU seconds of a unit: its own, or those that its steps take by the measured settings of its set. None if
    nothing of the set is measured."""
    name, side, _ = key.split("|")
    if key in units:
        return units[key]["cpu_seconds"]
    if side == "plain":
        return 1.0
    own = [unit for other, unit in units.items() if other.startswith(f"{name}|{side}|")]
    if own:
        return own[0]["cpu_seconds"]
    cells = [unit for other, unit in units.items() if other.startswith(f"{name}|grid ")]
    if not cells:
        return None
    least = min(cells, key=lambda unit: unit["steps"])
    step = least["step_cpu_seconds"]
    if side == label or side.startswith("best"):
        return least["cpu_seconds"] + step * (STEPS[-1] - least["steps"])
    training = settings_of(name, side)["training"]
    share = training["micro_batch_size"] * training["gradient_accumulation_steps"] / ROWS_PER_STEP
    return least["cpu_seconds"] + step * (share * training["max_steps"] - least["steps"])


def listing(units: dict[str, Unit], names: Sequence[str], label: str) -> str:
    """The plan of runs: for each set, the units, the measured ones, and the CPU minutes that all take."""
    lines, total = [f"{'set':22} {'units':>6} {'measured':>9} {'CPU minutes':>12}"], 0.0
    for name in names:
        keys = list(keys_of(name, units, label))
        seconds = [predicted(key, units, label) for key in keys]
        known = sum(second or 0.0 for second in seconds)
        total += known
        minutes = f"{known / 60:12.1f}" if None not in seconds else f"{'?':>12}"
        lines.append(f"{name:22} {len(keys):6} {sum(key in units for key in keys):9} {minutes}")
    return "\n".join([*lines, f"in all, of the sets with a measured setting: {total / 3600:.2f} CPU hours"])


def difference(one: Sequence[Unit], other: Sequence[Unit]) -> tuple[float, float]:
    """The mean difference of the test rows' scores in points, each row the mean over seeds, and half its 95 %
    interval."""
    sides = [[statistics.fmean(values) for values in zip(*map(rows_of, units), strict=True)] for units in (one, other)]
    apart = [100 * (a - b) for a, b in zip(*sides, strict=True)]
    return statistics.fmean(apart), 1.96 * statistics.stdev(apart) / len(apart) ** 0.5


def table(units: dict[str, Unit], label: str) -> str:
    """The table: init's recipe against the best setting of the grid and the best plain baseline."""
    head = ("set", "plain", label, "best of the grid", "its score", "difference", "steps x rows", "CPU s", "kept apart")
    lines, apart = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"], dict[bool, list[float]]()
    for name, data in SETS.items():
        inits = [units[key] for seed in range(DRAWS) if (key := f"{name}|{label}|{seed}") in units]
        sides, plain = best(name, units), units.get(f"{name}|plain|0", {}).get("baselines", {})
        if not (inits or sides):
            continue
        cells = [name, ", ".join(f"{kind} {value:.3f}" for kind, value in plain.items())]
        scores = [unit["test"] for unit in inits]
        cells.append(
            f"{statistics.fmean(scores):.3f} ({', '.join(f'{value:.3f}' for value in scores)})" if scores else ""
        )
        chosen = [units[key] for seed in range(SEEDS) if sides and (key := f"{name}|{sides[0]}|{seed}") in units]
        cells += [
            sides[0].removeprefix("grid ") if sides else "",
            f"{mean([u['test'] for u in chosen]):.3f}" if chosen else "",
        ]
        seeds = min(len(inits), len(chosen)) if not data.draws else min(len(inits), len(chosen), 1)
        both = difference(inits[:seeds], chosen[:seeds]) if seeds else None
        if both:
            apart.setdefault(data.kept_apart, []).append(both[0])
        cells.append(f"{both[0]:+.1f} ± {both[1]:.1f}" if both else "")
        pair = [each[0] for each in (inits, chosen) if each]
        cells.append(" / ".join(f"{unit['steps']} x {unit['rows_per_step']}" for unit in pair))
        cells.append(" / ".join(f"{unit['train_cpu_seconds']:.0f}" for unit in pair))
        lines.append(f"| {' | '.join([*cells, 'yes' if data.kept_apart else ''])} |")
    means = [
        f"mean of {len(v)} sets{' kept apart' if k else ''}: {mean(v):+.1f} points" for k, v in sorted(apart.items())
    ]
    return "\n".join([*lines, "", *means])


def main() -> None:
    more = {
        "text_model": "",
        "sets": ",".join(SETS),
        "sides": ",".join(SIDES),
        "label": "init",
        "most_steps": LONG_STEPS,
    }
    settings = parse_options(__doc__, "defaults", **more, list=False, table=False)
    path, started, names = settings.path.with_suffix(".jsonl"), time.monotonic(), settings.sets.split(",")
    units, bases = read_units(path), {"encoder": settings.model, "decoder": settings.text_model}
    if settings.list or settings.table:
        print(listing(units, names, settings.label) if settings.list else table(units, settings.label))
        return
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout
    sides = settings.sides.split(",")
    for side in sides:
        for name in names:
            for key in keys_of(name, units, settings.label):
                if key in units or side_of(key, units, settings.label) != side or "|best " in key:
                    continue
                if side == "grid" and int(key.split("|")[1].split()[-1]) > settings.most_steps:
                    continue
                if time.monotonic() - started > settings.minutes * 60:
                    return
                if SETS[name].base == "decoder" and not bases["decoder"]:
                    bases["decoder"] = str(find_base())
                place = Path(settings.work).resolve() / key.replace("|", "-").replace(" ", "_")
                units[key] = {**measure(key, bases, place), "commit": commit.strip()}
                add_unit(path, key, units[key])
                shutil.rmtree(place, ignore_errors=True)
                seconds, result = units[key]["cpu_seconds"], units[key].get("test", units[key].get("baselines"))
                print(f"{time.strftime('%H:%M:%S')} {key}: {result}, {seconds} CPU s", flush=True)


if __name__ == "__main__":
    main()
