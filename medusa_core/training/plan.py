"""How heads are trained, and how far a run has come."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from medusa_core.errors import ConfigError
from medusa_core.model.sequential_heads import HeadsShape
from medusa_core.training.losses import LossWeights
from medusa_core.training.tuned_base import JointPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """How heads are trained. An update takes `rows_per_update` rows, one after the other, whatever the memory.

    learning_rate: the highest, after `warmup_share` of all updates; it then falls to 0 along a cosine.
    ema_decay: of the moving average over updates that is exported; 0 exports the last update's heads. Update n counts with at least
        9 / (10 + n), so that the average of a short run is not that of its beginning.
    joint: what follows the `epochs` in which heads learn alone; None for Medusa-1.
    """

    shape: HeadsShape = field(default_factory=HeadsShape)
    epochs: int = 2
    rows_per_update: int = 8
    learning_rate: float = 1e-3
    warmup_share: float = 0.05
    ema_decay: float = 0.99
    seed: int = 0
    loss: LossWeights = field(default_factory=LossWeights)
    joint: JointPlan | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "rows_per_update"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not (0.0 < self.learning_rate < math.inf and 0.0 <= self.warmup_share < 1.0 and 0.0 <= self.ema_decay < 1.0):
            raise ConfigError("learning_rate must be a positive number, warmup_share and ema_decay in [0, 1).")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """After an update. loss: of the update's rows. num_tokens: of all rows so far, padding included. seconds: since the run was
    started, or gone on with."""

    update: int
    num_updates: int
    loss: float
    learning_rate: float
    num_tokens: int
    seconds: float
