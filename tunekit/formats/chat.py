"""`format: chat`: OpenAI messages, `{"messages": [{"role": ..., "content": ...}], "tools": [...]}`.

Content is text, or parts of text, images and reasoning; it may be null only in a message with tool_calls. Reasoning at
the start of an answer is its field `thinking`. The `weight` of an assistant message multiplies the loss of its tokens.
With weight 0 or `train: false`, the message is only context.
"""

from collections.abc import Mapping, Sequence

from tunekit.basics import JsonObject
from tunekit.errors import DataError
from tunekit.formats.example import IMAGE, ROLES, THINKING_TAGS, ChatExample, Example, Message
from tunekit.formats.fields import Fields, check_text, listed, named_nearly, read_json, read_value, read_weight
from tunekit.formats.media import Media
from tunekit.formats.message_images import COLUMNS, KINDS, read_image_part, with_images

DESCRIPTION = (
    "messages: a list of {role, content}, as in OpenAI's API; tools: optional tool definitions; images: optional"
)
FIELDS = ("messages", "tools", "sample_weight", *COLUMNS)
REQUIRED = ("messages",)
EXAMPLE = "text"
CALL = '{"function": {"name": ..., "arguments": {...}}}'

CALLS = ("tool_calls", "function_call")
WEIGHTS = ("weight", "train")  # fields of a message: its weight in the loss, or whether it is trained on


def make_example(row: Fields) -> Example:
    """The conversation of a row."""
    messages = read_messages(read_value(row, "messages"), "messages")
    return ChatExample(with_images(messages, row), read_tools(row.get("tools"), messages))


def read_messages(value: object, label: str) -> tuple[Message, ...]:
    """A list of messages."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"'{label}' must be a list of messages, not {type(value).__name__}", "write [{...}, ...]")
    if not value:
        raise DataError(f"'{label}' is empty", "write at least a user and an assistant message, or leave the row out")
    return tuple(_read_message(message, f"{label}[{index}]") for index, message in enumerate(value))


def _read_message(value: object, label: str) -> Message:
    if not isinstance(value, Mapping):
        what = f"'{label}' must be an object with role and content, not {type(value).__name__}"
        raise DataError(what, 'write {"role": "user", "content": "..."}')
    role = _read_role(value, label)
    extra: JsonObject = {}
    older = value.get("function_call")  # the form of OpenAI's API before tool_calls
    calls = value.get("tool_calls") or ([older] if older else None)
    if calls:
        if role != "assistant":
            raise DataError(
                f"'{label}' has tool_calls, but its role is {role!r}",
                "only messages of the assistant can have tool_calls",
            )
        extra["tool_calls"] = read_tool_calls(calls, f"{label}.tool_calls")
    for name, part in value.items():
        if part not in (None, "", [], {}) and name not in ("role", "content", *CALLS, *WEIGHTS):
            extra[name] = check_text(part, f"{label}.{name}") if isinstance(part, str) else read_json(part, label)
    content, images = _read_content(value, label, bool(calls))
    if role == "assistant" and (opening := THINKING_TAGS.match(content)) and isinstance(value["content"], list):
        extra["thinking"], content = opening[1], content[opening.end() :]
    return Message(role, content, _read_weight(value, label, role), extra, images)


def _read_role(value: Fields, label: str) -> str:
    if "role" not in value:
        how = "rows with 'from' and 'value' are format: sharegpt" if "from" in value else "add one"
        raise DataError(f"'{label}' has no role; it has {listed(value)}", how)
    role = value["role"]
    if role not in ROLES:
        how = f"{named_nearly(role, ROLES)}known roles: {', '.join(ROLES)}"
        raise DataError(f"'{label}' has the unknown role {str(role)[:40]!r}", how)
    return str(role)


def _read_content(value: Fields, label: str, calls_tools: bool) -> tuple[str, tuple[Media | None, ...] | None]:
    """The text, in which IMAGE stands for each image, and the images; None if no part is an image."""
    content = value.get("content")
    if content is None:
        if calls_tools:
            return "", None
        state = "null" if "content" in value else "missing"
        raise DataError(f"'{label}.content' is {state}", "write text; null is allowed only with tool_calls")
    if not isinstance(content, list):
        return check_text(content, f"{label}.content"), None
    parts = [_read_part(part, f"{label}.content[{index}]") for index, part in enumerate(content)]
    images = tuple(image for text, image in parts if text == IMAGE)
    return "".join(text for text, _ in parts), images or None


def _read_part(part: object, label: str) -> tuple[str, Media | None]:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if isinstance(part, Mapping) and kind in KINDS:
        return IMAGE, read_image_part(part, label)
    if not isinstance(part, Mapping) or kind not in ("text", "thinking"):
        how = 'write {"type": "text", "text": ...} or {"type": "image", "image": FILE}'
        raise DataError(f"'{label}' is a {kind!r} part", how)
    text = part.get(kind)
    if kind == "text":
        return check_text(text, f"{label}.text"), None
    if isinstance(text, list):  # Mistral's API has text parts in it
        parts = [_read_part(inner, f"{label}.thinking[{index}]")[0] for index, inner in enumerate(text)]
        if IMAGE in parts:
            raise DataError(f"'{label}.thinking' has an image", "put images beside the reasoning, not in it")
        text = "".join(parts)
    return f"[THINK]{check_text(text, f'{label}.thinking')}[/THINK]", None


def _read_weight(value: Fields, label: str, role: str) -> float:
    """The weight of a message in the loss. Raises: DataError if the weight is invalid, or if the message is not the
    assistant's."""
    fields = [name for name in WEIGHTS if value.get(name) is not None]
    if len(fields) > 1:
        raise DataError(f"'{label}' has both weight and train", "keep one")
    weight = 1.0
    if fields == ["train"]:
        if not isinstance(value["train"], bool):
            what = f"'{label}.train' must be true or false, not {value['train']!r}"
            raise DataError(what, "true trains on the message, false does not")
        weight = float(value["train"])
    elif fields:
        weight = read_weight(value["weight"], f"{label}.weight")
    if role != "assistant" and (weight not in (0.0, 1.0) or value.get("train")):
        what = f"'{label}' has {fields[0]}: {str(value[fields[0]]).lower()}, but its role is {role!r}"
        raise DataError(what, "remove this field; only the assistant's messages are trained on")
    return weight


def read_tool_calls(value: object, label: str) -> list[JsonObject]:
    """Reads tool calls. Their arguments become objects, because chat templates print them with `tojson`."""
    calls = read_json(value, label)
    if not isinstance(calls, list):
        raise DataError(f"'{label}' must be a list, not {type(calls).__name__}", f"write [{CALL}]")
    return [_read_tool_call(call, f"{label}[{index}]") for index, call in enumerate(calls)]


def _read_tool_call(call: object, label: str) -> JsonObject:
    if isinstance(call, Mapping) and "function" not in call and "name" in call:
        call = {"type": "function", "function": call}
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"'{label}' has no function with a name", f"write {CALL}")
    arguments = function.get("arguments")
    parsed = {} if arguments is None or arguments == "" else read_json(arguments, f"{label}.function.arguments")
    present = {key: part for key, part in call.items() if part is not None}
    return {**present, "function": {"name": function["name"], "arguments": parsed}}


def read_tools(value: object, messages: Sequence[Message] = ()) -> tuple[JsonObject, ...] | None:
    """The tools of a row: a list of JSON schemas, or JSON text of the list or of its items. None if the system message
    lists them already in <tools> tags, as in Hermes' data sets."""
    listed_already = any(message.role == "system" and "<tools>" in message.content for message in messages)
    if value is None or value == [] or value == "" or listed_already:
        return None
    tools = read_json(value, "tools")
    tools = [read_json(tool, "tools") for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError("'tools' must be a list of objects", "write JSON schemas as in OpenAI's API, or remove `tools`")
    return tuple(dict(tool) for tool in tools) or None
