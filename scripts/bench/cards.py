"""Predicted peak memory of full-size models on GPUs of common sizes, from their configurations alone, without weights.

    scripts/bench/run cards [--minutes 10]     simulates the cases that scripts/results/cards.json lacks
    scripts/bench/run cards --page             writes the tables into the guide from that file

The training step is simulated on the meta device, as `tunekit plan` does it for a GPU. A case is one row of LENGTH
tokens per micro-batch, with recomputed layers: the smallest step of such rows. The file is written after each case, so
a run can stop at any time. No case was compared with a real GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "scripts" / "gpu")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from shapes import MODELS as MEASURED_MODELS  # noqa: E402

from tunekit.contracts import Batch, Objective  # noqa: E402
from tunekit.memory.streaming import layer_bytes  # noqa: E402
from tunekit.model.load import make_meta_model  # noqa: E402
from tunekit.objectives.base import make_objective  # noqa: E402
from tunekit.objectives.losses.logprobs import logits_chunk_tokens  # noqa: E402
from tunekit.objectives.rows.sequences import sequence_parts  # noqa: E402
from tunekit.planning.forecast import peak_bytes  # noqa: E402
from tunekit.planning.simulation import SimulatedRun  # noqa: E402
from tunekit.recipe.adapters.full import FullSettings  # noqa: E402
from tunekit.recipe.adapters.lora import LoraSettings  # noqa: E402
from tunekit.recipe.model import ModelSection  # noqa: E402
from tunekit.recipe.objectives.sft import SftSettings  # noqa: E402
from tunekit.recipe.training import TrainingSection  # noqa: E402
from tunekit.records import ExecutionSettings  # noqa: E402

RESULTS = REPOSITORY / "scripts" / "results" / "cards.json"
PAGES = REPOSITORY / "scripts" / "site" / "pages" / "guide"
CARDS_GB = (8, 12, 16, 24, 48, 80)
USABLE_SHARE = 0.9  # plan leaves 5 % free; the driver, the libraries and the allocator's gaps take about as much
LENGTH = 2048
GPU = torch.device("cuda")
NO_TOKENIZER: Any = SimpleNamespace(pad_id=0, fingerprint="random ids", images=None)


def _decoder(kind: str, sizes: tuple[int, ...], vocabulary: int, **more: Any) -> dict[str, Any]:
    """config.json of a decoder. `sizes`: hidden, MLP, layers, heads, key-value heads."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {"model_type": kind, **dict(zip(names, sizes, strict=True)), "vocab_size": vocabulary, **ids, **more}


MODELS: dict[str, dict[str, Any]] = {  # as the families' published config.json have them
    "Llama-3.2-1B": _decoder("llama", (2048, 8192, 16, 32, 8), 128256, head_dim=64, tie_word_embeddings=True),
    "Gemma-2-2B": _decoder("gemma2", (2304, 9216, 26, 8, 4), 256000, head_dim=256),
    "Llama-3.2-3B": MEASURED_MODELS["llama-3.2-3b"],
    "Llama-3.1-8B": MEASURED_MODELS["llama-3.1-8b"],
    "Qwen3-14B": _decoder("qwen3", (5120, 17408, 40, 40, 8), 151936, head_dim=128, tie_word_embeddings=False),
    "Mistral-Small-24B": _decoder("mistral", (5120, 32768, 40, 32, 8), 131072, head_dim=128, sliding_window=None),
    "Qwen2.5-32B": MEASURED_MODELS["qwen2.5-32b"],
    "Llama-3.1-70B": MEASURED_MODELS["llama-70b"],
    "tiny": _decoder("llama", (64, 128, 2, 4, 2), 512),  # for the test
}


@dataclass(frozen=True)
class Case:
    """A simulated training step. `quantization`: of the base. `method`: lora or full. `streaming`: off or host."""

    model: str
    method: str = "lora"
    quantization: str = "none"
    streaming: str = "off"
    streamed_head: bool = False
    rows: int = 1
    length: int = LENGTH
    recomputed: bool = True
    r: int = 16

    @property
    def name(self) -> str:
        """The key in the file of results: all fields that differ from the defaults."""
        changed = {key: value for key, value in vars(self).items() if value != vars(Case(self.model))[key]}
        return " ".join([self.model, *(f"{key}={value}" for key, value in changed.items())])


STREAMED = {"streaming": "host", "streamed_head": True}
METHODS: dict[str, dict[str, Any]] = {  # columns of the table, from the most memory to the least
    "full": {"method": "full"},
    "LoRA": {},
    "QLoRA": {"quantization": "nf4"},
    "LoRA, streamed": STREAMED,
    "QLoRA, streamed": {"quantization": "nf4", **STREAMED},
}
FIRST = Case("Llama-3.1-8B", rows=4, recomputed=False)
LADDER: list[tuple[str, dict[str, Any]]] = [  # each step keeps the changes of the steps before
    ("4 rows of 2,048 tokens per micro-batch, nothing recomputed", {}),
    ("`memory.gradient_checkpointing: auto`", {"recomputed": True}),
    ("`training.micro_batch_size: 1`, with four times the accumulation", {"rows": 1}),
    ("`memory.streamed_head: true`", {"streamed_head": True}),
    ("`model.quantization: nf4`", {"quantization": "nf4"}),
    ("`adapter.r: 8`", {"r": 8}),
    ("`data.max_length: 1024`", {"length": 1024}),
    ("`memory.streaming: host`", {"streaming": "host"}),
]


def ladder() -> list[tuple[str, Case]]:
    """The steps of the page "Out of memory", each with its text and its case."""
    steps, case = [], FIRST
    for text, changes in LADDER:
        case = replace(case, **changes)
        steps.append((text, case))
    return steps


def table_models() -> list[str]:
    """The models of the tables."""
    return [name for name in MODELS if name != "tiny"]


def cases() -> list[Case]:
    """All cases of both pages: first the steps of "Out of memory", then the tables of cards, small models first."""
    table = [Case(model, **settings) for model in table_models() for settings in METHODS.values()]
    return list(dict.fromkeys([*(case for _, case in ladder()), *table]))


def micro_batch(case: Case, objective: Objective) -> Batch:
    """A micro-batch of `rows` sequences of `length` tokens; the model learns the second half of each sequence."""
    ids = np.arange(case.length, dtype=np.int32) % 500 + 3  # (T,)
    trained = np.arange(case.length) >= case.length // 2  # (T,)
    rows = [[objective.rows.make_row(sequence_parts(ids, trained), f"row {at}")] for at in range(case.rows)]
    return objective.rows.collate(rows)


def simulated(case: Case) -> dict[str, int]:
    """The predicted peak bytes by part, and the bytes of the layers that stay on the host if the base is streamed."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODELS[case.model]), encoding="utf-8")
        section = ModelSection(name_or_path=folder, dtype="bfloat16", quantization=case.quantization)  # type: ignore[arg-type]
        base = make_meta_model(section, device=GPU)
        objective = make_objective(SftSettings(), NO_TOKENIZER)
        text, layers = base.text, base.facts.layers
        assert text is not None
        choice = ExecutionSettings(
            logits_chunk_tokens=logits_chunk_tokens(text.vocabulary_size),
            checkpointed_layers=layers - 1 if case.recomputed and case.streaming == "off" else 0,
            streaming=case.streaming,
            streamed_head=case.streamed_head,
        )
        adapter = FullSettings() if case.method == "full" else LoraSettings(r=case.r, alpha=2.0 * case.r)
        run = SimulatedRun(base, adapter, objective, TrainingSection(), choice, GPU)
        peak = peak_bytes(run.training_step(micro_batch(case, objective)), None, None, GPU, base.dtype)
        parts = {name: getattr(peak, name) for name in ("weights", "adapter", "optimizer", "activations", "logits")}
        sizes = {"total": peak.total, "layers": layer_bytes(base), "parameters": base.facts.total_parameters}
        return parts | sizes


def simulate_missing(minutes: float, file: Path = RESULTS, wanted: Callable[[], list[Case]] = cases) -> int:
    """Simulate the cases that the file lacks. Returns how many are still missing."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"cases": {}}
    end = time.monotonic() + 60.0 * minutes
    missing = [case for case in wanted() if case.name not in known["cases"]]
    for done, case in enumerate(missing):
        if time.monotonic() > end:
            return len(missing) - done
        known["cases"][case.name] = simulated(case)
        known |= {"date": f"{datetime.now(UTC):%Y-%m-%d}", "torch": torch.__version__}
        file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(f"{case.name}: {gib(known['cases'][case.name]['total'])} GiB", flush=True)
    return 0


def gib(size: float) -> str:
    """Bytes in GiB, for a table."""
    return f"{size / 2**30:,.1f}" if size < 100 * 2**30 else f"{size / 2**30:,.0f}"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def best_table(known: dict[str, dict[str, int]]) -> str:
    """A table with the first of METHODS that is predicted to fit, for each model and card."""
    rows = []
    for model in table_models():
        totals = {method: known[Case(model, **settings).name]["total"] for method, settings in METHODS.items()}
        cells = []
        for card in CARDS_GB:
            fitting = [name for name, total in totals.items() if total <= USABLE_SHARE * card * 2**30]
            cells.append(fitting[0] if fitting else "none")
        rows.append([model, *cells])
    return _table(["model", *(f"{card}GB" for card in CARDS_GB)], rows)


def methods_table(known: dict[str, dict[str, int]]) -> str:
    """A table with the predicted GiB of all methods for each model, and with the host's memory if the base is
    streamed."""
    rows = []
    for model in table_models():
        results = [known[Case(model, **settings).name] for settings in METHODS.values()]
        hosts = [gib(results[3]["layers"]), gib(results[4]["layers"])]
        rows.append([model, *(gib(result["total"]) for result in results), *hosts])
    return _table(["model", *METHODS, "host: LoRA", "host: QLoRA"], rows)


def ladder_table(known: dict[str, dict[str, int]]) -> str:
    """A table for the page "Out of memory": the predicted GiB after each step, and the GiB that the step saved."""
    rows, before = [], None
    for number, (text, case) in enumerate(ladder()):
        total = known[case.name]["total"]
        saved = "" if before is None else gib(before - total)
        rows.append([f"{number}. {text}" if number else text, gib(total), saved])
        before = total
    return _table(["change, in addition to those above", "GiB", "saves"], rows)


TABLES = {
    "best": ("cards.md", best_table),
    "methods": ("cards.md", methods_table),
    "ladder": ("out-of-memory.md", ladder_table),
}


def filled(page: str, name: str, table: str) -> str:
    """The page with the table between its marks."""
    before, begin, others = page.partition(f"<!-- {name} -->\n")
    _, end, after = others.partition(f"<!-- end of {name} -->")
    assert begin, f"no mark <!-- {name} -->"
    assert end, f"no mark <!-- end of {name} -->"
    return f"{before}{begin}{table}\n{end}{after}"


def write_pages(file: Path = RESULTS) -> None:
    """Write each table into its page."""
    known = json.loads(file.read_text(encoding="utf-8"))["cases"]
    for name, (page, make) in TABLES.items():
        text = (PAGES / page).read_text(encoding="utf-8")
        (PAGES / page).write_text(filled(text, name, make(known)), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--page", action="store_true")
    settings = parser.parse_args()
    if settings.page:
        write_pages()
    elif remaining := simulate_missing(settings.minutes):
        print(f"{remaining} cases are missing: call it again")
