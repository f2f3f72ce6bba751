"""KEY=VALUE and ~KEY obey the file's rules; other tools' key names are rewritten, exactly or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe.test_checks import load
from tests.recipe.test_reader import SMALL, problems_of
from tunekit.errors import RecipeError
from tunekit.recipe.load import load_recipe, load_target_overrides

AXOLOTL = """\
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
load_in_4bit: true
load_in_8bit: false
adapter: qlora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
lora_model_dir:
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
  - path: rows.jsonl
    type: chat_template
    field_messages: talk
val_set_size: 0.05
sequence_len: 4096
sample_packing: true
num_epochs: 3
micro_batch_size: 4
gradient_accumulation_steps: 2
lr_scheduler: constant
optimizer: paged_adamw_8bit
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
output_dir: ./out
"""
LLAMA_FACTORY = """\
model_name_or_path: meta-llama/Llama-3.2-1B
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: q_proj,v_proj
dataset: a.json,b.jsonl
cutoff_len: 512
per_device_train_batch_size: 1
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
quantization_bit: 8
val_size: 0.1
train_on_prompt: false
output_dir: saves
report_to: none
logging_steps: 10
"""


def test_dotted_keys_and_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"{SMALL}training: {{epochs: 3, seed: 1}}\nadapter: lora\n"
    recipe = load(
        text,
        tmp_path,
        "~training.epochs",
        "training.max_steps=5",
        "adapter.r=4",
        "adapter.rank_pattern.layers.0.q_proj=2",
        "data.train.1=b.jsonl",
        "data.train.1.weight=2",
        "data.train.0.format=chat",
        "memory.streaming=off",
        "output.dir='a b'",
        "~evaluation.best",
    )
    assert (recipe.training.epochs, recipe.training.max_steps, recipe.training.seed) == (None, 5, 1)
    settings = recipe.adapter.model_dump()
    assert (settings["r"], settings["rank_pattern"]) == (4, {"layers.0.q_proj": 2})
    assert [(source.format, source.weight) for source in recipe.data.train] == [("chat", 1.0), ("auto", 2.0)]
    assert recipe.memory.streaming == "off"
    assert recipe.output.dir == str(tmp_path / "a b")


def test_an_item_of_a_list_can_be_removed(tmp_path: Path) -> None:
    text = "model: m\ndata:\n  train:\n  - a.jsonl\n  - b.jsonl\n  - {path: c.jsonl, wieght: 2}\noutput: {dir: out}\n"
    lines = problems_of(text, tmp_path, "~data.train.0")
    assert lines == ["recipe.yaml:6: data.train.1.wieght: unknown key; did you mean 'weight'?"]


def test_lines_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ndata:\n  train: [a.jsonl,\n    b.jsonl]\nnum_epochs: 3\noutput:\n  dir: out\n")
    loaded = load_recipe(path, ["training.seed=3"])
    assert loaded.line_of("data.train.1.path") == 4
    assert loaded.line_of("training.epochs") == 5
    assert loaded.line_of("output.dir") == 7
    assert loaded.line_of("training.seed") is None
    assert loaded.rewrites == [f"{path}:5: num_epochs -> training.epochs"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.epoch=2", "training.epoch: unknown key; did you mean 'epochs'?"),
        ("training", "'training': is neither KEY=VALUE nor ~KEY"),
        ("=3", "'': is not a dotted key"),
        ("training..seed=3", "'training..seed': is not a dotted key"),
        ("training.seed=true", "training.seed: must be a whole number, not true"),
        ("training.seed=[1", "training.seed: not valid YAML"),
        ("training.seed=*x", "training.seed: the alias *x is not allowed"),
        ("training.seed=", "training.seed: must be a whole number, not empty"),
        ("training.seed.x=1", "training.seed: must be a whole number, not a mapping"),
        ("data.train.5=x", "data.train.5: data.train has 1 items"),
        ("data.train.x=1", "data.train.x: data.train has 1 items; write data.train.0.x"),
        ("output.dir.x=1", "output.dir.x: output.dir is 'out', not a mapping"),
        ("model=5", "model: must be a mapping or a name, not 5; write model: NAME"),
        ("model=", "model: must be a mapping or a name, not empty; write model: NAME"),  # it has no default
        ("data=rows.jsonl", "data: must be a mapping, not 'rows.jsonl'; write data: {train: rows.jsonl}"),
        ("output=first", "output: must be a mapping, not 'first'; write output: {dir: runs/first}"),
        ("adapter=", "adapter: must be a mapping or a name, not empty; remove the key to use the defaults"),
        ("objective.method=distill", "objective.teacher: is required; write teacher: NAME"),
        ("~training.epoch", "training.epoch: unknown key; did you mean 'epochs'?"),
        ("~data.train.3", "data.train.3: the list has no such item"),
        ("~output.dir", "output.dir: is required; write dir: runs/first"),
        ("~", "'': is not a dotted key"),
        ("optim=adagrad", "optim: 'adagrad' has no exact translation"),
    ],
)
def test_bad_overrides(override: str, expected: str, tmp_path: Path) -> None:
    lines = problems_of(SMALL, tmp_path, override)
    assert any(expected in line for line in lines), lines
    assert all(line.startswith(("command line: ", "recipe.yaml:3: output.dir")) for line in lines), lines


def test_a_key_given_twice(tmp_path: Path) -> None:
    assert problems_of(SMALL, tmp_path, "training.seed=1", "seed=2") == [
        "command line: training.seed: is given twice; keep one"
    ]


def test_axolotl(tmp_path: Path) -> None:
    recipe = load(AXOLOTL, tmp_path, "num_epochs=2")
    assert recipe.model.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (recipe.model.quantization, recipe.model.dtype) == ("nf4", "auto")
    assert recipe.adapter.model_dump(exclude_defaults=True) == {"r": 8, "alpha": 16.0}
    assert [source.format for source in recipe.data.train] == ["alpaca_prompt", "chat"]
    assert recipe.data.train[1].columns == {"talk": "messages"}
    assert (recipe.data.eval, recipe.data.max_length, recipe.data.packing) == (0.05, 4096, True)
    training = recipe.training
    assert (training.epochs, training.micro_batch_size, training.optimizer) == (2.0, 4, "paged_adamw_8bit")
    assert (training.scheduler, training.warmup_ratio) == ("constant", 0.0)
    assert recipe.memory.gradient_checkpointing is True


def test_llama_factory(tmp_path: Path) -> None:
    recipe = load(LLAMA_FACTORY, tmp_path)
    assert (recipe.model.quantization, recipe.model.dtype) == ("int8", "bfloat16")
    assert recipe.adapter.model_dump(exclude_defaults=True) == {"r": 4, "target_modules": ("q_proj", "v_proj")}
    assert [source.path for source in recipe.data.train] == [str(tmp_path / name) for name in ("a.json", "b.jsonl")]
    assert (recipe.data.eval, recipe.training.warmup_ratio, recipe.output.report_to) == (0.1, 0.1, ())


def test_peft_names_in_adapter(tmp_path: Path) -> None:
    peft = "peft_type: LORA, task_type: CAUSAL_LM, r: 4, lora_alpha: 8, lora_dropout: 0.1, bias: none"
    assert load(f"{SMALL}adapter: {{{peft}}}\n", tmp_path).adapter.model_dump(exclude_defaults=True) == {
        "r": 4,
        "alpha": 8.0,
        "dropout": 0.1,
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "num_epochs: 3\ntraining: {epochs: 2}",
            "recipe.yaml:4: num_epochs: num_epochs and training.epochs (recipe.yaml:5) mean",
        ),
        (
            "num_epochs: 3\nnum_train_epochs: 3",
            "recipe.yaml:5: num_train_epochs: num_train_epochs and num_epochs (recipe.yaml:4)",
        ),
        ("num_epochs: abc", "recipe.yaml:4: training.epochs (written num_epochs): must be a number, not 'abc'"),
        ("optim: adagrad", "recipe.yaml:4: optim: 'adagrad' has no exact translation"),
        ("lr_scheduler: one_cycle", "recipe.yaml:4: lr_scheduler: 'one_cycle' has no exact translation"),
        (
            "lr_scheduler: constant\nwarmup_steps: 5",
            "recipe.yaml:4: lr_scheduler: the other tool's schedule `constant` ignores the warm-up",
        ),
        ("val_set_size: 200", "recipe.yaml:4: val_set_size: is a number of rows, not a fraction; write a fraction"),
        (
            "load_in_4bit: true\nload_in_8bit: true",
            "recipe.yaml:5: load_in_8bit: load_in_8bit and load_in_4bit (recipe.yaml:4)",
        ),
        ("load_in_4bit: no", "recipe.yaml:4: load_in_4bit: must be true or false, not 'no'"),
        ("load_in_4bit: false\nadapter: qlora", "recipe.yaml:4: load_in_4bit: false contradicts adapter: qlora"),
        ("bnb_4bit_quant_type: fp4", "recipe.yaml:4: bnb_4bit_quant_type: the model is not loaded in 4 bits"),
        ("bf16: true\nfp16: true", "recipe.yaml:5: fp16: contradicts bf16 (recipe.yaml:4)"),
        (
            "base_model: x",
            "recipe.yaml:4: base_model: base_model and model.name_or_path (recipe.yaml:1) mean the same setting",
        ),
        ("deepspeed: zero3.json", "recipe.yaml:4: deepspeed: is a key of another tool and would be lost"),
        (
            "training: {num_train_epochs: 3}",
            "recipe.yaml:4: training.num_train_epochs: unknown key; write training.epochs: 3",
        ),
        ("adapter: {lora_r: 3}", "recipe.yaml:4: adapter.lora_r: unknown key; write adapter.r: 3"),
        (
            "max_steps: 5\nnum_epochs: 3",
            "recipe.yaml:5: training.epochs (written num_epochs): excludes training.max_steps",
        ),
        ("lora_r: 8\nadapter: 5", "recipe.yaml:4: lora_r: adapter (recipe.yaml:5) is not a mapping"),
    ],
)
def test_aliases_that_do_not_translate(text: str, expected: str, tmp_path: Path) -> None:
    lines = problems_of(f"{SMALL}{text}\n", tmp_path)
    assert any(line.startswith(expected) for line in lines), lines


@pytest.mark.parametrize(("written", "override"), [("max_steps: 5", "training.epochs=3"), ("epochs: 5", "max_steps=3")])
def test_the_advice_for_keys_that_exclude_each_other_works(written: str, override: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{SMALL}training: {{{written}}}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="excludes training") as caught:
        load_recipe(recipe, [override])
    advice = caught.value.problems[0].how.removeprefix("remove one (").removesuffix(" on the command line)")
    load_recipe(recipe, [override, advice])
    with pytest.raises(RecipeError, match=r"; remove one$"):
        load_recipe(
            recipe, [f"~training.{written.split(':')[0]}", "training.warmup_steps=3", "training.warmup_ratio=0.1"]
        )


def test_a_wrong_item_does_not_make_a_list_something_else(tmp_path: Path) -> None:
    lines = problems_of(f"{SMALL}objective: {{method: classify, labels: [a, a]}}\n", tmp_path)
    assert lines == ["recipe.yaml:4: objective.labels: names the label 'a' twice; each label is one output of the head"]


def test_overrides_of_a_target() -> None:
    found = load_target_overrides(["load_in_4bit=true", "evaluation.metrics=[exact_match]"])
    assert (found.model, found.evaluation) == (
        {"quantization": "nf4"},
        {"metrics": ("exact_match",), "generate": True},
    )
    assert found.rewrites == ["command line: load_in_4bit -> model.quantization: 'nf4'"]
    with pytest.raises(RecipeError, match="training: cannot be overridden here"):
        load_target_overrides(["training.seed=3"])
    with pytest.raises(RecipeError, match="did you mean 'quantization'"):
        load_target_overrides(["model.quantizaton=nf4"])
