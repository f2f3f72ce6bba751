"""The families of models. Each file in this folder that defines FAMILY is one family; the other files are shared
code."""

import re
from functools import cache
from importlib import import_module
from pathlib import Path

from tunekit.model.families.family import Family as Family
from tunekit.model.pretrained import text_config as text_config


@cache
def known_families() -> tuple[Family, ...]:
    """All families, sorted by descending precedence."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    names = [file.stem for file in files if re.search(r"^FAMILY = ", file.read_text("utf-8"), re.MULTILINE)]
    return tuple(sorted(map(make_family, names), key=lambda family: -family.precedence))


def make_family(name: str) -> Family:
    """The family with this name, which is the name of its file."""
    return import_module(f"tunekit.model.families.{name}").FAMILY
