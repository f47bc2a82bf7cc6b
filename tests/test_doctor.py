"""The doctor command: its report, and one line of advice for each thing that can be wrong."""

import json

import pytest

from torch_naiveconv import __main__ as cli
from torch_naiveconv.commands import doctor


def test_text(capsys):
    status = cli.main(["doctor"])
    out = capsys.readouterr().out
    assert "_cpu.so" in out and "naive" in out and "right" in out
    assert (status == 0) == ("all is well" in out)


def test_json(capsys):
    status = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["small convolution"] == "right"
    assert report["conv on cpu"][-1] == "naive"
    assert (status == 0) == (report["advice"] == [])


WRONG = {
    "too old": {"torch": "2.9.1+cpu"},
    "only the naive loop": {"conv on cpu": ["naive"]},
    "AVX2": {"conv on cpu": ["generic", "naive"], "platform": "Linux x86_64"},
    "CUDA library is not built": {"gpu": "some GPU (sm_90)", "libraries loaded": ["_cpu.so"]},
    "no GPU is visible": {"gpu": None, "libraries loaded": ["_cpu.so", "_cuda.so"]},
    "report it": {"small convolution": "wrong: 35.0 for 36"},
}


@pytest.mark.parametrize("expected", WRONG)
def test_advice(expected):
    well = {
        **doctor.examine(),
        "conv on cpu": ["avx2", "naive"],
        "gpu": None,
        "libraries loaded": ["_cpu.so"],
    }
    assert doctor.advice(well) == []
    lines = doctor.advice({**well, **WRONG[expected]})
    assert len(lines) == 1
    assert expected in lines[0]
    assert "\n" not in lines[0]
