"""The parity table: the result of each cell, gathered from all pytest processes and printed at the end.

A test makes a `Cell` by peft_case.run_cell, or by hand. A whole run of tests/parity also fails where fewer checks pass
than held.txt says, where a row lacks a family, or where a method has no row. tests/conftest.py registers this module
as a plugin.

A cell travels from a pytest-xdist worker to the process that prints in the user properties of its test's report.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import tunekit.recipe.adapters as adapter_settings

CHECKS = ("forward", "gradients", "merged", "written", "read")
FAMILIES = ("llama", "gpt2", "t5", "bert", "mixtral")  # every row has these
MORE_FAMILIES = ("bart",)  # some have these too
COLUMNS = FAMILIES + MORE_FAMILIES
WITHOUT_A_ROW = {"bitfit": "peft has no such type", "full": "an adapter of no kind: the weights themselves"}
PROPERTY = "parity cell"
FOLDER = Path(__file__).resolve().parent
HELD = FOLDER / "held.txt"

_made: list[Cell] = []


@dataclass
class Cell:
    """What came of the checks of one method on one family; `failures` says why one did not pass.

    Making one puts it into the parity table. `method` and `family` may be left out in a test that is parametrised with
    them; `row` is the name in the table, by default the test's other parameter, or the method.
    `refused`: check -> why there is nothing to compare; only where peft refuses too or the mathematics forbids it.
    """

    passed: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    method: str = ""
    family: str = ""
    row: str = ""
    refused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _made.append(self)

    def check(self, name: str, action: Callable[[], Any]) -> None:
        """Run one check; whatever it raises is its failure."""
        try:
            action()
            self.passed.append(name)
        except Exception as error:
            self.failures[name] = f"{type(error).__name__}: {error}"

    def refuse(self, reason: str, checks: Iterable[str] = CHECKS) -> None:
        """These checks compare nothing, for this reason."""
        self.refused |= dict.fromkeys(checks, reason)


Entry = dict[str, Any]  # a Cell as plain values: method, row, family, passed, failed, refused


def entry_of(cell: Cell, parameters: Mapping[str, Any]) -> Entry:
    """The cell with its names filled in from the parameters of the test that made it."""
    texts = [value for value in parameters.values() if isinstance(value, str)]
    family = cell.family or next((text for text in texts if text in COLUMNS), "")
    row = cell.row or next((text for text in texts if text != family and text not in CHECKS), "")
    method = cell.method or row
    named = row if not method or row.startswith(method) else f"{method} {row}".strip()
    values = {"passed": list(cell.passed), "failed": sorted(cell.failures), "refused": dict(cell.refused)}
    return {"method": method, "row": named, "family": family, **values}


class Table:
    """Cells by row and family; a check that ever failed has failed, one that ever passed was not refused."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.rows: dict[str, dict[str, dict[str, str]]] = {}  # row -> family -> check -> passed, failed, or a reason
        self.methods: set[str] = set()
        for entry in entries:
            self.methods.add(entry["method"])
            cell = self.rows.setdefault(entry["row"], {}).setdefault(entry["family"], {})
            for check, reason in entry["refused"].items():
                cell.setdefault(check, reason)
            for check in entry["passed"]:
                if cell.get(check) != "failed":
                    cell[check] = "passed"
            cell.update(dict.fromkeys(entry["failed"], "failed"))
        self.rows = dict(sorted(self.rows.items()))

    def passing(self) -> int:
        """Checks passed, over all rows and families."""
        states = [state for row in self.rows.values() for cell in row.values() for state in cell.values()]
        return states.count("passed")

    def refusals(self) -> int:
        """Checks in which there is nothing to compare."""
        states = [state for row in self.rows.values() for cell in row.values() for state in cell.values()]
        return len(states) - states.count("passed") - states.count("failed")

    def gaps(self) -> list[str]:
        """Rows without one of the families, cells without one of the checks, and methods without a row."""
        found = [
            f"{row} on {family}: {', '.join(missing)}"
            for row, cells in self.rows.items()
            for family in FAMILIES
            for missing in [[check for check in CHECKS if check not in cells.get(family, {})]]
            if missing
        ]
        known = {module.name for module in pkgutil.iter_modules(adapter_settings.__path__)}
        return found + [f"{name} has no row" for name in sorted(known - self.methods - set(WITHOUT_A_ROW))]

    def lines(self) -> list[str]:
        """One line a row: a capital for each check passed, - where refused, ! where failed, . where not run."""
        families = [f for f in COLUMNS if any(f in cells for cells in self.rows.values())]
        reasons: dict[str, int] = {}
        width = max((len(row) for row in self.rows), default=0) + 2
        lines = [" " * width + "".join(f"{family:9}" for family in families)]
        for row, cells in self.rows.items():
            shown = [_letters(cells.get(family, {}), family in MORE_FAMILIES, reasons) for family in families]
            lines.append((f"{row:{width}}" + "".join(f"{text:9}" for text in shown)).rstrip())
        return lines + [f"{number}  {reason}" for reason, number in reasons.items()]


def _letters(cell: Mapping[str, str], optional: bool, reasons: dict[str, int]) -> str:
    """FGMWR, with - and the number of the reason for what was refused."""
    if optional and not cell:
        return ""
    states = [cell.get(check) for check in CHECKS]
    signs = {"passed": None, "failed": "!", None: "."}
    letters = "".join(signs.get(s, "-") or check[0].upper() for s, check in zip(states, CHECKS, strict=True))
    named = {state for state in states if state not in signs}
    numbers = sorted(reasons.setdefault(str(reason), len(reasons) + 1) for reason in named)
    return letters + ",".join(map(str, numbers))


def verdict(table: Table, held: int) -> tuple[list[str], bool]:
    """What to say after a whole run, and whether it is a failure."""
    passing, gaps = table.passing(), table.gaps()
    said = [f"no cell: {gap}" for gap in gaps]
    if passing < held:
        said.append(f"{passing} checks pass, and tests/parity/held.txt holds {held}: the number may only rise")
    elif passing > held:
        said.append(f"{passing} checks pass: raise the number in tests/parity/held.txt from {held} to {passing}")
    return said, bool(gaps) or passing < held


def is_whole_run(config: pytest.Config) -> bool:
    """Whether nothing of tests/parity was left out by paths, -k, -m, --lf and the like."""
    options = config.option
    narrowed = options.keyword or options.markexpr not in ("", "not slow") or getattr(options, "lf", False)
    narrowed = narrowed or options.deselect or options.maxfail or options.collectonly
    paths = [Path(str(argument).partition("::")[0]).resolve() for argument in config.args]
    return not narrowed and any(path == FOLDER or path in FOLDER.parents for path in paths)


def _gathered(reporter: Any) -> list[Entry]:
    reports = [report for name in ("passed", "failed") for report in reporter.stats.get(name, [])]
    return [value for report in reports for name, value in getattr(report, "user_properties", ()) if name == PROPERTY]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Attach the cells that the test made to its report."""
    if call.when == "call":
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        item.user_properties += [(PROPERTY, entry_of(cell, parameters)) for cell in _made]
    _made.clear()
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a whole run that would pass although the table has shrunk."""
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if hasattr(session.config, "workerinput") or reporter is None or exitstatus != 0:
        return
    if is_whole_run(session.config):
        _, failed = verdict(Table(_gathered(reporter)), int(HELD.read_text()))
        session.exitstatus = pytest.ExitCode.TESTS_FAILED if failed else session.exitstatus


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Print the table of the cells that ran."""
    entries = _gathered(terminalreporter)
    if not entries:
        return
    table, write = Table(entries), terminalreporter.write_line
    terminalreporter.section("parity with peft")
    write("Forward, Gradients, Merged, Written here and read by peft, Read here from peft's file;")
    write(
        "a letter: equal; -: peft refuses too, or there is nothing to compare (see the number); !: differs; .: not run"
    )
    for line in table.lines():
        write(line)
    write(f"{table.passing()} checks pass, {table.refusals()} refused, in {len(table.rows)} rows")
    if is_whole_run(config):
        for line in verdict(table, int(HELD.read_text()))[0]:
            write(line, red=True)
