"""Measures the times that a person waits: answers of chat and serve, the report's page, data check, the progress view
and watch.

    scripts/bench/run people chat|serve|report|data|shipped|progress [--model FILE] [--json FILE]

CPU seconds of the process and ratios of paired rounds are measured, because other programs may be running. `shipped`
also reads the texts of TUNEKIT_SHARED if there are any; `report` needs chromium. Results: scripts/results/people.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

FIGURES = {
    "minutes": 5,
    "options": "chat --model $TUNEKIT_SMOLLM2 --json $RESULTS/people.json",
    "result": "people.json",
    "figures": {
        "chat": {
            "what": "chat, greedy answer of 48 tokens, against transformers' generate",
            "unit": "tokens per CPU second",
            "digits": 1,
            "ours": "tunekit_tokens_per_cpu_second",
            "theirs": "transformers_tokens_per_cpu_second",
        },
    },
}
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MODEL = ROOT / ".cache" / "smollm2-gguf" / "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "Tell me a long story about a lighthouse keeper, with many details of his days."
SUBJECTS = ("the sea", "bread", "trains", "a garden", "winter", "the moon", "a bridge", "tea", "rain", "a clock")
CLIENTS, REQUESTS = 8, 200
ROWS = 100_000
WORDS = [a + b + c for a in ("ba", "ke", "li", "mo") for b in ("ra", "se", "ti", "po", "gu") for c in ("n", "m", "l")]


def chat(model: Path, rounds: int = 4, tokens: int = 48) -> dict[str, Any]:
    """Tokens per CPU second of one greedy answer, against transformers' own cached generation; float32, one thread."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunekit.formats.example import Message
    from tunekit.talking.answer import Request
    from tunekit.talking.conversation import make_speaker
    from tunekit.targets.target import find_target, load_target

    torch.set_num_threads(1)
    speaker = make_speaker(load_target(find_target(str(model), None, ["model.dtype=float32"]), torch.device("cpu")))
    theirs = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    request = Request([Message("user", QUESTION)], tokens)
    ids = torch.tensor([speaker.prepare(request).prompt])

    def of_theirs() -> str:
        with torch.no_grad():
            found = theirs.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))

    def of_ours() -> str:
        speaker.states.clear()  # a first question, not the same one again
        (reply,) = speaker.answer([request], speaker.adapters.names[0])
        assert reply.new_tokens == tokens
        return reply.text

    assert of_ours() == of_theirs(), "greedy answers differ"
    pairs = [(_cpu(of_ours), _cpu(of_theirs)) for _ in range(rounds)]
    return {
        "tokens": tokens,
        "tunekit_tokens_per_cpu_second": tokens / statistics.median(ours for ours, _ in pairs),
        "transformers_tokens_per_cpu_second": tokens / statistics.median(theirs for _, theirs in pairs),
        "ratio_of_each_round": [round(theirs / ours, 3) for ours, theirs in pairs],
    }


def _cpu(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def serve(model: Path, tokens: int = 24, short: int = 8) -> dict[str, Any]:
    """Measure eight requests at once against eight requests one after another; then 200 requests of eight clients, with
    a restart of the server in between."""
    import psutil
    import torch

    from tunekit.generate import answer
    from tunekit.targets.target import find_target, load_target

    torch.set_num_threads(1)
    questions = [f"Write a few lines about {subject}." for subject in SUBJECTS]
    settings = ["model.dtype=float32", f"evaluation.max_new_tokens={short}"]
    expected = answer(load_target(find_target(str(model), None, settings), torch.device("cpu")), questions)
    found: dict[str, Any] = {}
    wrong = 0
    for part in range(2):
        with _serving(model) as (server, port):
            process = psutil.Process(server)
            if part == 0:
                found |= _batched(process, port, questions[:CLIENTS], tokens)
                found["errors"] = _errors(port)
            asked = [at % len(questions) for at in range(REQUESTS // 2)]
            with ThreadPoolExecutor(CLIENTS) as clients:
                texts = list(clients.map(lambda at: _ask(port, questions[at], short), asked))
            wrong += sum(text != expected[at] for at, text in zip(asked, texts, strict=True))
    return {**found, "requests": REQUESTS, "clients": CLIENTS, "answers_that_differ_from_generate": wrong}


def _batched(process: Any, port: int, questions: list[str], tokens: int) -> dict[str, Any]:
    """The server's CPU and wall seconds for requests one after another and all at once, and the median ratio of three
    rounds."""
    rounds = []
    for _ in range(3):
        spent = []
        for workers in (1, len(questions)):
            cpu, wall = sum(process.cpu_times()[:2]), time.monotonic()
            with ThreadPoolExecutor(workers) as clients:
                list(clients.map(lambda text: _ask(port, text, tokens), questions))
            spent.append((sum(process.cpu_times()[:2]) - cpu, time.monotonic() - wall))
        rounds.append([together / alone for alone, together in zip(*spent, strict=True)])
    cpu, wall = (statistics.median(ratio) for ratio in zip(*rounds, strict=True))
    return {"share_of_cpu_seconds": round(cpu, 3), "share_of_wall_seconds": round(wall, 3)}


def _ask(port: int, text: str, tokens: int, key: str = "secret") -> str:
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=600)
    reply = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": text}], max_tokens=tokens, temperature=0
    )
    return str(reply.choices[0].message.content)


def _errors(port: int) -> dict[str, Any]:
    """The status and error code of three bad requests: a wrong key, a body that is not JSON, and a prompt that is too
    long."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    import openai

    found: dict[str, Any] = {}
    for name, text, key in (("bad key", "x", "wrong"), ("too long a prompt", "word " * 20_000, "secret")):
        try:
            _ask(port, text, 4, key)
        except openai.APIStatusError as error:
            found[name] = [error.status_code, error.code]
    try:
        headers = {"authorization": "Bearer secret"}
        urlopen(Request(f"http://127.0.0.1:{port}/v1/chat/completions", b"{no", headers))
    except HTTPError as error:
        found["bad JSON"] = [error.code, json.loads(error.read())["error"]["type"]]
    return found


@contextmanager
def _serving(model: Path) -> Iterator[tuple[int, int]]:
    """A server in a separate process, and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        "serve",
        str(model),
        "model.dtype=float32",
        "--port",
        str(port),
        "--api-key",
        "secret",
        "--batch-size",
        "8",
    ]
    server = subprocess.Popen([sys.executable, "-m", "tunekit", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while True:
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield server.pid, port
    finally:
        server.terminate()
        server.wait()


def report(model: Path) -> dict[str, Any]:
    """The bytes of a report page of 20,000 steps, and the seconds until chromium has drawn the page."""
    from playwright.sync_api import sync_playwright

    from tests.artifacts.test_html_browser import browser_path
    from tests.support.run_case import write_run
    from tunekit.artifacts.report.html import html_page
    from tunekit.artifacts.report.run_report import run_report
    from tunekit.artifacts.report.values import read_run

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = Path(folder) / "report.html"
        run = read_run(write_run(Path(folder) / "run", steps=20_000, rate=1e-4))
        page_file.write_text(html_page(run_report(run)), "utf-8")
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        drawn = []
        for _ in range(5):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(page_file.as_uri())
            drawn.append(page.evaluate("new Promise(r => requestAnimationFrame(() => r(performance.now())))"))
        browser.close()
        return {"bytes": page_file.stat().st_size, "milliseconds_until_drawn": [round(each) for each in drawn]}


def data(model: Path) -> dict[str, Any]:
    """Rows per second and memory of `data check` on rows with planted faults, and the faults that it finds."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows, planted = _rows(ROWS)
        every = Path(folder) / "rows.jsonl"
        every.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        few = Path(folder) / "few.jsonl"
        few.write_text("".join(json.dumps(row) + "\n" for row in rows[:50]), "utf-8")
        (start, _), (whole, lines) = (_cpu_of_child(partial(_check, file, "sft")) for file in (few, every))
        found["rows"], found["rows_per_cpu_second"] = len(rows), round(len(rows) / whole)
        found["start_cpu_seconds"] = round(start, 2)
        found["rows_per_cpu_second_after_the_start"] = round(len(rows) / (whole - start))
        found["peak_mib"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
        found["planted"] = {kind: len(at) for kind, at in planted.items()}
        found["planted_found"] = {kind: len(set(at) & set(lines.get(kind, ()))) for kind, at in planted.items()}
        wrong = {line for at in lines.values() for line in at} - {line for at in planted.values() for line in at}
        found["other_rows_with_a_finding"] = len(wrong)
    return found


def _cpu_of_child(work: Callable[[], Any]) -> tuple[float, Any]:
    """The result of `work`, and the CPU seconds of the processes that it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    value = work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, value


def shipped(model: Path) -> dict[str, Any]:
    """Findings of `data check` in the recipes' data and in the texts of TUNEKIT_SHARED, by file and kind."""
    found: dict[str, Any] = {}
    shared = Path(os.environ["TUNEKIT_SHARED"]) / "data" if "TUNEKIT_SHARED" in os.environ else ROOT / "nothing"
    files = sorted([*(ROOT / "recipes").rglob("*.jsonl"), *shared.rglob("*.jsonl"), *shared.rglob("*.csv")])
    for file in files:
        for objective in ("sft", "classify", "dpo"):
            lines_of = _check(file, objective)
            if "broken" not in lines_of:
                found[f"{file.parent.name}/{file.name}"] = {kind: len(at) for kind, at in lines_of.items()}
                break
    return found


def _rows(count: int) -> tuple[list[dict[str, Any]], dict[str, list[int]]]:
    """Conversations of about 60 words, and the lines of the faults among them."""
    draw = Random(0)
    rows = [
        _turns(" ".join(draw.choices(WORDS, k=20)) + "?", " ".join(draw.choices(WORDS, k=40)) + ".")
        for _ in range(count)
    ]
    planted: dict[str, list[int]] = {}
    for at in range(100, count, 1000):
        kind = ("exact", "near", "email", "secret", "garbled", "empty", "roles", "long")[at // 1000 % 8]
        question, answer = (turn["content"] for turn in rows[at - 50]["messages"])
        rows[at] = {
            "exact": rows[at - 50],
            "near": _turns(question, answer.replace(answer.split()[5], "other", 1)),
            "email": _turns(question[::-1], "write to ada@example.org " + answer[::-1]),
            "secret": _turns(question[::-1], "hf_" + "abcDEF123" * 4),
            "garbled": _turns(question[::-1], "cafÃ© " + answer[::-1]),
            "empty": _turns(question[::-1], ""),
            "roles": {"messages": [{"role": "assistant", "content": answer[::-1]}]},
            "long": _turns(question[::-1], answer[::-1] * 200),
        }[kind]
        planted.setdefault(kind, []).append(at + 1)
    return rows, planted


def _turns(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _check(file: Path, objective: str) -> dict[str, list[int]]:
    """Findings of one file: the lines by kind."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, out = Path(folder) / "recipe.json", Path(folder) / "found.json"
        values = {"model": "org/base", "data": {"train": str(file)}, "objective": objective, "output": {"dir": "run"}}
        recipe.write_text(json.dumps(values), "utf-8")
        words = [sys.executable, "-m", "tunekit", "data", "check", str(recipe), "--json", str(out)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True)
        if not out.exists():
            assert done.returncode == 2, done.stderr
            return {"broken": [0]}
        (each,) = json.loads(out.read_text("utf-8"))["files"]
        return dict(each["findings"])


def progress(model: Path) -> dict[str, Any]:
    """CPU microseconds per step of the progress view in a terminal, and of `watch` during a run."""
    from tests.support.run_case import write_run
    from tunekit.console import Console
    from tunekit.console.progress import StepProgress
    from tunekit.files.lock import FolderLock
    from tunekit.records import StepRecord

    reader, writer = os.openpty()
    os.set_blocking(reader, False)
    records = [StepRecord(at, 0.1, 2.0, 1e-4, 1.0, 600, 150, 1.0, 600.0, 1 << 29) for at in range(1, 2001)]
    clock = iter(float(at) for at in range(10**6)).__next__  # a second a step: every line is drawn
    with os.fdopen(writer, "w", encoding="utf-8") as terminal:
        view = StepProgress(Console(output=terminal), len(records) + 1, budget_bytes=1 << 30, clock=clock)

        def shown() -> None:
            for record in records:
                view.update(record)
                os.read(reader, 1 << 16)

        spent = _cpu(shown)
    found: dict[str, Any] = {"view_microseconds_a_step": round(1e6 * spent / len(records))}
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder) / "run", steps=20_000, rate=1e-4, finished=False)
        lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        lock = FolderLock(run)
        watching = subprocess.Popen(
            [sys.executable, "-m", "tunekit", "watch", str(run)], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        import psutil

        process = psutil.Process(watching.pid)
        time.sleep(30)  # until it has shown what there is
        before = sum(process.cpu_times()[:2])
        for at in range(30):
            with (run / "metrics.jsonl").open("ab") as file:
                file.write(lines[1 + at])
            time.sleep(1)
        found["watch_milliseconds_a_step"] = round(1e3 * (sum(process.cpu_times()[:2]) - before) / 30, 2)
        lock.release()
        watching.wait()
    return found


SECTIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    section.__name__: section for section in (chat, serve, report, data, shipped, progress)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    load = os.getloadavg()[0]
    found = {"load_average_before": round(load, 2), **SECTIONS[chosen.section](chosen.model)}
    print(json.dumps(found, indent=1))
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
