"""The other side of a comparison: TRL's trainers, or peft with a plain loop. Runs in the benchmark's own environment.

    rival.py SPECIFICATION      (a JSON file that compare/bench.py writes)

Specification: kind (trl, dpo, grpo, loop), model, rows (JSON Lines: input_ids and labels, or prompt and completion; of
dpo prompt_ids, chosen_ids and rejected_ids; of grpo prompt_ids, completion_ids and rewards, a step each), steps_log,
losses.  For trl, dpo and grpo: config (fields of SFTConfig, DPOConfig or GRPOConfig).  For trl: adapters (default, or
"bfloat16": in the base's dtype).  For dpo, grpo and loop: init (an adapter folder to begin from).
For loop: dtype, rows_per_step, steps, learning_rate, exact_loss (taken in float64) and save (the adapter's folder).
For dpo with precompute_ref_log_probs: reference.json gets the CPU seconds of computing the reference.
The script only imports the modules that it uses, trains as the tools' documentation shows, and adds a line to steps_log
after each optimizer step.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

SPECIFICATION = json.loads(Path(sys.argv[1]).read_text("utf-8"))
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def note(step: int, tokens: int) -> None:
    with open(SPECIFICATION["steps_log"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "tokens": tokens}) + "\n")


def run_trl() -> list[float]:
    import trl
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainerCallback

    name = "DPO" if SPECIFICATION["kind"] == "dpo" else "SFT"
    trainer_kind, config_kind = (getattr(trl, f"{name}{what}") for what in ("Trainer", "Config"))

    class Counting(trainer_kind):  # type: ignore[misc,valid-type]
        """Counts the tokens that are not padding."""

        tokens = 0

        def training_step(self, model, inputs, num_items_in_batch=None):  # type: ignore[no-untyped-def]
            mask = inputs.get("attention_mask")
            self.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().training_step(model, inputs, num_items_in_batch)

        if name == "DPO":

            def _prepare_dataset(self, dataset, *rest):  # type: ignore[no-untyped-def]
                return dataset  # rows of token ids

            def _precompute_ref_logps(self, *settings):  # type: ignore[no-untyped-def]
                before = time.process_time()
                dataset = super()._precompute_ref_logps(*settings)
                place = Path(SPECIFICATION["losses"]).with_name("reference.json")
                place.write_text(json.dumps(time.process_time() - before), encoding="utf-8")
                return dataset

    class Noting(TrainerCallback):
        def on_step_end(self, arguments, state, control, **named):  # type: ignore[no-untyped-def]
            note(state.global_step, trainer.tokens)

    dataset = load_dataset("json", data_files=SPECIFICATION["rows"], split="train")
    model, given = SPECIFICATION["model"], {"peft_config": LoraConfig(**LORA)}
    if SPECIFICATION.get("init"):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model, **SPECIFICATION["config"]["model_init_kwargs"])
        model, given = PeftModel.from_pretrained(base, SPECIFICATION["init"], is_trainable=True), {}
        del SPECIFICATION["config"]["model_init_kwargs"]  # of a model that is given by name
    elif SPECIFICATION.get("adapters") == "bfloat16":
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        model, given = get_peft_model(base, LoraConfig(**LORA), autocast_adapter_dtype=False), {}
    if not given:
        from transformers import AutoTokenizer

        given = {"processing_class": AutoTokenizer.from_pretrained(SPECIFICATION["model"])}
    trainer = Counting(
        model=model, args=config_kind(**SPECIFICATION["config"]), train_dataset=dataset, callbacks=[Noting()], **given
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run_grpo() -> list[float]:
    """Train GRPO on completions that exist already; the gradient norms are written to norms.json."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    groups = [json.loads(line) for line in Path(SPECIFICATION["rows"]).read_text("utf-8").splitlines()]
    config = {key: value for key, value in SPECIFICATION["config"].items() if value is not None}
    base = AutoModelForCausalLM.from_pretrained(SPECIFICATION["model"], **config.pop("model_init_kwargs"))
    model = PeftModel.from_pretrained(base, SPECIFICATION["init"], is_trainable=True)

    def rollout(prompts, trainer):  # type: ignore[no-untyped-def]
        """The completions of each prompt. A prompt is the number of a group, repeated once for each of its
        completions."""
        chosen = [groups[int(prompt)] for prompt in prompts]
        size = len(chosen[0]["completion_ids"])
        completions = [group["completion_ids"][at % size] for at, group in enumerate(chosen)]
        return {
            "prompt_ids": [group["prompt_ids"] for group in chosen],
            "completion_ids": completions,
            "logprobs": None,
        }

    def score(prompts, completions, **columns):  # type: ignore[no-untyped-def]
        size = len(groups[0]["rewards"])
        return [groups[int(prompt)]["rewards"][at % size] for at, prompt in enumerate(prompts)]

    tokens = [
        sum(len(group["prompt_ids"]) + len(ids) for ids in group["completion_ids"]) for group in groups
    ]  # of each step

    class Noting(TrainerCallback):
        def on_step_end(self, arguments, state, control, **named):  # type: ignore[no-untyped-def]
            note(state.global_step, sum(tokens[: state.global_step]))

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=score,
        args=GRPOConfig(**config),
        train_dataset=Dataset.from_dict({"prompt": [str(number) for number in range(len(groups))]}),
        processing_class=AutoTokenizer.from_pretrained(SPECIFICATION["model"]),
        rollout_func=rollout,
        callbacks=[Noting()],
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    place = Path(SPECIFICATION["losses"]).with_name("norms.json")
    place.write_text(json.dumps([entry["grad_norm"] for entry in logged]), encoding="utf-8")
    return [entry["loss"] for entry in logged]


def run_loop() -> list[float]:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, SPECIFICATION["dtype"])
    base = AutoModelForCausalLM.from_pretrained(SPECIFICATION["model"], dtype=dtype)
    if SPECIFICATION.get("init"):
        model = PeftModel.from_pretrained(base, SPECIFICATION["init"], is_trainable=True)
    else:
        model = get_peft_model(base, LoraConfig(**LORA))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=SPECIFICATION["learning_rate"], weight_decay=0.0)
    rows = [json.loads(line) for line in Path(SPECIFICATION["rows"]).read_text("utf-8").splitlines()]
    model.train()
    losses, tokens, size = [], 0, SPECIFICATION["rows_per_step"]
    for step in range(SPECIFICATION["steps"]):
        chosen = rows[step * size : (step + 1) * size]
        widest = max(len(row["input_ids"]) for row in chosen)
        ids = torch.zeros(len(chosen), widest, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for number, row in enumerate(chosen):
            length = len(row["input_ids"])
            ids[number, :length], mask[number, :length] = torch.tensor(row["input_ids"]), 1
            labels[number, :length] = torch.tensor(row["labels"])
        given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if SPECIFICATION.get("exact_loss"):
            logits = model(**given).logits[:, :-1].flatten(0, 1).double()  # (N, V)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
        else:
            loss = model(**given, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tokens += int(mask.sum())
        note(step + 1, tokens)
    if SPECIFICATION.get("save"):
        model.save_pretrained(SPECIFICATION["save"])
    return losses


if __name__ == "__main__":
    runs = {"loop": run_loop, "grpo": run_grpo}
    found = runs.get(SPECIFICATION["kind"], run_trl)()
    Path(SPECIFICATION["losses"]).write_text(json.dumps(found), encoding="utf-8")
