"""Every backbone keeps one contract, and computes its paper's formula: one file in references/ for each of them."""

import dataclasses
import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import recsys.backbones
from recsys.backbones import BACKBONES
from recsys.backbones.base import Backbone
from tests.backbones.references import Case, D, F

B = 7

REFERENCES: dict[str, ModuleType] = {
    name: importlib.import_module(f"tests.backbones.references.{name}") for name in BACKBONES
}
CASES: dict[str, tuple[str, Case]] = {
    case: (name, made) for name, reference in REFERENCES.items() for case, made in reference.CASES.items()
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    # Tensors this small gain nothing from threads, and on busy cores threads that wait for each other cost tenfold.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


every_case = pytest.mark.parametrize("case", CASES)


def build(case: str, seed: int = 0, num_fields: int = F, dim: int = D, **changes: Any) -> Backbone:
    name, made = CASES[case]
    torch.manual_seed(seed)
    return BACKBONES[name](num_fields, dim, dataclasses.replace(made.config, **changes))


def rows(batch: int = B, seed: int = 1) -> Tensor:
    return torch.randn(batch, F, D, generator=torch.Generator().manual_seed(seed))


# The contract


def test_every_file_is_registered_and_has_a_case() -> None:
    folder = Path(recsys.backbones.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "base", "cross", "fused", "layers", "tokens"}
    assert files == set(BACKBONES)
    references = {path.stem for path in Path(__file__).parent.joinpath("references").glob("*.py")} - {"__init__"}
    assert references == set(BACKBONES)
    assert {name for name, _ in CASES.values()} == set(BACKBONES)
    assert len(CASES) == sum(len(reference.CASES) for reference in REFERENCES.values())


@pytest.mark.parametrize("name", BACKBONES)
def test_registered_under_the_papers_name(name: str) -> None:
    kind = BACKBONES[name]
    assert kind.__name__.lower() == name.replace("_", "")
    assert kind.__module__ == f"recsys.backbones.{name}"
    # The default config works, and is the class's own.
    config = vars(kind)["Config"]()
    assert type(config).__name__ == f"{kind.__name__}Config"
    assert kind(F, D)(rows()).shape == kind(F, D, config)(rows()).shape


@every_case
def test_shape(case: str) -> None:
    backbone = build(case)
    assert backbone.out_dim == CASES[case][1].out_dim
    for batch in (0, 1, B):
        h_BO = backbone(rows(batch))
        assert h_BO.shape == (batch, backbone.out_dim)
        assert h_BO.dtype == torch.float32


@every_case
def test_every_parameter_gets_a_gradient(case: str) -> None:
    backbone = build(case)
    h_BO = backbone(rows())
    # Random weights: a plain sum after a layer norm has no gradient.
    weights_BO = torch.randn(h_BO.shape, generator=torch.Generator().manual_seed(2))
    torch.autograd.backward((h_BO * weights_BO).sum())
    assert [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_case
@pytest.mark.parametrize("train", [True, False])
def test_rows_are_independent(case: str, train: bool) -> None:
    backbone = build(case).train(train)
    x_BFD, changed_BFD = rows(), rows()
    changed_BFD[3] = 5.0 * torch.randn(F, D, generator=torch.Generator().manual_seed(3))
    h_BO, changed_BO = backbone(x_BFD), backbone(changed_BFD)
    others = torch.arange(B) != 3
    assert_close(changed_BO[others], h_BO[others], rtol=0, atol=1e-6)
    assert (changed_BO[3] - h_BO[3]).abs().max() > 1e-2
    # Nor does a row know its place or the size of its batch.
    assert_close(backbone(x_BFD[2:4].flip(0)), h_BO[2:4].flip(0), rtol=1e-5, atol=1e-5)


@every_case
def test_deterministic_in_eval_and_dropout_in_training(case: str) -> None:
    backbone = build(case, dropout=0.5)
    x_BFD = rows()
    assert not torch.equal(backbone(x_BFD), backbone(x_BFD))
    backbone.eval()
    assert torch.equal(backbone(x_BFD), backbone(x_BFD))


@every_case
def test_seed_decides_the_parameters_and_state_dict_carries_them(case: str) -> None:
    x_BFD = rows()
    backbone, twin, other = build(case), build(case), build(case, seed=9)
    assert torch.equal(twin(x_BFD), backbone(x_BFD))
    assert not torch.allclose(other(x_BFD), backbone(x_BFD))
    other.load_state_dict(backbone.state_dict())
    assert torch.equal(other(x_BFD), backbone(x_BFD))


@every_case
def test_bf16_autocast_is_finite_and_near(case: str) -> None:
    backbone = build(case)
    x_BFD = rows()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h_BO = backbone(100.0 * x_BFD)
        near_BO = backbone(x_BFD)
    torch.autograd.backward(h_BO.float().square().mean())
    assert h_BO.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())
    assert_close(near_BO.float(), backbone(x_BFD), rtol=0.1, atol=0.1)


@every_case
def test_export_with_a_dynamic_batch(case: str) -> None:
    backbone = build(case, dropout=0.5).eval()
    exported = torch.export.export(backbone, (rows(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (1, 2, 19):
        assert_close(exported.module()(rows(batch)), backbone(rows(batch)))


@every_case
def test_learns_xor(case: str) -> None:
    # Nothing that is linear in the two fields can: the best it does is a loss of ln 2.
    ids_BF = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    labels_B = torch.tensor([0.0, 1.0, 1.0, 0.0])
    backbone = build(case, num_fields=2, dim=4)
    embeddings = nn.Embedding(4, 4)
    head = nn.Linear(backbone.out_dim, 1)
    parameters = [*backbone.parameters(), *embeddings.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        logits_B = head(backbone(embeddings(ids_BF + torch.tensor([0, 2])))).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits_B, labels_B)
        torch.autograd.backward(loss)
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [(name, *refused) for name, reference in REFERENCES.items() for refused in reference.REFUSED],
)
def test_widths_that_cannot_work(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BACKBONES[name].Config(**changes)


@every_case
def test_flops_are_what_torch_counts(case: str) -> None:
    backbone = build(case)
    with FlopCounterMode(display=False) as counter:
        backbone(rows())
    assert counter.get_total_flops() == B * backbone.flops() > 0


@every_case
@pytest.mark.parametrize("along", ["width", "depth"])
def test_ladder(case: str, along: Any) -> None:
    name, made = CASES[case]
    assert made.config.ladder(1, along) == made.config
    rungs = [BACKBONES[name](F, D, made.config.ladder(k, along)) for k in (1, 2, 4, 8, 16)]
    for below, above in itertools.pairwise(rungs):
        assert below.flops() < above.flops()
        assert below.num_parameters() < above.num_parameters()
    assert rungs[-1].flops() < 32 * rungs[0].flops()
    assert rungs[-1](rows()).isfinite().all()


def randomised(backbone: Backbone) -> Backbone:
    """In float64, with every parameter random: norms and biases too, which start as the identity."""
    torch.manual_seed(4)
    backbone.double()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.uniform_(-0.7, 0.7)
    return backbone


@every_case
@torch.no_grad()
def test_equals_the_papers_formula(case: str) -> None:
    name, made = CASES[case]
    backbone = randomised(build(case))
    x_BFD = rows(2).double()
    expected_BO = torch.stack([REFERENCES[name].row(backbone, made.config, x_FD) for x_FD in x_BFD])
    assert_close(backbone(x_BFD), expected_BO, rtol=1e-5, atol=1e-5)
