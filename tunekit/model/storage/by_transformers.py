"""Lets transformers make a net with the base's weights, or, by the same function, on the meta device without them."""

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import nn

from tunekit.files.tensors import make_header
from tunekit.files.work_folder import temporary_folder
from tunekit.model.base_spec import BaseSpec
from tunekit.model.storage.mapped_files import MappedFiles
from tunekit.model.storage.reading import keep_float32, needs_copies
from tunekit.model.storage.shards import SINGLE
from tunekit.model.transformers_guard import model_errors, no_fetched_code, quiet

SETTINGS = ("config.json", "generation_config.json")  # files that transformers reads together with the weights


def from_pretrained(
    spec: BaseSpec, folder: Path, **arguments: object
) -> tuple[nn.Module, Mapping[str, Collection[object]]]:
    """The net with the weights in `folder`, and what transformers tells about missing and unknown tensors.

    Raises: ModelError.
    """
    with model_errors(spec.section), quiet(), no_fetched_code(gguf=spec.source.gguf_file is not None):
        return spec.family.auto_class().from_pretrained(
            str(folder),
            config=spec.config,
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=spec.section.trust_remote_code,
            ignore_mismatched_sizes=True,  # the caller refuses them by name
            **spec.arguments,
            **arguments,
        )


def meta_net(spec: BaseSpec, files: MappedFiles | None) -> nn.Module:
    """The net on the meta device. `files`: the base's files; None for a GGUF file, or if they are not here yet.

    If transformers will read the weights, it also makes this net, from the same folder with an empty file of weights:
    whatever fails there for another reason than the weights fails here too. Raises: ModelError.
    """
    if spec.is_dense and spec.read_by_us and files is not None and not needs_copies(files, spec.dtype, spec.device):
        with temporary_folder() as name:
            folder = Path(name)
            for path in (spec.source.folder / file for file in SETTINGS):
                if path.is_file():
                    shutil.copyfile(path, folder / path.name)
            (folder / SINGLE).write_bytes(make_header([], {"format": "pt"}))
            return from_pretrained(spec, folder, use_safetensors=True, device_map={"": "meta"})[0]
    with model_errors(spec.section), quiet(), no_fetched_code(), torch.device("meta"):
        net = spec.family.auto_class().from_config(
            spec.config, trust_remote_code=spec.section.trust_remote_code, **spec.arguments
        )
        keep_float32(net, spec.dtype)
    return net
