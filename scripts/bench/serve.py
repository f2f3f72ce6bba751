"""Measures a server with many clients: latency of short answers next to long answers, many adapters, and clients that
disconnect.

    scripts/bench/run serve --model FOLDER [--tree FOLDER] [--seconds 60] [--only equal,mixed,adapters,leaving]
                      [--resume] [--json FILE]

The server runs in a separate process, with one thread for torch. Times are its CPU time, so that other programs on the
machine do not count. `--tree`: an earlier checkout of tunekit, whose server is measured instead; its figures are under
"before". `--resume`: measure only parts that the file does not have yet. Each part is written when it is complete, with
a page next to the file. Results: scripts/results/serve.json and serve.md.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from beside.harness import hardware, versions

FIGURES = {
    "minutes": 6,
    "options": "--model $TUNEKIT_SMOLLM2 --json $RESULTS/serve.json",
    "result": "serve.json",
    "figures": {
        "short": {
            "what": "serve, 64 clients: median time of answers of up to 16 tokens, beside answers of up to 500",
            "unit": "CPU seconds",
            "digits": 2,
            "ours": "mixed/short_median_seconds",
        },
        "short95": {
            "what": "serve, 64 clients: 95th percentile of the same",
            "unit": "CPU seconds",
            "digits": 2,
            "ours": "mixed/short_95th_percentile_seconds",
        },
        "throughput": {
            "what": "serve, 64 clients: tokens of all answers",
            "unit": "tokens per CPU second",
            "digits": 1,
            "ours": "mixed/tokens_per_cpu_second",
        },
        "adapters": {
            "what": "serve, 300 adapters by turns, against one adapter: tokens of 8 clients",
            "unit": "tokens per CPU second",
            "digits": 1,
            "ours": "adapters/tokens_per_cpu_second_of_all",
            "theirs": "adapters/tokens_per_cpu_second_of_one",
        },
    },
}
ROOT = Path(__file__).resolve().parents[2]
SHORT, LONG = 16, 500  # tokens
SUBJECTS = ("the sea", "bread", "trains", "a garden", "winter", "the moon", "a bridge", "tea", "rain", "a clock")


@contextmanager
def serving(tree: Path, model: Path, *options: str) -> Iterator[tuple[int, int]]:
    """A server in a separate process: the process and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "tunekit", "serve", str(model), "model.dtype=float32", "--port", str(port), *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])}
    server = subprocess.Popen([sys.executable, *words], cwd=tree, env=environment, stdout=subprocess.DEVNULL)
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None
            time.sleep(0.2)
        ask(port, "base", 2, Random(0))
        yield server.pid, port
    finally:
        server.terminate()
        server.wait()


@contextmanager
def streamed(port: int, name: str, tokens: int, draw: Random) -> Iterator[http.client.HTTPResponse]:
    """Request a streamed greedy answer; returns the response."""
    question = f"Tell me a long story about {draw.choice(SUBJECTS)} and {draw.choice(SUBJECTS)}."
    body = {"model": name, "messages": [{"role": "user", "content": question}], "max_tokens": tokens}
    body |= {"temperature": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        yield connection.getresponse()
    finally:
        connection.close()


def pieces(response: http.client.HTTPResponse) -> Iterator[str]:
    """The pieces of text in a streamed response. Nearly every token is one piece."""
    for line in response:
        if line.startswith(b"data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            if choice["delta"].get("content"):
                yield choice["delta"]["content"]


def ask(port: int, name: str, tokens: int, draw: Random) -> int:
    """Request an answer; returns the number of its pieces."""
    with streamed(port, name, tokens, draw) as response:
        return len(list(pieces(response)))


def clock_of(server: int) -> Callable[[], float]:
    """The CPU seconds of a process."""
    import psutil

    times = psutil.Process(server).cpu_times
    return lambda: float(sum(times()[:2]))


def median_cost(clock: Callable[[], float], jobs: Iterable[Callable[[], object]]) -> float:
    """Run some jobs one after another; returns the median of their CPU seconds."""
    costs = []
    for job in jobs:
        before = clock()
        job()
        costs.append(clock() - before)
    return statistics.median(costs)


def equal(tree: Path, model: Path, count: int = 24) -> dict[str, Any]:
    """Request greedy answers of different lengths, 16 at once, then each one alone; returns how many are equal."""
    sizes = [2 + 5 * (number % 7) for number in range(count)]

    def answer(port: int, number: int) -> str:
        with streamed(port, "base", sizes[number], Random(number)) as response:
            return "".join(pieces(response))

    with serving(tree, model, "--batch-size", "16") as (_, port):
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(partial(answer, port), range(count)))
        alone = [answer(port, number) for number in range(count)]
    return {"answers": count, "equal": sum(one == other for one, other in zip(together, alone, strict=True))}


def mixed(tree: Path, model: Path, clients: int, seconds: float) -> dict[str, Any]:
    """Measure clients that request answers of 2 to 500 tokens (log-uniform) again and again.

    If a short answer has not ended at the end of the measurement, its time so far counts.
    """
    short: list[float] = []
    running: dict[int, float] = {}  # client -> the start of its short answer
    count = [0]
    lock = threading.Lock()

    def work(port: int, number: int) -> None:
        draw = Random(number)
        with suppress(OSError, http.client.HTTPException, KeyError):  # the server ends before the clients
            while True:
                tokens = round(2 * (LONG / 2) ** draw.random())
                if tokens <= SHORT:
                    running[number] = clock()
                with streamed(port, "base", tokens, draw) as response:
                    for _ in pieces(response):
                        with lock:
                            count[0] += 1
                if number in running:
                    short.append(clock() - running.pop(number))

    with serving(tree, model, "--batch-size", "16") as (server, port):
        clock = clock_of(server)
        started = clock()
        for number in range(clients):
            threading.Thread(target=work, args=(port, number), daemon=True).start()
        while clock() < started + seconds:
            time.sleep(0.1)
        elapsed, tokens, ended = clock() - started, count[0], list(short)
        waiting = [clock() - since for since in list(running.values())]
    latencies = sorted(ended + waiting)
    return {
        "clients": clients,
        "cpu_seconds": round(elapsed, 1),
        "short_answers": len(ended),
        "short_answers_without_end": len(waiting),
        "short_median_seconds": statistics.median(latencies),
        "short_95th_percentile_seconds": latencies[int(0.95 * len(latencies))],
        "tokens_per_cpu_second": tokens / elapsed,
    }


def adapters(tree: Path, model: Path, count: int = 300, tokens: int = 8) -> dict[str, Any]:
    """Measure first tokens, throughput and memory with many adapters of rank 8, and with one of them for comparison."""
    import psutil

    with tempfile.TemporaryDirectory() as folder:
        write_adapters(model, Path(folder), count)
        options = ["--adapter", folder, "--adapter-memory", "256MiB", "--cache-memory", "128MiB"]
        if tree != ROOT:  # had no limit, and loaded all adapters when it started
            options = options[:2]
        with serving(tree, model, *options) as (server, port):
            names, clock = [f"a{number:03}" for number in range(count)], clock_of(server)
            memory = psutil.Process(server).memory_info
            before, added = memory().rss, []
            first = median_cost(clock, (partial(ask, port, name, 1, Random(0)) for name in names[:20]))
            again = median_cost(clock, (partial(ask, port, name, 1, Random(0)) for name in names[:20]))
            rates = []
            for asked in (names[:1] * count, names):
                started = clock()
                with ThreadPoolExecutor(8) as pool:
                    pieces = list(pool.map(lambda job: ask(port, job[1], tokens, Random(job[0])), enumerate(asked)))
                rates.append(sum(pieces) / (clock() - started))
                added.append(round((memory().rss - before) / 2**20))
            size = sum(file.stat().st_size for file in (Path(folder) / names[0]).iterdir())
    return {
        "adapters": count,
        "bytes_of_each": size,
        "first_token_cpu_seconds_at_first_use": first,
        "first_token_cpu_seconds_again": again,
        "tokens_per_cpu_second_of_one": rates[0],
        "tokens_per_cpu_second_of_all": rates[1],
        "added_memory_of_one_mib": added[0],
        "added_memory_mib": added[1],
    }


def write_adapters(model: Path, folder: Path, count: int) -> None:
    """Copies of one adapter of rank 8 on the attention's projections, with random values."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    torch.manual_seed(0)
    net = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=8, target_modules=targets))
    net.save_pretrained(folder / "a000")
    for number in range(1, count):
        shutil.copytree(folder / "a000", folder / f"a{number:03}")


def leaving(tree: Path, model: Path, clients: int = 100) -> dict[str, Any]:
    """Measure the CPU time of a short answer before and after many clients disconnect, each after the first piece of a
    long answer."""

    def leave(port: int, number: int) -> None:
        with streamed(port, "base", LONG, Random(number)) as response:
            next(pieces(response), None)

    with serving(tree, model, "--batch-size", "16") as (server, port):
        clock = clock_of(server)
        short = partial(ask, port, "base", 4, Random(0))
        before = median_cost(clock, [short] * 3)
        spent = clock()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(partial(leave, port), range(clients)))
        spent = clock() - spent
        after = median_cost(clock, [short])
    return {
        "clients": clients,
        "cpu_seconds_until_all_have_left": spent,
        "short_answer_cpu_seconds_before": before,
        "short_answer_cpu_seconds_after": after,
    }


PAGE = """# A server and many clients

SmolLM2-135M in float32, greedy, one thread for torch. The clock is the CPU time of the server, so that other programs
do not count. "Before" is the version that answered batch after batch. {processor}, {date}; torch {torch}, transformers
{transformers}. Made by `scripts/bench/run serve`; all numbers are in [serve.json](serve.json). All clients of a part
begin at once, so the median of short answers beside long ones is mostly the wait for a slot.

| | before | now |
|---|--:|--:|
"""
ROWS = {
    "mixed": {
        "cpu_seconds": "64 clients, 16 slots, answers of 2 to 500 tokens (log-uniform): CPU seconds measured",
        "tokens_per_cpu_second": "tokens per CPU second",
        "short_answers": "answers of up to 16 tokens that ended",
        "short_answers_without_end": "answers of up to 16 tokens that still waited",
        "short_median_seconds": "their median, waiting ones with the time so far, CPU seconds",
        "short_95th_percentile_seconds": "their 95th percentile, CPU seconds",
    },
    "equal": {
        "answers": "answers of 2 to 32 tokens, 16 at once",
        "equal": "of these, equal to the answer of the request alone",
    },
    "adapters": {
        "adapters": "adapters of rank 8 on the attention's projections",
        "first_token_cpu_seconds_at_first_use": "first token at an adapter's first use, CPU seconds",
        "first_token_cpu_seconds_again": "first token when it is in memory, CPU seconds",
        "tokens_per_cpu_second_of_one": "8 clients that ask one adapter, tokens per CPU second",
        "tokens_per_cpu_second_of_all": "8 clients that ask all adapters in turns, tokens per CPU second",
        "added_memory_of_one_mib": "added memory after 20 adapters were loaded, and one asked (128 MiB of cache), MiB",
        "added_memory_mib": "added memory after all were asked (limit 256 MiB for adapters), MiB",
    },
    "leaving": {
        "clients": "clients that leave after the first piece of an answer of 500 tokens",
        "cpu_seconds_until_all_have_left": "CPU seconds until all have left",
        "short_answer_cpu_seconds_before": "an answer of 4 tokens before them, CPU seconds",
        "short_answer_cpu_seconds_after": "the same after them, CPU seconds",
    },
}


MASKS = """
Mask of tokens for a JSON schema (llguidance 1.9.1, 49,152 tokens, 2026-11-28): 0.09 to 0.31 ms a token, with two of 15
tokens at 32 and 40 ms, where a part of the schema was met first; 34 ms to compile the schema.
"""
MEMORY = """
Where the memory of adapters went. Measured in the process itself (/proc/self/smaps_rollup before and after malloc_trim,
2026-11-29): 300 adapters loaded one after another under a limit of 256 MiB, no answers.

| Growth of the process, MiB | |
|---|--:|
| in all | 495 |
| tensors of the 72 adapters in memory, which the limit counted | 253 |
| Python's objects for their 8,640 layers, which it did not count | 92 |
| free blocks, which malloc_trim returned, mostly of evicted adapters | 150 |
| pages of mapped files (adapters are read, not mapped) | 1 |

The layers of an evicted adapter referred to each other, so that it stayed until Python's next collection. Now it is
freed at once, and the limit counts the objects, and copies of factors as well. Measured again, 24 adapters under a
limit of 40 MiB: the process grew by 41 MiB with the 8 adapters that fit, and by 45 MiB after all 24. Beside the
adapters in memory, one is being read.

The 906 MiB in the table are from the version before, with answers. Keys and values have a limit of their own,
`--cache-memory`, which was a quarter of the free memory there. They were not measured apart.
"""


def write_page(results: dict[str, Any], path: Path) -> None:
    """The figures of both versions as a table."""
    lines = [PAGE.format(**results["settings"])]
    for part, names in ROWS.items():
        sides = [results.get("before", {}).get(part, {}), results.get(part, {})]
        for name, words in names.items():
            if any(name in side for side in sides):
                cells = [f"{side[name]:.3g}" if name in side else "" for side in sides]
                lines.append(f"| {words} | {' | '.join(cells)} |\n")
    path.write_text("".join([*lines, MASKS, MEMORY]), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--only", default="equal,mixed,adapters,leaving")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--json", type=Path, default=ROOT / "scripts" / "results" / "serve.json")
    chosen = parser.parse_args()
    results = json.loads(chosen.json.read_text("utf-8")) if chosen.resume and chosen.json.exists() else {}
    side = results if chosen.tree == ROOT else results.setdefault("before", {})
    known = versions(Path(sys.executable))
    results["settings"] = {"processor": hardware()["processor"], "date": time.strftime("%Y-%m-%d %H:%M")}
    results["settings"] |= {name: known[name] for name in ("torch", "transformers")}
    for name in chosen.only.split(","):
        if name in side:
            continue
        load = round(os.getloadavg()[0], 2)
        more = (chosen.clients, chosen.seconds) if name == "mixed" else ()
        side[name] = globals()[name](chosen.tree, chosen.model, *more) | {"load_average_before": load}
        print(name, json.dumps(side[name], indent=1), flush=True)
        chosen.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        write_page(results, chosen.json.with_suffix(".md"))


if __name__ == "__main__":
    main()
