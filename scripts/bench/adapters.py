"""Loads adapter folders that other programs wrote, and compares tunekit's logits with theirs.

    scripts/bench/run adapters [--makers NAME,...] [--kinds NAME,...] [--work FOLDER] [--output FOLDER]

Each maker (a program that writes adapters) writes folders with random trained values on tiny random bases, and the
logits that it computes: peft 0.6, 0.10 and 0.15 with transformers 4, peft 0.21, transformers' own add_adapter, and
programs that write single files for diffusion pipelines. tunekit loads each folder like `tunekit eval`. A row of the
result is the largest difference of the logits, or the reason of a refusal. A row that is already in adapters.json is
made again only if --kinds names it.

Older releases of peft are in FOLDER/peft/VERSION of $TUNEKIT_PROGRAMS, next to transformers4 (scripts/certify):
pip install --no-deps --target FOLDER/peft/VERSION peft==VERSION accelerate==1.6.0 psutil
LyCORIS is in FOLDER/lycoris:  pip install --no-deps --target FOLDER/lycoris lycoris-lora==4.1.3 einops toml
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from beside.adapter_cases import KINDS, Kind
from beside.adapter_files import KINDS as FILE_KINDS
from beside.adapter_files import compare_file
from beside.units import Results
from safetensors import safe_open
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tunekit.errors import TunekitError
from tunekit.exports.programs.versions import interpreter, programs_folder
from tunekit.model.call import calling
from tunekit.targets.target import find_target, load_target

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))  # for the tokenizer of the tests
LIMIT = 1e-5
IDS = [[3, 9, 5, 6, 11, 40, 17, 90, 5, 200, 31, 7], [8, 5, 6, 44, 21, 3, 100, 101, 102, 9, 33, 12]]
SIZES: dict[str, Any] = {"vocab_size": 267, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "initializer_range": 0.1}
GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 2}
MAKERS = {  # name -> release of peft, transformers' add_adapter instead of peft
    "peft 0.6.2": ((0, 6), False),
    "peft 0.10.0": ((0, 10), False),
    "peft 0.15.2": ((0, 15), False),
    "peft 0.21.2": ((0, 21), False),
    "transformers 4.57.6": ((0, 15), True),  # with peft 0.15.2
    "transformers 5.24.0": ((0, 21), True),
}
FIELDS = ("base", "config", "fields", "resize", "spread", "pickle")  # of a Kind, for its maker
OF_PEFT = {"transformers 4.57.6": "0.15.2"}  # the release that it imports
FILES = "single files"
HEAD = """# Adapter folders of other programs

Tiny random bases; trained values are random. Each figure is the largest difference between tunekit's logits and the
maker's in float32 (for single files: between outputs of the UNet). Empty: the maker does not know this kind, or cannot
compute it with the installed transformers. transformers 4.57.6 imports peft 0.15.2. transformers 5.24.0 asks for peft
0.22, which is not released; its check was lowered to 0.21.2. Made by `scripts/bench/run adapters`.
"""


def write_bases(folder: Path) -> dict[str, dict[str, Any]]:
    """Write the random bases: name -> folder, class in transformers, and input of all comparisons."""
    from transformers import AutoTokenizer

    from tests.conftest import write_tiny_llama

    words = AutoTokenizer.from_pretrained(write_tiny_llama(folder / "words"))
    end = {"pad_token_id": 2}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 267}
    gpt2 = {"vocab_size": 267, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}
    vit = {"image_size": 16, "patch_size": 4, "num_labels": 3}
    makers = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
        "tied": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=True)),
        "scores": lambda: LlamaForSequenceClassification(LlamaConfig(**GROUPED, num_labels=3, **end)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**gpt2, bos_token_id=0, eos_token_id=2)),
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=4)),
        "t5": lambda: T5ForConditionalGeneration(T5Config(**t5, decoder_start_token_id=0)),
        "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=128, num_labels=3)),
        "vit": lambda: ViTForImageClassification(ViTConfig(**{**SIZES, **vit})),
    }
    classes = {
        "t5": "AutoModelForSeq2SeqLM",
        "vit": "AutoModelForImageClassification",
        **dict.fromkeys(("bert", "scores"), "AutoModelForSequenceClassification"),
    }
    bases = {}
    for name, make in makers.items():
        place = folder / name
        if not (place / "config.json").exists():
            torch.manual_seed(0)
            net = make()
            _move_vectors(net)
            net.save_pretrained(place)
            words.save_pretrained(place)
        inputs: dict[str, Any] = {"input_ids": IDS}
        if name == "t5":
            inputs["decoder_input_ids"] = [row[:7] for row in IDS]
        if name == "vit":
            ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(place)
            inputs = {"pixel_values": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)).tolist()}
        found = classes.get(name, "AutoModelForCausalLM")
        bases[name] = {"folder": str(place), "class": found, "inputs": inputs}
    return bases


def _move_vectors(net: torch.nn.Module) -> None:
    """Change the biases and norms, so that they are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def kinds_of(maker: str) -> dict[str, Kind]:
    """The kinds of adapters that this maker's release supports."""
    release, injected = MAKERS[maker]
    return {
        name: kind
        for name, kind in KINDS.items()
        if kind.since <= release <= kind.until and (kind.injected or not injected)
    }


def python_of(maker: str) -> tuple[Path, dict[str, str]] | None:
    """The Python interpreter of a maker, and its environment variables; None if the maker is not installed."""
    release, _ = MAKERS[maker]
    if release == (0, 21):
        return Path(sys.executable), {}
    version = OF_PEFT.get(maker, maker.split()[1])
    place, python = programs_folder() / "peft" / version, interpreter("transformers4")
    return (python, {"PYTHONPATH": str(place)}) if (place / "peft").is_dir() and python.exists() else None


def make_folders(maker: str, kinds: dict[str, Kind], bases: dict[str, Any], work: Path) -> Path | None:
    """Let the maker write the folders that do not exist yet; returns the folder that contains all of them."""
    found, place = python_of(maker), work / maker.replace(" ", "-")
    if found is None:
        return None
    python, environment = found
    place.mkdir(parents=True, exist_ok=True)
    cases = [{"name": file_name(name), **{key: getattr(kind, key) for key in FIELDS}} for name, kind in kinds.items()]
    used = {kind.base for kind in kinds.values()}
    request = {"injected": MAKERS[maker][1], "bases": {name: bases[name] for name in used}, "cases": cases}
    (place / "request.json").write_text(json.dumps({**request, "folder": str(place)}), "utf-8")
    variables = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", **environment}
    script = Path(__file__).parent / "beside" / "adapter_maker.py"
    subprocess.run([str(python), str(script), str(place / "request.json")], env=variables, check=True)
    return place


def file_name(kind: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in kind)


def our_logits(target: str, base: dict[str, Any]) -> np.ndarray:
    """The logits of a folder (adapter or base) as tunekit loads it, row by row. Raises: TunekitError."""
    named = None if target == base["folder"] else base["folder"]
    model = load_target(find_target(target, named, ["model.dtype=float32"]), torch.device("cpu")).model
    inputs = {name: torch.tensor(values) for name, values in base["inputs"].items()}
    with torch.no_grad(), calling(model.call_for(inputs)):
        return model.own_logits(inputs).float().numpy()


def compare(maker: str, name: str, place: Path, base: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    folder = place / file_name(name)
    unit: dict[str, Any] = {"maker": maker, "kind": name, "largest": None, "refused": "", "failed": ""}
    if not (folder / "logits.npy").exists():
        return {**unit, "not_made": (folder / "error.txt").read_text("utf-8").strip().splitlines()[-1][:300]}
    theirs = np.load(folder / "logits.npy")
    unit["effect"] = float(np.abs(_cut(theirs, base["logits"]) - _cut(base["logits"], theirs)).max())
    try:
        ours = our_logits(str(folder / "adapter"), base)
    except TunekitError as error:
        return {**unit, "refused": reason_of(error)}
    except Exception:
        return {**unit, "failed": traceback.format_exc().strip().splitlines()[-1][:300]}
    lost = theirs.shape[-1] - ours.shape[-1]  # rows of a resized vocabulary that the maker did not save
    if lost and (KINDS[name].resize != lost or saves_rows(folder / "adapter")):
        return {**unit, "failed": f"logits {ours.shape}, the maker's {theirs.shape}"}
    return {**unit, "lost": lost, "largest": float(np.abs(ours - _cut(theirs, ours)).max())}


def reason_of(error: TunekitError) -> str:
    """The first problem of a refusal: key, fault and advice."""
    problem = error.problems[0]
    return f"{problem.key + ': ' if problem.key else ''}{problem.what}; {problem.how}"


def saves_rows(folder: Path) -> bool:
    """Whether the maker wrote embeddings into the folder."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return any(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in file.keys())  # noqa: SIM118


def _cut(values: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The part of `values` that `other` has too: the last positions and the first tokens."""
    if values.ndim == 3:
        values = values[:, -min(values.shape[1], other.shape[1]) :]
    return values[..., : min(values.shape[-1], other.shape[-1])]


def check_bases(bases: dict[str, Any], place: Path) -> None:
    """Check that the maker computes the same logits of the bases as tunekit; the logits are added to `bases`."""
    for name, base in bases.items():
        if (place / f"{name}.npy").exists():
            theirs = np.load(place / f"{name}.npy")
            ours = our_logits(base["folder"], base).reshape(theirs.shape)
            largest = float(np.abs(ours - theirs).max())
            if largest > LIMIT:
                raise SystemExit(f"{place.name}: the base {name} differs by {largest:.1g}")
            base["logits"] = theirs


def verdict(unit: dict[str, Any]) -> str:
    """The verdict on a row: not made, wrong, right or refused."""
    if "not_made" in unit:
        return "not made"
    if unit["refused"]:
        return "refused"
    return "right" if unit["largest"] is not None and unit["largest"] <= LIMIT else "wrong"


def cell_text(unit: dict[str, Any] | None, reasons: dict[str, int]) -> str:
    """The difference, or the number of the refusal's reason."""
    if unit is None or "not_made" in unit:
        return ""
    if unit["refused"]:
        return f"refused ({reasons.setdefault(unit['refused'], len(reasons) + 1)})"
    text = "failed" if unit["largest"] is None else f"{unit['largest']:.0e}"
    return f"{text} (rows lost)" if unit.get("lost") else text


def page(units: dict[str, dict[str, Any]]) -> str:
    """The counts by maker, the table, and the reasons of the refusals."""
    lines, reasons = [HEAD, "| maker | right | refused | wrong |", "|---|--:|--:|--:|"], dict[str, int]()
    verdicts = {name: verdict(unit) for name, unit in units.items() if "not_made" not in unit}
    for maker in (*MAKERS, FILES):
        found = [state for name, state in verdicts.items() if name.startswith(f"{maker}|")]
        lines.append(f"| {maker} | {' | '.join(str(found.count(state)) for state in ('right', 'refused', 'wrong'))} |")
    lines += [
        "",
        f"{len(verdicts)} rows in total.",
        "",
        f"| kind | {' | '.join(MAKERS)} |",
        "|---|" + "--:|" * len(MAKERS),
    ]
    for kind in KINDS:
        row = [cell_text(units.get(f"{maker}|{kind}"), reasons) for maker in MAKERS]
        lines.append(f"| {kind} | {' | '.join(row)} |")
    lines += ["", "| single file for a diffusion pipeline | |", "|---|--:|"]
    lines += [f"| {kind} | {cell_text(units.get(f'{FILES}|{kind}'), reasons)} |" for kind in FILE_KINDS]
    lines += [
        "",
        "rows lost: the maker does not save the new rows of a resized vocabulary; the other logits are compared.",
        "",
    ]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--makers", default="", help=f"of {', '.join(MAKERS)}, {FILES}")
    options.add_argument("--kinds", default="")
    options.add_argument("--work", default=tempfile.gettempdir() + "/tunekit-adapters")
    options.add_argument("--output", default=str(REPOSITORY / "scripts" / "results"))
    chosen = options.parse_args()
    results, work = Results(Path(chosen.output) / "adapters.json"), Path(chosen.work)
    work.mkdir(parents=True, exist_ok=True)
    wanted = set(filter(None, chosen.kinds.split(",")))
    for maker in [name for name in MAKERS if not chosen.makers or name in chosen.makers.split(",")]:
        bases = write_bases(work / "bases")
        kinds = {name: kind for name, kind in kinds_of(maker).items() if not wanted or name in wanted}
        left = {name: kind for name, kind in kinds.items() if wanted or f"{maker}|{name}" not in results.units}
        place = make_folders(maker, left, bases, work) if left else None
        if place is None:
            continue
        check_bases(bases, place)
        for name, kind in left.items():
            unit = compare(maker, name, place, bases[kind.base])
            results.add(f"{maker}|{name}", unit)
            print(
                f"{verdict(unit):9} {maker}: {name}: {unit['largest']} {unit['refused'] or unit['failed']}"
                f"{unit.get('not_made', '')} (effect {unit.get('effect', 0):.2g})",
                flush=True,
            )
    for kind in FILE_KINDS if not chosen.makers or FILES in chosen.makers.split(",") else ():
        if f"{FILES}|{kind}" not in results.units and (programs_folder() / "lycoris").is_dir():
            unit = compare_file(kind, work / "files")
            results.add(f"{FILES}|{kind}", unit)
            print(f"{verdict(unit):9} {FILES}: {kind}: {unit['largest']} {unit['refused']}", flush=True)
    (Path(chosen.output) / "adapters.md").write_text(page(results.units), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
