"""Tables look up each field, fields come in schema order, and values start alike under every plan."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchrec.sparse.jagged_tensor import KeyedTensor

from recsys.embeddings import init
from recsys.embeddings.config import EmbeddingConfig, Owner
from recsys.embeddings.init import fill_uniform, init_tables
from recsys.embeddings.tables import FieldOrder, Tables
from tests.batches import batch_of

SPARSE = {"c": 11, "a": 5, "b": 7}
B = 32


@pytest.mark.parametrize("dims", [{"one": 4}, {"one": 4, "two": 8}])
def test_tables_look_up_each_field_in_its_own_table(dims: dict[str, int]) -> None:
    owners = [Owner(name=name, seed=name, config=EmbeddingConfig(embedding_dim=dim)) for name, dim in dims.items()]
    tables = Tables(SPARSE, owners).to_empty(device="cpu")
    init_tables(tables, lambda table: (table, 1.0))
    ids = {name: torch.randint(num_ids, (B,)) for name, num_ids in SPARSE.items()}
    weights = tables.state_dict()
    fields = tables(batch_of(torch.zeros(B, 0), ids, torch.zeros(B)).sparse)
    for owner, x_BFD in zip(dims, fields, strict=True):
        rows = [weights[f"tables.embedding_bags.{owner}/{name}.weight"][ids[name]] for name in SPARSE]
        assert_close(x_BFD, torch.stack(rows, dim=1))
        assert x_BFD.shape == (B, len(SPARSE), dims[owner])


@pytest.mark.parametrize("dim", [0, 2, 10])
def test_a_dim_that_fbgemm_does_not_take_is_named(dim: int) -> None:
    with pytest.raises(ValueError, match=f"embedding_dim {dim} must be a multiple of 4; {max(4, dim + 2)} is"):
        EmbeddingConfig(embedding_dim=dim)


GROUPS, DIMS = [["u", "v", "w"], ["x", "y", "z"]], [4, 8]


def pooled(keys: Sequence[str]) -> KeyedTensor:
    widths = [DIMS[0] if key in GROUPS[0] else DIMS[1] for key in keys]
    values = torch.randn(5, sum(widths), generator=torch.Generator().manual_seed(0))
    return KeyedTensor(keys=list(keys), length_per_key=widths, values=values)


def test_fields_come_in_schema_order_from_any_order_of_keys() -> None:
    # One FieldOrder for all orders: what it remembers of one must not serve another.
    field_order = FieldOrder(GROUPS, DIMS)
    for keys in itertools.permutations(itertools.chain(*GROUPS)):
        given = pooled(keys)
        for group, x_BFD in zip(GROUPS, field_order(given), strict=True):
            assert torch.equal(x_BFD, torch.stack([given[key] for key in group], dim=1)), keys


def test_fields_that_stand_in_order_are_not_copied() -> None:
    for keys in ("uvwxyz", "xyzuvw"):
        given = pooled(keys)
        for x_BFD in FieldOrder(GROUPS, DIMS)(given):
            assert x_BFD.untyped_storage().data_ptr() == given.values().untyped_storage().data_ptr()


# Initial values of tables

TABLE = (37, 12)


def filled(rows: slice = slice(0, 37), columns: slice = slice(0, 12), seed: str = "0/c", scale: float = 0.01) -> Tensor:
    """A piece of a table, filled as a shard."""
    shard = torch.full((rows.stop - rows.start, columns.stop - columns.start), math.nan)
    fill_uniform(shard, seed, scale, first=(rows.start, columns.start), num_columns=TABLE[1])
    return shard


@pytest.mark.parametrize("rows", [slice(0, 37), slice(0, 10), slice(10, 37), slice(36, 37)])
@pytest.mark.parametrize("columns", [slice(0, 12), slice(0, 4), slice(4, 12)])
def test_a_shard_is_that_part_of_the_table(rows: slice, columns: slice) -> None:
    assert torch.equal(filled(rows, columns), filled()[rows, columns])


@pytest.mark.parametrize("elements", [1, 12, 50, 443, 444])
def test_values_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    whole = filled()
    monkeypatch.setitem(init.CHUNK_ELEMENTS, "cpu", elements)
    assert torch.equal(filled(), whole)


def test_values_are_uniform_and_uncorrelated() -> None:
    table, scale = torch.empty(4096, 16), 0.25
    fill_uniform(table, "0/c", scale, first=(0, 0), num_columns=16)
    num = table.numel()
    assert -scale <= table.min() < -0.999 * scale
    assert 0.999 * scale < table.max() < scale
    assert abs(table.mean()) < 4 * scale / math.sqrt(3 * num)
    assert table.var().item() == pytest.approx(scale**2 / 3, rel=0.02)
    counts = torch.histc(table, bins=16, min=-scale, max=scale)
    assert (counts - num / 16).abs().max() < 5 * math.sqrt(num / 16)
    for first, second in ((table[1:], table[:-1]), (table[:, 1:], table[:, :-1])):
        assert abs((first * second).mean()) < 5 * scale**2 / 3 / math.sqrt(num)


def test_other_seeds_give_other_values() -> None:
    assert torch.equal(filled(seed="0/c"), filled(seed="0/c"))
    assert not (filled(seed="0/c") == filled(seed="1/c")).any()
    assert not (filled(seed="0/c") == filled(seed="0/d")).any()
