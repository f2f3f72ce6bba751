"""Fields that several settings have. Each settings class lists its own, so that none inherits from a long chain."""

from pydantic import Field

MODULES_TO_SAVE = Field((), description="modules trained whole, such as a head: names or name endings")
TARGET_MODULES = Field("all-linear", description="all-linear, a list of names, or a regular expression")
EXCLUDE_MODULES = Field(None, description="modules never adapted, written the same way")
DROPOUT = Field(0.0, description="on the update's input, while training")
RANK_PATTERN: dict[str, int] = Field(default_factory=dict, description="module pattern: its own r")
ALPHA_PATTERN: dict[str, float] = Field(default_factory=dict, description="module pattern: its own alpha")
LAYERS_TO_TRANSFORM = Field((), description="numbers of the layers adapted; none: all")
LAYERS_PATTERN = Field(
    None, description="name of the list that holds the layers, where a module's name has several numbers"
)
