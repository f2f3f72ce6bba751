"""Checks folders of earlier releases of peft, in which some fields have a different meaning than today."""

from collections.abc import Mapping

from tunekit.adapters.folder.config import AdapterConfig
from tunekit.adapters.patterns import Patterns
from tunekit.errors import AdapterError

RankAndAlpha = tuple[float | None, float | None]


def refuse_changed_patterns(config: AdapterConfig, layers: Mapping[str, RankAndAlpha]) -> None:
    """Refuse rank and alpha patterns to which an earlier release of PEFT may have given a different meaning.

    Before 0.15, PEFT took the first key that matched a layer, and looked up both rank and alpha under this key. It also
    did not group alternatives (a|b). Files state their release since 0.18. In older files, only LoRA's field
    corda_config shows that the release is 0.15 or later.
    Raises: AdapterError.
    """
    fields = config.fields
    ranks, alphas = (getattr(config.settings, key, None) or {} for key in ("rank_pattern", "alpha_pattern"))
    if "peft_version" in fields or "corda_config" in fields or not isinstance(ranks, dict) or not (ranks or alphas):
        return
    default: RankAndAlpha = getattr(config.settings, "r", None), getattr(config.settings, "alpha", None)
    patterns = Patterns(file=config.file, key="rank_pattern" if ranks else "alpha_pattern")
    for name, sizes in layers.items():
        keys = [key for key in ranks if patterns.matches_as_before(key, name)]
        keys = keys or [key for key in alphas if patterns.matches_as_before(key, name)] or [name]
        for key in keys:  # PEFT sorted them in files, so that any of them may have been the first
            earlier = ranks.get(key, default[0]), alphas.get(key, default[1])
            if earlier != sizes:
                what = (
                    f"gives '{name}' rank {sizes[0]} and alpha {sizes[1]}, but rank {earlier[0]} and alpha "
                    f"{earlier[1]} in peft before 0.15, and the file does not state its peft_version"
                )
                how = (
                    'add "peft_version" if peft 0.15 or later wrote the file; otherwise write a pattern for each layer'
                )
                raise AdapterError(what, how, file=config.file, key=patterns.key)
