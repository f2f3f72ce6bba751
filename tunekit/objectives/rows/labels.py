"""Labels from the recipe or from the rows, and objectives whose head has one score per label."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from tunekit.contracts import (
    Answering,
    AnswerLimits,
    Array,
    Labels,
    Model,
    Objective,
    Processor,
    Row,
    RowKind,
    Rows,
    default_labels,
)
from tunekit.errors import DataError, InputError, RecipeError
from tunekit.files.cache_folder import hash_of
from tunekit.formats.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from tunekit.metrics.classes import f1
from tunekit.objectives.losses.labels import LabelLoss
from tunekit.objectives.rows.label_kinds import LABEL_KINDS, LabelSets, Quantities
from tunekit.objectives.rows.pairs import are_pairs
from tunekit.recipe.bases.label_settings import BALANCED, ClassWeights, LabelSettings
from tunekit.recipe.model import HeadedModel, ModelSection

MOST_NOTES = 8  # on single labels
MOST_ALONE = 100  # labels that may have only one row each
NUMBER = r"[-+]?[0-9]{1,18}(\.[0-9]{1,18})?"  # a label that is a number


Settings = TypeVar("Settings", bound=LabelSettings)


def settings_of_head(settings: Settings, facts: Mapping[str, Any]) -> Settings:
    """The settings. If there is a trained head, its problem type replaces the problem type in the recipe."""
    return settings.model_copy(update={key: facts[key] for key in ("problem_type",) if key in facts})


def given_labels(
    settings: LabelSettings, facts: Mapping[str, Any], pad_id: int | None = None, problem_type: str = SINGLE_LABEL
) -> Labels:
    """The labels of a trained head, read from `facts`; without a trained head, the labels in the recipe."""
    names = facts.get("labels") or settings.labels
    return LABEL_KINDS[problem_type](tuple(map(str, names)), tuple(facts.get("head", ())), pad_id)


def never_split(unit: str) -> tuple[tuple[str, str, str]]:
    """The `allowed_options` of rows that are never split. `unit`: the content of a row, such as text."""
    return (
        (
            "excess_length",
            "truncate, drop or error",
            f"a {unit} is not split, because its label may be wrong for a piece of the {unit}",
        ),
    )


def utf8(text: str) -> Array:
    """The text as an array of UTF-8 bytes, to be stored in a row."""
    return np.frombuffer(text.encode(), np.uint8)


def label_of(row: Row) -> str:
    """The label text of a row."""
    return row.parts["label"].tobytes().decode()


def label_objective(
    settings: LabelSettings, rows: RowKind, loss: LabelLoss, processor: Processor | None = None, **facts: object
) -> Objective:
    """Make the objective of rows with labels. `facts`: values to save besides the labels and the problem type."""
    if loss.problem_type not in (None, SINGLE_LABEL):
        facts = {"problem_type": loss.problem_type, **loss.measured_facts, **facts}
    answering = Answering("label", processor=processor)
    counted = "objective.class_weights" if settings.class_weights == BALANCED else None
    objective = Objective(
        settings.method, settings.family, rows, loss, answering, facts={"labels": [], **facts}, counts_rows=counted
    )
    loss = replace(loss, smoothing=settings.label_smoothing)
    return _with_labels(objective, loss, rows.labels.names, rows.fingerprint, settings.class_weights)


def _with_labels(
    objective: Objective,
    loss: LabelLoss,
    names: tuple[str, ...],
    unlabelled: str,
    weights: ClassWeights = None,
    notes: Sequence[str] = (),
    bias: Sequence[float] = (),
) -> Objective:
    """The objective with the labels `names`. `unlabelled`: the fingerprint of the rows without labels. The new
    fingerprint includes the labels, because the labels decide which rows are invalid. `bias`: the bias of a new
    head."""
    labels, loss = replace(objective.rows.labels, names=names), replace(loss, labels=names)
    rows = replace(objective.rows, labels=labels, fingerprint=hash_of([unlabelled, *names]))  # type: ignore[type-var]
    labelled = replace(
        objective,
        rows=rows,
        loss=loss,
        answering=replace(objective.answering, write=partial(_write, rows, loss), labels=names),  # type: ignore[type-var]
        section=partial(headed_section, objective.family, labels, loss, bias=tuple(bias)),
        complete=bool(names),
        facts={**objective.facts, "labels": list(names)},
        notes=tuple(notes),
        learning=None,
    )
    return replace(labelled, learning=partial(_learn, loss, unlabelled, weights))


def headed_section(
    family: str,
    labels: Labels,
    loss: LabelLoss | None,
    model: ModelSection,
    seed: int = 0,
    bias: tuple[float, ...] = (),
) -> ModelSection:
    """The base's model section, extended by a head with one score per label. If the base has a head with these labels,
    this head is kept."""
    new = bool(labels.head) and labels.head != labels.names
    head = {"new_head": new, "labels": labels.names, "head_seed": seed, "head_pad_id": labels.pad_id}
    meaning = {} if loss is None else {"problem_type": loss.problem_type, **loss.measured_facts}
    return HeadedModel.of(model, family=family, head_bias=bias, **meaning, **head)


def _learn(
    loss: LabelLoss, unlabelled: str, weights: ClassWeights, objective: Objective, rows: Sequence[Rows]
) -> Objective:
    """The objective with the labels that occur in the rows, or with the recipe's list of labels. If the base's head has
    the same labels, they are in the order of the head.
    Raises: DataError for fewer than two labels, for one number in two spellings, or for an unlisted label that occurs
    only in evaluation rows from a different file."""
    objective = _with_pairs(objective, rows) if objective.rows.reads_pairs else objective
    kind = objective.rows
    if isinstance(kind.labels, Quantities):
        return _learn_outputs(objective, loss, kind.labels, unlabelled, rows)
    listed, head = kind.labels.names, kind.labels.head
    train, held = ([some[index] for index in range(len(some))] for some in (rows[0], rows[1] if rows[1:] else ()))
    taught = Counter(label for row in train for label in set(kind.labels_of(row)))
    unseen = {label: row for row in reversed(held) for label in kind.labels_of(row) if label not in taught}
    present = {*taught, *unseen}
    _refuse_two_spellings(present, kind, [*train, *held])
    if not listed:
        _refuse_no_classes(taught, kind, train)
    known = replace(kind.labels, names=listed or head)
    same = head if set(head) == set(map(known.head_name, present)) else ()
    if not listed and not same:
        _refuse_unseen(unseen, train)
    names = listed or same or tuple(sorted(present, key=_by_number))
    if not names:
        raise DataError("no row of data.train has a label", "add rows with labels")
    labels_to_learn = names if listed or same else tuple(taught)
    if len(labels_to_learn) < 2 and loss.problem_type != MULTI_LABEL:
        what = f"all training rows have the label '{labels_to_learn[0]}'"
        raise DataError(what, "classification needs two labels or more")
    known = replace(kind.labels, names=names)
    counts, other = Counter[str](), set(map(known.head_name, unseen))
    for label, count in taught.items():
        counts[known.head_name(label)] += count
    words = Counter(label for row in train for label in kind.labels_of(row))
    notes = [*_note_baseline(kind, loss, words, held), *loss.notes]
    notes += [f"the label '{label}' occurs only in the evaluation rows" for label in names if label in other]
    notes += _note_rare([label for label in names if counts[label] == 1])
    if present and not present & set(names) and names == default_labels(len(names)):
        notes.append(
            f"the outputs of the head have no names, so label n is output n of the head ({Labels.text(names)})"
        )
    if head and head == names:
        notes.append(f"the head of the base is kept, with its labels: {Labels.text(names)}")
    if head and head != names:
        notes.append(
            f"the base's head ({Labels.text(head)}) is not used; a new head is trained for {Labels.text(names)}; "
            "to keep the base's head, list its labels in the order of its rows under objective.labels"
        )
    if weights is not None:
        occurring = Counter[str]()
        for label, count in words.items():
            occurring[known.head_name(label)] += count
        loss = replace(loss, weights=_weights_of(weights, known, [occurring[name] for name in names]))
        shown = [f"{name} {weight:.4g}" for name, weight in zip(names, loss.weights, strict=True)]
        notes.append(f"weights of the labels in the training loss: {Labels.text(shown)}")
    odds = [(counts[name] + 0.5) / (len(train) - counts[name] + 0.5) for name in names]
    bias = [math.log(each) for each in odds] if loss.problem_type == MULTI_LABEL else []
    return _with_labels(objective, loss, names, unlabelled, weights, notes, bias)


def _with_pairs(objective: Objective, rows: Sequence[Rows]) -> Objective:
    """The objective after a check whether its rows are pairs of texts. If they are pairs, the facts saved with the
    adapter state this.

    Raises: DataError if only some rows are pairs.
    """
    pairs = are_pairs(some[index] for some in rows for index in range(len(some)))
    facts = {**objective.facts, "pairs": True} if pairs else objective.facts
    return replace(objective, rows=replace(objective.rows, pairs=pairs), facts=facts)  # type: ignore[type-var]


def _learn_outputs(
    objective: Objective, loss: LabelLoss, labels: Quantities, unlabelled: str, rows: Sequence[Rows]
) -> Objective:
    """The objective with a name for each number of a row: from the recipe, else transformers' default names. A note
    states the error of a baseline that always answers the mean.
    Raises: DataError if rows have different counts of numbers."""
    train, *held = ([(label_of(row), row.origin) for row in map(some.__getitem__, range(len(some)))] for some in rows)
    count = labels.refuse_other_counts([*train, *chain(*held)])
    names = labels.names or default_labels(count)
    notes = [f"the head of the base is kept: {Labels.text(names)}"] if labels.head == names else []
    if labels.head and labels.head != names:
        what = f"the base's head ({Labels.text(labels.head)}) is not used, and a new head is trained"
        notes.append(f"{what}; to keep the base's head, list its labels under objective.labels")
    mean = labels.targets(text for text, _ in train).double().mean(dim=0)  # (C,)
    if held:
        squares = (labels.targets(text for text, _ in held[0]).double() - mean).square().mean()
        notes.append(f"always answering the mean of the training rows gives an eval.mse of {float(squares):.4g}")
    return _with_labels(objective, loss, names, unlabelled, None, notes, mean.tolist())


def _refuse_unseen(unseen: Mapping[str, Row], train: Sequence[Row]) -> None:
    """Raises: DataError for a label that occurs only in evaluation rows. Evaluation rows taken from the training files
    are exempt, because they may contain a label's only row."""
    files = {row.origin.rpartition(":")[0] for row in train}
    for label, row in sorted(unseen.items(), key=lambda pair: pair[1].number):
        file, _, line = row.origin.rpartition(":")
        if file not in files:
            how = f"add rows with this label to data.train, remove this row, or list '{label}' under objective.labels"
            raise DataError(f"the label '{label}' is in no row of data.train", how, file=file, line=int(line))


def _note_baseline(kind: RowKind, loss: LabelLoss, taught: Counter[str], held: Sequence[Row]) -> list[str]:
    """A note on a baseline that always answers the most frequent label: its accuracy, or its micro F1 in multi-label
    rows."""
    if not (taught and held):
        return []
    label, there = taught.most_common(1)[0][0], [kind.labels_of(row) for row in held]
    right, labels = sum(each.count(label) for each in there), sum(map(len, there))
    score = f1(right, len(held), labels) if loss.problem_type == MULTI_LABEL else right / labels
    return [f"always answering '{label}', the most frequent label, has an eval.{loss.metrics[1]} of {score:.4g}"]


def _note_rare(labels: Sequence[str]) -> list[str]:
    """Notes on labels with a single training row: one note per label, or one note for all if there are many such
    labels."""
    if len(labels) <= MOST_NOTES:
        return [f"the label '{label}' has only one training row" for label in labels]
    return [f"{len(labels):,} labels have only one training row each ({Labels.text(labels)})"]


def _refuse_no_classes(counts: Mapping[str, int], kind: RowKind, rows: Sequence[Row]) -> None:
    """Raises: DataError if the labels seem to be no names of classes: numbers with a fraction, many labels with one row
    each, or the same labels in all rows (as 0 and 1 in multi-hot rows of two labels)."""
    numbers = [label for label in counts if re.fullmatch(NUMBER, label) and not float(label).is_integer()]
    if numbers:
        what = f"the label {numbers[0]} is a number with a fraction"
        how = (
            f"to learn numbers, write objective.problem_type: {REGRESSION}; if the number names a class, list "
            "objective.labels"
        )
        label = numbers[0]
    elif len(counts) > MOST_ALONE and max(counts.values()) == 1:
        label = next(iter(counts))
        what = f"each of the {len(counts):,} labels occurs in only one row, for example '{label[:60]}'"
        how = (
            f"name the column of labels under data.train[].columns; to learn numbers, write objective.problem_type: "
            f"{REGRESSION}"
        )
    elif isinstance(kind.labels, LabelSets) and len(counts) > 1 and min(counts.values()) == len(rows) > 1:
        label = next(iter(counts))
        what = f"each training row has all labels ({Labels.text(sorted(counts))})"
        how = (
            "write the names of the labels that the row has; multi-hot rows (0 or 1 for every label) are not supported"
        )
    else:
        return
    row = next(row for row in rows if label in kind.labels_of(row))
    file, _, line = row.origin.rpartition(":")
    raise DataError(what, how, file=file, line=int(line))


def _weights_of(written: ClassWeights, labels: Labels, counts: Sequence[int]) -> tuple[float, ...]:
    """The weight of each label: from the recipe, or as in scikit-learn's `balanced`: (number of rows) / (number of
    labels that occur * number of rows with this label).
    Raises: RecipeError for a weight of an unknown label."""
    if isinstance(written, Mapping):
        other = next((label for label in written if label not in labels.head_rows), None)
        if other is not None:
            what = f"'{other}' is not among the labels ({Labels.text(labels.names)})"
            raise RecipeError(what, "use only labels that occur in the data", key="objective.class_weights")
        by_name = {labels.head_name(label): weight for label, weight in written.items()}
        return tuple(by_name.get(name, 1.0) for name in labels.names)
    occurring = sum(map(bool, counts))
    return tuple(sum(counts) / (occurring * count) if count else 1.0 for count in counts)


def _refuse_two_spellings(labels: set[str], kind: RowKind, rows: Sequence[Row]) -> None:
    """Raises: DataError if two labels are the same number (1 and 1.0, or 01), or if some labels are numbers and other
    labels are true or false."""
    spellings, wrong = dict[float, str](), ("", "", "")
    for label in sorted(labels, key=lambda label: (len(label), label)):
        if not re.fullmatch(NUMBER, label):
            continue
        first = spellings.setdefault(float(label), label)
        if first != label:
            wrong = label, f"is the same number as the label '{first}' in other rows", f"write '{first}' in all rows"
    truth = sorted(labels & {"true", "false"})
    if spellings and truth:
        what = f"is a boolean, but the label '{min(spellings.values())}' in other rows is a number"
        wrong = truth[0], what, "write all labels as numbers, or all labels as booleans"
    if wrong[0]:
        row = next(row for row in rows if wrong[0] in kind.labels_of(row))
        file, _, line = row.origin.rpartition(":")
        raise DataError(f"the label '{wrong[0]}' {wrong[1]}", wrong[2], file=file, line=int(line))


def _write(rows: RowKind, loss: LabelLoss, model: Model, prompts: Sequence[Any], limits: AnswerLimits) -> list[str]:
    """The most likely label for each prompt; if words are tagged, all tags separated by blanks.
    Raises: InputError if answers should be sampled."""
    if limits.sampling.temperature:
        what = "a classifier always answers with the most likely label, so nothing is sampled"
        raise InputError(what, "leave --temperature out")
    answers, unlabelled = list[str](), rows.unlabelled(model, prompts)
    for start in range(0, len(unlabelled), limits.batch_size):
        some = unlabelled[start : start + limits.batch_size]
        batch = rows.collate([[row] for row in some])
        texts = iter(loss.answers(loss.scores(model.output(batch.inputs), batch)[0]))
        answers += [" ".join(next(texts) for _ in range(row.supervised)) for row in some]
    return answers


def _by_number(label: str) -> tuple[bool, int, str]:
    """Sort key of a label: whole numbers come first, in numeric order, then names in alphabetical order."""
    number = re.fullmatch("-?[0-9]{1,18}", label)
    return (number is None, int(label) if number else 0, label)
