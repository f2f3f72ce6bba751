"""Exports every kind of adapter in every format, and compares the programs' results with torch's.

    scripts/bench/run exports --tokenizer MODEL [--speech MODEL] [--formats gguf,mlx,...] [--shapes llama,...]
                              [--cases plain,...] [--seed N --cells N] [--minutes N] [--page] [--work FOLDER]
                              [--output FOLDER]
    scripts/bench/run exports --run RUN [--exports F16,Q8_0,Q4_K_M,mlx,vllm]

The bases are random and tiny, with the tokenizer of MODEL (whose pre-tokenizer llama.cpp's converter must know), or the
files of a Whisper; peft writes the adapters. `transformers4` is not a format: transformers 4 reads the merged folder
for the hub. In the formats kohya and diffusers, diffusers reads tiny pipelines: kohya's file, or the run's own file and
merged pipelines. A cell is one `tunekit export`: the largest difference of log-probabilities from torch, or the reason
of a refusal and then the result of the merged model. A finished cell is in exports.json and is never made again.
--cells N: only N cells, drawn with --seed. The cells of programs that are not installed (scripts/certify) are left out.

--run: the exports of a run are evaluated on its evaluation rows. A row is exact if, at each trained position, the most
probable token after the row's earlier tokens is the row's next token. Then the greedy answer equals the row's answer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from beside.units import Results
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSpeechSeq2Seq, AutoTokenizer

from tunekit.arithmetic.merge import logits_of, merge
from tunekit.data.rows import load_rows
from tunekit.errors import InputError, Stopped, TunekitError
from tunekit.export import CERTIFICATE, export_verb
from tunekit.exports.compare import difference
from tunekit.exports.format import Options, load_format
from tunekit.exports.programs import llama_cpp, mlx, transformers4, vllm
from tunekit.exports.programs.answer import NextTokens
from tunekit.exports.programs.program import find_program
from tunekit.exports.questions import make_questions
from tunekit.targets.exportable import make_exportable
from tunekit.targets.target import find_target, load_target

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))  # for the tiny pipelines of the tests
SIZE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZE, "num_key_value_heads": 2, "max_position_embeddings": 512}
WHISPER = {
    **{f"{part}_{size}": value for part in ("encoder", "decoder") for size, value in (("layers", 2), ("ffn_dim", 256))},
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "d_model": 64,
}
SHAPES: dict[str, tuple[str, dict[str, Any], str, str]] = {  # model type, sizes, an attention layer, the embedding
    "llama": ("llama", GROUPED, "q_proj", "embed_tokens"),
    "qwen2": ("qwen2", {**GROUPED, "tie_word_embeddings": True}, "q_proj", "embed_tokens"),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 64}, "q_proj", "embed_tokens"),
    "gemma3": (
        "gemma3_text",
        {**GROUPED, "head_dim": 64, "sliding_window": 64, "query_pre_attn_scalar": 64, "num_hidden_layers": 6},
        "q_proj",
        "embed_tokens",
    ),
    "phi3": ("phi3", GROUPED, "qkv_proj", "embed_tokens"),
    "gpt2": ("gpt2", {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 512}, "c_attn", "wte"),
    "whisper": ("whisper", WHISPER, "q_proj", "embed_tokens"),
}
SPEECH_FORMATS, IMAGE_FORMATS = ("ctranslate2", "whispercpp"), ("kohya", "diffusers")
IMAGE_SHAPES = ("sd", "sdxl", "sd3")
IMAGE_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 7}},
    "dora": {"method": "dora"},
    "merged": {},
}
CASES = (
    *("plain", "rslora", "patterns", "dora", "pissa", "embedding", "lm_head", "modules_to_save", "ia3"),
    *("merged", "Q8_0", "Q4_K_M"),
)
ASKED = {"torch": None, "mlx": mlx.answers, "vllm": vllm.answers}  # every other export is a type of GGUF
AT_ONCE = 8  # rows, whose log-probabilities are all in memory
HEAD = """# Exports, read back by their programs

Tiny random bases; adapters written by peft, with a large effect. Each figure is the largest difference of a program's
log-probabilities (nats) from torch's in float32, on at most {tokens} tokens. In kohya and diffusers it is that of the
denoiser's output. "merged": the format or the program cannot hold the adapter, so that the export is a merged model,
and says why. Made by `scripts/bench/run exports`.
"""


def fits(form: str, shape: str, case: str) -> bool:
    """Whether there is such a cell."""
    if shape in IMAGE_SHAPES or form in IMAGE_FORMATS:
        known = shape in IMAGE_SHAPES and case in IMAGE_CASES and form in IMAGE_FORMATS
        return known and (form == "diffusers" or case != "merged")
    if shape == "whisper" or form == "whispercpp":
        return shape == "whisper" and form in SPEECH_FORMATS and case not in ("lm_head", "Q8_0", "Q4_K_M")
    return form == "gguf" or case not in ("Q8_0", "Q4_K_M")


def write_base(shape: str, source: Path, folder: Path) -> None:
    """Write a random base with uneven probabilities. `source`: the folder of the tokenizer, or of Whisper's files."""
    kind, sizes, _, _ = SHAPES[shape]
    torch.manual_seed(0)
    if shape == "whisper":
        config = AutoConfig.from_pretrained(source, **sizes, dtype=torch.float32)
        net = AutoModelForSpeechSeq2Seq.from_config(config)
    else:
        words = AutoTokenizer.from_pretrained(source)
        end = words.eos_token_id
        ids = {"bos_token_id": words.bos_token_id, "eos_token_id": end, "pad_token_id": end}
        net = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=len(words), **sizes, **ids))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    net.save_pretrained(folder)
    if shape != "whisper":
        words.save_pretrained(folder)
        return
    for file in source.glob("*.json"):
        if file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copyfile(file, folder / file.name)


def adapter_config(case: str, shape: str) -> PeftConfig:
    """peft's configuration of a case."""
    _, _, attention, embedding = SHAPES[shape]
    task = None if shape == "whisper" else "CAUSAL_LM"
    lora: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": task}
    changes: dict[str, dict[str, Any]] = {
        "rslora": {"use_rslora": True},
        "patterns": {"rank_pattern": {attention: 4}, "alpha_pattern": {attention: 32}},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa"},
        "embedding": {"target_modules": [attention, embedding]},
        "lm_head": {"target_modules": [attention, "lm_head"]},
        "modules_to_save": {"modules_to_save": [embedding]},
    }
    if case == "ia3":
        return IA3Config(target_modules=[attention], feedforward_modules=[], task_type=task)
    return LoraConfig(**{**lora, **changes.get(case, {})})


def write_adapter(case: str, shape: str, base: Path, folder: Path) -> None:
    """Write an adapter with random values, like the values after training."""
    kind = AutoModelForSpeechSeq2Seq if shape == "whisper" else AutoModelForCausalLM
    model = get_peft_model(kind.from_pretrained(base), adapter_config(case, shape))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn_like(parameter) * (0.1 if "modules_to_save" not in name else 0.02))
    model.save_pretrained(folder)


def run_cell(target: Path, form: str, case: str, place: Path) -> dict[str, Any]:
    """Export and certify. If the format refuses the adapter, export a merged model, and keep the reason."""
    quantized, format = case in ("Q8_0", "Q4_K_M"), load_format("hub" if form == "transformers4" else form)
    attempts = [Options(merged="merged" in format.OPTIONS, type=case if quantized else None)]
    if case != "merged" and not quantized and form != "transformers4":
        attempts = [*dict.fromkeys([Options(), *attempts])]
    refused = ""
    for options in attempts:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        output = place / f"model{format.SUFFIX}"
        try:
            if form == "transformers4":
                return transformers4_cell(target, output)
            export_verb(str(target), form, str(output), None, options, certify=True)
        except Stopped:
            raise
        except TunekitError as error:
            refused = refused or reason_of(error, place)
            continue
        file = output / CERTIFICATE if output.is_dir() else Path(f"{output}.{CERTIFICATE}")
        facts = json.loads(file.read_text("utf-8"))
        answer = facts["certificate"]
        program = f"{answer['program']} {answer['version']}"
        return {"refused": refused, "what": facts["what"], "parts": answer["parts"], "program": program}
    return {"refused": refused, "what": None, "parts": {}, "program": ""}


def reason_of(error: TunekitError, place: Path) -> str:
    """The first problem of a refusal, without paths of this machine."""
    problem = error.problems[0]
    return f"{problem.what}; {problem.how}".replace(str(place), "")


def transformers4_cell(target: Path, output: Path) -> dict[str, Any]:
    """The merged folder for the hub in transformers 4."""
    export_verb(str(target), "hub", str(output), None, Options(merged=True))
    program = find_program("transformers4")
    assert program is not None
    compared = make_questions(make_exportable(find_target(str(target), None, [])))
    part = difference(compared.rows, compared.expected, transformers4.answers(program, output, compared.rows))
    return {
        "refused": "",
        "what": "merged",
        "parts": {"merged": asdict(part)},
        "program": f"transformers {program.version.split()[0]}",
    }


def image_cell(form: str, shape: str, case: str, place: Path) -> dict[str, Any]:
    """The largest difference of the denoiser's output, which diffusers computes from an exported file or pipeline."""
    from tests.adapters import test_diffusers_file as images

    shutil.rmtree(place, ignore_errors=True)
    settings = {"target_modules": images.ATTENTION, **IMAGE_CASES[case]}  # the denoiser alone, as by default
    adapter, processor = images.attached(place, shape, **settings)
    folder = images.saved(adapter, place / "adapter", processor)
    expected, file, refused = images.ours(adapter, processor), folder / images.DIFFUSERS_NAME, ""
    try:
        if form == "kohya":
            file = place / "kohya.safetensors"
            export_verb(str(folder), form, str(file))
        elif case == "merged":
            merge(find_target(str(folder), None, []), place / "merged")
            processor, file = images.load_processor(images.ModelSection(name_or_path=str(place / "merged"))), None
    except TunekitError as error:
        refused = reason_of(error, place)
    parts: dict[str, Any] = {}
    if not refused:
        largest = float((images.theirs(processor, shape, file) - expected).abs().max())
        parts = {"output": {"largest": largest, "tokens": 0}}
    return {"refused": refused, "what": case, "parts": parts, "program": f"diffusers {version('diffusers')}"}


def cell_text(unit: dict[str, Any]) -> str:
    """The text of a cell: the largest difference of the program's results, and whether the export is a merged model."""
    if not unit["parts"]:
        return "refused"
    largest = max(part["largest"] for part in unit["parts"].values())
    return f"{largest:.1g} merged" if unit["what"] == "merged" else f"{largest:.1g}"


def run_rows(run: str) -> list[tuple[list[int], list[bool]]]:
    """Token ids of the run's evaluation rows, and which are trained on. Raises: InputError if there are no rows."""
    target = find_target(run, None, [])
    objective = make_exportable(target).objective
    rows = None
    if target.data is not None and objective is not None:
        rows = load_rows(target.data, objective, seed=target.seed).evaluation
    if rows is None or not len(rows):
        raise InputError(f"{run} has no evaluation rows", "name a run whose recipe has data.eval", key="--run")
    parts = [rows[index].parts for index in range(len(rows))]
    return [(part["ids"].tolist(), part["trained"].astype(bool).tolist()) for part in parts]


def torch_answers(run: str, rows: list[list[int]]) -> list[NextTokens]:
    """All log-probabilities of the run's model in float32."""
    target = find_target(run, None, ["model.dtype=float32"])
    model = load_target(target, torch.device("cpu")).model.base
    inputs = [model.family.inputs_of(torch.tensor(row)[None]) for row in rows]
    found = [logits.log_softmax(-1).numpy() for logits in logits_of(model, inputs)]
    return [
        NextTokens(values, None, values[range(len(row) - 1), row[1:]]) for values, row in zip(found, rows, strict=True)
    ]


def run_export(run: str, name: str, work: Path, rows: list[tuple[list[int], list[bool]]]) -> dict[str, Any]:
    """The exact rows of one export, by number. `rows`: from `run_rows`."""
    output = work / ("model.gguf" if name not in ASKED else name)
    if name != "torch" and not output.exists():
        options = Options(merged=True, type=None if name in ASKED else name)
        export_verb(run, "gguf" if name not in ASKED else name, str(output), None, options, certify=False)
    program = None if name == "torch" else find_program(name if name in ASKED else "llama.cpp")
    exact, ask = [], ASKED.get(name) or llama_cpp.answers
    for first in range(0, len(rows), AT_ONCE):
        ids = [each for each, _ in rows[first : first + AT_ONCE]]
        answers = torch_answers(run, ids) if program is None else ask(program, output, ids)
        for number, answer in enumerate(answers, start=first):
            tokens, trained = rows[number]
            best = answer.values.argmax(-1) if answer.tokens is None else answer.tokens[:, 0]
            if all(best[at - 1] == tokens[at] for at in range(1, len(tokens)) if trained[at]):
                exact.append(number)
    size = sum(file.stat().st_size for file in (output, *output.rglob("*")) if file.is_file())
    if output.is_file():
        output.unlink()
    return {
        "exact": exact,
        "rows": len(rows),
        "bytes": size,
        "program": program.version if program else torch.__version__,
    }


def run_page(units: dict[str, dict[str, Any]]) -> str:
    lines = [
        "## A run, answered by each program",
        "",
        "| export | program | exact rows | differ from torch | size |",
        "|---|---|--:|---|--:|",
    ]
    torch_exact = set(units["torch"]["exact"]) if "torch" in units else set()
    for name, unit in units.items():
        other = sorted(torch_exact ^ set(unit["exact"]))
        lines.append(
            f"| {name} | {unit['program']} | {len(unit['exact'])} of {unit['rows']} | {', '.join(map(str, other))} "
            f"| {unit['bytes'] / 1e6:,.0f} MB |"
        )
    return "\n".join(lines) + "\n"


def page(units: dict[str, dict[str, Any]]) -> str:
    answered = {name.removeprefix("run|"): unit for name, unit in units.items() if name.startswith("run|")}
    units = {name: unit for name, unit in units.items() if not name.startswith("run|")}
    names = [tuple(name.split("|")) for name in units]
    tokens = max((part["tokens"] for unit in units.values() for part in unit["parts"].values()), default=0)
    lines = [HEAD.format(tokens=tokens)]
    for form in dict.fromkeys(form for form, _, _ in names):
        shapes = [shape for shape in (*SHAPES, *IMAGE_SHAPES) if any((form, shape) == name[:2] for name in names)]
        program = next(
            (unit["program"] for name, unit in units.items() if name.startswith(form) and unit["program"]), ""
        )
        lines += [f"## {form}: {program}", "", f"| adapter | {' | '.join(shapes)} |", f"|---|{'--:|' * len(shapes)}"]
        for case in CASES:
            cells = [units.get(f"{form}|{shape}|{case}") for shape in shapes]
            if any(cells):
                lines.append(f"| {case} | {' | '.join('' if cell is None else cell_text(cell) for cell in cells)} |")
        reasons = sorted(
            {unit["refused"] for name, unit in units.items() if name.startswith(f"{form}|") and unit["refused"]}
        )
        lines += ["", *(f"- {reason}" for reason in reasons), ""]
    return "\n".join(lines) + (run_page(answered) if answered else "")


def measured(form: str, shape: str, case: str, work: Path, source: Path) -> dict[str, Any]:
    """The result of one cell. Base and adapter are made only once."""
    if shape in IMAGE_SHAPES:
        return image_cell(form, shape, case, work / "cell")
    base, adapter = work / "bases" / shape, work / "adapters" / f"{shape}-{case}"
    if not base.exists():
        write_base(shape, source, base)
    if not adapter.exists():
        write_adapter(case, shape, base, adapter)
    return run_cell(adapter, form, case, work / "cell")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--formats", default="gguf,mlx,vllm")
    parser.add_argument("--shapes", default=",".join((*SHAPES, *IMAGE_SHAPES)))
    parser.add_argument("--speech", type=Path)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--cells", type=int)
    parser.add_argument("--run")
    parser.add_argument("--exports", default="torch,F16,Q8_0,Q4_K_M,mlx,vllm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--work", type=Path, default=REPOSITORY / ".cache" / "bench" / "exports")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "scripts" / "results")
    asked = parser.parse_args()
    try:
        measure(asked, run_rows(asked.run) if asked.run and not asked.page else [])
    except TunekitError as error:
        sys.exit(f"error: {error}")


def measure(asked: argparse.Namespace, rows: list[tuple[list[int], list[bool]]]) -> None:
    """Measure all cells that exports.json lacks, or with --run the exports on `rows`; then write the page."""
    results, started = Results(asked.output / "exports.json"), time.monotonic()
    lists = (asked.formats.split(","), asked.shapes.split(","), asked.cases.split(","))
    cells = [cell for cell in itertools.product(*lists) if fits(*cell)]
    if asked.cells is not None:
        cells = random.Random(asked.seed).sample(cells, min(asked.cells, len(cells)))
        print(f"{len(cells)} cells drawn with --seed {asked.seed}")
    for name in asked.exports.split(",") if asked.run and not asked.page else ():
        if f"run|{name}" not in results.units:
            asked.work.mkdir(parents=True, exist_ok=True)
            unit = run_export(asked.run, name, asked.work, rows)
            results.add(f"run|{name}", unit)
            print(f"{time.strftime('%H:%M:%S')} {name}: {len(unit['exact'])} exact", flush=True)
    for form, shape, case in [] if asked.page or asked.run else cells:
        name = f"{form}|{shape}|{case}"
        if name in results.units or time.monotonic() - started > asked.minutes * 60:
            continue
        source = asked.speech if shape == "whisper" else asked.tokenizer
        if source is None and shape not in IMAGE_SHAPES:
            raise InputError(f"{shape} needs {'--speech' if shape == 'whisper' else '--tokenizer'} MODEL")
        unit = measured(form, shape, case, asked.work, source)
        results.add(name, unit)
        print(f"{time.strftime('%H:%M:%S')} {name}: {cell_text(unit)} {unit['refused']}", flush=True)
    (asked.output / "exports.md").write_text(page(results.units), "utf-8")


if __name__ == "__main__":
    main()
