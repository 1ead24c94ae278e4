"""First and second derivatives against finite differences and PyTorch's own; ties; what is stored and computed."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from second_order_ops import (
    Geometry,
    conv2d,
    conv_norm_activate,
    dense,
    largest,
    leaky_relu,
    max_pool_2x2,
    moments,
    rows,
)


@pytest.fixture(params=["CPU", "GPU"], autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs both forms of the operations, that for a GPU on the CPU."""
    if request.param == "GPU":
        monkeypatch.setattr("second_order_ops.on_cpu", lambda _: False)
    return str(request.param)


def made(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype).requires_grad_()


def assert_both_derivatives(function: Any, *tensors: Tensor) -> None:
    """Compare with finite differences along random directions; those of each gradient alone, and of all together."""

    def gradients(g: Tensor, *inputs: Tensor) -> Tensor:
        found = torch.autograd.grad(function(*inputs), inputs, g, create_graph=True)
        return torch.cat([gradient.flatten() for gradient in found])

    g = torch.rand_like(function(*tensors)).requires_grad_()
    assert gradcheck(function, tensors, fast_mode=True) and gradgradcheck(function, tensors, fast_mode=True)
    assert gradcheck(gradients, (g, *tensors), fast_mode=True)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    scale: Tensor,
    shift: Tensor,
    slope: float,
    pool: bool,
) -> Tensor:
    stride, padding, groups = geometry
    y = F.conv2d(x, weight, bias, stride, padding, groups=groups)
    y = F.leaky_relu(F.batch_norm(y, None, None, scale, shift, training=True), slope)
    return F.max_pool2d(y, 2) if pool else y


def block(*inputs: Any) -> Tensor:
    return conv_norm_activate(*inputs)


def block_inputs(groups: int = 1, channels: int = 2, dtype: torch.dtype = torch.float64, size: int = 7) -> list[Tensor]:
    """Images, weights, scale (one of each sign) and shift of a block with 3 outputs per group."""
    out = 3 * groups
    scale = torch.linspace(-1.5, 2.0, out, dtype=dtype).requires_grad_()
    return [
        made(2, groups * channels, size, size - 1, dtype=dtype),
        made(out, channels, 3, 3, dtype=dtype),
        scale,
        made(out, dtype=dtype),
    ]


@pytest.mark.usefixtures("no_coverage")
@pytest.mark.parametrize(
    ("size", "stride", "padding", "groups"), [(3, 1, 1, 1), (3, 2, 1, 2), (3, 1, 0, 3), (1, 1, 0, 1), (1, 1, 0, 2)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_convolution_has_both_derivatives(size: int, stride: int, padding: int, groups: int, bias: bool) -> None:
    tensors = [made(2, 2 * groups, 5, 4), made(3 * groups, 2, size, size), *([made(3 * groups)] if bias else [])]

    def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return conv2d(x, weight, bias, (stride, padding, groups))

    expected = F.conv2d(tensors[0], tensors[1], tensors[2] if bias else None, stride, padding, groups=groups)
    torch.testing.assert_close(convolution(*tensors), expected)
    assert_both_derivatives(convolution, *tensors)


@pytest.mark.usefixtures("no_coverage")
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("slope", [1.0, 0.1])
@pytest.mark.parametrize("groups", [1, 2])
def test_block_has_both_derivatives(slope: float, pool: bool, groups: int) -> None:
    """Odd height, scales of both signs, inputs that are not contiguous."""
    inputs = block_inputs(groups, size=5)

    def function(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
        return block(x, weight, None, (1, 1, groups), scale, shift, slope, pool)

    x, weight, scale, shift = inputs
    expected = reference(x, weight, None, (1, 1, groups), scale, shift, slope, pool)
    torch.testing.assert_close(function(*inputs), expected)
    assert_both_derivatives(function, *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["Conv4", "Conv4 at an odd size", "ResNet-12", "shortcut", "strided"])
def test_outer_gradient_through_an_inner_step_equals_pytorch(form: str, dtype: torch.dtype) -> None:
    """Two blocks, one gradient step on their weights, the gradient of what comes after it; per task in groups."""
    pool, kernel, stride = form.startswith("Conv4"), 1 if form == "shortcut" else 3, 2 if form == "strided" else 1
    geometry = (stride, kernel // 2, 2)
    x = made(4, 6, *((21, 23) if "odd" in form else (20, 20)), dtype=dtype).detach()
    start = [made(10, 3, kernel, kernel, dtype=dtype), made(10, 5, kernel, kernel, dtype=dtype)]
    scales, shifts = [made(10, dtype=dtype), made(11, dtype=dtype)[:10]], [made(12, dtype=dtype)[:10]] * 2

    def outer(layer: Any) -> tuple[Tensor, ...]:
        def loss(weights: list[Tensor]) -> Tensor:
            y = x
            for weight, scale, shift in zip(weights, scales, shifts, strict=True):
                y = layer(y, weight, None, geometry, scale, shift, 0.1, pool)
            return y.flatten(1).softmax(1).square().sum()

        inner = torch.autograd.grad(loss(start), start, create_graph=True)
        moved = [weight - 0.3 * gradient for weight, gradient in zip(start, inner, strict=True)]
        return torch.autograd.grad(loss(moved), [*start, *scales])

    rtol, atol = (1e-8, 1e-12) if dtype == torch.float64 else (1e-3, 1e-6)
    for ours, expected in zip(outer(block), outer(reference), strict=True):
        torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("pool", [False, True])
def test_a_block_of_one_channel_has_both_derivatives(pool: bool) -> None:
    inputs = made(2, 1, 5, 4), made(1, 1, 3, 3), made(1), made(1)
    assert_both_derivatives(lambda x, w, *norm: block(x, w, None, (1, 1, 1), *norm, 0.1, pool), *inputs)


def test_statistics_in_float32_are_as_precise_as_pytorchs_contiguous_ones() -> None:
    """PyTorch's channels-last kernels add up values one by one; over 90,000 of them that costs two digits."""
    x = made(40, 2, 48, 47, dtype=torch.float32).detach() + 2
    mean, variance = moments(dense(x))
    exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close((variance.double(), mean.double()), exact, rtol=3e-7, atol=0)


def test_a_bias_in_front_of_batch_norm_has_a_zero_gradient() -> None:
    x, weight, scale, shift = block_inputs()
    bias = made(3)
    out = block(x, weight, bias, (1, 1, 1), scale, shift, 0.1, True)
    (gradient,) = torch.autograd.grad(out.square().sum(), bias, create_graph=True)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_ties_go_where_max_pool2d_sends_them(layout: torch.memory_format) -> None:
    """Few values, so that most squares hold their maximum more than once; and a uniform image."""
    x = torch.randint(0, 3, (3, 4, 9, 8), generator=torch.Generator().manual_seed(0)).double()
    x[0] = 1.0
    x = x.contiguous(memory_format=layout).requires_grad_()
    weight = torch.arange(192, dtype=torch.float64).view(3, 4, 4, 4) + 1
    assert torch.equal(max_pool_2x2(x), F.max_pool2d(x, 2))
    ours, expected = (
        torch.autograd.grad((pool * weight).sum(), x)[0] for pool in (max_pool_2x2(x), F.max_pool2d(x, 2))
    )
    assert torch.equal(ours, expected)


def test_a_block_sends_the_gradient_of_a_uniform_image_where_pytorch_does() -> None:
    _, weight, scale, shift = block_inputs()
    x = torch.zeros(2, 2, 8, 8, dtype=torch.float64)
    x[1] = torch.randint(0, 2, (2, 8, 8), generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    found = [
        torch.autograd.grad(layer(x, weight, None, (1, 1, 1), scale, shift, 0.1, True).square().sum(), [x, weight])
        for layer in (block, reference)
    ]
    torch.testing.assert_close(*found)


def test_pooling_and_activation_alone_have_both_derivatives() -> None:
    assert_both_derivatives(max_pool_2x2, made(2, 3, 5, 4))
    assert_both_derivatives(lambda x: leaky_relu(x, 0.1), made(3, 4))
    x = made(3, 4)
    assert torch.equal(leaky_relu(x, 0.1), F.leaky_relu(x, 0.1))


def test_a_third_derivative_is_an_error() -> None:
    x, weight, scale, shift = block_inputs()
    loss = block(x, weight, None, (1, 1, 1), scale, shift, 0.1, True).pow(3).sum()
    (inner,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(inner.square().sum(), weight, create_graph=True)


def operations(function: Any) -> list[str]:
    """The names of the PyTorch operations that `function` runs."""
    with torch.profiler.profile() as profile:
        function()
    return [event.name for event in profile.events() if event.name.startswith("aten::")]


def test_nothing_is_computed_that_nobody_needs() -> None:
    """No places of maxima without a graph, no gradient of images, no second-derivative terms in first order."""
    x, weight, scale, shift = block_inputs(dtype=torch.float32)
    images = x.detach()

    def forward() -> Tensor:
        return block(images, weight, None, (1, 1, 1), scale, shift, 0.1, True)

    with torch.no_grad():
        assert "aten::arange" not in operations(forward)
    out = forward()
    first = operations(lambda: torch.autograd.grad(out.sum(), weight, retain_graph=True))
    assert first.count("aten::convolution_backward") == 1 and "aten::gather" not in first
    (gradient,) = torch.autograd.grad(out.sum(), weight, create_graph=True)
    second = operations(lambda: torch.autograd.grad(gradient.square().sum(), weight))
    assert second.count("aten::convolution") == 1  # of the images with the weight's gradient
    assert second.count("aten::convolution_backward") == 1  # to the weight, from both uses of its maps


def test_saved_tensors_survive_a_checkpoint() -> None:
    inputs = block_inputs()

    def outer(wrap: Any) -> tuple[Tensor, ...]:
        def inner(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            loss = block(x, weight, None, (1, 1, 1), scale, shift, 0.1, True).square().sum()
            return torch.autograd.grad(loss, weight, create_graph=True)[0]

        return torch.autograd.grad(wrap(inner, *inputs).square().sum(), inputs)

    plain = outer(lambda function, *args: function(*args))
    torch.testing.assert_close(outer(lambda f, *args: checkpoint(f, *args, use_reentrant=False)), plain)


def test_a_traced_gradient_equals_the_eager_one() -> None:
    inputs = [t.detach() for t in block_inputs()]

    def outer(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, weight, scale, shift = tensors = tuple(t.detach().requires_grad_() for t in tensors)
        loss = block(x, weight, None, (1, 1, 1), scale, shift, 0.1, True).square().sum()
        (inner,) = torch.autograd.grad(loss, weight, create_graph=True)
        return torch.autograd.grad(inner.square().sum(), tensors)

    traced = make_fx(outer)(*inputs)
    other = [t + 0.1 for t in inputs]
    for ours, expected in zip(traced(*other), outer(*other), strict=True):
        assert torch.equal(ours, expected)


def test_large_batches_in_parts_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = block_inputs()
    found = []
    for cached in (1, 10**9):
        monkeypatch.setattr("second_order_ops.CACHED", cached)
        loss = block(inputs[0], inputs[1], None, (1, 1, 1), *inputs[2:], 0.1, True).square().sum()
        inner = torch.autograd.grad(loss, inputs, create_graph=True)
        found.append(torch.autograd.grad(torch.cat([g.flatten() for g in inner]).square().sum(), inputs))
    assert all(map(torch.equal, *found))


def test_places_are_those_of_the_maxima() -> None:
    x = dense(made(2, 3, 5, 6).detach())
    pooled, place = largest(x)
    assert torch.equal(rows(x).gather(-1, place), rows(pooled))
