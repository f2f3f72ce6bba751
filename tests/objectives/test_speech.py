"""Speech to text: rows and losses against transformers and peft, what a step draws, and every verb."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import soundfile
import torch
from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import _compute_mask_indices

from tests.objectives.test_classify import losses_of, start_as_ours
from tests.support.plans import make_plan
from tests.support.speech_case import RATE, SECONDS, keys, texts, write_recipe, write_sounds, write_tiny_whisper
from tests.support.train_case import check_a_resume, check_streamed, losses, train
from tunekit.contracts import EncodeOptions, Row, RowKind
from tunekit.data.encoding.outcomes import Dropped, SourceEncoder
from tunekit.data.encoding.sounds import pieces, quietest, resampled
from tunekit.data.reading.lines import RawRow
from tunekit.data.reading.sound import opened
from tunekit.data.rows import load_rows
from tunekit.errors import DataError, InputError, TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.formats.media import Media
from tunekit.formats.transcript import make_example
from tunekit.generate import answer, generate_verb
from tunekit.merge import merge_verb
from tunekit.model.families import make_family
from tunekit.model.speech.processor import SpeechProcessor, load_speech_processor
from tunekit.objectives.base import make_objective
from tunekit.objectives.rows.recordings import SILENT
from tunekit.objectives.rows.spec_augment import drawn_masks, masked
from tunekit.objectives.rows.transcripts import EMPTY, TranscriptRows
from tunekit.preview import preview_verb
from tunekit.recipe.data import DataSection, Source
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.speech import SpeechSettings
from tunekit.targets.target import find_target, load_target

CPU = torch.device("cpu")
STEPS = 20
OPTIONS = EncodeOptions("assistant", None, 64, "drop")
AUGMENTED = {"apply_spec_augment": True, "mask_time_prob": 0.3, "mask_feature_prob": 0.2, "mask_feature_length": 4}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_whisper(tmp_path_factory.mktemp("english"), multilingual=False)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sounds(tmp_path_factory.mktemp("sounds") / "keys", texts(12))


@pytest.fixture(scope="module")
def processor(whisper: Path) -> SpeechProcessor:
    return load_speech_processor(ModelSection(name_or_path=str(whisper)))


def rows_with(
    processor: SpeechProcessor, settings: SpeechSettings | None = None, excess_length: str = "drop"
) -> RowKind:
    """Rows of the objective speech."""
    options = EncodeOptions(max_length=64, excess_length=excess_length)
    return make_objective(settings or SpeechSettings(language="en"), processor, options=options).rows


def encoded(processor: SpeechProcessor, settings: SpeechSettings | None = None, **row: Any) -> list[Row]:
    """Rows of one example."""
    kind = rows_with(processor, settings, row.pop("excess_length", "drop"))
    return [kind.encode(each, "rows:1") for each in kind.examples(make_example(row))]


# The oracle.


@pytest.mark.drawn
def test_twenty_steps_equal_transformers_and_peft(whisper: Path, sounds: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, whisper, sounds, training={"max_steps": STEPS})
    plan, _ = make_plan(load_recipe(recipe), device=CPU)
    ours = losses(train(recipe))
    model = WhisperForConditionalGeneration.from_pretrained(whisper, dtype=torch.float32)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    names = sorted({name.rpartition(".")[2] for name in linear} - {"proj_out"})
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=32, target_modules=names))
    start_as_ours(theirs, recipe, tmp_path)
    extractor, tokenizer = AutoFeatureExtractor.from_pretrained(whisper), AutoTokenizer.from_pretrained(whisper)
    prefix = tokenizer.convert_tokens_to_ids(["<|en|>", "<|transcribe|>", "<|notimestamps|>"])
    written = texts(12)

    def loss_of(step: int) -> torch.Tensor:
        total, count = torch.zeros(()), 0
        for number in range(step * 4 % 12, step * 4 % 12 + 4):
            samples, rate = soundfile.read(sounds / f"{number}.wav", dtype="float32")
            heard = resampled(torch.from_numpy(samples), rate, 16000).numpy()
            features = extractor(heard, sampling_rate=16000, return_tensors="pt").input_features
            text = tokenizer(" " + written[number], add_special_tokens=False)["input_ids"]
            labels = torch.tensor([[*prefix, *text, tokenizer.eos_token_id]])
            total = total + theirs(input_features=features, labels=labels).loss * labels.shape[1]
            count += labels.shape[1]
        return total / count

    assert ours == pytest.approx(losses_of(theirs, recipe, plan.warmup_steps, STEPS, loss_of), rel=1e-5)


def test_an_answer_begins_as_transformers_begins_it(processor: SpeechProcessor, english: Path) -> None:
    native = AutoTokenizer.from_pretrained(processor.folder)
    for language, task, times in (
        ("de", "translate", False),
        ("english", "transcribe", True),
        ("<|en|>", "transcribe", False),
    ):
        code = {"english": "en", "<|en|>": "en"}.get(language, language)
        names = ["<|startoftranscript|>", f"<|{code}|>", f"<|{task}|>", *([] if times else ["<|notimestamps|>"])]
        assert processor.prefix(language, task, times) == native.convert_tokens_to_ids(names)
    alone = load_speech_processor(ModelSection(name_or_path=str(english)))
    names = ["<|startoftranscript|>", "<|notimestamps|>"]
    assert alone.prefix(None, "transcribe", False) == native.convert_tokens_to_ids(names)
    for language, task in (("de", "transcribe"), (None, "translate")):
        with pytest.raises(DataError, match="only transcribe English"):
            alone.prefix(language, task, False)
    with pytest.raises(DataError, match=r"unknown language 'klingon'; write a name or a code: de, en"):
        processor.prefix("klingon", "transcribe", False)
    with pytest.raises(DataError, match="is multilingual, but no language is given"):
        processor.prefix(None, "transcribe", False)


def test_answers_are_those_of_transformers(whisper: Path, sounds: Path) -> None:
    target = load_target(find_target(str(whisper), None, ["evaluation.max_new_tokens=8", "model.dtype=float32"]), CPU)
    paths = [str(sounds / f"{number}.wav") for number in range(3)]
    net = WhisperForConditionalGeneration.from_pretrained(whisper, dtype=torch.float32).eval()
    extractor, tokenizer = AutoFeatureExtractor.from_pretrained(whisper), AutoTokenizer.from_pretrained(whisper)
    expected = []
    for path in paths:
        samples, rate = soundfile.read(path, dtype="float32")
        heard = resampled(torch.from_numpy(samples), rate, 16000).numpy()
        features = extractor(heard, sampling_rate=16000, return_tensors="pt").input_features
        ids = net.generate(features, max_new_tokens=8, max_length=None, task="transcribe")
        expected.append(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    assert answer(target, paths) == expected


# Recordings.


def test_features_are_the_extractors_own(processor: SpeechProcessor) -> None:
    samples = torch.from_numpy(keys("one two three", 16000))
    kept = processor.features(samples)
    whole = processor.extractor(samples.numpy(), sampling_rate=16000, return_tensors="np").input_features[0]
    assert np.array_equal(processor.padded_features(kept.reshape(-1)), whole)
    assert len(kept) <= len(samples) / 160 + 4, "what only fills the sound up is not kept"


@pytest.mark.parametrize(("rate", "wanted"), [(8000, 16000), (44100, 16000), (48000, 16000), (11025, 16000)])
def test_resampling_keeps_a_tone(rate: int, wanted: int) -> None:
    seconds, pitch = 0.5, 1000.0
    found = resampled(torch.sin(2 * math.pi * pitch * torch.arange(round(seconds * rate)) / rate), rate, wanted)
    assert len(found) == round(seconds * wanted)
    expected = torch.sin(2 * math.pi * pitch * torch.arange(len(found)) / wanted)
    middle = slice(len(found) // 10, -len(found) // 10)
    assert float((found - expected)[middle].abs().max()) < 2e-3
    if rate > wanted:  # what the new rate cannot hold is filtered out
        high = torch.sin(2 * math.pi * 0.7 * wanted * torch.arange(rate) / rate)
        assert float(resampled(high, rate, wanted)[wanted // 10 : -wanted // 10].abs().max()) < 2e-2


def test_channels_and_rates_are_one_sound(processor: SpeechProcessor, tmp_path: Path) -> None:
    for name, channels, rate in (("mono", 1, 16000), ("stereo", 2, 16000), ("surround", 6, 48000)):
        write_sounds(tmp_path / name, ["one two"], channels=channels, rate=rate)
    mono, stereo, surround = (
        encoded(processor, audio=str(tmp_path / name / "0.wav"), text="x")[0].parts["features"]
        for name in ("mono", "stereo", "surround")
    )
    assert np.array_equal(mono, stereo)
    first, second = (processor.padded_features(each)[:, :60] for each in (mono, surround))
    assert float(np.abs(first - second).mean()) < 0.05


def test_cuts_fall_where_it_is_quiet(tmp_path: Path) -> None:
    loud = torch.sin(torch.arange(16000) / 3.0)
    loud[12000:13600] *= 0.001
    assert 12000 < quietest(loud, 8000, 8000, 16000) < 13600
    soundfile.write(tmp_path / "long.wav", np.concatenate([keys("one two three four five six")] * 3), RATE)
    with opened(Media(str(tmp_path / "long.wav"))) as sound:
        found = list(pieces(sound, SECONDS))
        assert [found[0][0], found[-1][1]] == [0, sound.samples]
        assert all(one[1] == other[0] for one, other in pairwise(found))
        assert all(0 < stop - start <= SECONDS * RATE for start, stop in found)
        for _, stop in found[:-1]:
            assert float(np.abs(sound.read(stop - 200, stop + 200)).max()) < 1e-3


# Rows.


def test_labels_have_no_doubled_start(processor: SpeechProcessor, sounds: Path) -> None:
    (row,) = encoded(processor, audio=str(sounds / "0.wav"), text=texts(1)[0])
    batch = rows_with(processor).collate([[row], [row]])
    start = processor.tokenizer.answer_start_id
    assert batch.inputs["decoder_input_ids"][0, 0] == start
    assert start not in batch.targets["labels"]
    assert batch.targets["labels"][0, -1] == processor.tokenizer.eos_id
    assert torch.equal(batch.inputs["decoder_input_ids"][:, 1:], batch.targets["labels"][:, :-1])
    assert row.supervised == row.sizes[1] == batch.targets["labels"].shape[1]
    assert batch.inputs["input_features"].shape == (2, 16, 100 * SECONDS)


def test_a_row_says_its_own_language_and_task(processor: SpeechProcessor, sounds: Path) -> None:
    (row,) = encoded(processor, audio=str(sounds / "0.wav"), text="ja", language="German", task="translate")
    assert row.parts["answer"][:4].tolist() == processor.prefix("de", "translate", False)
    for wrong, said in (({"language": "xx"}, "unknown language 'xx'"), ({"task": "sing"}, "unknown 'task' 'sing'")):
        with pytest.raises(DataError, match=said):
            encoded(processor, audio=str(sounds / "0.wav"), text="x", **wrong)


def test_times_on_request(processor: SpeechProcessor, sounds: Path) -> None:
    settings = SpeechSettings(language="en", timestamps=True)
    segments = [{"start": 0.0, "end": 0.3, "text": "one"}, {"start": 0.31, "end": 0.6, "text": "two"}]
    (row,) = encoded(processor, settings, audio=str(sounds / "0.wav"), text="one two", segments=segments)
    assert processor.text(row.parts["answer"][3:-1].tolist()) == "<|0.00|> one<|0.30|><|0.32|> two<|0.60|>"
    assert processor.no_timestamps not in row.parts["answer"]
    with pytest.raises(DataError, match=r"the row has no 'segments', which objective\.timestamps"):
        encoded(processor, settings, audio=str(sounds / "0.wav"), text="one")


def test_long_sounds_are_cut_between_segments_or_refused(processor: SpeechProcessor, tmp_path: Path) -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    soundfile.write(tmp_path / "long.wav", keys(" ".join(words)), RATE)  # 2.7 s, the model hears 2
    long = {"audio": str(tmp_path / "long.wav"), "text": " ".join(words)}
    with pytest.raises(Dropped, match="longer than 2 s"):
        encoded(processor, **long)
    for excess in ("error", "split"):
        with pytest.raises(
            DataError, match=r"long.wav lasts 2.7 s, but the model's input is at most 2 s; cut the file, or add"
        ):
            encoded(processor, excess_length=excess, **long)
    segments = [{"start": 0.3 * at, "end": 0.3 * at + 0.15, "text": word} for at, word in enumerate(words)]
    first, second = encoded(processor, excess_length="split", segments=segments, **long)
    said = [bytes(row.parts["text"]).decode() for row in (first, second)]
    assert said == ["one two three four five six seven", "eight nine"]
    assert first.sizes[0] + second.sizes[0] == pytest.approx(270, abs=12)
    segments = [{"start": 0.0, "end": 2.5, "text": "all of it"}]
    with pytest.raises(DataError, match="is longer than 2 s; give shorter segments"):
        encoded(processor, excess_length="split", segments=segments, **long)
    (problem,) = rows_with(processor, excess_length="truncate").problems()
    assert problem.what == "truncating a recording would train on text that is no longer in the audio"


def test_an_empty_part_of_a_long_recording_leaves_the_others(processor: SpeechProcessor, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", keys(" ".join(["one"] * 18)), RATE)  # 5.4 s, the model hears 2
    texts = ["first", "", "last"]
    segments = [{"start": 1.8 * at, "end": 1.8 * at + 1.7, "text": text} for at, text in enumerate(texts)]
    kind = rows_with(processor, excess_length="split")
    row = RawRow(1, {"audio": str(tmp_path / "long.wav"), "segments": segments})
    _, rows = SourceEncoder(make_example, kind, "rows").outcome(row)
    assert isinstance(rows, list)
    assert [bytes(row.parts["text"]).decode() for row in rows] == ["first", "last"]
    assert kind.notices == {"parts of the rows left out: empty transcript": 1}


def test_bad_sounds_are_named(processor: SpeechProcessor, sounds: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000, np.float32), RATE)
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), RATE)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("this is no sound", encoding="utf-8")
    whole = (sounds / "0.wav").read_bytes()
    soundfile.write(tmp_path / "flac.wav", keys("one"), RATE, format="FLAC")  # of another kind than its name says
    samples = keys("one").copy()
    samples[5] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(Dropped, match=SILENT):
        encoded(processor, audio=str(tmp_path / "silent.wav"), text="one")
    with pytest.raises(Dropped, match=EMPTY):
        encoded(processor, audio=str(sounds / "0.wav"), text="  ")
    with pytest.raises(Dropped, match="than the 64 tokens that the model can write"):
        encoded(processor, audio=str(sounds / "0.wav"), text="one " * 100)
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    for name, said in (
        ("none.wav", "none.wav has no samples"),
        ("cut.wav", "cut.wav is cut short"),
        ("empty.wav", "empty.wav is empty"),
        ("text.wav", "text.wav cannot be read as a recording"),
        ("nan.wav", "nan.wav contains samples that are NaN or infinite"),
        ("absent.wav", "absent.wav does not exist"),
        (".", "is no file"),
    ):
        with pytest.raises(DataError, match=said):
            encoded(processor, audio=str(tmp_path / name), text="one")
    for row, said in (
        ({"audio": str(sounds / "0.wav")}, "no field 'text'"),
        ({"audio": str(sounds / "0.wav"), "text": None}, "'text' must be text, not null"),
        ({"audio": "", "text": "x"}, "'audio' is empty"),
        ({"audio": {"array": [0.1], "sampling_rate": 8000}, "text": "x"}, "is decoded already"),
    ):
        with pytest.raises(DataError, match=said):
            make_example(row)
    (flac,) = encoded(processor, audio=str(tmp_path / "flac.wav"), text="one")
    (held,) = encoded(processor, audio={"bytes": whole, "path": "0.wav"}, text="one")
    (named,) = encoded(processor, audio=str(sounds / "0.wav"), text="one")
    assert flac.supervised == held.supervised
    assert np.array_equal(held.parts["features"], named.parts["features"])


def test_three_hours_are_refused_without_being_read(processor: SpeechProcessor, tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    with soundfile.SoundFile(path, "w", 100, 1, subtype="PCM_U8") as file:
        file.write(np.full(3 * 3600 * 100, 0.1, np.float32))
    with pytest.raises(DataError, match=r"long.wav lasts 10,800.0 s, but the model's input is at most 2 s"):
        encoded(processor, audio=str(path), text="one", excess_length="error")


# Steps.


def test_masks_are_as_many_as_transformers_draws() -> None:
    settings = SpeechSettings(language="en", apply_spec_augment=True, mask_time_prob=0.2, mask_time_length=5)
    size = 120
    rows = [Row({}, (size, 5), 5, "", number) for number in range(200)]
    ours = np.stack(
        [
            masked(np.ones((4, size), np.float32), drawn_masks(settings, row, 16, (1, 3, row.number)))[0] == 0
            for row in rows
        ]
    )
    np.random.seed(0)
    theirs = _compute_mask_indices((200, size), 0.2, 5, min_masks=2)
    assert ours.mean() == pytest.approx(theirs.mean(), rel=0.05)
    again = drawn_masks(settings, rows[7], 16, (1, 3, 7))
    assert np.array_equal(again, drawn_masks(settings, rows[7], 16, (1, 3, 7)))
    assert not np.array_equal(again, drawn_masks(settings, rows[7], 16, (1, 4, 7)))
    assert not np.array_equal(again, drawn_masks(settings, rows[8], 16, (1, 3, 8)))


@pytest.mark.drawn
def test_micro_batches_change_nothing_and_evaluation_hears_all(whisper: Path, sounds: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, whisper, sounds, objective=AUGMENTED)
    one = losses(train(recipe, "output.dir=" + str(tmp_path / "one")))
    four = ("training.micro_batch_size=1", "training.gradient_accumulation_steps=4")
    assert losses(train(recipe, *four, "output.dir=" + str(tmp_path / "four"))) == pytest.approx(one, rel=1e-5)
    plain = losses(train(recipe, "objective.apply_spec_augment=false", "output.dir=" + str(tmp_path / "plain")))
    assert all(abs(a - b) > 1e-4 for a, b in zip(one, plain, strict=True))
    measured = []
    for run in ("one", "plain"):  # neither has moved before the first step
        evaluate_verb(str(tmp_path / run), None, str(sounds), None, [], str(tmp_path / "e.json"), [])
        measured.append(json.loads((tmp_path / "e.json").read_text("utf-8")))
    assert measured[0]["rows"] == 12
    assert {"loss", "perplexity", "rows", "frames_and_tokens", "supervised_tokens"} <= set(measured[0])


@pytest.mark.drawn
def test_a_resumed_run_is_the_same_to_the_bit(whisper: Path, sounds: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, whisper, sounds, objective=AUGMENTED, adapter={"dropout": 0.1})
    check_a_resume(recipe, "training.max_steps=6", "training.save_steps=3", "data.shuffle=true")


@pytest.mark.parametrize("streaming", ["host", pytest.param("disk", marks=pytest.mark.slow)])
def test_streamed_layers_compute_the_same(streaming: str, whisper: Path, sounds: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, whisper, sounds, objective=AUGMENTED)
    check_streamed(recipe, streaming)


@pytest.mark.parametrize("kind", ["int8", pytest.param("int8_weight_only", marks=pytest.mark.slow)])
def test_a_packed_base_learns(kind: str, whisper: Path, sounds: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, whisper, sounds, training={"max_steps": 8})
    dense = losses(train(recipe, f"output.dir={tmp_path / 'dense'}"))
    packed = losses(train(recipe, f"model.quantization={kind}", f"output.dir={tmp_path / 'packed'}"))
    assert packed == pytest.approx(dense, rel=0.05)
    assert packed != dense
    assert packed[-1] < packed[0]


def test_streamed_data_equals_loaded_data(whisper: Path, sounds: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, whisper, sounds)
    loaded = losses(train(recipe, f"output.dir={tmp_path / 'loaded'}"))
    streamed = losses(train(recipe, "data.train.0.streaming=true", f"output.dir={tmp_path / 'streamed'}"))
    assert streamed == loaded


# Sources.


def test_sources_of_every_kind_give_the_same_rows(processor: SpeechProcessor, sounds: Path, tmp_path: Path) -> None:
    import datasets

    lines = [json.loads(line) for line in (sounds / "metadata.jsonl").read_text("utf-8").splitlines()]
    table = sounds.parent / "table.csv"
    table.write_text("path,sentence\n" + "".join(f"keys/{row['file_name']},{row['text']}\n" for row in lines), "utf-8")
    held = [
        {"audio": {"bytes": (sounds / row["file_name"]).read_bytes(), "path": None}, "text": row["text"]}
        for row in lines
    ]
    kept = datasets.Dataset.from_list(held).cast_column("audio", datasets.Audio(decode=False))
    kept.to_parquet(str(tmp_path / "held.parquet"))
    kept.cast_column("audio", datasets.Audio()).save_to_disk(str(tmp_path / "saved"))
    objective = make_objective(SpeechSettings(language="en"), processor)

    def rows_of(path: Path) -> list[bytes]:
        data = DataSection(train=(Source(path=str(path)),))
        found = load_rows(data, objective, seed=0, cache_dir=tmp_path / "cache").train
        return [b"".join(part.tobytes() for part in found[index].parts.values()) for index in range(len(found))]

    expected = rows_of(sounds)
    assert len(expected) == 12
    for path in (table, tmp_path / "held.parquet", tmp_path / "saved"):
        assert rows_of(path) == expected, path


def test_a_changed_sound_is_heard_anew(processor: SpeechProcessor, tmp_path: Path) -> None:
    folder = write_sounds(tmp_path / "sounds", ["one", "two"])
    objective = make_objective(SpeechSettings(language="en"), processor)
    data = DataSection(train=(Source(path=str(folder)),))
    before = load_rows(data, objective, seed=0, cache_dir=tmp_path / "cache")
    soundfile.write(folder / "0.wav", keys("nine"), RATE)
    after = load_rows(data, objective, seed=0, cache_dir=tmp_path / "cache")
    assert before.fingerprint != after.fingerprint
    assert not np.array_equal(before.train[0].parts["features"], after.train[0].parts["features"])


def test_features_without_room_are_made_in_each_step(
    whisper: Path, sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, whisper, sounds, objective=AUGMENTED)
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "one"))
    kept = losses(train(recipe, f"output.dir={tmp_path / 'kept'}"))
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr("tunekit.objectives.rows.recordings.free_bytes", lambda path: 10**9)
    capsys.readouterr()
    assert losses(train(recipe, f"output.dir={tmp_path / 'made'}")) == kept
    assert "12 recordings read again in each step" in capsys.readouterr().out
    (files,) = (tmp_path / "other" / "tokens").iterdir()
    assert (files / "features.bin").stat().st_size == 0


def test_a_bad_file_is_named_with_its_row(processor: SpeechProcessor, tmp_path: Path) -> None:
    folder = write_sounds(tmp_path / "sounds", ["one", "two", "three"])
    (folder / "1.wav").write_bytes(b"RIFF of nothing")
    with (folder / "metadata.jsonl").open("a", encoding="utf-8") as table:
        table.write(json.dumps({"file_name": "gone.wav", "text": "four"}) + "\n")
    objective = make_objective(SpeechSettings(language="en"), processor)
    with pytest.raises(DataError) as caught:
        load_rows(DataSection(train=(Source(path=str(folder)),)), objective, seed=0, cache_dir=tmp_path / "cache")
    assert [(problem.line, problem.what.partition(":")[0]) for problem in caught.value.problems] == [
        (2, "1.wav cannot be read as a recording"),
        (4, f"{folder / 'gone.wav'} does not exist"),
    ]
    assert all(problem.file == str(folder / "metadata.jsonl") for problem in caught.value.problems)


# Verbs.


@pytest.mark.drawn
def test_every_verb_takes_a_run(
    whisper: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        tmp_path,
        whisper,
        sounds,
        data={"eval": 0.3},
        evaluation={"metrics": ["wer", "cer", "wer_normalized", "cer_normalized"], "max_new_tokens": 6},
    )
    run = train(recipe)
    report = (run / "report.html").read_text("utf-8")
    assert "frames and tokens" in report
    kept = json.loads((run / "evaluation_rows.json").read_text("utf-8"))
    assert all("recording: " in each["text"][0][0] for each in kept["worst"])
    capsys.readouterr()
    generate_verb(str(run), None, None, str(sounds), ["evaluation.max_new_tokens=4"])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["prompt"] for each in answers] == sorted(f"{number}.wav" for number in range(12))
    merge_verb(str(run), str(tmp_path / "merged"), None, None, [], None)
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text("utf-8"))
    assert (written["language"], written["task"]) == ("en", "transcribe")
    assert "forced_decoder_ids" not in written
    WhisperForConditionalGeneration.from_pretrained(tmp_path / "merged")
    AutoFeatureExtractor.from_pretrained(tmp_path / "merged")
    measured = []
    for target in (run, tmp_path / "merged"):
        overrides = ["model.dtype=float32", "evaluation.max_new_tokens=4"]
        evaluate_verb(str(target), None, str(sounds), None, ["wer"], str(tmp_path / "e.json"), overrides)
        measured.append(json.loads((tmp_path / "e.json").read_text("utf-8")))
    assert measured[0]["wer"] == measured[1]["wer"]
    assert set(measured[0]) == {"loss", "perplexity", "wer", "rows", "frames_and_tokens", "supervised_tokens"}
    preview_verb(load_recipe(recipe), 2, str(tmp_path / "preview.html"))
    assert "recording: " in capsys.readouterr().out


def test_what_cannot_be_is_refused(whisper: Path, sounds: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, whisper, sounds)
    for override, said in (
        ("objective.language=klingon", "unknown language 'klingon'"),
        (
            "adapter={method: prompt}",
            "prompt adds vectors to the embeddings of token ids, but a speech model reads no token ids",
        ),
        ("data.packing=true", "rows of this objective cannot be packed"),
        ("data.max_length=80", None),
    ):
        try:
            plan, _ = make_plan(load_recipe(recipe, [override]), device=CPU)
            found = [refusal.message for refusal in plan.refusals]
        except TunekitError as error:
            found = [problem.what for problem in error.problems]
        assert not found if said is None else any(said in each for each in found), (override, found)


def test_a_long_recording_is_written_down_piece_by_piece(english: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", np.concatenate([keys("one two three four five six")] * 3), RATE)
    target = load_target(find_target(str(english), None, ["evaluation.max_new_tokens=3"]), CPU)
    (found,) = answer(target, [str(tmp_path / "long.wav")])
    assert isinstance(found, str)
    with pytest.raises((InputError, DataError), match="does not exist"):
        answer(target, [str(tmp_path / "absent.wav")])


def test_the_family_is_told_by_the_configuration(whisper: Path) -> None:
    from tunekit.model.storage.inspection import family_of_base

    assert family_of_base(ModelSection(name_or_path=str(whisper))) == "speech"
    assert make_family("speech").task_type is None
    processor = load_speech_processor(ModelSection(name_or_path=str(whisper)))
    assert isinstance(make_objective(SpeechSettings(language="en"), processor).rows, TranscriptRows)
