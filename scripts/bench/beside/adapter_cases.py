"""The kinds of adapter folders in the table of adapters.py: peft's configuration on a tiny base, and its releases."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
ATTENTION = ["q_proj", "v_proj"]
LATEST = (99, 0)


@dataclass(frozen=True)
class Kind:
    """A kind of adapter. `since`, `until`: the first and the last release of peft that has it. `injected`: whether
    transformers' add_adapter accepts it too. `resize`: rows that are first added to the vocabulary. `spread`: the
    standard deviation of the noise in trained values. `pickle`: saved as pickle, which is the default of peft 0.6."""

    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    base: str = "llama"
    since: tuple[int, int] = (0, 6)
    until: tuple[int, int] = LATEST
    injected: bool = False
    resize: int = 0
    spread: float = 0.1
    pickle: bool = False


def lora(since: tuple[int, int] = (0, 6), base: str = "llama", **fields: Any) -> Kind:
    """LoRA of rank 4 on a decoder's attention; `fields` change its configuration."""
    options = {name: fields.pop(name) for name in ("resize", "injected", "until", "spread", "pickle") if name in fields}
    values = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, **CAUSAL, **fields}
    return Kind("LoraConfig", values, base, since, **options)


def prompts(config: str, since: tuple[int, int] = (0, 6), base: str = "llama", **fields: Any) -> Kind:
    """Three virtual tokens."""
    return Kind(config, {"num_virtual_tokens": 3, **CAUSAL, **fields}, base, since, spread=0.3)


def layers(config: str, since: tuple[int, int], **fields: Any) -> Kind:
    """A method on a decoder's attention."""
    options = {name: fields.pop(name) for name in ("injected", "until", "spread", "base") if name in fields}
    return Kind(config, {"target_modules": ATTENTION, **CAUSAL, **fields}, since=since, **options)


SEQUENCES = {"task_type": "SEQ_2_SEQ_LM"}
CROSSED = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.0.self_attn.q_proj": 40}}
LORAS: dict[str, Kind] = {
    "lora": lora(injected=True),
    "a pickle": lora(until=(0, 6), pickle=True),
    "rslora": lora((0, 8), use_rslora=True, injected=True),
    "dora": lora((0, 9), use_dora=True, injected=True),
    "bias: all": lora(base="gpt2", target_modules=["c_attn"], fan_in_fan_out=True, bias="all"),
    "bias: lora_only": lora(base="gpt2", target_modules=["c_attn"], fan_in_fan_out=True, bias="lora_only"),
    "gpt2's Conv1D": lora(base="gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "dora on Conv1D": lora((0, 9), base="gpt2", target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True),
    "rank and alpha patterns": lora(rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 9}, injected=True),
    "patterns of two keys": lora(**CROSSED),
    "a pattern with alternatives": lora(alpha_pattern={"q_proj|v_proj": 40}),
    "a full name as a pattern": lora(alpha_pattern={"model.layers.1.self_attn.q_proj": 40}),
    "embeddings": lora(target_modules=["q_proj", "embed_tokens"], injected=True),
    "embeddings, tied": lora(base="tied", target_modules=["q_proj", "embed_tokens"]),
    "dora on embeddings": lora((0, 9), target_modules=["q_proj", "embed_tokens"], use_dora=True),
    "head": lora(target_modules=["q_proj", "lm_head"]),
    "head, tied": lora(base="tied", target_modules=["q_proj", "lm_head"]),
    "modules_to_save": lora(modules_to_save=["lm_head"], injected=True),
    "modules_to_save, tied": lora(base="tied", modules_to_save=["embed_tokens"]),
    "some layers": lora(layers_to_transform=[1], layers_pattern="layers"),
    "an expression": lora(target_modules=r".*\.(q|up)_proj"),
    "exclude_modules": lora((0, 14), exclude_modules=["layers.0.self_attn.q_proj"]),
    "all-linear": lora((0, 8), target_modules="all-linear"),
    "resized vocabulary": lora(resize=4),
    "resized vocabulary, tied": lora(base="tied", resize=4),
    "resized vocabulary, adapted": lora(target_modules=["q_proj", "embed_tokens", "lm_head"], resize=4),
    "resized vocabulary, copied": lora(modules_to_save=["embed_tokens", "lm_head"], resize=4),
    "lora_bias": lora((0, 14), lora_bias=True),
    "lora_bias where the base has biases": lora(
        (0, 14), base="bert", target_modules=["query"], lora_bias=True, task_type="SEQ_CLS"
    ),
    "layer_replication": lora((0, 10), layer_replication=[[0, 2], [1, 2]]),
    "aLoRA": lora((0, 18), alora_invocation_tokens=[5, 6]),
    "ensure_weight_tying": lora((0, 18), base="tied", modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "ensure_weight_tying, adapted": lora(
        (0, 18), base="tied", target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True
    ),
    "trained tokens": lora((0, 15), trainable_token_indices=[3, 5]),
    "trained tokens of named modules": lora((0, 15), trainable_token_indices={"embed_tokens": [3, 5]}),
    "trained tokens, tied": lora((0, 15), base="tied", trainable_token_indices=[3, 5]),
    "fused experts": lora((0, 18), base="mixtral", target_parameters=["mlp.experts.down_proj"]),
    "PiSSA": lora((0, 10), init_lora_weights="pissa"),
    "OLoRA": lora((0, 11), init_lora_weights="olora"),
    "orthogonal": lora((0, 18), init_lora_weights="orthogonal"),
    "BD-LoRA": lora((0, 19), use_bdlora={"nblocks": 2, "target_modules_bd_a": ["q_proj", "v_proj"]}),
    "T5": lora(base="t5", target_modules=["q", "v", "wo"], **SEQUENCES),
    "a classifier's head": lora(base="bert", target_modules=["query", "value"], task_type="SEQ_CLS"),
    "a decoder's head of labels": lora(base="scores", task_type="SEQ_CLS"),
    "convolution": lora(
        base="vit", target_modules=["projection", "query"], task_type=None, modules_to_save=["classifier"]
    ),
    "dora on a convolution": lora(
        (0, 11),
        base="vit",
        target_modules=["projection"],
        task_type=None,
        use_dora=True,
        modules_to_save=["classifier"],
    ),
    "vision": lora(base="vit", target_modules=r".*\.(query|q_proj)", task_type=None, modules_to_save=["classifier"]),
}
OTHERS: dict[str, Kind] = {
    "IA3": layers(
        "IA3Config", (0, 6), target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], injected=True
    ),
    "IA3 on T5": layers(
        "IA3Config", (0, 6), base="t5", target_modules=["k", "wo"], feedforward_modules=["wo"], **SEQUENCES
    ),
    "AdaLoRA": layers("AdaLoraConfig", (0, 6), init_r=4, target_r=2, lora_alpha=6, total_step=100, tinit=10, tfinal=10),
    "LoHa": layers("LoHaConfig", (0, 6), r=4, alpha=6, injected=True),
    "LoHa patterns": layers("LoHaConfig", (0, 6), r=4, alpha=6, **CROSSED),
    "LoKr": layers("LoKrConfig", (0, 6), r=2, alpha=6, injected=True),
    "LoKr decomposed": layers("LoKrConfig", (0, 6), r=2, alpha=6, decompose_both=True, decompose_factor=4),
    "LoKr of a convolution": layers(
        "LoKrConfig", (0, 6), base="vit", target_modules=["projection"], r=2, alpha=6, task_type=None
    ),
    "OFT of blocks": layers("OFTConfig", (0, 7), r=4, oft_block_size=0),
    "OFT": layers("OFTConfig", (0, 16), oft_block_size=8),
    "OFT, constrained": layers("OFTConfig", (0, 16), oft_block_size=8, coft=True),
    "BOFT": layers("BOFTConfig", (0, 11), boft_block_size=4),
    "BOFT of two factors": layers("BOFTConfig", (0, 11), boft_block_size=4, boft_n_butterfly_factor=2),
    "LN tuning": layers("LNTuningConfig", (0, 11), target_modules=["input_layernorm", "norm"], injected=True),
    "VeRA": layers("VeraConfig", (0, 11), r=8, target_modules=["q_proj", "o_proj"]),
    "VeRA without projections": layers(
        "VeraConfig", (0, 11), r=8, target_modules=["q_proj", "o_proj"], save_projection=False
    ),
    "FourierFT": layers("FourierFTConfig", (0, 12), n_frequency=50),
    "FourierFT patterns": layers("FourierFTConfig", (0, 12), n_frequency=50, n_frequency_pattern={"q_proj|v_proj": 20}),
    "HRA": layers("HRAConfig", (0, 13), r=4),
    "HRA, orthogonalised": layers("HRAConfig", (0, 13), r=4, apply_GS=True),
    "VB-LoRA": layers("VBLoRAConfig", (0, 12), r=4, num_vectors=16, vector_length=16, topk=2),
    "Bone": layers("BoneConfig", (0, 14), until=(0, 18), r=4),
    "Bone, bat": layers("BoneConfig", (0, 14), until=(0, 18), r=4, init_weights="bat"),
    "RandLoRA": layers("RandLoraConfig", (0, 16), r=4),
    "trained tokens alone": Kind("TrainableTokensConfig", {"token_indices": [3, 5], **CAUSAL}, since=(0, 15)),
    "CPT": prompts(
        "CPTConfig",
        (0, 14),
        num_virtual_tokens=4,
        cpt_token_ids=[5, 6, 7, 8],
        cpt_mask=[1, 1, 1, 1],
        cpt_tokens_type_mask=[1, 2, 3, 4],
    ),
    "MiSS": layers("MissConfig", (0, 17), r=4),
    "C3A": layers("C3AConfig", (0, 16), block_size=8),
    "SHiRA": layers("ShiraConfig", (0, 17), r=4),
    "RoAd": layers("RoadConfig", (0, 18), group_size=8),
    "GraLoRA": layers("GraloraConfig", (0, 19), r=4, gralora_k=2),
    "DeLoRA": layers("DeloraConfig", (0, 19), r=4),
    "HiRA": layers("HiraConfig", (0, 20), r=4),
    "WaveFT": layers("WaveFTConfig", (0, 18), n_frequency=50),
    "PSOFT": layers("PsoftConfig", (0, 20), r=4),
    "TinyLoRA": layers("TinyLoraConfig", (0, 20)),
    "BEFT": layers("BeftConfig", (0, 20), base="bert", target_modules=["value"], task_type="SEQ_CLS"),
    "prompt tuning": prompts("PromptTuningConfig"),
    "prompt tuning of T5": prompts("PromptTuningConfig", base="t5", **SEQUENCES),
    "prefix tuning": prompts("PrefixTuningConfig"),
    "prefix tuning with a projection": prompts("PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=16),
    "P-tuning": prompts("PromptEncoderConfig", encoder_hidden_size=16),
    "P-tuning with an LSTM": prompts(
        "PromptEncoderConfig", encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
    ),
    "prompts of tasks": prompts("MultitaskPromptTuningConfig", num_tasks=2),
    "LLaMA-Adapter": Kind("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2, **CAUSAL}, spread=0.3),
}
KINDS = {**LORAS, **OTHERS}
