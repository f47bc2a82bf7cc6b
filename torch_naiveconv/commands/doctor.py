"""Show versions, libraries, implementations and GPU, and say what to do about whatever is wrong.

The exit status is 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch

from .. import SPEC_ID, __version__, functional, ops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    report = examine()
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        for name, value in report.items():
            if name != "advice":
                shown = ", ".join(value) if isinstance(value, list) else value
                print(f"{name:20} {'-' if shown in ('', None) else shown}")
        for line in report["advice"] or ["nothing: all is well"]:
            print(f"{'advice':20} {line}")
    return 1 if report["advice"] else 0


def examine() -> dict[str, Any]:
    """Everything that the command reports; "advice" has one line for each thing that is wrong."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    report = {
        "torch_naiveconv": __version__,
        "contract": SPEC_ID,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "libraries loaded": [path.name for path in ops.libraries_loaded()],
        "conv on cpu": list(ops.rows("conv", "cpu")),
        "max_pool on cpu": list(ops.rows("pool", "cpu")),
        "gpu": f"{gpu.name} (sm_{gpu.major}{gpu.minor})" if gpu else None,
        "conv on cuda": list(ops.rows("conv", "cuda")),
        "max_pool on cuda": list(ops.rows("pool", "cuda")),
        "small convolution": _small_convolution("cpu"),
        "on the gpu": _small_convolution("cuda") if gpu and ops.rows("conv", "cuda") else None,
    }
    return {**report, "advice": advice(report)}


def _small_convolution(device: str) -> str:
    """ "right", or what went wrong: the one thing here that runs a kernel."""
    x = torch.arange(9.0, device=device).view(1, 1, 3, 3)
    try:
        y = functional.conv2d(x, torch.ones(1, 1, 3, 3, device=device))
    except Exception as error:  # any failure at all belongs into the report
        return f"{type(error).__name__}: {error}".split("\n")[0]
    return "right" if y.item() == 36.0 else f"wrong: {y.item()} for 36"


def advice(report: dict[str, Any]) -> list[str]:
    """One line for each thing in a report that is wrong."""
    lines = []
    if ops.too_old(report["torch"]):
        lines.append(f"torch {report['torch']} is too old: pip install 'torch>=2.11'")
    if report["conv on cpu"] == ["naive"]:
        lines.append(
            "only the naive loop can run here: rebuild with `pip install --no-build-isolation .`"
        )
    elif report["platform"].endswith("x86_64") and not {"avx2", "avx512"} & set(
        report["conv on cpu"]
    ):
        lines.append(
            "no AVX2 on this processor, so the portable kernels run: choose a host with AVX2"
        )
    if report["gpu"] and "_cuda.so" not in report["libraries loaded"]:
        lines.append(
            "a GPU is visible, but the CUDA library is not built: install the CUDA toolkit and "
            "rebuild with `FORCE_CUDA=1 pip install --no-build-isolation .`"
        )
    if "_cuda.so" in report["libraries loaded"] and not report["gpu"]:
        lines.append("the CUDA library is here, but no GPU is visible: see nvidia-smi")
    for name in ("small convolution", "on the gpu"):
        if report[name] not in ("right", None):
            lines.append(
                f"{name} fails ({report[name]}): rebuild, and report it if that is no help"
            )
    return lines
