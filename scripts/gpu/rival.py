"""Runs the same row (a measured run) with peft and a plain loop, at the settings that peft's documentation recommends:
bf16, fused AdamW, bitsandbytes' 4 bits, and recomputation only if the step does not fit without it."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from measuring import HostMemory, cap_memory, device_peaks, reset_peaks, speeds
from random_model import begin_alike, configuration_folder, random_matrix, replace_everywhere
from shapes import Row
from torch import nn
from work import step as step_of

from tunekit.contracts import IGNORED, Batch

ATTENTION = ("flash_attention_2", "sdpa", "eager")


def attempts(row: Row) -> list[tuple[int, bool]]:
    """The settings to try, fastest first: rows per forward, and whether layers are recomputed, which costs a third of
    the speed."""
    sizes = [row.rows]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    if row.checkpointing == "every":
        return [(size, True) for size in sizes]
    if row.checkpointing == 0:
        return [(size, False) for size in sizes]
    return [*((size, False) for size in sizes), *((size, True) for size in sizes)]


def run_row(row: Row, device: torch.device) -> dict[str, Any]:
    """Measure the first attempt that fits into memory; the result names the attempts that did not fit."""
    import peft

    cap_memory(row, device)
    host, started = HostMemory(), time.monotonic()
    host.start()
    net, attention = random_net(row, device)
    names = row.targets if row.targets == "all-linear" else row.targets.split(",")
    settings = peft.LoraConfig(r=row.r, lora_alpha=2 * row.r, lora_dropout=0.0, target_modules=names, bias="none")
    settings.task_type = "SEQ_2_SEQ_LM" if row.reads_source else "CAUSAL_LM"
    model = peft.get_peft_model(net, settings)
    begin_alike(model.named_parameters())
    loaded, found = time.monotonic() - started, reset_peaks(device)
    tried: list[str] = []
    for size, recompute in attempts(row):
        try:
            measured = _train(model, row, device, size, recompute)
            break
        except torch.OutOfMemoryError:
            tried.append(f"{size} rows{', recomputed' if recompute else ''}: out of memory")
        model.zero_grad(set_to_none=True)  # after the error is gone, which holds what its frames held
        gc.collect()
        reset_peaks(device)
    else:
        return {"outcome": "out of memory", "tried": tried, **device_peaks(device)}
    return {
        **found,
        **measured,
        **device_peaks(device),
        "tried": tried,
        "host_anonymous_bytes": host.finish(),
        "load_seconds": loaded,
        "attention": attention,
        "peft": peft.__version__,
    }


def _train(model: Any, row: Row, device: torch.device, size: int, recompute: bool) -> dict[str, Any]:
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    else:
        model.gradient_checkpointing_disable()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    losses: list[float] = []
    tokens, supervised, seconds = [], [], []
    for step in range(row.steps):
        batches = step_of(row, step).batches
        started = time.monotonic()
        total = sum(batch.supervised for batch in batches)
        loss_sum = torch.zeros((), device=device)
        for batch in batches:
            for start in range(0, row.rows, size):
                part = slice(start, start + size)
                loss = _summed_loss(model, row, batch, part, device) / total
                loss.backward()
                loss_sum += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss_sum))
        seconds.append(time.monotonic() - started)
        tokens.append(sum(batch.tokens for batch in batches))
        supervised.append(total)
    return {
        **speeds(tokens, supervised, seconds),
        "losses": losses,
        "rows_of_a_forward": size,
        "recomputed": recompute,
    }


def _summed_loss(model: Any, row: Row, batch: Batch, part: slice, device: torch.device) -> torch.Tensor:
    """The summed loss of some rows, computed by transformers."""
    ids, labels = (tensor[part].to(device) for tensor in (batch.inputs["input_ids"], batch.targets["labels"]))
    if not row.reads_source:
        # Documents of a row see each other here: peft's loop has no packing of its own.
        return model(input_ids=ids, labels=labels, num_items_in_batch=1, use_cache=False).loss
    mask = batch.inputs["attention_mask"][part].to(device)
    mean = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    return mean * (batch.targets["labels"][part] != IGNORED).sum().item()


def random_net(row: Row, device: torch.device) -> tuple[Any, str]:
    """transformers' own model with the weights of random_model.py; packed as bitsandbytes packs them."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    with configuration_folder(row.model) as folder:
        config = AutoConfig.from_pretrained(str(folder))
    net, attention = _meta_net(AutoModelForSeq2SeqLM if row.reads_source else AutoModelForCausalLM, config, device)
    if row.quantization == "nf4":
        _pack(net, device)
    for name, module in list(net.named_modules()):
        prefix = f"{name}." if name else ""
        if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            for own, buffer in type(module)(config).named_buffers(recurse=False):
                module._buffers[own] = buffer.to(device)
        for own, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                values = random_matrix(f"{prefix}{own}", tuple(parameter.shape), device, parameter.dtype)
                replace_everywhere(net, parameter, nn.Parameter(values, requires_grad=False))
    return net, attention


def _meta_net(auto_class: Any, config: Any, device: torch.device) -> tuple[Any, str]:
    """The model on the meta device, with the first attention implementation that is installed."""
    for attention in ATTENTION[1 if device.type == "cpu" else 0 :]:
        try:
            with torch.device("meta"):
                net = auto_class.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
            return net, attention
        except (ImportError, ValueError):
            continue
    raise RuntimeError("no attention implementation fits this model")


def _pack(net: Any, device: torch.device) -> None:
    """Replace every linear layer except the head by bitsandbytes' Linear4bit."""
    from tunekit.model.quantized.codec import import_bitsandbytes

    library = import_bitsandbytes()
    for name, module in list(net.named_modules()):
        if type(module) is not nn.Linear or module is net.get_output_embeddings():
            continue
        layer = library.nn.Linear4bit(
            module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=torch.bfloat16,
            compress_statistics=True, quant_type="nf4", device="meta",
        )  # fmt: skip
        shape = (module.out_features, module.in_features)
        dense = random_matrix(f"{name}.weight", shape, device, torch.bfloat16)
        layer.weight = library.nn.Params4bit(
            dense, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
        ).to(device)
        if module.bias is not None:
            layer.bias = nn.Parameter(torch.zeros(shape[0], dtype=torch.bfloat16, device=device), requires_grad=False)
        parent, _, own = name.rpartition(".")
        setattr(net.get_submodule(parent), own, layer)
        del dense
