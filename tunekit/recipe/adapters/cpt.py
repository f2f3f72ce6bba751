"""`adapter: {method: cpt}`: settings of context-aware prompt tuning (Blau et al. 2024)."""

from __future__ import annotations

from pydantic import Field, model_validator

from tunekit.recipe.bases.section import AdapterSettings, CountOrZero, NotNegative, Section, Several, Text

SLOT = "{}"  # the place of the text in a template


class ContextExample(Section):
    """One example that is placed before every row."""

    input: Text = Field(description="the question")
    output: Text = Field(description="the answer; its embeddings are not trained")


class CptSettings(AdapterSettings):
    """Places examples before every row. Training moves the embeddings of the examples' inputs and templates by a
    limited distance; the embeddings of their outputs stay fixed. PEFT also adds the loss on the examples' outputs,
    with weights that decay from the last example to the first (opt_weighted_loss_type). tunekit's loss contains only
    the rows."""

    summary = "examples before each row, with trained embeddings"
    merges = False

    examples: Several[ContextExample] = Field((), description="a list of {input, output}, in order")
    input_template: Text = Field("input: {}\n", description="the text around each input, which replaces {}")
    output_template: Text = Field("output: {}\n", description="the text around each output, which replaces {}")
    token_ids: Several[CountOrZero] | None = Field(None, description="the examples as token ids, instead of `examples`")
    token_types: Several[CountOrZero] | None = Field(
        None,
        description="the type of each token in token_ids. With k as the number of its example, counted from 0: 4 k + 1 "
        "for the input template, 4 k + 2 for the input, 4 k + 3 for the output template, 4 k + 4 for the output; 0 for "
        "any other token",
    )
    opt_projection_epsilon: NotNegative = Field(
        0.1, description="maximum distance that an input's embedding may move, times sqrt(width / 2048)"
    )
    opt_projection_format_epsilon: NotNegative = Field(
        0.1, description="maximum distance that a template's embedding may move, times sqrt(width / 2048)"
    )

    @model_validator(mode="after")
    def _examples_or_ids(self) -> CptSettings:
        if self.init_from is not None:
            raise ValueError(
                "cpt cannot continue from init_from, because an adapter folder does not contain the vectors' original "
                "embeddings; remove init_from"
            )
        if self.examples and self.token_ids is not None:
            raise ValueError(
                "examples cannot be combined with token_ids, because both contain the context; write one of them"
            )
        for name in ("input_template", "output_template"):
            if getattr(self, name).count(SLOT) != 1:
                raise ValueError(f"{name} must contain {SLOT} exactly once")
        if (self.token_ids is None) != (self.token_types is None):
            raise ValueError("token_ids needs token_types, and token_types needs token_ids; write both")
        if self.token_ids is not None and not 0 < len(self.token_ids) == len(self.token_types or ()):
            raise ValueError("token_ids must have the same length as token_types, and at least one token")
        return self
