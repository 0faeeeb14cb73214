"""On a CUDA device: tables in fp16 and bf16, rounded to the nearest value or stochastically, and quantised tables."""

from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.distributed import process_group
from recsys.embeddings.bounds import IdBounds
from recsys.training.predict import Predictor
from recsys.training.trainer import Trainer
from tests.distributed.jobs import small_config, train_here

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_tables_of_16_bits_train_close_to_fp32(prepared: Path, dtype: str, stochastic: bool) -> None:
    one, other = train_here(
        [
            small_config(prepared, members=("dcnv2",)),
            small_config(prepared, members=("dcnv2",), table_dtype=dtype, stochastic_rounding=stochastic),
        ]
    )
    assert 0 < abs(one.losses_SM - other.losses_SM).max() < 2e-2


def test_small_updates_are_lost_to_the_nearest_value_and_not_to_stochastic_rounding(prepared: Path) -> None:
    moved = []
    with process_group() as world:
        for stochastic in (False, True):
            config = small_config(
                prepared, members=("dcnv2",), table_dtype="bf16", stochastic_rounding=stochastic, table_lr=1e-5
            )
            trainer = Trainer(config, world)
            before = tables_of(trainer)
            batches = trainer.loader.stream()
            for _ in range(5):
                trainer.train_step(batches)
            # From .05 on, neighbours are 2.4e-4 apart, and no update of row-wise Adagrad is above lr * sqrt(8).
            large = before.abs() > 0.05
            moved.append(float((tables_of(trainer) != before)[large].float().mean()))
    assert moved[0] == 0 < moved[1] < 0.5


def tables_of(trainer: Trainer) -> torch.Tensor:
    state = trainer.task.state_dict()
    weights = [state[key].local_shards()[0].tensor.flatten() for key in sorted(state) if "embedding_bags" in key]
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    return torch.cat(weights).clone()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4", "int2"])
def test_quantised_tables_predict_as_on_a_cpu(prepared: Path, tmp_path: Path, dtype: str) -> None:
    members = ("dcnv2", "wukong:embedding_dim=12", "fnn:table_dtype=bf16")
    found = []
    with process_group() as world:
        Trainer(small_config(prepared, out=tmp_path / "run", members=members, num_steps=5), world).train()
        for device in (world.device, torch.device("cpu")):
            predictor = Predictor(tmp_path / "run", type(world)(0, 1, 0, 1, device))
            predictor.quantise(dtype)
            predictions = predictor.predict("valid")
            assert predictions is not None
            found.append(predictions.logits_NM)
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_ids_are_looked_at_when_asked_for(prepared: Path) -> None:
    with process_group() as world:
        trainer = Trainer(small_config(prepared, members=("dcnv2",)), world)
        batch = next(trainer.loader.epoch(0)).to(world.device)
    bounds = IdBounds(dict.fromkeys(trainer.schema.sparse, 1))
    bounds(batch.sparse)
    bounds.when = "always"
    with pytest.raises(ValueError, match="feature C1, row "):
        bounds(batch.sparse)
