"""The families of models. Each file here that defines FAMILY is one; the others hold what families share."""

import re
from functools import cache
from importlib import import_module
from pathlib import Path

from tunekit.model.families.family import Family as Family
from tunekit.model.pretrained import text_config as text_config


@cache
def known_families() -> tuple[Family, ...]:
    """Every family, those of a higher precedence first."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    names = [file.stem for file in files if re.search(r"^FAMILY = ", file.read_text("utf-8"), re.MULTILINE)]
    return tuple(sorted(map(make_family, names), key=lambda family: -family.precedence))


def make_family(name: str) -> Family:
    """The family of this name, which is the name of its file."""
    return import_module(f"tunekit.model.families.{name}").FAMILY
