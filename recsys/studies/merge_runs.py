"""Offline merge: members of several runs, trained apart, become one run that evaluates and resumes like any other."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from recsys.config import InputError, load_file
from recsys.data.multihot import MLPERF_SIZES
from recsys.data.schema import Schema
from recsys.distributed import World, on_first
from recsys.members import MemberSpec, describe_member, renamed
from recsys.sharding.plan import Plan
from recsys.studies.config import MergeConfig
from recsys.training.checkpoint import folder as checkpoints
from recsys.training.checkpoint.load import load_averages, load_members
from recsys.training.checkpoint.saver import save_once
from recsys.training.config import TrainConfig
from recsys.training.metrics import ClickMetrics
from recsys.training.predictions import greedy_order, member_metrics, merge_for
from recsys.training.provenance import data_facts, difference, read_facts
from recsys.training.run import RunFolder
from recsys.training.trainer import Trainer


def merge_runs(config: MergeConfig, world: World) -> dict[str, ClickMetrics] | None:
    """Make one run of the members of several; rank 0 gets the validation metrics, the others None.

    The first run's config holds for the merged one; what members have otherwise, learning rates too, becomes options of
    theirs. Layers, tables and optimizer state are those of the newest checkpoints, so that the run can go on; its step
    is the highest of theirs. What a run has otherwise and no member can have for itself (weight decay, schedule, batch
    size, order of rows, number of steps) matters only when the merged run goes on: one line a run to stderr names it,
    and one line names the steps where they differ or a run is unfinished. The folder takes its name when all of it is
    there.

    Raises:
        InputError: runs that cannot be one, saying why.
    """
    merged, sources = on_first(lambda: _plan(config))
    trainer = Trainer(merged, world)
    trainer.step = load_members(sources, trainer.task, trainer.optimizer)
    if averages := trainer.one_step.ema:
        averages.restart()
        for path, names in sources:
            for here, there in names.items():
                load_averages(path, averages, here, there)
    with trainer.one_step.swapped():
        predictions = trainer.predict(trainer.valid_loader)
    partial = config.out.with_name(f".{config.out.name}.partial")
    if world.is_first:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    run, metrics = RunFolder(partial), None
    if world.is_first:
        partial.mkdir(parents=True)
        run.describe(merged, trainer.schema, trainer.plan)
    dist.barrier()
    save_once(run.checkpoints, world, trainer.step, trainer.state(), [run.config, run.plan])
    if predictions:
        merge = merge_for(merged.merge, predictions)
        run.save_merge(merge, greedy_order(predictions), trainer.step)
        metrics = member_metrics(predictions, merge)
        with run.writer(trainer.step, is_first=True) as write:
            write("valid", trainer.step, {name: asdict(member) for name, member in metrics.items()})
        partial.rename(config.out)
    dist.barrier()
    return metrics


@dataclass(frozen=True)
class _Source:
    """A run to merge."""

    run: RunFolder
    config: TrainConfig

    @property
    def path(self) -> Path:
        return self.run.path

    def data(self) -> dict[str, Any]:
        """Which data it was trained on; a run of an older version has not kept that, and its data may still stand."""
        return read_facts(self.run.data) if self.run.data.exists() else data_facts(self.config.data)


def _plan(config: MergeConfig) -> tuple[TrainConfig, list[tuple[Path, dict[str, str]]]]:
    """The merged run's config, and for each run its newest checkpoint and its members' names here to those there."""
    if not config.sources:
        raise InputError("no run named; name two or more run folders")
    if config.fit_on:
        raise InputError("--fit-on is for files of predictions; runs are fitted on their own validation rows")
    if config.out.exists():
        raise InputError(f"{config.out}: exists already; name another --out")
    sources = [_Source(run, load_file(TrainConfig, run.config)) for run in map(RunFolder.existing, config.sources)]
    first = sources[0]
    for source in sources:
        _check_alike(first, source)
    data = config.data or first.config.data
    _check_data(first, data)
    newest = [_newest(source.run) for source in sources]
    specs, names = _members(sources)
    texts = tuple(describe_member(spec, first.config.model, first.config.backbones) for spec in specs)
    merged = replace(
        first.config,
        data=data,
        out=config.out,
        members=texts,
        loss="independent",
        merge=config.rule or first.config.merge,
        resume="never",
        checkpoints=replace(first.config.checkpoints, folder=None),
        # What a run says of single tables is of other tables than these.
        sharding=replace(first.config.sharding, plan=None, constraints=()),
    )
    try:
        config.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {config.out}: cannot make its folder ({error.strerror})") from None
    for line in (*_changes(sources), *_steps(sources, newest)):
        print(line, file=sys.stderr)  # noqa: T201  (the metrics go to stdout)
    return merged, list(zip(newest, names, strict=True))


def _members(sources: Sequence[_Source]) -> tuple[list[MemberSpec], list[dict[str, str]]]:
    """Members of the merged run, and for each run their names here to those there.

    Raises:
        InputError: a member stands twice: a merge gains nothing by it.
    """
    taken: dict[str, tuple[RunFolder, MemberSpec]] = {}
    specs: list[MemberSpec] = []
    names: list[dict[str, str]] = []
    for source in sources:
        own = [_as_in(sources[0].config, spec, source.config) for spec in source.config.specs()]
        names.append({})
        for spec, before in zip(renamed(own, taken), own, strict=True):
            for other_run, other in taken.values():
                if replace(other, name="") == replace(spec, name=""):
                    raise InputError(
                        f"member {before.name} of {source.path} is member {other.name} of {other_run.path}: same "
                        f"backbone, seed {spec.seed} and settings, so merging them gains nothing; train one with "
                        "another --seed"
                    )
            taken[spec.name] = source.run, before
            names[-1][spec.name] = before.name
            specs.append(spec)
    return specs, names


def _as_in(first: TrainConfig, spec: MemberSpec, own: TrainConfig) -> MemberSpec:
    """A member of the job `own` as the first job would have it: a learning rate is its own where that job's differs."""

    def rate(name: str) -> float | None:
        found: float = getattr(own.optimizer, name) if getattr(spec, name) is None else getattr(spec, name)
        return None if found == getattr(first.optimizer, name) else found

    model = replace(spec.model, batched=first.model.batched)
    return replace(spec, model=model, dense_lr=rate("dense_lr"), table_lr=rate("table_lr"))


def _check_alike(first: _Source, source: _Source) -> None:
    """Raise InputError unless a run and the first one can be one."""
    Schema.load(first.path)
    first.run.check_schema(Schema.load(source.path))
    if different := difference(first.data(), source.data()):
        raise InputError(
            f"{source.path} was trained on other data than {first.path}: {different}; rows that one held out, another "
            "may have learnt. Merge runs of one prepared folder"
        )
    if source.config.model.tables == "shared":
        raise InputError(f"{source.path}: its members share tables; only members with private tables can join others")
    if any(spec.model.embeddings == "dynamic" for spec in source.config.specs()):
        raise InputError(
            f"{source.path}: its members have dynamic embeddings, and which id has which row is every run's own; merge "
            "files of predictions instead"
        )
    if source.config.loss == "joint" and len(source.config.specs()) > 1:
        raise InputError(
            f"{source.path}: its members were trained by one joint loss, so each is right only beside the others; "
            "only members with a loss of their own can join others"
        )
    found = _of_all_members(source)
    for name, wanted in _of_all_members(first).items():
        if wanted != found[name]:
            raise InputError(
                f"{source.path} has {name} {found[name]}, {first.path} has {wanted}; a run has one for all members"
            )


def _of_all_members(source: _Source) -> dict[str, Any]:
    """What members cannot have each for itself, and that changes what they are or which ids they see."""
    config, plan = source.config, Plan.load(source.run.plan)
    loader = config.loader
    if 0 < len(plan.replicated) < len(plan.tables):
        raise InputError(
            f"{source.path}: table {plan.replicated[0]} is data_parallel and others are not, so their optimizer "
            "state is kept apart; only runs in which all tables are, or none, can be merged"
        )
    ids_added = loader.multi_hot != "none"
    return {
        "model.precision": config.model.precision,
        "optimizer.tables": config.optimizer.tables,
        "optimizer.table_eps": config.optimizer.table_eps,
        "data-parallel tables": bool(plan.replicated),
        "loader.multi_hot": loader.multi_hot,
        "loader.multi_hot_sizes": (loader.multi_hot_sizes or MLPERF_SIZES) if ids_added else (),
        "loader.seed": loader.seed if ids_added else None,
    }


def _check_data(first: _Source, data: Path) -> None:
    """Raise InputError unless the folder is what the runs were trained on."""
    if not data.is_dir():
        raise InputError(f"{data}: no such folder, and {first.path} was trained on it; name where it is now by --data")
    first.run.check_schema(Schema.load(data))
    if different := difference(first.data(), data_facts(data)):
        raise InputError(
            f"{data} is not the data that {first.path} was trained on: {different}; rows that are held out now may "
            "have been learnt. Name that data by --data"
        )


def _changes(sources: Sequence[_Source]) -> list[str]:
    """A line for each run whose settings are not the first's, of those that matter only for going on."""
    first, lines = sources[0], []
    for source in sources[1:]:
        now, then = _for_going_on(source.config), _for_going_on(first.config)
        names = [name for name in now if now[name] != then[name]]
        if names:
            told = ", ".join(f"{name} {now[name]}" for name in names)
            become = ", ".join(str(then[name]) for name in names)
            lines.append(f"{source.path}: on --resume auto, {told} become {first.path}'s {become}")
    return lines


def _for_going_on(config: TrainConfig) -> dict[str, Any]:
    loop, loader, optimizer = config.train, config.loader, config.optimizer
    return {
        **{name: getattr(loop, name) for name in ("batch_size", "num_epochs", "num_steps")},
        **{name: getattr(optimizer, name) for name in ("weight_decay", "warmup_steps", "decay")},
        **{f"loader.{name}": getattr(loader, name) for name in ("seed", "slots")},
    }


def _steps(sources: Sequence[_Source], newest: Sequence[Path]) -> list[str]:
    """A line that tells each run's step where they differ, or where one is not at its last."""
    steps, told = [checkpoints.step_of(path) for path in newest], []
    for source, step in zip(sources, steps, strict=True):
        last = _num_steps(source)
        told.append(f"{source.path} at step {step:,}" + (f" of {last:,}, unfinished" if last and step < last else ""))
    if len(set(steps)) == 1 and not any("unfinished" in one for one in told):
        return []
    return [f"{'; '.join(told)}; the merged run goes on from step {max(steps):,}"]


def _num_steps(source: _Source) -> int | None:
    """Steps that a run takes; None where that is a number of epochs of nobody knows how many rows."""
    loop, num_rows = source.config.train, (source.data().get("rows") or {}).get("train")
    return loop.num_steps or (loop.num_epochs * (num_rows // loop.batch_size) if num_rows else None)


def _newest(run: RunFolder) -> Path:
    found = checkpoints.newest(run.checkpoints)
    if found is None:
        raise InputError(f"{run.checkpoints}: no checkpoint in it; the run has not saved one yet")
    return found
