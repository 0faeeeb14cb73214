"""What RankMixer owes beyond the contract."""

import math

import torch
from torch.testing import assert_close

from recsys.backbones.rankmixer import RankMixer, RankMixerConfig


def test_rankmixer_has_no_loop_over_tokens() -> None:
    def count_operations(num_tokens: int) -> int:
        backbone = RankMixer(5, 6, RankMixerConfig(num_tokens=num_tokens, token_dim=24))
        graph = torch.export.export(backbone, (torch.randn(7, 5, 6),)).graph
        return sum(node.op == "call_function" for node in graph.nodes)

    assert count_operations(2) == count_operations(12)


def test_rankmixer_scales_initial_weights_by_one_token() -> None:
    torch.manual_seed(0)
    backbone = RankMixer(num_fields=32, dim=16, config=RankMixerConfig(num_tokens=8, token_dim=64))
    # 512 values in 8 chunks of 64: Xavier's variance is 2 / (64 + 64), whatever the number of tokens.
    assert_close(backbone.tokenize.weight_TKN.std().item(), math.sqrt(2 / 128), rtol=0.05, atol=0)
