"""Values against torch.nn.functional over generated shapes: exact on small integers in float64 and
for max-pooling always, within a derived tolerance on random values."""

import pytest
import torch
import torch.nn.functional as TF
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from torch_naiveconv import functional as F

MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
FORMATS = {1: [None], 2: [None, torch.channels_last], 3: [None, torch.channels_last_3d]}


def bits(t):
    """The bits of a tensor, so that +0 differs from -0 and any NaN equals any other.

    (max-pooling here copies a NaN with its payload; torch rewrites those of 16-bit types.)
    """
    if t.is_floating_point():
        t = torch.where(t.isnan(), torch.full_like(t, float("nan")), t)
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.contiguous().view(sizes[t.element_size()])


@st.composite
def conv_calls(draw, transposed=False):
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    per_axis = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * dims))  # noqa: E731
    kernel, stride, dilation, padding = (
        per_axis(1, 4),
        per_axis(1, 4),
        per_axis(1, 3),
        per_axis(0, 4),
    )
    spatial = per_axis(1, 9 if dims < 3 else 5)
    channels, filters = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 4))
    arguments = {"stride": stride, "dilation": dilation, "padding": padding, "groups": groups}
    if transposed:
        arguments["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        out = [
            (i - 1) * s - 2 * p + d * (k - 1) + 1 + e
            for i, s, p, d, k, e in zip(
                spatial,
                stride,
                padding,
                dilation,
                kernel,
                arguments["output_padding"],
                strict=True,
            )
        ]
        weight = (channels, filters // groups, *kernel)
    else:
        out = [
            (i + 2 * p - d * (k - 1) - 1) // s + 1
            for i, s, p, d, k in zip(spatial, stride, padding, dilation, kernel, strict=True)
        ]
        weight = (filters, channels // groups, *kernel)
    assume(all(o >= 1 for o in out))
    return {
        "dims": dims,
        "input": (draw(st.integers(1, 3)), channels, *spatial),
        "weight": weight,
        "bias": filters if draw(st.booleans()) else None,
        "arguments": arguments,
        "memory_format": draw(st.sampled_from(FORMATS[dims])),
        "seed": draw(st.integers(0, 2**16)),
    }


def run(function, tensors, arguments):
    leaves = [None if t is None else t.clone(memory_format=torch.preserve_format) for t in tensors]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    output = function(*leaves, **arguments)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randint(-3, 4, output.shape, generator=generator).to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def tensors_of(call, values, dtype):
    generator = torch.Generator().manual_seed(call["seed"])
    shapes = [call["input"], call["weight"], None if call["bias"] is None else (call["bias"],)]
    made = []
    for shape in shapes:
        if shape is None:
            made.append(None)
            continue
        if values == "integers":
            t = torch.randint(-8, 9, shape, generator=generator).to(dtype)
        else:
            t = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if call["memory_format"] is not None and len(shape) > 1:
            t = t.contiguous(memory_format=call["memory_format"])
        made.append(t)
    return made


def check_exact(name, call):
    tensors = tensors_of(call, "integers", torch.float64)
    torchs = run(getattr(TF, name), tensors, call["arguments"])
    for impl in F.implementations(name):
        ours = run(getattr(F, name), tensors, {**call["arguments"], "impl": impl})
        for a, b in zip(ours, torchs, strict=True):
            assert torch.equal(a, b), (name, impl, call)


@MANY
@given(conv_calls())
def test_conv_is_exact_on_integers(call):
    check_exact(f"conv{call['dims']}d", call)


@MANY
@given(conv_calls(transposed=True))
def test_transposed_conv_is_exact_on_integers(call):
    check_exact(f"conv_transpose{call['dims']}d", call)


# Unit roundoff, and that of the output type; 16-bit results are rounded once at the end.
ROUNDOFF = {
    torch.float64: (2.0**-53, 0.0),
    torch.float32: (2.0**-24, 0.0),
    torch.float16: (2.0**-24, 2.0**-11),
    torch.bfloat16: (2.0**-24, 2.0**-8),
}


@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
@settings(MANY, max_examples=40)
@given(call=conv_calls())
def test_conv_is_close_on_random_values(dtype, call):
    """|result - exact| <= (n + 1) u sum|a b| for a sum of n products with unit roundoff u, and one
    more rounding for 16-bit results. The exact values and sum|a b| come from float64."""
    tensors = tensors_of(call, "random", dtype)
    function, reference = getattr(F, f"conv{call['dims']}d"), getattr(TF, f"conv{call['dims']}d")
    wide = [None if t is None else t.double() for t in tensors]
    expected = run(reference, wide, call["arguments"])
    generator = torch.Generator().manual_seed(1)
    weights = torch.randint(-3, 4, expected[0].shape, generator=generator).double()
    absolute = [None if t is None else t.abs().requires_grad_() for t in wide]
    output = reference(*absolute, **call["arguments"])
    output.backward(weights.abs())
    bounds = [output.detach(), *(t.grad for t in absolute if t is not None)]
    terms = max(
        1 + call["weight"][1] * torch.Size(call["weight"][2:]).numel(),
        call["weight"][0] * torch.Size(call["weight"][2:]).numel(),
        expected[0].numel() // call["weight"][0],
    )
    unit, last = ROUNDOFF[dtype]
    for ours, exact, bound in zip(
        run(function, tensors, call["arguments"]), expected, bounds, strict=True
    ):
        error = (ours.double() - exact).abs()
        allowed = (1.01 * (terms + 2) * unit + last) * bound + 2.0**-25
        assert bool((error <= allowed).all()), (dtype, call)


HARD = [0.0, -0.0, 1.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-40, 3.5]
POOL_TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGER_TYPES = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]


@st.composite
def pool_calls(draw):
    dims = draw(st.integers(1, 3))
    per_axis = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * dims))  # noqa: E731
    kernel, stride, dilation = per_axis(1, 4), per_axis(1, 4), per_axis(1, 3)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    spatial = per_axis(1, 12 if dims < 3 else 6)
    ceil_mode = draw(st.booleans())
    for i, p, d, k in zip(spatial, padding, dilation, kernel, strict=True):
        assume(i + 2 * p - d * (k - 1) - 1 >= 0)
    # torch reads outside of the input where a dilated window has no tap on it
    for i, p, d, k in zip(spatial, padding, dilation, kernel, strict=True):
        assume(d == 1 or p == 0 or i >= d * (k - 1))
    return {
        "dims": dims,
        "input": (draw(st.integers(1, 2)), draw(st.integers(1, 3)), *spatial),
        "arguments": {
            "kernel_size": kernel,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "ceil_mode": ceil_mode,
        },
        "memory_format": draw(st.sampled_from(FORMATS[dims])),
        "seed": draw(st.integers(0, 2**16)),
    }


@pytest.mark.parametrize("dtype", POOL_TYPES + INTEGER_TYPES, ids=str)
@settings(MANY, max_examples=60)
@given(call=pool_calls())
def test_max_pool_has_torchs_bits(dtype, call):
    """Values and indices, with ties, NaN, infinities and signed zeros among the inputs."""
    generator = torch.Generator().manual_seed(call["seed"])
    pick = torch.randint(0, len(HARD), call["input"], generator=generator)
    if dtype.is_floating_point:
        x = torch.tensor(HARD, dtype=torch.float64)[pick].to(dtype)
    else:
        x = (pick - (0 if dtype == torch.uint8 else 5)).to(dtype)
    if call["memory_format"] is not None:
        x = x.contiguous(memory_format=call["memory_format"])
    name = f"max_pool{call['dims']}d"
    # torch's channels_last 3-D and integer 1-D paths have gaps; its contiguous 2-D path is the rule
    reference = x.contiguous() if dtype.is_floating_point else x.contiguous().double()
    values, indices = getattr(TF, name)(reference, **call["arguments"], return_indices=True)
    for impl in F.implementations(name):
        ours, index = getattr(F, name)(x, **call["arguments"], return_indices=True, impl=impl)
        assert torch.equal(bits(ours), bits(values.to(dtype))), (impl, call)
        assert torch.equal(index, indices), (impl, call)
        alone = getattr(F, name)(x, **call["arguments"], impl=impl)
        assert torch.equal(bits(alone), bits(ours))


@pytest.mark.parametrize("size", [6, 7])
def test_max_unpool_equals_torch(size):
    for dims, shape in [(1, (2, 3, size)), (2, (2, 3, size, 4)), (3, (2, 2, size, 4, 4))]:
        x = torch.randn(shape, dtype=torch.float64)
        y, i = getattr(F, f"max_pool{dims}d")(x, 2, 2, return_indices=True)
        for output_size in (shape, shape[2:], *([None] if size == 6 else [])):
            ours = getattr(F, f"max_unpool{dims}d")(y, i, 2, 2, output_size=output_size)
            torchs = getattr(TF, f"max_unpool{dims}d")(y, i, 2, 2, output_size=output_size)
            assert torch.equal(ours, torchs)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_unbatched_and_odd_strides(dims):
    conv, reference = getattr(F, f"conv{dims}d"), getattr(TF, f"conv{dims}d")
    pool, pool_reference = getattr(F, f"max_pool{dims}d"), getattr(TF, f"max_pool{dims}d")
    big = torch.randint(-5, 6, (2, 6, *(9,) * dims), dtype=torch.float64)
    odd = big[:, ::2].transpose(-1, 2 if dims > 1 else -1)[..., ::2]
    weight = torch.randint(-5, 6, (3, 4, *(2,) * dims), dtype=torch.float64).transpose(0, 1)
    for x in (odd, odd[0], odd[:0]):
        if x.numel():
            assert torch.equal(conv(x, weight), reference(x, weight))
            assert torch.equal(pool(x, 2), pool_reference(x, 2))
    assert conv(odd[0], weight).dim() == dims + 1


def test_expanded_gradients():
    x = torch.randint(-5, 6, (2, 3, 5, 5)).double().requires_grad_()
    w = torch.randint(-5, 6, (4, 3, 3, 3)).double().requires_grad_()
    ours = torch.autograd.grad(F.conv2d(x, w).sum(), (x, w))
    torchs = torch.autograd.grad(TF.conv2d(x, w).sum(), (x, w))
    assert all(torch.equal(a, b) for a, b in zip(ours, torchs, strict=True))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_empty_batches_and_channels(dims):
    conv, pool = getattr(F, f"conv{dims}d"), getattr(F, f"max_pool{dims}d")
    weight = torch.ones(4, 3, *(2,) * dims, requires_grad=True)
    x = torch.ones(0, 3, *(5,) * dims, requires_grad=True)
    out = conv(x, weight, torch.ones(4))
    assert out.shape == (0, 4, *(4,) * dims)
    out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight)) and x.grad.shape == x.shape
    assert pool(x, 2).shape == (0, 3, *(2,) * dims)
    no_channels = conv(
        torch.ones(2, 0, *(5,) * dims), torch.ones(4, 0, *(2,) * dims), torch.arange(4.0)
    )
    assert torch.equal(no_channels.flatten(2)[0, :, 0], torch.arange(4.0))
    assert conv(torch.ones(2, 3, *(5,) * dims), torch.ones(0, 3, *(2,) * dims)).numel() == 0
