"""Jobs: which runs a merge study consists of."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from recsys.data.schema import Schema
from recsys.members import SEED_STRIDE, MemberSpec, describe_member, parse_members
from recsys.studies.config import MergeStudyConfig
from recsys.studies.rivals import Cost, cost, rival
from recsys.training.config import TrainConfig

Kind = Literal["members", "rivals", "ablations", "compressed"]
ABLATIONS: dict[str, dict[str, Any]] = {"shared": {"tables": "shared"}, "joint": {"loss": "joint"}}
"""What a job of several members is called, and what it does otherwise than members alone."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a study, and its folder OUT/KIND/NAME."""

    name: str
    kind: Kind
    config: TrainConfig
    cost: Cost
    """Of all its members together."""

    @property
    def folder(self) -> Path:
        """Of the run, with the predictions beside it."""
        return self.config.out

    @property
    def members(self) -> tuple[str, ...]:
        """Names of its members; each stands in one job alone."""
        return tuple(spec.name for spec in self.config.specs())


def member_name(backbone: str, seed: int) -> str:
    """Name of a backbone's member of the seed of that index."""
    return f"{backbone}_s{seed}"


def rival_name(backbone: str, kind: str, size: int, seed: int) -> str:
    """Name of a bigger model; `kind` is a RivalKind."""
    return f"{backbone}_{kind}{size}_s{seed}"


def ablation_members(config: MergeStudyConfig, kind: str, index: int) -> list[tuple[str, str]]:
    """Members of the `index`-th job of a key of ABLATIONS, each with its counterpart in the pool."""
    seeds = range(index * config.ablation_members, (index + 1) * config.ablation_members)
    return [(f"{config.main}_{kind}_s{seed}", member_name(config.main, seed)) for seed in seeds]


def plan(config: MergeStudyConfig, recipe: TrainConfig, schema: Schema) -> list[Job]:
    """All jobs of a study; first one member of every backbone, then the next.

    Seeds are the recipe's, and SEED_STRIDE more for each further one: member i of any backbone and of any job has the
    same. The order of rows is the recipe's for all of them.
    """
    jobs = [
        _alone(config, recipe, schema, "members", _spec(recipe, backbone, seed, member_name(backbone, seed)))
        for seed in range(max(map(config.num_seeds, config.backbones)))
        for backbone in config.backbones
        if seed < config.num_seeds(backbone)
    ]
    for size in config.rivals:
        for kind in config.rival_kinds:
            bigger = rival(_spec(recipe, config.main, 0, "one"), size, kind, schema)
            for seed in range(config.rival_seeds):
                name = rival_name(config.main, kind, size, seed)
                spec = replace(bigger, name=name, seed=recipe.seed + seed * SEED_STRIDE)
                jobs.append(_alone(config, recipe, schema, "rivals", spec))
    for index in range(config.ablation_sets):
        jobs += [_ablation(config, recipe, schema, kind, index) for kind in ABLATIONS]
    return jobs


def _spec(recipe: TrainConfig, backbone: str, seed: int, name: str) -> MemberSpec:
    text = f"{backbone}:name={name},seed={recipe.seed + seed * SEED_STRIDE}"
    model = replace(recipe.model, tables="private")
    return parse_members((text,), 0, model, recipe.backbones)[0]


def _alone(config: MergeStudyConfig, recipe: TrainConfig, schema: Schema, kind: Kind, spec: MemberSpec) -> Job:
    model = replace(recipe.model, tables="private")
    text = describe_member(spec, model, recipe.backbones)
    train = _train_config(config, recipe, f"{kind}/{spec.name}", (text,))
    return Job(name=spec.name, kind=kind, config=train, cost=cost(spec, schema))


def _ablation(config: MergeStudyConfig, recipe: TrainConfig, schema: Schema, kind: str, index: int) -> Job:
    name = f"{config.main}_{kind}_{index}"
    first = index * config.ablation_members
    specs = [
        _spec(recipe, config.main, first + place, member)
        for place, (member, _) in enumerate(ablation_members(config, kind, index))
    ]
    texts = tuple(describe_member(spec, specs[0].model, recipe.backbones) for spec in specs)
    train = _train_config(config, recipe, f"ablations/{name}", texts)
    changes = dict(ABLATIONS[kind])
    if "tables" in changes:
        train = replace(train, model=replace(train.model, tables=changes.pop("tables")))
    train = replace(train, **changes)
    costs = [cost(spec, schema) for spec in specs]
    total = sum(costs[1:], start=costs[0])
    if train.model.tables == "shared":
        total = replace(total, table_bytes=costs[0].table_bytes)
    return Job(name=name, kind="ablations", config=train, cost=total)


def _train_config(config: MergeStudyConfig, recipe: TrainConfig, folder: str, members: tuple[str, ...]) -> TrainConfig:
    return replace(
        recipe,
        data=config.data or recipe.data,
        out=config.out / folder,
        members=members,
        loss="independent",
        merge="mean_logit",
        resume="auto",
        model=replace(recipe.model, tables="private"),
    )
