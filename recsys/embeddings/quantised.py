"""Tables for inference in fewer bits: each row of integers has a scale and a bias of its own.

A row x of D values becomes D integers q of b bits, and two numbers in fp16 (FBGEMM's `RowwiseQuantizedSBHalf`):

    bias = fp16(min x),  scale = fp16((max x - bias) / (2^b - 1)),  q = clip(round((x - bias) / scale), 0, 2^b - 1)
    x is read back as q * scale + bias, off by scale / 2 at most, but for what fp16 rounds off scale and bias.

Quantisation per row and accuracy of CTR models: Guan et al., 2019 (1911.02079). fp16 and fp32 have no scale.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantisedCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.config import InputError
from recsys.embeddings.config import ServedDtype
from recsys.memory import give_back_freed

BITS: dict[ServedDtype, int] = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4, "int2": 2}
SPARSE_TYPES: dict[ServedDtype, SparseType] = {
    "fp32": SparseType.FP32,
    "fp16": SparseType.FP16,
    "int8": SparseType.INT8,
    "int4": SparseType.INT4,
    "int2": SparseType.INT2,
}
SCALE_BYTES = 4
"""Of a row's scale and bias, both fp16."""
CHUNK_ROWS = 1 << 18


@dataclass(frozen=True)
class TableBytes:
    """What tables took before and after they were quantised."""

    dtype: ServedDtype
    before: int
    after: int

    def __str__(self) -> str:
        ratio = self.before / max(self.after, 1)
        return f"tables: {self.before:,} bytes as trained, {self.after:,} as {self.dtype} ({ratio:.2f} times smaller)"


def quantise_tables(module: nn.Module, dtype: ServedDtype) -> TableBytes:
    """Replace the tables under `module`, sharded or not, by quantised ones, which can be looked up but not trained.

    Keys and their order stay. Shards are quantised where they lie: rows of a table may be on several ranks, and come
    out as they would on one. Values of before are freed, so afterwards `module` has no state_dict of tables.

    Args:
        module: with tables that have their values.
        dtype: of the new ones.

    Returns:
        Bytes of this rank's tables.

    Raises:
        InputError: no tables, or tables whose columns are on several ranks, where rows would have several scales.
    """
    collections = [
        (parent, name, part)
        for parent in list(module.modules())
        for name, part in parent.named_children()
        if isinstance(part, ShardedEmbeddingBagCollection | EmbeddingBagCollection)
    ]
    if not collections:
        raise InputError(f"--tables {dtype}: the model has no tables to quantise")
    before = after = 0
    for parent, name, part in collections:
        if isinstance(part, ShardedEmbeddingBagCollection):
            _check_whole_rows(part, dtype)
            sizes = _quantise_shards(part, dtype)
        else:
            quantised, sizes = _quantise_collection(part, dtype)
            setattr(parent, name, quantised)
        before, after = before + sizes[0], after + sizes[1]
    return TableBytes(dtype, before, after)


def quantised_rows(weight: Tensor, dtype: ServedDtype) -> tuple[Tensor, Tensor | None]:
    """Quantise rows [N, D]: bytes [N, D * bits / 8], and scale and bias as bytes [N, 4] where `dtype` has them.

    It is computed on the CPU on every device, so that devices give the same numbers.
    """
    weight = weight.detach().float().cpu()
    if dtype == "fp32":
        return weight.view(torch.uint8), None
    if dtype == "fp16":
        return weight.half().view(torch.uint8), None
    bits, dim = BITS[dtype], weight.size(1)
    # FBGEMM writes integers by two bytes. A row's own values, repeated, fill them up without changing its scale.
    missing = -dim % (16 // bits)
    filled = torch.cat([weight, weight[:, :missing]], dim=1) if missing else weight
    rows = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(filled, bits)
    return rows[:, : dim * bits // 8], rows[:, -SCALE_BYTES:]


class QuantisedBags(nn.Module):
    """Looks up and pools ids in one rank's shards of a group of tables; stands where TorchRec's trained kernel stood.

    Args:
        weights: [rows, D] a table, D of its own.
        feature_table_map: index of the table of each feature.
        pooling: of all tables.
        dtype: of the values that are kept.
    """

    def __init__(
        self, weights: Sequence[Tensor], feature_table_map: Sequence[int], pooling: PoolingMode, dtype: ServedDtype
    ) -> None:
        super().__init__()
        device = weights[0].device
        location = EmbeddingLocation.HOST if device.type == "cpu" else EmbeddingLocation.DEVICE
        self.kernel = IntNBitTableBatchedEmbeddingBagsCodegen(
            embedding_specs=[("", weight.size(0), weight.size(1), SPARSE_TYPES[dtype], location) for weight in weights],
            feature_table_map=list(feature_table_map),
            pooling_mode=pooling,
            device=device,
            output_dtype=SparseType.FP32,
        )
        self.kernel.initialize_weights()
        places = self.kernel.split_embedding_weights_with_scale_bias(split_scale_bias_mode=1)
        for weight, (values, scales, _) in zip(weights, places, strict=True):
            for begin in range(0, weight.size(0), CHUNK_ROWS):
                rows = slice(begin, begin + CHUNK_ROWS)
                new_values, new_scales = quantised_rows(weight[rows], dtype)
                values[rows].copy_(new_values)
                if new_scales is not None:
                    scales[rows].copy_(new_scales)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Ids of F features and B rows to [B, sum of the features' D], in fp32."""
        indices = features.values()
        if indices.device.type == "cuda":
            indices = indices.int()  # FBGEMM's kernel for a GPU takes no others
        return self.kernel(indices, features.offsets().to(indices.dtype), features.weights_or_none())

    def flush(self) -> None:
        """Nothing is cached that a state_dict would lack; TorchRec asks before each."""


def _quantise_shards(collection: ShardedEmbeddingBagCollection, dtype: ServedDtype) -> tuple[int, int]:
    """Put quantised kernels in the place of those of all lookups; bytes before and after."""
    before = after = 0
    for index, lookup in enumerate(collection._lookups):
        grouped: Any = lookup.module if isinstance(lookup, DistributedDataParallel) else lookup
        for number, trained in enumerate(grouped._emb_modules):
            weights = trained.split_embedding_weights()
            before += sum(weight.nbytes for weight in weights)
            bags = QuantisedBags(weights, trained._feature_table_map, trained._pooling, dtype)
            grouped._emb_modules[number] = bags
            after += _kernel_bytes(bags.kernel)
            _free(trained.emb_module)
        collection._lookups[index] = grouped
    for table in collection.embedding_bags.values():
        del table.weight
    for shards in (
        collection._model_parallel_name_to_local_shards,
        collection._model_parallel_name_to_shards_wrapper,
        collection._model_parallel_name_to_sharded_tensor,
        collection._model_parallel_name_to_dtensor,
    ):
        shards.clear()
    return before, after


def _free(trained: nn.Module) -> None:
    """Give back the memory of trained tables and of their optimizer's state.

    Optimizers and views of all kinds still refer to it, and nothing reads it through them any more.
    """
    for tensor in itertools.chain(trained.parameters(), trained.buffers()):
        tensor.untyped_storage().resize_(0)
    give_back_freed()


def _quantise_collection(
    collection: EmbeddingBagCollection, dtype: ServedDtype
) -> tuple[QuantisedCollection, tuple[int, int]]:
    weights = {name: bag.weight for name, bag in collection.embedding_bags.items()}
    data_type = DataType[dtype.upper()]
    device = next(iter(weights.values())).device
    quantised = QuantisedCollection(
        tables=[replace(config, data_type=data_type) for config in collection.embedding_bag_configs()],
        is_weighted=collection.is_weighted(),
        device=device,
        output_dtype=torch.float32,
        table_name_to_quantized_weights={
            name: tuple(part if part is None else part.to(device) for part in quantised_rows(weight, dtype))
            for name, weight in weights.items()
        },
        row_alignment=1 if device.type == "cpu" else 16,
    )
    quantised._table_name_to_quantized_weights = None  # the kernels have copies
    after = sum(_kernel_bytes(kernel) for kernel in quantised._emb_modules)
    return quantised, (sum(weight.nbytes for weight in weights.values()), after)


def _kernel_bytes(kernel: IntNBitTableBatchedEmbeddingBagsCodegen) -> int:
    return int(kernel.weights_host.nbytes + kernel.weights_dev.nbytes)


def _check_whole_rows(collection: ShardedEmbeddingBagCollection, dtype: ServedDtype) -> None:
    """Refuse scales of parts of rows: what a model predicts would depend on the plan."""
    if dtype in ("fp32", "fp16"):
        return
    for table, width in _narrowest_shards(collection):
        if width < collection._table_name_to_config[table].embedding_dim:
            raise InputError(
                f"--tables {dtype}: columns of table {table} are on several ranks, and each part of a row would get a "
                "scale of its own; ask on one process"
            )


def _narrowest_shards(collection: ShardedEmbeddingBagCollection) -> Iterator[tuple[str, int]]:
    for table, sharding in collection.module_sharding_plan.items():
        if sharding.sharding_spec is not None:  # replicated tables have none
            yield table, min(shard.shard_sizes[1] for shard in sharding.sharding_spec.shards)
