"""Code that comes with a model folder never runs without `trust_remote_code`, and nobody is asked whether it may."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.support.speech_case import write_tiny_whisper
from tests.support.tiny_pipelines import saved_pipeline
from tests.support.tiny_vit import write_tiny_vit
from tests.support.train_case import write_recipe
from tunekit.adapter import export_checkpoint_verb
from tunekit.arithmetic.losses import losses_on_rows
from tunekit.companions.reward_model import find_reward_model
from tunekit.errors import AdapterError, InputError, ModelError, RunFolderError
from tunekit.model.families.image_classifier import PixelProcessor
from tunekit.model.families.pipeline.processor import PipelineProcessor
from tunekit.model.load import make_meta_model
from tunekit.model.speech.features import load_extractor
from tunekit.model.storage import inspection
from tunekit.model.storage.inspection import remote_code
from tunekit.model.storage.source import ModelSource
from tunekit.recipe.bases.sample_settings import RewardSource
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.targets.export import load_run_recipe, refuse_code
from tunekit.targets.target import find_target
from tunekit.train import train_verb

PACKAGE = Path(__file__).parents[2] / "tunekit"
DATA_ONLY = "GenerationConfig"  # its from_pretrained reads numbers alone, and has no such argument
EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Evil: pass\n"


def extractor(folder: Path) -> Path:
    write_tiny_whisper(folder)
    plant(folder, "preprocessor_config.json", "AutoFeatureExtractor", feature_extractor_type="Evil")
    load_extractor(ModelSection(name_or_path=str(folder)))
    return folder


def pipeline_tokenizer(folder: Path) -> Path:
    inner = saved_pipeline(folder, "sd") / "tokenizer"
    for file in inner.iterdir():
        file.unlink()
    (inner / "tokenizer_config.json").write_text("{}")
    plant(inner, "tokenizer_config.json", "AutoTokenizer", tokenizer_class="Evil")
    _ = PipelineProcessor(folder, "StableDiffusionPipeline").tokenizers
    return inner


def image_processor(folder: Path) -> Path:
    write_tiny_vit(folder)
    plant(folder, "preprocessor_config.json", "AutoImageProcessor", image_processor_type="Evil")
    _ = PixelProcessor(folder).processor
    return folder


def configuration(folder: Path) -> Path:
    write_tiny_vit(folder)
    plant(folder, "config.json", "AutoConfig", model_type="evil")
    make_meta_model(ModelSection(name_or_path=str(folder)), device=torch.device("cpu"))
    return folder


def plant(folder: Path, name: str, auto_class: str, **changes: str) -> None:
    """Let a file of the folder name a class of the folder's own code."""
    values = json.loads((folder / name).read_text("utf-8"))
    named = ["evil.Evil", "evil.Evil"] if auto_class == "AutoTokenizer" else "evil.Evil"
    (folder / name).write_text(json.dumps(values | changes | {"auto_map": {auto_class: named}}), "utf-8")
    (folder / "evil.py").write_text(EVIL)


@pytest.mark.parametrize("load", [extractor, pipeline_tokenizer, image_processor, configuration])
def test_code_of_a_folder_is_refused_by_name_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[Path], Path]
) -> None:
    questions: list[str] = []

    def ask(text: str = "") -> str:
        questions.append(text)
        return "y"

    monkeypatch.setattr("builtins.input", ask)
    with pytest.raises(ModelError, match=r"(runs|a class with) remote code") as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert not questions
    assert not list(tmp_path.rglob("ran"))


def test_a_resume_with_changed_code_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    """The code decides what the base computes, like its weights."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    (base / "code.py").write_text("scale = 1\n")
    recipe = write_recipe(tmp_path, base, model={"trust_remote_code": True}, training={"save_steps": 2})
    train_verb(load_recipe(recipe), False, False)
    (tmp_path / "run" / "status.json").unlink()
    (base / "code.py").write_text("scale = 2\n")
    with pytest.raises(RunFolderError, match=r"model\.trust_remote_code: changed since the run: its content"):
        train_verb(load_recipe(recipe), True, False)


def test_code_of_another_repository_is_in_the_fingerprint(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    shutil.copytree(tiny_llama, base)
    other.mkdir()
    config = json.loads((base / "config.json").read_text())
    section = ModelSection(name_or_path=str(base), trust_remote_code=True)
    digests = [remote_code(section)]
    config["auto_map"] = {"AutoModelForCausalLM": "org/code--model.Model", "AutoTokenizer": [None, "local.Tokenizer"]}
    (base / "config.json").write_text(json.dumps(config))
    assert inspection.code_repositories(base) == ["org/code"]
    asked = []

    def find(section: ModelSection, **options: bool) -> ModelSource:
        asked.append((section.name_or_path, section.revision))
        return ModelSource(section.name_or_path, base if section.name_or_path == str(base) else other)

    monkeypatch.setattr(inspection, "find_source", find)
    for code in ("scale = 1", "scale = 2"):
        (other / "model.py").write_text(code)
        digests.append(remote_code(section))
    assert len({digest["model.trust_remote_code"] for digest in digests}) == 3
    assert asked[-1] == ("org/code", "main")


def test_code_of_a_run_of_somebody_else_needs_the_users_consent(tmp_path: Path) -> None:
    """The recipe of the run folder is as foreign as the code that it trusts."""
    base, run = tmp_path / "base", tmp_path / "run"
    write_tiny_vit(base)
    plant(base, "config.json", "AutoConfig", model_type="evil")
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    (run / "adapter").mkdir()
    (run / "plan.json").write_text("{}")
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    reward = [{"function": "rewards.py:score", "allow_code": True}]
    recipe: dict[str, object] = {"model": {"name_or_path": str(base), "trust_remote_code": True}}
    recipe |= {
        "data": {"train": "rows.jsonl"},
        "output": {"dir": "."},
        "objective": {"method": "grpo", "reward": reward},
    }
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    for target in (run, run / "adapter", f"{run}@1"):
        with pytest.raises(InputError, match=r"has Python code.*add model\.trust_remote_code=true"):
            find_target(str(target), None, [])
    values = load_recipe(run / "recipe.yaml").recipe.model_dump(serialize_as_any=True)
    with pytest.raises(InputError, match=r"model\.trust_remote_code, objective\.reward\.0\.allow_code: .*--allow-code"):
        refuse_code(run, values)
    with pytest.raises(InputError, match=r"or --allow-code to adapter diff and adapter export-checkpoint"):
        export_checkpoint_verb(f"{run}@1", None, str(tmp_path / "out"))
    with pytest.raises(RunFolderError, match="step-000001"):  # the empty checkpoint
        export_checkpoint_verb(f"{run}@1", None, str(tmp_path / "out"), allow_code=True)
    with pytest.raises(InputError, match="has Python code"):
        losses_on_rows([run / "adapter"], "rows.jsonl", None)
    with pytest.raises(InputError, match=r"if the run is a reward model, write allow_code: true next to its model"):
        find_reward_model(RewardSource(model=str(run)))
    with pytest.raises(AdapterError, match="adapters of type None"):  # the empty adapter
        find_reward_model(RewardSource(model=str(run), allow_code=True))
    assert not list(tmp_path.rglob("ran"))
    assert load_run_recipe(run, {"trust_remote_code": True}).model.trust_remote_code


@pytest.mark.drawn
def test_every_from_pretrained_says_whether_code_may_run() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line in undecided(ast.parse(path.read_text("utf-8")))
    ]
    assert not wrong


def undecided(tree: ast.Module) -> Iterator[int]:
    """Lines that name from_pretrained without a call, or call it without False and without a trust_remote_code that
    a section or the caller gives."""
    decided = {id(call.func) for call in ast.walk(tree) if isinstance(call, ast.Call) and decides(call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained" and id(node) not in decided:
            yield node.lineno


def decides(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == DATA_ONLY:
        return True
    value = next((each.value for each in call.keywords if each.arg == "trust_remote_code"), None)
    if isinstance(value, ast.Constant):
        return value.value is False
    return value is not None and ast.unparse(value).rpartition(".")[2] == "trust_remote_code"


@pytest.mark.parametrize(
    "call",
    [
        "A.from_pretrained(x)",
        "A.from_pretrained(x, trust_remote_code=True)",
        "A.from_pretrained(x, trust_remote_code=None)",
        "A.from_pretrained(x, **arguments)",
        "read = A.from_pretrained",
    ],
)
def test_a_call_that_leaves_the_choice_open_is_found(call: str) -> None:
    assert list(undecided(ast.parse(call))) == [1]
