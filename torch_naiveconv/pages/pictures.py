"""The pages' pictures as PNG and GIF, for documents (matplotlib and Pillow, the extra `plots`).

A picture shows one element of one view: its operands with the terms numbered, the result, and the
running sum beside them. Start reading at panel().
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from .trace import Scene

INCH = 0.42  # of a cell
LINES = 13  # of the running sum at most
INK, SOFT, LINE, LIT, CHOSEN = "#1c2430", "#5b6675", "#c9ced6", "#0b57d0", "#6a1b9a"
PLUS, MINUS = (240, 163, 94), (111, 168, 220)


def minus(text: str) -> str:
    return text.replace("-", "−")


def short(text: str) -> str:
    if len(text) <= 5 or text in ("nan", "inf", "-inf"):
        return minus(text)
    value = float(text)
    size = abs(value)
    if size >= 1e4 or size < 0.005:
        return minus(f"{value:.0e}")
    return minus(f"{value:.{2 if size < 10 else 1 if size < 100 else 0}f}")


def tint(text: str, largest: float) -> tuple[float, ...]:
    value = float(text or 0)
    if not abs(value) <= largest or largest == 0:
        return (1, 1, 1)
    colour = PLUS if value > 0 else MINUS
    strength = 0.6 * abs(value) / largest
    return tuple(1 - strength * (1 - c / 255) for c in colour)


def touched(view: Scene, step: list[Any]) -> list[tuple[str, int]]:
    """The operand positions of a step."""
    a, *b = view["operands"]
    if step[0] == "term":
        return [(a, step[1]), *((name, step[2]) for name in b)]
    return [(a, step[1])] if step[0] in ("look", "add") else []


def line(scene: Scene, view: Scene, step: list[Any]) -> tuple[str, str]:
    """A step in words, and the running value."""
    a, *b = view["operands"]
    match step:
        case ["term", i, j, _, chain]:
            factor = scene["tensors"][b[0]]["values"][j] if b else "1"
            return f"{minus(scene['tensors'][a]['values'][i])} × {minus(factor)}", minus(chain)
        case ["look", i, leader, best]:
            star = " ★" if i == leader else ""
            return minus(scene["tensors"][a]["values"][i]) + star, minus(best)
        case ["add", _, gives, sum_]:
            return f"+ {minus(gives)}", minus(sum_)
        case ["cut", total]:
            return "cut", minus(total)
        case ["bias", bias, total]:
            return f"bias + {minus(bias)}", minus(total)
    return "adds nothing", ""


def numbered(scene: Scene, view: Scene, steps: list[Any]) -> list[tuple[str, str, str]]:
    """The lines beside the grids: number, term, running value; long lists lose their middle."""
    rows = []
    number = 0
    for step in steps:
        counted = step[0] not in ("cut", "bias")
        number += counted
        if step[0] not in ("skip", "pass"):
            rows.append((str(number) if counted else "", *line(scene, view, step)))
    if len(rows) > LINES:
        keep = LINES // 2
        rows = [*rows[:keep], ("", "⋯", ""), *rows[-keep:]]
    return rows or [("", "no term", "0")]


def layout(tensor: dict[str, Any]) -> list[tuple[float, float]]:
    """The lower left corners of the planes: samples go down, channels and depth across."""
    samples, channels, depth, height, width = tensor["shape"]
    return [
        (plane * (width + 0.5), -n * (height + 0.5))
        for n in range(samples)
        for plane in range(channels * depth)
    ]


def extent(tensor: dict[str, Any]) -> tuple[float, float]:
    samples, channels, depth, height, width = tensor["shape"]
    drawn = channels * depth * (width + 0.5) - 0.5
    words = 0.27 * len(tensor["label"])
    return max(drawn, words), samples * (height + 0.5) - 0.5


def grid(
    ax: Any, tensor: dict[str, Any], x: float, marks: dict[int, tuple[str, str]], label: str
) -> None:
    """One tensor with its upper left corner at (x, 0); marks: position -> (colour, number)."""
    *_, depth, height, width = tensor["shape"]
    largest = max((abs(float(v)) for v in tensor["values"] if v not in ("", "nan")), default=0)
    ax.text(x, 0.35, label, fontsize=11, fontweight="bold", color=INK)
    for plane, (left, top) in enumerate(layout(tensor)):
        for h in range(height):
            for w in range(width):
                index = (plane * height + h) * width + w
                position = (plane % depth, h, w)
                inside = all(
                    0 <= p - o < n
                    for p, o, n in zip(position, tensor["origin"], tensor["inside"], strict=True)
                )
                value = tensor["values"][index]
                corner = (x + left + w, top - h - 1)
                ax.add_patch(
                    Rectangle(
                        corner, 1, 1, linewidth=0.8, edgecolor=LINE,
                        facecolor=tint(value, largest) if inside else "white",
                        hatch=None if inside else "////", linestyle="-" if inside else ":",
                    )
                )  # fmt: skip
                colour, badge = marks.get(index, ("", ""))
                ax.text(
                    corner[0] + 0.5, corner[1] + 0.42, short(value), ha="center", va="center",
                    fontsize=8, color=INK if inside else SOFT,
                )  # fmt: skip
                if colour:
                    edge = Rectangle(
                        (corner[0] + 0.06, corner[1] + 0.06), 0.88, 0.88, fill=False, zorder=3,
                        linewidth=2.6, edgecolor=colour, linestyle="--" if colour == CHOSEN else "-"
                    )  # fmt: skip
                    ax.add_patch(edge)
                    ax.text(corner[0] + 0.13, corner[1] + 0.72, badge, fontsize=5.5, color=colour)


def measure(scene: Scene, view: Scene) -> tuple[float, float]:
    """Width and height of a panel in cells."""
    sizes = [extent(scene["tensors"][name]) for name in [*view["operands"], view["result"]]]
    return sum(width + 1 for width, _ in sizes) + 7.2, max(height for _, height in sizes)


def panel(ax: Any, scene: Scene, view: Scene, element: int) -> None:
    """One element of one view into matplotlib axes whose unit is a cell."""
    tensors = scene["tensors"]
    steps = view["steps"][element]
    marks: dict[str, dict[int, tuple[str, str]]] = {name: {} for name in view["operands"]}
    number = 0
    for step in steps:
        number += step[0] not in ("cut", "bias")
        for name, index in touched(view, step):
            marks[name].setdefault(index, (LIT, str(number)))
    if view["kind"] == "scan":
        best = [step[2] for step in steps if step[0] == "look"][-1:]
        for index in best:
            marks["input"][index] = (CHOSEN, "★")
    if view["kind"] == "route":
        for step in steps:
            for index in view["winners"][step[1]] if step[0] == "add" else []:
                marks["input"][index] = (CHOSEN, "★")
    marks.setdefault(view["result"], {})[element] = (CHOSEN, "")
    x = 0.0
    for name in [*view["operands"], view["result"]]:
        grid(ax, tensors[name], x, marks[name], tensors[name]["label"])
        x += extent(tensors[name])[0] + 1
    kind = "best" if view["kind"] == "scan" else "sum"
    ax.text(x + 7, 0.35, f"running {kind}", ha="right", fontsize=9, color=SOFT)
    y = -0.3
    for no, term, value in numbered(scene, view, steps):
        ax.text(x + 0.5, y, no, ha="right", va="center", fontsize=8.5, color=LIT)
        ax.text(x + 0.8, y, term, va="center", fontsize=8.5, color=INK)
        ax.text(x + 7, y, value, ha="right", va="center", fontsize=8.5, color=INK)
        y -= 0.52
    result = minus(tensors[view["result"]]["values"][element])
    ax.plot([x, x + 7], [y + 0.24] * 2, color=CHOSEN, linewidth=1.5)
    ax.text(x + 7, y - 0.12, f"= {result}", ha="right", va="center", fontsize=10,
            fontweight="bold", color=CHOSEN)  # fmt: skip


def busiest(view: Scene) -> int:
    """The element with the most terms that are there; of equals, the middle one."""
    counts = [
        -1 if row is None else sum(step[0] not in ("skip", "pass") for step in row)
        for row in view["steps"]
    ]
    equals = [i for i, count in enumerate(counts) if count == max(counts)]
    return equals[len(equals) // 2]


def picture(scene: Scene, moments: list[tuple[Scene, int]], dpi: int = 100) -> Image.Image:
    """Panels, one a moment (view, element), below each other."""
    sizes = [measure(scene, view) for view, _ in moments]
    lists = [(len(numbered(scene, view, view["steps"][i])) + 1.5) * 0.52 for view, i in moments]
    heights = [max(size[1], lines) + 2.2 for size, lines in zip(sizes, lists, strict=True)]
    width = max(width for width, _ in sizes) + 0.8
    figure = Figure(figsize=(width * INCH, (sum(heights) + 0.9) * INCH), dpi=dpi, facecolor="white")
    total = sum(heights) + 0.9
    figure.text(0.4 / width, 1 - 0.72 / total, scene["call"], fontsize=10, family="monospace",
                color=SOFT)  # fmt: skip
    top = total - 0.9
    for (view, element), height in zip(moments, heights, strict=True):
        ax = figure.add_axes((0, (top - height) / total, 1, height / total))
        ax.set_xlim(-0.4, width - 0.4)
        ax.set_ylim(-height + 1.5, 1.5)
        ax.axis("off")
        ax.text(0, 0.98, view["label"].upper(), fontsize=8, color=CHOSEN, fontweight="bold")
        panel(ax, scene, view, element)
        top -= height
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi)
    return Image.open(buffer).convert("RGB")


def chosen(scene: Scene, key: str | None) -> list[Scene]:
    """The views to draw: one by name, or all but the bias's and the rarer tie rules'."""
    keys = [view["key"] for view in scene["views"]]
    if key is None:
        rare = ("grad_bias", "grad_input_last", "grad_input_all", "grad_input_split")
        return [view for view in scene["views"] if view["key"] not in rare]
    if key not in keys:
        raise ValueError(f"--view {key} is not one of {', '.join(keys)}")
    return [view for view in scene["views"] if view["key"] == key]


def save_png(scene: Scene, path: Path, key: str | None = None, element: int | None = None) -> None:
    """One picture: the chosen element of a view, or the busiest element of every view."""
    views = chosen(scene, key)
    for view in views:
        rows = view["steps"]
        if element is not None and not (0 <= element < len(rows) and rows[element]):
            raise ValueError(f"--element {element} is not an element of {view['key']}")
    moments = [(view, busiest(view) if element is None else element) for view in views]
    image = picture(scene, moments).quantize(128, dither=Image.Dither.NONE)
    image.save(path, optimize=True)


def save_gif(
    scene: Scene, path: Path, key: str | None = None, element: int | None = None,
    milliseconds: int = 900,
) -> None:  # fmt: skip
    """An animation over every element of a view, or of every view in turn (`element`: just it)."""
    moments = [
        (view, i)
        for view in chosen(scene, key)
        for i, row in enumerate(view["steps"])
        if row and (element is None or i == element)
    ]
    if not moments:
        raise ValueError(f"--element {element} is not an element of these views")
    images = [picture(scene, [moment], dpi=80) for moment in moments]
    size = (max(i.width for i in images), max(i.height for i in images))
    pages = []
    for image in images:
        sheet = Image.new("RGB", size, "white")
        sheet.paste(image, (0, 0))
        pages.append(sheet)
    sample = Image.new("RGB", (size[0], 3 * size[1]))
    for i, sheet in enumerate((pages[0], pages[len(pages) // 2], pages[-1])):
        sample.paste(sheet, (0, i * size[1]))
    method = Image.Quantize.FASTOCTREE  # median cut merges the rare colours of the roles
    palette = sample.quantize(63, method=method, dither=Image.Dither.NONE)
    frames = [sheet.quantize(palette=palette, dither=Image.Dither.NONE) for sheet in pages]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, optimize=True
    )
