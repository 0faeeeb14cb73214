"""Engines: what runs the kernels of a stage, here or on a Ray cluster. Kernels take one job each and leave files."""

import logging
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from recsys.config import InputError

Job = TypeVar("Job")
Advance = Callable[..., None]
Kernel = Callable[[Job, Advance], dict[str, Any]]

# What a process that runs jobs should have in its environment before it imports polars and pyarrow. Jobs run side by
# side: threads of polars within one cost 10 % more CPU and gain nothing. Allocators that keep pages for the next chunk
# save another 6 %, and memory too.
WORKER_ENVIRONMENT = {
    "POLARS_MAX_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "_RJEM_MALLOC_CONF": "dirty_decay_ms:5000,muzzy_decay_ms:5000",
}


class _StoppedError(Exception):
    """Another job failed."""


def run(
    engine: str, kernel: Kernel, jobs: Sequence[Job], advance: Advance, *, workers: int, cpus: int = 1, memory: int = 0
) -> list[dict[str, Any]]:
    """Run a kernel on every job and return the results in order of the jobs.

    Args:
        engine: local (threads of this process; kernels release the interpreter's lock) or ray.
        kernel: called with a job and `advance`; whatever it did must hold when it is called again for the same job.
        jobs: what to do.
        advance: told of progress.
        workers: jobs at a time, of the local engine.
        cpus: cores that a job uses, for Ray's scheduler.
        memory: bytes that a job takes, for Ray's scheduler.

    Raises:
        InputError: the first one that a kernel raised; jobs that had not begun are left.
    """
    if engine == "ray":
        return _run_on_ray(kernel, jobs, advance, cpus, memory)
    lock, stopped = threading.Lock(), threading.Event()

    def locked(*amounts: float) -> None:
        if stopped.is_set():
            raise _StoppedError
        with lock:
            advance(*amounts)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(kernel, job, locked) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()  # jobs that run learn of it when they next tell how far they are
            for future in futures:
                future.cancel()
    errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, _StoppedError)):
        raise error
    return [future.result() for future in futures]


def _run_on_ray(kernel: Kernel, jobs: Sequence[Job], advance: Advance, cpus: int, memory: int) -> list[dict[str, Any]]:
    try:
        import ray  # noqa: PLC0415  (an extra)
        from ray import cloudpickle  # noqa: PLC0415
        from ray.data import DataContext  # noqa: PLC0415
    except ImportError:
        raise InputError("--engine ray needs Ray: pip install 'recsys[ray]'") from None
    results: list[dict[str, Any]] = [{} for _ in jobs]
    if not jobs:
        return results
    if not ray.is_initialized():
        ray.init(log_to_driver=False, runtime_env={"env_vars": WORKER_ENVIRONMENT})
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it reports every stage; `advance` does that here
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []
    items = [{"index": i, "job": cloudpickle.dumps(job)} for i, job in enumerate(jobs)]
    data = ray.data.from_items(items, override_num_blocks=len(items))
    done = data.map(_on_worker, fn_args=(cloudpickle.dumps(kernel),), num_cpus=cpus, memory=memory or None)
    try:
        for row in done.iter_rows():
            found = pickle.loads(row["result"])
            if isinstance(found, Exception):
                raise found
            results[int(row["index"])], advanced = found
            for amounts in advanced:
                advance(*amounts)
    except ray.exceptions.RayError as error:
        told = next(filter(None, str(error).splitlines()), type(error).__name__)
        raise InputError(f"Ray gave a job up ({told.strip()}); the same command goes on from here") from None
    return results


def _on_worker(row: dict[str, Any], kernel: bytes) -> dict[str, Any]:
    """Run one job on a worker; what the user is to read travels back as a value, not as a traceback."""
    advanced: list[tuple[float, ...]] = []
    try:
        found: Any = (
            pickle.loads(kernel)(pickle.loads(row["job"]), lambda *amounts: advanced.append(amounts)),
            advanced,
        )
    except (InputError, OSError) as error:
        found = error
    return {"index": row["index"], "result": pickle.dumps(found)}
