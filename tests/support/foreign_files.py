"""Configurations of other tools, in the style of their own examples: name of the file -> its text, and the keys that
an import loses. The folder has the base `base`, and the files that `write_foreign_rows` writes."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.data_case import write_lines


def write_foreign_rows(folder: Path) -> None:
    """Rows of the formats that these configurations read."""
    said = [(f"What is {number}?", f"It is the number {number}.") for number in range(40)]
    write_lines(
        folder / "alpaca.jsonl", [{"instruction": asked, "input": "", "output": answer} for asked, answer in said]
    )
    messages = [[("user", asked), ("assistant", answer)] for asked, answer in said]
    chats = [[{"role": role, "content": text} for role, text in turns] for turns in messages]
    write_lines(folder / "chat.jsonl", [{"messages": turns} for turns in chats])
    names = {"user": "human", "assistant": "gpt"}
    shared = [[{"from": names[role], "value": text} for role, text in turns] for turns in messages]
    write_lines(folder / "sharegpt.jsonl", [{"conversations": turns} for turns in shared])
    write_lines(folder / "texts.jsonl", [{"text": f"{asked} {answer}"} for asked, answer in said])
    pairs = [{"prompt": asked, "chosen": answer, "rejected": "No idea."} for asked, answer in said]
    write_lines(folder / "pairs.jsonl", pairs)
    judged = [{"prompt": asked, "completion": answer, "label": len(answer) % 2 == 0} for asked, answer in said]
    write_lines(folder / "judged.jsonl", judged)
    described = {
        "identity": {"file_name": "alpaca.jsonl"},
        "glaive": {"file_name": "sharegpt.jsonl", "formatting": "sharegpt"},
        "likes": {
            "file_name": "pairs.jsonl",
            "ranking": True,
            "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
        },
        "photos": {"file_name": "photos.json", "columns": {"images": "images"}},
    }
    (folder / "dataset_info.json").write_text(json.dumps(described), encoding="utf-8")
    (folder / "zero3.yaml").write_text("distributed_type: DEEPSPEED\nnum_processes: 2\nmixed_precision: bf16\n")


AXOLOTL_53 = """
base_model: ./base
model_type: AutoModelForCausalLM
tokenizer_type: AutoTokenizer
trust_remote_code: false
load_in_8bit: false
load_in_4bit: false
strict: false
chat_template: tokenizer_default
datasets:
  - path: chat.jsonl
    type: chat_template
    field_messages: messages
    message_property_mappings:
      role: role
      content: content
    roles_to_train: ["assistant"]
    train_on_eos: "turn"
  - path: alpaca.jsonl
    type: alpaca
    ds_type: json
    shards: 10
shuffle_merged_datasets: true
dataset_prepared_path: last_run_prepared
val_set_size: 0.05
output_dir: ./outputs/lora-out
adapter: lora
lora_model_dir:
sequence_len: 256
sample_packing: false
eval_sample_packing: false
pad_to_sequence_len: true
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
lora_target_linear: false
lora_mlp_kernel: true
lora_qkv_kernel: true
lora_o_kernel: true
wandb_project: my-project
wandb_entity:
wandb_name: first
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_torch_fused
lr_scheduler: cosine
cosine_min_lr_ratio: 0.1
learning_rate: 0.0002
adam_beta2: 0.95
bf16: auto
tf32: false
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
resume_from_checkpoint:
logging_steps: 1
flash_attention: false
plugins: [axolotl.integrations.liger.LigerPlugin]
liger_rope: true
liger_glu_activation: true
warmup_ratio: 0.1
evals_per_epoch: 1
saves_per_epoch: 1
weight_decay: 0.0
special_tokens: {pad_token: "<pad>"}
"""
FACTORY_43 = """
model_name_or_path: ./base
trust_remote_code: false
enable_liger_kernel: true
flash_attn: auto
rope_scaling: linear
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_alpha: 16
lora_dropout: 0.1
lora_target: all
loraplus_lr_ratio: 16.0
additional_target: lm_head
use_rslora: false
dataset: identity,glaive,photos
dataset_dir: .
template: llama2
cutoff_len: 256
max_samples: 30
overwrite_cache: true
preprocessing_num_workers: 4
dataloader_num_workers: 2
mask_history: false
train_on_prompt: false
packing: false
output_dir: saves/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
report_to: none
run_name: first
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 1.0
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: '{"min_lr_rate": 0.2}'
warmup_ratio: 0.1
optim: adafactor
bf16: true
neftune_noise_alpha: 5
"""
TRL_32 = """
accelerate launch --config_file zero3.yaml trl/scripts/sft.py \\
    --model_name_or_path ./base \\
    --dataset_name chat.jsonl \\
    --learning_rate 2.0e-4 \\
    --num_train_epochs 1 \\
    --packing \\
    --per_device_train_batch_size 2 \\
    --gradient_accumulation_steps 4 \\
    --gradient_checkpointing \\
    --eos_token '<|im_end|>' \\
    --eval_strategy no \\
    --use_peft \\
    --lora_r 32 \\
    --lora_alpha 16 \\
    --lora_dropout 0.05 \\
    --lora_target_modules q_proj v_proj \\
    --max_length 256 \\
    --lr_scheduler_type cosine_with_min_lr \\
    --lr_scheduler_kwargs '{"min_lr_rate": 0.1}' \\
    --warmup_ratio 0.03 \\
    --weight_decay 0.01 \\
    --optim adamw_torch \\
    --adam_beta2 0.95 \\
    --max_grad_norm 0.3 \\
    --bf16 true \\
    --use_liger_kernel true \\
    --attn_implementation sdpa \\
    --logging_steps 5 \\
    --save_strategy steps \\
    --save_steps 200 \\
    --seed 7 \\
    --output_dir out/trl \\
    --push_to_hub
"""
FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "axolotl.yaml": (AXOLOTL_53, ("datasets.1.shards", "adam_beta2")),
    "factory.yaml": (FACTORY_43, ("rope_scaling", "dataset", "neftune_noise_alpha")),
    "trl.sh": (TRL_32, ("adam_beta2",)),
    "axolotl_completion.yaml": (
        "base_model: ./base\ndatasets:\n  - path: texts.jsonl\n    type: completion\n    field: text\n"
        "dataset_prepared_path: last_run_prepared\nval_set_size: 0.1\noutput_dir: ./outputs/lora\nadapter: lora\n"
        "sequence_len: 128\nlora_r: 8\nlora_alpha: 16\nlora_dropout: 0\nlora_target_linear: true\nmicro_batch_size: 2\n"
        "gradient_accumulation_steps: 2\nnum_epochs: 1\noptimizer: lion_32bit\nlr_scheduler: constant\n"
        "learning_rate: 0.00002\nbf16: auto\ngradient_checkpointing: false\nlogging_steps: 1\nneftune_noise_alpha: 0\n",
        (),
    ),
    "axolotl_dpo.yaml": (
        "base_model: ./base\nrl: dpo\nrl_beta: 0.2\nchat_template: tokenizer_default\ndatasets:\n"
        "  - path: pairs.jsonl\n    type: chatml.argilla\n    split: train\noutput_dir: ./outputs/dpo\n"
        "adapter: lora\nsequence_len: 256\nlora_r: 8\nlora_alpha: 16\nlora_dropout: 0.05\nlora_target_linear: true\n"
        "micro_batch_size: 2\ngradient_accumulation_steps: 2\nnum_epochs: 1\noptimizer: muon\n"
        "lr_scheduler: cosine\nlearning_rate: 0.0002\nbf16: auto\nwarmup_steps: 2\nloss_watchdog_threshold: 5.0\n"
        "loss_watchdog_patience: 3\nxformers_attention:\n",
        ("chat_template",),
    ),
    "axolotl_qlora.yaml": (
        "base_model: ./base\nload_in_4bit: true\nadapter: qlora\ndatasets:\n  - path: sharegpt.jsonl\n"
        "    type: sharegpt\n    conversation: chatml\nval_set_size: 0\noutput_dir: ./outputs/qlora\n"
        "sequence_len: 256\nsample_packing: false\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n"
        "micro_batch_size: 2\ngradient_accumulation_steps: 2\nmax_steps: 4\noptimizer: adafactor\n"
        "lr_scheduler: cosine\nlearning_rate: 0.0002\nbf16: auto\nflash_attn_rms_norm: true\nrelora_steps: 5\n",
        ("datasets.0.conversation", "relora_steps"),
    ),
    "factory_dpo.yaml": (
        "model_name_or_path: ./base\nstage: dpo\ndo_train: true\nfinetuning_type: lora\nlora_rank: 8\n"
        "lora_dropout: 0.1\nlora_target: all\npref_beta: 0.1\npref_loss: sigmoid\ndataset: likes\ntemplate: llama\n"
        "cutoff_len: 256\nmax_samples: 1000\noverwrite_cache: true\npreprocessing_num_workers: 16\n"
        "output_dir: saves/dpo\nlogging_steps: 10\nsave_steps: 500\nplot_loss: true\noverwrite_output_dir: true\n"
        "per_device_train_batch_size: 1\ngradient_accumulation_steps: 8\nlearning_rate: 5.0e-6\n"
        "num_train_epochs: 1.0\nlr_scheduler_type: cosine\nwarmup_ratio: 0.1\nbf16: true\nddp_timeout: 180000000\n",
        (),
    ),
    "factory_pretrain.yaml": (
        "model_name_or_path: ./base\nstage: pt\ndo_train: true\nfinetuning_type: lora\nlora_target: q_proj,v_proj\n"
        "dataset: texts.jsonl\ncutoff_len: 128\npacking: true\noutput_dir: saves/pt\nlogging_steps: 10\n"
        "per_device_train_batch_size: 1\ngradient_accumulation_steps: 2\nlearning_rate: 1.0e-4\n"
        "num_train_epochs: 1\nlr_scheduler_type: cosine\nwarmup_ratio: 0.1\nfp16: false\nval_size: 0.1\n"
        "per_device_eval_batch_size: 1\neval_strategy: steps\neval_steps: 500\nupcast_layernorm: true\n",
        (),
    ),
    "factory_full.yaml": (
        "model_name_or_path: ./base\nstage: sft\ndo_train: true\nfinetuning_type: full\n"
        "deepspeed: examples/deepspeed/ds_z3_config.json\ndataset: identity\ntemplate: default\ncutoff_len: 256\n"
        "output_dir: saves/full\nlogging_steps: 10\nsave_steps: 500\nper_device_train_batch_size: 1\n"
        "gradient_accumulation_steps: 2\nlearning_rate: 1.0e-5\nnum_train_epochs: 1.0\nbf16: true\n"
        "use_galore: true\npure_bf16: false\n",
        ("deepspeed", "template", "use_galore"),
    ),
    "trl_dpo.sh": (
        "accelerate launch --config_file deepspeed_zero2.yaml trl/scripts/dpo.py --dataset_name pairs.jsonl \\\n"
        "  --model_name_or_path ./base --learning_rate 5.0e-6 --num_train_epochs 1 --use_peft --lora_r 8 \\\n"
        "  --lora_alpha 16 --per_device_train_batch_size 2 --gradient_accumulation_steps 4 \\\n"
        "  --gradient_checkpointing --logging_steps 25 --beta 0.1 --output_dir out/dpo --no_remove_unused_columns\n",
        ("config_file", "no_remove_unused_columns"),
    ),
    "trl_kto.sh": (
        "trl kto --dataset_name judged.jsonl --model_name_or_path ./base --per_device_train_batch_size 4 \\\n"
        "  --num_train_epochs 1 --learning_rate 5e-7 --lr_scheduler_type=cosine --gradient_accumulation_steps 1 \\\n"
        "  --eval_steps 500 --output_dir out/kto --warmup_ratio 0.1 --report_to none --bf16 --use_peft \\\n"
        "  --logging_first_step --lora_target_modules=all-linear --lora_r=16 --lora_alpha=16\n",
        (),
    ),
    "trl_config.yaml": (
        "model_name_or_path: ./base\ndataset_name: chat.jsonl\nreport_to: none\nlearning_rate: 0.0001\n"
        "lr_scheduler_type: cosine\npacking: false\nuse_peft: true\nlora_r: 8\nlora_alpha: 16\n"
        "max_seq_length: 256\nassistant_only_loss: true\nadam_beta1: 0.9\nadam_epsilon: 1.0e-8\n"
        "label_smoothing_factor: 0.1\noutput_dir: out/trl\n",
        ("label_smoothing_factor",),
    ),
    "trl_reward.sh": (
        "python trl/scripts/reward.py --model_name_or_path ./base --dataset_name pairs.jsonl --output_dir out/rm \\\n"
        "  --per_device_train_batch_size 8 --num_train_epochs 1 --learning_rate 1.0e-4 --logging_steps 25 \\\n"
        "  --eval_strategy no --max_length 256 --use_peft --lora_task_type SEQ_CLS --lora_r 8 --lora_alpha 16\n",
        ("lora_task_type",),
    ),
}
