"""Drawn calls (drawn_cases.py): every row returns naive's bits, and pooling torch's values.

The seeds are fixed. A failure names its own; tools/draw_cases.py repeats it, and draws others.
"""

import pytest
import torch
from drawn_cases import DRAW, column, draw_pool, rows_of
from tensors import assert_same_bits

from torch_naiveconv import functional as F

CHUNK = 50
CASES = {"conv": 1000, "pool": 2000}


@pytest.mark.parametrize(
    ("op", "first"), [(op, first) for op in DRAW for first in range(0, CASES[op], CHUNK)]
)
def test_rows(op, first):
    for seed in range(first, first + CHUNK):
        DRAW[op](seed).check(rows_of(op))


def as_torch(case):
    """Arguments of the call as torch takes it, or None: it wants smaller, symmetric padding."""
    known = all(axis.before == axis.after <= axis.kernel // 2 for axis in case.axes)
    # Its own paths for other types have gaps, those for channels_last in three dimensions too.
    if not known or case.ties != "first" or case.dtype not in (torch.float32, torch.float64):
        return None
    names = {
        "kernel_size": "kernel",
        "stride": "stride",
        "padding": "before",
        "dilation": "dilation",
    }
    lists = {name: column(case.axes, part) for name, part in names.items()}
    return {**lists, "ceil_mode": case.ceil_mode, "return_indices": True}


def without_nan(t):
    """torch promises that a NaN stays one, not which."""
    return t.masked_fill(t.isnan(), 0.0)


def pooled(module, case, arguments):
    """Values, indices, and a function that returns a gradient."""
    leaf = case.input().contiguous().requires_grad_()
    output, index = getattr(module, f"max_pool{len(case.axes)}d")(leaf, **arguments)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return output.detach(), index, lambda: torch.autograd.grad(output, leaf, weights)[0]


@pytest.mark.parametrize("first", range(0, CASES["pool"], 10 * CHUNK))
def test_pooling_as_torch(first):
    compared = 0
    for case in map(draw_pool, range(first, first + 10 * CHUNK)):
        arguments = as_torch(case)
        if arguments is None:
            continue
        compared += 1
        ours, chosen, gradient = pooled(F, case, arguments)
        theirs, index, their_gradient = pooled(torch.nn.functional, case, arguments)
        missed = chosen < 0  # where a dilated window misses the input, torch's index is not defined
        assert_same_bits(chosen, index.masked_fill(missed, -1), case)
        assert_same_bits(ours.isnan(), theirs.isnan(), case)
        assert_same_bits(without_nan(ours), without_nan(theirs), case)
        if not missed.any():
            torch.testing.assert_close(gradient(), their_gradient(), msg=str(case))
    assert compared > CHUNK
