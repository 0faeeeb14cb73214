"""What stands between matrix products, in one pass over memory each where a CPU has our operators for it.

On a CPU whose matrix products are fast, a step is mostly this. Elsewhere, and in what is traced by torch.fx or
torch.jit, exported, compiled or vmapped, PyTorch's own operators do it, and give the same to rounding. Ours have first
derivatives alone: for second ones, or forward mode, see `unfused`.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from recsys.native import available

_allowed = ContextVar("fused", default=True)
_DTYPES = (torch.float32, torch.bfloat16)
"""What the operators take."""


@contextmanager
def unfused() -> Iterator[None]:
    """Leave everything to PyTorch, whatever is there: what others' trainers are made of."""
    before = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(before)


def linear_relu(layer: nn.Linear, x: Tensor) -> Tensor:
    """ReLU(x W^T + b), for x [B, in] and a layer that has a bias."""
    dtype = _product_dtype(x)
    if not _fits(x) or x.dim() != 2 or dtype not in _DTYPES or _hooked(layer):
        return functional.relu(layer(x))
    return _apply(_LinearReLU, x.to(dtype), layer.weight.to(dtype), layer.bias)


def bias_gelu(z: Tensor, bias: Tensor) -> Tensor:
    """GELU(z + b), for z [T, B, N] and a bias [T, N].

    z is used up: nothing else may need it.
    """
    if not _fits(z) or not _in_float32(bias):
        return functional.gelu(z + bias.unsqueeze(1).to(z.dtype))
    return _apply(_BiasGELU, z, bias)


def cross_layer(x0_BK: Tensor, layer: nn.Linear, h: Tensor, x_BK: Tensor) -> Tensor:
    """x_0 * (h W^T + b) + x, for a layer that has a bias; h is x itself or a projection of it."""
    dtype = _product_dtype(h)
    if not _fits(x0_BK, x_BK) or not _fits(h) or dtype != x0_BK.dtype or _hooked(layer):
        return x0_BK * layer(h) + x_BK
    return _apply(_CrossLayer, x0_BK, x_BK, h.to(dtype), layer.weight.to(dtype), layer.bias)


class Norm(nn.LayerNorm):
    """LayerNorm over the last axis, of x or of x + residual."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise [..., width]."""
        if _fits(x) and (residual is None or _fits(x, residual)) and _in_float32(self.weight, self.bias):
            return _apply(_Norm, x, residual, self.weight, self.bias, self.eps)
        return super().forward(x if residual is None else x + residual)


def mix_norm(norm: nn.LayerNorm, x_TBD: Tensor) -> Tensor:
    """LN(Mix(X) + X) over D, for tokens [T, B, D].

    Token h of Mix(X) is the concatenation over t of head h of x_t, each x_t split in T heads of D / T.
    """
    if _fits(x_TBD) and _in_float32(norm.weight, norm.bias) and not _hooked(norm):
        return _apply(_MixNorm, x_TBD, norm.weight, norm.bias, norm.eps)
    num_tokens = x_TBD.shape[0]
    # Heads become tokens and tokens heads: [T, B, heads, D / T], T heads.
    mixed_TBD = torch.unflatten(x_TBD, 2, (num_tokens, -1)).transpose(0, 2).flatten(2)
    return norm(mixed_TBD + x_TBD)


def wukong_norm(norm: nn.LayerNorm, fm_BN: Tensor, tokens_BDT: Tensor, x_BTD: Tensor | None) -> Tensor:
    """LN(concat(FM, L) + R) over D, [B, n_F + n_L, D], for FM [B, n_F * D] and L [B, D, n_L].

    R is x [B, n_F + n_L, D]. Without x, it is the last n_F + n_L tokens of [B, D, n_L + n_F + n_L], behind L.
    """
    more = (tokens_BDT,) if x_BTD is None else (tokens_BDT, x_BTD)
    alike = all(_fits(each) and each.dtype == fm_BN.dtype for each in (fm_BN, *more))
    if alike and _in_float32(norm.weight, norm.bias) and not _hooked(norm):
        return _apply(_WukongNorm, fm_BN, tokens_BDT, x_BTD, norm.weight, norm.bias, norm.eps)
    fm_BTD = torch.unflatten(fm_BN, 1, (-1, tokens_BDT.shape[1]))
    linear_BTD = tokens_BDT.transpose(1, 2)
    if x_BTD is None:
        num_linear = (linear_BTD.shape[1] - fm_BTD.shape[1]) // 2
        linear_BTD, x_BTD = linear_BTD[:, :num_linear], linear_BTD[:, num_linear:]
    return norm(torch.cat([fm_BTD, linear_BTD], dim=1) + x_BTD)


def transposed(x_BTD: Tensor) -> Tensor:
    """[B, D, T], contiguous."""
    return _apply(_Transposed, x_BTD) if _fits(x_BTD) else x_BTD.transpose(1, 2).contiguous()


def _fits(x: Tensor, *like: Tensor) -> bool:
    """Whether the operators take these tensors, of which all must be as the first is."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[no-untyped-call]
        and not torch._C._are_functorch_transforms_active()
        and _allowed.get()
        and type(x) in (Tensor, nn.Parameter)  # no proxy of torch.fx, and nothing that only looks like one
        and x.device.type == "cpu"
        and x.dtype in _DTYPES
        and x.numel() > 0
        and all(each.dtype == x.dtype and each.shape == x.shape for each in like)
        and available("fused")
    )


def _in_float32(*parameters: Tensor | None) -> bool:
    """Whether all are there, and as the operators take parameters."""
    return all(parameter is not None and parameter.dtype is torch.float32 for parameter in parameters)


def _hooked(module: nn.Module) -> bool:
    """Whether it must be called for what others have attached to it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _product_dtype(x: Tensor) -> torch.dtype:
    """What a product of x comes in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


@functools.cache
def _adds_bias() -> bool:
    """Whether oneDNN multiplies bf16 here, and adds a bias on its way: PyTorch's addmm first copies it to all rows."""
    return bool(hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return x W^T + b, of x and W in one type."""
    bias = bias.to(x.dtype)
    if x.dtype is torch.bfloat16 and _adds_bias():
        # It has a ReLU too, which makes 0 of NaN.
        z: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return z
    return functional.linear(x, weight, bias)


def _by_product(
    by_z: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and W in x W^T, those that are needed."""
    return by_z @ weight if of_x else None, by_z.t() @ x if of_weight else None


def _apply(function: Any, *inputs: Any) -> Tensor:
    """Apply an autograd function, or its forward alone where there is nothing to differentiate."""
    inputs = tuple(each.contiguous() if isinstance(each, Tensor) else each for each in inputs)
    out: Tensor = function.apply(*inputs) if torch.is_grad_enabled() else function.forward(None, *inputs)
    return out


class _LinearReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = torch.ops.recsys.relu_(_linear(x, weight, bias))
        if ctx is not None:
            ctx.save_for_backward(x, weight, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        by_z, by_bias = torch.ops.recsys.relu_backward(grad.contiguous(), out)
        return *_by_product(by_z, x, weight, *ctx.needs_input_grad[:2]), by_bias


class _BiasGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: Tensor) -> Tensor:
        # Slopes take the place of z: what backward needs is found once, and in memory that is there already.
        out: Tensor = torch.ops.recsys.bias_gelu_(z, bias, ctx is not None)
        if ctx is not None:
            torch.autograd.graph.increment_version(z)  # so that autograd refuses, should someone else need it
            ctx.save_for_backward(z, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.recsys.gelu_backward(grad.contiguous(), *ctx.saved_tensors)


class _CrossLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x0: Tensor, x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = _linear(h, weight, bias)
        if ctx is not None:
            ctx.save_for_backward(x0, h, weight, z)
        return torch.ops.recsys.cross(x0, z, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x0, h, weight, z = ctx.saved_tensors
        by_x0, by_z, by_bias = torch.ops.recsys.cross_backward(grad.contiguous(), x0, z)
        return by_x0, grad, *_by_product(by_z, h, weight, *ctx.needs_input_grad[2:4]), by_bias


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
        if ctx is not None:
            ctx.eps = eps
            ctx.save_for_backward(x, residual, gain)
        return torch.ops.recsys.norm(x, residual, gain, shift, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_x, by_gain, by_shift = torch.ops.recsys.norm_backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps)
        return by_x, by_x if ctx.needs_input_grad[1] else None, by_gain, by_shift, None


class _MixNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
        if ctx is not None:
            ctx.eps = eps
            ctx.save_for_backward(x, gain)
        return torch.ops.recsys.mix_norm(x, gain, shift, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.recsys.mix_norm_backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps), None


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.ops.recsys.transposed(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.ops.recsys.transposed(grad.contiguous())


class _WukongNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fm: Tensor, tokens: Tensor, x: Tensor | None, gain: Tensor, shift: Tensor, eps: float
    ) -> Tensor:
        if ctx is not None:
            ctx.eps = eps
            ctx.save_for_backward(fm, tokens, x, gain)
        return torch.ops.recsys.wukong_norm(fm, tokens, x, gain, shift, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        fm, tokens, x, gain = ctx.saved_tensors
        back = torch.ops.recsys.wukong_norm_backward(grad.contiguous(), fm, tokens, x, gain, ctx.eps)
        by_fm, by_tokens, by_x, by_gain, by_shift = back
        return by_fm, by_tokens, None if x is None else by_x, by_gain, by_shift, None
