"""Jobs of several processes that are killed, told to stop, or stand still."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from recsys.distributed import World, process_group
from recsys.training.checkpoint import folder as checkpoints
from recsys.training.checkpoint.config import CheckpointConfig
from recsys.training.config import TrainConfig
from recsys.training.trainer import Trainer
from recsys.training.watch import EXIT_STATUS, Standing, hang
from tests.distributed.jobs import on_ranks, small_config

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_job_whose_ranks_are_killed_comes_to_what_it_would_have(prepared: Path, tmp_path: Path) -> None:
    """Both ranks once each; `benchmarks/survival.py --kills 10` does more."""
    command = [
        sys.executable, str(ROOT / "benchmarks" / "survival.py"), "--data", str(prepared), "--json",
        str(tmp_path / "found.json"), "--folder", str(tmp_path), "--num-steps", "40", "--save-every", "4",
        "--kills", "2", "--seed", "4", "--options=--members dcnv2 --train.batch-size 128 --train.validate-every 16",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert {rank for _, rank in found["kills"]} == {0, 1}
    assert found["largest_loss_difference"] < 1e-6
    assert found["largest_metric_difference"] < 1e-6
    assert len(list((tmp_path / "killed" / "tensorboard").iterdir())) == 3  # attempts


# ---- told to stop


def _stop(world: World, config: TrainConfig, number: int, where: str, out: Path) -> None:
    trainer = Trainer(config, world)
    holder: Any = trainer if where == "training" else trainer.valid_loader
    name = "train_step" if where == "training" else "once"
    original = getattr(holder, name)

    def signalled(*arguments: Any) -> Any:
        if world.rank == 1 and trainer.step == 6:
            os.kill(os.getpid(), number)
        return original(*arguments)

    setattr(holder, name, signalled)
    try:
        trainer.train()
    except SystemExit as end:
        (out / f"told-{world.rank}.json").write_text(json.dumps([end.code, trainer.step]))


@pytest.mark.parametrize(("number", "where"), [(signal.SIGTERM, "training"), (signal.SIGUSR1, "validation")])
def test_a_signal_to_one_rank_saves_and_stops_all_at_one_step(
    prepared: Path, tmp_path: Path, number: int, where: str
) -> None:
    config = small_config(
        prepared, out=tmp_path / "run", members=("dcnv2",), num_steps=40, log_every=1,
        validate_every=6 if where == "validation" else None,
    )  # fmt: skip
    on_ranks(2, _stop, config, int(number), where, tmp_path)
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2)]
    step = told[0][1]
    # Rank 0 got no signal of its own, and ends as if by the usual one.
    assert told == [[128 + signal.SIGTERM, step], [128 + number, step]]
    assert step == 6 if where == "validation" else 7 <= step <= 9
    newest = checkpoints.newest(config.out / "checkpoints")
    assert newest is not None
    assert checkpoints.step_of(newest) == step


def test_a_stopped_run_goes_on_as_if_nothing_had_been(prepared: Path, tmp_path: Path) -> None:
    whole = small_config(prepared, out=tmp_path / "whole", members=("dcnv2",), num_steps=12, log_every=1)
    config = dataclasses.replace(whole, out=tmp_path / "stopped", resume="auto")
    with process_group() as world:
        torch.set_num_threads(1)
        Trainer(whole, world).train()
        trainer = Trainer(config, world)
        step = trainer.train_step

        def signalled(batches: Any) -> Any:
            if trainer.step == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(batches)

        before = signal.getsignal(signal.SIGTERM)
        trainer.train_step = signalled  # type: ignore[method-assign]
        with pytest.raises(SystemExit, match="143"):
            trainer.train()
        assert signal.getsignal(signal.SIGTERM) is before
        Trainer(config, world).train()
    losses = [
        [json.loads(line)["loss"] for line in lines if '"kind": "train"' in line]
        for lines in ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "stopped"))
    ]
    assert len(losses[0]) == 12
    assert losses[0] == losses[1]


def test_a_validation_that_was_cut_short_is_made_up_for(prepared: Path, tmp_path: Path) -> None:
    whole = small_config(
        prepared, out=tmp_path / "whole", members=("dcnv2",), num_steps=9, validate_every=3, patience=5
    )
    config = dataclasses.replace(whole, out=tmp_path / "stopped", resume="auto")
    with process_group() as world:
        torch.set_num_threads(1)
        Trainer(whole, world).train()
        trainer = Trainer(config, world)
        once = trainer.valid_loader.once

        def signalled() -> Any:
            if trainer.step == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return once()

        trainer.valid_loader.once = signalled  # type: ignore[method-assign]
        with pytest.raises(SystemExit, match="143"):
            trainer.train()
        resumed = Trainer(config, world)
        resumed.train()
    records = [
        [json.loads(line) for line in lines if '"kind": "valid"' in line]
        for lines in ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "stopped"))
    ]
    assert [record["step"] for record in records[0]] == [3, 6, 9]
    assert records[0] == records[1]


def _cannot_save(world: World, config: TrainConfig) -> None:
    trainer = Trainer(config, world)
    step = trainer.train_step

    def stuck(batches: Any) -> Any:
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return step(batches)

    trainer.train_step = stuck  # type: ignore[method-assign]
    trainer.train()


def test_a_run_that_cannot_save_within_the_grace_time_ends_all_the_same(
    prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small_config(prepared, out=tmp_path / "run", members=("dcnv2",), checkpoints=CheckpointConfig(grace_s=0.5))
    with pytest.raises(mp.ProcessExitedException) as ended:
        on_ranks(1, _cannot_save, config)
    assert ended.value.exit_code == 128 + signal.SIGTERM
    assert (
        "rank 0: not saved within 0.5 s of SIGTERM; the newest whole checkpoint is as it was" in capfd.readouterr().err
    )


# ---- standing still


def _hang(world: World, config: TrainConfig, how: str) -> None:
    trainer = Trainer(config, world)
    step = trainer.train_step

    def stuck(batches: Any) -> Any:
        if trainer.step == 5 and world.rank == 1:
            if how == "frozen":
                # Nobody else could end it within half a minute.
                subprocess.Popen(["sh", "-c", f"sleep 8; kill -9 {os.getpid()}"])
                os.kill(os.getpid(), signal.SIGSTOP)
            with trainer.one_step.phases("data"):
                time.sleep(60)
        return step(batches)

    trainer.train_step = stuck  # type: ignore[method-assign]
    trainer.train()


@pytest.mark.parametrize(
    ("how", "told"), [("slow", "rank 1 last in data of step 5"), ("frozen", "rank 1 silent, last")]
)
def test_a_job_that_stands_still_names_the_rank_that_it_waits_for(
    prepared: Path, tmp_path: Path, how: str, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small_config(prepared, out=tmp_path / "run", members=("dcnv2",), num_steps=40, hang_timeout_s=2.0)
    with pytest.raises(mp.ProcessExitedException) as ended:
        on_ranks(2, _hang, config, how)
    assert ended.value.exit_code == EXIT_STATUS
    assert f"recsys: no step for 2 s on 2 ranks; missing: {told}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("standings", "silent", "missing"),
    [
        ({0: Standing(5, "forward", 9), 1: Standing(4, "backward", 9)}, set(), "rank 1 last in backward of step 4"),
        ({0: Standing(5, "forward", 9), 1: Standing(5, "data", 9)}, set(), "rank 1 last in data of step 5"),
        ({0: Standing(5, "forward", 9), 1: Standing(6, "data", 4)}, {1}, "rank 1 silent, last in data of step 6"),
        ({0: Standing(5, "forward", 9), 1: None}, {1}, "rank 1 never heard of"),
        (
            {0: Standing(5, "forward", 9), 1: Standing(5, "forward", 9)},
            set(),
            "rank 0 last in forward of step 5; rank 1 last in forward of step 5",
        ),
    ],
)
def test_the_ranks_that_are_missing(standings: dict, silent: set[int], missing: str) -> None:
    assert f"missing: {missing}; look for" in hang(standings, silent, 300)
