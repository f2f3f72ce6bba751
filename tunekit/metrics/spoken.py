"""Error rates of transcripts."""

from collections.abc import Callable, Sequence

from tunekit.errors import InputError

LIBRARY = ("jiwer", "tunekit[speech]")  # the module that counts errors, and the extra that installs it


def error_rate(name: str) -> Callable[[Sequence[str], Sequence[str]], float]:
    """The function `score` of a metric, computed by jiwer's function `name`: errors in all pairs, divided by the units
    (words or characters) of all references. Pairs whose reference has no word are left out, because their error rate is
    undefined."""

    def score(predictions: Sequence[str], references: Sequence[str]) -> float:
        """The error rate over all pairs. Raises: ValueError if no pair remains; InputError if jiwer is not
        installed."""
        try:
            import jiwer
        except ModuleNotFoundError:
            what = f"{name} is computed by the package {LIBRARY[0]}, which is not installed"
            raise InputError(what, f"run: pip install '{LIBRARY[1]}'") from None

        pairs = [pair for pair in zip(references, predictions, strict=True) if pair[0].strip()]
        if not pairs:
            raise ValueError("no reference has a word")
        return float(getattr(jiwer, name)(*map(list, zip(*pairs, strict=True))))

    return score
