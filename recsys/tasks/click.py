"""The click task: weighted binary cross-entropy of every member."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from recsys.data.batch import Batch
from recsys.merge.rules import mean_logit
from recsys.model import RecModel


@dataclass
class Outputs:
    """What a forward pass leaves behind for metrics; nothing in it carries gradients."""

    losses_M: Tensor
    """Mean loss of each member over this rank's rows [M]."""
    logits_BM: Tensor
    labels_B: Tensor
    weights_B: Tensor


class ClickTask(nn.Module):
    """A model and its loss.

    Args:
        model: gives logits_BM.
        loss: "independent" sums the members' own losses, so that each gets the gradient that it would get alone;
            "joint" is the loss of their mean logit.
    """

    def __init__(self, model: RecModel, loss: Literal["independent", "joint"] = "independent") -> None:
        super().__init__()
        self.model = model
        self.loss = ClickLoss(loss)

    def forward(self, batch: Batch) -> tuple[Tensor, Outputs]:
        """Loss to differentiate (a scalar), and outputs."""
        return self.loss(self.model(batch), batch.labels, batch.weights)


class ClickLoss(nn.Module):
    """The loss alone, so that TorchRec's pipeline, which traces what stands above the tables, need not see into it."""

    def __init__(self, loss: Literal["independent", "joint"]) -> None:
        super().__init__()
        self.kind = loss

    def forward(self, logits_BM: Tensor, labels_B: Tensor, weights_B: Tensor) -> tuple[Tensor, Outputs]:
        """Mean over the rows of the batch of weight times cross-entropy."""
        logits_BM = logits_BM.float()
        losses_M = cross_entropy(logits_BM, labels_B, weights_B)
        if self.kind == "joint":
            loss = cross_entropy(mean_logit(logits_BM).unsqueeze(1), labels_B, weights_B).sum()
        else:
            loss = losses_M.sum()
        with torch.no_grad():
            outputs = Outputs(losses_M.detach(), logits_BM.detach(), labels_B, weights_B)
        return loss, outputs


def cross_entropy(logits_BM: Tensor, labels_B: Tensor, weights_B: Tensor) -> Tensor:
    """Weighted logloss of each column in nats [M], divided by the rows of the batch."""
    labels_BM = labels_B.unsqueeze(1).expand_as(logits_BM)
    losses_BM = functional.binary_cross_entropy_with_logits(logits_BM, labels_BM, reduction="none")
    return (losses_BM * weights_B.unsqueeze(1)).mean(dim=0)
