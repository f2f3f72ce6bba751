"""Measures full-size random models on one GPU: memory, tokens per second and loss, next to peft's on the same card.

    scripts/bench/run gpu --dry-run                        the plan of every row; needs no GPU
    scripts/bench/run gpu [--rows NAME,...] [--minutes 10] [--json FILE]
    scripts/bench/run gpu --table [--json FILE]            writes scripts/results/gpu.md from FILE
    scripts/bench/run gpu --rehearse [--rows NAME,...]     the same, tiny, on the simulated device of tests/devices

First tests/gpu runs, then the card's highest speeds (ceilings) are measured. Each row (a measured run) has its own
process and at most ten minutes; out of memory is a result too. FILE (scripts/results/gpu.json) is written after every
row. Rows that are in FILE do not run again unless --rows names them, so several calls of ten minutes can share the
work. If a row is expected to take longer than the rest of --minutes, it waits for the next call. peft's rows are
measured again in each call that compares with them. `--device cpu` runs stand-ins: the same code with a tiny model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "scripts" / "gpu"))
sys.path.insert(0, str(REPOSITORY))
if {"--rehearse", "--dry-run"} & set(sys.argv) == {"--rehearse"} and "TUNEKIT_SIMULATED_FAULTS" not in os.environ:
    os.environ.setdefault("TUNEKIT_SIMULATED_CAPABILITY", "9.0")
    import tests.devices.plugin  # noqa: F401  (before torch)

import torch  # noqa: E402
from arithmetic import Ceilings, as_json  # noqa: E402
from shapes import DOUBLES, ROWS, Row, rehearsed, shrink_models  # noqa: E402
from suite import counts, exit_at_sigterm, run_suite, stop  # noqa: E402

from tunekit.machine.variables import variables  # noqa: E402

RESULTS = REPOSITORY / "scripts" / "results"
LIBRARIES = ("torch", "triton", "transformers", "accelerate", "peft", "bitsandbytes", "liger_kernel", "flash_attn")
CEILINGS, CEILING_SECONDS = "ceilings", 240.0
CARD = "card"  # a child that only says which card it has
ROW_SECONDS = 600.0
REHEARSES = "--rehearse" in sys.argv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--rows", help="names, separated by commas; default: every row that has no result yet")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    exit_at_sigterm()
    known = {row.name: row for row in (DOUBLES if settings.device == "cpu" else ROWS)}
    if settings.rehearse:
        shrink_models()
        known = {name: rehearsed(row) for name, row in known.items()}
    names = settings.rows.split(",") if settings.rows else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"no such row: {', '.join(unknown)}; there are {', '.join(known)}")
    usual = (
        "gpu-rehearsed.json" if settings.rehearse else "gpu.json" if settings.device == "cuda" else "gpu-double.json"
    )
    file = settings.json or RESULTS / usual
    device = torch.device(settings.device, 0 if settings.device == "cuda" else None)  # torch's limits ask for an index
    if settings.child:
        run_child(settings.child, known, device, file)
    elif settings.dry_run:
        dry_run([known[name] for name in names], device, read_results(file), settings.json)
    elif settings.table:
        write_table(read_results(file), list(known.values()), device)
    elif device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; --dry-run prints the plan of every row, --device cpu runs the doubles")
    else:
        run_rows([known[name] for name in names], known, device, file, settings.minutes, again=bool(settings.rows))


def card(device: torch.device) -> dict[str, Any]:
    """What the figures hold for."""
    facts: dict[str, Any] = {"device": platform.processor() or platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts = {"device": properties.name, "memory_bytes": properties.total_memory}
        facts |= {"multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda}
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    python = {"python": platform.python_version(), "versions": versions}
    return {**facts, **python, "cores": os.cpu_count(), "load": os.getloadavg()[0]}


def read_results(file: Path) -> dict[str, Any]:
    """The results in a file: {card, ceilings, rows by name}; empty if there is no file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": {}}


def write_results(file: Path, results: dict[str, Any]) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".tmp")
    scratch.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    scratch.replace(file)


def known_ceilings(results: dict[str, Any]) -> Ceilings:
    """The measured ceilings of the card, or those of an H100 if none were measured."""
    found = results.get(CEILINGS)
    return Ceilings.of(found) if found and "product_flops" in found else Ceilings()


def dry_run(rows: list[Row], device: torch.device, results: dict[str, Any], file: Path | None) -> None:
    """Print the plan of each row."""
    from planning import plan_row

    ceilings, plans = known_ceilings(results), {}
    source = "measured" if ceilings.measured else "assumed"
    print(
        f"ceilings ({source}): {ceilings.product_flops / 1e12:.0f} TFLOP/s in bf16 products, "
        f"{ceilings.copy_bytes / 1e12:.1f} TB/s on the device, {ceilings.host_bytes / 1e9:.0f} GB/s from pinned memory"
    )
    for row in rows:
        plans[row.name] = plan_row(row, device, ceilings)
        print("\n".join(plan_lines(row, plans[row.name])), flush=True)
    if file is not None:
        write_results(file, {"ceilings": as_json(ceilings), "plans": plans})


def plan_lines(row: Row, plan: dict[str, Any]) -> list[str]:
    """A row's plan as text."""
    packed = "" if row.quantization == "none" else f", {row.quantization}"
    where = "resident" if row.engine == "resident" else f"streamed from {row.engine}"
    ways = ", liger kernels" if row.kernels != "none" else ""
    kind = "documents packed into" if row.documents else "rows of"
    lines = [
        f"\n{row.name} ({row.goal}, {row.tool}): {row.model}, {plan['parameters'] / 1e9:.2f}e9 parameters{packed}, "
        f"{gib(plan['stored_bytes'])} stored; {where}{ways}",
        f"  step: {row.micro_batches} x {row.rows} {kind} {row.length:,} = {row.step_tokens:,} tokens; "
        f"r {row.r} on {row.targets}; {row.steps} steps",
        f"  largest layer {mib(plan['layer_bytes'])}, two slots {mib(plan['slot_bytes'])}; "
        f"streaming breaks even from {plan['break_even_tokens']:,} tokens a step",
    ]
    if row.cap_bytes:
        lines.append(f"  the card capped to {gib(row.cap_bytes)}")
    lines.append(f"  adapter: {plan['trained_parameters']:,} parameters")
    if "predicted_bytes" in plan:
        parts = {name: size for name, size in plan["predicted_bytes"].items() if name != "total"}
        shown = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
        lines.append(
            f"  predicted peak {gib(plan['predicted_bytes']['total'])}: {shown}; "
            f"{plan['checkpointed_layers']} of {plan['layers']} layers recomputed"
        )
    floors = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in plan["floor_seconds"].items())
    return [
        *lines,
        f"  {plan['flops_per_token'] / 1e9:.1f} GFLOP a token; least time of a step: {floors}; "
        f"at most {plan['floor_tokens_per_second']:,.0f} tokens/s, 4N limit {plan['limit_tokens_per_second']:,.0f}",
        f"  expected: {plan['expected_minutes']:.1f} minutes with loading, at half of the product ceiling",
    ]


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def mib(size: float) -> str:
    return f"{size / 2**20:.0f} MiB"


def run_rows(
    rows: list[Row], known: dict[str, Row], device: torch.device, file: Path, minutes: float, *, again: bool
) -> None:
    """Run the tests, measure the ceilings, then run each row in its own process while minutes are left. The rival
    (peft's row) of a row runs once.

    This process itself uses no memory of the card, so that each row can use all of it.
    """
    ends, results, done = time.monotonic() + 60.0 * minutes, read_results(file), set[str]()
    if device.type == "cuda" and "tests" not in results:
        results["tests"] = run_tests(file, min(ROW_SECONDS, 60.0 * minutes))
        write_results(file, results)
        print(f"tests/gpu: {counts(results['tests'])}", flush=True)
    if CEILINGS not in results:
        left = max(1.0, ends - time.monotonic())
        results[CEILINGS] = in_child(CEILINGS, device, file, min(CEILING_SECONDS, left))
        write_results(file, results)
        print(f"{CEILINGS}: {json.dumps(results[CEILINGS])}", flush=True)
    for row in rows:
        if row.name in done or (row.name in results["rows"] and not again):
            continue
        group = [row] if row.rival is None or row.rival in done else [row, known[row.rival]]
        expected, left = sum(minutes_of(each, device, results) for each in group), ends - time.monotonic()
        if left < 60.0 * expected:
            print(f"{row.name}: waits for another call ({expected:.1f} minutes expected)", flush=True)
            continue
        for each in group:
            found = in_child(each.name, device, file, max(1.0, min(ROW_SECONDS, ends - time.monotonic())))
            found["when"] = datetime.now(UTC).isoformat(timespec="seconds")
            results["rows"][each.name] = {"row": as_json(each), **found}
            done.add(each.name)
            print(summary(each, results["rows"][each.name]), flush=True)
        if row.rival is not None:  # of this call: the speeds of two calls may be those of two cards
            results["rows"][row.name]["rival_tokens_per_second"] = results["rows"][row.rival].get("tokens_per_second")
        write_results(file, results)
    print(f"results: {file}")
    print_faults()


def print_faults() -> None:
    """After a rehearsal, print the faults that the simulated device found: operations that a real device would compute
    wrongly."""
    if REHEARSES:
        from tests.devices.plugin import faults

        seen = faults()
        print(f"faults that the device saw: {len(seen)}", *sorted(set(seen))[:8], sep="\n  ")


def minutes_of(row: Row, device: torch.device, results: dict[str, Any]) -> float:
    """The minutes that a row is expected to take."""
    from planning import expected_minutes

    return expected_minutes(row, device, known_ceilings(results))


def run_tests(file: Path, seconds: float) -> dict[str, dict[str, Any]]:
    """Run tests/gpu. Returns the outcome of each test, also from earlier calls with the same results."""
    return run_suite(file.with_suffix(".tests"), seconds, plugins=("tests.devices.plugin",) if REHEARSES else ())


def in_child(name: str, device: torch.device, file: Path, seconds: float) -> dict[str, Any]:
    """Run a row in a child process. Returns the results that the child wrote; if it did not finish, also how it
    ended."""
    answer = file.with_name(f".{name}-of-{file.name}")
    answer.unlink(missing_ok=True)
    answer.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--child", name, "--device", device.type, "--json", str(answer)]
    command += ["--rehearse"] if REHEARSES else []
    environment = variables() | os.environ | {"TUNEKIT_DEVICE": device.type}
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        errors, ended = child.communicate(timeout=seconds)[1], {}
    except subprocess.TimeoutExpired:
        errors, ended = "", {"outcome": f"stopped after {seconds:.0f} s"}
    finally:  # also after Ctrl-C
        stop(child)
    measured = read_results(answer)
    answer.unlink(missing_ok=True)
    if ended or "outcome" not in measured:
        measured.pop("rows", None)
        lines = errors.strip().splitlines() or ["no output"]
        last = next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[-1])
        measured |= ended or {"outcome": f"ended with {child.returncode}: {last}", "output": errors[-4000:]}
    return measured


def run_child(name: str, known: dict[str, Row], device: torch.device, answer: Path) -> None:
    """Measure one row, or the ceilings. The file `answer` always contains the results so far, so they remain if the
    child is stopped."""
    from tunekit.errors import TunekitError

    result: dict[str, Any] = {"card": card(device)}

    def keep(part: dict[str, Any]) -> None:
        result.update(part)
        write_results(answer, result)

    try:
        for part in child_work(name, known, device, answer, keep):
            keep(part)
        keep({"outcome": result.get("outcome", "ok")})
    except torch.OutOfMemoryError as error:
        peak = {"peak_allocated_bytes": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {}
        keep({"outcome": "out of memory", "message": str(error).partition("\n")[0], **peak})
    except (TunekitError, ImportError) as error:
        keep({"outcome": f"not run: {error}"})


def child_work(
    name: str, known: dict[str, Row], device: torch.device, answer: Path, keep: Callable[[dict[str, Any]], None]
) -> Iterator[dict[str, Any]]:
    """Do the work of a child: yields first the plan, then the measurements. `keep` is called with the steps of a
    row."""
    if name == CARD:
        return
    from planning import linear_shapes, plan_row

    if name == CEILINGS:
        from ceilings import measure_ceilings

        model = "llama-3.1-8b" if device.type == "cuda" else "tiny"
        yield measure_ceilings(device, linear_shapes(model, device), small=device.type == "cpu" or REHEARSES)
        return
    row = known[name]
    plan = plan_row(row, device, known_ceilings(read_results(answer.with_name(answer.name.partition("-of-")[2]))))
    yield {"plan": plan}
    if row.tool == "peft":
        import rival

        yield rival.run_row(row, device)
    else:
        import ours

        yield ours.run_row(row, device, plan, keep)


def summary(row: Row, found: dict[str, Any]) -> str:
    """A row's result as one line."""
    if "tokens_per_second" not in found:
        return f"{row.name}: {found['outcome']}"
    share = found["tokens_per_second"] / found["plan"]["limit_tokens_per_second"]
    peak = found.get("peak_allocated_bytes")
    held = "" if peak is None else f", peak {gib(peak)} allocated, {gib(found['peak_reserved_bytes'])} reserved"
    return (
        f"{row.name}: {found['tokens_per_second']:,.0f} tokens/s (least {found['tokens_per_second_least']:,.0f}), "
        f"{share:.0%} of the 4N limit{held}, host {gib(found['host_anonymous_bytes'])} anonymous, "
        f"loss {found['losses'][0]:.4f} -> {found['losses'][-1]:.4f}"
    )


def write_table(results: dict[str, Any], rows: list[Row], device: torch.device) -> None:
    """scripts/results/gpu.md."""
    from table import make_table

    file = RESULTS / ("gpu-rehearsed.md" if REHEARSES else "gpu.md" if device.type == "cuda" else "gpu-double.md")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(make_table(results, rows), encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
