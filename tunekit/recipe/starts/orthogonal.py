"""`start: orthogonal`: neither A nor B is 0, but B A is: their rows span orthogonal halves of the rank."""

from tunekit.recipe.bases.section import StartSettings


class OrthogonalSettings(StartSettings):
    """A and B that cancel out."""

    summary = "A and B are not 0, but B A is"
    needs_even_rank = True
    decomposes = False
