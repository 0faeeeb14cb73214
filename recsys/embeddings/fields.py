"""The embeddings of all owners, each of the kind that it asks for."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.embeddings.config import Owner
from recsys.embeddings.dynamic import Dynamic
from recsys.embeddings.mixed import MixedDimensions
from recsys.embeddings.qr import QuotientRemainder
from recsys.embeddings.robe import Robe
from recsys.embeddings.tables import TABLE_SEPARATOR, Tables

# A kind is made of features with their numbers of ids, in field order, and of the owners that have it. Its forward
# takes ids and gives one x_BFD an owner, fields in schema order.
KINDS: dict[str, Callable[[Mapping[str, int], Sequence[Owner]], nn.Module]] = {
    "tables": Tables,
    "dynamic": Dynamic,
    "robe": Robe,
    "qr": QuotientRemainder,
    "mixed": MixedDimensions,
}

# The name of its owner in that of a parameter of any kind.
_OWNER = re.compile(r"(?:embedding_bags|by_owner)\.(?P<name>\w+)")


class Size(NamedTuple):
    """How large an owner's embeddings are."""

    num_floats: int
    """Of tables, arrays and layers."""
    num_bytes: int
    num_whole: int
    """Floats of whole tables."""

    @property
    def compression(self) -> float:
        """What was reached."""
        return self.num_whole / self.num_floats


class Embeddings(nn.Module):
    """One module a kind, for all owners that have it, so that their tables are looked up in fused calls.

    Args:
        sparse: feature to number of ids, in field order.
        owners: in the order of what `forward` gives.
    """

    def __init__(self, sparse: Mapping[str, int], owners: Sequence[Owner]) -> None:
        super().__init__()
        kinds: list[str] = list(dict.fromkeys(owner.config.embeddings for owner in owners))
        self.owners = {owner.name: owner for owner in owners}
        self._indices = {
            kind: [index for index, owner in enumerate(owners) if owner.config.embeddings == kind] for kind in kinds
        }
        self.by_kind = nn.ModuleDict(
            {kind: KINDS[kind](sparse, [owners[index] for index in self._indices[kind]]) for kind in kinds}
        )
        self.sizes = self._sizes(sum(sparse.values()))
        """Owner to size. Sharded parameters would tell only of this rank's shards."""

    def _sizes(self, num_rows: int) -> dict[str, Size]:
        floats, sizes = Counter[str](), Counter[str]()
        for name, parameter in self.named_parameters():
            match = _OWNER.search(name)
            assert match, f"{name} tells whose it is"
            floats[match["name"]] += parameter.numel()
            sizes[match["name"]] += parameter.numel() * parameter.element_size()
        return {
            name: Size(floats[name], sizes[name], num_rows * owner.config.embedding_dim)
            for name, owner in self.owners.items()
        }

    def place(self, device: torch.device) -> None:
        """Move what TorchRec does not shard to `device`: arrays and layers."""
        for name, module in self.named_modules():
            if name.endswith(".by_owner"):
                module.to(device)

    def forward(self, ids: KeyedJaggedTensor) -> list[Tensor]:
        """Look up ids: one x_BFD an owner, fields in schema order."""
        found: dict[int, Tensor] = {}
        for kind, module in self.by_kind.items():
            fields = module(ids)  # may be a proxy, which has no length: TorchRec's pipeline traces this
            for place, index in enumerate(self._indices[kind]):
                found[index] = fields[place]
        return [found[index] for index in range(len(found))]

    def table_start(self, table: str) -> tuple[str, float]:
        """What a table's initial values are drawn from: its owner's seed and its feature; and their scale."""
        owner_name, feature = table.split(TABLE_SEPARATOR, maxsplit=1)
        owner = self.owners[owner_name]
        scales: dict[str, float] = getattr(self.by_kind[owner.config.embeddings], "scales", {})
        return f"{owner.seed}{TABLE_SEPARATOR}{feature}", scales.get(table, owner.config.init_scale)
