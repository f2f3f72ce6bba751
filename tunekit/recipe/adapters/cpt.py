"""`adapter: {method: cpt}` settings of context-aware prompt tuning (Blau et al. 2024)."""

from __future__ import annotations

from pydantic import Field, model_validator

from tunekit.recipe.bases.section import AdapterSettings, CountOrZero, NotNegative, Section, Several, Text

SLOT = "{}"  # where a template takes its text


class ContextExample(Section):
    """One example that stands before every row."""

    input: Text = Field(description="what is asked")
    output: Text = Field(description="what is answered, which stays as it is")


class CptSettings(AdapterSettings):
    """Real examples before every row, whose embeddings may move a little: those of inputs and of the templates around
    them, never those of outputs. PEFT also trains on the outputs of the examples, with weights that decay from the last
    to the first (opt_weighted_loss_type); here the loss is that of the rows alone."""

    summary = "examples before each row, whose embeddings are trained"

    examples: Several[ContextExample] = Field((), description="a list of {input, output}, in order")
    input_template: Text = Field("input: {}\n", description="around each input, which stands for {}")
    output_template: Text = Field("output: {}\n", description="around each output")
    token_ids: Several[CountOrZero] | None = Field(None, description="the examples as token ids, instead")
    token_types: Several[CountOrZero] | None = Field(
        None,
        description="of each of token_ids, 4 k + 1, 2, 3 or 4 for example k: input template, input, output template, "
        "output; 0: none of these",
    )
    opt_projection_epsilon: NotNegative = Field(
        0.1, description="how far an input's embedding may move, times sqrt(width / 2048)"
    )
    opt_projection_format_epsilon: NotNegative = Field(0.1, description="how far a template's may")

    @model_validator(mode="after")
    def _examples_or_ids(self) -> CptSettings:
        if self.init_from is not None:
            raise ValueError(
                "init_from cannot be continued by cpt: a folder does not hold from where its vectors moved"
            )
        if self.examples and self.token_ids is not None:
            raise ValueError("examples and token_ids both hold the context; write one of them")
        for name in ("input_template", "output_template"):
            if getattr(self, name).count(SLOT) != 1:
                raise ValueError(f"{name} must hold {SLOT} once")
        if (self.token_ids is None) != (self.token_types is None):
            raise ValueError("token_ids and token_types belong together")
        if self.token_ids is not None and not 0 < len(self.token_ids) == len(self.token_types or ()):
            raise ValueError("token_ids and token_types must be of one length")
        return self
