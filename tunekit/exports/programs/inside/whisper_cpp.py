"""Log-probabilities of a GGML file in whisper.cpp, through whisper.cpp's C interface."""

import ctypes
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
MODULE = find_spec("_pywhispercpp")
assert MODULE is not None
assert MODULE.origin is not None
NAMES = ("libwhisper.so", "libwhisper.dylib")  # next to the module
LIBRARY = next(path for name in NAMES if (path := Path(MODULE.origin).with_name(name)).exists())
WHISPER = ctypes.CDLL(str(LIBRARY))


class ContextOptions(ctypes.Structure):
    """whisper.h's whisper_context_params: the device, flash attention, and how the times of words are computed."""

    _fields_ = (
        ("use_gpu", ctypes.c_bool),
        ("flash_attention", ctypes.c_bool),
        ("gpu_device", ctypes.c_int),
        ("token_timestamps", ctypes.c_bool),
        ("alignment", ctypes.c_int),
        ("alignment_layers", ctypes.c_int),
        ("alignment_heads", ctypes.c_size_t * 2),
        ("alignment_bytes", ctypes.c_size_t),
    )


WHISPER.whisper_init_from_file_with_params.argtypes = (ctypes.c_char_p, ContextOptions)
WHISPER.whisper_init_from_file_with_params.restype = ctypes.c_void_p
WHISPER.whisper_get_logits.restype = ctypes.POINTER(ctypes.c_float)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """All log-probabilities of the rows. Raises: RuntimeError for a file that whisper.cpp does not read."""
    pointer = WHISPER.whisper_init_from_file_with_params(request["model"].encode(), ContextOptions())
    if not pointer:
        raise RuntimeError(f"whisper.cpp does not read {request['model']}")
    context = ctypes.c_void_p(pointer)
    size = WHISPER.whisper_n_vocab(context)
    answers = {}
    for index, row in enumerate(request["rows"]):
        _hear(context, request[f"features.{index}"])
        prompt = request["prompts"][index]
        logits = np.stack([_next(context, token, at, size) for at, token in enumerate([*prompt, *row])])[len(prompt) :]
        answers[f"values.{index}"] = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    return answers


def _hear(context: ctypes.c_void_p, features: NDArray[np.float32]) -> None:
    """Encode a recording, given as log-mel features (bands, frames)."""
    features = np.ascontiguousarray(features, np.float32)
    bands, frames = features.shape
    values = features.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    _require(WHISPER.whisper_set_mel(context, values, frames, bands), "whisper_set_mel")
    _require(WHISPER.whisper_encode(context, 0, THREADS), "whisper_encode")


def _next(context: ctypes.c_void_p, token: int, at: int, size: int) -> NDArray[np.float64]:
    """The logits (V,) after one more token."""
    tokens = (ctypes.c_int32 * 1)(token)
    _require(WHISPER.whisper_decode(context, tokens, 1, at, THREADS), "whisper_decode")
    return np.ctypeslib.as_array(WHISPER.whisper_get_logits(context), (size,)).astype(np.float64)


def _require(code: int, function: str) -> None:
    if code:
        raise RuntimeError(f"{function} failed with code {code}")
