"""Layers with weights of their own for each of T tokens: what RankMixer is made of."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from recsys.backbones.fused import bias_gelu
from recsys.backbones.layers import Dropout


class TokenLinear(nn.Module):
    """A linear layer of its own for each of T tokens, y_t = x_t W_t + b_t, as one batched matmul.

    Tokens come first in memory, [T, B, K]: so no operand of the product needs to be copied.
    """

    def __init__(self, num_tokens: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        # Xavier over one token's matrix; nn.init.xavier_uniform_ would take the token axis for part of the fan.
        bound = math.sqrt(6.0 / (in_dim + out_dim))
        self.weight_TKN = nn.Parameter(torch.empty(num_tokens, in_dim, out_dim).uniform_(-bound, bound))
        self.bias_TN = nn.Parameter(torch.zeros(num_tokens, out_dim))

    def forward(self, x_TBK: Tensor) -> Tensor:
        """Map tokens [T, B, in_dim] to [T, B, out_dim]."""
        # baddbmm would be one call, and on a CPU copies the bias to each row of the output first.
        y_TBN = torch.bmm(x_TBK, self.weight_TKN)
        return y_TBN.add_(self.bias_TN.unsqueeze(1).to(y_TBN.dtype))


class TokenFFN(nn.Sequential):
    """x_t -> GELU(x_t W1_t + b1_t) W2_t + b2_t for tokens [T, B, dim], with dropout between the two layers."""

    def __init__(self, num_tokens: int, dim: int, hidden_dim: int, dropout: float) -> None:
        up, down = TokenLinear(num_tokens, dim, hidden_dim), TokenLinear(num_tokens, hidden_dim, dim)
        super().__init__(up, nn.GELU(), Dropout(dropout), down)

    def forward(self, x_TBD: Tensor) -> Tensor:
        """Map tokens [T, B, dim] to [T, B, dim], the first layer's bias together with the GELU, which is not called."""
        up, _, dropout, down = self
        assert isinstance(up, TokenLinear)
        h_TBK = bias_gelu(torch.bmm(x_TBD, up.weight_TKN), up.bias_TN)
        out_TBD: Tensor = down(dropout(h_TBK))
        return out_TBD


class SparseMoE(nn.Module):
    """E feed-forward networks for each token, mixed by how far their gates are open: v_t = sum_e g_te FFN_te(s_t).

    The gates are g_t = ReLU(s_t R_t + r_t), so a token opens as many experts as it likes. All of them are computed; a
    sparse kernel would skip the closed ones. Paper: arXiv 2507.15551, section 3.

    In training a penalty keeps the share a_b of open gates among the T * E of a row b near target_active. The gradient
    is that of the loss, which has to be a mean over rows, plus that of the mean over rows of
    l1 * |a_b - target_active| * sum_te (ReLU(z_bte) if a_b > target_active else ReLU(-z_bte)), with g = ReLU(z) and
    a_b a constant. The paper has L1 on the gates, with a weight that keeps the share of active experts near a budget,
    and does not say how it finds the weight. Ours (our choice) follows from the row, so there is no state, and no row
    or rank depends on another; and below the budget it opens gates, since a closed one gets no other gradient.
    Dense-training-sparse-inference, the paper's own remedy for experts that learn too little, is left out.

    Router weights and r_t start as 1 / E of Xavier's and of 1 (our choice): 3/4 of the gates are open, and a token's
    sum to about 1.
    """

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        hidden_dim: int,
        dropout: float,
        num_experts: int,
        target_active: float,
        l1: float,
    ) -> None:
        super().__init__()
        self.num_experts, self.target_active, self.l1 = num_experts, target_active, l1
        self.router = TokenLinear(num_tokens, dim, num_experts)
        with torch.no_grad():
            self.router.weight_TKN.div_(num_experts)
            self.router.bias_TN.fill_(1.0 / num_experts)
        # A token's experts are tokens that read the same: token t * E + e is expert e of token t.
        self.experts = TokenFFN(num_tokens * num_experts, dim, hidden_dim, dropout)

    def forward(self, s_TBD: Tensor) -> Tensor:
        """Map tokens [T, B, D] to [T, B, D]."""
        z_TBE = self.router(s_TBD)
        if self.training:
            z_TBE = GatePenalty.apply(z_TBE, self.target_active, self.l1)  # type: ignore[no-untyped-call]
        gates_TEB = torch.relu(z_TBE).transpose(1, 2)
        v_TEBD = self.experts(s_TBD.repeat_interleave(self.num_experts, dim=0)).unflatten(0, (-1, self.num_experts))
        return (gates_TEB.unsqueeze(3) * v_TEBD).sum(dim=1)


class GatePenalty(torch.autograd.Function):
    """Gates before their ReLU, z [T, B, E], as they are; backward adds the gradient of SparseMoE's penalty.

    A backbone has no loss to add it to.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z_TBE: Tensor, target: float, l1: float) -> Tensor:
        """Pass z through."""
        return z_TBE.view_as(z_TBE)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
        """Keep z and the penalty's two numbers."""
        z_TBE, ctx.target, ctx.l1 = inputs
        ctx.save_for_backward(z_TBE)

    @staticmethod
    def backward(ctx: Any, grad_TBE: Tensor) -> tuple[Tensor, None, None]:
        """Above the budget push the open gates down, below it the closed ones up, by l1 / B times the distance."""
        (z_TBE,) = ctx.saved_tensors
        open_TBE = (z_TBE > 0).float()
        excess_1B1 = open_TBE.mean(dim=(0, 2), keepdim=True) - ctx.target
        pushed_TBE = torch.where(excess_1B1 > 0, open_TBE, 1.0 - open_TBE)
        penalty_TBE = ctx.l1 / max(z_TBE.shape[1], 1) * excess_1B1 * pushed_TBE
        return grad_TBE + penalty_TBE.to(grad_TBE.dtype), None, None
