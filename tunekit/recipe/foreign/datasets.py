"""Translates LLaMA-Factory's data sets to sources of the recipe. `dataset` contains their names, and dataset_info.json
describes them. An entry without an exact translation is a problem.

Source: LLaMA-Factory's data/README.md.
"""

import json
import os
from pathlib import Path
from typing import Any

from tunekit.errors import Problem
from tunekit.recipe.foreign.values import DATA_ENDINGS, NotExact, mapping_of
from tunekit.recipe.reading.draft import Draft
from tunekit.recipe.reading.suggest import did_you_mean, show

DESCRIPTIONS, FOLDER_KEY = "dataset_info.json", "dataset_dir"
MOST_BYTES = 1 << 24
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"}
SHAREGPT = {"messages": "conversations", "system": "system", "tools": "tools"}
JUDGED = {"chosen": "chosen", "rejected": "rejected", "kto_tag": "kto_tag"}
MEDIA = ("images", "videos", "audios")
_ENTRY_KEYS = ("hf_hub_url", "file_name", "split", "num_samples", "formatting", "ranking", "columns", "tags")
_ELSEWHERE = ("ms_hub_url", "om_hub_url")  # other hubs' copies
_TAGS = {  # messages {from, value} and messages {role, content}
    "sharegpt": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
    "chat": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}
SPOKEN = tuple(_TAGS["chat"])  # the other tags are optional
_TAGS["sharegpt"] |= {"observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"}
_TAGS["chat"] |= {"observation_tag": "tool", "function_tag": "tool_calls", "system_tag": "system"}


def name_sources(draft: Draft) -> None:
    """Replace the names of data sets in `dataset` and `eval_dataset` by sources, in place."""
    folder = draft.get((FOLDER_KEY,))
    for key in ("dataset", "eval_dataset"):
        value = draft.get((key,))
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not texts or all(name.endswith(DATA_ENDINGS) for name in names):
            continue
        place, sources, raw_text = draft.place((key,)), dict[str, dict[str, Any]](), draft.get(("stage",)) == "pt"
        for name in names:  # a lost data set does not cost the others
            try:
                known, path = _descriptions(draft, folder)
                sources[name] = _source(name, known, path, raw_text=raw_text)
            except NotExact as lost:
                draft.problems.append(Problem(lost.what, lost.how, file=place.file, line=place.line, key=key))
        if not sources:
            draft.remove((key,))
            draft.untranslated.add(("data", "train" if key == "dataset" else "eval"))
            continue
        draft.set((key,), list(sources.values()), place)
        shown = ", ".join(f"{name}: {Path(source['path']).name}" for name, source in sources.items())
        draft.rewrites.append(f"{place}: {key} -> {shown} (from {path})")
    if folder is not None:
        place = draft.place((FOLDER_KEY,))
        draft.remove((FOLDER_KEY,))
        draft.rewrites.append(f"{place}: {FOLDER_KEY} -> nothing (the paths of the files are written)")


def _descriptions(draft: Draft, folder: object) -> tuple[dict[str, Any], Path]:
    """The content and the path of dataset_info.json.

    Its folder is relative to the configuration's folder, or else to the working folder. Raises: NotExact if the file
    cannot be read.
    """
    beside = Path(os.path.abspath(draft.file)).parent
    asked = [str(folder)] if folder is not None else [".", "data"]
    places = [base / os.path.expanduser(name) / DESCRIPTIONS for base in (beside, Path.cwd()) for name in asked]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        folders = dict.fromkeys(str(place.parent) for place in places)  # both may be the same
        what = f"names data sets in {DESCRIPTIONS}, which is not in {' or '.join([*folders][:2])}"
        raise NotExact(what, f"write {FOLDER_KEY}: FOLDER OF THAT FILE, or data.train: FILE or hub name")
    try:
        known = json.loads(path.read_bytes()) if path.stat().st_size <= MOST_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise NotExact(f"{path} cannot be read ({error})", "mend the file") from error
    if not isinstance(known, dict):
        raise NotExact(f"{path} is not a mapping of data sets", "mend the file")
    return known, Path(os.path.normpath(path))


def _source(name: str, known: dict[str, Any], path: Path, *, raw_text: bool) -> dict[str, Any]:
    """The source of one data set. `raw_text`: read only the prompt (pre-training). Raises: NotExact."""
    if name.endswith(DATA_ENDINGS):
        return {"path": name}
    entry = known.get(name)
    if not isinstance(entry, dict):
        raise NotExact(
            f"{path} has no data set {show(name)}", did_you_mean(name, list(known), "add the data set to that file")
        )
    lost = [key for key, value in entry.items() if value and key not in (*_ENTRY_KEYS, *_ELSEWHERE)]
    columns, tags = mapping_of(entry, "columns"), mapping_of(entry, "tags")
    lost += [f"columns.{key}" for key in columns if key not in (*ALPACA, *SHAREGPT, *JUDGED)]
    if lost:
        why = "only text is read" if lost[0].split(".")[-1] in MEDIA else "it has no translation"
        raise NotExact(f"{name}: {lost[0]} would be lost: {why}", "write the source under data.train")
    if not (entry.get("hf_hub_url") or entry.get("file_name")):
        raise NotExact(f"{name} names neither a file nor a hub data set", "download the data, and name the file")
    where = entry.get("hf_hub_url") or str(path.parent / str(entry["file_name"]))
    source: dict[str, Any] = {"path": where}
    source |= {ours: entry[key] for key, ours in (("split", "split"), ("num_samples", "max_rows")) if entry.get(key)}
    if raw_text:
        column = columns.get("prompt", "instruction")
        return {**source, "format": "text", **({} if column == "text" else {"columns": {column: "text"}})}
    source["format"], fields = _format(name, entry, tags)
    renamed = {theirs: fields[key] for key, theirs in columns.items() if theirs != fields[key]}
    return {**source, **({"columns": renamed} if renamed else {})}


def _format(name: str, entry: dict[str, Any], tags: dict[str, str]) -> tuple[str, dict[str, str]]:
    """tunekit's format of a data set, and for each key of `columns` the field of this format. Raises: NotExact."""
    kind, columns = entry.get("formatting", "alpaca"), entry.get("columns") or {}
    judged = "preference" if entry.get("ranking") else "unpaired" if columns.get("kto_tag") else None
    if kind == "alpaca":
        return judged or "alpaca", ALPACA | JUDGED | {"tools": "tools"}
    if kind not in ("sharegpt", "openai"):
        raise NotExact(f"{name}: the formatting {show(kind)} has no translation", "write data.train: with a format")
    names = _TAGS["chat" if kind == "openai" else "sharegpt"] | tags
    for ours, usual in _TAGS.items():
        if all(names.get(tag) in (value, _TAGS["sharegpt"].get(tag, value)) for tag, value in usual.items()) and all(
            names[tag] == usual[tag] for tag in SPOKEN
        ):
            messages = {"messages": "messages"} if ours == "chat" and judged is None else {}
            return judged or ours, SHAREGPT | JUDGED | messages
    raise NotExact(f"{name}: no format reads messages with the tags {show(tags)}", "rename the keys of its messages")
