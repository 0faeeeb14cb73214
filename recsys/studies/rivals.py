"""Rivals: one bigger model with the FLOPs of M members, and what each really costs."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from recsys.backbones.layers import linear_flops
from recsys.data.schema import Schema
from recsys.embeddings.precision import BYTES
from recsys.members import MemberSpec
from recsys.model import Member
from recsys.studies.config import RivalKind

SMALLEST, LARGEST = 1e-6, 1e6
"""Rungs of the ladder between which sizes are looked for."""
HALVINGS = 30

Size = int | tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one row costs a model at inference, and what it keeps in memory."""

    flops: int
    """Multiplications and additions in the matrix products of one row: dense columns, backbone and head."""
    table_bytes: int
    """Of all its tables, in float32."""
    parameters: int
    """Trained values outside the tables."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            flops=self.flops + other.flops,
            table_bytes=self.table_bytes + other.table_bytes,
            parameters=self.parameters + other.parameters,
        )


def cost(spec: MemberSpec, schema: Schema) -> Cost:
    """Count a member's cost, with private tables.

    Raises:
        ValueError: sizes that cannot work.
    """
    with torch.device("meta"):  # nothing is computed: parameters have a shape alone
        member = Member(spec, schema)
    layers = linear_flops(member.head) + (linear_flops(member.dense_field) if member.dense_field is not None else 0)
    return Cost(
        flops=member.backbone.flops() + layers,
        table_bytes=sum(schema.sparse.values()) * spec.model.embedding_dim * BYTES[spec.model.table_dtype],
        parameters=sum(parameter.numel() for parameter in member.parameters()),
    )


def rival(base: MemberSpec, size: int, kind: RivalKind, schema: Schema) -> MemberSpec:
    """Make one model with the FLOPs of `size` members like `base`, as near as they get.

    `wider` and `deeper` have the table bytes of `size` members too: the embedding dimension is `size` times as large,
    and a deeper one has `size` times the layers. `bigger` keeps the embedding dimension, and so the table bytes of one
    member. Then the backbone's width is what brings its FLOPs nearest to the budget; of the first two it may well be
    below that of `base`, because wider embeddings alone cost FLOPs. There, cross weights that are full matrices cost
    K^2 for K = num_fields * dim, so that they would be beyond the budget at any width: they get a rank, which starts at
    K / 2 of `base`, where both forms cost the same. Layers of the head and of the dense columns keep their hidden
    widths.
    """
    dim, sizes, model = base.model.embedding_dim, base.sizes, base.model
    if kind != "bigger":
        model = replace(model, embedding_dim=dim * size)
        if getattr(sizes, "rank", 0) is None:
            sizes = replace(sizes, rank=max(schema.num_fields * dim // 2, 1))
    if kind == "deeper":
        sizes = sizes.ladder(size, "depth")

    def of_width(factor: float) -> MemberSpec:
        return replace(base, model=model, sizes=sizes.ladder(factor, "width"))

    budget = size * cost(base, schema).flops
    return _nearest(of_width, lambda spec: cost(spec, schema).flops, budget)


def sizes_of(spec: MemberSpec) -> dict[str, Size]:
    """Embedding dimension, and whatever of the backbone's fields is a size; None is a part that is left out or full."""
    fields = {field.name: getattr(spec.sizes, field.name) for field in dataclasses.fields(spec.sizes)}
    sizes = {name: value for name, value in fields.items() if not isinstance(value, bool | str | float)}
    return {"embedding_dim": spec.model.embedding_dim, **sizes}


def _nearest(make: Callable[[float], Any], price: Callable[[Any], int], budget: int) -> Any:
    """What `make` gives nearest to the budget; its price must not fall as its factor grows."""
    low, high = math.log(SMALLEST), math.log(LARGEST)
    # A factor that is far too large would make sizes that no machine has; grow until the budget is passed.
    top = 0.0
    while top < high and price(make(math.exp(top))) < budget:
        top += 1.0
    high = min(top, high)
    candidates = [make(math.exp(low)), make(math.exp(high))]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        made = make(math.exp(middle))
        if made not in candidates:
            candidates.append(made)
        if price(made) < budget:
            low = middle
        else:
            high = middle
    return min(candidates, key=lambda made: abs(math.log(price(made) / budget)))
