"""Writes the files that both sides read: the base as a bfloat16 safetensors folder, the rows as chat files and as token
ids.

    prepare.py GGUF ROWS FOLDER ROWS_TO_TRAIN

ROWS: JSON Lines of instruction, input, output.  In FOLDER: model/, chat.jsonl (messages), turns.jsonl (prompt and
completion, the same text), ids.jsonl (input_ids and labels of the first ROWS_TO_TRAIN rows, as tunekit encodes them).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from tunekit.contracts import IGNORED
from tunekit.data.rows import load_rows
from tunekit.model.load import load_model
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.objectives.base import make_objective
from tunekit.recipe.data import DataSection
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.sft import SftSettings

MAX_LENGTH = 2048


def write_base(gguf: Path, folder: Path) -> None:
    section = ModelSection(name_or_path=str(gguf), dtype="bfloat16")
    net = load_model(section, device=torch.device("cpu")).net
    net.hf_quantizer, net.is_quantized = None, False  # read dequantized; save_pretrained refuses otherwise
    if hasattr(net.config, "quantization_config"):
        del net.config.quantization_config
    net.save_pretrained(folder)
    load_tokenizer(section).save(folder)


def write_rows(source: Path, folder: Path, count: int) -> None:
    chat, turns = [], []
    for line in source.read_text("utf-8").splitlines():
        row = json.loads(line)
        question = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
        user, assistant = {"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}
        chat.append({"messages": [user, assistant]})
        turns.append({"prompt": [user], "completion": [assistant]})
    for name, rows in (("chat", chat), ("turns", turns), ("few", chat[:count])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    section = DataSection(train=[{"path": str(folder / "few.jsonl"), "format": "chat"}], max_length=MAX_LENGTH)
    objective = make_objective(SftSettings(), load_tokenizer(ModelSection(name_or_path=str(folder / "model"))))
    encoded = load_rows(section, objective, seed=0).train
    if len(encoded) != count:
        sys.exit(f"{count - len(encoded)} rows were dropped; both sides must train on the same ones")
    with (folder / "ids.jsonl").open("w", encoding="utf-8") as file:
        for index in range(count):
            row = encoded[index]
            ids, trained = row.parts["ids"].tolist(), row.parts["trained"].tolist()
            labels = [token if on else IGNORED for token, on in zip(ids, trained, strict=True)]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")


def main() -> None:
    gguf, source, folder, count = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "model.safetensors").exists():
        write_base(gguf, folder / "model")
    write_rows(source, folder, count)


if __name__ == "__main__":
    main()
