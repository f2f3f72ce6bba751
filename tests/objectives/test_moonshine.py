"""Moonshine: speech from samples, against transformers and peft."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import soundfile
import torch
from transformers import AutoTokenizer, MoonshineConfig, MoonshineForConditionalGeneration, Wav2Vec2FeatureExtractor

from tests.objectives.test_classify import losses_of, start_as_ours
from tests.support.plans import make_plan
from tests.support.speech_case import texts, write_recipe, write_sounds
from tests.support.train_case import check_a_resume, check_streamed, losses, train
from tunekit.data.encoding.sounds import resampled
from tunekit.errors import DataError, RecipeError
from tunekit.evaluate import evaluate_verb
from tunekit.generate import answer
from tunekit.merge import merge_verb
from tunekit.model.speech.processor import MIN_SAMPLES
from tunekit.model.storage.builtin import tiny_model_folder
from tunekit.recipe.load import load_recipe
from tunekit.targets.target import find_target, load_target

CPU = torch.device("cpu")
STEPS = 20
NO_LANGUAGE = {"language": None}


@pytest.fixture(scope="module")
def moonshine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, of two layers each side, one token a byte."""
    folder = tmp_path_factory.mktemp("moonshine")
    native = AutoTokenizer.from_pretrained(tiny_model_folder("builtin:tiny-llama"))
    native.chat_template = None
    sizes = {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2}
    heads = {"encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4}
    config = MoonshineConfig(
        vocab_size=len(native),
        hidden_size=32,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,
        decoder_start_token_id=native.bos_token_id,
        bos_token_id=native.bos_token_id,
        eos_token_id=native.eos_token_id,
        pad_token_id=native.eos_token_id,
        **sizes,
        **heads,
    )
    torch.manual_seed(0)
    net = MoonshineForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    net.save_pretrained(folder)
    native.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sounds(tmp_path_factory.mktemp("sounds") / "keys", texts(12))


def heard(sounds: Path, number: int) -> torch.Tensor:
    samples, rate = soundfile.read(sounds / f"{number}.wav", dtype="float32")
    return resampled(torch.from_numpy(samples), rate, 16000)


@pytest.mark.drawn
def test_twenty_steps_equal_transformers_and_peft(moonshine: Path, sounds: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, moonshine, sounds, training={"max_steps": STEPS}, objective=NO_LANGUAGE)
    plan, _ = make_plan(load_recipe(recipe), device=CPU)
    ours = losses(train(recipe))
    model = MoonshineForConditionalGeneration.from_pretrained(moonshine, dtype=torch.float32)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    names = sorted({name.rpartition(".")[2] for name in linear} - {"proj_out"})
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=32, target_modules=names))
    start_as_ours(theirs, recipe, tmp_path)
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(moonshine)
    tokenizer, written = AutoTokenizer.from_pretrained(moonshine), texts(12)

    def loss_of(step: int) -> torch.Tensor:
        total, count = torch.zeros(()), 0
        for number in range(step * 4 % 12, step * 4 % 12 + 4):
            made = extractor(heard(sounds, number).numpy(), sampling_rate=16000, return_tensors="pt")
            text = tokenizer(written[number], add_special_tokens=False)["input_ids"]
            labels = torch.tensor([[*text, tokenizer.eos_token_id]])
            total = total + theirs(**made, labels=labels).loss * labels.shape[1]
            count += labels.shape[1]
        return total / count

    assert ours == pytest.approx(losses_of(theirs, recipe, plan.warmup_steps, STEPS, loss_of), rel=1e-5)


def test_answers_are_those_of_transformers(moonshine: Path, sounds: Path) -> None:
    target = load_target(find_target(str(moonshine), None, ["evaluation.max_new_tokens=8", "model.dtype=float32"]), CPU)
    net = MoonshineForConditionalGeneration.from_pretrained(moonshine, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(moonshine)
    expected = []
    for number in range(3):
        ids = net.generate(input_values=heard(sounds, number)[None], max_new_tokens=8)
        expected.append(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    assert answer(target, [str(sounds / f"{number}.wav") for number in range(3)]) == expected


@pytest.mark.drawn
def test_micro_batches_change_nothing(moonshine: Path, sounds: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, moonshine, sounds, objective=NO_LANGUAGE)
    whole = train(recipe, f"output.dir={tmp_path / 'whole'}")
    cut = ["training.micro_batch_size=1", "training.gradient_accumulation_steps=4"]
    assert losses(train(recipe, *cut, f"output.dir={tmp_path / 'cut'}")) == pytest.approx(losses(whole), rel=1e-6)


@pytest.mark.drawn
def test_a_resumed_run_is_the_same_to_the_bit(moonshine: Path, sounds: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, moonshine, sounds, objective=NO_LANGUAGE, adapter={"dropout": 0.1})
    check_a_resume(recipe, "training.max_steps=6", "training.save_steps=3", "data.shuffle=true")


@pytest.mark.drawn
def test_merged_it_answers_the_same(moonshine: Path, sounds: Path, tmp_path: Path) -> None:
    run, merged = train(write_recipe(tmp_path, moonshine, sounds, objective=NO_LANGUAGE)), tmp_path / "merged"
    merge_verb(str(run), str(merged), None, None, [], None)
    evaluate_verb(str(merged), None, str(sounds), None, ["wer"], str(tmp_path / "e.json"), [])
    assert json.loads((tmp_path / "e.json").read_text("utf-8"))["wer"] > 0
    asked = [str(sounds / f"{number}.wav") for number in range(3)]
    short = ["evaluation.max_new_tokens=8", "model.dtype=float32"]
    targets = [load_target(find_target(str(folder), None, short), CPU) for folder in (run, merged)]
    assert answer(targets[0], asked) == answer(targets[1], asked)
    MoonshineForConditionalGeneration.from_pretrained(merged)


@pytest.mark.parametrize("streaming", ["host", pytest.param("disk", marks=pytest.mark.slow)])
def test_streamed_layers_compute_the_same(streaming: str, moonshine: Path, sounds: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, moonshine, sounds, objective=NO_LANGUAGE)
    check_streamed(recipe, streaming)


def test_a_recording_too_short_for_a_frame_is_named(moonshine: Path, tmp_path: Path) -> None:
    sounds = write_sounds(tmp_path / "keys", texts(2))
    soundfile.write(sounds / "1.wav", heard(sounds, 1)[:MIN_SAMPLES].numpy(), 16000)
    recipe = write_recipe(tmp_path, moonshine, sounds, objective=NO_LANGUAGE)
    assert make_plan(load_recipe(recipe), device=CPU)[0].rows.training.trained == 2
    soundfile.write(sounds / "1.wav", heard(sounds, 1)[: MIN_SAMPLES - 1].numpy(), 16000)
    with pytest.raises(DataError, match=r"lasts 0.056 s, but the model needs at least 0.056 s"):
        make_plan(load_recipe(recipe), device=CPU)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"language": "en"}, "transcribes the language that it was trained on"),
        ({"language": None, "timestamps": True}, "without times"),
        ({"language": None, "apply_spec_augment": True}, "this model's input is samples"),
    ],
)
def test_what_it_cannot_do_is_said(
    settings: dict[str, object], said: str, moonshine: Path, sounds: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        make_plan(load_recipe(write_recipe(tmp_path, moonshine, sounds, objective=settings)), device=CPU)
