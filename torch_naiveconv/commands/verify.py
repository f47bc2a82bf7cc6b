"""Verify the contract: every implementation and device present against the conformance cases.

Each case is computed by each implementation in every memory format and on one thread and several;
all results must have the SHA-256 that conformance.json holds. An implementation that does not take
a case leaves it to the next one, so the counts say what a caller gets who asks for it by name.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import __version__, conformance, ops
from ..conformance import Case


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report as JSON")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds TEXT")
    parser.add_argument(
        "--write", action="store_true", help="write conformance.json with the naive implementation"
    )


def implementations() -> list[tuple[str, str, str]]:
    """(op, device, implementation) for all that can run here."""
    found: list[tuple[str, str, str]] = []
    for device in ("cpu", "cuda"):
        for op, kind in (("conv", "conv"), ("max_pool", "pool")):
            found += [(op, device, name) for name in ops.rows(kind, device)]
        if ops.rows("conv", device):
            found.append(("max_unpool", device, "naive"))
    return found


def formats(case: Case) -> tuple[bool, ...]:
    return (False, True) if len(case.size) > 1 and case.op != "max_unpool" else (False,)


def agrees(case: Case, expected: str, impl: str, device: str) -> bool:
    """Does the implementation give the case's bits, in each memory format and with 1 thread too?"""
    threads = torch.get_num_threads()
    try:
        for count in {1, threads} if device == "cpu" else {threads}:
            torch.set_num_threads(count)
            for channels_last in formats(case):
                if conformance.digest(case, impl, device, channels_last) != expected:
                    return False
    finally:
        torch.set_num_threads(threads)
    return True


def machine() -> dict[str, str]:
    """What the report says of the place it was made."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return {
        "spec": conformance.SPEC_ID,
        "torch_naiveconv": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def run(arguments: argparse.Namespace) -> int:
    if arguments.write:
        conformance.write()
    chosen = [(case, hash_) for case, hash_ in conformance.load() if arguments.only in case.name]
    work = [
        (case, hash_, device, impl)
        for op, device, impl in implementations()
        for case, hash_ in chosen
        if case.op == op
    ]
    facts = machine()
    for name, fact in facts.items():
        print(f"{name:16}{fact}")
    counts: dict[tuple[str, str, str], list[int]] = {}
    failures: list[str] = []
    for case, expected, device, impl in tqdm(work, desc="verify", unit="case", file=sys.stderr):
        right = agrees(case, expected, impl, device)
        count = counts.setdefault((f"{case.op} {case.direction}", device, impl), [0, 0])
        count[0] += right
        count[1] += 1
        if not right:
            failures.append(f"{device} {impl} {case.name}")
    print(f"\n{'':22}{'device':8}{'implementation':16}{'same bits':>14}")
    for (what, device, impl), (same, all_) in counts.items():
        print(f"{what:22}{device:8}{impl:16}{f'{same} of {all_}':>14}")
    for failure in failures:
        print("DIFFERS", failure)
    if not work:
        print(f"no case holds {arguments.only!r} in its name")
    passed = bool(work) and not failures
    total = sum(all_ for _, all_ in counts.values())
    verdict = "verified" if passed else "NOT verified"
    print(f"{conformance.SPEC_ID} {verdict}: {total - len(failures)} of {total}")
    if arguments.json:
        report: dict[str, Any] = {
            **facts,
            "passed": passed,
            "counts": [
                {"what": what, "device": device, "implementation": impl, "same": same, "of": all_}
                for (what, device, impl), (same, all_) in counts.items()
            ],
            "differs": failures,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if passed else 1
