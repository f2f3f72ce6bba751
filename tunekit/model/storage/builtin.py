"""Built-in models that need no download. The folder of a model such as `builtin:tiny-llama` is made at the first use.

The weights are random, so a built-in model can only test whether a recipe runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunekit.files.cache_folder import default_cache_folder
from tunekit.files.durable import atomic_folder
from tunekit.model.transformers_guard import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PREFIX = "builtin:"  # hub names cannot contain a colon
TINY_LLAMA = f"{PREFIX}tiny-llama"
LAYOUT = "v1"  # part of the folder's name: change it, here and in cache_folder.py, if anything below changes
SEED = 0
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model_folder(name: str) -> Path | None:
    """The folder of the built-in model with this name, written now if it does not exist; None for any other name."""
    if name != TINY_LLAMA:
        return None
    folder = default_cache_folder() / "models" / f"{name.removeprefix(PREFIX)}-{LAYOUT}"
    if not (folder / "config.json").exists():
        with atomic_folder(folder) as work:
            write_tiny_llama(work)
            work.chmod(0o755)  # other users of a shared cache read it too
    return folder


def write_tiny_llama(folder: Path) -> None:
    """Write a seeded random llama with two layers and a byte-level tokenizer. The caller's random state does not
    change."""
    from transformers import LlamaConfig, LlamaForCausalLM

    native = _byte_tokenizer()
    configuration = LlamaConfig(
        vocab_size=len(native),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=native.bos_token_id,
        eos_token_id=native.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(SEED)
        net = LlamaForCausalLM(configuration)
    with quiet():
        net.save_pretrained(folder)
        native.save_pretrained(folder)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and three special tokens, which can encode every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*SPECIAL_TOKENS, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    bos, start, eos = SPECIAL_TOKENS
    native = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, additional_special_tokens=[start]
    )
    native.chat_template = CHAT_TEMPLATE
    return native
