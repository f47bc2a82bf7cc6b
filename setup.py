"""Builds the two libraries: CPU always, CUDA where nvcc and a GPU are, or with FORCE_CUDA=1.

The only place where compiler flags are written. Neither library uses Python's C API and both are on
LibTorch's stable ABI, so that one wheel serves every Python 3 and every torch from 2.11 on.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils import cpp_extension
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

WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",  # GCC 12 finds some in its own AVX-512 headers
    "-Wno-maybe-uninitialized",
    "-Wno-unused-parameter",  # and torch's stable headers have a few of these
]


def kernel_flags(machine: str) -> list[str]:
    """What the kernels need on a processor; tools/other_processors.py builds with them too."""
    x86 = machine in ("x86_64", "AMD64")
    # the contract is made of FMAs; every x86 since 2013 has them in hardware
    return [*ROUNDING, *SPEED, *(["-mfma"] if x86 else [])]


def relative(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(HERE)) for path in HERE.glob(pattern))


def cpu_library() -> CppExtension:
    return CppExtension(
        "torch_naiveconv._cpu",
        ["csrc/ops.cpp", *relative("csrc/cpu/*.cpp")],
        extra_compile_args=[*STABLE_ABI, *kernel_flags(platform.machine()), *WARNINGS],
        depends=relative("csrc/**/*.h"),
        py_limited_api=True,
    )


# What nvcc 13.0 knows, oldest to newest, and PTX for those that come later.
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def cuda_home() -> str | None:
    """The CUDA toolkit, also where torch itself was built without CUDA and so looks for none."""
    nvcc = shutil.which("nvcc")
    homes = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        str(Path(nvcc).resolve().parent.parent) if nvcc else None,
        "/usr/local/cuda",
    ]
    needed = ("bin/nvcc", "include/cuda_runtime.h")  # a wrapper script on PATH is no toolkit
    return next((h for h in homes if h and all(Path(h, n).exists() for n in needed)), None)


def cuda_library() -> Extension | None:
    """The CUDA library, or None where it is not wanted: no toolkit, or no GPU and no FORCE_CUDA."""
    forced = os.environ.get("FORCE_CUDA", "0") == "1"
    if not forced and not torch.cuda.is_available():
        return None
    home = cuda_home()
    if home is None:
        if forced:
            raise SystemExit("FORCE_CUDA=1, but there is no nvcc: set CUDA_HOME to the toolkit")
        return None
    cpp_extension.CUDA_HOME = home
    # Nothing of torch's CUDA is linked or included, so the toolkit may be of another version.
    cpp_extension._check_cuda_version = lambda *_: None
    every_architecture = "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available()
    if every_architecture:
        os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURES
    library = Path(home, "lib64") if Path(home, "lib64").exists() else Path(home, "lib")
    flags = kernel_flags(platform.machine())
    host = [*flags, "-fvisibility=hidden"]
    return CppExtension(
        "torch_naiveconv._cuda",
        ["csrc/cuda/ops.cpp", *relative("csrc/cuda/*.cu")],
        include_dirs=[str(Path(home, "include"))],
        library_dirs=[str(library)],
        # cudart linked statically: the library needs the driver, not some version of the toolkit.
        libraries=["cudart_static", "dl", "rt", "pthread"],
        extra_compile_args={
            "cxx": [*STABLE_ABI, *flags],
            "nvcc": [
                "-O3",
                "-fmad=false",  # as -ffp-contract=off
                f"-Xcompiler={','.join(host)}",
                # an eighth of the size, for a wheel; the drivers that nvcc 13 asks for unpack it
                *(["--compress-mode=size"] if every_architecture else []),
            ],
        },
        depends=relative("csrc/**/*.h"),
        py_limited_api=True,
    )


class Build(BuildExtension):
    """BuildExtension with plain library names, a bounded number of jobs, and incremental builds."""

    def __init__(self, *args, **kwargs):
        # torch looks for ninja on PATH, which an environment used without activation is not on
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
        super().__init__(*args, **kwargs, no_python_abi_suffix=True)

    def initialize_options(self):
        super().initialize_options()
        self.build_temp = str(HERE / "build" / "objects")  # fixed: an editable build finds it again

    def build_extensions(self):
        if torch.version.cuda is None:  # then torch does not tell ninja which headers nvcc read
            for made in HERE.glob("build/objects/csrc/cuda/*.o"):
                headers = HERE.glob("csrc/**/*.h")
                if made.stat().st_mtime < max(header.stat().st_mtime for header in headers):
                    made.unlink()
        if not self.use_ninja:  # torch would go on with one core, behind pip without a word
            raise SystemExit("there is no ninja, which builds on all cores: pip install ninja")
        if "MAX_JOBS" not in os.environ:  # a kernel file takes up to 2 GB to compile
            gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2**30
            os.environ["MAX_JOBS"] = str(max(1, min(os.cpu_count() or 1, int(gigabytes / 2))))
        super().build_extensions()


class Wheel(bdist_wheel):
    """py3-none-<platform>: native code, but none that knows Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    libraries = [library for library in (cpu_library(), cuda_library()) if library is not None]
    setup(ext_modules=libraries, cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
