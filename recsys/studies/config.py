"""The configs of studies, of a merge study and of an offline merge. They import no torch, so that help is instant."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from recsys.config import nearest
from recsys.place import Place

IN_PROCESS = "in_process"
RivalKind = Literal["wider", "deeper", "bigger"]


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What all studies that train are told: where to, on what, and where jobs run."""

    out: Path
    """Folder of the study: runs and predictions of all jobs, results.json, report.html and pictures."""
    data: Place | None = None
    """Prepared folder, may be a URL; without it, the recipe's."""
    scheduler: str = "in_process"
    """Where jobs are trained: in this process one after another, or by a scheduler of torchx, such as local_cwd."""
    torchx_args: str = "-j 1x1"
    """With a scheduler: arguments of the torchx component, such as "-j 2x8 --gpu 8"."""
    torchx_cfg: str = ""
    """With a scheduler: its options, KEY=VALUE,KEY=VALUE, over those in .torchxconfig."""
    component: str = "launchers/train.py:ddp"
    """With a scheduler: the torchx component that runs `recsys train`."""
    dry_run: bool = False
    """List the jobs, their sizes and what is left to do, and stop."""


@dataclass(frozen=True, kw_only=True)
class MergeStudyConfig(StudyConfig):
    """Which members a merge study trains, how it merges them, and what it compares the merges with.

    Every job is trained as RECIPE says, but for its members. RECIPE may be a config file: steps, batch size, learning
    rates and a member's sizes are changed there; the config.json of any run is one to start from. The same command goes
    on with a study that was interrupted, and makes the report of a finished one anew; checkpoints of jobs that have
    their predictions may be removed.
    """

    truth: Path | None = None
    """FILE.truth.parquet of `recsys synth`: adds the metrics of the best possible predictions."""
    backbones: tuple[str, ...] = ("fnn", "ipnn", "deepfm", "dcn", "dcnv2", "finalmlp", "wukong", "rankmixer")
    """Backbones whose members are merged; these are the merging paper's."""
    seeds: int = 4
    """Members of each backbone, each with a seed of its own."""
    more_seeds_of: tuple[str, ...] = ("dcnv2",)
    """Backbones with more members than that; the first is the one that rivals and ablations are made of."""
    more_seeds: int = 8
    """Members of each of those: two disjoint merges of M seeds take 2 M of them."""
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Members (M) of a merge."""
    rivals: tuple[int, ...] = (2, 4)
    """Budgets, in multiples of one member's FLOPs, at which bigger models are trained; none for no rivals."""
    rival_kinds: tuple[RivalKind, ...] = ("wider", "deeper", "bigger")
    """Models at each budget. wider: embeddings are as many times wider, and hidden widths fill the FLOPs. deeper: more
    layers besides. bigger: a member's own embedding dimension, and hidden widths fill the FLOPs."""
    rival_seeds: int = 3
    """Seeds of each of those models; fewer than 3 decide nothing."""
    ablation_members: int = 4
    """Members of a job that shares tables, and of one that trains on the joint loss."""
    ablation_sets: int = 2
    """Jobs of each of both kinds, of other seeds each; 0 for none."""

    def __post_init__(self) -> None:
        for name in ("seeds", "more_seeds", "rival_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        self._check_backbones()
        self._check_sizes()
        if self.ablation_sets < 0 or (self.ablation_sets and self.ablation_members < 2):
            raise ValueError("ablation_sets must not be negative, and ablation_members at least 2")
        if self.ablation_sets * self.ablation_members > self.more_seeds:
            raise ValueError(
                f"{self.ablation_sets} ablation_sets of {self.ablation_members} ablation_members need as many seeds of "
                f"{self.main}; raise more_seeds from {self.more_seeds} to {self.ablation_sets * self.ablation_members}"
            )

    def _check_backbones(self) -> None:
        from recsys.backbones import BACKBONES  # noqa: PLC0415  (help does not need it, and it imports torch)

        if not self.backbones:
            raise ValueError("backbones is empty; name one at least")
        for name, number in Counter(self.backbones).items():
            if name not in BACKBONES:
                raise ValueError(f"unknown backbone {name!r}; {nearest(name, BACKBONES)}")
            if number > 1:
                raise ValueError(f"backbone {name} stands twice; `seeds` says how many members of each there are")
        for name in self.more_seeds_of:
            if name not in self.backbones:
                raise ValueError(f"more_seeds_of {name!r} is none of the backbones; {nearest(name, self.backbones)}")
        if self.more_seeds_of and self.more_seeds < self.seeds:
            raise ValueError(f"more_seeds {self.more_seeds} must not be below seeds {self.seeds}")
        if not self.more_seeds_of and (self.rivals or self.ablation_sets):
            raise ValueError("more_seeds_of is empty; rivals and ablations are made of the first of them")

    def _check_sizes(self) -> None:
        num_members = sum(map(self.num_seeds, self.backbones))
        if not self.sizes or min(self.sizes) < 1 or max(self.sizes) > num_members:
            raise ValueError(f"sizes {self.sizes} must lie between 1 and the pool's {num_members} members")
        for size in self.rivals:
            if not 2 <= size <= self.more_seeds:
                raise ValueError(
                    f"rivals {size} must lie between 2 and the {self.more_seeds} seeds of {self.main}, whose merge "
                    "they are compared with; raise more_seeds"
                )
        if self.rivals and not self.rival_kinds:
            raise ValueError("rival_kinds is empty; name one at least, or no rivals")
        for name in ("sizes", "rivals", "rival_kinds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)} names one twice")

    @property
    def main(self) -> str:
        """The backbone that rivals and ablations are made of."""
        return self.more_seeds_of[0]

    def num_seeds(self, backbone: str) -> int:
        """Members of a backbone in the pool."""
        return self.more_seeds if backbone in self.more_seeds_of else self.seeds


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
    """For files and the rules weighted and stacked: predictions on the validation rows, a file for each source, in the
    order of the sources and with the same columns."""
    data: Place | None = None
    """For runs: the prepared folder that they were trained on, where it has moved; may be a URL."""

    def __post_init__(self) -> None:
        if self.rule is None:
            return
        from recsys.merge.rules import NAMES  # noqa: PLC0415  (help does not need it, and it imports torch)

        if self.rule not in NAMES:
            raise ValueError(f"unknown merge rule {self.rule!r}; {nearest(self.rule, NAMES)}")

    @property
    def of_files(self) -> bool:
        """Whether files of predictions are merged, and not runs."""
        return any(source.is_file() or source.suffix == ".parquet" for source in self.sources)
