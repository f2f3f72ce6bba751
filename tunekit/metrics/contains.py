"""Share of answers that contain their reference, white space at both ends of the reference aside."""

from tunekit.metrics.pairs import mean_of_pairs

DESCRIPTION = "share of generated answers that contain the reference"
HIGHER_IS_BETTER = True


def _contains(prediction: str, reference: str) -> bool:
    """An empty reference is contained in an empty answer only."""
    return reference.strip() in prediction if reference.strip() else not prediction.strip()


score = mean_of_pairs(_contains)
