"""How fast a trained run answers: its embeddings alone, and all of it."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from recsys.config import write_whole
from recsys.data.batch import to_device
from recsys.distributed import World
from recsys.studies.jobs import Job
from recsys.training.predict import Predictor

ROUNDS, FILE = 30, "inference.json"


@dataclass(frozen=True, kw_only=True)
class Inference:
    """Rows a second on this machine, of the fastest of several rounds."""

    batch_size: int
    lookup_rows_per_s: float
    """Embeddings alone."""
    rows_per_s: float
    """From ids to logits."""


def inference_of(job: Job, batch_size: int, world: World) -> Inference:
    """Time a job's newest checkpoint, once: the figure is kept in its folder."""
    path = job.folder / FILE
    if path.exists():
        found = Inference(**json.loads(path.read_text()))
        if found.batch_size == batch_size:
            return found
    found = _measure(job.folder, job.config.data, batch_size, world)
    write_whole(path, json.dumps(asdict(found), indent=2) + "\n")
    return found


@torch.no_grad()
def _measure(run: Path, data: Path, batch_size: int, world: World) -> Inference:
    predictor = Predictor(run, world, data=data, batch_size=batch_size)
    task = predictor.task.eval()
    model = task.module.model
    batch = next(to_device(iter(predictor.held_out("test").once()), world.device))
    rows = len(batch.labels)
    return Inference(
        batch_size=batch_size,
        lookup_rows_per_s=rows / _fastest(lambda: model.embedding(batch.sparse), world.device),
        rows_per_s=rows / _fastest(lambda: model(batch), world.device),
    )


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)
