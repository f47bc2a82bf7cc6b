"""Random calls to every row of the CPU tables, compared with the naive loop bit by bit.

    python tools/draw_cases.py --minutes 10                    # a convolution, a pooling, and so on
    python tools/draw_cases.py --op pool --seed 7 --cases 1    # repeats one that failed

A case is drawn from one number (tests/drawn_cases.py): the first from --seed, the next from the
number after it. At the first difference, or when a call ends its process, this prints the line that
repeats the case and ends with status 1.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE / "tests")]

import drawn_cases  # noqa: E402


def draw(ops: list[str], seed: int, number: int) -> tuple[str, int, Any]:
    """Operator, seed and case of the `number`-th draw."""
    op, seed = ops[number % len(ops)], seed + number // len(ops)
    return op, seed, drawn_cases.DRAW[op](seed)


def work(ops: list[str], seed: int, cases: float, until: float, begun: Any) -> None:
    parent = multiprocessing.parent_process()
    while begun.value < cases and time.monotonic() < until and parent and parent.is_alive():
        op, _, case = draw(ops, seed, begun.value)
        begun.value += 1
        try:
            case.check(drawn_cases.rows_of(op))
        except AssertionError as difference:
            sys.exit(f"\n{difference}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=list(drawn_cases.DRAW), help="default: all in turns")
    parser.add_argument("--seed", type=int, help="of the first case; default: any")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--cases", type=int, help="how many at most")
    arguments = parser.parse_args()
    ops = [arguments.op] if arguments.op else list(drawn_cases.DRAW)
    seed = random.randrange(10**9) if arguments.seed is None else arguments.seed
    cases = math.inf if arguments.cases is None else arguments.cases
    start, seconds = time.monotonic(), 60 * arguments.minutes

    context = multiprocessing.get_context("spawn")
    begun = context.Value("q", 0)
    worker = context.Process(target=work, args=(ops, seed, cases, start + seconds, begun))
    worker.start()
    timed = math.isfinite(seconds)
    with tqdm(
        total=round(seconds) if timed else arguments.cases, unit=" s" if timed else ""
    ) as bar:
        while worker.is_alive():
            worker.join(0.5)
            bar.n = min(round(time.monotonic() - start), bar.total) if timed else begun.value
            bar.set_postfix_str(f"{begun.value} cases")
    print(f"{begun.value} cases from seed {seed}")
    if worker.exitcode == 0:
        return 0
    op, seed, case = draw(ops, seed, begun.value - 1)
    print(f"the last one ended with status {worker.exitcode}: {case}")
    print(f"to repeat it: python tools/draw_cases.py --op {op} --seed {seed} --cases 1")
    return 1


if __name__ == "__main__":
    sys.exit(main())
