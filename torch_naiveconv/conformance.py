"""The conformance cases: small problems whose result every implementation must reproduce.

A case is a line of ``conformance.json``: an operation, its sizes, a class of values, a seed, and
the SHA-256 of the result. Inputs come from a counter-based integer generator, so that a program in
any language can make them; ``docs/contract.md`` specifies it. Start reading at :func:`cases`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops

FILE = Path(__file__).parent / "conformance.json"
SPEC_ID = "NC-1"  # the numeric contract; another order of additions gets another id

# The number of a tensor in the generator, by its role.
INPUT, WEIGHT, BIAS, OUTPUT, TOTAL, INDEX = range(6)


@dataclass(frozen=True)
class Case:
    """One problem. Lists have one number per spatial axis; ``pad`` is that before the input.

    ``direction``: forward, grad_input, grad_weight, grad_bias of ``conv``; forward, scatter, gather
    of ``max_pool``; forward, transpose of ``max_unpool``, where ``kernel`` is not used.
    """

    name: str
    op: str
    direction: str
    dtype: str
    values: str
    seed: int
    batch: int
    in_channels: int
    out_channels: int
    groups: int
    size: list[int]
    out: list[int]
    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    pad: list[int]
    bias: bool = False
    total: bool = False
    ties: str = "first"


# ---- the generator -----------------------------------------------------------------------------

FORMATS = {  # bits, mantissa bits, exponent bias
    "float16": (16, 10, 15),
    "bfloat16": (16, 7, 127),
    "float32": (32, 23, 127),
    "float64": (64, 52, 1023),
}
INTEGER_BITS = {
    **{f"{sign}int{bits}": bits for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bool": 8,
}


def random_bits(seed: int, tensor: int, count: int) -> np.ndarray:
    """64 bits for each of ``count`` elements: SplitMix64 of a counter.

    >>> [hex(x) for x in random_bits(1, 2, 2)]
    ['0x23d540310a8d5b31', '0x167b1b61a924b41c']
    """
    counter = np.uint64((seed * 8 + tensor) << 32) + np.arange(1, count + 1, dtype=np.uint64)
    z = counter * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def choices(values: str, bias: int) -> list[tuple[int, int]]:
    """A class of values: the (exponent field, kind of mantissa) among which each element draws.

    Kinds of mantissa: 0 zero, 1 random, 2 random with the last bit set, 3 the middle bit alone.
    """
    ordinary = [(bias - 4 + k, 1) for k in range(8)]  # 2^-4 to 2^4
    middle = bias - (bias - 1) // 2  # the square of such a number is near the smallest normal one
    table = {
        "ordinary": ordinary,
        # products near the largest number, and near the smallest normal one
        "large": [(bias + bias // 2 - 2 + k, 1) for k in range(8)],
        "tiny": [(middle - 4 + k, 1) for k in range(8)],
        "subnormal": [(0, 1), (1, 1), (2, 1), (bias, 1)],
        "smallest": [(0, 1), (1, 1), (1, 1), (2, 1)],
        "zeros": [(0, 0), (0, 0), (0, 0), (bias, 1)],
        "ties": [(0, 0), (bias, 0), (bias + 1, 0), (bias, 0)],  # 0, 1, 2, 1
        # an infinity, a NaN, a zero, a subnormal among ordinary numbers
        "special": [(2 * bias + 1, 0), (2 * bias + 1, 2), (0, 0), (0, 1), *ordinary[4:], *ordinary],
        # sums that rounding lifts to the smallest normal number, or does not
        "edge": [(middle - (0, 0, 12, 13)[k % 4], int(k < 4)) for k in range(16)],
        # sums so near halfway between two float32 numbers that float64 cannot tell
        "halfway": [(bias, 3), (bias - 30, 0)],
    }
    return table[values]


def generate(dtype: str, values: str, seed: int, tensor: int, count: int) -> np.ndarray:
    """The bit patterns of ``count`` elements, as unsigned integers of the type's size.

    >>> [hex(x) for x in generate("bfloat16", "ordinary", 1, 2, 3)]
    ['0x4031', '0x411c', '0x40d3']
    """
    r = random_bits(seed, tensor, count)
    if dtype in INTEGER_BITS:
        bits = INTEGER_BITS[dtype]
        if dtype == "bool":
            r &= np.uint64(1)
        elif values == "ties":  # 0 to 3, or -2 to 1
            r = (r & np.uint64(3)) - np.uint64(0 if dtype.startswith("u") else 2)
        return (r & np.uint64(2**bits - 1)).astype(f"<u{bits // 8}")
    bits, mantissa_bits, bias = FORMATS[dtype]
    table = np.array(choices(values, bias), dtype=np.uint64)
    exponent, kind = table[(r >> np.uint64(52)) % np.uint64(2048) % np.uint64(len(table))].T
    mantissa = r & np.uint64(2**mantissa_bits - 1)
    mantissa = np.select(
        [kind == 0, kind == 2, kind == 3],
        [np.uint64(0), mantissa | np.uint64(1), np.uint64(2 ** (mantissa_bits // 2))],
        mantissa,
    )
    sign = r >> np.uint64(63) << np.uint64(bits - 1)
    return (sign | exponent << np.uint64(mantissa_bits) | mantissa).astype(f"<u{bits // 8}")


def tensor(case: Case, number: int, shape: list[int], dtype: str | None = None) -> Tensor:
    """Tensor ``number`` of a case, contiguous: element i is the i-th in (n, c, d, h, w) order."""
    dtype = dtype or case.dtype
    edge_total = number == TOTAL and case.values == "edge"
    values = "smallest" if edge_total else case.values
    bits = generate(dtype, values, case.seed, number, math.prod(shape))
    return torch.from_numpy(bits).view(getattr(torch, dtype)).reshape(shape)


# ---- computing a case --------------------------------------------------------------------------


def canonical_bytes(t: Tensor) -> bytes:
    """Elements in (n, c, d, h, w) order, each little-endian."""
    flat = t.detach().cpu().contiguous().view(-1)
    size = flat.element_size()
    return flat.view(torch.uint8).numpy().view(f"u{size}").astype(f"<u{size}").tobytes()


def result(case: Case, impl: str, device: str = "cpu", channels_last: bool = False) -> bytes:
    """The canonical bytes of a case's result, by one implementation."""
    return b"".join(canonical_bytes(t) for t in _outputs(case, impl, device, channels_last))


def digest(case: Case, impl: str, device: str = "cpu", channels_last: bool = False) -> str:
    """The SHA-256 of :func:`result`, in hexadecimal.

    >>> case, expected = load()[0]
    >>> digest(case, "naive") == expected
    True
    """
    return hashlib.sha256(result(case, impl, device, channels_last)).hexdigest()


def _outputs(case: Case, impl: str, device: str, channels_last: bool) -> tuple[Tensor, ...]:
    def make(number: int, shape: list[int], dtype: str | None = None) -> Tensor:
        t = tensor(case, number, shape, dtype).to(device)
        if channels_last and len(shape) in (4, 5):
            t = t.to(
                memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d
            )
        return t

    input_size = [case.batch, case.in_channels, *case.size]
    output_size = [case.batch, case.out_channels, *case.out]
    if case.op == "max_unpool":
        planes, outputs = case.in_channels, math.prod(case.out)
        indices = random_bits(case.seed, INDEX, math.prod(input_size)) % np.uint64(outputs)
        chosen = torch.from_numpy(indices.astype(np.int64)).reshape(input_size).to(device)
        if case.direction == "forward":
            return (ops.max_unpool(make(INPUT, input_size), chosen, case.out),)
        written = make(OUTPUT, [case.batch, planes, *case.out])
        return (ops.max_unpool_gather(written, chosen),)
    before_after = [
        amount
        for axis in range(len(case.size))
        for amount in (case.pad[axis], _pad_after(case, axis))
    ]
    window = [*case.kernel, *case.stride, *before_after, *case.dilation]
    if case.op == "max_pool":
        input = make(INPUT, input_size)
        several = case.ties in ("all", "split")
        kind = "none" if several else "flat" if case.direction == "forward" else "offset"
        output, index = ops.max_pool(input, window, case.out, case.ties, kind, impl)
        if case.direction == "forward":
            return (output,) if several else (output, index)
        index = input if several else index
        if case.direction == "scatter":
            grad = make(OUTPUT, output_size)
            return (ops.max_pool_scatter(grad, index, case.size, window, case.ties, impl),)
        # `values` has the input's shape, but is another tensor
        values = make(OUTPUT, input_size)
        return (ops.max_pool_gather(values, index, case.out, window, case.ties, impl),)
    geometry = ([*case.stride, *before_after, *case.dilation], case.groups, impl)
    weight_size = [case.out_channels, case.in_channels // case.groups, *case.kernel]
    total_dtype = str(ops.total_dtype(getattr(torch, case.dtype))).removeprefix("torch.")
    if case.direction == "forward":
        bias = make(BIAS, [case.out_channels]) if case.bias else None
        return (ops.conv(make(INPUT, input_size), make(WEIGHT, weight_size), bias, *geometry),)
    grad = make(OUTPUT, output_size)
    if case.direction == "grad_input":
        bias = make(BIAS, [case.in_channels]) if case.bias else None
        return (ops.conv_grad_input(grad, make(WEIGHT, weight_size), bias, case.size, *geometry),)
    if case.direction == "grad_weight":
        total = make(TOTAL, weight_size, total_dtype) if case.total else None
        return (
            ops.conv_grad_weight(
                grad,
                make(INPUT, input_size),
                total,
                case.kernel,
                *geometry[:-1],
                channels_last and len(weight_size) > 3,
                impl,
            ),
        )
    total = make(TOTAL, [case.out_channels], total_dtype) if case.total else None
    return (ops.conv_grad_bias(grad, total, impl),)


def _pad_after(case: Case, axis: int) -> int:
    """What the windows need behind the input."""
    window = case.dilation[axis] * (case.kernel[axis] - 1) + 1
    reach = (case.out[axis] - 1) * case.stride[axis] + window - case.pad[axis]
    return max(reach - case.size[axis], 0)


# ---- the table ---------------------------------------------------------------------------------

FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = tuple(name for name in INTEGER_BITS if name != "bool")

# name: batch, channels, filters, groups, size, kernel, stride, dilation, (before, after) per axis
CONV_SHAPES: dict[str, tuple[Any, ...]] = {
    "plain": (2, 3, 4, 1, (5, 6), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))),
    "groups": (1, 4, 6, 2, (5, 5), (3, 2), (1, 1), (1, 1), ((1, 1), (0, 0))),
    "depthwise": (2, 5, 10, 5, (7, 18), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))),
    "depthwise-s2": (1, 18, 18, 18, (9, 9), (5, 5), (2, 2), (1, 1), ((2, 2), (2, 2))),
    "stride": (2, 3, 5, 1, (9, 8), (3, 2), (2, 3), (1, 1), ((0, 1), (2, 1))),
    "dilation": (1, 3, 4, 1, (9, 11), (3, 3), (1, 2), (2, 3), ((2, 2), (3, 3))),
    "rest": (1, 2, 3, 1, (8, 8), (2, 2), (3, 3), (1, 1), ((0, 0), (0, 0))),
    "line": (2, 3, 4, 1, (40,), (5,), (2,), (1,), ((2, 2),)),
    "volume": (1, 2, 3, 1, (3, 4, 5), (2, 3, 2), (1, 1, 2), (1, 1, 1), ((1, 0), (1, 1), (0, 1))),
    "pointwise": (2, 150, 21, 1, (5, 5), (1, 1), (1, 1), (1, 1), ((0, 0), (0, 0))),
    "mostly-padding": (1, 2, 2, 1, (2, 2), (3, 3), (1, 1), (1, 1), ((3, 3), (3, 3))),
    "deep": (1, 35, 19, 1, (7, 13), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))),
    "wide": (3, 1, 2, 1, (5, 70), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))),
    "one-term": (1, 1, 7, 1, (5, 21), (1, 1), (1, 1), (1, 1), ((0, 0), (0, 0))),
    "few-terms": (1, 1, 9, 1, (1, 400), (1, 3), (1, 1), (1, 1), ((0, 0), (0, 0))),
}
CONV_CLASSES = {  # class of values: the shapes in which it bites
    "large": ("plain", "pointwise"),
    "tiny": ("plain", "one-term", "pointwise"),
    "subnormal": ("one-term", "few-terms", "plain"),
    "zeros": ("plain", "groups", "stride"),
    "special": ("plain", "stride", "depthwise", "pointwise"),
    "ties": ("plain",),
}
BIAS_SHAPES = ("plain", "wide", "volume", "line")
POOL_SHAPES: dict[str, tuple[Any, ...]] = {  # batch, channels, size, kernel, stride, dilation, pads
    "2x2": (2, 3, (6, 8), (2, 2), (2, 2), (1, 1), ((0, 0), (0, 0))),
    "overlap": (1, 2, (9, 21), (3, 3), (2, 2), (1, 1), ((1, 1), (1, 1))),
    "dense": (1, 3, (7, 40), (3, 5), (1, 1), (1, 1), ((1, 1), (2, 2))),
    "dilation": (1, 2, (9, 9), (3, 2), (2, 1), (2, 3), ((0, 0), (1, 0))),
    "ceil": (1, 2, (7, 6), (3, 3), (2, 2), (1, 1), ((0, 0), (0, 1))),
    "empty-windows": (1, 2, (3, 3), (2, 2), (2, 2), (1, 1), ((4, 4), (3, 3))),
    "line": (2, 2, (33,), (4,), (3,), (1,), ((1, 1),)),
    "volume": (1, 2, (4, 5, 6), (2, 3, 2), (2, 2, 1), (1, 1, 1), ((0, 0), (1, 1), (1, 0))),
    "large-window": (1, 1, (17, 20), (17, 16), (1, 2), (1, 1), ((0, 0), (0, 0))),
}
POOL_CLASSES = {
    "ordinary": tuple(POOL_SHAPES),
    "ties": ("2x2", "overlap", "dense", "volume"),
    "special": ("2x2", "overlap", "dense", "empty-windows", "line"),
    "zeros": ("2x2", "overlap", "dense"),
    "subnormal": ("overlap", "dense"),
}


def cases() -> list[Case]:
    """The table of cases, in the order of the file; a case's seed is its place."""
    return [Case(seed=seed, **arguments) for seed, arguments in enumerate(_rows(), start=1)]


def _rows() -> Iterator[dict[str, Any]]:
    for direction in ("forward", "grad_input", "grad_weight", "grad_bias"):
        for dtype in (*FLOATS, *INTEGERS):
            for values, shape in _conv_values(direction, dtype):
                yield from _conv_rows(direction, dtype, values, shape)
    for dtype in (*FLOATS, *INTEGERS, "bool"):
        yield from _pool_rows(dtype)
    for dtype in ("float32", "bfloat16", "int64"):
        for direction in ("forward", "transpose"):
            yield {
                **_named("max_unpool", direction, dtype, "ordinary", "plane"),
                **_sizes(2, 3, 3, 1, (4, 5), (9, 7), (1, 1), (1, 1), (1, 1), (0, 0)),
            }


def _conv_values(direction: str, dtype: str) -> Iterator[tuple[str, str]]:
    if dtype in INTEGERS:
        yield from (("ordinary", "stride"),)
        return
    chosen = BIAS_SHAPES if direction == "grad_bias" else tuple(CONV_SHAPES)
    yield from (("ordinary", shape) for shape in chosen)
    for values, shapes in CONV_CLASSES.items():
        yield from ((values, s) for s in (("wide",) if direction == "grad_bias" else shapes))
    if dtype in ("float32", "bfloat16"):
        for shape in ("few-terms", "plain", "pointwise"):
            yield "edge", shape
    if dtype == "float32":
        yield "halfway", "plain"
    if direction == "grad_bias":
        yield "smallest", "plain"


def _conv_rows(direction: str, dtype: str, values: str, shape: str) -> Iterator[dict[str, Any]]:
    batch, channels, filters, groups, size, kernel, stride, dilation, pads = CONV_SHAPES[shape]
    out = tuple(
        ops.conv_output_size(size[i], kernel[i], stride[i], pads[i][0], pads[i][1], dilation[i])
        for i in range(len(size))
    )
    row = {
        **_named("conv", direction, dtype, values, shape),
        **_sizes(
            batch,
            channels,
            filters,
            groups,
            size,
            out,
            kernel,
            stride,
            dilation,
            tuple(before for before, _ in pads),
        ),
    }
    if direction in ("forward", "grad_input"):
        # a bias would drown sums of tiny products
        drowned = values in ("tiny", "subnormal", "edge")
        yield row | {"bias": not drowned and shape not in ("groups", "line")}
    else:
        yield row
        if shape in ("plain", "wide"):
            yield row | {"name": row["name"] + "-resumed", "total": True}


def _pool_rows(dtype: str) -> Iterator[dict[str, Any]]:
    for values, direction, shape, ties in _pool_values(dtype):
        batch, channels, size, kernel, stride, dilation, pads = POOL_SHAPES[shape]
        out = tuple(
            _pool_output(size[i], kernel[i], stride[i], pads[i], dilation[i], shape == "ceil")
            for i in range(len(size))
        )
        before = tuple(pad[0] for pad in pads)
        yield {
            **_named("max_pool", direction, dtype, values, f"{shape}-{ties}"),
            **_sizes(batch, channels, channels, 1, size, out, kernel, stride, dilation, before),
            "ties": ties,
        }


def _pool_values(dtype: str) -> Iterator[tuple[str, str, str, str]]:
    """(values, direction, shape, ties)"""
    if dtype not in FLOATS:
        for direction in ("forward",) if dtype == "bool" else ("forward", "scatter", "gather"):
            yield "ordinary", direction, "empty-windows", "first"
            yield "ties", direction, "overlap", "last"
        if dtype != "bool":
            yield "ordinary", "scatter", "overlap", "split"
        return
    for values, shapes in POOL_CLASSES.items():
        for shape in shapes:
            yield values, "forward", shape, "first"
            yield values, "scatter", shape, "first"
        yield values, "gather", "overlap", "first"
    for values in ("ties", "special"):
        for shape in ("overlap", "dense"):
            yield values, "forward", shape, "last"
            for ties in ("last", "all", "split"):
                yield values, "scatter", shape, ties
        for ties in ("all", "split"):
            yield values, "gather", "overlap", ties


def _pool_output(
    size: int, kernel: int, stride: int, pads: tuple[int, int], dilation: int, ceil: bool
) -> int:
    more = stride - 1 if ceil else 0
    return ops.conv_output_size(size + more, kernel, stride, *pads, dilation)


def _named(op: str, direction: str, dtype: str, values: str, shape: str) -> dict[str, Any]:
    name = f"{op}/{direction}/{dtype}/{values}/{shape}"
    return {"name": name, "op": op, "direction": direction, "dtype": dtype, "values": values}


def _sizes(*sizes: Any) -> dict[str, Any]:
    names = [field.name for field in fields(Case)]
    first = names.index("batch")
    values = (list(value) if isinstance(value, tuple) else value for value in sizes)
    return dict(zip(names[first : first + len(sizes)], values, strict=True))


def line(case: Case) -> str:
    """A case for ``csrc/driver/conformance.cpp``: words, unit axes put in front to make it 3-D."""
    unit = [1, 1, 1, 1, 1, 0]
    axes = [
        *zip(case.size, case.out, case.kernel, case.stride, case.dilation, case.pad, strict=True)
    ]
    numbers = [n for axis in [*[unit] * (3 - len(axes)), *axes] for n in axis]
    words = [case.name, case.op, case.direction, case.dtype, case.values, case.seed, case.batch]
    words += [case.in_channels, case.out_channels, case.groups, *numbers]
    return " ".join(map(str, [*words, int(case.bias), int(case.total), case.ties]))


# ---- the file ----------------------------------------------------------------------------------


def load() -> list[tuple[Case, str]]:
    """The cases of the file, each with the SHA-256 of its result."""
    document = json.loads(FILE.read_text())
    if document["spec"] != SPEC_ID:
        raise ValueError(f"{FILE.name} is of {document['spec']}, this package of {SPEC_ID}")
    return [(Case(**line), digest) for line in document["cases"] for digest in [line.pop("sha256")]]


def write(path: Path = FILE) -> None:
    """Compute every case of the table with the naive implementation and write the file."""
    defaults = {field.name: field.default for field in fields(Case)}
    lines = []
    for case in cases():
        line = {key: v for key, v in asdict(case).items() if v != defaults[key]}
        lines.append(json.dumps(line | {"sha256": digest(case, "naive")}))
    path.write_text(f'{{"spec": "{SPEC_ID}", "cases": [\n' + ",\n".join(lines) + "\n]}\n")
