"""What drift() and audit() report: no false alarm, and no wrong element let through."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_naiveconv import audit, convert, drift
from torch_naiveconv import functional as F
from torch_naiveconv.drift import COMPARISONS, difference

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def layers():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)
    )


def test_drift_of_a_model():
    model = layers()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    found = drift(model, torch.randn(2, 16, 20, 20))
    assert [layer.type for layer in found.layers] == [type(layer).__name__ for layer in model]
    assert found.first("own threads") is None and found.first("own format") is None
    assert all(set(layer.differences) == set(COMPARISONS) for layer in found.layers)
    assert all(name in str(found) for name in COMPARISONS)
    assert model.training and type(model[0]) is nn.Conv2d
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_a_converted_model_does_not_drift_from_the_contract():
    found = drift(convert(layers()), torch.randn(2, 16, 20, 20))
    assert all(found.first(name) is None for name in COMPARISONS)


def test_ulps():
    one = torch.tensor([1.0, -0.0, 3.0, float("inf")])
    other = torch.tensor([1.0 + 2**-23, 0.0, 3.0, float("nan")])
    assert difference(one, one).share == 0
    assert difference(one[:1], other[:1]).ulps == 1
    assert difference(one[1:2], other[1:2]).ulps == 1
    assert difference(one, other).share == 0.75
    halves = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert difference(halves, halves + torch.tensor([0.0, 2.0**-6], dtype=torch.bfloat16)).ulps == 1


def test_drift_picture(tmp_path):
    pytest.importorskip("matplotlib")
    drift(layers(), torch.randn(1, 16, 8, 8)).plot(tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 1000


def calls():
    torch.manual_seed(1)
    x, w, b = torch.randn(2, 6, 9, 9), torch.randn(4, 3, 3, 3), torch.randn(4)
    g = torch.randn(2, 4, 5, 5)
    geometry = {"stride": 2, "padding": 1, "groups": 2}
    conv = {"input": x, "weight": w, "bias": b, **geometry}
    return {
        "conv2d": conv,
        "conv_transpose2d": {"input": g, "weight": w, **geometry},
        "conv_grad_input": {"input_size": x.shape, "weight": w, "grad_output": g, **geometry},
        "conv_grad_weight": {"input": x, "weight_size": w.shape, "grad_output": g, **geometry},
        "conv_grad_bias": {"grad_output": g},
        "max_pool2d": {"input": x, "kernel_size": 3, "padding": 1, "ties": "last"},
    }


@pytest.mark.parametrize("op", calls())
def test_audit_finds_every_wrong_bit(op):
    inputs = calls()[op]
    output = getattr(F, op)(**inputs)
    report = audit(op, inputs, output, elements=10**6)
    assert report and report.checked == report.of == output.numel()
    assert audit(getattr(F, op), tuple(inputs.values())[:1], output) if len(inputs) == 1 else True
    wrong = output.clone()
    wrong.view(torch.int32).view(-1)[1] ^= 1
    report = audit(op, inputs, wrong, elements=10**6)
    assert not report and len(report.wrong) == 1
    assert "expected" in str(report)


def test_audit_refuses_what_it_cannot_check():
    x = torch.randn(1, 1, 4, 4)
    with pytest.raises(ValueError, match="no audit of 'max_unpool2d'"):
        audit("max_unpool2d", (x,), x)
    with pytest.raises(ValueError, match="has the shape"):
        audit("conv2d", (x, x), x)
    with pytest.raises(ValueError, match="padding_mode"):
        audit("conv2d", {"input": x, "weight": x, "padding_mode": "reflect"}, x)


def test_training_twice_gives_equal_hashes(monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("reproduce", EXAMPLES / "reproduce.py")
    reproduce = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "reproduce", reproduce)
    spec.loader.exec_module(reproduce)
    assert reproduce.main() == 0
    assert "all must be equal, and are" in capsys.readouterr().out
