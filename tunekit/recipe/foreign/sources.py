"""Translates the training and evaluation sources of Axolotl and TRL (`datasets`, `test_datasets`) to sources of the
recipe. A key of a source without an exact translation is a problem of its own: the source keeps its other keys."""

from typing import Any

from tunekit.recipe.foreign.become import complain, record
from tunekit.recipe.foreign.values import DATA_ENDINGS, NotExact, exactly, mapping_of
from tunekit.recipe.reading.draft import Draft, KeyPath, Place, dotted
from tunekit.recipe.reading.suggest import show

_TYPES = {"alpaca": "alpaca_prompt", "sharegpt": "sharegpt", "chat_template": "chat", "completion": "text"}
_TYPES |= dict.fromkeys(("chat_template.default", "chatml.ultra"), "preference")  # Axolotl's
_TYPES |= dict.fromkeys(("chatml.intel", "chatml.argilla", "chatml.argilla_chat"), "auto")  # pairs, or KTO
_KEYS = (
    *("path", "type", "ds_type", "split", "field", "field_messages", "field_chosen", "field_rejected", "revision"),
    *("message_field_role", "message_field_content", "message_property_mappings", "roles"),
)
_USUAL = {  # values of keys that change nothing, because tunekit always does this
    "trust_remote_code": exactly(False, how="tunekit never runs the code of a data set; convert it to JSONL"),
    "roles_to_train": exactly(["assistant"], ["gpt"], ["assistant", "gpt"], how="write data.train_on: all, if all are"),
    "train_on_eos": exactly("turn", how="the end token of every trained turn is trained"),
    "train_on_eot": exactly("turn", how="the end token of every trained turn is trained"),
    "name": exactly("default", how="write the source under data.train"),
}
_SPEAKERS = {"chat": ("role", "content"), "sharegpt": ("from", "value")}  # the keys of a message in both formats
_ROLES = {"user": ("user", "human"), "assistant": ("assistant", "gpt"), "system": ("system",), "tool": ("tool",)}


def translate_sources(draft: Draft) -> None:
    """Replace every source of `datasets` and `test_datasets` by a source of the recipe, in place."""
    for key in ("datasets", "test_datasets"):
        items = draft.get((key,))
        for index, item in enumerate(items) if isinstance(items, list) else ():
            if isinstance(item, dict):
                place, places = draft.place((key, index)), dict[KeyPath, Place]()
                for name in item:
                    places[key, index, name] = draft.place((key, index, name))
                draft.set((key, index), _Source(draft, (key, index), item, places).translate(), place)


class _Source:
    """One source of Axolotl: its values, and the places of its keys."""

    def __init__(self, draft: Draft, key: KeyPath, item: dict[Any, Any], places: dict[KeyPath, Place]) -> None:
        self.draft, self.key, self.item, self.places = draft, key, item, places

    def translate(self) -> dict[str, Any]:
        """The source of the recipe. Every key that is lost becomes a problem."""
        item, source = self.item, dict[str, Any]()
        for name in [name for name in item if name not in _KEYS and item[name] not in (None, False)]:
            self._settle(name, item[name])
        source |= {name: item[name] for name in ("path", "split", "revision") if item.get(name) is not None}
        ending = item.get("ds_type")
        endings = DATA_ENDINGS if ending == "json" else (f".{ending}",)
        if ending is not None and not str(item.get("path")).endswith(endings):
            self._lose("ds_type", f"{ending}, but the file name has a different ending", "rename the file")
        if (kind := item.get("type")) is not None:
            if isinstance(kind, str) and kind in _TYPES:
                source["format"] = _TYPES[kind]
            else:
                self._lose("type", f"{show(kind)} has no exact translation", f"known: {', '.join(_TYPES)}")
        try:
            _read_messages(item, source)
        except NotExact as lost:
            names = ("message_property_mappings", "message_field_role", "message_field_content", "roles")
            self._lose(next(name for name in names if item.get(name)), lost.what, lost.how)
        return {**source, **({"columns": columns} if (columns := _columns(item, source)) else {})}

    def _settle(self, name: str, value: object) -> None:
        if name not in _USUAL:
            return self._lose(name, "is a key of another tool and would be lost", "write the source under data.train")
        try:
            _USUAL[name](value)
        except NotExact as lost:
            return self._lose(name, lost.what, lost.how)
        place = self.places[*self.key, name]
        return record(self.draft, place, dotted((*self.key, name)), "nothing (tunekit always does this)")

    def _lose(self, name: str, what: str, how: str) -> None:
        complain(self.draft, self.places[*self.key, name], dotted((*self.key, name)), what, how)


def _columns(item: dict[Any, Any], source: dict[str, Any]) -> dict[str, str]:
    """Which columns of the file are which fields of the source's format."""
    messages = {"preference": "conversations", "sharegpt": "conversations"}.get(source.get("format", ""), "messages")
    if item.get("type") == "chat_template":  # Axolotl's default, also for messages with from and value
        item = {"field_messages": "messages", **item}
    fields = {"field": "text", "field_messages": messages, "field_chosen": "chosen", "field_rejected": "rejected"}
    return {str(item[key]): field for key, field in fields.items() if item.get(key) not in (None, field)}


def _read_messages(item: dict[str, Any], source: dict[str, Any]) -> None:
    """Check Axolotl's keys and roles of messages, and set the source's format. Raises: NotExact."""
    mapped = mapping_of(item, "message_property_mappings")
    keys = tuple(item.get(f"message_field_{name}") or mapped.get(name, name) for name in ("role", "content"))
    if keys not in _SPEAKERS.values() or set(mapped) - {"role", "content"}:
        raise NotExact(f"no format reads messages with {' and '.join(map(str, keys))}", "rename their keys")
    if source.get("format") == "chat" and keys == _SPEAKERS["sharegpt"]:
        source["format"] = "sharegpt"
    for role, names in mapping_of(item, "roles").items():
        listed = names if isinstance(names, list) else [] if names is None else [names]
        others = [name for name in listed if name not in _ROLES.get(role, ())]
        if others:
            raise NotExact(f"the role {show(others[0])} for {role} has no translation", "rename it in the rows")
