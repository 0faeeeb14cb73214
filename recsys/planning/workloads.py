"""The workload of a recipe, with or without its data."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.config import InputError, load, read_values
from recsys.planning.config import Changes
from recsys.sharding.workload import Workload

if TYPE_CHECKING:
    from recsys.training.config import TrainConfig


def workload_of(recipe: str, changes: Changes) -> Workload:
    """Tables, batch and dense part of a recipe.

    Args:
        recipe: a recipe's name, a config file, a `package.module:function`, or a file that holds a workload.
        changes: what is to be otherwise.

    Raises:
        InputError: no such recipe, no data to tell its tables, or a change that a workload cannot have.
    """
    from recsys.recipes.table_sets import SCHEMAS, WORKLOADS  # noqa: PLC0415  (torch takes seconds to import)

    if recipe in WORKLOADS:
        return _changed(WORKLOADS[recipe](), recipe, changes)
    if recipe.endswith((".json", ".yaml", ".yml")):
        values = read_values(Path(recipe))
        if isinstance(values, dict) and "tables" in values:
            return _changed(load(Workload, values, recipe), recipe, changes)
    from recsys.data.schema import Schema  # noqa: PLC0415
    from recsys.recipes import find_recipe  # noqa: PLC0415
    from recsys.training.workload import workload  # noqa: PLC0415

    config = _with(find_recipe(recipe), changes)
    if recipe in SCHEMAS and changes.data is None and not config.data.is_dir():
        schema = SCHEMAS[recipe]()
    else:
        schema = Schema.load(config.data)
    return replace(workload(config, schema), name=recipe)


def _with(config: "TrainConfig", changes: Changes) -> "TrainConfig":
    model, optimizer, train = config.model, config.optimizer, config.train
    try:
        if changes.embedding_dim:
            model = replace(model, embedding_dim=changes.embedding_dim)
        if changes.table_dtype:
            model = replace(model, table_dtype=changes.table_dtype)
        if changes.optimizer:
            optimizer = replace(optimizer, tables=changes.optimizer)
        if changes.batch_size:
            train = replace(train, batch_size=changes.batch_size)
        return replace(
            config,
            data=changes.data or config.data,
            members=changes.members or config.members,
            model=model,
            optimizer=optimizer,
            train=train,
        )
    except ValueError as error:
        raise InputError(str(error)) from None


def _changed(workload: Workload, recipe: str, changes: Changes) -> Workload:
    for name in ("data", "members"):
        if getattr(changes, name):
            raise InputError(f"--{name}: {recipe} is a set of tables, without data or members; leave it out")
    tables = workload.tables
    if changes.embedding_dim:
        tables = tuple(replace(table, dim=changes.embedding_dim) for table in tables)
    if changes.table_dtype:
        tables = tuple(replace(table, dtype=changes.table_dtype) for table in tables)
    return replace(
        workload,
        tables=tables,
        batch_size=changes.batch_size or workload.batch_size,
        optimizer=changes.optimizer or workload.optimizer,
    )
