"""Builds the two libraries: CPU always, CUDA where nvcc and a GPU are, or with FORCE_CUDA=1.

The only place where compiler flags are written. Neither library uses Python's C API and both are on
LibTorch's stable ABI, so that one wheel serves every Python 3 and every torch from 2.11 on.
"""

import os
import platform
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils.cpp_extension import BuildExtension, CppExtension

HERE = Path(__file__).parent

STABLE_ABI = [
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # use nothing newer than torch 2.11
    "-fvisibility=hidden",  # the CPU and the CUDA library must not see each other's symbols
]
ROUNDING = [
    "-ffp-contract=off",  # a fused step is written as one; the compiler may not make others
    "-fno-fast-math",  # nor reassociate, whatever CFLAGS say
]
SPEED = [
    "-O3",
    "-g0",  # ten times smaller libraries
    "-fno-math-errno",  # fma as an instruction even where errno could be set
    "-fno-trapping-math",  # compares may become blends; nobody reads the exception flags
]
if platform.machine() in ("x86_64", "AMD64"):
    SPEED.append("-mfma")  # the contract is made of FMAs; every x86 since 2013 has them in hardware


def relative(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(HERE)) for path in HERE.glob(pattern))


def cpu_library() -> CppExtension:
    return CppExtension(
        "torch_naiveconv._cpu",
        ["csrc/ops.cpp", *relative("csrc/cpu/*.cpp")],
        extra_compile_args=[*STABLE_ABI, *ROUNDING, *SPEED, "-Wall", "-Wextra"],
        depends=relative("csrc/**/*.h"),
        py_limited_api=True,
    )


class Build(BuildExtension):
    """BuildExtension with plain library names, a bounded number of jobs, and incremental builds."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, no_python_abi_suffix=True)

    def initialize_options(self):
        super().initialize_options()
        self.build_temp = str(HERE / "build" / "objects")  # fixed: an editable build finds it again

    def build_extensions(self):
        if "MAX_JOBS" not in os.environ:  # a kernel file takes up to 2 GB to compile
            gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2**30
            os.environ["MAX_JOBS"] = str(max(1, min(os.cpu_count() or 1, int(gigabytes / 2))))
        super().build_extensions()


class Wheel(bdist_wheel):
    """py3-none-<platform>: native code, but none that knows Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[cpu_library()], cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
