"""Sharded jobs: compressed communication, plans that are out of date, other plans after a resume, what a CPU lacks."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torchrec.distributed import comm_ops

from recsys.config import InputError
from recsys.data.schema import Schema
from recsys.distributed import World, process_group
from recsys.sharding.config import ShardingConfig
from recsys.sharding.plan import Plan
from recsys.training.config import TrainConfig
from recsys.training.trainer import Trainer
from tests.distributed.jobs import Outcome, cli_on_ranks, on_ranks, small_config, train
from tests.sharding.plans import hand_plan

pytestmark = pytest.mark.slow

# Forward and backward, how far losses of 10 steps may be from those in fp32, and what goes over the wire.
COMMS: dict[str, tuple[dict[str, str], float, set[torch.dtype]]] = {
    "fp32": ({}, 0.0, {torch.float32}),
    "fp16": ({"comms": "fp16", "gradient_comms": "fp16"}, 1e-3, {torch.float16}),
    "bf16": ({"comms": "bf16", "gradient_comms": "bf16"}, 5e-3, {torch.bfloat16}),
    "int8": ({"comms": "int8", "gradient_comms": "int8"}, 3e-2, {torch.uint8}),
    "int8 there, bf16 back": ({"comms": "int8", "gradient_comms": "bf16"}, 3e-2, {torch.uint8, torch.bfloat16}),
    "fp16 there alone": ({"comms": "fp16"}, 1e-3, {torch.float16, torch.float32}),
}
TYPES = ("table_wise", "row_wise")
COLLECTIVES = ("all_to_all_single", "reduce_scatter", "reduce_scatter_tensor", "all_gather", "all_gather_into_tensor")
"""That pooled embeddings and their gradients go through: exchanged, or summed on the way and spread on the way back."""


@dataclasses.dataclass
class Sent:
    """What a job of rank 0 gave to collectives that carry pooled embeddings: types, and bytes in all."""

    dtypes: set[torch.dtype]
    num_bytes: int


def _two_ranks(world: World, configs: dict[str, TrainConfig], half: TrainConfig, path: Path) -> None:
    found = {name: _watched(config, world) for name, config in configs.items()}
    Trainer(half, world).train()
    if world.is_first:
        torch.save(found, path)


def _watched(config: TrainConfig, world: World) -> tuple[Outcome | None, Sent]:
    sent = Sent(set(), 0)
    real = {name: getattr(dist, name) for name in COLLECTIVES}

    def note(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            given: Any = named.get("input", named.get("input_list", arguments[1] if len(arguments) > 1 else None))
            for tensor in given if isinstance(given, list) else [given]:
                if tensor.dtype not in (torch.int32, torch.int64):  # ids and how many there are
                    sent.dtypes.add(tensor.dtype)
                    sent.num_bytes += tensor.numel() * tensor.element_size()
            return real[name](*arguments, **named)

        return call

    for name in real:
        setattr(comm_ops.dist, name, note(name))
    try:
        return train(config, world), sent
    finally:
        for name, function in real.items():
            setattr(comm_ops.dist, name, function)


@pytest.fixture(scope="module")
def halves(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, TrainConfig]:
    """A run of 20 steps, and the same stopped after 10."""
    whole = small_config(
        prepared, out=tmp_path_factory.mktemp("run") / "whole", members=("dcnv2",), log_every=1, sharding="row_wise"
    )
    sharding = ShardingConfig(types=("table_wise",))
    shorter = dataclasses.replace(whole.train, num_steps=10)
    return whole, dataclasses.replace(whole, out=whole.out.with_name("half"), train=shorter, sharding=sharding)


@pytest.fixture(scope="module")
def two_ranks(
    prepared: Path, halves: tuple[TrainConfig, TrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Outcome, Sent]]:
    """Every kind of communication under every type, on two ranks, after which they train the first half."""
    configs = {
        f"{kind}, {name}": small_config(prepared, members=("dcnv2",), num_steps=10, sharding=kind, **comms)
        for kind in TYPES
        for name, (comms, *_) in COMMS.items()
    }
    path = tmp_path_factory.mktemp("comms") / "found.pt"
    on_ranks(2, _two_ranks, configs, halves[1], path)
    found: dict[str, tuple[Outcome, Sent]] = torch.load(path, weights_only=False)
    return found


@pytest.mark.parametrize("name", [name for name in COMMS if name != "fp32"])
@pytest.mark.parametrize("kind", TYPES)
def test_compressed_communication_is_compressed_and_close(
    kind: str, name: str, two_ranks: dict[str, tuple[Outcome, Sent]]
) -> None:
    (plain, all_bytes), (outcome, sent) = two_ranks[f"{kind}, fp32"], two_ranks[f"{kind}, {name}"]
    comms, bound, dtypes = COMMS[name]
    if kind == "row_wise" and "int8" in comms.values():
        # Sums on the way, which TorchRec has no int8 for: all goes as it is.
        assert sent == all_bytes
        np.testing.assert_allclose(outcome.losses_SM, plain.losses_SM, atol=1e-6, rtol=0)
        return
    assert sent.dtypes == dtypes
    assert sent.num_bytes < 0.8 * all_bytes.num_bytes
    difference = abs(outcome.losses_SM - plain.losses_SM).max()
    assert 0 < difference < bound


def test_uncompressed_communication_is_fp32(two_ranks: dict[str, tuple[Outcome, Sent]]) -> None:
    for kind in TYPES:
        assert two_ranks[f"{kind}, fp32"][1].dtypes == {torch.float32}


def test_a_run_goes_on_under_another_plan_on_fewer_ranks(
    halves: tuple[TrainConfig, TrainConfig], two_ranks: dict[str, tuple[Outcome, Sent]]
) -> None:
    whole, half = halves
    with process_group() as world:
        Trainer(whole, world).train()
        resumed = Trainer(dataclasses.replace(whole, out=half.out, resume="auto"), world)
        resumed.train()
        # Copies of tables are averaged by the trainer's count of steps, not by the pipeline's of batches.
        assert resumed.one_step._pipeline._dmp_collection_sync_interval_batches is None
    losses = [
        [json.loads(line)["loss"]["dcnv2"] for line in lines if '"kind": "train"' in line]
        for lines in ((config.out / "metrics.jsonl").read_text().splitlines() for config in (whole, half))
    ]
    assert len(losses[0]) == len(losses[1]) == 20
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5, rtol=0)
    plans = [
        Plan.load(path) for path in (half.out / "checkpoints" / "step-00000010" / "plan.json", half.out / "plan.json")
    ]
    assert [(plan.world_size, plan.tables["dcnv2/C1"].sharding_type) for plan in plans] == [
        (2, "table_wise"),
        (1, "row_wise"),
    ]


def test_plans_that_are_out_of_date_end_every_rank_with_one_line(prepared: Path, tmp_path: Path) -> None:
    sparse = Schema.load(prepared).sparse
    shapes = {f"dcnv2/{feature}": (rows, 16) for feature, rows in sparse.items()}
    plans = {
        "ranks": hand_plan(shapes, "table_wise", 1, 4),
        "schema": hand_plan({**shapes, "dcnv2/C1": (7, 16)}, "table_wise", 1, 2),
        "foreign": hand_plan({**shapes, "dcnv2/C27": (7, 16)}, "table_wise", 1, 2),
        "missing": hand_plan({name: shape for name, shape in shapes.items() if name != "dcnv2/C5"}, "table_wise", 1, 2),
        "split": hand_plan(shapes, "column_wise", 1, 2),
    }
    for name, plan in plans.items():
        plan.save(tmp_path / f"{name}.json")
    (tmp_path / "torn.json").write_text(plans["split"].dumps()[:-10])
    rest = ["--members", "dcnv2", "--train.num-steps", "1", "--train.batch-size", "64", "--out", str(tmp_path / "run")]
    begin = ["train", "synthetic", "--data", str(prepared), *rest]
    attempts = {name: ["--sharding.plan", str(tmp_path / f"{name}.json")] for name in (*plans, "torn")}
    attempts |= {
        "replicas": ["--sharding.replicas", "2"],
        "uvm": ["--sharding.kernels", "fused_uvm"],
        "uvm, as if there were a GPU": ["--sharding.kernels", "fused_uvm", "--sharding.hardware", "h100"],
        "key_value": ["--sharding.constraints", "dcnv2/C3=:key_value"],
    }
    told = cli_on_ranks(2, [[*begin, *attempt] for attempt in attempts.values()], tmp_path)
    messages = {
        "ranks": "planned for 4 ranks, the job has 2; plan again for 2",
        "schema": "table dcnv2/C1 has 7 rows of 16 columns in the plan and",
        "foreign": "table dcnv2/C27 is none of the model's; did you mean dcnv2/C",
        "missing": "the model's table dcnv2/C5 is not in the plan; plan again",
        "split": "column_wise would give each column shard an accumulator of its own under row-wise Adagrad",
        "torn": "torn.json: not a plan in JSON",
        "replicas": "TorchRec's 2-D parallelism (DMPCollection) needs CUDA devices; leave it at 1 here",
        "uvm": "the kernel fused_uvm keeps tables in host memory behind an accelerator, and cpu has none; use fused",
        "uvm, as if there were a GPU": "is planned under the kernel fused_uvm, which needs CUDA devices; use",
        "key_value": "the kernel key_value keeps tables on an SSD, and cpu has none; use fused",
    }
    for (name, message), ranks in zip(messages.items(), told, strict=True):
        assert [status for status, _ in ranks] == [2, 2], name
        lines = [line for _, text in ranks for line in text.splitlines() if "arn" not in line]
        assert len(lines) == 1, lines
        assert lines[0].startswith("recsys: ")
        assert message in lines[0]
    assert not (tmp_path / "run").exists()


def test_more_copies_than_one_need_cuda_devices(prepared: Path) -> None:
    with process_group() as world, pytest.raises(InputError, match="leave it at 1 here"):
        Trainer(small_config(prepared, members=("dcnv2",), replicas=2), world)
