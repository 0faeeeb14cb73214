"""How fast a run trains and answers on this machine: the fastest of many rounds, which other work disturbs least."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from recsys.config import write_whole
from recsys.data.batch import to_device
from recsys.distributed import World
from recsys.studies.jobs import Job
from recsys.training.predict import Predictor
from recsys.training.trainer import Trainer

ROUNDS, FILE = 60, "speed.json"


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one run."""

    step_ms: float
    """A training step at the run's batch size, its data at hand."""
    batch_size: int
    """Of inference."""
    lookup_rows_per_s: float
    """Inference, embeddings alone."""
    rows_per_s: float
    """Inference from ids to logits."""


def speed_of(job: Job, batch_size: int, world: World) -> Speed:
    """Time a finished job, once: the figures are kept in its folder; remove them to time it again."""
    path = job.folder / FILE
    if path.exists():
        found = Speed(**json.loads(path.read_text()))
        if found.batch_size == batch_size:
            return found
    step = _step_seconds(job, world)
    lookup, whole = _inference_seconds(job, batch_size, world)
    found = Speed(
        step_ms=step * 1e3,
        batch_size=batch_size,
        lookup_rows_per_s=batch_size / lookup,
        rows_per_s=batch_size / whole,
    )
    write_whole(path, json.dumps(asdict(found), indent=2) + "\n")
    return found


def _step_seconds(job: Job, world: World) -> float:
    """Of a model of this make: its values do not matter, so they are not loaded."""
    trainer = Trainer(job.config, world)
    batches = trainer.loader.stream()
    return _fastest(lambda: trainer.train_step(batches), world.device)


@torch.no_grad()
def _inference_seconds(job: Job, batch_size: int, world: World) -> tuple[float, float]:
    predictor = Predictor(job.folder, world, data=job.config.data, batch_size=batch_size)
    model = predictor.task.eval().module.model
    # The last rows of the split are filled up to a whole batch, so there always is one.
    batch = next(to_device(iter(predictor.held_out("test").once()), world.device))
    lookup = _fastest(lambda: model.embedding(batch.sparse), world.device)
    return lookup, _fastest(lambda: model(batch), world.device)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)
