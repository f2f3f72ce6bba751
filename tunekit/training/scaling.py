"""Loss scaling for float16: the scale grows after finite steps and halves after an overflow.

Source: Micikevicius et al. 2018, 3.2.
"""

from dataclasses import dataclass

from tunekit.errors import NumericsError

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL_STEPS = 2000


@dataclass
class LossScale:
    """The loss scale for float16. `scale` is a power of two, so that scaling and unscaling are exact. If `enabled` is
    false, losses are not scaled (`factor` is 1)."""

    enabled: bool = False
    scale: float = INITIAL_SCALE
    good_steps: int = 0
    skipped_steps: int = 0

    @property
    def factor(self) -> float:
        """The factor that multiplies the loss."""
        return self.scale if self.enabled else 1.0

    def update(self, finite: bool, step: int) -> None:
        """Double after GROWTH_INTERVAL_STEPS finite steps, halve after an overflow.

        Raises: NumericsError if the scale falls below 1, because then the gradients themselves are not finite.
        """
        if not self.enabled:
            return
        if finite:
            self.good_steps += 1
            if self.good_steps >= GROWTH_INTERVAL_STEPS:
                self.scale, self.good_steps = self.scale * 2.0, 0
            return
        self.scale, self.good_steps, self.skipped_steps = self.scale / 2.0, 0, self.skipped_steps + 1
        if self.scale < 1.0:
            how = "use model.dtype=bfloat16 or float32, or a smaller training.learning_rate"
            raise NumericsError(f"step {step}: gradients overflow in float16 even with the smallest loss scale", how)
