"""The CUDA kernels' bodies, run on the host: every bit equals the naive CPU row's.

No GPU is needed: the kernels are written against a small interface (``csrc/cuda/block.h``) that
``tests/cuda/emulation.h`` implements thread by thread. What is left to a GPU is the hardware's own
barriers, copies and arithmetic. A line that a driver prints reproduces the failing case:
``echo LINE | driver``.
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
DRIVERS = {"conv": "csrc/cpu/conv_naive.cpp", "pool": "csrc/cpu/max_pool_naive.cpp"}
FORWARD, GRAD_INPUT, GRAD_WEIGHT, GRAD_BIAS = range(4)
DEPTHWISE = 5  # the kernels 0 to 4 are the tiles: large to thin, and any
UNIT = (1, 1, 1, 0, 0, 1)
BFLOAT16 = 3

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")


def sanitizer_flags(place):
    """AddressSanitizer, where the compiler has its library: no kernel reads out of bounds."""
    flags = ["-fsanitize=address"]
    (place / "empty.cpp").write_text("int main() { return 0; }\n")
    command = [COMPILER, *flags, "-o", str(place / "empty"), str(place / "empty.cpp")]
    built = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return flags if built and subprocess.run([place / "empty"], check=False).returncode == 0 else []


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    place = tmp_path_factory.mktemp("cuda")
    fma = ["-mfma"] if platform.machine() in ("x86_64", "AMD64") else []
    checks = sanitizer_flags(place)
    builds = {}
    for name, naive in DRIVERS.items():
        sources = [str(HERE / "cuda" / f"emulate_{name}.cpp"), str(HERE.parent / naive)]
        command = [
            COMPILER,
            "-O1",
            *fma,
            *checks,
            "-ffp-contract=off",
            "-o",
            str(place / name),
            *sources,
        ]
        builds[name] = subprocess.Popen(command)
    for name, build in builds.items():
        assert build.wait() == 0, name
    return place


def run(driver, cases):
    lines = "".join(" ".join(map(str, case)) + "\n" for case in cases)
    result = subprocess.run([driver], input=lines, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:]
    assert result.stdout.endswith(f"{len(cases)} cases, 0 differ\n")


def axes(r, lengths, kernels, strides, dilations):
    """(in, kernel, stride, pad before, pad after, dilation) of depth, height, width."""
    dims = r.choice([1, 2, 2, 2, 3])
    result = [UNIT] * (3 - dims)
    for _ in range(dims):
        size = r.randrange(1, lengths[dims])
        pads = r.randrange(4), r.randrange(4)
        result.append((size, r.choice(kernels), r.choice(strides), *pads, r.choice(dilations)))
    return [number for axis in result for number in axis]


def tiled_case(r, direction):
    groups = r.choice([1, 1, 1, 2, 3])
    channels = groups * r.choice([1, 2, 3, 5, 17, 40]), groups * r.choice([1, 2, 3, 9, 20, 70])
    # order of the threads, copies that land late, split of the groups, kinds of values, format
    how = (
        r.randrange(3),
        r.randrange(2),
        r.choice([0, 0, 1, 2, 3, 6]),
        r.randrange(4),
        r.randrange(2),
    )
    lengths = {1: 60, 2: 13, 3: 6}
    sizes = axes(r, lengths, [1, 2, 3, 3, 5], [1, 1, 2, 3, 4], [1, 1, 2, 3])
    batch = r.choice([1, 1, 2, 3])
    return (direction, r.randrange(4), r.randrange(5), *how, batch, *channels, groups, *sizes)


def depthwise_case(r, direction):
    channels, filters = r.choice([1, 2, 3, 5, 17]), 1
    if direction in (FORWARD, GRAD_WEIGHT):
        filters = r.choice([1, 1, 2])
    kernel, stride, dilation = (
        r.choice([1, 3, 5, 7]),
        r.choice([1, 1, 2, 2, 3]),
        r.choice([1, 1, 2]),
    )
    sizes = axes(r, {1: 300, 2: 18, 3: 8}, [kernel], [stride], [dilation])
    if r.randrange(4) == 0:
        sizes = axes(r, {1: 60, 2: 18, 3: 8}, [1, 2, 3, 4], [1, 2, 3], [1, 2])
    if r.randrange(4) == 0:  # kernels of their own, and planes of more than one block
        width, stride = r.choice([3, 5, 7]), r.choice([1, 2])
        plane = [(r.randrange(8, 64), width, stride, r.randrange(4), r.randrange(4), 1)] * 2
        line = (r.randrange(60, 200), r.choice([1, 9, 31]), 1, r.randrange(9), r.randrange(9), 1)
        sizes = [
            n
            for axis in ([UNIT, UNIT, line] if r.randrange(3) == 0 else [UNIT, *plane])
            for n in axis
        ]
    groups = channels
    if direction == GRAD_BIAS:
        sizes = [n for i in range(0, 18, 6) for n in (sizes[i], *UNIT[1:])]
        channels = groups = 1
        filters = r.choice([1, 3, 8])
    how = r.randrange(3), 0, 0, r.randrange(4), r.randrange(2)
    if direction == GRAD_WEIGHT and r.randrange(4) == 0:  # groups of a few channels
        width = r.choice([3, 5, 7])
        plane = [
            (r.randrange(8, 40), width, r.choice([1, 2]), r.randrange(4), r.randrange(4), 1)
        ] * 2
        each = r.choice([(2, 2), (4, 4), (3, 5), (1, 6)])
        sizes = [n for axis in (UNIT, *plane) for n in axis]
        counts = r.choice([1, 2]), groups * each[0], groups * each[1], groups
        return (direction, 0, DEPTHWISE, *how[:4], 0, *counts, *sizes)
    counts = r.choice([1, 2, 3]), channels, channels * filters, groups
    return (direction, r.choice([0, 0, 0, 1, 2, 3]), DEPTHWISE, *how, *counts, *sizes)


def pool_case(r, direction):
    kind = r.randrange(3) if direction == FORWARD else r.choice([1, 2])  # none, offset, flat
    index = 3 if kind == 2 else r.randrange(3)
    sizes = axes(r, {1: 300, 2: 18, 3: 8}, [1, 2, 3, 3, 5], [1, 2, 2, 3, 4], [1, 1, 2, 3])
    how = r.randrange(2), kind, index, r.randrange(4), r.randrange(2)
    return (direction, r.randrange(13), *how, r.choice([1, 2]), r.choice([1, 3, 8]), *sizes)


WINDOWS = [(2, 2, 0), (3, 2, 1), (3, 1, 1), (4, 4, 0), (5, 1, 2), (9, 1, 4), (13, 1, 6)]


def known_window_case(r, direction):
    """Windows that have kernels of their own: floating point, bytes for indices, ties "first"."""
    width, stride, pad = r.choice(WINDOWS)
    size = 4 * r.randrange(1, 8)
    after = r.choice([pad, pad, r.randrange(width)])
    sizes = axes(r, {1: 2, 2: 12, 3: 6}, [1, 2, 3], [1, 2, 3], [1, 1, 2])
    sizes[12:] = size, width, stride, pad, after, 1
    kind = r.randrange(3) if direction == FORWARD else 1
    how = 0, kind, 3 if kind == 2 else 0, r.randrange(4), r.randrange(5) // 4
    return (direction, r.randrange(4), *how, r.choice([1, 2]), r.choice([1, 3, 8]), *sizes)


@pytest.mark.parametrize("direction", [FORWARD, GRAD_INPUT, GRAD_WEIGHT])
def test_tiled(drivers, direction):
    r = random.Random(direction)
    run(drivers / "conv", [tiled_case(r, direction) for _ in range(500)])


@pytest.mark.parametrize("direction", [FORWARD, GRAD_INPUT, GRAD_WEIGHT, GRAD_BIAS])
def test_depthwise_and_bias(drivers, direction):
    r = random.Random(direction)
    run(drivers / "conv", [depthwise_case(r, direction) for _ in range(300)])


def test_bias_of_minus_zero(drivers):
    """A flushed total of -0 stays -0 where a tap meets no output, and a bias of -0 shows it."""
    sizes = (*UNIT, *UNIT, 3, 3, 1, 0, 0, 1)
    cases = [
        (GRAD_INPUT, BFLOAT16, tile, 0, 0, 0, 4, last, 2, 20, 31, 1, *sizes)
        for tile in range(5)
        for last in (0, 1)
    ]
    run(drivers / "conv", cases)


@pytest.mark.parametrize("direction", [0, 1], ids=["forward", "scatter"])
def test_pool(drivers, direction):
    r = random.Random(direction)
    run(drivers / "pool", [pool_case(r, direction) for _ in range(600)])
    run(drivers / "pool", [known_window_case(r, direction) for _ in range(600)])


def test_unpool(drivers):
    r = random.Random(0)
    cases = []
    for _ in range(200):
        inputs, outputs = (r.randrange(1, 50), *UNIT[1:]), (r.randrange(1, 60), *UNIT[1:])
        planes = r.choice([1, 3]), r.choice([1, 2])
        cases.append(
            (2, r.randrange(13), 0, 0, 3, r.randrange(4), 0, *planes, *inputs, *outputs, *UNIT)
        )
    run(drivers / "pool", cases)
