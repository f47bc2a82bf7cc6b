"""The promises of docs/contract.md, each a test of its name over generated problems.

A problem is decoded from one integer, so a failing example is one line that reproduces it.
"""

import contextlib
import ctypes
import platform
import random
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensors import same, threads

from torch_naiveconv import audit, conformance
from torch_naiveconv import functional as F

CASES = 1000
FLOATS = ("float32", "float32", "float64", "float16", "bfloat16")
CLASSES = ("ordinary", "ordinary", "large", "tiny", "subnormal", "zeros", "special", "ties")
GRADIENTS = ("conv_grad_input", "conv_grad_weight", "conv_grad_bias")
OPS = ("conv", *GRADIENTS, "max_pool", "max_pool_grad_input")

many = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@dataclass
class Problem:
    """Shapes, arguments and values of one call of each operation, all drawn from `seed`."""

    seed: int
    large: bool = False  # so much work that the kernels share it among threads

    def __post_init__(self):
        draw = random.Random(self.seed)
        self.draw = draw
        dims = self.dims = draw.choice((1, 2, 2, 2, 3))
        self.dtype = draw.choice((*FLOATS, "int32"))
        self.values = draw.choice(CLASSES) if self.dtype in FLOATS else "ordinary"
        self.groups = draw.choice((1, 1, 2, 3))
        depthwise = self.groups > 1 and draw.random() < 0.4
        most = 1 if depthwise else 5
        grow = 4 if self.large else 1
        self.batch = draw.randint(1, 3) * grow
        self.channels = draw.randint(1, most) * self.groups * grow
        self.filters = draw.randint(1, 6) * self.groups * grow
        self.kernel = [draw.randint(1, 3) for _ in range(dims)]
        self.stride = [draw.choice((1, 1, 2, 3)) for _ in range(dims)]
        self.dilation = [draw.choice((1, 1, 2)) for _ in range(dims)]
        self.padding = [(draw.randint(0, 2), draw.randint(0, 2)) for _ in range(dims)]
        room = {1: 40, 2: 10, 3: 4}[dims] * (2 if self.large else 1)
        self.size = [
            self.dilation[i] * (self.kernel[i] - 1) + draw.randint(1, room) for i in range(dims)
        ]
        self.out = [
            (self.size[i] + sum(self.padding[i]) - self.dilation[i] * (self.kernel[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in range(dims)
        ]
        self.x = self.tensor(0, (self.batch, self.channels, *self.size))
        self.w = self.tensor(1, (self.filters, self.channels // self.groups, *self.kernel))
        self.b = self.tensor(2, (self.filters,)) if draw.random() < 0.5 else None
        self.g = self.tensor(3, (self.batch, self.filters, *self.out))
        self.pooled_g = self.tensor(4, (self.batch, self.channels, *self.out))

    def tensor(self, number, shape):
        seed = self.seed % 2**28
        bits = conformance.generate(
            self.dtype, self.values, seed, number, torch.Size(shape).numel()
        )
        return torch.from_numpy(bits).view(getattr(torch, self.dtype)).reshape(shape)

    @property
    def geometry(self):
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def inputs(self, op):
        """The arguments of a function of torch_naiveconv.functional, by name."""
        if op == "conv":
            own = {"input": self.x, "weight": self.w, "bias": self.b, "groups": self.groups}
        elif op == "conv_grad_input":
            own = {"input_size": self.x.shape, "weight": self.w, "grad_output": self.g}
            own["groups"] = self.groups
        elif op == "conv_grad_weight":
            own = {"input": self.x, "weight_size": self.w.shape, "grad_output": self.g}
            own["groups"] = self.groups
        elif op == "conv_grad_bias":
            return {"grad_output": self.g}
        elif op == "max_pool":
            own = {"input": self.x, "kernel_size": self.kernel}
        else:
            own = {"input": self.x, "grad_output": self.pooled_g, "kernel_size": self.kernel}
        return {**own, **self.geometry}

    def function(self, op):
        return getattr(F, f"{op}{self.dims}d" if op in ("conv", "max_pool") else op)

    def run(self, op, impl=None, **changed):
        return self.function(op)(**{**self.inputs(op), **changed}, impl=impl)


problems = st.integers(0, 2**40).map(Problem)
large_problems = st.integers(0, 2**40).map(lambda seed: Problem(seed, large=True))
ops = st.sampled_from(OPS)


def test_every_promise_has_its_test():
    text = (Path(__file__).parent.parent / "docs" / "contract.md").read_text()
    promised = re.findall(r"^\| \*\*(\w+)\*\* \|", text, flags=re.MULTILINE)
    assert len(promised) == 10
    assert all(f"test_{name}" in globals() for name in promised), promised


@many
@given(problems, ops)
def test_repeat(p, op):
    assert same(p.run(op), p.run(op))


@many
@given(large_problems, ops)
def test_threads(p, op):
    with threads(1):
        one = p.run(op)
    for count in (2, 3):
        with threads(count):
            assert same(one, p.run(op))


@many
@given(problems, st.sampled_from(("conv", "conv_grad_input", "max_pool", "max_pool_grad_input")))
def test_batch(p, op):
    whole = p.run(op)
    order = list(range(p.batch))
    p.draw.shuffle(order)
    chosen = order[: p.draw.randint(1, p.batch)]
    p.x, p.g, p.pooled_g = p.x[chosen], p.g[chosen], p.pooled_g[chosen]
    assert same(whole[chosen], p.run(op))


@many
@given(problems, ops)
def test_rows(p, op):
    naive = p.run(op, "naive")
    for impl in F.implementations(p.function(op).__name__):
        assert same(naive, p.run(op, impl)), impl


@many
@given(problems, ops)
def test_format(p, op):
    expected = p.run(op)
    p.x, p.w, p.g, p.pooled_g = (strange(t, p.draw) for t in (p.x, p.w, p.g, p.pooled_g))
    assert same(expected, p.run(op))


def strange(t, draw):
    """The same tensor in another memory format, or as a view into a larger one."""
    kind = draw.randint(0, 3)
    if kind == 0:
        return t.transpose(1, -1).contiguous().transpose(1, -1)
    if kind == 1:
        return t.movedim(1, -1).contiguous().movedim(-1, 1)  # channels last
    if kind == 2:
        wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]
    return t


@many
@given(problems)
def test_filters(p):
    p.groups = 1
    p.w = p.tensor(1, (p.filters, p.channels, *p.kernel))
    a = p.draw.randrange(p.filters)
    b = p.draw.randint(a + 1, p.filters)
    bias = None if p.b is None else p.b[a:b]
    assert same(p.run("conv")[:, a:b], p.run("conv", weight=p.w[a:b], bias=bias))


@many
@given(problems, st.sampled_from(("conv", "max_pool")))
def test_crop(p, op):
    if p.draw.random() < 0.5:
        p.padding = [(0, 0)] * p.dims
    crop, inner = [slice(None)] * 2, [slice(None)] * 2
    for i in range(p.dims):
        window = p.dilation[i] * (p.kernel[i] - 1) + 1
        before = p.padding[i][0]
        last = (p.size[i] - window + before) // p.stride[i]
        inside = range(-(-before // p.stride[i]), last + 1)
        if not inside:
            return test_crop.hypothesis.inner_test(unpadded(p), op)
        first = p.draw.choice(inside)
        end = p.draw.randint(first, inside[-1])
        start = first * p.stride[i] - before
        crop.append(slice(start, (end - first) * p.stride[i] + start + window))
        inner.append(slice(first, end + 1))
    whole = p.run(op)[tuple(inner)]
    assert same(whole, p.run(op, input=p.x[tuple(crop)], padding=0))


def unpadded(p):
    p.padding = [(0, 0)] * p.dims
    return p


@many
@given(problems, st.sampled_from(("conv_grad_weight", "conv_grad_bias")))
def test_resume(p, op):
    shape = p.w.shape if op == "conv_grad_weight" else (p.filters,)
    kept = torch.float32 if p.dtype in ("float16", "bfloat16") else p.x.dtype
    m = p.draw.randint(0, p.batch)
    total = torch.zeros(shape, dtype=kept)
    whole = p.run(op, total=total)
    for part in (slice(0, m), slice(m, None)):
        if p.g[part].shape[0] == 0:
            continue
        samples = {"grad_output": p.g[part]}
        if op == "conv_grad_weight":
            samples["input"] = p.x[part]
        total = p.run(op, total=total, **samples)
    assert same(whole, total)
    if kept == p.x.dtype:
        assert same(whole, p.run(op))


@many
@given(problems, st.sampled_from(("conv", *GRADIENTS, "max_pool", "conv_transpose")))
def test_alone(p, op):
    if op == "conv_transpose":
        inputs = {"input": p.g, "weight": p.w, "groups": p.groups, **p.geometry}
        if any(
            (p.out[i] - 1) * p.stride[i] + p.dilation[i] * (p.kernel[i] - 1) < sum(p.padding[i])
            for i in range(p.dims)
        ):
            inputs["padding"] = 0
        op = f"conv_transpose{p.dims}d"
        output = getattr(F, op)(**inputs)
    else:
        inputs, output = p.inputs(op), p.run(op)
        op = p.function(op).__name__
    report = audit(op, inputs, output, elements=2, seed=p.seed)
    assert report and report.checked == min(2, output.numel()), str(report)


# ---- the floating-point environment ------------------------------------------------------------

ROUNDINGS = {
    "x86_64": (0x400, 0x800, 0xC00),  # down, up, towards zero: fenv.h
    "aarch64": (0x800000, 0x400000, 0xC00000),
}.get(platform.machine(), ())


@contextlib.contextmanager
def flushing():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def rounding(mode):
    libm = ctypes.CDLL(None)
    assert libm.fesetround(mode) == 0
    try:
        yield
        assert libm.fegetround() == mode, "the caller's rounding mode was not restored"
    finally:
        libm.fesetround(0)


@many
@given(problems, ops, st.sampled_from(("flush", *ROUNDINGS)))
def test_environment(p, op, mode):
    expected = p.run(op)
    with flushing() if mode == "flush" else rounding(mode):
        found = p.run(op)
    assert same(expected, found)


def test_environment_of_a_fast_math_library(tmp_path):
    """Loading a library built with -ffast-math switches flush-to-zero on, in some compilers."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, library = tmp_path / "fast.cpp", tmp_path / "fast.so"
    source.write_text('extern "C" float half(float x) { return x / 2; }\n')
    command = [compiler, "-shared", "-fPIC", "-ffast-math", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    some = [Problem(seed) for seed in range(100)]
    expected = [[p.run(op) for op in OPS] for p in some]
    try:
        ctypes.CDLL(str(library))
        for p, results in zip(some, expected, strict=True):
            assert all(same(p.run(op), r) for op, r in zip(OPS, results, strict=True))
    finally:
        torch.set_flush_denormal(False)


def test_a_processor_without_fma_is_refused(monkeypatch):
    from torch_naiveconv import ops as operators

    operators.check_fma(operators.conv)

    def two_roundings(input, weight, bias, *rest):
        total = torch.zeros(())
        for a, b in zip(input.flatten(), weight.flatten(), strict=True):
            total = total + a * b
        return total.reshape(1, 1, 1)

    def through_double(input, weight, bias, *rest):
        total = torch.zeros(())
        for a, b in zip(input.flatten(), weight.flatten(), strict=True):
            total = (total.double() + a.double() * b.double()).float()
        return total.reshape(1, 1, 1)

    for wrong in (two_roundings, through_double):
        with pytest.raises(ImportError, match="fused multiply-add"):
            operators.check_fma(wrong)
