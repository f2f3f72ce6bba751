"""`tunekit chat` is a conversation in the terminal: lines that begin with / are commands, all others are questions."""

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tunekit.console import Console, visible
from tunekit.console.text import Flow
from tunekit.contracts import Sampling
from tunekit.errors import DataError, InputError, TunekitError
from tunekit.files.durable import write_text
from tunekit.formats.example import Message
from tunekit.machine.devices import make_devices
from tunekit.talking.conversation import BASE, Reply, Request, Speaker, make_speaker
from tunekit.targets.target import find_target, load_target

DEFAULT_NEW_TOKENS = 512
SETTINGS = {"temperature": float, "top_p": float, "top_k": int, "seed": int, "max_new_tokens": int}


@dataclass
class Chat:
    """A conversation and how its answers are made."""

    speaker: Speaker
    console: Console
    name: str  # who answers
    sampling: Sampling
    max_new_tokens: int
    history: Path | None = None
    messages: list[Message] = field(default_factory=list)
    ended: bool = False

    def line(self, text: str) -> None:
        """One line of the user. Raises: TunekitError, after which the conversation is as it was."""
        if not text.startswith("/"):
            self.ask(text)
            return
        word, _, rest = text[1:].partition(" ")
        if word not in COMMANDS:
            raise InputError(f"there is no command /{word}", f"there are: {', '.join('/' + name for name in COMMANDS)}")
        getattr(self, word)(rest.strip())

    def ask(self, text: str) -> None:
        """The user's turn, and the answer to it."""
        self.messages.append(Message("user", text))
        try:
            reply = self._answer(self.messages, self.name)
        except BaseException:
            self.messages.pop()  # asked again, it is no second turn
            raise
        self.messages.append(Message("assistant", reply.text))
        self._save()

    def _answer(self, messages: Sequence[Message], name: str) -> Reply:
        """The answer, written as it is made; Ctrl-C keeps what there is of it."""
        began, written = time.perf_counter(), ""
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
        seconds = time.perf_counter() - began
        self.console.write(flow.end() + "\n")
        if reply.reason == "length":
            self.console.info(f"[ended at {self.max_new_tokens} tokens; /set max_new_tokens N]")
        elif reply.reason == "interrupted":
            self.console.info("[stopped]")
        if reply.new_tokens:
            self.console.info(f"[{name}: {reply.new_tokens} tokens, {reply.new_tokens / seconds:.1f} a second]")
        return reply

    def _save(self) -> None:
        if self.history is not None:
            turns = [{"role": message.role, "content": message.content} for message in self.messages]
            write_text(self.history, json.dumps({"messages": turns}, ensure_ascii=False) + "\n")

    # The commands.
    def help(self, rest: str) -> None:
        """what can be written here"""
        for name, arguments in COMMANDS.items():
            self.console.info(f"/{f'{name} {arguments}'.strip():<28} {getattr(Chat, name).__doc__}")

    def base(self, rest: str) -> None:
        """the last question once more, answered by the base without an adapter; not kept"""
        asked = self.messages[:-1] if self.messages and self.messages[-1].role == "assistant" else self.messages
        if not asked or asked[-1].role != "user":
            raise InputError("nothing was asked yet", "ask something first")
        self._answer(asked, BASE)

    def adapter(self, rest: str) -> None:
        """who answers from now on; a folder is loaded as one more adapter; alone: who there is"""
        if rest and rest not in self.speaker.names:
            folder = Path(rest).expanduser()
            if not (folder / "adapter_config.json").exists() and (folder / "adapter").is_dir():
                folder /= "adapter"
            rest = folder.parent.name if folder.name == "adapter" else folder.name
            self.speaker.add(rest, folder.absolute())
        self.name = rest or self.name
        names = [f"{name} (answers)" if name == self.name else name for name in self.speaker.names]
        self.console.info(", ".join(names))

    def system(self, rest: str) -> None:
        """the system prompt from now on; alone: none"""
        others = [message for message in self.messages if message.role != "system"]
        self.messages[:] = [*([Message("system", rest)] if rest else []), *others]

    def set(self, rest: str) -> None:
        """a setting: temperature, top_p, top_k, seed, max_new_tokens; alone: all of them"""
        now = {**asdict(self.sampling), "max_new_tokens": self.max_new_tokens}
        if rest:
            name, _, value = rest.replace("=", " ").partition(" ")
            now[name] = _setting(name, value.strip())
            self.max_new_tokens = now.pop("max_new_tokens")
            self.sampling = Sampling(**now)
            return
        self.console.info(", ".join(f"{name} {value}" for name, value in now.items()))

    def undo(self, rest: str) -> None:
        """takes the last question and its answer back"""
        while self.messages and self.messages.pop().role != "user":
            pass
        self._save()

    def reset(self, rest: str) -> None:
        """begins a new conversation; the system prompt stays"""
        self.messages[:] = [message for message in self.messages if message.role == "system"]
        self._save()

    def save(self, rest: str) -> None:
        """writes the conversation there, now and after every turn, as a row of format chat"""
        if not rest:
            raise InputError("no file is named", "write /save FILE")
        self.history = Path(rest).expanduser()
        self._save()

    def quit(self, rest: str) -> None:
        """ends the program, as Ctrl-D does"""
        self.ended = True


COMMANDS = {  # methods of Chat, and what may follow their names
    "help": "",
    "base": "",
    "adapter": "[NAME | FOLDER]",
    "system": "[TEXT]",
    "set": "[SETTING VALUE]",
    "undo": "",
    "reset": "",
    "save": "FILE",
    "quit": "",
}


def _setting(name: str, value: str) -> float:
    kind = SETTINGS.get(name)
    if kind is None:
        raise InputError(f"there is no setting '{name}'", f"there are: {', '.join(SETTINGS)}")
    try:
        number: float = kind(value)
    except ValueError:
        raise InputError(f"'{value}' is no number for {name}", f"write /set {name} 1") from None
    allowed = {"top_p": 0 < number <= 1, "max_new_tokens": number >= 1}.get(name, number >= 0)
    if not allowed:
        raise InputError(f"{name} {value} is out of its range", "/set alone shows what is set")
    return number


def read_history(path: Path) -> list[Message]:
    """The conversation in a file that an earlier chat wrote; none where there is no file yet.

    Raises: DataError where the file holds something else.
    """
    if not path.exists():
        return []
    try:
        turns = json.loads(path.read_text("utf-8"))["messages"]
        return [Message(str(turn["role"]), str(turn["content"])) for turn in turns]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"holds no conversation ({error})", "name another file", file=str(path)) from error


def chat_verb(
    target: str,
    base: str | None,
    overrides: Sequence[str],
    adapters: Sequence[str],
    system: str | None,
    history: str | None,
    sampling: tuple[float, float, int, int],
    max_new_tokens: int | None,
) -> None:
    """Chat until the input ends. `sampling`: temperature, top_p, top_k, seed.

    Raises: TunekitError, whose exit code the command line returns.
    """
    console = Console()
    earlier = [] if history is None else read_history(Path(history))
    found = find_target(target, base, overrides)
    console.warn(*found.rewrites)
    console.info(f"loading {found.model.name_or_path} ...")
    devices = make_devices()
    try:
        speaker = make_speaker(load_target(found, devices.device))
        chat = Chat(speaker, console, speaker.default, Sampling(*sampling), max_new_tokens or DEFAULT_NEW_TOKENS)
        chat.history, chat.messages = None if history is None else Path(history), earlier
        for folder in adapters:
            chat.adapter(folder)
        chat.name = speaker.default
        if system is not None:
            chat.system(system)
        who = "the base" if chat.name == BASE else "the tuned model; /base asks the base"
        console.info(f"You talk to {who}. /help lists the commands; Ctrl-C ends an answer, Ctrl-D the program.")
        for message in chat.messages:
            console.info(f"{message.role}: {message.content}")
        _talk(chat, console)
    finally:
        devices.close()


def _talk(chat: Chat, console: Console) -> None:
    """Line by line, until the input ends."""
    asks = sys.stdin.isatty()
    if asks:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives the line its keys and its memory)
    while not chat.ended:
        try:
            text = input("> " if asks else "")
        except EOFError:
            break
        except KeyboardInterrupt:
            console.info("", "Ctrl-D or /quit ends the program")
            continue
        try:
            if text.strip():
                chat.line(text.strip())
        except TunekitError as error:
            console.warn(str(error))
    if asks:
        console.info("")
