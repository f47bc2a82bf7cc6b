"""Time convolution and max-pooling beside torch.nn.functional, layer by layer.

Both libraries run in this process, in turns; a time is the median of several rounds, and the ratio
is torch's time divided by ours, so above 1 we are faster. Freed memory is kept by the process
(with glibc), so that neither side pays for fetching pages anew. Before a layer is timed its result
is compared with impl="naive", bit for bit: max-pooling whole, convolution on as many channels of
the first sample (weight gradient: of all samples) as the naive loop does quickly. GFLOP/s count two
operations for each multiply-add of the definition, and "peak" is what this command measured with
multiply-adds on registers alone; GB/s count the bytes of input and output once, and "copy" is
what copying a large tensor reaches.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor
from tqdm import tqdm

from .. import functional as F
from .. import ops
from ..layers import CONV_LAYERS, POOL_LAYERS, ConvLayer, PoolLayer

DIRECTIONS = {
    "conv": ("forward", "grad_input", "grad_weight"),
    "pool": ("forward", "forward_indices", "backward"),
}
OPS = ("conv1d", "conv2d", "conv3d", "max_pool1d", "max_pool2d", "max_pool3d")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
CHECKED_MULTIPLY_ADDS = 20_000_000  # of a layer, or those of one channel if that is more
SECONDS_PER_SAMPLE = 2e-3  # short calls are repeated until a sample takes this long
COPIED_BYTES = 2**28
TINY = ConvLayer("call", 1, 3, (8, 8), 8, (3, 3), (1, 1), (0, 0), (1, 1), 1)

Call = Callable[[], Any]


@dataclass(frozen=True)
class Result:
    """One line of the tables: times in seconds, work in operations (conv) or bytes (pool)."""

    kind: str
    layer: str
    direction: str
    threads: int
    impl: str
    ours: float
    torch: float
    work: float
    limit: float = 0.0  # operations or bytes a second that the machine can do

    @property
    def ratio(self) -> float:
        return self.torch / self.ours

    @property
    def rate(self) -> float:
        return self.work / self.ours

    def cell(self) -> str:
        unit = "GFLOP/s" if self.kind == "conv" else "GB/s"
        share = f" {100 * self.rate / self.limit:.0f} %" if self.limit else ""
        times = f"{1e3 * self.ours:.3g} / {1e3 * self.torch:.3g} ms"
        return f"{times}, {self.rate / 1e9:.3g} {unit}{share}, **{self.ratio:.2f}**"


def function_name(kind: str, layer: ConvLayer | PoolLayer) -> str:
    return f"{'conv' if kind == 'conv' else 'max_pool'}{layer.dims}d"


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
    )


def random_tensor(shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    tensor = torch.randn(*shape, generator=generator).to(dtype)
    if channels_last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        tensor = tensor.contiguous(memory_format=formats[len(shape)])
    return tensor


@dataclass(frozen=True)
class Measured:
    """Something to time: ours and torch's call, ours compared with naive, and its work."""

    ours: Call
    torch: Call
    equals_naive: Callable[[], bool]
    work: float


class ConvBench:
    """The three directions of one layer in one row of the implementation table."""

    def __init__(self, layer: ConvLayer, dtype: torch.dtype, channels_last: bool, impl: str):
        self.layer, self.impl = layer, None if impl == "auto" else impl
        shape = (layer.batch, layer.channels, *layer.size)
        filters = (layer.filters, layer.channels // layer.groups, *layer.kernel)
        self.input = random_tensor(shape, dtype, channels_last)
        self.weight = random_tensor(filters, dtype, channels_last)
        outputs = (layer.batch, layer.filters, *layer.output_size)
        self.grad = random_tensor(outputs, dtype, channels_last)
        self.arguments = (layer.stride, layer.padding, layer.dilation)
        name = function_name("conv", layer)
        self.function, self.torchs = getattr(F, name), getattr(TF, name)

    def measured(self, direction: str) -> Measured:
        # Only what is asked for requires a gradient, so that neither side computes more.
        x = self.input.detach().requires_grad_(direction == "grad_input")
        w = self.weight.detach().requires_grad_(direction == "grad_weight")
        of = x if direction == "grad_input" else w
        arguments = (x, w, None, *self.arguments, self.layer.groups)
        output = self.function(*arguments, impl=self.impl)
        torch_output = self.torchs(*arguments)

        def ours() -> Tensor:
            if direction == "forward":
                return self.function(*arguments, impl=self.impl)
            return torch.autograd.grad(output, of, self.grad, retain_graph=True)[0]

        def torchs() -> Tensor:
            if direction == "forward":
                return self.torchs(*arguments)
            return torch.autograd.grad(torch_output, of, self.grad, retain_graph=True)[0]

        return Measured(
            ours,
            torchs,
            lambda: self.equals_naive(direction, ours()),
            2.0 * self.layer.multiply_adds,
        )

    def equals_naive(self, direction: str, result: Tensor) -> bool:
        """Compares as many whole channels (or groups of them) as the naive loop does quickly."""
        layer = self.layer
        samples = layer.batch if direction == "grad_weight" else 1
        x, w, grad = self.input[:samples], self.weight, self.grad[:samples]
        budget = CHECKED_MULTIPLY_ADDS * layer.batch / (samples * layer.multiply_adds)
        if layer.groups > 1:  # the first groups
            groups = min(layer.groups, max(1, int(budget * layer.groups)))
            ins = groups * (layer.channels // layer.groups)
            outs = groups * (layer.filters // layer.groups)
            x, w, grad = x[:, :ins], w[:outs], grad[:, :outs]
            channels = ins if direction == "grad_input" else outs
        else:
            groups = 1
            all_channels = layer.channels if direction == "grad_input" else layer.filters
            channels = min(all_channels, max(1, int(budget * all_channels)))
            if direction == "grad_input":
                x, w = x[:, :channels], w[:, :channels]
            else:
                w, grad = w[:channels], grad[:, :channels]
        rest = (*self.arguments, groups)
        if direction == "forward":
            naive = self.function(x, w, None, *rest, impl="naive")
            return same_bits(result[:1, :channels], naive)
        if direction == "grad_input":
            naive = F.conv_grad_input(x.shape, w, grad, *rest, impl="naive")
            return same_bits(result[:1, :channels], naive)
        naive = F.conv_grad_weight(x, w.shape, grad, *rest, impl="naive")
        return same_bits(result[:channels], naive)


class PoolBench:
    """Forward without and with indices, and backward, of one layer."""

    def __init__(self, layer: PoolLayer, dtype: torch.dtype, channels_last: bool, impl: str):
        shape = (layer.batch, layer.channels, *layer.size)
        self.input = random_tensor(shape, dtype, channels_last).requires_grad_()
        name = function_name("pool", layer)
        arguments = (layer.kernel, layer.stride, layer.padding, layer.dilation, layer.ceil_mode)

        def ours(x: Tensor, indices: bool = False, impl: str = impl) -> Any:
            row = None if impl == "auto" else impl
            return getattr(F, name)(x, *arguments, return_indices=indices, impl=row)

        def torchs(x: Tensor, indices: bool = False) -> Any:
            return getattr(TF, name)(x, *arguments, return_indices=indices)

        self.ours, self.torchs = ours, torchs
        self.output, self.torch_output = ours(self.input), torchs(self.input)
        self.naive_output = ours(self.input, impl="naive")
        self.grad = random_tensor(self.output.shape, dtype, channels_last)

    def measured(self, direction: str) -> Measured:
        x = self.input.detach()
        work = float(x.nbytes + self.output.nbytes)
        if direction == "backward":

            def gradient(output: Tensor) -> Tensor:
                return torch.autograd.grad(output, self.input, self.grad, retain_graph=True)[0]

            return Measured(
                lambda: gradient(self.output),
                lambda: gradient(self.torch_output),
                lambda: same_bits(gradient(self.output), gradient(self.naive_output)),
                work,
            )
        indices = direction == "forward_indices"

        def equal() -> bool:
            one, other = self.ours(x, indices), self.ours(x, indices, impl="naive")
            pairs = zip(one, other, strict=True) if indices else [(one, other)]
            return all(same_bits(a, b) for a, b in pairs)

        return Measured(
            lambda: self.ours(x, indices),
            lambda: self.torchs(x, indices),
            equal,
            work + (8.0 * self.output.numel() if indices else 0.0),
        )


# ---- measuring ---------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Asks glibc to keep what is freed; other allocators are left as they are.

    A large result may come as new pages, which can cost more than a convolution. To which of two
    calls in turns that happens is luck.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # names of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def medians(calls: Sequence[Call], rounds: int) -> list[float]:
    """Seconds of each call, in turns, the order reversed in every other round."""
    repeats = []
    for call in calls:
        call()
        count, start = 0, time.perf_counter()
        while count == 0 or time.perf_counter() - start < SECONDS_PER_SAMPLE:
            call()
            count += 1
        repeats.append(count)
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds):
        order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
        for i in order:
            start = time.perf_counter()
            for _ in range(repeats[i]):
                calls[i]()
            samples[i].append((time.perf_counter() - start) / repeats[i])
    return [statistics.median(s) for s in samples]


def tiny_calls(rounds: int) -> Iterator[str]:
    """What a call costs whose products cost nothing: a table in microseconds, one thread."""
    bench = ConvBench(TINY, torch.float32, False, "auto")
    x, w = bench.input, bench.weight
    needing = x.clone().requires_grad_(), w.clone().requires_grad_()

    def both(function: Callable[..., Tensor]) -> Call:
        return lambda: torch.autograd.grad(function(*needing), needing, bench.grad)

    pairs = {
        "forward": [lambda: bench.function(x, w), lambda: bench.torchs(x, w)],
        "forward and backward": [both(bench.function), both(bench.torchs)],
    }
    torch.set_num_threads(1)
    yield "| call, 1x3x8x8, 8 filters of 3x3 | ours / torch | ours as a multiple of torch's |"
    yield "|---|---|---|"
    for name, calls in pairs.items():
        ours, torchs = medians(calls, rounds)
        yield f"| {name} | {1e6 * ours:.1f} / {1e6 * torchs:.1f} us | {ours / torchs:.2f} |"


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of copying a tensor larger than any cache."""
    # Half a page apart: a load soon after a store to the same place of another page waits for it.
    count, half_page = COPIED_BYTES // 4, 512
    both = torch.ones(2 * count + half_page)
    source, target = both[:count], both[count + half_page :]
    (seconds,) = medians([lambda: target.copy_(source)], 5)
    return 2.0 * COPIED_BYTES / seconds


def machine() -> dict[str, str]:
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
                break
    except OSError:
        pass  # not Linux
    return {
        "processor": name,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


# ---- output ------------------------------------------------------------------------------------


def tables(results: Sequence[Result]) -> Iterator[str]:
    """Markdown: a table for each kind, thread count and row, its directions side by side."""
    groups = list(dict.fromkeys((r.kind, r.threads, r.impl) for r in results))
    for kind, threads, impl in groups:
        chosen = [r for r in results if (r.kind, r.threads, r.impl) == (kind, threads, impl)]
        directions = list(dict.fromkeys(r.direction for r in chosen))
        limit = chosen[0].limit / 1e9
        what = f"peak {limit:.0f} GFLOP/s" if kind == "conv" else f"copy {limit:.1f} GB/s"
        yield f"**{kind}, {threads} thread{'s' * (threads > 1)}, impl {impl}, {what}**\n"
        yield "| layer | " + " | ".join(directions) + " |"
        yield "|---" * (1 + len(directions)) + "|"
        for layer in dict.fromkeys(r.layer for r in chosen):
            cells = {r.direction: r.cell() for r in chosen if r.layer == layer}
            yield f"| {layer} | " + " | ".join(cells.get(d, "") for d in directions) + " |"
        summary = []
        for direction in directions:
            ratios = {r.layer: r.ratio for r in chosen if r.direction == direction}
            mean = math.exp(statistics.fmean(map(math.log, ratios.values())))
            worst = min(ratios, key=ratios.__getitem__)
            summary.append(f"mean **{mean:.2f}**, worst **{ratios[worst]:.2f}** ({worst})")
        yield "| geometric mean of the ratios | " + " | ".join(summary) + " |\n"


def plot(results: Sequence[Result], path: str, title: str) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(
            f"--plot needs matplotlib ({error}): pip install 'torch_naiveconv[plots]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = list(dict.fromkeys(r.layer for r in results))
    series = list(dict.fromkeys((r.direction, r.threads, r.impl) for r in results))
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.12 * len(layers) * (len(series) + 1)))
    for i, (direction, threads, impl) in enumerate(series):
        chosen = [r for r in results if (r.direction, r.threads, r.impl) == series[i]]
        positions = [layers.index(r.layer) + (i + 0.5) / (len(series) + 1) for r in chosen]
        label = f"{direction}, {threads} thread{'s' * (threads > 1)}, {impl}"
        axes.barh(positions, [r.ratio for r in chosen], 1 / (len(series) + 1), label=label)
    axes.set_yticks([i + 0.5 for i in range(len(layers))], layers)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("torch's time / ours")
    axes.set_title(title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


# ---- the command -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP")
    parser.add_argument(
        "--layers",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="such as 'resnet*' (%(default)s)",
    )
    every = list(dict.fromkeys(d for names in DIRECTIONS.values() for d in names))
    parser.add_argument(
        "--directions",
        nargs="+",
        choices=every,
        default=every,
        metavar="DIRECTION",
        help=", ".join(every),
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], metavar="N")
    parser.add_argument(
        "--channels-last", action="store_true", help="input and weight (2-D and 3-D layers only)"
    )
    parser.add_argument(
        "--impl", nargs="+", default=["auto"], metavar="ROW", help="rows of the tables, or auto"
    )
    parser.add_argument("--rounds", type=int, default=7, help="of timing; the median counts")
    parser.add_argument("--calls", action="store_true", help="only: what a tiny call costs")
    parser.add_argument("--json", metavar="FILE", help="write the results")
    parser.add_argument("--plot", metavar="FILE", help="write a bar chart of the ratios")


def chosen_layers(arguments: argparse.Namespace) -> Iterator[tuple[str, ConvLayer | PoolLayer]]:
    every = [("conv", layer) for layer in CONV_LAYERS] + [("pool", layer) for layer in POOL_LAYERS]
    for kind, layer in every:
        if function_name(kind, layer) not in arguments.ops:
            continue
        if arguments.channels_last and layer.dims == 1:
            continue
        if any(fnmatch(layer.name, pattern) for pattern in arguments.layers):
            yield kind, layer


def measure(arguments: argparse.Namespace) -> Iterator[Result]:
    dtype = DTYPES[arguments.dtype]
    jobs = [
        (kind, layer, impl, [d for d in DIRECTIONS[kind] if d in arguments.directions])
        for kind, layer in chosen_layers(arguments)
        for impl in arguments.impl
        if impl == "auto" or impl in ops.rows(kind, "cpu")
    ]
    steps = sum(len(directions) for *_, directions in jobs) * len(arguments.threads)
    with tqdm(total=steps, file=sys.stderr) as progress:
        for kind, layer, impl, directions in jobs:
            torch.set_num_threads(max(arguments.threads))
            rest = dtype, arguments.channels_last, impl
            bench = (
                ConvBench(layer, *rest) if isinstance(layer, ConvLayer) else PoolBench(layer, *rest)
            )
            for direction in directions:
                measured = bench.measured(direction)
                torch.set_num_threads(max(arguments.threads))
                if not measured.equals_naive():
                    raise SystemExit(f"{layer.name} {direction} {impl}: not the bits of naive")
                for threads in arguments.threads:
                    progress.set_description(f"{layer.name} {direction}")
                    torch.set_num_threads(threads)
                    ours, torchs = medians([measured.ours, measured.torch], arguments.rounds)
                    yield Result(
                        kind, layer.name, direction, threads, impl, ours, torchs, measured.work
                    )
                    progress.update()


def machine_limits(arguments: argparse.Namespace) -> dict[tuple[str, int, str], float]:
    """What a kind of call can reach on so many threads: multiply-adds, or bytes of a copy."""
    limits = {}
    double = DTYPES[arguments.dtype] == torch.float64
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for impl in arguments.impl:
            limits["conv", threads, impl] = ops.NAMESPACE.cpu_fma_peak(impl, double)
            limits["pool", threads, impl] = copy_bandwidth()
    return limits


def run(arguments: argparse.Namespace) -> int:
    if min(*arguments.threads, arguments.rounds, 1) < 1:
        print("--threads and --rounds must be positive", file=sys.stderr)
        return 2
    threads = torch.get_num_threads()
    keep_freed_memory()
    try:
        if arguments.calls:
            print("\n".join(tiny_calls(arguments.rounds)))
            return 0
        before, results = machine_limits(arguments), list(measure(arguments))
        after = machine_limits(arguments)
    finally:
        torch.set_num_threads(threads)
    if not results:
        print("nothing matches", file=sys.stderr)
        return 2
    # Other work on the machine can only lower what is measured: the higher one counts.
    keys = [(r.kind, r.threads, r.impl) for r in results]
    limits = [max(before[key], after[key]) for key in keys]
    results = [replace(r, limit=limit) for r, limit in zip(results, limits, strict=True)]
    about = machine()
    layout = "channels_last" if arguments.channels_last else "contiguous"
    title = f"{arguments.dtype}, {layout}, torch {about['torch']}"
    print(f"{title}; {about['processor']}, {about['system']}, {about['date']}")
    print("Ours / torch's milliseconds, our rate and its share of the machine's, **ratio**.\n")
    print("\n".join(tables(results)))
    if arguments.json:
        records = [asdict(r) | {"ratio": r.ratio} for r in results]
        text = {"machine": about, "dtype": arguments.dtype, "layout": layout, "results": records}
        Path(arguments.json).write_text(json.dumps(text, indent=1) + "\n")
    if arguments.plot:
        plot(results, arguments.plot, title)
    return 0
