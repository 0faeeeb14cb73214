"""Measuring what each phase of a step takes under a plan, on the ranks of a running job."""

import itertools
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.distributed import World
from recsys.sharding.cluster import PHASES
from recsys.sharding.native import use_native
from recsys.sharding.plan import Plan
from recsys.sharding.torchrec import TableOptimizer, TableSharder, mend_empty, sharding_plan
from recsys.sharding.workload import Workload
from recsys.studies.shard_cases import DENSE_HIDDEN

WARM_UP = 2
LEAST_REPEATS = 3
INIT = 0.01


class Bench:
    """A step that can be taken phase by phase.

    Args:
        workload: tables, batch, dense part of `with_dense`.
        plan: where tables live.
        world: this rank.
    """

    def __init__(self, workload: Workload, plan: Plan, world: World) -> None:
        self.workload, self.world = workload, world
        self.local_batch = workload.batch_size // world.size
        self.random = torch.Generator().manual_seed(world.rank)
        assert workload.optimizer in ("rowwise_adagrad", "adagrad")
        kind = workload.optimizer
        tables = EmbeddingBagCollection(tables=_configs(workload), device=torch.device("meta"))
        sharder = TableSharder(fused_params=TableOptimizer(kind=kind, lr=0.01, eps=1e-8).fused_params)
        self.tables = sharder.shard(
            tables,
            sharding_plan(plan, tables, world.device).plan[""],
            ShardingEnv.from_process_group(dist.group.WORLD),
            world.device,
        )
        mend_empty(self.tables)
        use_native(self.tables)
        replicated = list(dict(in_backward_optimizer_filter(self.tables.named_parameters())).values())
        self.replicated: torch.optim.Optimizer | None = None
        if replicated:
            make = RowWiseAdagrad if kind == "rowwise_adagrad" else torch.optim.Adagrad
            self.replicated = make(replicated, lr=0.01, eps=1e-8)
        self.buckets: list[Tensor] = []
        for lookup in self.tables._lookups:
            if isinstance(lookup, DistributedDataParallel):
                lookup.register_comm_hook(self.buckets, _put_off)
        width = sum(table.dim for table in workload.tables)
        layers = [nn.Linear(*pair) for pair in itertools.pairwise([width, *DENSE_HIDDEN, 1])]
        dense: nn.Module = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])
        dense = dense.to(world.device)
        if world.size > 1:
            dense = DistributedDataParallel(dense, gradient_as_bucket_view=True, static_graph=True)
            dense.register_comm_hook(self.buckets, _put_off)
        self.dense = dense
        self.apart = True
        self.spans: list[tuple[float, float]] = []

    def batch(self) -> KeyedJaggedTensor:
        """Ids spread evenly over rows, as many in every row of the batch."""
        tables = self.workload.tables
        counts = [self.local_batch * int(table.pooling) for table in tables]
        values = [
            torch.randint(table.rows, (count,), generator=self.random, dtype=torch.int32)
            for table, count in zip(tables, counts, strict=True)
        ]
        lengths = torch.cat(
            [torch.full((self.local_batch,), int(table.pooling), dtype=torch.int32) for table in tables]
        )
        ids = KeyedJaggedTensor.from_lengths_sync(
            keys=[f"f_{table.name}" for table in tables], values=torch.cat(values), lengths=lengths
        )
        return ids.to(self.world.device)

    def step(self, ids: KeyedJaggedTensor) -> list[tuple[float, float]]:
        """Take one step; returns when each phase of `PHASES` began and ended on this rank."""
        self.spans = []
        self.buckets.clear()
        tables, context = self.tables, self.tables.create_context()
        if self.replicated is not None:
            self.replicated.zero_grad()
        self.dense.zero_grad()
        sent = self._timed(lambda: tables.input_dist(context, ids).wait().wait())
        found = self._timed(lambda: tables.compute(context, sent))
        pooled = self._timed(lambda: tables.output_dist(context, found).wait().values())
        leaf = pooled.detach().requires_grad_()
        self._timed(lambda: self.dense(leaf).square().mean().backward())
        gradients = self._timed(lambda: torch.autograd.grad(pooled, found, leaf.grad, allow_unused=True))
        held = [(part, gradient) for part, gradient in zip(found, gradients, strict=True) if gradient is not None]
        self._timed(lambda: self._update(held))
        self._timed(self._average)
        return self.spans

    def whole_step(self, ids: KeyedJaggedTensor) -> float:
        """Seconds of a step on this rank whose phases begin as soon as they can."""
        self._synchronise()
        dist.barrier()
        self.apart = False
        spans = self.step(ids)
        self.apart = True
        return spans[-1][1] - spans[0][0]

    def _timed(self, work: Callable[[], Any]) -> Any:
        """Run one phase, which no rank begins before all have ended the one before."""
        if self.apart:
            self._synchronise()
            dist.barrier()
        begin = time.perf_counter()
        result = work()
        if self.apart or len(self.spans) == len(PHASES) - 1:
            self._synchronise()
        self.spans.append((begin, time.perf_counter()))
        return result

    def _synchronise(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    def _update(self, held: list[tuple[Tensor, Tensor]]) -> None:
        torch.autograd.backward([part for part, _ in held], [gradient for _, gradient in held])
        if self.replicated is not None:
            self.replicated.step()

    def _average(self) -> None:
        """What DistributedDataParallel does with gradients while the backward pass goes on."""
        waiting = []
        for bucket in self.buckets:
            bucket.div_(self.world.size)
            waiting.append(dist.all_reduce(bucket, async_op=True))
        for work in waiting:
            work.wait()

    def measure(self, repeats: int, seconds: float) -> Tensor:
        """Take steps; returns seconds of each phase, by step and rank [S, ranks, phases], on every rank.

        Args:
            repeats: steps to keep; fewer if they would take longer than `seconds`, three at least.
            seconds: see there.
        """
        for _ in range(WARM_UP):
            begin = time.perf_counter()
            self.step(self.batch())
        count = torch.tensor([seconds / (time.perf_counter() - begin)])
        dist.broadcast(count, src=0)
        count_ = max(LEAST_REPEATS, min(repeats, int(count)))
        batches = [self.batch() for _ in range(count_)]
        spans = torch.tensor([self.step(ids) for ids in batches], dtype=torch.float64)
        every = [torch.empty_like(spans) for _ in range(self.world.size)]
        dist.all_gather(every, spans)
        begins, ends = torch.stack(every, dim=1).unbind(-1)
        if _on_one_host():
            # Ranks that share cores begin late, too: what counts is when the first rank was let go. All processes of a
            # machine read the same clock.
            begins = begins.min(dim=1, keepdim=True).values
        return ends - begins


def _configs(workload: Workload) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name=table.name,
            feature_names=[f"f_{table.name}"],
            num_embeddings=table.rows,
            embedding_dim=table.dim,
            pooling=PoolingType.SUM,
            init_fn=lambda weight: weight.data.uniform_(-INIT, INIT),
        )
        for table in workload.tables
    ]


def _put_off(buckets: list[Tensor], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Leave gradients as they are, for `_average` to take its own time over."""
    buckets.append(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _on_one_host() -> bool:
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return len(set(names)) == 1


def by_phase(seconds: Tensor) -> dict[str, dict[str, Any]]:
    """Of each phase: the slowest rank in every step, its median, lowest and highest, and the median of each rank."""
    slowest = seconds.max(dim=1).values
    return {
        phase: {
            "median": slowest[:, index].median().item(),
            "low": slowest[:, index].min().item(),
            "high": slowest[:, index].max().item(),
            "ranks": seconds[:, :, index].median(dim=0).values.tolist(),
            "seconds": slowest[:, index].tolist(),
        }
        for index, phase in enumerate(PHASES)
    }
