"""The conformance cases: the file is the table's, every row reproduces it, and they can fail."""

import json
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from torch_naiveconv import SPEC_ID, conformance
from torch_naiveconv.__main__ import main

ROOT = Path(__file__).resolve().parent.parent


def test_the_file_holds_the_table():
    assert [case for case, _ in conformance.load()] == conformance.cases()
    names = [case.name for case in conformance.cases()]
    assert len(names) == len(set(names))


def test_written_file_is_the_shipped_file(tmp_path):
    conformance.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == conformance.FILE.read_bytes()


def test_classes_of_values_do_what_they_say():
    """No case is empty talk: NaN, infinities, subnormals and zeros do reach the results."""
    seen = set()
    for case, _ in conformance.load():
        if case.op == "conv" and case.dtype in ("float32", "bfloat16"):
            for t in conformance._outputs(case, "naive", "cpu", False):
                tiny = 2.0**-126
                seen |= {
                    (case.values, name)
                    for name, where in {
                        "nan": t.isnan(),
                        "inf": t.isinf(),
                        "zero": t == 0,
                        "subnormal": (t != 0) & (t.abs() < tiny),
                        "edge": t.abs() == tiny,
                    }.items()
                    if where.any()
                }
    assert {
        ("special", "nan"),
        ("special", "inf"),
        ("large", "inf"),
        ("large", "nan"),
        ("tiny", "zero"),
        ("tiny", "subnormal"),
        ("subnormal", "subnormal"),
        ("zeros", "zero"),
        ("edge", "edge"),
    } <= seen


def test_verify(capsys, tmp_path):
    report = tmp_path / "report.json"
    assert main(["verify", "--json", str(report)]) == 0
    assert f"{SPEC_ID} verified" in capsys.readouterr().out
    report = json.loads(report.read_text())
    assert report["passed"] and report["spec"] == SPEC_ID and not report["differs"]
    assert {line["implementation"] for line in report["counts"]} >= {"naive"}
    assert all(line["same"] == line["of"] > 0 for line in report["counts"])


def test_verify_fails_when_a_case_does(capsys, monkeypatch):
    case, digest = conformance.load()[0]
    wrong = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    monkeypatch.setattr(conformance, "load", lambda: [(case, wrong)])
    assert main(["verify"]) == 1
    assert "DIFFERS" in capsys.readouterr().out
    monkeypatch.setattr(conformance, "load", lambda: [])
    assert main(["verify"]) == 1


# ---- the kit can fail --------------------------------------------------------------------------

# Rules broken one at a time, in a copy of the specification: (file, from, to). The copy holds the
# original and every broken rule, and the environment chooses: BROKEN stands for "this one". A text
# without that word takes the place of whole statements.
RULES = {
    "terms in another order": (
        "spec/conv.h",
        "input, n, first_channel + ic,",
        "input, n, first_channel + (BROKEN ? s.group_in() - 1 - ic : ic),",
    ),
    "a skipped fold": (
        "spec/arithmetic.h",
        "if (++terms_ == group_length<T>) cut();",
        "++terms_;",
    ),
    "groups of another length": (
        "spec/arithmetic.h",
        "if (++terms_ == group_length<T>) cut();",
        "if (++terms_ == 2 * group_length<T>) cut();",
    ),
    "groups running on from sample to sample": ("spec/conv.h", "    sum.cut();", "    ;"),
    "missing taps losing their number": ("spec/conv.h", "sum.skip();", ";"),
    "the bias fused into the last group": (
        "spec/arithmetic.h",
        "    cut();\n    return canonical(total_ + bias);",
        "    return canonical(total_ + (chain_ + bias));",
    ),
    "a fused step in two roundings": (
        "spec/arithmetic.h",
        "return __builtin_fmaf(a, b, c);",
        "volatile float product = a * b; return product + c;",
    ),
    "a fused step through double": (
        "spec/arithmetic.h",
        "return __builtin_fmaf(a, b, c);",
        "return static_cast<float>(double(a) * double(b) + double(c));",
    ),
    "zero terms left out": (
        "spec/arithmetic.h",
        "chain_ = fused(a, b, chain_);",
        "if (a != T(0)) chain_ = fused(a, b, chain_);",
    ),
    "NaN as the processor makes it": (
        "spec/arithmetic.h",
        "return x == x ? x : canonical_nan<T>();",
        "return x;",
    ),
    "one chain for 16-bit types": (
        "spec/arithmetic.h",
        "(terms_ & 1) ? odd_ : even_;",
        "(terms_ & 1) && !BROKEN ? odd_ : even_;",
    ),
    "16-bit sums keeping subnormals": (
        "spec/arithmetic.h",
        "return flushed(a + b);",
        "return a + b;",
    ),
    "bfloat16 operands keeping subnormals": (
        "spec/arithmetic.h",
        "return (x.bits & 0x7f80u) ?",
        "return BROKEN || (x.bits & 0x7f80u) ?",
    ),
    "tininess before rounding": (
        "spec/arithmetic.h",
        "edge = 1.1754943157898258e-38;",
        "edge = BROKEN ? 1.1754943508222875e-38 : 1.1754943157898258e-38;",
    ),
    "gradual underflow deciding what is tiny": (
        "spec/arithmetic.h",
        "return (exact < edge && exact > -edge) ? signed_zero_of(r) : r;",
        "return r;",
    ),
    "a subnormal total resumed": (
        "spec/arithmetic.h",
        "total_(flushed(earlier))",
        "total_(BROKEN ? earlier : flushed(earlier))",
    ),
    "a max instruction": (
        "spec/max_pool.h",
        "return greater(next, best)",
        "return BROKEN ? !greater(best, next) : greater(next, best)",
    ),
    "a NaN that does not win": (
        "spec/max_pool.h",
        "|| is_nan(next) ||",
        "|| (!BROKEN && is_nan(next)) ||",
    ),
    "overlapping windows assigned": (
        "spec/max_pool.h",
        "total_ = total_ + x;",
        "total_ = x;",
    ),
}

NAIVE_ONLY = """
#include <cstdlib>
static const int broken = std::atoi(std::getenv("BROKEN_RULE"));
#include "cpu/conv_naive.cpp"
#include "cpu/max_pool_naive.cpp"
namespace torch_naiveconv {
const ConvRow* const conv_rows[] = {&conv_naive};
const int conv_row_count = 1;
bool run_conv(const ConvProblem& problem, const char*) { return conv_naive.run(problem); }
const PoolRow* const pool_rows[] = {&pool_naive};
const int pool_row_count = 1;
bool run_pool(const PoolProblem& problem, const char*) { return pool_naive.run(problem); }
}  // namespace torch_naiveconv
#include "driver/conformance.cpp"
"""


@pytest.fixture(scope="module")
def breakable(tmp_path_factory):
    """The driver with the naive rows alone, and every broken rule in it."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for number, (file, old, new) in enumerate(RULES.values(), start=1):
        path = folder / "csrc" / file
        text = path.read_text()
        assert old in text, f"the specification no longer says {old!r}"
        if "BROKEN" not in new:
            new = f"if (BROKEN) {{ {new} }} else {{ {old} }}"
        path.write_text(text.replace(old, new.replace("BROKEN", f"(broken == {number})")))
    source = folder / "csrc" / "broken.cpp"
    source.write_text(NAIVE_ONLY)
    program = folder / "broken"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mfma")
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
    return program


def differing(program, rule):
    """The names of the cases whose digest a program with one broken rule (0: none) misses."""
    cases = conformance.load()
    lines = "".join(conformance.line(case) + "\n" for case, _ in cases)
    done = subprocess.run(
        [str(program)],
        input=lines,
        env={"BROKEN_RULE": str(rule)},
        check=True,
        capture_output=True,
        text=True,
    )
    found = {line.split()[0]: line.split()[2] for line in done.stdout.splitlines()}
    assert len(found) == len(cases)
    return [case.name for case, digest in cases if found[case.name] != digest]


def test_the_driver_agrees_when_no_rule_is_broken(breakable):
    assert differing(breakable, 0) == []


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_is_noticed(breakable, rule):
    names = differing(breakable, 1 + list(RULES).index(rule))
    assert names, f"no case notices {rule}"
    assert len(names) < len(conformance.load())
