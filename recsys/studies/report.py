"""The report of a merge study: one HTML file that holds its tables and pictures."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.page import PAGE, picture, table, tag
from recsys.studies.bigger_models import against_bigger
from recsys.studies.estimates import Estimate
from recsys.studies.findings import NAMES, SHARED_ROWS, counted, direction, gain, growth, plain, signed, verdict
from recsys.studies.pool import METRICS

if TYPE_CHECKING:
    from recsys.studies.analysis import Point
    from recsys.studies.merge_study import Results


def html(results: "Results", figures: Mapping[str, Path]) -> str:
    """Write the page; `figures` are name to PNG file."""
    title = f"Merge study: {results.title}"
    parts = [
        tag("h1", title),
        tag("p", _question(results)),
        f'<p class="verdict">{"<br>".join(escape(line) for line in (gain(results), verdict(results)) if line)}</p>',
        tag("p", _facts(results)),
        *against_bigger(results),
        *_curves(results, figures),
        *_ablations(results),
        *_rules(results),
        *_greedy(results, figures),
        *_likeness(results, figures),
        *_jobs(results),
    ]
    return PAGE.format(title=escape(title), body="\n".join(parts))


def _question(results: "Results") -> str:
    backbones = results.study.backbones
    which = backbones[0] if len(backbones) == 1 else f"{', '.join(backbones[:-1])} and {backbones[-1]}"
    num_members = sum(map(results.study.num_seeds, backbones))
    return (
        f"A merge averages the logits of M members: click models that were trained alone, each with its own tables. "
        f"This study trained {num_members} members of {which}, merged them in sets, and asks what that gains, and "
        "whether one bigger model with the same FLOPs a row would have done as well. Lower logloss, and higher AUC, "
        "are better."
    )


def _facts(results: "Results") -> str:
    recipe, data = results.recipe, results.study.data or results.recipe.data
    length = f"{recipe.train.num_steps:,} steps" if recipe.train.num_steps else f"epochs: {recipe.train.num_epochs}"
    made = "a synthetic log whose true probabilities are known, " if results.study.truth else ""
    return (
        f"Data: {results.dataset} in {data} (schema {results.schema_hash}), {made}{results.num_test_rows:,} test rows, "
        f"validation click rate {results.base_rate:.4f}. Every job was trained alike: batch "
        f"{recipe.train.batch_size:,}, {length}, {recipe.optimizer.tables} on tables at {recipe.optimizer.table_lr:g}, "
        f"AdamW at {recipe.optimizer.dense_lr:g}, embedding dimension {recipe.model.embedding_dim} of a member. "
        "Learning rates are the recipe's for members and bigger models alike; the study tunes neither. Weights of "
        "fitted rules and the order of greedy selection come from the validation rows; everything shown is on the test "
        "rows. " + SHARED_ROWS
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
        tag("h2", "Merges against the number of members"),
        picture("curves", figures),
        picture("gains", figures),
        "<ul>" + "".join(tag("li", line) for line in growth(results)) + "</ul>",
        f'<p class="note">{escape(SOURCES)} {escape(bayes)}</p>',
        table(["source", "M", "sets", "MFLOPs a row", *metrics, *gains], rows),
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
        tag("h2", "Independent members against members that are trained together"),
        tag("p", "The same seeds, together in one job or each alone; differences are paired by set."),
        table([*head, "alone: mean member", "alone: merged", "together - alone, merged"], rows),
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
    text = f"{counted(first.num_sets, 'set')} of M = {first.size} backbones; differences are paired by set."
    return [tag("h2", "Merge rules"), tag("p", text), table(head, rows)]


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
    return [tag("h2", "Greedy selection"), tag("p", text), picture("greedy", figures), table(head, rows)]


def _likeness(results: "Results", figures: Mapping[str, Path]) -> list[str]:
    text = (
        "By the mean logit, the gain in logloss over the mean member equals the ambiguity, free of labels; what it is "
        "worth against the best member, and in AUC, is not given by it."
    )
    pictures = [picture("correlations", figures), picture("ambiguity", figures)]
    return [tag("h2", "How much members differ"), tag("p", text), *pictures]


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
        tag("h2", "Jobs"),
        tag("p", f"Training took {total / 3600:,.2f} hours in all, without validation and starts."),
        table([*head, *(f"test {NAMES[name]}" for name in METRICS)], rows),
    ]
