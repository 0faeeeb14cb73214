"""A training job whose steps are timed, with what each phase of a step takes."""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recsys.backbones.layers import linear_flops
from recsys.data.batch import Batch
from recsys.distributed import World
from recsys.members import ModelConfig
from recsys.model import Member
from recsys.tasks.click import ClickLoss
from recsys.training.config import LoopConfig, TrainConfig
from recsys.training.trainer import Trainer

PHASES = ("tables", "dense forward", "dense backward", "tables backward", "dense optimizer")
"""Zeroing gradients, distributing ids, looking up and TorchRec's pipeline; members and loss; their backward; that of
the tables with the optimizer in it; AdamW."""
CLOCKS = ("wall", "cpu")
LEAST_STEPS = 2


class Clock:
    """Splits wall and CPU time among phases, from now on."""

    def __init__(self) -> None:
        self.spent = {phase: [0.0, 0.0] for phase in PHASES}
        self.steps = 0
        self._phase, self._since = PHASES[0], now()

    def enter(self, phase: str) -> None:
        """What follows is of this phase."""
        at = now()
        for kind in (0, 1):
            self.spent[self._phase][kind] += at[kind] - self._since[kind]
        self._phase, self._since = phase, at

    def per_step(self) -> dict[str, list[float]]:
        """Wall and CPU milliseconds of each phase."""
        return {phase: [1e3 * seconds / self.steps for seconds in spent] for phase, spent in self.spent.items()}


def now() -> tuple[float, float]:
    """Wall and CPU seconds, the latter of all threads."""
    return time.perf_counter(), time.process_time()


class Job:
    """One job, whose turns are timed."""

    def __init__(self, members: tuple[str, ...], batch_size: int, model: ModelConfig, data: Path, world: World) -> None:
        loop = LoopConfig(batch_size=batch_size, num_steps=1_000_000)
        config = TrainConfig(data=data, out=data / "unused", members=members, model=model, train=loop)
        self.trainer = Trainer(config, world)
        self.turns: dict[str, list[dict[str, list[float]]]] = {"training": [], "inference": []}
        self.flops = batch_size * sum(_flops(member) for member in self.trainer.members)
        self.clock = Clock()
        self._hook()

    def _hook(self) -> None:
        """Have the trainer's parts tell the clock when a phase begins."""
        trainer = self.trainer

        def forward_begins(_: Any, inputs: tuple[list[Tensor], Tensor]) -> None:
            self.clock.enter("dense forward")
            left = [len(inputs[0])]

            def field_done(_: Tensor) -> None:
                left[0] -= 1
                if not left[0]:
                    self.clock.enter("tables backward")

            for field in inputs[0]:
                if field.requires_grad:
                    field.register_hook(field_done)  # type: ignore[no-untyped-call]

        def backward_begins(_: Tensor) -> None:
            self.clock.enter("dense backward")

        def forward_ends(_: Any, __: Any, outputs: tuple[Tensor, Any]) -> None:
            self.clock.enter("tables")
            if outputs[0].requires_grad:
                outputs[0].register_hook(backward_begins)  # type: ignore[no-untyped-call]

        trainer.members.register_forward_pre_hook(forward_begins)
        loss = next(part for part in trainer.task.modules() if isinstance(part, ClickLoss))
        loss.register_forward_hook(forward_ends)
        for _, part in trainer.optimizer.combined.optimizers:
            part.step = self._timed(part.step)

    def _timed(self, step: Callable[..., None]) -> Callable[..., None]:
        """One optimizer's step, as a phase of its own."""

        def timed_step(*arguments: Any, **options: Any) -> None:
            self.clock.enter("dense optimizer")
            step(*arguments, **options)
            self.clock.enter("tables")

        return timed_step

    def stepper(self, kind: str, batches: Iterator[Batch]) -> Callable[[], object]:
        """Return what takes one step: the trainer's own, or the forward that predicts."""
        trainer = self.trainer
        trainer.task.train(kind == "training")
        if kind == "training":
            return lambda: trainer.train_step(batches)
        trainer.one_step.detach()
        device = trainer.world.device
        return torch.no_grad()(lambda: trainer.task(next(batches).to(device))[1])

    def turn(self, kind: str, step: Callable[[], object], seconds: float) -> None:
        """Take steps for some time, and keep what one cost."""
        self.clock = Clock()
        started = time.perf_counter()
        while self.clock.steps < LEAST_STEPS or time.perf_counter() - started < seconds:
            step()
            self.clock.steps += 1
        self.clock.enter(PHASES[0])
        self.turns[kind].append(self.clock.per_step())

    def totals(self, kind: str) -> list[list[float]]:
        """Wall and CPU milliseconds of a step in each turn."""
        return [[sum(phase[clock] for phase in turn.values()) for clock in (0, 1)] for turn in self.turns[kind]]

    def costs(self, kind: str) -> dict[str, Any]:
        """Milliseconds of a step, without loading, its phases, and FLOP/s of the dense ones."""
        turns = self.turns[kind]
        phases = {phase: by_clock([turn[phase] for turn in turns]) for phase in PHASES}
        dense_ms = sum(phases[phase]["cpu"] for phase in ("dense forward", "dense backward"))
        flops = self.flops * (3 if kind == "training" else 1)
        totals = self.totals(kind)
        return {
            **{clock: spread([total[index] for total in totals]) for index, clock in enumerate(CLOCKS)},
            "phases": phases,
            "mflop": flops / 1e6,
            "gflops": flops / dense_ms / 1e6,
            "together": [group.indices for group in self.trainer.members.groups if group.on],
        }


def _flops(member: Member) -> int:
    """Of the matrix products of one row's forward."""
    return member.backbone.flops() + linear_flops(member.head) + linear_flops(member.dense_field or member.dropout)


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def by_clock(turns: list[list[float]]) -> dict[str, float]:
    """Medians of wall and CPU time."""
    return {clock: statistics.median(turn[index] for turn in turns) for index, clock in enumerate(CLOCKS)}
