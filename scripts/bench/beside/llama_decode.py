"""CPU seconds of greedy decoding in llama.cpp, by its C interface. Runs with the Python of `scripts/certify llama.cpp`.

llama_decode.py FILE.gguf ROWS PROMPT_TOKENS NEW_TOKENS REPEATS      prints the fewest seconds
"""

import sys
import time

import numpy as np
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

C, LLAMA = get_ffi(), get_lib()


def decode(context, vocabulary: int, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The next `count` tokens of each prompt: all rows in one batch, as llama.cpp's batched example does."""
    LLAMA.llama_memory_clear(LLAMA.llama_get_memory(context), True)
    answers, ends = [[] for _ in prompts], [len(prompt) for prompt in prompts]
    batch = LLAMA.llama_batch_init(sum(ends), 0, 1)
    wanted = [(row, place, token) for row, prompt in enumerate(prompts) for place, token in enumerate(prompt)]
    for _ in range(count):
        batch.n_tokens = len(wanted)
        for index, (row, place, token) in enumerate(wanted):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, place, 1
            batch.seq_id[index][0], batch.logits[index] = row, int(place >= ends[row] - 1)
        code = LLAMA.llama_decode(context, batch)
        if code:
            raise RuntimeError(f"llama_decode failed with code {code}")
        logits = np.frombuffer(C.buffer(LLAMA.llama_get_logits(context), 4 * len(prompts) * vocabulary), np.float32)
        chosen = logits.reshape(len(prompts), vocabulary).argmax(-1).tolist()
        wanted = [(row, ends[row] + len(answers[row]), token) for row, token in enumerate(chosen)]
        for row, token in enumerate(chosen):
            answers[row].append(token)
    LLAMA.llama_batch_free(batch)
    return answers


def main() -> None:
    file, (rows, prompt_tokens, count, repeats) = sys.argv[1], map(int, sys.argv[2:])
    model = LLAMA.llama_model_load_from_file(file.encode(), LLAMA.llama_model_default_params())
    options = LLAMA.llama_context_default_params()
    options.n_ctx = (prompt_tokens + count + 8) * rows
    options.n_batch = options.n_ubatch = max(prompt_tokens * rows, 32)
    options.n_seq_max, options.kv_unified = rows, True
    options.n_threads = options.n_threads_batch = 1
    context = LLAMA.llama_init_from_model(model, options)
    vocabulary = LLAMA.llama_vocab_n_tokens(LLAMA.llama_model_get_vocab(model))
    prompts = np.random.default_rng(0).integers(10, 1000, (rows, prompt_tokens)).tolist()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        decode(context, vocabulary, prompts, count)
        times.append(time.process_time() - began)
    print(min(times))


if __name__ == "__main__":
    main()
