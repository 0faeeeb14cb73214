"""Which checkpoints are whole, whose they are, and which are kept."""

import json
import math
from pathlib import Path

import pytest

from recsys.config import InputError
from recsys.place import place
from recsys.training.checkpoint import folder as checkpoints
from recsys.training.checkpoint.config import CheckpointConfig
from recsys.training.checkpoint.folder import Saved

HOUR = 3600.0


def saved(step: int, *, ne: float | None = None, auc: float = 0.5, at: float = 0.0) -> Saved:
    metrics = None if ne is None else {"merged": {"ne": ne, "auc": auc}}
    return Saved(step=step, saved_at=at, files={}, metrics=metrics)


def make(folder: Path, step: int, data: bytes = b"data") -> Path:
    path = folder / checkpoints.name_of(step)
    partial = checkpoints.partial_of(path)
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(data)
    checkpoints.complete(partial, path, saved(step))
    return path


@pytest.mark.parametrize(
    ("config", "gone"),
    [
        (CheckpointConfig(keep_last=None), []),
        (CheckpointConfig(keep_last=2, keep_best=0), [10, 20, 30]),
        (CheckpointConfig(keep_last=1, keep_best=1), [10, 30, 40]),
        (CheckpointConfig(keep_last=1, keep_best=2), [30, 40]),
        (CheckpointConfig(keep_last=1, keep_best=1, metric="auc"), [10, 20, 40]),
        (CheckpointConfig(keep_last=1, keep_best=0, keep_every_hours=2), [20, 40]),
    ],
)
def test_the_newest_the_best_and_one_of_some_hours_are_kept(config: CheckpointConfig, gone: list[int]) -> None:
    found = [
        saved(10, ne=0.80, auc=0.70, at=0.0),
        saved(20, ne=0.79, auc=0.71, at=1.9 * HOUR),
        saved(30, ne=0.81, auc=0.72, at=2.1 * HOUR),
        saved(40, at=3.9 * HOUR),
        saved(50, ne=math.nan, at=6.5 * HOUR),
    ]
    assert checkpoints.superfluous(found[::-1], config) == gone


def test_pruning_removes_what_is_superfluous_and_nothing_else(tmp_path: Path) -> None:
    paths = [make(tmp_path, step) for step in (1, 2, 3)]
    (tmp_path / "notes").mkdir()
    assert checkpoints.prune(tmp_path, CheckpointConfig(keep_last=2)) == paths[:1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-00000002", "step-00000003"]


@pytest.mark.parametrize("damage", ["short", "gone", "unmarked", "half a mark", "never finished"])
def test_a_torn_checkpoint_is_none(tmp_path: Path, damage: str) -> None:
    good, torn = make(tmp_path, 10), make(tmp_path, 20)
    if damage == "short":
        (torn / "__0_0.distcp").write_bytes(b"dat")
    elif damage == "gone":
        (torn / "__0_0.distcp").unlink()
    elif damage == "unmarked":
        (torn / checkpoints.COMPLETE).unlink()
    elif damage == "half a mark":
        (torn / checkpoints.COMPLETE).write_text('{"step": 2')
    else:
        torn.rename(checkpoints.partial_of(torn))
    assert checkpoints.newest(tmp_path) == good
    assert checkpoints.whole(tmp_path) == [good]


def test_a_checkpoint_replaces_one_of_the_same_step(tmp_path: Path) -> None:
    make(tmp_path, 10, b"old")
    path = make(tmp_path, 10, b"newer")
    assert (path / "__0_0.distcp").read_bytes() == b"newer"
    assert checkpoints.read(path).files == {"__0_0.distcp": 5}


def test_what_killed_attempts_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in (".step-00000003.partial", ".step-00000003.before", ".step-x.partial"):
        (folder / name).mkdir(parents=True)
    with checkpoints.taken(folder, tmp_path, "one"):
        pass
    assert sorted(path.name for path in folder.iterdir()) == [".step-x.partial", checkpoints.OWNER]


def test_a_disk_that_stutters_is_no_torn_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 10)

    def stale(*_: object) -> str:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "read_text", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        checkpoints.newest(tmp_path)


def test_metrics_are_added_to_a_whole_checkpoint(tmp_path: Path) -> None:
    path = make(tmp_path, 10)
    checkpoints.add_metrics(path, {"merged": {"ne": 0.5}})
    assert checkpoints.read(path).metrics == {"merged": {"ne": 0.5}}
    assert checkpoints.newest(tmp_path) == path


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with checkpoints.taken(tmp_path / "checkpoints", tmp_path, "one"):
        pass
    with (
        pytest.raises(InputError, match="holds the checkpoints of another run; name another"),
        checkpoints.taken(tmp_path / "checkpoints", tmp_path, "other"),
    ):
        pass
    with checkpoints.taken(tmp_path / "checkpoints", tmp_path, "one"):
        pass


def test_two_processes_do_not_train_one_run(tmp_path: Path) -> None:
    with (
        checkpoints.taken(tmp_path / "checkpoints", tmp_path, "one"),
        pytest.raises(InputError, match=r"process \d+ trains this run"),
        checkpoints.taken(tmp_path / "checkpoints", tmp_path, "one"),
    ):
        pass


def test_an_object_store_holds_checkpoints_by_their_mark_alone(tmp_path: Path) -> None:
    folder = place("memory://checkpoints")
    with checkpoints.taken(folder, tmp_path, "one"):
        first, second = make(folder, 1), make(folder, 2)
        (second / checkpoints.COMPLETE).unlink()
        assert [path.name for path in checkpoints.whole(folder)] == [first.name]
        make(folder, 3)
        gone = checkpoints.prune(folder, CheckpointConfig(keep_last=1, keep_best=0))
        assert [path.name for path in gone] == [first.name]
        assert not first.exists()
    assert json.loads((folder / checkpoints.OWNER).read_text()) == {"run": "one"}


@pytest.mark.parametrize(
    ("values", "told"),
    [({"keep_last": 0}, "keep_last 0 must be at least 1"), ({"grace_s": 0.0}, "grace_s 0.0 must be above 0")],
)
def test_a_config_that_cannot_work_is_refused(values: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CheckpointConfig(**values)
