"""A synthetic Criteo-format click log whose true click probabilities are known."""

# ruff: noqa: PLC0415  (numpy, polars and scikit-learn load where they are used: `recsys synth --help` answers at once)
from __future__ import annotations

import gzip
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.config import InputError

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ids = NDArray[np.int64]

CHUNK_ROWS = 2**16

# Distinct values of C1..C26 in the Criteo Kaggle log; `num_ids` caps them.
CRITEO_DOMAINS = (
    *(1461, 584, 10131227, 2202608, 306, 24, 12518, 634, 4, 93146, 5684, 8351593, 3195),
    *(28, 14993, 5461306, 11, 5653, 2173, 4, 7046547, 18, 16, 286181, 105, 142572),
)
CATEGORY_MISSING = dict.fromkeys((3, 4, 12, 16, 21, 24), 0.03) | dict.fromkeys((19, 20, 25, 26), 0.44)
CATEGORY_MISSING |= {6: 0.12, 22: 0.76}

# I1..I13: mean and standard deviation of log(1 + value), share of missing values; medians as in the Criteo Kaggle log.
INTEGERS = (
    *((0.8, 1.1, 0.45), (1.5, 2.2, 0.0), (2.0, 1.5, 0.21), (1.6, 1.0, 0.22), (7.9, 1.9, 0.03), (3.5, 1.6, 0.22)),
    *((1.4, 1.6, 0.04), (2.1, 1.0, 0.001), (3.6, 1.5, 0.04), (0.4, 0.6, 0.45), (0.9, 0.9, 0.04), (0.4, 0.9, 0.76)),
    (1.7, 1.1, 0.22),
)
NEGATIVE_INTEGER = 2  # Criteo's I2 alone goes below zero, to -3.

ZIPF_EXPONENT = 1.1
# An id seen in this share of the rows carries half of the weight drawn for it, a rarer one less: what is too rare to be
# learnt has little to teach, so that 300k rows suffice and mapping rare ids to one loses little.
HALF_WEIGHT_SHARE = 3e-3
LATENT_RANK = 2
# Pairs of categories that interact: a small domain with a larger one, so that 300k rows show most combinations.
PAIRS = ((1, 17), (2, 14), (5, 23), (6, 10), (9, 13), (7, 17))
MIXED = (5, 14)  # The slope of log I5 depends on C14.
# Standard deviation over the rows of each group of terms of the logit: categories, integers, PAIRS, MIXED.
STRENGTHS = (1.15, 0.6, 0.35, 0.25)

TABLES, EFFECTS, CALIBRATION, ROWS = range(4)  # The random streams of a seed.


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """What `synthesize` writes. The same config gives the same bytes; a shorter log is the head of a longer one."""

    out: Path
    """The log to write, gzip-compressed if its name ends in .gz; OUT.truth.parquet appears beside it."""
    num_rows: int = 300_000
    """Rows of the log."""
    seed: int = 0
    """Seed of the click model and of the rows."""
    num_ids: int = 20_000
    """Ids of the largest category; categories that are smaller in Criteo's log keep their size."""
    ctr: float = 0.25
    """Mean click probability."""

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ValueError(f"num_rows is {self.num_rows}; a log needs at least 1 row")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give an integer from 0 up")
        if not 4 <= self.num_ids <= max(CRITEO_DOMAINS):
            raise ValueError(f"num_ids is {self.num_ids}; give 4 to {max(CRITEO_DOMAINS)} (Criteo's largest category)")
        if not 0 < self.ctr < 1:
            raise ValueError(f"ctr is {self.ctr}; a probability strictly between 0 and 1 works, such as 0.25")

    @property
    def truth(self) -> Path:
        """The Parquet file of labels and true probabilities, one row a row of the log."""
        return self.out.with_name(f"{self.out.name}.truth.parquet")


@dataclass(frozen=True, kw_only=True)
class SynthSummary:
    """What was written, and what no model can beat on it (up to chance): the true probabilities as predictions."""

    rows: int
    """Rows of the log."""
    ctr: float
    """Share of clicks among the labels."""
    bayes_auc: float
    """Area under the ROC curve; nan where all labels are equal."""
    bayes_logloss: float
    """Mean negative log-likelihood, in nats."""
    bayes_ne: float
    """Normalised entropy: the log loss over the entropy of `ctr`; nan where all labels are equal."""


def synthesize(config: SynthConfig, progress: Callable[[int], None] | None = None) -> SynthSummary:
    """Write the log and its truth; both appear under their names only once they are complete.

    The truth has columns label (uint8) and probability (float64). Memory holds one chunk, the tables of the click
    model (about 100 bytes an id) and 9 bytes a row for the summary.

    Args:
        config: what to write.
        progress: called after each chunk with the rows just written.

    Raises:
        InputError: a file of either name exists, or the folder cannot be written.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in (config.out, config.truth):
        if path.exists():
            raise InputError(f"{path}: exists already; remove it or give --out another name")
    model = ClickModel(seed=config.seed, num_ids=config.num_ids, ctr=config.ctr)
    labels, probabilities = np.empty(config.num_rows, np.uint8), np.empty(config.num_rows, np.float64)
    schema = pa.schema({"label": pa.uint8(), "probability": pa.float64()})
    try:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        with (
            _renamed_when_done(config.truth, config.out) as (truth_path, log_path),
            _open_log(log_path, compress=config.out.suffix == ".gz") as log,
            pq.ParquetWriter(truth_path, schema) as truth,
        ):
            for start in range(0, config.num_rows, CHUNK_ROWS):
                rows = slice(start, min(start + CHUNK_ROWS, config.num_rows))
                frame, probability = model.rows(start // CHUNK_ROWS, rows.stop - start)
                labels[rows], probabilities[rows] = frame["label"].to_numpy(), probability
                log.write(frame.write_csv(include_header=False, separator="\t", quote_style="never").encode())
                truth.write_table(pa.table([labels[rows], probabilities[rows]], schema=schema))
                if progress:
                    progress(len(probability))
    except OSError as error:
        raise InputError(f"{config.out}: cannot write it ({error}); give --out a folder with room for it") from error
    return _summary(labels, probabilities)


class ClickModel:
    """A planted click model over Zipf-distributed categories and heavy-tailed integers.

    logit = bias + sum_f w_f(id_f) + sum_j e_j(I_j) + sum_(f,g in PAIRS) <u_f(id_f), u_g(id_g)> + x_j s_f(id_f), where
    x_j standardises log(1 + I_j), e_j is a parabola in x_j, (j, f) = MIXED in the last term, and each of the four
    groups is scaled to its STRENGTHS. Fields are independent and w, u, s have mean zero over the rows, so the pairs
    say nothing about single fields. Index 0 of a table is a missing value, index r the id of rank r; integers hold NaN
    where missing.
    """

    def __init__(self, *, seed: int, num_ids: int, ctr: float) -> None:
        import numpy as np

        self.seed = seed
        sizes = enumerate(np.minimum(CRITEO_DOMAINS, num_ids).tolist(), start=1)
        self.fields = [CategoryField(seed=seed, field=field, num_ids=size) for field, size in sizes]
        # Of each integer: slope and curvature in its standardised logarithm, weight when missing.
        self.effects = np.random.default_rng([seed, EFFECTS]).normal(size=(3, len(INTEGERS)))
        self.effects[1] *= 0.5
        terms = self.terms(*self.draw(np.random.default_rng([seed, CALIBRATION])))
        self.scales: Floats = np.array(STRENGTHS) / terms.std(axis=1)
        self.bias = _solve_bias(self.scales @ terms, ctr)

    def draw(self, rng: np.random.Generator) -> tuple[Ids, Floats]:
        """Draw CHUNK_ROWS rows: ids [26, CHUNK_ROWS] and integers [13, CHUNK_ROWS]."""
        import numpy as np

        ids = np.stack([field.draw(rng) for field in self.fields])
        integers = np.empty((len(INTEGERS), CHUNK_ROWS))
        for j, (mean, std, missing) in enumerate(INTEGERS):
            log_value = rng.normal(mean, std, CHUNK_ROWS)
            integers[j] = np.floor(np.expm1(np.maximum(log_value, 0.0)))
            if j + 1 == NEGATIVE_INTEGER:
                integers[j] += np.clip(np.ceil(log_value), -3.0, 0.0)
            integers[j, rng.random(CHUNK_ROWS) < missing] = np.nan
        return ids, integers

    def terms(self, ids: Ids, integers: Floats) -> Floats:
        """Sum the groups of terms of the logit, before scaling: [4, rows] in the order of STRENGTHS."""
        import numpy as np

        means, stds, _ = np.array(INTEGERS).T[:, :, None]
        x = np.clip((np.log1p(np.maximum(integers, 0.0)) - means) / stds, -3.0, 3.0)
        slope, curvature, when_missing = self.effects[:, :, None]
        latents = {f: self.fields[f - 1].latents[ids[f - 1]] for f in {f for pair in PAIRS for f in pair}}
        integer, category = MIXED
        groups = (
            np.sum([field.weights[row] for field, row in zip(self.fields, ids, strict=True)], axis=0),
            np.where(np.isnan(x), when_missing, x * (slope + curvature * x)).sum(axis=0),
            np.sum([np.einsum("rk,rk->r", latents[f], latents[g]) for f, g in PAIRS], axis=0),
            np.nan_to_num(x[integer - 1]) * self.fields[category - 1].slopes[ids[category - 1]],
        )
        return np.stack(groups)

    def rows(self, chunk: int, num_rows: int) -> tuple[pl.DataFrame, Floats]:
        """Make the first rows of a chunk: label, I1..I13, C1..C26, and beside them the true probabilities."""
        import numpy as np
        import polars as pl

        # All of the chunk is drawn even when fewer rows are wanted, so that a shorter log is the head of a longer one.
        rng = np.random.default_rng([self.seed, ROWS, chunk])
        ids, integers = self.draw(rng)
        ids, integers, uniform = ids[:, :num_rows], integers[:, :num_rows], rng.random(CHUNK_ROWS)[:num_rows]
        probability = _sigmoid(self.bias + self.scales @ self.terms(ids, integers))
        columns = {"label": pl.Series((uniform < probability).astype(np.uint8))}
        for j, values in enumerate(integers, start=1):
            columns[f"I{j}"] = pl.Series(values).fill_nan(None).cast(pl.Int64)
        for f, (field, row) in enumerate(zip(self.fields, ids, strict=True), start=1):
            columns[f"C{f}"] = field.text.gather(row)
        return pl.DataFrame(columns), probability


class CategoryField:
    """One category: how often each of its ids occurs, their weights in the click model, and their text in the log."""

    def __init__(self, *, seed: int, field: int, num_ids: int) -> None:
        import numpy as np
        import polars as pl

        self.num_ids, self.missing = num_ids, CATEGORY_MISSING.get(field, 0.0)
        edges = np.arange(1.0, num_ids + 2) ** (1 - ZIPF_EXPONENT)
        zipf = -np.diff(edges) / (edges[0] - edges[-1])
        self.shares: Floats = np.concatenate([[self.missing], (1 - self.missing) * zipf])
        rng = np.random.default_rng([seed, TABLES, field])
        tables = rng.normal(size=(num_ids + 1, LATENT_RANK + 1))
        tables *= (self.shares / (self.shares + HALF_WEIGHT_SHARE))[:, None]
        tables -= self.shares @ tables
        # The weight is the first latent too: an id's own effect helps to learn its pairs, and 300k rows need the help.
        self.slopes, self.weights, self.latents = tables[:, 0], tables[:, 1], tables[:, 1:]
        text = [f"{word:08x}" for word in rng.choice(2**32, size=num_ids, replace=False)]
        self.text = pl.Series([None, *text], dtype=pl.String)

    def draw(self, rng: np.random.Generator) -> Ids:
        """Draw CHUNK_ROWS indices into the tables: the power law x^-ZIPF_EXPONENT on [1, num_ids + 1), rounded down."""
        import numpy as np

        u = rng.random(CHUNK_ROWS)
        last = (self.num_ids + 1) ** (1 - ZIPF_EXPONENT)
        present = (u - self.missing) / (1 - self.missing)
        rank = (1 - present * (1 - last)) ** (1 / (1 - ZIPF_EXPONENT))
        return np.where(u < self.missing, 0, np.clip(rank, 1, self.num_ids).astype(np.int64))


def _sigmoid(logit: Floats) -> Floats:
    import numpy as np

    return np.asarray(1 / (1 + np.exp(-logit)))


def _solve_bias(logit: Floats, ctr: float) -> float:
    """Find the bias at which the mean of sigmoid(bias + logit) is `ctr`, by bisection."""
    middle, reach = math.log(ctr / (1 - ctr)), float(abs(logit).max())
    low, high = middle - reach, middle + reach
    for _ in range(60):
        bias = (low + high) / 2
        low, high = (bias, high) if _sigmoid(bias + logit).mean() < ctr else (low, bias)
    return (low + high) / 2


@contextmanager
def _renamed_when_done(*paths: Path) -> Iterator[list[Path]]:
    """Yield a temporary path beside each path; rename them when the block succeeds, remove them when it does not."""
    partial = [path.with_name(f".{path.name}.{os.getpid()}.partial") for path in paths]
    try:
        yield partial
        for temporary, path in zip(partial, paths, strict=True):
            temporary.rename(path)
    finally:
        for temporary in partial:
            temporary.unlink(missing_ok=True)


@contextmanager
def _open_log(path: Path, *, compress: bool) -> Iterator[BufferedIOBase]:
    with path.open("wb") as raw:
        if compress:
            # No name and no time in the header: the same rows give the same bytes.
            with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=raw, mtime=0) as packed:
                yield packed
        else:
            yield raw


def _summary(labels: NDArray[np.uint8], probabilities: Floats) -> SynthSummary:
    from sklearn.metrics import log_loss, roc_auc_score

    ctr, logloss = float(labels.mean()), float(log_loss(labels, probabilities, labels=[0, 1]))
    auc = ne = math.nan
    if 0 < ctr < 1:
        auc = float(roc_auc_score(labels, probabilities))
        ne = -logloss / (ctr * math.log(ctr) + (1 - ctr) * math.log1p(-ctr))
    return SynthSummary(rows=len(labels), ctr=ctr, bayes_auc=auc, bayes_logloss=logloss, bayes_ne=ne)
