"""Writes the page of scripts/gpu/first in Markdown: the measurements on a GPU next to the predictions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from arithmetic import Ceilings
from suite import counts

PREDICTED_PEAK = ("predicted_bytes", "measured_bytes")  # properties of tests that foresee a peak


def make_page(results: dict[str, Any]) -> str:
    """The page, with the sections card, ceilings, memory, speed and tests."""
    calls = results.get("calls", [])
    card = calls[-1] if calls else results.get("ceilings", {}).get("card", {})
    versions = ", ".join(f"{name} {number}" for name, number in card.get("versions", {}).items())
    days = sorted({call["when"][:10] for call in calls})
    lines = [f"# First measurements on {card.get('device', 'a GPU')}", ""]
    lines += [f"`scripts/gpu/first`, {', '.join(days)}; Python {card.get('python', '?')}; {versions}.", ""]
    lines += ["Weights are random, rows have random token ids. Predictions are those of `plan` for this GPU.", ""]
    parts = (_ceilings(results), _memory(results), _speed(results), _tests(results.get("tests", {})))
    return "\n".join([*lines, *(line for part in parts for line in part)])


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = ["| " + " | ".join(cells) + " |" for cells in rows]
    rule = "|" + "---|" * len(head)
    return [f"## {title}", "", "| " + " | ".join(head) + " |", rule, *body, ""] if body else []


def _ceilings(results: dict[str, Any]) -> list[str]:
    measured, assumed = results.get("ceilings", {}), Ceilings()
    if "product_flops" not in measured:
        return [f"The ceilings were not measured: {measured['outcome']}", ""] if measured else []
    side = measured["product_side"]
    shown = [
        (f"products, {side}^3 in bfloat16", assumed.product_flops, measured["product_flops"], 1e12, "TFLOP/s"),
        ("copies on the device", assumed.copy_bytes, measured["copy_bytes"], 1e12, "TB/s"),
        ("pinned memory to the device", assumed.host_bytes, measured["host_to_device_bytes"], 1e9, "GB/s"),
    ]
    rows = [[name, _number(a / unit), f"{_number(m / unit)} {text}"] for name, a, m, unit, text in shown]
    rows += [
        [f"products of {name}, {each['tokens']} x {each['inputs']} x {each['outputs']}", "",
         f"{_number(each['flops'] / 1e12)} TFLOP/s"]
        for name, each in measured["real_products"].items()
    ]  # fmt: skip
    return _table("Ceilings", ("what", "assumed", "measured"), rows)


def _memory(results: dict[str, Any]) -> list[str]:
    rows = []
    for name, result in results["rows"].items():
        predicted = result.get("plan", {}).get("predicted_bytes", {}).get("total")
        if predicted is None and "peak_allocated_bytes" not in result:
            continue
        rows.append([name, *_pair(predicted, result.get("peak_allocated_bytes")),
                     _gib(result.get("peak_reserved_bytes")), _gib(result.get("host_anonymous_bytes"))])  # fmt: skip
    for test, record in results.get("tests", {}).items():
        sizes = [record.get("properties", {}).get(key) for key in PREDICTED_PEAK]
        if all(sizes):
            rows.append([test.rpartition("::")[2], *_pair(*sizes), "", ""])
    head = ("row or test", "predicted peak", "measured peak", "measured / predicted", "reserved", "anonymous, host")
    return _table("Memory", head, rows)


def _speed(results: dict[str, Any]) -> list[str]:
    rows = []
    for name, result in results["rows"].items():
        plan, speed = result.get("plan", {}), result.get("tokens_per_second")
        bound, losses = plan.get("floor_tokens_per_second"), result.get("losses") or []
        rows.append([
            name,
            f"{result['row']['rows'] * result['row']['length'] * result['row']['micro_batches']:,}",
            f"{bound:,.0f}" if bound else "",
            f"{speed:,.0f}" if speed else result["outcome"].replace("|", "/"),
            f"{speed / bound:.0%}" if speed and bound else "",
            f"{plan['break_even_tokens']:,}" if plan else "",
            f"{result['expected_seconds']:.0f} / {result['seconds']:.0f}",
            f"{result['load_seconds']:.0f}" if "load_seconds" in result else "",
            f"{losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)}" if losses else "",
        ])  # fmt: skip
    head = (
        "row", "tokens a step", "tokens/s at most", "tokens/s", "share", "streaming breaks even from, tokens",
        "seconds, expected / taken", "of these, loading", "loss, first to last, steps",
    )  # fmt: skip
    return _table("Speed", head, rows) + _equal_losses(results["rows"])


def _equal_losses(rows: dict[str, Any]) -> list[str]:
    """Whether the streamed row has the losses of the resident row of the same tokens."""
    streamed, resident = (rows.get(f"8b-nf4-{kind}", {}).get("losses") for kind in ("streamed", "resident"))
    if not streamed or not resident:
        return []
    same = sum(a == b for a, b in zip(streamed, resident, strict=False))
    return [f"8b-nf4-streamed and 8b-nf4-resident have equal bits in {same} of {len(resident)} losses.", ""]


def _tests(outcomes: dict[str, dict[str, Any]]) -> list[str]:
    if not outcomes:
        return []
    rows = [
        [test.rpartition("::")[2], record["outcome"], f"{record.get('seconds', 0):.1f}", _line(record["message"])]
        for test, record in outcomes.items()
        if record["outcome"] != "passed"
    ]
    seconds = sum(record.get("seconds", 0.0) for record in outcomes.values())
    title = f"tests/gpu: {counts(outcomes)} in {seconds:.0f} s"
    return _table(title, ("test", "outcome", "seconds", "why"), rows) or [f"## {title}", ""]


def _pair(predicted: float | None, measured: float | None) -> list[str]:
    ratio = f"{measured / predicted:.2f}" if predicted and measured else ""
    return [_gib(predicted), _gib(measured), ratio]


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f} GiB"


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:200]
