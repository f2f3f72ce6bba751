"""llama.cpp's token ids of texts, with the vocabulary in a GGUF file."""

from typing import Any

import numpy as np
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

C, LLAMA = get_ffi(), get_lib()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The ids of each text. Special tokens in a text are recognised. Raises: RuntimeError for a file that llama.cpp
    refuses."""
    options = LLAMA.llama_model_default_params()
    options.vocab_only = True
    model = LLAMA.llama_model_load_from_file(request["model"].encode(), options)
    if model == C.NULL:
        raise RuntimeError(f"llama.cpp does not read {request['model']}")
    vocabulary, answers = LLAMA.llama_model_get_vocab(model), {}
    for index, text in enumerate(request["texts"]):
        data = text.encode()
        size = len(data) + 8  # no text has more tokens than bytes, and few are put around it
        ids = C.new("int32_t[]", size)
        count = LLAMA.llama_tokenize(vocabulary, data, len(data), ids, size, True, True)
        answers[f"tokens.{index}"] = np.array(list(ids[0 : max(count, 0)]), dtype=np.int64)
    return answers
