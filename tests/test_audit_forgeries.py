"""`tunekit audit` and forgeries of a run: each one is found, or the output names it as not proved."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.train_case import in_child, records, train_in_child, write_recipe
from tunekit import audit

TRAINING = {"epochs": 1.0, "save_steps": 2, "eval_steps": 2, "keep_checkpoints": 2}
RUNS: dict[str, dict[str, Any]] = {  # kinds of runs, and the sections of their recipes
    "adapter": {"training": TRAINING},
    "full": {"training": TRAINING, "adapter": {"method": "full", "r": None, "dropout": None}},
    "best": {  # the loss is higher after step 4 than after step 2, whose adapter is the result
        "training": {**TRAINING, "epochs": None, "max_steps": 4, "learning_rate": 0.05, "scheduler": "constant"},
        "evaluation": {"best": "eval.loss"},
    },
}
Forge = Callable[[Path], None]


@pytest.fixture(scope="module")
def honest(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """For a kind of run: a folder with recipe, rows and a finished run, with checkpoints of every second step and of
    the last."""

    @cache
    def trained(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        recipe = write_recipe(folder, tiny_llama, **RUNS[kind])
        values = json.loads(recipe.read_text("utf-8"))
        for section in ("adapter", "training"):
            values[section] = {name: value for name, value in values[section].items() if value is not None}
        recipe.write_text(json.dumps(values), "utf-8")
        ended = train_in_child(recipe, folder / "run")
        assert ended.code == 0, ended.output
        return folder

    return trained


def edited(name: str, change: Callable[[Any], object], *, hashed: str = "") -> Forge:
    """Change a JSON file of the run, and with `hashed` its sha256 in another file, as a careful forger would."""

    def forge(run: Path) -> None:
        file = run / name
        value = json.loads(file.read_text("utf-8"))
        change(value)
        file.write_text(json.dumps(value), "utf-8")
        if hashed:
            described = json.loads((run / hashed).read_text("utf-8"))
            facts = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
            described["files"][file.name] = facts
            (run / hashed).write_text(json.dumps(described), "utf-8")

    return forge


def configured(**values: object) -> Forge:
    return edited("adapter/adapter_config.json", lambda value: value.update(values), hashed="adapter/tunekit.json")


def checkpointed(change: Callable[[Any], object]) -> Forge:
    folder = "checkpoints/step-000002"
    return edited(f"{folder}/state.json", change, hashed=f"{folder}/manifest.json")


def recorded(change: Callable[[list[Any]], list[Any]]) -> Forge:
    """Change the records of metrics.jsonl: the evaluations of steps 0, 2 and 3, and steps 1, 2 and 3."""

    def forge(run: Path) -> None:
        lines = [json.dumps(record) for record in change(records(run))]
        (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")

    return forge


def with_value(name: str, value: float, *, evaluation: bool = False) -> Forge:
    def change(lines: list[Any]) -> list[Any]:
        record = next(each for each in lines if each["step"] == 2 and ("eval" in each) == evaluation)
        (record["eval"] if evaluation else record)[name] = value
        return lines

    return recorded(change)


def added(name: str, text: str = "{}") -> Forge:
    def forge(run: Path) -> None:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(text, "utf-8")

    return forge


def flipped(name: str) -> Forge:
    def forge(run: Path) -> None:
        data = bytearray((run / name).read_bytes())
        data[-2] ^= 1
        (run / name).write_bytes(data)

    return forge


def other_row(run: Path) -> None:
    rows = run.parent / "train.jsonl"
    rows.write_text(rows.read_text("utf-8").replace("very", "most"), "utf-8")


def both(*forgeries: Forge) -> Forge:
    def forge(run: Path) -> None:
        for each in forgeries:
            each(run)

    return forge


WEIGHTS, CONFIG, FACTS = (
    f"adapter/{name}" for name in ("adapter_model.safetensors", "adapter_config.json", "tunekit.json")
)
AGAIN = "metrics.jsonl has a record of this step again, or after a later step"
FOREIGN = "is not part of this result"
UNPROVED = 0  # the exit code of what the output names as not proved
FORGERIES: dict[str, tuple[Forge, int, list[str]]] = {
    # values
    "loss": (with_value("loss", 0.1), 3, ["step 2: loss was 0.1, is "]),
    "norm": (with_value("grad_norm", 0.1), 3, ["step 2: grad_norm was 0.1, is "]),
    "rate": (with_value("learning_rate", 0.5), 3, ["step 2: learning_rate was 0.5, is "]),
    "tokens": (with_value("tokens", 7), 3, ["step 2: tokens was 7, is "]),
    "evaluation": (with_value("loss", 0.1, evaluation=True), 3, ["step 2: eval.loss was 0.1, is "]),
    "weights": (flipped(WEIGHTS), 3, [f"{WEIGHTS} has different bytes"]),
    "checkpoint": (flipped("checkpoints/step-000002/tensors.safetensors"), 2, ["differs from its sha256"]),
    "state": (checkpointed(lambda value: value["facts"]["loop"].update(tokens=7)), 3, ["loop.tokens was 7, is "]),
    # files
    "code": (added("adapter/modeling_evil.py", "import os"), 3, [f"adapter/modeling_evil.py {FOREIGN}"]),
    "pickle": (added("adapter/adapter_model.bin"), 3, [f"adapter/adapter_model.bin {FOREIGN}"]),
    "hidden file": (added("adapter/.config.json"), 3, [f"adapter/.config.json {FOREIGN}"]),
    "inner folder": (added("adapter/inner/adapter_config.json"), 3, [f"adapter/inner/adapter_config.json {FOREIGN}"]),
    "second result": (added("model/config.json"), 3, [f"model/config.json {FOREIGN}"]),
    "template": (added("adapter/chat_template.jinja"), 3, [f"adapter/chat_template.jinja {FOREIGN}"]),
    "link": (lambda run: (run / "adapter" / "notes").symlink_to("/etc/hosts"), 2, ["adapter/notes", "is a link"]),
    "removed weights": (lambda run: (run / WEIGHTS).unlink(), 3, [f"{WEIGHTS} is missing"]),
    "removed facts": (lambda run: (run / FACTS).unlink(), 3, [f"{FACTS} has different values"]),
    # records
    "removed step": (recorded(lambda lines: [*lines[:1], *lines[2:]]), 3, ["step 1: ", "loss was (absent)"]),
    "removed evaluation": (
        recorded(lambda lines: lines[1:]),
        3,
        ["no record of the evaluations after steps 0", "base_eval_loss was "],
    ),
    "repeated record": (recorded(lambda lines: [*lines[:2], *lines[1:]]), 3, [f"step 1: {AGAIN}"]),
    "all records twice": (recorded(lambda lines: lines * 2), 3, [f"step 1: {AGAIN}", f"step 3: {AGAIN}"]),
    "order": (recorded(lambda lines: [lines[0], lines[2], lines[1], *lines[3:]]), 3, [f"step 1: {AGAIN}"]),
    "invented step": (recorded(lambda lines: [{"step": -1, "loss": 1.0}, *lines]), 3, ["step -1: "]),
    "invented evaluation": (
        recorded(lambda lines: [*lines[:2], {"step": 1, "eval": {"loss": 0.1}}, *lines[2:]]),
        3,
        ["the evaluations after steps 1 were not computed again", "report.json has different values"],
    ),
    # names and settings
    "path of the base": (
        configured(base_model_name_or_path="/models/other"),
        UNPROVED,
        [f"{CONFIG}: base_model_name_or_path is /models/other, and the audit used ", "paths are not proved"],
    ),
    "name of the base": (
        configured(base_model_name_or_path="org/other"),
        3,
        ['base_model_name_or_path was "org/other", is '],
    ),
    "hash of the base": (
        edited(FACTS, lambda value: value["base"].update(fingerprint="0")),
        3,
        ["base.fingerprint was"],
    ),
    "rank": (configured(r=8), 3, [f"{CONFIG} has different values: r was 8, is 4"]),
    "alpha without its hash": (
        edited(CONFIG, lambda value: value.update(lora_alpha=64)),
        3,
        [f"{CONFIG} is not the file that {FACTS} describes"],
    ),
    # reports
    "report": (edited("report.json", lambda value: value.update(eval_loss=0.1)), 3, ["eval_loss was 0.1, is "]),
    "best step": (edited("report.json", lambda value: value.update(best_step=2)), 3, ["best_step was 2, is "]),
    "rows of the report": (
        edited("report.json", lambda value: value["rows"].update(trained=9999)),
        3,
        ["rows.trained"],
    ),
    "losses of rows": (
        edited("evaluation_rows.json", lambda value: value["losses"].__setitem__(0, 0.1)),
        3,
        ["evaluation_rows.json has different rows or losses"],
    ),
    "losses before training": (
        edited("evaluation_rows.json", lambda value: value["before"].__setitem__(0, 9.9)),
        3,
        ["step 0: evaluation_rows.json has different losses before training"],
    ),
    "plan": (
        edited("plan.json", lambda value: value["recipe"]["training"].update(learning_rate=1.0)),
        3,
        ["plan.json has different values: recipe.training.learning_rate was 1.0, is 0.01"],
    ),
    "path of the data": (
        edited("plan.json", lambda value: value["recipe"]["data"]["train"][0].update(path="/data/better.jsonl")),
        UNPROVED,
        ["recipe.data.train.0.path is /data/better.jsonl, and the audit used ", "paths are not proved"],
    ),
    "page": (added("report.md", "loss 0"), UNPROVED, ["not compared: ", "report.md"]),
    "scores": (added("tasks.json"), UNPROVED, ["not compared: ", "tasks.json"]),
    # data
    "rows and code": (
        both(other_row, added("adapter/modeling_evil.py")),
        2,
        ["the training or evaluation rows differ", f"adapter/modeling_evil.py {FOREIGN}"],
    ),
    "rows and records": (
        both(other_row, recorded(lambda lines: lines * 2)),
        2,
        ["the training or evaluation rows differ", f"step 1: {AGAIN}"],
    ),
}


MODEL = "model/model.safetensors"
OF_FULL: dict[str, tuple[Forge, int, list[str]]] = {  # of a run that trains its base, whose result is a model folder
    "weights": (flipped(MODEL), 3, [f"{MODEL} has different bytes"]),
    "no weights": (lambda run: (run / MODEL).unlink(), 3, [f"{MODEL} is missing"]),
    "second weights": (added("model/model-00002.safetensors"), 3, [f"model/model-00002.safetensors {FOREIGN}"]),
    "pickle": (added("model/pytorch_model.bin"), 3, [f"model/pytorch_model.bin {FOREIGN}"]),
    "code": (added("model/modeling_evil.py", "import os"), 3, [f"model/modeling_evil.py {FOREIGN}"]),
    "class": (
        edited("model/config.json", lambda value: value.update(auto_map={"AutoModel": "modeling_evil.Evil"})),
        3,
        ["model/config.json has different bytes"],
    ),
    "tokenizer": (
        edited("model/tokenizer.json", lambda value: value["added_tokens"].clear()),
        3,
        ["model/tokenizer.json has different bytes"],
    ),
    "template": (
        edited("model/tokenizer_config.json", lambda value: value.update(chat_template="{{ 'so' }}")),
        3,
        ["model/tokenizer_config.json has different bytes"],
    ),
    "adapter": (added("adapter/adapter_config.json"), 3, [f"adapter/adapter_config.json {FOREIGN}"]),
    "checkpoint": (flipped("checkpoints/step-000002/tensors.safetensors"), 2, ["differs from its sha256"]),
    "loss": (with_value("loss", 0.1), 3, ["step 2: loss was 0.1, is "]),
    "report": (edited("report.json", lambda value: value.update(trainable_parameters=7)), 3, ["trainable_parameters"]),
}


def reached(change: Callable[[Any], object], step: int = 4) -> Forge:
    """Change the loop's values in the state of a checkpoint."""
    folder = f"checkpoints/step-{step:06d}"
    return edited(
        f"{folder}/state.json", lambda value: change(value["facts"]["loop"]), hashed=f"{folder}/manifest.json"
    )


def last_as_best(run: Path) -> None:
    """Exports the adapter of the last step as that of the best."""
    best, last = (load_file(run / f"checkpoints/step-00000{step}/tensors.safetensors") for step in (2, 4))
    adapter = load_file(run / WEIGHTS)
    for name, value in adapter.items():
        flat, size = best["group0.weights"], value.numel()
        starts = (flat == value.flatten()[0]).nonzero().flatten().tolist()
        start = next(each for each in starts if torch.equal(flat[each : each + size], value.flatten()))
        adapter[name] = last["group0.weights"][start : start + size].view_as(value).clone()
    save_file(adapter, run / WEIGHTS)


def renamed_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints/step-000002")
    shutil.copytree(run / "checkpoints/step-000004", run / "checkpoints/step-000002")


OF_BEST: dict[str, tuple[Forge, int, list[str]]] = {  # of a run whose result is an earlier step than the last
    "last step as best": (last_as_best, 3, [f"{WEIGHTS} has different bytes"]),
    "best step of the report": (
        edited("report.json", lambda value: value.update(best_step=4)),
        3,
        ["best_step was 4, is 2"],
    ),
    "loss of the best step": (with_value("loss", 0.1, evaluation=True), 3, ["step 2: eval.loss was 0.1, is "]),
    "loss of the report": (edited("report.json", lambda value: value.update(eval_loss=0.1)), 3, ["eval_loss was 0.1"]),
    "best step of the last state": (reached(lambda loop: loop.update(best_step=4)), 3, ["loop.best_step was 4, is 2"]),
    "best value of the last state": (reached(lambda loop: loop.update(best_value=0.1)), 3, ["loop.best_value was 0.1"]),
    "best value of an earlier state": (
        reached(lambda loop: loop.update(best_value=0.1), 2),
        3,
        ["loop.best_value was 0.1"],
    ),
    "best checkpoint": (flipped("checkpoints/step-000002/tensors.safetensors"), 2, ["differs from its sha256"]),
    "another checkpoint as best": (renamed_checkpoint, 2, ["step-000002"]),
    "no best checkpoint": (  # forges nothing: all steps are computed again in one part
        lambda run: shutil.rmtree(run / "checkpoints/step-000002"),
        0,
        ["steps 1 to 4 of 4: computing again", "proved: the whole run"],
    ),
    "no evaluation after the best": (
        recorded(lambda lines: [each for each in lines if "eval" not in each or each["step"] <= 2]),
        UNPROVED,
        ["no record of the evaluations after steps 4"],
    ),
    "losses of rows": (
        edited("evaluation_rows.json", lambda value: value["losses"].__setitem__(0, 0.1)),
        3,
        ["evaluation_rows.json has different rows or losses"],
    ),
}
ALL = {"adapter": FORGERIES, "full": OF_FULL, "best": OF_BEST}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, forgeries in ALL.items() for name in forgeries])
def test_a_forgery_is_found_or_named(
    kind: str, name: str, honest: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    forge, code, texts = ALL[kind][name]
    case = tmp_path_factory.mktemp("case")  # of the same depth: the recipe has relative paths
    run = Path(shutil.copytree(honest(kind), case, dirs_exist_ok=True)) / "run"
    forge(run)
    ended = in_child(lambda: audit.audit_verb(str(run), None, None, None), case / "log")
    assert ended.code == code, ended.output
    for text in texts:
        assert text in ended.output


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_an_honest_run_is_proved(kind: str, honest: Callable[[str], Path], tmp_path: Path) -> None:
    ended = in_child(lambda: audit.audit_verb(str(honest(kind) / "run"), None, None, None), tmp_path / "log")
    assert ended.code == 0, ended.output
    assert "proved: the whole run" in ended.output
    report = json.loads((honest(kind) / "run" / "report.json").read_text("utf-8"))
    assert report.get("best_step") == (2 if kind == "best" else None)
