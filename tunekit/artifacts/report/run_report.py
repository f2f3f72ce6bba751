"""The report of one run, made from the files of its run folder. The sections about memory, time and rows are in
run_costs.py."""

import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence

from tunekit.artifacts.report.bad_signs import bad_signs
from tunekit.artifacts.report.curves import binned_text, charts_of
from tunekit.artifacts.report.next_step import after_training
from tunekit.artifacts.report.pictures import before_and_after
from tunekit.artifacts.report.plan_page import WEIGHTS
from tunekit.artifacts.report.run_costs import memory, overview, rows, size, speed
from tunekit.artifacts.report.sections import MarkedText, ReportPage, ReportSection, ReportTable, Tone
from tunekit.artifacts.report.tasks import change_table, forgetting, score_table
from tunekit.artifacts.report.values import RunValues, Values
from tunekit.artifacts.run import PICTURES
from tunekit.metrics.classes import columns_of, confusion_table
from tunekit.metrics.retrieval import search_table
from tunekit.metrics.sources import sources_table
from tunekit.recipe.bases.paths import is_like_path, last_name, relative_to
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.recipe.reading.names import facts_of, known_names, settings_class
from tunekit.recipe.reading.paths import code_keys
from tunekit.records import Headline, Panel, skipped_text

MOST_CHARACTERS = 240  # maximum characters of a prompt that is shown with its answers
MOST_EVALUATIONS, MOST_LABELS = 12, 20
CERTIFIED = ("largest", "mean", "perplexity", "torch_perplexity", "greedy_differences", "tokens")
MOST_ENVIRONMENT = 2**20  # characters


def run_report(run: RunValues) -> ReportPage:
    """The report of a run, finished or not."""
    sections = [section for build in SECTIONS for section in build(run)]
    return ReportPage(run.name, _intro(run), sections, *_verdict(run))


def _intro(run: RunValues) -> list[str]:
    plan, model, adapter = run.plan, run.plan.part("model"), run.recipe.part("adapter")
    rank = f" of rank {adapter['r']}" if adapter.get("r") else ""
    quantization, name = model.get("quantization", "none"), str(model.get("name_or_path"))
    base = last_name(name) if is_like_path(name) else name  # a report is shown to others
    weights = "" if quantization == "none" else f", weights in {WEIGHTS.get(str(quantization), quantization)}"
    method = run.recipe.part("objective").get("method")
    objective = "" if method is None else f" Objective: {method}."
    trained, total = plan.count("trainable_parameters"), plan.count("total_parameters")
    targets, done = len(plan.items_of("targets")), len(run.steps)
    modules = f" in {targets:,} modules" if targets else ""
    per_epoch = plan.part("rows").count("steps_per_epoch")
    epochs = f" ({done / per_epoch:.2f} epochs)" if per_epoch else ""
    return [
        f"{adapter.get('method')}{rank} on {base} ({model.get('model_type')}, "
        f"computed in {model.get('dtype')}{weights}) on {plan.get('device')}.{objective}",
        f"{trained:,} of {total:,} parameters ({trained / max(total, 1):.2%}){modules} were trained "
        f"for {done:,} of {plan.count('steps'):,} steps{epochs}. State: {run.state}.{_stopped_rate(run)}",
    ]


def _stopped_rate(run: RunValues) -> str:
    """A sentence about the learning rate at which max_minutes ended the run; empty for other runs."""
    rate = run.steps[-1].number("learning_rate") if run.steps and run.is_stopped_by_time else None
    highest = run.recipe.part("training").number("learning_rate")
    if rate is None or not highest:
        return ""
    share = f"{rate / highest:.0%} of training.learning_rate"
    return f" The last step had the learning rate {rate:.3g}, {share}: the schedule did not end."


def _verdict(run: RunValues) -> tuple[str, Tone]:
    """The sentence with the result, and its tone."""
    before, after = run.report.number("base_eval_loss"), run.report.number("eval_loss")
    if "verdict" in run.report:
        return f"{str(run.report['verdict']).capitalize()}.", "bad"
    if before is None or after is None or run.shows.headline != Headline():  # else the loss means little
        return "", "neutral"
    text = f"Evaluation loss {before:.4g} before training, {after:.4g} with the exported weights."
    return text, "good" if after < before else "neutral"


def _next_steps(run: RunValues) -> Iterator[ReportSection]:
    """The signs that the run went badly, and the next steps that follow from its measurements."""
    if signs := bad_signs(run):
        yield ReportSection("What went badly", warnings=[f"{sign[0].upper()}{sign[1:]}." for sign in signs])
    if steps := after_training(run):
        yield ReportSection("Next step", [f"{step[0].upper()}{step[1:]}." for step in steps])


def _curves(run: RunValues) -> Iterator[ReportSection]:
    """The section with the charts, and with the change of the most important metric over the run."""
    headline, charts = run.shows.headline, charts_of([run])
    first, final = run.report.number(f"first_{headline.name}"), run.report.number(f"final_{headline.name}")
    paragraphs, warnings = [], []
    if first is not None and final is not None:
        means = f"{first:.4g} over the first tenth of the steps, {final:.4g} over the last"
        paragraphs.append(f"{headline.title}: {means}.")
        if len(run.steps) > 2 and (final <= first if headline.rises else final >= first):
            warnings.append(f"{headline.title} did not {'rise' if headline.rises else 'fall'}.")
    if paragraphs or charts:
        yield ReportSection("Over the steps", [*paragraphs, *binned_text([run])], warnings, charts=charts)


def _result(run: RunValues) -> Iterator[ReportSection]:
    """The section with the table of evaluations. It also says which weights were exported."""
    best, exported = run.report.get("best_step"), run.report.get("best_step", run.report.get("final_step"))
    why = "the last step" if best is None else "which had the best evaluation"
    text = [] if exported is None else [f"The exported weights are the weights after step {exported:,}, {why}."]
    if not run.evaluations:
        none = "There are no evaluation rows." if run.report else "Nothing has been evaluated yet."
        yield ReportSection("Result", [none, *text])
        return
    names = sorted(dict.fromkeys(name for each in run.evaluations for name in each.part("eval")), key="loss".__ne__)
    shown = _few(run.evaluations, best)
    lines = [[_step_label(record.count("step"), best), *map(record.part("eval").get, names)] for record in shown]
    marked = next((at for at, record in enumerate(shown) if record["step"] == exported), -1)
    tables, sources = [ReportTable(["evaluation at step", *names], lines, best=marked)], shown[marked].part("sources")
    if sources:
        table = sources_table({name: sources.numbers(name) for name in sources})
        tables.append(ReportTable(*table, f"By source, after step {shown[marked]['step']:,}"))
    tables += _searches(shown, marked)
    yield ReportSection("Result", [*text, *_better_elsewhere(run)], tables=tables)


def _searches(records: Sequence[Values], exported: int) -> Iterator[ReportTable]:
    """The table of searches, if documents were searched: the model before training, BM25, and the exported model."""
    rankings = {name: records[exported].part("search").numbers(name) for name in records[exported].part("search")}
    if not rankings:
        return
    untuned = records[0].part("search").numbers("model") if records[0]["step"] == 0 else {}
    table = search_table(({"before training": untuned} if untuned else {}) | rankings)
    yield ReportTable(*table, f"Searches, after step {records[exported]['step']:,}")


def _better_elsewhere(run: RunValues) -> Iterator[str]:
    """If the exported step was chosen by its loss, a note on each other metric that was better at a different step.
    Metrics that are functions of the loss, such as the perplexity, are left out."""
    if run.recipe.part("evaluation").get("best") != "eval.loss" or "best_step" not in run.report:
        return
    values, of_loss = run.exported.numbers("eval"), facts_of("metrics", "loss").NEEDS
    for name in (name for name in values if name in known_names("metrics")):
        if getattr(facts_of("metrics", name), "NEEDS", ()) == of_loss:
            continue
        measured = [
            (each, record) for record in run.evaluations if (each := record.part("eval").number(name)) is not None
        ]
        choose = max if facts_of("metrics", name).HIGHER_IS_BETTER else min
        best, record = choose(measured, key=lambda pair: pair[0])
        if best != values[name]:
            step = record.count("step")  # the state before training is never exported
            how = f" To export the step with the best {name}, set evaluation.best: eval.{name}." if step else ""
            yield (
                f"This step had the best loss, but {name} was better at step {_step_label(step, None)}: "
                f"{best:.4g} instead of {values[name]:.4g}.{how}"
            )


def _few(records: Sequence[Values], best: object) -> list[Values]:
    """About MOST_EVALUATIONS records: the first, the last, the best, and others at equal distances."""
    stride, last = -(-len(records) // MOST_EVALUATIONS), len(records) - 1
    return [record for at, record in enumerate(records) if at % stride == 0 or at == last or record["step"] == best]


def _step_label(step: int, best: object) -> str:
    return f"{step:,}" + (" (best)" if step == best else " (before training)" if step == 0 else "")


def _labels(run: RunValues) -> Iterator[ReportSection]:
    """The section with a table that has a line for each label. If there are many labels, a table of the worst labels
    comes first. If there are few, the confusion matrix follows."""
    facts = run.report.part("classes")
    if not facts:
        return
    columns = columns_of(facts)
    lines = [[line.get(name) for name in columns] for line in facts.parts("per_class")]
    tables = [ReportTable(columns, lines, "Each label, with the exported weights")]
    if len(lines) > MOST_LABELS and "f1" in columns:
        worst = sorted(facts.parts("per_class"), key=lambda line: line.number("f1") or 0.0)[:MOST_LABELS]
        shown = [[line.get(name) for name in columns] for line in worst]
        tables.insert(0, ReportTable(columns, shown, f"The {len(shown)} labels with the lowest F1"))
    confusion = confusion_table(facts)
    if confusion is not None:
        tables.append(ReportTable(*confusion, "Confusion"))
    yield ReportSection("Labels", tables=tables)


def _pictures(run: RunValues) -> Iterator[ReportSection]:
    """The section with images for the validation prompts, generated before training and with the exported weights."""
    prompts = [str(prompt) for prompt in run.recipe.part("objective").items_of(run.shows.draws)]
    pictures = before_and_after(run.path, prompts, run.exported_step)
    if pictures:
        text = f"All images of a prompt start from the same noise. {PICTURES}/ contains the images of every evaluation."
        yield ReportSection("Images", [text], pictures=pictures)


def _answers(run: RunValues) -> Iterator[ReportSection]:
    """The section with answers to the first evaluation rows, before training and with the exported weights, next to the
    reference."""
    records = [record for record in run.evaluations if record.parts("samples")]
    if not records:
        return
    result = run.exported if run.exported.parts("samples") else records[-1]
    shown = [records[0]] if result is records[0] else [records[0], result]
    head = ["prompt", "the row's answer", *(f"step {record['step']}" for record in shown)]
    lines = [
        [_end_of(str(row[-1]["prompt"])), row[-1]["reference"], *(sample["answer"] for sample in row)]
        for row in zip(*(record.parts("samples") for record in shown), strict=False)
    ]
    yield ReportSection("Answers to the first evaluation rows", tables=[ReportTable(head, lines, has_texts=True)])


MARKER = re.compile(r"<\|[^<>|\s]+\|>")  # a chat template's markers of turns, such as <|im_start|>


def _end_of(prompt: str) -> str:
    """The prompt, or only the end of a long prompt, because the answer continues there."""
    prompt = MARKER.sub("", prompt)
    end = prompt[-MOST_CHARACTERS:]
    return prompt if prompt == end else f"[...] {end.partition(' ')[2] or end}"  # some languages have no blanks


def _panels(run: RunValues) -> Iterator[ReportSection]:
    """The sections that exist only for this objective: examples from the first and from the last step that recorded
    examples."""
    for panel in run.shows.panels:
        records = [record for record in run.steps if record.parts(panel.key)]
        shown = records if len(records) < 2 else [records[0], records[-1]]
        tables = [_panel_table(panel, f"Step {record['step']:,}", record.parts(panel.key)) for record in shown]
        if tables:
            yield ReportSection(panel.title, tables=tables)


def _panel_table(panel: Panel, title: str, examples: Sequence[Values]) -> ReportTable:
    columns = list[tuple[str, str, str]]()  # label, key, and the name in the mapping if the value is a mapping
    for label, key in panel.columns:
        columns += [(name, key, name) for name in examples[0].part(key)] or [(label, key, "")]
    lines = [[each.part(key).get(name) if name else each.get(key) for _, key, name in columns] for each in examples]
    return ReportTable([label for label, _, _ in columns], lines, title, has_texts=True)


def _worst_rows(run: RunValues) -> Iterator[ReportSection]:
    """The section with the evaluation rows that have the highest loss per unit. The trained part of each row is
    marked."""
    rows, units = run.row_losses, run.shows.units
    counts, losses, before = map(rows.column, ("units", "losses", "before"))
    if not rows.parts("worst"):
        return
    head = ["row", units, *(["loss before"] if before else []), "loss", "text (the trained part is marked)"]
    lines = []
    for row in rows.parts("worst"):
        at = row.count("number")
        means = (_mean(values[at], counts[at]) for values in (before, losses) if values)
        text = [
            (MARKER.sub("", str(each[0])), bool(each[1])) for each in row.items_of("text") if isinstance(each, list)
        ]
        lines.append([rows.items_of("rows")[at], counts[at], *means, MarkedText(text)])
    why = (
        f"The rows with the highest mean loss over {units}, of {len(counts):,} rows. Look for wrong labels and formats."
    )
    yield ReportSection("Evaluation rows with the highest loss", [why], tables=[ReportTable(head, lines)])


def _mean(loss: float | None, units: float | None) -> float | None:
    return None if loss is None or units is None else loss / max(units, 1)


def _reactions(run: RunValues) -> Iterator[ReportSection]:
    """The section about checks that changed the course of the run, and about skipped steps."""
    if not run.report:
        return
    skipped, reactions = run.report.count("skipped_steps"), run.report.parts("reactions")
    text = [f"{skipped_text(skipped)}."] if skipped else []
    if not reactions and not skipped:
        text.append("No reactions: all checks at the start passed, and the run followed its plan.")
    lines = [[item["probe"], item["action"], item["step"]] for item in reactions]
    tables = [ReportTable(["check", "what was done", "at step"], lines)] if lines else []
    yield ReportSection("Reactions", text, tables=tables)


def _tasks(run: RunValues) -> Iterator[ReportSection]:
    """The section with lm-eval's scores, for the exported weights and for the base."""
    scores, changes = run.tasks.parts("scores"), run.tasks.parts("changes")
    if scores:
        tables = [ReportTable(*score_table(scores, run.tasks.parts("before")), "Scores of the exported weights")]
        tables += [ReportTable(*change_table(changes), "Changes by tuning, on the same documents")] if changes else []
        yield ReportSection("Tasks", [], forgetting(changes), tables=tables)


def _exports(run: RunValues) -> Iterator[ReportSection]:
    """The section that compares other programs with torch on the exported files: the measured differences, and the
    compared rows."""
    head = ["export", "program", "computed", *(name.replace("_", " ") for name in CERTIFIED)]
    lines = []
    texts = [
        "The log-probabilities (nats) of each program are compared with those of torch in float32, on the same tokens."
    ]
    for export in run.exports:
        certificate = export.part("certificate")
        program = f"{certificate.get('program')} {certificate.get('version')}"
        name = os.path.basename(str(export.get("path")))
        for part, values in certificate.part("parts").items():
            figures = Values(values) if isinstance(values, dict) else Values()
            lines.append([name, program, part, *(figures.number(figure) for figure in CERTIFIED)])
        stated = [str(certificate[key]).rstrip(".") for key in ("rows", "note", "warning") if certificate.get(key)]
        texts.append(f"{name} in {program}: {'. '.join(stated)}.")
    if lines:
        texts = list(dict.fromkeys(texts))  # a repeated export is shown once
        yield ReportSection("Exports, computed by their programs", texts, tables=[ReportTable(head, lines)])


def _use(run: RunValues) -> Iterator[ReportSection]:
    """Commands that use the result."""
    if not run.report:
        return
    place = relative_to(run.path)
    place = shlex.quote(str(run.path) if place.startswith("..") else place)
    method = run.recipe.part("adapter").get("method")
    settings = settings_class("adapters", str(method)) if method in known_names("adapters") else AdapterSettings
    full = getattr(settings, "trains_base", False)
    code = list(code_keys(run.recipe))
    allowed, trusted = (
        " --allow-code" * any(code),
        " model.trust_remote_code=true" * ("model.trust_remote_code" in code),
    )
    rows, prompt = "" if run.evaluations else " --data FILE", "--prompt 'your text'"
    if run.objective.single_score:
        prompt = "--score FILE"
    elif run.objective.medium is not None and not run.shows.draws:
        prompt = "--prompt FILE"
    commands = [f"tunekit eval {place}{allowed}{rows}", f"tunekit generate {place}{trusted} {prompt}"]
    if not full and getattr(settings, "merges", True):
        commands.append(f"tunekit merge {place}/adapter{trusted} --output {place}-merged")
    if run.shows.draws:
        commands.append('# diffusers can load a LoRA in adapter/: pipeline.load_lora_weights("adapter")')
    elif not full:
        commands.append('# PEFT can load adapter/: PeftModel.from_pretrained(base, "adapter")')
    yield ReportSection("Use it", commands=commands)


def _files(run: RunValues) -> Iterator[ReportSection]:
    """The section with the text of the recipe and the environment."""
    shown = {name: value for name, value in run.environment.items() if name != "fingerprint"}
    environment = json.dumps(shown, indent=2, sort_keys=True)[:MOST_ENVIRONMENT] if shown else ""
    files = [("recipe.yaml", run.recipe_text), ("Machine and versions", environment)]
    yield ReportSection("Recipe and environment", files=[(name, text) for name, text in files if text])


RESULTS = (overview, _next_steps, _curves, _result, _labels, _pictures, _answers, _panels, _worst_rows)
SECTIONS = (*RESULTS, _tasks, _exports, memory, speed, rows, size, _reactions, _use, _files)
