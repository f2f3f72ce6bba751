"""Verbosity of the output: quiet, normal or verbose."""

import os

LOUDNESS = "TUNEKIT_OUTPUT"  # quiet, verbose, or anything else


def is_quiet() -> bool:
    """Whether only results, warnings and errors are printed."""
    return os.environ.get(LOUDNESS) == "quiet"


def is_verbose() -> bool:
    """Whether the seconds of each phase and the libraries' logs are printed too."""
    return os.environ.get(LOUDNESS) == "verbose"
