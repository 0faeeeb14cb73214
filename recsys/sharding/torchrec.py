"""Plans in TorchRec's words, and what TorchRec needs to carry them out."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbeddingBag
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.planner.utils import placement
from torchrec.distributed.types import (
    CommOp,
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingPlan,
)
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recsys.config import InputError
from recsys.sharding.config import ShardingConfig
from recsys.sharding.plan import TYPES, Plan
from recsys.sharding.workload import FUSED_ON_CPU, OptimizerKind

FUSED: dict[OptimizerKind, EmbOptimType] = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
    "adam": EmbOptimType.ADAM,
    "partial_rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,
    "lamb": EmbOptimType.LAMB,
}
"""FBGEMM's words for the kinds."""
COUNTING: frozenset[OptimizerKind] = frozenset({"adam", "partial_rowwise_adam", "lamb"})
"""Kinds that correct the bias of their means by how many updates there have been."""
COMMS = {"fp16": CommType.FP16, "bf16": CommType.BF16, "int8": CommType.INT8}


@dataclass(frozen=True, kw_only=True)
class TableOptimizer:
    """What updates tables: FBGEMM or our operators within their backward, or `RowOptimizer` after it, all alike."""

    kind: OptimizerKind
    lr: float
    eps: float
    betas: tuple[float, float] = (0.9, 0.999)
    """Of adam, partial_rowwise_adam and lamb."""

    @property
    def fused_params(self) -> dict[str, Any]:
        """FBGEMM's words for it."""
        params: dict[str, Any] = {"optimizer": FUSED[self.kind], "learning_rate": self.lr}
        if self.kind != "sgd":
            params["eps"] = self.eps
        if self.kind in COUNTING:
            params["beta1"], params["beta2"] = self.betas
        return params


class TableSharder(EmbeddingBagCollectionSharder):
    """Offers every sharding type on every device; TorchRec hides the row-wise ones on a CPU, where they work.

    And the kernel dense beside the fused ones, for optimizers that FBGEMM does not fuse.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """All types."""
        return list(TYPES)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """All kernels of the type and device."""
        own = super().compute_kernels(sharding_type, compute_device_type)
        return own if "dense" in own else [*own, "dense"]

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingBagCollection:
        """Shard a collection by a plan for its tables.

        Raises:
            InputError: a table under a kernel that cannot train it here, naming it.
        """
        # It would warn of every table under the kernel dense that caches, which it does not have, are not for it.
        logging.getLogger("torchrec.distributed.utils").setLevel(logging.ERROR)
        optimizer = (self.fused_params or {}).get("optimizer")
        kind = next((kind for kind, word in FUSED.items() if word == optimizer), None)
        for config in module.embedding_bag_configs():
            kernel = params[config.name].compute_kernel
            if kernel == "dense" and config.data_type != DataType.FP32:
                raise InputError(
                    f"table {config.name} is {config.data_type.value.lower()} under the kernel dense, whose optimizer "
                    "would round otherwise than a fused one; use --model.table-dtype fp32, or --sharding.kernels fused "
                    f"and --optimizer.tables {' or '.join(sorted(FUSED_ON_CPU))}"
                )
            on_cpu = device is not None and device.type == "cpu"
            if kernel != "dense" and on_cpu and kind is not None and kind not in FUSED_ON_CPU:
                raise InputError(
                    f"table {config.name} is planned under the kernel {kernel}, and FBGEMM has no fused {kind} on a "
                    "CPU; use --sharding.kernels dense"
                )
        return super().shard(module, params, env, device, module_fqn)


def check_device(config: ShardingConfig, device: torch.device) -> None:
    """See that this machine's build of FBGEMM can do what was asked for.

    Raises:
        InputError: it cannot, with the reason; `recsys plan` plans it all the same.
    """
    if device.type != "cpu":
        return
    if config.replicas > 1:
        raise InputError(
            f"--sharding.replicas {config.replicas}: TorchRec's 2-D parallelism (DMPCollection) needs CUDA devices; "
            "leave it at 1 here, and plan it by `recsys plan --sharding.replicas`"
        )


def check_kernels(plan: Plan, device: torch.device) -> Plan:
    """Return the plan, having seen that this machine has its kernels, whatever profile it was priced by.

    Raises:
        InputError: it has not.
    """
    if device.type == "cpu":
        for name, table in plan.tables.items():
            if table.kernel not in ("fused", "dense"):
                raise InputError(
                    f"table {name} is planned under the kernel {table.kernel}, which needs CUDA devices; use fused here"
                )
    return plan


def batches_of_tables(module: nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """FBGEMM's batches of fused tables in a sharded module, which does not name them among its modules."""
    for collection in module.modules():
        if isinstance(collection, ShardedEmbeddingBagCollection):
            parts = (part for lookup in collection._lookups for part in lookup.modules())
            yield from (part for part in parts if isinstance(part, SplitTableBatchedEmbeddingBagsCodegen))


def dense_batches_of_tables(module: nn.Module) -> Iterator[BatchedDenseEmbeddingBag]:
    """TorchRec's batches of tables under the kernel dense in a sharded module, without those whose ranks average."""
    for collection in module.modules():
        if isinstance(collection, ShardedEmbeddingBagCollection):
            alone = (lookup for lookup in collection._lookups if not isinstance(lookup, DistributedDataParallel))
            parts = (part for lookup in alone for part in lookup.modules())
            yield from (part for part in parts if isinstance(part, BatchedDenseEmbeddingBag))


def mend_empty(module: nn.Module) -> None:
    """Let ranks hold no row of a table, or of any, on a CPU: row-wise tables of few rows leave such ranks.

    FBGEMM tells tables apart by where their rows begin, so that one without rows passes for a part of the next and, in
    the last place, for one that ends somewhere in foreign memory: updates go astray. So each counts as having a row at
    least, which is in nobody's ids. And it takes weights without elements for a sign that it runs on a GPU.
    """
    for part in batches_of_tables(module):
        if not part.use_cpu:
            continue
        begins = [0, *accumulate(max(rows, 1) for rows, *_ in part.embedding_specs)]
        begins = [*(begins[table] for table in part.feature_table_map), begins[-1]]
        part.hash_size_cumsum.copy_(torch.tensor(begins))
        if not part.weights_host.numel():
            part.weights_host = nn.Parameter(part.weights_host.new_zeros(part.max_D))


def comm_codecs(config: ShardingConfig, device: torch.device) -> Mapping[str, QuantizedCommCodecs] | None:
    """What compresses pooled embeddings and gradients on their way between ranks; None where nothing does.

    int8 leaves out reduce-scatters (row-wise types), in which values are summed on the way: TorchRec has it for
    all-to-alls alone.
    """
    if config.comms == config.gradient_comms == "fp32":
        return None
    one_way = COMMS | {"fp32": CommType.FP32}
    quantised = QCommsConfig(forward_precision=one_way[config.comms], backward_precision=one_way[config.gradient_comms])
    only = None
    if "int8" in (config.comms, config.gradient_comms):
        only = [CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL, CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL]
    # Asked for a CPU, TorchRec would silently make fp16 of bf16, which gloo carries well.
    asked = torch.device("cuda") if device.type == "cpu" else device
    registry: Mapping[str, QuantizedCommCodecs] = get_qcomm_codecs_registry(quantised, comm_ops=only, device=asked)
    return registry


def sharding_plan(plan: Plan, module: nn.Module, device: torch.device) -> ShardingPlan:
    """A plan for the tables under `module`, which must hold each of them in one EmbeddingBagCollection."""
    modules = {}
    for path, part in module.named_modules():
        if isinstance(part, EmbeddingBagCollection):
            modules[path] = EmbeddingModuleShardingPlan(
                {config.name: _parameter_sharding(plan, config.name, device) for config in part.embedding_bag_configs()}
            )
    return ShardingPlan(modules)


def _parameter_sharding(plan: Plan, name: str, device: torch.device) -> ParameterSharding:
    table = plan.tables[name]
    if table.sharding_type == "data_parallel":
        return ParameterSharding(table.sharding_type, table.kernel, ranks=list(range(plan.world_size)))
    return ParameterSharding(
        table.sharding_type,
        table.kernel,
        ranks=[shard.rank for shard in table.shards],
        sharding_spec=EnumerableShardingSpec(
            [
                ShardMetadata(
                    shard_offsets=[shard.row, shard.column],
                    shard_sizes=[shard.rows, shard.columns],
                    placement=placement(device.type, shard.rank, plan.ranks_per_node),
                )
                for shard in table.shards
            ]
        ),
    )
