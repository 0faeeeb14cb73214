"""Raw formats: rules against plain Python, hours against datetime, and what a description may not say."""

import dataclasses
import datetime
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recsys.config import InputError
from recsys.data.formats import (
    FORMATS,
    MLPERF_NUM_IDS,
    Column,
    RawFormat,
    format_of,
    hour_features,
    integer_rule,
    log1p,
    log3,
    log_squared_bucket,
)
from tests.logs import AVAZU, CRITEO, SHOP, SHOP_YAML, write
from tests.slow_prepare import slow_bucket

LABEL, CATEGORY = Column(name="y", kind="label"), Column(name="c", kind="text")


# ---- rules


def test_integers_as_log1p() -> None:
    found = log1p(np.array([-(2**63), -3, -1, 0, 1, 2, 3, 1000, 2**62]))
    np.testing.assert_allclose(found, [0, 0, 0, *(math.log(value + 1) for value in [0, 1, 2, 3, 1000, 2**62])])


def test_integers_as_log3() -> None:
    found = log3(np.array([-(2**63), -3, -2, -1, 0, 1, 1000, 2**62]))
    np.testing.assert_allclose(found, [0, 0, 0, *(math.log(value + 3) for value in [-1, 0, 1, 1000, 2**62])])


def test_integers_as_buckets() -> None:
    values = [None, *range(-5, 50_000), 2**31, 2**62]
    found = pl.DataFrame({"v": values}).select(log_squared_bucket(pl.col("v")))["v"]
    assert found.dtype == pl.Int64
    assert found.to_list() == [None, *(slow_bucket(value) for value in values[1:] if value is not None)]


def test_an_unknown_rule_is_told_the_nearest() -> None:
    assert [integer_rule(name) for name in ("log1p", "log3", "log_squared_bucket")]
    with pytest.raises(InputError, match="unknown rule --integers 'log_squared'; did you mean log_squared_bucket"):
        integer_rule("log_squared")


def test_hours_are_those_of_the_calendar() -> None:
    first = datetime.datetime(2014, 12, 30)
    times = [first + datetime.timedelta(hours=7 * i) for i in range(500)]
    times += [datetime.datetime(2016, 2, 29, 23), datetime.datetime(2000, 1, 1), datetime.datetime(2099, 12, 31, 12)]
    numbers = [int(time.strftime("%y%m%d%H")) for time in times]
    frame = pl.DataFrame({"at": [*numbers, None]}, schema={"at": pl.UInt32}).select(**hour_features("at"))
    assert dict(frame.schema) == dict.fromkeys(["hour", "weekday", "is_weekend"], pl.Int64)
    assert frame.rows() == [
        *((time.hour, time.isoweekday(), int(time.isoweekday() in (6, 7))) for time in times),
        (None, None, None),
    ]


# ---- the formats that there are


def test_criteo_has_its_columns() -> None:
    assert CRITEO.label == "label"
    assert CRITEO.named("integer") == tuple(f"I{i}" for i in range(1, 14))
    assert CRITEO.named("hex32") == tuple(f"C{i}" for i in range(1, 27))
    assert [column.name for column in CRITEO.columns] == ["label", *CRITEO.named("integer"), *CRITEO.named("hex32")]
    assert (CRITEO.split, CRITEO.threshold, CRITEO.header) == ("random", 5, False)


def test_terabyte_is_criteo_with_the_caps_of_mlperf() -> None:
    terabyte = FORMATS["criteo_1tb"]
    assert [column.name for column in terabyte.columns] == [column.name for column in CRITEO.columns]
    assert tuple(column.max_ids for column in terabyte.columns if column.kind == "hex32") == MLPERF_NUM_IDS
    assert (len(MLPERF_NUM_IDS), sum(MLPERF_NUM_IDS)) == (26, 204_184_588)
    assert (terabyte.split, terabyte.threshold) == ("file", 1)


def test_avazu_has_its_header() -> None:
    header = (
        "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,"
        "device_ip,device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
    )
    assert ",".join(column.name for column in AVAZU.columns) == header
    assert (AVAZU.separator, AVAZU.header, AVAZU.label) == (",", True, "click")


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_found_by_its_name(name: str) -> None:
    assert format_of(name) is FORMATS[name]


def test_only_digits_are_read_the_fast_way() -> None:
    assert [FORMATS[name].is_numeric for name in ("criteo_kaggle", "criteo_1tb", "avazu", "kdd12")] == [True] * 4
    assert not SHOP.is_numeric
    assert not dataclasses.replace(CRITEO, quote='"').is_numeric
    assert not RawFormat(name="own", columns=(LABEL, CATEGORY)).is_numeric


# ---- formats of one's own


def test_a_description_is_read(tmp_path: Path) -> None:
    assert format_of(str(write(tmp_path / "shop.yaml", SHOP_YAML.encode()))) == SHOP


def test_what_a_description_leaves_out_has_a_default(tmp_path: Path) -> None:
    content = b'{"name": "own", "columns": [{"name": "y", "kind": "label"}, {"name": "c", "kind": "text"}]}'
    assert format_of(str(write(tmp_path / "own.json", content))) == RawFormat(name="own", columns=(LABEL, CATEGORY))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (SHOP_YAML.replace("kind: float", "kind: number"), r"shop.yaml.columns\[1\].kind: 'number' is not one of"),
        (SHOP_YAML + "delimiter: ','\n", "delimiter"),
        (SHOP_YAML.replace("name: shop\n", ""), "name"),
        (SHOP_YAML.replace("kind: label", "kind: text"), "exactly one column must be of kind label"),
        (SHOP_YAML + "file: csv\n", "'csv' is not one of 'text', 'parquet'"),
        ("name: [\n", "shop.yaml: not yaml"),
    ],
)
def test_a_description_that_cannot_be_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        format_of(str(write(tmp_path / "shop.yaml", content.encode())))


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(InputError, match=r"^unknown format 'avasu'; did you mean avazu.* \(or a YAML file that"):
        format_of("avasu")
    with pytest.raises(InputError, match=r"^missing.yaml: cannot read it \(No such file or directory\)"):
        format_of("missing.yaml")


def columns(*kinds: str) -> tuple[Column, ...]:
    return tuple(Column(name=f"{kind}_{i}", kind=kind) for i, kind in enumerate(kinds))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"columns": (LABEL, CATEGORY, CATEGORY)}, "column 'c' stands twice"),
        ({"columns": columns("label", "label", "text")}, "exactly one column must be of kind label"),
        ({"columns": columns("text")}, "exactly one column must be of kind label"),
        ({"columns": columns("label", "clicks", "impressions", "text")}, "exactly one column must be of kind label"),
        ({"columns": columns("clicks", "text")}, "columns of kind clicks and impressions go together"),
        ({"columns": columns("label", "impressions", "text")}, "columns of kind clicks and impressions go together"),
        ({"columns": columns("label", "integer", "float", "unused")}, "no column is a category"),
        ({"columns": (LABEL, Column(name=".split", kind="text"))}, "column '.split': a name must not be empty, begin"),
        ({"columns": (LABEL, Column(name="a/b", kind="text"))}, "column 'a/b': a name must not be empty, begin"),
        ({"columns": (LABEL, Column(name="", kind="text"))}, "column '': a name must not be empty, begin"),
        (
            {"columns": (*columns("label", "hour"), Column(name="weekday", kind="text"))},
            "column 'weekday' stands twice",
        ),
        ({"columns": columns("label", "hour", "hour")}, r"column 'hour' stands twice \(hour gives hour, weekday, is_w"),
        ({"columns": (LABEL, Column(name="c", kind="float", max_ids=9), *columns("text"))}, "its kind float is no cat"),
        ({"separator": ""}, "separator must be one ASCII character"),
        ({"separator": "||"}, "separator must be one ASCII character"),
        ({"separator": "é"}, "separator must be one ASCII character"),
        ({"separator": ",", "quote": ","}, "quote another one or none"),
        ({"quote": "''"}, "quote another one or none"),
        ({"integers": "log2"}, "unknown rule --integers 'log2'"),
    ],
)
def test_a_format_that_cannot_be_is_refused(changes: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        RawFormat(**{"name": "own", "columns": (LABEL, CATEGORY), **changes})
