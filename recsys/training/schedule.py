"""Learning-rate schedules, as functions of the step alone."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Decay = Literal["constant", "linear", "cosine", "polynomial", "step"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A linear warm-up from 0 to 1, and what follows it.

    Let t go from 0 at the end of the warm-up to 1 after the last step. constant stays 1; linear is 1 - t, cosine
    (1 + cos(pi t)) / 2, polynomial (1 - t)^power; step is gamma^k after k of the milestones.
    """

    warmup_steps: int = 0
    decay: Decay = "constant"
    power: float = 2.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if not self.warmup_steps >= 0:
            raise ValueError(f"warmup_steps {self.warmup_steps} must not be negative")
        if not 0 < self.power < math.inf:
            raise ValueError(f"decay_power {self.power} must be a finite number above 0; 1 is linear")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"decay_gamma {self.gamma} must lie in [0, 1]")
        if any(one >= other for one, other in pairwise((0, *self.milestones))):
            raise ValueError(f"decay_milestones {self.milestones} must be steps above 0, and grow")
        if (self.decay == "step") != bool(self.milestones):
            raise ValueError(
                f"decay {self.decay} with decay_milestones {self.milestones}: decay step takes steps to fall at, such "
                "as 1000 2000, and the others none"
            )

    def factor(self, step: int, num_steps: int) -> float:
        """What a learning rate is multiplied by at `step` of `num_steps`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "step":
            return float(self.gamma ** sum(step >= milestone for milestone in self.milestones))
        left = 1.0 - (step - self.warmup_steps) / max(num_steps - self.warmup_steps, 1)
        if self.decay == "linear":
            return left
        if self.decay == "polynomial":
            return float(max(left, 0.0) ** self.power)
        return 0.5 * (1.0 + math.cos(math.pi * (1.0 - left))) if self.decay == "cosine" else 1.0
