"""What RankMixer owes beyond the contract."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.testing import assert_close

from recsys.backbones.rankmixer import RankMixer, RankMixerConfig
from recsys.backbones.tokens import SparseMoE


@pytest.mark.parametrize("counted", ["num_tokens", "num_experts"])
def test_rankmixer_has_no_loop_over_tokens_or_experts(counted: str) -> None:
    def count_operations(number: int) -> int:
        config = RankMixerConfig(**{"num_tokens": 4, "num_experts": 3, "token_dim": 24, counted: number})
        backbone = RankMixer(5, 6, config).eval()
        graph = torch.export.export(backbone, (torch.randn(7, 5, 6),)).graph
        return sum(node.op == "call_function" for node in graph.nodes)

    assert count_operations(2) == count_operations(12)


def test_rankmixer_scales_initial_weights_by_one_token() -> None:
    torch.manual_seed(0)
    backbone = RankMixer(num_fields=32, dim=16, config=RankMixerConfig(num_tokens=8, token_dim=64))
    # 512 values in 8 chunks of 64: Xavier's variance is 2 / (64 + 64), whatever the number of tokens.
    assert_close(backbone.tokenize.weight_TKN.std().item(), math.sqrt(2 / 128), rtol=0.05, atol=0)


# The sparse mixture of experts

FIELDS, DIM = 6, 4


def mixer(seed: int = 0, **changes: Any) -> RankMixer:
    torch.manual_seed(seed)
    config = {"num_tokens": 4, "token_dim": 16, "num_layers": 1, "expansion": 2, "num_experts": 4} | changes
    return RankMixer(FIELDS, DIM, RankMixerConfig(**config))


def rows(batch: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, FIELDS, DIM, generator=torch.Generator().manual_seed(seed))


def watch_gates(backbone: nn.Module) -> list[Tensor]:
    """The gates before ReLU [B, T, E] of every block in every forward from now on, in a list that grows."""
    watched: list[Tensor] = []
    for part in backbone.modules():
        if isinstance(part, SparseMoE):
            part.router.register_forward_hook(lambda _router, _inputs, z_TBE: watched.append(z_TBE.transpose(0, 1)))
    return watched


def gradients(backbone: RankMixer, x_BFD: Tensor) -> dict[str, Tensor]:
    """Of a loss that is a mean over rows."""
    backbone.zero_grad()
    torch.autograd.backward(backbone(x_BFD).square().sum(dim=1).mean())
    return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


def test_experts_start_open() -> None:
    backbone = mixer(num_layers=2, token_dim=64, num_experts=8)
    watched = watch_gates(backbone)
    backbone(rows(1000))
    assert len(watched) == 2
    for z_BTE in watched:
        assert_close((z_BTE > 0).float().mean().item(), 0.75, rtol=0, atol=0.05)
        assert (z_BTE > 0).float().mean(dim=0).min() > 0.2
        assert_close(z_BTE.relu().sum(dim=2).mean().item(), 1.15, rtol=0.1, atol=0)


def test_gradient_is_that_of_the_loss_with_the_penalty_as_documented() -> None:
    l1, target, x_BFD = 0.3, 0.7, rows(50).double()
    backbone = mixer(l1=0.0, num_layers=2).double()
    watched = watch_gates(backbone)
    loss = backbone(x_BFD).square().sum(dim=1).mean()
    assert len(watched) == 2
    for z_BTE in watched:
        for z_TE in z_BTE:
            share = (z_TE > 0).double().mean().item()
            pushed = z_TE.clamp(min=0) if share > target else (-z_TE).clamp(min=0)
            loss = loss + l1 * abs(share - target) * pushed.sum() / len(x_BFD)
        above_B = (z_BTE > 0).double().mean(dim=(1, 2)) > target
        assert 0 < above_B.sum() < len(x_BFD)
    torch.autograd.backward(loss)
    expected = {name: p.grad for name, p in backbone.named_parameters()}

    penalised = mixer(l1=l1, target_active=target, num_layers=2).double()
    assert_close(gradients(penalised, x_BFD), expected)
    # It is no part of the output, nor of evaluation.
    assert torch.equal(penalised(x_BFD), backbone(x_BFD))
    assert_close(gradients(penalised.eval(), x_BFD), gradients(backbone, x_BFD))


def test_penalty_is_the_same_on_two_ranks() -> None:
    backbone, x_BFD = mixer(l1=0.3, target_active=0.7).double(), rows(20).double()
    whole, first, second = (gradients(backbone, part) for part in (x_BFD, x_BFD[:10], x_BFD[10:]))
    assert_close({name: (first[name] + second[name]) / 2 for name in whole}, whole)


@pytest.mark.parametrize(
    ("target", "l1", "low", "high"), [(0.25, 0.1, 0.2, 0.35), (0.9, 0.1, 0.8, 1.0), (0.25, 0, 0.6, 0.8)]
)
def test_share_of_active_experts_goes_to_its_target(target: float, l1: float, low: float, high: float) -> None:
    # Three quarters of the gates are open at the start, and stay open where nothing is done about it.
    backbone = mixer(target_active=target, l1=l1)
    head = nn.Linear(backbone.out_dim, 1)
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=3e-3)
    for step in range(200):
        x_BFD = rows(256, seed=step)
        labels_B = (x_BFD[:, 0, 0] * x_BFD[:, 1, 1] > 0).float()
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(head(backbone(x_BFD)).squeeze(1), labels_B)
        torch.autograd.backward(loss)
        optimizer.step()
    watched = watch_gates(backbone)
    backbone(rows(1000, seed=1000))
    assert low < (watched[0] > 0).float().mean().item() < high
    assert loss.item() < 0.2


def test_members_of_one_vmap_get_the_gradients_that_each_gets_alone() -> None:
    members, x_BFD = [mixer(seed, l1=0.3, target_active=0.7) for seed in range(2)], rows(20)
    parameters, buffers = stack_module_state(members)

    def loss(parameters: Any) -> Tensor:
        h_BO: Tensor = functional_call(members[0], (parameters, buffers), (x_BFD,))
        return h_BO.square().sum(dim=1).mean()

    together = vmap(grad(loss))(parameters)
    for index, member in enumerate(members):
        assert_close({name: g[index] for name, g in together.items()}, gradients(member, x_BFD), rtol=1e-4, atol=1e-5)
