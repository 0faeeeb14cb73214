"""Initial values of tables as a function of (seed, table, row, column) alone.

Neither the sharding plan nor the number of ranks nor the other tables change a value, and no rank ever holds more of a
table than its shards.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

# Values that are drawn at once. On a CPU what is computed on the way to them stays in a cache: a tenth of the time that
# it takes from memory. A GPU wants many.
CHUNK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 22}


@torch.no_grad()
def init_tables(module: nn.Module, start: Callable[[str], tuple[str, float]]) -> None:
    """Fill every table shard under `module` with uniform values in [-scale, scale).

    Args:
        module: a sharded module whose state_dict holds tables as `embedding_bags.TABLE.weight`.
        start: name of a table to the text that its values are drawn from, and the scale, half the distribution's width.
    """
    for key, weight in module.state_dict().items():
        *_, parent, table, leaf = ["", "", *key.split(".")]
        if parent != "embedding_bags" or leaf != "weight":
            continue
        seed, scale = start(table)
        if isinstance(weight, ShardedTensor):
            num_columns = weight.metadata().size[1]
            for shard in weight.local_shards():
                row, column = shard.metadata.shard_offsets
                fill_uniform(shard.tensor, seed, scale, first=(row, column), num_columns=num_columns)
        else:
            fill_uniform(weight, seed, scale, first=(0, 0), num_columns=weight.size(1))


def fill_uniform(shard: Tensor, seed: str, scale: float, *, first: tuple[int, int], num_columns: int) -> None:
    """Fill `shard`, whose corner is element `first` of a table that is `num_columns` wide, in bounded memory."""
    step = max(CHUNK_ELEMENTS[shard.device.type] // max(shard.size(1), 1), 1)
    for begin in range(0, shard.size(0), step):
        rows = torch.arange(begin, min(begin + step, shard.size(0)), device=shard.device)
        fill_rows(shard, rows, seed, scale, first=first, num_columns=num_columns)


def fill_rows(
    shard: Tensor, rows: Tensor, seed: str, scale: float, *, first: tuple[int, int], num_columns: int
) -> None:
    """Fill some rows of `shard`, counted from its own first one, as `fill_uniform` does all."""
    key = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], signed=True)
    columns = torch.arange(first[1], first[1] + shard.size(1), device=shard.device)
    bits = _splitmix64((rows[:, None] + first[0]) * num_columns + columns + key)
    # 24 bits are what a float32 in [0, 1) holds.
    unit = _shift_right(bits, 40).to(torch.float32) * 2.0**-24
    shard[rows] = (unit * 2 - 1).mul_(scale).to(shard.dtype)


def _splitmix64(word: Tensor) -> Tensor:
    """SplitMix64's output function (Steele et al., 2014) on int64, whose arithmetic wraps."""
    word = word * _signed(0x9E3779B97F4A7C15)
    word = (word ^ _shift_right(word, 30)) * _signed(0xBF58476D1CE4E5B9)
    word = (word ^ _shift_right(word, 27)) * _signed(0x94D049BB133111EB)
    return word ^ _shift_right(word, 31)


def _shift_right(word: Tensor, by: int) -> Tensor:
    """Shift without sign."""
    return (word >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
