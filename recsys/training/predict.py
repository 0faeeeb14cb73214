"""Predict: logits of a run's members on held-out rows, each row exactly once."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from recsys.config import InputError, load_file, nearest
from recsys.data.loader import Loader
from recsys.data.schema import Schema
from recsys.distributed import World, mean_over_ranks, on_all_alike, on_every, on_first
from recsys.embeddings.config import served_dtype
from recsys.embeddings.precision import for_inference
from recsys.embeddings.quantised import TableBytes, quantise_tables
from recsys.members import MemberSpec
from recsys.merge.rules import FITTED, Merge
from recsys.training.casts import cast_once
from recsys.training.checkpoint import folder as checkpoints
from recsys.training.checkpoint.load import load, load_averages
from recsys.training.config import TrainConfig
from recsys.training.ema import Ema
from recsys.training.optim import dense_parameters
from recsys.training.predictions import Predictions, greedy_order, merge_for
from recsys.training.provenance import data_facts
from recsys.training.run import RunFolder
from recsys.training.sharded import held_out, shard
from recsys.training.share import Share, check_groups, predict_share


class Predictor:
    """Members of a run at its newest checkpoint, sharded over the job's ranks, without what training needs.

    Args:
        path: run folder.
        world: the job.
        members: which of them, by name; all where left out. No others are built or read.
        data: prepared folder, where it is not the one that the run was trained on.
        batch_size: rows of a global batch, where it is not that of training.

    Raises:
        InputError: no run, no checkpoint, an unknown member, or data that does not fit the run.
    """

    def __init__(
        self,
        path: Path,
        world: World,
        members: Sequence[str] | None = None,
        data: Path | None = None,
        batch_size: int | None = None,
    ) -> None:
        with on_all_alike():  # what one rank alone lacks is agreed on in there
            self._build(path, world, members, data, batch_size)

    def _build(
        self, path: Path, world: World, members: Sequence[str] | None, data: Path | None, batch_size: int | None
    ) -> None:
        self.world = world
        self.run = RunFolder.existing(path)
        config = load_file(TrainConfig, self.run.config)
        loop = replace(config.train, batch_size=batch_size or config.train.batch_size)
        # A pinned plan, and constraints, are for all members on the ranks that trained them.
        sharding = replace(config.sharding, plan=None, constraints=(), replicas=1)
        self.config = replace(config, data=data or config.data, train=loop, sharding=sharding)
        self.schema = on_every(lambda: Schema.load(self.config.data))
        self.run.check_schema(self.schema)
        on_first(lambda: self.run.check_held_out(self.config.data))
        newest = on_first(lambda: checkpoints.newest(self.run.checkpoints))
        if newest is None:
            raise InputError(f"{self.run.checkpoints}: no checkpoint in it; the run has not saved one yet")
        on_first(lambda: self._check_config(newest))
        specs = [self._spec(name) for name in members] if members else self.config.specs()
        self.specs = [replace(spec, model=for_inference(spec.model, world.device)) for spec in specs]
        local_batch_size = max(self.config.train.batch_size // world.size, 1)
        self.task, model, _ = shard(self.config, self.schema, self.specs, local_batch_size, world)
        self.step = load(newest, self.task)
        if config.optimizer.ema_decay is not None:
            averages = Ema(dense_parameters(self.task), config.optimizer.ema_decay)
            load_averages(newest, averages)
            averages.apply()
        cast_once(model, self.schema)  # after all that is loaded, which is fp32

    def _check_config(self, newest: Path) -> None:
        """See that `config.json` describes the members that are in the checkpoint, but for how they are computed."""
        trained = {spec.name: spec for spec in load_file(TrainConfig, newest / "config.json").specs()}
        for spec in self.config.specs():
            there = trained.get(spec.name)
            how = {name: getattr(spec.model, name) for name in ("batched", "compile", "rows")}
            if there is None or replace(there, model=replace(there.model, **how)) != spec:
                raise InputError(
                    f"{self.run.config}: member {spec.name} is not the one in {newest}, which has a config.json too; "
                    "copy that one back"
                )

    def _spec(self, name: str) -> MemberSpec:
        specs = {spec.name: spec for spec in self.config.specs()}
        if name not in specs:
            raise InputError(f"{self.run.path} has no member {name!r}; {nearest(name, specs)}")
        return specs[name]

    @property
    def names(self) -> list[str]:
        """Of the members."""
        return [spec.name for spec in self.specs]

    def merge(self, members: Sequence[str] | None = None) -> Merge:
        """The run's merge of these members, or of others in the order given; all ranks call it.

        A fitted rule is fitted anew, and kept, where validation has not done so at this step: the run was killed in
        between, or it saves more often than it validates.

        Raises:
            InputError: the rule must be fitted anew, and not all members are here.
        """
        config, everyone = self.config, [spec.name for spec in self.config.specs()]
        if config.merge not in FITTED:
            return Merge(rule=config.merge)
        saved = on_first(lambda: self.run.load_merge(self.step))
        if saved is None:
            if self.names != everyone:
                raise InputError(
                    f"{self.run.path}: {config.merge} was not fitted at step {self.step}; `recsys evaluate "
                    f"{self.run.path}` does that"
                )
            predictions = self.predict("valid")
            saved = on_first(lambda: self._fit(predictions))
        return saved[0].subset([everyone.index(name) for name in members or self.names])

    def quantise(self, dtype: str) -> TableBytes:
        """Quantise the tables for all that is predicted from now on; bytes of them over all ranks.

        Raises:
            ValueError: no such dtype.
            InputError: tables that cannot be quantised.
        """
        mine = quantise_tables(self.task, served_dtype(dtype))
        both = mean_over_ranks(torch.tensor([mine.before, mine.after], dtype=torch.float64)) * self.world.size
        before, after = (round(value) for value in both.tolist())
        return replace(mine, before=before, after=after)

    def _fit(self, predictions: Predictions | None) -> tuple[Merge, list[str]]:
        assert predictions is not None, "rank 0 has them"
        merge, order = merge_for(self.config.merge, predictions), greedy_order(predictions)
        self.run.save_merge(merge, order, self.step)
        return merge, order

    def held_out(self, split: str) -> Loader:
        """Every row of a split once, in the order of its files."""
        return held_out(self.config, split, self.world)

    def facts(self, split: str) -> dict[str, str]:
        """What predictions of a split are of."""
        manifest = data_facts(self.config.data)["manifest_sha256"]
        facts = {"schema": self.schema.hash, "split": split, "data": str(self.config.data)}
        return facts | ({"manifest": manifest} if manifest else {})

    def share(self, split: str, by: str | None = None) -> Share:
        """Logits of this rank's rows of a split, with the ids of a feature that they are grouped by, if one is named.

        Raises:
            InputError: rows cannot be grouped by that feature.
        """
        if by is not None:
            on_first(lambda: check_groups(by, self.schema, self.config.loader.multi_hot))
        share = predict_share(self.task, self.names, self.held_out(split).once(), self.world.device, by)
        not_finite = mean_over_ranks(share.logits_NM.isfinite().logical_not().any(dim=0).double())
        for name, ranks in zip(self.names, not_finite.tolist(), strict=True):
            if ranks:
                with on_all_alike():
                    raise InputError(
                        f"{self.run.path}: member {name} predicts no number for rows of {split}; it diverged in "
                        f"training, or its checkpoint of step {self.step} is damaged"
                    )
        return share

    def predict(self, split: str) -> Predictions | None:
        """Logits of a split's rows on rank 0, None on the others; see `share`."""
        return self.share(split).gathered()
