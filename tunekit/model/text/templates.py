"""Chat templates: code from a stranger, run in transformers' sandbox with limits on time and memory.

Comes in: a template and messages.  Goes out: text, or DataError with what the template said.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from typing import Any

from tunekit.errors import DataError
from tunekit.machine.memory import address_space_bytes
from tunekit.model.transformers_guard import replaced

KEY = "data.chat_template"
LIMIT_SECONDS = 5.0
LIMIT_CHARACTERS = 50_000_000
LIMIT_EXTRA_BYTES = 2 * 2**30
# A template that writes today's date would make other rows tomorrow; the day is Llama 3's own stand-in.
FIXED_DAY = datetime(2024, 7, 26)


class _TimeUp(Exception):
    pass


def render_template(
    native: Any,
    template: str,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    add_generation_prompt: bool,
) -> str:
    """The template applied to messages.

    Raises: DataError where the template refuses, is no template, takes too long or writes too much.
    """
    try:
        with _memory_limit(), _time_limit(), _fixed_day(template):
            text = native.apply_chat_template(
                list(messages),
                tools=None if tools is None else list(tools),
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
    except _TimeUp as error:
        raise DataError(f"the chat template took more than {LIMIT_SECONDS:g} seconds", key=KEY) from error
    except MemoryError as error:
        raise DataError("the chat template asked for too much memory") from error
    except RecursionError as error:
        raise DataError("the chat template, or the row, nests too deeply") from error
    except Exception as error:  # a template may raise anything
        reason = str(error).strip() or type(error).__name__
        raise DataError(f"the chat template refused the row: {reason}", key=KEY) from error
    if len(text) > LIMIT_CHARACTERS:
        raise DataError(f"the chat template wrote {len(text)} characters")
    return str(text)


def _fixed_day(template: str) -> AbstractContextManager[None]:
    """A block in which the template's clock stands still; transformers keeps one compiled copy of each template."""
    from transformers.utils import chat_template_utils

    compile_template: Callable[[str], Any] | None = getattr(chat_template_utils, "_compile_jinja_template", None)
    if compile_template is None or "strftime_now" not in template:
        return nullcontext()
    return replaced(compile_template(template).environment.globals, strftime_now=FIXED_DAY.strftime)


@contextmanager
def _time_limit() -> Iterator[None]:
    """At most LIMIT_SECONDS for the block; in the main thread alone, as signals are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: Any) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory_limit() -> Iterator[None]:
    """No allocation beyond what the process has now and LIMIT_EXTRA_BYTES more, where the system can say so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        limit = address_space_bytes() + LIMIT_EXTRA_BYTES
        known = [value for value in (limit, soft, hard) if value != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(known), hard))
    except (OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
