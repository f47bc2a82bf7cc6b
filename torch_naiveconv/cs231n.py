"""The course's four layer functions, with its names, signatures, ``(out, cache)`` and dictionaries.

numpy arrays in, numpy arrays out; tensors in, tensors out. The ``_naive`` functions run the
specification itself, the ``_fast`` ones the best implementation here; the bits are equal.
Where the article's listing is wrong (overlapping windows, ties, NaN, integer biases, sizes by true
division) these are right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import functional as F

Array = Any  # numpy.ndarray or Tensor

__all__ = [
    "conv_backward_fast",
    "conv_backward_naive",
    "conv_forward_fast",
    "conv_forward_naive",
    "max_pool_backward_fast",
    "max_pool_backward_naive",
    "max_pool_forward_fast",
    "max_pool_forward_naive",
]


def _tensor(name: str, x: Array) -> Tensor:
    if isinstance(x, Tensor):
        return x
    if isinstance(x, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(x))
    raise TypeError(f"{name} must be a numpy array or a Tensor, got {type(x).__name__}")


def _like(t: Tensor, x: Array) -> Array:
    return t if isinstance(x, Tensor) else t.numpy()


def _common(**arrays: Array) -> list[Tensor]:
    """Tensors of one type: numpy's promotion, so that an integer bias beside float data works."""
    tensors = [_tensor(name, x) for name, x in arrays.items()]
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return [t.to(dtype) for t in tensors]


def _parameter(parameters: dict[str, int], name: str, kind: str) -> int:
    try:
        return parameters[name]
    except KeyError:
        raise ValueError(f"{kind} must have the key {name!r}, got {sorted(parameters)}") from None


def _conv_forward(
    x: Array, w: Array, b: Array, conv_param: dict[str, int], impl: str | None
) -> tuple[Array, tuple[Any, ...]]:
    stride = _parameter(conv_param, "stride", "conv_param")
    pad = _parameter(conv_param, "pad", "conv_param")
    input, weight, bias = _common(x=x, w=w, b=b)
    out = F.conv2d(input, weight, bias, stride, pad, impl=impl)
    return _like(out, x), (x, w, b, conv_param)


def _conv_backward(
    dout: Array, cache: tuple[Any, ...], impl: str | None
) -> tuple[Array, Array, Array]:
    x, w, b, conv_param = cache
    stride, pad = conv_param["stride"], conv_param["pad"]
    input, weight, _, grad = _common(x=x, w=w, b=b, dout=dout)
    dx = F.conv_grad_input(input.shape, weight, grad, stride, pad, impl=impl)
    dw = F.conv_grad_weight(input, weight.shape, grad, stride, pad, impl=impl)
    db = F.conv_grad_bias(grad, impl=impl)
    return _like(dx, x), _like(dw, x), _like(db, x)


def _pool_arguments(pool_param: dict[str, int]) -> tuple[tuple[int, int], int]:
    kernel = (
        _parameter(pool_param, "pool_height", "pool_param"),
        _parameter(pool_param, "pool_width", "pool_param"),
    )
    return kernel, _parameter(pool_param, "stride", "pool_param")


def _max_pool_forward(
    x: Array, pool_param: dict[str, int], impl: str | None
) -> tuple[Array, tuple[Any, ...]]:
    kernel, stride = _pool_arguments(pool_param)
    out = F.max_pool2d(_tensor("x", x), kernel, stride, impl=impl)
    return _like(out, x), (x, pool_param)


def _max_pool_backward(dout: Array, cache: tuple[Any, ...], impl: str | None) -> Array:
    x, pool_param = cache
    kernel, stride = _pool_arguments(pool_param)
    input, grad = _tensor("x", x), _tensor("dout", dout)
    return _like(F.max_pool_grad_input(input, grad, kernel, stride, impl=impl), x)


def conv_forward_naive(
    x: Array, w: Array, b: Array, conv_param: dict[str, int]
) -> tuple[Array, tuple[Any, ...]]:
    """Forward pass of a convolution, by the specification's loops.

    Args:
        x: input (N, C, H, W).
        w: filters (F, C, HH, WW).
        b: biases (F,).
        conv_param: ``{"stride": ..., "pad": ...}``.

    Returns:
        ``(out, cache)`` with out (N, F, H', W'), ``H' = (H + 2 * pad - HH) // stride + 1``.

    >>> import numpy as np
    >>> x = np.arange(9.0).reshape(1, 1, 3, 3)
    >>> out, cache = conv_forward_naive(
    ...     x, np.ones((1, 1, 2, 2)), np.zeros(1), {"stride": 1, "pad": 0})
    >>> out[0, 0].tolist()
    [[8.0, 12.0], [20.0, 24.0]]
    """
    return _conv_forward(x, w, b, conv_param, "naive")


def conv_backward_naive(dout: Array, cache: tuple[Any, ...]) -> tuple[Array, Array, Array]:
    """Backward pass of a convolution: ``(dx, dw, db)`` for dout (N, F, H', W').

    >>> import numpy as np
    >>> x, w, b = np.ones((1, 1, 3, 3)), np.ones((1, 1, 2, 2)), np.zeros(1)
    >>> out, cache = conv_forward_naive(x, w, b, {"stride": 1, "pad": 0})
    >>> dx, dw, db = conv_backward_naive(np.ones_like(out), cache)
    >>> dx[0, 0].tolist(), dw[0, 0].tolist(), db.tolist()
    ([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]], [[4.0, 4.0], [4.0, 4.0]], [4.0])
    """
    return _conv_backward(dout, cache, "naive")


def max_pool_forward_naive(x: Array, pool_param: dict[str, int]) -> tuple[Array, tuple[Any, ...]]:
    """Forward pass of max-pooling, by the specification's loops.

    Args:
        x: input (N, C, H, W).
        pool_param: ``{"pool_height": ..., "pool_width": ..., "stride": ...}``.

    Returns:
        ``(out, cache)`` with out (N, C, H', W'), ``H' = (H - pool_height) // stride + 1``.

    >>> import numpy as np
    >>> x = np.arange(16.0).reshape(1, 1, 4, 4)
    >>> out, cache = max_pool_forward_naive(
    ...     x, {"pool_height": 2, "pool_width": 2, "stride": 2})
    >>> out[0, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    return _max_pool_forward(x, pool_param, "naive")


def max_pool_backward_naive(dout: Array, cache: tuple[Any, ...]) -> Array:
    """Backward pass of max-pooling: dx for dout (N, C, H', W').

    Overlapping windows add up, the first of several equal maxima gets the gradient, and a NaN that
    won its window gets it too.

    >>> import numpy as np
    >>> out, cache = max_pool_forward_naive(
    ...     np.zeros((1, 1, 2, 2)), {"pool_height": 2, "pool_width": 2, "stride": 2})
    >>> max_pool_backward_naive(np.full_like(out, 8.0), cache)[0, 0].tolist()
    [[8.0, 0.0], [0.0, 0.0]]
    """
    return _max_pool_backward(dout, cache, "naive")


def conv_forward_fast(
    x: Array, w: Array, b: Array, conv_param: dict[str, int]
) -> tuple[Array, tuple[Any, ...]]:
    """:func:`conv_forward_naive` by the fastest implementation here, the same bits."""
    return _conv_forward(x, w, b, conv_param, None)


def conv_backward_fast(dout: Array, cache: tuple[Any, ...]) -> tuple[Array, Array, Array]:
    """:func:`conv_backward_naive` by the fastest implementation here, the same bits."""
    return _conv_backward(dout, cache, None)


def max_pool_forward_fast(x: Array, pool_param: dict[str, int]) -> tuple[Array, tuple[Any, ...]]:
    """:func:`max_pool_forward_naive` by the fastest implementation here, the same bits."""
    return _max_pool_forward(x, pool_param, None)


def max_pool_backward_fast(dout: Array, cache: tuple[Any, ...]) -> Array:
    """:func:`max_pool_backward_naive` by the fastest implementation here, the same bits."""
    return _max_pool_backward(dout, cache, None)
