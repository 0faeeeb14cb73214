"""Members of one make: computed together they train as they do one after another."""

from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.backbones import BACKBONES
from recsys.batched import is_faster_together
from recsys.data.schema import Schema
from recsys.members import ModelConfig, parse_members
from recsys.model import RecModel
from tests.distributed.jobs import small_config, train_here, train_on_ranks

BATCH, LOSS_TOLERANCE, LOGIT_TOLERANCE = 16, 1e-5, 1e-3
SCHEMA = Schema(name="toy", dense=("I1", "I2"), sparse={"a": 5, "b": 7, "c": 9}, labels=("label",))


def fields_of(model: RecModel, requires_grad: bool = True) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(BATCH, 3, owner.config.embedding_dim, requires_grad=requires_grad)
        for owner in model.embedding.owners.values()
    ]


def model_of(*members: str, **changes: object) -> RecModel:
    return RecModel(SCHEMA, parse_members(members, 0, ModelConfig(embedding_dim=8, **changes)))  # type: ignore[arg-type]


def gradients(model: RecModel, on: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    for group in model.members.groups:
        group.on = on
    fields, dense_BN = fields_of(model), torch.randn(BATCH, 2)
    model.zero_grad()
    logits_BM = model.members(fields, dense_BN)
    (logits_BM.float() * torch.linspace(-1, 1, logits_BM.numel()).view_as(logits_BM)).sum().backward()
    found = {f"field {i}": field.grad for i, field in enumerate(fields)}
    found |= {name: parameter.grad for name, parameter in model.members.named_parameters()}
    return logits_BM.detach().float(), {name: grad for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tables", ["private", "shared"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_gives_the_same_logits_and_gradients(backbone: str, tables: str, precision: str) -> None:
    model = model_of("fnn", f"{backbone}*3", tables=tables, precision=precision)
    assert [len(group.indices) for group in model.members.groups] == [4 if backbone == "fnn" else 3]
    (alone, one), (together, other) = gradients(model, False), gradients(model, True)
    tolerance = 1e-5 if precision == "fp32" else 0.1
    torch.testing.assert_close(together, alone, atol=tolerance, rtol=tolerance)
    assert set(one) == set(other)
    # By the norm of all gradients: where bf16 rounds otherwise, a ReLU may open for one element.
    norm = torch.stack([grad.norm() for grad in one.values()]).norm()
    assert torch.stack([(other[name] - grad).norm() for name, grad in one.items()]).norm() <= tolerance * norm
    if precision == "fp32":
        for name in one:
            torch.testing.assert_close(
                other[name], one[name], atol=1e-5 * max(1.0, float(one[name].abs().max())), rtol=0
            )


def test_only_members_of_one_make_are_a_group() -> None:
    model = model_of("dcnv2", "wukong", "dcnv2*2", "wukong:width=2", "wukong:head_hidden=8", "fnn*2:embedding_dim=16")
    assert [group.indices for group in model.members.groups] == [[0, 2, 3], [6, 7]]


@pytest.mark.parametrize("option", ["embedding_dropout=0.2", "dropout=0.2"])
def test_members_with_dropout_are_together_only_where_nothing_is_dropped(option: str) -> None:
    model = model_of(f"dcnv2*2:{option}")
    (group,) = model.members.groups
    group.on = True
    assert not group.active
    model.eval()
    assert group.active


def test_measuring_leaves_no_trace() -> None:
    model = model_of("dcnv2*2:dropout=0.5")
    (group,) = model.members.groups
    fields, dense_BN = fields_of(model), torch.randn(BATCH, 2)
    state = torch.get_rng_state()
    assert is_faster_together(group, model.members, fields, dense_BN) in (True, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert not group.on
    assert model.members.training
    assert all(parameter.grad is None for parameter in [*fields, *model.members.parameters()])


def test_auto_is_off_on_a_cpu() -> None:
    for setting, on in (("auto", False), ("off", False), ("on", True)):
        model = model_of("dcnv2*2", batched=setting)
        model.choose(BATCH, torch.device("cpu"))
        assert [group.on for group in model.members.groups] == [on]


@pytest.mark.parametrize("backbone", ["dcnv2", "wukong", "rankmixer"])
def test_together_they_train_as_one_after_another(prepared: Path, backbone: str) -> None:
    members = (f"{backbone}*3", "fnn")
    one, other = train_here([small_config(prepared, members=members, batched=setting) for setting in ("off", "on")])
    np.testing.assert_allclose(other.losses_SM, one.losses_SM, atol=LOSS_TOLERANCE, rtol=0)
    np.testing.assert_allclose(other.logits_NM, one.logits_NM, atol=LOGIT_TOLERANCE, rtol=0)


def test_together_on_two_ranks_and_with_bf16(prepared: Path, tmp_path: Path) -> None:
    configs = [
        small_config(prepared, members=("dcnv2*2",), batched="on", num_steps=5, **changes)
        for changes in ({}, {"precision": "bf16"})
    ]
    two = train_on_ranks(2, configs, tmp_path)
    one = train_here([small_config(prepared, members=("dcnv2*2",), batched="off", num_steps=5)])[0]
    np.testing.assert_allclose(two[0].losses_SM, one.losses_SM, atol=LOSS_TOLERANCE, rtol=0)
    np.testing.assert_allclose(two[1].losses_SM, one.losses_SM, atol=0.01, rtol=0)
