"""The command line: help, exit statuses, and that `check` can fail."""

import torch

from torch_naiveconv import __main__ as cli
from torch_naiveconv import functional as F
from torch_naiveconv.commands import check


def test_check_passes(capsys):
    assert cli.main(["check", "--only", "max_pool1d"]) == 0
    out = capsys.readouterr().out
    assert "1 of 1" in out and out.rstrip().endswith("all checks passed")


def test_check_fails_on_a_wrong_kernel(capsys, monkeypatch):
    right = F.conv1d
    monkeypatch.setattr(F, "conv1d", lambda x, *args, **kwargs: right(x, *args, **kwargs) * 1.001)
    assert cli.main(["check", "--only", "conv1d"]) == 1
    assert "FAILED cpu" in capsys.readouterr().out


def test_check_of_nothing_fails(capsys):
    assert cli.main(["check", "--only", "no such case"]) == 1


def test_nan_does_not_pass_a_check(monkeypatch):
    case = check.CASES[0]
    monkeypatch.setattr(
        F, case.function, lambda x, w, *args, **kwargs: torch.nn.functional.conv1d(x * torch.nan, w)
    )
    for name in ("exact", "close"):
        try:
            check.CHECKS[name](case, None, "cpu")
        except Exception:
            continue
        raise AssertionError(f"{name} let NaN pass")
