"""Detects the tool that a configuration is for, and writes the tool's defaults for keys that the configuration lacks.

Sources of the defaults: TRL's SFTConfig, DPOConfig, RewardConfig and ModelConfig, transformers' TrainingArguments,
LLaMA-Factory's and Axolotl's argument classes, Unsloth's Config, the builders of torchtune.
"""

from typing import Any

from tunekit.recipe.foreign.become import complain, record
from tunekit.recipe.foreign.rewrite import file_of_base
from tunekit.recipe.foreign.table import TOP_LEVEL
from tunekit.recipe.foreign.torchtune import COMPONENT, rewrite_torchtune
from tunekit.recipe.foreign.unsloth import rewrite_options, rewrite_sections
from tunekit.recipe.reading.draft import Draft, KeyPath, Place, dotted
from tunekit.recipe.reading.suggest import nearest, show

AXOLOTL, FACTORY, PEFT, TORCHTUNE, TRL, UNSLOTH = "Axolotl", "LLaMA-Factory", "PEFT", "torchtune", "TRL", "Unsloth"
SCRIPT = "Unsloth's script"
OURS = ("model", "data", "training", "memory", "evaluation", "output", "objective", "adapter")
SIGNS = {  # keys that identify the tool of a flat configuration; the first match counts
    PEFT: ("peft_type",),
    AXOLOTL: ("base_model", "micro_batch_size", "sequence_len"),
    FACTORY: ("finetuning_type", "stage", "cutoff_len", "lora_target", "lora_rank", "template"),
    TRL: ("dataset_name", "use_peft", "lora_target_modules", "per_device_train_batch_size", "num_train_epochs"),
}
_TRAINER = {"training.scheduler": "linear", "training.micro_batch_size": 8, "training.gradient_accumulation_steps": 1}
_TRAINER |= {"training.epochs": 3, "training.warmup_ratio": 0.0, "data.excess_length": "truncate"}
_RATES = {**dict.fromkeys(("dpo", "kto", "grpo", "rloo"), 1e-6), "reward": 1e-4}  # TRL's trainers; SFTTrainer has 2e-5
_UNSLOTH = {  # defaults of both its command and its script
    "training.learning_rate": 2e-4,
    "training.optimizer": "adamw_8bit",
    "training.scheduler": "linear",
    "training.warmup_steps": 5,
    "training.weight_decay": 0.01,
    "training.gradient_accumulation_steps": 4,
    "data.excess_length": "truncate",
    "data.train_on": "all",
    "adapter.alpha": 16,
    "output.dir": "outputs",
}
DEFAULTS: dict[str, dict[str, Any]] = {  # tunekit's key -> the tool's default, where it differs
    TRL: {**_TRAINER, "data.max_length": 1024, "adapter.dropout": 0.05, "output.dir": "trainer_output"},
    FACTORY: {**_TRAINER, "training.learning_rate": 5e-5, "adapter.r": 8},
    AXOLOTL: {
        "training.micro_batch_size": 1,
        "training.gradient_accumulation_steps": 1,
        "data.max_length": 512,
        "output.dir": "model-out",
    },
    UNSLOTH: {**_UNSLOTH, "training.epochs": 3, "adapter.r": 64, "model.quantization": "nf4"},
    SCRIPT: {**_UNSLOTH, "training.max_steps": 400},
    TORCHTUNE: {
        "adapter.r": 8,
        "adapter.alpha": 16,
        "data.excess_length": "truncate",
        "training.gradient_accumulation_steps": 1,
    },
}
# for objectives that sample: prompts are never truncated
OF_SAMPLING = {"objective.max_completion_length": 512, "data.excess_length": "error", "data.max_length": 2048}
_ATTENTION = ("q_proj", "v_proj")
PEFT_TARGETS: dict[str, tuple[str, ...]] = {  # model_type -> PEFT's default target modules
    **dict.fromkeys(("llama", "llama4", "mistral", "mixtral", "stablelm", "gemma", "gemma2"), _ATTENTION),
    **dict.fromkeys(("gemma3_text", "qwen2", "qwen3", "opt", "gptj", "gpt_neo", "bart"), _ATTENTION),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("bloom", "gpt_neox", "falcon"), ("query_key_value",)),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), ("query", "value")),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    "deberta-v2": ("query_proj", "value_proj"),
    "phi": (*_ATTENTION, "fc1", "fc2"),
}
PEFT_CHOOSES = (  # printed with our default if the base's architecture is not known
    "; PEFT adapts fewer layers of some architectures (q_proj and v_proj of llama, mistral, gemma and qwen2): "
    "for these, write adapter.target_modules: [q_proj, v_proj]"
)
WITHOUT_DROPOUT = {  # objectives whose trainers disable all dropout (disable_dropout)
    TRL: ("dpo", "kto", "reward"),
    FACTORY: ("dpo", "kto"),
    AXOLOTL: ("dpo", "kto", "orpo", "simpo", "cpo"),
}
CUT_PROMPTS = (
    "LLaMA-Factory truncates a long row's prompt and answer in proportion, tunekit the end of the row; for long "
    "prompts, raise data.max_length"
)
TRAINED_TOKENS = (
    "TRL trains on all tokens of conversations, tunekit on those of the assistant; for all tokens, write "
    "data.train_on: all"
)
LION_BETAS = "lion has the betas of its paper (0.9 and 0.99); transformers gives it those of Adam (0.9 and 0.999)"
ONE_OF = {"epochs": "max_steps", "max_steps": "epochs", "warmup_ratio": "warmup_steps", "warmup_steps": "warmup_ratio"}


def tool_of(draft: Draft) -> str | None:
    """The tool whose configuration this is; None for a recipe, even if it has some keys of other tools."""
    values = draft.values
    sections = [value for value in values.values() if isinstance(value, dict)]
    if any(COMPONENT in section for section in sections):
        return TORCHTUNE
    if isinstance(values.get("lora"), dict) and isinstance(values.get("training"), dict):
        return UNSLOTH
    if draft.program is not None:
        return SCRIPT if "unsloth" in draft.program else TRL
    if any(isinstance(values.get(name), dict) for name in OURS):
        return None
    return next((tool for tool, signs in SIGNS.items() if any(sign in values for sign in signs)), None)


WHOLE = {TORCHTUNE: rewrite_torchtune, UNSLOTH: rewrite_sections, SCRIPT: rewrite_options}  # not flat


def rate_of(method: str) -> float:
    """The default learning rate of TRL's trainer for an objective. `method`: the name of the objective."""
    return _RATES.get(method, 2e-5)


def trains_base(draft: Draft, tool: str | None) -> bool:
    """Whether the tool would train all weights, because the configuration has no adapter. `draft`: the configuration
    before its keys are rewritten."""
    asked = draft.get(("adapter",)) if tool == AXOLOTL else draft.get(("use_peft",)) is True
    return tool in (AXOLOTL, TRL) and not asked


def drop_empty(draft: Draft) -> None:
    """Remove unknown keys with empty values, in place. Example configurations of other tools contain many."""
    for name in [name for name in draft.values if name not in OURS and name not in TOP_LEVEL]:
        if draft.values[name] in (None, False, "", [], {}):
            record(draft, draft.place((name,)), str(name), "nothing (it is empty)")
            draft.remove((name,))
    if draft.has(("adapter",)) and draft.get(("adapter",)) in (None, False, "", [], {}):
        draft.remove(("adapter",))


def drop_dropout(draft: Draft, tool: str) -> None:
    """Remove lora_dropout of objectives whose trainer turns all dropout off, in place."""
    named = (draft.get(key) for key in (("rl",), ("stage",), ("objective", "method"), ("objective",)))
    key = ("lora_dropout",)
    if next(filter(None, named), None) in WITHOUT_DROPOUT.get(tool, ()) and draft.has(key):
        record(draft, draft.place(key), "lora_dropout", "nothing (its trainer has no dropout)")
        draft.remove(key)


def drop_overruled(draft: Draft) -> None:
    """Remove epochs if max_steps is set, and warmup_ratio if warmup_steps is set, in place: other tools ignore them."""
    for used, ignored in (("max_steps", "epochs"), ("warmup_steps", "warmup_ratio")):
        if draft.get(("training", used)) == 0:
            used, ignored = ignored, used
        keys: tuple[KeyPath, KeyPath] = (("training", used), ("training", ignored))
        if all(draft.get(key) is not None for key in keys):
            spelled = draft.place(keys[1]).spelled or dotted(keys[1])
            record(draft, draft.place(keys[1]), spelled, f"nothing (training.{used} takes precedence)")
            draft.remove(keys[1])


def drop_unknown(draft: Draft, tool: str) -> None:
    """Remove keys that have no translation, in place. Each key becomes a problem: the import would lose it."""
    for name in [name for name in draft.values if name not in OURS]:
        similar = nearest(str(name), [known for known in TOP_LEVEL if not draft.has((known,))])
        how = f"did you mean '{similar}'? otherwise remove it" if similar else "correct its name, or remove it"
        complain(draft, draft.place((name,)), str(name), f"is not a known key of {tool}, and would be lost", how)
        draft.remove((name,))


def write_defaults(draft: Draft, tool: str, every_weight: bool) -> None:
    """Write the tool's defaults that differ from tunekit's, in place. `every_weight`: whether the tool trains all
    weights of the base."""
    defaults = dict(DEFAULTS.get(tool, {}))
    if every_weight:
        defaults["adapter.method"] = "full"
    method = "full" if every_weight else draft.get(("adapter", "method"))
    if tool == TRL:
        objective = str(draft.get(("objective", "method")))
        defaults["training.learning_rate"] = rate_of(objective)
        defaults |= OF_SAMPLING if objective in ("grpo", "rloo") else {}
        defaults |= {"data.excess_length": "drop"} if objective == "reward" else {}
        defaults |= {"data.shuffle": False} if objective == "kto" else {}
        defaults |= {"model.double_quantization": False} if draft.get(("model", "quantization")) == "nf4" else {}
        if objective in ("sft", "None") and not draft.has(("data", "train_on")):
            draft.rewrites.append(f"{draft.file}: {TRAINED_TOKENS}")
        targets = PEFT_TARGETS.get(file_of_base(draft, "config.json").get("model_type", ""))
        defaults["adapter.target_modules"] = "all-linear" if targets is None else list(targets)
    if draft.get(("objective", "method")) in WITHOUT_DROPOUT.get(tool, ()):
        defaults.pop("adapter.dropout", None)
    if draft.get(("training", "optimizer")) == "lion":
        draft.rewrites.append(f"{draft.file}: {LION_BETAS}")
    if tool == FACTORY and not draft.has(("data", "excess_length")):
        draft.rewrites.append(f"{draft.file}: {CUT_PROMPTS}")
    if tool == FACTORY and isinstance(rank := draft.get(("adapter", "r"), 8), int):
        defaults["adapter.alpha"] = 2 * rank
    for key, value in defaults.items():
        section, name = key.split(".")
        other = ONE_OF.get(name)
        written = draft.has((section, name)) or (other is not None and draft.has((section, other)))
        written = written or not isinstance(draft.get((section,), {}), dict)  # invalid, and refused later
        of_adapter = method == "full" and (section == "adapter" or name == "quantization") and name != "method"
        if not (written or of_adapter or draft.untranslated & {(section, name)}):
            draft.set((section, name), value, Place(draft.file))
            text = f"[{', '.join(value)}]" if isinstance(value, list) else show(value)
            text += PEFT_CHOOSES if key == "adapter.target_modules" and value == "all-linear" else ""
            draft.rewrites.append(f"{draft.file}: default of {tool} -> {key}: {text}")
