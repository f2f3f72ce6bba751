"""report.md: what was trained, what came of it, what it cost, and what to do next.

Comes in: facts, plan, the loss of each step.  Goes out: Markdown text.  What was not measured is left out.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunekit.artifacts.report.pictures import before_and_after
from tunekit.artifacts.run import PICTURES
from tunekit.console.text import curve_text, means_of
from tunekit.errors import redact
from tunekit.metrics.classes import COLUMNS, confusion_table
from tunekit.metrics.sources import sources_table
from tunekit.recipe.reading.names import draws_images, known_names, settings_class, sizes_of, units_of
from tunekit.records import Plan, ReportFacts, bytes_text, calibration_text, skipped_text

CURVE_COLUMNS = 60
MOST_LABELS = 20
SPECIAL = "\\`*_{}[]<>#|!~&"
PEAK = (
    "The peak, here, in the plan and in the line of progress, is the most that the run takes: on a GPU what its "
    "tensors are given; on a CPU what the process takes beyond Python and its libraries."
)
PARTS = ("weights", "adapter", "optimizer", "activations", "logits")
SECONDS_ORDER = ("load", "data", "calibrate", "try", "sample", "reward", "train", "evaluate", "save")


def escape(value: object) -> str:
    """Text from a recipe or a file as Markdown shows it: on one line, none of it a command or a secret."""
    flat = " ".join(redact(str(value)).split())
    return "".join(f"\\{letter}" if letter in SPECIAL else letter for letter in flat)


def make_page(
    path: Path, facts: ReportFacts, plan: Plan, losses: Sequence[float], rewards: Sequence[float] = ()
) -> str:
    """The whole page; `rewards`: of what the model sampled, instead of losses."""
    sections = [
        _head(path, facts, plan),
        _result(facts, losses, rewards),
        _pictures(path, facts, plan),
        _memory(facts, plan),
        _speed(facts, units_of(plan.objective), sizes_of(plan.objective)),
        _rows(facts, plan),
        _size(facts, plan),
        _reactions(facts, plan),
        _next(path, plan),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are set to the right."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join([":--", *["--:"] * (len(head) - 1)]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _head(path: Path, facts: ReportFacts, plan: Plan) -> str:
    adapter, model = plan.recipe.get("adapter", {}), plan.model
    rank = f" of rank {adapter['r']}" if adapter.get("r") else ""
    quantized = f", weights in {escape(model.quantization)}" if model.quantization != "none" else ""
    share = facts.trainable_parameters / plan.total_parameters if plan.total_parameters else 0.0
    modules = f" in {len(plan.targets)} modules" if plan.targets else ""
    epochs = f" ({facts.final_step / plan.rows.steps_per_epoch:.2f} epochs)" if plan.rows.steps_per_epoch else ""
    return (
        f"# {escape(path.name)}\n\n"
        f"{escape(adapter.get('method', 'adapter'))}{rank} on **{escape(model.name_or_path)}** "
        f"({escape(model.model_type)}, {plan.total_parameters:,} parameters, "
        f"computed in {escape(model.dtype)}{quantized}). "
        f"{facts.trainable_parameters:,} parameters ({share:.2%}){modules} were trained "
        f"for {facts.final_step:,} steps{epochs} on {escape(plan.device)}."
        + (f" {skipped_text(facts.skipped_steps)}." if facts.skipped_steps else "")
    )


def _result(facts: ReportFacts, losses: Sequence[float], rewards: Sequence[float]) -> str:
    lines = ["## Result", *([f"**{escape(facts.verdict.capitalize())}.**"] if facts.verdict else [])]
    rows = [(entry["step"], entry["eval"]) for entry in facts.evaluations if entry.get("eval")]
    if rows:
        names = sorted({name for _, metrics in rows for name in metrics}, key=lambda name: (name != "loss", name))
        shown = _few(rows, facts.best_step)
        lines.append(
            _table(
                ["evaluation at step", *map(escape, names)],
                [
                    [_step_label(step, rows, facts), *(_number(metrics.get(name)) for name in names)]
                    for step, metrics in shown
                ],
            )
        )
    else:
        lines.append("The result was not compared with its base: there are no evaluation rows (data.eval).")
    last = next((entry for entry in facts.evaluations if entry["step"] == (facts.best_step or facts.final_step)), {})
    if last.get("sources"):
        head, sources = sources_table(last["sources"])
        lines += [
            "By source, of the exported weights:",
            _table(head, [[escape(name), *map(_number, values)] for name, *values in sources]),
        ]
    if facts.classes is not None:
        lines += _classes(facts.classes)
    if facts.first_reward is not None and facts.final_reward is not None:
        flat = len(rewards) > 2 and facts.final_reward <= facts.first_reward
        lines.append(
            f"Mean reward of what the model sampled: {_number(facts.first_reward)} over the first tenth of the steps, "
            f"{_number(facts.final_reward)} over the last.{' **It did not rise.**' if flat else ''}"
        )
    elif facts.first_loss is not None and facts.final_loss is not None:
        flat = len(losses) > 2 and facts.final_loss >= facts.first_loss
        lines.append(
            f"Training loss: {_number(facts.first_loss)} over the first tenth of the steps, "
            f"{_number(facts.final_loss)} over the last.{' **It did not fall.**' if flat else ''}"
        )
    if len(losses) > 2:
        lines.append(f"```\n{curve(rewards or losses)}\n```")
    kept = facts.best_step if facts.best_step is not None else facts.final_step
    why = "the best evaluation" if facts.best_step is not None else "the last"
    lines.append(f"The exported weights are those after **step {kept}**, {why}.")
    return "\n\n".join(lines)


def _pictures(path: Path, facts: ReportFacts, plan: Plan) -> str:
    """What the validation prompts gave before training and with the exported weights."""
    prompts = plan.recipe.get("objective", {}).get("validation_prompts") or ()
    rows = before_and_after(path, prompts, facts.best_step or facts.final_step)
    lines = [
        f"{escape(row['prompt'])}: "
        + ", ".join(f"![{each['title']}]({PICTURES}/{each['path'].name}) {each['title']}" for each in row["shown"])
        for row in rows
    ]
    return "\n\n".join(["## Images", *lines]) if lines else ""


def _classes(facts: dict[str, Any]) -> list[str]:
    """Each label's line, the worst ones where there are many, and the confusion of few."""
    worst = sorted(facts["per_class"], key=lambda line: line["f1"])[:MOST_LABELS]
    shown = [line for line in facts["per_class"] if line in worst]
    which = "Each label" if len(shown) == len(facts["per_class"]) else f"The {len(shown)} labels of lowest F1"
    tables = [_table(COLUMNS, [[_number(line[name]) for name in COLUMNS] for line in shown])]
    confusion = confusion_table(facts)
    if confusion is not None:
        tables.append(_table([*map(escape, confusion[0])], [[*map(_number, line)] for line in confusion[1]]))
    return [f"{which}, of the exported weights:", *tables]


def _few(rows: list[tuple[int, dict[str, Any]]], best: int | None) -> list[tuple[int, dict[str, Any]]]:
    """At most a dozen evaluations: the first, the last, the best, and an even choice of the others."""
    stride = -(-len(rows) // 10)
    return [row for index, row in enumerate(rows) if index % stride == 0 or index == len(rows) - 1 or row[0] == best]


def _step_label(step: int, rows: list[tuple[int, dict[str, Any]]], facts: ReportFacts) -> str:
    if step == facts.best_step:
        return f"{step} (best)"
    return f"{step} (before training)" if step == 0 and step == rows[0][0] else str(step)


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else escape(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def curve(values: Sequence[float]) -> str:
    """Values as bars; the highest and the lowest mean of their shares beside them."""
    means = means_of(values, CURVE_COLUMNS)
    return f"{curve_text(values, CURVE_COLUMNS)}  {max(means):.4g} to {min(means):.4g}"


def _memory(facts: ReportFacts, plan: Plan) -> str:
    parts = [part for part in PARTS if part != "logits" or plan.peak_bytes.logits]  # a denoiser has none
    rows = [[part, bytes_text(getattr(plan.peak_bytes, part))] for part in parts]
    rows.append(["**peak**", f"**{bytes_text(plan.peak_bytes.total)}**"])
    lines = ["## Memory", PEAK, "Predicted before a weight was loaded:", _table(["part", "predicted"], rows)]
    both = sorted(set(facts.predicted_bytes) & set(facts.measured_bytes))
    if both:
        compared = [
            [
                escape(device),
                bytes_text(facts.predicted_bytes[device]),
                bytes_text(facts.measured_bytes[device]),
                _difference(facts.predicted_bytes[device], facts.measured_bytes[device]),
            ]
            for device in both
        ]
        lines.append(_table(["device", "predicted peak", "measured peak", "prediction against measurement"], compared))
    if facts.budget_bytes is not None:
        lines.append(_budget(facts, both))
    peaks = [
        ("asked for by tensors on the device", facts.peak_requested_bytes),
        ("allocated to them: the peak", facts.peak_allocated_bytes),
        ("reserved from the device by PyTorch", facts.peak_reserved_bytes),
        ("the whole process on the host, Python and its libraries included", facts.peak_host_bytes),
    ]
    measured = [[name, bytes_text(value)] for name, value in peaks if value is not None]
    if measured:
        lines.append(_table(["at its highest", "bytes"], measured))
    return "\n\n".join(lines)


def _budget(facts: ReportFacts, devices: Sequence[str]) -> str:
    """Whether the budget was kept, by measurement."""
    budget = facts.budget_bytes or 0
    measured = max((facts.measured_bytes[device] for device in devices), default=0)
    if not measured:
        return f"The budget was {bytes_text(budget)}."
    if measured <= budget:
        return f"The budget of {bytes_text(budget)} was kept: {bytes_text(budget - measured)} of it was left."
    return f"**The budget of {bytes_text(budget)} was exceeded** by {bytes_text(measured - budget)}."


def _difference(predicted: int, measured: int) -> str:
    return f"{(predicted - measured) / measured:+.1%}" if measured else ""


def _speed(facts: ReportFacts, units: str, sizes: str) -> str:
    lines = ["## Speed"]
    rates = [
        (f"{sizes} per second", facts.tokens_per_second),
        (f"{units} per second", facts.supervised_tokens_per_second),
    ]
    measured = [[name, f"{value:,.0f}"] for name, value in rates if value is not None]
    if measured:
        lines.append(_table(["rate", "value"], measured))
        lines.append(
            f"{sizes.capitalize()} are those of the rows, padding never counted; the loss is taken over the {units}. "
            "The time is that spent in optimizer steps; loading, evaluation and saving are not in it."
        )
    seconds = sorted(facts.seconds.items(), key=lambda item: _place(SECONDS_ORDER, item[0]))
    if seconds:
        lines.append(_table(["time for", "seconds"], [[escape(name), f"{value:,.1f}"] for name, value in seconds]))
    if facts.calibration is not None:
        lines.append(escape(calibration_text(facts.calibration).capitalize()) + ".")
    lines.append(f"{facts.tokens:,} {sizes} were seen, with {facts.supervised_tokens:,} {units}.")
    return "\n\n".join(lines)


def _place(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def _rows(facts: ReportFacts, plan: Plan) -> str:
    if not facts.rows:
        return ""
    order = ("read", "trained", "dropped", "truncated")
    rows = sorted(facts.rows.items(), key=lambda item: _place(order, item[0]))
    lines = ["## Rows", _table(["rows", "number"], [[escape(name), f"{count:,}"] for name, count in rows])]
    reasons = sorted(plan.rows.training.dropped_reasons.items())
    if reasons:
        lines.append("Dropped: " + "; ".join(f"{count:,} {escape(reason)}" for reason, count in reasons) + ".")
    if plan.text is not None:
        lines.append(f"Packing: {'on' if plan.rows.packing else 'off'} ({escape(plan.rows.packing_reason)}).")
    return "\n\n".join(lines)


def _size(facts: ReportFacts, plan: Plan) -> str:
    if facts.adapter_bytes is None:
        return ""
    text = f"The result takes {bytes_text(facts.adapter_bytes)} on disk"
    if facts.base_bytes:
        text += f", {facts.adapter_bytes / facts.base_bytes:.2%} of the base's {bytes_text(facts.base_bytes)}"
    return f"## Size\n\n{text}."


def _reactions(facts: ReportFacts, plan: Plan) -> str:
    if not facts.reactions:
        return "## Reactions\n\nNone: every check at the start passed, and the run did what its plan said."
    rows = [[escape(item.probe), escape(item.action), str(item.step)] for item in facts.reactions]
    return "## Reactions\n\n" + _table(["check", "what was done", "at step"], rows)


def _next(path: Path, plan: Plan) -> str:
    place = os.path.relpath(path)
    place = shlex.quote(str(path) if place.startswith("..") else place)
    method = plan.recipe.get("adapter", {}).get("method")
    full = method in known_names("adapters") and getattr(settings_class("adapters", method), "trains_base", False)
    commands = [f"tunekit eval {place}", f"tunekit generate {place} --prompt 'your text'"]
    if not full:
        commands.append(f"tunekit merge {place}/adapter --output {place}/merged")
    fence = "```"
    while any(fence in command for command in commands):
        fence += "`"
    text = f"## Use it\n\n{fence}sh\n" + "\n".join(commands) + f"\n{fence}"
    if draws_images(plan.objective):
        text += '\n\nA LoRA in `adapter/` is diffusers\' too: `pipeline.load_lora_weights("adapter")` loads it.'
    elif not full:
        text += '\n\n`adapter/` is in PEFT\'s format: `PeftModel.from_pretrained(base, "adapter")` loads it too.'
    return text
