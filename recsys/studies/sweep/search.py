"""The search: which trials a sweep makes, and what is kept of them. Optuna draws, prunes and remembers."""

import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from recsys.config import InputError, dump, load_file, write_whole
from recsys.data.schema import Schema
from recsys.studies.running import steps_of
from recsys.studies.sweep.config import SweepConfig
from recsys.studies.sweep.report import Record, show, write_report
from recsys.studies.sweep.space import Choice, Range, Space, Values, applied, described, read_space
from recsys.studies.sweep.trial import Outcome, run_trial
from recsys.training.config import TrainConfig
from recsys.training.sinks import finite

TRIALS = 20
"""Of random and tpe, where the user says nothing."""
FOLDER, PROBLEM, SECONDS, TRAINED = "folder", "problem", "seconds", "trained"
"""What is noted of a trial beside what Optuna keeps: TRAINED where one that failed was trained to its end, and would
fail again. Attempts at one trial have the same folder."""
# What may change when a sweep goes on: how many trials, and how long one that is stopped may take.
MAY_CHANGE = {"out", "trials", "grace_s", "ranks"}


@dataclass(frozen=True)
class Swept:
    """A sweep at its end."""

    records: list[Record]
    """Trials, in their order."""
    best: Record
    page: Path
    config: Path
    """Of the best trial, as `recsys train` takes it."""


def sweep(config: SweepConfig, recipe: TrainConfig) -> Swept:
    """Make all trials that are not made yet, and report.

    Raises:
        InputError: an unknown field, values that cannot be, data that cannot be opened, one folder for all
            checkpoints, another sweep in the folder, or no trial that came to its end.
    """
    if recipe.checkpoints.folder is not None:
        raise InputError(
            f"--checkpoints.folder {recipe.checkpoints.folder}: all trials would write to it; leave it out, and each "
            "has its own in its folder"
        )
    space = read_space(config)
    combinations = list(_combinations(space)) if config.sampler == "grid" else []
    _check([applied(recipe, values) for values in combinations] or [recipe])  # told now, and not after hours
    number = len(combinations) or config.trials or TRIALS
    _take_folder(config, recipe)
    study = _study(config)
    _give_up(study)
    _try_again(study)
    started, done_before = time.perf_counter(), len(_finished(study))
    while len(finished := _finished(study)) < number:
        trial = _next(study, space, combinations)
        done = _run(config, recipe, study, trial)
        elapsed = time.perf_counter() - started
        left = elapsed / (len(finished) + 1 - done_before) * (number - len(finished) - 1)
        _tell(f"sweep: trial {len(finished) + 1} of {number}, {done}, about {left / 60:,.1f} min left")
    records = [_record(trial) for trial in _finished(study).values()]
    complete = [record for record in records if record.state == "complete"]
    if not complete:
        raise InputError(f"{config.out}: no trial came to its end; the last: {records[-1].problem}")
    best = (min if config.lower_is_better else max)(complete, key=lambda record: record.value)
    path = config.out / "best.json"
    found = replace(applied(recipe, best.values), out=config.out.absolute() / "best")
    write_whole(path, json.dumps(dump(found), indent=2) + "\n")
    write_whole(config.out / "results.json", json.dumps([finite(dump(record)) for record in records], indent=2) + "\n")
    page = write_report(config, records, best)
    show(config, records)
    print(f"{page}\nrecsys train {path}")  # noqa: T201  (what the verb is asked for)
    return Swept(records, best, page, path)


def _check(trials: list[TrainConfig]) -> None:
    """See that the data of every trial can be opened."""
    for train in {(train.data, train.train, train.loader): train for train in trials}.values():
        Schema.load(train.data)
        steps_of(train, train.data)


def _take_folder(config: SweepConfig, recipe: TrainConfig) -> None:
    """Make the folder, or see that the sweep in it is this one."""
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{config.out}: cannot make the folder of the sweep ({error.strerror})") from None
    mine, base = config.out / "sweep.json", config.out / "recipe.json"
    if mine.exists():
        for path, kind, now, may_change in (
            (mine, SweepConfig, config, MAY_CHANGE),
            (base, TrainConfig, recipe, {"out"}),
        ):
            before, given = dump(load_file(kind, path)), dump(now)
            for name in before:
                if before[name] != given[name] and name not in may_change:
                    raise InputError(
                        f"{config.out}: holds a sweep with {name} {before[name]}, now it is {given[name]}; name "
                        "another --out"
                    )
    write_whole(base, json.dumps(dump(recipe), indent=2) + "\n")
    write_whole(mine, json.dumps(dump(config), indent=2) + "\n")


def _combinations(space: Space) -> Iterator[dict[str, str]]:
    choices = {name: found.values for name, found in space.items() if isinstance(found, Choice)}
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def _study(config: SweepConfig) -> Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(config.out / "trials.journal"))),
        study_name="sweep",
        direction="minimize" if config.lower_is_better else "maximize",
        pruner=_pruner(config),
        load_if_exists=True,
    )
    # A sweep that goes on must not draw again what it drew at its beginning.
    study.sampler = _sampler(config, config.seed + len(study.trials))
    return study


def _sampler(config: SweepConfig, seed: int) -> BaseSampler:
    return TPESampler(seed=seed) if config.sampler == "tpe" else RandomSampler(seed=seed)


def _pruner(config: SweepConfig) -> BasePruner:
    if config.pruner == "median":
        return MedianPruner(n_startup_trials=config.warmup_trials, n_warmup_steps=config.warmup_steps)
    return SuccessiveHalvingPruner() if config.pruner == "asha" else NopPruner()


def _give_up(study: Study) -> None:
    """Close the attempts that a killed sweep left open, and put the same values up again, in the same folder."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        if FOLDER in trial.user_attrs:
            study.enqueue_trial(trial.params, user_attrs={FOLDER: trial.user_attrs[FOLDER]})


def _try_again(study: Study) -> None:
    """Put up again what failed in an earlier sweep, in the same folder: its reason may be gone."""
    for folder, trial in _finished(study).items():
        if trial.state == TrialState.FAIL and TRAINED not in trial.user_attrs:
            _tell(f"sweep: tries again what failed: {described(trial.params)} ({trial.user_attrs[PROBLEM]})")
            study.enqueue_trial(trial.params, user_attrs={FOLDER: folder})


def _finished(study: Study) -> dict[str, FrozenTrial]:
    """Trials that are not to be made again, by folder, in the order of their folders."""
    last = {trial.user_attrs[FOLDER]: trial for trial in study.get_trials(deepcopy=False) if FOLDER in trial.user_attrs}
    return {
        folder: trial
        for folder, trial in sorted(last.items())
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        or (trial.state == TrialState.FAIL and PROBLEM in trial.user_attrs)  # else it was interrupted
    }


def _next(study: Study, space: Space, combinations: list[dict[str, str]]) -> Trial:
    """Take up what waits, else the grid's next combination, or values that are drawn."""
    if combinations and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        tried = [trial.params for trial in _finished(study).values()]
        study.enqueue_trial(next(values for values in combinations if values not in tried))
    trial = study.ask({name: _distribution(found) for name, found in space.items()})
    if FOLDER not in trial.user_attrs:
        trial.set_user_attr(FOLDER, f"{trial.number:04d}")
    return trial


def _distribution(found: Choice | Range) -> BaseDistribution:
    if isinstance(found, Choice):
        return CategoricalDistribution(found.values)
    if found.kind == "int":
        return IntDistribution(int(found.low), int(found.high))
    return FloatDistribution(found.low, found.high, log=found.kind == "log")


def _run(config: SweepConfig, recipe: TrainConfig, study: Study, trial: Trial) -> str:
    """Make a trial; what to say of it."""
    values: Values = trial.params
    out = config.out.absolute() / "trials" / trial.user_attrs[FOLDER]
    try:
        train = replace(applied(recipe, values), out=out, resume="auto")
        last = steps_of(train, train.data)
    except InputError as error:
        return _fail(study, trial, values, str(error), 0.0)

    reported: set[int] = set()

    def hopeless(step: int, value: float) -> bool:
        trial.report(value, step)
        reported.add(step)
        return step < last and trial.should_prune()

    outcome = run_trial(config, train, hopeless)
    for step in sorted(outcome.values.keys() - reported):  # written just before the trial ended
        trial.report(outcome.values[step], step)
    if outcome.problem:
        return _fail(study, trial, values, outcome.problem, outcome.seconds)
    if not outcome.pruned and math.isnan(max(outcome.values.items())[1]):  # which Optuna takes for an interrupted one
        trial.set_user_attr(TRAINED, True)
        return _fail(study, trial, values, f"{config.metric} is nan at its end", outcome.seconds)
    return f"{described(values)}: {_ended(config, study, trial, outcome)}"


def _fail(study: Study, trial: Trial, values: Values, problem: str, seconds: float) -> str:
    trial.set_user_attr(PROBLEM, problem)
    trial.set_user_attr(SECONDS, seconds)
    study.tell(trial, state=TrialState.FAIL)
    return f"{described(values)}: failed ({problem})"


def _ended(config: SweepConfig, study: Study, trial: Trial, outcome: Outcome) -> str:
    """Keep how a trial ended; what to say of it."""
    trial.set_user_attr(SECONDS, outcome.seconds)
    step, value = max(outcome.values.items())
    if outcome.pruned:
        study.tell(trial, state=TrialState.PRUNED)
        return f"stopped at step {step:,} with {config.metric} {value:.5f}"
    study.tell(trial, value)
    return f"{config.metric} {value:.5f} (best {study.best_value:.5f})"


def _record(trial: FrozenTrial) -> Record:
    steps: dict[int, float] = dict(sorted(trial.intermediate_values.items()))
    attributes: dict[str, Any] = trial.user_attrs
    return Record(
        name=attributes[FOLDER],
        values=trial.params,
        state={"COMPLETE": "complete", "PRUNED": "stopped", "FAIL": "failed"}[trial.state.name],
        value=trial.value if trial.value is not None else next(reversed(steps.values()), float("nan")),
        validations=steps,
        seconds=attributes[SECONDS],
        problem=attributes.get(PROBLEM),
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201  (beside the lines of `progress`)
