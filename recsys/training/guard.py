"""The guard: a loss that is no number, or that jumps, stops the run, or its batch is left out."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from recsys.config import InputError
from recsys.data.batch import Batch
from recsys.distributed import World
from recsys.members import MemberSpec
from recsys.training.optim import Optimizer, OptimizerConfig

MEMORY = 0.99
"""What the running mean of a loss keeps of itself a step."""
LAG = 4
"""Batches of a GPU that may be held until what is found in their losses has reached the host."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens to a batch whose loss is NaN or infinite, or jumps. It is saved in OUT/bad_batches."""

    action: Literal["stop", "skip", "back_off"] = "stop"
    """stop: the run ends, at the next line of its log. skip: the batch is left out. back_off: and the learning rates
    are lower for a while. The last two have ranks wait for one another between forward and backward."""
    spike_factor: float | None = None
    """A loss above this times its running mean jumps."""
    spike_warmup: int = 100
    """Steps before a loss can jump."""
    back_off_factor: float = 0.5
    """What back_off multiplies the learning rates by."""
    back_off_steps: int = 100
    """For how many steps."""
    max_in_a_row: int = 10
    """Batches in a row that may be left out; then the run ends, for it is not the batches."""
    max_saved: int = 10
    """Batches that a rank saves."""

    def __post_init__(self) -> None:
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise ValueError(f"spike_factor {self.spike_factor} must be above 1")
        if not 0 <= self.back_off_factor <= 1:
            raise ValueError(f"back_off_factor {self.back_off_factor} must lie in [0, 1]")
        for name, least in (("spike_warmup", 1), ("back_off_steps", 1), ("max_in_a_row", 1), ("max_saved", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {least}")


class _Seen(NamedTuple):
    """What a step found, on its way to the host."""

    step: int
    batch: Batch
    report: Tensor
    """Losses, their running means before, and whether each is bad [3, M]."""
    arrived: torch.cuda.Event | None

    @property
    def is_here(self) -> bool:
        """Whether the host can read the report without waiting."""
        return self.arrived is None or bool(self.arrived.query())  # type: ignore[no-untyped-call]


class Guard:
    """Looks at the losses of every step.

    Args:
        config: what to look for, and what to do.
        members: whose losses, in order.
        rates: of the run, for what an error tells.
        optimizer: whose learning rates back off.
        world: the job.
        out: run folder.

    Attributes:
        skipped: batches that were left out, on all ranks alike.
    """

    def __init__(
        self,
        config: GuardConfig,
        members: Sequence[MemberSpec],
        rates: OptimizerConfig,
        optimizer: Optimizer,
        world: World,
        out: Path,
    ) -> None:
        self.config, self._members, self._rates, self._optimizer, self._world = config, members, rates, optimizer, world
        self._folder = out / "bad_batches"
        self._means_M = torch.zeros(len(members), device=world.device)
        self._num_seen = torch.zeros((), dtype=torch.int64, device=world.device)
        self.skipped = torch.zeros((), dtype=torch.int64)
        self._backed_off_until = torch.zeros((), dtype=torch.int64)
        self._in_a_row = self._num_saved = 0
        self._found: tuple[int, str] | None = None
        self._under_way: deque[_Seen] = deque()

    def admits(self, losses_M: Tensor, batch: Batch, step: int) -> bool:
        """Look at this rank's losses of a batch: whether it is to be learned from, on all ranks alike.

        Raises:
            InputError: too many batches in a row are to be left out, or the first one of the run.
        """
        report = self._report(losses_M)
        if self.config.action == "stop":
            self._send(report, batch, step)
            return True
        rows = report.tolist()
        bad = [index for index, is_bad in enumerate(rows[2]) if is_bad]
        if not bad:
            self._in_a_row = 0
            return True
        self._save(batch, step, report)
        self._in_a_row += 1
        if step == 0 or self._in_a_row > self.config.max_in_a_row:
            why = f" ({self._in_a_row} batches in a row)" if step else ""
            raise _for_all(self._told(rows, bad[0], step) + why)
        self.skipped += 1
        if self.config.action == "back_off":
            self._backed_off_until.fill_(step + 1 + self.config.back_off_steps)
        return False

    def begin(self, step: int) -> None:
        """Set how far learning rates are backed off at `step`."""
        backs_off = step < int(self._backed_off_until)
        self._optimizer.factor = self.config.back_off_factor if backs_off else 1.0

    def check(self) -> None:
        """See on all ranks that the losses so far were good: before a line of the log, and before a checkpoint.

        Raises:
            InputError: one was not, naming member, step and value.
        """
        while self._under_way:
            self._receive()
        found: list[tuple[int, str] | None] = [None] * self._world.size
        dist.all_gather_object(found, self._found)
        bad = [one for one in found if one]
        if bad:  # what is bad on one rank is on all a step later: the first is told
            raise _for_all(min(bad)[1])

    def _report(self, losses_M: Tensor) -> Tensor:
        losses_M = losses_M.detach().float().clone()
        factor = self.config.spike_factor
        if self._world.size > 1 and (factor is not None or self.config.action != "stop"):
            dist.all_reduce(losses_M)
            losses_M /= self._world.size
        means_M = self._means_M.clone()
        bad_M = ~losses_M.isfinite()
        if factor is not None:
            bad_M |= (losses_M > factor * means_M) & (self._num_seen >= self.config.spike_warmup)
            # The mean of all so far, until there are enough for one that forgets; of good ones alone.
            weight = (1.0 / (self._num_seen + 1)).clamp(min=1 - MEMORY)
            good_M = torch.where(bad_M, means_M, losses_M)
            self._means_M += weight * (good_M - means_M)
            self._num_seen += 1
        return torch.stack([losses_M, means_M, bad_M.float()])

    def _send(self, report: Tensor, batch: Batch, step: int) -> None:
        """Have a report copied to the host, and look at those that have arrived: no step waits for its own."""
        arrived = None
        if report.device.type == "cuda":
            report = torch.empty(report.shape, pin_memory=True).copy_(report, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._under_way.append(_Seen(step, batch, report, arrived))
        while self._under_way and (len(self._under_way) > LAG or self._under_way[0].is_here):
            self._receive()

    def _receive(self) -> None:
        seen = self._under_way.popleft()
        if seen.arrived is not None:
            seen.arrived.synchronize()
        rows = seen.report.tolist()
        if self._found is None and any(rows[2]):
            self._found = seen.step, self._told(rows, rows[2].index(1.0), seen.step)
            self._save(seen.batch, seen.step, seen.report)

    def _told(self, rows: list[list[float]], index: int, step: int) -> str:
        spec, loss, mean = self._members[index], rows[0][index], rows[1][index]
        rates = [
            f"--optimizer.{name.replace('_', '-')} ({getattr(self._rates, name)})"
            if getattr(spec, name) is None
            else f"its own {name} ({getattr(spec, name)})"
            for name in ("dense_lr", "table_lr")
        ]
        jumps = f", {loss / mean:.1f} times its running mean" if math.isfinite(loss) and mean else ""
        return f"the loss of member {spec.name} is {loss:.6g}{jumps} at step {step}; lower {' or '.join(rates)}"

    def _save(self, batch: Batch, step: int, report: Tensor) -> None:
        """Keep a batch for inspection: its tensors, with the losses."""
        if self._num_saved >= self.config.max_saved:
            return
        self._num_saved += 1
        self._folder.mkdir(parents=True, exist_ok=True)
        ids = batch.sparse
        tensors = {
            "ids": ids.values(),
            "lengths": ids.lengths(),
            "dense": batch.dense,
            "labels": batch.labels,
            "weights": batch.weights,
        }
        values: dict[str, object] = {
            name: tensor.cpu().clone() for name, tensor in tensors.items()
        }  # they share memory
        values |= {"step": step, "features": ids.keys()}
        values["losses"] = dict(zip((spec.name for spec in self._members), report[0].tolist(), strict=True))
        torch.save(values, self._folder / f"step-{step:08d}-rank-{self._world.rank}.pt")

    def state(self) -> dict[str, Tensor]:
        """Running means, and what was left out; equal on all ranks."""
        return {
            "means": self._means_M,
            "seen": self._num_seen,
            "skipped": self.skipped,
            "backed_off_until": self._backed_off_until,
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take them over."""
        for name, value in self.state().items():
            value.copy_(state[name])


def _for_all(message: str) -> InputError:
    """An error that every rank raises."""
    error = InputError(message)
    error.on_all_ranks = True
    return error
