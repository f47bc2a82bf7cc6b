"""A convolution as the sparse matrix that it is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import functional as F
from . import ops


def conv_matrix(
    weight: Tensor,
    input_size: Sequence[int],
    stride: F.Size = 1,
    padding: F.Padding = 0,
    dilation: F.Size = 1,
    groups: int = 1,
) -> Tensor:
    """The matrix M of a convolution without bias: ``conv(x).flatten() = M @ x.flatten()``.

    M transposed is the gradient by the input, and the transposed convolution. A row holds one
    filter where its window lies; taps in the padding have no entry, so a row at the border is
    shorter. Entries are sorted by column, which is the contract's order of terms.

    As maps the two are equal: the results are the same wherever every sum is exact, for instance
    for small integers. Otherwise they differ in the last bits, because a sparse product neither
    fuses its steps nor cuts its sums as the contract says.

    Args:
        weight: (K, C / groups, ...) with 1 to 3 spatial axes; the result is differentiable by it.
        input_size: (C, ...) of one sample.
        stride, padding, dilation, groups: those of :func:`functional.conv2d`.

    Returns:
        A coalesced sparse COO tensor (outputs of one sample, inputs of one sample).

    Raises:
        ValueError, TypeError: arguments that do not fit, as in :func:`functional.conv2d`.

    >>> import torch
    >>> conv_matrix(torch.tensor([[[1.0, 10]]]), (1, 4), padding=1).to_dense()
    tensor([[10.,  0.,  0.,  0.],
            [ 1., 10.,  0.,  0.],
            [ 0.,  1., 10.,  0.],
            [ 0.,  0.,  1., 10.],
            [ 0.,  0.,  0.,  1.]])
    """
    dims = len(input_size) - 1
    F._check_tensor("weight", weight, (dims + 2,), F.NUMBERS)
    geometry = F._conv_geometry(
        dims, torch.Size([1, *input_size]), weight.shape, stride, padding, dilation, groups
    )
    filters, group_in, *kernel = weight.shape
    channels, *size = input_size
    steps, pads, dilations = ops.split(geometry)
    out = ops.conv_output_sizes(size, kernel, geometry)
    # Every (filter, output position, channel of the group, tap), in that order.
    grid = torch.meshgrid(
        [torch.arange(n, device=weight.device) for n in (filters, *out, group_in, *kernel)],
        indexing="ij",
    )
    filter_, *rest = (axis.reshape(-1) for axis in grid)
    o, (c, *k) = rest[:dims], rest[dims:]
    row, column = filter_, filter_ // (filters // groups) * group_in + c
    inside = torch.ones_like(row, dtype=torch.bool)
    for i in range(dims):
        position = o[i] * steps[i] - pads[2 * i] + k[i] * dilations[i]
        inside &= (position >= 0) & (position < size[i])
        row = row * out[i] + o[i]
        column = column * size[i] + position
    values = weight.unsqueeze(1).expand(filters, math.prod(out), *weight.shape[1:]).reshape(-1)
    return torch.sparse_coo_tensor(
        torch.stack([row[inside], column[inside]]),
        values[inside],
        (filters * math.prod(out), channels * math.prod(size)),
        check_invariants=True,
    ).coalesce()
