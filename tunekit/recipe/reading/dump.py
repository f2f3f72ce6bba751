"""Recipe -> YAML text, every key written, for the run folder.

Comes in: a Recipe (absolute paths) and the folder of the new file.  Goes out: text that load.py reads back to an equal
Recipe.  Strings that any YAML reader could take for something else are quoted.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tunekit.recipe.reading.paths import ALWAYS_LOCAL, MODELS, REWARD_PATHS, relative_path
from tunekit.recipe.reading.yaml_reader import read_scalar
from tunekit.recipe.recipe import Recipe

_BARE = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
_TAKEN_FOR_BOOLEAN = {"y", "n", "yes", "no", "on", "off"}  # by readers of YAML 1.1
_ESCAPED = re.compile("[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]")


def dump_recipe(recipe: Recipe, relative_to: Path, *, written_only: bool = False) -> str:
    """The recipe as YAML, without its defaults where `written_only`; absolute paths are written relative to the folder
    the new file will stand in."""
    values = recipe.model_dump(mode="json", exclude_unset=written_only)
    for *sections, name in (*ALWAYS_LOCAL, *MODELS):
        holder: dict[str, Any] = values
        for section in sections:
            holder = holder.get(section) or {}
        if holder.get(name) is not None:
            holder[name] = relative_path(holder[name], relative_to)
    for sources in (values["data"]["train"], values["data"].get("eval")):
        for source in sources if isinstance(sources, list) else ():
            source["path"] = relative_path(source["path"], relative_to)
    for reward in values.get("objective", {}).get("reward") or ():
        for name in (name for name in REWARD_PATHS if reward.get(name) is not None):
            reward[name] = relative_path(reward[name], relative_to)
    return "\n".join(yaml_lines(values)) + "\n"


def yaml_scalar(value: object) -> str:
    """One scalar as YAML text that reads back as itself."""
    if isinstance(value, str):
        bare = (
            _BARE.fullmatch(value) and value.lower() not in _TAKEN_FOR_BOOLEAN and isinstance(read_scalar(value), str)
        )
        quoted = json.dumps(value, ensure_ascii=False)
        return value if bare else _ESCAPED.sub(lambda found: f"\\u{ord(found.group()):04x}", quoted)
    if isinstance(value, float):
        mantissa, _, exponent = repr(value).partition("e")
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}" if exponent else mantissa
    return json.dumps(value)


def yaml_lines(values: dict[str, Any], indent: str = "") -> list[str]:
    """Plain values as lines of YAML."""
    lines: list[str] = []
    for name, value in values.items():
        start = f"{indent}{yaml_scalar(name)}:"
        if isinstance(value, dict) and value:
            lines += [start, *yaml_lines(value, f"{indent}  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(start)
            for item in value:
                first, *rest = yaml_lines(item, f"{indent}    ")
                lines += [f"{indent}  - {first.strip()}", *rest]
        elif isinstance(value, list):
            lines.append(f"{start} [{', '.join(yaml_scalar(item) for item in value)}]")
        else:
            lines.append(f"{start} {{}}" if value == {} else f"{start} {yaml_scalar(value)}")
    return lines
