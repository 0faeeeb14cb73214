"""Patience: how long TorchRec's proposers take, which make an object of every shard that they consider."""

import math
from collections.abc import Sequence

from recsys.config import InputError
from recsys.sharding.constraints import Allowed
from recsys.sharding.cost import CostModel
from recsys.sharding.plan import TYPES

COLUMN_PARTS = 4
"""Parts that columns are cut into at most; TorchRec considers one width for each table."""
MOST_COMBINATIONS = 10_000
"""That TorchRec's grid search begins with; it silently proposes nothing where there are more."""
BINS = 4096
"""Of memory, over all ranks, between which dynamic programming tells plans apart."""
SEARCHES = 4
"""Times that the memory-balanced partitioner places each proposal, about; 11 at most."""
BINS_A_PROPOSAL = 50
"""Of dynamic programming, about: most bins are out of reach, or hold a proposal that another bin has held."""

# Seconds on one core of a server, measured with 26 to 200 tables on 8 to 512 ranks: for a shard that is priced and
# copied, for one that a proposal places and the planner hashes, and for a step of dynamic programming (a table, an
# option and a bin).
SHARD_S, PLACE_S, STEP_S = 60e-6, 20e-6, 0.25e-6


def bins_a_rank(world_size: int) -> int:
    """Bins of memory that dynamic programming has for each rank: 100, TorchRec's number, or fewer on many ranks."""
    return max(1, min(100, BINS // world_size))


def check_patience(model: CostModel, rules: Sequence[Allowed], proposer: str, minutes: float) -> None:
    """See that a proposer ends in time.

    Raises:
        InputError: it would take longer than `minutes`, or not even begin.
    """
    seconds, digits = _work(model, rules, proposer)
    where = f"{len(rules):,} tables on {model.group.world_size:,} ranks"
    if proposer == "grid_search" and digits > math.log10(MOST_COMBINATIONS):
        raise InputError(
            f"TorchRec's grid_search tries no more than {MOST_COMBINATIONS:,} combinations, and {where} have "
            f"about 10^{digits:.0f}; leave fewer choices by --sharding.types or --sharding.constraints, or use "
            "--sharding.proposer search"
        )
    if seconds > 60 * minutes:
        about = f"{seconds / 60:,.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.0f} hours"
        raise InputError(
            f"TorchRec's {proposer} would take about {about} for {where}, more than --sharding.proposer-minutes "
            f"{minutes:g}; use --sharding.proposer search, or leave fewer choices by --sharding.types"
        )


def _work(model: CostModel, rules: Sequence[Allowed], proposer: str) -> tuple[float, float]:
    """Seconds that a proposer takes, about, and the logarithm of how many combinations the tables' choices have."""
    world, local = model.group.world_size, model.group.ranks_per_node
    shards_of = {
        "data_parallel": world,
        "row_wise": world,
        "table_wise": 1,
        "table_row_wise": local,
        "column_wise": COLUMN_PARTS,
        "table_column_wise": COLUMN_PARTS,
        "grid_shard": COLUMN_PARTS * local,
    }
    shards = placed = options = 0
    digits = 0.0
    for rule in rules:
        of_each = [
            shards_of[name] for name in rule.types for _ in (rule.kernels if name != "data_parallel" else ("dense",))
        ]
        shards += sum(of_each)
        placed += max(of_each)
        options += len(of_each)
        digits += math.log10(len(of_each))
    proposals = {
        "greedy": options - len(rules) + 1,
        "memory_balanced": SEARCHES * (options - len(rules) + 1),
        "uniform": len(TYPES),
        "grid_search": min(10 ** min(digits, 9), MOST_COMBINATIONS),
        "dynamic_programming": bins_a_rank(world) * world / BINS_A_PROPOSAL,
    }[proposer]
    steps = options * bins_a_rank(world) * world if proposer == "dynamic_programming" else 0
    return shards * SHARD_S + proposals * placed * PLACE_S + steps * STEP_S, digits
