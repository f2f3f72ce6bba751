"""Reads all settings of a GGUF file. transformers itself reads only some of the settings, and uses its defaults for the
others."""

import math

from transformers import PreTrainedConfig

from tunekit.model.storage.gguf_facts import GgufFacts
from tunekit.model.storage.gguf_positions import read_positions, read_scaling
from tunekit.model.storage.llama_cpp import FIXED, GROUPS

# llama.cpp's name -> the names of transformers' configurations, of which a configuration has one
ATTRIBUTES = {
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    "context_length": ("max_position_embeddings",),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_kv_heads", "num_key_value_heads"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "ssm.inner_size": ("intermediate_size",),
}
HEADS = ("attention.key_length", "attention.value_length")
PATTERN = "attention.sliding_window_pattern"
# settings of the file that change no result, or that are read from its tensors
UNUSED = ("tensor_data_layout", "use_parallel_residual", PATTERN, *HEADS)
OPTIONAL = ("context_length", "vocab_size", "feed_forward_length", "attention.head_count_kv")  # some types have none
EXPERTS_UNREAD = ("gpt-oss", "gpt_oss")  # transformers' code for them fails, or leaves out the experts


def refuse_architecture(facts: GgufFacts) -> None:
    """Raise ModelError for a model type whose GGUF files transformers reads wrongly, although it claims to support this
    type."""
    if facts.architecture in EXPERTS_UNREAD:
        raise facts.refuse("the model is gpt-oss, whose experts transformers does not read from a GGUF file")


def read_settings(facts: GgufFacts, config: PreTrainedConfig) -> None:
    """Write every setting of the file into the configuration that transformers made from the file.

    Raises: ModelError with the name of a setting that transformers' model does not have.
    Source: load_hparams of the models of llama.cpp.
    """
    if facts.architecture in _completely_read():
        read_scaling(facts, config)
        return
    for name, value in facts.settings.items():
        if name not in UNUSED and not name.startswith("rope."):
            _take(facts, config, name, value)
    if "token_embd.weight" in facts.tensors:  # the list of tokens may be longer
        config.vocab_size = int(facts.tensors["token_embd.weight"].shape[-1])
    _set_head_width(facts, config)
    _set_layers(facts, config)
    if config.model_type == "falcon":
        _set_falcon(facts, config)
    for name, expected in FIXED.get(config.model_type, {}).items():
        value = expected(config.to_dict())
        if getattr(config, name, None) not in (value, None):
            setattr(config, name, value)
    read_positions(facts, config)


def _completely_read() -> frozenset[str]:
    """Architectures whose settings transformers reads completely. Empty in older versions of transformers."""
    try:
        from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
    except ImportError:
        return frozenset()
    return frozenset(GGUF_CONFIG_ARCHS)


def _read_by_transformers(config: PreTrainedConfig) -> set[str]:
    """Names of the file's settings that transformers itself reads for this type of model."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    table = GGUF_CONFIG_MAPPING.get(config.model_type, {})
    return {name for name, attribute in table.items() if attribute is not None and hasattr(config, attribute)}


def _take(facts: GgufFacts, config: PreTrainedConfig, name: str, value: object) -> None:
    """Write one setting of the file into the configuration. A value of 0 or False means that the model lacks this
    component."""
    attribute = next((each for each in ATTRIBUTES.get(name, ()) if hasattr(config, each)), None)
    without_effect = bool(value) if name == "attention.causal" else not value
    if without_effect or (attribute is None and (name in OPTIONAL or name in _read_by_transformers(config))):
        return
    if attribute is None:
        raise facts.refuse(f"the file sets {facts.architecture}.{name}, which transformers does not read")
    if isinstance(value, list):
        if len(set(value)) > 1:
            raise facts.refuse(f"the layers in the file have different values of {facts.architecture}.{name}")
        value = value[0]
    if not _equal(getattr(config, attribute), value):
        setattr(config, attribute, value)


def _equal(one: object, other: object) -> bool:
    """Whether two values are equal. Floating-point numbers are compared in float32, the precision of the file."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _set_head_width(facts: GgufFacts, config: PreTrainedConfig) -> None:
    """Write the width of the attention heads into the configuration."""
    widths = {facts.settings[name] for name in HEADS if name in facts.settings}
    if not widths:
        return
    mean = getattr(config, "hidden_size", 0) // (getattr(config, "num_attention_heads", 0) or 1)
    if len(widths) > 1:
        raise facts.refuse(f"keys and values have different widths ({', '.join(map(str, sorted(map(str, widths))))})")
    width = widths.pop()
    if (getattr(config, "head_dim", None) or mean) != width:
        config.head_dim = width


def _set_layers(facts: GgufFacts, config: PreTrainedConfig) -> None:
    """Write into the configuration which layers have a sliding window: all layers except the last layer of each group,
    which has full attention."""
    if config.model_type not in GROUPS:
        if PATTERN in facts.settings:
            raise facts.refuse(f"the file sets {facts.architecture}.{PATTERN}, which transformers does not read")
        return
    stated, count = facts.settings.get(PATTERN, GROUPS[config.model_type]), config.num_hidden_layers
    slides = stated if isinstance(stated, list) else [(layer + 1) % int(str(stated)) != 0 for layer in range(count)]
    config.layer_types = ["sliding_attention" if each else "full_attention" for each in slides]


def _set_falcon(facts: GgufFacts, config: PreTrainedConfig) -> None:
    """Write the variant of Falcon's architecture into the configuration. The numbers of heads and norms show which it
    is."""
    norms = 2 if any(".attn_norm_2." in name for name in facts.tensors) else 1
    config.new_decoder_architecture = norms == 2 or config.num_kv_heads > 1
    config.num_ln_in_parallel_attn = norms if config.new_decoder_architecture else None
    config.multi_query = True
