"""Writing checkpoints, in a thread of its own while training goes on."""

import functools
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException

from recsys.config import InputError
from recsys.distributed import World, on_first
from recsys.place import is_local
from recsys.training.checkpoint import folder as folders
from recsys.training.checkpoint.chunks import in_chunks
from recsys.training.checkpoint.config import CheckpointConfig
from recsys.training.checkpoint.folder import Saved
from recsys.training.checkpoint.load import reader
from recsys.training.checkpoint.staging import Stager, local_bytes

Metrics = dict[str, dict[str, float]]

FREE_SHARE = 0.8
"""Of the free memory, that a copy may take."""
CGROUP = Path("/sys/fs/cgroup")


class Saver:
    """Writes the checkpoints of a run; all ranks call alike.

    Args:
        folder: of the checkpoints, on a disk that all machines share, or on an object store.
        config: how they are written, and which are kept.
        world: the job.
        on_failure: called from another thread when one could not be written; `finish` then raises.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, world: World, on_failure: Callable[[], None] | None = None
    ) -> None:
        self.folder, self.config, self.world = folder, config, world
        self._on_failure = on_failure
        # Its thread must not come between the collectives of the training thread.
        self._group = dist.new_group(backend="gloo")
        # Nor does a thread have the device of another.
        begin = functools.partial(torch.cuda.set_device, world.device) if world.device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=begin)
        self._stager = Stager()
        self._writing: Future[None] | None = None
        self._lock = threading.Lock()  # over the mark of the checkpoint that is being finished
        self._metrics: dict[int, Metrics] = {}

    def save(self, step: int, state: Mapping[str, Any], files: Sequence[Path], metrics: Metrics | None = None) -> Path:
        """Write a state and copies of `files` as the checkpoint of a step, once the one before is written.

        Returns when the state may change. What goes wrong later, `finish` raises, or the next call.
        """
        self.finish()
        path = self.folder / folders.name_of(step)
        if metrics:
            self._metrics[step] = metrics
        on_first(lambda: self._begin(path))
        state = in_chunks(state)
        copied = self._may_copy(state)
        if copied:
            state = self._stager.stage(state)
        self._writing = self._thread.submit(self._write, path, state, list(files))
        self._writing.add_done_callback(self._tell)
        if not copied:
            self.finish()
        return path

    def validated(self, step: int, metrics: Metrics) -> None:
        """Tell, on rank 0, how good the members are at a step whose checkpoint may be under way."""
        with self._lock:
            self._metrics[step] = metrics
            path = self.folder / folders.name_of(step)
            if (path / folders.COMPLETE).exists():
                folders.add_metrics(path, metrics)
                folders.prune(self.folder, self.config)

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is under way on this rank."""
        return self._writing is not None and not self._writing.done()

    def finish(self) -> None:
        """Wait until what was saved is written.

        Raises:
            InputError: it could not be, on all ranks alike.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Finish, and end the thread."""
        try:
            self.finish()
        finally:
            self._thread.shutdown()
            dist.destroy_process_group(self._group)

    def _tell(self, written: "Future[None]") -> None:
        if written.exception() and self._on_failure:
            self._on_failure()

    def _may_copy(self, state: Mapping[str, Any]) -> bool:
        if self.config.write != "auto":
            return self.config.write == "async"
        needed = local_bytes(state) - self._stager.held_bytes
        return needed * self.world.local_size < FREE_SHARE * free_memory()

    def _begin(self, path: Path) -> None:
        try:
            folders.discard(folders.partial_of(path))
            folders.partial_of(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path}: cannot make the checkpoint ({error.strerror})") from None

    def _write(self, path: Path, state: dict[str, Any], files: Sequence[Path]) -> None:
        """Write this rank's part; rank 0 makes the checkpoint whole when all have."""
        partial = folders.partial_of(path)
        error: Exception | None = None
        is_whole = False
        try:
            writer = FileSystemWriter(str(partial)) if is_local(path) else FsspecWriter(str(partial))
            dcp.save(state, storage_writer=writer, process_group=self._group)
            if self.world.is_first:
                self._complete(partial, path, files)
            is_whole = True
        except CheckpointException as failure:
            rank, (cause, _) = next(iter(failure.failures.items()))
            error = _told(path, rank, cause)
        except Exception as cause:
            error = _told(path, self.world.rank, cause)
        found: list[Exception | None] = [None] * self.world.size
        dist.all_gather_object(found, error, group=self._group)
        error = next((one for one in found if one is not None), None)
        if error is not None:
            if self.world.is_first:
                if not is_whole:
                    folders.discard(partial)
                print(f"recsys: {error}", file=sys.stderr, flush=True)  # noqa: T201  (the run may not notice for long)
            raise error

    def _complete(self, partial: Path, path: Path, files: Sequence[Path]) -> None:
        for file in files:
            (partial / file.name).write_bytes(file.read_bytes())
        parts = {place.relative_path for place in reader(partial).read_metadata().storage_data.values()}
        if missing := sorted(part for part in parts if not (partial / part).exists()):
            raise InputError(
                f"{self.folder}: rank 0 does not find what another rank wrote there ({missing[0]}); name a "
                "--checkpoints.folder on a disk that all machines share, or on an object store"
            )
        with self._lock:
            step = folders.step_of(path)
            saved = Saved(step=step, saved_at=time.time(), files={}, metrics=self._metrics.pop(step, None))
            folders.complete(partial, path, saved)
            try:
                folders.prune(self.folder, self.config)
            except OSError as error:  # it is tried again next time
                print(f"recsys: {self.folder}: cannot remove old checkpoints ({error})", file=sys.stderr)  # noqa: T201


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group, if that has a limit."""
    free = psutil.virtual_memory().available
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # no control groups, or of the first version
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def _told(path: Path, rank: int, cause: BaseException) -> Exception:
    """An error of the disk or the network as one line, which all ranks raise; others are ours."""
    # torch.save says of a disk that took less than it was given that it stands at an unexpected position.
    is_short = isinstance(cause, RuntimeError) and "inline_container" in str(cause)
    if isinstance(cause, InputError):
        error = cause
    elif is_short or isinstance(cause, OSError):
        why = "the disk took only a part" if is_short else getattr(cause, "strerror", None) or cause
        error = InputError(
            f"{path}: rank {rank} cannot write the checkpoint ({why}); make room, and go on from the newest whole one "
            "by --resume auto"
        )
    else:
        return cause if isinstance(cause, Exception) else RuntimeError(str(cause))
    error.on_all_ranks = True
    return error


def save_once(folder: Path, world: World, step: int, state: Mapping[str, Any], files: Sequence[Path]) -> Path:
    """Write one checkpoint, and return when it is written; none is removed."""
    saver = Saver(folder, CheckpointConfig(write="sync", keep_last=None), world)
    try:
        return saver.save(step, state, files)
    finally:
        saver.close()
