"""A method's side of PEFT's adapter_config.json: which fields stand for our settings, which must be off.

Settings, or the fields of a foreign configuration, go in; the other one, or a refusal that names the field, comes out.
The format is that of PEFT 0.21.2: every field it writes is written.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from tunekit.adapters.base import PeftConfig, Settings
from tunekit.errors import AdapterError, Problem
from tunekit.files.untrusted import same, shown
from tunekit.records import Target

PeftFields = Mapping[str, tuple[str, Any]]  # PEFT's name -> (our setting, PEFT's default)
Fixed = Mapping[str, tuple[Any, ...]]  # PEFT's name -> the value that is written, then others that are accepted
PEFT_VERSION = "0.21.2"  # whose files ours are equal to, field by field


ANY = object()  # accepts every value: the field has no effect on what a finished adapter computes
COMMON: Fixed = {  # of every PEFT type: what we write, then what else we accept
    "auto_mapping": (None, ANY),  # names Python code to import: never followed
    "base_model_name_or_path": (None, ANY),  # read by folder/config.py
    "inference_mode": (True, False),
    "peft_type": ("", ANY),  # read by folder/config.py
    "peft_version": (PEFT_VERSION, ANY),
    "revision": (None, ANY),  # read by folder/config.py
    "task_type": ("CAUSAL_LM", None, "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
}
UNWRITTEN: Fixed = {"runtime_config": (ANY,)}  # PEFT ignores it in files, and so do we
MODULES: Fixed = {  # of every PEFT type that adapts modules, unless the method says otherwise
    "exclude_modules": (None,),
    "layers_pattern": (None, [], ""),
    "layers_to_transform": (None, []),
    "modules_to_save": (None, []),
}
LAYER_FIXED: Fixed = {  # of most methods whose layers are linear
    "bias": ("none",),
    "fan_in_fan_out": (False, True),  # the layer's own class decides
    "init_weights": (True, False),
}
SAME_NAMED: dict[str, Any] = {  # fields with PEFT's default that stand for the settings of that name
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
OFF: tuple[Any, ...] = (None, False, [], {}, "")  # an unknown field with one of these values changes nothing


@dataclass(frozen=True)
class PeftSide(Generic[Settings]):
    """How one method's settings stand in PEFT's configuration.

    `peft_type`: "" of a method whose result is no adapter folder.
    `fields`: PEFT's name -> (our setting, PEFT's default where a file leaves the field out).
    `fixed`: PEFT's name -> values accepted, the first of which is written; any other value is refused by name.
    `claims`: fields by which this method is told from others of the same peft_type.
    `mends`: PEFT's name -> what to do about a value that is refused.
    `absent`: fields of MODULES that PEFT's class does not have, and warns of.
    `refuses_kernel_layers`, `takes_experts`: whether PEFT refuses layers whose weights a kernel reads, and takes layers
    of the names of former experts for fused ones (peft_models.py says where).
    `resolve`: (settings, targets, the fields so far) -> fields that depend on the targets.
    """

    peft_type: str
    settings: type[Settings]
    fields: PeftFields = field(default_factory=dict)
    fixed: Fixed = field(default_factory=dict)
    claims: Mapping[str, Any] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    mends: Mapping[str, str] = field(default_factory=dict)
    refuses_kernel_layers: bool = False
    takes_experts: bool = False
    resolve: Callable[[Any, Sequence[Target], PeftConfig], PeftConfig] | None = None

    def __post_init__(self) -> None:
        """Add the fields that have our setting's name."""
        own = self.settings.model_fields.keys() - self.fields.keys() - self.fixed.keys() - self.absent
        added = {name: (name, default) for name, default in SAME_NAMED.items() if name in own}
        object.__setattr__(self, "fields", {**added, **self.fields})

    def write(self, settings: Settings) -> PeftConfig:
        """PEFT's fields for `settings`, every one that PEFT 0.21.2 writes for this type."""
        known = {**COMMON, **MODULES, **self.fixed}
        written = {name: values[0] for name, values in known.items() if name not in self.absent}
        written |= {name: plain(getattr(settings, own), default) for name, (own, default) in self.fields.items()}
        return {**written, **self.claims, "peft_type": self.peft_type}

    def read(self, config: PeftConfig, file: str) -> Settings:
        """Our settings for PEFT's fields.

        Raises: AdapterError with every field that would change the result and is not supported, or is malformed.
        """
        problems = [
            Problem(
                f"the field has the value {shown(value)}, which tunekit does not support here",
                self.mends.get(name, ""),
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
        for name, (own, default) in self.fields.items():
            value = config.get(name, default)
            if default in (None, {}, []) and (value is None or (default is None and value in ([], ""))):
                value = default  # nothing, in any of the spellings that peft has used
            values[own] = tuple(value) if isinstance(value, list) else value
        try:
            return self.settings(**values)
        except ValueError as error:  # pydantic's: one entry per field
            raise AdapterError.of(self._malformed(error, file)) from error

    def _malformed(self, error: Any, file: str) -> list[Problem]:
        names, problems = {own: name for name, (own, _) in self.fields.items()}, []
        for entry in error.errors(include_url=False, include_input=False):
            said = entry["msg"].removeprefix("Value error, ")
            own = entry["loc"][0] if entry["loc"] else said.split()[0]  # a check of all settings begins with the first
            key = names.get(own, self.peft_type)
            problems.append(Problem(f"malformed: {shown(said)}", "", file, None, key))
        return problems

    def _accepts(self, name: str, value: object) -> bool:
        if name in self.claims:
            return same(value, self.claims[name])
        accepted = {**COMMON, **UNWRITTEN, **MODULES, **self.fixed}.get(name, OFF)
        return any(other is ANY or same(value, other) for other in accepted)


def named_alike(**defaults: object) -> PeftFields:
    """Fields that have the names of our settings, from PEFT's defaults."""
    return {name: (name, default) for name, default in defaults.items()}


def plain(value: object, default: object = None) -> object:
    """A setting as JSON holds it: a whole float as an integer (lora_alpha) but where PEFT's default is a float, a tuple
    as a sorted list."""
    if isinstance(value, float) and value.is_integer() and not isinstance(default, float):
        return int(value)
    if isinstance(value, tuple):
        return sorted(value)
    if isinstance(value, Mapping):
        return {key: plain(value[key]) for key in sorted(value)}
    return value
