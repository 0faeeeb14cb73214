"""Quotient-remainder and mixed-dimension tables: vectors, sizes and starts; and how large all kinds are."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.config import InputError
from recsys.embeddings.config import EmbeddingConfig, Owner
from recsys.embeddings.dial import least
from recsys.embeddings.fields import Embeddings
from recsys.embeddings.init import init_tables
from recsys.embeddings.mixed import dims_of
from recsys.embeddings.qr import SplitIds, divisors_of

SPARSE = {"c": 900, "a": 3, "b": 300, "d": 40, "e": 900}
B = 50
LENGTHS = {"one id": [1] * B, "many": [0, 1, 2, 3, 1] * (B // 5)}


def owner(kind: str, name: str = "one", seed: str = "0/dcnv2", **changes: Any) -> Owner:
    return Owner(name=name, seed=seed, config=EmbeddingConfig(embeddings=kind, **changes))  # type: ignore[arg-type]


def made(*owners: Owner) -> Embeddings:
    """Embeddings in memory, as on one rank."""
    embeddings = Embeddings(SPARSE, owners)
    for module in embeddings.modules():
        if module.__class__.__name__ == "EmbeddingBagCollection":
            module.to_empty(device="cpu")
    init_tables(embeddings, embeddings.table_start)
    return embeddings


def ids_of(hot: str) -> KeyedJaggedTensor:
    lengths = LENGTHS[hot]
    generator = torch.Generator().manual_seed(0)
    values = [torch.randint(num_ids, (sum(lengths),), generator=generator) for num_ids in reversed(SPARSE.values())]
    return KeyedJaggedTensor(
        keys=list(reversed(SPARSE)), values=torch.cat(values), lengths=torch.tensor(lengths * len(SPARSE)), stride=B
    )


def tables_of(embeddings: Embeddings) -> dict[str, Tensor]:
    found = {
        key.split("embedding_bags.")[1]: weight for key, weight in embeddings.state_dict().items() if "bags" in key
    }
    return {key.removesuffix(".weight"): weight for key, weight in found.items()}


def pooled(weights_ND: Tensor, ids: KeyedJaggedTensor, feature: str) -> Tensor:
    """Sums of each row's vectors, one by one."""
    own = ids[feature]
    return torch.stack([weights_ND[row.long()].sum(dim=0) for row in own.to_dense()])


# Quotient-remainder


@pytest.mark.parametrize(("hot", "combine"), [("one id", "multiply"), ("one id", "add"), ("many", "add")])
def test_two_vectors_make_one(hot: str, combine: str) -> None:
    owners = [
        owner("qr", compression=3, combine=combine),
        owner("qr", "two", "1/dcnv2", compression=5, combine=combine, embedding_dim=8),
        owner("qr", "whole", compression=1),
        owner("qr", "equal", "2/dcnv2", compression=3, combine=combine),
    ]
    embeddings, ids = made(*owners), ids_of(hot)
    tables = tables_of(embeddings)
    for own, x_BFD in zip(owners, embeddings(ids), strict=True):
        divisors = divisors_of(SPARSE, own)
        assert ("a" in divisors, "c" in divisors) == (False, own.name != "whole")
        for feature, x_BD in zip(SPARSE, x_BFD.unbind(dim=1), strict=True):
            name, R = f"{own.name}/{feature}", divisors.get(feature)
            if R is None:
                expected = pooled(tables[name], ids, feature)
            else:
                rows = torch.arange(SPARSE[feature])
                parts = tables[f"{name}/quotient"][rows // R], tables[f"{name}/remainder"][rows % R]
                expected = pooled(parts[0] * parts[1] if combine == "multiply" else parts[0] + parts[1], ids, feature)
            assert_close(x_BD, expected, atol=1e-7, rtol=1e-5)


def test_products_of_several_ids_are_refused() -> None:
    message = "one: feature [cbe] has rows of several ids, for which products of vectors are not exact; use combine add"
    with pytest.raises(InputError, match=message):
        made(owner("qr", compression=3))(ids_of("many"))
    # As many ids as rows, but not one in each; and a feature whose table is whole may have several.
    split = SplitIds({"a": 9, "b": 9}, ["a", "b:quotient3", "b:remainder3"], {"b": "one"})
    for lengths, is_exact in (([1, 1, 2, 0], False), ([2, 0, 1, 1], True), ([2, 2, 0, 1], True)):
        ids = KeyedJaggedTensor(keys=["a", "b"], values=torch.arange(sum(lengths)), lengths=torch.tensor(lengths))
        if is_exact:
            assert split(ids)["b:remainder3"].values().tolist() == [v % 3 for v in ids["b"].values().tolist()]
        else:
            with pytest.raises(InputError, match="one: feature b has rows of several ids"):
                split(ids)


@given(sparse=st.lists(st.integers(1, 5000), min_size=1, max_size=6), compression=st.floats(1, 30), dim=st.just(4))
@settings(max_examples=200, deadline=None)
def test_no_two_ids_share_a_vector_and_the_dial_is_reached(sparse: list[int], compression: float, dim: int) -> None:
    features = {f"f{place}": num_ids for place, num_ids in enumerate(sparse)}
    own = owner("qr", compression=compression, embedding_dim=dim)
    try:
        divisors = divisors_of(features, own)
    except InputError:
        # Even the fewest rows, twice the root of each number of ids, are too many.
        assert sum(min(num_ids, 2 * math.isqrt(num_ids)) for num_ids in sparse) * compression > sum(sparse) * 0.9
        return
    rows = 0
    for feature, num_ids in features.items():
        R = divisors.get(feature, num_ids)
        pairs = {(v // R, v % R) for v in range(num_ids)}
        assert len(pairs) == num_ids
        two = R + max(v // R for v in range(num_ids)) + 1
        assert feature not in divisors or two < num_ids
        rows += two if feature in divisors else num_ids
    assert rows <= sum(sparse) / compression


# Mixed dimensions


@pytest.mark.parametrize("hot", LENGTHS)
def test_a_layer_brings_short_vectors_to_all_columns(hot: str) -> None:
    owners = [owner("mixed", compression=2), owner("mixed", "two", "1/dcnv2", compression=1.5, embedding_dim=8)]
    embeddings, ids = made(*owners), ids_of(hot)
    tables, parameters = tables_of(embeddings), embeddings.state_dict()
    for own, x_BFD in zip(owners, embeddings(ids), strict=True):
        dims, dim = dims_of(SPARSE, own), own.config.embedding_dim
        assert dims["a"] == dim > dims["c"] == dims["e"] < dims["b"], "fields of one dimension stand apart"
        assert x_BFD.shape == (B, len(SPARSE), dim)
        for feature, x_BD in zip(SPARSE, x_BFD.unbind(dim=1), strict=True):
            expected = pooled(tables[f"{own.name}/{feature}"], ids, feature)
            assert expected.size(1) == dims[feature]
            if dims[feature] < dim:
                alike = [name for name in SPARSE if dims[name] == dims[feature]]
                weight = parameters[f"by_kind.mixed.layers.by_owner.{own.name}.weights.{dims[feature]}"]
                expected = expected @ weight[alike.index(feature)]
            assert_close(x_BD, expected, atol=1e-7, rtol=1e-5)


@given(
    sparse=st.lists(st.integers(1, 10**6), min_size=1, max_size=8),
    compression=st.floats(1, 8),
    dim=st.sampled_from([4, 16, 48]),
)
@settings(max_examples=200, deadline=None)
def test_dimensions_fall_with_the_number_of_ids_and_reach_the_dial(
    sparse: list[int], compression: float, dim: int
) -> None:
    features = {f"f{place}": num_ids for place, num_ids in enumerate(sparse)}
    own = owner("mixed", compression=compression, embedding_dim=dim)
    try:
        dims = dims_of(features, own)
    except InputError as error:
        best = float(str(error).rpartition(" ")[2])
        assert best < compression
        dims_of(features, owner("mixed", compression=best, embedding_dim=dim))
        return
    assert all(4 <= value <= dim and value % 4 == 0 for value in dims.values())
    order = sorted(features, key=features.__getitem__)
    assert dims[order[0]] == dim
    assert all(dims[one] >= dims[other] for one, other in itertools.pairwise(order))
    floats = sum(num_ids * dims[f] + (dims[f] < dim) * dims[f] * dim for f, num_ids in features.items())
    assert floats <= sum(sparse) * dim / compression
    assert all(dims[f] == dim or dims[f] * (n + dim) < n * dim for f, n in features.items()), "layers save something"


def test_layers_start_from_seed_and_feature_with_variance_one_over_their_width() -> None:
    one = made(owner("mixed", compression=2, embedding_dim=64)).state_dict()
    both = made(
        owner("mixed", "other", "5/fnn", compression=3, embedding_dim=64),
        owner("mixed", compression=2, embedding_dim=64),
    ).state_dict()
    layers = {name: weight for name, weight in one.items() if "by_owner" in name}
    assert layers
    for name, weight in layers.items():
        assert torch.equal(weight, both[name])
        assert weight.var().item() == pytest.approx(1 / weight.size(1), rel=0.2)
        assert weight.unique().numel() > 0.9 * weight.numel(), "each feature has its own"


# All kinds


@pytest.mark.parametrize("kind", ["qr", "mixed"])
def test_a_compression_out_of_reach_names_the_largest_that_works(kind: str) -> None:
    with pytest.raises(InputError, match=rf"one: embeddings {kind} cannot reach compression 500: at least") as error:
        Embeddings(SPARSE, [owner(kind, compression=500)])
    assert "\n" not in str(error.value)
    best = float(str(error.value).rpartition(" ")[2])
    assert Embeddings(SPARSE, [owner(kind, compression=best)]).sizes["one"].compression >= best
    with pytest.raises(InputError, match=f"the largest that works is {best:g}"):
        Embeddings(SPARSE, [owner(kind, compression=best + 0.02)])


def test_sizes_count_all_that_an_owner_has() -> None:
    owners = [
        owner("tables", "whole"),
        owner("tables", "half", table_dtype="fp16"),
        owner("robe", "robe", compression=10),
        owner("qr", "qr", compression=3),
        owner("mixed", "mixed", compression=2),
        owner("robe", "robe2", compression=7, embedding_dim=8),
    ]
    sizes = Embeddings(SPARSE, owners).sizes
    num_whole = sum(SPARSE.values()) * 16
    assert {name: size.num_whole for name, size in sizes.items()} == {
        own.name: sum(SPARSE.values()) * own.config.embedding_dim for own in owners
    }
    assert sizes["whole"][:2] == (num_whole, 4 * num_whole)
    assert sizes["half"][:2] == (num_whole, 2 * num_whole)
    assert sizes["robe"][:2] == (num_whole // 10, num_whole // 10 * 4)
    assert sizes["robe"].compression == pytest.approx(10, rel=0.01)
    divisors = divisors_of(SPARSE, owners[3])
    rows = [n if (R := divisors.get(f)) is None else R + -(-n // R) for f, n in SPARSE.items()]
    assert sizes["qr"].num_floats == sum(rows) * 16
    dims = dims_of(SPARSE, owners[4])
    assert sizes["mixed"].num_floats == sum(n * dims[f] + (dims[f] < 16) * 16 * dims[f] for f, n in SPARSE.items())
    assert 3 <= sizes["qr"].compression < 3.5
    assert 2 <= sizes["mixed"].compression < 4, "steps of 4 columns are large"


@pytest.mark.parametrize("combine", ["multiply", "add"])
def test_vectors_of_two_start_with_the_variance_of_whole_ones(combine: str) -> None:
    sparse = {"a": 100_000}
    embeddings = Embeddings(sparse, [owner("qr", compression=20, combine=combine, init_scale=0.3)])
    draws: list[Tensor] = []
    for part in ("quotient", "remainder"):
        seed, scale = embeddings.table_start(f"one/a/{part}")
        assert seed == f"0/dcnv2/a/{part}"
        draws.append((torch.rand(200_000, generator=torch.Generator().manual_seed(len(draws))) * 2 - 1) * scale)
    made_of_two = draws[0] * draws[1] if combine == "multiply" else draws[0] + draws[1]
    assert made_of_two.var().item() == pytest.approx(0.3**2 / 3, rel=0.02)


def test_a_table_starts_alike_beside_other_owners() -> None:
    others = [owner("qr", "first", "7/fnn", compression=5), owner("mixed", "second", compression=3)]
    own = [owner("qr", "q", compression=3), owner("mixed", "m", "1/fnn", compression=2)]
    alone, beside = (tables_of(made(*owners)) for owners in (own, [*others, *own]))
    for table, weight in alone.items():
        assert torch.equal(weight, beside[table]), table
        assert (weight != 0).float().mean() > 0.99
    assert all(table.split("/")[1] in SPARSE for table in beside)


def test_a_whole_table_of_qr_starts_as_one_of_tables() -> None:
    whole, qr = (tables_of(made(own)) for own in (owner("tables"), owner("qr", compression=3)))
    assert torch.equal(whole["one/a"], qr["one/a"])


def test_the_dial_finds_the_least_setting() -> None:
    own = owner("qr", compression=4)
    found = least(lambda setting: int(100 / (1 + setting)), 99, 100, own)
    assert found == pytest.approx(100 / 26 - 1, abs=1e-9), "25 floats are left from there on"
    assert least(lambda _: 1, 99, 100, own) == 0
