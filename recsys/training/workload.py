"""What a model costs a step, in the words of sharding plans."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recsys.backbones.layers import linear_flops
from recsys.data.multihot import MLPERF_SIZES
from recsys.data.schema import Schema
from recsys.model import Member, RecModel
from recsys.sharding.workload import TableDtype, TableSpec, Workload
from recsys.training.config import TrainConfig

DTYPES: dict[DataType, TableDtype] = {DataType.FP32: "fp32", DataType.FP16: "fp16", DataType.BF16: "bf16"}


def workload(config: TrainConfig, schema: Schema, model: RecModel | None = None) -> Workload:
    """The tables, batch and dense part of a run.

    Args:
        config: of the run.
        schema: of its data.
        model: of the run, on any device and not sharded; built without memory where left out.

    Raises:
        InputError: a width that cannot work.
    """
    if model is None:
        with torch.device("meta"):
            model = RecModel(schema, config.specs())
    hotness = ids_a_row(config, schema)
    tables, in_tables = [], 0
    for part in model.modules():
        if isinstance(part, EmbeddingBagCollection):
            in_tables += sum(parameter.numel() for parameter in part.parameters())
            tables += [
                TableSpec(
                    name=table.name,
                    rows=table.num_embeddings,
                    dim=table.embedding_dim,
                    pooling=float(sum(hotness.get(feature.split(":")[0], 1) for feature in table.feature_names)),
                    dtype=DTYPES[table.data_type],
                )
                for table in part.embedding_bag_configs()
            ]
    members: Sequence[Member] = list(model.members)
    return Workload(
        name=schema.name,
        tables=tuple(tables),
        batch_size=config.train.batch_size,
        optimizer=config.optimizer.tables,
        dense_parameters=sum(parameter.numel() for parameter in model.parameters()) - in_tables,
        dense_flops=dense_flops(members),
        dense_precision=config.model.precision,
        # Accumulation recomputes: one part of the batch leaves its values behind at a time.
        dense_activations=sum(_activations(member) for member in members) // config.train.accumulate,
    )


def ids_a_row(config: TrainConfig, schema: Schema) -> Mapping[str, int]:
    """Ids a row of each feature, as they reach the model."""
    if config.loader.multi_hot == "none":
        return schema.hotness
    return dict(zip(schema.sparse, config.loader.multi_hot_sizes or MLPERF_SIZES, strict=True))


def dense_flops(members: Iterable[Member]) -> int:
    """Of one row's forward in all members."""

    def flops(member: Member) -> int:
        around = [member.head, member.dense_field]
        return int(member.backbone.flops()) + sum(linear_flops(part) for part in around if part is not None)

    return sum(flops(member) for member in members)


def _activations(member: Member) -> int:
    """Values that linear layers leave behind for one row's backward: what goes in and what comes out."""
    layers = [layer for layer in member.modules() if isinstance(layer, nn.Linear)]
    return sum(layer.in_features + layer.out_features for layer in layers)
