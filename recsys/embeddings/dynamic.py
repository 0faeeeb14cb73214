"""Dynamic tables: rows go to the ids that are used, as they come; any 64 bits can be an id.

TorchRec's managed collision is not what does it. On a CPU its modules run sharded only with an operator that the CPU
build lacks (`fbgemm::reset_weight_momentum`); they admit and evict within each rank's share of the rows, so that a loss
depends on the number of ranks; they cannot be loaded into tables of another size; and its zero-collision hashing
(`HashZchManagedCollisionModule`) trains on CUDA alone. benchmarks/README.md has what either costs.

Here a loss does not depend on the number of ranks, with evictions either: ids are cut into buckets, whose number the
config says, and what a bucket does depends on its own ids, in the order of the global batch. It does depend on the size
of a batch, since all ids of a batch are counted before any is looked up, and on `map_buckets`.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.config import InputError
from recsys.embeddings.config import EmbeddingConfig, Owner
from recsys.embeddings.dynamic_map import RESERVED_ROWS, IdMap, MapRules
from recsys.embeddings.tables import Tables

Reset = Callable[[str, np.ndarray], None]
"""Gives rows of a feature's tables their initial values, and their optimizer state too, wherever they lie."""


class Dynamic(nn.Module):
    """Tables whose rows go to ids as they are seen (see `dynamic_map`), for all owners.

    Args:
        sparse: feature to number of ids, in field order; a feature of few ids gets fewer rows than the rules say.
        owners: whose tables.

    Raises:
        InputError: the ranks cannot share the maps' buckets equally.
    """

    def __init__(self, sparse: Mapping[str, int], owners: Sequence[Owner]) -> None:
        super().__init__()
        by_rules: dict[MapRules, list[int]] = {}
        for index, owner in enumerate(owners):
            by_rules.setdefault(rules_of(owner.config), []).append(index)
        self._indices = list(by_rules.values())
        self.groups = nn.ModuleList(
            [DynamicGroup(sparse, rules, [owners[index] for index in own]) for rules, own in by_rules.items()]
        )

    def forward(self, ids: KeyedJaggedTensor) -> list[Tensor]:
        """Look up ids: one x_BFD an owner, fields in schema order. In training, ids are learnt first."""
        found: dict[int, Tensor] = {}
        for group, indices in zip(self.groups, self._indices, strict=True):
            fields = group(ids)
            for place, index in enumerate(indices):
                found[index] = fields[place]
        return [found[index] for index in range(len(found))]


class DynamicGroup(nn.Module):
    """Tables of the owners whose maps have the same rules, and these maps.

    An id has the same row in the tables of all of them: what a map does depends on the data and its rules alone.
    """

    def __init__(self, sparse: Mapping[str, int], rules: MapRules, owners: Sequence[Owner]) -> None:
        super().__init__()
        self.owners = [owner.name for owner in owners]
        self.maps = DynamicMaps(sparse, rules)
        self.tables = Tables(self.maps.num_rows, owners)

    def forward(self, ids: KeyedJaggedTensor) -> list[Tensor]:
        """Look up ids: one x_BFD an owner."""
        return self.tables.fields(self.tables.tables(self.maps(ids)))  # `tables` would look whether rows are in bounds


def rules_of(config: EmbeddingConfig) -> MapRules:
    """The rules of an owner's maps."""
    return MapRules(
        rows=config.rows,
        admission=config.admission,
        eviction=config.eviction,
        interval=config.eviction_interval,
        buckets=config.map_buckets,
    )


class DynamicMaps(nn.Module):
    """The maps of all features, by the same rules; every rank has an equal part of each one's buckets.

    They stand in the memory of the host, whatever the device: ids travel there and rows back.

    Args:
        sparse: feature to number of ids, in field order.
        rules: of each map.
    """

    def __init__(self, sparse: Mapping[str, int], rules: MapRules) -> None:
        super().__init__()
        self.rules = {feature: rules.of_feature(num_ids) for feature, num_ids in sparse.items()}
        self.num_rows = {feature: RESERVED_ROWS + own.rows for feature, own in self.rules.items()}
        self.interval, self.buckets = rules.interval, rules.buckets
        self.step = 0
        """Batches that were learnt."""
        self.reset: Reset | None = None
        """Called on all ranks with the same rows."""
        self._by_feature: dict[str, IdMap] = {}
        if self.buckets % self._world_size:
            right = -(-self.buckets // self._world_size) * self._world_size
            raise InputError(
                f"{self.buckets} buckets cannot be shared by {self._world_size} ranks equally, and other buckets mean "
                f"other rows; use --model.map-buckets {right} from the first step of a run on"
            )

    @property
    def _world_size(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def by_feature(self) -> dict[str, IdMap]:
        """The part of every map that this rank has, made when it is first needed."""
        if not self._by_feature:
            num_buckets = self.buckets // self._world_size
            first = num_buckets * dist.get_rank() if self._world_size > 1 else 0
            self._by_feature = {feature: IdMap(rules, first, num_buckets) for feature, rules in self.rules.items()}
        return self._by_feature

    @torch.no_grad()
    def forward(self, ids: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Rows in place of ids, of all ranks' batches together."""
        if self.training:
            if self.step and self.step % self.interval == 0:
                self._settle()
            self.step += 1
        values, sizes = ids.values().cpu().numpy(), np.array(ids.length_per_key())
        rows = np.empty(len(values), dtype=np.int32)
        if self._world_size == 1:
            self._map(values, sizes, rows)
        else:
            self._map_by_owners(values, sizes, rows)
        return KeyedJaggedTensor(
            keys=ids.keys(),
            values=torch.from_numpy(rows).to(ids.values().device),
            lengths=ids.lengths(),
            offsets=ids.offsets(),
            stride=ids.stride(),
            length_per_key=ids.length_per_key(),
            offset_per_key=ids.offset_per_key(),
        )

    def _map(self, ids: np.ndarray, sizes: np.ndarray, rows: np.ndarray) -> None:
        """Map ids of this rank's buckets, feature after feature, as many of each as `sizes` says."""
        ends = np.cumsum(sizes)

        def work(index: int) -> None:
            own, part = maps[index], slice(ends[index] - sizes[index], ends[index])
            if self.training:
                own.learn(ids[part], rows[part], self.step)
            else:
                own.find(ids[part], rows[part])

        maps = list(self.by_feature.values())
        num_threads = torch.get_num_threads()
        if num_threads == 1:
            for index in range(len(maps)):
                work(index)
        else:
            with ThreadPoolExecutor(num_threads) as threads:
                list(threads.map(work, range(len(maps))))

    def _map_by_owners(self, ids: np.ndarray, sizes: np.ndarray, rows: np.ndarray) -> None:
        """Send ids to the ranks of their buckets, map what comes from all ranks, in their order, and send rows back."""
        from recsys.embeddings import dynamic_kernels  # noqa: PLC0415  (numba)

        num_ranks, num_features = self._world_size, len(sizes)
        ranks = np.empty(len(ids), dtype=np.int64)
        dynamic_kernels.owners(ids, self.buckets, self.buckets // num_ranks, ranks)
        groups = ranks * num_features + np.repeat(np.arange(num_features), sizes)
        order = np.argsort(groups.astype(np.uint16 if num_ranks * num_features < 2**16 else np.int64), kind="stable")
        sent_RF = np.bincount(groups, minlength=num_ranks * num_features).reshape(num_ranks, num_features)
        got_RF = _exchanged(sent_RF.reshape(-1), [num_features] * num_ranks, [num_features] * num_ranks)
        got_RF = got_RF.reshape(num_ranks, num_features)
        sent, got = sent_RF.sum(axis=1).tolist(), got_RF.sum(axis=1).tolist()
        got_ids = _exchanged(ids[order], sent, got)
        # From (rank, feature) to (feature, rank): so a feature's ids stand in the order of the global batch.
        by_feature = np.argsort(
            np.repeat(np.tile(np.arange(num_features), num_ranks), got_RF.reshape(-1)), kind="stable"
        )
        mapped, back = (np.empty(len(got_ids), dtype=np.int32) for _ in range(2))
        self._map(got_ids[by_feature], got_RF.sum(axis=0), mapped)
        back[by_feature] = mapped
        rows[order] = _exchanged(back, got, sent)

    def _settle(self) -> None:
        """Give rows to ids that wait, and initial values to those rows, on whichever rank they lie."""
        evicted = {feature: own.settle(self.step) for feature, own in self.by_feature.items()}
        everywhere = [evicted]
        if self._world_size > 1:
            everywhere = [{} for _ in range(self._world_size)]
            dist.all_gather_object(everywhere, evicted)
        for feature in evicted:
            rows = np.concatenate([of_rank[feature] for of_rank in everywhere])
            if len(rows):
                assert self.reset is not None, "the trainer connects maps and tables before the first step"
                self.reset(feature, rows)

    # ---- checkpoints

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for feature, own in self.by_feature.items():
            destination[f"{prefix}{feature}"] = _sharded(own.entries, self._world_size)
        destination[f"{prefix}step"] = torch.tensor(self.step)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        for feature, own in self.by_feature.items():
            entries = state_dict[f"{prefix}{feature}"]
            own.entries.copy_(entries.local_shards()[0].tensor if isinstance(entries, ShardedTensor) else entries)
            own.changed()
        self.step = int(state_dict[f"{prefix}step"])


def _exchanged(values: np.ndarray, sent: list[int], got: list[int]) -> np.ndarray:
    """Send to each rank as many values as `sent` says, one after another, and return what comes."""
    out = torch.empty(sum(got), dtype=torch.from_numpy(values[:0]).dtype)
    dist.all_to_all_single(out, torch.from_numpy(np.ascontiguousarray(values)), got, sent)
    return out.numpy()


def _sharded(entries: Tensor, world_size: int) -> ShardedTensor | Tensor:
    """All ranks' buckets as one tensor, of which this rank holds its part."""
    if not dist.is_initialized():
        return entries
    num_buckets, *rest = entries.shape
    shards = [
        ShardMetadata([rank * num_buckets, 0, 0], list(entries.shape), f"rank:{rank}/cpu") for rank in range(world_size)
    ]
    metadata = ShardedTensorMetadata(
        shards, torch.Size([num_buckets * world_size, *rest]), TensorProperties(dtype=entries.dtype)
    )
    local = [Shard(entries, shards[dist.get_rank()])]
    return ShardedTensor._init_from_local_shards_and_global_metadata(local, metadata)
