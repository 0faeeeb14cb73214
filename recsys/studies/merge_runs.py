"""Offline merge: members of several runs, trained apart, become one run that evaluates and resumes like any other."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch.distributed as dist
from tyro.conf import Positional

from recsys.config import InputError, load_file, nearest
from recsys.data.schema import Schema
from recsys.distributed import World, on_first
from recsys.members import MemberSpec, describe_member, renamed
from recsys.merge.rules import NAMES
from recsys.training import checkpoint
from recsys.training.config import TrainConfig
from recsys.training.metrics import ClickMetrics
from recsys.training.predictions import greedy_order, member_metrics, merge_for
from recsys.training.run import RunFolder, data_facts
from recsys.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """What to merge."""

    sources: Positional[tuple[Path, ...]]
    """Run folders, or files of predictions (Parquet with row, label and a column of logits a member)."""
    out: Path
    """Run folder to make, or file of predictions where the sources are such files."""
    rule: str | None = None
    """How logits become one: mean_logit, mean_probability, confidence, weighted or stacked; without it, as in the first
    run, or mean_logit."""
    fit_on: tuple[Path, ...] = ()
    """For files and the rules weighted and stacked: predictions of the same members on the validation rows."""

    def __post_init__(self) -> None:
        if self.rule is not None and self.rule not in NAMES:
            raise ValueError(f"unknown merge rule {self.rule!r}; {nearest(self.rule, NAMES)}")

    @property
    def of_files(self) -> bool:
        """Whether files of predictions are merged, and not runs."""
        return any(source.is_file() or source.suffix == ".parquet" for source in self.sources)


def merge_runs(config: MergeConfig, world: World) -> dict[str, ClickMetrics] | None:
    """Make one run of the members of several; rank 0 gets the validation metrics, the others None.

    The first run's config holds for the merged one; what members have otherwise, learning rates too, becomes options of
    theirs. Layers, tables and optimizer state are those of the newest checkpoints, so that the run can go on; its step
    is the highest of theirs. The folder takes its name when all of it is there.

    Raises:
        InputError: runs that cannot be one, saying why.
    """
    runs, merged, names = on_first(lambda: _plan(config))
    trainer = Trainer(merged, world)
    newest = on_first(lambda: [_newest(run) for run in runs])
    trainer.step = checkpoint.load_members(list(zip(newest, names, strict=True)), trainer.task, trainer.optimizer)
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
    checkpoint.save(run.checkpoints, trainer.step, trainer.task, trainer.optimizer, run.config)
    if predictions:
        merge = merge_for(merged.merge, predictions)
        run.save_merge(merge, greedy_order(predictions), trainer.step)
        metrics = member_metrics(predictions, merge)
        with run.writer(trainer.step, is_first=True) as write:
            write("valid", trainer.step, {name: asdict(member) for name, member in metrics.items()})
        partial.rename(config.out)
    dist.barrier()
    return metrics


def _plan(config: MergeConfig) -> tuple[list[RunFolder], TrainConfig, list[dict[str, str]]]:
    """Runs, the config of the merged one, and for each run its members' names there to those here."""
    if not config.sources:
        raise InputError("no run named; name two or more run folders")
    if config.out.exists():
        raise InputError(f"{config.out}: exists already; name another --out")
    runs = [RunFolder.existing(path) for path in config.sources]
    configs = [load_file(TrainConfig, run.config) for run in runs]
    first = configs[0]
    texts: list[str] = []
    names: list[dict[str, str]] = []
    taken: dict[str, tuple[RunFolder, str]] = {}
    for run, own in zip(runs, configs, strict=True):
        _check_alike(runs[0], first, run, own)
        specs = [_with_own_rates(spec, own, first) for spec in own.specs()]
        names.append({})
        for spec, before in zip(renamed(specs, taken), specs, strict=True):
            taken[spec.name] = run, before.name
            names[-1][spec.name] = before.name
            texts.append(describe_member(spec, first.model, first.backbones))
    merged = replace(first, members=tuple(texts), out=config.out, resume=False, merge=config.rule or first.merge)
    _check_distinct(merged.specs(), taken)
    return runs, merged, names


def _with_own_rates(spec: MemberSpec, own: TrainConfig, first: TrainConfig) -> MemberSpec:
    """Write a job's learning rates into its member where the merged job has others."""
    rates = {}
    for name in ("dense_lr", "table_lr"):
        job, merged = getattr(own.optimizer, name), getattr(first.optimizer, name)
        rates[name] = job if getattr(spec, name) is None and job != merged else getattr(spec, name)
    return replace(spec, **rates)


def _check_alike(first: RunFolder, theirs: TrainConfig, run: RunFolder, own: TrainConfig) -> None:
    """Raise InputError unless two runs can be one."""
    Schema.load(first.path)
    first.check_schema(Schema.load(run.path))
    one, other = _data(first, theirs), _data(run, own)
    for name in one:
        if one[name] != other[name]:
            raise InputError(
                f"{run.path} was trained on other data than {first.path}: {name} {other[name]} instead of {one[name]}; "
                "rows that one held out, another may have learnt. Merge runs of one prepared folder"
            )
    if own.model.tables == "shared":
        raise InputError(f"{run.path}: its members share tables; only members with private tables can join others")
    alike = {
        "model.precision": (theirs.model.precision, own.model.precision),
        "optimizer.tables": (theirs.optimizer.tables, own.optimizer.tables),
        "optimizer.table_eps": (theirs.optimizer.table_eps, own.optimizer.table_eps),
        "loss": (theirs.loss, own.loss),
        "data-parallel tables": tuple(config.train.sharding == "data_parallel" for config in (theirs, own)),
    }
    for name, (wanted, found) in alike.items():
        if wanted != found:
            raise InputError(f"{run.path} has {name} {found}, {first.path} has {wanted}; a run has one for all members")


def _data(run: RunFolder, config: TrainConfig) -> dict[str, object]:
    """Which data a run was trained on; a run of an older version has not kept that, and its data may still stand."""
    if run.data.exists():
        facts: dict[str, object] = json.loads(run.data.read_text())
        return facts
    return data_facts(config.data)


def _check_distinct(specs: Sequence[MemberSpec], origins: dict[str, tuple[RunFolder, str]]) -> None:
    """Raise InputError where one member stands twice: a merge gains nothing by it."""
    seen: dict[str, MemberSpec] = {}
    for spec in specs:
        for other in seen.values():
            if replace(spec, name="") == replace(other, name=""):
                (run, name), (other_run, other_name) = origins[spec.name], origins[other.name]
                raise InputError(
                    f"member {name} of {run.path} is member {other_name} of {other_run.path}: same backbone, seed "
                    f"{spec.seed} and settings, so merging them gains nothing; train one with another --seed"
                )
        seen[spec.name] = spec


def _newest(run: RunFolder) -> Path:
    found = checkpoint.newest(run.checkpoints)
    if found is None:
        raise InputError(f"{run.checkpoints}: no checkpoint in it; the run has not saved one yet")
    return found
