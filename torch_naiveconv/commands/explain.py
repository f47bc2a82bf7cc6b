"""Draw a convolution or max-pooling and its gradients, number by number.

    python -m torch_naiveconv explain conv2d --input 5x5 --kernel 3 --stride 2 -o page.html

makes one page that needs no network: choose an output, an input or a weight with mouse, touch or
keyboard, and see the terms of its sum in the contract's order. --format png and gif make pictures
of the same (they need matplotlib and Pillow).

Sizes are written 5x5; the input may have channels and a batch in front, 2x3x5x5. Values (of input,
weight, bias, grad) are "random" (normal, one decimal, no zero), "integers", "arange", "ones",
"zeros", a list like 1,2,nan,-0.5, or a file: .npy, or text with numbers.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import functional as F
from ..pages import trace
from ..pages.page import page

FUNCTIONS = [f"{kind}{d}d" for kind in ("conv", "conv_transpose", "max_pool") for d in (1, 2, 3)]
# What the other families of functions know, and its default.
FOREIGN: dict[str, dict[str, Any]] = {
    "conv": {"ceil_mode": False, "output_padding": [0]},
    "conv_transpose": {"ceil_mode": False},
    "max_pool": {
        "filters": None,
        "groups": 1,
        "no_bias": False,
        "output_padding": [0],
        "weight_values": "random",
        "bias_values": "random",
    },
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def sizes(argument: str) -> list[int]:
    try:
        return [int(size) for size in argument.replace(",", "x").split("x")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected sizes like 5 or 5x5, got {argument!r}"
        ) from None


def padding(argument: str) -> str | list[int]:
    return argument if argument in ("same", "valid") else sizes(argument)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("function", choices=FUNCTIONS, metavar="FUNCTION", help=", ".join(FUNCTIONS))
    add("--input", type=sizes, required=True, metavar="HxW", help="or CxHxW, or NxCxHxW")
    add("--kernel", type=sizes, required=True, metavar="K", help="3 or 3x3")
    add("--filters", type=int, default=None, metavar="K", help="output channels (default: groups)")
    add("--stride", type=sizes, default=None, metavar="S")
    add("--padding", type=padding, default=[0], metavar="P", help="an int, HxW, same or valid")
    add("--output-padding", type=sizes, default=[0], metavar="P", help="transposed only")
    add("--dilation", type=sizes, default=[1], metavar="D")
    add("--groups", type=int, default=1)
    add("--ceil-mode", action="store_true", help="max-pooling only")
    add("--no-bias", action="store_true")
    add("--dtype", choices=list(DTYPES), default="float32")
    add("--seed", type=int, default=0, help="of the random values (default 0)")
    for name in ("input", "weight", "bias", "grad"):
        add(f"--{name}-values", default="random", metavar="VALUES")
    add("--format", choices=["html", "png", "gif"], default=None, help="default: by -o's ending")
    add("--view", default=None, help="of a picture: output, grad_input, ... (default: all)")
    add("--element", type=int, default=None, help="of a png: the element whose terms are lit")
    add("-o", "--output", type=Path, default=None, metavar="FILE", help="default: FUNCTION.html")


def values(name: str, given: str, shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor of a shape from what the command line says."""
    count = math.prod(shape)
    generator = np.random.default_rng([seed, *name.encode()])
    if given == "random":
        flat = generator.standard_normal(count).round(1)
        flat[flat == 0] = 0.1  # a zero teaches nothing
    elif given == "integers":
        flat = generator.integers(-3, 10, count).astype(float)
    elif given == "arange":
        flat = np.arange(count, dtype=float)
    elif given in ("ones", "zeros"):
        flat = np.full(count, float(given == "ones"))
    elif Path(given).suffix == ".npy":
        flat = np.load(given, allow_pickle=False).astype(float).ravel()
    else:
        text = Path(given).read_text() if Path(given).is_file() else given
        try:
            flat = np.array([float(word) for word in text.replace(",", " ").split()])
        except ValueError:
            raise ValueError(
                f"--{name}-values {given!r} is neither a known word, a list of numbers nor a file"
            ) from None
    if flat.size != count:
        raise ValueError(
            f"--{name}-values has {flat.size} numbers, but the shape {tuple(shape)} needs {count}"
        )
    return torch.from_numpy(flat).to(dtype).reshape(shape)


def scenes(arguments: Any) -> list[trace.Scene]:
    """What the page shows: one scene, or three for max-pooling (as given, a tie, a NaN)."""
    a = arguments
    dims = int(a.function[-2])
    if not dims <= len(a.input) <= dims + 2:
        raise ValueError(f"--input {'x'.join(map(str, a.input))} has too many or too few sizes")
    for name, default in FOREIGN[a.function[:-2]].items():
        if getattr(a, name) != default:
            raise ValueError(f"{a.function} has no --{name.replace('_', '-')}")
    shape = [1] * (dims + 2 - len(a.input)) + a.input
    if min(shape) < 1:
        raise ValueError(f"--input {'x'.join(map(str, a.input))} has an empty axis")
    dtype = DTYPES[a.dtype]
    input = values("input", a.input_values, shape, dtype, a.seed)
    kernel = a.kernel * dims if len(a.kernel) == 1 else a.kernel

    def grad_like(output: Tensor) -> Tensor:
        return values("grad", a.grad_values, list(output.shape), dtype, a.seed)

    common = {"padding": a.padding, "dilation": a.dilation}
    if a.function.startswith("max_pool"):
        options = {"kernel_size": kernel, "stride": a.stride, "ceil_mode": a.ceil_mode, **common}
        function = getattr(F, a.function)
        grad = grad_like(function(input, **options))
        variants = {"as given": input, "with a tie": input.clone(), "with a NaN": input.clone()}
        taps = first_window(input, **options)
        best = input.view(-1)[taps].max()
        variants["with a tie"].view(-1)[[taps[0], taps[-1]]] = best
        variants["with a NaN"].view(-1)[taps[len(taps) // 2]] = float("nan")
        options = simple(options)
        return [trace.max_pool(x, grad, title=t, **options) for t, x in variants.items()]

    common |= {"stride": a.stride or [1], "groups": a.groups}
    filters = a.filters or a.groups
    if a.groups < 1 or shape[1] % a.groups or filters % a.groups:
        raise ValueError(
            f"--groups {a.groups} must divide {shape[1]} channels and {filters} filters"
        )
    if a.function.startswith("conv_transpose"):
        common["output_padding"] = a.output_padding
        weight_shape = [shape[1], filters // a.groups, *kernel]
        scene: Any = trace.conv_transpose
    else:
        weight_shape = [filters, shape[1] // a.groups, *kernel]
        scene = trace.conv
    weight = values("weight", a.weight_values, weight_shape, dtype, a.seed)
    bias = None if a.no_bias else values("bias", a.bias_values, [filters], dtype, a.seed)
    output = getattr(F, a.function)(input, weight, bias, **common)
    return [scene(input, weight, bias, grad_like(output), **simple(common))]


def simple(options: dict[str, Any]) -> dict[str, Any]:
    """[2] and [2, 2] as 2, [1, 2] as (1, 2), for the title."""

    def plain(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return value[0] if len(set(value)) == 1 else tuple(value)

    return {name: plain(value) for name, value in options.items()}


def first_window(input: Tensor, **options: Any) -> list[int]:
    """Flat positions of the inputs in the middle window of the first plane."""
    marked = torch.zeros_like(input)
    output = F.max_pool_grad_input  # a gradient of 1 for every tie finds the whole window
    pooled = getattr(F, f"max_pool{input.dim() - 2}d")(marked, **options)
    grad = torch.zeros_like(pooled)
    plane = grad[0, 0].view(-1)
    plane[plane.numel() // 2] = 1
    return [int(i) for i in output(marked, grad, **options, ties="all").view(-1).nonzero()]


def run(arguments: Any) -> int:
    suffix = arguments.output.suffix.removeprefix(".") if arguments.output else ""
    kind = arguments.format or (suffix if suffix in ("html", "png", "gif") else "html")
    path = arguments.output or Path(f"{arguments.function}.{kind}")
    try:
        shown = scenes(arguments)
        if kind == "html":
            path.write_text(page(shown), encoding="utf-8")
        else:
            from ..pages import pictures  # matplotlib is an extra

            draw = pictures.save_png if kind == "png" else pictures.save_gif
            draw(shown[0], path, arguments.view, arguments.element)
    except ImportError as error:
        print(f'explain: pictures need more: {error}; pip install "torch_naiveconv[plots]"')
        return 2
    except (ValueError, TypeError, OSError) as error:
        print(f"explain: {error}")
        return 2
    print(f"{path}: {shown[0]['call']}")
    return 0
