"""One wheel for all: the audit of the built libraries, that it can fail, the tag, and setup.py."""

import importlib.util
import shutil
import zipfile
from pathlib import Path

import pytest
import setuptools

from torch_naiveconv import ops

ROOT = Path(__file__).parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


audit = load(ROOT / "tools" / "audit_wheel.py")
setup = load(ROOT / "setup.py")
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")


@needs_nm
def test_libraries_use_the_stable_abi_only():
    for library in ops.libraries_loaded():
        assert audit.faults_of_library(library) == []


@pytest.mark.parametrize(
    "name",
    ["_ZN3c104impl8GPUTraceE", "_ZNK2at6Tensor3addE", "_ZN5torch3jit6tracerE", "PyObject_Call"],
)
def test_the_audit_finds(name):
    assert audit.FORBIDDEN.match(name)


@pytest.mark.parametrize(
    "name", ["aoti_torch_get_dim", "torch_delete_string", "_ZSt4cout", "malloc"]
)
def test_the_audit_allows(name):
    assert not audit.FORBIDDEN.match(name)


@needs_nm
def test_wheels(tmp_path):
    good = tmp_path / "torch_naiveconv-0.1.0-py3-none-linux_x86_64.whl"
    bad = tmp_path / "torch_naiveconv-0.1.0-cp311-cp311-linux_x86_64.whl"
    empty = tmp_path / "torch_naiveconv-0.1.0-py3-none-any.whl"
    for wheel in (good, bad, empty):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("torch_naiveconv/__init__.py", "")
            if wheel is not empty:
                archive.write(ops.CPU_LIBRARY, "torch_naiveconv/_cpu.so")
    assert audit.main([str(good)]) == 0
    assert audit.main([str(bad)]) == 1
    assert audit.main([str(empty)]) == 1


def test_build_without_ninja():
    build = setup.Build(setuptools.Distribution())
    build.use_ninja = False  # what torch sets where it finds none
    with pytest.raises(SystemExit, match="pip install ninja"):
        build.build_extensions()


def test_build_without_nvcc(monkeypatch):
    monkeypatch.setattr(setup, "cuda_home", lambda: None)
    monkeypatch.setenv("FORCE_CUDA", "0")
    assert setup.cuda_library() is None
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="set CUDA_HOME"):
        setup.cuda_library()
