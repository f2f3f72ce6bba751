"""The base class of every section of a recipe, and the value types that sections share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeGuard, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, WithJsonSchema
from pydantic.fields import FieldInfo

from tunekit.basics import DEFAULT_SHOWS, Shows
from tunekit.recipe.bases import fields
from tunekit.recipe.bases.paths import AdapterPath
from tunekit.recipe.bases.paths import Text as Text

LARGEST_COUNT = 10**9  # a larger count is a mistake; counts up to it are exact as floats


class Section(BaseModel):
    """Frozen settings. An unknown key is an error, and values are not converted from other types (no "5" for 5).

    `short`: if a recipe writes a single text instead of this mapping, the text becomes the value of this key.
    `free_keys`: keys that a resumed run may change, because no result depends on them.
    """

    short: ClassVar[str | None] = None
    free_keys: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True, protected_namespaces=())


class MethodSettings(Section):
    """Settings that are chosen by name (an adapter, an objective). `method` is the name of the file that defines the
    class; `summary`: what the method does, in one line. A class without a summary is only a base class."""

    short: ClassVar[str | None] = "method"
    summary: ClassVar[str]

    method: str

    @classmethod
    def __pydantic_init_subclass__(cls, **settings: object) -> None:
        if "summary" in vars(cls):
            name: Any = cls.__module__.rpartition(".")[2]
            field = FieldInfo(annotation=Literal[name], default=name, description=cls.summary)  # type: ignore[arg-type]
            cls.model_fields["method"] = field


@dataclass(frozen=True)
class PublishedRate:
    """The learning rate with which a method was published or compared, and the source of that rate."""

    value: float
    source: str


def metamath_rate(value: float, experiment: str) -> PublishedRate:
    """The learning rate of an experiment in PEFT's MetaMathQA comparison (Llama-3.2-3B)."""
    return PublishedRate(value, f"huggingface/peft, method_comparison/MetaMathQA/experiments/{experiment}")


Item = TypeVar("Item")
Several = Annotated[tuple[Item, ...], Strict(False)]  # a YAML or JSON list, kept as a tuple
ModelPart = Literal["language", "projector", "tower"]
Line = tuple[str, str]  # a line of YAML, and its comment


class AdapterSettings(MethodSettings):
    """Settings of every adapter method. The settings of one method are in recipe/adapters/NAME.py.

    `default_learning_rate`: the value of training.learning_rate if the recipe has none; None: the general default.
    `trains_base`: whether the method trains the base's own weights, so that the result is a model, not an adapter.
    `merges`: whether the adapter can be merged into the base's weights; False for adapters of the whole model.
    `first_lines`: the lines that `tunekit init` writes below the key `method`.
    """

    default_learning_rate: ClassVar[PublishedRate | None] = None
    trains_base: ClassVar[bool] = False
    merges: ClassVar[bool] = True
    first_lines: ClassVar[Sequence[Line]] = ()

    @property
    def less_memory(self) -> str:
        """Advice on the change of the recipe that would save the most memory."""
        quantize = "quantize the base with model.quantization: nf4"
        return "train an adapter, such as lora" if self.trains_base else quantize

    @property
    def initialisation(self) -> StartSettings | None:
        """The settings of the initialisation; None if the method has no key `start`."""
        return getattr(self, "start", None)

    @property
    def calibration(self) -> CalibratedStart | None:
        """The settings of the initialisation if it reads training data before step 1; otherwise None."""
        return self.initialisation if isinstance(self.initialisation, CalibratedStart) else None

    @property
    def needs_base_first(self) -> bool:
        """Whether the base must be loaded first, because the initial values come from its forward pass."""
        return self.calibration is not None

    init_from: AdapterPath | None = Field(
        None, description="an adapter to continue training: a run folder, or an adapter folder of tunekit or PEFT"
    )
    parts: Several[ModelPart] = Field(
        ("language",),
        min_length=1,
        description="the parts of a composite model (one that also reads images or audio) that get an adapter",
    )


class ObjectiveSettings(MethodSettings):
    """Settings and facts of every objective. The settings of one objective are in recipe/objectives/NAME.py.

    - `family`: the family of the models that the objective trains
    - `example`: the kind of training example; formats turn rows into this kind
    - `reference`: the model that the loss compares with: none, "policy at step 0" or "teacher"
    - `answers`: whether the model answers with text
    - `sums`: names of the sums over evaluation rows, from which metrics are computed
    - `supervised`: whether this objective evaluates a model of its family if no recipe names an objective
    - `samples`: whether the model learns from texts that it writes during training
    - `shows`: units, charts and warnings for progress, report and preview
    - `needs_recipe`: whether an evaluation needs the recipe, because only the recipe names the teacher or the rewards
    - `has_head`: whether the objective trains a head; `names_labels`: whether the outputs of the head have labels;
      `single_score`: whether the head has one output
    - `training_keys`: keys that do not affect the loss of an evaluation
    - `measures_training`: whether evaluations usually use training rows, so that a warning about this is not needed
    - `default_learning_rate`: takes precedence over the adapter's default
    - `required`: keys that must be written, and an example of each
    - `one_sequence`: whether a row is one sequence that contains all its answers
    - `medium`: audio or image, if rows name such files; None: text
    - `first_order`: the order in which `tunekit init` tries objectives on the first row; None: never tried
    - `first_lines`: the lines that `tunekit init` writes below the key `method`
    - `first_recipe`: the shipped recipe whose base `tunekit init` proposes; None: any base
    - `first_rows`: micro_batch_size and gradient_accumulation_steps of `tunekit init`; None: the usual ones
    - `first_reasons`: why `for_rows` chose a value, by the value
    """

    default_learning_rate: ClassVar[PublishedRate | None] = None
    family: ClassVar[str] = "causal"
    example: ClassVar[str] = "text"
    reference: ClassVar[str] = "none"
    answers: ClassVar[bool] = True
    sums: ClassVar[tuple[str, ...]] = ("loss", "correct", "units")
    supervised: ClassVar[bool] = False
    samples: ClassVar[bool] = False
    shows: ClassVar[Shows] = DEFAULT_SHOWS
    training_keys: ClassVar[tuple[str, ...]] = ()
    measures_training: ClassVar[bool] = False
    required: ClassVar[Mapping[str, str]] = {}
    one_sequence: ClassVar[bool] = False
    medium: ClassVar[str | None] = None
    first_order: ClassVar[int | None] = None
    first_lines: ClassVar[Sequence[Line]] = ()
    first_recipe: ClassVar[str | None] = None
    first_rows: ClassVar[tuple[int, int] | None] = None
    first_reasons: ClassVar[Mapping[str, str]] = {}
    needs_recipe: ClassVar[bool] = False
    has_head: ClassVar[bool] = False
    names_labels: ClassVar[bool] = False
    single_score: ClassVar[bool] = False

    @property
    def single_row(self) -> str:
        """The reason why a step must not have only one row; empty if it may."""
        return ""

    @classmethod
    def for_rows(cls, rows: Sequence[Mapping[str, object]]) -> Mapping[str, str]:
        """The settings that this objective needs to train on these rows, for the recipe of `tunekit init`."""
        return {}

    @classmethod
    def first_metric(cls, facts: Mapping[str, Any]) -> str | None:
        """The metric by which `tunekit init` chooses the best checkpoint; None: the loss. `facts`: as in `sums_of`."""
        return None

    @property
    def needs_evaluation(self) -> tuple[str, ...]:
        """The keys of the recipe that have an effect only if there are evaluation rows."""
        return ()

    @classmethod
    def sums_of(cls, facts: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the sums over evaluation rows. `facts`: settings of the objective, or facts of a trained adapter."""
        return cls.sums

    @classmethod
    def is_log_loss(cls, facts: Mapping[str, Any]) -> bool:
        """Whether the loss is a negative log-probability. `facts`: as in `sums_of`."""
        return True

    @property
    def listed_labels(self) -> tuple[str, ...]:
        """The labels that the recipe lists."""
        return ()


class StartSettings(MethodSettings):
    """Settings and facts of every LoRA initialisation. The settings of one initialisation are in recipe/starts/NAME.py.

    `looks_at`: the data that the initialisation needs in addition to a layer's weight: "inputs" or "gradients" of the
    layer in the run's first batches, "original" for the weight before quantization, or "" for none.
    """

    needs_even_rank: ClassVar[bool] = False
    needs_twice_the_rank: ClassVar[bool] = False  # it needs 2 r singular vectors of each matrix
    fills_experts: ClassVar[bool] = False  # it also initialises A and B of fused expert parameters
    moves_weights: ClassVar[bool] = False  # a part of W moves into A and B; the rest of W is frozen
    divides_by_scaling: ClassVar[bool] = False  # alpha must not be 0
    depends_on_layout: ClassVar[bool] = False  # a transposed W (Conv1D) gives a different A and B
    looks_at: ClassVar[str] = ""
    decomposes: ClassVar[bool] = True  # it decomposes a matrix of each layer; False: A and B are random


def _is_finite(value: object) -> TypeGuard[int | float]:
    """Whether the value is an int or a float (not a bool), and is finite as a float. math.isfinite cannot be used for
    all, because it fails for integers above 1e308."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 10**300 if isinstance(value, int) else math.isfinite(value)


def _number(value: object) -> float:
    """Converts an int or a float to a float. Raises: ValueError for a bool, NaN, infinity or another type."""
    if not _is_finite(value):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        raise ValueError("must be a finite number" if number else "must be a number")
    return float(value)


def _whole(value: object) -> int:
    """Converts an int, or a float without a fraction such as 1e3, to an int. Raises: ValueError for other values, also
    for a bool."""
    if not _is_finite(value) or value != int(value):
        raise ValueError("must be a whole number")
    return int(value)


def _auto_or_bool(value: object) -> object:
    if isinstance(value, bool) or value == "auto":
        return value
    raise ValueError("must be auto, true or false")


def _auto_bool_or_count(value: object) -> object:
    if isinstance(value, bool) or value == "auto":
        return value
    if not _is_finite(value) or value != int(value) or not 0 <= value <= LARGEST_COUNT:
        raise ValueError("must be auto, true, false or a number of layers")
    return int(value)


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"must be a regular expression ({error})") from None
    return text


def _one_or_several(value: object) -> object:
    """Puts a single integer into a tuple. Other values are not changed; pydantic checks them."""
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


def text_or_texts(value: object) -> str | tuple[str, ...]:
    """Returns a text after checking that it is a regular expression, or converts a list of texts to a tuple. Raises:
    ValueError for other values and for empty texts."""
    if isinstance(value, str) and value:
        return _expression(value)
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) and item for item in value):
        return tuple(value)
    raise ValueError("must be text or a list of texts")


Number = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_whole)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[Whole, Field(ge=1, le=LARGEST_COUNT)]
CountOrZero = Annotated[Whole, Field(ge=0, le=LARGEST_COUNT)]
Seed = Annotated[Whole, Field(ge=0, lt=2**32)]
Expression = Annotated[Text, AfterValidator(_expression)]
AutoOrBool = Annotated[str | bool, BeforeValidator(_auto_or_bool), WithJsonSchema({"enum": ["auto", True, False]})]
AutoBoolOrCount = Annotated[
    str | bool | int,
    BeforeValidator(_auto_bool_or_count),
    WithJsonSchema({"anyOf": [{"enum": ["auto", True, False]}, {"type": "integer", "minimum": 0}]}),
]
TextOrTexts = Annotated[str | tuple[str, ...], BeforeValidator(text_or_texts)]
Layers = Annotated[Several[CountOrZero], BeforeValidator(_one_or_several)]


class TargetedSettings(AdapterSettings):
    """Settings of the adapters whose layers can be chosen."""

    modules_to_save: Several[Text] = fields.MODULES_TO_SAVE
    target_modules: TextOrTexts = fields.TARGET_MODULES
    exclude_modules: TextOrTexts | None = fields.EXCLUDE_MODULES


class CalibratedStart(StartSettings):
    """An initialisation that reads training data before step 1."""

    batches: Count = Field(8, description="number of micro-batches of the training data to read before step 1")
