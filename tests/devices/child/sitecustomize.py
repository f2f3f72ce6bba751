"""Gives a Python process that a test starts the simulated device too."""

import os

if "TUNEKIT_SIMULATED_FAULTS" in os.environ:
    from tests.devices import simulated

    simulated.prepare()
