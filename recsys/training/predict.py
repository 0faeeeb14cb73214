"""Predict: logits of every member on held-out rows, each row exactly once, and their metrics."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from recsys.data.batch import Batch, to_device
from recsys.distributed import World, gather_to_first
from recsys.tasks.click import Outputs
from recsys.training.metrics import ClickMetrics, click_metrics

MERGED = "merged"


@dataclass(frozen=True)
class Predictions:
    """Logits of N held-out rows."""

    logits_NM: np.ndarray
    labels_N: np.ndarray
    weights_N: np.ndarray
    """How often each row counts; above 0."""


@torch.no_grad()
def predict(task: nn.Module, batches: Iterator[Batch], world: World) -> Predictions | None:
    """Run the task over this rank's batches; rank 0 gets the predictions of all ranks, the others None."""
    was_training = task.training
    task.eval()
    outputs: list[Outputs] = [task(batch)[1] for batch in to_device(batches, world.device)]
    task.train(was_training)
    gathered = [
        gather_to_first(torch.cat([getattr(output, name) for output in outputs]).float())
        for name in ("logits_BM", "labels_B", "weights_B")
    ]
    logits, labels, weights = gathered
    if logits is None or labels is None or weights is None:
        return None
    real = weights > 0
    return Predictions(*(values[real].cpu().numpy() for values in (logits, labels, weights)))


def member_metrics(
    predictions: Predictions, names: list[str], merge: Callable[[Tensor], Tensor]
) -> dict[str, ClickMetrics]:
    """Metrics of each member, and of all of them merged under the name `merged`."""
    logits = torch.from_numpy(predictions.logits_NM).double()
    columns = {name: logits[:, index] for index, name in enumerate(names)} | {MERGED: merge(logits)}
    return {
        name: click_metrics(predictions.labels_N, torch.sigmoid(logit).numpy(), predictions.weights_N)
        for name, logit in columns.items()
    }
