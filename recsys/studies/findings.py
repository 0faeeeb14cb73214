"""Findings: what the numbers of a merge study say, in sentences that a rule chooses."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from recsys.studies.comparisons import JUDGED
from recsys.studies.estimates import Difference, Estimate
from recsys.studies.pool import METRICS
from recsys.studies.sets import SEEDS

if TYPE_CHECKING:
    from recsys.studies.comparisons import Comparison
    from recsys.studies.merge_study import Results

SHOWN = ("logloss", "auc")
"""Metrics of sentences; tables have all."""
NORMAL_95 = 1.96
NAMES = {"auc": "AUC", "logloss": "logloss", "ne": "NE"}
CLAIM = "With the same FLOPs a merge of M members has a lower logloss than one bigger model"

RULE = (
    "Rule: the difference is the mean logloss of the merges of M seeds (disjoint sets) minus that of the bigger models "
    "(one a seed), all on the same test rows. Its error has three parts: how much merges vary with their seeds, how "
    "much models vary with theirs, and what other test rows would change (paired by row); each is estimated by itself, "
    "and the 95 % interval is Welch's. The claim held where the interval lies below 0, is refuted where it lies above, "
    "and is not decided where it has 0 in it, or where a model has fewer than 3 seeds. With fewer than 3 sets, the "
    "spread of single members stands for that of merges: too wide rather than too narrow. A model whose FLOPs are not "
    "within 10 % of the merge's takes no part. AUC and NE are reported beside, and decide nothing."
)
DEPENDENT = (
    "These comparisons are not independent evidence: merges of different M are made of the same members, all share the "
    "test rows, and logloss, NE and AUC are of the same predictions. Each interval is at 95 % by itself: where merges "
    "and models are in truth equally good, one or more of six comparisons is decided nevertheless in 16 to 34 % of "
    "studies (simulated), so that one decided comparison among many proves little."
)
SHARED_ROWS = (
    "All sets are scored on one test split, so that every standard error over sets is that of training randomness "
    "(initial values, of members whose data comes in one order) alone: it does not say how much other test rows would "
    "change. Sets of one source and size have no member in common; those of different sizes do."
)


def gain(results: "Results") -> str:
    """What merging gains over single members, at the most seeds of the first backbone; empty without a merge."""
    study = results.study
    source = f"{SEEDS} of {(study.more_seeds_of or study.backbones)[0]}"
    points = [point for point in results.points if point.source == source and point.size > 1]
    if not points:
        return ""
    point = max(points, key=lambda point: point.size)
    values = (
        f"{NAMES[name]} {point.merged[name].mean:.5f}, a gain of {plain(point.over_mean[name], sign=True)}"
        for name in SHOWN
    )
    sets = counted(point.num_sets, "set")
    return f"{point.size} {source} merged ({sets}): {'; '.join(values)} over their mean member."


def verdict(results: "Results") -> str:
    """Whether the claim held on this data, for models with the merge's table bytes and for those with a member's."""
    if not results.comparisons:
        return "No bigger model was trained: the claim was not tested."
    groups = {
        "with the merge's table bytes": [found for found in results.comparisons if found.kind != "bigger"],
        "with the tables of one member": [found for found in results.comparisons if found.kind == "bigger"],
    }
    told = [f"against models {which}, {_counted(group)}" for which, group in groups.items() if group]
    return f"{CLAIM}: " + "; ".join(told) + "."


def _counted(group: Sequence["Comparison"]) -> str:
    found = [comparison.verdict for comparison in group if comparison.verdict != "no part"]
    if not found:
        return "no comparison takes part"
    held, refuted = found.count("held"), found.count("refuted")
    undecided = len(found) - held - refuted
    counts = f"{held} held, {refuted} refuted, {undecided} not decided"
    if held == len(found):
        what = "this held on this data"
    elif held and not refuted:
        what = "this held on this data in part"
    elif refuted and not held:
        what = "this did NOT hold on this data"
    else:
        what = "the evidence on this data is mixed" if held else "this data does not decide it"
    return f"{what} ({counts} of {len(found)})"


def limits(comparisons: Sequence["Comparison"]) -> str:
    """What it would take to decide the undecided; empty where more seeds may do."""
    undecided = [found for found in comparisons if found.verdict == "not decided"]
    within = [c for c in undecided if abs(c.differences[JUDGED].mean) < NORMAL_95 * c.row_errors[JUDGED]]
    if not within:
        return ""
    return (
        f"In {len(within)} of the {counted(len(undecided), 'undecided comparison')} the error over test rows alone is "
        "wider than the difference: no number of seeds would decide them at differences like these, more test rows "
        "would."
    )


def claim(found: "Comparison") -> str:
    """A comparison's verdict, with the reason where it is not the interval."""
    return f"{found.verdict}: {found.reason}" if found.reason else found.verdict


def opponent(found: "Comparison") -> str:
    """What the merge is compared with."""
    return f"one {found.kind} {found.backbone}"


def sentence(found: "Comparison") -> str:
    """What one comparison says."""
    num_sets, num_rivals = found.merged[JUDGED].count, found.rival[JUDGED].count
    values = ", ".join(f"{NAMES[name]} {signed(found.differences[name])}" for name in SHOWN)
    return (
        f"{counted(num_sets, 'merge')} of {found.size} x {found.backbone} minus {opponent(found)} "
        f"({counted(num_rivals, 'seed')}, FLOPs x{found.flops_ratio:.2f}, table bytes x{found.table_bytes_ratio:.2f}): "
        f"{values}; lower logloss in {found.wins[JUDGED]:.0%} of pairs. {claim(found).capitalize()}."
    )


def growth(results: "Results") -> list[str]:
    """What each source of diversity gains at its largest M."""
    lines = []
    for source in dict.fromkeys(point.source for point in results.points):
        point = max((p for p in results.points if p.source == source), key=lambda p: p.size)
        if point.size > 1:
            gains = ", ".join(f"{NAMES[name]} {plain(point.over_mean[name], sign=True)}" for name in SHOWN)
            lines.append(
                f"{source}, M = {point.size} ({counted(point.num_sets, 'set')}): gain over the mean member {gains}"
            )
    return lines


def plain(found: Estimate, digits: int = 5, *, sign: bool = False) -> str:
    """A mean and its standard error."""
    mean = f"{found.mean:+.{digits}f}" if sign else f"{found.mean:.{digits}f}"
    return f"{mean} ± {found.standard_error:.{digits}f}" if found.standard_error is not None else mean


def signed(found: Difference, digits: int = 5) -> str:
    """A difference, its standard error and its interval."""
    mean = round(found.mean, digits) + 0.0  # never -0
    if found.low is None or found.high is None:
        return f"{mean:+.{digits}f} (too few for an interval)"
    interval = f"{found.low:+.{digits}f} to {found.high:+.{digits}f}"
    return f"{mean:+.{digits}f} ± {found.standard_error:.{digits}f} (95 %: {interval})"


def counted(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def direction(metric: str) -> str:
    """Which way a metric is better."""
    return "higher is better" if METRICS[metric] > 0 else "lower is better"
