"""Secrets out of text that goes to disk: access tokens and passwords in addresses.

Comes in: any text.  Goes out: the same with `[secret]` in their place.  Next: run.py, report/.
"""

from __future__ import annotations

import re

TOKEN = re.compile(r"\b(hf_|sk-|ghp_|github_pat_)[A-Za-z0-9_\-]{8,}")
USER_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+@")


def redact(text: str) -> str:
    """`text` without tokens and without user:password in addresses."""
    return USER_IN_ADDRESS.sub("[secret]@", TOKEN.sub("[secret]", text))
