"""What a run says of itself every few steps: how well its predictions fit, how fast it is, and where the time goes."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recsys.data.schema import Schema
from recsys.distributed import World
from recsys.tasks.click import Outputs
from recsys.training.config import TrainConfig
from recsys.training.metrics import TrainingMetrics
from recsys.training.phases import Phases
from recsys.training.throughput import Throughput, measured_peak
from recsys.training.workload import ids_a_row

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""By the model's precision; others multiply in float32."""


class TrainingLog:
    """Follows the steps of a run, from now on.

    Args:
        config: of the run.
        schema: of its data.
        dense_flops: of one row's forward, over all members; see recsys.training.workload.
        phases: of the steps.
        world: the job.
        peak_flops: FLOP/s of one device; measured where left out.
    """

    def __init__(
        self,
        config: TrainConfig,
        schema: Schema,
        dense_flops: float,
        phases: Phases,
        world: World,
        peak_flops: float | None = None,
    ) -> None:
        self.metrics = TrainingMetrics([spec.name for spec in config.specs()], world.device)
        self._phases, self._world = phases, world
        hotness = ids_a_row(config, schema)
        dtype = DTYPES.get(config.model.precision, torch.float32)
        self._throughput = Throughput(
            batch_size=config.train.batch_size,
            ids_per_row=sum(hotness.get(feature, 1) for feature in schema.sparse),
            dense_flops=dense_flops,
            num_devices=world.size,
            peak_flops=peak_flops or measured_peak(world.device, dtype),
        )
        self._steps = 0
        self.restart()

    def restart(self) -> None:
        """Begin to measure speed anew: what took time since the last record was no training."""
        self._phases.take()
        self._since, self._steps = time.perf_counter(), 0

    def update(self, outputs: Outputs) -> None:
        """Take the outputs of a step."""
        self.metrics.update(outputs)
        self._steps += 1

    def record(self) -> dict[str, Any]:
        """Speed since the last record or restart, and metrics of the window and of all steps; all ranks call it."""
        phases = self._phases.take()
        seconds = time.perf_counter() - self._since - phases.pop("save", 0.0)  # a checkpoint is no part of a step
        speed = self._throughput.record(self._steps, seconds, phases) if self._steps else {}
        lifetime = self.metrics.lifetime(self._world)
        values = {**speed, "window": self.metrics.window(self._world), "lifetime": lifetime}
        self.restart()
        return values

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; all ranks call it."""
        return self.metrics.state(self._world)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.metrics.load_state(state)
