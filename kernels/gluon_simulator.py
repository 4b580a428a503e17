"""The source of a Gluon kernel for Hopper, run on the CPU: roles as threads, copies and products that happen late.

Gluon has no interpreter. This one knows what two kernels need (`attention/hopper_kernel.py` and
`quantized/hopper_kernel.py`), and models what goes wrong in such kernels, which numbers alone would not show:

- One role runs at a time; at every step that others can see, a seeded draw decides who goes on. A wait lets its role
  go on once the phase of the named parity is complete. Where nobody can go on, that is a deadlock.
- A copy by TMA fills its target with NaN when it is issued, and with the data at some later step. One to memory reads
  at some later step what must be the same until it has been waited for, and what was fenced since it was written.
- A product by wgmma must not be used before it has been waited for, but as the sums of the next, and its operands in
  shared memory must hold the same numbers from the issue to the wait.
- Barriers count arrivals and bytes and refuse too many of them.

Functions are rebuilt from the code of the jitted ones, with other globals. Layouts are kept but not checked: that is
the compiler's part.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from types import FunctionType, MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from trine.kernels.gluon_names import gl
from trine.kernels.gluon_values import Barrier, Pointer, Product, Scalar, Shared, Value
from trine.kernels.launch import Launch

MAX_STEPS = 1_000_000


class StoppedError(Exception):
    """Raised in the other roles once one has failed."""


class Machine:
    """One multiprocessor that runs the programs of a launch one after another."""

    def __init__(self, seed: int, arrivals: Callable[[int], int] = lambda count: count) -> None:
        self.random, self.arrivals = random.Random(seed), arrivals
        self.turn = threading.Condition()
        self.ready: dict[int, Callable[[], bool]] = {}
        self.copies: list[Callable[[], None]] = []
        self.running: int | None = None
        self.failure: BaseException | None = None
        self.role = threading.local()
        self.program, self.num_programs, self.steps = 0, 1, 0
        self.registers: tuple[int, ...] = ()

    # --- who goes on ---

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others go on; return when `ready` holds and this role is drawn. Outside of roles nothing happens."""
        me = getattr(self.role, "number", None)
        if me is None:
            return
        with self.turn:
            self.ready[me] = ready
            self._draw()
            self._wait_for_turn(me)

    def _wait_for_turn(self, me: int) -> None:
        assert self.turn.wait_for(lambda: self.running == me or self.failure is not None, timeout=60)
        if self.failure is not None:
            raise StoppedError

    def _draw(self) -> None:
        """Do late copies and choose a role that can go on."""
        self.running = None
        while self.ready and self.failure is None:
            self.steps += 1
            able = [role for role, ready in self.ready.items() if ready()]
            choice = self.random.randrange(len(able) + len(self.copies)) if able or self.copies else None
            if choice is None or self.steps > MAX_STEPS:
                self.failure = AssertionError(f"deadlock: roles {sorted(self.ready)} wait for good")
            elif choice < len(able):
                self.running = able[choice]
                break
            else:
                try:
                    self.copies.pop(choice - len(able))()
                except AssertionError as error:
                    self.failure = error
        self.turn.notify_all()

    def specialize(self, parts: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
        self.registers = tuple(registers)

        def run(number: int, function: Any, arguments: tuple[Any, ...]) -> None:
            self.role.number, self.role.issued, self.role.storing, self.role.unfenced = number, [], [], False
            try:
                with self.turn:
                    self._wait_for_turn(number)
                function(*arguments)
                assert not self.role.issued, "a role ends with products that nobody waited for"
                assert not self.role.storing, "a role ends with copies to memory that nobody waited for"
            except StoppedError:
                pass
            except BaseException as error:
                self.failure = self.failure or error
            finally:
                with self.turn:
                    del self.ready[number]
                    self._draw()

        self.ready = {number: lambda: True for number in range(len(parts))}
        threads = [threading.Thread(target=run, args=(n, *part), daemon=True) for n, part in enumerate(parts)]
        for thread in threads:
            thread.start()
        with self.turn:
            self._draw()
        for thread in threads:
            thread.join(120)
        if self.failure is not None:
            raise self.failure
        assert not self.copies, "copies are under way at the end"

    # --- barriers and copies ---

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = self.arrivals(count)

    def wait(self, barrier: Barrier, parity: int) -> None:
        self.pause(lambda: barrier.passed(parity))

    def arrive(self, barrier: Barrier, count: int = 1, pred: bool = True) -> None:
        self.pause()
        if pred:
            barrier.arrive(count)

    def expect(self, barrier: Barrier, num_bytes: int) -> None:
        self.pause()
        barrier.arrive(1, num_bytes)

    def load(self, desc: Any, place: list[int], barrier: Barrier, target: Shared) -> None:
        block = torch.zeros(desc.block_shape)
        here = tuple(
            slice(at, min(at + size, end)) for at, size, end in zip(place, block.shape, desc.base.shape, strict=True)
        )
        piece = desc.base[here].float()
        block[tuple(slice(size) for size in piece.shape)] = piece
        assert target.data.shape == block.shape
        target.data.fill_(float("nan"))

        def finish() -> None:
            target.data.copy_(block)
            barrier.complete(block.numel() * desc.base.element_size())

        self.copies.append(finish)
        self.pause()

    def wrote(self) -> None:
        self.role.unfenced = True
        self.pause()

    def fence(self) -> None:
        self.role.unfenced = False

    def store(self, desc: Any, place: list[int], source: Shared) -> None:
        assert not self.role.unfenced, "shared memory is copied by TMA without a fence after it was written"
        issued, done = source.data.clone(), [False]

        def finish() -> None:
            assert torch.equal(source.data, issued), "shared memory changed while it was copied to memory"
            target = desc.base[tuple(slice(at, at + size) for at, size in zip(place, issued.shape, strict=True))]
            assert bool(target.isnan().all()), "a result is written twice"
            target.copy_(issued[tuple(slice(size) for size in target.shape)])
            done[0] = True

        self.role.storing.append(done)
        self.copies.append(finish)
        self.pause()

    def await_stores(self, outstanding: int) -> None:
        storing = self.role.storing
        self.pause(lambda: sum(not done[0] for done in storing) <= outstanding)
        storing[:] = [done for done in storing if not done[0]]

    # --- products ---

    def multiply(self, a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async
        assert isinstance(acc, Value)
        total = a.data @ b.data
        if use_acc:
            total = total + (acc.sums if isinstance(acc, Product) else acc.data)
        operands = [(x.data, x.data.clone()) for x in (a, b) if isinstance(x, Shared)]
        product = Product(total, acc.layout, operands)
        self.role.issued.append(product)
        self.pause()
        return product

    def await_products(self, outstanding: int, deps: tuple[Any, ...]) -> Any:
        self.pause()
        while len(self.role.issued) > outstanding:
            self.role.issued.pop(0).retire()
        return deps[0] if len(deps) == 1 else deps


def _language(machine: Machine) -> SimpleNamespace:
    """What kernels call `gl`."""

    def unary(function: Callable[[Tensor], Tensor]) -> Callable[[Value], Value]:
        return lambda x: Value(function(x.data), x.layout)

    def reduced(function: Callable[[Tensor, int], Tensor]) -> Callable[[Value, int], Value]:
        return lambda x, axis: Value(function(x.data, axis), layouts.SliceLayout(axis, x.layout))

    def minimum(a: Any, b: Any) -> Any:
        return a.apply(lambda x, y: x.clamp(max=y), b) if isinstance(a, Value) else Scalar(min(a, b))

    def where(condition: Value, x: Any, y: Any) -> Value:
        parts = [part.data if isinstance(part, Value) else torch.tensor(part) for part in (x, y)]
        return Value(torch.where(condition.data, parts[0], parts[1]), condition.layout)

    def load(pointer: Pointer, mask: Value | None = None, other: float = 0.0) -> Any:
        if isinstance(pointer.offset, Value):
            places, layout = pointer.offset.data, pointer.offset.layout
            if mask is None:
                return Value(pointer.memory[places], layout)
            found = pointer.memory[torch.where(mask.data, places, 0)]
            return Value(torch.where(mask.data, found, other), layout)
        number = pointer.memory[pointer.offset]
        return Value(number, None) if number.is_floating_point() else Scalar(number)

    def store(pointer: Pointer, x: Value, mask: Value) -> None:
        mask_data = mask.data.expand(x.data.shape)
        places = pointer.offset.data[mask_data]
        assert bool(pointer.memory[places].isnan().all()), "a result is written twice"
        pointer.memory[places] = x.data[mask_data].to(pointer.memory.dtype)

    def allocate(dtype: Any, shape: list[int], layout: Any) -> Shared:
        if layout == "barrier":
            return Shared([Barrier() for _ in range(shape[0])], dtype, machine.wrote)
        return Shared(torch.full(shape, float("nan")), dtype, machine.wrote)

    def split(x: Value) -> tuple[Value, Value]:
        return Value(x.data[..., 0], x.layout), Value(x.data[..., 1], x.layout)

    layouts = SimpleNamespace(
        SliceLayout=lambda dim, parent: SimpleNamespace(dim=dim, parent=parent),
        NVMMADistributedLayout=lambda *parts: ("mma", *parts),
        DotOperandLayout=lambda *parts: ("operand", *parts),
    )
    return SimpleNamespace(
        **vars(layouts),
        float32=torch.float32,
        int64=torch.int64,
        program_id=lambda axis: Scalar(machine.program),
        num_programs=lambda axis: Scalar(machine.num_programs),
        static_range=range,
        arange=lambda begin, end, layout: Value(torch.arange(begin, end), layout),
        full=lambda shape, value, dtype, layout: Value(torch.full(tuple(shape), value, dtype=dtype), layout),
        zeros=lambda shape, dtype, layout: Value(torch.zeros(tuple(shape), dtype=dtype), layout),
        convert_layout=lambda x, layout: Value(x.data, layout),
        minimum=minimum,
        maximum=lambda a, b: a.apply(torch.maximum, b),
        max=reduced(lambda x, axis: x.amax(axis)),
        sum=reduced(lambda x, axis: x.sum(axis)),
        exp=unary(torch.exp),
        exp2=unary(torch.exp2),
        log2=unary(torch.log2),
        where=where,
        reshape=lambda x, shape: Value(x.data.reshape(shape), x.layout),
        permute=lambda x, order: Value(x.data.permute(order), x.layout),
        split=split,
        load=load,
        store=store,
        allocate_shared_memory=allocate,
        warp_specialize=machine.specialize,
    )


def plain(function: Any, names: Mapping[str, Any] = MappingProxyType({})) -> Callable[..., Any]:
    """The Python function inside a jitted one, with those it calls made plain too and `names` for globals."""
    inner = function.fn
    scope: dict[str, Any] = {}
    rebuilt = FunctionType(inner.__code__, scope, inner.__name__, inner.__defaults__)
    for name, value in inner.__globals__.items():
        if name in names:
            scope[name] = names[name]
        elif isinstance(value, JITFunction) and name in inner.__code__.co_names:
            scope[name] = plain(value, names)
        else:
            scope[name] = value.value if isinstance(value, gl.constexpr) else value
    return rebuilt


def simulate(launch: Launch, seed: int, arrivals: Callable[[int], int] = lambda count: count) -> Machine:
    """Run a recorded launch; its results are written to its tensors, which must hold NaN before.

    `arrivals` may change the counts that barriers are initialised with, to see that a test notices.
    """
    machine = Machine(seed, arrivals)
    barriers = SimpleNamespace(
        init=machine.init,
        wait=machine.wait,
        arrive=machine.arrive,
        expect=machine.expect,
        MBarrierLayout=lambda: "barrier",
    )
    names = {
        "gl": _language(machine),
        "mbarrier": barriers,
        "tma_load": machine.load,
        "tma_store": machine.store,
        "tma_store_wait": machine.await_stores,
        "warpgroup_mma": machine.multiply,
        "warpgroup_mma_init": lambda sums: sums,
        "warpgroup_mma_wait": machine.await_products,
        "fence_async_shared": machine.fence,
    }
    kernel = plain(launch.kernel, names)
    machine.num_programs = launch.grid[0]
    for machine.program in range(launch.grid[0]):
        kernel(**{name: _argument(value) for name, value in launch.arguments.items()})
    return machine


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer.to_tensor(value)
    if hasattr(value, "block_shape"):
        num_bytes = torch.Size(value.block_shape).numel() * value.base.element_size()
        shape = SimpleNamespace(nbytes=num_bytes)
        return SimpleNamespace(
            base=value.base, block_shape=value.block_shape, block_type=shape, dtype=value.base.dtype, layout=None
        )
    return Scalar(value) if type(value) is int else value
