"""Full-size models by name, as their published config.json has them, and the rows of scripts/bench/run gpu."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

GIB = 2**30


def _llama(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": 8}
    rest = {"vocab_size": 128256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    ids = {"bos_token_id": 128000, "eos_token_id": 128001, "max_position_embeddings": 131072}
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **shape, **heads_of, **rest, **ids, **more}


def _t5(kind: str, width: int, inner: int, heads: int, vocabulary: int) -> dict[str, Any]:
    architecture = {"t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration"}[kind]
    shape = {"d_model": width, "d_ff": inner, "d_kv": 64, "num_heads": heads, "num_layers": 24}
    rest = {"num_decoder_layers": 24, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    rest |= {"dropout_rate": 0.0}  # 0.1 as published; off, so that all tools compute the same
    ids = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return {"model_type": kind, "architectures": [architecture], **shape, **rest, **ids}


MODELS: dict[str, dict[str, Any]] = {
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, head_dim=128, tie_word_embeddings=True),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32),
    "qwen2.5-32b": _llama(5120, 27648, 64, 40, vocab_size=152064, rope_theta=1e6, rms_norm_eps=1e-6)
    | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151645},
    "llama-70b": _llama(8192, 28672, 80, 64),
    "bloomz-7b1": {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM"],
        "hidden_size": 4096,
        "n_layer": 30,
        "n_head": 32,
        "vocab_size": 250880,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    },
    "t0-3b": _t5("t5", 2048, 5120, 32, 32128),
    "mt0-xxl": _t5("mt5", 4096, 10240, 64, 250112),
    # The doubles of the rest for a machine without a GPU: seconds on a CPU.
    "tiny": _llama(64, 128, 3, 4, num_key_value_heads=2, vocab_size=512, bos_token_id=0, eos_token_id=1),
    "tiny-t5": _t5("t5", 64, 128, 4, 512) | {"d_kv": 16, "num_layers": 2, "num_decoder_layers": 2},
}


@dataclass(frozen=True)
class Row:
    """One measured run. `tool`: tunekit or peft; `checkpointing`: auto, every, or how many layers are recomputed.

    `rows` x `length` tokens are one micro-batch (`documents`: packed from rows of real lengths; of an encoder-decoder
    half of each row is its source), `micro_batches` one step, of which `pass_size` go through a streamed layer
    together. `cap_bytes`: the memory that the process may use, to stand for a smaller card. `rival`: peft's row, which
    is measured in the same call.
    """

    name: str
    goal: str
    model: str
    tool: str = "tunekit"
    quantization: str = "none"
    engine: str = "resident"  # resident, host, disk
    streamed_head: bool = False  # its output projection too
    rows: int = 1
    length: int = 4096
    micro_batches: int = 1
    pass_size: int = 1000
    documents: bool = False
    r: int = 16
    targets: str = "all-linear"
    checkpointing: str | int = "auto"
    kernels: str = "none"
    tile_tokens: int | None = None  # of MLPs
    steps: int = 8
    cap_bytes: int | None = None
    rival: str | None = None

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.rows * self.length * self.micro_batches

    @property
    def reads_source(self) -> bool:
        """Whether the model has an encoder, which reads a part of each row."""
        return "num_decoder_layers" in MODELS[self.model]

    @property
    def source_tokens(self) -> int:
        """The number of tokens in a row that the encoder reads."""
        return self.length // 2 if self.reads_source else 0

    @property
    def passes(self) -> int:
        """How often a step runs through all streamed layers."""
        return -(-self.micro_batches // self.pass_size)


SEED = {"length": 512, "r": 8, "targets": "all-linear"}  # of the seed table; its own settings are not published
STREAMED = {"engine": "host", "micro_batches": 8, "rows": 1, "checkpointing": "every"}
FULL_8B = {"model": "llama-3.1-8b", "rows": 3}  # as many as need no recomputation on 80 GB
SMALL_8B = {"model": "llama-3.1-8b", "rows": 2, "length": 2048, "checkpointing": "every"}
SMALL_32B = {"model": "qwen2.5-32b", "rows": 2, "micro_batches": 2, "steps": 5}
PUBLISHED_3B = {"model": "llama-3.2-3b", "rows": 4, "length": 768, "r": 32, "targets": "q_proj,v_proj"}  # peft's
LONG_8B = {"model": "llama-3.1-8b", "checkpointing": "every", "tile_tokens": 2**15}
NF4 = {"quantization": "nf4"}
PEFT = {"tool": "peft"}


def _seed_table(name: str, model: str, *heads: str) -> list[Row]:
    """The rows of one model in the seed table: streamed, in 4 bits, and peft's. `heads`: the rows with a streamed head.
    They have as few micro-batches as possible, because the head is copied for each micro-batch."""
    common, rival = {"model": model, **SEED}, f"{name}-peft"
    streamed = STREAMED | ({"rows": 8, "micro_batches": 1, "streamed_head": True} if "streamed" in heads else {})
    return [
        Row(f"{name}-streamed", "G1", **common, **streamed, rival=rival),
        Row(rival, "G1", **common, rows=8, **PEFT),
        Row(f"{name}-nf4", "G2", **common, **NF4, rows=8, rival=rival),
        Row(f"{name}-nf4-recomputed", "G2", **common, **NF4, rows=8, checkpointing="every",
            streamed_head="recomputed" in heads, rival=rival),
    ]  # fmt: skip


# What says most comes first, since a card's time may end before the list does.
ROWS: list[Row] = [
    Row("8b-bf16", "G3", **FULL_8B, rival="8b-bf16-peft"),
    Row("8b-bf16-peft", "G3", **FULL_8B, **PEFT),
    *_seed_table("t0-3b", "t0-3b"),
    *_seed_table("bloomz", "bloomz-7b1", "recomputed"),
    *_seed_table("mt0-xxl", "mt0-xxl", "streamed"),
    Row("3b-qv", "G10", **PUBLISHED_3B, checkpointing=0, rival="3b-qv-peft"),
    Row("3b-qv-recomputed", "G10", **PUBLISHED_3B, checkpointing="every", rival="3b-qv-peft"),
    Row("3b-qv-peft", "G10", **PUBLISHED_3B, **PEFT),
    Row("8b-nf4", "G4", **FULL_8B, **NF4, rival="8b-nf4-peft"),
    Row("8b-nf4-peft", "G4", **FULL_8B, **NF4, **PEFT),
    Row("8b-nf4-small", "G4", **SMALL_8B, **NF4, rival="8b-nf4-small-peft"),
    Row("8b-nf4-small-head", "G4", **SMALL_8B, **NF4, streamed_head=True, tile_tokens=2048, rival="8b-nf4-small-peft"),
    Row("8b-nf4-small-peft", "G4", **SMALL_8B, **NF4, **PEFT),
    Row("8b-nf4-streamed", "G4", model="llama-3.1-8b", **NF4, **STREAMED),
    Row("8b-nf4-resident", "G4", model="llama-3.1-8b", **NF4, **(STREAMED | {"engine": "resident"})),
    Row("8b-nf4-small-streamed", "G4", **(SMALL_8B | {"rows": 1}), **NF4, micro_batches=2, engine="host",
        streamed_head=True),
    Row("70b-nf4-streamed", "G5", model="llama-70b", **NF4, **(STREAMED | {"micro_batches": 16}), length=2048, steps=4,
        streamed_head=True),
    Row("8b-nf4-128k", "G7", **LONG_8B, **NF4, length=2**17, steps=2),
    Row("8b-nf4-256k", "G7", **LONG_8B, **NF4, length=2**18, steps=1),
    Row("8b-bf16-packed", "G3", **FULL_8B, documents=True),
    Row("8b-bf16-liger", "G3", **FULL_8B, kernels="liger"),
    Row("8b-fp8", "G3", **FULL_8B, quantization="fp8"),
    Row("8b-nf4-24gb", "G4", **FULL_8B, **NF4, cap_bytes=24 * GIB),
    Row("70b-nf4", "G5", model="llama-70b", **NF4, micro_batches=8, steps=4),
    Row("70b-nf4-peft", "G5", model="llama-70b", **NF4, micro_batches=8, steps=4, **PEFT),
    Row("32b-nf4", "G5", **SMALL_32B, **NF4, rival="32b-nf4-peft"),
    Row("32b-nf4-peft", "G5", **SMALL_32B, **NF4, **PEFT),
]  # fmt: skip


def rehearsed(row: Row) -> Row:
    """The row at a size that a simulated device computes in seconds."""
    return replace(
        row,
        rows=min(row.rows, 2),
        length=min(row.length, 64),
        micro_batches=min(row.micro_batches, 2),
        r=min(row.r, 4),
        steps=min(row.steps, 3),
        tile_tokens=row.tile_tokens and 16,
        cap_bytes=row.cap_bytes and 2**30,
    )


def shrink_models() -> None:
    """Give every model three layers of 64 numbers, and a vocabulary of 512."""
    for name, config in MODELS.items():
        small: dict[str, Any] = {"vocab_size": 512}
        if config["model_type"] == "bloom":
            small |= {"hidden_size": 64, "n_layer": 3, "n_head": 4}
        elif "num_decoder_layers" in config:
            small |= {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 3}
        else:
            small |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
            small |= {"num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 0, "eos_token_id": 1}
        MODELS[name] = config | small


DOUBLES: list[Row] = [
    Row("tiny-bf16", "double", model="tiny", rows=2, length=64, steps=4),
    Row("tiny-packed", "double", model="tiny", rows=2, length=256, documents=True, steps=4),
    Row("tiny-nf4", "double", model="tiny", rows=2, length=64, steps=4, **NF4),
    Row("tiny-streamed", "double", model="tiny", length=64, steps=4, engine="host", micro_batches=2,
        checkpointing="every"),
    Row("tiny-t5", "double", model="tiny-t5", rows=2, length=64, steps=4),
    Row("tiny-t5-streamed", "double", model="tiny-t5", length=64, steps=4, engine="host", micro_batches=2,
        checkpointing="every"),
    Row("tiny-t5-peft", "double", model="tiny-t5", rows=2, length=64, steps=4, **PEFT),
    Row("tiny-peft", "double", model="tiny", rows=2, length=64, steps=4, **PEFT),
    Row("tiny-nf4-peft", "double", model="tiny", rows=2, length=64, steps=4, **NF4, **PEFT),
]  # fmt: skip
