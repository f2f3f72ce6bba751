"""`start: olora`: A and B are the first r columns and rows of each matrix's QR decomposition (Büyükakyüz 2024)."""

from tunekit.recipe.bases.section import StartSettings


class OloraSettings(StartSettings):
    """B is orthonormal, from a QR decomposition of W."""

    summary = "the first r columns and rows of W = Q R"
    moves_weights = True
    depends_on_layout = True
