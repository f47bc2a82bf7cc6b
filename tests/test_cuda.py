"""On a GPU: every CUDA kernel returns the bits of the CPU's naive row, on any stream and in graphs.

Where there is none, the kernels' bodies are tested by ``test_cuda_emulated.py``.
"""

import cuda_cases
import pytest
import torch

from torch_naiveconv import functional as F
from torch_naiveconv import ops

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not ops.rows("conv", "cuda"), reason="no GPU"
)


@pytest.mark.skipif(not ops.CUDA_LIBRARY.exists(), reason="the CUDA library is not built")
def test_the_library_loads_and_registers():
    torch.ops.load_library(str(ops.CUDA_LIBRARY))
    for name in ("conv", "conv_grad_bias", "max_pool", "max_unpool_gather"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_naiveconv::{name}", "CUDA")
    assert torch.ops.torch_naiveconv.cuda_conv_rows().endswith("naive")


def test_the_random_calls_are_valid():
    assert cuda_cases.disagreements(0, 60, device="cpu") == []


@needs_gpu
@pytest.mark.parametrize("seed", range(8))
def test_generated_calls(seed):
    assert cuda_cases.disagreements(seed, 40) == []


def tensors(device="cuda"):
    x, w = torch.randn(4, 16, 20, 20, device=device), torch.randn(32, 16, 3, 3, device=device)
    return x.requires_grad_(), w.requires_grad_()


@needs_gpu
def test_autograd():
    x, w = tensors("cpu")
    expected = torch.autograd.grad(F.max_pool2d(F.conv2d(x, w), 2).sum(), (x, w))
    x, w = (t.detach().cuda().requires_grad_() for t in (x, w))
    got = torch.autograd.grad(F.max_pool2d(F.conv2d(x, w), 2).sum(), (x, w))
    assert all(map(cuda_cases.same, expected, got))


@needs_gpu
def test_another_stream():
    x, w = tensors()
    expected = F.conv2d(x, w)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = F.conv2d(x * 1, w * 1)
    stream.synchronize()
    assert cuda_cases.same(expected, got)


@needs_gpu
def test_graph_capture():
    x, w = tensors()

    def step():
        y = F.conv2d(x, w, padding=1)
        pooled = F.max_pool2d(y, 2)
        return pooled, *torch.autograd.grad(pooled.sum(), (x, w))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(cuda_cases.same, step(), captured))


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_current():
    x, w = tensors("cuda:1")
    got = F.conv2d(x, w)
    assert got.device == x.device and torch.cuda.current_device() == 0
    assert cuda_cases.same(got, F.conv2d(x.cpu(), w.cpu(), impl="naive"))


@needs_gpu
def test_tensors_of_two_devices_are_refused():
    x, w = tensors()
    with pytest.raises((RuntimeError, ValueError)):
        F.conv2d(x, w.cpu())
    with pytest.raises(RuntimeError, match="different devices"):
        ops.conv(x, w.cpu(), None, [1, 1, 0, 0, 0, 0, 1, 1], 1, "auto")


@needs_gpu
def test_indices_out_of_range_are_dropped():
    x = torch.ones(1, 1, 2, 2, device="cuda")
    indices = torch.tensor([[[[0, -1], [16, 5]]]], device="cuda")
    y = ops.max_unpool(x, indices, [4, 4])
    assert y.sum() == 2 and y[0, 0, 0, 0] == 1 and y[0, 0, 1, 1] == 1
    assert ops.max_unpool_gather(y, indices).sum() == 2
