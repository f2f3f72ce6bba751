"""Writes the results of scripts/bench/run gpu as a table in Markdown."""

from __future__ import annotations

from typing import Any

from shapes import Row
from suite import counts

HEAD = (
    "row", "goal", "tool", "model", "weights", "tokens a step", "tokens/s (least)", "x peft", "% of 4N limit",
    "peak allocated", "reserved", "predicted", "host anonymous", "loss, first to last",
)  # fmt: skip


def make_table(results: dict[str, Any], rows: list[Row]) -> str:
    """The page: the card, its highest speeds, and a line for each row, with its result or the reason why it did not
    run."""
    ceilings = results.get("ceilings", {})
    card = ceilings.get("card", {})
    lines = ["# Measured on one GPU", "", "`scripts/bench/run gpu`; weights are random, rows of random ids.", ""]
    versions = ", ".join(f"{name} {number}" for name, number in card.get("versions", {}).items())
    lines += [f"{card.get('device', 'no card yet')}; Python {card.get('python', '?')}; {versions}.", ""]
    if "tests" in results:
        lines += [f"tests/gpu: {counts(results['tests'])}", ""]
    if "product_flops" in ceilings:
        lines += [
            f"Ceilings: {ceilings['product_flops'] / 1e12:.1f} TFLOP/s ({ceilings['product_side']}^3, bf16), "
            f"{ceilings['copy_bytes'] / 1e12:.2f} TB/s copied on the device, "
            f"{ceilings['host_to_device_bytes'] / 1e9:.1f} GB/s from pinned memory "
            f"({ceilings['host_to_device_pageable_bytes'] / 1e9:.1f} from pageable).",
            "",
        ]
        for name, found in ceilings["real_products"].items():
            shape = f"{found['tokens']} x {found['inputs']} x {found['outputs']}"
            lines.append(f"- {name}, {shape}: {found['flops'] / 1e12:.1f} TFLOP/s")
        lines.append("")
    others = {found["card"]["device"] for found in results["rows"].values() if "card" in found} - {card.get("device")}
    if others:
        lines += [f"Some rows are of another card: {', '.join(sorted(others))}.", ""]
    lines += [_line(HEAD), _line(["---"] * len(HEAD))]
    lines += [_line(_cells(row, results["rows"][row.name])) for row in rows if row.name in results["rows"]]
    return "\n".join(lines) + "\n"


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _cells(row: Row, found: dict[str, Any]) -> list[str]:
    weights = {"none": "bf16", "fp8": "fp8 (approximate)"}.get(row.quantization, row.quantization)
    weights += "" if row.engine == "resident" else f", streamed from {row.engine}"
    weights += f", {row.kernels} kernels" if row.kernels != "none" else ""
    weights += f", capped to {_gib(row.cap_bytes)}" if row.cap_bytes else ""
    first = [row.name, row.goal, row.tool, row.model, weights, f"{row.step_tokens:,}"]
    if "tokens_per_second" not in found:
        return [*first, found["outcome"], *[""] * (len(HEAD) - len(first) - 1)]
    share = found["tokens_per_second"] / found["plan"]["limit_tokens_per_second"]
    rival = found.get("rival_tokens_per_second")
    predicted = found["plan"].get("predicted_bytes", {}).get("total")
    return [
        *first,
        f"{found['tokens_per_second']:,.0f} ({found['tokens_per_second_least']:,.0f})",
        f"{found['tokens_per_second'] / rival:.2f}" if rival else "",
        f"{share:.0%}",
        _gib(found.get("peak_allocated_bytes")),
        _gib(found.get("peak_reserved_bytes")),
        _gib(predicted),
        _gib(found["host_anonymous_bytes"]),
        f"{found['losses'][0]:.4f} to {found['losses'][-1]:.4f}",
    ]


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f} GiB"
