"""Problems in our words, all at once, in the order of the file; contradictions are found before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.recipe.test_reader import SMALL, problems_of
from tunekit.errors import RecipeError
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading.supported import refuse_unsupported
from tunekit.recipe.recipe import Recipe


def load(text: str, folder: Path, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides).recipe


def test_unknown_keys_of_inner_mappings_are_suggested(tmp_path: Path) -> None:
    text = (
        "model: m\n"
        "data:\n  train: a\n  eval: [{path: a, fromat: chat}]\n"
        "adapter: {method: full, alpha: 16}\n"
        "objective:\n  method: distill\n  teacher: {name_or_path: m, quantisation: nf4}\n"
        "output: {dir: out}\n"
    )
    assert problems_of(text, tmp_path) == [
        "recipe.yaml:4: data.eval.0.fromat: unknown key; did you mean 'format'?",
        "recipe.yaml:5: adapter.alpha: unknown key; "
        "the keys here are: method, init_from, parts, modules_to_save, target_modules",
        "recipe.yaml:8: objective.teacher.quantisation: unknown key; did you mean 'quantization'?",
    ]
    rewarded = "model: m\ndata: {train: a}\noutput: {dir: out}\nobjective:\n  method: grpo\n"
    rewarded += "  reward:\n    - {function: a.py:b, alow_code: true}\n"
    assert "recipe.yaml:7: objective.reward.0.alow_code: unknown key; did you mean 'allow_code'?" in problems_of(
        rewarded, tmp_path
    )


def test_a_draw_needs_a_number_of_rows(tmp_path: Path) -> None:
    text = "model: m\ndata:\n  train: {path: a, draw_seed: null}\noutput: {dir: out}\n"
    assert problems_of(text, tmp_path) == [
        "recipe.yaml:3: data.train.0.draw_seed: has an effect only with max_rows, which is not written; remove it"
    ]
    recipe = load(text.replace("path: a", "path: a, max_rows: 5"), tmp_path)
    assert recipe.data.train[0].draw_seed is None


@pytest.mark.parametrize("zero", ["0", "0.0", "null"])
def test_an_evaluation_fraction_of_zero_is_none(zero: str, tmp_path: Path) -> None:
    text = "model: m\ndata: {train: a}\noutput: {dir: out}\n"
    assert load(text, tmp_path, f"data.eval={zero}").data.eval is None
    assert problems_of(text + "evaluation: {best: eval.loss}\n", tmp_path, f"data.eval={zero}") == [
        "recipe.yaml:4: evaluation.best: needs evaluation rows; set data.eval"
    ]


def test_a_model_that_gives_no_answers_gives_no_samples(tmp_path: Path) -> None:
    text = "model: m\ndata: {train: a, eval: 0.1}\nobjective: reward\noutput: {dir: out}\nevaluation: {samples: 4}\n"
    assert problems_of(text, tmp_path) == [
        "recipe.yaml:5: evaluation.samples: a model of this objective writes no text; remove it"
    ]


def test_several_values_are_for_a_sweep(tmp_path: Path) -> None:
    text = "model: m\ndata: {train: a}\nadapter: lora\nobjective: sft\noutput: {dir: out}\n"
    assert problems_of(text, tmp_path, "adapter.r=2,4", "training.max_steps='1,000'", "adapter.dropout=0.1,0.3") == [
        "command line: adapter.r: must be a whole number, not '2,4'; write one value, or compare several with tunekit "
        "sweep",
        "command line: adapter.dropout: must be a number, not '0.1,0.3'; write one value, or compare several with "
        "tunekit sweep",
        "command line: training.max_steps: must be a whole number, not '1,000'; write 1000 without quotes",
    ]


@pytest.mark.parametrize("value", ["true", "false", "auto"])
def test_a_removed_key_is_refused_with_its_reason(tmp_path: Path, value: str) -> None:
    reason = (
        "training.compile: was removed: it compiled almost nothing, because kernels replace norms first and layers "
        "with adapters were not compiled; remove the key"
    )
    text = f"model: m\ndata: {{train: a}}\noutput: {{dir: out}}\ntraining:\n  seed: 1\n  compile: {value}\n"
    assert problems_of(text, tmp_path) == [f"recipe.yaml:6: {reason}"]
    assert problems_of(SMALL, tmp_path, f"training.compile={value}") == [f"command line: {reason}"]
    load(text, tmp_path, "~training.compile")
    for written_by_older_versions in ("plan.json", "sweep.json"):
        marker = tmp_path / written_by_older_versions
        marker.touch()
        load(text, tmp_path)
        marker.unlink()


def test_every_problem_at_once_by_line(tmp_path: Path) -> None:
    text = (
        "model: {name_or_path: m, quantizaton: nf4, dtype: bf16, trust_remote_code: no}\n"
        "data: {train: [{path: a}, {format: chat}], eval: 2}\n"
        "adapter: {method: lroa}\n"
        "training: {epoch: 3, learning_rate: '1e-4', save_steps: 1_000}\n"
        "evaluation: {metrics: [los]}\n"
        "output: {dir: out, report_to: [tensorbord]}\n"
        "r: 8\n"
    )
    assert problems_of(text, tmp_path, "training.sed=3") == [
        "recipe.yaml:1: model.dtype: must be one of auto, float32, bfloat16, float16, not 'bf16'; "
        "did you mean 'bfloat16'?",
        "recipe.yaml:1: model.trust_remote_code: must be true or false, not 'no'; write false",
        "recipe.yaml:1: model.quantizaton: unknown key; did you mean 'quantization'?",
        "recipe.yaml:2: data.train.1.path: is required; write a file or a hub data set",
        "recipe.yaml:2: data.eval: must be less than 1, not 2",
        "recipe.yaml:3: adapter.method: unknown adapter 'lroa'; did you mean 'lora'?",
        "recipe.yaml:4: training.learning_rate: must be a number, not '1e-4'; write 1e-4 without quotes",
        "recipe.yaml:4: training.save_steps: must be a whole number, not '1_000'; write 1000 without quotes",
        "recipe.yaml:4: training.epoch: unknown key; did you mean 'epochs'?",
        "recipe.yaml:5: evaluation.metrics.0: unknown metric 'los'; did you mean 'loss'?",
        "recipe.yaml:6: output.report_to.0: must be one of tensorboard, wandb, mlflow, trackio, aim, comet_ml, "
        "clearml, dvclive, swanlab, not 'tensorbord'; did you mean 'tensorboard'?",
        "recipe.yaml:7: r: unknown key; did you mean 'adapter.r'?",
        "command line: training.sed: unknown key; did you mean 'seed'?",
    ]


@pytest.mark.parametrize(("written", "warns"), [("", True), ("eval: null, ", False), ("eval: 0.1, ", False)])
def test_steps_between_evaluations_without_rows_to_evaluate_are_warned_of(
    tmp_path: Path, written: str, warns: bool
) -> None:
    """A written null is a choice, and recipes that runs save have one."""
    text = f"model: m\ndata: {{{written}train: a}}\noutput: {{dir: out}}\ntraining: {{eval_steps: 7}}\n"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    defaults = load_recipe(tmp_path / "recipe.yaml").defaults
    assert any(line.startswith("warning: training.eval_steps has no effect") for line in defaults) == warns


def test_only_a_row_of_one_sequence_may_be_several(tmp_path: Path) -> None:
    each = "data.rewritten_answers=each"
    assert load(SMALL, tmp_path, each).data.rewritten_answers == "each"
    assert problems_of(f"{SMALL}objective: dpo\n", tmp_path, each) == [
        "command line: data.rewritten_answers: a row of this objective has at most one answer to train on; remove it"
    ]
    for train_on in ("last", "all"):
        assert problems_of(SMALL, tmp_path, each, f"data.train_on={train_on}") == [
            f"command line: data.rewritten_answers: each needs data.train_on: assistant, not {train_on}; remove it"
        ]
    assert problems_of(SMALL, tmp_path, each, "data.reasoning=mask") == [
        "command line: data.rewritten_answers: data.reasoning: mask already trains on every answer of a conversation; "
        "remove it"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "training: {epochs: 1,\n max_steps: 5}",
            "recipe.yaml:5: training.max_steps: excludes training.epochs (recipe.yaml:4)",
        ),
        (
            "training: {warmup_steps: 1, warmup_ratio: 0.1}",
            "recipe.yaml:4: training.warmup_ratio: excludes training.warmup_steps",
        ),
        (
            "training: {micro_batch_size: 1, micro_batch_tokens: 9}",
            "recipe.yaml:4: training.micro_batch_size: excludes training.micro",
        ),
        ("training: {epochs: null}", "recipe.yaml:4: training.epochs: is empty, and training.max_steps too"),
        ("training: {micro_batch_size: null}", "recipe.yaml:4: training.micro_batch_size: is empty"),
        ("training:", "recipe.yaml:4: training: must be a mapping, not empty"),
        ("adapter:", "recipe.yaml:4: adapter: must be a mapping or a name, not empty"),
        ("evaluation: {best: eval.loss}", "recipe.yaml:4: evaluation.best: needs evaluation rows; set data.eval"),
        ("evaluation: {patience: 2}", "recipe.yaml:4: evaluation.patience: needs evaluation rows; set data.eval"),
        (
            "evaluation: {best: eval.rouge_l}",
            "recipe.yaml:4: evaluation.best: rouge_l is not in evaluation.metrics; add",
        ),
        (
            "evaluation: {metrics: [exact_match], generate: false}",
            "recipe.yaml:4: evaluation.generate: the metric exact_m",
        ),
        ("token: hf_" + "a" * 34, "recipe.yaml:4: token: looks like a secret"),
        ("adapter: {start: ghp_" + "a" * 36 + "}", "recipe.yaml:4: adapter.start: looks like a secret"),
        ("memory: {budget: 8}", "recipe.yaml:4: memory.budget: must be a size with its unit, such as 8GiB, not 8"),
        (
            "training: {scheduler: cosine, scheduler_settings: {min_lr: 1e-5}}",
            "recipe.yaml:4: training.scheduler_settings: has 'min_lr'; the settings of cosine are: num_cycles",
        ),
        (
            "training: {scheduler: polynomial, scheduler_settings: {power: linear}}",
            "recipe.yaml:4: training.scheduler_settings: has power: linear, which",
        ),
        (
            "training: {scheduler: cosine_with_min_lr, scheduler_settings: {min_lr_rate: 10}}",
            "recipe.yaml:4: training.scheduler_settings: has min_lr_rate: 10.0, which is above 1; write a share",
        ),
        (
            "training: {scheduler: warmup_stable_decay, scheduler_settings: {num_decay_steps: 0.5}}",
            "recipe.yaml:4: training.scheduler_settings: has num_decay_steps: 0.5, which is not a number of steps",
        ),
        (
            "training: {scheduler: polynomial, learning_rate: 1e-4, scheduler_settings: {lr_end: 1e-3}}",
            "recipe.yaml:4: training.scheduler_settings: has lr_end: 0.001, which is above training.learning_rate",
        ),
        (
            "training: {scheduler: cosine_with_min_lr, scheduler_settings: {min_lr: 0, min_lr_rate: 0}}",
            "recipe.yaml:4: training.scheduler_settings: has min_lr and min_lr_rate, which set the same value",
        ),
        ("training: {scheduler: cosin}", "recipe.yaml:4: training.scheduler: must be one of constant, linear, cosine,"),
        (
            "adapter: {target_modules: 'q_proj(', exclude_modules: '*.x'}",
            "recipe.yaml:4: adapter.target_modules: must be a regular expression (missing ), unterminated subpattern",
        ),
        (
            "adapter: {exclude_modules: '*.x'}",
            "recipe.yaml:4: adapter.exclude_modules: must be a regular expression (nothing to repeat at position 0)",
        ),
        (
            "adapter: {rank_pattern: {'layers.[0': 2}}",
            "recipe.yaml:4: adapter.rank_pattern.layers.[0: must be a regular expression (unterminated character set",
        ),
        ("memory: {budget: 0GiB}", "recipe.yaml:4: memory.budget: must be at least 1 byte, not '0GiB'"),
        (
            "memory: {budget: [8GiB, 0GiB]}",
            "recipe.yaml:4: memory.budget: the budget of rank 1 must be at least 1 byte, n",
        ),
        (
            "memory: {budget: [8, 4GiB]}",
            "recipe.yaml:4: memory.budget: the budget of rank 0 must be a size with its un",
        ),
        ("memory: {budget: [8GiB]}", "recipe.yaml:4: memory.budget: a list needs the sizes of two ranks or more; wri"),
    ],
)
def test_contradictions(text: str, expected: str, tmp_path: Path) -> None:
    lines = problems_of(f"{SMALL}{text}\n", tmp_path)
    assert any(line.startswith(expected) for line in lines), lines
    assert not any("hf_aaaaaaaa" in line for line in lines)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("{train: [{path: a, streaming: true}]}", "data.train.0.streaming: a streamed source has no known length"),
        (
            "{train: {path: a, streaming: true}, eval: 0.1}",
            "data.eval: a fraction of a streamed source cannot be split off",
        ),
        ("{train: a, eval: [{path: b, weight: 2}]}", "data.eval.0.weight: every evaluation row counts once"),
        ("{train: a, eval: [{path: b, streaming: true}]}", "data.eval.0.streaming: evaluation rows cannot be streamed"),
        ("{train: {path: a, format: chta}}", "data.train.0.format: unknown format 'chta'; did you mean 'chat'?"),
        (
            "{train: {path: a, format: text, columns: {q: prompt}}}",
            "data.train.0.columns.q: 'prompt' is not a field of the",
        ),
        (
            "{train: {path: a, columns: {q: text, p: text}}}",
            "data.train.0.columns.p: is a second column for the field 'text'",
        ),
        ("{train: []}", "data.train: must not be empty"),
        ("{train: 'https://me:pass@host/x.jsonl'}", "data.train.0.path: looks like a secret"),
    ],
)
def test_sources(data: str, expected: str, tmp_path: Path) -> None:
    lines = problems_of(f"model: m\ndata: {data}\noutput: {{dir: out}}\n", tmp_path)
    assert any(line.startswith(f"recipe.yaml:2: {expected}") for line in lines), lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training: {lr: 1e-4}", "training.lr: unknown key; did you mean 'learning_rate'?"),
        ("training: {batch_size: 4}", "training.batch_size: unknown key; did you mean 'micro_batch_size'?"),
        (
            "adapter: {lora_target_linear: true}",
            "adapter.lora_target_linear: unknown key; write adapter.target_modules: 'all-linear'",
        ),
        ("adapter: {lora_rank: 4}", "adapter.lora_rank: unknown key; write adapter.r: 4"),
        ("memory: {load_in_4bit: true}", "memory.load_in_4bit: unknown key; write model.quantization: 'nf4'"),
        ("training: {bf16: true}", "training.bf16: unknown key; did you mean 'model.dtype'?"),
        ("data: {max_seq_length: 9}", "data.max_seq_length: unknown key; write data.max_length: 9"),
        ("output: {report_to: neptune}", "output.report_to.0: must be one of tensorboard, wandb, mlflow, trackio, aim"),
        *(
            (f"model: {{quantization: {written}}}", f"not {shown}; did you mean '{meant}'?")
            for written, shown, meant in (("int4", "'int4'", "nf4"), ("4", "4", "nf4"), ("8bit", "'8bit'", "int8"))
        ),
        ("model: {dtype: bf16}", "not 'bf16'; did you mean 'bfloat16'?"),
    ],
)
def test_what_habit_writes_is_answered_with_what_is_meant(text: str, expected: str, tmp_path: Path) -> None:
    assert any(expected in line for line in problems_of(f"{text}\n", tmp_path))


@pytest.mark.parametrize(("written", "names"), [("wandb", ("wandb",)), ("none", ())])
def test_a_single_tracker_needs_no_list(written: str, names: tuple[str, ...], tmp_path: Path) -> None:
    assert load(SMALL.replace("dir: out", f"dir: out, report_to: {written}"), tmp_path).output.report_to == names


def test_writing_one_voids_the_default_of_the_other(tmp_path: Path) -> None:
    training = load(f"{SMALL}training: {{max_steps: 5, warmup_steps: 2, micro_batch_tokens: 64}}\n", tmp_path).training
    assert (training.epochs, training.warmup_ratio, training.micro_batch_size) == (None, None, None)
    assert (training.max_steps, training.warmup_steps, training.micro_batch_tokens) == (5, 2, 64)
    plain = load(SMALL, tmp_path).training
    assert (plain.epochs, plain.warmup_ratio, plain.micro_batch_size, plain.max_steps) == (1.0, 0.03, 2, None)


def test_a_generation_metric_turns_generation_on(tmp_path: Path) -> None:
    assert load(f"{SMALL}evaluation: {{metrics: [loss, rouge_l]}}\n", tmp_path).evaluation.generate is True
    assert load(SMALL, tmp_path).evaluation.generate is False
    asked = load(f"{SMALL}evaluation: {{generate: true}}\n", tmp_path).evaluation
    assert asked.metrics == ("loss", "exact_match")  # never answers that nothing scores


def test_what_cannot_be_obeyed_is_named(tmp_path: Path) -> None:
    text = (
        SMALL.replace("model: m", "model: {name_or_path: m, family: speech}")
        + "memory: {activation_offload: true, gradient_checkpointing: false}\n"
    )
    assert [problem.key for problem in refuse_unsupported(load(text, tmp_path))] == [
        "model.family",
        "memory.activation_offload",
    ]
    assert refuse_unsupported(load(SMALL, tmp_path)) == []


def test_ranks_may_have_different_budgets(tmp_path: Path) -> None:
    memory = load(SMALL + "memory: {budget: [8GiB, 4GiB]}\n", tmp_path).memory
    assert [memory.of_rank(rank, 2).budget_bytes for rank in range(2)] == [8 * 2**30, 4 * 2**30]
    assert memory.budget_bytes == memory.of_rank(0, 3).budget_bytes == 4 * 2**30


@pytest.mark.parametrize(
    ("text", "count"), [("8GiB", 8 * 2**30), ("1.5 GB", 1_500_000_000), ("700MiB", 700 * 2**20), ("12 B", 12)]
)
def test_a_budget_is_a_size(text: str, count: int, tmp_path: Path) -> None:
    assert load(f"{SMALL}memory: {{budget: {text}}}\n", tmp_path).memory.budget_bytes == count


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.epochs: 3", "recipe.yaml:4: training.epochs: unknown key; write training: {epochs: ...}"),
        ('"a\\nb": 1', "recipe.yaml:4: the key 'a\\nb' is not printable; write KEY: VALUE"),
        ("? \n: x", "recipe.yaml:4: an empty key; write KEY: VALUE"),
        ("adapter: {method: [lora]}", "recipe.yaml:4: adapter.method: unknown adapter a list; known adapters: "),
        (
            "memory: {budget: '" + "x" * 500 + "'}",
            "recipe.yaml:4: memory.budget: must be a size with its unit, such as 8GiB, no",
        ),
    ],
)
def test_odd_keys_and_values_stay_on_one_line(text: str, expected: str, tmp_path: Path) -> None:
    lines = problems_of(f"{SMALL}{text}\n", tmp_path)
    assert len(lines) == 1
    assert lines[0].startswith(expected)


def test_what_an_alias_could_not_write_is_not_also_missing(tmp_path: Path) -> None:
    text = "model: m\ndatasets: [{path: a.jsonl, shards: 4}]\nsequence_len: 9\noutput: {dir: out}\n"
    assert problems_of(text, tmp_path) == [
        "recipe.yaml:2: datasets.0.shards: is a key of another tool and would be lost; "
        "write the source under data.train"
    ]


@pytest.mark.parametrize("objective", ["clasify", {"method": "clasify", "labels": ["a", "b"]}])
def test_nothing_follows_from_an_unknown_objective(tmp_path: Path, objective: object) -> None:
    """The rows, metrics and settings of the default objective are not asked of it."""
    (tmp_path / "d.jsonl").write_text("{}\n")
    values = {
        "model": "org/base",
        "data": {"train": {"path": "d.jsonl", "format": "labels", "columns": {"a": "text"}}, "eval": 0.1},
        "objective": objective,
        "evaluation": {"metrics": ["accuracy", "macro_f1"], "best": "eval.macro_f1"},
        "output": {"dir": "run"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    problem = caught.value.problems[0]
    assert len(caught.value.problems) == 1, str(caught.value)
    assert (problem.what, problem.how) == ("unknown objective 'clasify'", "did you mean 'classify'?")
