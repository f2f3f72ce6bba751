"""Configurations after other tools' published examples, with their key structure and own values: what each becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.data_case import write_lines
from tunekit.errors import RecipeError
from tunekit.recipe.load import LoadedRecipe, load_recipe
from tunekit.recipe.reading.dump import yaml_lines
from tunekit.recipe.recipe import Recipe

FACTORY = """
### model
model_name_or_path: Qwen/Qwen3-1.7B
trust_remote_code: false
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 12
lora_target: all
### dataset
template: qwen3_nothink
cutoff_len: 1536
max_samples: 700
preprocessing_num_workers: 3
dataloader_num_workers: 2
### output
output_dir: out/factory
logging_steps: 5
save_steps: 250
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
### train
per_device_train_batch_size: 2
gradient_accumulation_steps: 6
learning_rate: 3.0e-5
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.05
bf16: true
ddp_timeout: 9000000
resume_from_checkpoint: null
"""
AXOLOTL = """
base_model: HuggingFaceTB/SmolLM2-360M
load_in_8bit: false
load_in_4bit: false
strict: false
dataset_prepared_path: prepared
val_set_size: 0.15
output_dir: ./out/axolotl
adapter: lora
lora_model_dir:
sequence_len: 1024
sample_packing: true
eval_sample_packing: true
pad_to_sequence_len: true
lora_r: 24
lora_alpha: 48
lora_dropout: 0.1
lora_fan_in_fan_out:
lora_target_modules:
  - q_proj
  - v_proj
wandb_project:
wandb_entity:
wandb_watch:
wandb_name:
wandb_log_model:
gradient_accumulation_steps: 3
micro_batch_size: 4
num_epochs: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0003
train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
tf32: false
gradient_checkpointing: true
early_stopping_patience:
resume_from_checkpoint:
local_rank:
logging_steps: 1
xformers_attention:
flash_attention: true
s2_attention:
loss_watchdog_threshold: 6.0
loss_watchdog_patience: 2
warmup_steps: 7
evals_per_epoch: 5
saves_per_epoch: 2
eval_table_size:
debug:
deepspeed:
weight_decay: 0.0
fsdp:
fsdp_config:
special_tokens:
  pad_token: "<|pad|>"
"""
TRL = """
model_name_or_path: Qwen/Qwen2.5-1.5B
dataset_name: someone/reviews
dataset_config: default
report_to: none
learning_rate: 0.0003
lr_scheduler_type: cosine
output_dir: out/trl
use_peft: true
lora_r: 20
lora_alpha: 40
lora_target_modules: [q_proj, v_proj]
lora_task_type: CAUSAL_LM
max_length: 768
packing: true
packing_strategy: bfd
padding_free: false
activation_offloading: false
gradient_checkpointing: true
per_device_train_batch_size: 3
gradient_accumulation_steps: 5
num_train_epochs: 1
logging_steps: 25
load_in_4bit: true
bnb_4bit_quant_type: nf4
use_bnb_nested_quant: true
dtype: bfloat16
warmup_ratio: 0.02
seed: 7
push_to_hub: false
attn_implementation: sdpa
"""
ALPACA = [{"instruction": "add", "input": "1 2", "output": "3"}]
SHAREGPT = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}]
OPENAI = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
PAIRS = [{"said": SHAREGPT[0]["conversations"][:1]} | {w: {"from": "gpt", "value": w} for w in ("chosen", "rejected")}]
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
DATASETS: dict[str, dict[str, Any]] = {
    "plain": {"file_name": "alpaca.jsonl"},
    "asked": {"file_name": "asked.jsonl", "columns": {"prompt": "question", "response": "answer", "system": "rules"}},
    "talks": {"file_name": "talks.jsonl", "formatting": "sharegpt"},
    "chats": {
        "file_name": "chats.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {**OPENAI_TAGS, "system_tag": "system"},
    },
    "pairs": {
        "file_name": "pairs.jsonl",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "said", "chosen": "chosen", "rejected": "rejected"},
    },
    "judged": {
        "file_name": "judged.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "good"},
        "tags": OPENAI_TAGS,
    },
    "pages": {"file_name": "pages.jsonl", "columns": {"prompt": "page"}},
    "far": {"hf_hub_url": "someone/rows", "split": "train_sft", "ms_hub_url": "someone/else"},
    "pictures": {"file_name": "chats.jsonl", "columns": {"images": "images"}},
    "odd": {"file_name": "chats.jsonl", "formatting": "sharegpt", "tags": {"role_tag": "who"}},
    "elsewhere": {"ms_hub_url": "someone/else"},
    "part": {"hf_hub_url": "someone/rows", "subset": "en"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A configuration's folder, with LLaMA-Factory's `data` in it."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "dataset_info.json").write_text(json.dumps(DATASETS), encoding="utf-8")
    judged = [{"messages": OPENAI[0]["messages"], "good": True}]
    asked = [{"question": "q", "answer": "a", "rules": "be brief"}]
    files = {"alpaca": ALPACA, "talks": SHAREGPT, "chats": OPENAI, "pairs": PAIRS, "judged": judged, "asked": asked}
    for name, rows in {**files, "pages": [{"page": "text"}]}.items():
        write_lines(data / f"{name}.jsonl", rows)
    return tmp_path


def load(folder: Path, text: str, *changes: str) -> LoadedRecipe:
    """The configuration with lines replaced (of the same key) or added."""
    lines = text.splitlines()
    for change in changes:
        key = change.split(":")[0]
        lines = [line for line in lines if not line.startswith(f"{key}:")] + change.splitlines()
    path = folder / "theirs.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return load_recipe(path)


def sources(recipe: Recipe) -> list[tuple[str, str, dict[str, str]]]:
    return [(Path(each.path).name, each.format, each.columns) for each in recipe.data.train]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [  # LLaMA-Factory/examples: train_lora/qwen3_lora_{sft,pretrain,dpo,kto,reward}, extras/loraplus, train_qlora
        (["dataset: plain"], [("alpaca.jsonl", "alpaca", {})]),
        (
            ["dataset: plain,asked", "loraplus_lr_ratio: 8.0", "val_size: 0.2", "eval_strategy: steps"],
            [
                ("alpaca.jsonl", "alpaca", {}),
                ("asked.jsonl", "alpaca", {"question": "instruction", "answer": "output", "rules": "system"}),
            ],
        ),
        (["dataset: talks"], [("talks.jsonl", "sharegpt", {})]),
        (["dataset: chats", "mix_strategy: concat"], [("chats.jsonl", "chat", {})]),
        (["dataset: pages", "stage: pt"], [("pages.jsonl", "text", {"page": "text"})]),
        (
            ["dataset: pairs", "stage: dpo", "pref_beta: 0.2", "pref_loss: sigmoid"],
            [("pairs.jsonl", "preference", {"said": "conversations"})],
        ),
        (
            ["dataset: judged", "stage: kto", "pref_beta: 0.2"],
            [("judged.jsonl", "unpaired", {"messages": "conversations", "good": "kto_tag"})],
        ),
        (["dataset: pairs", "stage: rm"], [("pairs.jsonl", "preference", {"said": "conversations"})]),
        (["dataset: far", "quantization_bit: 4", "quantization_method: bnb"], [("rows", "alpaca", {})]),
    ],
)
def test_llama_factory(folder: Path, changes: list[str], expected: list[Any]) -> None:
    loaded = load(folder, FACTORY, *changes)
    recipe = loaded.recipe
    assert sources(recipe) == expected
    assert all(source.max_rows == 700 for source in recipe.data.train)
    assert (recipe.adapter.r, recipe.training.learning_rate, recipe.training.micro_batch_size) == (12, 3e-5, 2)  # type: ignore[attr-defined]
    method = {"pt": "sft", "rm": "reward"}
    stage = next((each.split(": ")[1] for each in changes if each.startswith("stage")), "sft")
    assert recipe.objective.method == method.get(stage, stage)
    assert any("dataset_info.json)" in line for line in loaded.rewrites)
    if stage == "pt":
        assert (recipe.data.packing, recipe.data.excess_length) == (True, "split")


@pytest.mark.parametrize(("iterations", "expected"), [(16, 16), (4, 4), (-1, None), (None, 16)])
def test_pissa(folder: Path, iterations: int | None, expected: int | None) -> None:
    """LLaMA-Factory/examples/extras/pissa."""
    written = [] if iterations is None else [f"pissa_iter: {iterations}"]
    loaded = load(folder, FACTORY, "dataset: plain", "pissa_init: true", "pissa_convert: true", *written)
    start = loaded.recipe.adapter.start  # type: ignore[attr-defined]
    assert (start.method, start.iterations) == ("pissa", expected)
    assert "pissa_convert -> nothing (run `tunekit adapter convert` on the result)" in "\n".join(loaded.rewrites)


def test_dora_is_a_method(folder: Path) -> None:
    loaded = load(folder, FACTORY, "dataset: plain", "use_dora: true")
    assert (loaded.recipe.adapter.method, loaded.recipe.adapter.r) == ("dora", 12)  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="use_dora: is an option of lora, but the method is 'ia3'"):
        load(folder, FACTORY, "dataset: plain", "use_dora: true", "finetuning_type: ia3", "lora_rank:", "lora_target:")
    rows = "datasets:\n  - path: data/alpaca.jsonl\n    type: alpaca"
    assert load(folder, AXOLOTL, rows, "peft_use_dora: true").recipe.adapter.method == "dora"


def test_the_folder_of_the_descriptions_is_named(folder: Path) -> None:
    (folder / "data").rename(folder / "elsewhere")
    with pytest.raises(RecipeError, match=r"dataset: names data sets in dataset_info\.json, which is not in .*/data"):
        load(folder, FACTORY, "dataset: plain")
    loaded = load(folder, FACTORY, "dataset: plain", "dataset_dir: elsewhere", "eval_dataset: talks")
    assert loaded.recipe.data.train[0].path == str(folder / "elsewhere" / "alpaca.jsonl")
    assert loaded.recipe.data.eval[0].format == "sharegpt"  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("plane", r"has no data set 'plane'; did you mean 'plain'\?"),
        ("pictures", r"pictures: columns\.images would be lost: only text is read"),
        ("odd", "odd: no format reads messages with the tags"),
        ("elsewhere", "elsewhere names neither a file nor a hub data set"),
        ("part", "part: subset would be lost"),
    ],
)
def test_what_has_no_source_is_refused(folder: Path, name: str, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        load(folder, FACTORY, f"dataset: {name}")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [  # axolotl/examples/llama-3: lora-1b, qlora-1b, instruct-lora-8b, instruct-dpo-lora-8b
        (["datasets:\n  - path: data/alpaca.jsonl\n    type: alpaca"], ("alpaca_prompt", {})),
        (
            ["load_in_4bit: true", "adapter: qlora", "datasets:\n  - path: data/alpaca.jsonl\n    type: alpaca"],
            ("alpaca_prompt", {}),
        ),
        (
            [
                "base_model: meta-llama/Llama-3.2-1B-Instruct",
                "model_type: LlamaForCausalLM\ntokenizer_type: AutoTokenizer",
                "chat_template: llama3",
                "eval_max_new_tokens: 64",
                "lora_target_modules:",
                "lora_target_linear: true",
                "datasets:\n  - path: data/chats.jsonl\n    type: chat_template\n    field_messages: messages\n"
                "    message_field_role: role\n    message_field_content: content\n"
                "    roles:\n      user:\n        - user\n      assistant:\n        - assistant",
            ],
            ("chat", {}),
        ),
        (
            [
                "rl: dpo",
                "sample_packing: false",
                "datasets:\n  - path: data/pairs.jsonl\n    type: chat_template.default\n    field_messages: said\n"
                "    field_chosen: chosen\n    field_rejected: rejected\n"
                "    message_property_mappings:\n      role: role\n      content: content\n"
                "    roles:\n      system:\n        - system\n      user:\n        - user\n"
                "      assistant:\n        - assistant",
            ],
            ("preference", {"said": "conversations"}),
        ),
    ],
)
def test_axolotl(folder: Path, changes: list[str], expected: tuple[str, dict[str, str]]) -> None:
    text = AXOLOTL.replace("  - q_proj\n  - v_proj\n", "") if "lora_target_linear: true" in changes else AXOLOTL
    loaded = load(folder, text, *changes)
    assert [(each.format, each.columns) for each in loaded.recipe.data.train] == [expected]
    assert (loaded.recipe.adapter.r, loaded.recipe.training.micro_batch_size, loaded.recipe.data.eval) == (24, 4, 0.15)  # type: ignore[attr-defined]
    said = "\n".join(loaded.rewrites)
    assert (
        "evals_per_epoch -> nothing (tunekit counts steps: write training.eval_steps: ROWS / 12 / 5, rounded up" in said
    )
    assert (
        "saves_per_epoch -> nothing (tunekit counts steps: write training.save_steps: ROWS / 12 / 2, rounded up" in said
    )
    assert "special_tokens -> nothing" in said


def test_what_axolotl_would_do_otherwise_is_refused(folder: Path) -> None:
    rows = "datasets:\n  - path: data/alpaca.jsonl\n    type: alpaca"
    with pytest.raises(
        RecipeError,
        match="tunekit evaluates by steps, not by epochs, and early stopping depends on the evaluations; write",
    ):
        load(folder, AXOLOTL, rows, "early_stopping_patience: 3")
    with pytest.raises(RecipeError, match="special_tokens: eos_token is taken from the base's tokenizer"):
        load(folder, AXOLOTL.replace("  pad_token:", "  eos_token:"), rows)
    with pytest.raises(RecipeError, match="evals_per_epoch: must be a number above 0"):
        load(folder, AXOLOTL, rows, "evals_per_epoch: often")


@pytest.mark.parametrize(
    "line", ["roles: x", "roles: {user: 5}", "message_property_mappings: [role]", "message_property_mappings: 7"]
)
def test_keys_of_messages_that_are_no_mappings_are_refused_in_words(folder: Path, line: str) -> None:
    rows = f"datasets:\n  - path: data/alpaca.jsonl\n    type: chat_template\n    {line}"
    with pytest.raises(RecipeError, match=f"{line.partition(':')[0]} must be a mapping|the role 5 for user"):
        load(folder, AXOLOTL, rows)


@pytest.mark.parametrize("entry", [{"tags": "x"}, {"columns": 5}])
def test_a_description_that_is_no_mapping_is_refused_in_words(folder: Path, entry: dict[str, object]) -> None:
    described = {"file_name": "alpaca.jsonl", "formatting": "sharegpt", **entry}
    (folder / "dataset_info.json").write_text(json.dumps({"mine": described}), encoding="utf-8")
    text = "model_name_or_path: base\nfinetuning_type: lora\ndataset: mine\noutput_dir: out"
    (folder / "theirs.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match="must be a mapping"):
        load_recipe(folder / "theirs.yaml")


def test_a_list_of_mappings_and_texts_is_written_as_it_is() -> None:
    values = {"modules": [{"q_proj": [1]}, "v_proj", {}], "rest": ["a", {"b": "c"}]}
    assert yaml.safe_load("\n".join(yaml_lines(values))) == values


def test_trl(folder: Path) -> None:
    """trl/examples/cli_configs/example_config.yaml, with the arguments of SFTConfig and ModelConfig beside."""
    recipe = load(folder, TRL).recipe
    assert (recipe.model.dtype, recipe.model.quantization, recipe.model.attention) == ("bfloat16", "nf4", "sdpa")
    assert (recipe.data.packing, recipe.data.max_length, recipe.training.seed) == (True, 768, 7)
    for change, what in (
        ("eos_token: <|im_end|>", "would be lost: rows end with the end token of the base"),
        ("packing_strategy: wrapped", "'wrapped' has no exact translation"),
    ):
        with pytest.raises(RecipeError) as caught:
            load(folder, TRL, change)
        (problem,) = caught.value.problems
        assert what in str(problem)
