"""The kernel of the row ``amx`` on an emulated matrix unit: every bit equals the naive CPU row's.

No processor with AMX is needed: the kernel (``csrc/cpu/conv_amx.h``) is written against a small
unit that ``tests/amx/emulate_conv.cpp`` implements with the specification's own arithmetic. What is
left to the processor is that its instruction computes the same; the row asks for that itself before
it is used, and the last test shows that a unit which computes something else is found out. A line
that the driver prints reproduces the failing case: ``echo LINE | driver``.
"""

import os
import platform
import random
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX", "c++")
FORWARD, GRAD_INPUT, GRAD_WEIGHT = range(3)
UNIT = (1, 1, 1, 0, 0, 1)


def has_avx2():
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and " avx2 " in cpu.read_text()


pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER) is None or platform.machine() != "x86_64" or not has_avx2(),
    reason="no C++ compiler, or no AVX2 here",
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    program = tmp_path_factory.mktemp("amx") / "conv"
    sources = [str(HERE / "amx" / "emulate_conv.cpp"), str(HERE.parent / "csrc/cpu/conv_naive.cpp")]
    flags = ["-std=c++17", "-O1", "-mfma", "-ffp-contract=off"]
    subprocess.run([COMPILER, *flags, *sources, "-o", str(program)], check=True)
    return program


def run(driver, cases):
    lines = "".join(" ".join(map(str, case)) + "\n" for case in cases)
    result = subprocess.run([driver], input=lines, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    assert result.stdout.endswith(f"{len(cases)} cases, 0 differ\n")


def case(r, direction, shape, threads=None, small=None):
    values, layout = r.choice([0, 0, 1, 1, 2, 2, 3, 4]), r.choice([0, 0, 0, 1, 1, 2, 3, 4])
    threads = threads or r.choice([1, 1, 2, 5])
    small = r.choice([0, 0, 0, 1, 1, 2, 3]) if small is None else small
    return (direction, values, layout, threads, small, r.randrange(2), r.randrange(3), *shape)


def random_shape(r):
    dims = r.choice([1, 2, 2, 2, 3])
    longest = {1: r.choice([40, 150]), 2: r.choice([9, 20]), 3: 6}[dims]
    sizes = [UNIT] * (3 - dims)
    while len(sizes) < 3:
        size, kernel, stride, dilation = (
            r.randint(1, longest),
            r.choice([1, 1, 2, 3, 3, 4]),
            r.choice([1, 1, 2, 3]),
            r.choice([1, 1, 2, 3]),
        )
        before, after = r.choice([(0, 0), (1, 1), (r.randrange(4), r.randrange(4))])
        if size + before + after > dilation * (kernel - 1):
            sizes.append((size, kernel, stride, before, after, dilation))
    groups = r.choice([1, 1, 1, 2, 3])
    channels = [groups * r.choice([1, 2, 8, 16, 17, 32, 33, r.randint(1, 70)]) for _ in range(2)]
    axes = [number for axis in sizes for number in axis]
    return (r.choice([1, 1, 2, 3]), *channels, groups, *axes)


@pytest.mark.parametrize("direction", [FORWARD, GRAD_INPUT, GRAD_WEIGHT])
def test_random(driver, direction):
    r = random.Random(direction)
    run(driver, [case(r, direction, random_shape(r)) for _ in range(200)])


SHAPES = {  # N, C, K, groups, axes
    "one tile": (1, 32, 16, 1, *UNIT, *UNIT, 16, 1, 1, 0, 0, 1),
    "pointwise": (2, 64, 32, 1, *UNIT, *(13, 1, 1, 0, 0, 1) * 2),
    "pointwise, strided": (2, 40, 24, 1, *UNIT, *(13, 1, 2, 0, 0, 1) * 2),
    "no padding": (2, 32, 32, 1, *UNIT, *(12, 3, 1, 0, 0, 1) * 2),
    "padding": (2, 20, 20, 1, *UNIT, *(14, 3, 1, 1, 1, 1) * 2),
    "dilation": (1, 20, 20, 1, *UNIT, *(14, 3, 1, 4, 4, 4) * 2),
    "few long rows": (1, 8, 8, 1, *UNIT, 2, 1, 1, 0, 0, 1, 700, 3, 1, 1, 1, 1),
    "planes that share a tile": (2, 16, 16, 1, *(3, 3, 1, 1, 1, 1) * 3),
    "strides larger than the kernel": (2, 20, 20, 1, *UNIT, *(17, 2, 5, 0, 0, 1) * 2),
    "kernel larger than the image": (2, 20, 20, 1, *UNIT, *(3, 7, 1, 3, 3, 1) * 2),
    "stride phases, the last not everywhere": (2, 5, 40, 1, *UNIT, *(15, 3, 2, 1, 1, 1) * 2),
    "four stride phases side by side": (1, 3, 33, 1, *UNIT, *(40, 4, 4, 0, 0, 1) * 2),
    "long rows": (1, 20, 20, 1, *UNIT, 4, 3, 1, 1, 1, 1, 75, 3, 1, 1, 1, 1),
    "short rows": (2, 6, 16, 1, *UNIT, *(14, 5, 1, 0, 0, 1) * 2),
    "strided rows of a large kernel": (1, 3, 20, 1, *UNIT, *(30, 7, 2, 3, 3, 1) * 2),
}


@pytest.mark.parametrize("direction", [FORWARD, GRAD_INPUT, GRAD_WEIGHT])
def test_named(driver, direction):
    r = random.Random(direction)
    run(driver, [case(r, direction, s, small=i % 4) for s in SHAPES.values() for i in range(4)])


@pytest.mark.parametrize("direction", [FORWARD, GRAD_INPUT, GRAD_WEIGHT])
def test_every_remainder(driver, direction):
    """Rows, columns and terms from one to beyond two tiles, each with the others in turn."""
    r = random.Random(direction)
    cases = []
    for size in range(1, 36):
        for c, k, width in ((size, 17, 18), (17, size, 18), (34, 16, size)):
            axes = (*UNIT, *UNIT, width, 1, 1, 0, 0, 1)
            cases.append(case(r, direction, (1, c, k, 1, *axes)))
    run(driver, cases)


WRONG = ["one chain", "gradual", "tiny before rounding", "keeps subnormals", "truncates"]


@pytest.mark.parametrize("unit", ["exact", *WRONG])
def test_a_wrong_unit_is_not_trusted(driver, unit):
    said = subprocess.run([driver, unit], capture_output=True, text=True, check=True).stdout
    assert said == ("trusted\n" if unit == "exact" else "not trusted\n")
