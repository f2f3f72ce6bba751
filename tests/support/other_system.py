"""Python as tunekit meets it on Windows or on a Mac: what that system's Python lacks is hidden from every module of
tunekit, in this process, and the file system keeps that system's rules. Other packages see the system that is there.

Sources: the "Availability" notes of Python's library reference; Windows' rules for open files.
"""

import builtins
import ctypes
import errno
import importlib
import io
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

UNIX_MODULES = ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "readline", "syslog", "posix")
UNIX_SIGNALS = (
    *("SIGHUP", "SIGKILL", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE", "SIGQUIT", "SIGCONT", "SIGTSTP"),
    *("SIGSTOP", "SIGWINCH", "SIGBUS", "SIGXCPU", "setitimer", "getitimer", "ITIMER_REAL", "alarm", "pause"),
    *("pthread_sigmask", "pthread_kill", "SIG_BLOCK", "SIG_SETMASK", "SIG_UNBLOCK", "sigpending", "sigwait"),
)
UNIX_OS = (
    *("fork", "forkpty", "getuid", "geteuid", "getgid", "getegid", "getgroups", "setuid", "setsid", "killpg"),
    *("getpgid", "getpgrp", "nice", "getloadavg", "uname", "sysconf", "confstr", "pathconf", "statvfs", "fstatvfs"),
    *("preadv", "pwritev", "pread", "pwrite", "readv", "writev", "sendfile", "lockf", "sync", "fdatasync", "mkfifo"),
    *("mknod", "chown", "fchown", "lchown", "fchmod", "chroot", "posix_fadvise", "posix_fallocate", "posix_spawn"),
    *("sched_getaffinity", "sched_setaffinity", "sched_yield", "register_at_fork", "wait3", "wait4", "WNOHANG"),
    *("memfd_create", "eventfd", "openpty", "ttyname", "ctermid", "fchdir", "pipe2", "splice", "copy_file_range"),
    *("O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "O_DIRECTORY", "O_SYNC", "O_DSYNC", "O_NOCTTY", "O_DIRECT"),
    *("O_PATH", "O_TMPFILE", "O_NOATIME", "O_ASYNC", "EX_OK", "EX_USAGE", "EX_SOFTWARE"),
)
LINUX_OS = (  # that a Mac lacks
    *("sched_getaffinity", "sched_setaffinity", "posix_fadvise", "posix_fallocate", "preadv", "pwritev", "fdatasync"),
    *("memfd_create", "eventfd", "splice", "copy_file_range", "getrandom", "O_DIRECT", "O_PATH", "O_TMPFILE"),
)
O_BINARY = 0x8000  # has no effect on Linux
LOCK_ERRORS = ("read_text", "write_text", "read_bytes")


class Hidden(ModuleType):
    """A module without the attributes that the other system lacks, and with those that it alone has."""

    def __init__(self, real: ModuleType, lacks: tuple[str, ...], has: dict[str, object]) -> None:
        super().__init__(real.__name__)
        self._real, self._lacks, self._has = real, lacks, has

    def __getattr__(self, name: str) -> Any:
        if name in self._lacks:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        return self._has[name] if name in self._has else getattr(self._real, name)


def hide(system: str) -> None:
    """From now on, modules of tunekit are imported as on that system: windows or mac."""
    assert not any(name.partition(".")[0] == "tunekit" for name in sys.modules), "tunekit is imported already"
    changed = {"os": Hidden(os, LINUX_OS, {"open": _open_on_mac}), "platform": _platform()}
    modules: tuple[str, ...] = ()
    if system == "windows":
        modules = UNIX_MODULES
        changed |= {
            "os": Hidden(os, UNIX_OS, _os_of_windows()),
            "signal": Hidden(signal, UNIX_SIGNALS, {"SIGBREAK": signal.Signals(21)}),
            "mmap": Hidden(importlib.import_module("mmap"), _named("mmap", "MADV_", "MAP_", "PROT_"), {}),
            "ctypes": Hidden(ctypes, (), {"CDLL": NoLibrary}),
            "multiprocessing": Hidden(multiprocessing, (), _processes()),
        }
        _lock_paths()
    _hide_proc()
    real = builtins.__import__

    def importing(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> ModuleType:
        importer = str((globals or {}).get("__name__", ""))
        if level == 0 and importer.partition(".")[0] == "tunekit":
            if name.partition(".")[0] in modules:
                raise ModuleNotFoundError(f"No module named '{name}'", name=name)
            if name in changed:
                return changed[name]
        return real(name, globals, locals, fromlist, level)

    builtins.__import__ = importing


def _named(module: str, *starts: str) -> tuple[str, ...]:
    return tuple(name for name in vars(importlib.import_module(module)) if name.startswith(starts))


def _platform() -> ModuleType:
    return Hidden(importlib.import_module("platform"), (), {"libc_ver": lambda: ("", "")})


def _processes() -> dict[str, object]:
    def get_context(method: str | None = None) -> Any:
        if method not in (None, "spawn"):
            raise ValueError(f"cannot find context for {method!r}")
        return multiprocessing.get_context("spawn")

    return {"get_context": get_context, "get_all_start_methods": lambda: ["spawn"]}


class NoLibrary(ctypes.CDLL):
    """Windows has no library without a name: no libc at hand."""

    def __init__(self, name: str | None, *rest: object) -> None:
        if name is not None:
            raise OSError(f"Could not find module '{name}'")
        raise TypeError("LoadLibrary() argument 1 must be str, not None")


def _refused(path: object, number: int = errno.EACCES) -> OSError:
    return OSError(number, os.strerror(number), str(path))


def _of_kernel(path: object) -> bool:
    return str(path).startswith(("/proc/", "/sys/"))


def _open_on_mac(path: Any, flags: int, *rest: Any, **options: Any) -> int:
    if _of_kernel(path):
        raise _refused(path, errno.ENOENT)
    return os.open(path, flags, *rest, **options)


def _os_of_windows() -> dict[str, object]:
    """Windows opens no folder, translates line ends unless told not to, and moves or removes nothing that is open."""

    def open_file(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if os.path.isdir(path):
            raise _refused(path)
        if _of_kernel(path):
            raise _refused(path, errno.ENOENT)
        assert flags & O_BINARY or str(path) == os.devnull, f"{path} is opened as text"
        return _open_on_mac(path, flags, *rest, **options)

    def fsync(number: int) -> None:
        if os.path.exists(link := f"/proc/self/fdinfo/{number}"):
            flags = next(line for line in _lines(link) if line.startswith("flags:"))
            if not int(flags.split()[1], 8) & (os.O_WRONLY | os.O_RDWR):
                raise _refused(number, errno.EBADF)
        os.fsync(number)

    def unless_open(action: Callable[..., Any], *, replaces: bool = True) -> Callable[..., Any]:
        def checked(path: Any, *rest: Any, **options: Any) -> Any:
            for each in (path, *rest):
                _refuse_open(each)
            if rest and os.path.lexists(rest[0]) and not (replaces and os.path.isfile(rest[0])):
                raise _refused(rest[0], errno.EEXIST)
            return action(path, *rest, **options)

        return checked

    moves = {name: unless_open(getattr(os, name)) for name in ("replace", "unlink", "remove", "rmdir")}
    moves["rename"] = unless_open(os.rename, replaces=False)
    return {"O_BINARY": O_BINARY, "open": open_file, "fsync": fsync, "name": "nt", **moves}


def _lines(path: str) -> list[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().splitlines()


def _refuse_open(path: Any) -> None:
    """A file that is open or mapped in this process, or a folder with one."""
    place = os.path.realpath(path)
    names = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    names += [line.split(maxsplit=5)[-1] for line in _lines("/proc/self/maps")]
    if any(name == place or name.startswith(f"{place}/") for name in names):
        raise _refused(path)


def _lock_paths() -> None:
    """A locked file can be neither read nor written by way of its name, nor removed."""
    for name in LOCK_ERRORS:
        real = getattr(pathlib.Path, name)

        def locked(path: pathlib.Path, *rest: Any, real: Callable[..., Any] = real, **options: Any) -> Any:
            if path.suffix == ".lock":
                _refuse_open(path)
            return real(path, *rest, **options)

        setattr(pathlib.Path, name, locked)
    unlink = pathlib.Path.unlink

    def checked(path: pathlib.Path, *rest: Any, **options: Any) -> None:
        _refuse_open(path)
        unlink(path, *rest, **options)

    pathlib.Path.unlink = checked  # type: ignore[method-assign]


def _hide_proc() -> None:
    real = pathlib.Path.read_text

    def hidden(path: pathlib.Path, *rest: Any, **options: Any) -> str:
        if _of_kernel(path):
            raise _refused(path, errno.ENOENT)
        return real(path, *rest, **options)

    pathlib.Path.read_text = hidden  # type: ignore[method-assign]


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Ctrl-C while a run logs this step."""
    from tunekit.artifacts import metrics_log

    real = metrics_log.append_line

    def with_interrupt(path: pathlib.Path, line: bytes) -> None:
        real(path, line)
        if json.loads(line).get("step") == step:
            signal.raise_signal(signal.SIGINT)

    metrics_log.append_line = with_interrupt
    try:
        yield
    finally:
        metrics_log.append_line = real


def command(*words: str, typed: str = "") -> int:
    """The exit code of `tunekit WORDS` in this process."""
    from tunekit.cli import main

    sys.argv, sys.stdin = ["tunekit", *words], io.StringIO(typed)
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return -1
    return 0


def run_all(system: str, recipe: str, folder: str) -> dict[str, int]:
    """The exit code of every verb."""
    hide(system)
    whole, stopped, merged = (str(pathlib.Path(folder) / name) for name in ("whole", "stopped", "merged"))
    codes = {name: command(name, recipe) for name in ("validate", "plan")}
    codes["train"] = command("train", recipe, f"output.dir={whole}")
    with interrupted_at(3):
        codes["Ctrl-C"] = command("train", recipe, f"output.dir={stopped}")
    codes["resume"] = command("train", recipe, f"output.dir={stopped}", "--resume")
    codes["overwrite"] = command("train", recipe, f"output.dir={whole}", "--overwrite")
    codes["eval"] = command("eval", stopped)
    codes["merge"] = command("merge", f"{stopped}/adapter", "--output", merged)
    codes["chat"] = command("chat", stopped, typed="/set max_new_tokens 3\nhello\n/quit\n")
    codes["report"] = command("report", stopped, whole)
    codes["runs"] = command("runs", folder)
    return codes


if __name__ == "__main__":
    print(json.dumps(run_all(*sys.argv[1:])))
