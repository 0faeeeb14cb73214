"""The cross network that backbones share, beyond the contract."""

import torch

from recsys.backbones.dcnv2 import DCNv2, DCNv2Config
from recsys.backbones.dlrm_dcn import DLRMDCN, DLRMDCNConfig


def test_no_loop_over_experts() -> None:
    def count_operations(num_experts: int) -> int:
        backbone = DCNv2(5, 6, DCNv2Config(rank=3, num_experts=num_experts))
        graph = torch.export.export(backbone, (torch.randn(7, 5, 6),)).graph
        return sum(node.op == "call_function" for node in graph.nodes)

    assert count_operations(2) == count_operations(12)


def test_one_expert_is_a_plain_low_rank_weight() -> None:
    one, none = (DCNv2(5, 6, DCNv2Config(rank=3, num_experts=num_experts)) for num_experts in (1, None))
    one.load_state_dict(none.state_dict())
    x_BFD = torch.randn(7, 5, 6)
    assert torch.equal(one(x_BFD), none(x_BFD))


def test_dlrm_dcn_is_a_stacked_dcnv2_with_a_rank() -> None:
    benchmark = DLRMDCN(5, 6, DLRMDCNConfig(rank=3))
    stacked = DCNv2(5, 6, DCNv2Config(rank=3, structure="stacked"))
    stacked.load_state_dict(benchmark.state_dict())
    x_BFD = torch.randn(7, 5, 6)
    assert torch.equal(stacked(x_BFD), benchmark(x_BFD))
