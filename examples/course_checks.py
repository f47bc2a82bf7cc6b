# %% [markdown]
# # The course's own checks
#
# What CS231n's "ConvolutionalNetworks" notebook checks of a student's four functions, checked of
# `torch_naiveconv.cs231n`: expected values, numeric gradients, then the fast functions with their
# differences and speed-ups. Open it as a notebook (Jupytext, VS Code), or run it as a script; every
# check asserts.

# %%
import time

import numpy as np

from torch_naiveconv.cs231n import (
    conv_backward_fast,
    conv_backward_naive,
    conv_forward_fast,
    conv_forward_naive,
    max_pool_backward_fast,
    max_pool_backward_naive,
    max_pool_forward_fast,
    max_pool_forward_naive,
)


def rel_error(x, y):
    return np.max(np.abs(x - y) / np.maximum(1e-8, np.abs(x) + np.abs(y)))


def numeric_gradient(f, x, dout, h=1e-5):
    """The gradient of sum(f(x) * dout) by central differences."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        kept = x[i]
        x[i] = kept + h
        above = f(x)
        x[i] = kept - h
        below = f(x)
        x[i] = kept
        gradient[i] = np.sum((above - below) * dout) / (2 * h)
    return gradient


def check(name, error, limit):
    print(f"{name}: {error:.3g} (below {limit:g})")
    assert error < limit, name


# %% [markdown]
# ## Convolution: forward pass

# %%
x = np.linspace(-0.1, 0.5, num=2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
w = np.linspace(-0.2, 0.3, num=3 * 3 * 4 * 4).reshape(3, 3, 4, 4)
b = np.linspace(-0.1, 0.2, num=3)
out, _ = conv_forward_naive(x, w, b, {"stride": 2, "pad": 1})
correct = np.array(
    [
        [
            [[-0.08759809, -0.10987781], [-0.18387192, -0.2109216]],
            [[0.21027089, 0.21661097], [0.22847626, 0.23004637]],
            [[0.50813986, 0.54309974], [0.64082444, 0.67101435]],
        ],
        [
            [[-0.98053589, -1.03143541], [-1.19128892, -1.24695841]],
            [[0.69108355, 0.66880383], [0.59480972, 0.56776003]],
            [[2.36270298, 2.36904306], [2.38090835, 2.38247847]],
        ],
    ]
)
print("Testing conv_forward_naive")
check("difference", rel_error(out, correct), 1e-7)

# %% [markdown]
# ## Convolution: backward pass

# %%
np.random.seed(231)  # noqa: NPY002  the course's values come from this generator
x = np.random.randn(4, 3, 5, 5)  # noqa: NPY002
w = np.random.randn(2, 3, 3, 3)  # noqa: NPY002
b = np.random.randn(2)  # noqa: NPY002
dout = np.random.randn(4, 2, 5, 5)  # noqa: NPY002
conv_param = {"stride": 1, "pad": 1}
out, cache = conv_forward_naive(x, w, b, conv_param)
dx, dw, db = conv_backward_naive(dout, cache)


def forward(_):  # the arrays are changed in place
    return conv_forward_naive(x, w, b, conv_param)[0]


print("Testing conv_backward_naive")
check("dx error", rel_error(dx, numeric_gradient(forward, x, dout)), 1e-7)
check("dw error", rel_error(dw, numeric_gradient(forward, w, dout)), 1e-7)
check("db error", rel_error(db, numeric_gradient(forward, b, dout)), 1e-7)

# %% [markdown]
# ## Max-pooling: forward and backward pass

# %%
x = np.linspace(-0.3, 0.4, num=2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
pool_param = {"pool_width": 2, "pool_height": 2, "stride": 2}
out, _ = max_pool_forward_naive(x, pool_param)
print("Testing max_pool_forward_naive")
check("difference", rel_error(out, x[:, :, 1::2, 1::2]), 1e-15)

# %%
np.random.seed(231)  # noqa: NPY002
x = np.random.randn(3, 2, 8, 8)  # noqa: NPY002
dout = np.random.randn(3, 2, 4, 4)  # noqa: NPY002
out, cache = max_pool_forward_naive(x, pool_param)
dx = max_pool_backward_naive(dout, cache)
numeric = numeric_gradient(lambda x: max_pool_forward_naive(x, pool_param)[0], x, dout)
print("Testing max_pool_backward_naive")
check("dx error", rel_error(dx, numeric), 1e-10)

# %% [markdown]
# ## Fast layers
#
# The course expects differences around 1e-9 here. They are exactly zero: the loop is the
# specification, and the fast functions return its bits. `naive` is this package's own loop,
# compiled and on all threads; a loop in Python is far slower.

# %%
print(f"{'':16}{'naive':>10}{'fast':>10}{'speed-up':>10}")


def compare(name, naive, fast):
    """Best of three, the results the same bits."""
    fast()  # the first call prepares
    seconds = []
    for function in (naive, fast):
        spent = []
        for _ in range(3):
            begin = time.perf_counter()
            results = function()
            spent.append(time.perf_counter() - begin)
        seconds.append((min(spent), results))
    (slow, expected), (quick, got) = seconds
    print(f"{name:16}{slow * 1e3:8.2f}ms{quick * 1e3:8.2f}ms{slow / quick:9.1f}x")
    for a, b in zip(expected, got, strict=True):
        assert np.array_equal(a, b), name


np.random.seed(231)  # noqa: NPY002
x = np.random.randn(100, 3, 31, 31)  # noqa: NPY002
w = np.random.randn(25, 3, 3, 3)  # noqa: NPY002
b = np.random.randn(25)  # noqa: NPY002
dout = np.random.randn(100, 25, 16, 16)  # noqa: NPY002
conv_param = {"stride": 2, "pad": 1}
out, cache = conv_forward_fast(x, w, b, conv_param)
assert rel_error(out.sum(), 55154.77602711192) < 1e-12
compare(
    "conv forward",
    lambda: conv_forward_naive(x, w, b, conv_param)[:1],
    lambda: conv_forward_fast(x, w, b, conv_param)[:1],
)
compare(
    "conv backward",
    lambda: conv_backward_naive(dout, cache),
    lambda: conv_backward_fast(dout, cache),
)

# %%
x = np.random.randn(100, 3, 32, 32)  # noqa: NPY002
dout = np.random.randn(100, 3, 16, 16)  # noqa: NPY002
out, cache = max_pool_forward_fast(x, pool_param)
compare(
    "pool forward",
    lambda: max_pool_forward_naive(x, pool_param)[:1],
    lambda: max_pool_forward_fast(x, pool_param)[:1],
)
compare(
    "pool backward",
    lambda: (max_pool_backward_naive(dout, cache),),
    lambda: (max_pool_backward_fast(dout, cache),),
)
