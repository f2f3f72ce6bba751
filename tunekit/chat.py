"""`tunekit chat`: a conversation in the terminal. Lines that begin with / are commands, all others are messages. With
an embedding model, all others are queries, and the answers are documents."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunekit.console import Console, visible
from tunekit.console.text import Flow
from tunekit.contracts import GREEDY, Sampling
from tunekit.errors import DataError, InputError, TunekitError
from tunekit.files.durable import write_text
from tunekit.formats.example import Message
from tunekit.machine.devices import make_devices
from tunekit.model.families import make_family
from tunekit.model.text.draws import PENALTIES, penalty, with_penalties
from tunekit.talking.adapters import BASE, check_folder
from tunekit.talking.answer import Reply, Request
from tunekit.talking.conversation import Speaker, make_speaker
from tunekit.talking.embedder import make_embedder
from tunekit.talking.search import DocumentSearch, make_search
from tunekit.targets.system_message import trained_system
from tunekit.targets.target import family_of, find_target, load_target

DEFAULT_NEW_TOKENS = 512
SETTINGS = {"temperature": float, "top_p": float, "top_k": int, "seed": int, "max_new_tokens": int}
SETTINGS |= dict.fromkeys(PENALTIES, float)


@dataclass
class Chat:
    """A conversation in the terminal, and the settings for its answers."""

    speaker: Speaker
    console: Console
    name: str  # the model that answers
    sampling: Sampling
    max_new_tokens: int
    history: Path | None = None
    messages: list[Message] = field(default_factory=list)
    ended: bool = False

    def line(self, text: str) -> None:
        """Handle one line of the user. Raises: TunekitError, without changing the conversation."""
        if not text.startswith("/"):
            self.send(text)
            return
        word, _, argument = text[1:].partition(" ")
        if word not in COMMANDS:
            raise InputError(
                f"there is no command /{word}", f"the commands are: {', '.join('/' + name for name in COMMANDS)}"
            )
        getattr(self, word)(argument.strip())

    def send(self, text: str) -> None:
        """Add the user's turn, and the answer to it."""
        self.messages.append(Message("user", text))
        try:
            reply = self._answer(self.messages, self.name)
        except BaseException:
            self.messages.pop()  # the user may send it again, which must not make a second turn
            raise
        self.messages.append(Message("assistant", reply.text))
        self._save()

    def _answer(self, messages: Sequence[Message], name: str) -> Reply:
        """Generate an answer and print it piece by piece; Ctrl-C ends it early."""
        started, written = time.perf_counter(), ""
        flow = Flow(self.console.columns if self.console.is_terminal else None)

        def show(row: int, text: str) -> bool:
            nonlocal written
            written += text
            self.console.write(flow.add(visible(text)))
            return True

        request = Request(messages, self.max_new_tokens, self.sampling)
        try:
            (reply,) = self.speaker.answer([request], name, show)
        except KeyboardInterrupt:
            reply = Reply(written, 0, 0, "interrupted")
        seconds = time.perf_counter() - started
        self.console.write(flow.end() + "\n")
        if reply.reason == "length":
            self.console.info(f"[ended at {self.max_new_tokens} tokens; /set max_new_tokens N changes this limit]")
        elif reply.reason == "interrupted":
            self.console.info("[stopped]")
        if reply.new_tokens:
            self.console.info(f"[{name}: {reply.new_tokens} tokens, {reply.new_tokens / seconds:.1f} a second]")
        return reply

    def _save(self) -> None:
        if self.history is not None:
            turns = [{"role": message.role, "content": message.content} for message in self.messages]
            write_text(self.history.resolve(), json.dumps({"messages": turns}, ensure_ascii=False) + "\n")

    # The commands.
    def help(self, argument: str) -> None:
        """list the commands"""
        for name, arguments in COMMANDS.items():
            self.console.info(f"/{f'{name} {arguments}'.strip():<28} {getattr(Chat, name).__doc__}")

    def base(self, argument: str) -> None:
        """let the base answer the last question again, without an adapter; the answer is not saved"""
        question = self.messages[:-1] if self.messages and self.messages[-1].role == "assistant" else self.messages
        if not question or question[-1].role != "user":
            raise InputError("there is no question yet", "write a question first")
        self._answer(question, BASE)

    def adapter(self, argument: str) -> None:
        """choose an adapter, or load one from a folder; without an argument: list the adapters"""
        adapters = self.speaker.adapters
        if argument and not adapters.knows(argument):
            before = adapters.names
            adapters.add_folder(argument)
            argument = next(name for name in adapters.names if name not in before)
        self.name = argument or self.name
        names = [f"{name} (answers)" if name == self.name else name for name in adapters.names]
        self.console.info(", ".join(names))

    def system(self, argument: str) -> None:
        """set the system prompt from now on; without an argument: remove it"""
        others = [message for message in self.messages if message.role != "system"]
        self.messages[:] = [*([Message("system", argument)] if argument else []), *others]

    def set(self, argument: str) -> None:
        """change a setting, such as temperature, top_p or max_new_tokens; without an argument: show all"""
        if argument:
            name, _, value = argument.replace("=", " ").partition(" ")
            number = _setting(name, value.strip())
            if name == "max_new_tokens":
                self.max_new_tokens = int(number)
            else:
                changed: dict[str, Any] = {name: number}
                self.sampling = replace(self.sampling, **changed)
            return
        now = {name: getattr(self.sampling, name, self.max_new_tokens) for name in SETTINGS}
        self.console.info(", ".join(f"{name} {value}" for name, value in now.items()))

    def undo(self, argument: str) -> None:
        """remove the last question and its answer"""
        if any(message.role == "user" for message in self.messages):
            while self.messages.pop().role != "user":
                pass
            self._save()

    def reset(self, argument: str) -> None:
        """start a new conversation; the system prompt stays"""
        self.messages[:] = [message for message in self.messages if message.role == "system"]
        self._save()

    def save(self, argument: str) -> None:
        """save the conversation to FILE now and after every turn, as a row of the format chat"""
        if not argument:
            raise InputError("no file name was given", "write /save FILE")
        path = Path(argument).expanduser()
        if path.exists() and path != self.history:
            raise InputError(f"{path} exists", "name a new file; chat --history FILE continues a saved conversation")
        self.history = path
        self._save()

    def quit(self, argument: str) -> None:
        """end the program, like Ctrl-D"""
        self.ended = True

    exit = quit


COMMANDS = {  # methods of Chat, and the arguments after their names
    "help": "",
    "base": "",
    "adapter": "[NAME | FOLDER]",
    "system": "[TEXT]",
    "set": "[SETTING VALUE]",
    "undo": "",
    "reset": "",
    "save": "FILE",
    "quit": "",
    "exit": "",
}


def _setting(name: str, value: str) -> float:
    kind = SETTINGS.get(name)
    if kind is None:
        raise InputError(f"there is no setting '{name}'", f"the settings are: {', '.join(SETTINGS)}")
    try:
        number: float = kind(value)
    except ValueError:
        raise InputError(f"'{value}' is not a number, but {name} needs a number", f"write /set {name} 1") from None
    if name in PENALTIES:
        return penalty(name, value)
    allowed = {"top_p": 0 < number <= 1, "max_new_tokens": number >= 1}.get(name, number >= 0)
    if not allowed:
        raise InputError(f"{name} {value} is out of range", "/set without an argument shows the settings")
    return number


def read_history(path: Path) -> list[Message]:
    """The conversation in a file written by an earlier chat; empty if the file does not exist.

    Raises: DataError if the file contains something else.
    """
    if not path.exists():
        return []
    try:
        row = json.loads(path.read_text("utf-8"))
        turns = row["messages"]
        if row.keys() != {"messages"} or any(turn.keys() != {"role", "content"} for turn in turns):
            raise ValueError("it has other fields than role and content, which would be lost")
        if not all(isinstance(value, str) for turn in turns for value in turn.values()):
            raise ValueError("a role or a content is not a text")
        return [Message(turn["role"], turn["content"]) for turn in turns]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"contains no conversation ({error})", "name another file", file=str(path)) from error


def chat_verb(
    target: str,
    base: str | None,
    overrides: Sequence[str],
    adapters: Sequence[str],
    system: str | None,
    history: str | None,
    sampling: tuple[float, float, int, int],
    max_new_tokens: int | None,
    penalties: Sequence[str] = (),
) -> None:
    """Chat until the input ends. `sampling`: temperature, top_p, top_k, seed. `penalties`: NAME=VALUE.

    Raises: TunekitError, whose exit code the command line returns.
    """
    console = Console()
    settings = with_penalties(Sampling(*sampling), penalties)
    earlier = [] if history is None else read_history(Path(history))
    spec = find_target(target, base, overrides)
    searches = make_family(family_of(spec)).headless
    if searches and any((adapters, system, history, settings != GREEDY, max_new_tokens)):
        raise InputError("the target embeds texts, so options of conversations have no effect", "remove them")
    for folder in adapters:
        check_folder(folder)
    console.warn(*spec.notes)
    console.info(f"loading {spec.model.name_or_path} ...")
    devices = make_devices()
    try:
        loaded = load_target(spec, devices.device)
        if searches:
            search = make_search(make_embedder(loaded, spec.evaluation.batch_size), console)
            console.info("Each line is a query. Ctrl-D ends the program.")
            _talk(search, console)
            return
        speaker = make_speaker(loaded)
        chat = Chat(speaker, console, speaker.default, settings, max_new_tokens or DEFAULT_NEW_TOKENS)
        chat.history, chat.messages = None if history is None else Path(history), earlier
        for folder in adapters:
            chat.adapter(folder)
        chat.name = speaker.default
        if system is not None:
            chat.system(system)
        elif not earlier and (usual := trained_system(spec)) is not None:
            console.info(f"The training rows begin with a system message; to use it, type: /system {usual}")
        model_name = "the base" if chat.name == BASE else "the tuned model; /base asks the base"
        console.info(
            f"You are chatting with {model_name}. /help lists the commands; Ctrl-C ends an answer, Ctrl-D the program."
        )
        for message in chat.messages:
            console.info(f"{message.role}: {message.content}")
        _talk(chat, console)
    finally:
        devices.close()


def _talk(chat: Chat | DocumentSearch, console: Console) -> None:
    """Read lines until the input ends."""
    interactive, typed = sys.stdin.isatty(), ""
    with _pending_input() if interactive else contextlib.nullcontext():
        while not chat.ended:
            try:
                text = _read_line(typed) if interactive else input()
            except EOFError:
                break
            except KeyboardInterrupt:
                typed = _typed_text()
                console.info("", "Ctrl-D or /quit ends the program")
                continue
            typed = ""
            try:
                if text.strip():
                    chat.line(text.strip())
            except TunekitError as error:
                console.warn(str(error))
    if interactive:
        console.info("")


def _read_line(typed: str) -> str:
    """Read a line from the terminal. The line starts with the text that was typed before Ctrl-C."""
    try:
        import readline  # gives input() line editing and a history
    except ImportError:
        return input("> ")
    readline.set_startup_hook(lambda: readline.insert_text(typed))
    try:
        return input("> ")
    finally:
        readline.set_startup_hook(None)


def _typed_text() -> str:
    """The text of the line that Ctrl-C interrupted."""
    try:
        import readline
    except ImportError:
        return ""
    return readline.get_line_buffer()


@contextlib.contextmanager
def _pending_input() -> Iterator[None]:
    """A context manager: in the block, Ctrl-C does not discard the text that was typed during an answer."""
    try:
        import termios

        before = termios.tcgetattr(sys.stdin)
    except (ImportError, termios.error):
        yield
        return
    flags = [*before[:3], before[3] | termios.NOFLSH, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, flags)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
