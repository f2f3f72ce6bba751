"""Converts a method's settings to and from PEFT's adapter_config.json. Some of PEFT's fields correspond to a setting;
all others must have a fixed value.

A written file contains every field that PEFT 0.21.2 writes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from tunekit.adapters.base import PeftConfig, Settings
from tunekit.errors import AdapterError, Problem
from tunekit.files.untrusted import printable, same_value
from tunekit.records import Target

PeftFields = Mapping[str, tuple[str, Any]]  # PEFT's name -> (our setting, PEFT's default)
Fixed = Mapping[str, tuple[Any, ...]]  # PEFT's name -> the written value, then other accepted values
PEFT_VERSION = "0.21.2"  # the release of PEFT whose files ours equal, field by field


TRAINED_VALUE = "write the value that the adapter was trained with"
ANY = object()  # accepts every value: the field does not affect a finished adapter
COMMON: Fixed = {  # of every PEFT type: the written value, then other accepted values
    "auto_mapping": (None, ANY),  # names Python code to import; never used
    "base_model_name_or_path": (None, ANY),  # read by folder/config.py
    "inference_mode": (True, False),
    "peft_type": ("", ANY),  # read by folder/config.py
    "peft_version": (PEFT_VERSION, ANY),
    "revision": (None, ANY),  # read by folder/config.py
    "task_type": ("CAUSAL_LM", None, "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
}
UNWRITTEN: Fixed = {"runtime_config": (ANY,)}  # PEFT ignores it in files, and so do we
MODULES: Fixed = {  # of every PEFT type that adapts modules, unless the method overrides it
    "exclude_modules": (None,),
    "layers_pattern": (None, [], ""),
    "layers_to_transform": (None, []),
    "modules_to_save": (None, []),
}
LAYER_FIXED: Fixed = {  # of most methods with linear layers
    "bias": ("none",),
    "fan_in_fan_out": (False, True),  # depends only on the class of each layer
    "init_weights": (True, False),
}
SAME_NAMED: dict[str, Any] = {  # fields with PEFT's default that correspond to the settings of the same name
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": [],
    "layers_pattern": None,
    "modules_to_save": [],
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_parameters": [],
    "trainable_token_indices": [],
}
OFF: tuple[Any, ...] = (None, False, [], {}, "")  # an unknown field with one of these values has no effect


@dataclass(frozen=True)
class PeftSide(Generic[Settings]):
    """How the settings of one method are written to, and read from, PEFT's configuration.

    `peft_type`: PEFT's name of the method; "" if the method's result is not an adapter folder.
    `fields`: PEFT's name -> (our setting, PEFT's default for an absent field).
    `fixed`: PEFT's name -> accepted values. The first of them is written. A file with any other value is refused.
    `claims`: fields that distinguish this method from others of the same peft_type.
    `remedies`: PEFT's name -> the advice for a refused value.
    `absent`: common fields (MODULES) that PEFT's class for this method does not have. PEFT warns if a file contains
    them.
    `refuses_kernel_layers`: whether PEFT refuses layers whose weights a compiled kernel reads directly.
    `takes_experts`: whether PEFT interprets the older names of expert layers, such as w1, as names of fused experts.
    See peft_models.py for the last two.
    `resolve`: (settings, targets, the fields so far) -> fields that depend on the targets.
    `stored`: (settings, the shapes of the file's tensors) -> the settings with which PEFT computed those tensors.
    """

    peft_type: str
    settings: type[Settings]
    fields: PeftFields = field(default_factory=dict)
    fixed: Fixed = field(default_factory=dict)
    claims: Mapping[str, Any] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    remedies: Mapping[str, str] = field(default_factory=dict)
    refuses_kernel_layers: bool = False
    takes_experts: bool = False
    resolve: Callable[[Any, Sequence[Target], PeftConfig], PeftConfig] | None = None
    stored: Callable[[Any, Mapping[str, tuple[int, ...]]], Any] | None = None

    def __post_init__(self) -> None:
        """Add the fields that have the same name in PEFT and in tunekit's settings."""
        unlisted = self.settings.model_fields.keys() - self.fields.keys() - self.fixed.keys() - self.absent
        added = {name: (name, default) for name, default in SAME_NAMED.items() if name in unlisted}
        object.__setattr__(self, "fields", {**added, **self.fields})

    def write(self, settings: Settings) -> PeftConfig:
        """Returns PEFT's fields for `settings`: all fields that PEFT 0.21.2 writes for this method."""
        fixed_fields = {**COMMON, **MODULES, **self.fixed}
        written = {name: values[0] for name, values in fixed_fields.items() if name not in self.absent}
        ours = self.fields.items()
        written |= {name: json_value(getattr(settings, setting), default) for name, (setting, default) in ours}
        return {**written, **self.claims, "peft_type": self.peft_type}

    def read(self, config: PeftConfig, file: str) -> Settings:
        """Returns the settings that correspond to PEFT's fields.

        Raises: AdapterError with every field that is malformed, or that is unsupported and changes the result.
        """
        problems = [
            Problem(
                f"the field has the value {printable(value)}, which tunekit does not support",
                self.remedies.get(name, ""),
                file,
                None,
                name,
            )
            for name, value in sorted(config.items())
            if name not in self.fields and not self._accepts(name, value)
        ]
        if problems:
            raise AdapterError.of(problems)
        values: PeftConfig = {}
        for name, (setting, default) in self.fields.items():
            value = config.get(name, default)
            if default in (None, {}, []) and (value is None or (default is None and value in ([], ""))):
                value = default  # peft writes an empty value in several ways
            values[setting] = tuple(value) if isinstance(value, list) else value
        try:
            return self.settings(**values)
        except ValueError as error:  # pydantic's: one entry per field
            raise AdapterError.of(self._malformed(error, file)) from error

    def _malformed(self, error: Any, file: str) -> list[Problem]:
        names, problems = {setting: name for name, (setting, _) in self.fields.items()}, []
        for entry in error.errors(include_url=False, include_input=False):
            message = entry["msg"].removeprefix("Value error, ")
            # the message about several settings begins with the name of the first of them
            setting = entry["loc"][0] if entry["loc"] else message.split()[0]
            key = names.get(setting, self.peft_type)
            problems.append(Problem(f"malformed: {printable(message)}", TRAINED_VALUE, file, None, key))
        return problems

    def _accepts(self, name: str, value: object) -> bool:
        if name in self.claims:
            return same_value(value, self.claims[name])
        accepted = {**COMMON, **UNWRITTEN, **MODULES, **self.fixed}.get(name, OFF)
        return any(other is ANY or same_value(value, other) for other in accepted)


def same_names(**defaults: object) -> PeftFields:
    """Builds PeftSide.fields for settings that have the same name in PEFT. `defaults`: PEFT's defaults."""
    return {name: (name, default) for name, default in defaults.items()}


def json_value(value: object, default: object = None) -> object:
    """Converts a setting to a JSON value. A float without fraction, such as lora_alpha, becomes an integer, unless
    PEFT's default is a float. A tuple becomes a list; names are sorted, and token ids keep the order of their rows."""
    if isinstance(value, float) and value.is_integer() and not isinstance(default, float):
        return int(value)
    if isinstance(value, tuple):
        return list(value) if all(isinstance(each, int) for each in value) else sorted(value)
    if isinstance(value, Mapping):
        return {key: json_value(value[key]) for key in sorted(value)}
    return value
