"""Quotient-remainder embeddings (1909.02107)."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recsys.config import InputError
from recsys.embeddings.bounds import IdBounds
from recsys.embeddings.config import TABLE_SEPARATOR, Owner
from recsys.embeddings.dial import least
from recsys.embeddings.precision import DATA_TYPES
from recsys.embeddings.tables import FieldOrder, leave

QUOTIENT, REMAINDER = "quotient", "remainder"


class QuotientRemainder(nn.Module):
    """Vectors made of two: id v of a feature with n ids has combine(quotients[v // R], remainders[v mod R]).

    So no two ids of a feature share a vector. Tables of R and ceil(n / R) rows stand for one of n; R is about n / k,
    one k for all features, as small as reaches `compression`, and never below the root of n, where both together have
    fewest rows. Features for which two tables would have as many rows as one keep it.

    Args:
        sparse: feature to number of ids, in field order.
        owners: whose tables; what they are called begins with OWNER/FEATURE.

    Raises:
        InputError: a compression that cannot be reached, naming the largest that can.
    """

    def __init__(self, sparse: Mapping[str, int], owners: Sequence[Owner]) -> None:
        super().__init__()
        self.bounds = IdBounds(sparse)
        self.scales: dict[str, float] = {}
        """Half the width of a table's initial values, where it is not its owner's init_scale."""
        configs: list[EmbeddingBagConfig] = []
        divisors = {owner.name: divisors_of(sparse, owner) for owner in owners}
        for owner in owners:
            for feature, num_ids in sparse.items():
                configs += self._tables(owner, feature, num_ids, divisors[owner.name].get(feature))
        self.split = SplitIds(sparse, [config.feature_names[0] for config in configs], _multiplied(owners, divisors))
        self.tables = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
        # A feature that feeds one table gives a key of its own name, one that feeds several gives feature@table.
        uses = Counter(config.feature_names[0] for config in configs)
        keys = {c.name: c.feature_names[0] + (f"@{c.name}" if uses[c.feature_names[0]] > 1 else "") for c in configs}
        self.combine = Combine(sparse, owners, divisors, keys)

    def _tables(self, owner: Owner, feature: str, num_ids: int, divisor: int | None) -> list[EmbeddingBagConfig]:
        """Tables of a feature: one, or that of quotients and that of remainders."""
        name, scale = f"{owner.name}{TABLE_SEPARATOR}{feature}", owner.config.init_scale
        if divisor is None:
            return [_table(owner, name, feature, num_ids)]
        made = []
        for part, rows in ((QUOTIENT, -(-num_ids // divisor)), (REMAINDER, divisor)):
            made.append(_table(owner, f"{name}{TABLE_SEPARATOR}{part}", f"{feature}:{part}{divisor}", rows))
            # Such that products, or sums, have the variance of values of a whole table, scale^2 / 3.
            own = math.sqrt(math.sqrt(3) * scale) if owner.config.combine == "multiply" else scale / math.sqrt(2)
            self.scales[made[-1].name] = own
        return made

    def forward(self, ids: KeyedJaggedTensor) -> list[Tensor]:
        """Look up ids: one x_BFD an owner, fields in schema order.

        Raises:
            InputError: an id without a row, or several ids in a row of a feature whose vectors are multiplied.
        """
        self.bounds(ids)
        return self.combine(self.tables(self.split(ids)))


class SplitIds(nn.Module):
    """Turns ids into what tables of quotients and remainders take.

    Args:
        sparse: feature to number of ids.
        keys: what tables take: FEATURE, FEATURE:quotientR or FEATURE:remainderR.
        multiplied: feature to an owner who multiplies its vectors.
    """

    def __init__(self, sparse: Mapping[str, int], keys: Sequence[str], multiplied: Mapping[str, str]) -> None:
        super().__init__()
        self.keys, self.multiplied = list(dict.fromkeys(keys)), dict(multiplied)
        self.features = [key.partition(":")[0] for key in self.keys]
        parts = [key.partition(":")[2] for key in self.keys]
        assert set(self.features) == set(sparse), "every feature has a table"
        self.divisors = [int(part.removeprefix(QUOTIENT).removeprefix(REMAINDER) or 1) for part in parts]
        self.are_remainders = [part.startswith(REMAINDER) for part in parts]

    def forward(self, ids: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Quotients and remainders of all ids.

        Raises:
            InputError: several ids in a row of a feature whose vectors are multiplied.
        """
        self._check(ids)
        columns = [ids.keys().index(feature) for feature in self.features]
        given = ids.permute(columns)
        values = given.values()
        counts = torch.tensor(given.length_per_key(), device=values.device)

        def of_each(parts: list) -> Tensor:
            return torch.tensor(parts, device=values.device).repeat_interleave(counts, output_size=len(values))

        divisors = of_each(self.divisors).to(values.dtype)
        quotients = values.div(divisors, rounding_mode="floor")
        split = torch.where(of_each(self.are_remainders), values - quotients * divisors, quotients)
        return KeyedJaggedTensor(keys=self.keys, values=split, lengths=given.lengths(), stride=given.stride())

    def _check(self, ids: KeyedJaggedTensor) -> None:
        # Where all rows have one length, as the loader makes them, this is exact, and no device has to be waited for.
        counts = dict(zip(ids.keys(), ids.length_per_key(), strict=True))
        several = {feature for feature, count in counts.items() if count > ids.stride()}
        if ids.values().device.type == "cpu":
            longest = ids.lengths().view(len(counts), -1).amax(dim=1) if ids.stride() else torch.zeros(len(counts))
            several |= {feature for feature, length in zip(counts, longest.tolist(), strict=True) if length > 1}
        for feature, owner in self.multiplied.items():
            if feature in several:
                raise InputError(
                    f"{owner}: feature {feature} has rows of several ids, for which products of vectors are not exact; "
                    "use combine add for embeddings qr"
                )


class Combine(nn.Module):
    """Makes one vector of two."""

    def __init__(
        self,
        sparse: Mapping[str, int],
        owners: Sequence[Owner],
        divisors: Mapping[str, Mapping[str, int]],
        keys: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.multiplies = [owner.config.combine == "multiply" for owner in owners]
        self.wholes, self.splits, self.orders = [], [], []
        groups, dims = [], []
        for owner in owners:
            own = divisors[owner.name]
            names = {feature: f"{owner.name}{TABLE_SEPARATOR}{feature}" for feature in sparse}
            whole, split = ([f for f in sparse if (f in own) == which] for which in (False, True))
            self.wholes.append(bool(whole))
            self.splits.append(bool(split))
            order = {feature: place for place, feature in enumerate([*whole, *split])}
            self.orders.append([order[feature] for feature in sparse])
            parts = [[names[f] for f in whole]]
            parts += [[f"{names[f]}{TABLE_SEPARATOR}{part}" for f in split] for part in (QUOTIENT, REMAINDER)]
            groups += [[keys[table] for table in part] for part in parts if part]
            dims += [owner.config.embedding_dim for part in parts if part]
        self.fields = FieldOrder(groups, dims)

    def forward(self, pooled: KeyedTensor) -> list[Tensor]:
        """Pooled vectors of all tables to one x_BFD an owner."""
        parts = iter(self.fields(pooled))
        found = []
        for multiplies, whole, split, order in zip(self.multiplies, self.wholes, self.splits, self.orders, strict=True):
            own = [next(parts)] if whole else []
            if split:
                quotient_BFD, remainder_BFD = next(parts), next(parts)
                own.append(quotient_BFD * remainder_BFD if multiplies else quotient_BFD + remainder_BFD)
            found.append(own[0] if len(own) == 1 else torch.cat(own, dim=1)[:, order])
        return found


def divisors_of(sparse: Mapping[str, int], owner: Owner) -> dict[str, int]:
    """R of each feature that has two tables.

    Raises:
        InputError: a compression that cannot be reached.
    """
    dim = owner.config.embedding_dim

    def num_floats(factor: float) -> int:
        return dim * sum(_rows(num_ids, _divisor(num_ids, factor)) for num_ids in sparse.values())

    largest = max((math.sqrt(num_ids) for num_ids in sparse.values()), default=1.0)
    factor = least(num_floats, largest, dim * sum(sparse.values()), owner)
    found = {feature: _divisor(num_ids, factor) for feature, num_ids in sparse.items()}
    return {feature: divisor for feature, divisor in found.items() if divisor < sparse[feature]}


def _divisor(num_ids: int, factor: float) -> int:
    """R for factor k; as many as there are ids where two tables would gain nothing."""
    divisor = max(math.ceil(num_ids / max(factor, 1.0)), math.isqrt(max(num_ids - 1, 0)) + 1)
    return divisor if divisor + -(-num_ids // divisor) < num_ids else num_ids


def _rows(num_ids: int, divisor: int) -> int:
    return num_ids if divisor >= num_ids else divisor + -(-num_ids // divisor)


def _multiplied(owners: Sequence[Owner], divisors: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """Features whose vectors are multiplied, and one who does so."""
    multiply = [owner.name for owner in owners if owner.config.combine == "multiply"]
    return {feature: name for name in multiply for feature in divisors[name]}


def _table(owner: Owner, name: str, key: str, rows: int) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=name,
        feature_names=[key],
        num_embeddings=rows,
        embedding_dim=owner.config.embedding_dim,
        pooling=PoolingType.SUM,
        data_type=DATA_TYPES[owner.config.table_dtype],
        init_fn=leave,
    )
