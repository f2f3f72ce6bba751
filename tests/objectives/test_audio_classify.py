"""Audio classification from recipe to merged model, against transformers and peft by hand."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import soundfile
import torch
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, WhisperForAudioClassification

from tests.objectives.test_classify import losses_of, start_as_ours
from tests.support.data_case import write_lines
from tests.support.plans import make_plan
from tests.support.speech_case import RATE, SECONDS, held_sound, keys, write_recipe, write_tiny_whisper
from tests.support.train_case import check_a_resume, check_streamed, losses, train
from tunekit.contracts import EncodeOptions, Row, RowKind
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.encoding.sounds import resampled
from tunekit.data.rows import load_rows
from tunekit.errors import DataError, InputError, ModelError, TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.formats.audio_label import make_example
from tunekit.generate import answer, generate_verb
from tunekit.merge import merge_verb
from tunekit.model.families import make_family
from tunekit.model.load import load_model
from tunekit.model.speech.features import AudioProcessor
from tunekit.model.storage.shards import read_headers
from tunekit.objectives.base import make_objective
from tunekit.objectives.rows.recordings import SILENT
from tunekit.planning.checks import raise_refusals
from tunekit.preview import preview_verb
from tunekit.recipe.data import DataSection, Source
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.audio_classify import AudioClassifySettings
from tunekit.targets.target import find_target, load_target

CPU = torch.device("cpu")
STEPS = 20
LABELS = ("five", "nine", "one")
AUGMENTED = {"apply_spec_augment": True, "mask_time_prob": 0.3, "mask_feature_prob": 0.2, "mask_feature_length": 4}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a key: its tone, of different lengths."""
    folder = tmp_path_factory.mktemp("recordings") / "keys"
    for label in LABELS:
        (folder / label).mkdir(parents=True)
        for number in range(4):
            soundfile.write(folder / label / f"{number}.wav", keys(label, seconds=0.1 + 0.04 * number), RATE)
    return folder


@pytest.fixture(scope="module")
def processor(whisper: Path) -> AudioProcessor:
    processor = make_family("audio_classifier").processor(ModelSection(name_or_path=str(whisper)))
    assert isinstance(processor, AudioProcessor)
    return processor


def write(folder: Path, base: Path, source: Path, **sections: Any) -> Path:
    objective = {"method": "audio_classify", "language": None, **sections.pop("objective", {})}
    path = write_recipe(folder, base, source, **sections)
    values = json.loads(path.read_text("utf-8"))
    values["objective"] = {key: value for key, value in objective.items() if key != "language"}
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def rows_with(processor: AudioProcessor, excess_length: str = "drop") -> RowKind:
    """Rows of the objective audio_classify."""
    options = EncodeOptions(max_length=64, excess_length=excess_length)
    return make_objective(AudioClassifySettings(), processor, options=options).rows


def encoded(processor: AudioProcessor, row: dict[str, Any], excess_length: str = "drop") -> list[Row]:
    """Rows of one example."""
    kind = rows_with(processor, excess_length)
    return [kind.encode(each, "rows:1") for each in kind.examples(make_example(row))]


def wrapped(base: Path, **more: Any) -> peft.PeftModel:
    """transformers' classifier with peft's adapter of the recipes here."""
    torch.manual_seed(5)
    model = WhisperForAudioClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)
    linear = [name for name, module in model.encoder.named_modules() if isinstance(module, torch.nn.Linear)]
    names = sorted({name.rpartition(".")[2] for name in linear})
    saved = ["projector", "classifier"]
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=32, target_modules=names, modules_to_save=saved, **more)
    )


def features_of(base: Path, recordings: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all recordings, by transformers' extractor alone, and their labels."""
    extractor = AutoFeatureExtractor.from_pretrained(base)
    files = sorted(recordings.rglob("*.wav"))
    heard = [resampled(torch.from_numpy(soundfile.read(file, dtype="float32")[0]), RATE, 16000) for file in files]
    made = extractor([each.numpy() for each in heard], sampling_rate=16000, return_tensors="pt").input_features
    return made, torch.tensor([LABELS.index(file.parent.name) for file in files])


# The oracle.


@pytest.mark.drawn
def test_twenty_steps_equal_transformers_and_peft(whisper: Path, recordings: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, whisper, recordings, training={"max_steps": STEPS})
    plan, _ = make_plan(load_recipe(recipe), device=CPU)
    assert not [target.name for target in plan.targets if not target.name.startswith("encoder.layers.")]
    ours = losses(train(recipe))
    theirs = wrapped(whisper)
    start_as_ours(theirs, recipe, tmp_path)
    features, labels = features_of(whisper, recordings)

    def loss_of(step: int) -> torch.Tensor:
        rows = slice(step * 4 % 12, step * 4 % 12 + 4)
        found: torch.Tensor = theirs(input_features=features[rows], labels=labels[rows]).loss
        return found

    assert ours == pytest.approx(losses_of(theirs, recipe, plan.warmup_steps, STEPS, loss_of), abs=1e-5)
    assert ours[-1] < ours[0] / 2


def test_an_adapter_of_peft_is_measured_by_the_labels_that_are_named(
    whisper: Path, recordings: Path, tmp_path: Path
) -> None:
    theirs, folder, out = wrapped(whisper).eval(), tmp_path / "theirs", tmp_path / "e.json"
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(folder)
    features, labels = features_of(whisper, recordings)
    with torch.no_grad():
        logits = theirs(input_features=features).logits
    verb = (str(folder), str(whisper), str(recordings), None, [], str(out))
    evaluate_verb(*verb, ["model.dtype=float32", f"objective.labels=[{', '.join(LABELS)}]"])
    found = json.loads(out.read_text("utf-8"))
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert found["rows"] == len(labels)
    with pytest.raises(TunekitError, match=r"objective\.labels"):
        evaluate_verb(*verb, [])
    with pytest.raises(TunekitError, match="names 2 labels, but the adapter's head has 3 rows"):
        evaluate_verb(*verb, ["objective.labels=[five, nine]"])
    with pytest.raises(TunekitError, match="must be a list of different names"):
        evaluate_verb(*verb, ["objective.labels=[five, five, one]"])
    with pytest.raises(InputError, match="is only for an adapter"):
        evaluate_verb(str(whisper), *verb[1:], ["objective.labels=[five, nine, one]"])


def test_an_adapter_goes_to_peft_and_back(whisper: Path, recordings: Path, tmp_path: Path) -> None:
    run = train(write(tmp_path, whisper, recordings))
    config = json.loads((run / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert sorted(config["modules_to_save"]) == ["classifier", "projector"]
    features, _ = features_of(whisper, recordings)
    model = WhisperForAudioClassification.from_pretrained(whisper, num_labels=3, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(model, str(run / "adapter")).eval()
    family, net = make_family("audio_classifier"), load_target(find_target(str(run), None, []), CPU).model.base.net
    with torch.no_grad():
        expected = theirs(input_features=features).logits
        torch.testing.assert_close(family.logits(net, {"input_features": features}), expected)
        mean = family.hidden(net, {"input_features": features}).mean(dim=1)  # as the loss reads it
        torch.testing.assert_close(family.head(net).logits(mean), expected)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = load_target(find_target(str(tmp_path / "theirs"), str(whisper), ["model.dtype=float32"]), CPU)
    assert again.objective.facts["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    with torch.no_grad():
        torch.testing.assert_close(family.logits(again.model.base.net, {"input_features": features}), expected)


def test_full_training_equals_transformers(whisper: Path, recordings: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, whisper, recordings, training={"max_steps": 6, "learning_rate": 1e-3})
    values = json.loads(recipe.read_text("utf-8")) | {"adapter": {"method": "full"}}
    recipe.write_text(json.dumps(values), encoding="utf-8")
    plan, prepared = make_plan(load_recipe(recipe), device=CPU)
    theirs = WhisperForAudioClassification.from_pretrained(whisper, num_labels=3, dtype=torch.float32)
    theirs.load_state_dict(load_model(prepared.model, device=CPU).net.state_dict())  # with our head
    theirs.encoder.embed_positions.requires_grad_(False)  # as its class says, which from_pretrained forgets
    features, labels = features_of(whisper, recordings)

    def loss_of(step: int) -> torch.Tensor:
        rows = slice(step * 4 % 12, step * 4 % 12 + 4)
        found: torch.Tensor = theirs(input_features=features[rows], labels=labels[rows]).loss
        return found

    run = train(recipe)
    assert losses(run) == pytest.approx(losses_of(theirs, recipe, plan.warmup_steps, 6, loss_of), abs=1e-5)
    model = AutoModelForAudioClassification.from_pretrained(run / "model")
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-3, atol=1e-4)


# Bases and their heads.


def test_the_decoder_is_neither_read_nor_counted(whisper: Path, recordings: Path, tmp_path: Path) -> None:
    plan, prepared = make_plan(load_recipe(write(tmp_path, whisper, recordings)), device=CPU)
    encoder = WhisperForAudioClassification.from_pretrained(whisper, num_labels=3)
    assert plan.model.total_parameters == sum(parameter.numel() for parameter in encoder.parameters())
    for quantization in ("none", "int8_weight_only"):
        section = prepared.model.model_copy(update={"quantization": quantization})
        base = load_model(section, device=CPU)
        (note,) = base.notes  # and none of tensors that are not used
        assert "do not contain projector, classifier; these modules are initialised at random" in note
        assert not any("decoder" in name for name, _ in base.net.named_modules())
        for name in ("projector", "classifier"):  # drawn, and never packed
            assert type(base.net.get_submodule(name)) is torch.nn.Linear
            assert float(base.net.get_parameter(f"{name}.weight").std()) > 0
    packed: Any = base.net.get_submodule("encoder.layers.0.fc1")
    assert type(packed) is not torch.nn.Linear


def test_a_head_of_the_base_is_kept_where_it_has_the_labels(whisper: Path, recordings: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    own = WhisperForAudioClassification.from_pretrained(
        whisper, num_labels=3, id2label=dict(enumerate(("one", "nine", "five")))
    )
    own.save_pretrained(tmp_path / "own")
    for file in whisper.glob("preprocessor_config.json"):
        shutil.copy(file, tmp_path / "own")

    def heads(**objective: Any) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        recipe = write(tmp_path, tmp_path / "own", recordings, objective=objective)
        _, prepared = make_plan(load_recipe(recipe), device=CPU)
        net = load_model(prepared.model, device=CPU).net
        notes = [note for note in prepared.rows.objective.notes if "head" in note]
        return net.get_parameter("projector.weight"), net.get_parameter("classifier.weight"), notes

    projector, classifier, notes = heads()
    assert notes == ["the head of the base is kept, with its labels: one, nine, five"]
    assert torch.equal(projector, own.projector.weight)
    assert torch.equal(classifier, own.classifier.weight)
    projector, classifier, notes = heads(labels=["one", "nine", "five", "six"])
    assert "the base's head (one, nine, five) is not used" in notes[0]
    assert torch.equal(projector, own.projector.weight), "it has nothing to do with the labels"
    assert classifier.shape[0] == 4


def test_other_encoders_are_refused(whisper: Path, recordings: Path, tmp_path: Path) -> None:
    config = json.loads((whisper / "config.json").read_text("utf-8"))
    extractor = (whisper / "preprocessor_config.json").read_text("utf-8")
    waves = {"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForSequenceClassification"]}
    cases = (
        (waves, r"\(wav2vec2\) .* it is not a Whisper model. .* raw waveforms"),
        (
            config | {"use_weighted_layer_sum": True},
            r"\(whisper\) .* its head mixes all layers .* \(use_weighted_layer_sum\)",
        ),
    )
    for number, (written, said) in enumerate(cases):
        folder = tmp_path / str(number)
        shutil.copytree(whisper, folder)
        (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
        (folder / "preprocessor_config.json").write_text(extractor, encoding="utf-8")
        with pytest.raises(TunekitError, match=said) as caught:
            make_plan(load_recipe(write(tmp_path, folder, recordings)), device=CPU)
        assert caught.value.exit_code == 2
        assert len(caught.value.problems) == 1, "said once"
        with pytest.raises(ModelError, match=said):
            make_family("audio_classifier").processor(ModelSection(name_or_path=str(folder)))


# Steps.


@pytest.mark.drawn
def test_micro_batches_change_nothing_and_evaluation_hears_all(whisper: Path, recordings: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, whisper, recordings, objective=AUGMENTED)
    one = losses(train(recipe, f"output.dir={tmp_path / 'one'}"))
    four = ("training.micro_batch_size=1", "training.gradient_accumulation_steps=4")
    assert losses(train(recipe, *four, f"output.dir={tmp_path / 'four'}")) == pytest.approx(one, rel=1e-5)
    plain = losses(train(recipe, "objective.apply_spec_augment=false", f"output.dir={tmp_path / 'plain'}"))
    assert all(abs(a - b) > 1e-4 for a, b in zip(one, plain, strict=True))
    objective: Any = make_plan(load_recipe(recipe), device=CPU)[1].rows.objective
    assert objective.evaluation_copy().prepare_step(None, "as it is") == "as it is"


@pytest.mark.drawn
def test_a_resumed_run_is_the_same_to_the_bit(whisper: Path, recordings: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, whisper, recordings, objective=AUGMENTED, adapter={"dropout": 0.1})
    check_a_resume(recipe, "training.max_steps=6", "training.save_steps=3", "data.shuffle=true")


@pytest.mark.parametrize("streaming", ["host", pytest.param("disk", marks=pytest.mark.slow)])
def test_streamed_layers_compute_the_same(streaming: str, whisper: Path, recordings: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, whisper, recordings, objective=AUGMENTED)
    check_streamed(recipe, streaming)


@pytest.mark.parametrize("kind", ["int8", pytest.param("int8_weight_only", marks=pytest.mark.slow)])
def test_a_packed_base_learns(kind: str, whisper: Path, recordings: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, whisper, recordings, training={"max_steps": 7})
    dense = losses(train(recipe, f"output.dir={tmp_path / 'dense'}"))
    packed = losses(train(recipe, f"model.quantization={kind}", f"output.dir={tmp_path / 'packed'}"))
    assert packed == pytest.approx(dense, rel=0.05)
    assert packed != dense
    assert packed[6] < packed[0]  # of the same rows


@pytest.mark.drawn
def test_nf4_is_trained_and_merged(tmp_path: Path, recordings: Path) -> None:
    wide = write_tiny_whisper(tmp_path / "wide", d_model=64, encoder_ffn_dim=64, decoder_ffn_dim=64)
    recipe = write(tmp_path, wide, recordings, model={"quantization": "nf4"}, training={"max_steps": 13})
    run = train(recipe)
    assert losses(run)[12] < losses(run)[0]  # of the same rows
    merge_verb(str(run), str(tmp_path / "merged"), None, "quantized", [])
    skipped = json.loads((tmp_path / "merged" / "config.json").read_text("utf-8"))["quantization_config"]
    assert {"projector", "classifier"} <= set(skipped["llm_int8_skip_modules"])
    prompts = [str(file) for file in sorted(recordings.rglob("*.wav"))]
    both = [
        load_target(find_target(str(where), None, ["model.dtype=float32"]), CPU) for where in (run, tmp_path / "merged")
    ]
    assert answer(both[0], prompts) == answer(both[1], prompts)


def test_a_base_of_float32_is_merged_as_such_whatever_was_computed_in(
    whisper: Path, recordings: Path, tmp_path: Path
) -> None:
    run = train(write(tmp_path, whisper, recordings, model={"dtype": "bfloat16"}, training={"max_steps": 2}))
    merge_verb(str(run), str(tmp_path / "merged"), None, None, [])
    assert {each.dtype for each in read_headers(tmp_path / "merged").values()} == {torch.float32}
    assert json.loads((tmp_path / "merged" / "config.json").read_text("utf-8"))["dtype"] == "float32"


@pytest.mark.drawn
def test_a_folder_packed_from_float32_is_read_in_bfloat16(tmp_path: Path, recordings: Path) -> None:
    wide = write_tiny_whisper(tmp_path / "wide", d_model=64, encoder_ffn_dim=64, decoder_ffn_dim=64)
    settings = {"quantization": "nf4", "dtype": "float32"}
    run = train(write(tmp_path, wide, recordings, model=settings, training={"max_steps": 2}))
    merge_verb(str(run), str(tmp_path / "merged"), None, "quantized", [])
    found = load_target(find_target(str(tmp_path / "merged"), None, ["model.dtype=bfloat16"]), CPU)
    assert {each.dtype for each in found.model.base.net.parameters()} == {torch.bfloat16}
    assert answer(found, [str(file) for file in sorted(recordings.rglob("*.wav"))])


def test_streamed_data_equals_loaded_data(whisper: Path, recordings: Path, tmp_path: Path) -> None:
    files = sorted(recordings.rglob("*.wav"))
    table = tmp_path / "rows.jsonl"  # a folder of classes is small, and read whole
    table.write_text("".join(json.dumps({"audio": str(f), "label": f.parent.name}) + "\n" for f in files), "utf-8")
    recipe = write(tmp_path, whisper, table, objective={"labels": list(LABELS)})
    loaded = losses(train(recipe, f"output.dir={tmp_path / 'loaded'}"))
    streamed = losses(train(recipe, "data.train.0.streaming=true", f"output.dir={tmp_path / 'streamed'}"))
    assert streamed == loaded


# Sources.


def test_sources_of_every_kind_give_the_same_rows(processor: AudioProcessor, recordings: Path, tmp_path: Path) -> None:
    import datasets

    files = sorted(recordings.rglob("*.wav"))
    lines = [{"file_name": str(file), "label": file.parent.name} for file in files]
    folder = tmp_path / "listed"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    table = recordings.parent / "table.csv"
    named = "".join(f"keys/{file.parent.name}/{file.name},{file.parent.name}\n" for file in files)
    table.write_text(f"path,label\n{named}", "utf-8")
    held = [{"audio": {"bytes": file.read_bytes(), "path": None}, "label": file.parent.name} for file in files]
    kept = datasets.Dataset.from_list(held).cast_column("audio", datasets.Audio(decode=False))
    kept.to_parquet(str(tmp_path / "held.parquet"))
    objective = make_objective(AudioClassifySettings(), processor)

    def rows_of(path: Path) -> list[bytes]:
        data = DataSection(train=(Source(path=str(path)),))
        found = load_rows(data, objective, seed=0, cache_dir=tmp_path / "cache").train
        return [b"".join(part.tobytes() for part in found[index].parts.values()) for index in range(len(found))]

    expected = rows_of(recordings)
    assert len(expected) == 12
    for path in (folder, table, tmp_path / "held.parquet"):
        assert rows_of(path) == expected, path


def test_a_long_recording_is_dropped_cut_or_refused(processor: AudioProcessor, tmp_path: Path) -> None:
    long = {"audio": str(tmp_path / "long.wav"), "label": "one"}
    samples = np.concatenate([keys("one", seconds=1.0), keys("five", seconds=1.0)])  # 4 s, the model hears 2
    soundfile.write(tmp_path / "long.wav", samples, RATE)
    soundfile.write(tmp_path / "begun.wav", samples[: SECONDS * RATE], RATE)
    with pytest.raises(Dropped, match="recording longer than 2 s, the model's maximum"):
        encoded(processor, long)
    said = r"lasts 4.0 s, but the model's input is at most 2 s; cut the file, or write data.excess_length: truncate"
    with pytest.raises(DataError, match=said):
        encoded(processor, long, "error")
    (problem,) = rows_with(processor, "split").problems()
    assert problem.what == "a recording is not split, because its label may be wrong for a piece of the recording"
    beyond, heard = encoded(processor, long, "truncate")
    (begun,) = encoded(processor, long | {"audio": str(tmp_path / "begun.wav")})
    assert np.array_equal(heard.parts["features"], begun.parts["features"])
    assert (heard.sizes, heard.supervised) == ((100 * SECONDS,), 1)
    assert beyond.supervised == 0
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(long | {"label": label}) + "\n" for label in LABELS), "utf-8")
    data = DataSection(train=(Source(path=str(table)),), excess_length="truncate")
    rows = load_rows(data, make_objective(AudioClassifySettings(), processor), seed=0, cache_dir=tmp_path / "cache")
    assert (len(rows.train), rows.counts.truncated) == (3, 3)


def test_long_recordings_are_held_out_one_by_one(processor: AudioProcessor, tmp_path: Path) -> None:
    names = [f"{number}.wav" for number in range(20)]
    for number, name in enumerate(names):
        soundfile.write(tmp_path / name, np.sin(np.arange(4 * RATE) * (0.05 + 0.01 * number)), RATE)
    labelled = [{"audio": name, "label": LABELS[number % 2]} for number, name in enumerate(names)]
    table = write_lines(tmp_path / "rows.jsonl", labelled)
    data = DataSection(train=(Source(path=str(table)),), eval=0.2, excess_length="truncate")
    rows = load_rows(data, make_objective(AudioClassifySettings(), processor), seed=0, cache_dir=tmp_path / "cache")
    assert rows.evaluation is not None
    assert (len(rows.train), len(rows.evaluation)) == (16, 4)
    assert not any("also training rows" in note for note in rows.notes)


def test_bad_recordings_are_named(processor: AudioProcessor, recordings: Path, tmp_path: Path) -> None:
    whole = (recordings / "one" / "0.wav").read_bytes()
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000, np.float32), RATE)
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), RATE)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("no recording", encoding="utf-8")
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Dropped, match=SILENT):
        encoded(processor, {"audio": str(tmp_path / "silent.wav"), "label": "one"})
    for name, said in (
        ("none.wav", "none.wav has no samples"),
        ("empty.wav", "empty.wav is empty"),
        ("text.wav", "text.wav cannot be read as a recording"),
        ("cut.wav", "cut.wav is cut short"),
        ("gone.wav", "gone.wav does not exist"),
    ):
        with pytest.raises(DataError, match=said):
            encoded(processor, {"audio": str(tmp_path / name), "label": "one"})
    for row, said in (
        ({"audio": str(tmp_path / "x.wav")}, "no field 'label'"),
        (
            {"audio": str(tmp_path / "x.wav"), "label": None},
            "'label' must be a text or a number, or a list of them, not null",
        ),
        ({"label": "one"}, "no field 'audio'"),
    ):
        with pytest.raises(DataError, match=said):
            encoded(processor, row)


def test_what_cannot_be_is_refused(whisper: Path, recordings: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, whisper, recordings)
    for override, said in (
        ("objective.labels=[one, nine]", "the label 'five' is not among the labels (one, nine)"),
        (
            "adapter={method: prompt}",
            "prompt adds vectors to the embeddings of token ids, but an audio classifier reads no token ids",
        ),
        (
            "adapter={method: bitfit}",
            "bitfit cannot train modules outside the adapter, but this objective trains the head",
        ),
        ("data.packing=true", "rows of this objective cannot be packed"),
        ("data.excess_length=split", "its label may be wrong for a piece of the recording"),
        ("evaluation.metrics=[span_f1]", "objective audio_classify has no metric span_f1"),
        ("objective.mask_time_probs=0.1", "unknown key"),
    ):
        with pytest.raises(TunekitError) as caught:
            raise_refusals(make_plan(load_recipe(recipe, [override]), device=CPU)[0])
        assert any(said in str(problem) for problem in caught.value.problems), (override, caught.value.problems)


# Verbs.


@pytest.mark.drawn
def test_every_verb_takes_a_run(
    whisper: Path, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = {"metrics": ["loss", "accuracy", "macro_f1"], "batch_size": 4}
    training = {"learning_rate": 5e-3, "scheduler": "constant", "max_steps": 50, "eval_steps": 50}
    recipe = write(
        tmp_path,
        whisper,
        recordings,
        data={"eval": str(recordings), "shuffle": True},
        evaluation=evaluation,
        training=training,
    )
    preview_verb(load_recipe(recipe), 2, str(tmp_path / "preview.html"))
    assert "(recording: 0." in capsys.readouterr().out
    run = train(recipe)
    assert "token" not in capsys.readouterr().out
    evaluated = [json.loads(line)["eval"] for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()
                 if "eval" in line]  # fmt: skip
    assert evaluated[-1]["accuracy"] == 1.0 > evaluated[0]["accuracy"]
    assert "frames" in (run / "report.html").read_text("utf-8")
    generate_verb(str(run), None, None, str(recordings / "nine"), [])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers == [{"prompt": f"{number}.wav", "answer": "nine"} for number in range(4)]
    alone = tmp_path / "alone"  # the adapter's folder says what it was trained for
    shutil.copytree(run / "adapter", alone)
    target = load_target(find_target(str(alone), str(whisper), []), CPU)
    assert answer(target, [str(recordings / "five" / "0.wav")]) == ["five"]
    soundfile.write(tmp_path / "long.wav", keys("one", seconds=2.0), RATE)
    with pytest.raises(DataError, match=r"long.wav lasts 4.0 s, but the model's input is at most 2 s"):
        answer(target, [str(tmp_path / "long.wav")])
    with pytest.raises(DataError, match="does not exist"):
        answer(target, [str(tmp_path / "absent.wav")])
    with pytest.raises(InputError, match="a classifier always answers with the most likely label"):
        generate_verb(str(run), None, [str(recordings / "five" / "0.wav")], None, [], temperature=1.0)
    capsys.readouterr()
    merge_verb(str(run), str(tmp_path / "merged"), None, None, [])
    assert "token" not in capsys.readouterr().out
    measured = []
    for where in (run, tmp_path / "merged"):
        result = tmp_path / "e.json"
        evaluate_verb(str(where), None, str(recordings), None, ["accuracy"], str(result), ["model.dtype=float32"])
        measured.append(json.loads(result.read_text("utf-8")))
    assert measured[1]["loss"] == pytest.approx(measured[0]["loss"], abs=1e-5)
    assert {"loss", "accuracy", "rows", "frames", "labels", "classes"} <= set(measured[0])
    assert [line["label"] for line in measured[0]["classes"]["per_class"]] == list(LABELS)

    model = AutoModelForAudioClassification.from_pretrained(tmp_path / "merged").eval()
    assert not any("decoder" in name for name, _ in model.named_parameters())
    AutoFeatureExtractor.from_pretrained(tmp_path / "merged")
    features, labels = features_of(tmp_path / "merged", recordings)
    with torch.no_grad():
        scores = model(features).logits
    assert [model.config.id2label[number] for number in scores.argmax(dim=1).tolist()] == [
        LABELS[number] for number in labels.tolist()
    ]
    ours = torch.nn.functional.cross_entropy(scores, labels)
    assert float(ours) == pytest.approx(measured[0]["loss"], abs=1e-5)


def test_recordings_may_be_held_in_memory(processor: AudioProcessor) -> None:
    media = held_sound("one")
    (row,) = encoded(processor, {"audio": {"bytes": media.data, "path": media.path}, "label": 3})
    assert bytes(row.parts["label"]) == b"3"
    assert rows_with(processor).spans(row)[0].title == "label: 3 (recording: 0.30 s)"
