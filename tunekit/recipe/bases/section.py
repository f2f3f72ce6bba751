"""The base of every section of a recipe: frozen, strict, no unknown keys; and the value types that sections share."""

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

LARGEST_COUNT = 10**9  # nobody means more rows, steps or tokens, and every count below it is exact as a float


class Section(BaseModel):
    """Frozen settings; an unknown key is an error; a value is never coerced from another kind (no "5" for 5).

    `short`: the key that a text alone stands for, where a mapping may be written as a text.
    `free_keys`: keys that a resumed run may change, because no result depends on them.
    """

    short: ClassVar[str | None] = None
    free_keys: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True, protected_namespaces=())


class MethodSettings(Section):
    """Settings of a named part (an adapter, an objective). `method` is the name of the file that defines them, for each
    class with a `summary`: what the method does, in one line."""

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
    """The learning rate with which a method was published or compared, and where that can be read."""

    value: float
    source: str


def metamath_rate(value: float, experiment: str) -> PublishedRate:
    """The rate of an experiment of PEFT's MetaMathQA comparison, on Llama-3.2-3B."""
    return PublishedRate(value, f"huggingface/peft, method_comparison/MetaMathQA/experiments/{experiment}")


Line = tuple[str, str]  # a line of YAML, and the comment beside it


class AdapterSettings(MethodSettings):
    """What every adapter has; the settings of one method are in recipe/adapters/NAME.py.

    `default_learning_rate`: training.learning_rate where the recipe does not write it; None: the recipe's own default.
    `trains_base`: the base's own weights are trained, so that nothing can be bypassed and the result is a model.
    `first_lines`: what `tunekit init` writes below the method.
    """

    default_learning_rate: ClassVar[PublishedRate | None] = None
    trains_base: ClassVar[bool] = False
    first_lines: ClassVar[Sequence[Line]] = ()

    @property
    def less_memory(self) -> str:
        """What else in the recipe would save most of a run's memory, in words."""
        quantize = "quantize the base with model.quantization: nf4"
        return "train an adapter, lora for one" if self.trains_base else quantize

    @property
    def initialisation(self) -> StartSettings | None:
        """The settings of its start, if its method has one."""
        return getattr(self, "start", None)

    @property
    def calibration(self) -> CalibratedStart | None:
        """Its start, if that looks at the run's own data before step 1."""
        return self.initialisation if isinstance(self.initialisation, CalibratedStart) else None

    @property
    def needs_base_first(self) -> bool:
        """Whether its first values come from a forward of the base."""
        return self.calibration is not None

    init_from: AdapterPath | None = Field(
        None, description="a run folder or an adapter folder, ours or peft's, that training continues"
    )


class ObjectiveSettings(MethodSettings):
    """What every objective has; the settings of one are in recipe/objectives/NAME.py.

    `family`: of the models that it trains; `example`: the kind of example that it learns from, as formats give it;
    `reference`: none, "policy at step 0" or "teacher", which its loss compares with; `answers`: whether its model gives
    texts;
    `sums`: what its evaluation adds up, of which metrics are made; `supervised`: whether it measures models of its
    family that come without a recipe; `samples`: whether it learns from texts that the model writes meanwhile; `shows`:
    facts for progress, report and preview;
    `needs_recipe`: whether only its recipe names all that it measures with (a teacher, rewards);
    `has_head`: whether it trains a head next to the base; `names_labels`: whether the rows of that head have labels;
    `single_score`: whether that head gives one score;
    `measures_training`: whether evaluation rows are usually training rows, so that it is no leak where they are;
    `default_learning_rate`: before that of the adapter; `required`: keys that must be written, and how; `one_sequence`:
    whether a row is one sequence with answers in it; `medium`: audio or image where rows name files of it, None for
    text; `first_order`: `tunekit init` asks of the first row whether it is of this kind, smallest numbers first (None:
    never); `first_lines`: what it writes below the method.
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
    measures_training: ClassVar[bool] = False
    required: ClassVar[Mapping[str, str]] = {}
    one_sequence: ClassVar[bool] = False
    medium: ClassVar[str | None] = None
    first_order: ClassVar[int | None] = None
    first_lines: ClassVar[Sequence[Line]] = ()
    needs_recipe: ClassVar[bool] = False
    has_head: ClassVar[bool] = False
    names_labels: ClassVar[bool] = False
    single_score: ClassVar[bool] = False

    @classmethod
    def for_rows(cls, rows: Sequence[Mapping[str, object]]) -> Mapping[str, str]:
        """Settings without which it does not learn from such rows, for a first recipe."""
        return {}

    @property
    def needs_evaluation(self) -> tuple[str, ...]:
        """Keys of settings that act on evaluation rows."""
        return ()

    @classmethod
    def sums_of(cls, facts: Mapping[str, Any]) -> tuple[str, ...]:
        """The sums with such settings, or of a trained adapter with such facts."""
        return cls.sums

    @property
    def listed_labels(self) -> tuple[str, ...]:
        """The labels that the recipe lists."""
        return ()


class StartSettings(MethodSettings):
    """What every start of the LoRA family has; the settings of one are in recipe/starts/NAME.py.

    `looks_at` is what it needs besides the layer's own weight: "" nothing, "inputs" or "gradients" of the base on the
    run's first batches, "original" the weight that was quantized.
    """

    needs_even_rank: ClassVar[bool] = False
    needs_twice_the_rank: ClassVar[bool] = False  # as many singular vectors of each matrix
    fills_experts: ClassVar[bool] = False  # also A and B of fused expert parameters
    moves_weights: ClassVar[bool] = False  # a part of W goes into A and B; W as it was less that part stays frozen
    divides_by_scaling: ClassVar[bool] = False  # so that alpha must not be 0
    depends_on_layout: ClassVar[bool] = False  # a transposed W, as Conv1D stores it, would give other A and B
    looks_at: ClassVar[str] = ""
    decomposes: ClassVar[bool] = True  # a matrix of each layer; else A and B are drawn without a look at the base


def _is_finite(value: object) -> TypeGuard[int | float]:
    """Whether it is a number (never a bool) that a float can hold; math.isfinite overflows on an int beyond 1e308."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 10**300 if isinstance(value, int) else math.isfinite(value)


def _number(value: object) -> float:
    """Accept int or float (never bool, NaN or infinity) and hand on a float."""
    if not _is_finite(value):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        raise ValueError("must be a finite number" if number else "must be a number")
    return float(value)


def _whole(value: object) -> int:
    """Accept an int, or a float without a fraction such as 1e3; never a bool."""
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
    """A single number as a list of one; anything else is left to the type."""
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


def text_or_texts(value: object) -> str | tuple[str, ...]:
    """A regular expression, or texts as a tuple; neither may be empty."""
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
Item = TypeVar("Item")
Several = Annotated[tuple[Item, ...], Strict(False)]  # a YAML or JSON list, kept as a tuple
Layers = Annotated[Several[CountOrZero], BeforeValidator(_one_or_several)]


class TargetedSettings(AdapterSettings):
    """What the adapters have whose layers the user chooses."""

    modules_to_save: Several[Text] = fields.MODULES_TO_SAVE
    target_modules: TextOrTexts = fields.TARGET_MODULES
    exclude_modules: TextOrTexts | None = fields.EXCLUDE_MODULES


class CalibratedStart(StartSettings):
    """A start that looks at the run's own data before step 1."""

    batches: Count = Field(8, description="micro-batches of the training data that are looked at, before step 1")
