"""Checks that combine several keys of the recipe. They run before the model and the data are loaded."""

from collections.abc import Mapping, Sequence

from tunekit.errors import holds_secret
from tunekit.recipe.bases.section import ObjectiveSettings, Section
from tunekit.recipe.data import DataSection, Source
from tunekit.recipe.evaluation import CHOICE_METRICS, EvaluationSection
from tunekit.recipe.reading.draft import Draft, KeyPath, inner_items
from tunekit.recipe.reading.names import (
    facts_of,
    formats_of,
    known_names,
    needs_generation,
    objective_class,
    unmeasurable,
)
from tunekit.recipe.reading.sections import section_class
from tunekit.recipe.reading.suggest import did_you_mean, show
from tunekit.recipe.recipe import DEFAULT_METHOD
from tunekit.recipe.sweep import SweepSection

EITHER_OR = (("max_steps", "epochs"), ("warmup_steps", "warmup_ratio"), ("micro_batch_tokens", "micro_batch_size"))
_ONE_NEEDED = (("epochs", "max_steps"), ("micro_batch_size", "micro_batch_tokens"))
ANSWER_METRIC = "exact_match"
SEED = "training.seed"


def settle_pairs(draft: Draft) -> None:
    """Settle keys that exclude each other, such as epochs and max_steps. If the recipe writes one key, the default of
    the other key is removed. If it writes both, or sets both to null, add a problem."""
    training = draft.values.get("training")
    if not isinstance(training, dict):
        return
    for special, usual in EITHER_OR:
        if training.get(special) is None:
            continue
        if training.get(usual) is None:
            training[usual] = None
            continue
        first, second = sorted([special, usual], key=lambda name: draft.place(("training", name)).line or 1 << 30)
        where = draft.place(("training", first))
        removable = [name for name in (usual, special) if draft.place(("training", name)).line is not None]
        how = f"remove one (~training.{removable[0]} on the command line)" if removable else "remove one"
        draft.add_problem(("training", second), f"excludes training.{first} ({where})", how)
    for usual, special in _ONE_NEEDED:
        if usual in training and training[usual] is None and training.get(special) is None:
            draft.add_problem(("training", usual), f"is empty, and training.{special} too", "write one of them")


def settle_generation(draft: Draft) -> None:
    """Turn evaluation.generate on if a metric compares generated answers, unless the recipe writes false. If generate
    is true without such a metric, add the metric exact_match."""
    evaluation, metrics = draft.values.get("evaluation"), draft.get(("evaluation", "metrics"), ["loss"])
    if not isinstance(evaluation, dict) or not isinstance(metrics, list):
        return
    generated = [name for name in metrics if name in known_names("metrics") and needs_generation(name)]
    if not generated and evaluation.get("generate") is True:
        evaluation["metrics"] = [*metrics, ANSWER_METRIC]  # generated answers without a metric would be wasted
    if generated and "generate" not in evaluation:
        evaluation["generate"] = True
    elif generated and evaluation["generate"] is False:
        how = "set evaluation.generate: true, or remove the metric"
        draft.add_problem(("evaluation", "generate"), f"the metric {generated[0]} needs generated answers", how)


def settle_learning_rate(draft: Draft) -> None:
    """If the recipe has no learning rate, set the published rate of the objective or, if the objective has none, of the
    adapter method. Without a published rate, the default stays."""
    training = draft.values.get("training", {})
    if not isinstance(training, dict) or "learning_rate" in training:
        return
    for section in ("objective", "adapter"):
        owner = section_class(section, draft.values.get(section))
        rate = getattr(owner, "default_learning_rate", None)
        if owner is not None and rate is not None:
            draft.values["training"] = {**training, "learning_rate": rate.value}
            method = owner.model_fields["method"].default
            draft.defaults.append(f"training.learning_rate {rate.value:g}: the default of {method} ({rate.source})")
            return


def check_across(draft: Draft, sections: Mapping[str, Section]) -> None:
    """Check the keys of several sections together. `sections`: the valid sections by name; invalid ones are skipped."""
    data, evaluation = sections.get("data"), sections.get("evaluation")
    objective, written = _objective_class(draft), sections.get("objective")
    known = _method(draft) in known_names("objectives")  # else its name is refused, or it follows from the model
    for name, how in objective.required.items():
        if written is not None and not getattr(written, name):
            draft.add_problem(("objective", name), "is required", how)
    if isinstance(data, DataSection):
        if known:
            _check_rewritten_answers(draft, objective)
        _check_sources(draft, data, formats_of(objective.example) if known else sorted(known_names("formats")))
        if not draft.has(("data", "eval")) and draft.get(("training", "eval_steps")) is not None:
            what = "warning: training.eval_steps has no effect, because there are no evaluation rows"
            draft.defaults.append(f"{what}; write data.eval: a fraction or a file")
        for name in written.needs_evaluation if data.eval is None and isinstance(written, ObjectiveSettings) else ():
            draft.add_problem(("objective", name), "needs evaluation rows", "set data.eval")
    if isinstance(evaluation, EvaluationSection):
        _check_metrics(draft, evaluation)
        if known:
            _check_measurable(draft, evaluation, objective, {} if written is None else written.model_dump())
        for name in ("best", "patience", "corpus"):
            if isinstance(data, DataSection) and data.eval is None and getattr(evaluation, name) is not None:
                draft.add_problem(("evaluation", name), "needs evaluation rows", "set data.eval")
    if isinstance(sweep := sections.get("sweep"), SweepSection):
        _check_sweep(draft, sweep, data, evaluation)


def check_secrets(draft: Draft, value: object = None, key: KeyPath = ()) -> None:
    """Refuse access tokens and passwords, because a run saves its recipe unchanged."""
    value = draft.values if not key else value
    if isinstance(value, str) and holds_secret(value):
        draft.add_problem(key, "looks like a secret, but a run saves its recipe as text", "set HF_TOKEN instead")
    for part, inner in inner_items(value):
        check_secrets(draft, inner, (*key, part))


def _check_rewritten_answers(draft: Draft, objective: type[ObjectiveSettings]) -> None:
    """Check `rewritten_answers: each`, which makes several rows from one conversation. This setting needs an objective
    with one sequence per row, and a loss on all assistant turns but on no other tokens."""
    key, train_on = ("data", "rewritten_answers"), draft.get(("data", "train_on")) or "assistant"
    if draft.get(key) == "each" and not objective.one_sequence:
        draft.add_problem(key, "a row of this objective has at most one answer to train on", "remove it")
    elif draft.get(key) == "each" and train_on != "assistant":
        draft.add_problem(key, f"each needs data.train_on: assistant, not {train_on}", "remove it")
    elif draft.get(key) == "each" and (kept := draft.get(("data", "reasoning"))) in ("train", "mask"):
        draft.add_problem(key, f"data.reasoning: {kept} already trains on every answer of a conversation", "remove it")


def _objective_class(draft: Draft) -> type[ObjectiveSettings]:
    """The settings class of the recipe's objective; if the recipe names no known objective, of the default
    objective."""
    method = _method(draft)
    return objective_class(method if method in known_names("objectives") else DEFAULT_METHOD["objective"])


def _method(draft: Draft) -> object:
    """The name of the recipe's objective, which may be unknown; None if it is not known yet."""
    written = draft.values.get("objective", DEFAULT_METHOD["objective"])
    return written.get("method", DEFAULT_METHOD["objective"]) if isinstance(written, dict) else written


def _check_sources(draft: Draft, data: DataSection, formats: Sequence[str]) -> None:
    evaluation = data.eval if isinstance(data.eval, tuple) else ()
    for name, sources in (("train", data.train), ("eval", evaluation)):
        for index, source in enumerate(sources):
            _check_source(draft, ("data", name, index), source, formats)
    streamed = [index for index, source in enumerate(data.train) if source.streaming]
    if streamed:
        _check_streaming(draft, ("data", "train", streamed[0], "streaming"), data)
    for index, source in enumerate(evaluation):
        if source.streaming:
            draft.add_problem(
                ("data", "eval", index, "streaming"), "evaluation rows cannot be streamed", "use max_rows"
            )
        if source.weight != 1:
            draft.add_problem(("data", "eval", index, "weight"), "every evaluation row counts once", "remove it")


def _check_streaming(draft: Draft, key: KeyPath, data: DataSection) -> None:
    if draft.get(("training", "max_steps")) is None:
        draft.add_problem(key, "a streamed source has no known length", "set training.max_steps")
    if isinstance(data.eval, float):
        what = "a fraction of a streamed source cannot be split off"
        draft.add_problem(("data", "eval"), what, "name an evaluation source")


def _check_source(draft: Draft, key: KeyPath, source: Source, formats: Sequence[str]) -> None:
    if source.max_rows is None and source.draw_seed != Source.model_fields["draw_seed"].default:
        draft.add_problem((*key, "draw_seed"), "has an effect only with max_rows, which is not written", "remove it")
    if source.format != "auto" and source.format not in formats:
        known = source.format in known_names("formats")
        what = "the objective does not learn from the format" if known else "unknown format"
        how = did_you_mean(source.format, ["auto", *formats], "its formats" if known else "known formats")
        draft.add_problem((*key, "format"), f"{what} '{source.format}'", how)
        return
    chosen = formats if source.format == "auto" else (source.format,)
    fields = sorted({field for name in chosen for field in facts_of("formats", name).FIELDS})
    taken: set[str] = set()
    for column, field in source.columns.items():
        if field not in fields:
            how = did_you_mean(field, fields, "its fields are")
            draft.add_problem((*key, "columns", column), f"'{field}' is not a field of the format {source.format}", how)
        elif field in taken:
            draft.add_problem((*key, "columns", column), f"is a second column for the field '{field}'", "keep one")
        taken.add(field)


def _check_metrics(draft: Draft, evaluation: EvaluationSection) -> None:
    """Check the metrics and the choices, whatever the objective."""
    known, chosen = known_names("metrics"), evaluation.choices is not None
    if evaluation.content_free_prompt is not None and not chosen:
        what, how = "there are no choices to calibrate", "write evaluation.choices, or remove it"
        draft.add_problem(("evaluation", "content_free_prompt"), what, how)
    for index, name in enumerate(evaluation.metrics):
        key: KeyPath = ("evaluation", "metrics", index)
        if name not in known:
            draft.add_problem(key, f"unknown metric '{name}'", did_you_mean(name, known, "known metrics"))
        elif name in evaluation.metrics[:index]:
            draft.add_problem(key, f"the metric {name} is listed twice", "keep one")
    _check_best(draft, ("evaluation", "best"), evaluation.best or "eval.loss", evaluation)


def _check_measurable(
    draft: Draft, evaluation: EvaluationSection, objective: type[ObjectiveSettings], settings: Mapping[str, object]
) -> None:
    """Check that the rows and the models of this objective have the metrics."""
    chosen = evaluation.choices is not None
    if chosen and objective.example != "text":
        what = "choices need rows with a prompt and an answer, and this objective has other rows"
        draft.add_problem(("evaluation", "choices"), what, "remove it, or write objective: sft or seq2seq")
    for index, name in enumerate(evaluation.metrics):
        key: KeyPath = ("evaluation", "metrics", index)
        if name not in known_names("metrics") or name in evaluation.metrics[:index]:
            continue
        if needs_generation(name) and not objective.answers:
            what = f"the metric {name} needs text answers, but a model of this objective writes no text"
            draft.add_problem(key, what, "remove it")
        elif wrong := unmeasurable(name, objective, settings, chosen=chosen):
            draft.add_problem(key, *wrong)
    if evaluation.samples and not objective.answers:
        draft.add_problem(("evaluation", "samples"), "a model of this objective writes no text", "remove it")


def _check_best(draft: Draft, key: KeyPath, name: str, evaluation: EvaluationSection) -> None:
    """Check the metric that compares runs or checkpoints. `name`: eval.METRIC."""
    metric, known, chosen = name.removeprefix("eval."), known_names("metrics"), evaluation.choices is not None
    if metric != "loss" and metric not in (*evaluation.metrics, *(CHOICE_METRICS if chosen else ())):
        how = f"add {metric} to evaluation.metrics" if metric in known else did_you_mean(metric, known, "known metrics")
        draft.add_problem(key, f"{metric} is not in evaluation.metrics", how)


def _check_leave_out(draft: Draft, sweep: SweepSection, data: DataSection) -> None:
    key: KeyPath = ("sweep", "leave_out")
    if len(data.train) < 2:
        draft.add_problem(
            key, "data.train has only one source, and a run without it has no rows", "name two sources or more"
        )
    if not isinstance(data.eval, tuple):
        what = "a fraction would select different rows in each trial, so trials could not be compared"
        draft.add_problem(key, what, "name evaluation sources in data.eval")
    if _changes(sweep, "data.train"):
        draft.add_problem(key, "sweep.keys changes data.train too", "remove one of them")


def _changes(sweep: SweepSection, key: str) -> bool:
    """Whether the trials have different values of `key`: sweep.keys has this key, a part of it, or what contains it."""
    return any(f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.") for name in sweep.keys)


def _check_folds(draft: Draft, sweep: SweepSection, data: DataSection) -> None:
    key: KeyPath = ("sweep", "folds")
    if sweep.folds is None:
        if sweep.fold_group is not None:
            draft.add_problem(("sweep", "fold_group"), "there are no folds", "write sweep.folds, or remove it")
        return
    if sweep.leave_out is not None:
        draft.add_problem(key, "sweep.leave_out already selects the rows by source", "remove one of them")
    if _changes(sweep, "data.train") or _changes(sweep, "data.eval"):
        draft.add_problem(key, "sweep.keys changes the rows too", "remove one of them")
    if any(source.streaming for source in data.train):
        draft.add_problem(key, "streamed rows cannot be divided into folds", "write streaming: false, or remove it")


def _changed_loss(draft: Draft, sweep: SweepSection) -> list[str]:
    """The keys of sweep.keys that change what the loss of an evaluation measures."""
    settings = _objective_class(draft)
    others = {f"objective.{key}" for key in (*settings.free_keys, *settings.training_keys)}
    several = {key: values for key, values in sweep.keys.items() if len(values) > 1 and key not in others}
    methods = {str(value.get("method") if isinstance(value, dict) else value) for value in several.get("objective", ())}
    return [key for key in several if key.startswith("objective.") or (key == "objective" and len(methods) > 1)]


def _check_sweep(draft: Draft, sweep: SweepSection, data: Section | None, evaluation: Section | None) -> None:
    if evaluation is not None or "evaluation" not in draft.values:  # otherwise its own problems are reported
        settings = evaluation if isinstance(evaluation, EvaluationSection) else EvaluationSection()
        _check_best(draft, ("sweep", "by"), sweep.by, settings)
    if sweep.has_trials and sweep.folds is None and isinstance(data, DataSection) and data.eval is None:
        draft.add_problem(("sweep", "by"), "trials are compared on evaluation rows", "set data.eval")
    if sweep.by == "eval.loss" and (changed := _changed_loss(draft, sweep)):
        what = f"the loss depends on {changed[0]}, so the losses of these trials cannot be compared"
        draft.add_problem(("sweep", "by"), what, "write another metric of evaluation.metrics")
    if sweep.strategy == "random" and sweep.trials is None:
        draft.add_problem(
            ("sweep", "strategy"), "random needs the number of combinations to draw", "write sweep.trials"
        )
    if sweep.strategy != "random" and sweep.trials is not None:
        draft.add_problem(("sweep", "trials"), "has an effect only with the strategy random", "write strategy: random")
    if sweep.seeds > 1 and SEED in sweep.keys:
        draft.add_problem(("sweep", "seeds"), f"sweep.keys has {SEED} too", "remove one of them")
    if sweep.leave_out is not None and isinstance(data, DataSection):
        _check_leave_out(draft, sweep, data)
    if isinstance(data, DataSection):
        _check_folds(draft, sweep, data)
    for name, values in sweep.keys.items():
        if not values:
            draft.add_problem(("sweep", "keys", name), "has no values", "write a list of values")
        same = next((value for at, value in enumerate(values) if value in values[:at]), None)
        if same is not None:
            draft.add_problem(("sweep", "keys", name), f"{show(same)} is listed twice", "keep one")
        if name.partition(".")[0] in ("output", "sweep"):
            draft.add_problem(("sweep", "keys", name), "cannot differ between the trials", "remove it")
