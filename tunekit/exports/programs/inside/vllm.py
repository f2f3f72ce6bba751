"""The largest log-probabilities of a model folder in vLLM, with or without an adapter."""

from typing import Any

import numpy as np
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

LARGEST = 20  # log-probabilities per token, vLLM's limit


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The LARGEST log-probabilities after each token of the rows, computed in float32."""
    rows, adapter = request["rows"], request["adapter"]
    options: dict[str, Any] = {"language_model_only": True}  # of composite models: rows have text alone
    if adapter:
        options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": request["max_lora_rank"]}
        options["enable_mixed_moe_lora_format"] = request["experts"]  # as in the printed command
    length = max(map(len, rows)) + 1
    model = LLM(request["model"], dtype="float32", max_model_len=length, enforce_eager=True, seed=0, **options)
    sampling = {"temperature": 0.0, "max_tokens": 1, "logprobs": LARGEST}
    if adapter:
        # With an adapter, prompt_logprobs fails on a CPU: each beginning of a row is a prompt, and the token that
        # follows is the only allowed answer. vLLM computes the log-probabilities before that limit.
        beginnings = [(row[:end], row[end : end + 1]) for row in rows for end in range(1, len(row) + 1)]
        outputs = model.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in beginnings],
            [SamplingParams(**sampling, allowed_token_ids=following or None) for _, following in beginnings],
            lora_request=LoRARequest("adapter", 1, adapter),
        )
        computed = iter([output.outputs[0].logprobs[0] for output in outputs])
        steps_of = [[next(computed) for _ in row] for row in rows]
    else:
        outputs = model.generate(
            [{"prompt_token_ids": row} for row in rows], SamplingParams(**sampling, prompt_logprobs=LARGEST)
        )
        steps_of = [[*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]] for output in outputs]
    answers: dict[str, Any] = {}
    for index, (row, steps) in enumerate(zip(rows, steps_of, strict=True)):  # each step also has the following token
        largest = [sorted(((each.logprob, token) for token, each in step.items()), reverse=True) for step in steps]
        answers[f"values.{index}"] = np.array([[value for value, _ in step[:LARGEST]] for step in largest])
        answers[f"tokens.{index}"] = np.array([[token for _, token in step[:LARGEST]] for step in largest])
        following = zip(steps[:-1], row[1:], strict=True)
        answers[f"following.{index}"] = np.array([step[token].logprob for step, token in following])
    return answers
