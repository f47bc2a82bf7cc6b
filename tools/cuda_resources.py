"""Registers, shared memory, stack and spills of every kernel, from what ``ptxas -v`` prints.

Reads the log of a build from standard input (``make cuda-resources``); exit status 1 if a kernel
spills or the log names none.
"""

import re
import shutil
import subprocess
import sys

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def plain(names: list[str]) -> list[str]:
    """Names as in the source, without namespaces and parameters."""
    if names and shutil.which("c++filt"):
        text = subprocess.run(
            ["c++filt", *names], capture_output=True, text=True, check=True
        ).stdout
        names = text.splitlines()
    short = []
    for name in names:
        name = re.sub(r"torch_naiveconv::|\(anonymous namespace\)::|^void ", "", name)
        short.append(name.rsplit("(", 1)[0] if name.endswith(")") else name)
    return short


def main() -> int:
    rows: list[list] = []
    for line in sys.stdin:
        if match := ENTRY.search(line):
            rows.append([match[1], match[2], 0, 0, 0, 0])
        elif rows and (match := FRAME.search(line)):
            rows[-1][4], rows[-1][5] = int(match[1]), int(match[2]) + int(match[3])
        elif rows and (match := USED.search(line)):
            rows[-1][2], rows[-1][3] = int(match[1]), int(match[2] or 0)
        elif "error" in line:
            print(line, end="")
    for row, name in zip(rows, plain([row[0] for row in rows]), strict=True):
        row[0] = name
    print(f"{'arch':8}{'registers':>10}{'shared':>8}{'stack':>7}{'spills':>7}  kernel")
    for name, arch, registers, shared, stack, spills in sorted(rows):
        print(f"{arch:8}{registers:10}{shared:8}{stack:7}{spills:7}  {name}")
    spilling = [row[0] for row in rows if row[5]]
    print(f"{len(rows)} kernels, {len(spilling)} spill")
    return 1 if spilling or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
