"""One rank's share of the predictions on held-out rows, and metrics over all ranks' shares without gathering them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from recsys.config import InputError, nearest
from recsys.data.batch import Batch, to_device
from recsys.data.schema import Schema
from recsys.distributed import gather_to_first, mean_over_ranks, on_first
from recsys.merge.rules import FITTED, Merge
from recsys.metrics.click import ClickMetrics, ClickScores
from recsys.metrics.groups import Grouped, GroupedScores
from recsys.metrics.ranked import CHUNK_ROWS
from recsys.tasks.click import Outputs
from recsys.training.predictions import MERGED, Predictions, greedy_order, merge_for


@dataclass(frozen=True)
class Share:
    """Logits of this rank's rows of a split, in their order; those that fill up its last batches have weight 0."""

    names: tuple[str, ...]
    """Of the M members."""
    logits_NM: Tensor
    """float32, on the rank's device, as all of these."""
    labels_N: Tensor
    weights_N: Tensor
    ids_N: Tensor | None = None
    """Of the feature that rows are grouped by."""

    def gathered(self) -> Predictions | None:
        """Predictions of all ranks on rank 0, None on the others; all call it."""
        gathered = [gather_to_first(values) for values in (self.logits_NM, self.labels_N, self.weights_N)]
        if any(values is None for values in gathered):
            return None
        return Predictions.of_whole_split(
            self.names, *(values.cpu().numpy() for values in gathered if values is not None)
        )

    def metrics(self, merge: Merge) -> dict[str, ClickMetrics]:
        """Metrics of each member, and of all of them merged under the name `merged`, on all ranks; all call it.

        A rank holds, beside its share, 8 bytes a row for a member and 12 for the merge, whose logits are float64.
        """
        found = {}
        for name in (*self.names, MERGED):
            scores = ClickScores(np.float64 if name == MERGED else np.float32)
            for rows in self._parts():
                scores.add(
                    self._logits(name, rows, merge), self._numpy(self.labels_N, rows), self._numpy(self.weights_N, rows)
                )
            found[name] = scores.metrics(dist.group.WORLD)
        return found

    def grouped(self, merge: Merge) -> dict[str, Grouped]:
        """Metrics within the groups of rows that have the same id, of each member and the merge; all ranks call it."""
        assert self.ids_N is not None, "predicted without a feature to group by"
        found = {}
        for name in (*self.names, MERGED):
            scores = GroupedScores()
            for rows in self._parts():
                columns = (self._numpy(values, rows) for values in (self.labels_N, self.weights_N))
                scores.add(self._numpy(self.ids_N, rows), self._logits(name, rows, merge), *columns)
            found[name] = scores.metrics(dist.group.WORLD)
        return found

    def clicks(self) -> float:
        """How many rows of all ranks have label 1; all call it."""
        mine = ((self.labels_N > 0) & (self.weights_N > 0)).sum().double()
        return float(round(float(mean_over_ranks(mine)) * dist.get_world_size()))

    def _parts(self) -> Iterator[slice]:
        for begin in range(0, len(self.labels_N), CHUNK_ROWS):
            yield slice(begin, begin + CHUNK_ROWS)

    def _logits(self, name: str, rows: slice, merge: Merge) -> np.ndarray:
        if name == MERGED:
            logits: np.ndarray = merge(self.logits_NM[rows].double()).cpu().numpy()
            return logits
        return self._numpy(self.logits_NM[:, self.names.index(name)], rows)

    @staticmethod
    def _numpy(values: Tensor, rows: slice) -> np.ndarray:
        array: np.ndarray = values[rows].cpu().numpy()
        return array


@torch.no_grad()
def predict_share(
    task: nn.Module, names: Sequence[str], batches: Iterator[Batch], device: torch.device, by: str | None = None
) -> Share:
    """Run the task over this rank's batches; `by` is a one-hot feature whose ids are kept."""
    was_training = task.training
    task.eval()
    outputs: list[Outputs] = []
    ids: list[Tensor] = []
    for batch in to_device(batches, device):
        outputs.append(task(batch)[1])
        if by is not None:
            ids.append(batch.sparse[by].values())
    task.train(was_training)
    logits_NM, labels_N, weights_N = (
        torch.cat([getattr(output, name) for output in outputs]).float()
        for name in ("logits_BM", "labels_B", "weights_B")
    )
    return Share(tuple(names), logits_NM, labels_N, weights_N, torch.cat(ids) if ids else None)


@dataclass(frozen=True)
class Validation:
    """What validation rows say, on every rank."""

    metrics: dict[str, ClickMetrics]
    """Of each member and their merge."""
    merge: Merge
    order: list[str]
    """Members from the one to keep first to the one to drop first."""


def validate(share: Share, rule: str) -> Validation:
    """Make the merge of a rule, order the members, and score all of them; all ranks call it and get the same.

    Rank 0 gathers the logits where members must be weighed against one another: for a fitted rule, and to order two or
    more. One member alone is scored without that.

    Raises:
        InputError: the rule cannot be fitted on these rows.
    """
    if len(share.names) == 1 and rule not in FITTED:
        merge, order = Merge(rule=rule), list(share.names)
    else:
        predictions = share.gathered()

        def weigh() -> tuple[Merge, list[str]]:
            assert predictions is not None, "rank 0 has them"
            return merge_for(rule, predictions), greedy_order(predictions)

        merge, order = on_first(weigh)
    return Validation(share.metrics(merge), merge, order)


def with_groups(metrics: Mapping[str, ClickMetrics], grouped: Mapping[str, Grouped]) -> dict[str, ClickMetrics]:
    """Put each member's GAUC among its metrics."""
    return {name: replace(found, gauc=grouped[name].gauc) for name, found in metrics.items()}


def check_groups(by: str, schema: Schema, multi_hot: str) -> None:
    """See that rows can be grouped by a feature.

    Args:
        by: its name.
        schema: of the data.
        multi_hot: what the loader makes of ids, see LoaderConfig.

    Raises:
        InputError: there is no such feature, or its rows have other than one id below 2^31.
    """
    if by not in schema.sparse:
        raise InputError(f"--by {by}: no sparse feature of that name; {nearest(by, schema.sparse)}")
    if by in schema.raw:
        raise InputError(f"--by {by}: its ids are raw; rows can be grouped by features that have a vocabulary")
    if schema.hotness.get(by, 1) > 1 or multi_hot != "none":
        single = [name for name in schema.sparse if schema.hotness.get(name, 1) == 1 and multi_hot == "none"]
        remedy = f"those with one are {', '.join(single)}" if single else "no feature here has one"
        raise InputError(f"--by {by}: its rows have several ids; {remedy}")
