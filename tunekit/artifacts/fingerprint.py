"""The fingerprint of a run: everything that must be equal so that a resumed run repeats every bit. Also messages about
differences between fingerprints. The number of processes is not included, because results do not depend on it."""

import json
import os
from collections.abc import Collection, Container, Iterator, Mapping

from tunekit.errors import Problem, RunFolderError
from tunekit.recipe.reading.paths import path_mark
from tunekit.recipe.reading.sections import section_class
from tunekit.recipe.training import BITSANDBYTES_OPTIMIZERS

RESULT_VERSIONS = ("tunekit", "torch", "transformers")
# It is raised by every change of tunekit after which a resumed run continues with different numbers.
NUMERICS = 2
RAW_SHARES = 2  # from here on, the share of data.eval is drawn from raw rows; before, from encoded rows
EARLIER_SHARE = "an earlier version of tunekit trained the run, and drew other evaluation rows"
NOT_INSTALLED = "not installed"
MISSING = "(absent)"


def make_fingerprint(
    recipe: Mapping[str, object],
    *,
    data: str,
    base: str,
    versions: Mapping[str, str],
    device: str,
    dtype: str,
    accelerator: str | None = None,
    threads: int,
    code: Mapping[str, str] | None = None,
    packages: Collection[str] = (),
) -> dict[str, object]:
    """Make the fingerprint of a run.

    `recipe`: Recipe.model_dump(mode="json"); `device`: cpu or cuda; `dtype`: in which the base computes; `code`: recipe
    key -> sha256 of a Python file that the run executes, or of the teacher's files; `packages`: those whose kernels the
    base uses on a GPU.
    """
    names = (*RESULT_VERSIONS, "bitsandbytes") if _uses_bitsandbytes(recipe, device) else RESULT_VERSIONS
    kernels = () if device == "cpu" else (*packages, *_kernel_packages(recipe))
    return {
        "recipe": recipe_values(recipe),
        "data": data,
        "base": base,
        **({"code": dict(code)} if code else {}),
        "versions": {name: versions[name] for name in names if name in versions}
        | {name: versions.get(name, NOT_INSTALLED) for name in kernels},
        "numerics": NUMERICS,
        "device": device,
        "dtype": dtype,
        "accelerator": accelerator,
        "threads": threads,
    }


def recipe_values(recipe: Mapping[str, object]) -> dict[str, object]:
    """The recipe's values that a resume must not change, by their dotted keys."""
    owners = {name: section_class(name, values) for name, values in recipe.items()}
    free = [f"{name}.{key}" for name, owner in owners.items() if owner is not None for key in owner.free_keys]
    return dict(sorted(flat_values(recipe, free=free)))


def _uses_bitsandbytes(recipe: Mapping[str, object], device: str) -> bool:
    """Whether the run uses kernels of bitsandbytes. On a CPU, tunekit's own code computes 4-bit weights."""
    quantization = _part(recipe, "model").get("quantization", "none")
    optimizer = _part(recipe, "training").get("optimizer", "adamw")
    kernels = ("int8",) if device == "cpu" else ("int8", "nf4", "fp4")
    return quantization in kernels or optimizer in BITSANDBYTES_OPTIMIZERS


def _kernel_packages(recipe: Mapping[str, object]) -> tuple[str, ...]:
    """The packages whose kernels the recipe requests on a GPU, besides those of bitsandbytes."""
    liger = _part(recipe, "training").get("kernels") == "liger"
    flash = _part(recipe, "model").get("attention") == "flash_attention_2"
    return (*(["liger-kernel"] if liger else []), *(["flash-attn"] if flash else []))


def _part(values: Mapping[str, object], name: str) -> Mapping[str, object]:
    part = values.get(name)
    return part if isinstance(part, Mapping) else {}


def flat_values(value: object, key: str = "", free: Container[str] = ()) -> Iterator[tuple[str, object]]:
    """Yields (dotted key, value) for every plain value in nested mappings and lists. An empty mapping or list counts as
    a value.

    `free`: the dotted keys to leave out.
    """
    if key in free:
        return
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from flat_values(inner, f"{key}.{name}" if key else str(name), free)
    elif isinstance(value, list | tuple) and value:
        for index, inner in enumerate(value):
            yield from flat_values(inner, f"{key}.{index}", free)
    else:
        yield key, list(value) if isinstance(value, tuple) else value


def compare_fingerprints(old: Mapping[str, object], new: Mapping[str, object]) -> list[tuple[str, str]]:
    """(key, description) of every difference that makes a resume impossible; empty if the run can be resumed."""
    if has_earlier_share(old) and not has_earlier_share(new):
        return [("data.eval", EARLIER_SHARE)]
    now = _part(new, "recipe")
    differences = [
        (key, f"was {_shown(was)}, is {_shown(is_)}")
        for key, was, is_ in _changes(old, new, "recipe")
        if not (is_moved_file(key, was, is_, now) or key.endswith(".allow_code"))  # a permission changes no number
        and key != "training.compile"  # it was removed; the plan of an older run states whether layers were compiled
    ]
    if old.get("data") != new.get("data"):
        differences.append(("data", "the training or evaluation rows differ (files, options or tokenizer)"))
    if old.get("base") != new.get("base"):
        differences.append(("model", "the base model's files differ"))
    differences += [(key, "its content is different") for key in changed_files(old, new)]
    differences += [
        (name, f"was version {was}, is {is_}")
        for name, was, is_ in _changes(old, new, "versions")
        if MISSING not in (was, is_) or name in (*RESULT_VERSIONS, "bitsandbytes")  # older runs do not state the others
    ]
    if old.get("device") != new.get("device"):
        differences.append(("device", f"was {old.get('device')}, is {new.get('device')}"))
    elif "dtype" in old and old["dtype"] != new.get("dtype") and not differences:  # older runs do not state it
        text = f"auto is {old['dtype']} on one processor or GPU, but {new.get('dtype')} on the other"
        differences.append(("model.dtype", text))
    return differences


def has_earlier_share(fingerprint: Mapping[str, object]) -> bool:
    """Whether an earlier version drew the evaluation rows, as a share of the training rows."""
    numerics = fingerprint.get("numerics")
    earlier = not isinstance(numerics, int) or numerics < RAW_SHARES
    return earlier and isinstance(_part(fingerprint, "recipe").get("data.eval"), float)


def changed_files(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """The keys whose files (code, models) have changed. --accept-changed can allow these differences, but no others."""
    code = [
        key
        for key, was, _ in _changes(old, new, "code")
        if was != MISSING or not key.endswith(".trust_remote_code")  # older runs do not state it
    ]
    read = [
        key for key, was, is_ in _changes(old, new, "files") if MISSING not in (was, is_)
    ]  # files that both runs have read
    return list(dict.fromkeys([*code, *read]))


def _changes(old: Mapping[str, object], new: Mapping[str, object], part: str) -> Iterator[tuple[str, object, object]]:
    """(key, old value, new value) of every difference in one part of two fingerprints, sorted by key."""
    before, now = _part(old, part), _part(new, part)
    for key in sorted(set(before) | set(now)):
        was, is_ = before.get(key, MISSING), now.get(key, MISSING)
        if was != is_:
            yield key, was, is_


def is_moved_file(key: str, was: object, is_: object, recipe: Mapping[str, object]) -> bool:
    """Whether a difference is only a new path of the same file. The file's content is compared elsewhere: in the
    fingerprint of the data or of the base, or as part of the saved state."""
    if not (isinstance(was, str) and isinstance(is_, str) and os.path.isabs(was) and os.path.isabs(is_)):
        return False
    mark = path_mark(key, recipe)
    return mark is not None and mark.expected != ""


def _shown(value: object) -> str:
    text = MISSING if value == MISSING else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def resume_notes(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """Notes about differences that do not prevent a resume, but may change results: a different model of GPU, or an
    older tunekit that computed some models differently."""
    notes = []
    if old.get("accelerator") != new.get("accelerator"):
        what = f"the checkpoint was made on {old.get('accelerator')}, but this device is {new.get('accelerator')}"
        notes.append(f"{what}: the run continues, but its results may differ in the last digits")
    if not old.get("numerics") and _part(new, "recipe").get("model.quantization", "none") != "none":
        notes.append(
            "an older tunekit started this run: if the base is T5, mT5 or umT5, the layers `wo` were quantized then, "
            "and are dense now, so the results change; to avoid this, start the run again with --overwrite"
        )
    if not old.get("numerics") and new.get("device") != "cpu" and new.get("dtype") == "float32":
        notes.append(
            "an older tunekit started this run: convolutions in float32 were rounded to 10 bits on a GPU, and are "
            "exact now, so the results of a base with convolutions may differ slightly"
        )
    return notes


def require_same(
    old: Mapping[str, object],
    new: Mapping[str, object],
    *,
    lines: Mapping[str, int],
    file: str,
    accepted: Collection[str] = (),
) -> list[str]:
    """Refuse a resume if the recipe, data, base or versions changed. Returns the keys whose changed files the user has
    accepted.

    `accepted`: keys, or sections of keys, from --accept-changed. Raises: RunFolderError with all other differences.
    """
    files = changed_files(old, new)
    allowed = [key for key in files if any(f"{key}.".startswith(f"{name}.") for name in accepted)]
    problems = []
    for key, text in compare_fingerprints(old, new):
        accept = f" (also in files that it loads), accept it with --accept-changed {key}" if key in files else ""
        earlier = text == EARLIER_SHARE
        what, cure = (text, "") if earlier else (f"changed since the run: {text}", f"undo the change{accept}, or ")
        how = f"{cure}start a new run in another output.dir (adapter.init_from starts it from an existing adapter)"
        if key not in allowed:
            place = file if key in lines else None
            problems.append(Problem(what, how, place, lines.get(key), key))
    if problems:
        raise RunFolderError.of(problems)
    return allowed
