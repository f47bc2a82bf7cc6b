"""The specification against exact rational arithmetic.

The words of docs/contract.md written once more with fractions, for tiny cases: which terms, in
which order, cut where, rounded how. Signs of zeros are left to the other tests.
"""

import itertools
from fractions import Fraction

import pytest
import torch

from torch_naiveconv import functional as F

NORMAL = Fraction(1, 2**126)


def nearest(x, precision, lowest_exponent):
    """x rounded to a binary float, ties to even; lowest_exponent None: no subnormals."""
    if x == 0:
        return x
    exponent = abs(x).numerator.bit_length() - abs(x).denominator.bit_length()
    if abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    if lowest_exponent is not None:
        exponent = max(exponent, lowest_exponent)
    quantum = Fraction(2) ** (exponent - precision + 1)
    return round(x / quantum) * quantum


def flushed(x):
    """float32 without subnormal results: tiny after rounding becomes zero."""
    r = nearest(x, 24, None)
    return r if abs(r) >= NORMAL else Fraction(0)


def total_of(samples, dtype, bias=Fraction(0)):
    """The ordered sum: `samples` is a list of lists of terms, a term a pair of factors or None."""
    half = dtype in (torch.float16, torch.bfloat16)
    length = 32 if half else 128
    step = {
        torch.float64: lambda x: nearest(x, 53, -1022),
        torch.float32: lambda x: nearest(x, 24, -126),
    }
    fit = flushed if half else step[dtype]

    def operand(x):
        return Fraction(0) if dtype == torch.bfloat16 and abs(x) < NORMAL else x

    total = Fraction(0)
    for terms in samples:
        for first in range(0, len(terms), length):
            chains = [Fraction(0), Fraction(0)]
            for number, term in enumerate(terms[first : first + length]):
                which = number % 2 if half else 0
                if term is not None:
                    chains[which] = fit(operand(term[0]) * operand(term[1]) + chains[which])
            total = fit(total + (fit(chains[0] + chains[1]) if half else chains[0]))
    total = fit(total + operand(bias))
    if dtype == torch.bfloat16:
        return nearest(total, 8, -126)
    return nearest(total, 11, -14) if dtype == torch.float16 else total


def exact(t):
    return [Fraction(v) for v in t.double().flatten().tolist()], t.stride()


def at(view, *index):
    values, strides = view
    return values[sum(i * s for i, s in zip(index, strides, strict=True))]


STRIDE, PAD, DILATION, GROUPS = 2, 1, 2, 2
N, C, L, K, KERNEL = 2, 44, 9, 4, 3  # 22 channels a group: 66 terms forward; 6 in grad_input
OUT = (L + 2 * PAD - DILATION * (KERNEL - 1) - 1) // STRIDE + 1


def values(shape, dtype, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    mantissa = torch.randn(shape, generator=generator, dtype=torch.float64)
    spread = torch.randint(-3, 4, shape, generator=generator)
    return (mantissa * 2.0**spread * scale).to(dtype)


CASES = [
    (torch.float32, 1.0),
    (torch.float32, 2.0**-72),  # products around 2^-144: subnormal
    (torch.float64, 1.0),
    (torch.float16, 1.0),
    (torch.float16, 2.0**-12),  # subnormal results
    (torch.bfloat16, 1.0),
    (torch.bfloat16, 2.0**-63),  # products around 2^-126: flushed or not
]


@pytest.mark.parametrize(("dtype", "scale"), CASES, ids=str)
@pytest.mark.parametrize("impl", F.implementations("conv1d"))
def test_conv_is_what_the_contract_says(dtype, scale, impl):
    x, w = values((N, C, L), dtype, 1, scale), values((K, C // GROUPS, KERNEL), dtype, 2, scale)
    b, g = values((K,), dtype, 3, scale**2), values((N, K, OUT), dtype, 4, scale)
    arguments = {"stride": STRIDE, "padding": PAD, "dilation": DILATION, "groups": GROUPS}
    X, W, B, G = exact(x), exact(w), exact(b), exact(g)
    group_in, group_out = C // GROUPS, K // GROUPS

    def padded(n, c, position):
        return at(X, n, c, position) if 0 <= position < L else Fraction(0)

    def check(result, expected):
        assert result.shape == expected_shape
        found = [Fraction(v) for v in result.double().flatten().tolist()]
        assert found == expected

    expected_shape = (N, K, OUT)
    check(
        F.conv1d(x, w, b, impl=impl, **arguments),
        [
            total_of(
                [
                    [
                        (
                            padded(
                                n, k // group_out * group_in + c, o * STRIDE - PAD + t * DILATION
                            ),
                            at(W, k, c, t),
                        )
                        for c in range(group_in)
                        for t in range(KERNEL)
                    ]
                ],
                dtype,
                at(B, k),
            )
            for n, k, o in itertools.product(range(N), range(K), range(OUT))
        ],
    )

    def output_of(i, t):
        o, rest = divmod(i + PAD - t * DILATION, STRIDE)
        return o if rest == 0 and 0 <= o < OUT else None

    expected_shape = (N, C, L)
    check(
        F.conv_grad_input(x.shape, w, g, impl=impl, **arguments),
        [
            total_of(
                [
                    [
                        None
                        if output_of(i, t) is None
                        else (at(G, n, k, output_of(i, t)), at(W, k, c % group_in, t))
                        for k in range(c // group_in * group_out, (c // group_in + 1) * group_out)
                        for t in range(KERNEL)
                    ]
                ],
                dtype,
            )
            for n, c, i in itertools.product(range(N), range(C), range(L))
        ],
    )

    expected_shape = tuple(w.shape)
    check(
        F.conv_grad_weight(x, w.shape, g, impl=impl, **arguments),
        [
            total_of(
                [
                    [
                        (
                            at(G, n, k, o),
                            padded(
                                n, k // group_out * group_in + c, o * STRIDE - PAD + t * DILATION
                            ),
                        )
                        for o in range(OUT)
                    ]
                    for n in range(N)
                ],
                dtype,
            )
            for k, c, t in itertools.product(range(K), range(group_in), range(KERNEL))
        ],
    )

    expected_shape = (K,)
    one = Fraction(1)
    check(
        F.conv_grad_bias(g, impl=impl),
        [
            total_of([[(at(G, n, k, o), one) for o in range(OUT)] for n in range(N)], dtype)
            for k in range(K)
        ],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_long_sums_are_cut_into_groups(dtype):
    """300 terms in one output, and 300 in one weight's gradient over two samples."""
    a, b = values((1, 300, 1), dtype, 5, 1.0), values((1, 300, 1), dtype, 6, 1.0)
    terms = list(zip(exact(a)[0], exact(b)[0], strict=True))
    for impl in F.implementations("conv1d"):
        assert Fraction(F.conv1d(a, b, impl=impl).item()) == total_of([terms], dtype)
        g, x = a.view(2, 1, 150), b.view(2, 1, 150)
        weight = F.conv_grad_weight(x, (1, 1, 1), g, impl=impl)
        assert Fraction(weight.item()) == total_of([terms[:150], terms[150:]], dtype)
