"""Rates follow from steps and seconds; phases and windows from what a run did."""

import time
from pathlib import Path

import pytest
import torch

from recsys.data.schema import Schema
from recsys.distributed import process_group
from recsys.tasks.click import Outputs
from recsys.training.log import TrainingLog
from recsys.training.phases import Phases
from recsys.training.throughput import Throughput, measured_peak
from tests.distributed.jobs import small_config


def test_rates_are_those_of_all_devices() -> None:
    throughput = Throughput(batch_size=100, ids_per_row=26, dense_flops=1e6, num_devices=2, peak_flops=3e9)
    record = throughput.record(5, 0.25, {"forward": 0.1, "backward": 0.125})
    assert record["rows_per_s"] == 2_000
    assert record["ids_per_s"] == 52_000
    assert record["mfu"] == pytest.approx(2_000 * 3e6 / 6e9)
    assert record["step_ms"] == 50
    assert record["phase_ms"] == {"forward": 20, "backward": 25}


def test_a_peak_is_measured_in_flops_a_second() -> None:
    found = measured_peak(torch.device("cpu"), torch.float32)
    assert 1e8 < found < 1e14


def test_records_hold_speed_and_metrics_and_begin_anew(prepared: Path) -> None:
    config, phases = small_config(prepared, members=("dcnv2",)), Phases()
    with process_group() as world:
        log = TrainingLog(config, Schema.load(prepared), 1e3, phases, world, peak_flops=1e9)
        outputs = Outputs(torch.tensor([0.5]), torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, 1.0]), torch.ones(2))
        with phases("validation"):
            time.sleep(0.02)
        log.restart()
        for _ in range(3):
            with phases("forward"):
                log.update(outputs)
        first, empty = log.record(), log.record()
        log.update(outputs)
        second = log.record()
    assert "validation" not in first["phase_ms"]
    assert first["phase_ms"]["forward"] <= first["step_ms"]
    assert first["ids_per_s"] == 26 * first["rows_per_s"]
    assert first["window"]["dcnv2"]["logloss"] == first["lifetime"]["dcnv2"]["logloss"] == 0.5
    assert first["window"]["dcnv2"]["auc"] == 1.0
    assert "rows_per_s" not in empty
    assert empty["window"] == {}
    assert second["lifetime"]["dcnv2"]["calibration"] == first["lifetime"]["dcnv2"]["calibration"]
