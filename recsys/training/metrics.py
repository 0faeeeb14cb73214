"""Metrics of the training predictions, each made before its row was learnt: progressive validation.

Blum, Kalai & Langford, "Beating the Hold-Out" (COLT 1999). They cost a small part of a step, wait for the device only
when they are read, and tell of drift without a pass over held-out rows. From the second epoch on, rows were learnt
before, and they say how well those are remembered.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from recsys.distributed import World
from recsys.metrics.click import ClickMetrics, auc, base_entropy, click_metrics, logloss
from recsys.metrics.histogram import BINS, area, bins_of
from recsys.tasks.click import Outputs

__all__ = ["ClickMetrics", "TrainingMetrics", "auc", "click_metrics", "logloss"]

KEPT_STEPS = 16
"""Outputs of so many steps are added up together: on a CPU, small operations cost more to start than to do."""


class TrainingMetrics:
    """Logloss, NE, AUC and calibration of each member, since the window began and since the first step.

    Everything is a sum over rows, in float64, so that it adds up over ranks and over restarts. AUC is that of a
    histogram of the logits in 65,536 bins; it is off by at most `auc_error`. A rank's rows of a step at which some
    member's loss is not finite count nowhere.

    Args:
        members: names.
        device: of the outputs.
    """

    def __init__(self, members: Sequence[str], device: torch.device) -> None:
        self._members = tuple(members)
        # Weight, and weight times label; of each member weight times loss, and weight times prediction; of each member
        # the weight of negative and of positive rows by bin.
        self._num_sums = 2 + 2 * len(members)
        size = self._num_sums + len(members) * 2 * BINS
        self._own, self._window, self._before = (
            torch.zeros(size, dtype=torch.float64, device=device) for _ in range(3)
        )
        self._kept: list[Outputs] = []
        self._steps = 0

    def update(self, outputs: Outputs) -> None:
        """Take the outputs of a step."""
        self._kept.append(outputs)
        self._steps += 1
        if len(self._kept) == KEPT_STEPS:
            self._add_kept()

    def window(self, world: World) -> dict[str, dict[str, float]]:
        """Metrics of each member over all ranks' rows of this window, which ends; all ranks call it."""
        self._reduce(world)
        found = self._metrics(self._window)
        self._before += self._window
        self._window.zero_()
        return found

    def lifetime(self, world: World) -> dict[str, dict[str, float]]:
        """Metrics of each member over all ranks' rows since the first step; all ranks call it."""
        self._reduce(world)
        return self._metrics(self._before + self._window)

    def state(self, world: World) -> dict[str, Tensor]:
        """What a checkpoint keeps, the same on all ranks; all call it. 1 MiB a member for each of the two."""
        self._reduce(world)
        return {"before": self._before.clone(), "window": self._window.clone()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state, on as many ranks as there are."""
        self._before.copy_(state["before"])
        self._window.copy_(state["window"])
        self._own.zero_()
        self._kept, self._steps = [], 0

    def _add_kept(self) -> None:
        logits_BM, labels_B, weights_B = (
            torch.cat([getattr(outputs, name) for outputs in self._kept])
            for name in ("logits_BM", "labels_B", "weights_B")
        )
        rows_S = torch.tensor([len(outputs.labels_B) for outputs in self._kept], device=logits_BM.device)
        losses_SM = torch.stack([outputs.losses_M for outputs in self._kept]).double()
        counts_S = losses_SM.isfinite().all(dim=1)
        wide_B = weights_B.double() * counts_S.repeat_interleave(rows_S, output_size=len(labels_B))
        of_rows = torch.stack([wide_B.sum(), wide_B @ labels_B.double()])
        losses_M = rows_S.double() @ losses_SM.where(counts_S.unsqueeze(1), 0.0)
        predicted_M = wide_B @ logits_BM.double().sigmoid().nan_to_num(0.0)
        self._own[: self._num_sums] += torch.cat([of_rows, losses_M, predicted_M])
        num_members = len(self._members)
        first_M = torch.arange(num_members, device=logits_BM.device) * (2 * BINS)
        places_BM = bins_of(logits_BM) + first_M + (labels_B > 0).unsqueeze(1) * BINS
        many_BM = wide_B.unsqueeze(1).expand(-1, num_members)
        self._own[self._num_sums :].index_add_(0, places_BM.reshape(-1), many_BM.reshape(-1))
        self._kept.clear()

    def _reduce(self, world: World) -> None:
        """Bring what this rank alone has seen into the window of all."""
        if not self._steps:  # ranks step together
            return
        if self._kept:
            self._add_kept()
        if world.size > 1:
            dist.all_reduce(self._own)
        self._window += self._own
        self._own.zero_()
        self._steps = 0

    def _metrics(self, totals: Tensor) -> dict[str, dict[str, float]]:
        weight, clicks, *of_members = totals[: self._num_sums].tolist()
        if not weight:
            return {}
        num_members, rate = len(self._members), clicks / weight
        bins_M2K = totals[self._num_sums :].view(num_members, 2, BINS)
        found = {}
        for index, name in enumerate(self._members):
            loss, predicted = of_members[index] / weight, of_members[num_members + index]
            area_, error = area(bins_M2K[index])
            found[name] = {
                "logloss": loss,
                "ne": loss / base_entropy(rate) if 0 < rate < 1 else float("nan"),
                "auc": area_,
                "auc_error": error,
                "calibration": predicted / clicks if clicks else float("inf"),
            }
        return found
