"""The derivative rules, written once.

conv, conv_grad_input and conv_grad_weight are each bilinear, and the derivatives of any of them are
the other two; gather and scatter of pooling are each other's derivative. So a handful of functions
gives every order of derivative.

Each rule set is an ``autograd.Function`` that is also the operator's kernel for the dispatcher's
Autograd key, so compilers, ``torch.func`` and direct calls of an operator get the same derivatives.
Eager calls take a shorter road (``_differentiable``) to the functions at the end, which have the
signatures of the operators in ``ops.py``; call those, not the operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import tree_map_only

from . import ops

Ints = list[int]

# Gradients of the arguments that are no tensors. As many as any rule needs: what is too much, the
# engine drops.
REST = (None,) * 5


_functorch_level = torch._C._functorch.peek_interpreter_stack


def transforms_active() -> bool:
    """Is a torch.func transform or a forward-mode level active?"""
    return _functorch_level() is not None or forward_ad._current_level >= 0


LIBRARY = torch.library.Library("torch_naiveconv", "FRAGMENT")


def _autograd_kernel(rules: type[_Rules]) -> Callable[..., Any]:
    apply = rules.apply

    def kernel(*args: Any) -> Any:
        with enable_single_level_autograd_function():  # torch.func calls this once for each level
            return apply(*args)

    return kernel


def _forward(op: Any) -> Callable[..., Any]:
    """The operator without its autograd kernel, which is what called."""
    run, below_autograd = op._op, ops.below_autograd

    def forward(*args: Any) -> Any:
        if _functorch_level() is None:
            with below_autograd():
                return run(*args)
        # Other levels of torch.func lie below this one, and differentiate too.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), below_autograd():
            return op(*args)

    return forward


def _with_lower_levels(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """torch calls `jvp` with forward mode off, which would lose the tangents of a jvp around it."""

    def run(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(ctx, *tangents)

    return run


def _primals(ctx: Any) -> tuple[Any, ...]:
    """The saved tensors for use in `jvp`: without their tangents of this level."""
    return tuple(
        None if t is None else forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors
    )


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    if transforms_active():
        ctx.save_for_forward(*tensors)


def _also_over_nothing(vmap: Callable[..., Any]) -> Callable[..., Any]:
    """Adds a mapped dimension of 0 to a vmap rule: it runs on one slice, and none is kept."""

    def run(info: Any, in_dims: Any, *args: Any) -> Any:
        if info.batch_size:
            return vmap(info, in_dims, *args)
        slices = [
            arg.new_zeros(_replaced(arg.shape, dim, 1)) if isinstance(dim, int) else arg
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        out, out_dims = vmap(info._replace(batch_size=1), in_dims, *slices)
        return tree_map_only(Tensor, lambda t: t[:0], out), out_dims

    return run


def _replaced(shape: torch.Size, dim: int, size: int) -> list[int]:
    return [size if i == dim else n for i, n in enumerate(shape)]


class _Rules(_SingleLevelFunction):
    """What all rule sets share; `tensors` is the number of leading Tensor (or None) arguments."""

    op: Any
    tensors: int
    apply: Any  # of the base class, which works at one level of torch.func
    forward: Any
    jvp: Any
    vmap: Any

    # The base class for one level of torch.func lacks what compiled autograd asks a node for.
    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

    @staticmethod
    def register(cls: type[_Rules]) -> type[_Rules]:
        cls.forward = staticmethod(_forward(cls.op))
        cls.jvp = staticmethod(_with_lower_levels(cls.jvp))
        # What the engine calls: torch's own method only looks up which function this is.
        cls._backward_cls.apply = cls.backward
        # Not torch.library.register_autograd: its kernel drops the tangents of forward mode.
        LIBRARY.impl(cls.op._schema.name, _autograd_kernel(cls), "Autograd")
        torch.library.register_vmap(cls.op._schema.name, _also_over_nothing(cls.vmap))
        return cls

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        saved = [arg for arg in inputs if arg is None or isinstance(arg, Tensor)]
        _save(ctx, *saved)
        ctx.arguments = inputs[len(saved) :]


def _sum(*terms: Tensor | None) -> Tensor | None:
    present = [term for term in terms if term is not None]
    if not present:
        return None
    total = present[0]
    for term in present[1:]:
        total = total + term
    return total


def _per_channel(vector: Tensor | None, dim: int) -> Tensor | None:
    return None if vector is None else vector.view(1, -1, *(1,) * (dim - 2))


# ---- vmap: fold the mapped dimension into the batch, the groups or the channels ----------------


def _front(t: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension first; an unmapped tensor is repeated (a view)."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _into_batch(t: Tensor, dim: int | None, size: int) -> Tensor:
    return _front(t, dim, size).flatten(0, 1)


def _out_of_batch(t: Tensor, size: int) -> Tensor:
    return t.unflatten(0, (size, t.shape[0] // size))


def _into_channels(t: Tensor, dim: int | None, size: int) -> Tensor:
    """(N, C, ...) tensors: the mapped dimension in front of the channels."""
    return _front(t, dim, size).movedim(0, 1).flatten(1, 2)


def _out_of_channels(t: Tensor, size: int) -> Tensor:
    return t.unflatten(1, (size, t.shape[1] // size)).movedim(1, 0)


# ---- convolution -------------------------------------------------------------------------------


@_Rules.register
class Conv(_Rules):
    op = ops.conv
    tensors = 3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, weight, _bias = ctx.saved_tensors
        geometry, groups, impl = ctx.arguments
        needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_input = grad_weight = grad_bias = None
        if needs_input:
            size = list(input.shape)[2:]  # not a torch.Size, which operators are slow to read
            grad_input = conv_grad_input(grad, weight, None, size, geometry, groups, impl)
        if needs_weight:
            size, channels_last = list(weight.shape)[2:], ops.is_channels_last(weight)
            grad_weight = conv_grad_weight(
                grad, input, None, size, geometry, groups, channels_last, impl
            )
        if needs_bias:
            grad_bias = conv_grad_bias(grad, None, impl)
        return grad_input, grad_weight, grad_bias, *REST

    @staticmethod
    def jvp(ctx: Any, d_input: Any, d_weight: Any, d_bias: Any, *_: Any) -> Tensor | None:
        input, weight, _bias = _primals(ctx)
        arguments = ctx.arguments
        return _sum(
            None if d_input is None else conv(d_input, weight, d_bias, *arguments),
            None if d_weight is None else conv(input, d_weight, None, *arguments),
            _expanded_bias(d_bias, input, weight, arguments) if d_input is None else None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, input: Any, weight: Any, bias: Any, *arguments: Any) -> Any:
        size = info.batch_size
        *geometry, groups, impl = arguments
        if in_dims[1] is None and in_dims[2] is None:
            out = conv(_into_batch(input, in_dims[0], size), weight, bias, *arguments)
            return _out_of_batch(out, size), 0
        out = conv(
            _into_channels(input, in_dims[0], size),
            _into_batch(weight, in_dims[1], size),
            None if bias is None else _into_batch(bias, in_dims[2], size),
            *geometry,
            groups * size,
            impl,
        )
        return _out_of_channels(out, size), 0


def _expanded_bias(d_bias: Any, input: Tensor, weight: Tensor, arguments: Any) -> Tensor | None:
    """The tangent of an output that only the bias moves."""
    if d_bias is None:
        return None
    return conv(torch.zeros_like(input), torch.zeros_like(weight), d_bias, *arguments)


@_Rules.register
class ConvGradInput(_Rules):
    op = ops.conv_grad_input
    tensors = 3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_output, weight, bias = ctx.saved_tensors
        _input_size, geometry, groups, impl = ctx.arguments
        needs = ctx.needs_input_grad
        d_grad_output = d_weight = d_bias = None
        if needs[0]:
            d_grad_output = _conv_like(grad_output, grad, weight, geometry, groups, impl)
        if needs[1]:
            d_weight = conv_grad_weight(
                grad_output,
                grad,
                None,
                list(weight.shape)[2:],
                geometry,
                groups,
                ops.is_channels_last(weight),
                impl,
            )
        if bias is not None and needs[2]:
            d_bias = conv_grad_bias(grad, None, impl)
        return d_grad_output, d_weight, d_bias, *REST

    @staticmethod
    def jvp(ctx: Any, d_grad_output: Any, d_weight: Any, d_bias: Any, *_: Any) -> Tensor | None:
        grad_output, weight, _bias = _primals(ctx)
        arguments = ctx.arguments
        if d_grad_output is None and d_weight is None and d_bias is not None:
            d_grad_output = torch.zeros_like(grad_output)
        return _sum(
            None
            if d_grad_output is None
            else conv_grad_input(d_grad_output, weight, d_bias, *arguments),
            None
            if d_weight is None
            else conv_grad_input(
                grad_output, d_weight, d_bias if d_grad_output is None else None, *arguments
            ),
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, grad_output: Any, weight: Any, bias: Any, *arguments: Any
    ) -> Any:
        size = info.batch_size
        *geometry, groups, impl = arguments
        if in_dims[1] is None and in_dims[2] is None:
            out = conv_grad_input(
                _into_batch(grad_output, in_dims[0], size), weight, bias, *arguments
            )
            return _out_of_batch(out, size), 0
        out = conv_grad_input(
            _into_channels(grad_output, in_dims[0], size),
            _into_batch(weight, in_dims[1], size),
            None if bias is None else _into_batch(bias, in_dims[2], size),
            *geometry,
            groups * size,
            impl,
        )
        return _out_of_channels(out, size), 0


def _conv_like(
    grad_output: Tensor, input: Tensor, weight: Tensor, geometry: Ints, groups: int, impl: str
) -> Tensor:
    """conv(input, weight) with the output size of `grad_output`, whatever output_padding was.

    Behind the last window the input of a transposed convolution's gradient may have a rest; one as
    long as a stride would make the forward formula count another window, so it is cut off.
    """
    stride, padding, dilation = ops.split(geometry)
    padding = list(padding)
    for i in range(input.dim() - 2):
        window = dilation[i] * (weight.shape[2 + i] - 1) + 1
        reach = (grad_output.shape[2 + i] - 1) * stride[i] + window - padding[2 * i]
        rest = input.shape[2 + i] - reach
        if rest >= stride[i]:
            input = input.narrow(2 + i, 0, reach)
        padding[2 * i + 1] = max(-rest, 0)
    return conv(input, weight, None, [*stride, *padding, *dilation], groups, impl)


@_Rules.register
class ConvGradWeight(_Rules):
    op = ops.conv_grad_weight
    tensors = 3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_output, input, total = ctx.saved_tensors
        _kernel_size, geometry, groups, _channels_last, impl = ctx.arguments
        needs = ctx.needs_input_grad
        d_grad_output = d_input = None
        weight = grad.to(input.dtype)
        if needs[0]:
            d_grad_output = _conv_like(grad_output, input, weight, geometry, groups, impl)
        if needs[1]:
            d_input = conv_grad_input(
                grad_output, weight, None, list(input.shape)[2:], geometry, groups, impl
            )
        d_total = grad if total is not None and needs[2] else None
        return d_grad_output, d_input, d_total, *REST

    @staticmethod
    def jvp(ctx: Any, d_grad_output: Any, d_input: Any, d_total: Any, *_: Any) -> Tensor | None:
        grad_output, input, total = _primals(ctx)
        arguments = ctx.arguments
        zero = None if total is None else torch.zeros_like(total)
        return _sum(
            None
            if d_grad_output is None
            else conv_grad_weight(d_grad_output, input, zero, *arguments),
            None if d_input is None else conv_grad_weight(grad_output, d_input, zero, *arguments),
            d_total,
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, grad_output: Any, input: Any, total: Any, *arguments: Any
    ) -> Any:
        size = info.batch_size
        *geometry, groups, channels_last, impl = arguments
        out = conv_grad_weight(
            _into_channels(grad_output, in_dims[0], size),
            _into_channels(input, in_dims[1], size),
            None if total is None else _into_batch(total, in_dims[2], size),
            *geometry,
            groups * size,
            channels_last,
            impl,
        )
        return _out_of_batch(out, size), 0


@_Rules.register
class ConvGradBias(_Rules):
    op = ops.conv_grad_bias
    tensors = 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_output, total = ctx.saved_tensors
        d_grad_output = None
        if ctx.needs_input_grad[0]:
            d_grad_output = (
                grad.to(grad_output.dtype)
                .view(1, -1, *(1,) * (grad_output.dim() - 2))
                .expand(grad_output.shape)
            )
        d_total = grad if total is not None and ctx.needs_input_grad[1] else None
        return d_grad_output, d_total, *REST

    @staticmethod
    def jvp(ctx: Any, d_grad_output: Any, d_total: Any, *_: Any) -> Tensor | None:
        total = _primals(ctx)[1]
        zero = None if total is None else torch.zeros_like(total)
        moved = (
            None if d_grad_output is None else conv_grad_bias(d_grad_output, zero, *ctx.arguments)
        )
        return _sum(moved, d_total)

    @staticmethod
    def vmap(info: Any, in_dims: Any, grad_output: Any, total: Any, impl: str) -> Any:
        size = info.batch_size
        out = conv_grad_bias(
            _into_channels(grad_output, in_dims[0], size),
            None if total is None else _into_batch(total, in_dims[1], size),
            impl,
        )
        return _out_of_batch(out, size), 0


# ---- max-pooling -------------------------------------------------------------------------------


@_Rules.register
class MaxPool(_Rules):
    op = ops.max_pool
    tensors = 1

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, *ctx.arguments = inputs
        window, _output_size, ties, _indices, impl = ctx.arguments
        ctx.scatter = list(input.shape)[2:], window, ties, impl
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # else every backward fills zeros as large as the indices
        chosen = input if ties in ("all", "split") else output[1]
        _save(ctx, chosen)

    @staticmethod
    def chosen(saved: tuple[Tensor, ...]) -> Tensor:
        (chosen,) = saved
        if chosen.dim() == 1:
            raise RuntimeError(
                "max_pool was called with indices='none', which keeps nothing to differentiate by: "
                "pass 'offset' or 'flat'"
            )
        return chosen

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
        if grad is None:
            return None, *REST
        chosen = MaxPool.chosen(ctx.saved_tensors)
        return max_pool_scatter(grad, chosen, *ctx.scatter), *REST

    @staticmethod
    def jvp(ctx: Any, d_input: Tensor, *_: Any) -> Any:
        window, output_size, ties, _indices, impl = ctx.arguments
        chosen = MaxPool.chosen(_primals(ctx))
        return max_pool_gather(d_input, chosen, output_size, window, ties, impl), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, input: Any, *arguments: Any) -> Any:
        size = info.batch_size
        output, index = max_pool(_into_batch(input, in_dims[0], size), *arguments)
        if arguments[3] == "none":
            return (_out_of_batch(output, size), index), (0, None)
        return (_out_of_batch(output, size), _out_of_batch(index, size)), (0, 0)


def _fold_two(function: Any) -> Any:
    """vmap for a map of two (N, C, ...) tensors: both into the batch."""

    def vmap(info: Any, in_dims: Any, values: Any, index: Any, *arguments: Any) -> Any:
        size = info.batch_size
        out = function(
            _into_batch(values, in_dims[0], size), _into_batch(index, in_dims[1], size), *arguments
        )
        return _out_of_batch(out, size), 0

    return staticmethod(vmap)


class _IndexedMap(_Rules):
    """A map that is linear in its first tensor; the second says where each value goes."""

    tensors = 2

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        values, index, *ctx.arguments = inputs
        ctx.spatial = list(values.shape)[2:]
        _save(ctx, index)


@_Rules.register
class MaxPoolScatter(_IndexedMap):
    op = ops.max_pool_scatter

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        _size, *rest = ctx.arguments
        return max_pool_gather(grad, index, ctx.spatial, *rest), None, *REST

    @staticmethod
    def jvp(ctx: Any, d_values: Tensor, *_: Any) -> Tensor:
        return max_pool_scatter(d_values, _primals(ctx)[0], *ctx.arguments)

    vmap = _fold_two(lambda *args: max_pool_scatter(*args))


@_Rules.register
class MaxPoolGather(_IndexedMap):
    op = ops.max_pool_gather

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        _size, *rest = ctx.arguments
        return max_pool_scatter(grad, index, ctx.spatial, *rest), None, *REST

    @staticmethod
    def jvp(ctx: Any, d_values: Tensor, *_: Any) -> Tensor:
        return max_pool_gather(d_values, _primals(ctx)[0], *ctx.arguments)

    vmap = _fold_two(lambda *args: max_pool_gather(*args))


@_Rules.register
class MaxUnpool(_IndexedMap):
    op = ops.max_unpool

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return max_unpool_gather(grad, ctx.saved_tensors[0]), None, *REST

    @staticmethod
    def jvp(ctx: Any, d_values: Tensor, *_: Any) -> Tensor:
        return max_unpool(d_values, _primals(ctx)[0], *ctx.arguments)

    vmap = _fold_two(lambda *args: max_unpool(*args))


@_Rules.register
class MaxUnpoolGather(_IndexedMap):
    op = ops.max_unpool_gather

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return max_unpool(grad, ctx.saved_tensors[0], ctx.spatial), None

    @staticmethod
    def jvp(ctx: Any, d_values: Tensor, *_: Any) -> Tensor:
        return max_unpool_gather(d_values, _primals(ctx)[0])

    vmap = _fold_two(lambda *args: max_unpool_gather(*args))


# ---- the differentiable functions, with the operators' signatures ------------------------------


def _differentiable(rules: type[_Rules]) -> Callable[..., Any]:
    """The operator of a rule set, called in the way that the moment asks for.

    By the shortest road, since a small call costs what it takes to get there: names bound once,
    past the dispatcher's Autograd key and the frame of ``OpOverload.__call__``.
    """
    op = rules.op
    run, below_autograd = op._op, ops.below_autograd
    apply, leading = rules.apply, slice(rules.tensors)
    is_compiling, is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled

    def call(*args: Any) -> Any:
        if is_compiling() or transforms_active():
            return op(*args)
        if is_grad_enabled():
            for arg in args[leading]:
                if arg is not None and arg.requires_grad:
                    return apply(*args)
        with below_autograd():
            return run(*args)

    return call


conv: Callable[..., Tensor] = _differentiable(Conv)
conv_grad_input: Callable[..., Tensor] = _differentiable(ConvGradInput)
conv_grad_weight: Callable[..., Tensor] = _differentiable(ConvGradWeight)
conv_grad_bias: Callable[..., Tensor] = _differentiable(ConvGradBias)
max_pool: Callable[..., tuple[Tensor, Tensor]] = _differentiable(MaxPool)
max_pool_scatter: Callable[..., Tensor] = _differentiable(MaxPoolScatter)
max_pool_gather: Callable[..., Tensor] = _differentiable(MaxPoolGather)
max_unpool: Callable[..., Tensor] = _differentiable(MaxUnpool)
max_unpool_gather: Callable[..., Tensor] = _differentiable(MaxUnpoolGather)
