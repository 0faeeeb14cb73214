"""Every backbone keeps one contract, and computes its paper's formula (written out here in loops)."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import recsys.backbones
from recsys.backbones import BACKBONES
from recsys.backbones.base import Backbone
from recsys.backbones.dcnv2 import DCNv2Config
from recsys.backbones.layers import Dropout, mlp
from recsys.backbones.rankmixer import RankMixer, RankMixerConfig
from recsys.backbones.wukong import WukongConfig

B, F, D = 7, 5, 6

# RankMixer pads: 30 values do not divide by 4 tokens. Wukong projects its first residual, from 5 fields to 7 tokens;
# wukong_same, which goes from 5 to 5, projects none.
CASES: dict[str, tuple[str, Any]] = {
    "dcnv2": ("dcnv2", DCNv2Config(hidden=(16, 8))),
    "dcnv2_low_rank": ("dcnv2", DCNv2Config(rank=3, num_cross_layers=2, hidden=(16, 8))),
    "dcnv2_stacked": ("dcnv2", DCNv2Config(structure="stacked", hidden=(16, 8))),
    "rankmixer": ("rankmixer", RankMixerConfig(num_tokens=4, token_dim=12)),
    "wukong": ("wukong", WukongConfig(num_fm=3, num_linear=4, fm_rank=2, hidden=(16,))),
    "wukong_same": ("wukong", WukongConfig(num_fm=3, num_linear=2, fm_rank=2, hidden=(16,))),
}
OUT_DIMS = {
    "dcnv2": 30 + 8,
    "dcnv2_low_rank": 30 + 8,
    "dcnv2_stacked": 8,
    "rankmixer": 12,
    "wukong": 7 * 6,
    "wukong_same": 5 * 6,
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
    name, config = CASES[case]
    torch.manual_seed(seed)
    return BACKBONES[name](num_fields, dim, dataclasses.replace(config, **changes))


def rows(batch: int = B, seed: int = 1) -> Tensor:
    return torch.randn(batch, F, D, generator=torch.Generator().manual_seed(seed))


# The contract


def test_every_file_is_registered_and_has_a_case() -> None:
    folder = Path(recsys.backbones.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "base", "layers"}
    assert files == set(BACKBONES)
    assert {name for name, _ in CASES.values()} == set(BACKBONES)


@pytest.mark.parametrize("name", BACKBONES)
def test_registered_under_the_papers_name(name: str) -> None:
    kind = BACKBONES[name]
    assert kind.__name__.lower() == name
    assert kind.__module__ == f"recsys.backbones.{name}"
    # The default config works, and is the class's own.
    config = vars(kind)["Config"]()
    assert type(config).__name__ == f"{kind.__name__}Config"
    assert kind(F, D)(rows()).shape == kind(F, D, config)(rows()).shape


@every_case
def test_shape(case: str) -> None:
    backbone = build(case)
    assert backbone.out_dim == OUT_DIMS[case]
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
    ("kind", "changes", "message"),
    [
        (DCNv2Config, {"num_cross_layers": 0}, "num_cross_layers is 0: give 1 or more"),
        (DCNv2Config, {"rank": 0}, "rank is 0"),
        (DCNv2Config, {"hidden": ()}, "hidden is empty"),
        (DCNv2Config, {"hidden": (16, -1)}, "hidden is "),
        (DCNv2Config, {"dropout": 1.0}, "dropout is 1.0"),
        (RankMixerConfig, {"num_tokens": 0}, "num_tokens is 0"),
        (RankMixerConfig, {"token_dim": 0}, "token_dim is 0"),
        (RankMixerConfig, {"token_dim": 60}, "token_dim is 60: .* num_tokens = 8, give 56 or 64"),
        (RankMixerConfig, {"token_dim": 6}, "token_dim is 6: .* num_tokens = 8, give 8$"),
        (RankMixerConfig, {"num_layers": 0}, "num_layers is 0"),
        (RankMixerConfig, {"expansion": 0}, "expansion is 0"),
        (RankMixerConfig, {"dropout": -0.1}, "dropout is -0.1"),
        (WukongConfig, {"num_layers": 0}, "num_layers is 0"),
        (WukongConfig, {"num_fm": 0}, "num_fm is 0"),
        (WukongConfig, {"num_linear": 0}, "num_linear is 0"),
        (WukongConfig, {"fm_rank": 0}, "fm_rank is 0"),
        (WukongConfig, {"hidden": ()}, "hidden is empty"),
        (WukongConfig, {"dropout": 1.5}, "dropout is 1.5"),
    ],
)
def test_widths_that_cannot_work(kind: type, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**changes)


# The papers' formulas, one row at a time, on lists of vectors [D]


def randomised(backbone: Backbone) -> Backbone:
    """In float64, with every parameter random: norms and biases too, which start as the identity."""
    torch.manual_seed(4)
    backbone.double()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.uniform_(-0.7, 0.7)
    return backbone


def affine(weight_NK: Tensor, bias_N: Tensor, x_K: Tensor) -> Tensor:
    y_N = torch.zeros(len(weight_NK), dtype=x_K.dtype)
    for n in range(len(weight_NK)):
        y_N[n] = sum(weight_NK[n, k] * x_K[k] for k in range(len(x_K))) + bias_N[n]
    return y_N


def layer_norm(norm: nn.LayerNorm, x_D: Tensor) -> Tensor:
    values = x_D.tolist()
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    y_D: Tensor = norm.weight * (x_D - mean) / math.sqrt(variance + 1e-5) + norm.bias
    return y_D


def relu_mlp(layers: nn.Module, x_K: Tensor) -> Tensor:
    for layer in layers.modules():
        if isinstance(layer, nn.Linear):
            x_K = affine(layer.weight, layer.bias, x_K).clamp(min=0)
    return x_K


def dcnv2_row(model: Any, config: DCNv2Config, x_FD: Tensor) -> Tensor:
    x0_K = x_K = torch.cat(list(x_FD))
    for cross in model.cross:
        if config.rank is None:
            y_K = affine(cross.weight, cross.bias, x_K)
        else:
            v, u = cross
            assert v.weight.shape == (config.rank, len(x0_K))
            y_K = affine(u.weight @ v.weight, u.bias, x_K)
        x_K = x0_K * y_K + x_K
    if config.structure == "stacked":
        return relu_mlp(model.mlp, x_K)
    return torch.cat([x_K, relu_mlp(model.mlp, x0_K)])


def rankmixer_row(model: Any, config: RankMixerConfig, x_FD: Tensor) -> Tensor:
    T, width = config.num_tokens, config.token_dim
    flat = [*x_FD.flatten(), *torch.zeros(2, dtype=x_FD.dtype)]
    chunk = len(flat) // T
    project = model.tokenize
    tokens = [
        affine(project.weight_TKN[t].T, project.bias_TN[t], torch.stack(flat[t * chunk : (t + 1) * chunk]))
        for t in range(T)
    ]
    for block in model.blocks:
        first, _, _, second = block.ffn
        head = width // T
        mixed = [torch.cat([tokens[t][h * head : (h + 1) * head] for t in range(T)]) for h in range(T)]
        s = [layer_norm(block.mix_norm, mixed[t] + tokens[t]) for t in range(T)]
        tokens = []
        for t in range(T):
            z = affine(first.weight_TKN[t].T, first.bias_TN[t], s[t])
            z = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
            tokens.append(
                layer_norm(block.ffn_norm, affine(second.weight_TKN[t].T, second.bias_TN[t], z) + s[t]),
            )
    return torch.stack(tokens).sum(0) / T


def wukong_row(model: Any, config: WukongConfig, x_FD: Tensor) -> Tensor:
    tokens = list(x_FD)
    for layer in model.layers:
        n, y = len(tokens), layer.fm_weight_TK
        dots = [[sum(a * b for a, b in zip(tokens[i], tokens[j], strict=True)) for j in range(n)] for i in range(n)]
        fm = [sum(dots[i][j] * y[j, k] for j in range(n)) for i in range(n) for k in range(config.fm_rank)]
        norm, hidden, last = layer.fm_mlp
        flat_K = affine(last.weight, last.bias, relu_mlp(hidden, layer_norm(norm, torch.tensor(fm, dtype=x_FD.dtype))))
        out = [flat_K[i * D : (i + 1) * D] for i in range(config.num_fm)]
        out += [sum(w * token for w, token in zip(weights, tokens, strict=True)) for weights in layer.linear_weight]
        if n == len(out):
            assert layer.residual_weight is None
            residual = tokens
        else:
            residual = [sum(row[i] * tokens[i] for i in range(n)) for row in layer.residual_weight]
        tokens = [layer_norm(layer.norm, a + b) for a, b in zip(out, residual, strict=True)]
    return torch.cat(tokens)


@every_case
@torch.no_grad()
def test_equals_the_papers_formula(case: str) -> None:
    by_hand: dict[str, Any] = {"dcnv2": dcnv2_row, "rankmixer": rankmixer_row, "wukong": wukong_row}
    assert set(by_hand) == set(BACKBONES)
    name, config = CASES[case]
    backbone = randomised(build(case))
    x_BFD = rows(2).double()
    expected_BO = torch.stack([by_hand[name](backbone, config, x_FD) for x_FD in x_BFD])
    assert_close(backbone(x_BFD), expected_BO, rtol=1e-5, atol=1e-5)


def test_rankmixer_has_no_loop_over_tokens() -> None:
    def count_operations(num_tokens: int) -> int:
        backbone = build("rankmixer", num_tokens=num_tokens, token_dim=24)
        graph = torch.export.export(backbone, (rows(),)).graph
        return sum(node.op == "call_function" for node in graph.nodes)

    assert count_operations(2) == count_operations(12)


def test_rankmixer_scales_initial_weights_by_one_token() -> None:
    torch.manual_seed(0)
    backbone = RankMixer(num_fields=32, dim=16, config=RankMixerConfig(num_tokens=8, token_dim=64))
    # 512 values in 8 chunks of 64: Xavier's variance is 2 / (64 + 64), whatever the number of tokens.
    assert_close(backbone.tokenize.weight_TKN.std().item(), math.sqrt(2 / 128), rtol=0.05, atol=0)


# Layers


def dropout(p: float = 0.4, seed: int | None = None) -> Dropout:
    layer = Dropout(p)
    if seed is not None:
        layer.reseed(seed)
    return layer


def test_dropout_stream_belongs_to_its_seed() -> None:
    x = torch.ones(1000)
    first, twin, other = dropout(seed=3), dropout(seed=3), dropout(seed=4)
    torch.manual_seed(0)
    masks = [first(x), first(x)]
    torch.manual_seed(1)
    # Neither torch's global stream nor a layer with another seed in between moves the stream.
    twin_masks = []
    for _ in range(2):
        other(x)
        torch.rand(5)
        twin_masks.append(twin(x))
    assert torch.equal(torch.stack(twin_masks), torch.stack(masks))
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(dropout(seed=4)(x), masks[0])
    # Reseeding starts over.
    first.reseed(3)
    assert torch.equal(first(x), masks[0])


def test_dropout_with_a_stream_leaves_the_global_one_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    dropout(seed=3)(torch.ones(10))
    assert torch.equal(torch.rand(3), expected)


def test_dropout_without_a_stream_draws_from_the_global_one() -> None:
    x = torch.ones(1000)
    torch.manual_seed(0)
    layer = dropout()
    mask = layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), mask)
    assert layer.generator is None


def test_dropout_keeps_the_expectation_and_scales_gradients_alike() -> None:
    x = torch.full((200_000,), 2.0, requires_grad=True)
    y = dropout(0.4, seed=0)(x)
    assert_close(y.mean().item(), 2.0, rtol=0.01, atol=0)
    assert_close((y == 0).float().mean().item(), 0.4, rtol=0.01, atol=0)
    torch.autograd.backward(y.sum())
    assert x.grad is not None
    assert_close(x.grad, y.detach() / 2.0)


def test_dropout_is_the_identity_in_eval_and_at_zero() -> None:
    x = torch.ones(10)
    assert dropout(0.4, seed=0).eval()(x) is x
    assert dropout(0.0, seed=0)(x) is x


def test_mlp_layers() -> None:
    kinds = [type(layer) for layer in mlp(6, (4, 3), dropout=0.1, norm=True)]
    assert kinds == 2 * [nn.Linear, nn.LayerNorm, nn.ReLU, Dropout]
    plain = mlp(6, (4, 3), dropout=0.1)
    assert [type(layer) for layer in plain] == 2 * [nn.Linear, nn.ReLU, Dropout]
    assert plain(torch.ones(2, 6)).shape == (2, 3)
