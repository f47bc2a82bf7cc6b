"""The operators and what the dispatcher must know of them: libraries, fake kernels, FLOPs,
table rows.

The schemas are in ``csrc/ops.cpp``; the derivative rules in ``autograd.py``. ``padding`` lists hold
a ``(before, after)`` pair per spatial axis; ``geometry`` is stride, padding, dilation end to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

HERE = Path(__file__).parent
CPU_LIBRARY = HERE / "_cpu.so"
CUDA_LIBRARY = HERE / "_cuda.so"


def too_old(version: str) -> bool:
    """Is this torch older than the stable ABI that the libraries are built for?"""
    return tuple(int(part) for part in version.split(".")[:2]) < (2, 11)


def _load() -> None:
    if too_old(torch.__version__):
        raise ImportError(
            f"torch_naiveconv: torch {torch.__version__} is too old: pip install 'torch>=2.11'"
        )
    if not CPU_LIBRARY.exists():
        raise ImportError(
            f"{CPU_LIBRARY.name} is not built: run `pip install -e . --no-build-isolation` "
            "in the source folder, or import from outside of it"
        )
    load(CPU_LIBRARY)
    if torch.version.cuda is not None and CUDA_LIBRARY.exists():
        load(CUDA_LIBRARY)


def load(library: Path) -> None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"{library.name} does not fit this machine or this torch ({error.__cause__ or error}): "
            "remove it and run `pip install --force-reinstall --no-deps --no-build-isolation .` "
            "in the source folder"
        ) from error


def check_fma(conv: Callable[..., Tensor]) -> None:
    """Refuses a machine that rounds a fused multiply-add twice: one sum that tells.

    2^-60 + (1 + 2^-12)^2 lies above the middle of two float32 numbers, by less than float64 sees.
    """
    row = torch.tensor([[[2.0**-30, 1 + 2.0**-12]]], dtype=torch.float32, device="cpu")
    found = conv(row, row, None, [1, 0, 0, 1], 1, "naive").item()
    if found != 1 + 2.0**-11 + 2.0**-23:
        raise ImportError(
            "torch_naiveconv: this machine's fused multiply-add rounds more than once "
            f"(found {found!r}), so it cannot compute the contract's bits"
        )


def libraries_loaded() -> list[Path]:
    """Those of this package's libraries that this process has loaded."""
    return [
        p for p in (CPU_LIBRARY, CUDA_LIBRARY) if str(p.resolve()) in torch.ops.loaded_libraries
    ]


_load()
NAMESPACE = torch.ops.torch_naiveconv
conv = NAMESPACE.conv.default
conv_grad_input = NAMESPACE.conv_grad_input.default
conv_grad_weight = NAMESPACE.conv_grad_weight.default
conv_grad_bias = NAMESPACE.conv_grad_bias.default
max_pool = NAMESPACE.max_pool.default
max_pool_scatter = NAMESPACE.max_pool_scatter.default
max_pool_gather = NAMESPACE.max_pool_gather.default
max_unpool = NAMESPACE.max_unpool.default
max_unpool_gather = NAMESPACE.max_unpool_gather.default
if not NAMESPACE.cpu_conv_rows():
    raise ImportError("torch_naiveconv: this processor has no fused multiply-add instruction")
check_fma(conv)


@cache
def rows(kind: str, device: str) -> tuple[str, ...]:
    """The rows of a table (``"conv"`` or ``"pool"``) that can run on a device here, best first."""
    name = f"{device}_{kind}_rows"
    if device == "cuda" and not torch.cuda.is_available():
        return ()
    op = getattr(NAMESPACE, name, None)
    return () if op is None else tuple(op().split(","))


# ---- fake kernels: the shapes, types and memory formats of the results -------------------------


def is_channels_last(t: Tensor) -> bool:
    """Strides exactly those of a dense channels_last tensor, and not those of a contiguous one.

    The rule of ``csrc/tensor.h``; sizes of 1 count too, so a one-channel image keeps its format.
    """
    if t.dim() < 4:
        return False
    memory_format = torch.channels_last if t.dim() == 4 else torch.channels_last_3d
    return (
        t.is_contiguous(memory_format=memory_format)  # the quick way out
        and _has_strides(t, True)
        and not _has_strides(t, False)
    )


def _has_strides(t: Tensor, channels_last: bool) -> bool:
    expected = t.shape[1] if channels_last else 1
    if channels_last and t.stride(1) != 1:
        return False
    for i in range(t.dim() - 1, -1, -1):
        if channels_last and i == 1:
            continue
        if t.stride(i) != expected:
            return False
        expected = expected * t.shape[i]
    return True


def _empty(
    like: Tensor, size: Sequence[int], channels_last: bool, dtype: torch.dtype | None = None
) -> Tensor:
    memory_format = torch.contiguous_format
    if channels_last and len(size) >= 4:
        memory_format = torch.channels_last if len(size) == 4 else torch.channels_last_3d
    return torch.empty(
        size, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format
    )


def total_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which a sum of ``dtype`` is kept: float32 for the 16-bit types."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def conv_output_size(
    in_: int, kernel: int, stride: int, before: int, after: int, dilation: int
) -> int:
    """``floor((in + before + after - dilation * (kernel - 1) - 1) / stride) + 1``."""
    return (in_ + before + after - dilation * (kernel - 1) - 1) // stride + 1


def split(geometry: Sequence[int]) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """(stride, padding pairs, dilation) of a convolution's geometry."""
    dims = len(geometry) // 4
    return geometry[:dims], geometry[dims : 3 * dims], geometry[3 * dims :]


def conv_output_sizes(
    in_: Sequence[int], kernel: Sequence[int], geometry: Sequence[int]
) -> list[int]:
    """The output's size on each spatial axis."""
    stride, padding, dilation = split(geometry)
    axes = zip(in_, kernel, stride, padding[::2], padding[1::2], dilation, strict=True)
    return [conv_output_size(*axis) for axis in axes]


def offset_dtype(taps: int) -> torch.dtype:
    """The smallest type that holds every offset of a window of ``taps`` and -1."""
    return torch.uint8 if taps <= 255 else torch.int16 if taps <= 32767 else torch.int32


@torch.library.register_fake("torch_naiveconv::conv")
def _(input, weight, bias, geometry, groups, impl):  # type: ignore[no-untyped-def]
    spatial = conv_output_sizes(input.shape[2:], weight.shape[2:], geometry)
    return _empty(input, [input.shape[0], weight.shape[0], *spatial], is_channels_last(input))


@torch.library.register_fake("torch_naiveconv::conv_grad_input")
def _(grad_output, weight, bias, input_size, geometry, groups, impl):  # type: ignore[no-untyped-def]
    size = [grad_output.shape[0], weight.shape[1] * groups, *input_size]
    return _empty(grad_output, size, is_channels_last(grad_output))


@torch.library.register_fake("torch_naiveconv::conv_grad_weight")
def _(grad_output, input, total, kernel_size, geometry, groups, channels_last, impl):  # type: ignore[no-untyped-def]
    size = [grad_output.shape[1], input.shape[1] // groups, *kernel_size]
    dtype = None if total is None else total_dtype(input.dtype)
    return _empty(input, size, channels_last, dtype)


@torch.library.register_fake("torch_naiveconv::conv_grad_bias")
def _(grad_output, total, impl):  # type: ignore[no-untyped-def]
    dtype = None if total is None else total_dtype(grad_output.dtype)
    return _empty(grad_output, [grad_output.shape[1]], False, dtype)


@torch.library.register_fake("torch_naiveconv::max_pool")
def _(input, window, output_size, ties, indices, impl):  # type: ignore[no-untyped-def]
    size = [input.shape[0], input.shape[1], *output_size]
    channels_last = is_channels_last(input)
    taps = 1
    for k in window[: len(output_size)]:
        taps = taps * k
    dtype = torch.int64 if indices == "flat" else offset_dtype(taps)
    index = _empty(input, [0] if indices == "none" else size, channels_last, dtype)
    return _empty(input, size, channels_last), index


@torch.library.register_fake("torch_naiveconv::max_pool_scatter")
def _(grad_output, index, input_size, window, ties, impl):  # type: ignore[no-untyped-def]
    size = [grad_output.shape[0], grad_output.shape[1], *input_size]
    return _empty(grad_output, size, is_channels_last(grad_output))


@torch.library.register_fake("torch_naiveconv::max_pool_gather")
def _(input, index, output_size, window, ties, impl):  # type: ignore[no-untyped-def]
    size = [input.shape[0], input.shape[1], *output_size]
    return _empty(input, size, is_channels_last(input))


@torch.library.register_fake("torch_naiveconv::max_unpool")
def _(input, indices, output_size):  # type: ignore[no-untyped-def]
    return _empty(input, [input.shape[0], input.shape[1], *output_size], False)


@torch.library.register_fake("torch_naiveconv::max_unpool_gather")
def _(grad_output, indices):  # type: ignore[no-untyped-def]
    return _empty(grad_output, indices.shape, False)


# ---- FLOPs, as torch counts them for its own convolutions ----------------------------------------


def _flops(output: Sequence[int], weight: Sequence[int]) -> int:
    """Two for every tap of every filter at every position of the convolution's output."""
    return 2 * output[0] * math.prod(output[2:]) * math.prod(weight)


@register_flop_formula(NAMESPACE.conv)
def _(input, weight, *_, out_shape, **__):  # type: ignore[no-untyped-def]
    return _flops(out_shape, weight)


@register_flop_formula(NAMESPACE.conv_grad_input)
def _(grad_output, weight, *_, **__):  # type: ignore[no-untyped-def]
    return _flops(grad_output, weight)


@register_flop_formula(NAMESPACE.conv_grad_weight)
def _(grad_output, *_, out_shape, **__):  # type: ignore[no-untyped-def]
    return _flops(grad_output, out_shape)


# Context: operators without their autograd kernels; the caller has seen to the derivatives.
below_autograd = torch._C._AutoDispatchBelowAutograd
