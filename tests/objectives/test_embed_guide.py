"""`objective: embed` with the loss gist: the guide's embeddings, and runs with a guide."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertModel

from tests.conftest import write_tiny_llama
from tests.support.embed_case import ROWS, example_of, write_bert, write_case, write_newer_schema
from tests.support.loop_case import CPU
from tests.support.plans import make_plan
from tests.support.train_case import check_a_resume, lose_the_end, losses, records, train
from tunekit.companions.base import load_companions
from tunekit.contracts import EncodeOptions
from tunekit.errors import RecipeError, RunFolderError, TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.formats.embedding import make_example
from tunekit.generate import generate_verb
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.objectives.embed import make
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.embed import EmbedSettings
from tunekit.tuned.model import ModelRun


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def guide(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It pools the first token, and puts a prompt before anchors. Its tokenizer has the ids of two letters swapped."""
    folder = write_bert(tmp_path_factory.mktemp("guide"), llama, 0.0)
    tokens = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokens["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokens), encoding="utf-8")
    write_newer_schema(folder)
    return folder


def write_guided(folder: Path, base: Path, guide: Path, **further: Any) -> Path:
    objective = {"loss": "gist", "guide": {"name_or_path": str(guide), "dtype": "float32"}, "temperature": 0.1}
    return write_case(folder, base, objective, **further)


def test_the_guide_embeds_texts_with_its_own_tokenizer_pooling_and_prompts(llama: Path, guide: Path) -> None:
    section = {"name_or_path": str(guide), "dtype": "float32"}
    settings = EmbedSettings.model_validate({"method": "embed", "loss": "gist", "guide": section})
    objective = make(settings, load_tokenizer(ModelSection(name_or_path=str(llama))), {}, EncodeOptions(max_length=64))
    rows = [objective.rows.encode(make_example(example_of(number)), "") for number in range(3)]
    batch = objective.rows.collate([[row] for row in rows])
    companion: Any = load_companions(objective, CPU)["objective.guide"]
    [ours] = companion.embed(ModelRun(companion._model, objective.rows), [batch])
    theirs, tokenizer = BertModel.from_pretrained(guide), AutoTokenizer.from_pretrained(guide)
    texts = [
        ("find: " if place == 0 else "") + text
        for row in range(3)
        for place, text in enumerate(example_of(row).values())
    ]
    assert len(texts) == len(ours) == 7
    for text, vector in zip(texts, ours, strict=True):
        with torch.no_grad():
            wanted = theirs(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0]
        torch.testing.assert_close(vector, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.drawn
def test_a_guided_run_does_not_depend_on_micro_batches_and_is_evaluated_as_it_was(
    llama: Path, guide: Path, tmp_path: Path
) -> None:
    sizes, runs = ((1, 8), (4, 2), (8, 1)), []
    for size, steps in sizes:
        training = {"micro_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 3, "epochs": None}
        runs.append(train(write_guided(tmp_path / str(size), llama, guide, training=training)))
    first, *others = map(losses, runs)
    for other in others:
        assert other == pytest.approx(first, rel=2e-5)
    last = [record["eval"] for record in records(runs[0]) if "eval" in record][-1]
    result = tmp_path / "eval.json"
    evaluate_verb(str(runs[0]), None, None, None, (), str(result), ["evaluation.batch_size=3"])
    assert json.loads(result.read_text("utf-8"))["loss"] == pytest.approx(last["loss"], rel=1e-5)
    plain = train(write_case(tmp_path / "plain", llama, {"scale": 10.0}, training={"max_steps": 1, "epochs": None}))
    assert losses(plain)[0] != pytest.approx(first[0], rel=1e-3)


def test_the_plan_counts_the_guides_weights(llama: Path, guide: Path, tmp_path: Path) -> None:
    guided, plain = (
        make_plan(load_recipe(path), device=CPU)[0]
        for path in (write_guided(tmp_path / "guided", llama, guide), write_case(tmp_path / "plain", llama))
    )
    size = 4 * sum(tensor.numel() for tensor in BertModel.from_pretrained(guide, add_pooling_layer=False).parameters())
    assert guided.peak_bytes.weights - plain.peak_bytes.weights == pytest.approx(size, rel=0.05)
    assert not guided.refusals


@pytest.mark.drawn
def test_a_resume_has_the_same_bytes_and_a_changed_guide_is_refused(llama: Path, guide: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(guide, tmp_path / "guide"))
    recipe = write_guided(tmp_path, llama, own)
    check_a_resume(recipe, "training.save_steps=2")
    generate_verb(str(tmp_path / "whole"), None, "what", None, [], output=str(tmp_path / "before.npy"))
    pooling = own / "1_Pooling" / "config.json"
    content = pooling.read_text("utf-8")
    pooling.write_text(content.replace("cls", "max"), encoding="utf-8")
    lose_the_end(tmp_path / "cut")
    with pytest.raises(RunFolderError, match=r"objective\.guide\.name_or_path: changed since the run"):
        train(recipe, "training.save_steps=2", f"output.dir={tmp_path / 'cut'}", resume=True)
    shutil.rmtree(own)  # only the loss reads the guide
    generate_verb(str(tmp_path / "whole"), None, "what", None, [], output=str(tmp_path / "after.npy"))
    assert (tmp_path / "after.npy").read_bytes() == (tmp_path / "before.npy").read_bytes()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"loss": "gist"}, "gist needs a guide; write guide: NAME"),
        ({"guide": "some-guide"}, r"objective\.guide: has an effect only with loss gist"),
        ({"contrast_anchors": False}, r"objective\.contrast_anchors: has an effect only with loss gist"),
        ({"loss": "gist", "guide": "./absent"}, r"objective\.guide\.name_or_path: there is no folder or file"),
    ],
)
def test_wrong_guides_are_refused(objective: dict[str, Any], message: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(TunekitError, match=message) as caught:
        make_plan(load_recipe(write_case(tmp_path, llama, objective)), device=CPU)
    assert caught.value.exit_code == RecipeError.exit_code == 2


def test_rows_with_texts_fill_the_longest_batch(llama: Path, guide: Path) -> None:
    """A simulation repeats the texts that the guide reads, too."""
    section = {"name_or_path": str(guide)}
    settings = EmbedSettings.model_validate({"method": "embed", "loss": "gist", "guide": section})
    objective = make(settings, load_tokenizer(ModelSection(name_or_path=str(llama))), {}, EncodeOptions(max_length=64))
    rows = (objective.rows.encode(make_example(example_of(number)), "") for number in range(ROWS))
    [row] = objective.rows.fill(rows, 40, 0)
    assert row.parts["counts"].tolist() == [40, 40]
    assert min(row.parts["text_bytes"]) >= 40
