"""Translates keys of TRL's GRPOConfig and RLOOConfig, and converts micro-batches, which count completions in TRL."""

from tunekit.recipe.foreign.alias import Alias, dropped, nowhere, same_names, to
from tunekit.recipe.foreign.values import exactly, lost, one_of
from tunekit.recipe.reading.draft import Draft, KeyPath
from tunekit.recipe.reading.names import known_names, settings_class

SIZE: KeyPath = ("training", "micro_batch_size")
STEPS: KeyPath = ("training", "gradient_accumulation_steps")
OUR_STEPS = 8  # default of training.gradient_accumulation_steps
OF_COMPLETIONS = ("per_device_train_batch_size", "micro_batch_size")  # TRL's and Axolotl's name
_SCALES = {True: "group", False: "none", "group": "group", "batch": "batch", "none": "none"}

OF_SAMPLES: dict[str, Alias] = {
    **same_names("objective", "num_generations", "max_completion_length", "temperature", "top_p", "top_k"),
    **same_names("objective", "num_iterations", "epsilon", "epsilon_high", "importance_sampling_level"),
    **to("objective.scale_rewards", "scale_rewards", by=one_of(_SCALES)),
    **same_names("objective", "mask_truncated_completions", "use_bias_correction_kl", "normalize_advantages"),
    **to("data.shuffle", "shuffle_dataset"),
    **nowhere(
        lost("tunekit needs the reward's file", "write objective.reward: [{function: FILE.py:NAME, allow_code: true}]"),
        *("reward_funcs", "reward_model_name_or_path", "reward_processing_classes"),
    ),
    **nowhere(lost("each reward has a separate weight", "write weight: in objective.reward"), "reward_weights"),
    **nowhere(
        lost(
            "tunekit does not truncate prompts", "write data.max_length: the maximum tokens of prompt plus completion"
        ),
        "max_prompt_length",
    ),
    **nowhere(lost("the trained model generates the samples, without vLLM", "write use_vllm: false"), "use_vllm"),
    **dropped(
        "tunekit does not use vLLM",
        *("vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_server_base_url", "vllm_server_host"),
        *("vllm_server_port", "vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization"),
        *("vllm_max_model_length", "vllm_tensor_parallel_size", "vllm_importance_sampling_correction"),
        *("vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap"),
        *("vllm_importance_sampling_clip_min", "use_transformers_continuous_batching", "use_transformers_paged"),
    ),
    **nowhere(
        lost(
            "each step samples new completions, unless objective.num_iterations is above 1",
            "write objective.num_iterations: the number of steps that use the same completions",
        ),
        *("steps_per_generation", "generation_batch_size"),
    ),
    **nowhere(lost("an evaluation generates one greedy completion per prompt"), "num_generations_eval"),
    **nowhere(exactly("sum_then_normalize"), "multi_objective_aggregation"),
    **nowhere(exactly(1.0), "repetition_penalty", "top_entropy_quantile"),
    **nowhere(lost("sampling has only temperature, top_p and top_k"), "min_p", "generation_kwargs"),
    **dropped("the report shows completions of every step", "log_completions", "num_completions_to_print"),
    **dropped("this setting changes no result", "ds3_gather_for_generation", "log_unique_prompts"),
}


def count_prompts(draft: Draft, of_tool: bool) -> None:
    """Convert TRL's micro-batches, which count completions, to micro-batches of prompts, in place. A step has as many
    prompts as before.

    `of_tool`: whether the file is the configuration of another tool. In a recipe, only TRL's key names are converted.
    """
    method, written = draft.get(("objective", "method")), draft.get(SIZE)
    spelled = draft.place(SIZE).spelled if draft.has(SIZE) else None
    if method not in known_names("objectives") or not isinstance(written, int):
        return
    settings = settings_class("objectives", method)
    if not settings.samples or not (of_tool or spelled in OF_COMPLETIONS):  # type: ignore[attr-defined]
        return
    default = settings.model_fields["num_generations"].default
    group, steps = draft.get(("objective", "num_generations"), default), draft.get(STEPS, OUR_STEPS)
    if not (isinstance(group, int) and isinstance(steps, int) and min(group, steps, written) > 0):
        return  # invalid values are reported by other checks
    place, rows = draft.place(SIZE), written * steps
    if rows % group:
        what = f"{rows} completions per step ({written} x {steps}) are not a multiple of the group size {group}"
        draft.add_problem(SIZE, what, "write training.micro_batch_size and gradient_accumulation_steps in prompts")
        return
    prompts = rows // group
    size = max(each for each in range(1, prompts + 1) if prompts % each == 0 and (each * group <= written or each == 1))
    draft.set(SIZE, size, place)
    draft.set(STEPS, prompts // size, draft.place(STEPS) if draft.has(STEPS) else place)
    draft.rewrites.append(
        f"{place}: {written} completions x {steps} -> training.micro_batch_size: {size} (prompts of {group} "
        f"completions), training.gradient_accumulation_steps: {prompts // size}"
    )
