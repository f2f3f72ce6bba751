"""Plan: decided without a weight, every refusal at once, and the same numbers that training then meets."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.architectures.tiny import write_tiny
from tests.support.plans import make_plan
from tests.support.recipe_mutator import make_valid_case
from tests.support.train_case import write_recipe
from tunekit.artifacts.report.plan_page import facts
from tunekit.errors import ModelError, RecipeError, TunekitError
from tunekit.memory.streaming import layer_bytes
from tunekit.model.compute import kernel_packages
from tunekit.model.load import make_meta_model
from tunekit.objectives.losses.logprobs import logits_chunk_tokens
from tunekit.plan import plan_verb
from tunekit.planning.checks import library_problems
from tunekit.planning.forecast import PROCESS_BYTES
from tunekit.planning.notes import HIGHEST_RATE, rate_notes
from tunekit.planning.prepared import Resources
from tunekit.planning.tiers import allowed_tiers
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.training import TrainingSection
from tunekit.records import ExecutionSettings, Plan
from tunekit.training.session import Planned
from tunekit.training.state import Processors

CPU = torch.device("cpu")
# what a mutated recipe may draw so that a tiny llama over chat rows can take it
PLANNABLE: dict[str, list[str]] = {
    "model.dtype": ["auto", "float32", "bfloat16"],
    "model.attention": ["auto", "eager", "sdpa"],
    "data.train.0.format": ["auto", "chat"],
    "data.train.0.columns": ["{}"],
    "data.train.0.max_rows": ["null", "10"],
    "data.train.0.weight": ["1", "1.", "0.5", "3"],
    "data.eval": ["0.3", "null", "eval.jsonl", "[eval.jsonl]"],
    "data.chat_template": ["null"],
    "data.image_tokens": ["auto"],  # the rows have no images
    "data.max_length": ["512", "2048", "2e3"],
    "data.excess_length": ["drop", "truncate"],
    "adapter.r": ["1", "8"],
    "memory.streamed_head": ["false"],  # an adapted head stays
    # what these may be depends on others: on alpha and the rank, on modules_to_save
    "adapter.start": ["default", "gaussian", "{method: eva, rho: 2, batches: 1}"],
    "adapter.trainable_token_indices": ["[]", "{embed_tokens: [3, 4]}"],
    "adapter.exclude_modules": ["null", "[k_proj]"],
    "adapter.rank_pattern": ["{}", "{q_proj: 4}"],
    "training.max_steps": ["1", "10"],
    "evaluation.choices": ["null"],
}


def plan_of(path: Path, *overrides: str) -> tuple[Plan, Planned]:
    return make_plan(load_recipe(path, overrides), device=CPU)


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path) -> Path:
    return write_recipe(tmp_path / "recipe", tiny_llama)


def test_a_plan_needs_no_weight(tmp_path: Path, tiny_llama: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare)
    whole, _ = plan_of(write_recipe(tmp_path / "whole", tiny_llama))
    (bare / "model.safetensors").unlink()
    plan, _ = plan_of(write_recipe(tmp_path / "recipe", bare))
    assert plan.peak_bytes == whole.peak_bytes
    assert plan.targets == whole.targets
    assert not plan.refusals


def test_plans_of_one_process_share_a_processor(recipe: Path) -> None:
    """Those of a sweep's trials: each tokenizer would take as much memory as a small adapter."""
    shared: Processors = {}
    rank = ["adapter.r=2"]
    first, second = (make_plan(load_recipe(recipe, more), device=CPU, processors=shared)[1] for more in ([], rank))
    assert first.processor is second.processor
    assert make_plan(load_recipe(recipe), device=CPU)[1].processor is not first.processor


def test_counts_are_those_of_the_windows(recipe: Path) -> None:
    for overrides in (
        (),
        ("data.packing=true",),
        ("training.epochs=1.5",),
        ("~training.epochs", "training.max_steps=4"),
    ):
        plan, prepared = plan_of(recipe, *overrides)
        steps = list(prepared.rows.steps(prepared.batch_settings).after(0))
        supervised = sum(int((batch.targets["labels"] != -100).sum()) for step in steps for batch in step.batches)
        assert plan.steps == len(steps)
        assert plan.supervised_tokens == supervised
        assert plan.rows.packing == ("data.packing=true" in overrides)


def test_parameters_are_counted_by_target(recipe: Path) -> None:
    plan, _ = plan_of(recipe, "adapter.target_modules=[q_proj]", "adapter.r=4")
    assert [target.name for target in plan.targets] == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert plan.trainable_parameters == 2 * 4 * (64 + 64)
    packed, _ = plan_of(recipe, "adapter.target_modules=[q_proj]", "adapter.r=4", "model.quantization=int8_weight_only")
    assert packed.total_parameters == plan.total_parameters, "a packed matrix counts as the numbers that it stands for"
    assert packed.peak_bytes.weights < plan.peak_bytes.weights


def test_a_rate_above_the_highest_usual_one_is_told() -> None:
    for rate in (HIGHEST_RATE, 0.31):
        for key in ("learning_rate", "head_learning_rate"):
            notes = [note for note in rate_notes(TrainingSection(**{key: rate}), 100) if "is very high" in note]
            assert len(notes) == (rate > HIGHEST_RATE)


def test_warm_up_and_chunks_follow_their_rules(recipe: Path) -> None:
    plan, _ = plan_of(recipe, "training.warmup_ratio=0.3")
    assert (plan.steps, plan.warmup_steps) == (6, 2)
    assert [logits_chunk_tokens(size) for size in (300, 32_000, 49_152, 151_936, 1_000_000)] == [
        1024,
        262,
        170,
        64,
        64,
    ]
    assert plan.choice.logits_chunk_tokens == 1024


def test_rows_are_packed_only_where_the_recipe_says_so_and_the_model_can(
    tmp_path: Path, tiny_llama: Path, recipe: Path
) -> None:
    plan, _ = plan_of(recipe, "~data.packing")
    assert not plan.rows.packing
    plan, _ = plan_of(recipe, "data.packing=true")
    assert plan.rows.packing
    bloom = write_other(tmp_path / "bloom", tiny_llama, "bloom", hidden_size=64, n_layer=2, n_head=4)
    other = write_recipe(tmp_path / "other", bloom)
    plan, _ = plan_of(other, "data.packing=true")
    assert not plan.rows.packing
    assert "position ids" in plan.rows.packing_reason
    assert [refusal.key for refusal in plan.refusals] == ["data.packing"]


@pytest.mark.parametrize(("kind", "packed"), [("xglm", False), ("biogpt", False), ("afmoe", True), ("stablelm", True)])
def test_packing_is_refused_where_the_mask_is_made_without_positions(kind: str, packed: bool, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, write_tiny(kind, tmp_path / "model"))
    plan, _ = plan_of(recipe, "data.packing=true")
    assert plan.rows.packing == packed
    assert [refusal.key for refusal in plan.refusals] == [] if packed else ["data.packing"]
    assert packed or "without positions" in plan.rows.packing_reason


def write_other(folder: Path, tokenizer: Path, kind: str, **sizes: Any) -> Path:
    """A configuration without weights beside the tiny llama's tokenizer."""
    from transformers import AutoConfig

    shutil.copytree(tokenizer, folder)
    (folder / "model.safetensors").unlink()
    vocabulary = sizes.pop("vocab_size", 264)
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, bos_token_id=0, eos_token_id=2, **sizes)
    config.save_pretrained(folder)
    return folder


def test_rows_beyond_a_table_of_positions_are_refused(tmp_path: Path, tiny_llama: Path) -> None:
    gpt2 = write_other(tmp_path / "gpt2", tiny_llama, "gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=40)
    plan, _ = plan_of(write_recipe(tmp_path / "other", gpt2))
    assert [refusal.key for refusal in plan.refusals] == ["data.max_length"]
    assert "40 positions" in plan.refusals[0].message
    config = json.loads((tiny_llama / "config.json").read_text())
    llama = tmp_path / "short"
    shutil.copytree(tiny_llama, llama)
    (llama / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    plan, _ = plan_of(write_recipe(tmp_path / "short-recipe", llama))
    assert not plan.refusals
    (longest,) = [int(note.split()[5]) for note in plan.notes if "made for at most 40" in note]
    for most in (longest - 1, longest):
        (llama / "config.json").write_text(json.dumps(config | {"max_position_embeddings": most}))
        plan, _ = plan_of(write_recipe(tmp_path / "short-recipe", llama))
        assert any("made for at most" in note for note in plan.notes) == (most < longest)


def test_long_rows_that_change_the_positions_of_others_are_stated(tmp_path: Path, tiny_llama: Path) -> None:
    """Longrope: transformers chooses the factors of all rows by the longest one."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
    for limit in (16, 400):
        rope = {"rope_type": "longrope", "original_max_position_embeddings": limit, **factors}
        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "rope_parameters": rope,
        }
        sizes |= {"original_max_position_embeddings": limit, "num_key_value_heads": 4, "intermediate_size": 64}
        folder = write_other(tmp_path / f"base-{limit}", tiny_llama, "phi3", pad_token_id=0, **sizes)
        plan, _ = plan_of(write_recipe(tmp_path / f"{limit}", folder), "adapter.target_modules=all-linear")
        stated = [note for note in plan.notes if "factors for long rows" in note]
        assert len(stated) == (limit == 16)


def test_tokens_beyond_the_embedding_are_refused(tmp_path: Path, tiny_llama: Path) -> None:
    small = write_other(tmp_path / "small", tiny_llama, "gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=60)
    plan, _ = plan_of(write_recipe(tmp_path / "other", small))
    assert [refusal.key for refusal in plan.refusals] == ["model.name_or_path"]
    assert "59" in plan.refusals[0].message


@pytest.mark.drawn
def test_layers_are_recomputed_where_memory_asks_for_it(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = ("data.packing=true", "data.max_length=512")
    plain, _ = plan_of(recipe, *longer, "memory.gradient_checkpointing=false")
    every, _ = plan_of(recipe, *longer, "memory.gradient_checkpointing=true")
    one, _ = plan_of(recipe, *longer, "memory.gradient_checkpointing=1")
    assert [plan.choice.checkpointed_layers for plan in (plain, one, every)] == [0, 1, 2]
    assert plain.peak_bytes.total > one.peak_bytes.total
    assert every.peak_bytes.total == pytest.approx(one.peak_bytes.total, rel=0.01), "the last layer saves nothing"
    overrides = (*longer, "memory.gradient_checkpointing=auto")
    for available, layers, refused in (
        (plain.peak_bytes.total, 0, False),
        (one.peak_bytes.total, 1, False),
        (one.peak_bytes.total - 1, 1, True),  # never the last layer
        (1000, 1, True),
    ):
        monkeypatch.setattr("tunekit.planning.prepared.available_bytes", lambda device, free=available: free)
        plan, _ = plan_of(recipe, *overrides)
        assert plan.choice.checkpointed_layers == layers
        assert bool(plan.refusals) == refused
    assert plan.refusals[0].key == "training.micro_batch_size"


def test_all_problems_are_told_at_once(recipe: Path) -> None:
    (recipe.parent / "train.jsonl").write_text("{}\n")
    with pytest.raises(TunekitError) as caught:
        plan_of(recipe, "adapter.target_modules=[q_prj]", "model.quantization=int8", "memory.mlp_tile_tokens=64")
    text = str(caught.value)
    assert caught.value.exit_code == 2
    for words in ("did you mean 'q_proj'", "memory.mlp_tile_tokens", "train.jsonl:1"):
        assert words in text


def test_a_model_that_is_not_there_is_told_with_the_data(recipe: Path) -> None:
    with pytest.raises(ModelError, match="no folder"):
        plan_of(recipe, "model.name_or_path=./nothing")


def test_ranks_too_large_are_refused(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"^command line: adapter\.r: rank 33 is too large for"):
        plan_of(recipe, "adapter.r=33")


def test_answers_of_a_base_without_attention_can_be_planned(tmp_path: Path) -> None:
    folder = write_tiny("mamba", tmp_path / "base")
    path = write_recipe(tmp_path, folder, evaluation={"samples": 1})
    plan, _ = plan_of(path, "adapter.target_modules=all-linear")
    assert not plan.refusals


@pytest.mark.parametrize("kind", ["mamba", "gemma4_text"])
def test_sampling_is_planned_for_bases_without_attention_or_with_different_heads(kind: str, tmp_path: Path) -> None:
    folder = write_tiny(kind, tmp_path / "base")
    (tmp_path / "rewards.py").write_text("def one(completions):\n    return [1.0] * len(completions)\n")
    rows = "".join(json.dumps({"prompt": f"say {number}"}) + "\n" for number in range(8))
    path = write_recipe(tmp_path, folder, evaluation={"samples": 1})
    (tmp_path / "train.jsonl").write_text(rows)
    objective: dict[str, Any] = {"method": "grpo", "num_generations": 2, "max_completion_length": 8}
    objective["reward"] = [{"function": "rewards.py:one", "allow_code": True}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"objective": objective}))
    plan, _ = plan_of(path, "adapter.target_modules=all-linear")
    assert not plan.refusals
    assert not [note for note in plan.notes if "not in the predicted peak" in note]
    assert any(("keys and values" in note) is (kind != "mamba") for note in plan.notes if note.startswith("sampling"))


def test_layers_on_the_host_must_fit_into_its_memory(recipe: Path) -> None:
    base = make_meta_model(load_recipe(recipe).recipe.model, device=CPU)
    written = load_recipe(recipe, ["memory.streaming=host"]).recipe
    room = Resources(CPU, host_bytes=2 * layer_bytes(base), ranks=2, ranks_here=2)
    prepared: Any = SimpleNamespace(base=base, resources=room, companions={})
    assert allowed_tiers(prepared, written) == (["host"], [])
    prepared.resources = replace(room, ranks=3, ranks_here=3)
    _, (problem,) = allowed_tiers(prepared, written)
    assert problem.key == "memory.streaming"
    assert "3 ranks" in problem.what
    prepared.resources = Resources(torch.device("cuda"), ranks=16, ranks_here=16)  # the GPUs of another machine
    assert allowed_tiers(prepared, written) == (["host"], [])
    assert allowed_tiers(prepared, load_recipe(recipe).recipe)[0] == ["off", "ranks", "host", "disk"]


def test_a_link_that_cannot_be_copied_to_the_trained_model_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    """As DVC and git-annex make them: the run would end after its last step."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    (tmp_path / "0123").write_text("the licence")
    (base / "LICENSE").symlink_to(tmp_path / "0123")
    path = write_recipe(tmp_path / "recipe", base, rows=8)
    (refusal,) = plan_of(path, "adapter={method: full}")[0].refusals
    assert refusal.message.startswith(f"is a link to {tmp_path / '0123'}, outside of the model folder")
    assert not plan_of(path)[0].refusals


def test_packages_of_kernels_are_those_of_the_bases_code(tmp_path: Path, recipe: Path) -> None:
    """A resume compares their versions on a GPU."""
    assert plan_of(recipe)[1].kernel_packages == ()
    mamba = make_meta_model(ModelSection(name_or_path=str(write_tiny("mamba", tmp_path / "mamba"))), device=CPU)
    assert kernel_packages(mamba.net) == ("mamba-ssm", "causal-conv1d")


def test_a_cache_folder_without_room_is_stated(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamed base that is not stored in its compute dtype is read from a cache file."""
    monkeypatch.setattr("tunekit.planning.tiers.lacks_room", lambda size, room: True)
    for overrides, stated in ((("model.dtype=bfloat16", "memory.streaming=disk"), 1), (("model.dtype=bfloat16",), 0)):
        plan, _ = plan_of(recipe, *overrides)
        assert sum("set TUNEKIT_CACHE" in note for note in plan.notes) == stated


def test_ranks_that_share_a_host_are_warned_of_together(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_recipe(recipe, ["memory.sharding=off"])
    peak = make_plan(loaded, device=CPU)[0].peak_bytes.total
    monkeypatch.setattr("tunekit.planning.prepared.available_bytes", lambda device: 3 * peak // 2)
    for ranks in (1, 2):
        plan, _ = make_plan(loaded, device=CPU, ranks=ranks)
        assert sum("ranks are on this machine" in note for note in plan.notes) == ranks - 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert not [note for note in make_plan(loaded, device=CPU, ranks=2)[0].notes if "ranks are on" in note]


def test_a_refusal_says_where_it_was_written(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(TunekitError) as caught:
        plan_verb(
            load_recipe(recipe, ["memory.budget=1MiB", f"output.dir={tmp_path / 'run'}"]), str(tmp_path / "plan.json")
        )
    assert caught.value.exit_code == 4
    assert str(caught.value).startswith("command line: memory.budget: the smallest setting of this run needs")
    (refusal,) = json.loads((tmp_path / "plan.json").read_text())["refusals"]
    assert (refusal["key"], refusal["line"], refusal["file"]) == ("memory.budget", None, "command line")


def test_a_problem_of_an_adapter_folder_names_its_file(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "begun"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("[]", encoding="utf-8")
    plan, _ = plan_of(recipe, f"adapter.init_from={folder}")
    (refusal,) = plan.refusals
    assert refusal.file == str(folder / "adapter_config.json")
    with pytest.raises(TunekitError, match=f"^{folder / 'adapter_config.json'}: "):
        plan_verb(load_recipe(recipe, [f"adapter.init_from={folder}", f"output.dir={tmp_path / 'run'}"]), None)


@pytest.mark.drawn
def test_missing_libraries_are_named(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunekit.planning.checks.find_spec", lambda name: None)
    loaded = ("model.quantization=int8", "training.optimizer=adamw", "output.report_to=[tensorboard]")
    plan, _ = plan_of(recipe, *loaded)
    assert sorted(refusal.key for refusal in plan.refusals) == ["model.quantization", "output.report_to"]
    for quantization in ("int8_weight_only", "nf4", "fp4"):
        plan, _ = plan_of(recipe, f"model.quantization={quantization}")
        assert not plan.refusals


def test_a_metric_without_its_library_is_refused_with_the_extra(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunekit.planning.checks.find_spec", lambda name: None if name == "jiwer" else object())
    told = "evaluation.metrics: {0} needs jiwer, which is not installed; run: pip install 'tunekit[speech]'"
    for name in ("wer", "cer", "wer_normalized", "cer_normalized"):
        (problem,) = library_problems(load_recipe(recipe, [f"evaluation.metrics=[{name}]"]).recipe)
        assert str(problem) == told.format(name)


def test_four_bits_do_without_bitsandbytes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunekit.planning.checks.find_spec", lambda name: None)
    assert not list(library_problems(load_recipe(recipe, ["model.quantization=nf4"]).recipe))
    (problem,) = library_problems(load_recipe(recipe, ["model.quantization=int8"]).recipe)
    assert (problem.key, problem.what) == ("model.quantization", "int8 needs bitsandbytes")


def test_the_verb_prints_and_writes(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_verb(load_recipe(recipe, ["training.epochs=1"]), str(tmp_path / "plan.json"))
    text = capsys.readouterr().out
    for words in ("q_proj", "trained", "peak", "free", "3 an epoch", "dropout is on"):
        assert words in text
    assert f" threads {torch.get_num_threads()} " in " ".join(text.split())
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["steps"] == 3
    fixed = {"targets", "trainable_parameters", "total_parameters", "supervised_tokens", "refusals"}
    assert fixed <= written.keys()
    plan, _ = plan_of(recipe, "training.epochs=1")
    assert ExecutionSettings(**written["choice"]) == plan.choice, "a resumed run reads it back"
    assert written["text"] == {"vocabulary_size": 264, "positions": plan.text.positions if plan.text else None}
    assert set(written["peak_bytes"]) == {"weights", "adapter", "optimizer", "activations", "logits", "total"}
    assert not (recipe.parent / "run").exists(), "plan makes no folder"


def test_threads_of_the_recipe(recipe: Path) -> None:
    plan, _ = plan_of(recipe, "training.threads=3")
    assert (plan.choice.threads, facts(plan)["threads"]) == (3, "3")
    plan, _ = plan_of(recipe, "training.threads=1000")
    assert [note for note in plan.notes if note.startswith("training.threads: 1,000 is more than the")]
    plan, _ = plan_of(recipe, "training.threads=adaptive")
    assert plan.choice.threads == torch.get_num_threads()
    adaptive = replace(plan, choice=replace(plan.choice, threads=4))
    assert facts(adaptive)["threads"] == "4 at first, fewer while other programs use the cores"
    assert facts(replace(adaptive, device="cuda:0"))["threads"] is None


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_on_a_processor_without_it_is_said_to_be_slow(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr("tunekit.model.compute._cpu_has_bfloat16", lambda: native)
    for dtype, slow in (("bfloat16", not native), ("auto", False), ("float32", False)):
        plan, _ = plan_of(recipe, f"model.dtype={dtype}")
        assert bool([note for note in plan.notes if note.startswith("model.dtype bfloat16: ")]) == slow


def test_the_verb_refuses_a_folder_that_holds_a_run(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "used" / "checkpoints").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for name, words in (("used", "already holds a run"), ("file", "not a folder")):
        with pytest.raises(RecipeError, match=words) as caught:
            plan_verb(load_recipe(recipe, [f"output.dir={tmp_path / name}"]), str(tmp_path / "plan.json"))
        assert caught.value.problems[0].key == "output.dir"
        assert json.loads((tmp_path / "plan.json").read_text())["refusals"]


@pytest.mark.drawn
def test_drawn_valid_recipes_are_planned(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path / "recipe", tiny_llama)
    monkeypatch.chdir(path.parent)  # paths in overrides are the shell's
    shutil.copy(path.parent / "train.jsonl", path.parent / "eval.jsonl")
    for number in range(12):
        case = make_valid_case(random.Random(f"plan-{number}"), only=PLANNABLE)
        path.write_bytes(case.text.encode())
        overrides = [*case.overrides, f"model.name_or_path={tiny_llama}", f"output.dir={tmp_path / 'run'}"]
        plan, _ = plan_of(path, *overrides)
        assert not plan.refusals, f"{plan.refusals}\n{case}"
        assert plan.steps > 0
        assert plan.peak_bytes.total > 0


def test_experts_are_simulated_in_every_dtype(tmp_path: Path, tiny_llama: Path) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "num_local_experts": 4}
    mixtral = write_other(tmp_path / "mixtral", tiny_llama, "mixtral", hidden_size=64, intermediate_size=128, **heads)
    plan, _ = plan_of(write_recipe(tmp_path / "other", mixtral))
    assert plan.peak_bytes.activations > 0
    assert any("fused parameters of experts" in note for note in plan.notes)


def test_a_model_that_cannot_be_simulated_is_said_to_be(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("needs values\nand more")

    whole, _ = plan_of(recipe)
    monkeypatch.setattr("tunekit.planning.simulation.SimulatedRun.training_step", fail)
    plan, _ = plan_of(recipe)
    assert not plan.refusals
    assert any("warning: activations of llama" in note and "(needs values)" in note for note in plan.notes)
    assert plan.peak_bytes.activations == 0
    assert plan.peak_bytes.weights >= whole.peak_bytes.weights > 0
    assert plan.peak_bytes.total > PROCESS_BYTES + plan.peak_bytes.weights


def test_fifty_rows_of_ten_are_five_steps_an_epoch_by_default(tmp_path: Path, tiny_llama: Path) -> None:
    rows = write_recipe(
        tmp_path,
        tiny_llama,
        rows=50,
        data={"eval": None},
        training={"micro_batch_size": 10, "gradient_accumulation_steps": 1, "epochs": 8},
    )
    plan, _ = plan_of(rows, "~data.packing")
    assert plan.steps == 40


def test_a_run_whose_only_step_has_rate_zero_is_warned_of(recipe: Path) -> None:
    one, _ = plan_of(recipe, "~training.epochs", "training.max_steps=1")
    assert any("the run learns almost nothing" in note for note in one.notes)
    several, _ = plan_of(recipe)
    assert not any("the run learns almost nothing" in note for note in several.notes)
