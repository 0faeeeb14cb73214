"""The loop of a run: train, log, validate, save, and stop where it is told to."""

import itertools
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from recsys.data.batch import Batch
from recsys.data.loader import Loader
from recsys.distributed import mean_over_ranks, on_first
from recsys.tasks.click import Outputs
from recsys.training.cadence import Cadence
from recsys.training.checkpoint.saver import Saver
from recsys.training.control import Ask, Control, Stopped
from recsys.training.metrics import ClickMetrics
from recsys.training.mlperf import LAST
from recsys.training.profile import Profile
from recsys.training.run import RunFolder
from recsys.training.share import validate
from recsys.training.watch import Watch

if TYPE_CHECKING:
    from recsys.training.trainer import Trainer

Write = Callable[[str, int, Mapping[str, Any]], None]


class Loop:
    """One run on one rank, from the step at which its trainer stands.

    Args:
        trainer: what is trained.
        run: where it is written down.
        control: what ranks ask of one another.
        watch: told of every step.
        saver: writes checkpoints.
        write: of the run's metrics, see `RunFolder.writer`.
        profile: told of every step.
    """

    def __init__(
        self,
        trainer: "Trainer",
        run: RunFolder,
        control: Control,
        watch: Watch,
        saver: Saver,
        write: Write,
        profile: Profile,
    ) -> None:
        self.trainer, self.folder, self.control = trainer, run, control
        self.watch, self.saver, self.write, self.profile = watch, saver, write, profile
        config, loop = trainer.config, trainer.config.train
        self.saving = Cadence(every=loop.save_every, minutes=config.checkpoints.every_minutes)
        self.validation = Cadence(
            every=loop.validate_every,
            per_epoch=loop.validations_per_epoch,
            steps_per_epoch=trainer.loader.steps_per_epoch,
            minutes=loop.validate_every_minutes,
        )
        self._saved_step = trainer.step or None  # a run that goes on stands at a checkpoint
        trainer.log.restart()

    def run(self, advance: Callable[..., None], *, validate_first: bool = False) -> dict[str, ClickMetrics] | None:
        """Go on to the end; rank 0 gets the metrics of the last validation, the others None.

        Args:
            advance: shows progress.
            validate_first: whether a validation that is due where the trainer stands was not finished.

        Raises:
            SystemExit: a signal stopped the run; it is saved.
        """
        trainer, loop = self.trainer, self.trainer.config.train
        if validate_first and trainer.step < trainer.num_steps and self.validation.due(trainer.step):
            metrics, reason = self._validate()
            if reason:
                return self._end_early(metrics, reason)
        batches = itertools.islice(trainer.loader.stream(trainer.step), trainer.num_steps - trainer.step)
        while trainer.step < trainer.num_steps:
            outputs = trainer.train_step(batches)
            self.profile.step()
            trainer.log.update(outputs)
            self.watch.moved(trainer.step)
            is_last = trainer.step == trainer.num_steps
            advance(loop.batch_size, self._log(outputs) if is_last or trainer.step % loop.log_every == 0 else "")
            asked = self._asked()
            if "failed" in asked:
                self.saver.finish()
            if "stop" in asked:
                self._stop()
            metrics = None
            if not is_last and ("validate" in asked or self.validation.due(trainer.step)):
                metrics, reason = self._validate()
                if reason:
                    return self._end_early(metrics, reason)
            if not is_last and ("save" in asked or self.saving.due(trainer.step)):
                self._save(metrics)
        if self._saved_step != trainer.step:
            self._save(None)
        metrics, _ = self._validate()
        if metrics:
            self.saver.validated(trainer.step, {name: asdict(member) for name, member in metrics.items()})
            if worse := [name for name, member in metrics.items() if member.ne > 1]:
                self._say(
                    f"{', '.join(worse)}: NE above 1, which is worse than the same mean for every row; is a dense "
                    "column not scaled to about 1, a learning rate too high, or the run too short?"
                )
        self.write("end", trainer.step, {"reason": LAST})
        return metrics

    def _end_early(self, metrics: dict[str, ClickMetrics] | None, reason: str) -> dict[str, ClickMetrics] | None:
        self._say(f"stopped at step {self.trainer.step:,} of {self.trainer.num_steps:,}: {reason}")
        self._save(metrics)
        self.write("end", self.trainer.step, {"reason": reason})
        return metrics

    def _asked(self) -> set[Ask]:
        if self.trainer.world.is_first:
            for cadence, ask in ((self.saving, "save"), (self.validation, "validate")):
                if cadence.overdue():
                    self.control.ask(ask)  # type: ignore[arg-type]
        return self.control.agreed()

    def _log(self, outputs: Outputs) -> str:
        """Write a line of training metrics; returns what progress shows of it."""
        trainer = self.trainer
        trainer.one_step.guard.check()
        losses = mean_over_ranks(outputs.losses_M).tolist()
        names = [spec.name for spec in trainer.specs]
        values = {"epoch": trainer.epoch, "loss": dict(zip(names, losses, strict=True)), **trainer.log.record()}
        if trainer.config.loader.on_corrupt == "skip":
            values |= _skipped(trainer.loader)
        self.write("train", trainer.step, values)
        return "loss " + " ".join(f"{loss:.4f}" for loss in losses)

    def _validate(self) -> tuple[dict[str, ClickMetrics] | None, str | None]:
        """Score the validation rows, and keep the merge: metrics on rank 0, and on all ranks why to stop, if so."""
        trainer = self.trainer
        try:
            with trainer.one_step.phases("validation"), trainer.one_step.swapped():
                share = trainer.share(trainer.valid_loader, self._watched)
        except Stopped:
            self._stop()
        with self.watch.paused():
            found = validate(share, trainer.config.merge)
            metrics = found.metrics if trainer.world.is_first else None
            if metrics is not None:
                self.write("valid", trainer.step, {name: asdict(member) for name, member in metrics.items()})
                self.folder.save_merge(found.merge, found.order, trainer.step)
            reason = self._weigh(metrics)
        self.validation.done()
        trainer.log.restart()
        return metrics, reason

    def _weigh(self, metrics: dict[str, ClickMetrics] | None) -> str | None:
        """Whether to stop early, which rank 0 decides."""
        stopping, epoch = self.trainer.stopping, self.trainer.epoch

        def see() -> tuple[str | None, str | None, list[float]]:
            assert metrics is not None, "rank 0 has them"
            return *stopping.see(metrics, epoch), stopping.state().tolist()

        reason, warning, state = on_first(see)
        stopping.load_state(state)
        if warning:
            self._say(warning)
        return reason

    def _watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in self.control.until_stopped(batches):
            self.watch.moved(self.trainer.step)
            yield batch

    def _save(self, metrics: Mapping[str, ClickMetrics] | None) -> None:
        trainer = self.trainer
        trainer.one_step.guard.check()
        trainer.check_finite()
        known = {name: asdict(member) for name, member in metrics.items()} if metrics else None
        with self.watch.paused(), trainer.one_step.phases("save"):
            self.saver.save(trainer.step, trainer.state(), [self.folder.config, self.folder.plan], known)
        self._saved_step = trainer.step
        self.saving.done()

    def _stop(self) -> None:
        """Save, and end this process as the signal would have."""
        trainer = self.trainer
        if self._saved_step != trainer.step:
            self._save(None)
        with self.watch.paused():
            self.saver.finish()
        number = self.control.signal or signal.SIGTERM
        self._say(f"stopped by a signal at step {trainer.step:,}, which is saved; go on by --resume auto")
        raise SystemExit(128 + number)

    def _say(self, line: str) -> None:
        if self.trainer.world.is_first:
            print(f"recsys: {line}", file=sys.stderr, flush=True)  # noqa: T201


def _skipped(loader: Loader) -> dict[str, int]:
    """Row groups that could not be decoded on any rank, and their rows."""
    by_rank: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(by_rank, loader.skipped)
    groups = {where: rows for skipped in by_rank for where, rows in skipped.items()}
    return {"num_skipped_groups": len(groups), "num_skipped_rows": sum(groups.values())}
