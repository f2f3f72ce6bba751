"""`objective: embed`: the loss of a whole step, for any micro-batches, parts and ranks; rows, pooling, and runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel

from tests.conftest import write_tiny_llama
from tests.support.embed_case import ROWS, example_of, write_bert, write_case, write_newer_schema
from tests.support.loop_case import CPU, Case, ListedRows, make_case
from tests.support.ranks_case import train_in_ranks
from tests.support.train_case import check_a_resume, losses, records, train
from tunekit.contracts import EncodeOptions, ModelOutput, Objective, StepBatches
from tunekit.data.batching.order import by_kind, without_repeats
from tunekit.data.batching.steps import BatchSettings
from tunekit.data.rows import load_rows
from tunekit.errors import DataError, InputError, RecipeError, TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.export import export_verb
from tunekit.files.untrusted import sha256_of
from tunekit.formats.embedding import EmbeddingExample, make_example
from tunekit.memory.splitting import Splitting
from tunekit.merge import merge_verb
from tunekit.model.call import AFTER_LAYERS, OUTSIDE_LAYERS, calling, seed_layer
from tunekit.model.load import load_model
from tunekit.model.storage.sentence_transformers import read_modules
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.objectives.embed import make
from tunekit.objectives.losses.contrast import RowTexts, embedding_loss
from tunekit.objectives.losses.embeddings import pool
from tunekit.objectives.rows.texts import text_key
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import HeadlessModel, ModelSection
from tunekit.recipe.objectives.embed import EmbedSettings
from tunekit.recipe.training import TrainingSection
from tunekit.talking.conversation import make_speaker
from tunekit.targets.target import find_target, load_target
from tunekit.training.engine import StepAttempt, StepWork


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def bert(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("encoder"), llama, 0.0)


@pytest.fixture(scope="module")
def dropping_bert(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("dropping"), llama, 0.2)


def objective_on(base: Path, settings: EmbedSettings, **facts: Any) -> Objective:
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(base)))
    return make(settings, tokenizer, facts, EncodeOptions(max_length=64))


def case_on(
    base: Path, micro_batch_size: int, dtype: torch.dtype, dropout: float = 0.2, **settings_of_case: Any
) -> Case:
    """A run over ROWS rows, whose weights have this dtype. The adapter differs from 0."""
    settings = EmbedSettings.model_validate({"method": "embed"})
    objective = objective_on(base, settings)
    rows = ListedRows([objective.rows.encode(make_example(example_of(number)), "") for number in range(ROWS)])
    accumulated = 8 // micro_batch_size
    training = TrainingSection(
        max_steps=2, epochs=None, micro_batch_size=micro_batch_size, gradient_accumulation_steps=accumulated, seed=3
    )
    section = HeadlessModel(name_or_path=str(base), dtype="float32", family="embedder")
    from tunekit.recipe.adapters.lora import LoraSettings

    adapter = LoraSettings(r=4, alpha=8.0, dropout=dropout)
    case = make_case(
        base, rows, training=training, adapter=adapter, model=section, objective=settings, **settings_of_case
    )
    case.parts.objective, case.steps._kind = objective, objective.rows
    with torch.no_grad():
        for number, tensor in enumerate(case.adapter.trained().values()):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)) / 8)
    case.model.base.net.to(dtype)
    case.model.base.dtype = dtype
    return case


def prepared_work(case: Case, step: StepBatches, splitting: Splitting | None = None) -> StepWork:
    case.parts.splitting = splitting
    return case.work(case.parts.prepare_step(step), micro_batches=len(step.batches))


def gradients(case: Case) -> Tensor:
    return torch.cat([tensor.grad.flatten().double() for tensor in case.adapter.trained().values()])


def run_step(case: Case, work: StepWork) -> tuple[float, Tensor]:
    case.model.clear_gradient()
    with case.model.training_mode(True):
        [result] = case.parts.engine.run([work])
    return float(result.checked().total), gradients(case)


def by_autograd(case: Case, work: StepWork) -> tuple[float, Tensor]:
    """The loss of the step and its gradient, from one graph over all its parts."""
    case.model.clear_gradient()
    attempt, texts, counts = StepAttempt(work), list[Tensor](), list[int]()
    with case.model.training_mode(True):
        for part in attempt.parts:
            with calling(attempt.call(part)) as call:
                seed_layer(call, OUTSIDE_LAYERS)
                output = case.model.output(part.batch.inputs)
                seed_layer(call, AFTER_LAYERS)
                texts.append(case.parts.objective.loss.embed(output, part.batch))
            counts += part.batch.targets["counts"].tolist()
        loss = embedding_loss(case.parts.objective.loss.settings, torch.cat(texts), RowTexts(counts))
        loss.backward()
    return float(loss), gradients(case)


def assert_equal(ours: tuple[float, Tensor], theirs: tuple[float, Tensor], loss: float, gradient: float) -> None:
    assert abs(ours[0] - theirs[0]) <= loss * abs(theirs[0])
    assert float((ours[1] - theirs[1]).norm()) <= gradient * float(theirs[1].norm())


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_loss_and_gradient_equal_autograd_over_the_whole_step(
    kind: str, micro_batch_size: int, dropping_bert: Path, llama: Path
) -> None:
    """In float64, with dropout in the base and in the adapter."""
    case = case_on(dropping_bert if kind == "encoder" else llama, micro_batch_size, torch.float64)
    for step in case.steps.after(0):
        work = prepared_work(case, step)
        assert ("gradient" in work.batches.batches[0].targets) == (micro_batch_size < 8)
        assert_equal(run_step(case, work), by_autograd(case, work), 1e-9, 1e-9)


def test_a_float32_run_is_as_exact_as_float32(dropping_bert: Path) -> None:
    case = case_on(dropping_bert, 2, torch.float32)
    work = prepared_work(case, next(case.steps.after(0)))
    assert_equal(run_step(case, work), by_autograd(case, work), 1e-6, 1e-5)


def test_a_streamed_decoder_computes_the_same_step(llama: Path) -> None:
    resident, streamed = (
        case_on(llama, 2, torch.float32, streaming=streaming) for streaming in (None, {"pass_size": 3})
    )
    ours, theirs = (run_step(case, prepared_work(case, next(case.steps.after(0)))) for case in (streamed, resident))
    assert_equal(ours, theirs, 1e-6, 1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_single_micro_batch_that_runs_out_of_memory_equals_autograd_over_its_parts(
    dropout: float, bert: Path, dropping_bert: Path
) -> None:
    """Memory runs out in the backward pass, when the loss has been computed directly; then also in the next step,
    which is prepared in parts from the start."""
    case = case_on(dropping_bert if dropout else bert, 8, torch.float64, dropout)
    failing = [True]
    loss = type(case.parts.objective.loss).loss

    def limited(self: Any, output: ModelOutput, batch: Any) -> Any:
        if len(batch.rows) == 8:
            assert failing.pop()
            raise torch.OutOfMemoryError("out of memory")
        return loss(self, output, batch)

    splitting = Splitting()
    steps = list(case.steps.after(0))
    work = prepared_work(case, steps[0], splitting)
    assert "gradient" not in work.batches.batches[0].targets
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(case.parts.objective.loss), "loss", limited)
        ours = run_step(case, work)
        assert not failing
        assert_equal(ours, by_autograd(case, work), 1e-9, 1e-9)  # with the parts of the split
        after = prepared_work(case, replace(steps[0], step=1), splitting)
        assert "gradient" in after.batches.batches[0].targets
        assert_equal(run_step(case, after), by_autograd(case, after), 1e-9, 1e-9)


def test_a_part_of_a_step_that_was_not_prepared_again_raises(bert: Path) -> None:
    case = case_on(bert, 8, torch.float32)
    work = prepared_work(case, next(case.steps.after(0)))
    work = replace(work, batches=replace(work.batches, again=None), splitting=Splitting(tokens=1))
    with pytest.raises(ValueError, match="not prepared again"):
        run_step(case, work)


def test_the_logged_loss_is_the_true_one_and_runs_do_not_depend_on_micro_batches(bert: Path, tmp_path: Path) -> None:
    """The sum of embedding times gradient alone would be 0."""
    sizes = ((1, 8), (2, 4), (8, 1))
    runs = [
        train(
            write_case(
                tmp_path / str(size), bert, training={"micro_batch_size": size, "gradient_accumulation_steps": steps}
            )
        )
        for size, steps in sizes
    ]
    first, *others = ([record.get("loss", record.get("eval")) for record in records(run)] for run in runs)
    assert min(value for value in first if isinstance(value, float)) > 0.1
    for other in others:
        for ours, theirs in zip(other, first, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5)
    assert losses(runs[0])[-1] < losses(runs[0])[0]


@pytest.mark.slow
@pytest.mark.parametrize("objective", [{}, {"loss": "triplet"}])
def test_two_ranks_give_the_curve_of_one(bert: Path, tmp_path: Path, objective: dict[str, Any]) -> None:
    recipe = write_case(tmp_path, bert, objective)
    if objective:
        rows = [example_of(2 * number + 1) for number in range(ROWS)]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for world in (1, 2):
        run, steps = tmp_path / f"run{world}", "training.gradient_accumulation_steps=3"
        for ended in train_in_ranks(recipe, run, steps, world=world):
            assert ended.code == 0, ended.text
    one, two = (losses(tmp_path / f"run{world}") for world in (1, 2))
    assert one == pytest.approx(two, rel=2e-5)
    assert len(one) == len(two) > 4


def test_pooling_equals_plain_formulas() -> None:
    hidden = torch.randn(3, 5, 4, dtype=torch.float64)
    lengths = torch.tensor([5, 1, 3])
    modes: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": lambda text: text.mean(0),
        "cls": lambda text: text[0],
        "lasttoken": lambda text: text[-1],
        "max": lambda text: text.amax(0),
        "mean_sqrt_len_tokens": lambda text: text.sum(0) / len(text) ** 0.5,
        "weightedmean": lambda text: (
            torch.stack([text[at] * (at + 1) for at in range(len(text))]).sum(0) / sum(range(1, len(text) + 1))
        ),
    }
    for mode, formula in modes.items():
        wanted = torch.stack([formula(text[:length]) for text, length in zip(hidden, lengths, strict=True)])
        torch.testing.assert_close(pool(hidden, lengths, [mode]), wanted)
    assert pool(hidden, lengths, list(modes)).shape == (3, 4 * len(modes))
    assert pool(hidden.bfloat16(), lengths, ["mean"]).dtype == torch.float32


def test_embeddings_are_those_of_transformers_and_the_pooler_is_left_out(bert: Path) -> None:
    section = HeadlessModel(name_or_path=str(bert), dtype="float32", family="embedder")
    loaded = load_model(section, device=CPU)
    assert "pooler" not in dict(loaded.net.named_children())
    objective = objective_on(bert, EmbedSettings.model_validate({"method": "embed"}))
    rows = [objective.rows.encode(make_example(example_of(number)), "") for number in range(4)]
    batch = objective.rows.collate([[row] for row in rows])
    from tests.support.loop_case import BoundaryStore, TunedModel

    output = TunedModel(loaded, None, BoundaryStore(None)).output(batch.inputs)
    ours = objective.loss.embed(output, batch)
    theirs, tokenizer = BertModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    texts = [value for number in range(4) for value in example_of(number).values()]
    for text, vector in zip(texts, ours, strict=True):
        with torch.no_grad():
            hidden = theirs(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, hidden / hidden.norm(), rtol=1e-5, atol=1e-6)


def test_no_text_is_twice_in_a_step() -> None:
    generator = np.random.default_rng(0)
    hashes = {row: frozenset(generator.integers(0, 40, 2).tolist()) for row in range(60)}
    order = generator.permutation(60).tolist()
    kept = without_repeats(order, hashes, 8)
    assert len(set(kept)) == len(kept)
    for start in range(0, len(kept), 8):
        some = [key for row in kept[start : start + 8] for key in hashes[row]]
        assert len(some) == len(set(some))
    assert without_repeats(order, {row: frozenset([row]) for row in range(60)}, 8) == order
    assert without_repeats([0, 1, 2], dict.fromkeys(range(3), frozenset([7])), 2) == [0]


def test_a_step_has_rows_of_one_kind() -> None:
    """Rows 0-29 are of one kind, the others of another one. The larger rest is the last step."""
    generator = np.random.default_rng(1)
    hashes = {row: frozenset([row]) for row in range(44)}
    kinds, order = [int(row >= 30) for row in range(44)], generator.permutation(44).tolist()
    chosen = by_kind(order, hashes, 8, kinds, shuffle=True)
    steps = [[kinds[row] for row in chosen[start : start + 8]] for start in range(0, len(chosen), 8)]
    assert [len(step) for step in steps] == [8, 8, 8, 8, 6]
    assert all(len(set(step)) == 1 for step in steps)
    assert [step[0] for step in steps[:-1]] == [0, 0, 1, 0]  # spread evenly
    assert [kinds[row] for row in by_kind(order, hashes, 8, kinds, shuffle=False)[:32]] == [0] * 24 + [1] * 8
    assert len(set(chosen)) == len(chosen) == 38
    assert by_kind(order, hashes, 8, [0] * 44, shuffle=True) == without_repeats(order, hashes, 8)


def test_sources_with_and_without_negatives_share_no_step(bert: Path, tmp_path: Path) -> None:
    pairs = [example_of(2 * number) for number in range(12)]
    triplets = [example_of(2 * number + 1) for number in range(20)]
    recipe = write_case(
        tmp_path, bert, data={"train": [{"path": "pairs.jsonl"}, {"path": "triplets.jsonl"}], "eval": None}
    )
    for name, rows in (("pairs", pairs), ("triplets", triplets)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    objective = objective_on(bert, EmbedSettings.model_validate({"method": "embed"}))
    rows = load_rows(load_recipe(recipe).recipe.data, objective, seed=0)
    for size, accumulated in ((2, 4), (8, 1)):
        more = {"packing": False, "shuffle": True, "seed": 0, "epochs": 2.0, "max_steps": None}
        settings = BatchSettings(size, None, accumulated, 64, **more)
        steps = [[row for batch in step.batches for row in batch.rows] for step in rows.steps(settings).after(0)]
        assert {len({len(row.parts["counts"]) for row in step}) for step in steps} == {1}
        assert sorted(map(len, steps)) == [4, 4, 8, 8, 8, 8, 8, 8]
    with pytest.raises(DataError, match="a source has only 12 rows with its number of texts, and a step has 16 rows"):
        rows.steps(replace(settings, gradient_accumulation_steps=2))


def test_equal_texts_are_equal_in_any_form() -> None:
    assert text_key("caf\u00e9  au\nlait ") == text_key("cafe\u0301 au lait") != text_key("cafe au lait")


def test_columns_have_roles_by_name() -> None:
    row = {"score": "[3, 2, 1]", "negative_2": "c", "negative_1": "b", "passage": "a", "question": "q"}
    assert make_example(row) == EmbeddingExample(("q", "a", "b", "c"), (3.0, 2.0, 1.0))
    assert make_example({"anchor": "q", "positive": "a", "negatives": ["b"]}).texts == ("q", "a", "b")
    with pytest.raises(DataError, match="'query' and 'question' could both be the anchor"):
        make_example({"query": "q", "question": "r", "positive": "a"})
    with pytest.raises(DataError, match="'score' must be a number"):
        make_example({"anchor": "q", "positive": "a", "score": "high"})


@pytest.mark.parametrize(
    ("loss", "texts", "scores", "message"),
    [
        ("multiple_negatives_ranking", 2, (1.0,), "1 scores"),
        ("cosent", 2, (), "reads 2 texts and 1 score"),
        ("cosine", 2, (3.0,), "from -1 to 1"),
        ("online_contrastive", 2, (0.5,), "either 0 or 1"),
        ("triplet", 2, (), "an anchor, a positive and a negative"),
        ("margin_mse", 3, (1.0, 2.0, 3.0), "a teacher's score"),
        ("distill_kl", 3, (1.0,), "a teacher's score"),
    ],
)
def test_rows_that_the_loss_cannot_use_are_errors(
    loss: str, texts: int, scores: tuple[float, ...], message: str, bert: Path
) -> None:
    rows = objective_on(bert, EmbedSettings.model_validate({"method": "embed", "loss": loss})).rows
    with pytest.raises(DataError, match=message):
        rows.encode(EmbeddingExample(tuple("abcd"[:texts]), scores), "")


def test_prompts_and_maximum_lengths_are_those_of_the_folder_unless_the_recipe_states_others(bert: Path) -> None:
    facts = {"prompts": {"query": "query: "}, "max_length": 9, "pooling": ["cls"], "normalize": False}
    example = EmbeddingExample(("one", "two " * 30))
    plain = objective_on(bert, EmbedSettings.model_validate({"method": "embed"}), **facts)
    row = plain.rows.encode(example, "")
    tokenizer = AutoTokenizer.from_pretrained(bert)
    assert row.parts["ids"][: row.parts["counts"][0]].tolist() == tokenizer("query: one")["input_ids"][:9]
    assert row.parts["counts"][1] == 9
    assert plain.facts["pooling"] == ["cls"]
    assert not plain.facts["normalize"]
    values = {"method": "embed", "prompts": {"query": ""}, "max_lengths": {"document": 12}, "pooling": "max"}
    other = objective_on(bert, EmbedSettings.model_validate(values), **facts)
    row = other.rows.encode(example, "")
    assert row.parts["counts"][1] == 12
    assert row.parts["ids"][: row.parts["counts"][0]].tolist() == tokenizer("one")["input_ids"]
    assert other.facts["pooling"] == ["max"]


def test_metrics_do_not_depend_on_the_batch_size_and_an_adapter_is_evaluated_as_its_run(
    bert: Path, tmp_path: Path
) -> None:
    run = train(write_case(tmp_path, bert, training={"max_steps": 3, "epochs": None}))
    found = []
    for target, size in ((run, 1), (run / "adapter", 7)):
        path = tmp_path / f"{size}.json"
        overrides = [f"evaluation.batch_size={size}"]
        evaluate_verb(str(target), str(bert), str(tmp_path / "train.jsonl"), None, (), path, overrides)
        found.append(json.loads(path.read_text("utf-8")))
    for name in ("loss", "ndcg_at_10", "mrr_at_10", "accuracy_at_1"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)
    assert found[0]["ndcg_at_10"] > 0
    assert found[0]["search"]["model"]["ndcg@10"] == pytest.approx(found[0]["ndcg_at_10"])
    assert found[0]["search"]["bm25"]["recall@10"] > 0.5


def test_a_corpus_is_searched_and_must_have_every_positive(bert: Path, tmp_path: Path) -> None:
    """The Matryoshka sizes have a column each in the table of searches."""
    recipe = write_case(
        tmp_path,
        bert,
        {"matryoshka": [32, 8]},
        data={"eval": [{"path": "train.jsonl"}]},
        evaluation={"corpus": "corpus.jsonl", "cutoffs": [1, 4]},
        training={"max_steps": 2, "epochs": None},
    )
    corpus = tmp_path / "corpus.jsonl"
    texts = [*(example_of(number)["document"] for number in range(ROWS)), *(f"another {n}" for n in range(9))]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[1:]), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"the positives of 1 evaluation rows .*train.jsonl:1\) are not documents"):
        train(recipe)
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    run = train(recipe)
    search = records(run)[-1]["search"]
    assert list(search) == ["bm25", "model", "model at 8"]
    assert {"accuracy@1", "recall@4", "precision@4", "map@100", "mrr@10", "ndcg@10"} <= search["model"].keys()
    assert "| metric | before training | bm25 | model | model at 8 |" in (run / "report.md").read_text("utf-8")


@pytest.mark.parametrize("loss", ["cosent", "angle", "cosine", "contrastive", "online_contrastive"])
def test_scored_pairs_are_trained_and_correlated(loss: str, bert: Path, tmp_path: Path) -> None:
    recipe = write_case(tmp_path, bert, {"loss": loss}, training={"max_steps": 2, "epochs": None})
    rows = [{"sentence1": f"a {n}", "sentence2": f"b {n % 5}", "score": n % 2} for n in range(ROWS)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    last = records(train(recipe))[-1]["eval"]
    labelled = {"average_precision", "pair_accuracy", "pair_f1"} if "contrastive" in loss else set()
    assert last.keys() == {"loss", "spearman", "pearson"} | labelled


@pytest.mark.parametrize(("loss", "metric"), [("multiple_negatives_ranking", "ndcg_at_10"), ("cosine", "spearman")])
def test_the_best_checkpoint_is_chosen_by_a_metric_of_the_search(
    loss: str, metric: str, bert: Path, tmp_path: Path
) -> None:
    """The rate is so high that the last step is rarely the best."""
    training = {"max_steps": 6, "epochs": None, "learning_rate": 0.3, "eval_steps": 1, "save_steps": 1}
    recipe = write_case(
        tmp_path,
        bert,
        {"loss": loss},
        training=training,
        evaluation={"metrics": ["loss", metric], "best": f"eval.{metric}"},
        data={"eval": 0.5},
    )
    if loss == "cosine":
        rows = [{"sentence1": f"a {n}", "sentence2": f"b {n % 5}", "score": n % 2} for n in range(ROWS)]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = train(recipe)
    values = {record["step"]: record["eval"][metric] for record in records(run) if "eval" in record}
    best = json.loads((run / "report.json").read_text("utf-8"))["best_step"]
    assert values[best] == max(value for step, value in values.items() if step)


def test_a_corpus_without_a_search_is_refused(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"text": "here"}', encoding="utf-8")
    row = json.dumps({"sentence1": "a", "sentence2": "b", "score": 1}) + "\n"
    recipe = write_case(tmp_path, bert, {"loss": "cosine"}, evaluation={"corpus": "corpus.jsonl"})
    (tmp_path / "train.jsonl").write_text(row + row.replace("a", "c"), encoding="utf-8")
    with pytest.raises(RecipeError, match="searches no documents; remove this key"):
        train(recipe)
    with pytest.raises(RecipeError, match=r"evaluation\.corpus: needs evaluation rows"):
        train(recipe, "~data.eval")


def test_a_fully_trained_model_is_a_sentence_transformers_folder(bert: Path, tmp_path: Path) -> None:
    recipe = write_case(tmp_path, bert)
    values = json.loads(recipe.read_text("utf-8"))
    recipe.write_text(json.dumps({**values, "adapter": {"method": "full"}}), encoding="utf-8")
    model = train(recipe) / "model"
    assert read_modules(model)["pooling"] == ["mean"]


def hashes_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def test_the_export_for_sentence_transformers_is_the_merged_folder(bert: Path, tmp_path: Path) -> None:
    stated = {"prompts": {"query": "find: "}, "max_lengths": {"document": 48}, "pooling": "cls"}
    run = train(write_case(tmp_path, bert, stated, training={"max_steps": 2, "epochs": None}))
    merge_verb(str(run), str(tmp_path / "merged"), None, None, [])
    export_verb(str(run), "sentence-transformers", str(tmp_path / "exported"))
    assert hashes_of(tmp_path / "exported") == hashes_of(tmp_path / "merged")
    assert read_modules(tmp_path / "exported") == {
        "normalize": True,
        "pooling": ["cls"],
        "prompts": {"query": "find: "},
        "max_length": 48,
    }


def test_a_folder_in_the_newer_schema_is_a_target_and_exported_in_the_older_one(bert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert, tmp_path / "newer"))
    write_newer_schema(folder)
    objective = load_target(find_target(str(folder), None, []), CPU).objective
    assert objective.facts["pooling"] == ["cls"]
    export_verb(str(folder), "sentence-transformers", str(tmp_path / "older"))
    pooling = json.loads((tmp_path / "older" / "1_Pooling" / "config.json").read_text("utf-8"))
    assert pooling["pooling_mode_cls_token"]
    assert "pooling_mode" not in pooling
    assert read_modules(tmp_path / "older")["prompts"] == {"query": "find: "}
    assert sha256_of(tmp_path / "older" / "model.safetensors") == sha256_of(folder / "model.safetensors")


def test_models_without_embeddings_are_not_exported_for_sentence_transformers(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reads embedding models and rerankers, and the model has no modules\.json"):
        export_verb(str(llama), "sentence-transformers", str(tmp_path / "out"))


def test_a_fully_trained_run_pools_as_its_folder(bert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert, tmp_path / "newer"))
    write_newer_schema(folder)
    recipe = write_case(tmp_path, folder)
    values = json.loads(recipe.read_text("utf-8"))
    values["training"] |= {"max_steps": 2}
    del values["training"]["epochs"]
    recipe.write_text(json.dumps({**values, "adapter": {"method": "full"}}), encoding="utf-8")
    run = train(recipe)
    assert load_target(find_target(str(run), None, []), CPU).objective.facts["pooling"] == ["cls"]


def test_a_resumed_run_has_the_same_bytes(dropping_bert: Path, tmp_path: Path) -> None:
    check_a_resume(write_case(tmp_path, dropping_bert, {"matryoshka": [32, 8]}), "training.save_steps=2")


def test_recipes_with_options_without_effect_are_refused(bert: Path, tmp_path: Path) -> None:
    for objective, message in (
        ({"margin": 1.0}, "objective.margin: has an effect only with"),
        (
            {"loss": "cosent", "directions": ["query_to_doc", "doc_to_doc"]},
            "objective.directions: has an effect only with",
        ),
        ({"directions": ["doc_to_query"]}, "must contain query_to_doc"),
        ({"directions": ["query_to_doc", "doc_to_doc"], "partition": "per_direction"}, "excludes doc_to_doc"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(write_case(tmp_path, bert, objective))


def test_a_chat_with_an_embedding_model_is_refused(bert: Path, tmp_path: Path) -> None:
    loaded = load_target(find_target(str(write_case(tmp_path, bert)), None, []), CPU)
    with pytest.raises(InputError, match="tunekit generate"):
        make_speaker(loaded)


def test_a_budget_of_tokens_is_refused(bert: Path, tmp_path: Path) -> None:
    recipe = write_case(tmp_path, bert)
    values = json.loads(recipe.read_text("utf-8"))
    del values["training"]["micro_batch_size"]
    values["training"]["micro_batch_tokens"] = 100
    recipe.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(TunekitError, match="micro_batch_tokens fixes no number of rows"):
        train(recipe)
