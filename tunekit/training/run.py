"""A run and its training loop. Each step runs the engine, clips (`Run._clip`) and checks gradients, updates weights and
records numbers. The run also evaluates, saves and stops when necessary. A rank with fewer rows computes only its own
micro-batches: `_count_units` counts those of all ranks. engine.py acts if memory runs out in a step.

On a GPU, a step's loss and norm are read one step later, so that the host never waits for them. Until then, the device
itself skips a non-finite update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from signal import Signals

import torch
from torch import Tensor

from tunekit.adapters.attach import AttachedAdapter
from tunekit.artifacts.checkpoint import save_checkpoint
from tunekit.artifacts.run import RunFolder
from tunekit.artifacts.stopped import next_commands
from tunekit.artifacts.trackers import Trackers
from tunekit.console.progress import CountProgress, StepProgress
from tunekit.contracts import StepBatches, StepSource
from tunekit.errors import InputError, Problem, Stopped
from tunekit.evaluation.evaluator import Evaluation, Evaluator, queries_of
from tunekit.evaluation.row_losses import RowLosses
from tunekit.evaluation.scores import EvaluationStopped
from tunekit.machine.cpu_times import CpuTimes
from tunekit.machine.devices import Devices
from tunekit.memory.splitting import Splitting
from tunekit.model.router_loss import ROUTER_LOSS
from tunekit.records import EvaluationRecord, JsonObject, Plan, Reaction, StepRecord
from tunekit.targets.export import facts_for_export
from tunekit.training.engine import StepResult, StepView, StepWork, require_gradients
from tunekit.training.optimizers import Optimizer
from tunekit.training.pace import MARK, watch_pace
from tunekit.training.run_files import (
    make_trackers,
    protected_steps,
    remove_records_of_result,
    restore_end,
    tracked_numbers,
    write_pictures,
    write_rows,
)
from tunekit.training.schedules import rate_multiplier
from tunekit.training.session import Planned, Session
from tunekit.training.state import LoopState, add_seconds, checkpoint_facts, checkpoint_tensors
from tunekit.training.step_numbers import StepNumbers, check_finite, means, start_numbers, watch_step
from tunekit.training.streaming import make_engine
from tunekit.training.time_limit import run_end
from tunekit.tuned.model import TunedModel

CLIPPING_EPSILON = 1e-6  # as in torch's clip_grad_norm_
SPLIT = "split in two, which does not change the result"  # a batch that ran out of memory in a forward


@dataclass(eq=False)
class Run:
    """A run: its model, objective, data and state. All ranks call its methods in the same order."""

    session: Session
    plan: Plan  # with the layers that the adapter really adapts
    planned: Planned
    model: TunedModel
    optimizer: Optimizer
    state: LoopState
    fingerprint: JsonObject
    earlier: StepBatches | None = None  # the prepared previous step, if several steps reuse its samples
    pace: list[CpuTimes] = field(default_factory=list)  # of the last steps on a CPU, see pace.py
    pending: StepNumbers | None = None  # of a step whose loss and norm have not been read yet
    settled: float = 0.0  # when the numbers of the last step that was read arrived
    progress: StepProgress | None = None  # while the run is open
    trackers: Trackers | None = None
    ended_by_time: bool = False
    started: float = 0.0  # when the present step began
    counts: tuple[float, ...] = ()  # of the present step on all ranks: tokens, supervised tokens, micro-batches

    def __post_init__(self) -> None:
        recipe, rows, devices = self.session.loaded.recipe, self.planned.rows, self.devices
        self.training, self.evaluation, self.objective = recipe.training, recipe.evaluation, rows.objective
        self.shows = recipe.objective.shows
        self.engine = make_engine(self.model, self.session.console.warn)
        self.steps: StepSource = rows.steps(self.planned.batch_settings, rank=devices.rank, world=devices.world)
        self.splitting = Splitting(partial(self.session.react, self.state), self.state.split_tokens)
        self.evaluator: Evaluator | None = None  # without evaluation rows
        if rows.evaluation is not None:
            self.row_losses = RowLosses(rows.evaluation, rows.objective, self.planned.processor.tokenizer)
            self.evaluator = Evaluator(
                self.model,
                rows.objective,
                devices,
                rows.evaluation,
                queries_of(rows, recipe.evaluation, recipe.evaluation.metrics, recipe.data),
                recipe.evaluation,
                template=rows.template,
                on_split=self.note_split,
                progress=CountProgress(self.session.console),
            )
        numbers = sum(parameter.numel() for parameter in self.adapter.trained().values())
        self.ending = run_end(recipe, rows, numbers)

    def train(self) -> None:
        """Train from the present state to the last step. Raises: NumericsError; Stopped or InputError, after a
        checkpoint was saved."""
        with self.opened():  # progress, trackers, training mode: closed in every case
            if self.start():  # the evaluation before step 1; False: nothing is left to train
                for step in self.steps.after(self.state.step):
                    work = self.begin_step(step)
                    [result] = self.engine.run([work])
                    self.finish_step(work, result)
                    if not self.after_step():  # evaluate, save; False: the run has ended
                        break

    @contextmanager
    def opened(self) -> Iterator[None]:
        """A context manager for everything that a run holds open while it trains. If the data has an error, the steps
        before it are saved first."""
        with ExitStack() as stack:
            self.trackers = stack.enter_context(make_trackers(self.session, self.state.step))
            console, count, budget = self.session.console, self.steps.count, self.plan.budget_bytes
            self.progress = stack.enter_context(StepProgress(console, count, budget_bytes=budget, shows=self.shows))
            stack.enter_context(self.model.training_mode(True))
            try:
                yield
            except InputError as error:
                if not self.session.limit.has_trained:
                    raise
                if self.devices.world > 1:  # another rank may be in the middle of a step
                    raise
                self.settle()
                if self.state.step > self.state.saved_step and self.can_resume:
                    self._save()
                if not self.state.saved_step:
                    raise
                saved = Problem(f"the checkpoint of step {self.state.saved_step} is written", error.resume_advice)
                raise InputError.of([*error.problems, saved]) from error

    def start(self) -> bool:
        """Evaluate before step 1. Returns whether a step is left to train. Raises: Stopped after a stop signal;
        InputError if the time limit leaves no step."""
        state, evaluated, limit = self.state, self.state.evaluated_step, self.session.limit
        restore_end(self.session, state)
        if not limit.earlier:
            state.starts.append({"first_step": state.step + 1, "last_step": state.step, "minutes": 0.0})
        self._evaluate_if_due()  # a signal or an error may have interrupted it before the resume
        if state.evaluated_step > max(evaluated, 0):  # this step's checkpoint lacks the results
            self._save()
        self._stop_if_asked()
        if state.stopped_early or state.step >= self.steps.count:
            return False
        problem = limit.lack(state, self.ending)
        if self.training.max_minutes and (problems := [each for each in self.devices.gather([problem]) if each]):
            if limit.earlier:
                self._end_now()
                return False
            raise InputError.of([self.session.loaded.locate(problems[0])])
        if state.step:
            self.session.in_folder(remove_records_of_result)
        if self.progress is not None:
            self.progress.start(state.step + 1)
        return True

    def begin_step(self, step: StepBatches) -> StepWork:
        """Prepare a step, and count its units on all ranks."""
        self.started = time.monotonic()
        self.session.limit.begin(self.state)
        step = self.prepare_step(step)
        units = self._count_units(step)
        self.optimizer.zero_gradients()
        return replace(
            self._work(step),
            units=units,
            micro_batches=int(self.counts[2]),
            loss_scale=self.state.scale.factor,  # fixed here, so that a second attempt uses the same one
            watches_gradients=self.state.step == self.state.saved_step and not self.adapter.settings.trains_base,
        )

    def finish_step(self, work: StepWork, result: StepResult) -> None:
        """Sum the gradients over ranks, clip and check them, update weights and state, and start to copy the step's
        numbers to the host. Then settle the previous step. Raises: the step's error; NumericsError."""
        result, state = result.checked(), self.state
        if self.computes_on_cpu:
            self.pace.append(result.times)
        self.adapter.after_backward()
        self.devices.sum_in_place(self.optimizer.gradients())
        loss, norm, found_inf = self._clip(self.devices.sum(result.total).sum())
        logged = (*self.objective.loss.logged, *([ROUTER_LOSS] if self.model.router_loss else []))
        named = means(logged, result.metrics, work.units, self.devices)
        if work.watches_gradients:
            require_gradients(self.adapter, result.reached, self.devices)
        values = {"loss": loss, "norm": norm, **named}
        numbers = start_numbers(state.step + 1, work.batches, result.losses, self.counts, values, self.started)
        finite = True
        if not self.reads_later:
            check_finite(numbers, *numbers.read(), self.devices, may_overflow=state.scale.enabled)
            finite = math.isfinite(numbers.read()[1])
        numbers.rate = self.optimizer.step(self.rate(), found_inf)
        state.scale.update(finite, numbers.step)
        self._advance(finite)
        numbers.sent = time.monotonic()
        self.settle()  # the previous step, whose numbers arrived while this one was queued
        self.pending = numbers

    def after_step(self) -> bool:
        """Evaluate and save when due. Returns whether the run continues. Raises: Stopped after a stop signal."""
        state, settings = self.state, self.training
        last = state.step == self.steps.count
        evaluates = self.evaluator is not None and state.step % settings.eval_steps == 0
        if not self.reads_later or last or evaluates or state.step % settings.save_steps == 0:
            self.settle()
        warned = any(MARK in reaction["probe"] for reaction in state.reactions)
        slow = watch_pace(self.pace, state.step, self.devices, adaptive=self.adapts_threads, warned=warned)
        if slow is not None:
            self.session.react(state, slow)
        saved_best = self._evaluate_if_due()
        ended = last or state.stopped_early
        if saved_best or ended or state.step % settings.save_steps == 0:
            self._save()
        self._stop_if_asked()
        return not (ended or self._end_by_time())

    def _end_by_time(self) -> bool:
        """End the run if the time is up. Returns whether it ends."""
        limit = self.session.limit
        if not limit.is_set or not self.can_resume:
            return False
        limit.mark(self.state)
        if self.devices.any(int(limit.is_over(self.state, self.ending))):
            self._end_now()
        return self.ended_by_time

    def _end_now(self) -> None:
        """Save a checkpoint, and evaluate the weights that may be exported. The checkpoint does not contain this
        evaluation, so that a resumed run equals a run that never stopped."""
        self.settle()
        if self.state.step > self.state.saved_step:
            self._save()
        self.ended_by_time = True
        self._evaluate_if_due()
        self._stop_if_asked()

    def _count_units(self, step: StepBatches) -> Tensor:
        """The step's number of loss units, (K,) float64, summed over ranks. The other numbers of the step are kept in
        `counts`."""
        batches = step.batches
        counts = [sum(batch.tokens for batch in batches), sum(batch.supervised for batch in batches), len(batches)]
        units = sum(map(self.objective.loss.units, batches), torch.zeros(1, dtype=torch.float64))
        together = self.devices.sum(torch.cat([torch.tensor(counts, dtype=torch.float64), units]))
        self.counts = tuple(together[:3].tolist())
        return together[3:]

    def settle(self) -> None:
        """Wait for the numbers of the pending step, check them and record them. The step's seconds are counted from the
        arrival of the previous step's numbers, if it was started before. Raises: NumericsError."""
        numbers, state = self.pending, self.state
        if numbers is None:
            return
        self.pending, before = None, max(numbers.started, self.settled)
        self.settled = numbers.arrival(before)
        (loss, norm), seconds = numbers.read(), self.settled - before
        check_finite(numbers, loss, norm, self.devices, may_overflow=state.scale.enabled)
        exported = numbers.step == self.steps.count and self.evaluation.best is None
        for reaction in watch_step(state, numbers, loss, self.shows, self.devices, exported=exported):
            self.session.react(state, reaction)
        add_seconds(state.seconds, numbers.spent(seconds))
        # the report shows samples of the first step, the last step, and steps with an evaluation
        shown = numbers.step in (1, self.steps.count) or numbers.step % self.training.eval_steps == 0
        record = numbers.record(loss, norm, seconds, self.session.peak_bytes(), shown=shown)
        self.record(replace(record, threads=torch.get_num_threads()) if self.adapts_threads else record)

    def prepare_step(self, step: StepBatches) -> StepBatches:
        """The step's micro-batches, prepared by the objective. They are kept if later steps reuse their samples."""
        prepared = self.objective.prepare_step(self.view(step), step, self.earlier)
        self.earlier = prepared if self.objective.loss.updates_per_sampling > 1 else None
        return prepared

    def view(self, step: StepBatches) -> StepView:
        """The parts of the run that the objective and its companions (auxiliary models) may use in a step."""
        rows, gather, work = self.objective.rows, self.devices.gather, self._work(step)
        split = partial(self.note_split, where="while a step was prepared", step=self.state.step + 1)
        return StepView(self.model, rows, gather, on_split=split, engine=self.engine, work=work)

    def _work(self, step: StepBatches) -> StepWork:
        """A step, before its units are known."""
        return StepWork(
            self.model,
            self.objective,
            step,
            torch.ones(1, dtype=torch.float64),
            self.training.seed,
            splitting=self.splitting,
            micro_batches_per_pass=self.plan.choice.pass_micro_batches,
        )

    def try_batch(self, step: StepBatches, *, watches_gradients: bool = False) -> None:
        """Run forward and backward of a prepared dry-run step. The gradient is not cleared. Raises: its error."""
        units = sum(map(self.objective.loss.units, step.batches), torch.zeros(1, dtype=torch.float64))
        work = replace(self._work(step), units=units, watches_gradients=watches_gradients)
        [result] = self.engine.run([work])
        result.checked()
        if watches_gradients:
            require_gradients(self.adapter, result.reached, self.devices)

    def _clip(self, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unscale the gradients and clip them by their norm. Returns the loss, the norm before clipping, and found_inf;
        each has shape ()."""
        if self.state.scale.enabled:
            self.optimizer.scale_gradients(1.0 / self.state.scale.factor)
        norm = self.optimizer.gradient_norm()  # () float32
        found_inf = (~(torch.isfinite(norm) & torch.isfinite(loss))).to(torch.float32)
        if self.training.max_grad_norm is not None:
            factor = (self.training.max_grad_norm / (norm + CLIPPING_EPSILON)).clamp(max=1.0)
            self.optimizer.scale_gradients(factor)
        return loss, norm, found_inf

    def _advance(self, finite: bool) -> None:
        state = self.state
        state.step += 1
        state.updates += int(finite)
        state.tokens += int(self.counts[0])
        state.supervised_tokens += int(self.counts[1])
        if finite:
            self.adapter.after_step(state.step - 1, self.steps.count)

    def _evaluate_if_due(self) -> bool:
        """Evaluate before training, at every multiple of eval_steps and when the run ends. Returns whether this
        evaluation is the best so far, so that a checkpoint must be saved. The evaluation before training is only a
        reference."""
        state, settings = self.state, self.evaluation
        due = state.step % self.training.eval_steps == 0 or state.step == self.steps.count or self.ended_by_time
        due = due if state.step else settings.before_training
        if self.evaluator is None or not due or state.step <= state.evaluated_step:
            return False
        try:
            with state.timed("evaluate"):
                evaluation = self.evaluate(self.evaluator)
        except EvaluationStopped:
            return False
        state.evaluated_step, state.measured_facts = state.step, dict(evaluation.facts)
        values = evaluation.metrics, evaluation.classes, evaluation.samples, evaluation.sources, evaluation.search
        self.record(EvaluationRecord(state.step, *values))
        if self.session.folder is not None:
            write_pictures(self.session.folder, state.step, evaluation)
        better = state.judge(settings, evaluation.metrics)
        if better or settings.best is None or not state.step:
            self.keep_rows(evaluation)
        return better and settings.best is not None

    def evaluate(self, evaluator: Evaluator) -> Evaluation:
        """Run an evaluation. Raises: EvaluationStopped after a stop signal, at a step at which the run can resume."""
        return evaluator.evaluate(lambda: self.session.signals.requested is not None and self.can_resume)

    def record(self, value: StepRecord | EvaluationRecord) -> None:
        """Write a record to metrics.jsonl, the progress line and the trackers. On other ranks, do nothing."""
        if self.session.folder is None or self.progress is None or self.trackers is None:
            return
        self.session.folder.append_metrics(value)
        show = self.progress.update if isinstance(value, StepRecord) else self.progress.evaluation
        show(value)  # type: ignore[arg-type]
        self.trackers.log(tracked_numbers(value), value.step)

    def keep_rows(self, evaluation: Evaluation) -> None:
        """Write the loss of each evaluation row to the run folder."""
        if self.session.folder is not None and evaluation.sums.row_losses:
            folder, ended = self.session.folder, self.ended_by_time
            write_rows(folder, self.row_losses, self.state.step, evaluation, ended_by_time=ended)

    def save(self) -> None:
        """Write a checkpoint on the main rank. An error there is raised on every rank."""

        def write(folder: RunFolder) -> None:
            state = self.state
            state.split_tokens = self.splitting.tokens
            with self.session.signals.critical():
                tensors = checkpoint_tensors(self.optimizer, self.adapter, self.model.reference_state)
                facts = checkpoint_facts(self.optimizer, state, self.fingerprint)
                facts["export"] = facts_for_export(self.adapter, self.objective, state.measured_facts)
                keep, protect = self.training.keep_checkpoints, protected_steps(self.session, state.best_step)
                save_checkpoint(folder, state.step, tensors, facts, keep=keep, protect=protect)

        self.session.in_folder(write)

    def _save(self) -> None:
        state = self.state
        state.saved_step = state.step
        state.note_time(self.session.limit.elapsed)
        with state.timed("save"):
            self.save()

    def _stop_if_asked(self) -> None:
        """If a signal requested a stop, save a checkpoint and end the run. Raises: Stopped."""
        step = self.state.step
        number = self.devices.any(self.session.stop_signal(step))
        if not number or not self.can_resume:
            return
        self.settle()
        if step > self.state.saved_step:
            self._save()
        ended = f"after step {step} of {self.steps.count}" if step else "before the first step"
        run = Path(self.session.loaded.recipe.output.dir)
        how = next_commands(run, alone=self.devices.world == 1) if step else "nothing was trained yet"
        raise Stopped(f"stopped by {Signals(number).name} {ended}", number, how)

    def note_split(self, size: str, where: str = "in an evaluation", step: int | None = None) -> None:
        """Warn and record that memory ran out, once for each size. `step`: if it is not the present one."""
        what = f"{size} ran out of memory {where}"
        self.session.react(self.state, Reaction(what, SPLIT, self.state.step if step is None else step), once=True)

    @property
    def devices(self) -> Devices:
        """The device of this rank, and the other ranks."""
        return self.session.devices

    @property
    def adapter(self) -> AttachedAdapter:
        """The trained adapter."""
        assert self.model.adapter is not None
        return self.model.adapter

    @property
    def can_resume(self) -> bool:
        """Whether a run can resume after this step. Checkpoints do not contain the samples that later steps reuse."""
        return self.state.step % self.objective.loss.updates_per_sampling == 0

    @property
    def reads_later(self) -> bool:
        """Whether a step's loss and norm are read one step later. This is possible if the device itself skips a
        non-finite update."""
        return self.optimizer.gated and not self.state.scale.enabled and self.model.device.type != "cpu"

    @property
    def computes_on_cpu(self) -> bool:
        """Whether the steps are computed on a CPU, by threads of this process."""
        return self.model.device.type == "cpu"

    @property
    def adapts_threads(self) -> bool:
        """Whether the number of threads may fall during the run."""
        return self.computes_on_cpu and self.training.threads == "adaptive"

    def rate(self) -> float:
        """Multiplier of the learning rate of the next update."""
        return rate_multiplier(self.training, self.state.updates, self.steps.count, self.plan.warmup_steps)
