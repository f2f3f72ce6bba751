"""Prompt methods through the real loop and through recipes: training, resume, evaluation and generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.loop_case import check_four_steps, four_steps, make_case, make_rows
from tests.support.peft_case import BASES, move_from_start
from tests.support.plans import make_plan
from tests.support.train_case import (
    in_child,
    kill_self,
    lose_the_end,
    records,
    result_bytes,
    train_in_child,
    without_times,
    write_recipe,
)
from tunekit.adapters.attach import attach_adapter
from tunekit.errors import RecipeError, RunFolderError
from tunekit.model.load import LoadedModel, load_model, make_meta_model
from tunekit.model.text.generation import generate_texts
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.planning.checks import raise_refusals
from tunekit.recipe.adapters.cpt import ContextExample, CptSettings
from tunekit.recipe.adapters.multitask_prompt import MultitaskPromptSettings
from tunekit.recipe.adapters.p_tuning import PTuningSettings
from tunekit.recipe.adapters.prompt import PromptSettings
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.training import TrainingSection
from tunekit.tuned.fit import position_problems
from tunekit.tuned.model import TunedModel

LSTM: dict[str, Any] = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12, "encoder_dropout": 0.1}
WIDE: dict[str, Any] = {"opt_projection_epsilon": 9.0, "opt_projection_format_epsilon": 9.0}
METHODS: dict[str, Any] = {
    "prompt": PromptSettings(num_virtual_tokens=6),
    "p_tuning": PTuningSettings(num_virtual_tokens=6, encoder_hidden_size=16),
    "p_tuning lstm": PTuningSettings(num_virtual_tokens=6, **LSTM),
    "multitask_prompt": MultitaskPromptSettings(num_virtual_tokens=6, num_ranks=2),
    "cpt": CptSettings(token_ids=(40, 41, 42, 43, 44), token_types=(1, 2, 2, 3, 4), **WIDE),
}
RATES = {"multitask_prompt": 0.3}  # a product of small factors
every = pytest.mark.parametrize("name", METHODS)


@pytest.mark.sampled(2)
@every
def test_four_steps(name: str, tiny_llama: Path) -> None:
    check_four_steps(tiny_llama, METHODS[name], RATES.get(name, 2e-2))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("storage", ["nf4", "int8"])
@every
def test_four_steps_on_a_quantized_base(name: str, storage: str, tiny_llama: Path) -> None:
    still = four_steps(tiny_llama, METHODS[name], 0.0, quantization=storage)
    case = four_steps(tiny_llama, METHODS[name], RATES.get(name, 2e-2), quantization=storage, checkpointed=1)
    still.run()
    case.run()
    assert case.losses[-1] < still.losses[-1]
    assert all(torch.isfinite(tensor).all() for tensor in case.state().values())


def test_a_base_in_half_precision(tiny_llama: Path) -> None:
    case, still = (four_steps(tiny_llama, METHODS["p_tuning"], rate, dtype="bfloat16") for rate in (2e-2, 0.0))
    case.run()
    still.run()
    assert all(parameter.dtype == torch.float32 for parameter in case.adapter.trained().values())
    assert case.losses[-1] < still.losses[-1]


@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_micro_batches_are_one_batch_to_a_prompt(micro_batch_size: int, tiny_llama: Path) -> None:
    """Rows of different lengths, padded or alone: the same step."""
    sections = [
        TrainingSection(
            learning_rate=0.02, scheduler="constant", warmup_ratio=None, epochs=None, max_steps=2,
            micro_batch_size=size, gradient_accumulation_steps=8 // size,
        )
        for size in (4, micro_batch_size)
    ]  # fmt: skip
    cases = [make_case(tiny_llama, make_rows(8), training=s, adapter=METHODS["prompt"]) for s in sections]
    for case in cases:
        case.run()
    assert cases[0].losses == pytest.approx(cases[1].losses, abs=1e-5)


def tuned(folder: Path, name: str) -> TunedModel:
    """An adapter that is not as it starts."""
    base = load_model(ModelSection(name_or_path=str(folder), dtype="float32"), device=torch.device("cpu"))
    attached = attach_adapter(base.net, METHODS[name], seed=0, head_name="lm_head")
    move_from_start(attached.trained().values(), 1.0)
    return TunedModel(base, attached)


def greedy(model: TunedModel, prompt: list[int], count: int) -> list[int]:
    """Token by token, the whole row anew for each."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.own_logits({"input_ids": torch.tensor([ids])})[0, -1].argmax()))
    return ids[len(prompt) :]


@every
def test_with_a_cache_as_without_one_token_for_token(name: str, tiny_llama: Path) -> None:
    """Prompts of different lengths share a batch, padded on the left; each answers as it does alone."""
    model = tuned(tiny_llama, name)
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_llama)))
    prompts = [[60, 61, 62], [70, 71, 72, 73, 74, 75, 76], [80]]
    with torch.no_grad(), model.training_mode(False):
        expected = [greedy(model, prompt, 12) for prompt in prompts]
        found = generate_texts(
            model.base,
            tokenizer,
            prompts,
            max_new_tokens=12,
            batch_size=3,
            stop_ids=[],
            adapt=model.adapt_inputs,
            virtual_tokens=model.virtual_tokens,
        )
    assert found == expected
    base: LoadedModel = model.base
    plain = generate_texts(base, tokenizer, prompts, max_new_tokens=12, batch_size=3, stop_ids=[])
    assert found != plain


@pytest.mark.parametrize("family", [family for family in ("t5", "bart") if family in BASES])
def test_an_encoder_decoder_answers_behind_a_prompt(family: str, tiny_llama: Path, tmp_path: Path) -> None:
    """The encoder has the vectors; with a cache as without one, sources padded as alone."""
    BASES[family].make().save_pretrained(tmp_path / "base")
    base = load_model(ModelSection(name_or_path=str(tmp_path / "base"), dtype="float32"), device=torch.device("cpu"))
    attached = attach_adapter(
        base.net, PromptSettings(num_virtual_tokens=4, init="random"), seed=0, head_name="lm_head"
    )
    model, net = TunedModel(base, attached), base.net
    start: Any = net.config
    prompts = [[60, 61, 62], [70, 71, 72, 73, 74, 75, 76]]
    expected = []
    with torch.no_grad(), model.training_mode(False):
        for prompt in prompts:
            answer = [start.decoder_start_token_id]
            for _ in range(6):
                ids = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([answer])}
                hidden = model.hidden(ids)  # (1, answer, D)
                answer.append(int(base.family.head(net).logits(hidden[0, -1:]).argmax()))
            expected.append(answer[1:])
        tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_llama)))
        found = generate_texts(
            base, tokenizer, prompts, max_new_tokens=6, batch_size=2, stop_ids=[],
            adapt=model.adapt_inputs, virtual_tokens=model.virtual_tokens,
        )  # fmt: skip
    assert found == expected


@pytest.mark.parametrize(("virtual", "key"), [(60, "data.max_length"), (64, "adapter.num_virtual_tokens")])
def test_a_table_of_positions_must_hold_the_vectors_too(virtual: int, key: str, tmp_path: Path) -> None:
    BASES["gpt2"].make().save_pretrained(tmp_path / "base")
    base = make_meta_model(ModelSection(name_or_path=str(tmp_path / "base")), device=torch.device("cpu"))
    (problem,) = position_problems(base, 12 + virtual, virtual)
    assert (problem.key, f"including {virtual} virtual tokens" in problem.what) == (key, True)
    assert list(position_problems(base, 64, virtual)) == []


SECTIONS: dict[str, dict[str, Any]] = {
    "prompt": {"method": "prompt", "num_virtual_tokens": 5, "init": "text", "init_text": "Say it."},
    "p_tuning": {"method": "p_tuning", "num_virtual_tokens": 5, **LSTM},
    "multitask_prompt": {"method": "multitask_prompt", "num_virtual_tokens": 5, "num_tasks": 2, "task": 1},
    "cpt": {
        "method": "cpt",
        "examples": [{"input": "say 3", "output": "3"}, {"input": "say 5", "output": "so 5"}],
        **WIDE,
    },
}


def recipe_of(folder: Path, model: Path, name: str, **data: Any) -> Path:
    """A recipe whose adapter section is this one and nothing else of what write_recipe writes there."""
    path = write_recipe(folder, model, rows=9, data=data, evaluation={"batch_size": 4})
    values = json.loads(path.read_text())
    values["adapter"] = SECTIONS[name]
    values["training"] |= {"gradient_accumulation_steps": 1, "max_steps": 4, "learning_rate": RATES.get(name, 0.05)}
    del values["training"]["epochs"]
    path.write_text(json.dumps(values))
    return path


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", SECTIONS)
def test_a_recipe_trains_resumes_evaluates_and_generates(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    path = recipe_of(tmp_path, tiny_llama, name)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ended = train_in_child(path, whole)
    assert ended.code == 0, ended.output
    assert "virtual tokens are put before each row" in ended.output

    def die_in_step_3() -> None:
        from tunekit.training.engine import Engine

        plain = Engine.run

        def run(self: Any, works: Any) -> Any:
            if works[0].window.step == 3:
                kill_self()
            return plain(self, works)

        Engine.run = run  # type: ignore[method-assign]

    assert train_in_child(path, cut, before=die_in_step_3).code != 0
    ended = train_in_child(path, cut, resume=True)
    assert ended.code == 0, ended.output
    assert result_bytes(cut) == result_bytes(whole)
    assert without_times(records(cut)) == without_times(records(whole))
    still = tmp_path / "still"
    assert train_in_child(path, still, "training.learning_rate=0").code == 0
    losses = [[entry["loss"] for entry in records(each) if "loss" in entry] for each in (whole, still)]
    assert losses[0][-1] < losses[1][-1]

    alone = tmp_path / "elsewhere"
    (whole / "adapter").rename(alone)

    def use_the_folder() -> None:
        from tunekit.evaluate import evaluate_verb
        from tunekit.generate import generate_verb

        base = str(tiny_llama)
        evaluate_verb(str(alone), base, str(tmp_path / "train.jsonl"), None, [], str(tmp_path / "eval.json"), [])
        generate_verb(str(alone), base, ["say 4"], None, ["evaluation.max_new_tokens=4"])

    used = in_child(use_the_folder, tmp_path / "use.log")
    assert used.code == 0, used.output
    assert json.loads((tmp_path / "eval.json").read_text())["loss"] > 0


def test_merge_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    path = recipe_of(tmp_path, tiny_llama, "prompt")
    assert train_in_child(path, tmp_path / "run").code == 0

    def merge() -> None:
        from tunekit.merge import merge_verb

        merge_verb(str(tmp_path / "run" / "adapter"), str(tmp_path / "merged"), None, None, [])

    ended = in_child(merge, tmp_path / "merge.log")
    assert ended.code == 2, ended.output
    assert "a prompt adapter does not change weights and cannot be merged" in ended.output
    assert not (tmp_path / "merged").exists()


def test_init_from_continues_a_folder(tiny_llama: Path, tmp_path: Path) -> None:
    path = recipe_of(tmp_path, tiny_llama, "prompt")
    assert train_in_child(path, tmp_path / "first").code == 0
    run, frozen = (
        tmp_path / "second",
        ("training.learning_rate=0", "training.save_steps=1", "training.keep_checkpoints=2"),
    )
    second = train_in_child(path, run, f"adapter.init_from={tmp_path / 'first' / 'adapter'}", *frozen)
    assert second.code == 0, second.output
    name = "adapter_model.safetensors"
    assert result_bytes(run)[name] == result_bytes(tmp_path / "first")[name]
    lose_the_end(run)
    moved = shutil.copytree(tmp_path / "first" / "adapter", tmp_path / "moved")
    tensors = {key: tensor + 1 for key, tensor in load_file(moved / name).items()}
    other = shutil.copytree(moved, tmp_path / "other")
    (other / "tunekit.json").unlink()  # the folder is not damaged
    save_file(tensors, other / name, {"format": "pt"})
    refused = train_in_child(path, run, f"adapter.init_from={other}", *frozen, resume=True)
    assert refused.code == RunFolderError.exit_code
    assert "adapter.init_from: changed since the run: its content is different" in refused.output
    resumed = train_in_child(path, run, f"adapter.init_from={moved}", *frozen, resume=True)
    assert resumed.code == 0, resumed.output


@pytest.mark.parametrize(("name", "numbers"), [("prompt", 5 * 64), ("multitask_prompt", 5 * 64 + 2 * (5 + 64))])
def test_plan_counts_the_vectors(name: str, numbers: int, tiny_llama: Path, tmp_path: Path) -> None:
    plan, prepared = make_plan(load_recipe(recipe_of(tmp_path, tiny_llama, name)))
    assert plan.refusals == []
    assert plan.trainable_parameters == numbers
    assert not plan.rows.packing
    packed, _ = make_plan(load_recipe(recipe_of(tmp_path, tiny_llama, name), ["data.packing=true"]))
    assert "the adapter puts virtual tokens before each row" in packed.refusals[0].message
    assert any(note.startswith("5 virtual tokens are put before each row") for note in plan.notes)
    assert "activations of" not in str(plan.notes)
    longer, _ = make_plan(load_recipe(recipe_of(tmp_path, tiny_llama, name), ["adapter.num_virtual_tokens=300"]))
    assert longer.peak_bytes.activations > plan.peak_bytes.activations
    assert prepared.adapter.method == name


def test_texts_become_ids_before_anything_is_planned(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_llama)))
    _, prepared = make_plan(load_recipe(recipe_of(tmp_path, tiny_llama, "cpt")))
    settings: Any = prepared.adapter
    pieces = [("input: ", 1), ("say 3", 2), ("\n", 1), ("output: ", 3), ("3", 4), ("\n", 3)]
    ids = [token for text, _ in pieces for token in tokenizer.encode(text)]
    types = [kind for text, kind in pieces for _ in tokenizer.encode(text)]
    assert list(settings.token_ids[: len(ids)]) == ids
    assert list(settings.token_types[: len(ids)]) == types
    assert settings.examples[1] == ContextExample(input="say 5", output="so 5")
    assert max(settings.token_types) == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.packing=true"], "the adapter puts virtual tokens before each row"),
        (["adapter.init=text"], "init: text needs init_text"),
        (["adapter.init_text=hello"], "needs init: text"),
        (["adapter.opt_weighted_loss_type=decay"], "unknown key"),
        (["adapter.method=p_tuning", "adapter.init_from=x"], "not the network that computes them"),
        (["adapter.method=p_tuning", "adapter.encoder_dropout=0.1"], "LSTM"),
        (["adapter.method=multitask_prompt", "adapter.task=1"], "counted from 0"),
        (["adapter.method=cpt", "~adapter.num_virtual_tokens"], "but there are none"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    overrides: list[str], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    path = recipe_of(tmp_path, tiny_llama, "prompt")
    values = json.loads(path.read_text())
    values["adapter"] = {"method": "prompt", "num_virtual_tokens": 5}
    path.write_text(json.dumps(values))
    with pytest.raises(RecipeError, match=message):
        raise_refusals(make_plan(load_recipe(path, overrides))[0])
