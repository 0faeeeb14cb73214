"""The config of a sweep. It imports no torch, so that help is instant."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import UseAppendAction

Metric = Literal["ne", "logloss", "auc"]


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Which settings to try: `recsys sweep RECIPE --grid FIELD=A,B ... -- OPTIONS OF recsys train`.

    A trial is a `recsys train` of its own, in OUT/trials. The same command goes on with a sweep that was interrupted.
    """

    out: Path
    """Folder of the sweep: trials, sweep.html, and best.json, which `recsys train` takes."""
    grid: UseAppendAction[tuple[str, ...]] = ()
    """FIELD=A,B: a field of the config, as in config.json, and its values. One that has commas in it: FIELD=A;B. A
    field of several, such as members: split each value at its spaces. Several --grid are tried in all combinations."""
    space: UseAppendAction[tuple[str, ...]] = ()
    """FIELD=log(A,B), uniform(A,B) or int(A,B): a range to draw from, for the methods random and tpe."""
    method: Literal["grid", "random", "tpe"] | None = None
    """grid: all combinations. random: drawn blindly. tpe: drawn where earlier trials did well. Without it, grid, or tpe
    where there is a --space."""
    trials: int | None = None
    """Trials of random and tpe; 20 when not given."""
    metric: Metric = "ne"
    """Of the merge, on the validation rows at the end of a trial: normalised entropy, logloss or AUC."""
    pruner: Literal["median", "asha", "none"] = "median"
    """Which trials are stopped early, by the metric at validations on the way (--train.validate-every): those worse
    than the median of the others at that step, those outside the best quarter at steps four times apart, or none."""
    warmup_trials: int = 4
    """Trials that have to finish before the median stops any."""
    warmup_steps: int = 0
    """Steps of a trial before the median stops it."""
    seed: int = 0
    """Seed of what is drawn; the trials' own seed is the recipe's."""
    ranks: int = 1
    """Processes of a trial, under torchrun on this machine."""
    grace_s: float = 60.0
    """Time that a stopped trial has to end before it is killed."""

    def __post_init__(self) -> None:
        if not self.grid and not self.space:
            raise ValueError("nothing to try: name --grid FIELD=A,B or --space FIELD=log(A,B)")
        for name in ("trials", "ranks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        for name in ("warmup_trials", "warmup_steps", "seed", "grace_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")
        if self.sampler == "grid" and self.space:
            raise ValueError("method grid cannot draw from --space; use random or tpe")
        if self.sampler == "grid" and self.trials is not None:
            raise ValueError(f"trials {self.trials}: a grid tries all combinations; use --method random for some")

    @property
    def sampler(self) -> Literal["grid", "random", "tpe"]:
        """The method."""
        return self.method or ("tpe" if self.space else "grid")

    @property
    def lower_is_better(self) -> bool:
        """Of the metric."""
        return self.metric != "auc"
