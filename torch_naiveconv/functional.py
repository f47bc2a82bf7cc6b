"""Convolution and max-pooling with the signatures and meaning of ``torch.nn.functional``.

Every argument is checked here, once. Below, ``autograd.py`` holds the derivative rules and
``csrc/`` the kernels. All functions take the keyword ``impl``: None (the best that can run here) or
a name from :func:`implementations`; the bits of the result do not depend on it.

Beyond torch: padding as a ``(before, after)`` pair per axis, ``'same'`` with any stride,
``padding_mode``, max-pool padding of any size, integer tensors everywhere (bool in pooling), and
the tie rules of max-pooling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import autograd, ops

Size = int | Sequence[int]
Padding = int | str | Sequence[int] | Sequence[Sequence[int]]

__all__ = [
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_grad_bias",
    "conv_grad_input",
    "conv_grad_weight",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "implementations",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_pool_grad_input",
    "max_unpool1d",
    "max_unpool2d",
    "max_unpool3d",
]

LIMIT = 2**48  # of every single number; keeps all 64-bit sums below in range
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
COMPLEX = (torch.complex64, torch.complex128)
TIES = ("first", "last", "all", "split")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular", "symmetric")


# ---- arguments: sizes --------------------------------------------------------------------------


def _integer(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _sizes(name: str, value: Any, dims: int, least: int) -> list[int]:
    """One integer per spatial axis; a single one counts for all."""
    if _integer(value):
        values = [value] * dims
    elif isinstance(value, (tuple, list, torch.Size)):
        values = list(value) * dims if len(value) == 1 else list(value)
    else:
        raise TypeError(f"{name} must be an int or a tuple of {dims} ints, got {value!r}")
    if len(values) != dims or not all(_integer(v) for v in values):
        kind = ValueError if all(_integer(v) for v in values) else TypeError
        raise kind(f"{name} must be an int or a tuple of {dims} ints, got {value!r}")
    for v in values:
        if v < least or v > LIMIT:
            raise ValueError(f"{name} must be between {least} and 2**48, got {value!r}")
    return values


def _pads(
    value: Any, dims: int, in_: Sequence[int], kernel: Sequence[int], stride: Any, dilation: Any
) -> list[int]:
    """(before, after) for each spatial axis, flat."""
    if isinstance(value, str):
        if value == "valid":
            return [0] * (2 * dims)
        if value != "same":
            raise ValueError(
                f"padding must be 'same', 'valid', an int, a tuple of {dims} ints or "
                f"of {dims} (before, after) pairs, got {value!r}"
            )
        pads = []
        for i in range(dims):
            out = -(-in_[i] // stride[i])
            total = (out - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 - in_[i]
            total = max(total, 0)
            pads += [total // 2, total - total // 2]
        return pads
    pairs = isinstance(value, (tuple, list)) and any(isinstance(v, (tuple, list)) for v in value)
    if not pairs:
        return [p for p in _sizes("padding", value, dims, 0) for _ in range(2)]
    if len(value) != dims:
        raise ValueError(f"padding must hold {dims} (before, after) pairs, got {value!r}")
    pads = []
    for v in value:
        pair = [v, v] if _integer(v) else list(v)
        if len(pair) != 2:
            raise ValueError(f"padding must hold {dims} (before, after) pairs, got {value!r}")
        pads += _sizes("padding", pair, 2, 0)
    return pads


def _check_numel(name: str, shape: Sequence[int]) -> None:
    """A tensor whose size cannot be counted cannot be asked for."""
    if all(isinstance(size, int) for size in shape) and math.prod(shape) >= 2**62:
        raise ValueError(f"{name} would have the shape {tuple(shape)}: over 2**62 elements")


NO_TORCHSCRIPT = (
    "torch_naiveconv has no TorchScript, which torch itself has given up: use torch.export or "
    "torch.compile, or turn the layers back into torch's with convert(model, back=True)"
)
_tracing = torch.jit.is_tracing


Function = TypeVar("Function", bound=Callable[..., Any])


def _remembered(function: Function) -> Function:
    """lru_cache for argument checks, stepping aside for lists, symbolic sizes and compilers."""
    cached = lru_cache(maxsize=4096)(function)
    is_compiling = torch.compiler.is_compiling

    @wraps(function)
    def call(*args: Any) -> Any:
        if is_compiling():
            return function(*args)
        try:
            return cached(*args)
        except TypeError:
            return function(*args)

    return call  # type: ignore[return-value]


@_remembered
def _conv_geometry(
    dims: int,
    input: Sequence[int],
    weight: Sequence[int],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
) -> list[int]:
    """The checked geometry of a batched convolution: stride, padding pairs, dilation."""
    if not _integer(groups):
        raise TypeError(f"groups must be an int, got {groups!r}")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    channels, filters = input[1], weight[0]
    if channels != weight[1] * groups:
        raise ValueError(
            f"input has {channels} channels (shape {tuple(input)}), but weight (shape "
            f"{tuple(weight)}) with groups={groups} expects {weight[1]} * {groups} = "
            f"{weight[1] * groups}: the weight's shape is (out_channels, in_channels / groups, ...)"
        )
    if filters % groups:
        raise ValueError(
            f"groups={groups} must divide the {filters} filters of weight (shape {tuple(weight)})"
        )
    kernel = weight[2:]
    stride = _sizes("stride", stride, dims, 1)
    dilation = _sizes("dilation", dilation, dims, 1)
    padding = _pads(padding, dims, input[2:], kernel, stride, dilation)
    out = [input[0], filters]
    for i in range(dims):
        before, after = padding[2 * i : 2 * i + 2]
        if kernel[i] < 1:
            raise ValueError(f"weight (shape {tuple(weight)}) has an empty kernel")
        size = ops.conv_output_size(input[2 + i], kernel[i], stride[i], before, after, dilation[i])
        if input[2 + i] < 1 or size < 1:
            raise ValueError(
                f"no output on spatial axis {i}: floor((input {input[2 + i]} + padding {before} + "
                f"{after} - dilation {dilation[i]} * (kernel {kernel[i]} - 1) - 1) / stride "
                f"{stride[i]}) + 1 = {size}: enlarge the input or the padding, or use a smaller "
                "kernel or dilation"
            )
        out.append(size)
    _check_numel("output", out)
    return [*stride, *padding, *dilation]


@_remembered
def _transposed_geometry(
    dims: int,
    input: Sequence[int],
    weight: Sequence[int],
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: Any,
    dilation: Any,
) -> tuple[list[int], list[int]]:
    """Checked (output size, geometry) of a transposed convolution."""
    if not _integer(groups):
        raise TypeError(f"groups must be an int, got {groups!r}")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    if input[1] != weight[0]:
        raise ValueError(
            f"input has {input[1]} channels (shape {tuple(input)}), but weight (shape "
            f"{tuple(weight)}) expects {weight[0]}: a transposed weight has the shape "
            "(in_channels, out_channels / groups, ...)"
        )
    if weight[0] % groups:
        raise ValueError(f"groups={groups} must divide the {weight[0]} input channels")
    kernel = weight[2:]
    stride = _sizes("stride", stride, dims, 1)
    dilation = _sizes("dilation", dilation, dims, 1)
    extra = _sizes("output_padding", output_padding, dims, 0)
    if isinstance(padding, str):
        raise ValueError(f"padding of a transposed convolution must be numbers, got {padding!r}")
    padding = _pads(padding, dims, input[2:], kernel, stride, dilation)
    sizes = []
    for i in range(dims):
        before, after = padding[2 * i : 2 * i + 2]
        if kernel[i] < 1:
            raise ValueError(f"weight (shape {tuple(weight)}) has an empty kernel")
        if extra[i] >= max(stride[i], dilation[i]):
            raise ValueError(
                f"output_padding {extra[i]} on spatial axis {i} must be smaller than stride "
                f"{stride[i]} or dilation {dilation[i]}"
            )
        size = (
            (input[2 + i] - 1) * stride[i]
            - before
            - after
            + dilation[i] * (kernel[i] - 1)
            + extra[i]
            + 1
        )
        if input[2 + i] < 1 or size < 1 or size > LIMIT:
            raise ValueError(
                f"no output on spatial axis {i}: (input {input[2 + i]} - 1) * stride {stride[i]} - "
                f"padding {before} - {after} + dilation {dilation[i]} * (kernel {kernel[i]} - 1) + "
                f"output_padding {extra[i]} + 1 = {size}: use less padding or a larger kernel"
            )
        sizes.append(size)
    _check_numel("output", [input[0], weight[1] * groups, *sizes])
    return sizes, [*stride, *padding, *dilation]


@_remembered
def _pool_geometry(
    dims: int,
    input: Sequence[int],
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Checked (kernel, stride, padding pairs, dilation, output size) of a batched pooling."""
    kernel = _sizes("kernel_size", kernel_size, dims, 1)
    if stride is None or (isinstance(stride, (tuple, list)) and not stride):
        stride = kernel
    stride = _sizes("stride", stride, dims, 1)
    dilation = _sizes("dilation", dilation, dims, 1)
    if isinstance(padding, str):
        raise TypeError(
            f"padding must be an int, {dims} ints or {dims} (before, after) pairs, got {padding!r}"
        )
    padding = _pads(padding, dims, input[2:], kernel, stride, dilation)
    sizes = []
    for i in range(dims):
        before, after = padding[2 * i : 2 * i + 2]
        rounding = stride[i] - 1 if ceil_mode else 0
        room = input[2 + i] + before + after - dilation[i] * (kernel[i] - 1) - 1
        size = (room + rounding) // stride[i] + 1
        if ceil_mode and (size - 1) * stride[i] >= input[2 + i] + before:
            size -= 1  # the last window would begin behind the input
        if input[2 + i] < 1 or size < 1:
            raise ValueError(
                f"no output on spatial axis {i}: {'ceil' if ceil_mode else 'floor'}((input "
                f"{input[2 + i]} + padding {before} + {after} - dilation {dilation[i]} * (kernel "
                f"{kernel[i]} - 1) - 1) / stride {stride[i]}) + 1 = {size}: enlarge the input or "
                "the padding, or use a smaller kernel or dilation"
            )
        sizes.append(size)
    if math.prod(kernel) >= 2**31:
        raise ValueError(f"kernel_size {tuple(kernel)} has 2**31 taps or more")
    _check_numel("output", [input[0], input[1], *sizes])
    return kernel, stride, padding, dilation, sizes


# ---- arguments: tensors ------------------------------------------------------------------------


def _check_tensor(name: str, t: Any, ranks: tuple[int, ...], dtypes: tuple[Any, ...]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
    if t.is_nested:
        raise TypeError(
            f"{name} must not be nested: use .to_padded_tensor(0), or one call for each"
        )
    if t.dim() not in ranks:
        expected = " or ".join(f"{rank}-D" for rank in ranks)
        raise ValueError(f"{name} must be {expected}, got {t.dim()}-D of shape {tuple(t.shape)}")
    if t.dtype not in dtypes:
        raise TypeError(
            f"{name} is {t.dtype}, which is not supported here; convert it to one of "
            + ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        )
    if t.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {t.layout}: use .to_dense()")


def _check_alike(name: str, t: Any, like_name: str, like: Tensor) -> None:
    """`t` of the type and on the device of `like`."""
    if t.dtype != like.dtype:
        raise TypeError(
            f"{name} is {t.dtype}, but {like_name} is {like.dtype}: convert one of them, "
            f"for instance {name}.to({like_name}.dtype)"
        )
    if t.device != like.device:
        raise ValueError(
            f"{name} is on {t.device}, but {like_name} is on {like.device}: move one of them, "
            f"for instance {name}.to({like_name}.device)"
        )


NUMBERS = (*FLOATS, *INTEGERS, *COMPLEX)
STRIDED = torch.strided


def _check_conv_tensors(dims: int, input: Any, weight: Any, bias: Any, filters: bool) -> bool:
    """Types, ranks and devices; the common case is one comparison each. Says if it was that one:
    real floating-point tensors."""
    plain = (
        type(input) is Tensor
        and isinstance(weight, Tensor)
        and (dtype := input.dtype) is weight.dtype
        and dtype in FLOATS
        and ((input.is_cpu and weight.is_cpu) or input.device == weight.device)
        and weight.dim() == dims + 2
        and weight.dim() - input.dim() in (0, 1)
        and input.layout is weight.layout is STRIDED
        and not (input.is_nested or weight.is_nested)
    )
    if not plain:
        _check_tensor("input", input, (dims + 1, dims + 2), NUMBERS)
        _check_tensor("weight", weight, (dims + 2,), NUMBERS)
        _check_alike("weight", weight, "input", input)
    if bias is not None:
        if not (isinstance(bias, Tensor) and bias.dim() == 1 and bias.layout is STRIDED):
            _check_tensor("bias", bias, (1,), NUMBERS)
        _check_alike("bias", bias, "input", input)
        if filters and bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"bias has {bias.shape[0]} elements, but weight has {weight.shape[0]} filters: "
                "pass one bias per filter"
            )
    return plain


def _row(kind: str, impl: str | None, device: torch.device) -> str:
    if impl is None:
        return "auto"
    names = ops.rows(kind, device.type)
    if impl not in names:
        raise ValueError(
            f"impl={impl!r} cannot run on {device.type} here; choose one of {', '.join(names)}, "
            "or None for the best of them"
        )
    return impl


_any_autocast = torch._C._is_any_autocast_enabled  # the quick way out


def _autocast_enabled(t: Any) -> bool:
    if not isinstance(t, Tensor):
        return False
    device = t.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(*tensors: Any) -> Any:
    """What autocast does to convolutions: all to the region's type, float64 excepted."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.dtype in (torch.float32, torch.float16, torch.bfloat16)
        else t
        for t in tensors
    )


# ---- convolution -------------------------------------------------------------------------------


def _pad(input: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """The input with (before, after) pairs of a padding mode made explicit."""
    if mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {mode!r}")
    for i in range(len(padding) // 2):
        size = input.shape[2 + i]
        limit = size - 1 if mode == "reflect" else size
        before, after = padding[2 * i : 2 * i + 2]
        if mode != "replicate" and max(before, after) > limit:
            raise ValueError(
                f"padding {before}, {after} on spatial axis {i} is too large for padding_mode="
                f"{mode!r} and an input of {size}: at most {limit}"
            )
        if before == after == 0:
            continue
        position = torch.arange(-before, size + after, device=input.device)
        if mode == "replicate":
            position = position.clamp(0, size - 1)
        elif mode == "circular":
            position = position % size
        elif mode == "reflect":
            position = (size - 1) - ((size - 1) - position.abs()).abs()
        else:
            position = torch.where(position < 0, -1 - position, position)
            position = torch.where(position >= size, 2 * size - 1 - position, position)
        input = input.index_select(2 + i, position)
    return input


def _conv(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Padding,
    dilation: Size,
    groups: int,
    padding_mode: str,
    impl: str | None,
) -> Tensor:
    if _tracing():
        raise RuntimeError(NO_TORCHSCRIPT)
    if _any_autocast() and _autocast_enabled(input):
        input, weight, bias = _autocast(input, weight, bias)
    plain = _check_conv_tensors(dims, input, weight, bias, True)
    row = "auto" if impl is None else _row("conv", impl, input.device)
    batched = input.dim() == dims + 2
    if not batched:
        input = input.unsqueeze(0)
    geometry = _conv_geometry(dims, input.shape, weight.shape, stride, padding, dilation, groups)
    if padding_mode != "zeros":
        steps, pads, dilations = ops.split(geometry)
        input = _pad(input, pads, padding_mode)
        geometry = [*steps, *(0 for _ in pads), *dilations]
    if plain or not input.is_complex():
        output = autograd.conv(input, weight, bias, geometry, groups, row)
    else:
        output = _by_parts(autograd.conv, input, weight, bias, (geometry, groups, row))
    return output if batched else output.squeeze(0)


def _by_parts(
    function: Callable[..., Tensor], x: Tensor, w: Tensor, bias: Tensor | None, arguments: Any
) -> Tensor:
    """(a + ib)(c + id) = (ac - bd) + i(ad + bc), each product a real convolution, bias last."""
    a, b, c, d = x.real, x.imag, w.real, w.imag
    real = function(a, c, None, *arguments) - function(b, d, None, *arguments)
    imag = function(a, d, None, *arguments) + function(b, c, None, *arguments)
    out = torch.complex(real, imag)
    return out if bias is None else out + bias.view(1, -1, *(1,) * (x.dim() - 2))


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    impl: str | None = None,
) -> Tensor:
    """1-D convolution; :func:`conv2d` with one spatial axis.

    Shapes: input (N, C, L) or (C, L), weight (K, C / groups, kernel), output (N, K, L_out).

    >>> import torch
    >>> x = torch.tensor([[[0.0, 1, 2, 3]]])
    >>> conv1d(x, torch.tensor([[[1.0, 10]]]), stride=2)
    tensor([[[10., 32.]]])
    """
    return _conv(1, input, weight, bias, stride, padding, dilation, groups, padding_mode, impl)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    impl: str | None = None,
) -> Tensor:
    """2-D convolution (cross-correlation), as ``torch.nn.functional.conv2d``.

    ``output[n, k, i, j] = bias[k] + sum over c, u, v of weight[k, c, u, v] *
    input[n, c, i * stride + u * dilation - padding, j * stride + v * dilation - padding]``,
    summed in the order that ``docs/contract.md`` states.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, float16, bfloat16, an integer type, or
            complex (composed of real convolutions).
        weight: (K, C / groups, kernel height, kernel width), of the same type.
        bias: (K,) or None.
        stride: steps of the window, one int or one per axis.
        padding: an int, one per axis, a ``(before, after)`` pair per axis, ``'valid'``, or
            ``'same'``: ``ceil(input / stride)`` outputs, the odd pad behind.
        dilation: distance of two taps.
        groups: blocks of channels that do not see each other.
        padding_mode: what the padding holds: 'zeros', 'reflect', 'replicate', 'circular',
            'symmetric'.
        impl: None or a name from ``implementations("conv2d", device)``.

    Returns:
        (N, K, H_out, W_out) in the memory format of the input, with ``H_out =
        floor((H + before + after - dilation * (kernel - 1) - 1) / stride) + 1``.

    Raises:
        ValueError, TypeError: arguments that do not fit; the message holds the numbers.

    >>> import torch
    >>> x = torch.arange(9.0).view(1, 1, 3, 3)
    >>> conv2d(x, torch.tensor([[[[0.0, 1], [2, 3]]]]))
    tensor([[[[19., 25.],
              [37., 43.]]]])
    """
    return _conv(2, input, weight, bias, stride, padding, dilation, groups, padding_mode, impl)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    impl: str | None = None,
) -> Tensor:
    """3-D convolution; :func:`conv2d` with three spatial axes.

    Shapes: input (N, C, D, H, W) or (C, D, H, W), weight (K, C / groups, kd, kh, kw).

    >>> import torch
    >>> conv3d(torch.ones(1, 2, 2, 2, 2), torch.ones(1, 2, 2, 2, 2)).item()
    16.0
    """
    return _conv(3, input, weight, bias, stride, padding, dilation, groups, padding_mode, impl)


# ---- transposed convolution --------------------------------------------------------------------


def _conv_transpose(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Padding,
    output_padding: Size,
    groups: int,
    dilation: Size,
    impl: str | None,
) -> Tensor:
    if _tracing():
        raise RuntimeError(NO_TORCHSCRIPT)
    if _any_autocast() and _autocast_enabled(input):
        input, weight, bias = _autocast(input, weight, bias)
    _check_conv_tensors(dims, input, weight, bias, False)
    row = "auto" if impl is None else _row("conv", impl, input.device)
    batched = input.dim() == dims + 2
    if not batched:
        input = input.unsqueeze(0)
    size, geometry = _transposed_geometry(
        dims, input.shape, weight.shape, stride, padding, output_padding, groups, dilation
    )
    if bias is not None and bias.shape[0] != weight.shape[1] * groups:
        raise ValueError(
            f"bias has {bias.shape[0]} elements, but weight (shape {tuple(weight.shape)}) with "
            f"groups={groups} makes {weight.shape[1] * groups} channels: pass one bias per channel"
        )
    if input.is_complex():
        output = _by_parts(
            autograd.conv_grad_input, input, weight, bias, (size, geometry, groups, row)
        )
    else:
        output = autograd.conv_grad_input(input, weight, bias, size, geometry, groups, row)
    return output if batched else output.squeeze(0)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    impl: str | None = None,
) -> Tensor:
    """1-D transposed convolution; :func:`conv_transpose2d` with one spatial axis.

    >>> import torch
    >>> conv_transpose1d(torch.tensor([[[1.0, 2]]]), torch.tensor([[[1.0, 10]]]), stride=2)
    tensor([[[ 1., 10.,  2., 20.]]])
    """
    return _conv_transpose(
        1, input, weight, bias, stride, padding, output_padding, groups, dilation, impl
    )


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    impl: str | None = None,
) -> Tensor:
    """2-D transposed convolution, as ``torch.nn.functional.conv_transpose2d``.

    It is the map by which a convolution's gradient reaches its input, and the same code.

    Args:
        input: (N, C, H, W) or (C, H, W).
        weight: (C, K / groups, kernel height, kernel width).
        bias: (K,) or None.
        stride, padding, dilation, groups: those of the convolution that it transposes; padding may
            hold ``(before, after)`` pairs.
        output_padding: rows and columns added behind, smaller than stride or dilation.
        impl: None or a name from ``implementations("conv_transpose2d", device)``.

    Returns:
        (N, K, H_out, W_out) with ``H_out = (H - 1) * stride - before - after +
        dilation * (kernel - 1) + output_padding + 1``.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    >>> import torch
    >>> conv_transpose2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    tensor([[[[1., 2., 1.],
              [2., 4., 2.],
              [1., 2., 1.]]]])
    """
    return _conv_transpose(
        2, input, weight, bias, stride, padding, output_padding, groups, dilation, impl
    )


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    impl: str | None = None,
) -> Tensor:
    """3-D transposed convolution; :func:`conv_transpose2d` with three spatial axes.

    >>> import torch
    >>> conv_transpose3d(torch.ones(1, 1, 1, 1, 1), torch.ones(1, 2, 2, 2, 2)).shape
    torch.Size([1, 2, 2, 2, 2])
    """
    return _conv_transpose(
        3, input, weight, bias, stride, padding, output_padding, groups, dilation, impl
    )


# ---- the gradients by themselves ---------------------------------------------------------------


def _gradient_geometry(
    input: Sequence[int],
    weight: Sequence[int],
    grad_output: Tensor,
    stride: Size,
    padding: Padding,
    dilation: Size,
    groups: int,
) -> list[int]:
    dims = grad_output.dim() - 2
    if len(input) != dims + 2 or len(weight) != dims + 2:
        raise ValueError(
            f"sizes of input {tuple(input)}, weight {tuple(weight)} and grad_output "
            f"{tuple(grad_output.shape)} must have one rank: gradients take batched tensors"
        )
    geometry = _conv_geometry(
        dims, torch.Size(input), torch.Size(weight), stride, padding, dilation, groups
    )
    expected = [input[0], weight[0], *ops.conv_output_sizes(input[2:], weight[2:], geometry)]
    if list(grad_output.shape) != expected:
        raise ValueError(
            f"grad_output has the shape {tuple(grad_output.shape)}, but the convolution's output "
            f"has {tuple(expected)}"
        )
    return geometry


def conv_grad_input(
    input_size: Sequence[int],
    weight: Tensor,
    grad_output: Tensor,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    impl: str | None = None,
) -> Tensor:
    """The gradient of a convolution by its input, 1-D to 3-D (``torch.nn.grad.conv2d_input``).

    >>> import torch
    >>> g = torch.zeros(1, 1, 3, 3); g[0, 0, 0, 0] = 1
    >>> conv_grad_input((1, 1, 4, 4), torch.tensor([[[[1.0, 2], [3, 4]]]]), g)[0, 0, :2, :2]
    tensor([[1., 2.],
            [3., 4.]])
    """
    _check_tensor("grad_output", grad_output, (3, 4, 5), (*FLOATS, *INTEGERS))
    _check_tensor("weight", weight, (grad_output.dim(),), (*FLOATS, *INTEGERS))
    _check_alike("weight", weight, "grad_output", grad_output)
    geometry = _gradient_geometry(
        input_size, weight.shape, grad_output, stride, padding, dilation, groups
    )
    return autograd.conv_grad_input(
        grad_output,
        weight,
        None,
        list(input_size[2:]),
        geometry,
        groups,
        _row("conv", impl, grad_output.device),
    )


def conv_grad_weight(
    input: Tensor,
    weight_size: Sequence[int],
    grad_output: Tensor,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    total: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """The gradient of a convolution by its weight, 1-D to 3-D (``torch.nn.grad.conv2d_weight``).

    With ``total`` the sum goes on from an earlier one (the *resume* promise): the gradient of a
    batch equals, bit for bit, the gradient of its first samples continued with the rest. ``total``
    has the weight's shape and the accumulation type (float32 for 16-bit types), and so has the
    result then; start from zeros.

    >>> import torch
    >>> x = torch.arange(16.0).view(1, 1, 4, 4)
    >>> g = torch.zeros(1, 1, 3, 3); g[0, 0, 0, 0] = 1
    >>> conv_grad_weight(x, (1, 1, 2, 2), g)
    tensor([[[[0., 1.],
              [4., 5.]]]])
    """
    _check_tensor("grad_output", grad_output, (3, 4, 5), (*FLOATS, *INTEGERS))
    _check_tensor("input", input, (grad_output.dim(),), (*FLOATS, *INTEGERS))
    _check_alike("input", input, "grad_output", grad_output)
    geometry = _gradient_geometry(
        input.shape, weight_size, grad_output, stride, padding, dilation, groups
    )
    if total is not None:
        dtype = ops.total_dtype(input.dtype)
        if tuple(total.shape) != tuple(weight_size) or total.dtype != dtype:
            raise ValueError(
                f"total must have the shape {tuple(weight_size)} and the type {dtype}, got "
                f"{tuple(total.shape)} and {total.dtype}"
            )
    return autograd.conv_grad_weight(
        grad_output,
        input,
        total,
        list(weight_size[2:]),
        geometry,
        groups,
        False,
        _row("conv", impl, input.device),
    )


def conv_grad_bias(
    grad_output: Tensor, *, total: Tensor | None = None, impl: str | None = None
) -> Tensor:
    """The gradient of a convolution by its bias: grad_output (N, K, ...) summed to (K,).

    ``total`` as in :func:`conv_grad_weight`.

    >>> import torch
    >>> conv_grad_bias(torch.ones(2, 3, 4, 4))
    tensor([32., 32., 32.])
    """
    _check_tensor("grad_output", grad_output, (3, 4, 5), (*FLOATS, *INTEGERS))
    if total is not None:
        dtype = ops.total_dtype(grad_output.dtype)
        if tuple(total.shape) != (grad_output.shape[1],) or total.dtype != dtype:
            raise ValueError(
                f"total must have the shape {(grad_output.shape[1],)} and the type {dtype}, got "
                f"{tuple(total.shape)} and {total.dtype}"
            )
    return autograd.conv_grad_bias(grad_output, total, _row("conv", impl, grad_output.device))


# ---- max-pooling -------------------------------------------------------------------------------


def _max_pool(
    dims: int,
    input: Tensor,
    kernel_size: Size,
    stride: Size | None,
    padding: Padding,
    dilation: Size,
    ceil_mode: bool,
    return_indices: bool,
    ties: str,
    impl: str | None,
) -> Any:
    if _tracing():
        raise RuntimeError(NO_TORCHSCRIPT)
    _check_tensor("input", input, (dims + 1, dims + 2), (*FLOATS, *INTEGERS, torch.bool))
    if ties not in TIES:
        raise ValueError(f"ties must be one of {', '.join(TIES)}, got {ties!r}")
    several = ties in ("all", "split")
    if several and return_indices:
        raise ValueError(
            f"ties={ties!r} chooses several elements of a window, so there are no indices to "
            "return: use ties='first' or 'last'"
        )
    row = "auto" if impl is None else _row("pool", impl, input.device)
    batched = input.dim() == dims + 2
    if not batched:
        input = input.unsqueeze(0)
    kernel, stride, padding, dilation, size = _pool_geometry(
        dims, input.shape, kernel_size, stride, padding, dilation, bool(ceil_mode)
    )
    if return_indices:
        indices = "flat"
    elif not several and (
        autograd.transforms_active()
        or (torch.is_grad_enabled() and (input.requires_grad or torch.compiler.is_exporting()))
    ):
        indices = "offset"
    else:
        indices = "none"
    window = [*kernel, *stride, *padding, *dilation]
    output, index = autograd.max_pool(input, window, size, ties, indices, row)
    if not batched:
        output = output.squeeze(0)
    if not return_indices:
        return output
    return output, index if batched else index.squeeze(0)


def max_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Padding = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    ties: str = "first",
    impl: str | None = None,
) -> Any:
    """1-D max-pooling; :func:`max_pool2d` with one spatial axis.

    >>> import torch
    >>> max_pool1d(torch.tensor([[[3.0, 0, 4, 2, 0]]]), 3, 2, return_indices=True)
    (tensor([[[4., 4.]]]), tensor([[[2, 2]]]))
    """
    return _max_pool(
        1,
        input,
        kernel_size,
        stride,
        padding,
        dilation,
        ceil_mode,
        return_indices,
        ties,
        impl,
    )


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Padding = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    ties: str = "first",
    impl: str | None = None,
) -> Any:
    """2-D max-pooling, as ``torch.nn.functional.max_pool2d``.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, float16, bfloat16, integers, bool.
        kernel_size: height and width of the window.
        stride: its steps; None means kernel_size.
        padding: positions around the input that hold nothing, of any size; an int, one per axis, or
            a ``(before, after)`` pair per axis.
        dilation: distance of two taps.
        ceil_mode: also a last window that begins on the input (or the padding before it) and ends
            behind the padding.
        return_indices: also return int64 positions in the flattened (H, W) plane.
        ties: which of several equal maxima counts: "first" (torch's rule), "last", "all" (each gets
            the whole gradient) or "split" (each gets an equal share).
        impl: None or a name from ``implementations("max_pool2d", device)``.

    Returns:
        (N, C, H_out, W_out), or a pair with the indices. The last NaN of a window wins; a window
        that holds no input at all gives -inf (or the least integer) and index -1.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    >>> import torch
    >>> max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 3, padding=1, stride=2)
    tensor([[[[ 5.,  7.],
              [13., 15.]]]])
    """
    return _max_pool(
        2,
        input,
        kernel_size,
        stride,
        padding,
        dilation,
        ceil_mode,
        return_indices,
        ties,
        impl,
    )


def max_pool3d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Padding = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    ties: str = "first",
    impl: str | None = None,
) -> Any:
    """3-D max-pooling; :func:`max_pool2d` with three spatial axes.

    >>> import torch
    >>> max_pool3d(torch.arange(8.0).view(1, 1, 2, 2, 2), 2).item()
    7.0
    """
    return _max_pool(
        3,
        input,
        kernel_size,
        stride,
        padding,
        dilation,
        ceil_mode,
        return_indices,
        ties,
        impl,
    )


def max_pool_grad_input(
    input: Tensor,
    grad_output: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Padding = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    *,
    ties: str = "first",
    impl: str | None = None,
) -> Tensor:
    """The gradient of max-pooling by its input, 1-D to 3-D; grad_output may have another type.

    >>> import torch
    >>> x = torch.tensor([[[3.0, 0, 4, 2, 0]]])
    >>> max_pool_grad_input(x, torch.tensor([[[0.5, 1.0]]]), 3, 2)
    tensor([[[0.0000, 0.0000, 1.5000, 0.0000, 0.0000]]])
    """
    _check_tensor("input", input, (3, 4, 5), (*FLOATS, *INTEGERS, torch.bool))
    _check_tensor("grad_output", grad_output, (input.dim(),), (*FLOATS, *INTEGERS))
    if ties not in TIES:
        raise ValueError(f"ties must be one of {', '.join(TIES)}, got {ties!r}")
    kernel, stride, padding, dilation, size = _pool_geometry(
        input.dim() - 2, input.shape, kernel_size, stride, padding, dilation, bool(ceil_mode)
    )
    if list(grad_output.shape) != [*input.shape[:2], *size]:
        raise ValueError(
            f"grad_output has the shape {tuple(grad_output.shape)}, but the pooling's output has "
            f"{(*input.shape[:2], *size)}"
        )
    if grad_output.device != input.device:
        raise ValueError(f"grad_output is on {grad_output.device}, but input is on {input.device}")
    row = _row("pool", impl, input.device)
    window = [*kernel, *stride, *padding, *dilation]
    if ties in ("all", "split"):
        chosen = input.to(grad_output.dtype)
    else:
        chosen = autograd.max_pool(input.detach(), window, size, ties, "offset", row)[1]
    return autograd.max_pool_scatter(grad_output, chosen, list(input.shape[2:]), window, ties, row)


# ---- max-unpooling -----------------------------------------------------------------------------


def _max_unpool(
    dims: int,
    input: Tensor,
    indices: Tensor,
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    output_size: Sequence[int] | None,
) -> Tensor:
    _check_tensor("input", input, (dims + 1, dims + 2), (*FLOATS, *INTEGERS))
    _check_tensor("indices", indices, (dims + 1, dims + 2), (torch.int64,))
    if indices.shape != input.shape:
        raise ValueError(
            f"indices (shape {tuple(indices.shape)}) must have the shape of input, "
            f"{tuple(input.shape)}"
        )
    if indices.device != input.device:
        raise ValueError(f"indices are on {indices.device}, but input is on {input.device}")
    kernel = _sizes("kernel_size", kernel_size, dims, 1)
    steps = kernel if stride is None else _sizes("stride", stride, dims, 1)
    pads = _sizes("padding", padding, dims, 0)
    batched = input.dim() == dims + 2
    spatial = input.shape[-dims:]
    default = [(spatial[i] - 1) * steps[i] - 2 * pads[i] + kernel[i] for i in range(dims)]
    if output_size is None:
        size = default
    else:
        size = list(output_size)[-dims:]
        if len(output_size) not in (dims, dims + 1, dims + 2) or not all(map(_integer, size)):
            raise ValueError(f"output_size must hold {dims} sizes, got {output_size!r}")
        for i in range(dims):
            if not default[i] - steps[i] < size[i] < default[i] + steps[i]:
                raise ValueError(
                    f"output_size {size[i]} on spatial axis {i} must lie between "
                    f"{default[i] - steps[i]} and {default[i] + steps[i]}, both exclusive: (input "
                    f"{spatial[i]} - 1) * stride {steps[i]} - 2 * padding {pads[i]} + kernel "
                    f"{kernel[i]} = {default[i]}, plus or minus less than a stride"
                )
    if any(s < 1 for s in size):
        raise ValueError(f"no output: its size would be {tuple(size)}")
    _check_numel("output", [*input.shape[:-dims], *size])
    if not batched:
        input, indices = input.unsqueeze(0), indices.unsqueeze(0)
    output = autograd.max_unpool(input, indices, size)
    return output if batched else output.squeeze(0)


def max_unpool1d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """1-D max-unpooling; :func:`max_unpool2d` with one spatial axis.

    >>> import torch
    >>> max_unpool1d(torch.tensor([[[4.0, 9]]]), torch.tensor([[[1, 2]]]), 2)
    tensor([[[0., 4., 9., 0.]]])
    """
    return _max_unpool(1, input, indices, kernel_size, stride, padding, output_size)


def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """2-D max-unpooling, as ``torch.nn.functional.max_unpool2d``.

    Every value goes to its index in the flattened output plane, the rest is 0. Where two values
    have one index, the last in memory order stays, and it alone gets the gradient.

    Args:
        input: (N, C, H, W) or (C, H, W).
        indices: int64, of the same shape, as returned by :func:`max_pool2d`.
        kernel_size, stride, padding: those of the pooling.
        output_size: resolves the size that was pooled; default ``(H - 1) * stride - 2 * padding +
            kernel_size``.
        impl: accepted for symmetry; there is one implementation per device.

    Raises:
        ValueError, TypeError: arguments that do not fit.
        RuntimeError: an index outside of the output plane.

    >>> import torch
    >>> y, i = max_pool2d(torch.arange(4.0).view(1, 1, 2, 2), 2, return_indices=True)
    >>> max_unpool2d(y, i, 2)
    tensor([[[[0., 0.],
              [0., 3.]]]])
    """
    return _max_unpool(2, input, indices, kernel_size, stride, padding, output_size)


def max_unpool3d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """3-D max-unpooling; :func:`max_unpool2d` with three spatial axes.

    >>> import torch
    >>> max_unpool3d(torch.ones(1, 1, 1, 1, 1), torch.full((1, 1, 1, 1, 1), 7), 2).sum().item()
    1.0
    """
    return _max_unpool(3, input, indices, kernel_size, stride, padding, output_size)


# ---- what can run here -------------------------------------------------------------------------


def implementations(function: str, device: str | torch.device = "cpu") -> tuple[str, ...]:
    """The values of ``impl`` that can run a function on a device here, best first, "naive" last.

    >>> implementations("conv2d", "cpu")[-1]
    'naive'
    >>> implementations("max_pool1d")[-1]
    'naive'
    """
    if function not in __all__ or function == "implementations":
        raise ValueError(f"no function called {function!r}; there are {', '.join(__all__)}")
    if "unpool" in function:
        return ("naive",)
    return ops.rows("pool" if "pool" in function else "conv", torch.device(device).type)


for _name in __all__:
    torch.fx.wrap(_name)  # a traced model calls the function: the checks need a real tensor
