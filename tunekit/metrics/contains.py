"""Share of answers that contain their reference. White space at both ends of the reference is ignored."""

from tunekit.metrics.pairs import MeanOfPairs

DESCRIPTION = "share of generated answers that contain the reference"
HIGHER_IS_BETTER = True


def _contains(prediction: str, reference: str) -> bool:
    """Whether the answer contains the reference; an empty reference is contained only in an empty answer."""
    return reference.strip() in prediction if reference.strip() else not prediction.strip()


score = MeanOfPairs(_contains)
