"""What a throughput benchmark trains, and on what: a setting, its config, and synthetic prepared data."""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.backbones import BACKBONES
from recsys.config import dump, nearest
from recsys.data.schema import Schema
from recsys.members import BackboneConfigs, ModelConfig
from recsys.recipes.paper import SIZES
from recsys.training.config import LoopConfig, TrainConfig
from recsys.training.optim import OptimizerConfig

SEED, CTR = 7, 0.25
GROUP_ROWS = 65_536
EPOCH_IDS = 10_000_000
"""Of an epoch, so that data stay small; but at least so many batches:"""
EPOCH_BATCHES = 8
FOREVER = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One case: what is trained, at what sizes."""

    backbone: str = "dcnv2"
    """Any of `recsys backbones`."""
    sizes: Literal["paper", "default"] = "paper"
    """Of the backbone: those of the recipes *_paper where they name it (DCNv2 has an MLP of 1024-512-256), or its own
    default ones, which are smaller."""
    fields: int = 39
    """Sparse features; there are no dense columns."""
    rows_per_table: int = 25_000
    """Ids of each feature."""
    dim: int = 16
    """Columns of a table."""
    pooling: int = 1
    """Ids a row and feature."""
    zipf: float | None = None
    """Exponent of the power law that ids follow; uniform without."""
    batch_size: int = 8192
    """Rows of a global batch."""
    members: int = 1
    """Seeds of the backbone that train side by side."""
    ranks: int = 1
    """Processes, among which the cores of this machine are shared; on CUDA, devices."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(precision="bf16"))
    """Of our trainer; baselines compute in fp32."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Of our trainer; baselines take its rates."""

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ValueError(f"unknown backbone {self.backbone!r}; {nearest(self.backbone, BACKBONES)}")
        for name in ("fields", "rows_per_table", "pooling", "batch_size", "members", "ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        replace(self.model, embedding_dim=self.dim)  # refuses a width that cannot be
        if self.batch_size % self.ranks:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of ranks {self.ranks}")
        if self.model.embedding_dim not in (ModelConfig().embedding_dim, self.dim):
            raise ValueError(
                f"model.embedding_dim {self.model.embedding_dim} is not dim {self.dim}; give it by dim alone"
            )
        if self.zipf is not None and not self.zipf > 0:
            raise ValueError(f"zipf {self.zipf} must be above 0; leave it out for uniform ids")

    def record(self) -> dict[str, Any]:
        """What names a result: all sizes, and of model and optimizer what differs from their defaults."""
        usual = Setting()
        parts = {name: _differences(getattr(self, name), getattr(usual, name)) for name in ("model", "optimizer")}
        return dump(self) | parts

    def config(self, data: Path) -> TrainConfig:
        """Return what our trainer takes for it."""
        return TrainConfig(
            data=data,
            out=data / "unused",
            members=(f"{self.backbone}*{self.members}",),
            model=replace(self.model, embedding_dim=self.dim),
            backbones=SIZES if self.sizes == "paper" else BackboneConfigs(),
            optimizer=self.optimizer,
            train=LoopConfig(batch_size=self.batch_size, num_steps=FOREVER),
        )


def _differences(config: Any, usual: Any) -> dict[str, Any]:
    names = [part.name for part in dataclasses.fields(config)]
    return {name: dump(getattr(config, name)) for name in names if getattr(config, name) != getattr(usual, name)}


def make_data(setting: Setting, parent: Path) -> Path:
    """Write a prepared folder for a setting, unless `parent` has one; returns it.

    Labels are drawn by chance: there is nothing to be learned, and that costs the same.
    """
    ids_per_row = setting.fields * setting.pooling
    rows = max(EPOCH_IDS // ids_per_row, EPOCH_BATCHES * setting.batch_size)
    folder = parent / f"{setting.fields}x{setting.rows_per_table}x{setting.pooling}-{setting.zipf}-{rows}"
    if folder.exists():
        return folder
    features = [f"C{index + 1}" for index in range(setting.fields)]
    schema = Schema(
        name="throughput",
        dense=(),
        sparse=dict.fromkeys(features, setting.rows_per_table),
        labels=("label",),
        hotness=dict.fromkeys(features, setting.pooling) if setting.pooling > 1 else {},
    )
    for part, (split, num_rows) in enumerate({"train": rows, "valid": setting.batch_size}.items()):
        (folder / split).mkdir(parents=True)
        rng = np.random.default_rng([SEED, part])
        _write(folder / split / "part-00000.parquet", setting, features, num_rows, rng)
    schema.save(folder)
    return folder


def _write(path: Path, setting: Setting, features: list[str], rows: int, rng: np.random.Generator) -> None:
    one = pa.field("element", pa.int32(), nullable=False)
    kind = one.type if setting.pooling == 1 else pa.list_(one, setting.pooling)
    kinds = {"label": pa.uint8()} | dict.fromkeys(features, kind)
    columns = pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])
    weights = None if setting.zipf is None else np.arange(1, setting.rows_per_table + 1) ** -setting.zipf
    cumulated = None if weights is None else np.cumsum(weights) / weights.sum()
    with pq.ParquetWriter(path, columns, compression="lz4") as file:
        for first in range(0, rows, GROUP_ROWS):
            count = min(GROUP_ROWS, rows - first)
            arrays = [pa.array((rng.random(count) < CTR).astype(np.uint8))]
            for _ in features:
                ids = _draw(rng, count * setting.pooling, setting.rows_per_table, cumulated)
                flat = pa.array(ids)
                arrays.append(flat if setting.pooling == 1 else pa.FixedSizeListArray.from_arrays(flat, type=kind))
            file.write_table(pa.table(arrays, columns), row_group_size=GROUP_ROWS)


def _draw(rng: np.random.Generator, count: int, num_ids: int, cumulated: np.ndarray | None) -> np.ndarray:
    if cumulated is None:
        return rng.integers(num_ids, size=count, dtype=np.int32)
    return cumulated.searchsorted(rng.random(count)).clip(max=num_ids - 1).astype(np.int32)
