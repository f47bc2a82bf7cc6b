"""One wheel for every torch: build it, install it beside each release named, and test it there.

    python tools/check_wheel.py --torch 2.11.0 newest    # builds the wheel; newest: pip's choice
    python tools/check_wheel.py --wheel dist/X.whl --torch 2.15.0
    python tools/check_wheel.py --torch 2.13.0 --keep ~/envs    # environments stay for next time

For each release: a new virtual environment, that torch from pip's index (with CUDA that is several
GB), the wheel with its test extra, and then, in a folder that holds nothing but the tests, the
commands and every test that depends on which torch this is. Exit status 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from audit_wheel import faults_of_wheel

ROOT = Path(__file__).resolve().parent.parent

# What meets torch beyond calling it, which a new release can break; of the kernels one file.
TESTS = [
    "test_autocast.py",
    "test_compile.py",
    "test_distributed.py",
    "test_doctor.py",
    "test_ecosystem.py",
    "test_errors.py",
    "test_export.py",
    "test_func.py",
    "test_memory_format.py",
    "test_modules.py",
    "test_opcheck.py",
    "test_pool_rows.py",
]

NEWEST = "newest"
WHERE = "import torch_naiveconv as tn, torch; print(tn.__file__, torch.__version__, sep='\\n')"
EXAMINE = (  # not the command: its exit status is 1 where a GPU has no CUDA library
    "import json; from torch_naiveconv.commands import doctor; print(json.dumps(doctor.examine()))"
)


class Failed(Exception):
    pass


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; neither the checkout nor the caller's packages are in its reach."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        shown = " ".join(str(part) for part in command)
        raise Failed(f"{shown}: exit status {done.returncode}\n{done.stdout[-6000:]}")
    return done.stdout


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def build(place: Path) -> Path:
    pip_wheel = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", place)
    run(sys.executable, *pip_wheel, ROOT, cwd=place)
    (wheel,) = place.glob("*.whl")
    return wheel


def new_environment(folder: Path, release: str, wheel: Path) -> Path:
    """The Python of an environment with that torch and the wheel."""
    python = folder / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", folder, cwd=Path("/"))
    torch = "torch" if release == NEWEST else f"torch=={release}"
    packages = (torch, f"{wheel}[test]")
    run(python, "-m", "pip", "install", "--quiet", *packages, cwd=folder)
    reinstall = ("--force-reinstall", "--no-deps", "--quiet", wheel)
    run(python, "-m", "pip", "install", *reinstall, cwd=folder)  # same version, other contents
    return python


def check(python: Path, release: str, tests: list[str], place: Path) -> None:
    """Raises Failed, or prints a line for each thing tried."""
    file, version = run(python, "-c", WHERE, cwd=place).split()
    if python.parent.parent.resolve() not in Path(file).resolve().parents:
        raise Failed(f"imported {file}, not the wheel")
    if release not in (version.split("+")[0], NEWEST):
        raise Failed(f"found torch {version}, not {release}")
    report = json.loads(run(python, "-c", EXAMINE, cwd=place))
    if report["small convolution"] != "right":
        raise Failed(f"doctor: {report}")
    print(f"  doctor   torch {version}, rows {', '.join(report['conv on cpu'])}", flush=True)
    for command in ("verify", "check"):
        begin = time.monotonic()
        line = last_line(run(python, "-m", "torch_naiveconv", command, cwd=place))
        print(f"  {command:8} {line} ({time.monotonic() - begin:.0f} s)", flush=True)
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    print(f"  tests    {last_line(run(*pytest, cwd=place / 'tests'))}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", nargs="+", required=True, metavar="RELEASE")
    parser.add_argument("--wheel", type=Path, help="instead of building one")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="environments are kept here")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="FILE", help="some of tests/")
    arguments = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        shutil.copytree(ROOT / "tests", place / "tests")
        wheel = arguments.wheel.resolve() if arguments.wheel else build(place)
        faults = faults_of_wheel(wheel)
        print("\n".join(faults) or f"{wheel.name}: stable ABI only", flush=True)
        failures += len(faults)
        for release in arguments.torch:
            folder = (arguments.keep.resolve() if arguments.keep else place) / f"torch-{release}"
            begin = time.monotonic()
            try:
                python = new_environment(folder, release, wheel)
                print(f"torch {release}: installed ({time.monotonic() - begin:.0f} s)", flush=True)
                check(python, release, arguments.tests, place)
            except Failed as failure:
                failures += 1
                print(f"torch {release}: FAILED\n{failure}", flush=True)
            finally:
                if not arguments.keep:
                    shutil.rmtree(folder, ignore_errors=True)
    print(f"{failures} failures" if failures else f"{len(arguments.torch)} releases pass")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
