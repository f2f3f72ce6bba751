"""`tunekit import` of configurations after torchtune's, Unsloth's, TRL's and PEFT's own published ones, with their key
structure and own values: each becomes a recipe that is read as it was meant, or the table says what is lost.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.data_case import write_lines
from tunekit.cli import main
from tunekit.errors import RecipeError
from tunekit.foreign import import_verb
from tunekit.recipe.foreign.command_line import read_command_line
from tunekit.recipe.foreign.table import IN_ADAPTER, TOP_LEVEL
from tunekit.recipe.foreign.torchtune import TABLE
from tunekit.recipe.foreign.unsloth import OPTIONS, SECTIONS
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading.dump import yaml_scalar
from tunekit.recipe.reading.sections import section_class
from tunekit.recipe.reading.yaml_reader import read_yaml
from tunekit.recipe.recipe import Recipe
from tunekit.validate import validate

TORCHTUNE = """
output_dir: out/torchtune
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  lora_rank: 24
  lora_alpha: 48
  lora_dropout: 0.1
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: base/original/tokenizer.model
  max_seq_len: 640
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: base
  checkpoint_files: [
     model.safetensors
  ]
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: LLAMA3_2
resume_from_checkpoint: False
save_adapter_weights_only: False
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: False
seed: null
shuffle: True
batch_size: 3
optimizer:
  _component_: torch.optim.AdamW
  fused: True
  weight_decay: 0.02
  lr: 4e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 60
loss:
  _component_: torchtune.modules.loss.LinearCrossEntropyLoss
epochs: 2
max_steps_per_epoch: null
gradient_accumulation_steps: 6
clip_grad_norm: null
compile: False
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}/logs
log_every_n_steps: 1
log_peak_memory_stats: True
log_level: INFO
device: cuda
dtype: bf16
enable_activation_checkpointing: False
enable_activation_offloading: False
profiler:
  _component_: torchtune.training.setup_torch_profiler
  enabled: False
  output_dir: ${output_dir}/profiling_outputs
"""
UNSLOTH = """
model: org/base
data:
  dataset: someone/rows
  format_type: auto
training:
  training_type: lora
  max_seq_length: 1536
  load_in_4bit: true
  output_dir: out/unsloth
  num_epochs: 2
  learning_rate: 0.0003
  batch_size: 3
  gradient_accumulation_steps: 5
  warmup_steps: 7
  max_steps: 0
  save_steps: 0
  weight_decay: 0.002
  random_seed: 11
  packing: false
  train_on_completions: false
  gradient_checkpointing: "unsloth"
lora:
  lora_r: 24
  lora_alpha: 12
  lora_dropout: 0.0
  target_modules: "q_proj,v_proj"
  vision_all_linear: false
  use_rslora: false
  use_loftq: false
  use_dora: false
  finetune_vision_layers: true
  finetune_language_layers: true
  finetune_attention_modules: true
  finetune_mlp_modules: true
logging:
  enable_wandb: false
  wandb_project: mine
  enable_tensorboard: false
  tensorboard_dir: runs
"""
MLP = ("gate_proj", "up_proj", "down_proj")
DPO_LOSS = "_component_: torchtune.modules.loss.LinearCrossEntropyLoss"
DPO = {
    "_component_: torchtune.datasets.alpaca_cleaned_dataset\n  packed: False": (
        "_component_: torchtune.datasets.stack_exchange_paired_dataset"
    ),
    DPO_LOSS: ("_component_: torchtune.rlhf.loss.DPOLoss\n  beta: 0.07\n  label_smoothing: 0"),
}
TEACHER = """
teacher_model:
  _component_: torchtune.models.qwen2.qwen2_1_5b
teacher_checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: teacher
  checkpoint_files: [model.safetensors]
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: QWEN2
kd_loss:
  _component_: torchtune.modules.loss.ForwardKLWithChunkedOutputLoss
  num_output_chunks: 8
kd_ratio: 0.3
"""
ALPACA = "_component_: torchtune.datasets.alpaca_cleaned_dataset\n  packed: False"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where configurations lie, with a base and rows to name."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}", encoding="utf-8")
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    write_lines(tmp_path / "rows.jsonl", rows)
    return tmp_path


def imported(folder: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]) -> tuple[Recipe, str]:
    """The recipe that `import` wrote, valid, and what it said."""
    path, output = folder / name, folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    import_verb(str(path), str(output))
    recipe = validate(str(output)).recipe
    whole = load_recipe(output).recipe
    assert recipe == whole
    return recipe, capsys.readouterr().err


def changed(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


def values(recipe: Recipe, *keys: str) -> list[Any]:
    found = []
    for key in keys:
        value: Any = recipe
        for part in key.split("."):
            value = value[int(part)] if part.isdigit() else getattr(value, part)
        found.append(value)
    return found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            UNSLOTH.replace("format_type: auto", "format_type: [a]"),
            r"format_type: a list has no exact translation[^\n]*$",
        ),
        ("base_model: base\nmicro_batch_size: 2\nadapter: [lora]\n", "adapter: must be a mapping or a name, not"),
        (
            "model_name_or_path: base\nuse_peft: true\ndataset_name: [rows]\ndataset_text_field: story\n",
            "dataset_text_field: there are no training sources",
        ),
    ],
)
def test_values_of_the_wrong_type_are_problems(folder: Path, text: str, problem: str) -> None:
    (folder / "theirs.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=problem):
        import_verb(str(folder / "theirs.yaml"), None)


def test_the_reasons_name_keys_that_exist() -> None:
    reasons = " ".join(
        alias.why for table in (TOP_LEVEL, IN_ADAPTER, TABLE, SECTIONS, OPTIONS) for alias in table.values()
    )
    named = set(re.findall(r"\b(model|data|training|memory|evaluation|output)\.(\w+)", reasons))
    assert ("training", "kernels") in named
    for section, key in named:
        owner = section_class(section, None)
        assert owner is not None
        assert key in owner.model_fields, f"{section}.{key}"


@pytest.mark.parametrize("line", ["  max_seq_len: null\n", ""])
def test_torchtune_without_a_limit_loses_no_tokens(folder: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, said = imported(folder, "theirs.yaml", changed(TORCHTUNE, {"  max_seq_len: 640\n": line}), capsys)
    assert values(recipe, "data.max_length", "data.excess_length") == [131072, "error"]
    assert "tokenizer.max_seq_len -> data.max_length: 131072" in said


@pytest.mark.parametrize(
    ("changes", "expected"),
    [  # torchtune/recipes/configs: 1B_lora, 3B_qlora, 8B_dora, 8B_qdora, 1B_full, 7B_lora_dpo, 0.5B_lora (qwen2)
        ({}, {"adapter.method": "lora", "adapter.target_modules": ("q_proj", "v_proj", "o_proj", *MLP)}),
        (
            {"lora_llama3_2_1b": "qlora_llama3_2_3b", "apply_lora_to_mlp: True": "apply_lora_to_mlp: False"},
            {"model.quantization": "nf4", "adapter.target_modules": ("q_proj", "v_proj", "o_proj")},
        ),
        (
            {"lora_rank: 24": "lora_rank: 24\n  use_dora: True\n  apply_lora_to_output: True"},
            {"adapter.method": "dora", "adapter.target_modules": ("q_proj", "v_proj", "o_proj", *MLP, "lm_head")},
        ),
        (
            {"lora_rank: 24": "lora_rank: 24\n  use_dora: True\n  quantize_base: True"},
            {"adapter.method": "dora", "model.quantization": "nf4"},
        ),
        (
            {
                "lora_llama3_2_1b": "llama3_2_1b",
                "  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']\n  apply_lora_to_mlp: True\n": "",
                "  lora_rank: 24\n  lora_alpha: 48\n  lora_dropout: 0.1\n": "",
                "torch.optim.AdamW\n  fused: True": "bitsandbytes.optim.PagedAdamW8bit",
                "seed: null": "seed: null\noptimizer_in_bwd: False",
                "clip_grad_norm: null": "clip_grad_norm: 1.5",
            },
            {"adapter.method": "full", "training.optimizer": "paged_adamw_8bit", "training.max_grad_norm": 1.5},
        ),
        (
            {**DPO, DPO_LOSS: "_component_: torchtune.rlhf.loss.RSOLoss\n  gamma: 0.3"},
            {"objective.method": "dpo", "objective.loss_type": ("hinge",), "objective.beta": 0.3},
        ),
        (
            {"seed: null": f"seed: null\n{TEACHER}"},  # qwen2/1.5_to_0.5B_KD_lora_single_device.yaml
            {"objective.method": "distill", "objective.beta": 0.0, "objective.kd_ratio": 0.3},
        ),
        (
            {"seed: null": f"seed: null\n{TEACHER.replace('ForwardKL', 'ReverseKL').replace('kd_ratio: 0.3', '')}"},
            {"objective.beta": 1.0, "objective.kd_ratio": 0.5},
        ),
        (
            {ALPACA: "_component_: torchtune.datasets.instruct_dataset\n  source: org/rows"},
            {"data.train.0.format": "alpaca", "data.train.0.columns": {"input": "instruction"}},
        ),
        (
            {
                ALPACA: "_component_: torchtune.datasets.instruct_dataset\n  source: org/rows\n"
                "  column_map: {input: question, output: output}"
            },
            {"data.train.0.format": "alpaca", "data.train.0.columns": {"question": "instruction"}},
        ),
        (DPO, {"objective.method": "dpo", "objective.beta": 0.07, "data.train.0.format": "preference"}),
        (
            {
                ALPACA: "_component_: torchtune.datasets.alpaca_dataset\n  split: train[:90%]",
                "seed: null": "seed: null\nrun_val_every_n_steps: 50\nbatch_size_val: ${batch_size}\ndataset_val:\n"
                "  _component_: torchtune.datasets.alpaca_dataset\n  split: train[90%:]",
            },
            {"data.eval": 0.1, "training.eval_steps": 50, "evaluation.batch_size": 3, "data.train.0.split": "train"},
        ),
        (
            {
                ALPACA: "_component_: torchtune.datasets.chat_dataset\n  source: json\n  data_files: rows.jsonl\n"
                "  conversation_column: messages\n  conversation_style: openai\n  packed: True",
                "lr_scheduler:\n  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup\n"
                "  num_warmup_steps: 60\n": "",
                "DiskLogger": "TensorBoardLogger",
            },
            {
                "data.train.0.format": "chat",
                "data.packing": True,
                "data.train_on": "assistant",
                "training.scheduler": "constant",
                "training.warmup_ratio": 0.0,
                "output.report_to": ("tensorboard",),
            },
        ),
    ],
)
def test_torchtune(
    folder: Path, changes: dict[str, str], expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, said = imported(folder, "theirs.yaml", changed(TORCHTUNE, changes), capsys)
    keys = ("model.name_or_path", "data.max_length", "data.excess_length", "training.epochs", "training.learning_rate")
    assert values(recipe, *keys) == [str(folder / "base"), 640, "truncate", 2.0, 4e-4]
    assert values(recipe, *expected) == list(expected.values())
    if "alpaca" in recipe.data.train[0].path:
        assert recipe.data.train[0].format == "alpaca_turn"
        assert recipe.data.train_on == "all"  # what its builder does where it is not told otherwise
    assert "theirs.yaml: a configuration of torchtune" in said
    assert "checkpointer.recipe_checkpoint -> nothing (it is empty)" in said


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"max_steps_per_epoch: null": "max_steps_per_epoch: few"}, "max_steps_per_epoch: .* would be lost"),
        ({"llama3_2.lora_llama3_2_1b": "phi3.lora_phi3_mini"}, "have other names in transformers' model"),
        ({"llama3_2.lora_llama3_2_1b": "llama3_2_vision.lora_11b"}, "is not a text-only model"),
        ({"loss.LinearCrossEntropyLoss": "loss.SimPOLoss"}, "the loss 'SimPOLoss' has no exact translation"),
        ({"epochs: 2": f"epochs: 2\n{TEACHER.replace('ForwardKL', 'SymmetricKL')}"}, "'SymmetricKLWith.* has no exact"),
        ({"alpaca_cleaned_dataset": "samsum_dataset"}, "the data set 'samsum_dataset' has no exact translation"),
        ({"seed: null": "seed: null\nquantizer:\n  _component_: a.B"}, "quantizer._component_: .* would be lost"),
        ({"seed: null": "seed: null\nfuture: 3"}, "future: is not a known key, and would be lost"),
        ({"LinearCrossEntropyLoss": "DPOLoss\n  loss_type: ipo"}, "loss.loss_type: .* would be lost"),
        ({"['q_proj', 'v_proj', 'output_proj']": "3"}, "model.lora_attn_modules: must be a list, not 3"),
        ({"['q_proj', 'v_proj', 'output_proj']": "[[q_proj]]"}, "have other names in transformers' model"),
        ({ALPACA: "- alpaca_cleaned_dataset"}, "dataset: 'alpaca_cleaned_dataset' is not a data set with its argum"),
        ({ALPACA: f"{ALPACA}\n  split: 3"}, "dataset: split must be a text, not 3"),
        ({ALPACA: f"{ALPACA}\n  column_map: [input]"}, "dataset: column_map must be a mapping, not"),
        ({ALPACA: f"{ALPACA}\n  column_map: {{input: [q]}}"}, "dataset: column_map.input must be a text, not a list"),
        ({"clip_grad_norm: null": "clip_grad_norm: few"}, "clip_grad_norm.: must be a number"),
    ],
)
def test_what_torchtune_has_and_nothing_here_is_said(
    folder: Path, changes: dict[str, str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RecipeError, match=problem) as caught:
        imported(folder, "theirs.yaml", changed(TORCHTUNE, changes), capsys)
    assert caught.value.exit_code == 2
    assert any("optimizer.lr -> training.learning_rate" in line for line in caught.value.notes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [  # unsloth: studio's lora_text.yaml and full_finetune.yaml, and what unsloth_cli/config.py allows
        ({}, {"adapter.method": "lora", "model.quantization": "nf4", "data.train_on": "all"}),
        (
            {"training_type: lora": "training_type: full", "load_in_4bit: true": "load_in_4bit: false"},
            {"adapter.method": "full", "model.quantization": "none"},
        ),
        ({"format_type: auto": "format_type: alpaca"}, {"data.train.0.format": "alpaca_with_input"}),
        (
            {
                "use_dora: false": "use_dora: true",
                "dataset: someone/rows\n  format_type: auto": "local_dataset: [rows.jsonl]\n  format_type: chatml",
                "train_on_completions: false": "train_on_completions: true",
                "enable_tensorboard: false": "enable_tensorboard: true",
                "max_steps: 0": "max_steps: 40",
                "num_epochs: 2": "num_epochs: 0",
            },
            {
                "adapter.method": "dora",
                "data.train.0.format": "chat",
                "data.train_on": "assistant",
                "output.report_to": ("tensorboard",),
                "training.max_steps": 40,
            },
        ),
        ({"  learning_rate: 0.0003\n": "", "  num_epochs: 2\n": ""}, {"training.epochs": 3.0}),
    ],
)
def test_unsloth(
    folder: Path, changes: dict[str, str], expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, said = imported(folder, "theirs.yaml", changed(UNSLOTH, changes), capsys)
    keys = ("training.optimizer", "training.scheduler", "training.warmup_steps", "data.max_length")
    assert values(recipe, *keys) == ["adamw_8bit", "linear", 7, 1536]
    assert values(recipe, *expected) == list(expected.values())
    assert "default of Unsloth -> training.optimizer: 'adamw_8bit'" in said
    assert recipe.training.learning_rate == (3e-4 if "  learning_rate: 0.0003\n" not in changes else 2e-4)
    assert ("write format: alpaca_with_input" in said) == (recipe.data.train[0].format == "auto")


SCRIPT = """#!/bin/bash
# what trains
export CUDA_VISIBLE_DEVICES=0
python unsloth-cli.py --model_name "org/base" --max_seq_length 1536 --dtype None --load_in_4bit \\
  --r 24 --lora_alpha 12 --lora_dropout 0.1 --bias "none" --use_gradient_checkpointing "unsloth" \\
  --random_state 11 --use_rslora --per_device_train_batch_size 3 --gradient_accumulation_steps 5 \\
  --warmup_steps 7 --max_steps 40 --learning_rate 2e-6 --logging_steps 1 --optim "adamw_8bit" \\
  --weight_decay 0.002 --lr_scheduler_type "linear" --seed 12 --output_dir "out" --report_to "tensorboard" \\
  --dataset someone/rows --save_model --save_path "model" --quantization "f16"
echo done --r 99
"""


def test_unsloths_script(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, said = imported(folder, "run.sh", SCRIPT, capsys)
    keys = ("adapter.r", "adapter.use_rslora", "model.quantization", "training.max_steps", "training.seed")
    assert values(recipe, *keys, "data.train.0.format") == [24, True, "nf4", 40, 12, "alpaca_with_input"]
    assert "run.sh:9: the script's prompt is alpaca_with_input with each line" in said
    assert "run.sh:9: quantization -> nothing (run `tunekit merge` or `tunekit export` on the result)" in said
    for change, what in (
        ({"--save_model": "--raw_text_file"}, "raw_text_file: .* tunekit cuts texts to data.max_length"),
        ({"someone/rows": "rows.jsonl"}, "dataset: the script cuts a file into overlapping chunks of raw text"),
        ({"--r 24": "--r $RANK"}, r"run.sh:5: r: a shell would replace \$RANK"),
    ):
        with pytest.raises(RecipeError, match=what):
            import_verb(str(_written(folder, "run.sh", changed(SCRIPT, change))), None)
    with pytest.raises(RecipeError, match="contains no known training command"):
        import_verb(str(_written(folder, "run.sh", "ls --all\n")), None)


def _written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_token_in_quotes_does_not_end_a_command(tmp_path: Path) -> None:
    command = "trl sft --eos_token '<|im_end|>' --lora_r 20 2>&1 | tee log.txt --lora_alpha 3"
    draft = read_command_line(_written(tmp_path, "run.sh", command))
    assert (draft.get(("eos_token",)), draft.get(("lora_r",))) == ("<|im_end|>", 20)
    assert not draft.has(("lora_alpha",))


@pytest.mark.parametrize(
    ("command", "expected"),
    [  # the heads of trl/scripts/sft.py, dpo.py and reward.py
        (
            "accelerate launch --num_processes 1 trl/scripts/sft.py --model_name_or_path org/base "
            "--dataset_name someone/rows --learning_rate 2.0e-4 --num_train_epochs 1 --packing "
            "--per_device_train_batch_size 2 --gradient_accumulation_steps 8 --eos_token --use_peft --lora_r 20",
            None,
        ),
        (
            "trl sft --model_name_or_path org/base --dataset_name someone/rows --use_peft --lora_r=20",
            {"objective.method": "sft", "training.learning_rate": 2e-5, "data.max_length": 1024, "adapter.r": 20},
        ),
        (
            "trl dpo --model_name_or_path org/base --dataset_name someone/pairs --use_peft --lora_r 20 --beta 0.3",
            {"objective.method": "dpo", "training.learning_rate": 1e-6, "objective.beta": 0.3, "adapter.dropout": 0.0},
        ),
        (
            "trl dpo --model_name_or_path org/base --dataset_name someone/pairs --use_peft --lora_dropout 0.1",
            {"adapter.dropout": 0.0},
        ),
        (
            "torchrun --nproc_per_node 4 --nnodes=2 trl/scripts/dpo.py --model_name_or_path org/base --use_peft "
            "--dataset_name someone/pairs --gradient_accumulation_steps 3 2>&1 | tee log.txt",
            {"training.gradient_accumulation_steps": 24},
        ),
        (
            "trl sft --model_name_or_path org/base --dataset_name someone/rows --use_peft --load_in_4bit "
            "--assistant_only_loss false --lora_target_modules q_proj v_proj > log.txt",
            {
                "model.double_quantization": False,
                "data.train_on": "assistant",
                "adapter.target_modules": ("q_proj", "v_proj"),
            },
        ),
        (
            "python trl/scripts/reward.py --model_name_or_path org/base --dataset_name someone/pairs",
            {"objective.method": "reward", "adapter.method": "full", "data.excess_length": "drop"},
        ),
    ],
)
def test_trls_commands(
    folder: Path, command: str, expected: dict[str, Any] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is not written is what TRL takes, a fully trained model where no adapter is asked for."""
    if expected is None:
        with pytest.raises(RecipeError, match=r"eos_token: .* rows end with the end token of the base's tokenizer"):
            imported(folder, "run.sh", command, capsys)
        return
    recipe, said = imported(folder, "run.sh", command, capsys)
    assert values(recipe, *expected) == list(expected.values())
    assert values(recipe, "training.scheduler", "training.micro_batch_size", "training.epochs") == ["linear", 8, 3.0]
    assert "default of TRL -> training.epochs: 3" in said


@pytest.mark.parametrize(
    ("model_type", "options", "expected", "said"),
    [
        ("qwen2", "", ("q_proj", "v_proj"), "default of TRL -> adapter.target_modules: [q_proj, v_proj]"),
        ("gpt2", "", ("c_attn",), "default of TRL -> adapter.target_modules: [c_attn]"),
        ("unheard_of", "", "all-linear", "adapter.target_modules: 'all-linear'; PEFT adapts fewer layers"),
        ("qwen2", "--lora_target_modules k_proj o_proj", ("k_proj", "o_proj"), "-> adapter.target_modules"),
    ],
)
def test_trl_without_target_modules_adapts_those_of_peft(
    folder: Path,
    model_type: str,
    options: str,
    expected: object,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    command = f"trl sft --model_name_or_path {folder / 'base'} --dataset_name someone/rows --use_peft {options}"
    recipe, lines = imported(folder, "run.sh", command, capsys)
    assert values(recipe, "adapter.target_modules") == [expected]
    assert said in lines


@pytest.mark.parametrize(
    ("data", "options", "split", "said"),
    [
        ("someone/rows", "--eval_strategy steps --eval_steps 30", "test", "eval_strategy -> data.eval"),
        ("someone/rows", "--eval_strategy epoch", "test", "eval_strategy -> data.eval"),
        ("someone/rows", "--eval_strategy steps --dataset_test_split dev", "dev", "dataset_test_split -> data.eval"),
        ("someone/rows", "--dataset_test_split dev", None, "nothing (eval_strategy is off)"),
        ("rows.jsonl", "--eval_strategy steps --eval_steps 30", None, "no evaluation rows: write data.eval: FILE"),
    ],
)
def test_trl_evaluates_on_a_split_of_its_data_set(
    folder: Path, data: str, options: str, split: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"trl sft --model_name_or_path org/base --dataset_name {data} --use_peft {options}"
    recipe, lines = imported(folder, "run.sh", command, capsys)
    assert said in lines
    if split is None:
        assert recipe.data.eval is None
    else:
        assert values(recipe, "data.eval.0.path", "data.eval.0.split") == ["someone/rows", split]
    assert values(recipe, "training.eval_steps") == [30 if "30" in options else 100]


def test_a_split_of_a_file_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "trl sft --model_name_or_path org/base --dataset_name rows.jsonl --eval_strategy steps"
    with pytest.raises(RecipeError, match="dataset_test_split: is a split of a hub data set, but no data set is named"):
        imported(folder, "run.sh", f"{command} --dataset_test_split dev", capsys)


@pytest.mark.slow
def test_the_target_modules_of_peft_are_pefts() -> None:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    from tunekit.recipe.foreign.tools import PEFT_TARGETS

    for model_type, names in PEFT_TARGETS.items():
        assert tuple(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type]) == names


GRPO = (
    "trl grpo --model_name_or_path org/base --dataset_name someone/rows --use_peft --num_generations 4 --beta 0.04 "
    "--scale_rewards false --log_completions --vllm_mode colocate"
)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--reward_funcs accuracy_reward", r"reward_funcs: .* write objective\.reward: \[\{function: FILE\.py:NAME"),
        ("--use_vllm", "use_vllm: .* the trained model generates the samples"),
        ("--max_prompt_length 512", "max_prompt_length: .* tunekit does not truncate prompts"),
        ("--steps_per_generation 4", "steps_per_generation: .* each step samples new completions"),
        ("--per_device_train_batch_size 3", r"3 completions per step \(3 x 1\) are not a multiple of the group size 4"),
        ("", r"objective\.reward: is required; write reward: "),
    ],
)
def test_what_grpo_cannot_have_from_trl(folder: Path, more: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError, match=said):
        imported(folder, "run.sh", f"{GRPO} {more}", capsys)


@pytest.mark.parametrize(
    ("rows", "steps", "group", "expected"),
    [(8, 1, 4, (2, 1)), (8, 3, 8, (1, 3)), (2, 8, 4, (1, 4)), (12, 2, 8, (1, 3)), (32, 2, 8, (4, 2))],
)
def test_trl_counts_completions_where_we_count_prompts(
    folder: Path, rows: int, steps: int, group: int, expected: tuple[int, int]
) -> None:
    """A step has as many of them; ours are never fewer than one group at a time."""
    text = f"""
model: {folder / "base"}
data: {{train: rows.jsonl}}
objective: {{method: grpo, reward: [{{regex: a}}], num_generations: {group}}}
per_device_train_batch_size: {rows}
gradient_accumulation_steps: {steps}
output: {{dir: run}}
"""
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    loaded = load_recipe(folder / "recipe.yaml")
    training = loaded.recipe.training
    assert (training.micro_batch_size, training.gradient_accumulation_steps) == expected
    assert any(
        f"{rows} completions x {steps} -> training.micro_batch_size: {expected[0]}" in s for s in loaded.rewrites
    )
    overrides = [f"training.micro_batch_size={rows}", "~per_device_train_batch_size"]
    assert load_recipe(folder / "recipe.yaml", overrides[:1]).recipe.training.micro_batch_size == rows, (
        "ours are prompts"
    )
    plain = load_recipe(
        folder / "recipe.yaml", [f"per_device_train_batch_size={4 * group}", "objective.num_generations=2"]
    )
    assert plain.recipe.training.micro_batch_size == 2 * group, "by an override, too"


@pytest.mark.slow
def test_trls_defaults_are_trls() -> None:
    from trl import DPOConfig, KTOConfig, ModelConfig, RewardConfig, SFTConfig

    from tunekit.recipe.foreign.tools import DEFAULTS, TRL, rate_of

    names = {"lr_scheduler_type": "training.scheduler", "per_device_train_batch_size": "training.micro_batch_size"}
    names |= {"gradient_accumulation_steps": "training.gradient_accumulation_steps", "max_length": "data.max_length"}
    names |= {"num_train_epochs": "training.epochs", "warmup_steps": "training.warmup_ratio"}
    configs: Sequence[tuple[str, Any]] = (
        ("sft", SFTConfig),
        ("dpo", DPOConfig),
        ("kto", KTOConfig),
        ("reward", RewardConfig),
    )
    for method, config in configs:
        fields = config.__dataclass_fields__
        assert rate_of(method) == fields["learning_rate"].default
        for theirs, ours in names.items():
            assert DEFAULTS[TRL][ours] == fields[theirs].default
    assert DEFAULTS[TRL]["adapter.dropout"] == ModelConfig.__dataclass_fields__["lora_dropout"].default


@pytest.mark.parametrize(
    ("fields", "expected"),
    [  # as PEFT's own save_pretrained writes them
        ({"peft_type": "LORA", "r": 12, "lora_alpha": 24, "use_rslora": True}, {"method": "lora", "alpha": 24.0}),
        ({"peft_type": "LORA", "r": 12, "lora_alpha": 6, "use_dora": True}, {"method": "dora", "r": 12}),
        (
            {"peft_type": "IA3", "feedforward_modules": ["v_proj"]},
            {"method": "ia3", "feedforward_modules": ("v_proj",)},
        ),
        (
            {"peft_type": "LORA", "rank_pattern": {"q_proj": 4}},
            {"method": "lora", "r": 8, "rank_pattern": {"q_proj": 4}},
        ),
    ],
)
def test_an_adapters_configuration(
    folder: Path, fields: dict[str, Any], expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A field that is absent has PEFT's default, not ours; the rows are to be named."""
    common = {"base_model_name_or_path": str(folder / "base"), "target_modules": ["q_proj", "v_proj"]}
    write_lines(folder / "train.jsonl", [json.loads((folder / "rows.jsonl").read_text("utf-8"))])
    text = json.dumps({**common, "task_type": "CAUSAL_LM", "inference_mode": True, "peft_version": "0.21.2", **fields})
    recipe, said = imported(folder, "adapter_config.json", text, capsys)
    assert {name: getattr(recipe.adapter, name) for name in expected} == expected
    assert recipe.adapter.target_modules == ("q_proj", "v_proj")  # type: ignore[attr-defined]
    assert recipe.model.name_or_path == str(folder / "base")
    assert "write data.train (now train.jsonl)" in said
    assert ("use_dora -> adapter.method" in said) == ("use_dora" in fields)
    assert "use_dora -> nothing" not in said
    assert "revision" not in said  # the file has none
    with pytest.raises(RecipeError, match="configuration of a PEFT adapter, not a recipe; convert it: `tunekit import"):
        validate(str(folder / "adapter_config.json"))


@pytest.mark.parametrize(
    ("task", "objective"),
    [("SEQ_CLS", "classify"), ("TOKEN_CLS", "token_classify"), ("SEQ_2_SEQ_LM", "seq2seq"), ("CAUSAL_LM", "sft")],
)
def test_the_task_of_an_adapter_is_the_objective(folder: Path, task: str, objective: str) -> None:
    fields = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "task_type": task, "target_modules": ["q"]}
    saved = ["classifier", "score", "embed_tokens"] if task.endswith("CLS") else None
    path = _written(folder, "adapter_config.json", json.dumps({**fields, "r": 12, "modules_to_save": saved}))
    import_verb(str(path), str(folder / "recipe.yaml"))
    recipe = load_recipe(folder / "recipe.yaml").recipe
    assert recipe.objective.method == objective
    assert recipe.adapter.modules_to_save == (("embed_tokens",) if saved else ())  # type: ignore[attr-defined]


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", "QUESTION_ANS"])
def test_a_task_without_an_objective_is_a_problem(folder: Path, task: str) -> None:
    fields = {"peft_type": "LORA", "target_modules": ["q"]}
    path = _written(folder, "adapter_config.json", json.dumps(fields | {"task_type": task}))
    with pytest.raises(RecipeError, match=f"task_type: no objective trains {task}; known: CAUSAL_LM, SEQ_CLS"):
        import_verb(str(path), str(folder / "recipe.yaml"))


def test_what_an_adapters_configuration_has_and_nothing_here_is_said(folder: Path) -> None:
    text = json.dumps(
        {"peft_type": "LORA", "target_modules": ["q_proj"], "use_qalora": True, "megatron_config": {"a": 1}}
    )
    path = _written(folder, "adapter_config.json", text)
    with pytest.raises(RecipeError) as caught:
        import_verb(str(path), str(folder / "recipe.yaml"))
    assert [problem.key for problem in caught.value.problems] == ["megatron_config", "use_qalora"]
    with pytest.raises(RecipeError, match="VBLORA2 are not supported"):
        import_verb(str(_written(folder, "adapter_config.json", '{"peft_type": "VBLORA2"}')), None)


def test_an_adapters_configuration_is_written_without_what_is_lost(folder: Path) -> None:
    fields = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 12, "lora_alpha": "much", "use_qalora": True}
    with pytest.raises(RecipeError) as caught:
        import_verb(str(_written(folder, "adapter_config.json", json.dumps(fields))), str(folder / "r.yaml"))
    assert [problem.key for problem in caught.value.problems] == ["use_qalora", "lora_alpha"]
    recipe = load_recipe(folder / "r.yaml").recipe
    assert recipe.adapter.r == 12  # type: ignore[attr-defined]
    text = (folder / "r.yaml").read_text(encoding="utf-8")
    assert "#   use_qalora: true\n" in text
    assert "#   lora_alpha: much\n" in text


def test_the_steps_of_each_epoch_are_those_of_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"max_steps_per_epoch: null": "max_steps_per_epoch: 30"}
    recipe, said = imported(folder, "theirs.yaml", changed(TORCHTUNE, changes), capsys)
    assert values(recipe, "training.max_steps", "training.epochs") == [60, None]
    assert (
        "epochs -> nothing (if an epoch has fewer than 30 steps, write training.epochs instead of training.max_steps)"
        in said
    )


def test_the_teacher_is_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "teacher").mkdir()
    (folder / "teacher" / "config.json").write_text("{}", encoding="utf-8")
    recipe, _ = imported(folder, "theirs.yaml", f"{TORCHTUNE}{TEACHER}", capsys)
    assert values(recipe, "objective.teacher.name_or_path") == [str(folder / "teacher")]


TRL_FILE = """
model_name_or_path: org/base
dataset_name: someone/rows
use_peft: true
output_dir: out
"""


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("desirable_weight: 2.0", {"objective.method": "kto", "data.shuffle": False, "training.learning_rate": 1e-6}),
        ("loss_type: apo_zero_unpaired\nbeta: 0.2", {"objective.method": "kto", "objective.beta": 0.2}),
        ("loss_type: [sigmoid]\nbeta: 0.2", {"objective.method": "dpo", "objective.beta": 0.2}),
        ("precompute_ref_log_probs: true\nld_alpha: 0.5", {"objective.method": "dpo", "data.shuffle": True}),
        ("center_rewards_coefficient: 0.01", {"objective.method": "reward"}),
        ("loss_type: nll\nassistant_only_loss: true", {"objective.method": "sft", "data.train_on": "assistant"}),
        ("objective: dpo", {"objective.method": "dpo", "training.learning_rate": 1e-6}),
        (
            "objective: kto\nloss_type: apo_zero_unpaired\ntrain_sampling_strategy: random",
            {"objective.method": "kto", "data.shuffle": True},
        ),
        ("packing: false\nshuffle_dataset: false", {"objective.method": "sft", "data.shuffle": True}),
        ("packing: false\nmax_length: null", {"data.max_length": 131072, "data.excess_length": "error"}),
        ("packing: false\nwarmup_steps: 0.1", {"training.warmup_ratio": 0.1, "training.warmup_steps": None}),
        ("packing: false\nbf16: true\ndtype: bfloat16", {"model.dtype": "bfloat16"}),
        ("packing: false\nbf16: true\ndtype: auto", {"model.dtype": "bfloat16"}),
        ("packing: false\nbf16: false\nfp16: false", {"model.dtype": "float32"}),
        ("packing: false\ntruncation_mode: keep_start", {"data.excess_length": "truncate"}),
        ("packing: false\nfp16: false", {"model.dtype": "auto"}),
        ("packing: false\nbf16: false\ndtype: bfloat16", {"model.dtype": "bfloat16"}),
    ],
)
def test_a_file_of_trl_trains_what_its_trainer_does(
    folder: Path, lines: str, expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The file does not name the trainer; its keys do, or the user."""
    recipe, _ = imported(folder, "theirs.yaml", f"{TRL_FILE}{lines}\n", capsys)
    assert values(recipe, *expected) == list(expected.values())


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        (
            "",
            r"several trainers have its keys; add the line `objective: sft` to it \(or dpo, kto, grpo, rloo, reward\)",
        ),
        ("beta: 0.1", r"add the line `objective: dpo` to it \(or kto, grpo, rloo\)"),
        ("vllm_mode: colocate\nnum_generations_eval: 2", r"add the line `objective: grpo` to it \(or rloo\)"),
        ("ld_alpha: 0.1\npacking: true", "no trainer has all of the keys ld_alpha, packing; add the line"),
        ("packing: true\nmax_length: null", "max_length: packing needs the length of a packed row"),
        ("packing: true\nbf16: true\ndtype: float32", "dtype: dtype and bf16 .* mean the same setting"),
    ],
)
def test_a_file_of_trl_that_does_not_decide_is_refused(folder: Path, lines: str, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        import_verb(str(_written(folder, "theirs.yaml", f"{TRL_FILE}{lines}\n")), str(folder / "recipe.yaml"))


@pytest.mark.slow
def test_the_trainers_of_a_key_are_those_that_have_it() -> None:
    from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, RLOOConfig, SFTConfig

    from tunekit.recipe.foreign.trainer import LOSSES, READ_BY, trainers_with

    configs = {"sft": SFTConfig, "dpo": DPOConfig, "kto": KTOConfig, "reward": RewardConfig}
    configs |= {"grpo": GRPOConfig, "rloo": RLOOConfig}
    of_older_versions = ("max_seq_length", "rpo_alpha", "max_prompt_length")
    for key, trainers in READ_BY.items():  # some trainers had a key in older versions
        names = {name for name, config in configs.items() if key in config.__dataclass_fields__}
        assert names <= {*trainers}, key
        assert names or key in (*of_older_versions, "reward_funcs"), key  # the latter is an argument of TRL's script
    others = {key for name in ("sft", "dpo", "kto", "reward") for key in configs[name].__dataclass_fields__}
    for key in {*GRPOConfig.__dataclass_fields__, *RLOOConfig.__dataclass_fields__} - others - {*READ_BY}:
        names = {name for name in ("grpo", "rloo") if key in configs[name].__dataclass_fields__}
        assert {*trainers_with(key)} == names, key
    for name in ("sft", "kto"):
        choices = configs[name].__dataclass_fields__["loss_type"].metadata["choices"]
        assert {loss for loss, trainer in LOSSES.items() if trainer == name} == {*choices}


AXOLOTL = """
base_model: base
datasets:
  - path: rows.jsonl
    type: chat_template
adapter: lora
lora_r: 12
num_epochs: 2
output_dir: out
"""


@pytest.mark.parametrize(
    ("more", "expected", "line"),
    [
        (
            "push_to_hub: true",
            {},
            "push_to_hub -> nothing (tunekit uploads nothing; use `hf upload` with the finished folder)",
        ),
        (
            "fsdp: [full_shard]\nfsdp_config: {a: 1}",
            {},
            "fsdp_config -> nothing (memory.sharding: full divides the base",
        ),
        (
            "save_strategy: epoch",
            {},
            "save_strategy -> nothing (tunekit counts steps: write training.save_steps: the steps",
        ),
        ("eval_strategy: epoch\neval_steps: 7", {"training.eval_steps": 100}, "eval_steps -> nothing (eval_strategy: "),
        ("save_strategy: 'no'", {}, "save_strategy -> nothing"),
        ("shuffle_merged_datasets: false", {"data.shuffle": True}, "shuffle_merged_datasets -> nothing (Axolotl's tr"),
        ("curriculum_sampling: true", {"data.shuffle": False}, "curriculum_sampling -> data.shuffle: false"),
        (
            "excess_length_strategy: raise",
            {"data.excess_length": "error"},
            "excess_length_strategy -> data.excess_length",
        ),
        ("eos_token: <|im_end|>", {}, "eos_token -> nothing (the base's tokenizer has the same token)"),
        ("special_tokens: {eos_token: <|im_end|>, pad_token: x}", {}, "special_tokens -> nothing"),
        ("max_steps: 9", {"training.max_steps": 9}, "num_epochs -> nothing (training.max_steps takes precedence)"),
        ("warmup_ratio: 0.1\nwarmup_steps: 0", {"training.warmup_ratio": 0.1}, "warmup_steps -> nothing (training.wa"),
        (
            "val_set_size: 0.1\nload_best_model_at_end: true",
            {"evaluation.best": "eval.loss"},
            "load_best_model_at_end ->",
        ),
    ],
)
def test_what_changes_no_result_is_not_lost(
    folder: Path, more: str, expected: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = {"eos_token": {"content": "<|im_end|>"}}
    (folder / "base" / "tokenizer_config.json").write_text(json.dumps(tokens), encoding="utf-8")
    recipe, said = imported(folder, "theirs.yaml", f"{AXOLOTL}{more}\n", capsys)
    assert values(recipe, *expected) == list(expected.values())
    assert line in said


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("rl: kto\nmicro_batch_size: 2\nshuffle_merged_datasets: false", {"data.shuffle": False}),
        ("rl: kto\nmicro_batch_size: 2", {"data.shuffle": True}),
        ("rl: dpo\ncurriculum_sampling: true", {"data.shuffle": True}),
    ],
)
def test_axolotls_trainers_of_preferences_have_their_own_order(
    folder: Path, lines: str, expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    text = changed(AXOLOTL, CHATML_PAIRS)
    recipe, _ = imported(folder, "theirs.yaml", f"{text}{lines}\n", capsys)
    assert values(recipe, *expected) == list(expected.values())


CHATML_PAIRS = {"base_model: base": "base_model: Qwen/base", "chat_template": "chatml.intel", "rows.jsonl": "a/rows"}
FACTORY_FILE = """
model_name_or_path: org/base
dataset: rows.jsonl
finetuning_type: lora
lora_dropout: 0.1
output_dir: out
"""


@pytest.mark.parametrize(
    ("lines", "expected", "line"),
    [
        ("stage: dpo", {"adapter.dropout": 0.0}, "lora_dropout -> nothing (its trainer has no dropout)"),
        ("stage: rm", {"adapter.dropout": 0.1}, "lora_dropout -> adapter.dropout"),
        (
            "stage: sft\npacking: true",
            {"data.packing": True},
            "the rows of a pack attend to each other; in tunekit they",
        ),
        ("packing: true\nneat_packing: true", {"data.packing": True}, "packing -> nothing (neat_packing: true packs"),
        (
            "stage: pt\npacking: false",
            {"data.excess_length": "truncate"},
            "default of LLaMA-Factory -> data.excess_length",
        ),
        (
            "stage: pt",
            {"data.excess_length": "split", "data.packing": True},
            "stage: pt -> data.excess_length: 'split'",
        ),
        ("stage: sft", {"data.excess_length": "truncate"}, "truncates a long row's prompt and answer in proportion"),
    ],
)
def test_llama_factorys_trainers(
    folder: Path, lines: str, expected: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(folder / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    write_lines(folder / "texts.jsonl", [{"instruction": "text"}])
    described = {"pages": {"file_name": "texts.jsonl"}}
    (folder / "dataset_info.json").write_text(json.dumps(described), encoding="utf-8")
    stage = lines.partition("\n")[0].removeprefix("stage: ")
    rows = {"dpo": "pairs.jsonl", "rm": "pairs.jsonl", "pt": "pages"}
    text = FACTORY_FILE.replace("rows.jsonl", rows.get(stage, "rows.jsonl"))
    recipe, said = imported(folder, "theirs.yaml", f"{text}{lines}\n", capsys)
    assert values(recipe, *expected) == list(expected.values())
    assert line in said


def test_axolotls_pairs_are_trained_without_dropout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = changed(AXOLOTL, CHATML_PAIRS)
    recipe, _ = imported(folder, "theirs.yaml", f"{text}rl: orpo\nlora_dropout: 0.1\n", capsys)
    assert values(recipe, "adapter.dropout") == [0.0]


def test_axolotls_messages_are_in_the_column_messages(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(folder / "rows.jsonl", [{"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}])
    mapped = "type: chat_template\n    message_property_mappings: {role: from, content: value}"
    recipe, _ = imported(folder, "theirs.yaml", AXOLOTL.replace("type: chat_template", mapped), capsys)
    assert values(recipe, "data.train.0.format", "data.train.0.columns") == ["sharegpt", {"messages": "conversations"}]


def test_axolotls_chatml_is_not_the_template_of_every_base(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"{changed(AXOLOTL, CHATML_PAIRS)}rl: dpo\n"
    assert "chat_template -> nothing (the tokenizer's own template" in imported(folder, "a.yaml", text, capsys)[1]
    with pytest.raises(RecipeError, match="chat_template: tunekit does not know the template 'chatml', and the base's"):
        import_verb(str(_written(folder, "b.yaml", text.replace("Qwen/", "meta-llama/"))), None)


def test_axolotl_splits_long_texts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = AXOLOTL.replace("chat_template", "completion")
    recipe, _ = imported(folder, "theirs.yaml", f"{text}excess_length_strategy: drop\n", capsys)
    assert values(recipe, "data.train.0.format", "data.excess_length") == ["text", "split"]
    mixed = AXOLOTL.replace("type: chat_template", "type: chat_template\n  - path: rows.jsonl\n    type: completion")
    with pytest.raises(RecipeError, match=r"datasets: Axolotl splits the long texts .* and drops the long rows of the"):
        import_verb(str(_written(folder, "theirs.yaml", mixed)), None)


LOST = """
future: {a: 1, b: [2, 3]}
eos_token: <|other|>
hub_token: hf_abcdefghijklmnopqrstuvwxyz
learning_rate: fast
early_stopping_patience: 2
eval_strategy: epoch
"""


def test_a_lost_key_does_not_lose_the_others(folder: Path) -> None:
    path, output = _written(folder, "theirs.yaml", f"{AXOLOTL}{LOST}"), folder / "recipe.yaml"
    with pytest.raises(RecipeError) as caught:
        import_verb(str(path), str(output))
    assert caught.value.exit_code == 2
    keys = [str(problem.key) for problem in caught.value.problems]
    assert keys == [
        "future",
        "eos_token",
        "training.learning_rate (written learning_rate)",
        "evaluation.patience (written early_stopping_patience)",
        "eval_strategy",
    ]
    recipe = validate(str(output)).recipe
    assert values(recipe, "adapter.r", "training.epochs", "training.learning_rate") == [12, 2.0, 2e-4]
    text = output.read_text(encoding="utf-8")
    for line in (
        "#   future:\n#     a: 1\n#     b: [2, 3]\n",
        '#   eos_token: "<|other|>"\n',
        "#   learning_rate: fast\n",
    ):
        assert line in text
    assert "hf_" not in text
    with pytest.raises(RecipeError, match="exists already"):
        import_verb(str(path), str(output))


def test_of_a_file_of_something_else_nothing_is_written(folder: Path) -> None:
    with pytest.raises(RecipeError, match="model: is required"):
        import_verb(str(_written(folder, "theirs.yaml", "services: {web: 1}\n")), str(folder / "recipe.yaml"))
    assert not (folder / "recipe.yaml").exists()


@pytest.mark.parametrize("line", ["key{}: 1", "key{}:"])
def test_many_unknown_keys_are_not_all_listed(
    folder: Path, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = 3000
    text = AXOLOTL + "".join(f"{line.format(number)}\n" for number in range(count))
    with_problems = line.endswith("1")
    monkeypatch.setattr(
        sys, "argv", ["tunekit", "import", str(_written(folder, "t.yaml", text)), "--output", str(folder / "r.yaml")]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == (2 if with_problems else 0)
    said = capsys.readouterr().err
    assert f"... and {count - 100:,} more" in said
    assert len(said) + len((folder / "r.yaml").read_text(encoding="utf-8")) < 50_000


def test_reading_keys_costs_as_many_steps_as_there_are_keys() -> None:
    """A place that is forgotten is looked up, not looked for among all others."""

    class Counted(dict[Any, Any]):
        walks = 0

        def __iter__(self) -> Any:
            Counted.walks += 1
            return super().__iter__()

    draft = read_yaml("".join(f"key{number}: {{a: [1]}}\n" for number in range(50)), "r.yaml")
    draft.places = Counted(draft.places)
    for name in list(draft.values):
        draft.remove((name,))
    assert (draft.places, Counted.walks) == ({}, 0)


def test_validate_says_whose_a_configuration_is(folder: Path) -> None:
    for name, text, tool in (("theirs.yaml", TORCHTUNE, "torchtune"), ("run.sh", SCRIPT, "Unsloth's script")):
        loaded = validate(str(_written(folder, name, text)))
        assert loaded.rewrites[0].endswith(
            f"is a configuration of {tool}; to convert it, run `tunekit import {folder / name} --output RECIPE`"
        )
    ours = "model: base\ndata: {train: rows.jsonl}\nlora_r: 4\noutput_dir: out\n"  # with a spelling or two
    assert validate(str(_written(folder, "ours.yaml", ours))).tool is None


def test_of_a_file_that_is_not_there_nothing_is_lost(folder: Path) -> None:
    with pytest.raises(RecipeError, match="no such file") as found:
        import_verb(str(folder / "nothere.yaml"), None)
    assert not found.value.notes


def test_values_that_nothing_can_hold_are_refused_in_words(folder: Path, tmp_path: Path) -> None:
    """Found by scripts/fuzz: a list for a name, and half a surrogate pair, which no file in UTF-8 holds."""
    for old, new in (("torch.optim.AdamW", "[adamw]"), ("seed: null", 'seed: "\\ud800"')):
        path = folder / "odd.yaml"
        path.write_text(changed(TORCHTUNE, {old: new}), encoding="utf-8")
        with pytest.raises(RecipeError):
            import_verb(str(path), str(tmp_path / f"{len(new)}.yaml"))
    assert yaml_scalar("\ud800\u202e") == '"\\ud800\\u202e"'
