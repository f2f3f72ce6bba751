"""Fields that several settings classes have. Each class lists its fields; this avoids a long chain of inheritance."""

from pydantic import Field

MODULES_TO_SAVE = Field(
    (), description="modules that are trained completely, without an adapter, such as a head: names or name endings"
)
TARGET_MODULES = Field("all-linear", description="all-linear, a list of names, or a regular expression")
EXCLUDE_MODULES = Field(None, description="modules without an adapter: a list of names, or a regular expression")
DROPOUT = Field(0.0, description="dropout on the input of the adapter's update, in training")
RANK_PATTERN: dict[str, int] = Field(
    default_factory=dict, description="different ranks for some modules: a mapping {PATTERN: r}"
)
ALPHA_PATTERN: dict[str, float] = Field(
    default_factory=dict, description="different alphas for some modules: a mapping {PATTERN: alpha}"
)
LAYERS_TO_TRANSFORM = Field((), description="indices of the layers with an adapter; empty: all layers")
LAYERS_PATTERN = Field(
    None, description="name of the module that lists the layers, needed if the modules' names contain several numbers"
)
