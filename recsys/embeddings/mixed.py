"""Mixed-dimension embeddings (1909.11810): the more ids a feature has, the shorter its vectors."""

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.embeddings.bounds import IdBounds
from recsys.embeddings.config import TABLE_SEPARATOR, Owner
from recsys.embeddings.dial import least
from recsys.embeddings.init import fill_uniform
from recsys.embeddings.precision import DATA_TYPES
from recsys.embeddings.tables import FieldOrder, leave

LEAST_DIM = 4
"""Also what dimensions are multiples of, as FBGEMM wants them."""


class MixedDimensions(nn.Module):
    """Tables of d_f columns for a feature of n_f ids, d_f = D (n_least / n_f)^temperature, and a layer to D columns.

    The feature of fewest ids has D columns, and so have those whose layer would be larger than what it saves; a feature
    of D columns has no layer. The temperature is the least that reaches `compression`, layers counted; dimensions are
    rounded to multiples of 4, and are at least 4. How often an id is used goes by one over n_f, as in the paper.

    Args:
        sparse: feature to number of ids, in field order.
        owners: whose tables.

    Raises:
        InputError: a compression that cannot be reached, naming the largest that can.
    """

    def __init__(self, sparse: Mapping[str, int], owners: Sequence[Owner]) -> None:
        super().__init__()
        self.bounds = IdBounds(sparse)
        dims = {owner.name: dims_of(sparse, owner) for owner in owners}
        self.tables = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=f"{owner.name}{TABLE_SEPARATOR}{feature}",
                    feature_names=[feature],
                    num_embeddings=num_ids,
                    embedding_dim=dims[owner.name][feature],
                    pooling=PoolingType.SUM,
                    data_type=DATA_TYPES[owner.config.table_dtype],
                    init_fn=leave,
                )
                for owner in owners
                for feature, num_ids in sparse.items()
            ],
            device=torch.device("meta"),
        )
        self.layers = Layers(dims, owners)
        # A feature that feeds one table gives a key of its own name, one that feeds several gives feature@table.
        several = len(owners) > 1
        groups, widths = [], []
        for owner in owners:
            for dim, features in _by_dim(dims[owner.name]).items():
                table = f"@{owner.name}{TABLE_SEPARATOR}"
                groups.append([f"{feature}{table}{feature}" if several else feature for feature in features])
                widths.append(dim)
        self.fields = FieldOrder(groups, widths)

    def forward(self, ids: KeyedJaggedTensor) -> list[Tensor]:
        """Look up ids: one x_BFD an owner, fields in schema order.

        Raises:
            InputError: an id without a row, see `bounds`.
        """
        self.bounds(ids)
        return self.layers(self.fields(self.tables(ids)))


class Layers(nn.Module):
    """The layers of all owners. It holds no tables, so that TorchRec's pipeline does not trace into it.

    Args:
        dims: owner to d_f of each feature, in field order.
        owners: whose.
    """

    def __init__(self, dims: Mapping[str, Mapping[str, int]], owners: Sequence[Owner]) -> None:
        super().__init__()
        self.by_owner = nn.ModuleDict({owner.name: Projections(dims[owner.name], owner) for owner in owners})
        ends = itertools.accumulate((len(_by_dim(dims[owner.name])) for owner in owners), initial=0)
        self.parts = list(itertools.pairwise(ends))

    def forward(self, parts: list[Tensor]) -> list[Tensor]:
        """Vectors of each owner's features of each dimension to one x_BFD an owner."""
        return [own(parts[slice(*which)]) for own, which in zip(self.by_owner.values(), self.parts, strict=True)]


class Projections(nn.Module):
    """Layers, without bias, that bring vectors of all dimensions to D columns.

    Args:
        dims: d_f of each feature, in field order.
        owner: whose; its seed is what initial values are drawn from, with variance 1 / d_f.
    """

    def __init__(self, dims: Mapping[str, int], owner: Owner) -> None:
        super().__init__()
        by_dim = _by_dim(dims)
        place = {feature: place for place, feature in enumerate(f for features in by_dim.values() for f in features)}
        self.order = [place[feature] for feature in dims]
        dim = owner.config.embedding_dim
        self.weights = nn.ParameterDict()
        for own, features in by_dim.items():
            if own == dim:
                continue
            weight_GdD = torch.empty(len(features), own, dim)
            if not weight_GdD.is_meta:
                for feature, weight_dD in zip(features, weight_GdD, strict=True):
                    seed = TABLE_SEPARATOR.join((owner.seed, feature, "projection"))
                    fill_uniform(weight_dD, seed, math.sqrt(3 / own), first=(0, 0), num_columns=dim)
            self.weights[str(own)] = nn.Parameter(weight_GdD)

    def forward(self, parts: list[Tensor]) -> Tensor:
        """Vectors [B, features of dimension d, d] of each d to x_BFD."""
        projected = []
        for part_BGd in parts:
            name = str(part_BGd.size(2))
            if name in self.weights:
                part_BGd = torch.einsum("bgd,gdk->bgk", part_BGd, self.weights[name])  # noqa: PLW2901
            projected.append(part_BGd)
        return projected[0] if len(projected) == 1 else torch.cat(projected, dim=1)[:, self.order]


def dims_of(sparse: Mapping[str, int], owner: Owner) -> dict[str, int]:
    """d_f of each feature.

    Raises:
        InputError: a compression that cannot be reached.
    """
    dim = owner.config.embedding_dim
    fewest = min(sparse.values(), default=1)

    def dims(temperature: float) -> dict[str, int]:
        found = {}
        for feature, num_ids in sparse.items():
            wanted = dim * (fewest / num_ids) ** temperature
            own = max(round(wanted / LEAST_DIM) * LEAST_DIM, LEAST_DIM)
            found[feature] = own if own * (num_ids + dim) < num_ids * dim else dim
        return found

    def num_floats(temperature: float) -> int:
        own = dims(temperature)
        return sum(own[feature] * (num_ids + dim * (own[feature] < dim)) for feature, num_ids in sparse.items())

    # From here on every feature has fewest columns, but for those of fewest ids.
    ratios = [num_ids / fewest for num_ids in sparse.values() if num_ids > fewest]
    hottest = math.log(2 * dim) / math.log(min(ratios)) if ratios else 0.0
    return dims(least(num_floats, hottest, dim * sum(sparse.values()), owner))


def _by_dim(dims: Mapping[str, int]) -> dict[int, list[str]]:
    """Features of each dimension, in field order."""
    found: dict[int, list[str]] = {}
    for feature, dim in dims.items():
        found.setdefault(dim, []).append(feature)
    return found
