"""Early stopping, and a word when members overfit after their first epoch."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from recsys.training.metrics import ClickMetrics
from recsys.training.predictions import MERGED


class EarlyStopping:
    """Looks at the merge's validation metrics one after the other.

    Args:
        patience: validations without a better NE, after which to stop.
        target_auc: the AUC at which to stop.
    """

    def __init__(self, patience: int | None, target_auc: float | None) -> None:
        self._patience, self._target_auc = patience, target_auc
        self._best, self._waited, self._auc = math.inf, 0, 0.0
        self._best_of_first_epoch = math.inf
        self._has_warned = False

    def see(self, metrics: Mapping[str, ClickMetrics], epoch: float) -> tuple[str | None, str | None]:
        """Take one validation; returns why to stop, and a warning, where there are any."""
        merged = metrics[MERGED]
        if merged.ne < self._best:
            self._best, self._waited = merged.ne, 0
        else:
            self._waited += 1
        self._auc = merged.auc
        return self.reason(), self._overfits(merged.ne, epoch)

    def reason(self) -> str | None:
        """Why to stop after the last validation, if so."""
        if self._target_auc is not None and self._auc >= self._target_auc:
            return f"AUC {self._auc:.5f} has reached --train.target-auc {self._target_auc}"
        if self._patience is not None and self._waited >= self._patience:
            return f"NE has not been below {self._best:.5f} for {self._waited} validations (--train.patience)"
        return None

    def state(self) -> Tensor:
        """What to save."""
        values = (self._best, self._waited, self._auc, self._best_of_first_epoch, self._has_warned)
        return torch.tensor([float(value) for value in values], dtype=torch.float64)

    def load_state(self, state: list[float]) -> None:
        """Go on from what was saved."""
        self._best, waited, self._auc, self._best_of_first_epoch, warned = state
        self._waited, self._has_warned = int(waited), bool(warned)

    def _overfits(self, ne: float, epoch: float) -> str | None:
        """The one-epoch phenomenon of CTR models (Zhang et al., CIKM 2022, arXiv 2209.06053)."""
        if epoch <= 1:
            self._best_of_first_epoch = min(self._best_of_first_epoch, ne)
            return None
        if self._has_warned or not ne > self._best_of_first_epoch:
            return None
        self._has_warned = True
        return (
            f"validation NE {ne:.5f} in epoch {math.ceil(epoch)} is above the {self._best_of_first_epoch:.5f} of the "
            "first: CTR models overfit as soon as they see rows again; try --train.num-epochs 1"
        )
