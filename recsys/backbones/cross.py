"""The cross network that DCNv2, DLRMDCN and GDCN share: x_{l+1} = x_0 * A_l(x_l) + x_l, with a weight A_l a layer."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from recsys.backbones.fused import cross_layer
from recsys.backbones.layers import linear, linear_flops


def cross(x0_BK: Tensor, weights: Iterable[nn.Module]) -> Tensor:
    """Apply cross layers to x_0 [B, K]; each weight maps x_l to A_l(x_l), both [B, K]."""
    x_BK = x0_BK
    for weight in weights:
        match weight:
            case nn.Linear():
                x_BK = cross_layer(x0_BK, weight, x_BK, x_BK)
            case nn.Sequential():
                v, u = weight
                assert isinstance(u, nn.Linear)
                x_BK = cross_layer(x0_BK, u, v(x_BK), x_BK)
            case _:
                x_BK = x0_BK * weight(x_BK) + x_BK
    return x_BK


def cross_weight(in_dim: int, rank: int | None = None, num_experts: int | None = None) -> nn.Module:
    """Make A(x) = W x + b, with a rank U (V^T x) + b, with a rank and several experts `CrossExperts`."""
    if rank is None:
        return linear(in_dim, in_dim)
    if num_experts is None or num_experts == 1:
        return nn.Sequential(linear(in_dim, rank, bias=False), linear(rank, in_dim))
    return CrossExperts(in_dim, rank, num_experts)


class CrossExperts(nn.Module):
    """A mixture of E low-rank experts: A(x) = sum_e G_e(x) U_e tanh(C_e tanh(V_e^T x)) + b, G = softmax over experts.

    As arXiv 2008.13535 has it, sum_e G_e(x) (x_0 * (U_e ... + b)): x_0 and b factor out, since softmax sums to 1. The
    paper leaves g and the gate open; tanh, softmax and a gate without bias are what DeepCTR and FuxiCTR have. They
    share one gate among the layers; here every layer has its own (our choice).
    """

    def __init__(self, in_dim: int, rank: int, num_experts: int) -> None:
        super().__init__()
        self.gate = linear(in_dim, num_experts, bias=False)
        self.v_ERK = _experts(num_experts, rank, in_dim)
        self.c_ERR = _experts(num_experts, rank, rank)
        self.u_ERK = _experts(num_experts, rank, in_dim)
        self.bias_K = nn.Parameter(torch.zeros(in_dim))

    def forward(self, x_BK: Tensor) -> Tensor:
        """Map x_l [B, K] to A(x_l) [B, K]."""
        num_experts, rank, _ = self.v_ERK.shape
        gate_BE = self.gate(x_BK).softmax(dim=1)
        # Experts side by side make V and U one matrix each; only C is a batched product.
        h_BER = functional.linear(x_BK, self.v_ERK.flatten(0, 1)).tanh().reshape(-1, num_experts, rank)
        h_EBR = torch.bmm(h_BER.transpose(0, 1), self.c_ERR.transpose(1, 2)).tanh()
        gated_BER = h_EBR.transpose(0, 1) * gate_BE.unsqueeze(2)
        return torch.addmm(self.bias_K, gated_BER.flatten(1), self.u_ERK.flatten(0, 1))

    def flops(self) -> int:
        """Gate, V, C and U of every expert."""
        return linear_flops(self) + 2 * (self.v_ERK.numel() + self.c_ERR.numel() + self.u_ERK.numel())


def cross_flops(weights: Iterable[nn.Module]) -> int:
    """FLOPs of the weights of a cross network for one row."""
    return sum(weight.flops() if isinstance(weight, CrossExperts) else linear_flops(weight) for weight in weights)


def _experts(num_experts: int, num_rows: int, num_columns: int) -> nn.Parameter:
    # Xavier over one expert's matrix; nn.init.xavier_uniform_ would take the expert axis for part of the fan.
    bound = math.sqrt(6.0 / (num_rows + num_columns))
    return nn.Parameter(torch.empty(num_experts, num_rows, num_columns).uniform_(-bound, bound))
