"""The conformance cases under other compilers and on other processors, without torch.

    python tools/other_processors.py            # all setups below
    python tools/other_processors.py --quick    # those that take seconds

Builds ``csrc/driver/conformance.cpp`` and the kernels with the flags of ``setup.py`` and its own
after them, runs it (under user-mode emulation where the processor is another one) and compares
every row of the tables with ``conformance.json``. A setup whose tools are not installed is reported
and left out. On Debian: apt-get install clang g++-aarch64-linux-gnu qemu-user.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from torch_naiveconv import conformance

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Setup:
    name: str
    compiler: str
    machine: str = "x86_64"
    flags: tuple[str, ...] = ()
    runner: tuple[str, ...] = ()
    quick: bool = False


ARM = {"compiler": "aarch64-linux-gnu-g++", "machine": "aarch64", "runner": ("qemu-aarch64",)}
SETUPS = (
    Setup("g++ -O3", "g++"),
    Setup("g++ -O2", "g++", flags=("-O2",)),
    Setup("g++ -O0", "g++", flags=("-O0",), quick=True),
    Setup("clang++ -O3", "clang++"),
    Setup("clang++ -O1", "clang++", flags=("-O1",)),
    Setup("g++ -O2 for AVX2 throughout", "g++", flags=("-O2", "-march=haswell")),
    # No x86 under emulation: with QEMU 7.2 some 16-bit cases differ that pass on the processor
    # itself, probably for the way in which the emulator flushes subnormals.
    Setup("AArch64 g++ -O3", **ARM),
    Setup("AArch64 g++ -O0", **ARM, flags=("-O0",), quick=True),
)


def kernel_flags(machine: str) -> list[str]:
    """The flags of setup.py, the only place where they are written."""
    spec = importlib.util.spec_from_file_location("naiveconv_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.kernel_flags(machine))


def missing(setup: Setup) -> str | None:
    """The tool that a setup lacks here, if any."""
    if not setup.runner and setup.machine != platform.machine():
        return f"a processor of the kind {setup.machine}"
    tools = (setup.compiler, *setup.runner[:1])
    return next((tool for tool in tools if shutil.which(tool) is None), None)


def build(setup: Setup, folder: Path, jobs: int) -> Path:
    """Compiles the driver and every kernel file; a static program, since emulators like them."""
    flags = [*kernel_flags(setup.machine), "-std=c++17", *setup.flags]
    sources = [ROOT / "csrc/driver/conformance.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        command = [setup.compiler, *flags, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, text=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, sources, objects))
    program = folder / "conformance"
    link = [setup.compiler, "-static", "-pthread", *map(str, objects), "-o", str(program)]
    subprocess.run(link, check=True, capture_output=True, text=True)
    return program


def digests(program: Path, runner: tuple[str, ...] = ()) -> dict[tuple[str, str], str]:
    """What a driver prints: (case, row) -> SHA-256."""
    lines = "".join(conformance.line(case) + "\n" for case, _ in conformance.load())
    done = subprocess.run(
        [*runner, str(program)], input=lines, check=True, capture_output=True, text=True
    )
    words = (line.split() for line in done.stdout.splitlines())
    return {(name, row): digest for name, row, digest in words}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only setups that take seconds")
    parser.add_argument("--only", default="", metavar="TEXT", help="setups whose name holds TEXT")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time (2 GB each)")
    arguments = parser.parse_args()
    expected = {case.name: digest for case, digest in conformance.load()}
    chosen = [s for s in SETUPS if (s.quick or not arguments.quick) and arguments.only in s.name]
    failed = not chosen
    for setup in tqdm(chosen, desc="setups", file=sys.stderr):
        lacking = missing(setup)
        if lacking:
            tqdm.write(f"{setup.name:40} SKIPPED: there is no {lacking} here")
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = digests(build(setup, Path(folder), arguments.jobs), setup.runner)
            except subprocess.CalledProcessError as error:
                tqdm.write(f"{setup.name:40} FAILED: {' '.join(error.cmd)}\n{error.stderr}")
                failed = True
                continue
        if {name for name, _ in found} != set(expected):
            tqdm.write(f"{setup.name:40} FAILED: not every case was computed")
            failed = True
        for row in dict.fromkeys(row for _, row in found):
            mine = {name: digest for (name, of), digest in found.items() if of == row}
            wrong = [name for name, digest in mine.items() if digest != expected[name]]
            tqdm.write(f"{setup.name:40} {row:10} {len(mine) - len(wrong)} of {len(mine)}")
            for name in wrong:
                tqdm.write(f"    DIFFERS {name}")
            failed = failed or bool(wrong)
    print(f"{conformance.SPEC_ID} {'NOT verified' if failed else 'verified'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
