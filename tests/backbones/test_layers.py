"""Layers that backbones share."""

import torch
from torch import nn
from torch.testing import assert_close

from recsys.backbones.layers import MLP, Dropout, deeper_mlp, wider


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
    plain = MLP(6, (4, 3), dropout=0.1)
    assert [type(layer) for layer in plain] == 2 * [nn.Linear, nn.ReLU, Dropout]
    assert plain(torch.ones(2, 6)).shape == (2, 3)


def test_sizes_of_a_ladder() -> None:
    assert [wider(64, k, multiple=8) for k in (1, 2, 4)] == [64, 88, 128]
    assert deeper_mlp((256, 128), 2) == (256, 256, 128, 128)
    assert deeper_mlp((256, 128), 1.5) == (256, 256, 128)
    assert deeper_mlp((256, 128), 1) == (256, 128)
