"""Facts about a base that are known before its weights are read: files, configuration, family, dtype, device."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from tunekit.errors import ModelError
from tunekit.model.compute import resolve_attention, resolve_dtype
from tunekit.model.families import Family, make_family
from tunekit.model.storage import inspection
from tunekit.model.storage.gguf_facts import GgufFacts, read_facts
from tunekit.model.storage.gguf_settings import read_settings, refuse_architecture
from tunekit.model.storage.quantized_layouts import open_weights
from tunekit.model.storage.source import ModelSource
from tunekit.model.transformers_guard import model_errors, quiet
from tunekit.recipe.model import HeadedModel, ModelSection
from tunekit.records import JsonObject


@dataclass(frozen=True)
class BaseSpec:
    """Facts about a base that are known before its weights are read, and the device for which it is loaded."""

    section: ModelSection
    source: ModelSource
    config: PreTrainedConfig
    family: Family
    dtype: torch.dtype
    device: torch.device
    attention: str
    fingerprint: str | None = None  # None if only the configuration is read
    stored_as: str | None = None  # the method by which the weights in the files are quantized; None if they are dense

    @property
    def arguments(self) -> dict[str, object]:
        """Arguments with which transformers creates the net."""
        return {"dtype": self.dtype, "attn_implementation": self.attention}

    @property
    def read_by_us(self) -> bool:
        """Whether tunekit can read the files without transformers."""
        return not self.section.trust_remote_code

    @property
    def is_dense(self) -> bool:
        """Whether no layer is packed."""
        return self.section.quantization == "none"

    def refuse_transformers(self) -> None:
        """Check that transformers may read the weights. Raises: ModelError for quantized weights in the files, which it
        would read in another way."""
        if self.stored_as is not None:
            what = f"{self.section.name_or_path} has remote code, and weights that are stored as {self.stored_as}"
            how = "choose the unquantized base"
            raise ModelError(f"{what}, which tunekit cannot read", how, key="model.name_or_path")

    def stored_notes(self) -> list[str]:
        """A note for a base whose files contain quantized weights."""
        if self.stored_as is None:
            return []
        then = f"kept in {self.dtype}" if self.is_dense else f"packed to {self.section.quantization}"
        return [f"the base stores weights as {self.stored_as}: each is dequantized when it is read, then {then}"]


def read_base_spec(source: ModelSource, section: ModelSection, device: torch.device, *, weights: bool) -> BaseSpec:
    """Read everything about the base except its weights. `weights`: also check the weights' files and compute their
    fingerprint.

    Raises: ModelError for an architecture, a stored quantization or remote code that cannot be loaded.
    """
    dtype = resolve_dtype(section, device)
    config, family, stored_as = _read_configuration(source, section)
    if weights and source.gguf_file is None:
        open_weights(source.folder)
    attention = resolve_attention(section, config, device, family.auto_class())
    fingerprint = inspection.fingerprint(source) if weights else None
    return BaseSpec(section, source, config, family, dtype, device, attention, fingerprint, stored_as)


def default_config(kind: str, settings: Mapping[str, object] | None = None) -> JsonObject:
    """`settings` of a model type, with transformers' defaults for all settings that are missing. Empty for a type that
    transformers does not know."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if kind not in CONFIG_MAPPING:
        return {}
    stated = {name: value for name, value in (settings or {}).items() if name != "model_type"}
    with quiet():  # its advice is printed where the base is read
        return JsonObject(AutoConfig.for_model(kind, **stated).to_dict())


def _read_configuration(source: ModelSource, section: ModelSection) -> tuple[PreTrainedConfig, Family, str | None]:
    """Read the configuration, and find the base's family and the method by which its stored weights are quantized.
    Check the architecture, this method and remote code. In the returned configuration, the weights are dense."""
    from transformers import AutoConfig

    arguments: dict[str, object] = {}
    facts: GgufFacts | None = None
    stored_as: str | None = None
    if source.gguf_file is not None:
        inspection.check_gguf(source)
        facts = read_facts(source)
        refuse_architecture(facts)
        arguments["gguf_file"] = source.gguf_file
        family = make_family(section.family) if isinstance(section, HeadedModel) else inspection.unnamed_family()
    else:
        raw = inspection.read_config(source)
        stored_as = inspection.stored_method(raw, section)
        family = inspection.find_family(raw, section)
    with model_errors(section), quiet():
        config = AutoConfig.from_pretrained(
            str(source.folder), trust_remote_code=section.trust_remote_code, local_files_only=True, **arguments
        )
    if facts is not None:
        read_settings(facts, config)
    if isinstance(section, HeadedModel):
        config.id2label = dict(enumerate(section.labels))
        config.label2id = {label: number for number, label in enumerate(section.labels)}
        if section.problem_type is not None:
            config.problem_type = section.problem_type
        vars(config).pop("thresholds", None)  # thresholds of an earlier head
        if section.thresholds:
            config.thresholds = list(section.thresholds)
        pad_id = getattr(config, "pad_token_id", None)
        config.pad_token_id = section.head_pad_id if pad_id is None else pad_id
    _check_known(config, family, section)
    config.use_cache = False
    if hasattr(config, "transformers_weights"):
        del config.transformers_weights  # this key would select a different file than the checked file
    _forget_packing(config)
    return config, family, stored_as


def _forget_packing(config: PreTrainedConfig) -> None:
    """Remove the settings of the stored quantization from a configuration and the configurations inside."""
    vars(config).pop("quantization_config", None)
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            _forget_packing(part)


def _check_known(config: PreTrainedConfig, family: Family, section: ModelSection) -> None:
    """Check that transformers has a model of this family for the configuration. Raises: ModelError."""
    if type(config) in family.auto_class()._model_mapping or section.trust_remote_code:
        return
    what = f"{section.name_or_path} ({config.model_type}) is not {family.text} for which transformers has a class"
    raise ModelError(what, "choose another base, or a newer transformers", key="model.name_or_path")
