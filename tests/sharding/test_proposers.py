"""TorchRec's proposers plan with our prices."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recsys.config import InputError
from recsys.sharding import search
from recsys.sharding.config import ShardingConfig
from recsys.sharding.make import make_plan
from recsys.sharding.plan import KERNELS, TYPES, Plan
from recsys.sharding.proposers import _AnyKernel, _planner, propose
from recsys.sharding.quote import quote
from recsys.sharding.search import Search
from tests.sharding.plans import mlperf, setting, small

PROPOSERS = ("greedy", "uniform", "dynamic_programming", "memory_balanced", "grid_search")
# Few enough choices for the grid search: eight tables have two each.
FEW = ("*=table_wise", *(f"C{index}=table_wise+row_wise" for index in (1, 2, 3, 10, 11, 19, 20, 21)))


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_each_plans_the_26_tables(proposer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SHAKES", 1000)
    model, rules = setting(mlperf(), "h100x4x2", constraints=FEW)
    plan = propose(model, rules, 0.1, proposer)
    plan.check()
    priced = quote(plan, model, reserve=0.1)
    assert priced.fits
    ours = quote(Search(model, rules, 0.1).best(), model).step_seconds
    assert ours <= priced.step_seconds * 1.001
    assert logging.root.manager.disable == 0


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("kernel", ["fused", "fused_uvm", "fused_uvm_caching", "key_value"])
def test_every_type_and_kernel_comes_through(kind: str, kernel: str) -> None:
    workload = small([(10, 16), (3, 8), (1000, 48), (5, 4)])
    model, rules = setting(workload, "h100x2x2", [kind], [kernel])
    plan = propose(model, rules, 0.1, "uniform")
    assert {table.sharding_type for table in plan.tables.values()} == {kind}
    assert {table.kernel for table in plan.tables.values()} == {"dense" if kind == "data_parallel" else kernel}
    assert (plan.world_size, plan.ranks_per_node) == (4, 2)
    assert quote(plan, model).fits
    if kind == "column_wise":
        assert [shard.columns for shard in plan.tables["t2"].shards] == [12] * 4


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_one_line_where_nothing_fits(proposer: str) -> None:
    model, rules = setting(mlperf(), "a100-40x2", constraints=FEW)
    with pytest.raises(InputError, match=rf"^nothing fits: none of the plans that TorchRec's {proposer} pro") as caught:
        propose(model, rules, 0.1, proposer)
    assert "\n" not in str(caught.value)


def test_what_would_take_hours_does_not_begin() -> None:
    model, rules = setting(small([(1000, 16)] * 3000), "h100x8x32")
    started = time.perf_counter()
    with pytest.raises(InputError, match=r"greedy would take about [\d,]+ hours for 3,000 tables on 256 ranks"):
        propose(model, rules, 0.1, "greedy")
    with pytest.raises(InputError, match=r"no more than 10,000 combinations, and 3,000 tables on 256 ranks have about"):
        propose(model, rules, 0.1, "grid_search", 1e9)
    assert time.perf_counter() - started < 5, "it is told at once"
    few, rules = setting(small([(1000, 16)] * 3), "h100x8", ["table_wise", "row_wise"])
    with pytest.raises(InputError, match=r"more than --sharding.proposer-minutes 1e-06"):
        propose(few, rules, 0.1, "greedy", 1e-6)
    propose(few, rules, 0.1, "greedy")


def _make(proposer: str, types: Sequence[str] = ()) -> Plan:
    model, _ = setting(mlperf(), "h100x4")
    return make_plan(model, ShardingConfig(proposer=proposer, types=tuple(types)))  # type: ignore[arg-type]


def test_the_config_names_the_proposer() -> None:
    assert _make("uniform", ["row_wise"]) == _make("greedy", ["row_wise"])
    assert {table.sharding_type for table in _make("uniform").tables.values()} <= {"row_wise", "table_wise"}
    with pytest.raises(InputError, match="grid_search tries no more than"):
        _make("grid_search")
    with pytest.raises(ValueError, match="proposer_minutes 0 must be above 0"):
        ShardingConfig(proposer_minutes=0)


def test_options_come_in_one_order() -> None:
    kernels = ["fused_uvm", "fused"]
    model, rules = setting(small([(1000, 16)] * 3), "h100x2x2", kernels=kernels)
    planner = _planner(model, rules, 0.1, "greedy")
    tables = [EmbeddingBagConfig(name=f"t{n}", num_embeddings=1000, embedding_dim=16) for n in range(3)]
    module = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    found = [
        (option.name, option.sharding_type, option.compute_kernel)
        for option in planner._enumerator.enumerate(module, [_AnyKernel()])
    ]
    types = [kind for kind in TYPES if kind in rules[0].types]
    assert sorted(found, key=lambda o: (o[0], types.index(o[1]), KERNELS.index(o[2]))) == found
    assert len(found) == 3 * len(types) * len(kernels)


@pytest.mark.slow
def test_plans_do_not_depend_on_how_words_are_hashed() -> None:
    code = "from tests.sharding.test_proposers import in_two_ways; import sys; print(*in_two_ways(), sep='', end='')"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert told.stdout == "".join(in_two_ways())


def in_two_ways() -> tuple[str, str]:
    """Plans of TorchRec's and of our search, with all types and two kernels to choose from."""
    model, rules = setting(small([(1000 * 3**n, 16) for n in range(8)]), "h100x2x2", kernels=["fused", "fused_uvm"])
    return propose(model, rules, 0.1, "greedy").dumps(), Search(model, rules, 0.1).best().dumps()
