"""`tunekit doctor`: shows versions, this machine, caches, and the packages that optional features need.

`tunekit doctor MODEL` shows which programs would misread a model folder or could not read it. It can write a copy that
these programs read correctly.
"""

import contextlib
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tunekit.console import Console
from tunekit.data.looking.similar import NEAR_DUPLICATES
from tunekit.errors import InputError, ModelError
from tunekit.files.cache_folder import cache_entries, clear_cache, default_cache_folder
from tunekit.files.durable import free_bytes, json_result
from tunekit.files.work_folder import check_new_folder
from tunekit.machine.devices import make_devices
from tunekit.machine.drivers import gpu_problem, intel_problem
from tunekit.machine.environment import accelerator_names, library_versions, processor_name
from tunekit.machine.memory import available_bytes
from tunekit.machine.signals import StopSignals
from tunekit.machine.versions import describe_package, differing_packages
from tunekit.model.compute import resolve_dtype
from tunekit.model.storage.model_folder import write_portable_copy
from tunekit.model.storage.portable import read_model_files
from tunekit.model.storage.programs import FolderReading, readings
from tunekit.model.storage.source import find_source
from tunekit.recipe.model import ModelSection
from tunekit.records import bytes_text
from tunekit.targets.target import find_target

FEATURES = {  # feature -> (modules that it needs, the command that installs them)
    "near duplicates in tunekit data check": (("rensa",), NEAR_DUPLICATES),
    "tunekit eval --tasks": (("lm_eval",), "pip install 'tunekit[evals]'"),
    "tunekit serve": (("starlette", "uvicorn"), "pip install 'tunekit[serve]'"),
    "response_format and tool_choice in tunekit serve": (("llguidance",), "pip install 'tunekit[serve]'"),
    "objective: speech, audio_classify": (("soundfile", "jiwer"), "pip install 'tunekit[speech]'"),
    "objective: image_classify": (("PIL", "torchvision"), "pip install 'tunekit[images]'"),
    "objective: dreambooth": (("diffusers", "PIL"), "pip install 'tunekit[diffusion]'"),
    "output.report_to: [tensorboard]": (("tensorboard",), "pip install 'tunekit[tensorboard]'"),
    "output.report_to: [wandb]": (("wandb",), "pip install wandb"),
    "output.report_to: [mlflow]": (("mlflow",), "pip install mlflow"),
    "output.report_to: [trackio]": (("trackio",), "pip install trackio"),
    "training.kernels: liger": (("liger_kernel",), "pip install liger-kernel"),
    "training.optimizer: adamw_8bit": (("bitsandbytes",), "pip install bitsandbytes"),
}


def doctor_verb(clear: bool, json_file: str | None) -> None:
    """Print the facts about this machine; with `clear`, empty tunekit's cache. Raises: RunFolderError if a cache entry
    cannot be removed."""
    console, write_result = Console(json_file=json_file), json_result(json_file)
    versions, (values, shown, findings) = library_versions(), machine_facts()
    caches = {str(path): size for path, size in cache_sizes().items()}
    missing = {name: how for name, (modules, how) in FEATURES.items() if not all(map(find_spec, modules))}
    packages = differing_packages() | {name: describe_package(name, version) for name, version in versions.items()}
    rows = [[name, each.tested, each.marked] for name, each in packages.items()]
    console.table(["package", "tested", "installed"], [*rows, ["python", None, platform.python_version()]])
    findings += [f"{each} is too old: {each.advice}" for each in packages.values() if each.is_too_old]
    console.panel("this machine", shown)
    if caches:
        console.table(["cache", "size"], [[path, bytes_text(size)] for path, size in caches.items()])
    console.table(["feature", "installed"], [[name, missing.get(name) or "yes"] for name in FEATURES])
    console.warn(*findings)
    cleared = sum(map(_bytes, cache_entries())) if clear else 0
    if clear:
        clear_cache()
        console.info(f"{default_cache_folder()}: {bytes_text(cleared)} freed; a run recomputes the parts that it needs")
    tested = {name: each.tested for name, each in packages.items() if each.tested}
    result = {
        "versions": versions,
        "tested_versions": tested,
        "machine": values,
        "cache_bytes": caches,
        "missing": missing,
    }
    write_result(result | {"findings": findings, "cleared_bytes": cleared})


def machine_facts() -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The facts of this machine as values, the same facts as texts, and problems that runs on this machine will
    have."""

    devices = make_devices()
    device = devices.device
    devices.close()
    values: dict[str, Any] = {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "accelerators": accelerator_names(),
        "available_bytes": available_bytes(device),
        "free_disk_bytes": free_bytes(Path.cwd()),
        "computes_in": str(resolve_dtype(ModelSection(name_or_path="any"), device)).removeprefix("torch."),
    }
    findings = []
    if values["free_disk_bytes"] < 2**30:
        findings.append(
            f"{bytes_text(values['free_disk_bytes'])} free in this folder: perhaps too little for a run's checkpoints"
        )
    if device.type == "cpu" and find_spec("bitsandbytes") is None:
        findings.append("bitsandbytes is missing, and model.quantization: int8 needs it; pip install bitsandbytes")
    findings += filter(None, (gpu_problem(), intel_problem()))
    shown = {
        "processor": f"{values['cpu']}, {values['cores']} cores",
        "accelerators": ", ".join(values["accelerators"]) or "none; runs use the CPU",
        "memory for a run": bytes_text(values["available_bytes"]),
        "model.dtype: auto": values["computes_in"],
        "free disk, this folder": bytes_text(values["free_disk_bytes"]),
    }
    return values, shown, findings


def model_verb(model: str, fix: str | None, json_file: str | None) -> int:
    """Print how other programs read a model folder. `fix`: write a mended copy to this folder, and print how they read
    the copy. Returns the exit code: 2 if findings remain.

    Raises: InputError if `model` is not a model folder, or if `fix` is not a new one.
    """
    console, write_result = Console(json_file=json_file), json_result(json_file)
    folder = _model_folder(model, weights=fix is not None)
    output = None if fix is None else check_new_folder(Path(fix), [folder], "--fix")
    results = _readings(folder)
    _print_readings(console, folder, results)
    if output is not None:
        with (
            StopSignals(announce=False) as signals,
            signals.at_once("while the copy was written; the partial copy was removed"),
        ):
            write_portable_copy(folder, output)
        results = _readings(output)
        _print_readings(console, output, results)
    elif any(finding.mendable for result in results for finding in result.findings):
        console.info(f"tunekit doctor {shlex.quote(model)} --fix OUT writes a copy that mends this")
    write_result(
        {"model": str(folder), "fixed": output and str(output), "programs": [asdict(each) for each in results]}
    )
    return InputError.exit_code if any(result.findings for result in results) else 0


def _model_folder(model: str, *, weights: bool) -> Path:
    """The folder of a model. Raises: InputError for an adapter, a pipeline or a GGUF file."""
    target = find_target(model, None, [], allow_code=True)  # only files are read
    if target.adapter is not None:
        how = f"merge it first: tunekit merge {shlex.quote(model)} --output MODEL"
        raise InputError(f"{model} is an adapter, and doctor checks model folders", how)
    source = find_source(target.model, weights=weights)
    if source.gguf_file is not None or not (source.folder / "config.json").is_file():
        what = f"{model} has no config.json, so it is not a model folder, which doctor needs"
        raise InputError(what, "name a model's folder")
    return source.folder.resolve()


def _readings(folder: Path) -> list[FolderReading]:
    try:
        return readings(read_model_files(folder))
    except RecursionError as error:
        raise ModelError(
            "is nested too deeply", "restore the original file", file=str(folder / "config.json")
        ) from error


def _print_readings(console: Console, folder: Path, results: Sequence[FolderReading]) -> None:
    """Print a table of the programs, and one line for each finding. The line names all programs that have this
    finding."""
    rows = [[each.program, each.version, each.unsupported or _count_text(len(each.findings))] for each in results]
    console.table(["program", "version", "reading this folder"], rows, title=str(folder))
    programs: dict[tuple[str, bool], list[str]] = {}
    for finding in (finding for each in results for finding in each.findings):
        programs.setdefault((finding.what, finding.mendable), []).append(finding.program)
    for (what, mendable), names in programs.items():
        console.warn(f"{', '.join(names)}: {what}{'' if mendable else ' (--fix cannot mend this)'}")


def _count_text(count: int) -> str:
    return f"{count} {'finding' if count == 1 else 'findings'}" if count else "no finding"


def cache_sizes() -> dict[Path, int]:
    """The sizes in bytes of tunekit's cache and of the Hugging Face cache, if they exist."""
    hub = os.environ.get("HF_HUB_CACHE") or os.path.join(os.environ.get("HF_HOME", "~/.cache/huggingface"), "hub")
    places = [default_cache_folder(), Path(hub).expanduser()]
    return {path: _bytes(path) for path in places if path.is_dir()}


def _bytes(path: Path) -> int:
    """The number of bytes that a file, or all files below a folder, occupy on the disk. Hard links count once; files
    that vanish meanwhile count 0."""
    sizes: dict[tuple[int, int], int] = {}
    for place, _, names in os.walk(path):
        for name in (".", *names):
            with contextlib.suppress(OSError):
                info = os.lstat(os.path.join(place, name))
                sizes[info.st_dev, info.st_ino] = info.st_blocks * 512
    return sum(sizes.values()) or (path.lstat().st_blocks * 512 if path.is_file() else 0)
