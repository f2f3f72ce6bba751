"""`start: orthogonal`: A and B are not 0, but B A is 0, because A and B use orthogonal subspaces of dimension r / 2."""

from tunekit.recipe.bases.section import StartSettings


class OrthogonalSettings(StartSettings):
    """A and B are not 0, but their product is 0."""

    summary = "A and B are not 0, but B A is 0"
    needs_even_rank = True
    decomposes = False
