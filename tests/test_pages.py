"""The pages of `explain` in a real browser: what a reader sees adds up to what the library returns.

Each number is read back from the page's text, its place is compared with the formulas of a
convolution, and every sum is repeated with exact fractions, rounded once a step.
"""

import shutil
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_naiveconv import __main__ as cli
from torch_naiveconv import functional as F
from torch_naiveconv.pages import trace
from torch_naiveconv.pages.page import page

GROUP = 128

# ---- cases ---------------------------------------------------------------------------------------


def normal(seed, shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Case:
    """A convolution, what the library returns for it, and its scene."""

    def __init__(self, kind, input, weight, grad, dtype=torch.float32, **arguments):
        self.kind, self.arguments, self.dims = kind, arguments, len(input) - 2
        shapes = {"input": input, "weight": weight, "grad_output": grad, "bias": grad[1:2]}
        self.values = {
            name: normal(seed, shape, dtype) for seed, (name, shape) in enumerate(shapes.items())
        }
        function = getattr(F, f"{kind}{self.dims}d")
        leaves = [self.values[name].requires_grad_() for name in ("input", "weight", "bias")]
        output = function(*leaves, **arguments)
        grads = torch.autograd.grad(output, leaves, self.values["grad_output"])
        self.values = {name: t.detach() for name, t in self.values.items()} | dict(
            zip(
                ("output", "grad_input", "grad_weight", "grad_bias"),
                (output.detach(), *grads),
                strict=True,
            )
        )
        v = self.values
        self.scene = getattr(trace, kind)(
            v["input"], v["weight"], v["bias"], v["grad_output"], **arguments
        )

    def argument(self, name, default):
        value = self.arguments.get(name, default)
        return value if isinstance(value, tuple) else (value,) * self.dims

    def reads(self, o, k):
        """The position at the input side that tap k of position o at the output side meets."""
        stride, dilation = self.argument("stride", 1), self.argument("dilation", 1)
        padding = self.argument("padding", 0)
        return tuple(o[j] * stride[j] + k[j] * dilation[j] - padding[j] for j in range(len(o)))

    def terms(self, view, element):
        """[(operand, position), (operand, position)] for each numbered term, None for a skip."""
        v, weight = self.values, self.values["weight"].shape
        transposed = self.kind == "conv_transpose"
        # The roles in the convolution, whichever of the two this is.
        wide, narrow = ("grad_output", "input") if transposed else ("input", "grad_output")
        role = view
        if transposed and view in ("output", "grad_input"):
            role = "grad_input" if view == "output" else "output"
        groups = self.arguments.get("groups", 1)
        group_in, group_out = weight[1], weight[0] // groups
        taps = list(product(*map(range, weight[2:])))
        places = list(product(*map(range, v[narrow].shape[2:])))
        first, second, *where = element if view != "grad_bias" else (0, *element)
        if role == "output":
            return [
                [
                    (wide, (first, second // group_out * group_in + ic, *self.reads(where, k))),
                    ("weight", (second, ic, *k)),
                ]
                for ic in range(group_in)
                for k in taps
            ]
        if role == "grad_input":
            terms = []
            for oc in range(second // group_in * group_out, (second // group_in + 1) * group_out):
                for k in taps:
                    met = [o for o in places if self.reads(o, k) == tuple(where)]
                    reached = ("weight", (oc, second % group_in, *k))
                    terms.append([(narrow, (first, oc, *met[0])), reached] if met else None)
            return terms
        if role == "grad_weight":
            channel = first // group_out * group_in + second
            return [
                [(narrow, (n, first, *o)), (wide, (n, channel, *self.reads(o, where)))]
                for n in range(v["input"].shape[0])
                for o in places
            ]
        outputs = product(*map(range, v["grad_output"].shape[2:]))
        return [
            [("grad_output", (n, second, *o))]
            for n, o in product(range(v["input"].shape[0]), outputs)
        ]

    def value(self, name, position):
        t = self.values[name]
        inside = all(0 <= p < size for p, size in zip(position, t.shape, strict=True))
        return t[position].numpy()[()] if inside else t.numpy().dtype.type(0)


CASES = {
    "conv2d": Case("conv", (1, 1, 5, 5), (1, 1, 3, 3), (1, 1, 3, 3), stride=2, padding=1),
    "conv2d with everything": Case(
        "conv", (2, 4, 4, 5), (4, 2, 2, 3), (2, 4, 4, 3), groups=2, dilation=(2, 1), padding=(1, 0)
    ),
    "conv1d in two groups": Case("conv", (1, 16, 3), (1, 16, 9), (1, 1, 3), padding=4),
    "conv1d in float64": Case("conv", (1, 2, 5), (1, 2, 2), (1, 1, 4), dtype=torch.float64),
    "conv_transpose2d": Case(
        "conv_transpose", (1, 2, 3, 3), (2, 1, 3, 3), (1, 1, 6, 6), stride=2, padding=1,
        output_padding=1,
    ),
}  # fmt: skip

POOL_GRAD = torch.tensor([[[[1.0, 2], [3, 4]]]])
POOL = {"kernel_size": 3, "stride": 2}


def pool_inputs():
    overlap = torch.arange(25.0).view(1, 1, 5, 5)
    overlap[0, 0, 2, 2] = 100
    tie = torch.zeros(1, 1, 5, 5)
    broken = overlap.clone()
    broken[0, 0, 1, 1] = float("nan")
    return {"overlap": overlap, "a tie": tie, "a NaN": broken}


# ---- the browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("selenium", reason="selenium is not installed (the extra `browser`)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium or chromedriver is not on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync"
    for flag in [*flags.split(), "disable-background-networking", "disable-component-update"]:
        options.add_argument("--" + flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def show(browser, tmp_path):
    """Opens scenes; after the test the console must be empty."""

    def open_page(scenes, width=1280, height=900, dark=False):
        path = tmp_path / "page.html"
        path.write_text(page(scenes), encoding="utf-8")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        browser.get(path.as_uri())
        return browser

    yield open_page
    assert browser.get_log("browser") == []


def click(browser, selector):
    from selenium.webdriver.common.by import By

    element = browser.find_element(By.CSS_SELECTOR, selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()
    return element


READ_ALL = """
const text = (row, part) => row.querySelector("." + part)?.textContent ?? "";
const found = [];
for (const cell of document.querySelectorAll("figure.result .cell:not(.ring)")) {
  cell.dispatchEvent(new MouseEvent("click", { bubbles: true }));
  found.push({
    chosen: document.getElementById("chosen").textContent,
    story: document.getElementById("story").textContent,
    lit: [...document.querySelectorAll("figure:not(.result) .cell.done")].map(
      (c) => c.querySelector("title").textContent.split(" = ")[0]),
    rows: [...document.querySelectorAll("#steps li")].map((row) => ({
      kind: row.dataset.kind, so: row.dataset.so, number: text(row, "no"),
      who: text(row, "who"), what: text(row, "what") })),
  });
}
return found;
"""


def ascii_minus(found):
    """The page writes minus signs; Python reads hyphens."""
    if isinstance(found, str):
        return found.replace("−", "-")
    if isinstance(found, list):
        return [ascii_minus(item) for item in found]
    return {k: ascii_minus(v) for k, v in found.items()} if isinstance(found, dict) else found


# ---- arithmetic, independent of the library ------------------------------------------------------


def rounded(exact, dtype):
    """The nearest float, ties to even."""
    near = dtype(float(exact))
    around = [np.nextafter(near, dtype(-np.inf)), near, np.nextafter(near, dtype(np.inf))]
    word = {4: np.uint32, 8: np.uint64}[near.itemsize]
    return min(around, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(word)) & 1))


def fused(a, b, c):
    return rounded(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)), type(a))


def hexadecimal(x):
    return f"{int(x.view({4: np.uint32, 8: np.uint64}[x.itemsize])):0{2 * x.itemsize}x}"


SHORT = {"grad_output": "grad_out", "grad_input": "grad_in", "grad_weight": "grad_w"}


def named(case, name, position):
    shape = case.values[name].shape
    if not name.endswith("bias") and shape[0] == 1 and shape[1] == 1:
        position = position[2:]
    return f"{SHORT.get(name, name)}[{', '.join(map(str, position))}]"


def check_element(case, view, element, found):
    dtype = case.values["input"].numpy().dtype.type
    rows = iter(found["rows"])
    terms = case.terms(view, element)
    samples = case.values["input"].shape[0] if view in ("grad_weight", "grad_bias") else 1
    per_sample = len(terms) // samples
    chain = total = dtype(0)
    lit = set()
    for number, term in enumerate(terms, 1):
        row = next(rows)
        assert row["number"] == str(number)
        if term is None:
            assert row["kind"] == "skip" and "adds nothing" in row["what"]
        else:
            operands = [case.value(*operand) for operand in term]
            factors = [*operands, dtype(1)][:2]
            names = [named(case, *operand) for operand in term]
            lit.update(names)
            chain = fused(*factors, chain)
            assert row["kind"] == "term"
            assert row["who"] == " × ".join([*names, "1"][:2])
            left, result = row["what"].split(" = ")
            assert [dtype(text) for text in left.split(" × ")] == factors
            assert dtype(result) == rounded(
                Fraction(float(factors[0])) * Fraction(float(factors[1])), dtype
            )
            assert dtype(row["so"]) == chain
        in_sample = (number - 1) % per_sample + 1
        if in_sample % GROUP == 0 or in_sample == per_sample:
            total = dtype(total + chain)
            chain = dtype(0)
            row = next(rows)
            assert row["kind"] == "cut" and dtype(row["so"]) == total
    if view == "output":
        row = next(rows)
        total = dtype(total + case.value("bias", element[1:2]))
        assert row["kind"] == "bias" and dtype(row["so"]) == total
    end = next(rows)
    returned = case.value(view, element)
    assert end["kind"] == "end" and next(rows, None) is None
    assert hexadecimal(dtype(end["so"])) == hexadecimal(returned) == hexadecimal(total)
    assert hexadecimal(returned) in found["story"]
    assert found["chosen"] == f"{named(case, view, element)} = {end['so']}"
    assert set(found["lit"]) == lit


@pytest.mark.parametrize("name", CASES)
def test_every_element_adds_up(show, name):
    case = CASES[name]
    browser = show([case.scene])
    for view in ("output", "grad_input", "grad_weight", "grad_bias"):
        click(browser, f'#tabs [data-key="{view}"]')
        found = ascii_minus(browser.execute_script(READ_ALL))
        elements = list(product(*map(range, case.values[view].shape)))
        assert len(found) == len(elements)
        for element, seen in zip(elements, found, strict=True):
            check_element(case, view, element, seen)


# ---- max-pooling ---------------------------------------------------------------------------------


def seed_listing(x, grad, kernel, stride):
    """What the article's loop leaves in dx: it assigns, and to every maximum."""
    dx = np.zeros_like(x)
    for i, j in product(*map(range, grad.shape)):
        window = x[i * stride : i * stride + kernel, j * stride : j * stride + kernel]
        mask = window == (np.nan if np.isnan(window).any() else window.max())
        dx[i * stride : i * stride + kernel, j * stride : j * stride + kernel] = mask * grad[i, j]
    return dx


@pytest.mark.parametrize("name", ["overlap", "a tie", "a NaN"])
def test_pooling_winners_routes_and_rules(show, name):
    x = pool_inputs()[name]
    browser = show([trace.max_pool(x, POOL_GRAD, title=name, **POOL)])
    output, index = F.max_pool2d(x, **POOL, return_indices=True)
    found = ascii_minus(browser.execute_script(READ_ALL))
    for window, seen in enumerate(found):
        *looks, end = seen["rows"]
        i, j = divmod(window, 2)
        taps = [(2 * i + a, 2 * j + b) for a, b in product(range(3), repeat=2)]
        assert [row["who"].split(" = ")[0] for row in looks] == [
            f"input[{a}, {b}]" for a, b in taps
        ]
        leads = [tap for tap, row in zip(taps, looks, strict=True) if "★" in row["what"]]
        winner = divmod(int(index.flatten()[window]), 5)
        assert leads[-1] == winner
        assert np.array_equal(float(end["so"]), float(output.flatten()[window]), equal_nan=True)

    click(browser, '#tabs [data-key="grad_input_first"]')
    for rule in ("first", "last", "all", "split"):
        click(browser, f'#rules [data-key="grad_input_{rule}"]')
        dx = F.max_pool_grad_input(x, POOL_GRAD, **POOL, ties=rule).flatten()
        for i, seen in enumerate(ascii_minus(browser.execute_script(READ_ALL))):
            *windows, end = seen["rows"]
            total = np.float32(0)
            for row in windows:
                if row["kind"] == "add":
                    total += np.float32(row["what"].removeprefix("gives "))
                    assert np.float32(row["so"]) == total
            assert np.float32(end["so"]) == total == dx[i].numpy()
            spans = sum(0 <= i // 5 - 2 * a <= 2 and 0 <= i % 5 - 2 * b <= 2
                        for a, b in product(range(2), repeat=2))  # fmt: skip
            assert len(windows) == spans

    click(browser, '#tabs [data-key="compare"]')
    grids = browser.execute_script("""
      const shown = (cell) =>
        [cell.querySelector(".value").textContent, cell.classList.contains("differs")];
      return Object.fromEntries([...document.querySelectorAll("figure")].map(
        (f) => [f.dataset.tensor, [...f.querySelectorAll(".cell")].map(shown)]));""")
    right = F.max_pool_grad_input(x, POOL_GRAD, **POOL).flatten().tolist()
    wrong = seed_listing(x[0, 0].numpy(), POOL_GRAD[0, 0].numpy(), 3, 2).flatten().tolist()
    assert [float(text) for text, _ in grids["article"]] == wrong
    assert [mark for _, mark in grids["article"]] == [
        a != b for a, b in zip(right, wrong, strict=True)
    ]
    assert wrong != right and len([n for n in grids if n.startswith("grad_input_")]) == 4


# ---- using the page ------------------------------------------------------------------------------


def chosen(browser):
    return ascii_minus(
        browser.execute_script("return document.getElementById('chosen').textContent")
    )


def test_animation_plays_to_the_end(show):
    from selenium.webdriver.support.ui import WebDriverWait

    scene = trace.conv(normal(0, (1, 1, 3, 3)), normal(1, (1, 1, 2, 2)), None)
    browser = show([scene])
    browser.execute_script("document.getElementById('speed').value = '30'")
    click(browser, "#play")
    assert browser.execute_script("return document.body.dataset.animation") == "playing"
    WebDriverWait(browser, 30).until(
        lambda b: b.execute_script("return document.body.dataset.animation") == "ended"
    )
    assert chosen(browser).startswith("output[1, 1] = ")
    now = browser.execute_script("return document.getElementById('now').textContent")
    assert ascii_minus(now) == chosen(browser)
    assert browser.execute_script("return document.getElementById('play').textContent") == "play"


def test_mouse_touch_and_keyboard(show):
    from selenium.webdriver import ActionChains, Keys

    browser = show([CASES["conv2d"].scene])
    click(browser, '[data-tensor="output"] .cell[data-index="4"]')
    assert chosen(browser).startswith("output[1, 1]")
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    assert chosen(browser).startswith("output[1, 2]")
    ActionChains(browser).send_keys(Keys.ARROW_DOWN).send_keys(Keys.HOME).send_keys(".").perform()
    assert chosen(browser).startswith("output[2, 2]")
    assert browser.execute_script("return document.querySelectorAll('.cell.now').length") == 2
    click(browser, '[data-tensor="input"] .cell[data-index="24"]')  # an input: to its gradient
    assert chosen(browser).startswith("grad_in[2, 2]")
    click(browser, '[data-tensor="weight"] .cell[data-index="4"]')  # a weight: to its gradient
    assert chosen(browser).startswith("grad_w[1, 1]")
    click(browser, '[data-tensor="input"] .cell[data-index="0"]')  # padding has no gradient
    assert "padding" in browser.execute_script("return document.getElementById('now').textContent")
    click(browser, '#tabs [data-key="all"]')
    assert browser.execute_script("return document.querySelectorAll('figure').length") == 8
    click(browser, '[data-tensor="grad_bias"] .cell')
    assert chosen(browser).startswith("grad_bias[0]")

    browser = show([CASES["conv2d"].scene], width=390, height=844)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    place = browser.execute_script("""
      const cell = document.querySelector('[data-tensor="output"] .cell[data-index="1"]');
      cell.scrollIntoView({block: "center"});
      const box = cell.getBoundingClientRect();
      return {x: box.x + box.width / 2, y: box.y + box.height / 2};""")
    for kind, points in (("touchStart", [place]), ("touchEnd", [])):
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    assert chosen(browser).startswith("output[0, 1]")


@pytest.mark.parametrize("name", ["conv2d", "conv2d with everything", "conv1d in two groups"])
def test_a_phone_needs_no_sideways_scrolling(show, name):
    colours = set()
    for dark in (False, True):
        browser = show([CASES[name].scene], width=390, height=844, dark=dark)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        colours.add(
            browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        )
        smallest = browser.execute_script("""
          const shown = [...document.querySelectorAll("button, .cell")].filter(
            (e) => !e.closest("[hidden]"));
          return Math.min(...shown.map((e) => e.getBoundingClientRect().height))""")
        assert smallest >= 24
    assert len(colours) == 2


def test_cells_are_named_for_screen_readers(show):
    browser = show([CASES["conv2d"].scene])
    names = browser.execute_script("""
      return [...document.querySelectorAll("svg[role=grid] [role=row] [role=gridcell]")].map(
        (c) => c.getAttribute("aria-label"))""")
    assert len(names) == 49 + 9 + 9
    assert names[0] == "input[−1, −1], padding: 0" and all(": " in name for name in names)


# ---- without a browser ---------------------------------------------------------------------------


def test_group_length_is_the_specifications():
    header = Path(__file__).parents[1] / "csrc/spec/arithmetic.h"
    assert f"is_half_type<T> ? 32 : {trace.GROUP};" in header.read_text()


def test_a_wrong_sum_makes_no_page(monkeypatch):
    right = trace.sums

    def wrong(*args):
        steps, end = right(*args)
        return steps, end * (1 + 2**-20)

    monkeypatch.setattr(trace, "sums", wrong)
    with pytest.raises(AssertionError, match="library's bits"):
        trace.conv(normal(0, (1, 1, 3, 3)), normal(1, (1, 1, 2, 2)), None)


def explain(tmp_path, *arguments):
    path = tmp_path / "out.html"
    return cli.main(["explain", *arguments, "-o", str(path)]), path


@pytest.mark.parametrize(
    "arguments",
    [
        "conv2d --input 5x5 --kernel 3 --stride 2 --padding 1",
        "conv1d --input 2x8 --kernel 3 --padding same --no-bias --dtype float64",
        "conv3d --input 3x3x3 --kernel 2 --filters 2",
        "conv_transpose2d --input 2x3x3 --kernel 3 --stride 2 --groups 2 --filters 4",
        "max_pool2d --input 5x5 --kernel 3x2 --stride 2 --padding 1 --ceil-mode",
        "max_pool1d --input 6 --kernel 2 --input-values 1,nan,3,3,inf,-1",
        "conv1d --input 4 --kernel 3 --padding 1 --input-values 1,nan,inf,-0.0",
    ],
)
def test_command(tmp_path, arguments):
    status, path = explain(tmp_path, *arguments.split())
    assert status == 0
    text = path.read_text(encoding="utf-8")
    assert "@DATA@" not in text and "src=" not in text and "url(http" not in text


def test_values_from_files(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(4.0))
    (tmp_path / "w.txt").write_text("1 10\n")
    status, path = explain(
        tmp_path, *["conv1d", "--input", "4", "--kernel", "2", "--no-bias"],
        "--input-values", str(tmp_path / "x.npy"), "--weight-values", str(tmp_path / "w.txt"),
    )  # fmt: skip
    assert status == 0 and '"values":["10","21","32"]' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("conv2d --input 5x5 --kernel 9", "no output on spatial axis 0"),
        ("conv2d --input 5x5 --kernel 3 --weight-values 1,2", "has 2 numbers"),
        ("conv2d --input 5x5 --kernel 3 --weight-values many", "neither a known word"),
        ("conv2d --input 5 --kernel 3", "too few sizes"),
        ("conv2d --input 3x5x5 --kernel 3 --groups 2", "must divide"),
        ("conv2d --input 64x64 --kernel 15", "steps, more than"),
        ("conv2d --input 5x5 --kernel 3 --ceil-mode", "has no --ceil-mode"),
        ("max_pool2d --input 5x5 --kernel 3 --groups 2", "has no --groups"),
        ("conv2d --input 0x1x5x5 --kernel 3", "has an empty axis"),
        ("conv2d --input 5x5 --kernel 3 --stride 0", "stride must be"),
    ],
)
def test_command_errors(tmp_path, capsys, arguments, message):
    status, path = explain(tmp_path, *arguments.split())
    assert status == 2 and message in capsys.readouterr().out and not path.exists()


def test_pictures(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra `plots`)")
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (the extra `plots`)")
    arguments = ["conv2d", "--input", "3x3", "--kernel", "2", "--view", "output"]
    for kind, frames in (("png", 1), ("gif", 4)):
        path = tmp_path / f"picture.{kind}"
        assert cli.main(["explain", *arguments, "-o", str(path)]) == 0
        with image.open(path) as picture:
            assert getattr(picture, "n_frames", 1) == frames and picture.width > 300
    path = tmp_path / "none.png"
    assert cli.main(["explain", *arguments, "--element", "4", "-o", str(path)]) == 2
    assert "--element 4 is not an element of output" in capsys.readouterr().out
