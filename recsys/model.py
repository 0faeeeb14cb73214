"""The model: a batch in, one logit a member out."""

import functools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recsys.backbones import BACKBONES
from recsys.backbones.layers import MLP, Dropout, linear
from recsys.batched import Together, is_faster_together, of_one_make
from recsys.config import InputError
from recsys.data.batch import Batch
from recsys.data.schema import Schema
from recsys.distributed import on_first
from recsys.embeddings.config import Owner
from recsys.embeddings.fields import Embeddings
from recsys.embeddings.precision import AUTOCAST, Precision, set_arithmetic
from recsys.embeddings.tables import TABLE_SEPARATOR
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
        self.dropouts = [part for part in self.modules() if isinstance(part, Dropout)]

    def forward(self, x_BFD: Tensor, dense_BN: Tensor) -> Tensor:
        """Field embeddings [B, sparse features, D] and dense columns [B, num_dense] to logits [B]."""
        if self.dense_field is not None:
            x_BFD = torch.cat([x_BFD, self.dense_field(dense_BN).unsqueeze(1)], dim=1)
        return self.head(self.backbone(self.dropout(x_BFD))).squeeze(1)

    def reseed(self, *where: int) -> None:
        """Start the random streams of this member anew, as a function of its seed and `where` (rank, step) alone."""
        for index, layer in enumerate(self.dropouts):
            layer.reseed(hash((self.seed, index, *where)))


def _mlp_to(out_dim: int, in_dim: int, hidden: tuple[int, ...]) -> nn.Sequential:
    return nn.Sequential(MLP(in_dim, hidden, dropout=0.0), linear(hidden[-1] if hidden else in_dim, out_dim))


class EmbeddingGradients:
    """What becomes of gradients on their way from the members into the embeddings.

    Tables that are updated within the backward pass take them as they come, so it is done here. A gradient is first
    divided by `scale`, by which the loss was multiplied, and a vector of it that is not finite then becomes 0; then its
    elements are cut to [-limit, limit].

    Attributes:
        scale: of the loss; a tensor of one element.
        limit: above 0, in terms of this rank's mean loss.
    """

    def __init__(self) -> None:
        self.scale: Tensor | None = None
        self.limit: float | None = None

    def __call__(self, x_BFD: Tensor) -> Tensor:
        """The embeddings as they are; their gradient will be seen to."""
        if (self.scale is None and self.limit is None) or not x_BFD.requires_grad:
            return x_BFD
        return _Gradient.apply(x_BFD, self)  # type: ignore[no-untyped-call]

    def seen_to(self, grad_BFD: Tensor) -> Tensor:
        """The gradient that the embeddings get."""
        if self.scale is not None:
            grad_BFD = grad_BFD / self.scale
            grad_BFD = grad_BFD.where(grad_BFD.isfinite().all(dim=-1, keepdim=True), 0.0)
        return grad_BFD if self.limit is None else grad_BFD.clamp(-self.limit, self.limit)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BFD: Tensor, gradients: EmbeddingGradients) -> Tensor:
        ctx.gradients = gradients
        return x_BFD.view_as(x_BFD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BFD: Tensor) -> tuple[Tensor, None]:
        return ctx.gradients.seen_to(grad_BFD), None


class Members(nn.Module):
    """All members side by side. It holds no tables, so that TorchRec's pipeline does not trace into it.

    Args:
        members: name to member, in order.
        precision: bf16 and fp16 are autocast.
        groups: indices of members that can be computed together; they are where a group is `on`.

    Attributes:
        gradients: what becomes of those of the embeddings.
        parts: of a batch, in training. More than 1 keep activations of one part at a time: the backward pass computes
            each part's again, and gives the same gradients, to rounding.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        precision: Precision,
        groups: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__()
        self.by_name = nn.ModuleDict(members)
        self.precision = precision
        self.groups = [Together(group, [list(members.values())[index] for index in group]) for group in groups]
        self.gradients = EmbeddingGradients()
        self.parts = 1

    def __iter__(self) -> Iterator[Member]:
        """Iterate over members in order."""
        return iter(self.by_name.values())  # type: ignore[arg-type]

    def forward(self, fields: list[Tensor], dense_BN: Tensor) -> Tensor:
        """One x_BFD a member (or one for all) and the dense columns to logits_BM."""
        fields = [self.gradients(x_BFD) for x_BFD in fields]
        if self.parts == 1 or not self.training:
            return self._logits(dense_BN, *fields)
        dropouts = [layer for member in self for layer in member.dropouts]
        seeds = [layer.seed for layer in dropouts]

        def logits_of(part: int, *inputs: Tensor) -> Tensor:
            for layer, seed in zip(dropouts, seeds, strict=True):
                if seed is not None:  # so that both passes over a part draw the same
                    layer.reseed(hash((seed, part)))
            return self._logits(*inputs)

        parts = zip(*(tensor.chunk(self.parts) for tensor in (dense_BN, *fields)), strict=True)
        logits = [checkpoint(logits_of, part, *inputs, use_reentrant=False) for part, inputs in enumerate(parts)]
        return torch.cat(logits)

    def _logits(self, dense_BN: Tensor, *fields: Tensor) -> Tensor:
        shared = len(fields) == 1
        logits: dict[int, Tensor] = {}
        dtype = AUTOCAST.get(self.precision)
        if dtype is not None:
            # Once, here: else every layer that reads them casts them again, and what is done element by element
            # moves twice the bytes.
            fields = tuple(x_BFD.to(dtype) for x_BFD in fields)
        with torch.autocast(dense_BN.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            for group in self.groups:
                if group.active:
                    logits |= zip(group.indices, group(fields, dense_BN), strict=True)
            for i, member in enumerate(self):
                if i not in logits:
                    logits[i] = member(fields[0 if shared else i], dense_BN)
        return torch.stack([logits[i] for i in range(len(logits))], dim=1)


class RecModel(nn.Module):
    """Tables and members.

    Args:
        schema: columns of the data.
        members: see `parse_members`. Whether they share tables, and their precision, are those of the first.

    Raises:
        InputError: a width that cannot work, naming member and field; raw ids, and embeddings that need others.
    """

    def __init__(self, schema: Schema, members: Sequence[MemberSpec]) -> None:
        super().__init__()
        first = members[0]
        if first.model.tables == "shared":
            owners = [Owner(name=SHARED, seed=f"{first.seed}{TABLE_SEPARATOR}{SHARED}", config=first.model)]
        else:
            owners = [
                Owner(name=spec.name, seed=f"{spec.seed}{TABLE_SEPARATOR}{spec.backbone}", config=spec.model)
                for spec in members
            ]
        for owner in owners:
            if schema.raw and owner.config.embeddings != "dynamic":
                raise InputError(
                    f"ids of feature {schema.raw[0]} are raw, any 64 bits, which embeddings "
                    f"{owner.config.embeddings!r} of {owner.name} have no vectors for; use --embeddings dynamic, or "
                    "data that was prepared with --vocabulary count"
                )
        self.embedding = Embeddings(schema.sparse, owners)
        built = {}
        for spec in members:
            try:
                built[spec.name] = Member(spec, schema)
            except ValueError as error:
                raise InputError(f"member {spec.name}: {error}") from None
        self.members = Members(built, first.model.precision, of_one_make(members))
        self._num_sparse, self._num_dense, self._batched = (
            len(schema.sparse),
            len(schema.dense),
            "off" if first.model.compile else first.model.batched,
        )

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, M], members in order."""
        return self.members(self.embedding(batch.sparse), batch.dense)

    def choose(self, batch_size: int, device: torch.device) -> None:
        """Settle on all ranks which members are computed together, for batches of `batch_size` rows a rank.

        Moves to `device` what is not sharded. Must come before the model is.

        Raises:
            InputError: a precision that the device has not.
        """
        set_arithmetic(self.members.precision, device)
        self.members.to(device)
        self.embedding.place(device)
        measure = self._batched == "auto" and device.type == "cuda"
        dims = [owner.config.embedding_dim for owner in self.embedding.owners.values()]
        for group in self.members.groups:
            group.on = self._batched == "on"
            if measure:
                fields = [torch.zeros(batch_size, self._num_sparse, d, device=device, requires_grad=True) for d in dims]
                dense_BN = torch.zeros(batch_size, self._num_dense, device=device)
                group.on = on_first(functools.partial(is_faster_together, group, self.members, fields, dense_BN))
