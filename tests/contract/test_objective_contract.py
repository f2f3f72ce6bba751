"""What every objective promises of its rows, and that rows of another shape, such as pairs, pass through unbroken."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.memory.test_streaming_seq2seq import make_net
from tests.support.data_case import objective_of, settings, tokenizer_of, write_lines
from tests.support.image_case import held_picture
from tests.support.loop_case import CPU, ListedRows
from tests.support.pair_case import parts_of
from tests.support.speech_case import held_sound, write_sounds, write_tiny_whisper
from tests.support.steps import run_step
from tests.support.tiny_pipelines import SIZE, saved_pipeline
from tests.support.tiny_vit import write_tiny_vit
from tunekit.adapters.attach import attach_adapter
from tunekit.companions.base import make_companions
from tunekit.contracts import (
    ROW_LOSSES,
    ROW_MARGINS,
    ROW_RIGHT,
    Batch,
    EncodeOptions,
    Objective,
    Processor,
    Row,
    RowKind,
    RowLayout,
)
from tunekit.data.batching.split import split_batch
from tunekit.data.batching.steps import StoredSteps
from tunekit.data.encoding import sources
from tunekit.data.encoding.cache import CODE, PACKAGES, cached_store
from tunekit.data.encoding.store import ChosenRows, Part, StoreWriter, TokenStore
from tunekit.data.rows import load_rows
from tunekit.evaluation.scores import added, prepared
from tunekit.files import cache_folder
from tunekit.formats.audio_label import AudioLabelExample
from tunekit.formats.embedding import EmbeddingExample
from tunekit.formats.example import CompletionExample
from tunekit.formats.image import ImageExample
from tunekit.formats.image_label import ImageLabelExample
from tunekit.formats.labels import LabelExample
from tunekit.formats.preference import PreferenceExample
from tunekit.formats.prompt import PromptExample
from tunekit.formats.reranking import RerankingExample
from tunekit.formats.tags import TagsExample
from tunekit.formats.transcript import TranscriptExample
from tunekit.formats.unpaired import UnpairedExample
from tunekit.memory.splitting import Splitting
from tunekit.model.families import make_family
from tunekit.model.load import load_model
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.objectives.base import make_objective
from tunekit.objectives.rows.answers import SIDES
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.data import DataSection, Source
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.dpo import DpoSettings
from tunekit.recipe.objectives.sft import SftSettings
from tunekit.recipe.reading.names import known_names, settings_class
from tunekit.tuned.model import ModelRun, TunedModel

ANSWERED = tuple(
    CompletionExample(*row)
    for row in (("abc", "defg"), ("z", "ihgfedcba", 0.25), ("keyboard", "xy"), ("12345", "54321", 3.0))
)
LABELLED = tuple(
    LabelExample(*row) for row in (("abc", "yes"), ("ihgfedcba", "no"), ("xy", "yes"), ("12345", "perhaps"))
)
PREFERRED = tuple(
    PreferenceExample(*row) for row in (("abc", "defg", "xyz"), ("z", "ihgfedcba", "i"), ("12345", "1", "54321"))
)
TAGGED = tuple(
    TagsExample(*row)
    for row in ((("abc", "de"), ("B-X", "O")), (("ihgf", "ed", "cba"), ("O", "B-X", "I-X")), (("12345",), ("O",)))
)
UNPAIRED = tuple(
    UnpairedExample(*row) for row in (("abc", "defg", True), ("z", "ihgfedcba", False), ("12345", "1", True))
)
ASKED = tuple(PromptExample(*row) for row in (("abc", "d"), ("zyx", "i"), ("keyboard", None), ("12345", "5")))
SPOKEN = tuple(
    TranscriptExample(held_sound(text), text, language="en") for text in ("one", "two three", "nine", "zero one two")
)
SEEN = tuple(ImageExample(held_picture(number), text) for number, text in enumerate(("abc", "defg", None, "xy")))
SORTED = tuple(
    ImageLabelExample(held_picture(number), label) for number, label in enumerate(("yes", "no", "yes", "perhaps"))
)
HEARD = tuple(
    AudioLabelExample(held_sound(text), label)
    for text, label in (("one", "yes"), ("two three", "no"), ("nine", "yes"), ("zero one two", "perhaps"))
)
GROUPED = tuple(EmbeddingExample(texts) for texts in (("abc", "defg"), ("zyx", "i", "klmno"), ("keyboard", "12345")))
CANDIDATES = (
    RerankingExample("abc", ("defg", "z"), positives=1),
    RerankingExample("zyx", ("i", "klmno", "pq"), positives=1),
    RerankingExample("keyboard", ("12345", "xy"), positives=1),
)
EXAMPLES = {
    "audio_label": HEARD,
    "embedding": GROUPED,
    "image": SEEN,
    "image_label": SORTED,
    "text": ANSWERED,
    "prompt": ASKED,
    "label": LABELLED,
    "preference": PREFERRED,
    "reranking": CANDIDATES,
    "tags": TAGGED,
    "transcript": SPOKEN,
    "unpaired": UNPAIRED,
}  # by the kind that an objective learns from
SAMPLED = {"reward": [{"regex": "[a-m]"}], "num_generations": 2, "max_completion_length": 6}
NEEDED: dict[str, dict[str, Any]] = {
    "dreambooth": {"instance_prompt": "a photo", "resolution": SIZE},
    "speech": {"language": "en"},
    "distill": {"teacher": ModelSection(name_or_path="a teacher")},
    "grpo": SAMPLED,
    "rloo": SAMPLED,
}  # settings without a default
SAMPLES = ("grpo", "rloo")
OPTIONS = EncodeOptions(max_length=64)
every_objective = pytest.mark.parametrize("name", known_names("objectives"))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> LoadedTokenizer:
    return LoadedTokenizer(tokenizer_of(tiny_llama).native, None, answer_start_id=0)


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of each family."""
    bart = tmp_path_factory.mktemp("bart")
    make_net("bart", vocab_size=300).save_pretrained(bart)  # type: ignore[operator]
    whisper = write_tiny_whisper(tmp_path_factory.mktemp("whisper"))
    texts = dict.fromkeys(("causal", "classifier", "token_classifier", "embedder"), tiny_llama)
    pipeline = saved_pipeline(tmp_path_factory.mktemp("pipeline") / "sd", "sd")
    vit = write_tiny_vit(tmp_path_factory.mktemp("vit"))
    return {
        **texts,
        "seq2seq": bart,
        "speech": whisper,
        "diffusion": pipeline,
        "image_classifier": vit,
        "audio_classifier": whisper,
    }


@pytest.fixture(scope="module")
def processors(tokenizer: LoadedTokenizer, folders: dict[str, Path]) -> dict[str, Processor]:
    """What makes rows for a base of each family."""
    own = {
        family: make_family(family).processor(ModelSection(name_or_path=str(folders[family])))
        for family in ("speech", "diffusion", "image_classifier", "audio_classifier")
    }
    texts = ("causal", "classifier", "token_classifier", "embedder", "seq2seq")
    return {**dict.fromkeys(texts, tokenizer), **own}


def make(name: str, processors: Mapping[str, Processor]) -> Objective:
    settings = settings_class("objectives", name)(method=name, **NEEDED.get(name, {}))
    return make_objective(settings, processors[settings.family], options=OPTIONS)  # type: ignore[attr-defined]


def encoded(kind: RowKind) -> list[Row]:
    """Rows of every kind of example that the objective learns from."""
    return [
        kind.encode(one, f"d:{line}")
        for line, example in enumerate(EXAMPLES[kind.example])
        for one in kind.examples(example)
    ]


def make_case(name: str, processors: Mapping[str, Processor]) -> tuple[Objective, list[Row]]:
    """An objective, told of its rows, and rows of every kind of example that it learns from."""
    objective = make(name, processors)
    listed = ListedRows(encoded(objective.rows))
    return objective.learn([listed]), listed.rows


def counted(objective: Objective, rows: Sequence[Row]) -> float:
    """What the loss of rows of `make_case` is divided by."""
    examples = EXAMPLES[objective.rows.example]
    documents = (len(getattr(examples[row.number], "documents", "1")) for row in rows)  # of a reranker's row
    weights = (getattr(examples[row.number], "weight", 1.0) for row in rows)
    return sum(row.supervised * count * weight for row, count, weight in zip(rows, documents, weights, strict=True))


def stored(folder: Path, layout: RowLayout, rows: Sequence[Row]) -> TokenStore:
    """Rows written to files, and mapped."""

    def fill(writer: StoreWriter) -> dict[str, Any]:
        for number, row in enumerate(rows):
            writer.add(row, number, number, number)
        return {}

    cached_store(folder, "rows", layout, fill)
    return cached_store(folder, "rows", layout, lambda writer: pytest.fail("they were written"))[0]


def assert_equal(one: Row, other: Row, layout: RowLayout) -> None:
    assert set(one.parts) == set(other.parts) == set(layout.parts)
    for part, values in one.parts.items():
        assert np.array_equal(values, other.parts[part])
        assert values.dtype == other.parts[part].dtype == np.dtype(layout.parts[part])
    assert (one.sizes, one.supervised, one.origin, one.number) == (
        other.sizes,
        other.supervised,
        other.origin,
        other.number,
    )


@every_objective
def test_rows_survive_the_store(name: str, processors: dict[str, Processor], tmp_path: Path) -> None:
    objective, rows = make_case(name, processors)
    store = stored(tmp_path, objective.rows.layout, rows)
    assert any(isinstance(values, np.memmap) for values in store.parts.values())
    assert set(objective.rows.layout.token_parts) <= set(objective.rows.layout.parts)
    for number, row in enumerate(rows):
        assert len(row.sizes) == objective.rows.layout.sizes
        assert row.supervised > 0
        assert_equal(store.row(number, row.origin, number), row, objective.rows.layout)


@every_objective
def test_another_process_encodes_the_same_rows(name: str, processors: dict[str, Processor]) -> None:
    kind = make(name, processors).rows
    kind.notices.update(["of this process"])
    sent = pickle.loads(pickle.dumps(kind.counting()))
    assert not sent.notices
    for one, row in zip(pickle.loads(pickle.dumps(encoded(sent))), encoded(kind), strict=True):
        assert_equal(one, row, kind.layout)


@every_objective
def test_a_whole_row_is_what_is_cut_at_its_size(name: str, processors: dict[str, Processor]) -> None:
    objective, rows = make_case(name, processors)
    for row in rows:
        length = objective.rows.layout.length(row.sizes)
        assert_equal(objective.rows.cut(row, 0, length), row, objective.rows.layout)
        if not length:  # a picture is never cut
            continue
        assert objective.rows.layout.length(objective.rows.cut(row, 0, length - 1).sizes) == length - 1


@every_objective
def test_a_batch_counts_what_its_rows_do(name: str, processors: dict[str, Processor]) -> None:
    objective, rows = make_case(name, processors)
    layouts = [[[row] for row in rows], [rows[:1], rows[1:]]] if objective.rows.packable else [[[row] for row in rows]]
    for sequences in layouts:
        batch = objective.rows.collate(sequences)
        assert batch.rows == rows
        assert batch.tokens == sum(row.size for row in rows)
        assert batch.supervised == sum(row.supervised for row in rows)
        assert objective.loss.units(batch).tolist() == [counted(objective, rows)]
        assert batch.padded >= batch.tokens


@every_objective
def test_halves_hold_each_row_once_and_add_up(
    name: str, processors: dict[str, Processor], folders: dict[str, Path]
) -> None:
    objective, rows = make_case(name, processors)
    if objective.rows.layout.distinct is not None:
        pytest.skip("the loss compares the rows of a step; tests/objectives/test_embed.py splits such steps")
    section = objective.section(ModelSection(name_or_path=str(folders[objective.family]), dtype="float32"), 0)
    base = load_model(section, device=CPU)
    model = TunedModel(base, None, chunk_tokens=3)
    model.companions = make_companions(objective.companions)
    for companion in model.companions.values():
        if name == "distill":
            vars(companion)["_model"] = TunedModel(load_model(section, device=CPU), None)
        elif name in SAMPLES:
            companion.load(CPU)
    if objective.loss.reference:  # else the policy is its own reference
        model.adapter = attach_adapter(base.net, LoraSettings(r=4), seed=0, head_name="lm_head")
    base.net.eval()
    torch.manual_seed(0)
    for parameter in base.net.parameters():  # so that a row that saw another would show
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    layouts = [[[row] for row in rows]]
    layouts += [[rows], [rows[:1], rows[1:]]] if objective.rows.packable else []
    for sequences in layouts:
        whole = prepared(model, objective, objective.rows.collate(sequences))
        halves = split_batch(whole, objective.rows)
        assert halves is not None
        assert [row for half in halves for row in half.rows] == whole.rows
        losses = [objective.loss.loss(model.output(batch.inputs), batch).total for batch in (whole, *halves)]
        assert float(losses[0]) > 0 or name in SAMPLES  # of which advantages are around 0
        torch.testing.assert_close(losses[1] + losses[2], losses[0], rtol=1e-5, atol=1e-6)
        if name in SAMPLES:  # which measure other completions than those they learn from
            continue
        sums = [objective.loss.sums(model.output(batch.inputs), batch) for batch in (whole, *halves)]
        together = added(sums[1], sums[2])
        assert together.keys() == sums[0].keys()
        for kind, value in sums[0].items():
            torch.testing.assert_close(together[kind].double(), value.double(), rtol=1e-5, atol=1e-6)
        for batch, found in zip((whole, *halves), sums, strict=True):
            assert found["units"].item() == objective.loss.units(batch).item() == counted(objective, batch.rows)
        declared = {*settings_class("objectives", name).sums, ROW_LOSSES}  # type: ignore[attr-defined]
        assert set(sums[0]) - {ROW_RIGHT, ROW_MARGINS} == declared
        assert sums[0]["loss"].item() == pytest.approx(float(losses[0]), rel=1e-5)
        by_itself = [objective.rows.collate([[row]]) for row in whole.rows]  # as prepared: of the same step
        alone = [float(objective.loss.sums(model.output(batch.inputs), batch)["loss"]) for batch in by_itself]
        assert sums[0][ROW_LOSSES].tolist() == pytest.approx(alone, rel=1e-4, abs=1e-6)


# Rows of another shape: a chosen and a rejected answer, which belong together.


BETA = 2.0
PAIRED = objective_of(DpoSettings())
PAIR_LENGTHS = [(5, 9), (7, 3), (12, 4), (6, 6), (3, 11), (8, 5), (4, 4)]


def pair(number: int, lengths: tuple[int, int]) -> Row:
    draw = np.random.default_rng(number)
    sides = [
        (name, draw.integers(3, 250, length).astype(np.int32), np.ones(length, np.bool_))
        for name, length in zip(SIDES, lengths, strict=True)
    ]
    return PAIRED.rows.make_row(parts_of(*sides), f"d:{number}", number)


def expected_losses(net: Any, rows: Sequence[Row], reference: Mapping[int, Any]) -> list[float]:
    """Each pair by itself through the net's own logits."""
    found = []
    for row in rows:
        gains = []
        for place, part in enumerate(("chosen", "rejected")):
            ids = torch.from_numpy(row.parts[part]).long()
            loss = torch.nn.functional.cross_entropy(net(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum")
            gains.append(-float(loss) - float(reference[row.number][place]))
        found.append(-float(torch.nn.functional.logsigmoid(torch.tensor(BETA * (gains[0] - gains[1])))))
    return found


def test_pairs_are_never_split(tiny_llama: Path, tokenizer: LoadedTokenizer, tmp_path: Path) -> None:
    objective, seen = make_objective(DpoSettings(beta=BETA), tokenizer), list[Batch]()
    loss: Any = objective.loss
    object.__setattr__(
        loss, "loss", lambda output, batch, plain=loss.loss: (seen.append(batch), plain(output, batch))[1]
    )
    written = [pair(number, lengths) for number, lengths in enumerate(PAIR_LENGTHS)]
    store = stored(tmp_path, objective.rows.layout, written)
    rows = ChosenRows([Part(store, np.arange(len(store)), "d")])
    chosen = settings(micro_batch_size=None, micro_batch_tokens=60, gradient_accumulation_steps=9)
    (step,) = StoredSteps(rows, objective.rows, chosen).after(0)
    assert sorted(row.number for batch in step.batches for row in batch.rows) == list(range(len(PAIR_LENGTHS)))
    assert max(len(batch.rows) for batch in step.batches) > 1
    assert max(batch.padded for batch in step.batches) <= 60
    for row in (row for batch in step.batches for row in batch.rows):
        assert_equal(row, written[row.number], objective.rows.layout)

    base = load_model(ModelSection(name_or_path=str(tiny_llama), dtype="float32"), device=CPU)
    adapter = attach_adapter(base.net, LoraSettings(r=4), seed=0, head_name="lm_head")
    model, trained = TunedModel(base, adapter), adapter.trained()
    step = objective.prepare_step(ModelRun(model, objective.rows), step)
    reference = {row.number: row.parts["reference"] for batch in step.batches for row in batch.rows}
    assert len(reference) == len(PAIR_LENGTHS)
    generator = torch.Generator().manual_seed(0)
    for parameter in trained.values():  # else the policy is its own reference
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    units = torch.stack([objective.loss.units(batch) for batch in step.batches]).sum(0)
    assert units.tolist() == [len(PAIR_LENGTHS)]

    found = []
    for splitting in (None, Splitting(tokens=1)):
        seen.clear()
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        with model.training_mode(True):
            count = len(step.batches)
            result = run_step(model, objective, step, units, micro_batches=count, splitting=splitting)
        found.append(
            (float(result.total), torch.cat([p.grad.flatten().clone() for p in trained.values() if p.grad is not None]))
        )
        assert sorted(row.number for batch in seen for row in batch.rows) == list(range(len(PAIR_LENGTHS)))
        for batch in seen:
            assert len(batch.inputs["input_ids"]) == 2 * len(batch.rows), "both of each pair"
            assert all("reference" in row.parts for row in batch.rows)
    assert {len(batch.rows) for batch in seen} == {1}, "each pair by itself"
    with torch.no_grad():
        expected = sum(expected_losses(base.net.eval(), written, reference)) / len(written)
    assert abs(expected - float(np.log(2))) > 1e-3, "no pair is as the reference has it"
    assert found[0][0] == pytest.approx(expected, rel=1e-5)
    assert found[1][0] == pytest.approx(expected, rel=1e-5)
    assert float(found[0][1].abs().max()) > 0
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-7)


# What the token cache is kept under.


class WeighedSettings(SftSettings):
    weight: float = 1.0


def test_the_cache_of_one_objective_is_not_another_s(
    tokenizer: LoadedTokenizer, processors: dict[str, Processor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sounds(tmp_path / "keys", ["one"])
    for number, name in enumerate(("p.png", "q.png")):
        (tmp_path / name).write_bytes(held_picture(number).data or b"")
    rows: dict[str, list[dict[str, Any]]] = {
        "embedding": [{"query": "p", "document": "c"}],
        "reranking": [{"query": "p", "document": "c", "label": 1}, {"query": "p", "document": "d", "label": 0}],
        "text": [{"prompt": "p", "completion": "c"}],
        "image": [{"image": "p.png", "text": "c"}],
        "audio_label": [{"audio": "keys/0.wav", "label": "c"}, {"audio": "keys/0.wav", "label": "d"}],
        "image_label": [{"image": "p.png", "label": "c"}, {"image": "q.png", "label": "d"}],
        "label": [{"text": "p", "label": "c"}, {"text": "p", "label": "d"}],
        "prompt": [{"prompt": "p", "answer": "c"}],
        "preference": [{"prompt": "p", "chosen": "c", "rejected": "d"}],
        "tags": [{"words": ["p", "q"], "tags": ["c", "d"]}],
        "transcript": [{"file_name": "keys/0.wav", "text": "one"}],
        "unpaired": [{"prompt": "p", "completion": "c", "label": True}],
    }

    def entries(objective: Objective) -> int:
        path = write_lines(tmp_path / "d.jsonl", rows[objective.rows.example])
        load_rows(DataSection(train=(Source(path=str(path)),)), objective, seed=0, cache_dir=tmp_path / "cache")
        return len(os.listdir(tmp_path / "cache" / "tokens"))

    names = known_names("objectives")
    assert [entries(make(name, processors)) for name in names] == list(range(1, len(names) + 1))
    assert entries(make("sft", processors)) == len(names), "it is kept"
    assert entries(make_objective(WeighedSettings(), tokenizer)) == len(names) + 1
    assert entries(make_objective(WeighedSettings(weight=2.0), tokenizer)) == len(names) + 2
    other = LoadedTokenizer(tokenizer.native, None, answer_start_id=1)
    assert entries(make("seq2seq", {"seq2seq": other})) == len(names) + 3
    monkeypatch.setattr(sources, "code_version", lambda places, packages: "of other code")
    assert entries(make("sft", processors)) == len(names) + 4


@pytest.mark.parametrize(
    "place", ["data", "formats", "objectives", "recipe/objectives", "recipe/data.py", "model/text", "model/speech"]
)
def test_the_cache_follows_every_file_that_decides_a_row(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version: Any = cache_folder.code_version.__wrapped__  # type: ignore[attr-defined]
    copy = tmp_path / "tunekit"
    shutil.copytree(cache_folder.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    here = version(CODE, PACKAGES)
    monkeypatch.setattr(cache_folder, "PACKAGE", copy)
    before = version(CODE, PACKAGES)
    assert before == here
    files = [copy / place] if place.endswith(".py") else sorted((copy / place).rglob("*.py"))
    assert files
    for file in files:
        text = file.read_bytes()
        file.write_bytes(text + b"\n# another line\n")
        assert version(CODE, PACKAGES) != before, file
        file.write_bytes(text)
    assert version(CODE, PACKAGES) == before
    shutil.rmtree(copy / place) if (copy / place).is_dir() else (copy / place).unlink()
    with pytest.raises(FileNotFoundError):
        version(CODE, PACKAGES)
