"""Model types that are refused as causal language models before any weight is read, each with its reason.

The table of all types (scripts/results/models.md) shows for every other type that it is trained as transformers
computes it.
"""

HALF = "it is an encoder, or a part of an encoder-decoder, which does not continue text by itself"
OTHER_TASK = "it does not continue a text by text alone"
NEEDS_IMAGES = "its code computes nothing for rows without an image"
ALONE = "its code computes another result for a row in a batch than for the row alone"
RANDOM = "its routers draw experts at random while it trains, so no other program computes the same losses"
GROUPED = "its layers o_a_proj multiply their inputs in groups, so an adapter of a linear layer does not fit them"
HEAD = "its class computes logits from hidden states in a way that tunekit does not know"
PEFT = "peft loads an adapter of this type incompletely"
CACHE = "its code samples other tokens with a cache than without"
NO_LIST = "its layers are in no single list"
BROKEN = "transformers 5.24 could not load or call a tiny model of this type"
UNTESTED = "no tiny model of this type could be tested: its code needs timm or scipy"
REASONS = {
    HALF: (
        "bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text electra"
        " ernie marian mbart megatron-bert mvp pegasus plbart prophetnet rembert roberta roberta-prelayernorm roc_bert"
        " roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xmod"
    ),
    OTHER_TASK: (
        "diffusion_gemma gemma4_assistant gemma4_unified_assistant musicgen musicgen_melody pi0 pi05 shieldgemma2"
    ),
    NEEDS_IMAGES: "blip blip-2 git idefics instructblip instructblipvideo kosmos-2 kosmos-2.5",
    ALONE: "cpmant dory",
    RANDOM: "phimoe",
    GROUPED: "deepseek_v4",
    HEAD: "inkling_text",
    PEFT: ("deepseek_ocr2 inkling2 inkling2_loop inkling2_loop_text inkling2_text laguna mistral_large4 unlimited_ocr"),
    CACHE: "minimax",
    NO_LIST: "blt hrm_text longcat_flash",
    BROKEN: "ernie4_5_vl_moe nemotron_h_omni xlnet",
    UNTESTED: "fast_vlm inkling_mm_model muse_spark perception_lm",
}
REASON_OF = {name: reason for reason, names in REASONS.items() for name in names.split()}
