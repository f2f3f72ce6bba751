"""Translates a chat template from Jinja to Go's text/template, which Ollama uses. The translation is derived from the
Jinja template's output.

A Jinja template is a program, but most chat templates only put fixed texts around each message. These texts are found
by rendering conversations with known contents. The result is used only if it reproduces further conversations exactly.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tunekit.errors import DataError
from tunekit.records import JsonObject

Render = Callable[[Sequence[JsonObject], bool], str]  # messages, and whether an answer shall follow
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class TurnTexts:
    """The fixed texts of a chat template. `before` and `after`: the texts around a message, by role. `opening`: the
    text before a conversation without a system message. `answer`: the text after the last message, where the model's
    answer begins. If `before` lacks the role "system", the template does not write system messages separately.
    `trims`: whether the template changes spaces around a message's content."""

    before: dict[str, str]
    after: dict[str, str]
    opening: str
    answer: str
    trims: bool = False

    def render(self, messages: Sequence[JsonObject], answer: bool) -> str:
        """The text of a conversation."""
        text = "" if messages[0]["role"] == "system" else self.opening
        for message in messages:
            role = message["role"]
            text += f"{self.before[role]}{message['content']}{self.after[role]}"
        return text + (self.answer if answer else "")

    def as_go(self) -> str:
        """The template for Ollama's TEMPLATE, which has .Messages with .Role and .Content."""
        opening = _literal(self.opening)
        turns = [f'{{{{ if and (eq $i 0) (ne .Role "system") }}}}{opening}{{{{ end }}}}'] if opening else []
        for role in self.before:
            content = f"{_literal(self.before[role])}{{{{ .Content }}}}{_literal(self.after[role])}"
            turns.append(f'{{{{ if eq .Role "{role}" }}}}{content}{{{{ end }}}}')
        is_last = 'and (eq (len (slice $.Messages $i)) 1) (ne .Role "assistant")'
        turns.append(f"{{{{ if {is_last} }}}}{_literal(self.answer)}{{{{ end }}}}")
        return f"{{{{ range $i, $_ := .Messages }}}}{''.join(turns)}{{{{ end }}}}"


def _literal(text: str) -> str:
    """An action of a Go template that writes the text: Go neither interprets nor trims its characters."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def derive_turns(render: Render) -> TurnTexts | None:
    """The fixed texts of a chat template; None if it writes more than fixed texts around each message."""
    user, answer, more = (
        {"role": role, "content": f"content-{role}-{number}"}
        for number, role in enumerate(("user", "assistant", "user"))
    )
    system = {"role": "system", "content": "content-system"}
    try:
        opening, user_end = _around(render([user], False), user)
        _, start_of_answer = _around(render([user], True), user)
        _, dialogue = _around(render([user, answer, more], False), user)
        to_answer, dialogue = _around(dialogue, answer)
        to_user, _ = _around(dialogue, more)
        _, answer_end = _around(render([user, answer], False), answer)
        turns = TurnTexts(
            before={"user": _without(answer_end, to_user), "assistant": _without(user_end, to_answer)},
            after={"user": user_end, "assistant": answer_end},
            opening="",
            answer=_without(user_end, start_of_answer),
        )
        turns = replace(turns, opening=_without_end(turns.before["user"], opening))
    except (ValueError, DataError):
        return None
    turns = _with_system(turns, render, system, user)
    conversations = [[user], [user, answer, more], [user, answer, more, answer, user]]
    if "system" in turns.before:
        conversations += [[system, *each] for each in conversations]

    def same(messages: Sequence[JsonObject], ending: bool) -> bool:
        return turns.render(messages, ending) == render(messages, ending)

    try:
        if not all(same(each, ending) for each in conversations for ending in (False, True)):
            return None
        spaced = [{**message, "content": f" {message['content']} "} for message in conversations[-1]]
        return replace(turns, trims=not same(spaced, True))
    except DataError:
        return None


def _with_system(turns: TurnTexts, render: Render, system: JsonObject, user: JsonObject) -> TurnTexts:
    """Add the texts around a system message to `turns`, if the template writes such a message separately."""
    try:
        before, rest = _around(render([system, user], False), system)
        between, _ = _around(rest, user)
        after = _without_end(turns.before["user"], between)
    except (ValueError, DataError):
        return turns
    return replace(turns, before={"system": before, **turns.before}, after={"system": after, **turns.after})


def _around(text: str, message: JsonObject) -> tuple[str, str]:
    """The texts before and after the message's content. Raises: ValueError unless `text` has it exactly once."""
    before, after = text.split(message["content"])
    return before, after


def _without(start: str, text: str) -> str:
    """The text after its beginning `start`. Raises: ValueError unless the text begins with it."""
    if not text.startswith(start):
        raise ValueError(start)
    return text[len(start) :]


def _without_end(end: str, text: str) -> str:
    """The text before its ending `end`. Raises: ValueError unless the text ends with it."""
    if not text.endswith(end):
        raise ValueError(end)
    return text[: len(text) - len(end)]
