"""Random calls of every operator, run on a CUDA device and on the CPU, compared bit by bit.

Used by ``test_cuda.py`` and by ``tools/gpu_check.py``; needs torch alone.
"""

import math
import random

import torch

from torch_naiveconv import functional as F
from torch_naiveconv import ops

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
CONV = [F.conv1d, F.conv2d, F.conv3d]
POOL = [F.max_pool1d, F.max_pool2d, F.max_pool3d]
MOST_PRODUCTS = 50_000_000  # of a sample: what the CPU's naive row does in a moment


def bits(t):
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.detach().cpu().contiguous().view(sizes[t.element_size()])


def same(a, b):
    """Equal shapes, types and bits, NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def values(r, shape, dtype, channels_last):
    generator = torch.Generator().manual_seed(r.randrange(1 << 30))
    if not dtype.is_floating_point:
        t = torch.randint(0, 100, shape, generator=generator).to(dtype)
    else:
        t = torch.randn(shape, generator=generator)
        hard = r.randrange(3)  # 0: ordinary, 1: with subnormals and zeros, 2: with inf and NaN too
        if hard:
            tiny = torch.finfo(dtype).tiny
            special = [0.0, -0.0, tiny / 4, -tiny / 8, tiny, -1.0, 1.0]
            if hard == 2:
                special += [float("inf"), float("-inf"), float("nan")]
            pick = torch.randint(0, 20 * len(special), shape, generator=generator)
            t = torch.where(pick < len(special), torch.tensor(special)[pick % len(special)], t)
        t = t.to(dtype)
    if channels_last and t.dim() >= 4:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        t = t.contiguous(memory_format=formats[t.dim()])
    return t


def numbers(r, dims, choices):
    return tuple(r.choice(choices) for _ in range(dims))


def conv_call(r):
    """A description, and a function of a device that returns tensors."""
    dims = r.choice([1, 2, 2, 2, 3])
    kind = r.choice(["dense", "dense", "grouped", "depthwise"])
    if kind == "depthwise":
        groups = r.choice([1, 3, 8, 40])
        channels, filters = groups, groups * r.choice([1, 1, 2])
    else:
        groups = 1 if kind == "dense" else r.choice([2, 3])
        channels = groups * r.choice([1, 3, 8, 40, 130])
        filters = groups * r.choice([1, 3, 20, 64, 150])
    kernel = (
        numbers(r, dims, [1, 2, 3, 3, 5, 7]) if r.randrange(2) else (r.choice([1, 3, 5, 7]),) * dims
    )
    options = {
        "stride": numbers(r, dims, [1, 1, 2, 3]) if r.randrange(2) else r.choice([1, 2]),
        "padding": numbers(r, dims, [0, 1, 2, 3]),
        "dilation": numbers(r, dims, [1, 1, 2]) if r.randrange(2) else 1,
        "groups": groups,
    }
    spatial = numbers(r, dims, list(range(13, {1: 200, 2: 40, 3: 17}[dims])))
    if math.prod(spatial) * math.prod(kernel) * channels * filters // groups > MOST_PRODUCTS:
        return conv_call(r)
    dtype = r.choice(FLOATS + FLOATS + INTEGERS)
    last = r.randrange(2)
    impl = r.choice([None, *F.implementations("conv2d", "cuda")])
    x = values(r, (r.choice([1, 2, 5]), channels, *spatial), dtype, last)
    w = values(r, (filters, channels // groups, *kernel), dtype, last)
    b = values(r, (filters,), dtype, 0)
    conv = CONV[dims - 1]
    g = values(r, conv(x, w, **options).shape, dtype, last)

    def call(device):
        on = [t.to(device) for t in (x, w, b, g)]
        how = dict(options, impl=impl if device != "cpu" else "naive")
        return [
            conv(on[0], on[1], on[2], **how),
            F.conv_grad_input(x.shape, on[1], on[3], **how),
            F.conv_grad_weight(on[0], w.shape, on[3], **how),
            F.conv_grad_bias(on[3], impl=how["impl"]),
        ]

    return (
        f"{conv.__name__} {tuple(x.shape)} {tuple(w.shape)} {options} {dtype} {last=} {impl=}",
        call,
    )


def pool_call(r):
    dims = r.choice([1, 2, 2, 2, 3])
    kernel = numbers(r, dims, [1, 2, 3, 3, 5])
    options = {
        "kernel_size": kernel,
        "stride": numbers(r, dims, [1, 2, 2, 3]),
        "padding": tuple(r.randrange(k // 2 + 1) for k in kernel),
        "dilation": numbers(r, dims, [1, 1, 2]) if r.randrange(2) else 1,
        "ceil_mode": bool(r.randrange(2)),
        "ties": r.choice(["first", "first", "last", "all", "split"]),
    }
    spatial = numbers(r, dims, list(range(13, {1: 2000, 2: 60, 3: 20}[dims])))
    dtype = r.choice([*FLOATS, *FLOATS, *INTEGERS, torch.bool])
    last = r.randrange(2)
    impl = r.choice([None, *F.implementations("max_pool2d", "cuda")])
    shape = r.choice([1, 2]), r.choice([1, 3, 64]), *spatial
    if dtype == torch.bool:
        x = values(r, shape, torch.uint8, last) > 50
    else:
        x = values(r, shape, dtype, last)
    pool = POOL[dims - 1]
    has_index = options["ties"] in ("first", "last")

    def call(device):
        on = x.to(device)
        how = dict(options, impl=impl if device != "cpu" else "naive")
        if has_index:
            y, index = pool(on, **how, return_indices=True)
            results = [y, index]
        else:
            results = [pool(on, **how)]
        if dtype.is_floating_point:
            leaf = on.clone().requires_grad_()
            out = pool(leaf, **how)
            (grad,) = torch.autograd.grad(
                out, leaf, torch.arange(out.numel(), device=device).to(out).view_as(out)
            )
            results.append(grad)
        if (
            has_index
            and dtype != torch.bool
            and not options["ceil_mode"]
            and bool((index >= 0).all())
        ):
            results.append(ops.max_unpool(y, index, list(spatial)))
        return results

    return f"{pool.__name__} {tuple(x.shape)} {options} {dtype} {last=} {impl=}", call


def disagreements(seed, count, device="cuda"):
    """Runs `count` random calls; returns the descriptions of those whose bits differ."""
    found = []
    for i in range(count):
        r = random.Random(seed * 1_000_003 + i)
        description, call = r.choice([conv_call, conv_call, pool_call])(r)
        expected, got = call("cpu"), call(device)
        where = [k for k, (a, b) in enumerate(zip(expected, got, strict=True)) if not same(a, b)]
        if where:
            found.append(f"seed {seed}, case {i}, results {where}: {description}")
    return found
