"""The model: a batch in, one logit a member out."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from recsys.backbones import BACKBONES
from recsys.backbones.layers import Dropout, linear, mlp
from recsys.config import InputError
from recsys.data.batch import Batch
from recsys.data.schema import Schema
from recsys.embeddings.tables import TABLE_SEPARATOR, Tables
from recsys.members import MemberSpec

SHARED = "shared"


class Member(nn.Module):
    """A backbone and its head, and the layers that turn dense columns into its last field."""

    def __init__(self, spec: MemberSpec, schema: Schema) -> None:
        super().__init__()
        config = spec.model
        # Backbone and seed together: two backbones of one seed must not draw the same numbers.
        self.seed = zlib.crc32(f"{spec.backbone}/{spec.seed}".encode())
        dim, num_dense = config.embedding_dim, len(schema.dense)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.dense_field: nn.Module | None = None
            if num_dense:
                self.dense_field = _mlp_to(dim, num_dense, config.dense_hidden)
            self.dropout = Dropout(config.embedding_dropout)
            self.backbone = BACKBONES[spec.backbone](schema.num_fields, dim, spec.sizes)
            self.head = _mlp_to(1, self.backbone.out_dim, config.head_hidden)

    def forward(self, x_BFD: Tensor, dense_BN: Tensor) -> Tensor:
        """Field embeddings [B, sparse features, D] and dense columns [B, num_dense] to logits [B]."""
        if self.dense_field is not None:
            x_BFD = torch.cat([x_BFD, self.dense_field(dense_BN).unsqueeze(1)], dim=1)
        return self.head(self.backbone(self.dropout(x_BFD))).squeeze(1)

    def reseed(self, *where: int) -> None:
        """Start the random streams of this member anew, as a function of its seed and `where` (rank, step) alone."""
        for index, layer in enumerate(part for part in self.modules() if isinstance(part, Dropout)):
            layer.reseed(hash((self.seed, index, *where)))


def _mlp_to(out_dim: int, in_dim: int, hidden: tuple[int, ...]) -> nn.Sequential:
    return nn.Sequential(mlp(in_dim, hidden, dropout=0.0), linear(hidden[-1] if hidden else in_dim, out_dim))


class Members(nn.Module):
    """All members side by side. It holds no tables, so that TorchRec's pipeline does not trace into it."""

    def __init__(self, members: Mapping[str, Member], precision: Literal["fp32", "bf16"]) -> None:
        super().__init__()
        self.by_name = nn.ModuleDict(members)
        self.precision = precision

    def __iter__(self) -> Iterator[Member]:
        """Iterate over members in order."""
        return iter(self.by_name.values())  # type: ignore[arg-type]

    def forward(self, fields: list[Tensor], dense_BN: Tensor) -> Tensor:
        """One x_BFD a member (or one for all) and the dense columns to logits_BM."""
        shared = len(fields) == 1
        with torch.autocast(dense_BN.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = [member(fields[0 if shared else i], dense_BN) for i, member in enumerate(self)]
        return torch.stack(logits, dim=1)


class RecModel(nn.Module):
    """Tables and members.

    Args:
        schema: columns of the data.
        members: see `parse_members`. Whether they share tables, and their precision, are those of the first.

    Raises:
        InputError: a width that cannot work, naming member and field.
    """

    def __init__(self, schema: Schema, members: Sequence[MemberSpec]) -> None:
        super().__init__()
        first = members[0]
        if first.model.tables == "shared":
            owners = {SHARED: first}
            self._owner_seeds = {SHARED: f"{first.seed}{TABLE_SEPARATOR}{SHARED}"}
        else:
            owners = {spec.name: spec for spec in members}
            self._owner_seeds = {spec.name: f"{spec.seed}{TABLE_SEPARATOR}{spec.backbone}" for spec in members}
        self.owners = owners
        self.embedding = Tables(schema.sparse, {name: spec.model.embedding_dim for name, spec in owners.items()})
        built = {}
        for spec in members:
            try:
                built[spec.name] = Member(spec, schema)
            except ValueError as error:
                raise InputError(f"member {spec.name}: {error}") from None
        self.members = Members(built, first.model.precision)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, M], members in order."""
        return self.members(self.embedding(batch.sparse), batch.dense)

    def table_start(self, table: str) -> tuple[str, float]:
        """What a table's initial values are drawn from: its owner's backbone and seed, its feature; and their scale."""
        owner, feature = table.split(TABLE_SEPARATOR, maxsplit=1)
        return f"{self._owner_seeds[owner]}{TABLE_SEPARATOR}{feature}", self.owners[owner].model.init_scale
