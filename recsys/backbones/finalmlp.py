"""FinalMLP, two MLP streams with feature gates and a bilinear fusion (arXiv 2304.00902)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from recsys.backbones.base import Along, Backbone
from recsys.backbones.layers import MLP, check_sizes, deeper_mlp, linear, linear_flops, wider, wider_mlp


@dataclass(frozen=True, kw_only=True)
class FinalMLPConfig:
    """Sizes of a FinalMLP. Its streams may differ in width and depth."""

    hidden1: tuple[int, ...] = (256, 128)
    """Widths of the first stream's MLP; the last is a multiple of num_heads."""

    hidden2: tuple[int, ...] = (256, 128)
    """Widths of the second stream's MLP; the last is a multiple of num_heads."""

    num_heads: int = 8
    """Parts that each stream's output is cut into for the bilinear fusion; more heads have fewer weights."""

    gate_dim: int | None = 64
    """Hidden width of the feature gates' MLPs; None for no gates."""

    gate_fields1: tuple[int, ...] = ()
    """Fields, counted from 0, that the first stream's gate reads; none for a learned context vector."""

    gate_fields2: tuple[int, ...] = ()
    """Fields, counted from 0, that the second stream's gate reads; none for a learned context vector."""

    dropout: float = 0.0
    """Share of each MLP layer's activations dropped in training."""

    def __post_init__(self) -> None:
        sizes = {"hidden1": self.hidden1, "hidden2": self.hidden2}
        check_sizes(self.dropout, **sizes, num_heads=self.num_heads, gate_dim=self.gate_dim)
        for name, hidden in sizes.items():
            if hidden[-1] % self.num_heads:
                works = (hidden[-1] // self.num_heads + 1) * self.num_heads
                raise ValueError(f"{name} ends in {hidden[-1]}: give a multiple of num_heads, such as {works}")
        if self.gate_dim is None and self.gate_fields1 + self.gate_fields2:
            raise ValueError("gate_fields need gates: give gate_dim, such as 64, or leave the fields out")

    def ladder(self, k: float, along: Along) -> Self:
        """Scale the streams' widths, the last kept a multiple of num_heads, or their layers."""
        if along == "depth":
            return replace(self, hidden1=deeper_mlp(self.hidden1, k), hidden2=deeper_mlp(self.hidden2, k))
        one, two = ((*wider_mlp(h[:-1], k), wider(h[-1], k, self.num_heads)) for h in (self.hidden1, self.hidden2))
        return replace(self, hidden1=one, hidden2=two)


_DEFAULT = FinalMLPConfig()


class FeatureGate(nn.Module):
    """A stream's view of the fields: x * 2 sigmoid(W2 relu(W1 context + b1) + b2), elementwise over F * D.

    The context is some fields' embeddings, or else a learned vector of dim values, which gates all rows alike.
    """

    def __init__(self, num_fields: int, dim: int, gate_dim: int, fields: tuple[int, ...]) -> None:
        super().__init__()
        if not set(fields) <= set(range(num_fields)):
            raise ValueError(f"gate_fields are {fields}: with {num_fields} fields give 0 to {num_fields - 1}")
        self.fields = fields
        # Random and not 0, where neither it nor W1 would get a gradient.
        self.context_D = None if fields else nn.Parameter(torch.randn(dim))
        self.inner = linear(max(len(fields), 1) * dim, gate_dim)
        self.outer = linear(gate_dim, num_fields * dim)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Gate field embeddings [B, F, D] to [B, F * D]."""
        if self.context_D is None:
            context_BK = torch.cat([x_BFD[:, field] for field in self.fields], dim=1)
            logit = self.outer(self.inner(context_BK).relu())
        else:  # Once a batch and not once a row: a matrix by a vector.
            hidden_N = torch.addmv(self.inner.bias, self.inner.weight, self.context_D).relu()
            logit = torch.addmv(self.outer.bias, self.outer.weight, hidden_N)
        return x_BFD.flatten(1) * (2 * logit.sigmoid())


class FinalMLP(Backbone):
    """o_s = MLP_s(gate_s(x)) for both streams, fused: h = concat(o_1, o_2, o_1j^T W_j o_2j for each head j).

    hidden1[-1] + hidden2[-1] + num_heads wide. A linear head with weights (w_1, w_2, 1, ..., 1) gives the paper's
    b + w_1^T o_1 + w_2^T o_2 + sum_j o_1j^T W_j o_2j. Paper: arXiv 2304.00902.
    """

    Config: ClassVar[type] = FinalMLPConfig

    def __init__(self, num_fields: int, dim: int, config: FinalMLPConfig = _DEFAULT) -> None:
        super().__init__()
        gates: list[nn.Module] = [nn.Flatten(), nn.Flatten()]
        if config.gate_dim is not None:
            fields = (config.gate_fields1, config.gate_fields2)
            gates = [FeatureGate(num_fields, dim, config.gate_dim, chosen) for chosen in fields]
        self.stream1 = nn.Sequential(gates[0], MLP(num_fields * dim, config.hidden1, config.dropout))
        self.stream2 = nn.Sequential(gates[1], MLP(num_fields * dim, config.hidden2, config.dropout))
        dims = config.hidden1[-1] // config.num_heads, config.hidden2[-1] // config.num_heads
        heads = [nn.init.xavier_uniform_(torch.empty(dims)) for _ in range(config.num_heads)]
        self.fusion_HKN = nn.Parameter(torch.stack(heads))
        self.out_dim = config.hidden1[-1] + config.hidden2[-1] + config.num_heads

    def forward(self, x_BFD: Tensor) -> Tensor:
        """Map field embeddings [B, F, D] to [B, out_dim]."""
        o1_BK, o2_BN = self.stream1(x_BFD), self.stream2(x_BFD)
        heads = self.fusion_HKN.shape[0]
        left_HBN = o1_BK.unflatten(1, (heads, -1)).transpose(0, 1) @ self.fusion_HKN
        fused_HB = (left_HBN * o2_BN.unflatten(1, (heads, -1)).transpose(0, 1)).sum(dim=2)
        return torch.cat([o1_BK, o2_BN, fused_HB.T], dim=1)

    def flops(self) -> int:
        """The streams, gates that read fields, and W_j; a gate with a learned context is no work of a row."""
        gates = [part for part in self.modules() if isinstance(part, FeatureGate) and not part.fields]
        return linear_flops(self) - sum(linear_flops(gate) for gate in gates) + 2 * self.fusion_HKN.numel()
