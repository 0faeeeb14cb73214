"""What predictions read of parameters in bf16 or fp16 alone is kept in it, and no logit changes by a bit."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from recsys.backbones import BACKBONES
from recsys.data.schema import Schema
from recsys.embeddings.precision import AUTOCAST, Precision
from recsys.members import ModelConfig, parse_members
from recsys.model import RecModel
from recsys.training.casts import cast_once

SCHEMA = Schema(name="s", dense=("x", "y"), sparse=dict.fromkeys("abcdef", 9), labels=("label",))
VARIANTS = [
    "autoint:hidden=16-8",
    "dcnv2:rank=4",
    "dcnv2:rank=4,num_experts=2",
    "finalmlp:gate_fields1=0",
    "masknet:structure=serial",
    "rankmixer:num_experts=3",
]
READ_IN_FP32 = {
    "dcn": ("backbone.bias_LK", "backbone.cross.weight"),
    "finalmlp": ("context_D",),
    "masknet": ("norm_weight_FD", "norm_weight_PO"),
    "rankmixer": ("norm.weight",),
    "wukong": ("fm_mlp.0.weight", "norm.weight"),
}
"""Ends of names of what cannot be cast."""


def model(*texts: str, **options: Any) -> RecModel:
    """Members whose biases and gains are not those that they start with."""
    made = RecModel(SCHEMA, parse_members(texts, 0, ModelConfig(embedding_dim=8, **options)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.members.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return made


@torch.no_grad()
def logits(made: RecModel, rows: Sequence[int] = (1, 3, 300)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    made.eval()
    found = []
    for each in rows:
        dims = [owner.config.embedding_dim for owner in made.embedding.owners.values()]
        fields = [torch.randn(each, 6, dim, generator=generator) for dim in dims]
        found.append(made.members(fields, torch.randn(each, 2, generator=generator)))
    return found


class Copies(TorchDispatchMode):
    """Counts those that are made of parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.memory = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].untyped_storage().data_ptr() in self.memory
        return func(*args, **(kwargs or {}))


def copies(made: RecModel) -> int:
    with Copies(made.members) as counter:
        logits(made, [1])
    return counter.count


def dtypes(module: nn.Module) -> set[torch.dtype]:
    """Of all matrices."""
    return {value.dtype for name, value in module.named_parameters() if value.dim() > 1 and "bias" not in name}


@pytest.mark.parametrize("text", [*BACKBONES, *VARIANTS])
@pytest.mark.parametrize("precision", AUTOCAST)
def test_logits_are_equal_to_the_bit(text: str, precision: Precision) -> None:
    made = model(text, precision=precision)
    before = logits(made)
    cast_once(made, SCHEMA)
    for expected, found in zip(before, logits(made), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_is_read_in_fp32_stays_so_and_weights_do_not(backbone: str) -> None:
    made = model(backbone, precision="bf16")
    assert copies(made) > 5
    cast_once(made, SCHEMA)
    parameters = dict(made.members.named_parameters())
    for end in READ_IN_FP32.get(backbone, ()):
        assert {value.dtype for name, value in parameters.items() if name.endswith(end)} == {torch.float32}
    cast = sum(value.numel() for value in parameters.values() if value.dtype is torch.bfloat16)
    assert cast > 0.85 * sum(value.numel() for value in parameters.values())
    if backbone == "dcnv2":
        assert dtypes(made.members) == {torch.bfloat16}
    assert copies(made) == (backbone == "dcn")  # whose cross.weight is read both ways


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_without_autocast_nothing_happens(precision: Precision) -> None:
    made = model("dcnv2", precision=precision)
    before = {name: (id(value), value.data_ptr()) for name, value in made.members.named_parameters()}
    cast_once(made, SCHEMA)
    assert {name: (id(value), value.data_ptr()) for name, value in made.members.named_parameters()} == before
    assert dtypes(made.members) == {torch.float32}


@pytest.mark.parametrize(("tables", "options"), [("private", "embedding_dim=4"), ("shared", "width=2")])
def test_members_of_several_makes_are_all_cast(tables: str, options: str) -> None:
    made = model("dcnv2", "fnn*2", f"dcnv2:name=other,{options}", precision="bf16", tables=tables)
    before = logits(made)
    cast_once(made, SCHEMA)
    assert dtypes(made.members) == {torch.bfloat16}
    assert all(torch.equal(*pair) for pair in zip(logits(made), before, strict=True))


def test_members_that_are_computed_together_stay_as_they_are() -> None:
    made = model("wukong", "fnn*2", precision="bf16")
    (group,) = made.members.groups
    group.on = True
    before = logits(made)
    cast_once(made, SCHEMA)
    alone, *stacked = made.members.by_name.values()
    assert torch.bfloat16 in dtypes(alone)
    assert {value.dtype for each in stacked for value in each.parameters()} == {torch.float32}
    assert all(torch.equal(*pair) for pair in zip(logits(made), before, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_that_it_had_and_no_stream_is_drawn_from(training: bool) -> None:
    made = model("dcnv2:dropout=0.5", precision="bf16", embedding_dropout=0.5).train(training)
    state = torch.get_rng_state()
    cast_once(made, SCHEMA)
    assert {part.training for part in made.members.modules()} == {training}
    assert torch.equal(torch.get_rng_state(), state)
    assert dtypes(made.members) == {torch.bfloat16}


class Reads(nn.Module):
    """Reads parameters in ways that no backbone does."""

    def __init__(self) -> None:
        super().__init__()
        matrices = [nn.Parameter(torch.randn(8, 8)) for _ in range(5)]
        self.view, self.column, self.both, self.late, self.wider = matrices
        self.tied, self.unread = self.late, nn.Parameter(torch.randn(8))

    def forward(self, x_BFD: Tensor, dense_BN: Tensor) -> Tensor:
        y_B8 = x_BFD[:, 0] @ self.view.t().unflatten(0, (2, 4)).flatten(0, 1) @ self.both
        y_B1 = x_BFD[:, 0] @ self.column[:, :1]
        wide_B8 = y_B8.float() * self.both.view(64)[:8] + y_B8.double() @ self.wider.double()
        late_B8 = (x_BFD[:, 1] @ self.late).float() + self.tied.t()[0]
        return (wide_B8 + late_B8 + y_B1).sum(dim=1)


def test_views_are_followed_and_parts_copies_in_other_dtypes_and_second_uses_are_not_cast() -> None:
    made = model("fnn", precision="bf16")
    read = Reads()
    made.members.by_name["fnn"] = read
    before = logits(made)
    cast_once(made, SCHEMA)
    assert {name for name, value in read.named_parameters() if value.dtype is torch.bfloat16} == {"view"}
    assert all(torch.equal(*pair) for pair in zip(logits(made), before, strict=True))
