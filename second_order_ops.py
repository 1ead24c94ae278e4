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

where mean(h) = (e db - w a dw U / N) / N and mean(h n) = (e dw - w a dw P / N) / N.

Pooling comes before the activation, which is increasing: the values and gradients are those of pooling after it. Where
values tie, the first in row order takes the gradient, as in `max_pool2d`.

A CPU is limited by the bytes that it moves: `NormActivate` is the whole block, maps are channels-last (these kernels
are 1.1 to 15 times faster that way), and all passes over whole maps are two sums, one weighted sum of u, x and 1, and
one placing of pooled values. Pooling comes before the normalisation too, whose slope w a may be negative: such channels
change their sign, in the convolution's weights and in w. A GPU is limited by the number of calls on small maps: there
batch norm, pooling and activation are functions of their own with PyTorch's kernels, each a call or two. With the
projection R(z) = a (z - mean(z) - n mean(z n)), which is batch norm's gradient for w = 1, and k = -w a / N:

    dL/dg = w R(u) + v n + c      dL/dw = Σ R(u) g = t      dL/dx = R(k dw u + (v + k P) g) + k t n
"""

from collections.abc import Callable, Sequence
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
    """View dense maps as rows of values in which `max_pool2d` finds its places: one per image or, on a GPU, per map."""
    return x.permute(0, 2, 3, 1).flatten(1) if on_cpu(x) else x.flatten(2)


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


# --- a whole block -------------------------------------------------------------------------------------------------


def conv_norm_activate(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    geometry: Geometry,
    weight: Tensor,
    bias: Tensor,
    slope: float = 1.0,
    pool: bool = False,
    seen: list[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """A convolution, batch norm by the maps' own statistics, a 2x2 max-pool if wanted, and a leaky ReLU.

    A slope of 1 is no activation. Each channel's mean and unbiased variance are appended to `seen`.
    """
    sign = None
    if pool and on_cpu(x):
        sign = torch.ones_like(weight).copysign_(weight.detach())
        conv_weight, weight = conv_weight * sign.view(-1, 1, 1, 1), weight * sign
        conv_bias = None if conv_bias is None else conv_bias * sign
    y = dense(conv2d(x, conv_weight, conv_bias, geometry))
    if on_cpu(x):
        out, mean, scale = NormActivate.apply(y, weight, bias, slope, pool, torch.is_grad_enabled())
    else:
        out, mean, scale = BatchNorm.apply(y, weight, bias)
        out = max_pool_2x2(out) if pool else out
        out = out if slope == 1 else leaky_relu(out, slope)
    if seen is not None:
        n = y.numel() / y.shape[1]
        seen.append((mean if sign is None else mean * sign, (scale**-2 - EPS) * (n / (n - 1))))
    return out


def weighted_sum(
    shift: Tensor, *terms: tuple[Tensor, Tensor], placed: tuple[Tensor | None, Tensor, Tensor] | None = None
) -> Tensor:
    """Return dense maps shift + Σ factor * map, where the shift and the factors are per channel.

    `placed` = (place, factor, values) adds factor * values at the places that `largest` found. The sum is formed for a
    few images at a time, which stay in the processor's cache meanwhile.
    """
    first = terms[0][1]
    total = torch.empty_like(first)
    images = max(CACHED // first[0].numel(), 1)
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
    """View channels-last maps (n, C, H, W) as (n, W*C, H, 1).

    PyTorch adds up channels-last maps one by one, and the rounding error grows with the number of values per channel.
    """
    return x.permute(0, 2, 3, 1).flatten(2).unsqueeze(2).permute(0, 3, 1, 2)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each channel of channels-last maps."""
    means, variances = (m.view(-1, x.shape[1]) for m in aten.batch_norm_update_stats(wide(x), None, None, 0.0))
    mean = means.mean(0)
    return mean, variances.add_((means - mean).square_()).mean(0)


def sums(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return per channel Σ g (x - mean) scale and Σ g of channels-last maps, in one pass over them."""
    wanted, channels = [False, True, True], g.shape[1]
    mean, scale = mean.repeat(g.shape[3]), scale.repeat(g.shape[3])  # the kernel reads them one after the other
    found = aten.native_batch_norm_backward(wide(g), wide(x), None, None, None, mean, scale, True, EPS, wanted)
    dw, db = (per_column.view(-1, channels).sum(0) for per_column in found[1:])
    return dw, db


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
        """`graph`: whether the caller records one; inside a function that cannot be seen."""
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
        ctx.mark_non_differentiable(mean, scale)
        ctx.set_materialize_grads(False)
        return out, mean, scale

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Any, ...]:
        if g is None:
            return (None,) * 6
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
        at_places = u if place is None else pick(u, place, pooled.shape)
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


# --- batch norm, pooling and activation alone ----------------------------------------------------------------------


class BatchNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        y, mean, scale = aten.native_batch_norm(x, weight, bias, None, None, True, 0.0, EPS)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.mark_non_differentiable(mean, scale)
        ctx.set_materialize_grads(False)
        return y, mean, scale

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> Any:
        return (None,) * 3 if g is None else BatchNormBackward.apply(g, *ctx.saved_tensors)


class BatchNormBackward(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor) -> Any:
        g = dense(g)
        dx, dw, db = normalised(g, x, weight, mean, scale)
        ctx.save_for_backward(g, x, weight, mean, scale, dw)
        ctx.set_materialize_grads(False)
        return dx, dw, db

    @staticmethod
    @last_derivative
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, c: Tensor | None) -> tuple[Any, ...]:
        g, x, weight, mean, scale, dw = ctx.saved_tensors
        u = torch.zeros_like(x) if u is None else dense(u)
        ones = torch.ones_like(weight)  # without a weight, CUDA's kernel has nothing to allocate its gradient like
        projected, p, _ = normalised(u, x, ones, mean, scale)
        t = (projected * g).sum((0, 2, 3))
        of_g = projected.mul_(per_channel(weight))
        if v is not None or c is not None:
            of_g += aten.native_batch_norm(
                x, torch.zeros_like(weight) if v is None else v, c, None, None, True, 0.0, EPS
            )[0]
        k = weight * scale * (-x.shape[1] / x.numel())
        e = k * p if v is None else torch.addcmul(v, k, p)
        h = torch.addcmul(per_channel(e) * g, per_channel(k * dw), u)
        of_x = normalised(h, x, ones, mean, scale)[0]
        of_x += aten.native_batch_norm(x, k * t, None, None, None, True, 0.0, EPS)[0]
        return of_g, of_x, t, None, None


def normalised(g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return batch norm's gradients by the maps x, its weight and its bias."""
    gradients: tuple[Tensor, Tensor, Tensor] = aten.native_batch_norm_backward(
        g, x, weight, None, None, mean, scale, True, EPS, [True, True, True]
    )
    return gradients


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 2x2 max-pool of dense maps and where in `rows` each maximum is."""
    pooled, place = aten.max_pool2d_with_indices(x, [2, 2])
    if on_cpu(x):
        channels = x.shape[1]
        place = torch.add(torch.arange(channels).view(-1, 1, 1), place, alpha=channels)
    return pooled, rows(place)


def pick(x: Tensor, place: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the values of dense maps at the places that `largest` found, as maps of a shape."""
    n, c, h, w = shape
    values = rows(x).gather(-1, place)
    return values.view(n, h, w, c).permute(0, 3, 1, 2) if on_cpu(x) else values.view(shape)


def max_pool_2x2(x: Tensor) -> Tensor:
    """Halve maps by the maximum of each 2x2 square; an odd last row or column is left out."""
    x = dense(x)
    pooled: Tensor = MaxPool.apply(x) if torch.is_grad_enabled() and x.requires_grad else F.max_pool2d(x, 2)
    return pooled


class MaxPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        pooled, place = largest(x)
        ctx.save_for_backward(place)
        ctx.shape = x.shape
        return pooled

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return Place.apply(g, *ctx.saved_tensors, ctx.shape)


class Place(Function):
    """Pooled values put where they were found, zeros elsewhere; linear, with picking as its adjoint."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, place: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(place)
        ctx.shape = g.shape
        maps = dense(g.new_zeros(shape))
        rows(maps).scatter_(-1, place, rows(dense(g)))
        return maps

    @staticmethod
    @last_derivative
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        (place,) = ctx.saved_tensors
        return pick(dense(u), place, ctx.shape), None, None


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """The leaky ReLU, whose second derivative is zero and costs nothing."""
    out: Tensor = LeakyReLU.apply(x, None, slope)
    return out


class LeakyReLU(Function):
    """The activation of x; or, by the signs of its values `out`, its gradient x, which is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor | None, slope: float) -> Tensor:
        made = F.leaky_relu(x, slope) if out is None else aten.leaky_relu_backward(x, out, slope, True)
        ctx.save_for_backward(made if out is None else out)
        ctx.slope = slope
        return made

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return LeakyReLU.apply(g, *ctx.saved_tensors, ctx.slope), None, None
