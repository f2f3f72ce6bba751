"""Recipe -> YAML text, every key written, for the run folder. Texts that YAML readers could take for something else are
quoted."""

import json
import re
from pathlib import Path
from typing import Any

from tunekit.recipe.reading.paths import named_paths, relative_path
from tunekit.recipe.reading.yaml_reader import read_scalar
from tunekit.recipe.recipe import Recipe

_BARE = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
_TAKEN_FOR_BOOLEAN = {"y", "n", "yes", "no", "on", "off"}  # by readers of YAML 1.1
_ESCAPED = re.compile("[\x7f-\xa0\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")


def dump_recipe(recipe: Recipe, relative_to: Path, *, written_only: bool = False) -> str:
    """The recipe as YAML, without its defaults where `written_only`; absolute paths are written relative to the folder
    the new file will stand in."""
    values = recipe.model_dump(mode="json", exclude_unset=written_only)
    for path in named_paths(values):
        path.holder[path.key[-1]] = relative_path(path.text, relative_to)
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
