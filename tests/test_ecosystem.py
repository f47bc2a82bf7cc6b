"""Determinism switches, FLOP counts, profiler names, DataLoader workers, threads, torch.fx."""

import threading

import pytest
import torch
import torch.nn.functional as TF
from torch.utils.flop_counter import FlopCounterMode

import torch_naiveconv as tn
from torch_naiveconv import functional as F


def everything(x, w):
    """One call of every operator, forward and backward."""
    y = F.conv2d(x, w, w.new_zeros(w.shape[0]).requires_grad_(), padding=1)
    z = F.conv_transpose2d(y, w)
    pooled, indices = F.max_pool2d(z, 2, return_indices=True)
    restored = F.max_unpool2d(pooled, indices, 2, output_size=z.shape)
    (grad,) = torch.autograd.grad(restored.square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    return x.grad


def test_deterministic_algorithms():
    x, w = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 3, 3)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            everything(x.clone().requires_grad_(), w.clone().requires_grad_())
        for mode in F.PADDING_MODES:
            F.conv2d(x.clone().requires_grad_(), w, padding=1, padding_mode=mode).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("arguments", [{}, {"stride": 2, "padding": 1}, {"dilation": 2}])
def test_flops(arguments):
    counts = []
    for module in (F, TF):
        x, w = (
            torch.randn(2, 3, 8, 9, requires_grad=True),
            torch.randn(4, 3, 3, 3, requires_grad=True),
        )
        with FlopCounterMode(display=False) as counter:
            module.conv2d(x, w, **arguments).sum().backward()
        transposed = torch.randn(3, 4, 3, 3, requires_grad=True)
        with counter:
            module.conv_transpose2d(x, transposed, **arguments).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_profiler_names():
    with torch.profiler.profile() as profile:
        everything(
            torch.randn(1, 3, 8, 8, requires_grad=True), torch.randn(3, 3, 3, 3, requires_grad=True)
        )
    names = {event.key for event in profile.key_averages()}
    for name in (
        "conv",
        "conv_grad_input",
        "conv_grad_weight",
        "conv_grad_bias",
        "max_pool",
        "max_pool_scatter",
        "max_unpool",
        "max_unpool_gather",
    ):
        assert f"torch_naiveconv::{name}" in names
    assert "ConvBackward" in names
    assert "MaxPoolBackward" in names


class Convolved(torch.utils.data.Dataset):
    """A data set that convolves in the worker."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        x = torch.full((1, 1, 40, 40), float(i + 1))
        return F.max_pool2d(F.conv2d(x, torch.ones(1, 1, 3, 3)), 2)[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(method):
    F.conv2d(torch.randn(4, 8, 40, 40), torch.randn(8, 8, 3, 3))  # threads exist before the fork
    loader = torch.utils.data.DataLoader(
        Convolved(), num_workers=2, multiprocessing_context=method, timeout=120
    )
    assert [batch.unique().item() for batch in loader] == [9.0, 18.0, 27.0, 36.0]


def test_many_threads_at_once():
    x, w = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 3, 3)
    expected = everything(x.clone().requires_grad_(), w.clone().requires_grad_())
    results, start = [None] * 8, threading.Barrier(8)

    def work(i):
        start.wait()
        for _ in range(5):
            results[i] = everything(x.clone().requires_grad_(), w.clone().requires_grad_())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in results)


class Tagged(torch.Tensor):
    """A subclass that adds nothing."""


def test_tensor_subclasses():
    x, w = torch.randn(1, 3, 8, 8), torch.randn(3, 3, 3, 3)
    tagged = x.as_subclass(Tagged)
    y = F.max_pool2d(F.conv2d(tagged, w), 2)
    assert isinstance(y, Tagged)
    assert torch.equal(y.as_subclass(torch.Tensor), F.max_pool2d(F.conv2d(x, w), 2))


def test_meta_tensors():
    x, w = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 3, 3)
    expected = F.max_pool2d(F.conv2d(x, w, padding=1), 2)
    leaf = x.to("meta").requires_grad_()
    got = F.max_pool2d(F.conv2d(leaf, w.to("meta"), padding=1), 2)
    assert (got.shape, got.stride(), got.dtype) == (
        expected.shape,
        expected.stride(),
        expected.dtype,
    )
    got.sum().backward()
    assert leaf.grad.shape == x.shape


def test_convert_parametrized_layers():
    from torch.nn.utils import parametrizations, parametrize

    torch.manual_seed(0)
    layer = parametrizations.weight_norm(torch.nn.Conv1d(2, 3, 3))
    x = torch.randn(1, 2, 9)
    expected = layer(x)
    assert isinstance(tn.convert(layer), tn.Conv1d)
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original0.grad is not None
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is tn.Conv1d
    again = parametrizations.weight_norm(layer)
    assert not isinstance(tn.convert(again, back=True), tn.Conv1d)
    torch.testing.assert_close(again(x), expected)


def small_model():
    return torch.nn.Sequential(
        tn.Conv2d(2, 3, 3, padding="same"), tn.MaxPool2d(2), tn.ConvTranspose2d(3, 2, 2)
    )


def test_fx_symbolic_trace():
    model, x = small_model(), torch.randn(1, 2, 8, 8)
    traced = torch.fx.symbolic_trace(model)
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert {F.conv2d, F.max_pool2d, F.conv_transpose2d} <= called
    assert torch.equal(traced(x), model(x))


def test_torchscript_is_refused():
    with pytest.raises(RuntimeError, match=r"use torch\.export"):
        torch.jit.script(small_model())
    for layer in small_model():
        with pytest.raises(RuntimeError, match=r"use torch\.export"):
            torch.jit.trace(layer, torch.randn(1, layer.__dict__.get("in_channels", 1), 8, 8))


def test_convert_lazy_layers():
    layer = tn.convert(torch.nn.Sequential(torch.nn.LazyConv2d(4, 3)))
    layer(torch.randn(1, 2, 5, 5))
    assert type(layer[0]) is tn.Conv2d
