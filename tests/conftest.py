"""Fixtures that many test files share. Real files are found through two environment variables, else skipped.

The quick tier runs N cells of a matrix that is marked `sampled(N)`, and one in DRAWN of the longer tests, marked
`drawn`. A seed that follows from the commit draws them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = "TUNEKIT_TEST_SEED"
DRAWN = 16
pytest_plugins = ["tests.parity.table"]  # gathers the parity table from every process and prints it


def pytest_configure() -> None:
    """The seed of the drawn cells, for the processes of pytest-xdist too."""
    if SEED not in os.environ:
        os.environ[SEED] = "0"
        with contextlib.suppress(OSError, ValueError):  # no git, or no commit
            commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True).stdout
            os.environ[SEED] = str(int(commit[:8], 16))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Modules and test items live until the end: the garbage collector need not read them again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the cells and the longer tests that are not drawn to the slow tier."""
    pools: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            pools.setdefault(item.nodeid.partition("[")[0], []).append(item)
        elif item.get_closest_marker("drawn") and not item.get_closest_marker("slow"):
            pools.setdefault("drawn", []).append(item)
    for name, pool in pools.items():
        mark = pool[0].get_closest_marker("sampled")
        count = mark.args[0] if mark else -(-len(pool) // DRAWN)
        drawn = random.Random(f"{os.environ[SEED]} {name}").sample(range(len(pool)), min(count, len(pool)))
        for number, item in enumerate(sorted(pool, key=lambda item: item.nodeid)):
            if number not in drawn:
                item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the seed."""
    terminalreporter.write_line(f"cells of large matrices and longer tests drawn with {SEED}={os.environ[SEED]}")


@pytest.fixture(scope="session", autouse=True)
def heard_hangups() -> None:
    """What a test starts would ignore a hang-up or Ctrl-C where these tests run under nohup or in the background."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """fsync refuses what is no open file, and returns: no test loses power. Tests of durability count its calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: os.fstat(number) and None)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of a test is kept in the user's cache."""
    os.environ["TUNEKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared real data and small models (TUNEKIT_SHARED)."""
    folder = Path(os.environ.get("TUNEKIT_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"shared files are absent ({folder}); set TUNEKIT_SHARED")
    return folder


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """stories260k: a real llama of 260,000 parameters with a 512-token vocabulary."""
    return shared / "models" / "stories260k"


def find_smollm2(repository: Path, named: str | None) -> Path | None:
    """SmolLM2-135M-Instruct as a folder or a GGUF file: the one named, else one in .cache (scripts/fetch_model)."""
    cache = repository / ".cache"
    places = [Path(named)] if named else [cache / "smollm2", cache / "smollm2-gguf" / SMOLLM2_FILE]
    fitting = [place for place in places if place.is_file() or (place / "config.json").is_file()]
    return fitting[0] if fitting else None


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, as a folder or a GGUF file."""
    named = os.environ.get("TUNEKIT_SMOLLM2")
    found = find_smollm2(REPOSITORY, named)
    if found is None:
        pytest.skip(f"SmolLM2-135M-Instruct is absent ({named or '.cache'}): run scripts/fetch_model")
    return found


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_llama(folder: Path, *, layers: int = 2, hidden: int = 64, seed: int = 0) -> Path:
    """A random llama with a byte-level tokenizer of 262 tokens and a ChatML template; weights depend only on seed."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: index for index, token in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    native = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    native.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary) + 5,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=2,
        )
    )
    model.save_pretrained(folder)
    native.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer llama folder with a chat tokenizer."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))
