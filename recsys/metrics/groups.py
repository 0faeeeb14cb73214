"""Metrics within groups of rows, such as users: GAUC, and what each of the largest groups is worth."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from recsys.metrics.click import NAN, ClickMetrics, base_entropy, cross_entropy
from recsys.metrics.ranked import NEGATIVE, POSITIVE, ROWS, Bucket, RankedRows

SEGMENTS = 20
"""Groups whose own metrics are given, the largest by weight."""

PAIRS, OF_POSITIVE, OF_NEGATIVE, OF_ROWS, LOSS, PREDICTED = range(6)
"""Columns of a group's line: pairs in the right order, weight of positive and negative rows, rows, and weighted sums of
losses and predictions."""
Line = np.ndarray


@dataclass(frozen=True)
class Grouped:
    """Metrics within groups."""

    gauc: float
    """Mean of the groups' AUC, each by its weight; nan where no group has both labels."""
    share: float
    """Of the weight of all rows, what lies in groups with both labels, which alone count."""
    num_groups: int
    segments: dict[int, ClickMetrics]
    """Of the largest groups, by their id, the largest first."""


class GroupedScores:
    """Rows of groups, with logits that are compared as float32: 12 bytes each.

    GAUC = sum_g w_g AUC_g / sum_g w_g over groups g with clicks and without, where w_g is the weight of a group's rows
    (its impressions): Zhu et al., "Optimized Cost per Click in Taobao Display Advertising" (KDD 2017), and Zhou et al.,
    "Deep Interest Network" (KDD 2018), equation 11.
    """

    def __init__(self) -> None:
        self._rows = RankedRows(np.uint64)
        self._num_nan = 0

    def add(self, ids: np.ndarray, logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> "GroupedScores":
        """Take rows; ids lie in [0, 2^31), labels are 0 or 1. Returns this object."""
        sane = ~np.isnan(logits)
        self._num_nan += int((~sane & (weights > 0)).sum())
        keys = ids[sane].astype(np.uint64) << np.uint64(32) | _ordered(logits[sane].astype(np.float32))
        self._rows.add(keys, labels[sane], weights[sane])
        return self

    def metrics(self, group: dist.ProcessGroup | None = None) -> Grouped:
        """Metrics of the rows of all ranks of a group, who all call it; without one, of this process."""
        sums = np.zeros(5)
        """Of groups with both labels: weight times AUC, and weight; weight of all; groups; rows whose logit is nan."""
        edges: list[tuple[int, int, Line]] = []
        largest: list[tuple[int, Line]] = []
        for bucket in self._rows.buckets(group):
            ids, lines = _lines(bucket)
            # The first and the last group of a bucket may have rows in others.
            inside = slice(1, max(len(ids) - 1, 1))
            edges += [(int(ids[at]), bucket.index, lines[at].copy()) for at in sorted({0, len(ids) - 1}) if len(ids)]
            sums[:4] += _added(lines[inside])
            largest = _largest([*largest, *_heaviest(ids[inside], lines[inside])])
        sums[4] = self._num_nan
        if group:
            dist.all_reduce(torch.from_numpy(sums), group=group)
            everyone: list = [None] * dist.get_world_size(group)
            dist.all_gather_object(everyone, (edges, largest), group)
            edges = [edge for each, _ in everyone for edge in each]
            largest = [line for _, each in everyone for line in each]
        joined = _joined(edges)
        sums[:4] += _added(np.array([line for _, line in joined]).reshape(-1, PREDICTED + 1))
        right, counted, total, num_groups, num_nan = sums
        if num_nan:
            return Grouped(NAN, NAN, round(num_groups), {})
        segments = {id_: _segment(line) for id_, line in _largest([*largest, *joined])}
        gauc = float(right / counted) if counted else NAN
        return Grouped(gauc, float(counted / total) if total else NAN, round(num_groups), segments)


def _ordered(values: np.ndarray) -> np.ndarray:
    """Map float32 to uint64 below 2^32 that compare alike."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0 and 0 are equal
    flipped = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))
    return flipped.astype(np.uint64)


def _values(keys: np.ndarray) -> np.ndarray:
    """Logits of keys, in float64."""
    flipped = (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    bits = np.where(flipped >> 31, flipped & np.uint32(0x7FFFFFFF), ~flipped)
    return bits.view(np.float32).astype(np.float64)


def _lines(bucket: Bucket) -> tuple[np.ndarray, np.ndarray]:
    """Ids [I] of the groups in a bucket, rising, and a line for each [I, 6]."""
    ids_G = bucket.keys_G >> np.uint64(32)
    if not len(ids_G):
        return ids_G, np.empty((0, PREDICTED + 1))
    first = np.flatnonzero(np.concatenate([[True], ids_G[1:] != ids_G[:-1]]))
    positive_G, negative_G = bucket.sums_G5[:, POSITIVE], bucket.sums_G5[:, NEGATIVE]
    before_G = np.cumsum(negative_G) - negative_G
    lower_G = before_G - np.repeat(before_G[first], np.diff([*first, len(ids_G)]))
    p_G = torch.from_numpy(_values(bucket.keys_G)).sigmoid().numpy()
    one_G, zero_G = (cross_entropy(np.full_like(p_G, label), p_G) for label in (1.0, 0.0))
    columns = [
        positive_G * (lower_G + negative_G / 2),
        positive_G,
        negative_G,
        bucket.sums_G5[:, ROWS],
        positive_G * one_G + negative_G * zero_G,
        (positive_G + negative_G) * p_G,
    ]
    return ids_G[first], np.add.reduceat(np.stack(columns, axis=1), first, axis=0)


def _joined(edges: list[tuple[int, int, Line]]) -> list[tuple[int, Line]]:
    """Put together what buckets hold of the same groups, whose higher buckets have the higher scores."""
    found: dict[int, Line] = {}
    for id_, _, line in sorted(edges, key=lambda edge: edge[:2]):
        if id_ in found:
            lower = found[id_]
            found[id_] = lower + line
            found[id_][PAIRS] += line[OF_POSITIVE] * lower[OF_NEGATIVE]
        else:
            found[id_] = line
    return list(found.items())


def _added(lines: np.ndarray) -> np.ndarray:
    """Of groups with both labels, weight times AUC and weight; weight of all; groups."""
    pairs = lines[:, OF_POSITIVE] * lines[:, OF_NEGATIVE]
    weights = lines[:, OF_POSITIVE] + lines[:, OF_NEGATIVE]
    both = pairs > 0
    right = (weights[both] * lines[both, PAIRS] / pairs[both]).sum()
    return np.array([right, weights[both].sum(), weights.sum(), len(lines)])


def _largest(lines: list[tuple[int, Line]]) -> list[tuple[int, Line]]:
    return sorted(lines, key=lambda item: (-item[1][OF_POSITIVE] - item[1][OF_NEGATIVE], item[0]))[:SEGMENTS]


def _heaviest(ids: np.ndarray, lines: np.ndarray) -> list[tuple[int, Line]]:
    """The largest of many groups, with copies of their lines: a view would keep all of them."""
    weights = lines[:, OF_POSITIVE] + lines[:, OF_NEGATIVE]
    if len(ids) > SEGMENTS:  # and those that weigh as much as the last of them, between which ids decide
        kept = np.flatnonzero(weights >= np.partition(weights, -SEGMENTS)[-SEGMENTS])
        kept = kept[np.lexsort((ids[kept], -weights[kept]))[:SEGMENTS]]
        ids, lines = ids[kept], lines[kept]
    return [(int(id_), line.copy()) for id_, line in zip(ids, lines, strict=True)]


def _segment(line: Line) -> ClickMetrics:
    pairs, positive, negative, rows, loss, predicted = line.tolist()
    total, products = positive + negative, positive * negative
    return ClickMetrics(
        auc=pairs / products if products else NAN,
        logloss=loss / total,
        ne=loss / total / base_entropy(positive / total) if products else NAN,
        calibration=predicted / positive if positive else float("inf"),
        num_rows=round(rows),
    )
