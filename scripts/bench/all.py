"""Run the benchmarks that the documents quote, and write their newest figures next to earlier figures.

    scripts/bench/run all [--minutes N] [--only NAME,NAME] [--again] [--page]

A benchmark is included if its file contains a literal FIGURES (see compare.py); there is no other list:

    minutes    its duration; the benchmark is not started if fewer minutes are left
    options    its command line. $NAME is read from the environment; $RESULTS is scripts/results
    result     the JSON file that it writes there
    figures    name -> {what, unit, ours, theirs (optional), digits, divisor}

`ours` and `theirs` lead to a number in the result: keys with a slash between them; {PATH} in a key is replaced by the
text at that path. Every measurement is added to all.json as soon as it is made, so the command can be stopped: the next
call continues with the benchmarks that were not measured with this code on this processor. Failures and benchmarks that
were left out are printed; with a failure the exit code is 1. The page is all.md. A result that a direct call of a
benchmark wrote is added with its own date, if it has a date and a processor; such a benchmark is still due.

Documents quote a figure as <!--figure NAME.FIGURE SIDE-->42<!--/figure-->. SIDE is ours, theirs, ratio, date or
processor. The command also fills in these figures; with --page it measures nothing.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from beside.harness import FOLDER, REPOSITORY, hardware

RESULTS = FOLDER / "results"
VERSIONS = ("torch", "transformers", "trl", "peft")
QUOTED = re.compile(r"(<!--figure (?P<name>\w+)\.(?P<figure>\w+) (?P<side>\w+)-->)(?P<text>.*?)(<!--/figure-->)")
PAGE = """# Measured figures

Made by `scripts/bench/run all`: the newest measurement of each benchmark, and next to it the earlier ones. A ratio is
tunekit's figure by the other side's. Every measurement, with the versions of the packages, is in [all.json](all.json).

| figure | unit | tunekit | other side | ratio | measured | processor | load | earlier |
|---|---|--:|--:|--:|---|---|--:|---|
"""

Declaration = dict[str, Any]
Record = dict[str, Any]  # one measurement of one benchmark


def declarations(folder: Path) -> dict[str, Declaration]:
    """The FIGURES of each benchmark, read without importing it."""
    found = {}
    for file in sorted(folder.glob("*.py")):
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "FIGURES":
                found[file.stem] = ast.literal_eval(node.value)
    return found


def value_at(result: Any, path: str) -> Any:
    """The value at a path of a result. Raises: KeyError, IndexError."""
    path = re.sub(r"\{([^}]*)\}", lambda match: str(value_at(result, match[1])), path)
    for key in path.split("/"):
        result = result[int(key)] if isinstance(result, list) else result[key]
    return result


def read_figures(declaration: Declaration, results: Path) -> dict[str, dict[str, float]]:
    """The declared figures of a result: figure -> {ours, theirs}."""
    result = json.loads((results / declaration["result"]).read_text("utf-8"))
    return {
        name: {side: value_at(result, figure[side]) for side in ("ours", "theirs") if side in figure}
        for name, figure in declaration["figures"].items()
    }


def values_of(result: Any, key: str) -> list[Any]:
    """All values under this key, at any depth."""
    parts = list(result.values()) if isinstance(result, dict) else result if isinstance(result, list) else []
    own = [result[key]] if isinstance(result, dict) and key in result else []
    return [*own, *(value for part in parts for value in values_of(part, key))]


def add_results(declared: dict[str, Declaration], measured: Measurements) -> None:
    """Add the results of direct calls that are newer than the newest measurement of their benchmark."""
    for name, declaration in declared.items():
        file, records = measured.results / declaration["result"], measured.of(name)
        result = json.loads(file.read_text("utf-8")) if file.exists() else {}
        heads = {figure["ours"].partition("/")[0] for figure in declaration["figures"].values()}
        parts = [result[head] for head in heads if values_of(result.get(head), "date")] or [result]
        dates, processors = sorted(values_of(parts, "date")), set(values_of(parts, "processor"))
        if not dates or len(processors) != 1 or (records and records[0]["date"] >= dates[0]):
            continue
        load = next((each for each in values_of(result, "load") if isinstance(each, float)), None)
        try:
            figures = read_figures(declaration, measured.results)
        except (KeyError, IndexError) as error:
            print(f"{name}: {file.name} lacks {error}", flush=True)
            continue
        measured.add({
            "benchmark": name, "date": dates[0], "processor": processors.pop(), "load": load, "code": None,
            "versions": {}, "figures": figures,
        })  # fmt: skip


def code_hash(package: Path) -> str:
    """The sha256 of the package's source files. It shows whether a measurement was made with this code."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


class Measurements:
    """The list of all measurements in all.json, oldest first."""

    def __init__(self, results: Path) -> None:
        self.results, self.path = results, results / "all.json"
        self.records: list[Record] = json.loads(self.path.read_text("utf-8")) if self.path.exists() else []

    def add(self, record: Record) -> None:
        """Add a measurement, and write it at once."""
        self.records.append(record)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.records, indent=1) + "\n", "utf-8")
        part.replace(self.path)

    def of(self, name: str, figure: str | None = None) -> list[Record]:
        """The measurements of a benchmark, newest first; with `figure`, only those that have it."""
        named = [each for each in self.records if each["benchmark"] == name]
        return [each for each in reversed(named) if figure is None or figure in each["figures"]]


def shown(figure: Declaration, record: Record, name: str, side: str) -> str:
    """A figure as text: `side` is ours, theirs, ratio, date or processor."""
    if side in ("date", "processor"):
        return str(record[side][:10] if side == "date" else record[side])
    values = record["figures"][name]
    if side == "ratio":
        return f"{values['ours'] / values['theirs']:.2f}"
    return f"{values[side] / figure.get('divisor', 1):,.{figure.get('digits', 0)}f}"


def page(declared: dict[str, Declaration], measured: Measurements) -> str:
    """all.md."""
    lines = []
    for name, declaration in declared.items():
        for key, figure in declaration["figures"].items():
            records = measured.of(name, key)
            two = "theirs" in figure
            cells = [f"{name}.{key}: {figure['what']}", figure["unit"]]
            if not records:
                lines.append([*cells, *[""] * 3, "not yet", "", "", ""])
                continue
            newest = records[0]
            cells += [shown(figure, newest, key, side) if two or side == "ours" else "" for side in SIDES]
            earlier = [
                f"{shown(figure, each, key, 'ratio' if two else 'ours')} ({each['date'][:10]}, {each['processor']})"
                for each in records[1:]
            ]
            load = "" if newest["load"] is None else f"{newest['load']:.1f}"
            lines.append([*cells, newest["date"], newest["processor"], load, "; ".join(earlier)])
    return PAGE + "".join(f"| {' | '.join(line)} |\n" for line in lines)


SIDES = ("ours", "theirs", "ratio")


def filled(text: str, declared: dict[str, Declaration], measured: Measurements) -> str:
    """A document with the newest value in each quotation. Raises: KeyError for a figure that nobody measured."""

    def newest(match: re.Match[str]) -> str:
        name, key = match["name"], match["figure"]
        figure = declared[name]["figures"][key]
        records = measured.of(name, key)
        if not records:
            raise KeyError(f"{name}.{key} was never measured")
        return f"{match[1]}{shown(figure, records[0], key, match['side'])}{match[6]}"

    return QUOTED.sub(newest, text)


def documents() -> list[Path]:
    """The documents that may quote figures."""
    return [REPOSITORY / "README.md", *sorted((FOLDER / "site").rglob("*.md"))]


def write_documents(declared: dict[str, Declaration], measured: Measurements) -> None:
    """Write all.md, and the newest figures into the documents."""
    (measured.results / "all.md").write_text(page(declared, measured), "utf-8")
    for file in documents():
        text = file.read_text("utf-8")
        new = filled(text, declared, measured)
        if new != text:
            file.write_text(new, "utf-8")


def measure(name: str, declaration: Declaration, folder: Path, results: Path, code: str) -> Record:
    """Run one benchmark. Raises: RuntimeError if the benchmark fails, or writes no new result."""
    variables = {**os.environ, "RESULTS": str(results)}
    options = [re.sub(r"\$(\w+)", lambda match: variables[match[1]], each) for each in declaration["options"].split()]
    started, load = time.time(), os.getloadavg()[0]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, str(folder / f"{name}.py"), *options], env=environment, check=False)
    file = results / declaration["result"]
    if done.returncode or not file.exists() or file.stat().st_mtime < started - 1:
        raise RuntimeError(f"exit code {done.returncode}" if done.returncode else f"it wrote no new {file.name}")
    return {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "processor": hardware()["processor"],
        "load": load,
        "code": code,
        "minutes": round((time.time() - started) / 60, 1),
        "versions": {each: importlib.metadata.version(each) for each in VERSIONS if _is_installed(each)},
        "figures": read_figures(declaration, results),
    }


def _is_installed(package: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=package))


def left_out(declaration: Declaration, minutes: float) -> str | None:
    """Why a benchmark cannot be started; None if it can."""
    names = re.findall(r"\$(\w+)", declaration["options"])
    missing = [name for name in names if name != "RESULTS" and name not in os.environ]
    if missing:
        return f"set {', '.join(missing)}"
    return (
        f"takes {declaration['minutes']} minutes, {minutes:.0f} are left" if minutes < declaration["minutes"] else None
    )


def run_all(settings: argparse.Namespace, folder: Path, results: Path, code: str) -> int:
    """Run the benchmarks that are due, least recently measured first; returns the number of failures."""
    declared, measured = declarations(folder), Measurements(results)
    add_results(declared, measured)
    ends, failures, processor = time.monotonic() + 60 * settings.minutes, 0, hardware()["processor"]
    wanted = set(settings.only.split(",")) if settings.only else set(declared)
    dates = {name: (measured.of(name) or [{"date": ""}])[0]["date"] for name in declared}
    for name in sorted(wanted, key=lambda name: (dates[name], name)):
        records = [each for each in measured.of(name) if (each["code"], each["processor"]) == (code, processor)]
        reason = left_out(declared[name], (ends - time.monotonic()) / 60)
        if records and not settings.again:
            reason = f"measured with this code on {records[0]['date']}"
        if reason:
            print(f"{name}: {reason}", flush=True)
            continue
        print(f"{name}: about {declared[name]['minutes']} minutes", flush=True)
        try:
            record = measure(name, declared[name], folder, results, code)
        except (RuntimeError, KeyError, IndexError) as error:
            print(f"{name}: failed: {error}", flush=True)
            failures += 1
        else:
            measured.add(record)
            write_documents(declared, measured)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing that would end later")
    parser.add_argument("--only", help="names of benchmarks, with commas")
    parser.add_argument(
        "--again", action="store_true", help="measure again also the benchmarks that were measured with this code"
    )
    parser.add_argument(
        "--page",
        action="store_true",
        help="measure nothing; add results of direct calls, and write all.md and the documents",
    )
    settings = parser.parse_args()
    folder = Path(__file__).resolve().parent
    if settings.page:
        declared, measured = declarations(folder), Measurements(RESULTS)
        add_results(declared, measured)
        write_documents(declared, measured)
        return
    sys.exit(bool(run_all(settings, folder, RESULTS, code_hash(REPOSITORY / "tunekit"))))


if __name__ == "__main__":
    main()
