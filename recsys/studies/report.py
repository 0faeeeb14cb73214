"""The report of a merge study: one HTML file that holds its tables and pictures."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.studies.estimates import Estimate
from recsys.studies.findings import NAMES, RULE, SHARED_ROWS, direction, growth, plain, sentence, signed, verdict
from recsys.studies.pool import METRICS

if TYPE_CHECKING:
    from recsys.studies.analysis import Point
    from recsys.studies.merge_study import Results

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }}
h1 {{ font-size: 1.5em; }} h2 {{ font-size: 1.2em; margin-top: 2em; }}
.verdict {{ border-left: 4px solid #0072b2; padding: .6em 1em; background: #f3f7fb; font-size: 1.1em; }}
.note {{ color: #555; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2em .7em; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ border-bottom: 2px solid #999; }}
img {{ max-width: 100%; height: auto; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def html(results: "Results", figures: Mapping[str, Path]) -> str:
    """Write the page; `figures` are name to PNG file."""
    title = f"Merge study: {results.dataset}"
    parts = [
        _tag("h1", title),
        f'<p class="verdict">{escape(verdict(results))}</p>',
        _tag("p", _facts(results)),
        *_rivals(results),
        *_curves(results, figures),
        *_ablations(results),
        *_rules(results),
        *_greedy(results, figures),
        *_likeness(results, figures),
        *_jobs(results),
    ]
    return PAGE.format(title=escape(title), body="\n".join(parts))


def _facts(results: "Results") -> str:
    recipe = results.recipe
    length = f"{recipe.train.num_steps:,} steps" if recipe.train.num_steps else f"epochs: {recipe.train.num_epochs}"
    return (
        f"Schema {results.schema_hash}, {results.num_test_rows:,} test rows, validation click rate "
        f"{results.base_rate:.4f}. Every job was trained alike: batch {recipe.train.batch_size:,}, {length}, "
        f"{recipe.optimizer.tables} on tables at {recipe.optimizer.table_lr:g}, AdamW at "
        f"{recipe.optimizer.dense_lr:g}, embedding dimension {recipe.model.embedding_dim} of a member. Weights of "
        "fitted rules and the order of greedy selection come from the validation rows; everything shown is on the test "
        "rows. Learning rates are the recipe's for members and bigger models alike, and the study tunes neither. "
        + SHARED_ROWS
    )


def _rivals(results: "Results") -> list[str]:
    if not results.comparisons:
        return []
    rows = []
    for found in results.comparisons:
        for name in METRICS:
            row_error = f"{found.row_error:.5f}" if name == "logloss" else ""
            cells = [plain(found.merged[name]), plain(found.rival[name]), signed(found.differences[name]), row_error]
            budget = f"{found.flops_ratio:.3f}", f"{found.table_bytes_ratio:.3f}"
            kind = f"{found.size} x {found.backbone} - one {found.kind}"
            rows.append([kind, NAMES[name], *cells, f"{found.wins[name]:.0%}", *budget, found.verdicts[name]])
    head = ["comparison", "metric", "merge", "bigger model", "merge - model", "SE over rows", "pairs won"]
    return [
        _tag("h2", "A merge of M seeds against one model of M times the budget"),
        f'<p class="note">{escape(RULE)}</p>',
        "<ul>" + "".join(_tag("li", sentence(found)) for found in results.comparisons) + "</ul>",
        _table([*head, "FLOPs ratio", "table bytes ratio", "claim"], rows),
        f'<p class="note">{escape(BUDGET)}</p>',
    ]


BUDGET = (
    "Ratios are the model's over the merge's: FLOPs are multiplications and additions in the matrix products of one "
    "row, of dense columns, backbone and head; elementwise work and the gathering of table rows are not counted. The "
    "model has M times the embedding dimension; then its width is fitted to the budget, for the deeper one after its "
    "layers were multiplied by M. A full-rank cross network has a low rank there, because K x K weights for M times as "
    "many K would be beyond the budget. SE over rows: standard error of the difference in logloss over the test rows, "
    "paired by row: what another sample of rows would change. Pairs won: of all pairs of a set and a model, those that "
    "the merge wins."
)


def _curves(results: "Results", figures: Mapping[str, Path]) -> list[str]:
    rows = [
        [
            point.source,
            str(point.size),
            str(point.num_sets),
            f"{point.mflops:,.3f}",
            *(plain(point.merged[name]) for name in METRICS),
            *(_gain(point, gains, name) for gains in (point.over_mean, point.over_best) for name in ("auc", "logloss")),
        ]
        for point in results.points
    ]
    metrics = [f"{NAMES[name]} ({direction(name)})" for name in METRICS]
    gains = [f"gain over {whom}, {name}" for whom in ("mean member", "best member") for name in ("AUC", "logloss")]
    best = results.bayes_optimal
    bayes = f"Best possible (true probabilities): AUC {best.auc:.5f}, logloss {best.logloss:.5f}." if best else ""
    return [
        _tag("h2", "Merges against the number of members"),
        _picture("curves", figures),
        _picture("gains", figures),
        "<ul>" + "".join(_tag("li", line) for line in growth(results)) + "</ul>",
        f'<p class="note">{escape(SOURCES)} {escape(bayes)}</p>',
        _table(["source", "M", "sets", "MFLOPs a row", *metrics, *gains], rows),
    ]


def _gain(point: "Point", gains: Mapping[str, Estimate], name: str) -> str:
    return plain(gains[name], sign=True) if point.size > 1 else ""


SOURCES = (
    "Means over sets, with the standard error of the mean over sets where there are two or more. `seeds`: sets of one "
    "backbone, of all backbones, each with as many sets; `seeds of NAME`: all members of that backbone; `backbones`: "
    "sets of different backbones; `mixed`: sets drawn from the whole pool. Where sets differ in their backbones, so do "
    "their levels, and the gains, paired by set, are the sharper numbers. The best member is chosen on the test rows, "
    "which favours it."
)


def _ablations(results: "Results") -> list[str]:
    if not results.ablations:
        return []
    rows = [
        [
            {"shared": "shared tables", "joint": "joint loss"}.get(found.kind, found.kind),
            str(found.size),
            str(found.num_sets),
            f"{found.table_bytes_ratio:.2f}",
            NAMES[name],
            plain(found.together_members[name]),
            plain(found.together[name]),
            plain(found.alone_members[name]),
            plain(found.alone[name]),
            signed(found.differences[name]),
        ]
        for found in results.ablations
        for name in METRICS
    ]
    head = ["members trained", "M", "sets", "table bytes ratio", "metric", "together: mean member", "together: merged"]
    return [
        _tag("h2", "Independent members against members that are trained together"),
        _tag("p", "The same seeds, together in one job or each alone; differences are paired by set."),
        _table([*head, "alone: mean member", "alone: merged", "together - alone, merged"], rows),
    ]


def _rules(results: "Results") -> list[str]:
    rows = [
        [
            found.rule,
            *(plain(found.merged[name]) for name in METRICS),
            *(signed(found.over_mean_logit[name]) for name in ("auc", "logloss")),
        ]
        for found in results.rules
    ]
    if not rows:
        return []
    first = results.rules[0]
    head = ["rule", *(NAMES[name] for name in METRICS), "AUC - mean_logit", "logloss - mean_logit"]
    text = f"Sets of M = {first.size} backbones: {first.num_sets}; differences are paired by set."
    return [_tag("h2", "Merge rules"), _tag("p", text), _table(head, rows)]


def _greedy(results: "Results", figures: Mapping[str, Path]) -> list[str]:
    found = results.greedy
    chosen, all_of_them = found.test[found.num_chosen - 1], found.test[-1]
    rows = [
        [str(place + 1), member, f"{found.valid_loglosses[place]:.5f}", *(f"{scores[n]:.5f}" for n in METRICS)]
        for place, (member, scores) in enumerate(zip(found.members, found.test, strict=True))
    ]
    text = (
        f"Best on validation rows: the first {found.num_chosen}, with test AUC {chosen['auc']:.5f} and logloss "
        f"{chosen['logloss']:.5f}; all {len(found.members)} give {all_of_them['auc']:.5f} and "
        f"{all_of_them['logloss']:.5f}. One selection, so without a standard error."
    )
    head = ["taken", "member", "validation logloss", *(f"test {NAMES[name]}" for name in METRICS)]
    return [_tag("h2", "Greedy selection"), _tag("p", text), _picture("greedy", figures), _table(head, rows)]


def _likeness(results: "Results", figures: Mapping[str, Path]) -> list[str]:
    text = (
        "By the mean logit, the gain in logloss over the mean member equals the ambiguity, free of labels; what it is "
        "worth against the best member, and in AUC, is not given by it."
    )
    pictures = [_picture("correlations", figures), _picture("ambiguity", figures)]
    return [_tag("h2", "How much members differ"), _tag("p", text), *pictures]


def _jobs(results: "Results") -> list[str]:
    rows = [
        [
            f"{job.kind}/{job.name}",
            str(len(job.members)),
            f"{job.mflops:,.3f}",
            f"{job.table_bytes / 1e6:,.1f}",
            f"{job.parameters:,}",
            "" if job.seconds is None else f"{job.seconds:,.0f}",
            "" if job.rows_per_s is None else f"{job.rows_per_s:,.0f}",
            *(f"{job.test[name]:.5f}" for name in METRICS),
        ]
        for job in results.jobs
    ]
    total = sum(job.seconds or 0.0 for job in results.jobs)
    head = ["job", "members", "MFLOPs a row", "MB of tables", "dense parameters", "training s", "rows/s"]
    return [
        _tag("h2", "Jobs"),
        _tag("p", f"Training took {total / 3600:,.2f} hours in all, without validation and starts."),
        _table([*head, *(f"test {NAMES[name]}" for name in METRICS)], rows),
    ]


def _tag(name: str, text: str) -> str:
    return f"<{name}>{escape(text)}</{name}>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(name: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(_tag(name, cell) for cell in cells) + "</tr>"

    return '<div class="wide"><table>' + line("th", head) + "".join(line("td", row) for row in rows) + "</table></div>"


def _picture(name: str, figures: Mapping[str, Path]) -> str:
    data = base64.b64encode(figures[name].read_bytes()).decode()
    return f'<p><img alt="{name}" src="data:image/png;base64,{data}"></p>'
