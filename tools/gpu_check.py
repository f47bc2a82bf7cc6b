"""Everything to do on a machine with a GPU, in one go: build, test, compare, sanitize, time.

    python tools/gpu_check.py                      # all steps, into gpu_check.json and a table
    python tools/gpu_check.py --steps bits bench   # some; results of the others are kept

Needs this repository, torch >= 2.11 with CUDA and Python >= 3.10; no network. ``build`` compiles in
place with nvcc if the package cannot be imported with its CUDA library as it is. ``tests`` needs
pytest and hypothesis, ``sanitizer`` needs compute-sanitizer; a step whose tool is missing says so.
Exit status 1 if a step fails.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE / "tests")]

BATCH = 32
BITS_SECONDS = 60
# name, channels, spatial, filters, kernel, stride, padding, dilation, groups
CONV = [
    ("resnet50.conv1", 3, (224, 224), 64, 7, 2, 3, 1, 1),
    ("resnet50.l1.1x1a", 64, (56, 56), 64, 1, 1, 0, 1, 1),
    ("resnet50.l1.3x3", 64, (56, 56), 64, 3, 1, 1, 1, 1),
    ("resnet50.l1.1x1b", 64, (56, 56), 256, 1, 1, 0, 1, 1),
    ("resnet50.l2.3x3s2", 128, (56, 56), 128, 3, 2, 1, 1, 1),
    ("resnet50.l2.down", 256, (56, 56), 512, 1, 2, 0, 1, 1),
    ("resnet50.l3.3x3", 256, (14, 14), 256, 3, 1, 1, 1, 1),
    ("resnet50.l4.3x3", 512, (7, 7), 512, 3, 1, 1, 1, 1),
    ("vgg16.conv1_2", 64, (224, 224), 64, 3, 1, 1, 1, 1),
    ("vgg16.conv5_1", 512, (14, 14), 512, 3, 1, 1, 1, 1),
    ("mobilenetv2.dw.s1", 144, (56, 56), 144, 3, 1, 1, 1, 144),
    ("mobilenetv2.dw.s2", 192, (28, 28), 192, 3, 2, 1, 1, 192),
    ("mobilenetv2.expand", 24, (56, 56), 144, 1, 1, 0, 1, 1),
    ("efficientnet.dw5", 672, (14, 14), 672, 5, 1, 2, 1, 672),
    ("convnext.stem", 3, (224, 224), 96, 4, 4, 0, 1, 1),
    ("convnext.dw7", 96, (56, 56), 96, 7, 1, 3, 1, 96),
    ("resnext.g32", 128, (56, 56), 128, 3, 1, 1, 1, 32),
    ("deeplab.d12", 256, (33, 33), 256, 3, 1, 12, 12, 1),
    ("cs231n.3layer", 3, (32, 32), 32, 7, 1, 3, 1, 1),
    ("wav2vec2.f1", 512, (7999,), 512, 3, 2, 0, 1, 1),
    ("conformer.dw31", 256, (400,), 256, 31, 1, 15, 1, 256),
    ("r3d18.l1", 64, (8, 56, 56), 64, 3, 1, 1, 1, 1),
]
# name, channels, spatial, kernel, stride, padding
POOL = [
    ("resnet.3x3s2", 64, (112, 112), 3, 2, 1),
    ("vgg.2x2.224", 64, (224, 224), 2, 2, 0),
    ("vgg.2x2.28", 512, (28, 28), 2, 2, 0),
    ("inception.3x3s1", 192, (28, 28), 3, 1, 1),
    ("spp.13", 512, (20, 20), 13, 1, 6),
    ("audio.k4s4", 128, (16000,), 4, 4, 0),
    ("c3d.222", 128, (16, 56, 56), 2, 2, 0),
    ("i3d.333s2", 64, (16, 56, 56), 3, 2, 1),
]


def run(command: list[str], timeout: float = 550) -> tuple[int, str]:
    """Exit status and output; 124 if it ran past its time."""
    try:
        done = subprocess.run(
            command,
            cwd=HERE,
            env={**os.environ, "PYTHONPATH": str(HERE)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        return 124, output if isinstance(output, str) else output.decode(errors="replace")


def environment() -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_properties(0)
    smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.name,
        "multiprocessors": device.multi_processor_count,
        "capability": f"{device.major}.{device.minor}",
        "driver": run(smi)[1].strip() if shutil.which("nvidia-smi") else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "commit": run(["git", "rev-parse", "HEAD"])[1].strip() if shutil.which("git") else None,
    }


LOADED = "from torch_naiveconv import ops; assert ops.rows('conv', 'cuda')"


def build() -> dict[str, Any]:
    if run([sys.executable, "-c", LOADED])[0] == 0:
        return {"ok": True, "note": "loaded as it was"}
    status, output = run([sys.executable, "setup.py", "build_ext", "--inplace"], 1500)
    if status == 0:
        status, more = run([sys.executable, "-c", LOADED])
        output += more
    return {"ok": status == 0, "note": "built in place", "output": output[-4000:]}


def tests() -> dict[str, Any]:
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        return {"ok": None, "note": f"not run: no {', '.join(missing)}"}
    status, output = run([sys.executable, "-m", "pytest", "-q"])
    return {"ok": status == 0, "note": output.strip().splitlines()[-1], "output": output[-4000:]}


def bits() -> dict[str, Any]:
    import cuda_cases

    count, found, end = 0, [], time.monotonic() + BITS_SECONDS
    for seed in range(100, 1000):
        found += cuda_cases.disagreements(seed, 20)
        count += 20
        if time.monotonic() > end:
            break
    return {"ok": not found, "calls": count, "differ": len(found), "first": found[:20]}


def sanitizer() -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"ok": None, "note": "not run: no compute-sanitizer"}
    result: dict[str, Any] = {"ok": True}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, __file__]
        status, output = run([*command, "--short"])
        result[check] = {"status": status, "end": output[-1500:]}
        result["ok"] = result["ok"] and status == 0
    return result


def short() -> int:
    """A few calls of every kernel, small, for the sanitizer."""
    import cuda_cases

    found = cuda_cases.disagreements(7, 30)
    print("\n".join(found))
    return 1 if found else 0


# ---- benchmark ----------------------------------------------------------------------------------


def seconds(call: Any) -> float:
    """Median over repetitions of the device time of one call, by events."""
    import torch

    for _ in range(3):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure(count: int) -> float:
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count

    count = max(1, min(200, int(0.01 / max(measure(2), 1e-6))))
    return statistics.median(measure(count) for _ in range(5))


def conv_layer(layer: tuple[Any, ...]) -> list[dict[str, Any]]:
    import torch

    from torch_naiveconv import ops

    name, channels, spatial, filters, k, s, p, d, groups = layer
    dims = len(spatial)
    x = torch.randn(BATCH, channels, *spatial, device="cuda")
    w = torch.randn(filters, channels // groups, *(k,) * dims, device="cuda")
    lists = [s] * dims, [p] * dims, [d] * dims
    ours = [s] * dims + [p] * (2 * dims) + [d] * dims, groups
    g = torch.randn_like(torch.convolution(x, w, None, *lists, False, [0] * dims, groups))
    flops = 2 * g.numel() * (channels // groups) * k**dims

    def torch_calls(x: Any, w: Any, g: Any) -> dict[str, Any]:
        backward = torch.ops.aten.convolution_backward
        tail = [None, *lists, False, [0] * dims, groups]
        return {
            "forward": lambda: torch.convolution(x, w, None, *lists, False, [0] * dims, groups),
            "grad_input": lambda: backward(g, x, w, *tail, [True, False, False]),
            "grad_weight": lambda: backward(g, x, w, *tail, [False, True, False]),
        }

    our_calls = {
        "forward": lambda: ops.conv(x, w, None, *ours, "auto"),
        "grad_input": lambda: ops.conv_grad_input(g, w, None, list(spatial), *ours, "auto"),
        "grad_weight": lambda: ops.conv_grad_weight(g, x, None, [k] * dims, *ours, False, "auto"),
    }
    half = torch_calls(*(t.bfloat16() for t in (x, w, g)))
    full = torch_calls(x, w, g)
    rows = []
    for direction, call in our_calls.items():
        row = {"layer": name, "direction": direction, "gflop": flops / 1e9}
        torch.backends.cudnn.allow_tf32 = False
        row["ieee"], row["ours"] = seconds(full[direction]), seconds(call)
        # again, so that a drift of the clock shows and neither is always first
        row["ours"] = min(row["ours"], seconds(call))
        row["ieee"] = min(row["ieee"], seconds(full[direction]))
        torch.backends.cudnn.allow_tf32 = True
        row["tf32"] = seconds(full[direction])
        row["bf16"] = seconds(half[direction])
        row["tflops"] = flops / row["ours"] / 1e12
        row["ratio"] = row["ieee"] / row["ours"]
        rows.append(row)
    return rows


def pool_layer(layer: tuple[Any, ...]) -> list[dict[str, Any]]:
    import torch
    from torch.nn import functional as TF

    from torch_naiveconv import ops

    name, channels, spatial, k, s, p = layer
    dims = len(spatial)
    x = torch.randn(BATCH, channels, *spatial, device="cuda")
    leaf = x.clone().requires_grad_()
    pool = [TF.max_pool1d, TF.max_pool2d, TF.max_pool3d][dims - 1]
    out = pool(leaf, k, s, p)
    g = torch.randn_like(out)
    window = [k] * dims + [s] * dims + [p] * (2 * dims) + [1] * dims
    y, index = ops.max_pool(x, window, list(out.shape[2:]), "first", "offset", "auto")
    assert torch.equal(y, out)
    copied = torch.empty_like(x)
    copy = 2 * x.numel() * 4 / seconds(lambda: copied.copy_(x))
    traffic = {
        "forward": 4 * (x.numel() + y.numel()) + index.numel() * index.element_size(),
        "backward": 4 * (x.numel() + y.numel()) + index.numel() * index.element_size(),
    }
    calls = {
        "forward": (
            lambda: ops.max_pool(x, window, list(out.shape[2:]), "first", "offset", "auto"),
            lambda: pool(leaf, k, s, p),
        ),
        "backward": (
            lambda: ops.max_pool_scatter(g, index, list(spatial), window, "first", "auto"),
            lambda: torch.autograd.grad(out, leaf, g, retain_graph=True),
        ),
    }
    rows = []
    for direction, (ours, theirs) in calls.items():
        row = {"layer": name, "direction": direction, "ours": seconds(ours)}
        row["torch"] = seconds(theirs)
        row["ratio"] = row["torch"] / row["ours"]
        row["copy_fraction"] = traffic[direction] / row["ours"] / copy
        rows.append(row)
    return rows


def bench() -> dict[str, Any]:
    import torch

    torch.backends.cudnn.benchmark = True
    conv = [row for layer in CONV for row in conv_layer(layer)]
    pool = [row for layer in POOL for row in pool_layer(layer)]
    return {"ok": True, "batch": BATCH, "conv": conv, "pool": pool}


def table(result: dict[str, Any]) -> str:
    lines = []
    about = result.get("environment", {})
    lines.append(", ".join(f"{key} {value}" for key, value in about.items()))
    for step in STEPS:
        if step in result:
            outcome = {True: "passed", False: "FAILED", None: "not run"}[result[step]["ok"]]
            keys = ("note", "calls", "differ")
            rest = [f"{key}: {result[step][key]}" for key in keys if key in result[step]]
            lines.append(f"{step}: {outcome}" + (f" ({', '.join(rest)})" if rest else ""))
    measured = result.get("bench", {})
    if "conv" in measured:
        lines += [
            "",
            "| layer | direction | ours ms | IEEE | TF32 | bf16 | TFLOP/s | IEEE / ours |",
        ]
        lines.append("|---|---|---|---|---|---|---|---|")
        for row in measured["conv"]:
            times = " | ".join(f"{row[key] * 1e3:.3f}" for key in ("ours", "ieee", "tf32", "bf16"))
            lines.append(
                f"| {row['layer']} | {row['direction']} | {times} | {row['tflops']:.1f} "
                f"| {row['ratio']:.2f} |"
            )
        for direction in ("forward", "grad_input", "grad_weight"):
            ratios = [row["ratio"] for row in measured["conv"] if row["direction"] == direction]
            mean = statistics.geometric_mean(ratios)
            lines.append(f"\n{direction}: geometric mean {mean:.2f}, worst {min(ratios):.2f}")
        lines += ["", "| pool | direction | ours ms | torch ms | torch / ours | of copy speed |"]
        lines.append("|---|---|---|---|---|---|")
        for row in measured["pool"]:
            lines.append(
                f"| {row['layer']} | {row['direction']} | {row['ours'] * 1e3:.3f} "
                f"| {row['torch'] * 1e3:.3f} | {row['ratio']:.2f} | {row['copy_fraction']:.2f} |"
            )
    return "\n".join(lines)


STEPS = {"build": build, "bits": bits, "sanitizer": sanitizer, "bench": bench, "tests": tests}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--out", type=Path, default=HERE / "gpu_check.json")
    parser.add_argument("--short", action="store_true", help="only a few small calls")
    arguments = parser.parse_args()
    if arguments.short:
        return short()
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    import torch

    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False")
        return 1
    result["environment"] = environment()
    for step in arguments.steps:
        print(f"== {step}", flush=True)
        try:
            result[step] = STEPS[step]()
        except Exception as error:  # one broken step must not lose the others
            result[step] = {"ok": False, "note": f"{type(error).__name__}: {error}"}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return 0 if all(result[step]["ok"] is not False for step in arguments.steps) else 1


if __name__ == "__main__":
    sys.exit(main())
