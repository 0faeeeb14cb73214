"""What comes between gradients and optimizers, and around a step: on one rank."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn

from recsys.config import InputError
from recsys.data.batch import Batch
from recsys.distributed import World, process_group
from recsys.model import EmbeddingGradients, Members
from recsys.sharding import torchrec
from recsys.training.ema import Ema
from recsys.training.guard import MEMORY, GuardConfig
from recsys.training.phases import PHASES
from recsys.training.scaler import FIRST_SCALE
from recsys.training.trainer import Trainer
from tests.distributed.jobs import small_config, train_here

NUM_STEPS = 8
pytestmark = pytest.mark.filterwarnings("ignore:fbgemm..dense_embedding_codegen_lookup_function")


@pytest.fixture
def world() -> Iterator[World]:
    with process_group() as own:
        yield own


def trainer_of(data: Path, world: World, **changes: Any) -> Trainer:
    return Trainer(small_config(data, members=("dcnv2",), **{"num_steps": NUM_STEPS, **changes}), world)


def losses(trainer: Trainer, batches: Iterator[Batch] | None = None) -> list[float]:
    batches = batches or trainer.loader.stream()
    return [float(trainer.train_step(batches).losses_M) for _ in range(trainer.num_steps)]


def with_weights(batches: Iterator[Batch], weights: dict[int, float]) -> Iterator[Batch]:
    """Multiply the weights of some batches."""
    for index, batch in enumerate(batches):
        changed = copy.copy(batch)
        changed.weights = batch.weights * weights.get(index, 1.0)
        yield changed


@pytest.fixture(scope="module")
def plain(prepared: Path) -> list[float]:
    with process_group() as world:
        return losses(trainer_of(prepared, world))


@pytest.mark.parametrize(("members", "batched"), [(("dcnv2", "wukong"), "off"), (("dcnv2*2",), "on")])
def test_a_batch_in_parts_trains_as_a_whole_one(prepared: Path, members: tuple[str, ...], batched: str) -> None:
    whole, parts = train_here(
        [
            small_config(prepared, members=members, num_steps=NUM_STEPS, batched=batched, accumulate=accumulate)
            for accumulate in (1, 5)
        ]
    )
    np.testing.assert_allclose(parts.losses_SM, whole.losses_SM, atol=1e-5, rtol=0)
    np.testing.assert_allclose(parts.logits_NM, whole.logits_NM, atol=1e-4, rtol=0)


def test_a_batch_in_parts_has_the_gradients_of_what_it_drew(prepared: Path, world: World) -> None:
    trainer = trainer_of(prepared, world, accumulate=3, embedding_dropout=0.5)
    members = next(module for module in trainer.task.modules() if isinstance(module, Members))
    (member,) = members
    x_BFD, dense_BN = torch.randn(9, 26, 8, requires_grad=True), torch.randn(9, 13)
    rows: list[int] = []
    member.backbone.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    member.reseed(0, 0)
    members([x_BFD], dense_BN).sum().backward()
    assert rows == [3] * 6, "each part once, and once more for the backward pass"
    assert x_BFD.grad is not None
    dropped = x_BFD.grad.eq(0)
    assert 0.4 < dropped.float().mean() < 0.6
    assert not torch.equal(dropped[:3], dropped[3:6]), "parts draw masks of their own"
    member.reseed(0, 0)
    before = members([x_BFD], dense_BN)
    member.reseed(0, 0)
    moved = x_BFD.detach() + torch.where(dropped, 5.0, 0.0)
    torch.testing.assert_close(members([moved], dense_BN), before)  # what got no gradient was dropped


def test_gradients_of_embeddings_are_cut_and_scaled_down() -> None:
    gradients = EmbeddingGradients()
    x_BFD = torch.zeros(2, 2, 2, requires_grad=True)
    assert gradients(x_BFD) is x_BFD
    gradients.limit, gradients.scale = 1.5, torch.tensor([4.0])
    grad = torch.tensor([[[4.0, -8.0], [math.inf, 4.0]], [[2.0, math.nan], [0.0, 8.0]]])
    gradients(x_BFD).backward(grad)
    assert x_BFD.grad is not None
    assert x_BFD.grad.tolist() == [[[1.0, -1.5], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.5]]]


@pytest.mark.parametrize("kernel", ["fused", "dense"])
def test_tables_are_clipped_as_fbgemm_does(
    kernel: str, prepared: Path, world: World, plain: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, changes = 1e-4, {"table_lr": 0.5, "table_optimizer": "sgd"}
    free = losses(trainer_of(prepared, world, **changes))
    clipped = losses(trainer_of(prepared, world, clip_table_values=limit, kernels=(kernel,), **changes))
    assert abs(np.subtract(free, clipped)).max() > 1e-4

    params = torchrec.TableOptimizer.fused_params.fget  # type: ignore[attr-defined]
    clipping = {"gradient_clipping": True, "max_gradient": limit}
    monkeypatch.setattr(torchrec.TableOptimizer, "fused_params", property(lambda own: params(own) | clipping))
    assert torchrec.TableOptimizer(kind="sgd", lr=1.0, eps=1.0).fused_params["optimizer"] == EmbOptimType.EXACT_SGD
    by_fbgemm = losses(trainer_of(prepared, world, **changes))
    np.testing.assert_allclose(clipped, by_fbgemm, atol=1e-6, rtol=0)


def test_the_rest_is_clipped_by_its_norm(prepared: Path, world: World) -> None:
    trainer = trainer_of(prepared, world, clip_norm=0.01, dense="sgd", momentum=0.0, dense_lr=1.0)
    params = trainer.optimizer.dense
    before = {name: param.detach().clone() for name, param in params.items()}
    trainer.train_step(trainer.loader.stream())
    moved = torch.cat([(param.detach() - before[name]).flatten() for name, param in params.items()])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_averages_follow_their_formula_and_are_swapped_in() -> None:
    param = nn.Parameter(torch.tensor([1.0]))
    ema = Ema({"a": param}, 0.75)
    for value in (2.0, 3.0):
        param.data.fill_(value)
        ema.update()
    assert ema.state()["a"].item() == pytest.approx(0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 3)
    with ema.swapped():
        assert param.item() == pytest.approx(1.6875)
    assert param.item() == 3.0
    other = Ema({"a": param}, 0.75)
    other.load_state(ema.state())
    other.apply()
    assert param.item() == pytest.approx(1.6875)


def test_a_step_keeps_averages_of_what_is_no_table(prepared: Path, world: World, plain: list[float]) -> None:
    trainer = trainer_of(prepared, world, ema_decay=0.9)
    before = {name: param.detach().clone() for name, param in trainer.optimizer.dense.items()}
    batches = trainer.loader.stream()
    trainer.train_step(batches)
    for name, param in trainer.optimizer.dense.items():
        torch.testing.assert_close(trainer.one_step.state()[f"ema.{name}"], 0.9 * before[name] + 0.1 * param.detach())
    assert not any("embedding_bags" in name for name in before)
    with trainer.one_step.swapped():
        pass
    rest = [float(trainer.train_step(batches).losses_M) for _ in range(NUM_STEPS - 1)]
    assert rest == plain[1:], "it changes nothing of what is trained"


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.02), ("fp16", 2e-3)])
def test_half_precision_trains_close_to_fp32(precision: str, bound: float, prepared: Path, plain: list[float]) -> None:
    (outcome,) = train_here([small_config(prepared, members=("dcnv2",), num_steps=NUM_STEPS, precision=precision)])
    difference = abs(outcome.losses_SM[:, 0] - plain).max()
    assert 0 < difference < bound


def test_fp16_skips_a_step_that_overflows_and_scales_down(prepared: Path, world: World, plain: list[float]) -> None:
    trainer = trainer_of(prepared, world, precision="fp16", clip_norm=1e9, ema_decay=0.5)
    scaler = trainer.one_step.scaler
    assert scaler is not None
    assert scaler.scale.item() == FIRST_SCALE
    scaler.scale.fill_(2.0**40)
    before = {name: param.detach().clone() for name, param in trainer.optimizer.dense.items()}
    batches = trainer.loader.stream()
    trainer.train_step(batches)
    assert scaler.scale.item() == 2.0**39
    assert all(torch.equal(param, before[name]) for name, param in trainer.optimizer.dense.items())
    assert all(bool(weight.isfinite().all()) for weight in trainer.task.parameters())
    scaler.scale.fill_(128.0)
    trainer.train_step(batches)
    assert not all(torch.equal(param, before[name]) for name, param in trainer.optimizer.dense.items())
    state = {name: value.clone() for name, value in trainer.one_step.state().items()}
    assert state["scaler.good_steps"].item() == 1
    other = trainer_of(prepared, world, precision="fp16", clip_norm=1e9, ema_decay=0.5)
    other.one_step.load_state(state)
    assert all(torch.equal(value, state[name]) for name, value in other.one_step.state().items())


def test_a_cpu_has_no_tf32(prepared: Path, world: World) -> None:
    with pytest.raises(InputError, match=r"--model.precision tf32: a CPU has none; use fp32 or bf16"):
        trainer_of(prepared, world, precision="tf32")


@pytest.mark.parametrize("name", ["prefetch", "semi_sync", "fused_sparse_dist"])
def test_pipelines_of_gpus_are_refused_on_a_cpu(name: str, prepared: Path, world: World) -> None:
    with pytest.raises(InputError, match=f"--train.pipeline {name} needs CUDA devices; use sparse_dist here"):
        trainer_of(prepared, world, pipeline=name)


def test_pipelines_that_send_ids_need_tables(prepared: Path, world: World) -> None:
    robe = {"embeddings": "robe", "compression": 4.0}
    with pytest.raises(InputError, match=r"--train.pipeline sparse_dist: no embedding is sharded"):
        trainer_of(prepared, world, pipeline="sparse_dist", **robe)
    assert len(losses(trainer_of(prepared, world, **robe))) == NUM_STEPS


@pytest.mark.parametrize("name", ["base", "sparse_dist"])
def test_pipelines_give_the_same_and_tell_phases_apart(
    name: str, prepared: Path, world: World, plain: list[float]
) -> None:
    trainer = trainer_of(prepared, world, pipeline=name)
    phases = trainer.one_step.phases
    phases.take()
    assert losses(trainer) == plain
    seconds = phases.take()
    expected = set(PHASES) if name == "sparse_dist" else set(PHASES) - {"input_dist"}
    assert set(seconds) == expected | {"other"}
    assert min(seconds[phase] for phase in expected) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what torch.compile tells its developers
def test_compiled_backbones_train_alike_under_the_same_names(prepared: Path, world: World, plain: list[float]) -> None:
    trainer, usual = trainer_of(prepared, world, compile=True), trainer_of(prepared, world)
    assert list(trainer.task.state_dict()) == list(usual.task.state_dict())
    (member,) = trainer.members
    assert member.backbone._compiled_call_impl is not None
    np.testing.assert_allclose(losses(trainer), plain, atol=1e-5, rtol=0)


def test_deterministic_runs_are_alike_bit_for_bit(prepared: Path, world: World) -> None:
    try:
        runs = []
        for _ in range(2):
            trainer = trainer_of(prepared, world, deterministic=True, table_optimizer="adam")
            assert torch.are_deterministic_algorithms_enabled()
            runs.append((losses(trainer), {name: weight.clone() for name, weight in _weights(trainer).items()}))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    (one, weights), (other, same) = runs
    assert one == other
    assert all(torch.equal(weight, same[name]) for name, weight in weights.items())


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: param.detach().as_subclass(Tensor) for name, param in trainer.task.named_parameters()}


def spiky(prepared: Path, world: World, tmp_path: Path, **settings: Any) -> Trainer:
    guard = GuardConfig(**{"spike_factor": 3.0, "spike_warmup": 3, **settings})
    return trainer_of(prepared, world, guard=guard, out=tmp_path)


def test_a_spike_is_left_out_once_the_mean_is_known(prepared: Path, world: World, tmp_path: Path) -> None:
    trainer = spiky(prepared, world, tmp_path, action="skip")
    found = losses(trainer, with_weights(trainer.loader.stream(), {1: 10.0, 4: 10.0, 6: 50.0}))
    guard = trainer.one_step.guard
    assert int(guard.skipped) == 1, "the first comes too early, and the second is not 3 times a mean that knows it"
    assert [path.name for path in (tmp_path / "bad_batches").iterdir()] == ["step-00000006-rank-0.pt"]
    mean = 0.0
    for step, loss in enumerate(found):
        if step != 6:
            mean += max(1 / (step + 1), 1 - MEMORY) * (loss - mean)
    assert guard.state()["means"].item() == pytest.approx(mean)
    guard.check()


def test_a_spike_stops_a_run_when_it_is_asked(prepared: Path, world: World, tmp_path: Path) -> None:
    trainer = spiky(prepared, world, tmp_path)
    found = losses(trainer, with_weights(trainer.loader.stream(), {5: 100.0}))
    assert len(found) == NUM_STEPS
    told = r"the loss of member dcnv2 is \d+\.?\d*, \d+\.\d times its running mean at step 5; lower --optimizer"
    with pytest.raises(InputError, match=told):
        trainer.one_step.guard.check()


def test_batches_are_not_left_out_without_end(prepared: Path, world: World, tmp_path: Path) -> None:
    trainer = spiky(prepared, world, tmp_path, action="skip", max_in_a_row=2, max_saved=1)
    broken = with_weights(trainer.loader.stream(), dict.fromkeys(range(2, 9), math.nan))
    with pytest.raises(InputError, match=r"is nan at step 4; lower .* \(3 batches in a row\)"):
        losses(trainer, broken)
    assert len(list((tmp_path / "bad_batches").iterdir())) == 1


def test_bad_batches_with_good_ones_between_are_not_in_a_row(prepared: Path, world: World, tmp_path: Path) -> None:
    trainer = spiky(prepared, world, tmp_path, action="skip", max_in_a_row=1)
    losses(trainer, with_weights(trainer.loader.stream(), dict.fromkeys((1, 3, 5), math.nan)))
    assert int(trainer.one_step.guard.skipped) == 3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_batch_that_is_left_out_changes_nothing(precision: str, prepared: Path, world: World, tmp_path: Path) -> None:
    changes = {"guard": GuardConfig(action="skip"), "out": tmp_path, "ema_decay": 0.5, "clip_norm": 1.0}
    trainer = trainer_of(prepared, world, precision=precision, table_optimizer="adam", **changes)

    def everything() -> dict[str, Tensor]:
        optimizers = trainer.optimizer.combined.state_dict()["state"]
        found = {f"{name} {key}": value for name, values in optimizers.items() for key, value in values.items()}
        found = {key: value.local_shards()[0].tensor if "tables" in key else value for key, value in found.items()}
        found |= _weights(trainer) | trainer.one_step.state()
        return {name: value.clone() for name, value in found.items()}

    batches = with_weights(trainer.loader.stream(), {2: math.nan})
    for _ in range(2):
        trainer.train_step(batches)
    before = everything()
    trainer.train_step(batches)
    after = everything()
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == ["guard.skipped"]
    trainer.train_step(batches)
    assert sum(not torch.equal(value, before[name]) for name, value in everything().items()) > 50


def test_what_the_guard_knows_is_saved(prepared: Path, world: World, tmp_path: Path) -> None:
    trainer = spiky(prepared, world, tmp_path, action="back_off", back_off_steps=4, back_off_factor=0.25)
    batches = with_weights(trainer.loader.stream(), {4: 50.0})
    for _ in range(6):
        trainer.train_step(batches)
    other = spiky(prepared, world, tmp_path, action="back_off", back_off_steps=4, back_off_factor=0.25)
    other.one_step.load_state({name: value.clone() for name, value in trainer.one_step.state().items()})
    assert int(other.one_step.guard.skipped) == 1
    for step, factor in ((5, 0.25), (8, 0.25), (9, 1.0)):
        other.one_step.guard.begin(step)
        assert other.optimizer.factor == factor


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spike_factor": 1.0}, "spike_factor 1.0 must be above 1"),
        ({"back_off_factor": 2.0}, "back_off_factor 2.0 must lie"),
        ({"max_in_a_row": 0}, "max_in_a_row 0 must be at least 1"),
        ({"max_saved": -1}, "max_saved -1 must be at least 0"),
    ],
)
def test_settings_of_a_guard_that_cannot_be_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuardConfig(**settings)


def test_a_guard_that_leaves_out_batches_is_not_for_semi_sync(prepared: Path, world: World) -> None:
    with pytest.raises(InputError, match=r"--guard.action skip: semi_sync"):
        trainer_of(prepared, world, pipeline="semi_sync", guard=GuardConfig(action="skip"))


def test_compiled_members_are_computed_one_by_one(prepared: Path) -> None:
    with pytest.raises(ValueError, match="batched on cannot be compiled"):
        small_config(prepared, batched="on", compile=True)


def test_tables_that_no_kernel_here_can_train_are_named(prepared: Path, world: World) -> None:
    with pytest.raises(InputError, match=r"table dcnv2/C1 is fp16 under the kernel dense, .* --model.table-dtype fp32"):
        trainer_of(prepared, world, table_dtype="fp16", table_optimizer="adam")
    with pytest.raises(InputError, match=r"planned under the kernel fused, and FBGEMM has no fused lamb on a CPU"):
        trainer_of(prepared, world, hardware="h100", table_optimizer="lamb")
