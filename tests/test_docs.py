"""The documents: their code runs, links lead somewhere, the specification's lines are current.

The python blocks of a file run from top to bottom in one namespace; a block with >>> is compared
with the output that it shows. A block after a line `<!-- not run: reason -->` is left out.
"""

import doctest
import importlib.util
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^(<!-- not run: .+ -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|<img[^>]* src=\"([^\"]+)\"")


def code(path):
    """(line number, source) of the blocks that run."""
    text = path.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, block.start(2)), block[2])
        for block in BLOCK.finditer(text)
        if not block[1]
    ]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if code(path)], ids=lambda path: path.name
)
def test_code_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": path.stem}
    for line, source in code(path):
        if ">>>" in source:
            test = doctest.DocTestParser().get_doctest(source, names, path.name, str(path), line)
            runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
            report = []
            runner.run(test, out=report.append, clear_globs=False)
            assert not runner.summarize(verbose=False).failed, "".join(report)
            names.update(test.globs)
        else:
            exec(compile("\n" * line + source, str(path), "exec"), names)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in LINK.finditer(path.read_text(encoding="utf-8")):
        target = link[1] or link[2]
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_lines_of_the_specification_are_current(capsys):
    make = load(ROOT / "docs/make.py")
    assert make.main(["--check"]) == 0, capsys.readouterr().out
    text = (ROOT / "docs/understanding.md").read_text(encoding="utf-8")
    assert len(make.PLACE.findall(text)) >= 8
    assert make.filled(text.replace("sum.step(", "sum.jump(")) == text != ""


def test_the_translation_has_the_same_code_and_pictures():
    texts = [
        (ROOT / "docs" / name).read_text(encoding="utf-8")
        for name in ("understanding.md", "understanding.zh.md")
    ]
    for pattern in (r"^```(?:python|cpp|sh)\n.*?^```$", r"\]\((img/[^)]+)\)"):
        ours, theirs = (re.findall(pattern, text, re.MULTILINE | re.DOTALL) for text in texts)
        assert ours == theirs


def test_pictures_are_small():
    for path in (ROOT / "docs/img").iterdir():
        assert path.stat().st_size < 300_000, path.name


# ---- the examples of these documents ----------------------------------------------------------


def test_course_checks(capsys):
    runpy.run_path(str(ROOT / "examples/course_checks.py"))
    assert capsys.readouterr().out.count("x\n") == 4


def test_filters_of_the_image_demo():
    filters = load(ROOT / "examples/filters.py")
    image = np.zeros((1, 3, 6, 6))
    image[0, 0], image[0, 1], image[0, 2, :3], image[0, 2, 3:] = 200, 100, 50, 150
    gray, edges = filters.gray_and_edges(image)[0]
    np.testing.assert_allclose(gray, np.repeat([[125.0] * 6, [135.0] * 6], 3, axis=0), rtol=1e-12)
    assert edges.tolist() == [
        [-22, -72, -72, -72, -72, -22],
        [128] * 6,
        [-172, -272, -272, -272, -272, -172],
        [-172, -272, -272, -272, -272, -172],
        [128] * 6,
        [578, 728, 728, 728, 728, 578],
    ]


def test_filters_example(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (the extra `examples`)")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra `examples`)")
    filters = load(ROOT / "examples/filters.py")
    assert filters.main(["-o", str(tmp_path / "filters.png"), "--steps", "2"]) == 0
    assert (tmp_path / "filters.png").stat().st_size > 10_000
    assert "same bits" in capsys.readouterr().out
