"""Findings: what the numbers of a merge study say, in sentences that a rule chooses."""

from typing import TYPE_CHECKING

from recsys.studies.estimates import Difference, Estimate
from recsys.studies.pool import METRICS

if TYPE_CHECKING:
    from recsys.studies.analysis import Comparison
    from recsys.studies.merge_study import Results

JUDGED = ("logloss", "auc")
"""Metrics that the claim is judged by."""
NAMES = {"auc": "AUC", "logloss": "logloss", "ne": "NE"}

RULE = (
    "Rule: the difference is the mean of the merges of M seeds (disjoint sets) minus the mean of the bigger models "
    "(one a seed), all on the same test rows; its standard error is that of training "
    "randomness, s sqrt(1 / sets + 1 / models), with s the spread of seeds, pooled over the backbone's single members "
    "and all its bigger models (merges spread less), and the 95 % interval is Student's with their degrees of freedom. "
    "The claim held where the interval lies on the merge's side of 0, is refuted where it lies on the other, and is "
    "not decided in between."
)
SHARED_ROWS = (
    "All sets are scored on one test split, so that every standard error over sets is that of training randomness "
    "(initial values, of members whose data comes in one order) alone: it does not say how much other test rows would "
    "change. Sets of one source and size have no member in common; those of different sizes do."
)


def verdict(results: "Results") -> str:
    """Whether the claim held on this data, in one sentence."""
    found = [comparison.verdicts[name] for comparison in results.comparisons for name in JUDGED]
    if not found:
        return "No bigger model was trained: the claim was not tested."
    held, refuted = found.count("held"), found.count("refuted")
    what = "At equal inference budget a merge is better than one bigger model"
    counts = f"{held} of {len(found)} comparisons held, {refuted} refuted, {len(found) - held - refuted} not decided"
    if held == len(found):
        return f"{what}: this held on this data ({counts})."
    if held and not refuted:
        return f"{what}: this held on this data in part ({counts})."
    if refuted and not held:
        return f"{what}: this did NOT hold on this data ({counts})."
    if held:
        return f"{what}: the evidence on this data is mixed ({counts})."
    return f"{what}: this data does not decide it ({counts})."


def sentence(found: "Comparison") -> str:
    """What one comparison says."""
    parts = []
    for name in JUDGED:
        wins = f"{found.wins[name]:.0%} of pairs"
        rows = f", ± {found.row_error:.5f} over rows" if name == "logloss" else ""
        parts.append(f"{NAMES[name]} {signed(found.differences[name])}{rows}, better in {wins}: {found.verdicts[name]}")
    num_sets, num_rivals = found.merged["auc"].count, found.rival["auc"].count
    return (
        f"{found.size} x {found.backbone} merged ({num_sets} sets) minus one {found.kind} {found.backbone} "
        f"({num_rivals} seeds; {found.flops_ratio:.3f} times the merge's FLOPs, {found.table_bytes_ratio:.3f} times "
        "its table bytes): " + "; ".join(parts)
    )


def growth(results: "Results") -> list[str]:
    """What each source of diversity gains at its largest M."""
    lines = []
    for source in dict.fromkeys(point.source for point in results.points):
        point = max((p for p in results.points if p.source == source), key=lambda p: p.size)
        if point.size > 1:
            gains = ", ".join(f"{NAMES[name]} {plain(point.over_mean[name], sign=True)}" for name in JUDGED)
            lines.append(f"{source}, M = {point.size}, sets: {point.num_sets}: gain over the mean member {gains}")
    return lines


def plain(found: Estimate, digits: int = 5, *, sign: bool = False) -> str:
    """A mean and its standard error."""
    mean = f"{found.mean:+.{digits}f}" if sign else f"{found.mean:.{digits}f}"
    return f"{mean} ± {found.standard_error:.{digits}f}" if found.standard_error is not None else mean


def signed(found: Difference, digits: int = 5) -> str:
    """A difference, its standard error and its interval."""
    if found.low is None or found.high is None:
        return f"{found.mean:+.{digits}f} (no standard error of one set)"
    interval = f"{found.low:+.{digits}f} to {found.high:+.{digits}f}"
    return f"{found.mean:+.{digits}f} ± {found.standard_error:.{digits}f} (95 %: {interval})"


def direction(metric: str) -> str:
    """Which way a metric is better."""
    return "higher is better" if METRICS[metric] > 0 else "lower is better"
