"""Merges an adapter into its diffusion pipeline, and compares the predictions of the merged pipeline and of the
unmerged adapter."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from tunekit.arithmetic import merge_output
from tunekit.arithmetic.merge_output import LogitDifference, MergeResult
from tunekit.files.tensors import read_tensor_header
from tunekit.files.untrusted import MODEL_FILE
from tunekit.files.work_folder import check_new_folder, new_path
from tunekit.model.families.diffusion import FAMILY, IDS
from tunekit.model.families.pipeline.parts import PipelineNet, load_net
from tunekit.model.families.pipeline.processor import PipelineProcessor
from tunekit.model.storage.portable import make_portable
from tunekit.model.storage.rewrite import Changes
from tunekit.model.storage.source import find_source
from tunekit.model.transformers_guard import quiet
from tunekit.targets.target import LoadedTarget, TargetSpec, load_target

PROMPTS, TIMES, SEED = ("a photo",), (100, 500, 900), 0  # inputs of the compared predictions


def merge_pipeline(target: TargetSpec, adapter: Path, output: Path, dtype: torch.dtype | None) -> MergeResult:
    """Write the merged pipeline to a temporary folder, compare it with the unmerged adapter, and rename the folder to
    `output`.

    After a failure, the temporary folder is removed. Raises: InputError, AdapterError and ResourceError, as `merge`.
    """
    output, base = output.expanduser().absolute(), find_source(target.model, weights=True).folder
    check_new_folder(output, [base, adapter])
    exact = replace(target, model=target.model.model_copy(update={"dtype": "float32"}))
    with new_path(output) as staging:
        merge_output.check_space(output, sum(path.stat().st_size for path in base.rglob("*") if path.is_file()))
        staging.mkdir()
        result = replace(write_merged(load_target(exact, torch.device("cpu")), staging, dtype), folder=output)
        merge_output.write_report(staging, result)
    return result


def write_merged(loaded: LoadedTarget, staging: Path, dtype: torch.dtype | None) -> MergeResult:
    """Write the pipeline into a folder: trained components are merged, other components are copied.

    `loaded`: the pipeline with the adapter, in float32. `dtype`: the dtype of the written components; None: the dtype
    of their files.
    """
    net, processor = loaded.model.base.net, loaded.processor
    assert isinstance(net, PipelineNet)
    assert isinstance(processor, PipelineProcessor)
    before = _predicted(net, processor)
    assert loaded.model.adapter is not None
    changes = merge_output.collect_changes(loaded.model.adapter)
    loaded.model.adapter.detach()
    with torch.no_grad():
        _apply(net, changes)
    exact = _predicted(net, processor)
    processor.save(staging)
    written = {name: dtype or _stored_dtype(processor.folder / name) for name, _ in net.named_children()}
    for path in sorted(path.parent for path in processor.folder.glob("*/config.json")):
        if path.name in written:
            with quiet():
                net.part(path.name).to(written[path.name]).save_pretrained(staging / path.name)
        else:
            (staging / path.name).mkdir(exist_ok=True)
            for file in filter(Path.is_file, sorted(path.iterdir())):
                shutil.copyfile(file, staging / path.name / file.name)
        make_portable(staging / path.name)
    parts = list(written)
    after = _predicted(load_net(staging, parts, torch.float32), processor)
    unrounded, rounding = (float((one - other).abs().max()) for one, other in ((exact, before), (after, exact)))
    gap, rows = (after - before).abs(), f"predicted noise at {len(TIMES)} diffusion timesteps"
    largest, mean, spread = float(gap.max()), float(gap.mean()), float(before.std())
    difference = LogitDifference(
        largest, mean, spread, rows, 0, written=largest, unrounded=unrounded, rounding=rounding
    )
    kinds = sorted({str(kind).removeprefix("torch.") for kind in written.values()})
    reason = "the adapter was trained on the base's own weights"
    return MergeResult(staging, "full", reason, " and ".join(kinds), "float32", difference)


def _apply(net: nn.Module, changes: Changes) -> None:
    for name, change in changes.parameters.items():
        parameter = net.get_parameter(name)
        parameter.copy_(change(parameter.detach()))
    for name, merged in changes.layers.items():
        parameters = dict(net.get_submodule(name).named_parameters(recurse=False))
        weight, bias = merged(
            parameters["weight"].detach(), parameters["bias"].detach() if "bias" in parameters else None
        )
        parameters["weight"].copy_(weight)
        if bias is not None:
            parameters["bias"].copy_(bias)


def _stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the first tensor in the folder's files."""
    file = sorted(folder.glob("*.safetensors"))[0]
    return next(entry.dtype for entry in read_tensor_header(file, MODEL_FILE).values())


@torch.no_grad()
def _predicted(net: PipelineNet, processor: PipelineProcessor) -> torch.Tensor:
    """The pipeline's predictions (B, C, H, W) for random latents at the diffusion timesteps TIMES, for one prompt."""
    side, count = processor.multiple * 2, len(TIMES)
    generator = torch.Generator("cpu").manual_seed(SEED)
    ids = {f"{IDS}{name}": torch.from_numpy(each).repeat(count, 1) for name, each in processor.ids(PROMPTS).items()}
    inputs = {
        "latents": torch.randn(count, *processor.latent_shape(side, side), generator=generator),
        "times": torch.tensor(TIMES),
        "sizes": torch.tensor([[side, side, 0, 0, side, side]] * count),
    }
    return FAMILY.logits(net, {**inputs, **ids})
