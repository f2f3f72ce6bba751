"""cpu.json -> cpu.md and its plots. Runs in the benchmark's own environment (matplotlib).    page.py FOLDER"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def main() -> None:
    folder = Path(sys.argv[1])
    result = json.loads((folder / "cpu.json").read_text("utf-8"))
    draw_speed(result, folder / "cpu-speed.png")
    draw_memory(result, folder / "cpu-memory.png")
    draw_losses(result, folder / "cpu-losses.png")
    (folder / "cpu.md").write_text("\n".join(page(result)) + "\n", "utf-8")


def page(result: dict) -> list[str]:
    """The page's lines."""
    hardware, table = result["hardware"], result["summary"]
    ours = table.get("tunekit")
    lines = [
        "# On one CPU core",
        "",
        f"SmolLM2-135M-Instruct, LoRA r16 on all linear layers, bfloat16, {result['rows_per_step']} rows of "
        f"instructions to a step, {result['steps']} steps, the same rows in the same order. {hardware['processor']} "
        f"({', '.join(hardware['matrix']) or 'no bfloat16 instructions'}), one thread pinned to one core, "
        f"{result['date']}, load average {result['load_before'][0]:.2f} before"
        + (" (recorded with --force)" if result["forced"] else "")
        + f". tunekit: {_versions(result['ours'], ('torch', 'transformers'))}; "
        f"theirs: {_versions(result['theirs'], ('trl', 'peft', 'torch', 'transformers'))}. "
        "Made by `scripts/bench/run compare`; every run's numbers, arguments and settings are in [cpu.json](cpu.json).",
        "",
        "| | tokens per CPU second (least, median, most) | tunekit's factor | peak, GB | above the weights, MB "
        "| tunekit's share |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in table.items():
        rates = row["tokens_per_cpu_second"]
        factor = share = ""
        if ours and name != "tunekit":
            factor = f"{ours['tokens_per_cpu_second'][1] / rates[1]:.2f}"
            share = f"{ours['above_weights_bytes'] / row['above_weights_bytes']:.2f}"
        shown = " / ".join(f"{rate:.0f}" for rate in rates)
        above = f"{row['above_weights_bytes'] / 1e6:.0f}"
        lines.append(f"| {name} | {shown} | {factor} | {row['peak_bytes'] / 1e9:.2f} | {above} | {share} |")
    lines += [
        "",
        "Tokens are those that are not padding, of step 3 to the last. Above the weights: peak resident memory less "
        "what a process holds that has imported the same modules and nothing else, less the base's file.",
        "",
    ]
    if result["candidates"]:
        lines += [
            "TRL's best flags are the fastest of these, each run once:",
            "",
            "| TRL's flags | tokens per CPU second | peak, GB |",
            "|---|--:|--:|",
        ]
    else:
        given = result["best_flags"]["name"]
        lines.append(f"TRL's best flags were given (`--best`), those of an earlier run that tried all: {given}.")
    for run in result["candidates"]:
        if "failed" in run:
            lines.append(f"| {run['name'].removeprefix('TRL, ')} | does not run | |")
        else:
            rate, peak = run["tokens_per_cpu_second"], run["peak_bytes"]
            lines.append(f"| {run['name'].removeprefix('TRL, ')} | {rate:.0f} | {peak / 1e9:.2f} |")
    lines += ["", "![speed](cpu-speed.png) ![memory](cpu-memory.png) ![loss](cpu-losses.png)", ""]
    return lines + _gate(result["gate"]) + _first_step(result.get("first_step"))


def _versions(found: dict, names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {found[name]}" for name in names if name in found)


def _gate(gate: dict) -> list[str]:
    if gate.get("skipped"):
        return ["The parity gate was skipped: these timings do not count."]
    lines = ["## The parity gate", "", "| | found | limit |", "|---|--:|--:|"]
    return lines + [f"| {check['what']} | {check['found']:.1e} | {check['limit']:.1e} |" for check in gate["checks"]]


def _first_step(table: dict | None) -> list[str]:
    if not table:
        return []
    lines = ["", "## From the command to the end of the first optimizer step", ""]
    lines += ["| | CPU seconds | seconds |", "|---|--:|--:|"]
    for name, row in table.items():
        cpu, wall = row["first_step_cpu_seconds"], row["first_step_wall_seconds"]
        lines.append(f"| {name.removeprefix('first step: ')} | {cpu:.2f} | {wall:.2f} |")
    return lines


def draw_speed(result: dict, path: Path) -> None:
    table = result["summary"]
    names = list(table)[::-1]
    figure, axes = pyplot.subplots(figsize=(7, 0.6 * len(names) + 1), constrained_layout=True)
    medians = [table[name]["tokens_per_cpu_second"][1] for name in names]
    bars = axes.barh(names, medians, color=["#c44e52" if name == "tunekit" else "#8c8c8c" for name in names])
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xlabel("tokens per CPU second, padding not counted")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_memory(result: dict, path: Path) -> None:
    """Resident memory over each competitor's first run."""
    figure, axes = pyplot.subplots(figsize=(7, 3.4), constrained_layout=True)
    for name, run in _first_runs(result).items():
        seconds = [sample[0] for sample in run["samples"]]
        axes.plot(seconds, [(sample[1] + sample[2]) / 1e9 for sample in run["samples"]], label=name, linewidth=1)
    axes.set_xlabel("seconds since the command")
    axes.set_ylabel("resident memory, GB")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_losses(result: dict, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 3.4), constrained_layout=True)
    for name, run in _first_runs(result).items():
        axes.plot(range(1, len(run["losses"]) + 1), run["losses"], label=name, linewidth=1, marker=".")
    mean = statistics.mean(result["summary"][next(iter(result["summary"]))]["losses"])
    axes.set_title(f"loss of each step (mean of the first curve {mean:.4f})", fontsize=9)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _first_runs(result: dict) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for run in result["runs"]:
        found.setdefault(run["name"], run)
    return found


if __name__ == "__main__":
    main()
