"""Compares the memory that plan predicts for a GPU with the figures that other tools publish, and with this project's
goals: scripts/results/forecast.md. No GPU is needed.

If a tool does not state its settings, they are guessed here, and the table names the guessed settings.
usage: scripts/bench/run published
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

SCRIPTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(SCRIPTS / "gpu"))

import planning  # noqa: E402
from arithmetic import Ceilings  # noqa: E402
from shapes import GIB, NF4, ROWS, Row  # noqa: E402

GB = 10**9
CARD = torch.device("cuda")


@dataclass(frozen=True)
class Published:
    """The bytes that a tool publishes, and the row (a planned run) with which tunekit would do the same."""

    tool: str
    what: str
    published_bytes: float
    row: Row
    guessed: str


def row(model: str, **settings: object) -> Row:
    return Row("published", "forecast", model, **settings)  # type: ignore[arg-type]


TUNE = {"rows": 2, "length": 1024}
SEED = {"rows": 8, "length": 512, "r": 8, "checkpointing": 0}
SMALL = {"rows": 2, "length": 2048, "checkpointing": "every"}
TABLE = [
    Published("torchtune", "8B LoRA, recomputed", 16.2 * GIB, row("llama-3.1-8b", r=8, checkpointing="every", **TUNE),
              "rank 8, all linear, 2 x 1,024"),
    Published("torchtune", "8B LoRA", 30.3 * GIB, row("llama-3.1-8b", r=8, checkpointing=0, **TUNE),
              "rank 8, all linear, 2 x 1,024"),
    Published("torchtune", "8B QLoRA, recomputed", 7.4 * GIB,
              row("llama-3.1-8b", r=8, checkpointing="every", **TUNE, **NF4), "rank 8, all linear, 2 x 1,024"),
    Published("torchtune", "3B LoRA, rank 64", 8.5 * GIB, row("llama-3.2-3b", r=64, checkpointing="every", **TUNE),
              "all linear, 2 x 1,024, recomputed"),
    Published("torchtune", "3B QLoRA, rank 64", 4.6 * GIB,
              row("llama-3.2-3b", r=64, checkpointing="every", **TUNE, **NF4), "all linear, 2 x 1,024, recomputed"),
    Published("peft", "T0_3B LoRA", 14.4 * GB, row("t0-3b", **SEED), "bfloat16, rank 8, all linear, 8 x 512"),
    Published("peft", "bloomz-7b1 LoRA", 32 * GB, row("bloomz-7b1", **SEED), "bfloat16, rank 8, all linear, 8 x 512"),
    Published("peft", "mt0-xxl LoRA", 56 * GB, row("mt0-xxl", **SEED), "bfloat16, rank 8, all linear, 8 x 512"),
    Published("Unsloth", "8B QLoRA", 6 * GB, row("llama-3.1-8b", **SMALL, **NF4), "rank 16, all linear, 2 x 2,048"),
    Published("Unsloth", "8B QLoRA, here with streamed_head", 6 * GB,
              replace(row("llama-3.1-8b", **SMALL, **NF4), streamed_head=True), "rank 16, all linear, 2 x 2,048"),
    Published("Soup 0.77", "8B NF4 streamed", 2.40 * GB,
              row("llama-3.1-8b", **NF4, engine="host", micro_batches=2, length=2048, checkpointing="every"),
              "rank 16, all linear, 2 micro-batches of 1 x 2,048"),
    Published("Soup 0.77", "8B NF4 streamed, here with streamed_head", 2.40 * GB,
              row("llama-3.1-8b", **NF4, engine="host", micro_batches=2, length=2048, checkpointing="every",
                  streamed_head=True), "rank 16, all linear, 2 micro-batches of 1 x 2,048"),
]  # fmt: skip


# GB that a row of scripts/bench/run gpu is to stay within, by its name.
GOALS = {
    "8b-nf4-small-head": 5.5,
    "8b-nf4-small-streamed": 2.0,
    "70b-nf4-streamed": 7.0,
    "t0-3b-streamed": 1.5,
    "bloomz-streamed": 4.0,
    "mt0-xxl-streamed": 4.0,
    "t0-3b-nf4-recomputed": 2.5,
    "bloomz-nf4-recomputed": 6.5,
    "mt0-xxl-nf4-recomputed": 9.5,
}


def goal_lines() -> Iterator[str]:
    """A table of the goals."""
    yield "| row of `scripts/bench/run gpu` | goal | foreseen | weights | streamed head, of a step | tokens, settings |"
    yield "|---|--:|--:|--:|--:|---|"
    rows = {row.name: row for row in ROWS}
    for name, goal in GOALS.items():
        one = rows[name]
        plan = planning.plan_row(one, CARD, Ceilings())
        cost = f"{head_share(one, plan):.1%} at most" if one.streamed_head else ""
        settings = f"{one.micro_batches} x {one.rows} x {one.length:,}, rank {one.r}"
        settings += ", streamed_head" if one.streamed_head else ""
        settings += f", mlp_tile_tokens {one.tile_tokens:,}" if one.tile_tokens else ""
        peak = plan["predicted_bytes"]
        yield (
            f"| {name} | {goal:.1f} GB | {peak['total'] / GB:.2f} GB | {peak['weights'] / GB:.2f} GB | {cost} | "
            f"{settings} |"
        )


def head_share(row: Row, plan: dict[str, Any]) -> float:
    """The cost of a streamed head as a share of a step without it, at half of the card's speed of products: the logits
    are computed once more, and the copies over the bus overlap with nothing."""
    size, ceilings = planning.model_size(row.model, CARD), Ceilings()
    flops = ceilings.product_flops * planning.LIKELY_SHARE
    again = 2.0 * size.head * row.step_tokens * planning.supervised_share(row) / flops
    bus = 2.0 * planning.HEAD_BYTES * size.head * row.micro_batches / ceilings.host_bytes
    return (again + bus) / (plan["flops_per_token"] * row.step_tokens / flops)


def main() -> None:
    """Write both tables."""
    lines = [
        "# What plan foresees beside what is published",
        "",
        "By tunekit's own arithmetic for one NVIDIA GPU (allocated bytes, cuBLAS's workspaces included); nothing here "
        "was measured on a GPU. The published figures are the tools' own; how they were measured is mostly not said, "
        "so that the settings of the last column are guessed. Made by `scripts/bench/run published`.",
        "",
        "| tool | what | published | foreseen | weights | of it | settings guessed |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for one in TABLE:
        layers = planning.meta_base(one.row.model, one.row.quantization, CARD).facts.layers
        recomputed = layers if one.row.checkpointing == "every" else int(one.row.checkpointing)
        peak = planning.simulated_peak(one.row, CARD, recomputed)
        share = peak["total"] / one.published_bytes
        unit, name = (GIB, "GiB") if one.tool == "torchtune" else (GB, "GB")
        lines.append(
            f"| {one.tool} | {one.what} | {one.published_bytes / unit:.1f} {name} | "
            f"{peak['total'] / unit:.1f} {name} | {peak['weights'] / unit:.1f} {name} | {share:.0%} | {one.guessed} |"
        )
        print(lines[-1], flush=True)
    lines += ["", "## Goals", "", "By the same arithmetic; a gigabyte is 10^9 bytes.", ""]
    for line in goal_lines():
        lines.append(line)
        print(line, flush=True)
    (SCRIPTS / "results" / "forecast.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
