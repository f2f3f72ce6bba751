"""Marks of tests that run programs which read exports."""

from __future__ import annotations

import pytest

from tunekit.exports.programs.program import find_program


def needs(name: str) -> list[pytest.MarkDecorator]:
    """Slow, and skipped where the program is not installed."""
    absent = find_program(name) is None
    return [pytest.mark.slow, pytest.mark.skipif(absent, reason=f"install the program with: scripts/certify {name}")]
