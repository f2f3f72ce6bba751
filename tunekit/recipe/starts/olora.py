"""`start: olora`: B is the first r columns of Q, and A the first r rows of R, from the QR decomposition of each matrix
(Büyükakyüz 2024)."""

from tunekit.recipe.bases.section import StartSettings


class OloraSettings(StartSettings):
    """With W = Q R, B is the first r columns of Q, so its columns are orthonormal; A is the first r rows of R."""

    summary = "B: the first r columns of Q; A: the first r rows of R; W = Q R"
    moves_weights = True
    depends_on_layout = True
