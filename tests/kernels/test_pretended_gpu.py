"""The pretended GPU itself: it refuses and counts what a real one would, and its graphs compute again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trine.kernels.launch import launch
from trine.kernels.multi_tensor import upload
from trine.kernels.rms_norm import rms_norm, rms_norm_reference
from trine.kernels.tuning import Config

Pretend = Callable[[], AbstractContextManager[Any]]


def test_tensors_of_two_devices_do_not_meet(pretended_gpu: Pretend) -> None:
    with pretended_gpu():
        x = torch.ones(3, device="cuda")
        assert (x.device, x.is_cuda, (x * 2).device.type) == (torch.device("cuda", 0), True, "cuda")
        for call in (lambda: x + torch.ones(3), lambda: torch.cat([x, torch.ones(3)])):
            with pytest.raises(RuntimeError, match=r"expected all tensors on one device"):
                call()
        x += torch.tensor(2.0)  # a number may come along
        assert x.tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("waits", "call"),
    [
        (0, lambda x: upload([1, 2], torch.int64, x.device)),
        (0, lambda x: torch.ones(2).to(x.device, non_blocking=True)),
        (0, lambda x: torch.empty(4, pin_memory=True).copy_(x, non_blocking=True)),
        (0, lambda x: x[x.argmax()[None]] + x[1:].sum()),
        (0, lambda x: x.masked_fill_(x > 2, 0.0)),
        (1, lambda x: torch.ones(2).to(x.device)),
        (1, lambda x: torch.tensor([1.0], device=x.device)),
        (1, lambda x: torch.empty(4).copy_(x, non_blocking=True)),
        (1, lambda x: x[x.argmax()]),
        (1, lambda x: x[[0, 2]]),
        (1, lambda x: x[x > 2]),
        (1, lambda x: x.nonzero()),
        (1, lambda x: bool((x > 2).any())),
        (1, lambda x: x.cpu()),
        (1, lambda x: x.sum().item()),
        (1, lambda x: torch.cuda.synchronize()),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_what_the_host_waits_for_is_counted(
    pretended_gpu: Pretend, waits: int, call: Callable[[Tensor], Any], inference: bool
) -> None:
    with pretended_gpu() as gpu, torch.inference_mode(inference):
        x = torch.arange(4.0, device="cuda")
        gpu.forget()
        call(x)
        assert len(gpu.waits) == waits, gpu.waits


def test_operations_launch_their_kernels_with_gradients(pretended_gpu: Pretend) -> None:
    with pretended_gpu() as gpu:
        layer = nn.Linear(8, 8).to("cuda")
        rms_norm(layer(torch.randn(4, 8, device="cuda")), layer.bias, 1e-6).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.is_cuda
        assert gpu.kernels == {"_rows_kernel": 1, "_backward_kernel": 1}
        with pytest.raises(AssertionError, match=r"tensors of the CPU: \['x_ptr'\]"):
            launch(gpu.launches[0].kernel, (1,), Config({}), {"x_ptr": torch.ones(4)})
        with pytest.raises(AssertionError, match=r"no parameters \['other'\]"):
            launch(gpu.launches[0].kernel, (1,), Config({}), {"other": torch.ones(4, device="cuda")})
    assert not torch.cuda.is_available()
    x, weight = torch.randn(4, 8), torch.ones(8)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))


def test_a_captured_graph_computes_again_in_its_memory_and_waits_for_nothing(pretended_gpu: Pretend) -> None:
    with pretended_gpu():
        x, total = torch.zeros(2, 3, device="cuda"), torch.zeros(3, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = (x.t() + 1).t()
            total.add_(y[0])
            with pytest.raises(RuntimeError, match=r"while a graph is captured"):
                y.sum().item()
        for value in (2.0, 5.0):
            x.fill_(value)
            graph.replay()
            assert y.tolist() == [[value + 1] * 3] * 2
        assert total.tolist() == [1.0 + 3.0 + 6.0] * 3


def test_float8_is_indexed_and_not_computed_with(pretended_gpu: Pretend) -> None:
    with pretended_gpu():
        x = torch.ones(4, 2, device="cuda").to(torch.float8_e4m3fn)
        rows = upload([1, 0], torch.int64, x.device)
        x[rows] = x[2:].clone()
        assert x[rows].view(torch.int8).shape == (2, 2)
        for call in (lambda: x + x, lambda: x.index_copy_(0, rows, x[:2])):
            with pytest.raises(AssertionError, match=r"is not implemented for float8"):
                call()
