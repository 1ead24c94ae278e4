"""The layers of the inner loop, closed under differentiation: convolution, batch norm, max-pool and leaky ReLU.

The outer gradient of MAML differentiates the inner loop's gradients once more. PyTorch's own formulas for that second
derivative form the weight's gradient of a convolution with a filter as large as the map, batch norm's by 79 passes over
whole maps, and gradients that nobody needs. Here each gradient is one function whose own gradient is written out; a
third derivative is an error. Only what needs a gradient gets one, and what only the second derivative needs is computed
when that is formed, so first order and evaluation do not pay for it.

Convolution. y = w * x is linear in x and in w. With the inner product <g, y>, the input gradient B(g, w) and the weight
gradient C(g, x) are its adjoints: <g, w * x> = <B(g, w), x> = <C(g, x), w>. For the scalar
L = <u, B(g, w)> + <v, C(g, x)> these identities give every derivative as one of the three operations:

    dL/dg = w * u + v * x        dL/dx = B(g, v)        dL/dw = C(g, u)

Batch norm, pooling and activation, per channel with N values x. Mean m and variance s² of x are functions of x; let
a = (s² + eps)^-½, n = (x - m) a, and let the pool choose the places k. The output is f(w n[k] + b) with the leaky ReLU
f. With g the gradient in front of the activation, in the pooled map, and E the placing of pooled values at k:

    db = Σg      dw = Σ g n[k]      dx = w a (E g - (db + n dw) / N)

For the scalar L = <u, dx> + <v, dw> + <c, db>, let U = Σu, P = Σ u n and T = Σ u[k] g - (db U + dw P) / N. L depends
on x through n, with the direct derivative h = -w a dw u / N + e E g, where e = v - w a P / N, and through the factor a:
da/dx = -a² n / N. The normalisation turns h into a (h - mean(h) - n mean(h n)). Hence

    dL/dg = w a (u[k] - U / N) + e n[k] + c      dL/dw = a T
    dL/dx = a (h - mean(h) - n (mean(h n) + w a T / N))

where mean(h) = (e db - w a dw U / N) / N and mean(h n) = (e dw - w a dw P / N) / N. All passes over whole maps are two
sums, one weighted sum of u, x and 1, and one placing of pooled values.

Pooling comes before the activation, which is increasing: the values and gradients are those of pooling after it. It
also comes before the normalisation, whose slope w a may be negative: the caller turns the sign of such channels, in the
convolution's weights and in w. Where values tie, the first in row order takes the gradient, as in `max_pool2d`.

Maps are channels-last on the CPU, where these kernels are 1.1 to 15 times faster that way, and contiguous elsewhere.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

aten = torch.ops.aten

EPS = 1e-5
CACHED = 2**20  # values of a map that stay in a processor's cache from one operation to the next

Geometry = tuple[int, int, int]  # stride, padding, groups


def last_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse to record `backward`, also where, unlike with `once_differentiable`, few inputs' gradients are wanted."""

    @wraps(backward)
    def checked(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("the third derivative of a network with an inner loop is not implemented")
        return backward(ctx, *gradients)

    return checked


def on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def dense(x: Tensor) -> Tensor:
    """Return maps (n, C, H, W) in the memory order of this module."""
    return x.contiguous(memory_format=torch.channels_last if on_cpu(x) else torch.contiguous_format)


def rows(x: Tensor) -> Tensor:
    """View dense maps as one row of values per image."""
    return (x.permute(0, 2, 3, 1) if on_cpu(x) else x).flatten(1)


def per_channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


# --- convolution ---------------------------------------------------------------------------------------------------


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve maps (n, groups*in, H, W) with weights (groups*out, in, k, k)."""
    y: Tensor = Convolution.apply(dense(x), weight, bias, geometry)
    return y


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    stride, padding, groups = geometry
    return aten.convolution(x, weight, bias, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups)


def gradients(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: list[bool]) -> list[Tensor | None]:
    """Return those of B(g, weight), C(g, x) and the bias's gradient that are wanted; None in place of the others."""
    stride, padding, groups = geometry
    found = aten.convolution_backward(
        g, x, weight, [weight.shape[0]], [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, wanted
    )
    return [None if gradient is None else gradient.contiguous() if i else gradient for i, gradient in enumerate(found)]


class Convolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return convolve(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        return *ConvolutionBackward.apply(g, x, weight, ctx.geometry, list(ctx.needs_input_grad[:3])), None


class ConvolutionBackward(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: list[bool]) -> Any:
        g = dense(g)
        ctx.save_for_backward(g, x, weight)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return tuple(gradients(g, x, weight, geometry, wanted))

    @staticmethod
    @last_derivative
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, c: Tensor | None) -> tuple[Any, ...]:
        g, x, weight = ctx.saved_tensors
        u = None if u is None else dense(u)
        of_g = of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            if v is not None:
                of_g = convolve(x, v, c, ctx.geometry)
            elif c is not None:
                of_g = per_channel(c).expand_as(g).clone()
            if u is not None:
                through_weight = convolve(u, weight, None, ctx.geometry)
                of_g = through_weight if of_g is None else of_g.add_(through_weight)
        if ctx.needs_input_grad[1] and v is not None:
            of_x = gradients(g, x, v, ctx.geometry, [True, False, False])[0]
        if ctx.needs_input_grad[2] and u is not None:
            of_weight = gradients(g, u, weight, ctx.geometry, [False, True, False])[1]
        return of_g, of_x, of_weight, None, None


# --- batch norm, pooling and activation ----------------------------------------------------------------------------


def conv_norm_activate(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    geometry: Geometry,
    weight: Tensor,
    bias: Tensor,
    slope: float = 1.0,
    pool: bool = False,
) -> Tensor:
    """A convolution, batch norm by the maps' own statistics, a 2x2 max-pool if wanted, and a leaky ReLU.

    A slope of 1 is no activation.
    """
    if pool:
        sign = torch.ones_like(weight).copysign_(weight.detach())
        conv_weight, weight = conv_weight * sign.view(-1, 1, 1, 1), weight * sign
        conv_bias = None if conv_bias is None else conv_bias * sign
    y = dense(conv2d(x, conv_weight, conv_bias, geometry))
    out: Tensor = NormActivate.apply(y, weight, bias, slope, pool, torch.is_grad_enabled())
    return out


def weighted_sum(
    shift: Tensor, *terms: tuple[Tensor, Tensor], placed: tuple[Tensor | None, Tensor, Tensor] | None = None
) -> Tensor:
    """Return dense maps shift + Σ factor * map, where the shift and the factors are per channel.

    `placed` = (place, factor, values) adds factor * values at the places that `largest` found. The CPU does a few
    images after the other, so that each stays in its cache.
    """
    first = terms[0][1]
    total = torch.empty_like(first)
    images = max(CACHED // first[0].numel(), 1) if on_cpu(first) else len(first)
    for start in range(0, len(first), images):
        part = slice(start, start + images)
        before, out = per_channel(shift), total[part]
        for factor, x in terms:
            before = torch.addcmul(before, per_channel(factor), x[part], out=out)
        if placed is not None:
            place, factor, values = placed
            if place is None:
                out.addcmul_(per_channel(factor), values[part])
            else:
                rows(out).scatter_add_(1, place[part], rows(per_channel(factor) * values[part]))
    return total


def wide(x: Tensor) -> Tensor:
    """View dense maps (n, C, H, W) of the CPU as (n, W*C, H, 1).

    PyTorch adds up channels-last maps one by one, and the rounding error grows with the number of values per channel.
    """
    return x.permute(0, 2, 3, 1).flatten(2).unsqueeze(2).permute(0, 3, 1, 2)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each channel of dense maps."""
    if not on_cpu(x):
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return mean, variance
    means, variances = (m.view(-1, x.shape[1]) for m in aten.batch_norm_update_stats(wide(x), None, None, 0.0))
    mean = means.mean(0)
    return mean, variances.add_((means - mean).square_()).mean(0)


def sums(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return per channel Σ g (x - mean) scale and Σ g of dense maps, in one pass over them."""
    wanted, channels = [False, True, True], g.shape[1]
    if on_cpu(g):
        mean, scale = (values.expand(g.shape[3], channels).flatten() for values in (mean, scale))
        g, x = wide(g), wide(x)
    dw, db = aten.native_batch_norm_backward(g, x, None, None, None, mean, scale, True, EPS, wanted)[1:]
    return (dw.view(-1, channels).sum(0), db.view(-1, channels).sum(0)) if on_cpu(g) else (dw, db)


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 2x2 max-pool of dense maps and where in its row of values each maximum is, one row per image."""
    pooled, place = aten.max_pool2d_with_indices(x, [2, 2])
    c, h, w = x.shape[1:]
    if on_cpu(x):
        return pooled, rows(torch.add(torch.arange(c).view(-1, 1, 1), place, alpha=c))
    return pooled, rows(place + torch.arange(0, c * h * w, h * w, device=x.device).view(-1, 1, 1))


def pick(x: Tensor, place: Tensor | None, like: Tensor) -> Tensor:
    """Return the values of dense maps at the places that `largest` found, in the shape of `like`."""
    if place is None:
        return x
    n, c, h, w = like.shape
    values = rows(x).gather(1, place)
    return values.view(n, h, w, c).permute(0, 3, 1, 2) if on_cpu(x) else values.view_as(like)


class NormActivate(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        slope: float,
        pool: bool,
        graph: bool,
    ) -> Any:
        graph = graph and any(ctx.needs_input_grad)
        mean, variance = moments(x)
        scale = (variance + EPS).rsqrt_()
        pooled, place = (largest(x) if graph else (F.max_pool2d(x, 2), None)) if pool else (x, None)
        factor = weight * scale
        out = weighted_sum(torch.addcmul(bias, factor, mean, value=-1), (factor, pooled))
        if slope != 1:
            F.leaky_relu_(out, slope)
        if graph:
            ctx.save_for_backward(x, weight, mean, scale, pooled, place, out if slope != 1 else None)
            ctx.slope = slope
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, weight, *saved = ctx.saved_tensors
        found = NormActivateBackward.apply(g, x, weight, *saved, ctx.slope, ctx.needs_input_grad[0])
        return *found, None, None, None


class NormActivateBackward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        scale: Tensor,
        pooled: Tensor,
        place: Tensor | None,
        out: Tensor | None,
        slope: float,
        wanted: bool,
    ) -> Any:
        g = dense(g)
        if out is not None:
            g = aten.leaky_relu_backward(g, out, slope, True)
        dw, db = sums(g, pooled, mean, scale)
        dx = None
        if wanted:
            factor = weight * scale
            share = factor * (-x.shape[1] / x.numel())
            of_x = share * scale * dw
            of_1 = torch.addcmul(share * db, of_x, mean, value=-1)
            dx = weighted_sum(of_1, (of_x, x), placed=(place, factor, g))
        ctx.save_for_backward(g, x, weight, mean, scale, pooled, place, out, dw, db)
        ctx.slope = slope
        ctx.set_materialize_grads(False)
        return dx, dw, db

    @staticmethod
    @last_derivative
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, c: Tensor | None) -> tuple[Any, ...]:
        g, x, weight, mean, scale, pooled, place, out, dw, db = ctx.saved_tensors
        u = torch.zeros_like(x) if u is None else dense(u)
        n = x.numel() / x.shape[1]
        at_places = pick(u, place, pooled)
        p, s = sums(u, x, mean, scale)
        t = sums(g, at_places, torch.zeros_like(mean), torch.ones_like(mean))[0]
        t = t.add_(torch.addcmul(db * s, dw, p), alpha=-1 / n)
        factor = weight * scale
        share = factor / -n
        e = share * p if v is None else torch.addcmul(v, share, p)
        h_u = share * dw
        of_x = of_g = None
        if ctx.needs_input_grad[1]:
            of_mean = scale / -n
            by_x = of_mean * scale * torch.addcmul(e * dw, h_u, p).addcmul_(factor, t)
            shift = torch.addcmul(of_mean * torch.addcmul(e * db, h_u, s), by_x, mean, value=-1)
            of_x = weighted_sum(shift, (scale * h_u, u), (by_x, x), placed=(place, scale * e, g))
        if ctx.needs_input_grad[0]:
            by_pooled = e * scale
            shift = share * s if c is None else torch.addcmul(c, share, s)
            shift = shift.addcmul_(by_pooled, mean, value=-1)
            of_g = weighted_sum(shift, (factor, at_places), (by_pooled, pooled))
            if out is not None:
                of_g = aten.leaky_relu_backward(of_g, out, ctx.slope, True)
        return of_g, of_x, scale * t, *(None,) * 7


# --- pooling and activation alone ----------------------------------------------------------------------------------


def max_pool_2x2(x: Tensor) -> Tensor:
    """Halve maps by the maximum of each 2x2 square; an odd last row or column is left out."""
    x = dense(x)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return F.max_pool2d(x, 2)
    with torch.no_grad():
        pooled, place = largest(x)
    return Pick.apply(x, place, pooled)


class Pick(Function):
    """The values of maps at given places; and its adjoint, `Place`. Both are linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, like: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.shape = x.shape
        return pick(x, place, like)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return Place.apply(g, *ctx.saved_tensors, ctx.shape), None, None


class Place(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, place: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(place, g)
        maps = dense(g.new_zeros(shape))
        rows(maps).scatter_(1, place, rows(dense(g)))
        return maps

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        return Pick.apply(dense(u), *ctx.saved_tensors), None, None


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """The leaky ReLU, whose second derivative is zero and costs nothing."""
    out: Tensor = LeakyReLU.apply(x, F.leaky_relu(x.detach(), slope), slope)
    return out


class LeakyReLU(Function):
    """Multiply x by 1 or `slope`, by the sign of `out`; linear in x, so its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(out)
        ctx.slope = slope
        return aten.leaky_relu_backward(x, out, slope, True)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return LeakyReLU.apply(g, *ctx.saved_tensors, ctx.slope), None, None
