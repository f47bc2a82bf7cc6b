"""The doctor command: its report, and one line of advice for each thing that can be wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import torch_naiveconv
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


def library_of_another_machine(package):
    library = package / "_cpu.so"
    data = bytearray(library.read_bytes())
    data[18:20] = (0xF3).to_bytes(2, "little")  # e_machine of the ELF header: RISC-V
    library.write_bytes(data)


BROKEN = {
    "_cpu.so is not built: run `pip install": lambda package: (package / "_cpu.so").unlink(),
    "does not fit this machine or this torch": library_of_another_machine,
    "too old: pip install 'torch>=2.11'": lambda package: (package / "ops.py").write_text(
        (package / "ops.py")
        .read_text()
        .replace("_load()\nNAME", "torch.__version__ = '2.10.1'\n_load()\nNAME")
    ),
}


@pytest.mark.parametrize("expected", BROKEN)
def test_a_package_that_cannot_be_imported(expected, tmp_path):
    """There the doctor does not come to speak; the last line and the report say what to do."""
    package = tmp_path / "torch_naiveconv"
    shutil.copytree(Path(torch_naiveconv.__file__).parent, package)
    BROKEN[expected](package)
    run = subprocess.run(
        [sys.executable, "-m", "torch_naiveconv", "doctor", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    (advice,) = json.loads(run.stdout)["advice"]
    last = run.stderr.strip().splitlines()[-1]
    assert last == f"ImportError: {advice}" and expected in advice
