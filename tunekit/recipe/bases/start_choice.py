"""The key `start` of the LoRA family: NAME or {method: NAME, ...}, read as the settings of recipe/starts/NAME.py."""

from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Field, PlainSerializer
from pydantic_core import PydanticCustomError

from tunekit.recipe.bases.section import StartSettings
from tunekit.recipe.reading.names import known_names, settings_class

_NAMES = known_names("starts")
_Settings: Any = Annotated[Union[*(settings_class("starts", name) for name in _NAMES)], Field(discriminator="method")]
_NamedOrSettings: Any = Literal[*_NAMES] | _Settings
DEFAULT_START: Any = settings_class("starts", "default")(method="default")


def _named(value: object) -> object:
    """Turns a name such as pissa into {method: pissa}. Other values are not changed. Raises: ValueError for an invalid
    value or an unknown name."""
    if isinstance(value, str):
        value = {"method": value}
    elif isinstance(value, dict) and "method" not in value:
        raise ValueError("must name a method")
    elif not isinstance(value, dict | StartSettings):
        raise ValueError("must be a name or a mapping")
    if isinstance(value, dict) and value["method"] not in _NAMES:
        raise PydanticCustomError("literal_error", "unknown start", {"expected": ", ".join(_NAMES)})
    return value


def _shortest(start: StartSettings) -> object:
    """The name of the initialisation if it has no settings; otherwise a mapping with the name and all settings."""
    values = start.model_dump(mode="json")
    return start.method if len(values) == 1 else values


StartChoice = Annotated[
    _Settings, BeforeValidator(_named, json_schema_input_type=_NamedOrSettings), PlainSerializer(_shortest)
]
