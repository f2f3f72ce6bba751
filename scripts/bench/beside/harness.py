"""Runs both sides of a comparison: tunekit as the real `tunekit train`, the other tool as a script in its own
environment.

Every run is a fresh process on one core with one thread (watch.py), and its result is a dict of plain values.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from beside.watch import ENVIRONMENT, watch

FOLDER = Path(__file__).resolve().parents[2]  # scripts/
REPOSITORY, BESIDE = FOLDER.parent, FOLDER / "bench" / "beside"
ROWS_PER_STEP, WARM_STEPS, RATE = 8, 2, 2e-4
MOST_LOAD = 0.7
PACKAGES = ("trl", "peft", "transformers", "torch", "accelerate", "datasets", "matplotlib")
PINNED = {"torch", "transformers", "accelerate", "datasets"}  # to what tunekit runs with
TRL = {
    "use_cpu": True,
    "num_train_epochs": 1,
    "per_device_train_batch_size": ROWS_PER_STEP,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "train_sampling_strategy": "sequential",
    "max_length": 2048,
    "disable_tqdm": True,
}
IMPORTS = """
import importlib, json, sys
def memory():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}
for name in json.load(open(sys.argv[1])):
    try:
        importlib.import_module(name)
    except BaseException:
        pass
print(json.dumps(memory()))
"""


class Bench:
    """The files and settings of a comparison, and methods that run each side."""

    def __init__(self, settings: argparse.Namespace, warm_steps: int = WARM_STEPS) -> None:
        self.settings, self.warm_steps = settings, warm_steps
        self.load, self.started = os.getloadavg(), time.monotonic()
        self.work = Path(settings.work).resolve()
        self.model = self.work / "model"
        self.rival_python = Path(settings.venv).resolve() / "bin" / "python"
        self.count = 0

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def place(self, name: str) -> Path:
        """A new folder for one run."""
        self.count += 1
        place = self.work / "runs" / f"{self.count:03d}-{name.replace(' ', '-').replace(',', '')}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return place

    def ours(self, name: str, *, rows: str = "few", before: str = "", warm: int | None = None, **changes: dict) -> dict:
        """One real `tunekit train`. `changes`: sections of the recipe, merged into the usual ones; `before`: code that
        the process runs first; `warm`: the number of first steps that do not count, if it differs from the usual
        number."""
        place = self.place(name)
        recipe = {
            "model": {"name_or_path": str(self.model), "dtype": "bfloat16"},
            "data": {
                "train": [{"path": str(self.work / f"{rows}.jsonl"), "format": "chat"}],
                "max_length": 2048,
                "packing": False,
                "shuffle": False,
            },
            "adapter": {"method": "lora", "r": 16, "alpha": 32, "target_modules": "all-linear"},
            "training": {
                "learning_rate": RATE,
                "scheduler": "constant",
                "warmup_steps": 0,
                "max_steps": self.settings.steps,
                "micro_batch_size": ROWS_PER_STEP,
                "gradient_accumulation_steps": 1,
                "save_steps": 10**6,
            },
            "output": {"dir": str(place / "run")},
        }
        for section, values in changes.items():
            recipe[section] = {**recipe.get(section, {}), **values}
        (place / "recipe.yaml").write_text(json.dumps(recipe, indent=1), "utf-8")  # JSON is YAML
        log = place / "run" / "metrics.jsonl"
        module = ["-m", "tunekit"] if not before else ["-c", f"{before}\nfrom tunekit.cli import main\nmain()"]
        argv = [sys.executable, *module, "train", str(place / "recipe.yaml")]
        found = self._watch(argv, log, place)
        lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        tokens = [sum(line["tokens"] for line in lines[: number + 1]) for number in range(len(lines))]
        return self._named(name, found, place, [line["loss"] for line in lines], tokens, recipe, warm)

    def recipe(self, name: str, file: Path, *overrides: str) -> dict:
        """One real `tunekit train` of a recipe as it is, evaluations included."""
        place = self.place(name)
        log = place / "run" / "metrics.jsonl"
        argv = [sys.executable, "-m", "tunekit", "train", str(file), f"output.dir={place / 'run'}", *overrides]
        found = self._watch(argv, log, place)
        lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        found["steps"] = [seen for seen, line in zip(found["steps"], lines, strict=True) if "loss" in line]
        steps = [line for line in lines if "loss" in line]
        losses, tokens = [line["loss"] for line in steps], [line["tokens"] for line in steps]
        return self._named(name, found, place, losses, tokens, {"recipe": file.name, "overrides": list(overrides)})

    def theirs(
        self, name: str, kind: str, *, rows: str = "ids", script: str = "rival.py", **specification: object
    ) -> dict:
        """Run a script of the other side once. `rows`: a file in the work folder, or a path, without the suffix
        .jsonl."""
        place = self.place(name)
        log = place / "steps.jsonl"
        config = {**TRL, "output_dir": str(place / "out"), **(specification.pop("config", None) or {})}
        whole = {
            "kind": kind,
            "model": str(self.model),
            "rows": str(self.work / f"{rows}.jsonl"),
            "steps_log": str(log),
            "losses": str(place / "losses.json"),
            **({} if kind == "loop" else {"config": config}),
            **specification,
        }
        if "save" in whole:
            whole["save"] = str(place / str(whole["save"]))
        (place / "specification.json").write_text(json.dumps(whole, indent=1), "utf-8")
        argv = [str(self.rival_python), str(BESIDE / script), str(place / "specification.json")]
        found = self._watch(argv, log, place)
        tokens = [json.loads(line)["tokens"] for line in log.read_text("utf-8").splitlines()]
        losses = json.loads((place / "losses.json").read_text("utf-8"))
        return self._named(name, found, place, losses, tokens, whole)

    def _watch(self, argv: list[str], log: Path, place: Path) -> dict:
        environment = {
            "PYTHONPATH": os.pathsep.join([str(BESIDE / "hook"), str(REPOSITORY)]),
            "COMPARE_MODULES": str(place / "modules.json"),
            "HF_DATASETS_CACHE": str(place / "datasets"),  # of its own: trl keeps the reference's scores there
        }
        return watch(argv, log, place / "output.txt", core=self.settings.core, environment=environment)

    def _named(
        self,
        name: str,
        found: dict,
        place: Path,
        losses: list[float],
        tokens: list[int],
        settings: dict,
        warm: int | None = None,
    ) -> dict:
        steps, first = found["steps"], min(warm or self.warm_steps, len(found["steps"]) - 1)
        seconds = steps[-1]["cpu_seconds"] - steps[first - 1]["cpu_seconds"] if first and len(steps) > first else None
        rate = None if not seconds else (tokens[-1] - tokens[first - 1]) / seconds
        found |= {"name": name, "place": str(place), "losses": losses, "tokens": tokens, "settings": settings}
        found |= {"tokens_per_cpu_second": rate, "first_step": steps[0]}
        speed = "" if rate is None else f"{rate:7.1f} tokens per CPU second, "
        self.say(
            f"{name:42} {speed}peak {found['peak_bytes'] / 1e9:.2f} GB, first step after {steps[0]['cpu_seconds']:.1f} "
            f"CPU s, {found['wall_seconds']:.0f} s in all"
        )
        return found

    def imported_bytes(self, run: dict, python: Path) -> dict:
        """The memory of a process that has only imported the modules of this run."""
        argv = [str(python), "-c", IMPORTS, str(Path(run["place"]) / "modules.json")]
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment)
        return json.loads(done.stdout.strip().splitlines()[-1])


def make_environment(venv: Path) -> None:
    """Make the environment of the other tools, with the same torch and transformers as tunekit."""
    if (venv / "bin" / "python").exists():
        return
    print(f"making {venv}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    wanted = [
        f"{name}=={importlib.metadata.version(name).partition('+')[0]}" if name in PINNED else name for name in PACKAGES
    ]
    subprocess.run([str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", *wanted], check=True)


def versions(python: Path) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, sys; "
        "print(json.dumps({d.name: d.version for d in m.distributions()} | {'python': sys.version.split()[0]}))"
    )
    found = json.loads(subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout)
    return {name: found[name] for name in (*PACKAGES, "tokenizers", "tunekit", "python") if name in found}


def hardware() -> dict:
    model, flags = platform.machine(), ""
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        name, _, value = line.partition(":")
        model = value.strip() if name.strip() == "model name" else model
        flags = value if name.strip() == "flags" else flags
    wide = sorted(flag for flag in set(flags.split()) if flag.startswith(("amx", "avx512_bf16", "avx512f")))
    return {"processor": model, "cores": os.cpu_count(), "matrix": wide, "system": platform.platform()}


def find_base() -> Path:
    """The path of SmolLM2-135M-Instruct, a GGUF file or a model folder. If neither exists, the file is downloaded."""
    named = os.environ.get("TUNEKIT_SMOLLM2")
    if named and Path(named).exists():
        return Path(named)
    found = REPOSITORY / ".cache" / "smollm2-gguf" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not found.exists():
        subprocess.run([str(FOLDER / "fetch_model")], check=True)
    return found


def make_parser(told: str | None, candidates: dict[str, dict], steps: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--only", help="competitors of the timed runs: tunekit, TRL, peft")
    parser.add_argument("--best", choices=sorted(candidates), help="TRL's best flags, instead of trying all")
    parser.add_argument("--venv", default=str(REPOSITORY / ".cache" / "bench-venv"))
    parser.add_argument("--work", default=str(REPOSITORY / ".cache" / "bench"))
    parser.add_argument("--output", default=str(FOLDER / "results"))
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--force", action="store_true", help="record on a busy machine; the result says so")
    return parser


def start(settings: argparse.Namespace, warm_steps: int = WARM_STEPS) -> Bench:
    """Prepare a comparison. Exits if the machine is busy, unless --force is set."""
    bench = Bench(settings, warm_steps)
    if bench.load[0] > MOST_LOAD and not settings.force:
        sys.exit(f"the load average is {bench.load[0]:.2f}, more than {MOST_LOAD}: wait, or give --force")
    return bench


def start_on_pairs(parser: argparse.ArgumentParser, warm_steps: int) -> tuple[argparse.Namespace, Bench, Path]:
    """Parse the options, and prepare the base, the environment and the file of pairs for a comparison on pairs."""
    from beside.prepare import write_base

    parser.add_argument("--data", help="JSON Lines of prompt, chosen, rejected")
    settings = parser.parse_args()
    bench, shared = start(settings, warm_steps), os.environ.get("TUNEKIT_SHARED", "")
    source = Path(settings.data or Path(shared) / "data" / "preference_dpo" / "dpo_280.jsonl").resolve()
    if not source.is_file():
        sys.exit("no pairs: give --data FILE (JSON Lines of prompt, chosen, rejected), or set TUNEKIT_SHARED")
    make_environment(Path(settings.venv))
    if not (bench.model / "model.safetensors").exists():
        write_base(find_base(), bench.model)
    return settings, bench, source


def facts(bench: Bench) -> dict:
    """What was measured with."""
    return {
        "argv": sys.argv,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "hardware": hardware(),
        "ours": versions(Path(sys.executable)),
        "theirs": versions(bench.rival_python),
        "environment": ENVIRONMENT,
        "load_before": bench.load,
        "forced": bench.load[0] > MOST_LOAD,
        "rows_per_step": ROWS_PER_STEP,
        "steps": bench.settings.steps,
        "weights_bytes": (bench.model / "model.safetensors").stat().st_size,
    }


def ended(bench: Bench) -> dict:
    """The facts to record after all measurements."""
    return {"load_after": os.getloadavg(), "minutes": (time.monotonic() - bench.started) / 60}


def json_text(value: object) -> str:
    """A value as JSON, in which a list of numbers takes one line."""
    text = json.dumps(value, indent=1)
    return re.sub(r"\[\s+([-+.,\de\s]*\d)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def keep(bench: Bench, result: dict, name: str) -> Path:
    """Write the result; the file."""
    path = Path(bench.settings.output) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json_text(result).replace(str(bench.work), "work")
    text = text.replace(str(bench.rival_python.parent.parent), "venv")
    text = text.replace(f"{REPOSITORY}/", "")  # places inside the repository, whatever holds it
    text = re.sub(r'"/(?:[^"/\s]+/)+([^"/\s]+)"', r'"\1"', text)  # other places, such as a cache, by their names
    path.write_text(text + "\n", "utf-8")
    bench.say(str(path))
    return path


def best_flags(bench: Bench, kind: str, candidates: dict[str, dict]) -> tuple[str, list[dict]]:
    """Run every candidate once; returns the name of the fastest one."""
    runs = []
    for name, changes in candidates.items():
        try:
            runs.append(bench.theirs(f"TRL, {name}", kind, **changes))
        except RuntimeError as error:
            bench.say(f"TRL, {name}: does not run: {str(error).strip().splitlines()[-1][:150]}")
            runs.append({"name": f"TRL, {name}", "failed": str(error)[-2000:]})
    fastest = max(runs, key=lambda run: run.get("tokens_per_cpu_second") or 0.0)
    return fastest["name"].removeprefix("TRL, "), runs


def interleaved(bench: Bench, sides: dict[str, Callable[[], dict]]) -> list[dict]:
    """Run every selected competitor once, then all of them again. A competitor that cannot run on this machine is left
    out."""
    wanted, runs = set(bench.settings.only.split(",")) if bench.settings.only else None, []
    for repeat in range(bench.settings.repeats):
        for name, run in list(sides.items()):
            if wanted is None or name.split(",")[0] in wanted or name in wanted:
                try:
                    runs.append(run() | {"repeat": repeat})
                except RuntimeError as error:
                    if name.startswith("tunekit"):
                        raise
                    bench.say(f"{name}: does not run: {str(error).strip().splitlines()[-1][:150]}")
                    runs.append({"name": name, "failed": str(error)[-2000:]})
                    del sides[name]
    return runs


def memory_above(bench: Bench, runs: list[dict], widened: int = 1) -> dict[str, dict]:
    """The memory above the weights of each competitor, from its first run. `widened`: the size of the base in memory
    divided by the size of its file."""
    found, weights = {}, widened * (bench.model / "model.safetensors").stat().st_size
    for run in (run for run in runs if "failed" not in run):
        if run["name"] not in found:
            python = Path(sys.executable) if run["name"].startswith("tunekit") else bench.rival_python
            found[run["name"]] = bench.imported_bytes(run, python)
        imported = sum(found[run["name"]].values())
        run["above_weights_bytes"] = run["peak_bytes"] - imported - weights
    return found


def summary(runs: list[dict]) -> dict[str, dict]:
    """The median, minimum and maximum of each competitor."""
    table = {}
    for name in dict.fromkeys(run["name"] for run in runs if "failed" not in run):
        own = [run for run in runs if run["name"] == name]
        rates = [run["tokens_per_cpu_second"] for run in own if run["tokens_per_cpu_second"]]
        row = {
            "tokens_per_cpu_second": [min(rates), statistics.median(rates), max(rates)] if rates else None,
            "peak_bytes": statistics.median(run["peak_bytes"] for run in own),
            "first_step_cpu_seconds": min(run["first_step"]["cpu_seconds"] for run in own),
            "first_step_wall_seconds": min(run["first_step"]["wall_seconds"] for run in own),
            "losses": own[0]["losses"],
        }
        if all("above_weights_bytes" in run for run in own):
            row["above_weights_bytes"] = statistics.median(run["above_weights_bytes"] for run in own)
        table[name] = row
    return table
