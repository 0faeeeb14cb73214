"""Bigger models: the section of a report on merges against them."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from recsys.page import table, tag
from recsys.studies.comparisons import JUDGED
from recsys.studies.config import RivalKind
from recsys.studies.findings import DEPENDENT, NAMES, RULE, claim, limits, opponent, plain, sentence, signed
from recsys.studies.pool import METRICS
from recsys.studies.rivals import Size

if TYPE_CHECKING:
    from recsys.studies.comparisons import Comparison
    from recsys.studies.merge_study import Results

BELOW = "\u2193"


def against_bigger(results: "Results") -> list[str]:
    """Sentences and tables of all comparisons, and the sizes of the models; nothing where there are none."""
    if not results.comparisons:
        return []
    kinds = dict.fromkeys(found.kind for found in results.comparisons)
    return [
        tag("h2", f"Merges of M seeds of {results.study.main} against one bigger {results.study.main}"),
        "<ul>" + "".join(f"<li><b>{kind}</b>: {escape(KINDS[kind])}</li>" for kind in kinds) + "</ul>",
        "<ul>" + "".join(tag("li", sentence(found)) for found in results.comparisons) + "</ul>",
        tag("p", limits(results.comparisons)),
        _comparisons(results.comparisons),
        f'<p class="note">{escape(RULE)} {escape(DEPENDENT)}</p>',
        f'<p class="note">{escape(COLUMNS)}</p>',
        tag("h3", "Sizes of these models"),
        _sizes(results.comparisons),
        f'<p class="note">{escape(SIZES)}</p>',
    ]


KINDS: dict[RivalKind, str] = {
    "wider": "M times the embedding dimension, so the merge's table bytes; hidden widths (and rank) fill its FLOPs",
    "deeper": "M times the embedding dimension and the layers; hidden widths (and rank) fill the merge's FLOPs",
    "bigger": "a member's own embedding dimension, so the tables of one member; hidden widths fill the merge's FLOPs. "
    "What one would build first, and cheaper in memory than the merge",
}


def _comparisons(comparisons: Sequence["Comparison"]) -> str:
    rows = []
    for found in comparisons:
        name = f"{found.size} x {found.backbone} - {opponent(found)}"
        ratios = f"{found.flops_ratio:.3f}", f"{found.table_bytes_ratio:.3f}"
        for metric in (JUDGED, *(name for name in METRICS if name != JUDGED)):
            values = plain(found.merged[metric]), plain(found.rival[metric]), signed(found.differences[metric])
            merges = _error(found.merge_errors[metric]) + ("*" if found.single_members else "")
            errors = merges, _error(found.rival_errors[metric]), _error(found.row_errors[metric])
            wins = f"{found.wins[metric]:.0%}"
            is_first = metric == JUDGED
            head = (name, *ratios) if is_first else ("", "", "")
            rows.append([*head, NAMES[metric], *values, *errors, wins, claim(found) if is_first else ""])
    return table(
        ["comparison", "FLOPs ratio", "table bytes ratio", "metric", "merge", "bigger model", "merge - model",
         "SE of merges", "SE of models", "SE over rows", "pairs won", "claim"],
        rows,
    )  # fmt: skip


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


COLUMNS = (
    "Ratios are the model's over the merge's: FLOPs are multiplications and additions in the matrix products of one "
    "row, of dense columns, backbone and head; elementwise work and the gathering of table rows are not counted. The "
    "three standard errors are the parts of that of the difference, whose squares add up. A star: fewer than 3 sets, "
    "so that the spread of single members stands for that of merges. Pairs won: of all pairs of a set and a model, "
    "those that the merge wins."
)
SIZES = (
    "With M times the table bytes most FLOPs go into the wider input (all layers that read the embeddings grow with "
    "it), so that hidden widths and ranks may fall below a member's own; an arrow marks where they did. A full-rank "
    "cross network gets a low rank there, because K x K weights for M times as many K would be beyond the budget. Such "
    "a model is narrow because its tables take the budget; `bigger` keeps a member's embedding dimension, and is not."
)


def _sizes(comparisons: Sequence["Comparison"]) -> str:
    member = comparisons[0].member_sizes
    shown = [
        name for name in member if any(of[name] is not None for of in (member, *(c.rival_sizes for c in comparisons)))
    ]
    rows = [
        [
            f"one {comparisons[0].backbone} (a member)",
            "",
            "",
            *(_size(name, member[name], member[name]) for name in shown),
        ]
    ]
    for found in comparisons:
        ratios = f"{found.flops_ratio:.3f}", f"{found.table_bytes_ratio:.3f}"
        sizes = (_size(name, found.rival_sizes[name], member[name]) for name in shown)
        rows.append([f"{found.kind}, at M = {found.size}", *ratios, *sizes])
    return table(["model", "FLOPs ratio", "table bytes ratio", *(name.replace("_", " ") for name in shown)], rows)


def _size(name: str, size: Size, of_member: Size) -> str:
    """A size, marked where it is below a member's; no rank is a full one, above all others."""
    if size is None:
        return "full" if name == "rank" else "none"
    widest = max(size) if isinstance(size, tuple) else size
    usual = max(of_member) if isinstance(of_member, tuple) else of_member
    text = "-".join(map(str, size)) if isinstance(size, tuple) else str(size)
    return text + (f" {BELOW}" if widest < (usual or 0) or (name == "rank" and usual is None) else "")
