"""How much is said: notes and progress, as usual; nothing but results, warnings and errors; or more."""

import os

LOUDNESS = "TUNEKIT_OUTPUT"  # quiet, verbose, or anything else


def is_quiet() -> bool:
    """Only results, warnings and errors."""
    return os.environ.get(LOUDNESS) == "quiet"


def is_verbose() -> bool:
    """Also the seconds of each part, and what the libraries log."""
    return os.environ.get(LOUDNESS) == "verbose"
