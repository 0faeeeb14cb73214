"""Our operators between matrix products against PyTorch's in float64."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from recsys.backbones.fused import (
    Norm,
    bias_gelu,
    cross_layer,
    linear_relu,
    mix_norm,
    transposed,
    unfused,
    wukong_norm,
)
from recsys.backbones.layers import MLP
from recsys.native import available, instructions

Function = Callable[..., Tensor]
BF16_STEP = 2.0**-8
"""Between 1 and the next bfloat16, of which rounding errs by half."""


@pytest.fixture(autouse=True)
def built() -> None:
    if not available("tables") or not available("fused"):
        pytest.skip("the operators are not built: there was no compiler")


@pytest.fixture(params=["plain", "avx2", "avx512", "avx512_bf16"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    widest = instructions()
    if instructions(request.param) != request.param:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    instructions(widest)


def normed(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    # The parameters as they are, so that gradients come to them.
    return torch.func.functional_call(Norm(gain.numel()), {"weight": gain, "bias": shift}, (x,))


def plus_normed(x: Tensor, residual: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return torch.func.functional_call(Norm(gain.numel()), {"weight": gain, "bias": shift}, (x, residual))


class _WithNorm(nn.Module):
    def __init__(self, function: Function, width: int) -> None:
        super().__init__()
        self.function, self.norm = function, nn.LayerNorm(width)

    def forward(self, *inputs: Any) -> Tensor:
        return self.function(self.norm, *inputs)


def with_norm(function: Function) -> Function:
    def call(*inputs: Any) -> Tensor:
        *values, gain, shift = inputs
        parameters = {"norm.weight": gain, "norm.bias": shift}
        return torch.func.functional_call(_WithNorm(function, gain.numel()), parameters, tuple(values))

    return call


class _WithLayer(nn.Module):
    def __init__(self, function: Function, weight: Tensor) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(weight.shape[1], weight.shape[0])

    def forward(self, *inputs: Any) -> Tensor:
        return self.function(self.layer, *inputs)


def with_layer(function: Function) -> Function:
    def call(*inputs: Any) -> Tensor:
        *values, weight, bias = inputs
        low = values[0].dtype is torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            parameters = {"layer.weight": weight, "layer.bias": bias}
            return torch.func.functional_call(_WithLayer(function, weight), parameters, tuple(values))

    return call


def cross_of(layer: nn.Linear, x0: Tensor, x: Tensor, h: Tensor | None = None) -> Tensor:
    return cross_layer(x0, layer, x if h is None else h, x)


def gelu_of(z: Tensor, bias: Tensor) -> Tensor:
    return bias_gelu(z.clone(), bias)  # which uses its first input up


# What a case takes: shapes of values, in the data's type, and of parameters, which are float32.
CASES: dict[str, tuple[Function, list[tuple[int, ...] | None], list[tuple[int, ...]]]] = {
    "relu": (with_layer(linear_relu), [(70, 5)], [(33, 5), (33,)]),
    "relu_16": (with_layer(linear_relu), [(9, 5)], [(16, 5), (16,)]),
    "gelu": (gelu_of, [(3, 70, 37)], [(3, 37)]),
    "gelu_64": (gelu_of, [(2, 300, 64)], [(2, 64)]),
    "cross": (with_layer(cross_of), [(70, 37), (70, 37)], [(37, 37), (37,)]),
    "cross_low_rank": (with_layer(cross_of), [(300, 64), (300, 64), (300, 9)], [(64, 9), (64,)]),
    "norm": (normed, [(70, 37)], [(37,), (37,)]),
    "norm_3": (normed, [(7, 3, 3)], [(3,), (3,)]),
    "norm_16": (normed, [(70, 3, 16)], [(16,), (16,)]),
    "norm_64": (normed, [(300, 64)], [(64,), (64,)]),
    "norm_936": (normed, [(70, 936)], [(936,), (936,)]),
    "norm_residual": (plus_normed, [(70, 128), (70, 128)], [(128,), (128,)]),
    "mix": (with_norm(mix_norm), [(3, 70, 12)], [(12,), (12,)]),
    "mix_128": (with_norm(mix_norm), [(8, 70, 128)], [(128,), (128,)]),
    "mix_1": (with_norm(mix_norm), [(1, 5, 3)], [(3,), (3,)]),
    "wukong_x": (with_norm(wukong_norm), [(70, 32), (70, 16, 3), (70, 5, 16)], [(16,), (16,)]),
    "wukong": (with_norm(wukong_norm), [(70, 10), (70, 5, 8), None], [(5,), (5,)]),
    "transposed": (transposed, [(70, 39, 16)], []),
}
every_case = pytest.mark.parametrize("case", CASES)


def made(case: str, dtype: torch.dtype) -> tuple[Function, list[Tensor | None]]:
    function, values, parameters = CASES[case]
    random = torch.Generator().manual_seed(3)
    types = [dtype] * len(values) + [torch.float32] * len(parameters)
    tensors = [
        None if shape is None else torch.randn(shape, generator=random).to(kind)
        for shape, kind in zip([*values, *parameters], types, strict=True)
    ]
    return function, tensors


def results(function: Function, inputs: list[Tensor | None], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The output, and the gradients of all inputs, of a sum with weights; in `dtype` throughout where it is given."""
    own = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = function(*own)
    weights = 1.5 + torch.linspace(0, 40, out.numel(), dtype=torch.float64).sin().view_as(out)
    (out.double() * weights).sum().backward()
    return [out.detach().double(), *(x.grad.double() for x in own if x is not None and x.grad is not None)]


@every_case
def test_float32(case: str, instruction_set: str) -> None:
    function, inputs = made(case, torch.float32)
    with unfused():
        right = results(function, inputs, torch.float64)
    found = results(function, inputs)
    assert len(found) == 1 + sum(x is not None for x in inputs)
    for mine, reference in zip(found, right, strict=True):
        assert_close(mine, reference, rtol=1e-4, atol=3e-6 * (1 + reference.abs().max().item()))


@every_case
def test_bfloat16_errs_no_more_than_pytorch(case: str, instruction_set: str) -> None:
    function, inputs = made(case, torch.bfloat16)
    with unfused():
        right = results(function, inputs, torch.float64)
        usual = results(function, inputs)
    for mine, theirs, reference in zip(results(function, inputs), usual, right, strict=True):
        scale = reference.norm() + 1e-9
        assert (mine - reference).norm() / scale < max(1.3 * (theirs - reference).norm() / scale, 0.6 * BF16_STEP)


@every_case
def test_bits_depend_on_no_number_of_threads(case: str) -> None:
    function, inputs = made(case, torch.bfloat16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = results(function, inputs)
    torch.set_num_threads(2)
    together = results(function, inputs)
    torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(alone, together, strict=True))


@every_case
def test_without_gradients_and_memory_in_another_order(case: str) -> None:
    function, inputs = made(case, torch.float32)
    right = results(function, inputs)[0]
    apart = [None if x is None else torch.stack([x, x], dim=-1)[..., 0] for x in inputs]
    assert any(x is not None and not x.is_contiguous() for x in apart)
    with torch.no_grad():
        assert_close(function(*apart).double(), right, rtol=1e-5, atol=1e-5)
    for mine, reference in zip(results(function, apart), results(function, inputs), strict=True):
        assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def test_gelu_everywhere(instruction_set: str) -> None:
    x = torch.linspace(-30, 30, 100_001)
    z = x[None, :, None].repeat(1, 1, 1).requires_grad_()
    y = bias_gelu(z.clone(), torch.zeros(1, 1))
    y.sum().backward()
    right = x.double().requires_grad_()
    expected = nn.functional.gelu(right)
    expected.sum().backward()
    assert_close(y.flatten().double(), expected, rtol=3e-7, atol=1e-6)
    assert z.grad is not None
    assert_close(z.grad.flatten().double(), right.grad, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_no_numbers_stay_so(dtype: torch.dtype, instruction_set: str) -> None:
    odd = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]], dtype=dtype)
    layer = nn.Linear(1, 4)
    layer.weight.data = odd.float().t()
    layer.bias.data.zero_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        relu = linear_relu(layer, torch.ones(1, 1))
    assert_close(relu, torch.tensor([[math.nan, math.inf, 0.0, 1.0]], dtype=dtype), equal_nan=True)
    gelu = bias_gelu(odd[None].clone(), torch.zeros(1, 4))[0, 0]
    assert gelu[0].isnan()
    assert gelu[1] == math.inf
    assert gelu[2].abs() < 1e-30
    assert Norm(4)(odd.clone()).isnan().all()


def test_pytorch_does_what_the_operators_cannot() -> None:
    x = torch.randn(4, 6)
    norm = Norm(6)
    right = norm(x)
    assert_close(norm.double()(x.double()).float(), right)
    norm.float()
    assert_close(torch.vmap(norm)(x), right)
    assert_close(torch.fx.symbolic_trace(_Traced())(x), torch.relu(_Traced().layer(x)))
    with torch.autocast("cpu", torch.float16):
        assert linear_relu(nn.Linear(6, 5), x).dtype is torch.float16
    square = nn.Linear(6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        crossed = cross_layer(x, square, x, x)  # the product is bf16, and the rest is not
    assert_close(crossed, x * square(x) + x, rtol=0.05, atol=0.05)
    with unfused():
        assert type(norm(x.requires_grad_()).grad_fn).__name__ == "NativeLayerNormBackward0"
        with unfused():
            pass
        assert type(norm(x).grad_fn).__name__ == "NativeLayerNormBackward0"
    assert type(norm(x).grad_fn).__name__ == "_NormBackward"


class _Traced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return linear_relu(self.layer, x)


def test_parameters_of_another_type_are_left_to_pytorch() -> None:
    x = torch.randn(3, 4, 6)
    low = x.bfloat16()
    assert_close(Norm(6).bfloat16()(low), nn.LayerNorm(6).bfloat16()(low))
    bare = nn.LayerNorm(6, elementwise_affine=False)
    with unfused():
        right = mix_norm(bare, x)
    assert_close(mix_norm(bare, x), right)
    bias = torch.randn(3, 6)
    assert_close(bias_gelu(low.clone(), bias.bfloat16()), bias_gelu(low.clone(), bias), rtol=0.02, atol=0.02)


def test_who_else_needs_what_is_used_up_is_refused() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    y = bias_gelu(x.exp(), torch.zeros(2, 4))  # exp needs its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nan_passes_through_the_gradient_of_relu() -> None:
    layer = nn.Linear(1, 3)
    layer.weight.data = torch.tensor([[math.nan], [1.0], [-1.0]])
    layer.bias.data.zero_()
    (linear_relu(layer, torch.ones(1, 1)) * 2).sum().backward()
    assert layer.bias.grad is not None
    assert layer.bias.grad.tolist() == [2.0, 2.0, 0.0]


def test_what_needs_no_gradient_gets_none() -> None:
    layer = nn.Linear(6, 6)
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 6, requires_grad=True)
    (linear_relu(layer, x) + cross_layer(x, layer, x, x)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    assert x.grad is not None


def test_what_is_attached_to_layers_is_called() -> None:
    mlp = MLP(6, (5, 4), dropout=0.0)
    norm = nn.LayerNorm(6)
    called: list[nn.Module] = []
    for layer in (mlp[0], norm):
        layer.register_forward_hook(lambda module, *_: called.append(module))
    x = torch.randn(3, 2, 6)
    right = mlp[3](mlp[0](x[0]).relu()).relu()
    called.clear()
    assert_close(mlp(x[0]), right)
    mix_norm(norm, x)
    assert called == [mlp[0], norm]
    mlp[0] = nn.Sequential(mlp[0])
    assert_close(mlp(x[0]), right)


@pytest.mark.parametrize(
    ("operator", "shapes", "told"),
    [
        ("relu_", [(0, 6)], "values expected, not [0, 6]"),
        ("relu_backward", [(4, 6), (4, 5)], "contiguous values of one shape and type expected"),
        ("bias_gelu_", [(3, 4, 6), (2, 6), False], "bias [3, 6] expected, not Float [2, 6]"),
        ("cross", [(4, 6), (4, 6), (4, 5)], "contiguous values of one shape and type expected"),
        ("norm", [(4, 6), None, (5,), (5,), 1e-5], "a contiguous float32 gain of 6 expected"),
        ("mix_norm", [(4, 2, 6), (6,), (6,), 1e-5], "tokens [T, B, D] with D a multiple of T expected"),
        ("wukong_norm", [(4, 12), (4, 6, 3), None, (6,), (6,), 1e-5], "3 tokens cannot be L + 2 + L"),
        ("wukong_norm", [(4, 12), (4, 5, 3), None, (6,), (6,), 1e-5], "fm [B, F * 6] and tokens [B, 6, N] expected"),
        ("wukong_norm", [(4, 12), (4, 6, 3), (4, 4, 6), (6,), (6,), 1e-5], "a residual [4, 5, 6] expected"),
    ],
)
def test_shapes_that_do_not_fit(operator: str, shapes: list[Any], told: str) -> None:
    inputs = [torch.zeros(shape) if isinstance(shape, tuple) else shape for shape in shapes]
    with pytest.raises(RuntimeError) as raised:
        getattr(torch.ops.recsys, operator)(*inputs)
    assert told in str(raised.value)


def test_types_that_do_not_fit() -> None:
    with pytest.raises(RuntimeError, match="float32 or bfloat16 expected, not Double"):
        torch.ops.recsys.relu_(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="no instructions mmx"):
        instructions("mmx")
