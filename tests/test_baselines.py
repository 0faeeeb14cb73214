"""Baselines train the same model from the same start: their first losses are our trainer's."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from baselines import Baseline, Job
from baselines.plain import Plain
from baselines.sparse_bags import SparseBags
from baselines.torchrec_default import TorchRecDefault
from recsys.data.loader import Loader
from recsys.data.multihot_files import MultiHotConfig, store_multi_hot
from recsys.data.schema import Schema
from recsys.distributed import World, process_group
from recsys.members import parse_members
from recsys.training.config import TrainConfig
from recsys.training.trainer import Trainer
from tests.distributed.jobs import small_config
from workload import Setting, make_data

BASELINES: dict[str, Callable[[Job], Baseline]] = {
    "plain": Plain,
    "sparse_bags": SparseBags,
    "sparse_adam": partial(SparseBags, tables="sparse_adam"),
    "torchrec_default": TorchRecDefault,
}
NUM_STEPS = 3
pytestmark = [  # what the libraries tell of themselves when they are used as they come
    pytest.mark.filterwarnings("ignore:HeuristicalStorageReservation is known:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def multi_hot(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("multi-hot") / "data"
    store_multi_hot(MultiHotConfig(data=prepared, out=out, sizes=(2,) * 26, distribution="uniform"))
    return out


def ours(config: TrainConfig, world: World) -> tuple[list[float], Trainer]:
    """Losses of our trainer's first steps, summed over members."""
    trainer = Trainer(config, world)
    batches = itertools.islice(trainer.loader.stream(), NUM_STEPS)
    return [float(trainer.train_step(batches).losses_M.sum()) for _ in range(NUM_STEPS)], trainer


@pytest.mark.parametrize("data", ["prepared", "multi_hot"])
@pytest.mark.parametrize("name", BASELINES)
def test_the_first_losses_are_those_of_our_trainer(name: str, data: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(data)
    # Rates so small that every optimizer leaves the model where it starts, to well within the tolerance.
    config = small_config(folder, members=("dcnv2*2",), batch_size=64, table_lr=1e-7, dense_lr=1e-7)
    with process_group() as world:
        torch.set_num_threads(1)
        expected, trainer = ours(config, world)
        job = Job(
            specs=config.specs(),
            schema=Schema.load(folder),
            table_lr=config.optimizer.table_lr,
            dense_lr=config.optimizer.dense_lr,
            device=world.device,
        )
        baseline = BASELINES[name](job)
        batches = itertools.islice(trainer.loader.stream(), NUM_STEPS)
        found = [float(baseline.step(batches)) for _ in range(NUM_STEPS)]
    assert found == pytest.approx(expected, abs=1e-5)
    assert len({round(loss, 4) for loss in expected}) == NUM_STEPS


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of so many rows that TorchRec's planner does not replicate them."""
    return make_data(Setting(fields=4, rows_per_table=1000, batch_size=64), tmp_path_factory.mktemp("larger"))


@pytest.mark.parametrize("name", BASELINES)
def test_tables_and_layers_are_trained(name: str, larger: Path) -> None:
    schema, (batch, *_) = Schema.load(larger), itertools.islice(Loader(larger, "train", batch_size=64).epoch(0), 1)
    with process_group() as world:
        torch.set_num_threads(1)
        job = Job(specs=parse_members(("fnn",), 0), schema=schema, table_lr=0.05, dense_lr=0.01, device=world.device)
        baseline = BASELINES[name](job)
        model = baseline.model if isinstance(baseline, TorchRecDefault) else baseline.models[0]  # type: ignore[attr-defined]
        before = {key: _values(weight).clone() for key, weight in model.state_dict().items()}
        batches = itertools.repeat(batch)
        losses = [float(baseline.step(batches)) for _ in range(10)]
        still = {key for key, weight in model.state_dict().items() if torch.equal(before[key], _values(weight))}
    assert losses[-1] < losses[0] - 0.05
    assert not still


def _values(weight: torch.Tensor) -> torch.Tensor:
    """What a table or layer holds; TorchRec's tables are sharded, here on one rank."""
    shards = getattr(weight, "local_shards", None)
    return shards()[0].tensor if callable(shards) else weight
