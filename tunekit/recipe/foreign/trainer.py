"""Settings that a trainer of TRL, Axolotl or LLaMA-Factory decides, not a single key: the objective, the order of the
rows, what becomes of long rows, and packing."""

from tunekit.errors import RecipeError
from tunekit.recipe.foreign.become import complain, record, take, write, write_unlimited
from tunekit.recipe.reading.draft import Draft, Place

_SAMPLED = ("grpo", "rloo")
_REFERRED = ("dpo", "kto", *_SAMPLED)  # trainers with a reference model
TRAINERS = ("sft", *_REFERRED, "reward")
# keys that some trainers of TRL lack, and the trainers that have them
READ_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("packing", "packing_strategy", "eval_packing", "dataset_text_field", "dataset_kwargs"), ("sft",)),
    **dict.fromkeys(("completion_only_loss", "assistant_only_loss"), ("sft",)),
    "max_seq_length": ("sft",),
    "padding_free": ("sft", "dpo"),
    "truncation_mode": ("sft", "dpo", "kto"),
    **dict.fromkeys(("loss_weights", "rpo_alpha", "ld_alpha", "discopop_tau", "label_smoothing"), ("dpo",)),
    **dict.fromkeys(("f_divergence_type", "f_alpha_divergence_coef", "use_weighting"), ("dpo",)),
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), ("kto",)),
    "center_rewards_coefficient": ("reward",),
    **dict.fromkeys(("precompute_ref_log_probs", "precompute_ref_batch_size"), ("dpo", "kto")),
    **dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"), _REFERRED),
    **dict.fromkeys(("beta", "sync_ref_model", "max_prompt_length", "max_completion_length"), _REFERRED),
    **dict.fromkeys(("num_generations", "num_iterations", "temperature", "reward_funcs"), _SAMPLED),
    **dict.fromkeys(("top_p", "top_k", "epsilon", "epsilon_high", "reward_weights", "use_vllm"), _SAMPLED),
    **dict.fromkeys(("mask_truncated_completions", "log_completions"), _SAMPLED),
    **dict.fromkeys(("scale_rewards", "importance_sampling_level", "use_bias_correction_kl"), ("grpo",)),
    **dict.fromkeys(("cast_lm_head_to_fp32", "delta", "log_completions_hub_repo", "use_adaptive_entropy"), ("grpo",)),
    **dict.fromkeys(("max_tool_calling_iterations", "multi_objective_aggregation"), ("grpo",)),
    **dict.fromkeys(("off_policy_mask_threshold", "top_entropy_quantile"), ("grpo",)),
    **dict.fromkeys(("normalize_advantages", "reward_clip_range"), ("rloo",)),
    **dict.fromkeys(("generation_batch_size", "steps_per_generation", "num_generations_eval"), _SAMPLED),
    **dict.fromkeys(("min_p", "repetition_penalty", "generation_kwargs", "chat_template_kwargs"), _SAMPLED),
    **dict.fromkeys(("cache_implementation", "ds3_gather_for_generation", "log_multimodal"), _SAMPLED),
    **dict.fromkeys(("log_unique_prompts", "num_completions_to_print", "use_transformers_paged"), _SAMPLED),
    "shuffle_dataset": ("sft", *_SAMPLED),
    "max_length": ("sft", "dpo", "kto", "reward"),
}
PREFIXES = {  # of further keys
    **dict.fromkeys(("vllm_importance_sampling_", "entropy_", "sapo_", "vespo_"), ("grpo",)),
    **dict.fromkeys(("vllm_", "transformers_continuous_", "use_transformers_continuous_"), _SAMPLED),
}
LOSSES = {  # loss_type -> trainer; the other losses are DPO's
    **dict.fromkeys(("nll", "dft", "chunked_nll"), "sft"),
    **dict.fromkeys(("kto", "apo_zero_unpaired"), "kto"),
    **dict.fromkeys(("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"), "grpo"),
}
NEXT_TOKEN = ("nll", "chunked_nll")
COMPLETION = "completion"


def settle_trl(draft: Draft, *, imported: bool) -> None:
    """Rewrite the keys of a TRL configuration whose meaning depends on its trainer, in place.

    Raises: RecipeError if the keys do not decide the trainer, and the file is `imported`.
    """
    _write_trainer(draft, imported)
    length = ("max_length",)
    if draft.has(length) and draft.get(length) is None:
        place = draft.place(length)
        draft.remove(length)
        write_unlimited(draft, place, "max_length", packing=draft.get(("packing",)) is True)
    if _objective(draft) not in _SAMPLED:
        _drop(draft, "shuffle_dataset", "the trainer shuffles the rows of each epoch")
    if draft.get(("loss_type",)) in NEXT_TOKEN:
        _drop(draft, "loss_type", "it is the loss of sft")


def settle_axolotl(draft: Draft) -> None:
    """Rewrite the keys of an Axolotl configuration that depend on each other, in place: the order of the rows, and
    data.excess_length. Its trainers shuffle the rows of each epoch, except with curriculum_sampling, and for KTO."""
    sources, method = draft.get(("datasets",)), draft.get(("rl",))
    keeps_order = draft.get(("shuffle_merged_datasets",)) is False
    mixed = isinstance(sources, list) and len(sources) > 1 and not keeps_order
    if draft.get(("curriculum_sampling",)) is True and (mixed or method not in (None, *_SAMPLED)):
        why = "the mixed data sets are shuffled" if mixed else f"the trainer of {method} does not read it"
        _drop(draft, "curriculum_sampling", why)
    if method == "kto" and keeps_order:
        place = draft.place(("shuffle_merged_datasets",))
        draft.remove(("shuffle_merged_datasets",))
        write(draft, ("data", "shuffle"), False, place, "shuffle_merged_datasets")
    kinds = _kinds(sources)
    if any(kind.startswith("chatml.") for kind in kinds):  # this template, also if the tokenizer has a different one
        draft.set(("chat_template",), "chatml", draft.place(("datasets",)))
    _write_excess(draft, kinds)
    uses_wandb = draft.get(("wandb_mode",)) != "disabled" and not draft.get(("report_to",))
    if uses_wandb and (taken := take(draft, "wandb_project")) is not None:
        write(draft, ("output", "report_to"), ["wandb"], taken[1], "wandb_project")
        draft.rewrites[-1] += f": [wandb] (for its name, set WANDB_PROJECT={taken[0]})"


def _kinds(sources: object) -> set[str]:
    return {str(item.get("type")) for item in sources if isinstance(item, dict)} if isinstance(sources, list) else set()


def settle_factory(draft: Draft) -> None:
    """Rewrite the packing of a LLaMA-Factory configuration, in place: neat_packing includes packing."""
    packs = draft.get(("packing",)) is True
    if draft.get(("neat_packing",)) is True and packs:
        _drop(draft, "packing", "neat_packing: true packs the rows")
    elif packs:
        what = "data.packing: true (in LLaMA-Factory, the rows of a pack attend to each other; in tunekit they do not)"
        record(draft, draft.place(("packing",)), "packing", what)


def _write_excess(draft: Draft, kinds: set[str]) -> None:
    """Write data.excess_length: split for texts, which Axolotl cuts into pieces of sequence_len tokens. If the file has
    other rows too, this is a problem: Axolotl drops these, and the recipe has one setting for all rows."""
    if COMPLETION not in kinds:
        return
    place = draft.place(("datasets",))
    if len(kinds) > 1:
        what = f"Axolotl splits the long texts of type {COMPLETION}, and drops the long rows of the other types"
        complain(draft, place, "datasets", what, "write data.excess_length: split or drop, for all rows")
        return
    write(draft, ("data", "excess_length"), "split", place, f"type: {COMPLETION}")
    _drop(draft, "excess_length_strategy", "long texts are split")


def _drop(draft: Draft, name: str, why: str) -> None:
    if (taken := take(draft, name)) is not None:
        record(draft, taken[1], name, f"nothing ({why})")


def _objective(draft: Draft) -> object:
    written = draft.get(("rl",), draft.get(("objective",)))
    return written.get("method") if isinstance(written, dict) else written


def _write_trainer(draft: Draft, imported: bool) -> None:
    """Write objective.method for the trainer whose keys the file has. A configuration of TRL does not name it.

    Raises: RecipeError.
    """
    if _objective(draft) is not None:
        return
    deciding = [name for name in draft.values if draft.values[name] is not None and _readers(draft, name)]
    possible = [trainer for trainer in TRAINERS if all(trainer in _readers(draft, name) for name in deciding)]
    if len(possible) == 1:
        key = min(deciding, key=lambda name: len(_readers(draft, name)))
        write(draft, ("objective", "method"), possible[0], draft.place((key,)), key)
        return
    why = f"no trainer has all of the keys {', '.join(deciding)}" if not possible else "several trainers have its keys"
    what, named = f"the file does not name TRL's trainer, and {why}", possible or TRAINERS
    how = f"add the line `objective: {named[0]}` to it (or {', '.join(named[1:])})"
    if imported:
        raise RecipeError(what, how, file=draft.file, key="objective")
    record(draft, Place(draft.file), "objective", f"sft, because {what}; for a different objective, {how}")


def trainers_with(key: str) -> tuple[str, ...]:
    """The trainers of TRL that have a key; empty for keys that all trainers have."""
    prefixed = (PREFIXES[prefix] for prefix in PREFIXES if key.startswith(prefix))
    return READ_BY.get(key) or next(prefixed, ())


def _readers(draft: Draft, name: str) -> tuple[str, ...]:
    """The trainers that have this key, with its value; empty for keys that all trainers have."""
    if name != "loss_type":
        return trainers_with(name)
    value = draft.values[name]
    return (LOSSES.get(value, "dpo") if isinstance(value, str) else "dpo",)
