"""Acceptance values of the course's four functions, and what the article's listing gets wrong."""

import numpy as np
import pytest
import torch

from torch_naiveconv import cs231n
from torch_naiveconv import functional as F

VARIANTS = ["naive", "fast"]


def rel_error(x, y):
    return np.max(np.abs(x - y) / np.maximum(1e-8, np.abs(x) + np.abs(y)))


def course(name, variant):
    return getattr(cs231n, f"{name}_{variant}")


def close(x, y, tolerance=1e-12):
    return abs(x - y) <= tolerance * max(1.0, abs(y))


# fmt: off
A1_FULL = np.array([
    [[[-0.08759808612440192, -0.10987780640412217], [-0.18387191755612808, -0.2109216047110784]],
     [[0.2102708870077291, 0.216610967979389], [0.22847626058152373, 0.23004637467795364]],
     [[0.5081398601398601, 0.5430997423629003], [0.6408244387191755, 0.6710143540669855]]],
    [[[-0.9805358851674643, -1.031435406698565], [-1.1912889216047111, -1.2469584100110418]],
     [[0.6910835480309164, 0.6688038277511961], [0.5948097165991902, 0.56776002944424]],
     [[2.3627029812292974, 2.369043062200957], [2.3809083548030916, 2.3824784688995213]]]])
# fmt: on


@pytest.mark.parametrize("variant", VARIANTS)
def test_a1_conv_forward(variant):
    x = np.linspace(-0.1, 0.5, num=96).reshape(2, 3, 4, 4)
    w = np.linspace(-0.2, 0.3, num=144).reshape(3, 3, 4, 4)
    b = np.linspace(-0.1, 0.2, num=3)
    out, _ = course("conv_forward", variant)(x, w, b, {"stride": 2, "pad": 1})
    assert isinstance(out, np.ndarray)
    assert rel_error(out, A1_FULL) < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
def test_a2_conv_backward(variant):
    np.random.seed(231)  # noqa: NPY002
    x, w = np.random.randn(4, 3, 5, 5), np.random.randn(2, 3, 3, 3)  # noqa: NPY002
    b, dout = np.random.randn(2), np.random.randn(4, 2, 5, 5)  # noqa: NPY002
    _, cache = course("conv_forward", variant)(x, w, b, {"stride": 1, "pad": 1})
    dx, dw, db = course("conv_backward", variant)(dout, cache)
    expected_dx = [2.020226481106262, 1.3155724400168536, -3.1508785411398392,
                   3.2389219689824182, -4.012148443193525]  # fmt: skip
    expected_dw = [[3.7408322880511222, -1.1173693226760237, 5.650084752915142],
                   [-19.119629889665696, 5.654060373385501, 4.531247245716861],
                   [-3.632933797933478, 3.7616908691345534, 7.2047208679354044]]  # fmt: skip
    assert rel_error(dx[0, 0, 0], np.array(expected_dx)) < 1e-12
    assert rel_error(dw[0, 0], np.array(expected_dw)) < 1e-12
    assert rel_error(db, np.array([0.47050388352978434, 1.800073277599659])) < 1e-12
    assert close(dx.sum(), -25.297364850389357) and close(dw.sum(), -58.84515791476802)
    assert close(np.abs(dx).sum(), 755.2873712405383)
    assert close(np.abs(dw).sum(), 398.91399100820826)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a3_max_pool_forward(variant):
    x = np.linspace(-0.3, 0.4, 96).reshape(2, 3, 4, 4)
    pool = {"pool_height": 2, "pool_width": 2, "stride": 2}
    out, _ = course("max_pool_forward", variant)(x, pool)
    assert np.array_equal(out, x[:, :, 1::2, 1::2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a4_max_pool_backward(variant):
    np.random.seed(231)  # noqa: NPY002
    x, dout = np.random.randn(3, 2, 8, 8), np.random.randn(3, 2, 4, 4)  # noqa: NPY002
    pool = {"pool_height": 2, "pool_width": 2, "stride": 2}
    _, cache = course("max_pool_forward", variant)(x, pool)
    dx = course("max_pool_backward", variant)(dout, cache)
    assert close(dx.sum(), 0.164278867748058) and close(dout.sum(), 0.164278867748058)
    assert close(np.abs(dx).sum(), 81.8960676189007)
    assert np.count_nonzero(dx) == 96


def _conv_relu(variant, shape, dout_shape, pool):
    """The course's sandwich layers; returns dx, dw, db."""
    np.random.seed(231)  # noqa: NPY002
    x, w = np.random.randn(*shape), np.random.randn(3, 3, 3, 3)  # noqa: NPY002
    b, dout = np.random.randn(3), np.random.randn(*dout_shape)  # noqa: NPY002
    conv, conv_cache = course("conv_forward", variant)(x, w, b, {"stride": 1, "pad": 1})
    relu = np.maximum(conv, 0)
    if pool:
        out, pool_cache = course("max_pool_forward", variant)(
            relu, {"pool_height": 2, "pool_width": 2, "stride": 2}
        )
        assert out.shape == dout.shape
        dout = course("max_pool_backward", variant)(dout, pool_cache)
    return course("conv_backward", variant)(dout * (conv > 0), conv_cache)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a5_conv_relu_pool(variant):
    dx, dw, db = _conv_relu(variant, (2, 3, 16, 16), (2, 3, 8, 8), True)
    assert close(dx.sum(), -114.1076012502073) and close(dw.sum(), -122.91088379202466)
    expected = [-21.233217658402417, -0.5568389041543909, -0.09641202456809528]
    assert rel_error(db, np.array(expected)) < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
def test_a6_conv_relu(variant):
    dx, dw, db = _conv_relu(variant, (2, 3, 8, 8), (2, 3, 8, 8), False)
    assert close(dx.sum(), -0.5348087553747547) and close(dw.sum(), 70.09353243009781)
    expected = [-0.35896795152764915, 8.859714281135098, -0.7160455074868355]
    assert rel_error(db, np.array(expected)) < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
def test_a7_the_courses_benchmark(variant):
    np.random.seed(231)  # noqa: NPY002
    x, w = np.random.randn(100, 3, 31, 31), np.random.randn(25, 3, 3, 3)  # noqa: NPY002
    b, dout = np.random.randn(25), np.random.randn(100, 25, 16, 16)  # noqa: NPY002
    out, cache = course("conv_forward", variant)(x, w, b, {"stride": 2, "pad": 1})
    assert out.shape == (100, 25, 16, 16)
    assert close(out.sum(), 55154.77602711192)
    expected = [1.8824423661826122, -0.4703491161275438, -1.7321992811760194]
    assert rel_error(out[0, 0, 0, :3], np.array(expected)) < 1e-12
    _, dw, _ = course("conv_backward", variant)(dout, cache)
    assert close(dw.sum(), 2991.3275101803697)


def test_a7_pool_twin():
    np.random.seed(231)  # noqa: NPY002
    x, dout = np.random.randn(100, 3, 32, 32), np.random.randn(100, 3, 16, 16)  # noqa: NPY002
    pool = {"pool_height": 2, "pool_width": 2, "stride": 2}
    naive, naive_cache = cs231n.max_pool_forward_naive(x, pool)
    fast, fast_cache = cs231n.max_pool_forward_fast(x, pool)
    assert np.array_equal(naive, x.reshape(100, 3, 16, 2, 16, 2).max(axis=(3, 5)))
    assert np.array_equal(naive, fast)
    dx = cs231n.max_pool_backward_naive(dout, naive_cache)
    assert np.array_equal(dx, cs231n.max_pool_backward_fast(dout, fast_cache))
    assert close(dx.sum(), dout.sum(), 1e-9)


def test_a9_three_layer_net_overfits():
    """conv 7x7 - relu - 2x2 pool - affine - relu - affine: first loss log(10), then 100 images."""
    from torch import nn

    import torch_naiveconv as tn

    torch.manual_seed(0)
    model = nn.Sequential(
        tn.Conv2d(3, 32, 7, padding=3),
        nn.ReLU(),
        tn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )
    images, labels = torch.randn(100, 3, 16, 16), torch.arange(100) % 10
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=1e-3) if p.dim() > 1 else p.zero_()
    first = nn.functional.cross_entropy(model(images), labels)
    assert abs(first.item() - np.log(10)) < 1e-3
    with torch.no_grad():
        for layer in model:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    accuracy = (model(images).argmax(1) == labels).float().mean().item()
    assert accuracy == 1.0


def test_a11_image_processing_with_an_integer_bias():
    x = np.zeros((1, 3, 6, 6))
    x[0, 0], x[0, 1] = 200, 100
    x[0, 2, :3], x[0, 2, 3:] = 50, 150
    w = np.zeros((2, 3, 3, 3))
    w[0, :, 1, 1] = [0.3, 0.6, 0.1]
    w[1, 2] = [[1, 2, 1], [0, 0, 0], [-1, -2, -1]]
    out, _ = cs231n.conv_forward_naive(x, w, np.array([0, 128]), {"stride": 1, "pad": 1})
    assert np.allclose(out[0, 0, :3], 125, rtol=0, atol=1e-12)
    assert np.allclose(out[0, 0, 3:], 135, rtol=0, atol=1e-12)
    dark, bright, last = [-22, *[-72] * 4, -22], [-172, *[-272] * 4, -172], [578, *[728] * 4, 578]
    edge = [dark, [128] * 6, bright, bright, [128] * 6, last]
    assert out[0, 1].tolist() == edge


# ---- small cases by hand -----------------------------------------------------------------------


def test_b1_textbook_conv_and_pool():
    x = torch.arange(9.0).view(1, 1, 3, 3)
    k = torch.arange(4.0).view(1, 1, 2, 2)
    assert F.conv2d(x, k)[0, 0].tolist() == [[19, 25], [37, 43]]
    assert F.max_pool2d(x, 2, 1)[0, 0].tolist() == [[4, 5], [7, 8]]
    y = torch.arange(16.0).view(1, 1, 4, 4)
    assert F.max_pool2d(y, 3, 2, 1)[0, 0].tolist() == [[5, 7], [13, 15]]
    wide = F.max_pool2d(y, (2, 3), (2, 3), (1, 2))
    assert wide[0, 0].tolist() == [[0, 3], [8, 11], [12, 15]]


def test_b2_the_animation_with_the_right_numbers():
    image = [[2, 2, 3, 3, 3], [0, 1, 3, 0, 3], [2, 3, 0, 1, 3], [3, 3, 2, 1, 2], [3, 3, 0, 2, 3]]
    kernel = [[2, 0, 1], [1, 0, 0], [0, 1, 1]]
    out = F.conv2d(
        torch.tensor(image).view(1, 1, 5, 5), torch.tensor(kernel).view(1, 1, 3, 3), None, 2, 1
    )
    assert out[0, 0].tolist() == [[1, 5, 6], [7, 8, 3], [3, 10, 4]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [([3.0, 0, 1, 2, 0], [0.7, 0, 0, 0.9, 0]), ([3.0, 0, 4, 2, 0], [0, 0, 0.7 + 0.9, 0, 0])],
)
def test_b5_pool_1d_gradients(row, expected):
    x = torch.tensor(row, dtype=torch.float64).view(1, 1, 5).requires_grad_()
    F.max_pool1d(x, 3, 2).backward(torch.tensor([[[0.7, 0.9]]], dtype=torch.float64))
    assert x.grad[0, 0].tolist() == expected


def test_b7_gradients_of_one_output():
    x = torch.arange(16.0).view(1, 1, 4, 4).requires_grad_()
    w = torch.tensor([[[[1.0, 2], [3, 4]]]], requires_grad=True)
    F.conv2d(x, w)[0, 0, 0, 0].backward()
    assert w.grad[0, 0].tolist() == [[0, 1], [4, 5]]
    assert x.grad[0, 0, :2, :2].tolist() == [[1, 2], [3, 4]]
    assert x.grad.sum() == 10


# ---- where the article's listing is wrong ------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_c1_overlapping_windows_add_up(variant):
    x = np.arange(25.0).reshape(1, 1, 5, 5)
    x[0, 0, 2, 2] = 100
    pool = {"pool_height": 3, "pool_width": 3, "stride": 2}
    _, cache = course("max_pool_forward", variant)(x, pool)
    dx = course("max_pool_backward", variant)(np.array([[[[1.0, 2], [3, 4]]]]), cache)
    assert dx[0, 0, 2, 2] == 10 and dx.sum() == 10


@pytest.mark.parametrize("variant", VARIANTS)
def test_c2_a_tie_has_one_winner(variant):
    pool = {"pool_height": 2, "pool_width": 2, "stride": 2}
    _, cache = course("max_pool_forward", variant)(np.zeros((1, 1, 2, 2)), pool)
    dx = course("max_pool_backward", variant)(np.full((1, 1, 1, 1), 8.0), cache)
    assert dx[0, 0].tolist() == [[8, 0], [0, 0]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_c3_nan_wins_and_gets_the_gradient(variant):
    x = np.array([[[[1.0, np.nan], [2, 3]]]])
    pool = {"pool_height": 2, "pool_width": 2, "stride": 2}
    out, cache = course("max_pool_forward", variant)(x, pool)
    assert np.isnan(out).all()
    dx = course("max_pool_backward", variant)(np.ones((1, 1, 1, 1)), cache)
    assert dx[0, 0].tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [(6, 1, 2, 3), (7, 1, 2, 4), (32, 1, 2, 16), (54, 3, 2, 27), (4, 1, 2, 2)],
)
def test_c4_ceil_mode_sizes(size, kernel, stride, expected):
    x = torch.zeros(1, 1, size)
    assert F.max_pool1d(x, kernel, stride, ceil_mode=True).shape[-1] == expected


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_c5_negative_integers(memory_format):
    x = (torch.arange(24).view(1, 1, 4, 6) - 12).contiguous(memory_format=memory_format)
    assert F.max_pool2d(x, 2)[0, 0].tolist() == [[-5, -3, -1], [7, 9, 11]]


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [
        (6, 3, 2, (3, 0, 1)),
        (224, 7, 2, (112, 2, 3)),
        (28, 1, 3, (10, 0, 0)),
        (5, 2, 1, (5, 0, 1)),
    ],
)
def test_c6_same_padding_with_a_stride(size, kernel, stride, expected):
    out, before, after = expected
    x, w = torch.randn(1, 1, size), torch.randn(1, 1, kernel)
    same = F.conv1d(x, w, stride=stride, padding="same")
    assert same.shape[-1] == out
    assert torch.equal(same, F.conv1d(x, w, stride=stride, padding=((before, after),)))


def test_integer_input_has_a_backward():
    x = np.arange(16).reshape(1, 1, 4, 4)
    pool = {"pool_height": 2, "pool_width": 2, "stride": 2}
    _, cache = cs231n.max_pool_forward_naive(x, pool)
    dx = cs231n.max_pool_backward_naive(np.full((1, 1, 2, 2), 0.5), cache)
    assert dx.dtype == np.float64 and dx.sum() == 2.0
    w, b = np.ones((1, 1, 2, 2)), np.zeros(1)
    _, cache = cs231n.conv_forward_naive(x, w, b, {"stride": 2, "pad": 0})
    dx, dw, db = cs231n.conv_backward_naive(np.full((1, 1, 2, 2), 0.5), cache)
    assert dx.tolist() == np.full((1, 1, 4, 4), 0.5).tolist()
    assert dw.sum() == 0.5 * x.sum() and db.tolist() == [2.0]


def test_a_one_channel_weight_is_not_broadcast():
    with pytest.raises(ValueError, match="3 channels"):
        cs231n.conv_forward_naive(
            np.zeros((1, 3, 4, 4)),
            np.zeros((2, 1, 3, 3)),
            np.zeros(2),
            {"stride": 1, "pad": 1},
        )


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="'pad'"):
        cs231n.conv_forward_naive(
            np.zeros((1, 1, 4, 4)), np.zeros((1, 1, 3, 3)), np.zeros(1), {"stride": 1}
        )
    with pytest.raises(ValueError, match="no output"):
        cs231n.max_pool_forward_naive(
            np.zeros((1, 1, 4, 4)), {"pool_height": 5, "pool_width": 2, "stride": 1}
        )
    with pytest.raises(TypeError, match="numpy array or a Tensor"):
        cs231n.max_pool_forward_naive([[1.0]], {"pool_height": 1, "pool_width": 1, "stride": 1})


def test_tensors_in_tensors_out():
    x, w, b = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4)
    out, cache = cs231n.conv_forward_fast(x, w, b, {"stride": 1, "pad": 1})
    dx, dw, db = cs231n.conv_backward_fast(torch.ones_like(out), cache)
    assert all(isinstance(t, torch.Tensor) for t in (out, dx, dw, db))
    assert dx.shape == x.shape and dw.shape == w.shape and db.shape == b.shape
