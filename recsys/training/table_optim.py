"""Optimizers of tables that FBGEMM does not update: the formulas of its fused ones, row by row.

FBGEMM fuses only Adagrad and SGD on a CPU, and nothing into tables that are data-parallel. Tables under the kernel
dense are updated here, from a gradient as large as themselves; or by our operators in their backward, by rates and with
state from here.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torchrec.optim.keyed import KeyedOptimizer

from recsys.sharding.native import Rates, UnfusedTables
from recsys.sharding.torchrec import COUNTING, TableOptimizer
from recsys.sharding.workload import STATE_VALUES, OptimizerKind

TABLE = "embedding_bags."
"""Before a table's name in the name of a parameter."""


class RowOptimizer(KeyedOptimizer):
    """Updates the rows of tables whose gradient is not all zeros, which are those that a batch looked up.

    The formulas are those of the code that FBGEMM generates its kernels from (release 1.8, optimizers.py in
    fbgemm_gpu/codegen/genscript), where g is the gradient of a row of D elements, t counts updates, and m and v begin
    as 0:

    - sgd: w -= lr g
    - adagrad: v += g^2; w -= lr g / (sqrt(v) + eps)
    - rowwise_adagrad: v += mean(g^2), one a row; w -= lr g / (sqrt(v) + eps)
    - adam: m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w -= lr r, r = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    - partial_rowwise_adam: the same with mean(g^2) for g^2, so that v is one a row
    - lamb: as adam, but w -= lr (|w| / |r|) r, by the norms of the row

    Rows that a batch does not look up keep m and v as they are, as under the fused kernels; our operators, as FBGEMM's,
    update all those that it does. State is named as TorchRec names theirs: TABLE.momentum1 is v of Adagrad or m of the
    others, whose v is TABLE.exp_avg_sq.

    Args:
        params: by name. Tables [rows, D], here or what of them is here; other arrays count as rows of one element.
        optimizer: kind and constants; its rate is for those that have no other.
        lrs: rates, by name.
        sharded: the tables, by name, of which a part lies here.
        native: batches of tables that our operators update; the others are updated by `step`.

    Attributes:
        count: updates before the next one; the schedule sets it.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        optimizer: TableOptimizer,
        lrs: Mapping[str, float],
        sharded: Mapping[str, ShardedTensor] | None = None,
        native: Sequence[UnfusedTables] = (),
    ) -> None:
        self.optimizer, self.count = optimizer, 0
        sharded = sharded or {}
        places: dict[UnfusedTables, list[tuple[slice, nn.Parameter]]] = {tables: [] for tables in native}
        groups: dict[float, list[nn.Parameter]] = {}
        self._state: dict[str, list[Tensor]] = {}
        given: dict[nn.Parameter, dict[str, Any]] = {}
        for key, param in params.items():
            groups.setdefault(lrs.get(key, optimizer.lr), []).append(param)
            rows, dim = _rows(param).shape
            for tables in native:
                if place := tables.place(_rows(param)):
                    places[tables].append((place, param))
                    self._state[key] = tables.state_at(place, dim)
                    break
            else:
                self._state[key] = [
                    torch.zeros(shape, device=param.device) for shape in state_shapes(optimizer.kind, rows, dim)
                ]
            table = f"{table_of(key)}." if TABLE in key else ""
            names = ("momentum1", "exp_avg_sq")
            given[param] = {
                f"{table}{name}": _as_sharded(values, sharded[key]) if key in sharded else values
                for name, values in zip(names, self._state[key], strict=False)
            }
        super().__init__(params, given, [{"params": group, "lr": lr} for lr, group in groups.items()])
        for tables, own in places.items():
            begins = tables.facts[:, 0].tolist()
            of_features = [next((param for at, param in own if at.start <= begin < at.stop), None) for begin in begins]
            tables.rates = functools.partial(self._rates, of_features)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Forget the gradients."""
        for param in self.params.values():
            param.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update what has a gradient."""
        lrs = self._lrs()
        for key, param in self.params.items():
            if param.grad is None:
                continue
            weight, grad = _rows(param), _rows(param.grad)
            touched = grad.ne(0).any(dim=1).nonzero().squeeze(1)
            if not touched.numel():
                continue
            here = [values[touched] for values in self._state[key]]
            rows = weight[touched]
            rows -= change(self.optimizer, rows, grad[touched], here, lrs[param], self.count + 1)
            weight[touched] = rows
            for values, new in zip(self._state[key], here, strict=True):
                values[touched] = new

    def _lrs(self) -> dict[nn.Parameter, float]:
        return {param: group["lr"] for group in self.param_groups for param in group["params"]}

    def _rates(self, of_features: Sequence[nn.Parameter | None]) -> Rates:
        """What the next update of features' tables goes by; a table without rows here has no parameter."""
        lrs = self._lrs()
        own = [0.0 if param is None else lrs[param] for param in of_features]
        return Rates(own, self.optimizer.eps, betas=self.optimizer.betas, updates=self.count + 1)


def change(
    optimizer: TableOptimizer, rows: Tensor, grad: Tensor, state: Sequence[Tensor], lr: float, updates: int
) -> Tensor:
    """What to subtract from rows [R, D] in this update of so many; updates their state in place."""
    kind = optimizer.kind
    if kind == "sgd":
        return lr * grad
    if kind not in COUNTING:
        (squares,) = state
        squares += grad.square() if kind == "adagrad" else grad.square().mean(dim=1)
        return lr * grad / (_column(squares).sqrt() + optimizer.eps)
    mean, squares = state
    beta1, beta2 = optimizer.betas
    mean.mul_(beta1).add_(grad, alpha=1 - beta1)
    by_row = kind == "partial_rowwise_adam"
    squares.mul_(beta2).add_(grad.square().mean(dim=1) if by_row else grad.square(), alpha=1 - beta2)
    root = (_column(squares) / (1 - beta2**updates)).sqrt()
    towards = mean / (1 - beta1**updates) / (root + optimizer.eps)
    if kind == "lamb":
        towards *= rows.norm(dim=1, keepdim=True) / towards.norm(dim=1, keepdim=True)
    return lr * towards


def table_of(key: str) -> str:
    """The table that a parameter is, by its name."""
    return key.partition(TABLE)[2].removesuffix(".weight")


def _column(values: Tensor) -> Tensor:
    return values if values.dim() == 2 else values.unsqueeze(1)


def _rows(values: Tensor) -> Tensor:
    """As rows; a slice of a batch of tables is of a class of its own, whose gradient is elsewhere."""
    plain = values.detach().as_subclass(Tensor)
    return plain if plain.dim() == 2 else plain.view(-1, 1)


def state_shapes(kind: OptimizerKind, rows: int, dim: int) -> Iterator[tuple[int, ...]]:
    """Of what is elementwise, then of what is one a row."""
    of_row, of_element = STATE_VALUES[kind]
    yield from [(rows, dim)] * of_element
    yield from [(rows,)] * of_row


def _as_sharded(values: Tensor, table: ShardedTensor) -> ShardedTensor:
    """State of the part of a table that lies here, as a part of the state of the whole.

    Column shards that lie on one rank stand below one another in `values`. Kinds with a value a row have none.
    """
    whole = table.metadata()
    of_row = values.dim() == 1

    def place(shard: ShardMetadata) -> ShardMetadata:
        columns = slice(0, 1) if of_row else slice(0, 2)
        return ShardMetadata(shard.shard_offsets[columns], shard.shard_sizes[columns], shard.placement)

    sizes = [shard.metadata.shard_sizes[0] for shard in table.local_shards()]
    parts = torch.split(values, sizes) if sizes else ()
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        [Shard(part, place(shard.metadata)) for part, shard in zip(parts, table.local_shards(), strict=True)],
        ShardedTensorMetadata(
            shards_metadata=[place(shard) for shard in whole.shards_metadata],
            size=whole.size[:1] if of_row else whole.size,
            tensor_properties=whole.tensor_properties,
        ),
        process_group=table._process_group,
    )
