"""torch.export, training what it returns, and AOTInductor packages in a fresh process."""

import subprocess
import sys

import torch

import torch_naiveconv as tn


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        tn.Conv2d(3, 4, 3, padding=1),
        torch.nn.ReLU(),
        tn.MaxPool2d(2),
        tn.ConvTranspose2d(4, 2, 2, stride=2),
    )


def exported(m, x):
    batch = torch.export.Dim("batch", min=2, max=64)
    return torch.export.export(m, (x,), dynamic_shapes=({0: batch},))


def test_export_and_save(tmp_path):
    m, x = model(), torch.randn(3, 3, 8, 8)
    program = exported(m, x)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    for batch in (2, 5):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.equal(loaded.module()(x), m(x))


def test_train_the_exported_module():
    m, x = model(), torch.randn(3, 3, 8, 8)
    trained = exported(m, x).module()
    got = torch.autograd.grad(trained(x).square().sum(), list(trained.parameters()))
    expected = torch.autograd.grad(m(x).square().sum(), list(m.parameters()))
    assert len(got) == len(expected) == 4
    assert all(map(torch.equal, got, expected))


def test_train_through_an_exported_pooling():
    """Exported from an input without requires_grad: the indices must be kept all the same."""
    x = torch.randn(2, 3, 8, 8)
    pool = torch.export.export(tn.MaxPool2d(2), (x,)).module()
    x.requires_grad_()
    (got,) = torch.autograd.grad(pool(x).square().sum(), x)
    (expected,) = torch.autograd.grad(tn.MaxPool2d(2)(x).square().sum(), x)
    assert torch.equal(got, expected)


LOAD = """
import sys, torch
import torch_naiveconv  # registers the operators that the package calls
package = torch._inductor.aoti_load_package(sys.argv[1])
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(package(x), expected)
print("same")
"""


def test_aot_inductor_package_in_a_fresh_process(tmp_path):
    m, x = model().eval(), torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            exported(m, x), package_path=str(tmp_path / "model.pt2")
        )
        torch.save((x, m(x)), tmp_path / "data.pt")
    run = subprocess.run(
        [sys.executable, "-c", LOAD, package, str(tmp_path / "data.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "same", run.stderr
