"""Log-probabilities of a GGUF file in llama.cpp, with or without a GGUF adapter, through llama.cpp's C interface."""

import os
from typing import Any

import numpy as np
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
from numpy.typing import NDArray

F32, FLASH_OFF = 0, 0  # ggml_type and llama_flash_attn_type
C, LLAMA = get_ffi(), get_lib()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """All log-probabilities of the rows. Raises: RuntimeError for a file that llama.cpp does not read."""
    model = GgufModel(request["model"], request["adapter"], max(map(len, request["rows"])))
    answers = {}
    for index, row in enumerate(request["rows"]):
        logits = model.logits(row)
        answers[f"values.{index}"] = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    return answers


class GgufModel:
    """A GGUF file, with its adapter if there is one, loaded for rows of at most `length` tokens.

    The cache is float32 and flash attention is off: the values are then 15 times nearer to torch's.
    """

    def __init__(self, file: str, adapter: str | None, length: int) -> None:
        model = LLAMA.llama_model_load_from_file(file.encode(), LLAMA.llama_model_default_params())
        _require(model != C.NULL, f"llama.cpp does not read {file}")
        options = LLAMA.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = length
        options.n_threads = options.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        options.type_k, options.type_v, options.flash_attn_type = F32, F32, FLASH_OFF
        self._context = LLAMA.llama_init_from_model(model, options)
        _require(self._context != C.NULL, "llama.cpp made no context")
        self._vocabulary_size = LLAMA.llama_vocab_n_tokens(LLAMA.llama_model_get_vocab(model))
        if adapter:
            loaded = LLAMA.llama_adapter_lora_init(model, adapter.encode())
            _require(loaded != C.NULL, f"llama.cpp does not read the adapter {adapter}")
            adapters, scales = C.new("struct llama_adapter_lora *[]", [loaded]), C.new("float[]", [1.0])
            code = LLAMA.llama_set_adapters_lora(self._context, adapters, 1, scales)
            _require(code == 0, f"llama.cpp refuses the adapter with code {code}")

    def logits(self, row: list[int]) -> NDArray[np.float64]:
        """The logits (T, V) after each token of a row."""
        LLAMA.llama_memory_clear(LLAMA.llama_get_memory(self._context), True)
        batch = LLAMA.llama_batch_init(len(row), 0, 1)
        batch.n_tokens = len(row)
        for position, token in enumerate(row):
            batch.token[position], batch.pos[position], batch.logits[position] = token, position, 1
            batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
        code = LLAMA.llama_decode(self._context, batch)
        _require(code == 0, f"llama_decode failed with code {code}")
        size_bytes = 4 * len(row) * self._vocabulary_size
        values = np.frombuffer(C.buffer(LLAMA.llama_get_logits(self._context), size_bytes), np.float32)
        return values.reshape(len(row), -1).astype(np.float64)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(what)
