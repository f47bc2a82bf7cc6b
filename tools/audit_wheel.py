"""Check that wheels (or libraries) serve every Python 3 and every torch from 2.11 on.

    python tools/audit_wheel.py dist/*.whl

A wheel must carry the tag py3-none-<platform>; its libraries must take nothing from torch but the C
functions of the stable ABI, and nothing from Python at all.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# C++ names of torch (their mangling holds the namespace), and everything of Python's C API.
FORBIDDEN = re.compile(r"^_Z\w*?(3c10|2at|5torch|6caffe2)|^_?Py")


def undefined_symbols(library: Path) -> list[str]:
    """What a library expects others to define, without versions."""
    command = ["nm", "--dynamic", "--undefined-only", "--format=posix", str(library)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [line.split()[0].split("@")[0] for line in listing.splitlines()]


def faults_of_library(library: Path) -> list[str]:
    symbols = undefined_symbols(library)
    faults = [f"{library.name} needs {name}" for name in symbols if FORBIDDEN.match(name)]
    if "aoti_torch_abi_version" not in symbols:
        faults.append(f"{library.name} is not built on the stable ABI")
    return faults


def faults_of_wheel(wheel: Path) -> list[str]:
    faults = []
    if not re.fullmatch(r"[^-]+-[^-]+-py3-none-(?!any)[^-]+\.whl", wheel.name):
        faults.append(f"{wheel.name} has not the tag py3-none-<platform>")
    with tempfile.TemporaryDirectory() as place:
        zipfile.ZipFile(wheel).extractall(place)
        libraries = sorted(Path(place).rglob("*.so"))
        if not libraries:
            faults.append(f"{wheel.name} holds no library")
        for library in libraries:
            faults += faults_of_library(library)
    return faults


def main(paths: list[str]) -> int:
    if not paths:
        raise SystemExit(__doc__)
    faults = []
    for path in map(Path, paths):
        faults += (faults_of_wheel if path.suffix == ".whl" else faults_of_library)(path)
    print("\n".join(faults) or f"{len(paths)} audited: stable ABI only, no Python")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
