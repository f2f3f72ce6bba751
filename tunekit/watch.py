"""`tunekit watch`: follows a run in another process, line by line or on a page. It only reads files, so it does not
slow down the run."""

import time
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import socket
from threading import Semaphore

from tunekit.artifacts.metrics_log import METRICS_NAME, LoggedLine, Record, records_from
from tunekit.artifacts.report.html import html_page
from tunekit.artifacts.report.run_report import run_report
from tunekit.artifacts.report.values import damage_named, read_run, run_values
from tunekit.artifacts.run import read_json
from tunekit.console import Console
from tunekit.console.progress import StepProgress
from tunekit.errors import InputError, RunFolderError
from tunekit.files.lock import is_held
from tunekit.machine.network import names_this_machine
from tunekit.records import EvaluationRecord, StepRecord

Connection = socket | tuple[bytes, socket]
CONNECTIONS = 16  # of the page, at a time
LOOK_SECONDS = 0.5  # between two reads of the files
REFRESH = '<meta http-equiv="refresh" content="5">'  # the page reloads every 5 seconds
PLAIN = tuple(field.name for field in fields(StepRecord) if field.default is field.default_factory is MISSING)


def watch_verb(folder: str, port: int | None) -> None:
    """Follow a run until it ends, or serve its page until a signal. Raises: InputError if there is no run."""
    path, console = Path(folder), Console()
    read_run(path)
    if port is not None:
        _serve(path, port, console)
        return
    with damage_named(path):
        _follow(path, console)


def _follow(path: Path, console: Console) -> None:
    run = run_values(path)
    console.info(f"{path}: {run.state}")
    with StepProgress(console, run.plan.count("steps"), shows=run.shows) as progress:
        for record in _records(path, progress.stop):
            if isinstance(record, StepRecord):
                progress.update(record)
            else:
                progress.evaluation(record)
    console.info(f"{path}: {run_values(path).state}")


def _records(path: Path, at_end: Callable[[], None] = lambda: None) -> Iterator[StepRecord | EvaluationRecord]:
    """The records that the run has written so far, then each new record until the run ends. `at_end` is called before
    the last records are yielded. If a resume starts at an earlier step, the records after that step are yielded
    again."""
    reported: list[LoggedLine] = []
    last_state: tuple[int, int] | None = None
    while True:
        if ended := not _is_running(path):
            at_end()
        metrics = path / METRICS_NAME
        facts = metrics.stat() if metrics.exists() else None
        now = (0, 0) if facts is None else (facts.st_size, facts.st_mtime_ns)
        if now != last_state:
            same, new = _since(metrics, reported)
            yield from (_record(line) for _, line in new)
            reported, last_state = [*reported[:same], *new], now
        if ended:
            return
        time.sleep(LOOK_SECONDS)


def _since(metrics: Path, reported: list[LoggedLine]) -> tuple[int, list[LoggedLine]]:
    """The number of reported lines that are unchanged, and the lines after them. If the log has only grown, only its
    new lines are read."""
    try:
        grown = list(records_from(metrics, reported[-2][0])) if len(reported) > 1 else []
    except RunFolderError:  # the position is inside another line
        grown = []
    if grown and grown[0] == reported[-1]:
        return len(reported), grown[1:]
    lines = list(records_from(metrics))
    same = next((at for at, (old, new) in enumerate(zip(reported, lines, strict=False)) if old != new), len(reported))
    return same, lines[same:]


def _is_running(path: Path) -> bool:
    """Whether the run is running, according to its status file and its lock."""
    status = read_json(path / "status.json")
    return (not isinstance(status, dict) or status.get("exit_code") is None) and is_held(path)


def _record(line: Record) -> StepRecord | EvaluationRecord:
    if "eval" in line:
        return EvaluationRecord(line["step"], line["eval"])
    values = {name: line[name] for name in PLAIN}
    values["grad_norm"] = float("nan") if values["grad_norm"] is None else values["grad_norm"]
    metrics = {name: value for name, value in line.items() if name not in PLAIN and isinstance(value, float)}
    return StepRecord(**values, metrics=metrics)


class _Server(ThreadingHTTPServer):
    """A server with at most CONNECTIONS threads. Further connections wait in the system's queue."""

    free = Semaphore(CONNECTIONS)

    def process_request(self, request: Connection, client_address: object) -> None:
        """Start a thread for this connection."""
        self.free.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Connection, client_address: object) -> None:
        """Answer this connection, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()


class _Page(BaseHTTPRequestHandler):
    """A server for a page that shows the current state of the run."""

    path_of_run: Path
    timeout = 10  # seconds to wait for more of a request

    def do_GET(self) -> None:
        if not names_this_machine(self.headers.get("Host", "")):
            self.send_error(403, "use 127.0.0.1 or localhost")
            return
        if self.path not in ("/", "/index.html"):
            self.send_error(404)
            return
        try:
            with damage_named(self.path_of_run):
                run = run_values(self.path_of_run)
                text = html_page(run_report(run))
                if not run.report:
                    text = text.replace("<head>", f"<head>{REFRESH}", 1)
        except RunFolderError as error:
            text = f"{REFRESH}<p>{escape(str(error))}</p>"
        body = text.encode("utf-8", "backslashreplace")
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *values: object) -> None:
        """Do not log requests for the page."""


def _serve(path: Path, port: int, console: Console) -> None:
    try:
        server = _Server(("127.0.0.1", port), type("Page", (_Page,), {"path_of_run": path}))
    except OSError as error:
        raise InputError(f"cannot listen on port {port} ({error.strerror})", "choose another port") from error
    console.info(f"the page of {path}: http://127.0.0.1:{server.server_address[1]}/ - Ctrl-C ends it")
    with server:
        server.serve_forever()
