"""Shorthands of structure -> the full form: `model: NAME`, `adapter: lora`, `train: rows.jsonl`, ...

Comes in: a Draft as read.  Goes out: the same Draft with mappings and lists where the sections have them.
"""

from __future__ import annotations

from tunekit.recipe.reading.draft import Draft, KeyPath
from tunekit.recipe.reading.names import known_names
from tunekit.recipe.reading.yaml_reader import read_scalar

NAMED_BY_TEXT = {"model": "name_or_path", "adapter": "method", "objective": "method"}
TRACKERS: KeyPath = ("output", "report_to")
REWARDS: KeyPath = ("objective", "reward")
SOURCE_LISTS: tuple[KeyPath, ...] = (("data", "train"), ("data", "eval"))


def expand_shorthands(draft: Draft) -> None:
    """Write every shorthand out, in place; what is in full form already stays."""
    for section, inner in NAMED_BY_TEXT.items():
        if isinstance(draft.values.get(section), str):
            draft.wrap((section,), inner)
    if isinstance(draft.get(("objective", "teacher")), str):
        draft.wrap(("objective", "teacher"), "name_or_path")
    if draft.get(("adapter", "start")) in known_names("starts"):  # an unknown one is refused as it stands
        draft.wrap(("adapter", "start"), "method")
    tracker = draft.get(TRACKERS)
    if isinstance(tracker, str):
        draft.set(TRACKERS, [] if tracker == "none" else [tracker], draft.place(TRACKERS))
    for key in SOURCE_LISTS:
        _expand_sources(draft, key)
    if isinstance(draft.get(REWARDS), dict):
        draft.wrap(REWARDS, 0)


def _expand_sources(draft: Draft, key: KeyPath) -> None:
    """A path, a mapping, or a list of either -> a list of mappings."""
    value = draft.get(key)
    if key[-1] == "eval" and isinstance(value, str) and not isinstance(read_scalar(value), str):
        return  # "0.05" in quotes is no file name but a mistake, and is refused as it stands
    if isinstance(value, str | dict):
        draft.wrap(key, 0)
    sources = draft.get(key)
    if not isinstance(sources, list):
        return
    for index, source in enumerate(sources):
        if isinstance(source, str):
            draft.wrap((*key, index), "path")
