"""Rows are quantised as a slow plain reference does it, and looked up and pooled as their values read back."""

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.config import InputError
from recsys.embeddings import quantised
from recsys.embeddings.config import EmbeddingConfig, Owner, TableDtype, served_dtype
from recsys.embeddings.init import init_tables
from recsys.embeddings.quantised import BITS, quantise_tables, quantised_rows
from recsys.embeddings.tables import Tables

INTEGERS = ("int8", "int4", "int2")
SPARSE = {"c": 11, "a": 5, "b": 700}
DIMS = {"one": 4, "two": 8, "three": 20}
B = 33


def reference(row: np.ndarray, bits: int) -> tuple[np.ndarray, np.float16, np.float16]:
    """Integers, scale and bias of one row [D], value by value."""
    bias = np.float16(row.min())
    scale = np.float16((row.max() - np.float32(bias)) / np.float32(2**bits - 1))
    used = np.float32(scale)
    if used == 0 or np.isinf(np.float32(1) / used):
        scale, used = np.float16(1), np.float32(1)
    inverse = np.float32(1) / used
    integers = [min(max(int(np.rint((x - np.float32(bias)) * inverse)), 0), 2**bits - 1) for x in row]
    return np.array(integers), scale, bias


def unpacked(row: np.ndarray, bits: int) -> np.ndarray:
    """Integers of a row of bytes; the first stands in the lowest bits."""
    return np.array([(byte >> shift) & (2**bits - 1) for byte in row for shift in range(0, 8, bits)])


def rows_of(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "usual":
        return rng.normal(0, 0.05, (50, 12)).astype(np.float32)
    if kind == "one-sided":
        return rng.uniform(3, 4, (50, 12)).astype(np.float32)
    if kind == "scales":
        return (rng.normal(size=(50, 12)) * 10.0 ** rng.integers(-4, 4, (50, 1))).astype(np.float32)
    return np.repeat(np.array([[0.0], [3.3], [-0.125], [1e-9]], np.float32), 12, axis=1)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("kind", ["usual", "one-sided", "scales", "constant"])
def test_rows_are_those_of_the_reference(dtype: str, kind: str) -> None:
    rows, bits = rows_of(kind), BITS[served_dtype(dtype)]
    values, scales = quantised_rows(torch.from_numpy(rows), served_dtype(dtype))
    assert scales is not None
    numbers = scales.contiguous().numpy().view(np.float16)
    for index, row in enumerate(rows):
        integers, scale, bias = reference(row, bits)
        assert numbers[index].tolist() == [scale, bias], index
        np.testing.assert_array_equal(unpacked(values[index].numpy(), bits), integers)


def tables_of(dims: dict[str, int], dtype: TableDtype = "fp32") -> Tables:
    owners = [
        Owner(name=name, seed=name, config=EmbeddingConfig(embedding_dim=dim, table_dtype=dtype))
        for name, dim in dims.items()
    ]
    tables = Tables(SPARSE, owners).to_empty(device="cpu")
    init_tables(tables, lambda table: (table, 0.3))
    return tables


def ids(hotness: int, kind: torch.dtype = torch.int32) -> KeyedJaggedTensor:
    """Of none to `hotness` ids a row; one each where hotness is 1."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0 if hotness > 1 else 1, hotness + 1, (len(SPARSE), B), generator=generator)
    values = [
        torch.randint(num, (int(own.sum()),), generator=generator)
        for num, own in zip(SPARSE.values(), lengths, strict=True)
    ]
    return KeyedJaggedTensor(
        keys=list(SPARSE), values=torch.cat(values).to(kind), lengths=lengths.flatten().to(torch.int32)
    )


def plain_lookup(tables: Tables, batch: KeyedJaggedTensor, bits: int) -> list[np.ndarray]:
    """Sum of the values read back, id by id, in float64: one [B, F, D] an owner."""
    weights = {name: weight.float().numpy() for name, weight in tables.state_dict().items()}
    found = []
    for owner, dim in DIMS.items():
        x_BFD = np.zeros((B, len(SPARSE), dim))
        for field, feature in enumerate(SPARSE):
            weight = weights[f"tables.embedding_bags.{owner}/{feature}.weight"]
            for row, own in enumerate(batch[feature].to_dense()):
                for index in own.tolist():
                    values = weight[index].astype(np.float64)
                    if bits < 16:
                        integers, scale, bias = reference(weight[index], bits)
                        values = integers * np.float64(scale) + np.float64(bias)
                    elif bits == 16:
                        values = weight[index].astype(np.float16).astype(np.float64)
                    x_BFD[row, field] += values
        found.append(x_BFD)
    return found


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize(("hotness", "kind"), [(1, torch.int32), (4, torch.int32), (4, torch.int64)])
def test_lookups_are_those_of_values_read_back(dtype: str, hotness: int, kind: torch.dtype) -> None:
    tables, batch = tables_of(DIMS), ids(hotness, kind)
    expected = plain_lookup(tables, batch, BITS[served_dtype(dtype)])
    trained = tables(batch)
    quantise_tables(tables, served_dtype(dtype))
    for found, exact, wanted in zip(tables(batch), trained, expected, strict=True):
        assert found.dtype is torch.float32
        np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5, rtol=0)
        if dtype == "fp32":
            assert torch.equal(found, exact)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("hotness", [1, 4])
def test_kernels_of_shards_look_up_as_a_whole_collection(dtype: str, hotness: int) -> None:
    tables, batch = tables_of(DIMS), ids(hotness)
    weights = [weight.detach() for weight in tables.parameters()]
    bags = quantised.QuantisedBags(weights, range(len(weights)), quantised.PoolingMode.SUM, served_dtype(dtype))
    quantise_tables(tables, served_dtype(dtype))
    expected = torch.cat([x_BFD.flatten(1) for x_BFD in tables(batch)], dim=1)
    together = KeyedJaggedTensor(
        keys=[f"{number}" for number in range(len(weights))],
        values=batch.values().repeat(len(DIMS)),
        lengths=batch.lengths().repeat(len(DIMS)),
    )
    assert torch.equal(bags(together), expected)


# Half a step of the integers, and what fp16 rounds off scale (times the largest integer) and bias.
@pytest.mark.parametrize("dtype", BITS)
def test_errors_stay_within_half_a_step(dtype: str) -> None:
    bits = BITS[served_dtype(dtype)]
    tables, batch = tables_of(DIMS), ids(1)
    before = [x_BFD.detach() for x_BFD in tables(batch)]
    quantise_tables(tables, served_dtype(dtype))
    rounding = 2.0**-11 * 0.3
    bound = {32: 0.0, 16: rounding}.get(bits, 0.6 / (2**bits - 1) / 2 + 3 * rounding)
    errors = [float((one - other).abs().max()) for one, other in zip(before, tables(batch), strict=True)]
    assert max(errors) <= bound
    if bits < 16:
        assert max(errors) > bound / 3


def test_bytes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sum(SPARSE.values())
    for dtype, row_bytes in (("fp32", 4 * 20), ("fp16", 2 * 20), ("int8", 20 + 4), ("int4", 10 + 4), ("int2", 5 + 4)):
        sizes = quantise_tables(tables_of({"three": 20}), served_dtype(dtype))
        assert sizes.before == rows * 80
        # Tables begin at multiples of 128 bytes.
        assert rows * row_bytes <= sizes.after < rows * row_bytes + 128 * len(SPARSE)
    assert quantise_tables(tables_of({"three": 20}, "fp16"), "int8").before == rows * 40
    assert str(sizes).startswith(f"tables: {rows * 80:,} bytes as trained, {sizes.after:,} as int2 (")


def test_chunks_do_not_change_values(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(100, 8)
    whole = quantised.QuantisedBags([weight], [0], quantised.PoolingMode.SUM, "int4")
    monkeypatch.setattr(quantised, "CHUNK_ROWS", 7)
    cut = quantised.QuantisedBags([weight], [0], quantised.PoolingMode.SUM, "int4")
    assert torch.equal(whole.kernel.weights_host, cut.kernel.weights_host)


def test_fp16_tables_are_quantised_as_their_values() -> None:
    low = tables_of(DIMS, "fp16")
    same = tables_of(DIMS)
    with torch.no_grad():
        for weight, half in zip(same.parameters(), low.parameters(), strict=True):
            weight.copy_(half)
    for tables in (low, same):
        quantise_tables(tables, "int8")
    for one, other in zip(low(ids(3)), same(ids(3)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "near"), [("int3", "int8"), ("bf16", "fp16"), ("8", "int8"), ("", "known are")])
def test_an_unknown_dtype_is_named(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"tables {name!r} cannot be: .*{near}"):
        served_dtype(name)


def test_a_model_without_tables_is_refused() -> None:
    with pytest.raises(InputError, match="the model has no tables to quantise"):
        quantise_tables(torch.nn.Linear(2, 2), "int8")


def test_quantised_tables_are_not_quantised_again() -> None:
    tables = tables_of(DIMS)
    quantise_tables(tables, "int8")
    with pytest.raises(InputError, match="the model has no tables to quantise"):
        quantise_tables(tables, "int4")
