"""Runs vLLM on a model folder, with or without an adapter folder of peft's."""

from pathlib import Path

from tunekit.adapters.folder.config import adapter_header, tensors_path
from tunekit.exports.programs.answer import IdRows, NextTokens, ask_script
from tunekit.exports.programs.program import Program

NAME = "vllm"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that its option max_lora_rank allows
ENVIRONMENT = {  # in this process, on a CPU, in little memory, without the network
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def max_lora_rank(rank: int) -> int:
    """The smallest allowed value of --max-lora-rank for an adapter of this rank; the rank itself if vLLM allows no
    such value."""
    return next((allowed for allowed in RANKS if allowed >= rank), rank)


def answers(
    program: Program, model: Path, rows: IdRows, adapter: Path | None = None, rank: int = 1
) -> list[NextTokens]:
    """The 20 largest log-probabilities at each position (20 is vLLM's limit), computed in float32. `rank`: the
    adapter's largest rank.

    Raises: InputError with vLLM's log if it refuses a folder.
    """
    keys = () if adapter is None else adapter_header(tensors_path(adapter))
    options = {"max_lora_rank": max_lora_rank(rank), "experts": any(".experts." in key for key in keys)}
    return ask_script(program, NAME, model, rows, adapter, options=options, environment=ENVIRONMENT)
