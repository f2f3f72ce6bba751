"""Sampling of completions during training: its memory, and the window whose samples later steps reuse."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tunekit.companions.base import PlanContext
from tunekit.contracts import Batch, Companion, CompanionFacts, CompanionSpec, CountingAs, RunView, Window
from tunekit.errors import Problem
from tunekit.model.attention.self_attention import heads_and_width
from tunekit.model.families import text_config
from tunekit.model.text.generation import draw
from tunekit.recipe.bases.sample_settings import SampleSettings
from tunekit.tuned.fit import longest_tokens


class Sampler(Companion):
    """`window`: the last window with new samples. A rehearsal generates `count` completions in parallel, each with
    `prompt_tokens` and `new_tokens`: the maximum of the run."""

    rehearses = True
    window: Window | None = None

    def __init__(self, spec: CompanionSpec) -> None:
        super().__init__(spec)
        self.settings: SampleSettings = spec.settings
        self.count, self.prompt_tokens = self.settings.sampling_batch_size, 0
        self.new_tokens = self.settings.max_completion_length

    def facts(self, planned: PlanContext) -> CompanionFacts:
        """Sampling may produce any token, and cannot stream layers."""
        training, longest = planned.training, max(map(longest_tokens, planned.rows))
        self.prompt_tokens = longest - self.new_tokens + planned.virtual_tokens
        if training.micro_batch_size is not None:
            rows_of_a_step = training.micro_batch_size * training.gradient_accumulation_steps
            self.count = min(self.count, rows_of_a_step * self.settings.num_generations)
        obstacle = f"{self.settings.method} samples token by token, so every layer would be copied for each token"
        return CompanionFacts(problems=list(self._problems(planned)), any_token=True, streaming_obstacle=obstacle)

    def _problems(self, planned: PlanContext) -> Iterator[Problem]:
        """Problems for checkpoints between steps that reuse samples, which checkpoints do not contain."""
        training, updates = planned.training, self.settings.num_iterations
        places = {"save_steps": training.save_steps}
        places |= {"eval_steps": training.eval_steps} if planned.evaluation.best else {}
        for name, steps in places.items():
            if steps % updates:
                what = (
                    f"{steps} is not a multiple of objective.num_iterations, {updates}: that many steps reuse the same "
                    "completions, which checkpoints do not contain"
                )
                how = f"write a multiple of {updates}, or change objective.num_iterations"
                yield Problem(what, how, key=f"training.{name}")

    def rehearse(self, run: RunView, batch: Batch, counting_as: CountingAs) -> None:
        """Simulate the forward of the prompts, then the last token's logits and draw, with the keys and values of all
        layers."""
        base = run.model.base
        heads, width = heads_and_width(text_config(base.net))

        def cache(tokens: int) -> Tensor:
            shape = (2 * base.facts.layers, self.count, heads, tokens, width)
            return torch.empty(shape, dtype=base.dtype, device="meta")

        keys_values = cache(self.prompt_tokens)
        ids = torch.zeros(self.count, self.prompt_tokens, dtype=torch.int64)
        places = torch.arange(self.prompt_tokens).expand(self.count, -1)
        hidden = run.model.output({"input_ids": ids, "position_ids": places}).hidden
        assert hidden is not None
        hidden = hidden[:, -1].clone()
        keys_values = cache(self.prompt_tokens + self.new_tokens)
        with counting_as("logits"):
            draw(base.family.head(base.net).logits(hidden), torch.zeros(self.count, device="meta"))
        del keys_values


make = Sampler  # companions.base calls it with a CompanionSpec
