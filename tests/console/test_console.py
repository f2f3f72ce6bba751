"""What a person sees, on terminals of every kind and on none."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import subprocess
import sys
import termios
import threading
import time
from dataclasses import replace
from itertools import islice

import pytest
from rich.cells import cell_len

from tunekit.console import Console, visible
from tunekit.console.loudness import LOUDNESS
from tunekit.console.progress import CountProgress, StepProgress, beat_waits
from tunekit.console.tables import TableColumn, stacked
from tunekit.console.text import Flow, cell_text, time_text, wrapped
from tunekit.records import EvaluationRecord, StepRecord


class Terminal(io.StringIO):
    """Text output that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "COLUMNS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def record(step: int, loss: float = 1.25) -> StepRecord:
    return StepRecord(step, step / 10, loss, 1e-4, 0.5, 100, 40, 0.25, 1234.0, 3 << 29)


def both(console_is_terminal: bool = False) -> tuple[Console, io.StringIO, io.StringIO]:
    output, errors = (Terminal(), Terminal()) if console_is_terminal else (io.StringIO(), io.StringIO())
    return Console(output=output, errors=errors), output, errors


def test_lines_go_where_they_belong() -> None:
    console, output, errors = both()
    console.info("hello [red]x[/red]")
    console.info("one", "two")
    console.info()
    console.warn("careful", "and slow")
    assert output.getvalue() == "hello [red]x[/red]\none\ntwo\n"
    assert errors.getvalue() == "warning: careful\nwarning: and slow\n"


def test_quiet_prints_results_without_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOUDNESS, "quiet")
    console, output, _ = both()
    console.info("a note")
    console.result("a is the best")
    assert output.getvalue() == "a is the best\n"


def test_colours_only_on_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    console, _, errors = both(True)
    console.warn("careful")
    assert errors.getvalue() == "\x1b[33mwarning:\x1b[0m careful\n"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            console, output, errors = both(True)
            console.warn("careful")
            console.print_segments([("question", False), ("answer", True)])
            assert errors.getvalue() == "warning: careful\n"
            assert output.getvalue() == "question⟦answer⟧\n"


def test_lines_are_wrapped_between_words_and_colours_take_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    console, output, errors = both(True)
    console.warn("the loss of step 3 grew")
    assert errors.getvalue() == "\x1b[33mwarning:\x1b[0m the loss of\n  step 3 grew\n"
    console.listing("tasks", [("sort", "puts the rows in order"), ("drop", "removes rows")], 4)
    assert output.getvalue() == "tasks\n  sort  puts the rows in\n        order\n  drop  removes rows\n"


@pytest.mark.parametrize(
    "kept",
    [
        "`tunekit recipes sft-lora --copy mine.yaml`",
        "tunekit chat 'runs/a run with blanks in its name'",
        "tunekit report runs/first/of-this-week runs/second/of-this-week",
        "tunekit train mine.yaml --resume",
        "tunekit data rank runs/first --keep 0.5",
        "tunekit sweep mine.yaml training.learning_rate=1e-4,3e-4 ~training.epochs",
        "/data/a-path-that-is-longer/than-the-line-of/the-terminal.jsonl",
    ],
)
def test_commands_and_paths_stay_whole(kept: str) -> None:
    """So that they can be copied: a line of 30 columns is broken before them, never inside them."""
    text = f"the run has ended; to see more of it, use {kept}; then read the page of the run"
    lines = wrapped(text, 30).split("\n")
    assert any(kept in line for line in lines)
    assert all(len(line) <= 30 or kept in line for line in lines)
    assert len(lines) > 3


def test_errors_are_wrapped_if_only_they_are_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    errors, output = Terminal(), io.StringIO()
    console = Console(output=output, errors=errors)
    console.error("recipe.yaml:3: unknown key; did you mean 'epochs'?")
    console.info("a line of a file is not wrapped")
    assert errors.getvalue() == "recipe.yaml:3:\n  unknown key; did\n  you mean 'epochs'?\n"
    assert output.getvalue() == "a line of a file is not wrapped\n"


def test_complaints_hold_no_secrets() -> None:
    console, _, errors = both(False)
    console.warn("https://alice:pw123@host refused hf_AbCdEfGhIjKl")
    assert errors.getvalue() == "warning: https://[secret]@host refused [secret]\n"


def test_data_cannot_command_the_terminal() -> None:
    evil = "\x1b[2J\x1b]0;title\x07 \x9b31m \r\x00 ok\ttab"
    console, output, errors = both()
    console.info(evil)
    console.warn(evil)
    console.table([evil], [[evil]], title=evil)
    console.panel(evil, {evil: evil})
    console.print_segments([(evil, True)])
    with StepProgress(console, 1) as progress:
        progress.evaluation(EvaluationRecord(1, {evil: 1.0}))
    for letter in "\x1b\x07\x9b\r\x00":
        assert letter not in output.getvalue() + errors.getvalue()
    assert visible("\x1b[0m") == "\\x1b[0m"


def test_markup_in_data_stays_text() -> None:
    console, output, _ = both()
    console.table(["[b]name[/b]"], [["[link=x]y[/link]"], [":smile:"], ["[/]"]], title="[i]t[/i]")
    console.panel("[red]", {"[a]": "[/a]"})
    console.print_segments([("[bold]", True), ("[/nothing]", False)])
    for text in ("[b]name[/b]", "[link=x]y[/link]", ":smile:", "[/]", "[i]t[/i]", "[red]", "[a]", "[/a]", "⟦[bold]⟧"):
        assert text in output.getvalue()


def test_tables_hold_all_text_however_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.0.self_attn.q_proj"
    monkeypatch.setenv("COLUMNS", "20")
    console, output, _ = both()
    console.table(["module", "parameters"], [[name, 123456]])
    lines = output.getvalue().splitlines()
    assert all(len(line) <= 20 for line in lines if line != name)
    assert name in lines
    assert "     123,456" in lines
    monkeypatch.setenv("COLUMNS", "nonsense")
    console.table(["module"], [[name]])
    assert name in output.getvalue()


@pytest.mark.parametrize("path", ["runs/first", "runs/experiments/of-this-week/lora-r16-lr2e-4"])
def test_a_narrow_table_folds_long_cells_alone(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight columns on 80 characters: every number and every column name stays whole."""
    monkeypatch.setenv("COLUMNS", "80")
    console, output, _ = both()
    columns = ["run", "state", "steps", "loss", "eval\nloss", "size", "check-\npoints", "age"]
    row = [path, "finished", "1,200/1,200", "0.7396", "1.234", "937.6 MiB", "128.1 MiB", "12 min"]
    console.table(columns, [row])
    lines = output.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any(all(cell in line for cell in row[1:]) for line in lines)
    assert "check-" in output.getvalue()
    assert any(line.strip().split("  ")[0] == path for line in lines)  # whole, so that it can be copied


def test_a_narrow_table_breaks_texts_between_words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    console, output, _ = both()
    text = "the answer repeats the question, and the label of the row contradicts it"
    row = ["sft-lora-first", 1234, text, "+0.1721 to +0.2721"]
    console.table(["run", "rows in both", "the first of them", "interval"], [row])
    lines = output.getvalue().splitlines()
    assert all(len(line.rstrip()) <= 60 for line in lines)
    first = next(line for line in lines if "sft-lora-first" in line)
    assert "1,234" in first
    start, end = first.index("the answer"), first.index("+0.1721")
    assert " ".join(line[start:end] for line in lines[lines.index(first) :]).split() == text.split()


def test_a_table_with_too_many_long_names_becomes_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of three runs do not fit beside each other: each cell has a line of its own."""
    monkeypatch.setenv("COLUMNS", "80")
    console, output, _ = both()
    names = [f"lora-r16-learning-rate-{rate}-epochs-3" for rate in ("1e-4", "3e-4", "1e-3")]
    console.table(["run", *names], [["eval\nloss", *map(str, (2.41, 2.4, 2.5))]])
    assert output.getvalue().splitlines() == [
        *("", "run", "─" * 44, "eval", "loss"),
        *(f"  {name}  {loss}" for name, loss in zip(names, ("2.41", "2.4", "2.5"), strict=True)),
        "",
    ]


def test_wide_letters_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    console, output, _ = both()
    console.table(["text", "rows"], [["日本語のテキスト", 7]])
    assert "日本語のテキスト" in output.getvalue()
    console.table(["a path that is long", "text", "rows"], [["/data/of/this/week/train.jsonl", "日本語のテキスト", 7]])
    assert "  日本語のテキスト     7" in output.getvalue()


def test_a_table_in_a_pipe_is_wide_and_aligned() -> None:
    console, output, _ = both()
    console.table(["part", "bytes"], [["weights", 5], ["logits", 12345], ["x", None]])
    lines = [line for line in output.getvalue().splitlines() if line]
    assert lines[2].endswith("     5")
    assert lines[3].endswith("12,345")
    console.table(["a"], [])


def test_cells() -> None:
    assert [cell_text(value) for value in (None, True, 1234567, 0.123456, 1e-9, "x")] == [
        "", "yes", "1,234,567", "0.1235", "1e-09", "x"
    ]  # fmt: skip
    assert [time_text(value) for value in (-1, 0.4, 75, 3725)] == ["0s", "0s", "1m15s", "1h02m"]


def test_segments_are_coloured_and_complete() -> None:
    console, output, _ = both(True)
    console.print_segments([("user\n", False), ("yes sir", True), ("", False)])
    assert "\x1b[1;32myes sir\x1b[0m" in output.getvalue()
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(output=output).print_segments([("a", False), ("é", True)])
    output.seek(0)
    assert output.read() == "a[[\\xe9]]\n"


def test_other_ranks_print_nothing() -> None:
    console = Console(enabled=False, output=(output := io.StringIO()), errors=(errors := io.StringIO()))
    console.info("x")
    console.warn("x")
    console.table(["a"], [[1]])
    console.panel("x", {"a": 1})
    console.print_segments([("x", True)])
    with StepProgress(console, 2) as progress:
        progress.update(record(1))
        progress.evaluation(EvaluationRecord(1, {"loss": 1.0}))
    assert output.getvalue() == errors.getvalue() == ""


# --- progress ------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_first_last_and_now_and_then() -> None:
    console, output, _ = both()
    clock = Clock()
    with StepProgress(console, 1000, clock) as progress:
        for step in range(1, 1001):
            clock.now += 1.0
            progress.update(record(step))
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("step 1/1000  loss 1.2500  lr 1.00e-04  1,234 tok/s  peak 1.5 GiB  4m10s left")
    assert lines[-1] == "step 1000/1000  loss 1.2500  lr 1.00e-04  1,234 tok/s  peak 1.5 GiB"
    assert 40 < len(lines) <= 101
    assert "\r" not in output.getvalue()


def heartbeats() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


@pytest.mark.parametrize("live", [False, True])
def test_the_first_step_has_a_heartbeat_that_its_record_ends(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunekit.console.progress.beat_waits", lambda _: iter([0.0, 0.0, 3600.0]))
    console, output, _ = both(live)
    with StepProgress(console, 9) as progress:
        progress.start(4)
        while output.getvalue().count("computing") < 2:  # from another thread
            time.sleep(0.001)
        progress.update(replace(record(4), seconds=7200.0))
        assert not heartbeats(), "the heartbeat has ended, although its next beat is an hour away"
        progress.update(record(5))
    beats, steps = output.getvalue().split("step 4/9  loss")[0], output.getvalue()
    assert beats.count("step 4/9  computing, 0s so far") == 2
    assert steps.count("computing") == 2
    assert ("\r" in beats) == live


def test_a_heartbeat_ends_with_a_run_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = StepProgress(both()[0], 9)
    progress.start(1)
    assert heartbeats()
    progress.__exit__(KeyError, KeyError(), None)
    assert not heartbeats()
    quiet, output, _ = both(True)
    monkeypatch.setenv(LOUDNESS, "quiet")
    for silent in (quiet, Console(enabled=False)):
        with StepProgress(silent, 9) as progress:
            progress.start(1)
            assert not heartbeats(), "nothing to show, so no thread"
    assert output.getvalue() == ""


def test_a_log_gets_few_beats() -> None:
    assert list(islice(beat_waits(False), 5)) == [10.0, 10.0, 20.0, 40.0, 80.0]
    assert list(islice(beat_waits(True), 3)) == [0.0, 1.0, 1.0]


def test_the_last_step_is_told_once_and_an_early_end_keeps_the_last_line() -> None:
    console, output, _ = both()
    with StepProgress(console, 1) as progress:
        progress.update(record(1))
    assert output.getvalue().count("step 1/1") == 1
    console, output, _ = both()
    clock = Clock()
    with StepProgress(console, 100, clock) as progress:
        for step in (1, 2, 3):
            progress.update(record(step))
    assert [line.split()[1] for line in output.getvalue().splitlines()] == ["1/100", "3/100"]


def test_the_time_left_is_that_of_the_records_and_not_of_whoever_watches() -> None:
    """Read in no time, after an evaluation, in the second leg of a run: 60 steps of 2 seconds are left."""
    progress = StepProgress(both()[0], 100)
    assert progress.seconds_left() is None
    progress.evaluation(EvaluationRecord(0, {"loss": 1.0}))
    for step in range(1, 41):
        progress.update(replace(record(step), seconds=2.0 if step > 10 else 9.0))
    assert progress.seconds_left() == pytest.approx(120.0)
    progress.stop()
    assert progress.seconds_left() is None


def test_one_live_line_that_steps_aside() -> None:
    console, output, _ = both(True)
    with StepProgress(console, 3) as progress:
        progress.update(record(1))
        console.info("a message")
        progress.update(record(3, loss=0.5))
        progress.evaluation(EvaluationRecord(3, {"loss": 0.5, "accuracy": 1.0}))
    text = output.getvalue()
    assert text.startswith("\rstep 1/3  loss 1.2500")
    assert "\r\x1b[Ka message\n" in text
    assert "step 3  eval  accuracy 1.0000  loss 0.5000\n" in text
    assert text.endswith("\n")
    assert text.splitlines()[-1].endswith(
        "step 3/3  ████████████  loss 0.5000  █▁  lr 1.00e-04  1,234 tok/s  peak 1.5 GiB\x1b[K"
    )


def test_an_error_replaces_the_live_line_of_another_console() -> None:
    console, output, _ = both(True)
    console.draw("trials planned: 1 of 2")
    Console(output=output, errors=output).error("the file is empty")
    assert output.getvalue().endswith("\r\x1b[Kthe file is empty\n")


@pytest.mark.parametrize("columns", [78, 79])
def test_a_panel_breaks_no_word(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    console, output, _ = both(False)
    console.panel("adapter", {"fingerprint": "0" * 62, "ranks": 8})
    assert "0" * 62 in output.getvalue()
    assert ("╭" in output.getvalue()) == (columns == 79)


def test_the_live_line_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    console, output, _ = both(True)
    with StepProgress(console, 3) as progress:
        progress.update(record(1))
    drawn = output.getvalue().replace("\x1b[K", "").replace("\n", "").split("\r")
    assert all(len(line) <= 19 for line in drawn)


def test_the_live_line_of_a_named_run_fits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    console, output, _ = both(True)
    with StepProgress(console.named("learning_rate=1e-4"), 9) as progress:
        progress.update(record(1))
        drawn = output.getvalue().replace("\x1b[K", "").split("\r")[1]
    assert len(drawn) < 50
    assert drawn.startswith("learning_rate=1e-4: step 1/9  ")
    assert drawn.endswith("2s left")


def test_the_time_left_is_cut_last(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, shown in (
        (
            120,
            "step 1/9  █░░░░░░░░░░░  loss 1.2500  ▁▅██▅▁  lr 1.00e-04  1,234 tok/s  peak 1.5 GiB of 2.0 GiB  24s left",
        ),
        (100, "step 1/9  █░░░░░░░░░░░  loss 1.2500  lr 1.00e-04  1,234 tok/s  peak 1.5 GiB  24s left"),
        (80, "step 1/9  loss 1.2500  lr 1.00e-04  1,234 tok/s  peak 1.5 GiB  24s left"),
        (64, "step 1/9  loss 1.2500  1,234 tok/s  peak 1.5 GiB  24s left"),
        (50, "step 1/9  loss 1.2500  1,234 tok/s  24s left"),
        (40, "step 1/9  loss 1.2500  24s left"),
        (20, "step 1/9  24s left"),
    ):
        monkeypatch.setenv("COLUMNS", str(columns))
        budget = 2 << 30 if "of 2.0" in shown else None
        progress = StepProgress(both(True)[0], 9, budget_bytes=budget)
        progress._curve.extend([1.0, 2.0, 3.0, 3.0, 2.0, 1.0] if budget else [])
        progress._last = record(1)
        progress._pace.append(3.0)
        assert progress.line(record(1)) == shown, columns


def test_a_count_is_told_now_and_then() -> None:
    clock, (console, output, _) = Clock(), both(False)
    counting = CountProgress(console, clock)
    for done in range(0, 1001, 100):
        clock.now += 3.0
        counting("rows measured", done, 1000)
    assert output.getvalue().splitlines() == [f"rows measured: {done:,} of 1,000" for done in (300, 700, 1_000)]


def test_a_short_count_says_nothing() -> None:
    clock, (console, output, _) = Clock(), both(False)
    counting = CountProgress(console, clock)
    for done in (1, 2):
        counting("rows measured", done, 2)
    assert output.getvalue() == ""


def test_no_word_is_broken_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    console, output, errors = both(True)
    text = "the longest row has 4,096 tokens, in /a/folder/whose/name/is/longer/than/the/line"
    console.info(text)
    console.warn(text)
    for stream in (output, errors):
        lines = stream.getvalue().replace("\x1b[33mwarning:\x1b[0m ", "").splitlines()
        assert [word for line in lines for word in line.split()] == text.split()
        assert all(len(line) <= 24 or len(line.split()) == 1 for line in lines), lines
    console.table(["metric"], [["loss"]], title="/a/folder/whose/name/is/longer/than/the/line")
    assert "/a/folder/whose/name/is/longer/than/the/line\n" in output.getvalue()


# --- readers that go away ------------------------------------------------------------------------------------------


class Gone(io.StringIO):
    """A pipe whose reader has gone, or a terminal that hung up."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.calls = number, 0

    def write(self, text: str) -> int:
        self.calls += 1
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO])
def test_a_reader_that_has_gone_is_given_up(number: int) -> None:
    gone, errors = Gone(number), io.StringIO()
    console = Console(output=gone, errors=errors)
    console.info("x")
    console.table(["a"], [[1]])
    with StepProgress(console, 2) as progress:
        progress.update(record(1))
    console.warn("still here")
    assert gone.calls == 1
    assert errors.getvalue() == "warning: still here\n"


def test_closed_streams_are_no_error() -> None:
    output = io.StringIO()
    output.close()
    Console(output=output, errors=output).info("x")
    Console(output=output, errors=output).warn("x")


PIPED = """
from tunekit.console import Console
from tunekit.console.progress import StepProgress
from tunekit.records import StepRecord
console = Console()
for step in range(20000):
    console.info("a line of text")
with StepProgress(console, 1) as progress:
    progress.update(StepRecord(1, 0.1, 1.0, 1e-4, 0.5, 10, 5, 0.1, 100.0, 1))
"""


def test_head_ends_a_pipe_without_a_traceback() -> None:
    code = f"\"{sys.executable}\" -c '{PIPED}' | head -1; echo status ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "a line of text\nstatus 0\n"
    assert done.stderr == ""


def test_a_closed_standard_output() -> None:
    code = f"\"{sys.executable}\" -c '{PIPED}' >&-; echo status $?"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "status 0\n"
    assert done.stderr == ""


def test_a_real_terminal() -> None:
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 40))
    code = "from tunekit.console import Console; c = Console(); print(c.is_terminal, c.has_colours, c.columns)"
    done = subprocess.Popen([sys.executable, "-c", code], stdout=follower, stdin=follower)
    os.close(follower)
    assert done.wait(60) == 0
    assert os.read(leader, 100).decode().strip() == "True True 40"
    os.close(leader)


def test_plain_lines_need_no_rich() -> None:
    code = (
        "import sys; from tunekit.console import Console; c = Console(); c.info('x'); c.warn('y');"
        "sys.exit('rich' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_line_of_json_is_json_whatever_it_holds(encoding: str) -> None:
    value = {"answer": "".join(map(chr, range(0xA1))) + "\u2028\u2029 é 漢 🙂"}
    paper = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    Console(output=paper).json(value)
    paper.seek(0)
    text = paper.read()
    assert len(text.splitlines()) == 1
    assert json.loads(text) == value
    assert not set(text[:-1]) & {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))}
    assert ("é 漢 🙂" in text) == (encoding == "utf-8")


def test_text_that_comes_in_pieces_is_broken_between_words() -> None:
    text = "The ship left the harbour at dawn\nwith a map that was very bad indeed"
    for size in (1, 3, 7):
        flow = Flow(16)
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        lines = ("".join(map(flow.add, pieces)) + flow.end()).split("\n")
        assert [line.rstrip() for line in lines] == [
            *("The ship left", "the harbour at", "dawn", "with a map that", "was very bad", "indeed")
        ]
    assert Flow(None).add("as it is, however long") == "as it is, however long"


def test_the_first_piece_is_written_at_once() -> None:
    flow = Flow(12)
    pieces = [flow.add(piece) for piece in ("On", "ce upon", " a time", "less", " long day", "\nSo", "on")] + [
        flow.end()
    ]
    assert "".join(pieces) == "Once upon a \ntimeless \nlong day\nSoon"
    assert pieces[0] == "On"
    assert pieces[5].endswith("\nSo")


def test_wide_letters_count_as_two_columns_in_stacked_tables() -> None:
    """The values below a name start in the same column of the screen, also next to Chinese headings."""
    columns = [TableColumn("key", ["epochs"], False), TableColumn("漢字の実行", ["one " * 9], False)]
    lines = stacked([*columns, TableColumn("short", ["two " * 9], False)], 40, "-").splitlines()
    starts = {cell_len(line[: line.index(word)]) for line in lines for word in ("one", "two") if word in line}
    assert starts == {2 + 10 + 2}
