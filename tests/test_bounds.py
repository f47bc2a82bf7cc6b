"""No kernel reads beyond its tensors: they lie between pages that may not be touched.

A read there ends the process, so a row's calls run in one of their own: this file, as a script.
"""

import ctypes
import mmap
import random
import subprocess
import sys

import pytest
import torch

import torch_naiveconv.functional as F
from torch_naiveconv import autograd, ops

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CASES = 400
PAGE = mmap.PAGESIZE


def fenced(t: torch.Tensor, at_end: bool, kept: list[object]) -> torch.Tensor:
    """A copy of a dense tensor whose memory ends, or begins, at a page that may not be touched."""
    size = t.numel() * t.element_size()
    pages = -(-max(size, 1) // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for page in (0, pages + 1):
        forbidden = ctypes.c_void_p(start + page * PAGE), ctypes.c_size_t(PAGE)
        assert libc.mprotect(*forbidden, 0) == 0
    if size == 0:
        return t
    offset = (pages + 1) * PAGE - size if at_end else PAGE
    flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset)
    copy = flat.as_strided(t.size(), t.stride())
    copy.copy_(t)
    return copy


def conv_case(draw: random.Random, impl: str) -> None:
    dims = draw.choice((1, 2, 2, 2, 3))
    kind = draw.choice(("dense", "dense", "depthwise", "grouped"))
    groups = 1 if kind == "dense" else draw.choice((2, 3, 8, 16, 20, 33))
    per_in = 1 if kind == "depthwise" else draw.choice((1, 2, 3, 4, 5, 17, 40))
    per_out = 1 if kind == "depthwise" else draw.choice((1, 2, 4, 7, 16, 33))
    if groups > 1:
        per_in, per_out = min(per_in, 4), min(per_out, 4)
    kernel = [draw.choice((1, 2, 3, 3, 4, 5, 7, 11)) for _ in range(dims)]
    stride = [draw.choice((1, 1, 2, 3)) for _ in range(dims)]
    dilation = [draw.choice((1, 1, 2)) for _ in range(dims)]
    padding = [draw.randint(0, k) for k in kernel]
    sizes = [
        max(draw.randint(1, 40 if dims < 3 else 9), d * (k - 1) + 1 - 2 * p)
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    batch = draw.choice((1, 2))
    if draw.random() < 0.1:  # windows that touch each other
        batch = draw.choice((2, 50))
        kernel = stride = [draw.choice((1, 2, 4, 8, 16)) for _ in range(dims)]
        dilation, padding = [1] * dims, [0] * dims
        sizes = [k * draw.randint(1, {1: 70, 2: 12, 3: 3}[dims]) for k in kernel]
    dtype = draw.choice(DTYPES)
    x = torch.randn(batch, groups * per_in, *sizes).to(dtype)
    w = torch.randn(groups * per_out, per_in, *kernel).to(dtype)
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    if dims > 1 and draw.random() < 0.5:
        x = x.contiguous(memory_format=formats[dims])
        w = w.contiguous(memory_format=formats[dims])
    forward = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    rest = (stride, padding, dilation, groups)
    output = forward(x, w, None, *rest, impl="naive")
    kept: list[object] = []
    at_end = draw.random() < 0.7
    x, w, grad = (fenced(t, at_end, kept) for t in (x, w, torch.randn(output.shape).to(dtype)))
    if output.dim() > 3 and x.is_contiguous(memory_format=formats.get(dims, torch.channels_last)):
        grad = fenced(grad.contiguous(memory_format=formats[dims]), at_end, kept)
    forward(x, w, None, *rest, impl=impl)
    F.conv_grad_input(x.shape, w, grad, *rest, impl=impl)
    F.conv_grad_weight(x, w.shape, grad, *rest, impl=impl)


def pool_case(draw: random.Random, impl: str) -> None:
    dims = draw.choice((1, 2, 2, 2, 3))
    kernel = [draw.choice((1, 2, 2, 3, 3, 4, 5, 9)) for _ in range(dims)]
    stride = draw.choice((kernel, [1] * dims, [2] * dims, [draw.choice((1, 2, 3, 4))] * dims))
    dilation = [draw.choice((1, 1, 1, 2)) for _ in range(dims)]
    padding = [draw.randint(0, k // 2) for k in kernel]
    sizes = [
        max(draw.randint(1, 50 if dims < 3 else 12), d * (k - 1) + 1)
        for k, d in zip(kernel, dilation, strict=True)
    ]
    x = torch.randn(draw.choice((1, 2)), draw.choice((1, 3, 5, 16, 40)), *sizes)
    x = x.to(draw.choice(DTYPES))
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    if dims > 1 and draw.random() < 0.5:
        x = x.contiguous(memory_format=formats[dims])
    kept: list[object] = []
    at_end = draw.random() < 0.7
    x = fenced(x, at_end, kept)
    *geometry, size = F._pool_geometry(
        dims, x.shape, kernel, stride, padding, dilation, draw.random() < 0.3
    )
    window = [n for numbers in geometry for n in numbers]
    output, _ = autograd.max_pool(x, window, size, "first", "none", impl)
    grad = fenced(output.clone(), at_end, kept)
    for kind in ("flat", "offset"):
        _, index = autograd.max_pool(x, window, size, "first", kind, impl)
        index = fenced(index, at_end, kept)
        autograd.max_pool_scatter(grad, index, list(x.shape[2:]), window, "first", impl)
        autograd.max_pool_gather(x, index, size, window, "first", impl)


def main(row: str, seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for case in range(CASES):
        print("case", case, flush=True)
        for kind, run in (("conv", conv_case), ("pool", pool_case)):
            if row in ops.rows(kind, "cpu"):
                run(draw, row)
    print("done")


@pytest.mark.skipif(sys.platform != "linux", reason="forbids pages by the name that Linux has")
@pytest.mark.parametrize("row", [r for r in ops.rows("conv", "cpu") if r != "naive"])
def test_nothing_beyond_a_tensor_is_read(row: str) -> None:
    result = subprocess.run(
        [sys.executable, __file__, row, "1"], capture_output=True, text=True, timeout=600
    )
    tail = result.stdout.splitlines()[-1:], result.stderr[-2000:]
    assert result.returncode == 0, f"row {row} ended with {result.returncode}: {tail}"
    assert tail[0] == ["done"]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
