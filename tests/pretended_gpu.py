"""A GPU that is not there: tensors that say they lie on one, a real one's rules, and what the host waits for.

`pretended_gpu()` makes "cuda:0" exist. Its tensors are CPU tensors of a class of their own, so all numbers are real.
What would go wrong on a GPU goes wrong here too, or is written down:

    another device      an operation on a tensor of the GPU and one of the CPU raises (a number of the CPU may go along)
    waiting             whatever makes the host wait for the device is noted in `waits`; while a graph is captured it
                        raises
    launches            are checked and recorded as they would be on an H200; nothing is computed, results are zeros.
                        With TRITON_INTERPRET=1 they run in the interpreter
    captured graphs     are replayed from their recorded operations and launches, in the same memory
    float8              what torch's GPU operations do not do with it raises

It shows nothing of streams, of memory that is used again too early, or of what a kernel does on a real device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_flatten, tree_map_only

from trine.kernels import launch as launching
from trine.kernels import operation
from trine.kernels.hardware import INTERPRETING
from trine.kernels.target import COMPILED, INTERPRETER, pretend

CUDA = torch.device("cuda", 0)
# The host has to know a value, or how large a result is.
_WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::equal", "aten::bincount",
}  # fmt: skip
# What torch does with float8 on a GPU, beside views.
_FLOAT8 = {
    "aten::copy_", "aten::_to_copy", "aten::_foreach_copy_", "aten::clone", "aten::cat", "aten::zero_",
    "aten::fill_.Scalar", "aten::empty_like", "aten::new_empty", "aten::new_zeros", "aten::zeros_like",
    "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_",
}  # fmt: skip


# What a CPU does not do.
_ON_GPUS_ONLY: dict[str, Any] = {
    "aten::mm.dtype": lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
    "aten::mm.dtype_out": lambda a, b, dtype, *, out: out.copy_(a.to(dtype) @ b.to(dtype)),
    "aten::addmm.dtype_out": lambda c, a, b, dtype, *, out: out.copy_(c + a.to(dtype) @ b.to(dtype)),
}


class GpuTensor(Tensor):
    """A tensor of the pretended GPU; what is computed from it is one too."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        assert _gpu is not None, f"{func} on a tensor of a GPU that is no longer pretended"
        return _gpu.compute(func, args, kwargs or {})

    def tolist(self) -> Any:
        _note("tolist")
        return on_cpu(self).tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("a tensor of a GPU has no numpy array")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GpuTensor({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copy = self.detach().clone()
            memo[id(self)] = Parameter(copy, self.requires_grad) if isinstance(self, Parameter) else copy
        return memo[id(self)]


def on_gpu(x: Tensor) -> Tensor:
    """The same memory as a tensor of the GPU."""
    return x if isinstance(x, GpuTensor) else Tensor._make_subclass(GpuTensor, x, x.requires_grad)


def on_cpu(x: Tensor) -> Tensor:
    """The same memory as a plain tensor, for a test to look at: nobody waits."""
    if not isinstance(x, GpuTensor):
        return x
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


class Gpu:
    """What happened on the pretended GPU since `forget`.

    Attributes:
        waits: what the host waited for, and where.
        launches: of kernels; those of a captured graph when it is captured.
        replays: of captured graphs.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.launches: list[launching.Launch] = []
        self.replays = 0
        self.capturing: list[Callable[[], object]] | None = None
        self._pinned: dict[int, Any] = {}

    def forget(self) -> None:
        self.waits.clear()
        self.launches.clear()
        self.replays = 0

    @property
    def kernels(self) -> Counter[str]:
        """How often each kernel was launched."""
        return Counter(one.kernel.__name__ for one in self.launches)

    def pin(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self._pinned[storage.data_ptr()] = storage
        return x

    def is_pinned(self, x: Tensor) -> bool:
        return not isinstance(x, GpuTensor) and x.untyped_storage().data_ptr() in self._pinned

    def note(self, what: str) -> None:
        """The host waits. Raises RuntimeError where it may not."""
        frame: Any = sys._getframe(1)
        while frame is not None and "/trine/" not in frame.f_code.co_filename:
            frame = frame.f_back
        file = "" if frame is None else frame.f_code.co_filename.rpartition("/trine/")[2]
        where = f"{file}:{frame.f_lineno}" if file else "the test"
        if self.capturing is not None:
            raise RuntimeError(f"{what} at {where} while a graph is captured")
        self.waits.append(f"{what} at {where}")

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation on at least one tensor of the GPU."""
        name = func.name()
        if func.namespace == "trine":
            return torch._library.custom_ops.OPDEFS[name]._init_fn(*args, **kwargs)
        # In inference mode operations come whole that are elsewhere made of others.
        if func._can_decompose() and (result := func.decompose(*args, **kwargs)) is not NotImplemented:
            return result
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        self._check(func, args, kwargs, tensors)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": "cpu"}
        call = _ON_GPUS_ONLY.get(name, func)
        with torch._C._DisableTorchDispatch():
            result = call(*args, **kwargs)
            if "empty" in name:
                result.zero_()
        if name == "aten::_local_scalar_dense":
            return result
        given = {id(x) for x in tensors}
        result = tree_map_only(Tensor, lambda x: x if id(x) in given else on_gpu(x), result)
        if self.capturing is not None:
            self._record(call, args, kwargs, result, tensors)
        return result

    def _check(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
        """Note waits; raise where tensors of two devices meet, or where there is no such operation."""
        name = func.name()
        is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.arguments)
        if any(x.dtype.itemsize == 1 and x.is_floating_point() for x in tensors) and not is_view:
            assert name in _FLOAT8, f"{name} is not implemented for float8"
        if name in ("aten::copy_", "aten::_foreach_copy_"):
            pairs = [(args[0], args[1])] if name == "aten::copy_" else zip(args[0], args[1], strict=True)
            blocks_not = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            for to, origin in pairs:
                # A number that is assigned is made on the device.
                moves = isinstance(to, GpuTensor) != isinstance(origin, GpuTensor) and bool(origin.dim())
                if moves and not (blocks_not and (isinstance(to, GpuTensor) or self.is_pinned(to))):
                    self.note("copy between the devices")
        elif name.startswith(("aten::index.", "aten::index_put", "aten::_index_put_impl")):
            indices = [x for x in args[1] if x is not None]
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                self.note("indexing by a mask")
            if not all(isinstance(x, GpuTensor) for x in indices):
                self.note("indexing by numbers of the host")
            tensors = [args[0], *args[2:3]]
        elif name in _WAITING or (name == "aten::repeat_interleave.Tensor" and kwargs.get("output_size") is None):
            self.note(name)
        if not name.endswith("copy_") and any(x.dim() for x in tensors if not isinstance(x, GpuTensor)):
            found = [("cuda" if isinstance(x, GpuTensor) else "cpu", tuple(x.shape)) for x in tensors]
            raise RuntimeError(f"{name}: expected all tensors on one device, found {found}")

    def _record(self, call: Any, args: Any, kwargs: dict[str, Any], result: Any, tensors: list[Tensor]) -> None:
        """Keep an operation of a graph that is captured; views need none."""
        assert self.capturing is not None
        outputs = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
        known = {x.untyped_storage().data_ptr() for x in tensors}
        writes = getattr(getattr(call, "_schema", None), "is_mutable", True)
        if not writes and all(x.numel() and x.untyped_storage().data_ptr() in known for x in outputs):
            return

        def again() -> None:
            with torch._C._DisableTorchDispatch(), torch.inference_mode():
                new = [x for x in tree_flatten(call(*args, **kwargs))[0] if isinstance(x, Tensor)]
                for old, x in zip(outputs, new, strict=True):
                    if old.data_ptr() != x.data_ptr():
                        old.copy_(x)

        self.capturing.append(again)

    def launched(self, one: launching.Launch) -> None:
        """Check the launch of a kernel, and run it in the interpreter if that is asked for."""
        name, values = one.kernel.__name__, one.arguments
        parameters = [] if INTERPRETING else [(one.name, one.is_constexpr) for one in one.kernel.params]
        unknown = set(values) - {key for key, _ in parameters}
        assert INTERPRETING or not unknown, f"{name} has no parameters {sorted(unknown)}"
        strangers = [key for key, x in values.items() if isinstance(x, Tensor) and not isinstance(x, GpuTensor)]
        assert not strangers, f"{name} got tensors of the CPU: {strangers}"
        assert all(isinstance(size, int) and size >= 0 for size in one.grid), f"{name}: grid {one.grid}"
        assert launching._compare(parameters, values, [], []), f"{name}: Triton would be asked at every launch"
        self.launches.append(one)
        if not INTERPRETING or 0 in one.grid:
            return

        def start() -> None:
            with torch._C._DisableTorchDispatch():
                one.kernel[one.grid](**{key: on_cpu(x) if isinstance(x, Tensor) else x for key, x in values.items()})

        start()
        if self.capturing is not None:
            self.capturing.append(start)


_gpu: Gpu | None = None


def _note(what: str) -> None:
    assert _gpu is not None
    _gpu.note(what)


class _Launches(list[launching.Launch]):
    """A recording that shows each launch to the GPU."""

    def append(self, one: launching.Launch) -> None:
        assert _gpu is not None
        _gpu.launched(one)


class _Graph:
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], object]] = []

    def replay(self) -> None:
        assert _gpu is not None
        _gpu.replays += 1
        for step in self.steps:
            step()


@contextmanager
def _capture(graph: _Graph, **_: Any) -> Iterator[None]:
    """Stands for torch.cuda.graph."""
    assert _gpu is not None
    assert _gpu.capturing is None
    _gpu.capturing = graph.steps
    try:
        yield
    finally:
        _gpu.capturing = None


class _Event:
    """Stands for torch.cuda.Event."""

    def __init__(self, **_: Any) -> None:
        self.recorded = False

    def record(self, *_: Any) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded, "an event that was never recorded"
        _note("Event.synchronize")


def _stream(*_: Any) -> Any:
    """Stands for torch.cuda.Stream and torch.cuda.current_stream: there is but one."""
    return SimpleNamespace(cuda_stream=0, wait_stream=lambda _: None, synchronize=lambda: _note("Stream.synchronize"))


# --- torch's functions that name a device -----------------------------------------------------------------------------

_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like",
)  # fmt: skip
_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def _made(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes tensors, so that it knows of the GPU and of pinned memory."""
    name = make.__name__

    def made(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        assert _gpu is not None
        wanted = device is not None and torch.device(device).type == "cuda"
        assert not (wanted and pin_memory), f"{name}: memory of a GPU cannot be pinned"
        if wanted and "tensor" in name and not isinstance(args[0], GpuTensor):
            _gpu.note(f"{name} of numbers of the host")
        if device is not None:
            args = tuple(on_cpu(x) if isinstance(x, Tensor) else x for x in args)
            kwargs["device"] = "cpu" if wanted else device
        x = make(*args, **kwargs)
        x = _gpu.pin(x) if pin_memory else x
        return on_gpu(x.zero_() if name.startswith("empty") else x) if wanted else x

    return made


_plain_to: Any = Tensor.to


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stands for Tensor.to."""
    places = list(args)
    if places and isinstance(places[0], Tensor):
        places[:1] = [places[0].device, places[0].dtype]
    names_device = bool(places) and (places[0] is None or isinstance(places[0], str | torch.device))
    device = places.pop(0) if names_device else kwargs.pop("device", None)
    dtype = places.pop(0) if places and isinstance(places[0], torch.dtype) else kwargs.pop("dtype", None)
    blocks_not = places.pop(0) if places else kwargs.pop("non_blocking", False)
    copy = places.pop(0) if places else kwargs.pop("copy", False)
    there, dtype = isinstance(x, GpuTensor), dtype or x.dtype
    wanted = there if device is None else torch.device(device).type == "cuda"
    if wanted == there:
        where = {} if device is None or there else {"device": device}
        return _plain_to(x, dtype=dtype, copy=copy, **where, **kwargs)
    assert not (there and blocks_not), "a copy to the CPU that nobody waits for: the host could read it too early"
    if there or not blocks_not:
        _note("copy to the CPU" if there else "copy to the GPU")
    return _Moved.apply(x, dtype)


class _Moved(torch.autograd.Function):
    """A copy on the other device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        copy = _plain_to(on_cpu(x.detach()), dtype, copy=True)
        return copy if isinstance(x, GpuTensor) else on_gpu(copy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Moved.apply(grads[0], ctx.dtype), None


_TENSOR: dict[str, Any] = {
    "to": _to,
    "cpu": lambda x: _to(x, "cpu"),
    "cuda": lambda x: _to(x, CUDA),
    "pin_memory": lambda x: torch.empty_like(x, pin_memory=True).copy_(x),
    "is_pinned": lambda x: _gpu is not None and _gpu.is_pinned(x),
}
_PROPERTIES = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, total_memory=2**30, multi_processor_count=132,
    shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=227 * 1024,
)  # fmt: skip
_MODULE: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "device": lambda _: nullcontext(),
    "get_device_name": lambda *_: "NVIDIA H200",
    "get_device_capability": lambda *_: (9, 0),
    "get_device_properties": lambda *_: _PROPERTIES,
    "mem_get_info": lambda *_: (2**26, 2**30),
    "memory_allocated": lambda *_: 0,
    "max_memory_allocated": lambda *_: 2**16,
    "reset_peak_memory_stats": lambda *_: None,
    "empty_cache": lambda: None,
    "synchronize": lambda *_: _note("torch.cuda.synchronize"),
    "current_stream": _stream,
    "Stream": _stream,
    "stream": lambda _: nullcontext(),
    "Event": _Event,
    "CUDAGraph": _Graph,
    "graph": _capture,
    "graph_pool_handle": lambda: (0, 1),
    "is_current_stream_capturing": lambda: _gpu is not None and _gpu.capturing is not None,
    "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda *_: None,
    "manual_seed_all": lambda _: None,
    "_lazy_init": lambda: None,
}


@contextmanager
def pretended_gpu() -> Iterator[Gpu]:
    """See the module. `model.to("cuda")` moves a model there."""
    global _gpu
    assert _gpu is None
    gpu = Gpu()
    classes = frozenset({*operation._TENSORS, GpuTensor})
    patches: list[tuple[Any, str, Any]] = [
        *((torch.cuda, name, value) for name, value in _MODULE.items()),
        *((torch, name, _made(getattr(torch, name))) for name in _FACTORIES),
        *((Tensor, name, _made(getattr(Tensor, name))) for name in _METHODS),
        *((Tensor, name, value) for name, value in _TENSOR.items()),
        # So that operations run without the dispatcher, as they do on a GPU.
        (operation, "_TENSORS", classes),
        (operation, "_ITEMS", classes | {bool, float}),
        (operation, "_known", {}),
    ]
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.callback(launching._recorder.reset, launching._recorder.set(_Launches()))
        stack.enter_context(pretend(INTERPRETER if INTERPRETING else COMPILED["sm_90"]))
        # Otherwise parameters keep their class when a model is moved.
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        torch.__future__.set_swap_module_params_on_conversion(True)
        # A run on a GPU leaves torch in its deterministic mode.
        stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        for owner, name in (
            (torch.backends.cudnn, "benchmark"),
            (torch.utils.deterministic, "fill_uninitialized_memory"),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
        _gpu = gpu
        try:
            yield gpu
        finally:
            _gpu = None
