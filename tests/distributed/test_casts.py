"""A run's predictor casts once what its members read in bf16, after all is loaded, and predicts the same bits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys.distributed import World, process_group
from recsys.training import predict
from recsys.training.predict import Predictor
from recsys.training.trainer import Trainer
from tests.distributed.jobs import on_ranks, small_config

MEMBERS = ("dcnv2", "rankmixer")


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("casts") / "run"
    options = {"precision": "bf16", "ema_decay": 0.9, "num_steps": 10}
    with process_group() as world:
        torch.set_num_threads(1)
        trainer = Trainer(small_config(prepared, out=out, members=MEMBERS, **options), world)
        trainer.train()
        assert {value.dtype for value in dense(trainer.task).values()} == {torch.float32}
    return out


def dense(task: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in task.named_parameters() if ".members." in name}


def _both_ways(world: World, run: Path) -> None:
    cast_once = predict.cast_once
    predict.cast_once = lambda *_: None
    try:
        as_loaded = Predictor(run, world)
    finally:
        predict.cast_once = cast_once
    found = Predictor(run, world)
    loaded, cast = dense(as_loaded.task), dense(found.task)
    assert loaded.keys() == cast.keys()
    # As the averages are, which the run has beside its parameters.
    assert all(torch.equal(cast[name], value.to(cast[name].dtype)) for name, value in loaded.items())
    assert {value.dtype for name, value in cast.items() if "cross" in name and value.dim() > 1} == {torch.bfloat16}
    assert {value.dtype for name, value in cast.items() if "norm" in name} == {torch.float32}
    for one, other in zip(_logits(as_loaded), _logits(found), strict=True):
        np.testing.assert_array_equal(one, other)


def _logits(predictor: Predictor) -> list[np.ndarray]:
    shares = [predictor.share("test")]
    predictor.quantise("int8")
    shares.append(predictor.share("test"))
    return [share.logits_NM.numpy() for share in shares]


def test_a_predictor_says_what_it_would_say_without(run: Path) -> None:
    with process_group() as world:
        torch.set_num_threads(1)
        _both_ways(world, run)


def test_so_do_those_of_two_ranks(run: Path) -> None:
    on_ranks(2, _both_ways, run)
