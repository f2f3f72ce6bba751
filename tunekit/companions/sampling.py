"""Plans and simulates the memory for sampling completions during training."""

from math import prod

import torch
from torch import Tensor

from tunekit.contracts import Batch, CompanionSpec, CountingAs, LoadedBase, PlanContext, RunView
from tunekit.errors import Problem
from tunekit.model.attention.self_attention import attention_sizes
from tunekit.model.text.draws import draw
from tunekit.model.text.generation import PREFILL_TOKENS
from tunekit.objectives.losses.samples import Sampler
from tunekit.recipe.bases.sample_settings import SampleSettings
from tunekit.records import ExecutionSettings, bytes_text
from tunekit.tuned.fit import longest_tokens


class SamplingMemory(Sampler):
    """The companion that plans the memory for sampling. `prompt_tokens` and `new_tokens`: the maximum number of tokens
    of a prompt, and of a completion."""

    rehearses = any_token = True

    def __init__(self, spec: CompanionSpec) -> None:
        super().__init__(spec)
        assert isinstance(spec.settings, SampleSettings)
        self.settings = settings = spec.settings
        self.prompt_tokens, self.new_tokens = 0, settings.max_completion_length
        self.sampling_batch_size = settings.sampling_batch_size
        why = "samples token by token, so every layer would be copied for each token"
        self.streaming_obstacle = f"{settings.method} {why}"

    def examine(self, planned: PlanContext) -> list[Problem]:
        """Find the length of the prompts, and how many completions a step has. Returns problems if a checkpoint would
        be saved between steps that reuse samples, because checkpoints do not contain samples."""
        training, longest = planned.training, max(map(longest_tokens, planned.rows))
        self.prompt_tokens = longest - self.new_tokens + planned.virtual_tokens
        if training.micro_batch_size is not None:
            rows_of_a_step = training.micro_batch_size * training.gradient_accumulation_steps
            of_a_step = rows_of_a_step * self.settings.num_generations
            self.sampling_batch_size = min(self.sampling_batch_size, of_a_step)
        places = {"save_steps": training.save_steps}
        places |= {"eval_steps": training.eval_steps} if planned.evaluation.best else {}
        updates = self.settings.num_iterations
        why = f"{updates} steps reuse the same completions, and checkpoints do not contain completions"
        what = f"is not a multiple of objective.num_iterations, {updates}: {why}"
        how = f"write a multiple of {updates}, or change objective.num_iterations"
        wrong = {name: steps for name, steps in places.items() if steps % updates}
        return [Problem(f"{steps} {what}", how, key=f"training.{name}") for name, steps in wrong.items()]

    def notes(self, planned: PlanContext, execution: ExecutionSettings, tokens: int) -> list[str]:
        """A note that states how many completions are sampled in parallel, and how much memory their keys and values
        take."""
        size, tokens = execution.sampling_batch_size, self.prompt_tokens + self.new_tokens
        numbers = 2 * sum(map(prod, cache_shapes(planned.base, size, tokens)))
        note = f"sampling: {size:,} completions in parallel"
        if numbers:
            taken = bytes_text(numbers * planned.base.dtype.itemsize)
            note += f"; their keys and values, for up to {tokens:,} tokens each, take {taken}"
        if size < self.sampling_batch_size:
            note += f"; {self.sampling_batch_size:,} in parallel do not fit into memory"
        return [note]

    def rehearse(self, run: RunView, batch: Batch, execution: ExecutionSettings, counting_as: CountingAs) -> None:
        """Simulate the forward of some prompts, then the logits and the sampling of a token. Key-value caches for all
        completions and for these prompts are in memory, and briefly one layer's cache with repeated heads."""
        base, size = run.model.base, execution.sampling_batch_size

        def cache(rows: int, tokens: int) -> list[Tensor]:
            shapes = cache_shapes(base, rows, tokens)
            return [torch.empty(shape, dtype=base.dtype, device="meta") for shape in (*shapes, *shapes)]

        prompts = min(size // self.settings.num_generations + 1, size, max(PREFILL_TOKENS // self.prompt_tokens, 1))
        keys_values = cache(size, self.prompt_tokens + self.new_tokens)
        of_prompts = cache(prompts, self.prompt_tokens)
        places = torch.arange(min(self.prompt_tokens, PREFILL_TOKENS)).expand(prompts, -1)
        ids = torch.zeros_like(places)
        hidden = run.model.output({"input_ids": ids, "position_ids": places}).hidden
        assert hidden is not None
        hidden = hidden.new_empty(size, hidden.shape[-1])
        sizes = attention_sizes(base.net, base.facts.layers)
        repeated = max((queries // heads * heads * width for queries, heads, width in sizes), default=0)
        one_layer = hidden.new_empty(2, size, self.prompt_tokens + self.new_tokens, repeated, dtype=base.dtype)
        del one_layer
        with counting_as("logits"):
            draw(base.family.head(base.net).logits(hidden), torch.zeros(size, device="meta"))
        del keys_values, of_prompts


def cache_shapes(base: LoadedBase, rows: int, tokens: int) -> list[tuple[int, ...]]:
    """The shape (B, H, T, D) of each layer's key cache, which is also that of its value cache. Empty for a base without
    attention."""
    sizes = attention_sizes(base.net, base.facts.layers)
    return [(rows, heads, tokens, width) for _, heads, width in sizes]


make = SamplingMemory  # companions.base calls it with a CompanionSpec
