"""Runs commands on hostile inputs, each in a process of its own, and judges how they end."""

import contextlib
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

from tests.support.hostile_inputs import AREAS, Bases, HostileInput
from tests.support.speech_case import write_tiny_whisper
from tests.support.tiny_vit import write_tiny_vit
from tunekit import cli
from tunekit.errors import EXIT_FAULT
from tunekit.talking.protocol import ProtocolError, read_body

LIMIT_SECONDS, KILLED_SECONDS = 10.0, 60.0  # of its processor; on the clock, after which it is ended
# Beyond Python and its libraries. An image of 80 megapixels takes 0.83 GB (its pixels, their planes, and 4 bytes per
# pixel in PIL), or 1.14 GB if malloc cannot return PIL's blocks to the system.
LIMIT_BYTES = 1_500_000_000
REFUSED = 2
LOADED_BEFORE = (
    "preview",
    "report",
    "runs",
    "foreign",
    "watch",
    "evaluate",
    "merge",
    "model.speech.processor",
    "model.families.image_classifier",
)
COMMANDS = ("\x1b", "\x07", "\u202e", "\u2066")  # of terminals, which no output may have


@dataclass(frozen=True)
class Outcome:
    """How a command ended; `code`: None if it had to be killed."""

    area: str
    number: int
    input: HostileInput
    code: int | None
    seconds: float
    bytes: int
    text: str

    @property
    def fault(self) -> str | None:
        """What no input may cause; None if the command answered, or refused it in words."""
        if self.code is None or self.seconds > LIMIT_SECONDS:
            return f"took {self.seconds:.1f} s"
        if self.bytes > LIMIT_BYTES:
            return f"took {self.bytes / 1e9:.2f} GB"
        if self.code < 0 or self.code == EXIT_FAULT or "Traceback (most" in self.text:
            return f"ended with {self.code}"
        if self.code == REFUSED and not self.text.strip():
            return "was refused without a word"
        return "commands the terminal" if any(each in self.text for each in COMMANDS) else None

    def __str__(self) -> str:
        command = " ".join(map(repr, self.input.command)) or repr(self.input.body[:200] if self.input.body else b"")
        last = self.text.strip().splitlines()[-1:] or [""]
        place = f"{self.area} {self.number}: {self.fault or 'well'}: {self.input.what}"
        return f"{place}\n    {command}\n    {last[0][:300]}".encode("utf-8", "backslashreplace").decode()


def make_bases(folder: Path) -> Bases:
    """Tiny models, and everything imported that the commands import, which each process then has."""
    for name in LOADED_BEFORE:
        importlib.import_module(f"tunekit.{name}")
    return Bases(write_tiny_whisper(folder / "whisper"), write_tiny_vit(folder / "vit"))


def outcomes(folder: Path, bases: Bases, seed: int, numbers: Sequence[int]) -> Iterator[Outcome]:
    """Each area in turn. An input depends on the seed and its number alone."""
    (folder / "nothing").mkdir()
    libraries = _run("serve", 0, HostileInput("nothing", body=b"{}"), folder / "nothing").bytes
    for number in numbers:
        area = list(AREAS)[number % len(AREAS)]
        place = folder / str(number)
        place.mkdir()
        hostile = AREAS[area](random.Random(f"{seed} {number}"), place, bases)
        outcome = _run(area, number, hostile, place)
        yield replace(outcome, bytes=outcome.bytes - libraries)


def _run(area: str, number: int, hostile: HostileInput, folder: Path) -> Outcome:
    process = os.fork()
    if not process:
        _answer(hostile, folder)
    start, ended = time.monotonic(), 0
    while not ended:
        ended, status, used = os.wait4(process, os.WNOHANG)
        if not ended and time.monotonic() - start > KILLED_SECONDS:
            os.kill(process, signal.SIGKILL)
            _, status, used = os.wait4(process, 0)
            break
        time.sleep(0.005)
    seconds = used.ru_utime + used.ru_stime if ended else KILLED_SECONDS
    text = (folder / "printed").read_text("utf-8", "replace")
    code = os.waitstatus_to_exitcode(status) if ended else None
    return Outcome(area, number, hostile, code, seconds, used.ru_maxrss * 1024, text)


def _answer(hostile: HostileInput, folder: Path) -> NoReturn:
    """In the new process: do what was asked, and end."""
    code = EXIT_FAULT
    with contextlib.suppress(BaseException):
        printed = os.open(folder / "printed", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
        os.chdir(folder)
        os.environ |= {"TUNEKIT_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        torch.set_num_threads(1)
        code = _code_of(hostile)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _code_of(hostile: HostileInput) -> int:
    try:
        if hostile.body is not None:
            return _code_of_request(hostile.body)
        sys.argv = ["tunekit", *hostile.command]
        cli.main()
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else REFUSED
    except BaseException:
        traceback.print_exc()
        return EXIT_FAULT
    return 0


def _code_of_request(body: bytes) -> int:
    names: Any = SimpleNamespace(knows=lambda name: name == "base", listing="base")
    try:
        read_body(body, names, 16)
    except ProtocolError as error:
        print(json.dumps(error.body))
        return REFUSED
    return 0
