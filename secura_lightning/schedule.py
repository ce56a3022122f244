"""Learning-rate multipliers within one task."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from secura_lightning.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then a decay to the end of the task; it starts anew with every task.

    Attributes:
        kind: Shape after the warm-up.
        warmup: Part of a task's steps in which the rate rises linearly from 0.
        final: Multiplier at the task's end (``linear``, ``cosine``).
    """

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = 0.05
    final: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"model.schedule.warmup is {self.warmup}; give a part of the task in [0, 1)")
        if not 0 <= self.final <= 1:
            raise ConfigError(f"model.schedule.final is {self.final}; give a multiplier in [0, 1]")

    def multiplier(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by at ``step`` of ``total``."""
        rising = max(1, round(self.warmup * total)) if self.warmup > 0 else 0
        if step < rising:
            return (step + 1) / rising
        done = min(1.0, (step - rising) / max(1, total - rising))
        if self.kind == "constant":
            return 1.0
        fall = 0.5 * (1 + math.cos(math.pi * done)) if self.kind == "cosine" else 1 - done
        return self.final + (1 - self.final) * fall
