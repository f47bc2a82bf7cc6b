"""What the documents take from elsewhere: lines of the specification, and pictures.

    python docs/make.py           write the specification's lines into docs/*.md
    python docs/make.py --check   exit with 1 if they have drifted (the tests do this)
    python docs/make.py --images  also draw docs/img again (the extra `plots`)

A place in a document looks like this, and what is between the marks is written here:

    <!-- from csrc/spec/conv.h: conv_output_at -->
    <!-- end -->
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"(<!-- from (\S+): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

SMALL = ["--input", "5x5", "--kernel", "3", "--stride", "2"]
PEAK = ",".join(str(100 if i == 12 else i) for i in range(25))
IMAGES = {
    "opening.gif": ["conv2d", *SMALL, "--padding", "1"],
    "conv_forward.png": ["conv2d", *SMALL, "--padding", "1", "--view", "output"],
    "conv_grad_input.png": ["conv2d", *SMALL, "--padding", "1", "--view", "grad_input"],
    "conv_grad_weight.png": ["conv2d", *SMALL, "--padding", "1", "--view", "grad_weight"],
    "max_pool_forward.png": [
        *["max_pool2d", *SMALL, "--input-values", "integers", "--view", "output", "--seed", "3"]
    ],
    "max_pool_overlap.png": [
        *["max_pool2d", *SMALL, "--input-values", PEAK, "--grad-values", "1,2,3,4"],
        *["--view", "grad_input_first"],
    ],
}


def definition(path: str, name: str) -> str:
    """The C++ function or class of that name with the comment above it."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    starts = [
        i for i, line in enumerate(lines)
        if re.search(rf"^(TNC_HD|class|struct)\b.*\b{name}\b", line)
    ]  # fmt: skip
    if not starts:
        raise SystemExit(f"{path} has no definition of {name}")
    start = starts[0]
    while start > 0 and re.match(r"//|template", lines[start - 1]):
        start -= 1
    end = next(i for i in range(starts[0], len(lines)) if lines[i] in ("}", "};"))
    return "\n".join(lines[start : end + 1])


def filled(text: str) -> str:
    return PLACE.sub(lambda m: f"{m[1]}```cpp\n{definition(m[2], m[3])}\n```\n{m[4]}", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--images", action="store_true")
    arguments = parser.parse_args(argv)
    drifted = []
    for path in sorted(ROOT.glob("docs/*.md")):
        text = path.read_text(encoding="utf-8")
        if filled(text) != text:
            drifted.append(path.name)
            if not arguments.check:
                path.write_text(filled(text), encoding="utf-8")
    if arguments.check and drifted:
        print(f"not the specification's lines any more: {', '.join(drifted)}; run docs/make.py")
        return 1
    if arguments.images:
        from torch_naiveconv.__main__ import main as command

        for name, words in IMAGES.items():
            command(["explain", *words, "-o", str(ROOT / "docs/img" / name)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
