"""scripts/gpu/first without a GPU: its dry mode, its tests one by one, its rows, its page, and what it carries."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_bench_gpu import ROWS, bench_gpu, fake_result, planning, shapes

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "scripts" / "gpu" / "first"

import packages  # noqa: E402  (tests.test_bench_gpu adds scripts/gpu to the path)
import suite  # noqa: E402
from page import make_page  # noqa: E402

from tunekit.machine.variables import variables  # noqa: E402


def script() -> Any:
    loader = SourceFileLoader("first_half_hour", str(SCRIPT))
    spec = importlib.util.spec_from_loader("first_half_hour", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


first = script()


@pytest.mark.drawn
def test_the_dry_mode_shows_the_plans_of_a_call() -> None:
    """In a process of its own, without a GPU, with tiny shapes."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "2", "--dry-run", "--rehearse"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8b-nf4-streamed (G4, tunekit): llama-3.1-8b" in done.stdout
    assert done.stdout.count("predicted peak") == 2
    assert "all rows: 1.5 minutes expected" in done.stdout


def test_the_calls_fit_into_nine_minutes() -> None:
    device, ceilings = torch.device("cuda"), planning.Ceilings()
    for names in first.ROWS.values():
        ours = [ROWS[name] for name in names if ROWS[name].tool == "tunekit"]
        assert sum(planning.expected_minutes(row, device, ceilings) for row in ours) < first.MINUTES


def test_every_test_of_the_gpu_suite_has_a_place() -> None:
    files = (REPOSITORY / "tests" / "gpu").glob("test_*.py")
    nodes = [node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body]
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    assert names == set(suite.ORDER)
    assert len(suite.ORDER) == len(names)


SUITE = """
import os
import signal
import time

import pytest

pytestmark = pytest.mark.gpu

def test_passes(record_property):
    record_property("predicted_bytes", 100)
    record_property("measured_bytes", 110)

def test_fails():
    assert 1 == 2, "one is not two"

def test_is_skipped():
    pytest.skip("no such thing here")

def test_ends_the_process():
    os.kill(os.getpid(), signal.SIGSEGV)

def test_breaks_the_device():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_hangs():
    time.sleep(600)

def test_is_last():
    pass
"""


@pytest.mark.drawn
def test_a_crash_a_hang_and_a_broken_device_cost_one_test_each(tmp_path: Path) -> None:
    file, tests = tmp_path / "gpu.tests", tmp_path / "test_written.py"
    tests.write_text(SUITE, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n", encoding="utf-8")
    outcomes = suite.run_suite(file, 900.0, suite=str(tests), test_seconds=20.0)
    assert {suite.function_of(test): record["outcome"] for test, record in outcomes.items()} == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_is_skipped": "skipped",
        "test_ends_the_process": "failed",
        "test_breaks_the_device": "failed",
        "test_hangs": "failed",
        "test_is_last": "passed",
    }
    messages = {suite.function_of(test): record.get("message", "") for test, record in outcomes.items()}
    assert "one is not two" in messages["test_fails"]
    assert messages["test_is_skipped"] == "no such thing here"
    assert messages["test_ends_the_process"].startswith("ended with -11")
    assert messages["test_hangs"].startswith("stopped after")
    assert suite.counts(outcomes) == "2 passed, 4 failed, 1 skipped"
    page = make_page({"rows": {}, "tests": outcomes})
    assert "| test_passes | 0.00 GiB | 0.00 GiB | 1.10 |" in page
    assert "one is not two" in page
    again = suite.run_suite(file, 300.0, suite=str(tests))  # every test has an outcome
    assert again == outcomes


@pytest.mark.drawn
def test_a_suite_that_cannot_start_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    outcomes = suite.run_suite(tmp_path / "gpu.tests", 300.0, suite=str(tmp_path / "absent"))
    assert outcomes[str(tmp_path / "absent")]["outcome"] == "failed"
    assert "file or directory not found" in outcomes[str(tmp_path / "absent")]["message"]
    assert not suite.read_outcomes(tmp_path / "gpu.tests")


class Bench:
    """gpu.py with children that answer at once."""

    CEILINGS = bench_gpu.CEILINGS
    as_json, write_results, summary = (
        staticmethod(function) for function in (bench_gpu.as_json, bench_gpu.write_results, bench_gpu.summary)
    )

    def __init__(self) -> None:
        self.ran: list[str] = []

    def minutes_of(self, row: shapes.Row, device: torch.device, results: dict[str, Any]) -> float:
        return 1e6 if row.name == "8b-nf4-small" else 0.1

    def in_child(self, name: str, device: torch.device, file: Path, seconds: float) -> dict[str, Any]:
        self.ran.append(name)
        if name == self.CEILINGS:
            rates = {"product_flops": 7e14, "product_side": 8, "copy_bytes": 3e12, "host_to_device_bytes": 5e10}
            return rates | {"real_products": {"q_proj": {"tokens": 2, "inputs": 3, "outputs": 4, "flops": 6e14}}}
        if name == "8b-bf16":
            return {"outcome": "ended with 1: RuntimeError: a|b", "card": {}}
        plan = {"predicted_bytes": {"total": 2**31}, "floor_tokens_per_second": 20.0, "break_even_tokens": 1234}
        plan |= {"limit_tokens_per_second": 40.0}
        return fake_result(name) | {"plan": plan, "load_seconds": 2.0}


def test_a_failed_row_ends_nothing_and_is_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, rows = tmp_path / "gpu-h.json", [ROWS[name] for name in ("8b-bf16", "8b-nf4", "8b-nf4-small")]
    for _ in range(2):
        bench, results = Bench(), bench_gpu.read_results(file)
        first.Call(bench, torch.device("cpu"), file, results, time.monotonic() + 500.0).run(rows, tests=False)
    assert bench.ran == ["8b-bf16"]  # what was measured is not measured again
    assert "8b-nf4-small: waits for another call" in capsys.readouterr().out
    written = json.loads(file.read_text(encoding="utf-8"))
    assert list(written["rows"]) == ["8b-bf16", "8b-nf4"]
    page = file.with_suffix(".md").read_text(encoding="utf-8")
    assert "| 8b-nf4 | 2.00 GiB | 2.00 GiB | 1.00 |" in page
    assert "| 8b-nf4 | 12,288 | 20 | 10 | 50% | 1,234 |" in page
    assert "ended with 1: RuntimeError: a/b" in page
    assert "| products, 8^3 in bfloat16 | 798 | 700 TFLOP/s |" in page


@pytest.mark.drawn
def test_a_child_that_is_stopped_leaves_what_it_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, answer = tmp_path / "r.json", tmp_path / ".tiny-of-r.json"
    child = tmp_path / "child.py"
    child.write_text(
        f"import json, time\nopen({str(answer)!r}, 'w').write(json.dumps({{'plan': {{}}, 'losses': [2.0]}}))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(bench_gpu, "__file__", str(child))
    stopped = bench_gpu.in_child("tiny", torch.device("cpu"), file, 20.0)
    assert stopped == {"plan": {}, "losses": [2.0], "outcome": "stopped after 20 s"}
    child.write_text("class OddError(Exception): pass\nraise OddError('so it is\\nand more')\n")
    ended = bench_gpu.in_child("tiny", torch.device("cpu"), file, 300.0)
    assert ended["outcome"] == "ended with 1: OddError: so it is"


def test_a_child_has_the_settings_of_a_run_and_ends_with_this_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Otherwise it is still on the GPU during the next call's measurements."""
    children: list[subprocess.Popen[Any]] = []

    class Child(subprocess.Popen[Any]):
        def __init__(self, _: Any, **settings: Any) -> None:
            super().__init__([sys.executable, "-c", "import time; time.sleep(60)"], **settings)
            self.environment = settings["env"]
            children.append(self)

        def poll(self, *_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

        communicate = poll

    monkeypatch.setattr(subprocess, "Popen", Child)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.in_child("tiny", torch.device("cpu"), tmp_path / "r.json", 60.0)
    with pytest.raises(KeyboardInterrupt):
        suite.run_suite(tmp_path / "gpu.tests", 60.0)
    for child in children:
        assert child.returncode == -signal.SIGKILL
        assert child.environment.get("PYTORCH_ALLOC_CONF") == variables().get("PYTORCH_ALLOC_CONF")
        assert child.environment["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert len(children) == 2


@pytest.mark.parametrize(("module", "work"), [(first, "check"), (bench_gpu, "run_rows")])
def test_sigterm_stops_the_child_too(module: Any, work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        monkeypatch.setattr(sys, "argv", ["script", *(["1"] if module is first else ["--device", "cpu"])])
        monkeypatch.setattr(module, work, lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        monkeypatch.setattr(module, "run_call", lambda *_, **__: None, raising=False)
        with pytest.raises(SystemExit, match="143"):
            module.main()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert packages.missing()[0] == []
    releases = {"pydantic": None, "transformers": "5.1", "bitsandbytes": None}

    def version(name: str) -> str:
        if releases.get(name, "9999") is None:
            raise packages.PackageNotFoundError
        return releases.get(name) or "9999"

    monkeypatch.setattr(packages, "version", version)
    needed, optional = packages.missing()
    assert [line.split(";")[0] for line in needed] == ["transformers is 5.1", "pydantic is absent"]
    assert [line.split(":")[0] for line in optional] == ["bitsandbytes is absent; 0.50 or newer is needed"]
    with pytest.raises(SystemExit, match="--pack FOLDER"):
        first.check(stop=True)
    assert "pydantic is absent" in capsys.readouterr().out
    assert set(packages.OPTIONAL) <= {name for name, _ in packages.requirements()}
    assert [bool(packages.UNUSED.match(f"libbitsandbytes_{kind}.so")) for kind in ("cuda128", "rocm72", "cuda130")] == [
        True,
        True,
        False,
    ]
