"""`adapter: {method: cpt}` settings of context-aware prompt tuning (Blau et al. 2024)."""

from __future__ import annotations

from pydantic import Field, model_validator

from tunekit.recipe.bases.section import AdapterSettings, CountOrZero, NotNegative, Section, Several, Text

SLOT = "{}"  # the place of the text in a template


class ContextExample(Section):
    """One example that is placed before every row."""

    input: Text = Field(description="the question")
    output: Text = Field(description="the answer; its embeddings are not trained")


class CptSettings(AdapterSettings):
    """Examples before every row. Training may move the embeddings of their inputs and templates a little, but not of
    their outputs. PEFT also adds the loss on the examples' outputs, with weights that decay from the last example to
    the first (opt_weighted_loss_type); tunekit's loss is the loss of the rows alone."""

    summary = "examples before each row, with trained embeddings"

    examples: Several[ContextExample] = Field((), description="a list of {input, output}, in order")
    input_template: Text = Field("input: {}\n", description="the text around each input, which replaces {}")
    output_template: Text = Field("output: {}\n", description="the text around each output, which replaces {}")
    token_ids: Several[CountOrZero] | None = Field(None, description="the examples as token ids, instead of `examples`")
    token_types: Several[CountOrZero] | None = Field(
        None,
        description="the type of each of token_ids. For example k, counted from 0: 4 k + 1 input template, 4 k + 2 "
        "input, 4 k + 3 output template, 4 k + 4 output; 0: any other token",
    )
    opt_projection_epsilon: NotNegative = Field(
        0.1, description="maximum distance that an input's embedding may move, times sqrt(width / 2048)"
    )
    opt_projection_format_epsilon: NotNegative = Field(0.1, description="the same maximum for templates")

    @model_validator(mode="after")
    def _examples_or_ids(self) -> CptSettings:
        if self.init_from is not None:
            raise ValueError(
                "cpt cannot continue from init_from: a folder does not contain the original embeddings of the vectors"
            )
        if self.examples and self.token_ids is not None:
            raise ValueError("examples and token_ids both contain the context; write one of them")
        for name in ("input_template", "output_template"):
            if getattr(self, name).count(SLOT) != 1:
                raise ValueError(f"{name} must contain {SLOT} exactly once")
        if (self.token_ids is None) != (self.token_types is None):
            raise ValueError("token_ids and token_types belong together")
        if self.token_ids is not None and not 0 < len(self.token_ids) == len(self.token_types or ()):
            raise ValueError("token_ids and token_types must have the same length")
        return self
