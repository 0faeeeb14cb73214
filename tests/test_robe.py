"""ROBE looks up, sums, and learns what its formula says, bit for bit where numbers allow, on any number of threads."""

import itertools
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.config import InputError
from recsys.embeddings import robe_machine, robe_tensors
from recsys.embeddings.config import EmbeddingConfig, Owner
from recsys.embeddings.robe import Robe, RobeArray
from recsys.embeddings.robe_hash import Bags, P, RobeHash, robe_hash

SPARSE = {"c": 11, "a": 50, "b": 70}
PLACES = (robe_machine, robe_tensors)


def owner(name: str = "one", seed: str = "0/dcnv2", **changes: Any) -> Owner:
    return Owner(name=name, seed=seed, config=EmbeddingConfig(embeddings="robe", **changes))


def hash_of(dim: int, block_size: int, sign: bool, sparse: dict[str, int] = SPARSE, compression: float = 3.0):
    return robe_hash(sparse, owner(embedding_dim=dim, block_size=block_size, sign=sign, compression=compression))


def bags_of(lengths_FB: Sequence[Sequence[int]], sparse: dict[str, int] = SPARSE, dtype=torch.int32) -> Bags:
    """Ids in a batch whose features come in reverse order."""
    generator = torch.Generator().manual_seed(0)
    ids = [
        torch.randint(num_ids, (sum(lengths),), generator=generator, dtype=dtype)
        for num_ids, lengths in zip(reversed(sparse.values()), lengths_FB, strict=True)
    ]
    offsets = torch.tensor([0, *itertools.accumulate(itertools.chain(*lengths_FB))], dtype=torch.int32)
    return Bags(torch.cat(ids), offsets, list(reversed(range(len(sparse)))), len(lengths_FB[0]))


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Floats whose sums are exact in any order."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


def reference(array: list[float], robe: RobeHash, bags: Bags, grad_BFD: list) -> tuple[np.ndarray, np.ndarray]:
    """Values and gradient by the formula of 2207.10731, number by number."""
    m, Z, D = robe.num_floats, robe.block_size, robe.dim
    ids, offsets = bags.ids_L.tolist(), bags.offsets.tolist()
    x_BFD = np.zeros((bags.num_rows, len(bags.columns_F), D))
    grad_m = np.zeros(m)
    for f, column in enumerate(bags.columns_F):
        for b in range(bags.num_rows):
            bag = column * bags.num_rows + b
            for v in ids[offsets[bag] : offsets[bag + 1]]:
                row = v % 2**64 + int(robe.first_rows_F[f])
                for i in range(D):
                    a, b_, c = robe.places
                    index = ((a * row + b_ * (i // Z) + c) % P) % (m - Z + 1) + i % Z
                    sign = 1
                    if robe.signs:
                        a, b_, c = robe.signs
                        sign = -1 if ((a * row + b_ * (i // Z) + c) % P) % 2 else 1
                    x_BFD[b, f, i] += sign * array[index]
                    grad_m[index] += sign * grad_BFD[b][f][i]
    return x_BFD, grad_m


HOT = {"one id": [[1] * 9] * 3, "many": [[1, 0, 3, 2, 0, 1, 1, 4, 0], [0] * 9, [2, 1, 1, 1, 1, 5, 0, 0, 1]]}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("hot", HOT)
@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("block_size", [1, 8, 32, 128])
@pytest.mark.parametrize("dim", [4, 16, 48])
def test_values_and_gradients_are_those_of_the_formula(place, hot: str, sign: bool, block_size: int, dim: int) -> None:
    robe, bags = hash_of(dim, block_size, sign), bags_of(HOT[hot])
    array_m, grad_BFD = whole_numbers(robe.num_floats), whole_numbers(9, 3, dim, seed=1)
    x_BFD, lookup = place.look_up(array_m, robe, bags)
    values, gradient = reference(array_m.tolist(), robe, bags, grad_BFD.tolist())
    np.testing.assert_array_equal(x_BFD, values)
    np.testing.assert_array_equal(place.gradient(robe, lookup, grad_BFD), gradient)
    assert x_BFD.dtype == torch.float32


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("num_ids", "compression", "ids"),
    [
        (2**31 - 1, 1e8, torch.tensor([2**31 - 2, 2**31 - 3, P, P - 1, 0, 1], dtype=torch.int32)),
        (2**31 - 1, 1e8, torch.tensor([2**31 - 2, 2**31 - 3, P, P - 1, 0, 1])),
        (2**64, 1e18, torch.tensor([2**63 - 1, -1, -(2**63), P - 1, 0, 2**40])),
    ],
)
def test_nothing_overflows(place, num_ids: int, compression: float, ids: Tensor) -> None:
    robe = hash_of(16, 8, True, dict.fromkeys(SPARSE, num_ids), compression)
    assert robe.first_rows_F.tolist() == [0, num_ids % P, 2 * num_ids % P]
    bags = Bags(ids, torch.arange(7, dtype=torch.int32), [2, 1, 0], 2)
    array_m, grad_BFD = whole_numbers(robe.num_floats), whole_numbers(2, 3, 16, seed=1)
    x_BFD, lookup = place.look_up(array_m, robe, bags)
    values, gradient = reference(array_m.tolist(), robe, bags, grad_BFD.tolist())
    np.testing.assert_array_equal(x_BFD, values)
    np.testing.assert_array_equal(place.gradient(robe, lookup, grad_BFD), gradient)


@given(
    lengths=st.integers(1, 70).flatmap(
        lambda rows: st.lists(st.lists(st.integers(0, 3), min_size=rows, max_size=rows), min_size=3, max_size=3)
    ),
    dim=st.sampled_from([4, 12, 16, 36]),
    block_size=st.integers(1, 70),
    sign=st.booleans(),
    threads=st.integers(1, 3),
)
@settings(max_examples=50, deadline=None)
def test_machine_code_and_tensors_agree(lengths, dim: int, block_size: int, sign: bool, threads: int) -> None:
    robe, bags = hash_of(dim, block_size, sign), bags_of(lengths)
    array_m, grad_BFD = whole_numbers(robe.num_floats), whole_numbers(bags.num_rows, 3, dim, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = [place.look_up(array_m, robe, bags) for place in PLACES]
        gradients = [place.gradient(robe, own[1], grad_BFD) for place, own in zip(PLACES, found, strict=True)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(*gradients)


# Threads

ROWS = 3000


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("block_size", [8, 48])
def test_the_number_of_threads_changes_no_bit(threads: Any, block_size: int) -> None:
    robe, bags = hash_of(48, block_size, True, compression=7), bags_of([[2] * ROWS] * 3)
    array_m, grad_BFD = torch.randn(robe.num_floats), torch.randn(ROWS, 3, 48)
    results = []
    for number in (1, 2, 2, 3):
        threads(number)
        x_BFD, lookup = robe_machine.look_up(array_m, robe, bags)
        results.append((x_BFD, robe_machine.gradient(robe, lookup, grad_BFD)))
    for x_BFD, gradient in results[1:]:
        assert torch.equal(x_BFD, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_stretches_cover_everything_once(threads: Any) -> None:
    for number, num_all in itertools.product((1, 2, 3, 7), (1, 15, 16, 17, 1000, 1024)):
        threads(number)
        stretches = robe_machine._stretches(num_all, 16)
        assert [stretch[0] for stretch in stretches] == [0, *[stretch[1] for stretch in stretches[:-1]]]
        assert stretches[-1][1] == num_all
        assert all(begin % 16 == 0 and begin < end for begin, end in stretches)


# Memory


class LargestIndex(TorchDispatchMode):
    """Elements of the largest tensor of integers that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and not tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_index_is_as_large_as_the_output() -> None:
    sparse = dict.fromkeys(SPARSE, 5000)
    robe, bags = hash_of(64, 32, True, sparse, compression=100), bags_of([[1] * ROWS] * 3, sparse)
    array_m, grad_BFD = torch.randn(robe.num_floats), torch.randn(ROWS, 3, 64)
    with LargestIndex() as largest:
        _, lookup = robe_tensors.look_up(array_m, robe, bags)
        robe_tensors.gradient(robe, lookup, grad_BFD)
    assert 0 < largest.numel <= ROWS * 3 * 2, "one a block"
    tracemalloc.start()
    _, own = robe_machine.look_up(array_m, robe, bags)
    robe_machine.gradient(robe, own, grad_BFD)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert ROWS * 3 * 2 * 4 < peak < 2 * ROWS * 3 * 2 * 4, "of an int32 a block, which NumPy tells of, and the ends"


# The module


def ids_of(bags: Bags, sparse: dict[str, int] = SPARSE) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=list(reversed(sparse)), values=bags.ids_L, lengths=bags.offsets.diff(), stride=bags.num_rows
    )


def array_of(robe: Robe, name: str = "one") -> RobeArray:
    array = robe.by_owner[name]
    assert isinstance(array, RobeArray)
    return array


@pytest.mark.parametrize("on_any_device", [False, True])
def test_each_owner_looks_up_in_an_array_of_its_own(monkeypatch: pytest.MonkeyPatch, on_any_device: bool) -> None:
    if on_any_device:
        monkeypatch.setattr("recsys.embeddings.robe.robe_machine", robe_tensors)
    owners = [owner(embedding_dim=16), owner(name="two", seed="1/dcnv2", embedding_dim=8, sign=True, compression=2)]
    robe, bags = Robe(SPARSE, owners), bags_of(HOT["many"])
    fields = robe(ids_of(bags))
    for x_BFD, own in zip(fields, owners, strict=True):
        array = array_of(robe, own.name)
        expected, _ = robe_tensors.look_up(array.array, array.hash, bags)
        assert_close(x_BFD, expected)
        assert x_BFD.requires_grad
    grads = [torch.randn_like(x_BFD) for x_BFD in fields]
    torch.autograd.backward(fields, grads)
    for grad_BFD, own in zip(grads, owners, strict=True):
        array = array_of(robe, own.name)
        _, lookup = robe_tensors.look_up(array.array, array.hash, bags)
        assert_close(array.array.grad, robe_tensors.gradient(array.hash, lookup, grad_BFD))
    assert len(array_of(robe, "two").array) == sum(SPARSE.values()) * 8 // 2


def test_autocast_leaves_values_as_they_are() -> None:
    robe, bags = Robe(SPARSE, [owner()]), bags_of(HOT["one id"])
    (plain,) = robe(ids_of(bags))
    with torch.autocast("cpu", torch.bfloat16):
        (x_BFD,) = robe(ids_of(bags))
    assert torch.equal(x_BFD, plain)
    x_BFD.to(torch.bfloat16).sum().backward()
    assert array_of(robe).array.grad.dtype == torch.float32  # type: ignore[union-attr]


def test_values_and_places_come_from_the_owners_seed() -> None:
    one, renamed = (array_of(Robe(SPARSE, [owner(name=name)]), name) for name in ("one", "two"))
    other = array_of(Robe(SPARSE, [owner(seed="1/dcnv2")]))
    assert torch.equal(one.array, renamed.array)
    assert one.hash.places == renamed.hash.places
    assert not (one.array == other.array).any()
    assert one.hash.places != other.hash.places
    assert one.array.abs().max() <= 0.01
    signed = array_of(Robe(SPARSE, [owner(sign=True)])).hash
    assert signed.signs is not None
    assert signed.places == one.hash.places
    assert signed.signs != signed.places
    # A checkpoint holds the array and not the places: these must never change.
    assert one.hash.places == PINNED


PINNED = (1845079099, 910950231, 1862978400)


def test_an_array_is_not_made_where_no_memory_is_asked_for() -> None:
    with torch.device("meta"):
        assert array_of(Robe({"a": 2**40}, [owner(compression=1e6)])).array.is_meta


def test_ids_of_no_row_are_refused() -> None:
    bags = bags_of(HOT["one id"])
    bags.ids_L[0] = 70
    with pytest.raises(InputError, match="feature b, row 0 of the batch: id 70 has no row"):
        Robe(SPARSE, [owner()])(ids_of(bags))


# Adagrad within the backward


@pytest.mark.parametrize("share", [0.0, 2.0])
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("block_size", [1, 8, 32])
def test_a_fused_update_is_that_of_the_dense_optimizer(
    threads: Any, monkeypatch: pytest.MonkeyPatch, share: float, num_threads: int, block_size: int
) -> None:
    threads(num_threads)
    monkeypatch.setattr(robe_machine, "SHARE", share)  # whether all lines are updated, or only those that are touched
    sparse = dict.fromkeys(SPARSE, 999)  # the last line of the array is not a whole one
    pair = [Robe(sparse, [owner(block_size=block_size, compression=4, sign=True)]) for _ in range(2)]
    fused, dense = (array_of(robe) for robe in pair)
    optimizers = [torch.optim.Adagrad(robe.parameters(), lr=0.1, eps=1e-6, fused=True) for robe in pair]
    fused.fuse(optimizers[0])
    start = fused.array.detach().clone()
    for step in range(6):
        bags = bags_of([[step % 2 + 1] * 20] * 3, sparse)
        bags.ids_L.add_(step * 7).remainder_(999)
        for robe, optimizer in zip(pair, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            (x_BFD,) = robe(ids_of(bags, sparse))
            x_BFD.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_close(fused.array, dense.array, atol=1e-7, rtol=1e-5)
    assert fused.array.grad is None
    squares = [o.state[array.array]["sum"] for o, array in zip(optimizers, (fused, dense), strict=True)]
    assert_close(*squares, atol=1e-9, rtol=1e-5)
    untouched = squares[1] == 0
    assert 0.1 < untouched.float().mean() < 0.9
    assert torch.equal(fused.array[untouched], start[untouched])


def test_a_fused_update_goes_on_from_what_was_loaded() -> None:
    robe, bags = Robe(SPARSE, [owner()]), bags_of(HOT["one id"])
    array = array_of(robe)
    optimizer = torch.optim.Adagrad(robe.parameters(), lr=0.1)
    array.fuse(optimizer)
    with torch.no_grad():
        optimizer.state[array.array]["sum"].fill_(1e12)
        before = array.array.clone()
    robe(ids_of(bags))[0].sum().backward()
    assert_close(array.array, before)


# What cannot be


@pytest.mark.parametrize("compression", [0.5, 0, -1, float("nan"), float("inf")])
def test_a_compression_below_one_is_named(compression: float) -> None:
    with pytest.raises(ValueError, match=f"compression {compression:g} must be a finite number of at least 1"):
        owner(compression=compression)


def test_settings_that_are_another_kinds_are_named() -> None:
    with pytest.raises(ValueError, match="compression 10 is not for embeddings tables; use robe, qr, mixed"):
        EmbeddingConfig(compression=10)
    with pytest.raises(ValueError, match="table_dtype fp16 is not for embeddings robe"):
        owner(table_dtype="fp16")
    with pytest.raises(ValueError, match="block_size 0 must be at least 1; 32 is fast"):
        owner(block_size=0)


def test_an_array_smaller_than_a_block_names_what_works() -> None:
    num_floats = sum(SPARSE.values()) * 16
    with pytest.raises(InputError, match=r"one: compression 66 leaves 31 of 2,096 floats.* that works is 65") as error:
        Robe(SPARSE, [owner(compression=66)])
    assert num_floats == 2096
    assert len(array_of(Robe(SPARSE, [owner(compression=65)])).array) == 32
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="block_size 4000 is above that too, the largest that works is 2096"):
        Robe(SPARSE, [owner(block_size=4000)])
    assert len(array_of(Robe(SPARSE, [owner(block_size=2096)])).array) == 2096


def test_an_array_beyond_the_hash_names_what_works() -> None:
    sparse = {"a": 10**9}
    with pytest.raises(InputError, match=r"hash reaches 2,038,074,774; the smallest compression that works is 8"):
        robe_hash(sparse, owner(compression=7))
    assert robe_hash(sparse, owner(compression=8)).num_floats == 2 * 10**9
