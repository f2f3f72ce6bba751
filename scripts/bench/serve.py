"""A server and many clients: latency of short answers beside long ones, many adapters, clients that leave.

    scripts/bench/run serve --model FOLDER [--tree FOLDER] [--seconds 60] [--only mixed,adapters,leaving] [--json FILE]

The server is a process of its own, with one thread for torch. The clock is its CPU time, so that other programs on the
machine do not count. `--tree`: another checkout of tunekit, whose server is measured instead, for figures of before and
after. Results: scripts/results/serve.json.
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
    """The process and the port of a server."""
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
    """The response to a request of a greedy answer."""
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
    """The pieces of text; nearly every token is one piece."""
    for line in response:
        if line.startswith(b"data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            if choice["delta"].get("content"):
                yield choice["delta"]["content"]


def ask(port: int, name: str, tokens: int, draw: Random) -> int:
    """The number of pieces of an answer."""
    with streamed(port, name, tokens, draw) as response:
        return len(list(pieces(response)))


def clock_of(server: int) -> Callable[[], float]:
    """The CPU seconds of a process."""
    import psutil

    times = psutil.Process(server).cpu_times
    return lambda: float(sum(times()[:2]))


def median_cost(clock: Callable[[], float], jobs: Iterable[Callable[[], object]]) -> float:
    """The median of the CPU seconds of some jobs, one after another."""
    costs = []
    for job in jobs:
        before = clock()
        job()
        costs.append(clock() - before)
    return statistics.median(costs)


def mixed(tree: Path, model: Path, clients: int, seconds: float) -> dict[str, Any]:
    """Clients that ask for answers of 2 to 500 tokens (log-uniform), each again and again.

    A short answer that has not ended with the measurement counts with the time so far.
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
    """First tokens, throughput and memory with many adapters of rank 8, beside one of them."""
    import psutil

    with tempfile.TemporaryDirectory() as folder:
        write_adapters(model, Path(folder), count)
        with serving(tree, model, "--adapter", folder, "--adapter-memory", "256MiB") as (server, port):
            names, clock = [f"a{number:03}" for number in range(count)], clock_of(server)
            memory = psutil.Process(server).memory_info
            before = memory().rss
            first = median_cost(clock, (partial(ask, port, name, 1, Random(0)) for name in names[:20]))
            again = median_cost(clock, (partial(ask, port, name, 1, Random(0)) for name in names[:20]))
            rates = []
            for asked in (names[:1] * count, names):
                started = clock()
                with ThreadPoolExecutor(8) as pool:
                    pieces = list(pool.map(lambda job: ask(port, job[1], tokens, Random(job[0])), enumerate(asked)))
                rates.append(sum(pieces) / (clock() - started))
            used = memory().rss - before
            size = sum(file.stat().st_size for file in (Path(folder) / names[0]).iterdir())
    return {
        "adapters": count,
        "bytes_of_each": size,
        "first_token_cpu_seconds_at_first_use": first,
        "first_token_cpu_seconds_again": again,
        "tokens_per_cpu_second_of_one": rates[0],
        "tokens_per_cpu_second_of_all": rates[1],
        "added_memory_mib": round(used / 2**20),
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
    """Clients that leave after the first piece of a long answer: the CPU time of a short answer before and after."""

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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--only", default="mixed,adapters,leaving")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    results: dict[str, Any] = {"load_average_before": round(os.getloadavg()[0], 2)}
    for name in chosen.only.split(","):
        more = (chosen.clients, chosen.seconds) if name == "mixed" else ()
        results[name] = globals()[name](chosen.tree, chosen.model, *more)
    print(json.dumps(results, indent=1))
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
