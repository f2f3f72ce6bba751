"""Leaves the names of all loaded modules in $COMPARE_MODULES when the interpreter ends; found through PYTHONPATH."""

import atexit
import json
import os
import sys


def _write() -> None:
    with open(os.environ["COMPARE_MODULES"], "w", encoding="utf-8") as file:
        json.dump(sorted(sys.modules), file)


if "COMPARE_MODULES" in os.environ:
    atexit.register(_write)
