"""The benchmark command on tiny layers: its results, its files, and that it checks bits."""

import json

import pytest

from torch_naiveconv import __main__ as cli
from torch_naiveconv import functional as F
from torch_naiveconv.commands import bench
from torch_naiveconv.layers import CONV_LAYERS, POOL_LAYERS, ConvLayer, PoolLayer

PLAIN = ConvLayer("plain", 2, 4, (6, 5), 6, (3, 3), (1, 1), (1, 1), (1, 1), 1)
GROUPED = ConvLayer("grouped", 1, 6, (5, 5), 12, (3, 2), (2, 1), (1, 0), (1, 2), 3)
LINE = ConvLayer("line", 1, 2, (9,), 2, (3,), (2,), (0,), (1,), 2)
POOLED = PoolLayer("pooled", 1, 3, (6, 6), (2, 2), (2, 2), (0, 0), (1, 1), False)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench, "CONV_LAYERS", [PLAIN, GROUPED, LINE])
    monkeypatch.setattr(bench, "POOL_LAYERS", [POOLED])
    monkeypatch.setattr(bench, "SECONDS_PER_SAMPLE", 0.0)
    monkeypatch.setattr(bench, "COPIED_BYTES", 1 << 16)


def test_every_direction_is_timed_and_written(tiny, tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert cli.main(["bench", "--rounds", "1", "--threads", "1", "2", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert len(written["results"]) == 2 * (3 * 3 + 3)
    for result in written["results"]:
        assert result["ours"] > 0 and result["torch"] > 0 and result["limit"] > 0
        assert result["ratio"] == result["torch"] / result["ours"]
    out = capsys.readouterr().out
    assert "geometric mean" in out and "| pooled |" in out


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_channels_last_rows_and_types(tiny, dtype, capsys):
    command = ["bench", "--rounds", "1", "--channels-last", "--dtype", dtype]
    assert cli.main([*command, "--impl", *F.implementations("conv2d")]) == 0
    out = capsys.readouterr().out
    assert "channels_last" in out and "| line |" not in out


def test_tiny_calls(tiny, capsys):
    assert cli.main(["bench", "--calls", "--rounds", "1"]) == 0
    assert "| forward and backward | " in capsys.readouterr().out


def test_wrong_bits_are_not_timed(tiny, monkeypatch):
    right = F.conv2d
    monkeypatch.setattr(
        F, "conv2d", lambda *args, impl=None: right(*args, impl=impl) * (1 if impl else 1.0000002)
    )
    with pytest.raises(SystemExit, match="plain forward auto: not the bits of naive"):
        cli.main(["bench", "--ops", "conv2d", "--rounds", "1"])


def test_nothing_to_time_is_an_error(tiny):
    assert cli.main(["bench", "--layers", "no such layer"]) == 2


def test_plot(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench.png"
    assert cli.main(["bench", "--rounds", "1", "--ops", "conv1d", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_multiply_adds():
    """Of ResNet-50's first layer, from its paper's shapes."""
    first = CONV_LAYERS[0]
    assert first.output_size == (112, 112)
    assert first.multiply_adds == 8 * 64 * 112 * 112 * 3 * 49
    assert len({layer.name for layer in [*CONV_LAYERS, *POOL_LAYERS]}) == 39
