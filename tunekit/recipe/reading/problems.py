"""Turns pydantic's errors into messages, such as `recipe.yaml:7: training.epoch: unknown key; did you mean
'epochs'?`."""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tunekit.errors import Problem
from tunekit.recipe.data import Source
from tunekit.recipe.foreign.table import alias_target, meaning
from tunekit.recipe.reading.draft import Draft, KeyPath, dotted, has_item
from tunekit.recipe.reading.sections import fields_at, section_class
from tunekit.recipe.reading.suggest import did_you_mean, nearest, show
from tunekit.recipe.reading.yaml_reader import read_scalar
from tunekit.recipe.recipe import Recipe

_YES_NO = {**dict.fromkeys(("no", "off", "n"), "false"), **dict.fromkeys(("yes", "on", "y"), "true")}
_COMPARISONS = {
    "greater_than": ("must be greater than", "gt"),
    "greater_than_equal": ("must be at least", "ge"),
    "less_than": ("must be less than", "lt"),
    "less_than_equal": ("must be at most", "le"),
}
_KINDS = {
    "string_type": "must be text",
    "bool_type": "must be true or false",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "must be a mapping"),
    "tuple_type": "must be a list",
}
# keys and values that people write from habit -> what tunekit calls them
_MEANT_KEYS = {
    "lr": "learning_rate",
    "rank": "r",
    "batch_size": "micro_batch_size",
    "steps": "max_steps",
    "warmup": "warmup_ratio",
    "accumulation_steps": "gradient_accumulation_steps",
    "targets": "target_modules",
}
_REMOVED_KEYS = {  # keys of older versions, and why they were removed
    ("sweep", "joined"): "joined trials were slower than separate steps",
    ("training", "compile"): "it compiled almost nothing, because kernels replace norms first and layers with adapters "
    "were not compiled",
}
_MEANT_VALUES = {
    **dict.fromkeys(("int4", "4bit", "4", "bnb", "bnb_nf4", "qlora"), "nf4"),
    **dict.fromkeys(("8bit", "8", "llm.int8"), "int8"),
    "bf16": "bfloat16",
    **dict.fromkeys(("fp16", "half"), "float16"),
    **dict.fromkeys(("fp32", "float"), "float32"),
    **dict.fromkeys(("flash", "fa2", "flash_attention"), "flash_attention_2"),
    "adam": "adamw",
}


def problems_of(error: ValidationError, section: KeyPath, draft: Draft) -> list[Problem]:
    """All of pydantic's errors for one section, as problems of the recipe."""
    findings = error.errors(include_url=False)
    keys = [_written_key((*section, *finding["loc"]), draft, keep_last=False) for finding in findings]
    return [
        _problem(finding, section, draft)
        for finding, key in zip(findings, keys, strict=True)
        if not _is_echo(finding, section, draft) and not (finding["type"] == "literal_error" and _has_inner(key, keys))
    ]


def unknown_key(key: KeyPath, draft: Draft) -> Problem:
    """The problem of an unknown key, with the name that was probably meant. For a key that older versions had: why it
    was removed."""
    if key in _REMOVED_KEYS:
        return draft.problem(key, f"was removed: {_REMOVED_KEYS[key]}", "remove the key")
    name = str(key[-1])
    here = list(fields_at(key[:-1], draft))
    target = alias_target(name)
    elsewhere = _leaf_elsewhere(name, of_item=any(isinstance(part, int) for part in key))
    section, dot, inner_name = name.partition(".")
    meant = meaning(name, draft.get(key))
    if dot and section in Recipe.model_fields:
        how = f"write {section}: {{{inner_name}: ...}}"
    elif meant and not isinstance(meant[1], dict | list):
        how = f"write {dotted(meant[0])}: {show(meant[1])}"
    elif _MEANT_KEYS.get(name) in here:
        how = f"did you mean '{_MEANT_KEYS[name]}'?"
    elif target and target[:-1] == key[:-1] and target[-1] in here:
        how = f"did you mean '{target[-1]}'?"
    elif (other := target or elsewhere) and other != key and (target or not nearest(name, here)):
        how = f"did you mean '{dotted(other)}'?"
    else:
        how = did_you_mean(name, here, "the keys here are") if here else ""
    return draft.problem(key, "unknown key", how)


def _leaf_elsewhere(name: str, of_item: bool) -> KeyPath | None:
    """A key of exactly this name in any section; None if there is none. `of_item`: the written key is inside a list."""
    for section in Recipe.model_fields:
        owner = section_class(section, None)
        if owner and name in owner.model_fields:
            return (section, name)
    return ("data", "train", 0, name) if name in Source.model_fields and not of_item else None


def _is_echo(finding: ErrorDetails, section: KeyPath, draft: Draft) -> bool:
    """Whether an error only repeats another error: a list is too short because its items are wrong, or a key is missing
    because another tool's key could not be translated to it."""
    if finding["type"] == "missing":
        return (*section, *finding["loc"]) in draft.untranslated
    return finding["type"] == "too_short" and len(finding["input"]) > 0


def _has_inner(key: KeyPath, keys: Sequence[KeyPath]) -> bool:
    """Whether one of `keys` is inside `key`. Then the value of `key` is a mapping, and is not reported as a wrong
    word."""
    return any(len(other) > len(key) and other[: len(key)] == key for other in keys)


def _problem(finding: ErrorDetails, section: KeyPath, draft: Draft) -> Problem:
    kind, context, value = finding["type"], finding.get("ctx", {}), finding.get("input")
    key = _written_key((*section, *finding["loc"]), draft, keep_last=kind == "missing")
    if kind == "extra_forbidden":
        return unknown_key(key, draft)
    if kind == "missing":
        return missing_key(key, draft)
    if kind in ("too_short", "string_too_short"):
        return draft.problem(key, "must not be empty")
    of_section = not finding["loc"] or isinstance(finding["loc"][-1], int)  # the error is about a whole section
    if kind == "value_error" and of_section and isinstance(value, dict):  # the error's first word is the key
        name, _, rest = str(context["error"]).partition(" ")
        return draft.problem((*key, name), rest) if name in value else draft.problem(key, f"{name} {rest}")
    what, how = _words(kind, context, value, str(finding["msg"]))
    if isinstance(value, list | dict) and not what.startswith("must"):
        return draft.problem(key, what, how)  # the error is about an item, and not about the kind of value
    if len(key) == 2 or (len(key) == 3 and isinstance(key[2], int)):  # some keys have an example of their form
        owner = section_class(str(key[0]), draft.values.get(str(key[0])))
        how = getattr(owner, "required", {}).get(key[1], how)
    return draft.problem(key, f"{what}, not {show(value)}", how)


def _words(kind: str, context: dict[str, Any], value: object, message: str) -> tuple[str, str]:
    """The two parts of a message: what is wrong with a value, and how to mend it."""
    if kind in _COMPARISONS:
        words, bound = _COMPARISONS[kind]
        return f"{words} {context[bound]}", ""
    if kind == "literal_error":
        choices = str(context["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        meant = _MEANT_VALUES.get(str(value).lower())
        near = meant if meant in choices else nearest(value, choices) if isinstance(value, str) else None
        return f"must be {' or '.join(choices) if len(choices) < 3 else 'one of ' + ', '.join(choices)}", (
            f"did you mean '{near}'?" if near else ""
        )
    what = str(context["error"]) if kind == "value_error" else _KINDS.get(kind, message)
    return what, _mend(what, value)


def _mend(what: str, value: object) -> str:
    """Advice on how to write the value that was probably meant; empty if no value is likely."""
    if value is None:
        return "write a value or remove the key"
    if "must be text" in what:
        return "put it in quotes" if isinstance(value, bool | int | float) else ""
    if "true" in what and isinstance(value, str):
        meant = _YES_NO.get(value.lower())
        return f"write {meant}" if meant else ""
    if "number" in what and isinstance(value, str):
        parts = value.split(",")
        if len(parts) > 1 and not all(part.isdigit() and len(part) == 3 for part in parts[1:]):  # not 1,000
            return "write one value, or compare several with tunekit sweep"
        bare = value.replace("_", "").replace(",", "")
        return f"write {bare} without quotes" if isinstance(read_scalar(bare), int | float) else ""
    if "list" in what and isinstance(value, str):
        return f"write [{value}]"
    return ""


def _written_key(loc: tuple[str | int, ...], draft: Draft, *, keep_last: bool) -> KeyPath:
    """The recipe's key for pydantic's error location, without the names of union members that pydantic adds."""
    value = draft.values
    key: list[str | int] = []
    for position, part in enumerate(loc):
        if has_item(value, part):
            value = value[part]
        elif not (keep_last and position == len(loc) - 1):
            continue
        key.append(part)
    return tuple(key)


SECTION_EXAMPLES = {  # of the sections that a recipe must have
    "model": "model: NAME",
    "data": "data: {train: rows.jsonl}",
    "output": "output: {dir: runs/first}",
}


def missing_key(key: KeyPath, draft: Draft) -> Problem:
    """The problem of a required key that is missing, with an example of it."""
    examples = SECTION_EXAMPLES | {
        "name_or_path": "a local folder or a hub id",
        "path": "a file or a hub data set",
        "train": "train: rows.jsonl",
        "dir": "dir: runs/first",
        "teacher": "teacher: NAME",
    }
    name = str(key[-1])
    return draft.problem(key, "is required", f"write {examples.get(name, name)}")
