"""The synthetic log: Criteo's format, reproducible bytes, and a truth that the labels follow."""

import gzip
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from recsys.config import InputError
from recsys.data import synthetic
from recsys.data.formats import FORMATS
from recsys.data.synthetic import CHUNK_ROWS, ClickModel, SynthConfig, SynthSummary, synthesize

CRITEO = FORMATS["criteo_kaggle"]
NUM_ROWS = CHUNK_ROWS + 35_000


class Made(NamedTuple):
    """A log of two chunks, read back as text, and its truth."""

    config: SynthConfig
    summary: SynthSummary
    log: pl.DataFrame
    truth: pl.DataFrame


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    config = SynthConfig(out=tmp_path_factory.mktemp("synth") / "log.tsv", num_rows=NUM_ROWS)
    written: list[int] = []
    summary = synthesize(config, written.append)
    assert written == [CHUNK_ROWS, NUM_ROWS - CHUNK_ROWS]
    log = pl.read_csv(
        config.out,
        separator="\t",
        has_header=False,
        new_columns=[column.name for column in CRITEO.columns],
        infer_schema=False,
    )
    return Made(config=config, summary=summary, log=log, truth=pl.read_parquet(config.truth))


def test_the_log_has_criteos_columns(made: Made) -> None:
    lines = made.config.out.read_text().splitlines()
    assert len(lines) == made.summary.rows == NUM_ROWS
    assert {line.count("\t") for line in lines} == {39}
    assert '"' not in lines[0]
    assert len(set(lines)) == NUM_ROWS, "the chunks repeat one another"
    assert made.log["label"].unique().sort().to_list() == ["0", "1"]
    for name in CRITEO.named("integer"):
        assert made.log[name].drop_nulls().str.contains(r"^(0|[1-9]\d*|-[1-3])$").all(), name
    for name in CRITEO.named("hex32"):
        assert made.log[name].drop_nulls().str.contains(r"^[0-9a-f]{8}$").all(), name
    assert {"-1", "-2", "-3"} < set(made.log["I2"])
    assert (
        not made.log.select(pl.col(CRITEO.named("integer")).exclude("I2").str.starts_with("-").any()).to_numpy().any()
    )


def test_missing_values_have_criteos_shares(made: Made) -> None:
    shares = made.log.select(pl.all().is_null().mean()).row(0, named=True)
    expected = {"I1": 0.45, "I2": 0.0, "I10": 0.45, "I12": 0.76, "C1": 0.0, "C3": 0.03, "C19": 0.44, "C22": 0.76}
    assert {name: shares[name] for name in expected} == pytest.approx(expected, abs=0.007)
    assert shares["label"] == 0


def test_integers_have_heavy_tails(made: Made) -> None:
    values = made.log["I5"].drop_nulls().cast(pl.Int64).to_numpy()
    assert values.mean() > 3 * np.median(values) > 0


def test_categories_follow_zipfs_law(made: Made) -> None:
    sizes = made.log.select(pl.col(CRITEO.named("hex32")).drop_nulls().n_unique()).row(0, named=True)
    assert sizes["C9"] == 4
    assert sizes["C6"] == 24
    assert sizes["C2"] == 584
    assert 5_000 < sizes["C3"] < made.config.num_ids
    counts = np.sort(made.log["C3"].drop_nulls().value_counts()["count"].to_numpy())[::-1]
    slope = np.polyfit(np.log(np.arange(2, 100)), np.log(counts[1:99]), 1)[0]
    assert slope == pytest.approx(-synthetic.ZIPF_EXPONENT, abs=0.1)
    assert counts[0] / counts.sum() == pytest.approx(0.107, abs=0.005)


def test_hexadecimal_order_says_nothing_about_frequency(made: Made) -> None:
    counts = made.log["C7"].value_counts(sort=True).head(1000).with_columns(value=pl.col("C7").str.to_integer(base=16))
    rank_correlation = counts.select(pl.corr("value", "count", method="spearman")).item()
    assert abs(rank_correlation) < 0.15
    assert not set(made.log["C3"].drop_nulls()) & set(made.log["C4"].drop_nulls().head(1000))


def test_the_truth_is_row_aligned_and_calibrated(made: Made) -> None:
    assert made.truth.schema == {"label": pl.UInt8, "probability": pl.Float64}
    assert made.truth["label"].to_list() == made.log["label"].cast(pl.UInt8).to_list()
    label, probability = made.truth["label"].to_numpy(), made.truth["probability"].to_numpy()
    assert probability.mean() == pytest.approx(made.config.ctr, abs=0.005)
    for part in np.array_split(np.argsort(probability), 10):
        sigma = math.sqrt((probability[part] * (1 - probability[part])).sum())
        assert abs(label[part].sum() - probability[part].sum()) < 4 * sigma


def test_the_truth_can_be_computed_from_the_text_of_the_log(made: Made) -> None:
    log = made.log.tail(5_000)
    model = ClickModel(seed=made.config.seed, num_ids=made.config.num_ids, ctr=made.config.ctr)
    rank_of = [{word: rank for rank, word in enumerate(field.text)} for field in model.fields]
    ids = np.array([[rank_of[f][word] for word in log[name]] for f, name in enumerate(CRITEO.named("hex32"))])
    integers = log.select(pl.col(CRITEO.named("integer")).cast(pl.Float64).fill_null(math.nan)).to_numpy().T
    logit = model.bias + model.scales @ model.terms(ids, integers)
    np.testing.assert_allclose(1 / (1 + np.exp(-logit)), made.truth["probability"].tail(5_000), rtol=1e-9)


def test_the_summary_scores_the_true_probabilities(made: Made) -> None:
    label, probability = made.truth["label"].to_numpy(), made.truth["probability"].to_numpy()
    assert made.summary.ctr == label.mean()
    assert made.summary.bayes_auc == pytest.approx(roc_auc_score(label, probability))
    assert made.summary.bayes_logloss == pytest.approx(log_loss(label, probability))
    base_rate = np.full(len(label), label.mean())
    assert made.summary.bayes_ne == pytest.approx(log_loss(label, probability) / log_loss(label, base_rate))
    assert 0.79 < made.summary.bayes_auc < 0.82


def test_a_log_of_one_label_has_no_auc(tmp_path: Path) -> None:
    summary = synthesize(SynthConfig(out=tmp_path / "log.tsv", num_rows=1, num_ids=4))
    assert math.isnan(summary.bayes_auc)
    assert math.isnan(summary.bayes_ne)
    assert math.isfinite(summary.bayes_logloss)


def test_pairs_add_to_what_single_columns_say() -> None:
    model = ClickModel(seed=1, num_ids=20_000, ctr=0.25)
    rng = np.random.default_rng(0)
    ids, integers = model.draw(rng)
    terms = model.scales[:, None] * model.terms(ids, integers)
    logit = model.bias + terms.sum(axis=0)
    label = rng.random(CHUNK_ROWS) < 1 / (1 + np.exp(-logit))
    first_order_auc, bayes_auc = roc_auc_score(label, terms[:2].sum(axis=0)), roc_auc_score(label, logit)
    assert 0.70 < first_order_auc < bayes_auc - 0.01
    # Single columns cannot learn what the pairs and the mixed term add: it has mean zero whatever one id is.
    for field in {field for pair in synthetic.PAIRS for field in pair}:
        with_top_id = terms[2:, ids[field - 1] == 1]
        standard_error = with_top_id.std(axis=1) / math.sqrt(with_top_id.shape[1])
        assert (np.abs(with_top_id.mean(axis=1)) < 4 * standard_error + 0.005).all(), f"C{field}"


def test_rare_ids_carry_little_of_the_signal() -> None:
    model = ClickModel(seed=1, num_ids=20_000, ctr=0.25)
    ids, integers = model.draw(np.random.default_rng(0))
    logit = model.scales @ model.terms(ids, integers)
    for field in model.fields:
        rare = field.shares * 300_000 < 10
        for table in (field.weights, field.slopes, field.latents):
            table[rare] = 0
    without_rare = model.scales @ model.terms(ids, integers)
    assert np.mean((logit - without_rare) ** 2) < 0.01 * logit.var()


def test_the_same_config_gives_the_same_bytes_and_a_shorter_log_is_its_head(made: Made, tmp_path: Path) -> None:
    again, short, other = (tmp_path / name for name in ("again.tsv", "short.tsv", "other.tsv"))
    synthesize(SynthConfig(out=again, num_rows=NUM_ROWS))
    assert again.read_bytes() == made.config.out.read_bytes()
    assert Path(f"{again}.truth.parquet").read_bytes() == made.config.truth.read_bytes()
    synthesize(SynthConfig(out=short, num_rows=1000))
    assert again.read_bytes().startswith(short.read_bytes())
    synthesize(SynthConfig(out=other, num_rows=1000, seed=1))
    lines_of_seeds = zip(short.read_text().splitlines(), other.read_text().splitlines(), strict=True)
    assert all(a.split("\t")[1:14] != b.split("\t")[1:14] for a, b in lines_of_seeds), "the rows ignore the seed"
    assert not set(other.read_text().split()) & {word for word in short.read_text().split() if len(word) == 8}


def test_gzip_holds_the_plain_bytes_and_is_reproducible(made: Made, tmp_path: Path) -> None:
    packed = [tmp_path / name for name in ("one.tsv.gz", "two.tsv.gz")]
    for out in packed:
        synthesize(SynthConfig(out=out, num_rows=NUM_ROWS))
    assert packed[0].read_bytes() == packed[1].read_bytes()
    assert gzip.decompress(packed[0].read_bytes()) == made.config.out.read_bytes()


@pytest.mark.parametrize("existing", ["log.tsv", "log.tsv.truth.parquet"])
def test_it_never_overwrites(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("mine")
    with pytest.raises(InputError, match=rf"{existing}: exists already; remove it or give --out another name"):
        synthesize(SynthConfig(out=tmp_path / "log.tsv", num_rows=10, num_ids=4))
    assert [path.name for path in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_text() == "mine"


@pytest.mark.parametrize(
    ("failure", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError("full"), InputError)]
)
def test_a_failure_midway_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, raised: type[BaseException]
) -> None:
    rows = ClickModel.rows

    def fail_later(self: ClickModel, chunk: int, num_rows: int) -> Any:
        if chunk == 1:
            assert len(list(tmp_path.iterdir())) == 2, "both temporary files lie beside the log"
            raise failure
        return rows(self, chunk, num_rows)

    monkeypatch.setattr(ClickModel, "rows", fail_later)
    with pytest.raises(raised):
        synthesize(SynthConfig(out=tmp_path / "log.tsv.gz", num_rows=NUM_ROWS, num_ids=4))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write it"):
        synthesize(SynthConfig(out=tmp_path / "file" / "log.tsv", num_rows=10, num_ids=4))


@pytest.mark.parametrize("fields", [{"num_rows": 0}, {"seed": -1}, {"num_ids": 3}, {"ctr": 0.0}, {"ctr": 1.0}])
def test_bad_fields_are_named(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ValueError, match=rf"^{name} is "):
        SynthConfig(out=Path("log.tsv"), **fields)


def test_ctr_moves_the_mean_probability(tmp_path: Path) -> None:
    config = SynthConfig(out=tmp_path / "log.tsv", num_rows=50_000, num_ids=100, ctr=0.03)
    synthesize(config)
    assert pl.read_parquet(config.truth)["probability"].mean() == pytest.approx(0.03, abs=0.002)


def test_help_needs_no_heavy_import() -> None:
    code = "import sys, recsys.data.synthetic; print({'numpy', 'polars', 'pyarrow', 'sklearn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
