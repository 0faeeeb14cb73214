"""The embeddings of all owners, each of the kind that it asks for."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.embeddings.config import Owner
from recsys.embeddings.dynamic import Dynamic
from recsys.embeddings.robe import Robe
from recsys.embeddings.tables import TABLE_SEPARATOR, Tables

# A kind is made of features with their numbers of ids, in field order, and of the owners that have it. Its forward
# takes ids and gives one x_BFD an owner, fields in schema order.
KINDS: dict[str, Callable[[Mapping[str, int], Sequence[Owner]], nn.Module]] = {
    "tables": Tables,
    "dynamic": Dynamic,
    "robe": Robe,
}


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
        return f"{owner.seed}{TABLE_SEPARATOR}{feature}", owner.config.init_scale
