"""Checkpoints: written while training goes on, read under other plans and on other ranks, with all that a run needs."""

import dataclasses
import io
import json
import re
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from recsys.config import InputError
from recsys.distributed import World, mean_over_ranks, process_group
from recsys.place import place
from recsys.sharding.plan import ShardingType
from recsys.sharding.workload import OptimizerKind
from recsys.training.checkpoint import folder as checkpoints
from recsys.training.checkpoint import saver as saving
from recsys.training.checkpoint.config import CheckpointConfig, WarmStartConfig
from recsys.training.checkpoint.load import names_in
from recsys.training.checkpoint.saver import Saver, save_once
from recsys.training.checkpoint.warm_start import _there, warm_start
from recsys.training.config import TrainConfig
from recsys.training.trainer import Trainer
from tests.distributed.jobs import on_ranks, small_config

TABLE_OPTIMIZERS: tuple[str, ...] = get_args(OptimizerKind)


@pytest.fixture(scope="module")
def world() -> Any:
    with process_group() as alone:
        torch.set_num_threads(1)
        yield alone


class Losses:
    """Trains on, and tells the mean loss of each member at each step; the pipeline is ahead in one stream."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.batches = trainer, trainer.loader.stream(trainer.step)

    def of(self, num_steps: int) -> np.ndarray:
        losses = [mean_over_ranks(self.trainer.train_step(self.batches).losses_M) for _ in range(num_steps)]
        return torch.stack(losses).numpy()


# ---- under other plans, on other ranks


def _save_on_two(world: World, configs: dict[str, TrainConfig]) -> None:
    for config in configs.values():
        trainer = Trainer(config, world)
        losses = Losses(trainer)
        losses.of(5)
        save_once(config.out / "checkpoints", world, 5, trainer.state(), [])
        expected = losses.of(20)
        if world.is_first:
            np.save(config.out / "expected.npy", expected)


def _go_on(world: World, configs: list[TrainConfig]) -> None:
    for config in configs:
        trainer = Trainer(config, world)
        trainer.load(config.out / "checkpoints" / "step-00000005")
        assert trainer.step == 5
        np.testing.assert_allclose(Losses(trainer).of(20), np.load(config.out / "expected.npy"), atol=1e-5, rtol=0)


PLANS: dict[str, tuple[ShardingType, ShardingType]] = {  # saved under, and gone on under
    "rows": ("row_wise", "data_parallel"),
    "replicas": ("data_parallel", "table_wise"),
    "tables": ("table_wise", "row_wise"),
}


@pytest.mark.slow
def test_two_ranks_go_on_on_one_and_on_four_under_other_plans(prepared: Path, tmp_path: Path) -> None:
    saved, then = {}, []
    for number, optimizer in enumerate(TABLE_OPTIMIZERS):
        name = [*PLANS][number % len(PLANS)]
        before, after = PLANS[name]
        config = small_config(
            prepared, out=tmp_path / optimizer, members=("dcnv2",), table_optimizer=optimizer, sharding=before
        )
        saved[optimizer] = config
        config.out.mkdir()
        then.append(dataclasses.replace(config, sharding=dataclasses.replace(config.sharding, types=(after,))))
    on_ranks(2, _save_on_two, saved)
    on_ranks(4, _go_on, then)
    with process_group() as world:
        torch.set_num_threads(1)
        _go_on(world, then)


def test_a_resumed_run_is_the_same_bit_for_bit(prepared: Path, world: World, tmp_path: Path) -> None:
    whole = small_config(prepared, out=tmp_path / "whole", num_steps=12, log_every=1, save_every=6)
    Trainer(whole, world).train()
    half = dataclasses.replace(whole, out=tmp_path / "half", train=dataclasses.replace(whole.train, num_steps=6))
    Trainer(half, world).train()
    resumed = Trainer(dataclasses.replace(whole, out=half.out, resume="auto"), world)
    resumed.train()
    lines = [
        [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
        for config in (whole, half)
    ]
    losses = [[line["loss"] for line in run if line["kind"] == "train"] for run in lines]
    assert losses[0] == losses[1]
    ends = [torch.load(_flat(config.out / "checkpoints" / "step-00000012")) for config in (whole, half)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def _flat(path: Path) -> Path:
    """The tensors of a checkpoint in one file, whole."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    flat = path / "flat.pt"
    dcp_to_torch_save(path, flat)
    values = torch.load(flat)
    torch.save(_tensors(values, ""), flat)
    return flat


def _tensors(values: dict, prefix: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        found |= _tensors(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


# ---- written while training goes on


def test_what_is_trained_meanwhile_is_not_in_the_checkpoint(
    prepared: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, write = threading.Event(), saving.dcp.save

    def slow(*arguments: Any, **options: Any) -> Any:
        assert go.wait(60)
        return write(*arguments, **options)

    monkeypatch.setattr(saving.dcp, "save", slow)
    config = small_config(prepared, members=("dcnv2",))
    trainer = Trainer(config, world)
    losses = Losses(trainer)
    losses.of(3)
    saver = Saver(tmp_path, CheckpointConfig(write="async"), world)
    saver.save(3, trainer.state(), [])
    expected = losses.of(4)
    writing = [saver.is_writing]
    assert checkpoints.newest(tmp_path) is None
    go.set()
    saver.close()
    assert [*writing, saver.is_writing] == [True, False]
    other = Trainer(config, world)
    other.load(tmp_path / "step-00000003")
    np.testing.assert_array_equal(Losses(other).of(4), expected)


@pytest.mark.parametrize(("free", "copied"), [(2**40, True), (1000, False)])
def test_auto_copies_where_there_is_memory(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, copied: bool
) -> None:
    monkeypatch.setattr(saving.psutil, "virtual_memory", lambda: type("Memory", (), {"available": free}))
    saver = Saver(tmp_path, CheckpointConfig(), world)
    assert saver._may_copy({"a": {"b": torch.zeros(1000)}}) is copied
    saver.close()


def test_metrics_reach_a_checkpoint_that_is_being_written(world: World, tmp_path: Path) -> None:
    saver = Saver(tmp_path, CheckpointConfig(write="async", keep_last=1, keep_best=1), world)
    for step, ne in ((1, 0.7), (2, 0.9), (3, 0.8)):
        saver.save(step, {"step": torch.tensor(step)}, [])
        saver.validated(step, {"merged": {"ne": ne}})
    saver.close()
    assert [checkpoints.step_of(path) for path in checkpoints.whole(tmp_path)] == [1, 3]
    assert checkpoints.read(tmp_path / "step-00000001").metrics == {"merged": {"ne": 0.7}}


def test_a_checkpoint_outlives_the_failure_to_remove_another(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: Any) -> None:
        raise OSError("no right to remove")

    monkeypatch.setattr(checkpoints, "prune", refused)
    for folder in (tmp_path / "disk", place("memory://refused")):
        saver = Saver(folder, CheckpointConfig(write="sync"), world)
        saver.save(1, {"step": torch.tensor(1)}, [])
        saver.close()
        assert checkpoints.newest(folder) is not None
    assert capfd.readouterr().err.count("cannot remove old checkpoints (no right to remove)") == 2


def test_what_another_machine_s_disk_holds_is_missed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = saving.dcp.save

    def elsewhere(*arguments: Any, **options: Any) -> None:
        write(*arguments, **options)
        next((tmp_path / ".step-00000001.partial").glob("*.distcp")).unlink()

    monkeypatch.setattr(saving.dcp, "save", elsewhere)
    saver = Saver(tmp_path, CheckpointConfig(write="sync"), world)
    with pytest.raises(InputError, match="on a disk that all machines share"):
        saver.save(1, {"step": torch.tensor(1)}, [])
    saver.close()
    assert not list(tmp_path.iterdir())


# ---- where there is no room


def _with_room(world: World, limits: list[int], out: Path) -> None:
    """Save where a file may have so many bytes."""
    sys.stderr = io.StringIO()  # which may be a file, too
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    saver = Saver(out, CheckpointConfig(write="sync"), world)
    state = {"a": torch.zeros(3000), "b": torch.zeros(3000)}
    saver.save(1, state, [])
    told = []
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            saver.save(2, state, [])
        except InputError as error:
            told.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    saver.close()
    (out / "told.json").write_text(json.dumps(told))


def test_wherever_a_disk_is_full_it_is_one_line(tmp_path: Path) -> None:
    """torch.save says so in other ways at other places."""
    limits = list(range(100, 24_000, 1_700))
    on_ranks(1, _with_room, limits, tmp_path)
    told = json.loads((tmp_path / "told.json").read_text())
    assert len(told) == len(limits)
    assert all("rank 0 cannot write the checkpoint" in line for line in told)
    assert any("took only a part" in line for line in told)
    assert checkpoints.whole(tmp_path) == [tmp_path / "step-00000001"]


def _fill_the_disk(world: World, config: TrainConfig, out: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    trainer = Trainer(config, world)
    step = trainer.train_step

    def until_full(batches: Any) -> Any:
        if trainer.step == 5 and world.rank == 1:
            while checkpoints.newest(config.out / "checkpoints") is None:
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return step(batches)

    trainer.train_step = until_full  # type: ignore[method-assign]
    try:
        trainer.train()
    except InputError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (out / f"told-{world.rank}").write_text(str(error))


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_newest_whole_checkpoint(
    prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small_config(prepared, out=tmp_path / "run", members=("dcnv2",), num_steps=40, save_every=4)
    on_ranks(2, _fill_the_disk, config, tmp_path)
    told = [(tmp_path / f"told-{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert "step-00000008: rank 1 cannot write the checkpoint (File too large); make room" in told[0]
    assert capfd.readouterr().err.count("cannot write the checkpoint") == 1
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step-00000004", checkpoints.OWNER}


# ---- elsewhere, and from elsewhere


def test_a_run_does_not_begin_anew_beside_its_checkpoints(prepared: Path, world: World, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    config = small_config(
        prepared, out=tmp_path / "run", members=("dcnv2",), num_steps=2, checkpoints=CheckpointConfig(folder=folder)
    )
    Trainer(config, world).train()
    forgotten = dataclasses.replace(config, resume="auto", checkpoints=CheckpointConfig())
    with pytest.raises(InputError, match=f"checkpoints are in {folder}; name it by --checkpoints.folder"):
        Trainer(forgotten, world).train()


def test_damaged_names_are_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(InputError, match="cannot read what is in the checkpoint"):
        names_in(tmp_path)


def test_checkpoints_go_to_an_object_store(prepared: Path, world: World, tmp_path: Path) -> None:
    folder = place("memory://store/checkpoints")
    config = small_config(
        prepared, out=tmp_path / "run", members=("dcnv2",), num_steps=6, save_every=2, log_every=1,
        checkpoints=CheckpointConfig(folder=folder, keep_last=2),
    )  # fmt: skip
    Trainer(config, world).train()
    assert [path.name for path in checkpoints.whole(folder)] == ["step-00000004", "step-00000006"]
    more = dataclasses.replace(config, resume="auto", train=dataclasses.replace(config.train, num_steps=8))
    Trainer(more, world).train()
    assert [path.name for path in checkpoints.whole(folder)] == ["step-00000006", "step-00000008"]


@pytest.fixture(scope="module")
def source(prepared: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of dcnv2 and wukong."""
    config = small_config(
        prepared, out=tmp_path_factory.mktemp("source") / "run", members=("dcnv2", "wukong"), num_steps=5
    )
    Trainer(config, world).train()
    return config


@pytest.mark.parametrize("optimizer", [False, True])
def test_a_run_starts_warm_with_the_members_that_another_has(
    source: TrainConfig, world: World, tmp_path: Path, optimizer: bool
) -> None:
    config = dataclasses.replace(
        source,
        out=tmp_path / "run",
        members=("dcnv2", "rankmixer"),
        warm_start=WarmStartConfig(path=source.out, optimizer=optimizer),
    )
    trainer = Trainer(config, world)
    begin = {name: value.clone() for name, value in _whole_model(trainer).items()}
    found = warm_start(config.warm_start, trainer.task, trainer.optimizer, trainer.config.data)
    now = _whole_model(trainer)
    expected = torch.load(_flat(source.out / "checkpoints" / "step-00000005"))
    assert any("dcnv2/" in name for name in found.loaded)
    assert any(name.startswith("optimizer.") for name in found.loaded) is optimizer
    for name, value in now.items():
        assert torch.equal(value, expected[name] if "dcnv2" in name else begin[name])
        assert (name in found.loaded) is ("dcnv2" in name)
        assert (name in found.fresh) is ("rankmixer" in name)
    assert found.skipped
    assert all("wukong" in name for name in found.skipped)


def test_a_warm_start_maps_names_and_is_told_in_a_line(
    source: TrainConfig, world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(
        source,
        out=tmp_path / "run",
        members=("dcnv2:name=mine",),
        train=dataclasses.replace(source.train, num_steps=1),
        warm_start=WarmStartConfig(path=source.out / "checkpoints", names=("mine=dcnv2",)),
    )
    Trainer(config, world).train()
    assert "tensors loaded, none stays fresh" in capfd.readouterr().err
    assert not json.loads((config.out / "warm_start.json").read_text())["fresh"]


def test_several_members_start_as_one_and_so_do_their_averages(
    source: TrainConfig, world: World, tmp_path: Path
) -> None:
    config = dataclasses.replace(
        source,
        out=tmp_path / "run",
        members=("dcnv2", "dcnv2:name=mine", "dcnv2:name=yours"),
        optimizer=dataclasses.replace(source.optimizer, ema_decay=0.999),
        train=dataclasses.replace(source.train, num_steps=1),
        warm_start=WarmStartConfig(path=source.out, names=("mine=dcnv2", "yours=dcnv2", "dcnv2=dcnv2")),
    )
    trainer = Trainer(config, world)
    trainer.train()
    assert json.loads((config.out / "warm_start.json").read_text())["fresh"] == {}
    predictions = trainer.predict(trainer.valid_loader)
    assert predictions is not None
    one, *others = predictions.logits_NM.T
    assert all(np.abs(one - other).max() < 0.1 * one.std() for other in others)
    expected = torch.load(_flat(source.out / "checkpoints" / "step-00000005"))
    assert trainer.one_step.ema is not None
    for name, average in trainer.one_step.ema.state().items():
        there = expected[f"model.{name}".replace("mine", "dcnv2").replace("yours", "dcnv2")]
        torch.testing.assert_close(average, there, atol=1e-4, rtol=0)


def test_names_are_mapped_at_once() -> None:
    assert _there("model.a.b/C1.weight", ("a=b", "b=a")) == "model.b.a/C1.weight"


def test_a_table_of_another_size_stays_fresh(source: TrainConfig, world: World) -> None:
    wider = dataclasses.replace(source, model=dataclasses.replace(source.model, embedding_dim=16))
    trainer = Trainer(wider, world)
    found = warm_start(WarmStartConfig(path=source.out), trainer.task, trainer.optimizer, trainer.config.data)
    reason = next(why for name, why in found.fresh.items() if "dcnv2/C1." in name)
    assert re.fullmatch(r"of shape \[(\d+), 8\] there, \[\1, 16\] here", reason)


def test_a_warm_start_with_nothing_in_common_is_refused(source: TrainConfig, world: World, tmp_path: Path) -> None:
    trainer = Trainer(dataclasses.replace(source, members=("rankmixer",)), world)
    with pytest.raises(InputError, match="none of its tensors has name and shape of one of ours"):
        warm_start(WarmStartConfig(path=source.out), trainer.task, trainer.optimizer, trainer.config.data)
    with pytest.raises(InputError, match="no whole checkpoint there"):
        warm_start(WarmStartConfig(path=tmp_path), trainer.task, trainer.optimizer, trainer.config.data)


def _whole_model(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What one rank holds, by the names in a checkpoint."""
    values = trainer.task.state_dict()
    return {
        f"model.{name}": value.local_shards()[0].tensor if hasattr(value, "local_shards") else value
        for name, value in values.items()
    }
