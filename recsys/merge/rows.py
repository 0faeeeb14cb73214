"""Held-out rows, checked once and then read in chunks of float64, so that memory does not grow with their number.

N rows in all, C rows of a chunk, M members.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

CHUNK_NUMBERS = 2**22
"""Logits read at once: 32 MiB as float64. A pass holds about three times that."""


class Rows:
    """Logits, labels and weights of N rows; the logits stay in the precision that they came in.

    Args:
        logits_NM: finite logits of M members.
        labels_N: 0 or 1.
        weights_N: how often each row counts, 0 or more; once where left out.

    Raises:
        ValueError: shapes that do not fit, no rows, or a value out of range; a logit that is not finite with its
            member's index.
    """

    def __init__(self, logits_NM: Tensor, labels_N: Tensor, weights_N: Tensor | None = None) -> None:
        if logits_NM.ndim != 2 or 0 in logits_NM.shape:
            raise ValueError(f"logits are [rows, members], at least one of each; these are {list(logits_NM.shape)}")
        for name, values_N in (("labels", labels_N), ("weights", weights_N)):
            if values_N is not None and values_N.shape != logits_NM.shape[:1]:
                raise ValueError(f"{name} are {list(values_N.shape)}, not one for each of {len(logits_NM)} rows")
        self.logits_NM = logits_NM.detach()
        self.num_members = logits_NM.shape[1]
        self.labels_N = labels_N.detach().double()
        self.weights_N = torch.ones_like(self.labels_N) if weights_N is None else weights_N.detach().double()
        if not ((self.labels_N == 0) | (self.labels_N == 1)).all():
            raise ValueError("labels are 0 or 1; some are neither")
        if not (self.weights_N.isfinite() & (self.weights_N >= 0)).all():
            raise ValueError("weights are 0 or more and finite; some are not")
        self.total = self.weights_N.sum().item()
        if not self.total:
            raise ValueError("all weights are 0: no row counts")
        for logits_CM, _, _ in self.chunks():
            if not logits_CM.isfinite().all():
                member = logits_CM.isfinite().all(dim=0).int().argmin().item()
                raise ValueError(f"member {member} has logits that are not finite")

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Logits [C, M], labels [C] and shares [C] of all weight (so that a sum is a mean), in order of rows."""
        size = max(1, CHUNK_NUMBERS // self.num_members)
        for start in range(0, len(self.labels_N), size):
            rows = slice(start, start + size)
            yield self.logits_NM[rows].double(), self.labels_N[rows], self.weights_N[rows] / self.total

    def member_loglosses(self) -> Tensor:
        """Logloss of each member in nats [M]."""
        return torch.stack(
            [shares_C @ losses(logits_CM, labels_C) for logits_CM, labels_C, shares_C in self.chunks()]
        ).sum(0)


def losses(logits_CM: Tensor, labels_C: Tensor) -> Tensor:
    """Cross-entropy of every logit in nats [C, M], exact at any size: softplus would drop e^-z beyond z = 20."""
    return -logsigmoid(torch.where(labels_C.unsqueeze(1) > 0, logits_CM, -logits_CM))
