"""`recsys predict`: a file of predictions, of all members of a run, of some, or of as many as a time budget allows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from recsys.config import InputError, load_file, nearest
from recsys.distributed import World, on_first
from recsys.embeddings.quantised import TableBytes
from recsys.merge.rules import Merge
from recsys.training.budget import Answers, Timed
from recsys.training.checkpoint import folder as checkpoints
from recsys.training.config import TrainConfig
from recsys.training.metrics import ClickMetrics
from recsys.training.predict import Predictor
from recsys.training.predictions import Predictions, check_out, metrics_of
from recsys.training.request import PredictConfig
from recsys.training.run import RunFolder


@dataclass(frozen=True)
class Answer:
    """Who answered, and how well."""

    metrics: dict[str, ClickMetrics]
    """Of each member on the rows that it answered, and of the merge on all."""
    timing: dict[str, object] | None
    """See `Answers.facts`; None without a budget."""
    tables: TableBytes | None
    """Where tables were quantised."""


def answer(config: PredictConfig, world: World) -> Answer | None:
    """Write the file of predictions; rank 0 gets what it holds, the others None.

    Raises:
        InputError: no run, no such member, a budget in which none answers, or data that does not fit.
    """
    on_first(lambda: check_out(config.out))
    run = RunFolder.existing(config.run)
    names = on_first(lambda: _members(run, config))
    predictions: Predictions | None
    timing: Answers | None = None
    if config.budget:
        if world.size > 1:
            raise InputError(f"--budget is for one process, and this job has {world.size}; start it without torchrun")
        members = [_predictor(config, world, [name]) for name in names]
        merge, facts = members[0].merge(names), members[0].facts(config.split)
        tables = _quantised(members, config.tables)
        predictions, timing = Timed(members, config.budget_ms).predict(config.split)
    else:
        predictor = _predictor(config, world, names)
        merge, facts = predictor.merge(), predictor.facts(config.split)
        tables = _quantised([predictor], config.tables)
        predictions = predictor.predict(config.split)
    if predictions is None:
        return None
    merged = merge_answers(predictions, merge)
    predictions.save(config.out, facts | ({"tables": tables.dtype} if tables else {}), merged)
    metrics = metrics_of(predictions, merged, ~np.isnan(predictions.logits_NM))
    return Answer(metrics, timing.facts() if timing else None, tables)


def _predictor(config: PredictConfig, world: World, members: Sequence[str]) -> Predictor:
    return Predictor(config.run, world, members, config.data, config.batch_size)


def _quantised(predictors: Sequence[Predictor], dtype: str | None) -> TableBytes | None:
    """Quantise the tables of all predictors, whose merge was fitted before; bytes of all of them."""
    if dtype is None:
        return None
    sizes = [predictor.quantise(dtype) for predictor in predictors]
    return replace(sizes[0], before=sum(each.before for each in sizes), after=sum(each.after for each in sizes))


def _members(run: RunFolder, config: PredictConfig) -> list[str]:
    """Names of the members to ask, the one to ask first at the head."""
    known = [spec.name for spec in load_file(TrainConfig, run.config).specs()]
    numbers = [name for name in config.members if name.isdecimal() and name not in known]
    if numbers and len(config.members) > 1:
        raise InputError(
            f"--members {' '.join(config.members)}: {numbers[0]} stands alone, for the best so many; the run's members "
            f"are {', '.join(known)}"
        )
    if numbers:
        wanted = int(config.members[0])
        if not 1 <= wanted <= len(known):
            raise InputError(f"--members {wanted}: the run has {len(known)} members; name 1 to {len(known)}")
        return _best_first(run, known)[:wanted]
    for name in config.members:
        if name not in known:
            raise InputError(f"{run.path} has no member {name!r}; {nearest(name, known)}")
    if len(set(config.members)) < len(config.members):
        raise InputError(f"--members {' '.join(config.members)}: a member is named twice")
    return list(config.members) or (_best_first(run, known) if config.budget else known)


def _best_first(run: RunFolder, known: list[str]) -> list[str]:
    newest = checkpoints.newest(run.checkpoints)
    saved = run.load_merge(checkpoints.step_of(newest)) if newest else None
    return saved[1] if saved else known


def merge_answers(predictions: Predictions, merge: Merge) -> np.ndarray:
    """Merged logit of each row [N]: of those members that answered it, whose logits are not nan."""
    logits = torch.from_numpy(predictions.logits_NM).double()
    answered = ~torch.isnan(logits)
    merged = torch.full((len(logits),), float("nan"), dtype=torch.float64)
    patterns, which = torch.unique(answered, dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        rows, members = which == number, pattern.nonzero().flatten().tolist()
        merged[rows] = merge.subset(members)(logits[rows][:, members])
    values: np.ndarray = merged.numpy()
    return values
