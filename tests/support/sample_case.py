"""Completions with rewards given instead of a model, and the same in the shapes that trl has them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from tunekit.companions.base import load_companions
from tunekit.contracts import Batch, Gather, ModelOutput, Objective, Row, RowKind, StepBatches
from tunekit.model.call import seed_for
from tunekit.objectives.base import make_objective
from tunekit.objectives.losses.samples import SampledLoss
from tunekit.recipe.bases.sample_settings import SampleSettings
from tunekit.tuned.model import ModelRun

END, VOCABULARY, LONGEST = 2, 100, 7
PROMPTS = [4, 3, 6, 2]  # tokens of each
LENGTHS = [(5, 7, 1), (3, 3, 4), (7, 2, 6), (7, 7, 7)]  # of each one's completions; those of 7 did not end
REWARDS = [  # by two functions
    [(1.0, 0.5), (0.0, 0.25), (1.0, None)],
    [(0.5, 0.5), (0.5, 0.5), (0.5, 0.5)],
    [(None, None), (2.0, -1.0), (0.0, 3.0)],
    [(0.25, None), (None, 0.125), (-1.0, 0.0)],
]
CODE = """
import json
from pathlib import Path

TABLE = json.loads(Path(__file__).with_suffix(".json").read_text())

def first(prompts, completions, **columns):
    return [TABLE[text][0] for text in completions]

def second(completions):
    return [TABLE[text][1] for text in completions]
"""


class Words:
    """A tokenizer whose texts are ids."""

    fingerprint, pad_id, eos_id, chat_template, special_ids = "of ids", 0, END, None, frozenset([END])
    unknown_id = None

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return " ".join(str(number) for number in ids if number != END or not skip_special_tokens)

    def batch_decode(self, lines: Sequence[Sequence[int]], *, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in lines]

    pad_token_id = 0


class Table(nn.Module):
    """A model that gives each id its own log-probability, and each place its own entropy."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        drawn = torch.rand(2, 32, VOCABULARY, generator=torch.Generator().manual_seed(seed))  # (T, V)
        self.values, self.entropies = nn.Parameter(0.05 - drawn[0]), drawn[1]


class Output(ModelOutput):
    """Of a batch by a table, instead of hidden states."""

    def __init__(self, table: Table, batch: Batch) -> None:
        super().__init__(hidden=torch.zeros(1, 1, 1))
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "batch", batch)


def _of_batch(output: Any, index: Tensor, targets: Tensor, entropies: Tensor | None = None) -> Tensor:
    places = output.batch.inputs["position_ids"].flatten()[index]
    if entropies is not None:
        entropies.copy_(output.table.entropies[places, targets])
    found: Tensor = output.table.values[places, targets]
    return found


def drawn_ids() -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts, and the completions to each."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, VOCABULARY, size).tolist() for size in PROMPTS]
    groups = [[draw.integers(3, VOCABULARY, size).tolist() for size in sizes] for sizes in LENGTHS]
    return prompts, [[ids if len(ids) == LONGEST else [*ids[:-1], END] for ids in group] for group in groups]


@dataclass
class Case:
    """One step: prompts with completions, the rewards' file, numbers of the policy, the old one and the reference."""

    folder: Path
    kind: type[SampleSettings]
    values: dict[str, Any]
    off_policy: bool = False

    def __post_init__(self) -> None:
        self.prompts, self.groups = drawn_ids()
        texts = {Words().decode(ids, skip_special_tokens=True): at for at, ids in enumerate(list(chain(*self.groups)))}
        worth = list(chain(*REWARDS))
        (self.folder / "rewards.json").write_text(json.dumps({text: worth[at] for text, at in texts.items()}))
        (self.folder / "rewards.py").write_text(CODE)
        named = [
            {"function": f"{self.folder}/rewards.py:{name}", "allow_code": True, "weight": weight}
            for name, weight in (("first", 1.0), ("second", 0.5))
        ]
        sizes = {"num_generations": len(LENGTHS[0]), "max_completion_length": LONGEST}
        self.settings = self.kind.model_validate({"reward": named, **sizes, **self.values})
        self.policy, self.old, self.reference = (Table(seed) for seed in range(3))
        if not self.off_policy:
            self.old = self.policy

    # As tunekit has it.

    def objective(self) -> Objective:
        return make_objective(self.settings, Words())  # type: ignore[arg-type]

    def rows(self, objective: Objective) -> list[Row]:
        contexts = [json.dumps({"prompt": str(ids), "columns": {}}).encode() for ids in self.prompts]
        return [
            objective.rows.make_row(
                {"prompt": np.array(ids, np.int32), "context": np.frombuffer(context, np.uint8)}, f"d:{at}", at
            )
            for at, (ids, context) in enumerate(zip(self.prompts, contexts, strict=True))
        ]

    @contextmanager
    def log_probabilities(self) -> Iterator[None]:
        """A block in which losses read those of the tables."""
        with patch("tunekit.objectives.losses.answers.log_probabilities", _of_batch):
            yield

    def run(self, rows: RowKind, gather: Gather = list) -> ModelRun:
        def generate(tokenizer: Any, prompts: Sequence[list[int]], **named: Any) -> list[list[int]]:
            known = {tuple(prompt): group for prompt, group in zip(self.prompts, self.groups, strict=True)}
            count = len(LENGTHS[0])
            expected = [
                seed_for("sample", 5, 3, self.prompts.index(prompt), 0, at % count) for at, prompt in enumerate(prompts)
            ]
            assert named["seeds"] == expected, "what is drawn follows from seed, step, row and completion"
            return [known[tuple(prompt)][at % count] for at, prompt in enumerate(prompts)]

        tables = [self.old]

        @contextmanager
        def scoring(*, reference: bool) -> Iterator[None]:
            tables[:] = [self.reference if reference else self.old]
            yield

        def scores(batches: Sequence[Batch], read: Any) -> list[Tensor]:
            return [read(Output(tables[0], batch), batch).detach() for batch in batches]

        model: Any = SimpleNamespace(
            device=torch.device("cpu"),
            slots=None,
            stop_ids=lambda tokenizer, template: [END],
            scoring=scoring,
            scores=scores,
            companions=load_companions(self.objective(), torch.device("cpu")),
        )
        run = ModelRun(model, rows, gather)
        run.generate = generate  # type: ignore[method-assign]
        return run

    def ours(
        self, sizes: Sequence[int], layout: tuple[bool, bool] = (True, True), order: Sequence[int] = (0, 1, 2, 3)
    ) -> Any:
        """The step's loss, what is logged, and its step; cut into micro-batches of so many prompts."""
        objective = self.objective().laid_out(*layout)
        kind: Any = objective.rows
        rows, run = self.rows(objective), self.run(kind)
        starts = np.cumsum([0, *sizes]).tolist()
        groups = [
            [[rows[order[at]] for at in range(start, stop)]]
            if layout[0]
            else [[rows[order[at]]] for at in range(start, stop)]
            for start, stop in pairwise(starts)
        ]
        batches, loss = tuple(kind.collate(group) for group in groups), objective.loss
        assert isinstance(loss, SampledLoss)
        with self.log_probabilities():
            step = objective.prepare_step(run, StepBatches(3, 0.0, tuple(range(len(batches))), batches, 5))
            if self.off_policy:
                step = kind.with_tokens(step, "old", run.score(step.batches, loss.token_scores))
            losses = [loss.loss(Output(self.policy, batch), batch) for batch in step.batches]
        units = sum(float(loss.units(batch)) for batch in step.batches)
        logged = {name: sum(float(each.metrics[name]) for each in losses) / units for name in loss.logged}
        total = torch.stack([each.total for each in losses]).sum() / units
        return total, {**logged, **step.preparation.metrics}, step

    # As trl has it.

    def theirs(self) -> tuple[Tensor, dict[str, float]]:
        """The loss of the same completions in one batch of trl's own trainer, and what it logs."""
        grpo = self.kind.__name__ == "GrpoSettings"
        trainer, settings = (GRPOTrainer if grpo else RLOOTrainer), self.settings
        count = settings.num_generations
        prompts = [ids for ids in self.prompts for _ in range(count)]
        completions = list(chain(*self.groups))
        scores = torch.tensor(
            [[np.nan if value is None else value for value in pair] for pair in list(chain(*REWARDS))]
        )
        metrics: Any = defaultdict(lambda: defaultdict(list))
        stub = SimpleNamespace(
            accelerator=_Alone(),
            model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
            ref_model=self.reference,
            args=SimpleNamespace(
                per_device_train_batch_size=len(prompts),
                gradient_checkpointing_kwargs=None,
                steps_per_generation=1,
                gradient_accumulation_steps=1,
                delta=None,
                use_bias_correction_kl=getattr(settings, "use_bias_correction_kl", True),
                report_to=[],
            ),
            _metrics=metrics,
            _logs={
                "prompt": [],
                "completion": [],
                "rewards": defaultdict(list),
                "advantages": [],
                "extra": defaultdict(list),
            },
            _pending_extra_logs={},
            _pending_metrics={},
            state=SimpleNamespace(num_input_tokens_seen=0),
            processing_class=Words(),
            _tokenizer=Words(),
            eos_token_ids=[END],
            pad_to_multiple_of=None,
            environment_factories=None,
            environments=None,
            tools=None,
            use_vllm=False,
            rollout_func=lambda asked, _: {"prompt_ids": prompts, "completion_ids": completions, "logprobs": None},
            _tokenize_prompts=lambda asked: (prompts, None, {}),
            _generate_single_turn=lambda *given: completions,
            num_generations=count,
            num_iterations=1,
            reward_weights=torch.tensor([source.weight for source in settings.reward]),
            reward_func_names=["first", "second"],
            reward_funcs=[None, None],
            multi_objective_aggregation="sum_then_normalize",
            reward_clip_range=None,
            mask_truncated_completions=settings.mask_truncated_completions,
            max_completion_length=settings.max_completion_length,
            epsilon_low=settings.epsilon,
            epsilon_high=settings.clip_high,
            current_gradient_accumulation_steps=1,
            off_policy_mask_threshold=None,
            top_entropy_quantile=1.0,
            _entropy_bonus_enabled=False,
            aux_loss_enabled=False,
            log_multimodal=False,
            **{name: getattr(settings, name) for name in KEYS if hasattr(settings, name)},
        )
        stub._generate = lambda asked: trainer._generate(stub, asked)
        stub._calculate_rewards = lambda *given: scores
        stub._get_per_token_logps_and_entropies = lambda model, ids, mask, keep, *_, **__: (
            *self._of_lines(
                model if isinstance(model, Table) else self.old if grpo or not stub.trains else self.policy,
                ids,
                mask,
                keep,
            ),
            None,
        )
        stub.trains = False
        inputs = trainer._generate_and_score_completions(stub, [{"prompt": str(ids)} for ids in prompts])
        stub.trains = True
        if grpo and self.off_policy:
            whole = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], torch.ones_like(inputs["completion_ids"])], 1)
            inputs["old_per_token_logps"] = self._of_lines(self.old, whole, mask, inputs["completion_ids"].shape[1])[
                0
            ].detach()
        loss = trainer._compute_loss(stub, self.policy if grpo else object(), inputs)
        named = {name.replace("/", "_"): values[-1] for name, values in metrics["train"].items()}
        return loss, named

    def _of_lines(self, table: Table, ids: Tensor, mask: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """(B, C) of each completion's tokens; position 0 is the first token of the prompt, padded on the left."""
        first = (mask[:, : ids.shape[1] - keep] == 0).sum(1, keepdim=True)
        places = (torch.arange(ids.shape[1])[None] - first - 1)[:, -keep:]
        tokens = ids[:, -keep:]
        return table.values[places, tokens], table.entropies[places, tokens]


KEYS = ("beta", "loss_type", "scale_rewards", "importance_sampling_level", "normalize_advantages")


class _Alone:
    """An accelerator of one process."""

    device, num_processes, process_index = torch.device("cpu"), 1, 0

    def gather(self, value: Tensor) -> Tensor:
        return value

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        return value


def without(row: Row, *names: str) -> Row:
    return replace(row, parts={name: part for name, part in row.parts.items() if name not in names})
