"""Imports the LoRA of a diffusion pipeline from another program's file into an adapter folder."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.diffusers_file import ForeignLora, read_foreign
from tunekit.adapters.folder.write import save_adapter_folder
from tunekit.errors import InputError
from tunekit.model.families.diffusion import FAMILY
from tunekit.model.families.pipeline.parts import PipelineNet
from tunekit.model.load import base_fingerprint, make_meta_model
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.recipe.model import ModelSection, PipelineModel
from tunekit.recipe.recipe import make_adapter_settings

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
CPU = torch.device("cpu")


def adopt_lora(path: Path, base: Mapping[str, str], place: Path) -> tuple[int, int]:
    """Write an adapter folder at `place`. Returns the number of adapted layers and the size in bytes.

    `base`: the pipeline, as keys of the model section.
    Raises: InputError if the file does not fit the pipeline.
    """
    bare = ModelSection.model_validate({**base, "dtype": "float32"})
    pipeline = make_meta_model(bare, device=CPU).net
    if not isinstance(pipeline, PipelineNet):
        how = "name a diffusion pipeline; the commands read adapter folders of text models as they are"
        raise InputError(f"{bare.name_or_path} is not a diffusion pipeline", how, key="--base")
    parts = tuple(name for name in PARTS if pipeline.part(name) is not None)
    section = PipelineModel.of(bare, family=FAMILY.name, trained=parts)
    net = make_meta_model(section, device=CPU).net
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    lora = read_foreign(path, linear)
    trained = tuple(name for name in parts if any(module.startswith(f"{name}.") for module in lora.alphas))
    net = make_meta_model(PipelineModel.of(bare, family=FAMILY.name, trained=trained), device=CPU).net
    settings = _settings(lora)
    attached = attach_adapter(net, settings, seed=0, head_name=None, device=CPU, loads_state=True)
    names = {part.file_key(name): name for part in attached.parts() for name in part.file_tensors()}
    attached.load_state({names[key]: value for key, value in lora.tensors.items()}, ("trained", "saved"))
    trains_text = any(name.startswith("text_encoder") for name in trained)
    size_bytes = save_adapter_folder(
        attached,
        place,
        base_name=bare.name_or_path,
        base_fingerprint=base_fingerprint(bare),
        revision=None,
        task_type=None,
        objective={"method": "dreambooth", "train_text_encoder": trains_text},
        of_pipeline=True,
    )
    return len(lora.alphas), size_bytes


def _settings(lora: ForeignLora) -> AdapterSettings:
    """The settings of the LoRA in the file, with all of its layers by name."""
    ranks = {name: len(lora.tensors[f"base_model.model.{name}.lora_A.weight"]) for name in lora.alphas}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, lora.alphas))
    return make_adapter_settings(
        {
            "method": "lora",
            "r": rank,
            "alpha": alpha,
            "target_modules": list(lora.alphas),
            "rank_pattern": {name: each for name, each in ranks.items() if each != rank},
            "alpha_pattern": {name: each for name, each in lora.alphas.items() if each != alpha},
        }
    )
