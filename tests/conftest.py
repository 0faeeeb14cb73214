"""What tests of several modules share: a small prepared log, and jobs of one or more ranks."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("POLARS_MAX_THREADS", "1")  # as `recsys prepare` does; polars reads it once, when it is imported

from recsys.data.prepare import PrepareConfig, prepare
from recsys.data.synthetic import SynthConfig, synthesize

# Two threads on busy cores wait for one another; tests compute too little to gain by them.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def synthetic_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw log of 8,000 rows, with its truth beside it."""
    path = tmp_path_factory.mktemp("raw") / "log.tsv"
    synthesize(SynthConfig(out=path, num_rows=8_000, num_ids=300))
    return path


@pytest.fixture(scope="session")
def prepared(synthetic_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That log, prepared."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(PrepareConfig(format="criteo_kaggle", paths=(synthetic_log,), out=out, threshold=2))
    return out
