"""Run one script of this folder: `python -I run.py SCRIPT FOLDER`, by the Python of the program that the script uses.

The script's `answer(request)` gets the values of request.json and request.npz, and returns arrays, which are written to
answer.npz. The process ends when its standard input closes, so that nothing keeps running if tunekit is killed.
"""

import json
import os
import sys
import threading
from pathlib import Path
from runpy import run_path

import numpy as np


def main(script: str, folder: Path) -> None:
    """Run the script on the request in the folder, and write its answer."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answer = run_path(str(Path(__file__).with_name(f"{script}.py")))["answer"]
    with np.load(folder / "request.npz") as values:
        request = {**json.loads((folder / "request.json").read_text("utf-8")), **values}
    try:
        arrays = answer(request)
    except Exception as error:  # without the traceback, so that the end of the log is the program's own
        sys.exit(f"{type(error).__name__}: {error}")
    with (folder / "partial").open("wb") as file:
        halved = {name: values.astype(np.float32) for name, values in arrays.items() if values.dtype == np.float64}
        np.savez(file, **{**arrays, **halved})
    os.replace(folder / "partial", folder / "answer.npz")


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written: it returns when the pipe closes
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
