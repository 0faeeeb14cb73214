"""Ids are looked at when they are decoded, whatever the statistics of a file say, or if it has none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config import InputError
from recsys.data.loader import Loader
from tests.prepared_folder import PART, lie_in_statistics, make_folder, with_table, with_type, with_value

Change = Callable[[Path], object]


def read(folder: Path) -> int:
    """Decode all training rows; returns how many batches they make."""
    return sum(1 for _ in Loader(folder, "train", batch_size=4, shuffle=False, tail="pad").epoch(0))


NO_STATISTICS: dict[str, Any] = {"write_statistics": False}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (with_value("C1", 3, 6, **NO_STATISTICS), r"row group 0, row 3: column C1 holds id 6, but .* gives it 6 ids"),
        (with_value("C1", 7, -1, **NO_STATISTICS), r"row group 1, row 2: column C1 holds id -1, but .* gives it 6 ids"),
        (
            with_value("C3", 8, [5, 200_000], **NO_STATISTICS),
            "row group 1, row 3: column C3 holds id 200000, .* 200,000",
        ),
        (
            with_type("C2", pa.int64(), first=2**32, **NO_STATISTICS),
            "row group 0, row 0: column C2 holds id 4294967296",
        ),
        (with_type("C2", pa.int8(), first=-3, **NO_STATISTICS), "row 0: column C2 holds id -3, but .* gives it 4 ids"),
        (with_type("C2", pa.uint16(), first=4, **NO_STATISTICS), "row 0: column C2 holds id 4, but .* gives it 4 ids"),
        (with_type("C2", pa.float64(), first=1.5, **NO_STATISTICS), "row group 0: column C2 holds float64, not ids"),
    ],
)
def test_an_id_that_no_statistics_tell_of_is_named(tmp_path: Path, change: Change, told: str) -> None:
    folder = make_folder(tmp_path / "data")
    assert read(folder) == 5
    change(folder)
    with pytest.raises(InputError, match=told) as raised:
        read(folder)
    assert str(raised.value).startswith(f"{folder / PART}, row group ")


def test_statistics_that_lie_about_an_id_do_not_hide_it(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data")
    with_value("C3", 0, [300_000, 0])(folder)
    path = folder / PART
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    truth, lie = (np.int32(largest).tobytes() for largest in (300_000, 199_999))
    path.write_bytes(content[:footer] + content[footer:].replace(truth, lie))
    assert pq.read_metadata(path).row_group(0).column(6).statistics.max == 199_999
    with pytest.raises(InputError, match=r"row group 0, row 0: column C3 holds id 300000, but .* gives it 200,000 ids"):
        read(folder)


def test_statistics_alone_are_enough_to_refuse(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data")
    lie_in_statistics(folder / PART)
    with pytest.raises(InputError, match="column C3 holds ids 0 to 300000"):
        Loader(folder, "train", batch_size=4)


@pytest.mark.parametrize("kind", [pa.int64(), pa.int8(), pa.uint8()])
def test_ids_of_other_widths_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    folder = make_folder(tmp_path / "data")
    expected = [batch.sparse.values().tolist() for batch in Loader(folder, "train", batch_size=4).epoch(0)]
    with_table(lambda rows: rows.set_column(5, "C2", rows["C2"].cast(kind)), **NO_STATISTICS)(folder)
    assert pq.read_table(folder / PART)["C2"].type == kind
    assert [batch.sparse.values().tolist() for batch in Loader(folder, "train", batch_size=4).epoch(0)] == expected
