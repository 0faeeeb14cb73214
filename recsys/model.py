"""The model: a batch in, one logit a member out."""

import dataclasses
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from recsys.backbones import BACKBONES
from recsys.backbones.layers import Dropout, linear, mlp
from recsys.config import InputError, nearest
from recsys.data.batch import Batch
from recsys.data.schema import Schema
from recsys.embeddings.tables import TABLE_SEPARATOR, Tables

SHARED = "shared"
# Between the seeds of members of one backbone, so that jobs of seed 0, 1, 2, ... have no member in common.
SEED_STRIDE = 1000
MEMBER_PATTERN = re.compile(r"(?P<backbone>[A-Za-z0-9_]+)(?:\*(?P<count>[1-9]\d*))?")

if TYPE_CHECKING:
    BackboneConfigs = Any
else:
    BackboneConfigs = dataclasses.make_dataclass(
        "BackboneConfigs",
        [(name, kind.Config, dataclasses.field(default=kind.Config())) for name, kind in BACKBONES.items()],
        frozen=True,
        kw_only=True,
    )
    BackboneConfigs.__module__ = __name__
    BackboneConfigs.__doc__ = "Settings of each backbone, under its name."


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What all members have in common."""

    embedding_dim: int = 16
    """Columns of every table; a multiple of 4."""
    embedding_dropout: float = 0.0
    """Share of embedding values that are dropped in training, before the backbone."""
    dense_hidden: tuple[int, ...] = (64,)
    """Hidden widths of the layers that turn the dense columns into one more field."""
    head_hidden: tuple[int, ...] = ()
    """Hidden widths between a backbone and its logit; Wukong and RankMixer gain by some."""
    init_scale: float = 0.01
    """Tables start uniform in [-init_scale, init_scale)."""
    tables: Literal["private", "shared"] = "private"
    """Whether each member has tables of its own; members that share tables are not independent."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the members: bf16 is autocast, with parameters and tables in fp32."""

    def __post_init__(self) -> None:
        if self.embedding_dim < 4 or self.embedding_dim % 4:
            right = max(4, -(-self.embedding_dim // 4) * 4)
            raise ValueError(f"embedding_dim {self.embedding_dim} must be a multiple of 4; {right} is")
        if not 0 <= self.embedding_dropout < 1:
            raise ValueError(f"embedding_dropout {self.embedding_dropout} must lie in [0, 1)")
        for name in ("dense_hidden", "head_hidden"):
            if any(width < 1 for width in getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)} must hold widths of at least 1")


@dataclass(frozen=True)
class MemberSpec:
    """One member: which backbone, and the seed of all that is random in it."""

    name: str
    backbone: str
    seed: int


def parse_members(texts: Sequence[str], seed: int) -> tuple[MemberSpec, ...]:
    """Read `dcnv2 wukong` or `dcnv2*4`: the first member of a backbone gets `seed`, its next ones seed + 1000, ...

    So a member's name and seed do not depend on which others are asked for.

    Raises:
        InputError: an unknown backbone, with the nearest right ones, or a text that is no member.
    """
    members: list[MemberSpec] = []
    counts = dict.fromkeys(BACKBONES, 0)
    for text in texts:
        match = MEMBER_PATTERN.fullmatch(text)
        if not match:
            raise InputError(f"member {text!r} is neither NAME nor NAME*COUNT, like dcnv2 or dcnv2*4")
        backbone = match["backbone"]
        if backbone not in BACKBONES:
            raise InputError(f"unknown backbone {backbone!r}; {nearest(backbone, BACKBONES)}")
        for _ in range(int(match["count"] or 1)):
            index = counts[backbone]
            counts[backbone] += 1
            name = backbone if index == 0 else f"{backbone}_{index + 1}"
            members.append(MemberSpec(name, backbone, seed + index * SEED_STRIDE))
    if not members:
        raise InputError(f"no member named; known backbones are {', '.join(BACKBONES)}")
    return tuple(members)


class Member(nn.Module):
    """A backbone and its head, and the layers that turn dense columns into its last field."""

    def __init__(self, spec: MemberSpec, schema: Schema, config: ModelConfig, backbone_config: Any) -> None:
        super().__init__()
        # Backbone and seed together: two backbones of one seed must not draw the same numbers.
        self.seed = zlib.crc32(f"{spec.backbone}/{spec.seed}".encode())
        dim, num_dense = config.embedding_dim, len(schema.dense)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.dense_field: nn.Module | None = None
            if num_dense:
                self.dense_field = _mlp_to(dim, num_dense, config.dense_hidden)
            self.dropout = Dropout(config.embedding_dropout)
            self.backbone = BACKBONES[spec.backbone](schema.num_fields, dim, backbone_config)
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
        members: see `parse_members`.
        config, backbones: widths of what members have in common, and of each backbone.

    Raises:
        InputError: a width that cannot work, naming member and field.
    """

    def __init__(
        self, schema: Schema, members: Sequence[MemberSpec], config: ModelConfig, backbones: BackboneConfigs
    ) -> None:
        super().__init__()
        if config.tables == "shared":
            self._owner_seeds = {SHARED: f"{members[0].seed}{TABLE_SEPARATOR}{SHARED}"}
        else:
            self._owner_seeds = {spec.name: f"{spec.seed}{TABLE_SEPARATOR}{spec.backbone}" for spec in members}
        self.embedding = Tables(schema.sparse, dict.fromkeys(self._owner_seeds, config.embedding_dim))
        built = {}
        for spec in members:
            try:
                built[spec.name] = Member(spec, schema, config, getattr(backbones, spec.backbone))
            except ValueError as error:
                raise InputError(f"member {spec.name}: {error}") from None
        self.members = Members(built, config.precision)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, M], members in order."""
        return self.members(self.embedding(batch.sparse), batch.dense)

    def table_seed(self, table: str) -> str:
        """What a table's initial values are drawn from: its owner's backbone and seed, and its feature."""
        owner, feature = table.split(TABLE_SEPARATOR, maxsplit=1)
        return f"{self._owner_seeds[owner]}{TABLE_SEPARATOR}{feature}"
