"""What FinalMLP owes beyond the contract."""

import pytest
import torch
from torch.testing import assert_close

from recsys.backbones.finalmlp import FinalMLP, FinalMLPConfig


def test_gate_fields_lie_among_the_fields() -> None:
    with pytest.raises(ValueError, match=r"gate_fields are \(0, 5\): with 5 fields give 0 to 4"):
        FinalMLP(5, 6, FinalMLPConfig(gate_fields1=(0, 5)))
    with pytest.raises(ValueError, match=r"gate_fields are \(-1,\)"):
        FinalMLP(5, 6, FinalMLPConfig(gate_fields2=(-1,)))


@torch.no_grad()
def test_the_head_that_the_paper_has_is_a_linear_one() -> None:
    torch.manual_seed(0)
    backbone = FinalMLP(5, 6, FinalMLPConfig(hidden1=(8,), hidden2=(4,), num_heads=2, gate_dim=None)).double()
    x_BFD = torch.randn(7, 5, 6, dtype=torch.float64)
    w_O = torch.cat([torch.randn(8 + 4, dtype=torch.float64), torch.ones(2, dtype=torch.float64)])
    o1_BK, o2_BN = backbone.stream1(x_BFD), backbone.stream2(x_BFD)
    # Bilinear heads are one bilinear form whose matrix is block diagonal.
    full = torch.block_diag(*backbone.fusion_HKN)
    expected_B = o1_BK @ w_O[:8] + o2_BN @ w_O[8:12] + torch.einsum("bk,kn,bn->b", o1_BK, full, o2_BN)
    assert_close(backbone(x_BFD) @ w_O, expected_B)
