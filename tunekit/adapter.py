"""`tunekit adapter show`: what an adapter folder holds.

Comes in: folders, or runs.  Goes out: tables, JSON files.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from tunekit.adapters.configuration import CONFIG_NAME
from tunekit.adapters.summary import AdapterSummary, summarise_adapter
from tunekit.artifacts.durable import write_json
from tunekit.console import Console
from tunekit.decisions import bytes_text

LISTED = 12  # names printed of a list; a JSON file has them all


def show_verb(adapter: str, json_file: str | None) -> None:
    """Tell what is in the folder. Raises: AdapterError where it cannot be read as an adapter at all."""
    console = Console()
    summary = summarise_adapter(adapter_folder(adapter))
    _show(console, summary)
    if json_file is not None:
        write_json(Path(json_file), asdict(summary))


def adapter_folder(name: str) -> Path:
    """The folder itself, or the result of the run that is named."""
    folder = Path(name).expanduser()
    inner = folder / "adapter"
    return inner if not (folder / CONFIG_NAME).exists() and (inner / CONFIG_NAME).exists() else folder


def _show(console: Console, summary: AdapterSummary) -> None:
    ranks = ", ".join(f"{rank} ({count} layers)" for rank, count in summary.ranks.items())
    facts = {
        "method": f"{summary.method} (peft type {summary.peft_type})",
        "base": summary.base or "not named",
        "revision": summary.revision,
        "fingerprint": summary.fingerprint,
        "ranks": ranks or None,
        "settings": _settings_text(summary) or None,
        "parameters": summary.parameters,
        "file": f"{bytes_text(summary.tensor_bytes)}, {len(summary.tensors)} tensors",
    }
    console.panel(summary.folder, facts)
    rows = [(layer.name, layer.rank, layer.parameters, layer.norm, layer.update_norm) for layer in summary.layers]
    columns = ["layer", "rank", "parameters", "norm of its tensors", "norm of s B A"]
    width = 5 if any(row[4] is not None for row in rows) else 4
    console.table(columns[:width], [row[:width] for row in rows])
    _list(console, "all-zero tensors (as they started, or dead)", summary.dead)
    _list(console, "tensors with NaN or infinity", summary.not_finite)
    for fault in summary.faults:
        console.warn(f"would not be loaded: {fault}")


def _settings_text(summary: AdapterSummary) -> str:
    """Settings that say something."""
    said = {key: value for key, value in summary.settings.items() if value not in (None, [], {}, "")}
    return ", ".join(f"{key} {value}" for key, value in said.items() if key != "method")


def _list(console: Console, title: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        console.info(f"{len(names)} {title}: {', '.join(names[:LISTED])}{more}")
