"""Check gradients and values against torch: gradcheck, gradgradcheck and torch.nn.functional.

Runs a table of small cases on every device and implementation present, in float64. "exact"
compares with torch.nn.functional on small integers, where every order of additions gives the same
numbers, so the results must be equal; "close" compares on random values within the bound of the
summation error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor
from tqdm import tqdm

from .. import functional as F


@dataclass(frozen=True)
class Case:
    """One call: a function's name, the shapes of its tensors, its other arguments."""

    function: str
    shapes: tuple[tuple[int, ...], ...]
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
        arguments = "".join(f", {name}={value}" for name, value in self.arguments.items())
        return f"{self.function}({shapes}{arguments})"

    def ours(self, impl: str | None) -> Callable[..., Tensor]:
        function = getattr(F, self.function)
        return lambda *tensors: function(*tensors, **self.arguments, impl=impl)

    def torchs(self) -> Callable[..., Tensor]:
        function = getattr(TF, self.function)
        return lambda *tensors: function(*tensors, **self.arguments)

    def tensors(self, values: str, device: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Seeded inputs: "random" normal values, or small "integers" (distinct for pooling)."""
        generator = torch.Generator().manual_seed(0)
        made = []
        for shape in self.shapes:
            count = torch.Size(shape).numel()
            if self.function.startswith("max_pool"):
                t = torch.randperm(count, generator=generator).to(torch.float64)
            elif values == "integers":
                t = torch.randint(-8, 9, (count,), generator=generator).to(torch.float64)
            else:
                t = torch.randn(count, generator=generator, dtype=torch.float64)
            made.append(t.view(shape).to(device=device, dtype=dtype))
        return made


CASES = [
    Case("conv1d", ((2, 4, 9), (6, 2, 3), (6,)), {"stride": 2, "padding": 1, "groups": 2}),
    Case("conv1d", ((1, 2, 11), (3, 2, 2)), {"dilation": 3}),
    Case("conv2d", ((2, 3, 5, 4), (4, 3, 3, 3), (4,)), {"padding": 1}),
    Case("conv2d", ((1, 2, 7, 6), (2, 2, 2, 3)), {"stride": (3, 2), "padding": (1, 2)}),
    Case("conv2d", ((1, 4, 6, 6), (8, 1, 3, 3), (8,)), {"groups": 4, "padding": 2, "dilation": 2}),
    Case("conv2d", ((2, 2, 4, 4), (3, 2, 1, 1), (3,)), {"stride": 2}),
    Case("conv2d", ((1, 2, 5, 5), (2, 2, 4, 2)), {"padding": "same"}),
    Case("conv3d", ((1, 2, 4, 3, 4), (2, 1, 2, 3, 2), (2,)), {"padding": 1, "groups": 2}),
    Case(
        "conv_transpose1d",
        ((2, 4, 4), (4, 1, 3), (2,)),
        {"stride": 2, "output_padding": 1, "groups": 2},
    ),
    Case(
        "conv_transpose2d",
        ((1, 2, 3, 4), (2, 3, 3, 2), (3,)),
        {"stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0)},
    ),
    Case("conv_transpose2d", ((2, 2, 3, 3), (2, 2, 2, 2)), {"dilation": 2, "padding": 1}),
    Case("conv_transpose3d", ((1, 2, 2, 2, 3), (2, 1, 2, 2, 2), (1,)), {"stride": 2}),
    Case("max_pool1d", ((2, 3, 9),), {"kernel_size": 3, "stride": 2, "padding": 1}),
    Case("max_pool2d", ((2, 2, 6, 5),), {"kernel_size": 2}),
    Case(
        "max_pool2d",
        ((1, 2, 7, 7),),
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    ),
    Case("max_pool2d", ((1, 1, 6, 7),), {"kernel_size": (2, 3), "stride": 1, "dilation": (2, 1)}),
    Case("max_pool3d", ((1, 2, 4, 4, 4),), {"kernel_size": 2, "stride": (1, 2, 2)}),
]


def check_gradients(case: Case, impl: str | None, device: str) -> None:
    """First derivatives: reverse, forward and batched; raises where they are wrong."""
    tensors = [t.requires_grad_() for t in case.tensors("random", device)]
    assert torch.autograd.gradcheck(
        case.ours(impl),
        tensors,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


def check_second_gradients(case: Case, impl: str | None, device: str) -> None:
    """Second derivatives, reverse over reverse and forward over reverse."""
    tensors = [t.requires_grad_() for t in case.tensors("random", device)]
    assert torch.autograd.gradgradcheck(
        case.ours(impl), tensors, check_fwd_over_rev=True, check_batched_grad=True
    )


def _outputs_and_gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    output = function(*leaves)
    weights = torch.arange(output.numel(), device=output.device).remainder(5) - 2
    output.backward(weights.to(output.dtype).view(output.shape))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def check_exact(case: Case, impl: str | None, device: str) -> None:
    """Output and gradients equal to torch's on small integers."""
    tensors = case.tensors("integers", device)
    expected = _outputs_and_gradients(case.torchs(), tensors)
    for ours, torchs in zip(
        _outputs_and_gradients(case.ours(impl), tensors), expected, strict=True
    ):
        assert torch.equal(ours, torchs), case


def check_close(case: Case, impl: str | None, device: str) -> None:
    """Output and gradients near torch's on random values.

    Two float64 sums of n products each err by at most n * 2^-53 * sum |a b|; with n <= 1000 and
    sums of absolute values below 10^4 here, 1e-8 is far above rounding and far below any mistake.
    """
    tensors = case.tensors("random", device)
    expected = _outputs_and_gradients(case.torchs(), tensors)
    for ours, torchs in zip(
        _outputs_and_gradients(case.ours(impl), tensors), expected, strict=True
    ):
        assert ours.shape == torchs.shape
        assert bool(((ours - torchs).abs() <= 1e-8).all()), case


CHECKS: dict[str, Callable[[Case, str | None, str], None]] = {
    "gradcheck": check_gradients,
    "gradgradcheck": check_second_gradients,
    "exact": check_exact,
    "close": check_close,
}


def devices() -> list[str]:
    return ["cpu", "cuda"] if F.implementations("conv2d", "cuda") else ["cpu"]


def everything() -> Iterator[tuple[str, str, Case]]:
    """(device, impl, case) for all that can run here."""
    for device in devices():
        for case in CASES:
            for impl in F.implementations(case.function, device):
                yield device, impl, case


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds TEXT")


def run(arguments: argparse.Namespace) -> int:
    todo = [item for item in everything() if arguments.only in str(item[2])]
    passed: dict[tuple[str, str], dict[str, int]] = {}
    total: dict[tuple[str, str], int] = {}
    failures = []
    for device, impl, case in tqdm(todo, desc="check", unit="case", file=sys.stderr):
        key = device, impl
        total[key] = total.get(key, 0) + 1
        counts = passed.setdefault(key, dict.fromkeys(CHECKS, 0))
        for name, check in CHECKS.items():
            try:
                check(case, impl, device)
                counts[name] += 1
            except Exception as error:
                failures.append(f"{device} {impl} {name}: {case}: {type(error).__name__}: {error}")
    print(f"{'device':8}{'impl':10}" + "".join(f"{name:>16}" for name in CHECKS))
    for (device, impl), counts in passed.items():
        row = "".join(f"{f'{n} of {total[device, impl]}':>16}" for n in counts.values())
        print(f"{device:8}{impl:10}{row}")
    for failure in failures:
        print("FAILED", failure)
    if not todo:
        print(f"no case holds {arguments.only!r} in its name")
    print("all checks passed" if todo and not failures else "some checks FAILED")
    return 0 if todo and not failures else 1
