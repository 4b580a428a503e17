"""AdamW on a GPU at real sizes, against float64 and torch's fused kernel on the same GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.adamw.checks import STATE_DTYPES
from trine.kernels.adamw.formula import adamw_reference
from trine.kernels.adamw.op import adamw_step
from trine.kernels.adamw.optimizer import AdamW
from trine.kernels.adamw.rounding import FOR_PARAMETER, draws, round_stochastically
from trine.kernels.adamw.states import RATIO, decode, empty_states
from trine.kernels.gradient_norm import gradient_norm

FORMULA: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}
DECAY, LR = 0.1, 1e-3
DTYPES = (torch.float32, torch.bfloat16)
# A billion parameters of a Llama: embedding, then matrices and norms of layers; odd sizes at the end.
LAYER = ((2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192), (2048,))
BILLION = ((32000, 2048), *(LAYER * 15), (5,), (4097,), (3, 1023))
SMALL = ((4096, 512), (4099,), (5,), (1, 2048), (0, 7))


def make(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(shape, device="cuda", generator=generator).to(dtype) for shape in shapes]


def needs(gigabytes: int) -> None:
    if torch.cuda.get_device_properties(0).total_memory < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of GPU memory")


def test_a_billion_parameters_are_as_near_float64_as_torchs_fused_kernel() -> None:
    needs(60)
    weights = make(BILLION, torch.float32, 0)
    theirs = [w.clone() for w in weights]
    start = [w.clone() for w in weights]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    optimizer = AdamW(weights, weight_decay=DECAY, **FORMULA)
    assert 0.9e9 < sum(w.numel() for w in weights) < 1.2e9
    for update in (1, 2):
        gradients = make(BILLION, torch.float32, update)
        optimizer.step(LR, update=update, gradients=gradients)
        counts = [torch.tensor(float(update), device="cuda")] * len(theirs)
        torch._fused_adamw_(
            theirs, gradients, first, second, [], counts, lr=LR, beta1=0.9, beta2=0.95, weight_decay=DECAY,
            eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip
        del gradients
    both = [make(BILLION, torch.float32, update) for update in (1, 2)]
    for place, w in enumerate(start):
        exact = (w.double(), torch.zeros_like(w, dtype=torch.float64), torch.zeros_like(w, dtype=torch.float64))
        for update, gradients in enumerate(both, 1):
            gradient = gradients[place].double()
            exact = adamw_reference(exact[0], gradient, *exact[1:], lr=LR, weight_decay=DECAY, update=update, **FORMULA)
        found = (weights[place], optimizer.first_moments[place], optimizer.second_moments[place])
        plain = (theirs[place], first[place], second[place])
        for ours, other, double in zip(found, plain, exact, strict=True):
            floor = 2**-22 * float(double.abs().max())
            assert float((ours - double).abs().max()) <= 2 * float((other - double).abs().max()) + floor


@pytest.mark.parametrize(("dtype", "gradient_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
def test_one_update_of_every_combination(state: torch.dtype, dtype: torch.dtype, gradient_dtype: torch.dtype) -> None:
    weights = make(SMALL, dtype, 0)
    start = [w.clone() for w in weights]
    gradients = make(SMALL, gradient_dtype, 1)
    optimizer = AdamW(weights, weight_decay=DECAY, state_dtype=state, seed=2**33 + 1, **FORMULA)
    optimizer.step(LR, update=1, gradients=gradients, grad_scale=torch.tensor(0.5, device="cuda"))
    for place, w in enumerate(start):
        zero = torch.zeros_like(w, dtype=torch.float64)
        exact, m, v = adamw_reference(
            w.double(), 0.5 * gradients[place].double(), zero, zero, lr=LR, weight_decay=DECAY, update=1, **FORMULA
        )
        if not w.numel():
            continue
        if dtype == torch.float32:
            assert float((weights[place] - exact).abs().max()) <= 2**-22 * float(exact.abs().max())
        else:
            drawn = draws(w.numel(), w.device, seed=2**33 + 1, tensor=place, update=1, purpose=FOR_PARAMETER)
            rounded = round_stochastically(exact.float(), drawn.view(w.shape))
            # A last bit of fp32 decides the rounding of one number in 65,536.
            assert float((weights[place] != rounded).double().mean()) < 1e-3
            assert float((weights[place].double() - exact).abs().max()) <= 2**-7 * float(exact.abs().max())
        first, second = optimizer.first_moments[place].view(-1), optimizer.second_moments[place].view(-1)
        if state == torch.int8:
            first, second = decode(first, optimizer.first_scales[place]), decode(second, optimizer.second_scales[place])
        for found, expected in ((first, m.view(-1)), (second, v.view(-1))):
            bound = (RATIO - 1) * 1.001 if state == torch.int8 else 2**-20
            smallest = 2**-15.75 * float(expected.abs().max())
            assert ((found - expected).abs() <= bound * expected.abs() + smallest).all()


def test_errors_of_8_bit_states_and_of_bf16_cancel() -> None:
    weights = [torch.ones(2**24, device="cuda", dtype=torch.bfloat16)]
    optimizer = AdamW(weights, weight_decay=0.0, state_dtype=torch.int8, **FORMULA)
    gradients = make(((2**24,),), torch.bfloat16, 1)
    optimizer.step(2.0**-12, update=1, gradients=gradients)
    first = decode(optimizer.first_moments[0], optimizer.first_scales[0]).double()
    second = decode(optimizer.second_moments[0], optimizer.second_scales[0]).double()
    exact = gradients[0].double()
    for found, expected in ((first, exact * 0.1), (second, exact.square() * 0.05)):
        # At most half a level each, over 2^12 in the mean of 2^24; 1e-7 for the resolution of the draws.
        assert abs(float((found - expected).sum() / expected.abs().sum())) < 3 * (RATIO - 1) / 2 / 2**12 + 1e-6
    moved = 1 - weights[0].double()
    sign = exact.sign()
    # Rounding errors near 1 are at most 2^-8 (above) with probability 1/16.
    assert abs(float((moved * sign).mean()) - 2.0**-12) < 3 * 2.0**-10 / 2**12 + 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
def test_two_runs_give_the_same_bits(state: torch.dtype, dtype: torch.dtype) -> None:
    runs = []
    for _ in range(2):
        optimizer = AdamW(make(SMALL, dtype, 0), weight_decay=DECAY, state_dtype=state, seed=3, **FORMULA)
        for update in (1, 2, 3):
            optimizer.step(LR, update=update, gradients=make(SMALL, dtype, update))
        runs.append([*optimizer.parameters, *optimizer.first_moments, *optimizer.second_moments])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
def test_offsets_past_2_to_the_31(state: torch.dtype) -> None:
    """The last numbers of a tensor of more than 2^31 are those of a small tensor, but for the draws."""
    needs(70)
    size, tail = 2**31 + 2**20 + 5, 2**16 + 5
    weights = torch.zeros(size, device="cuda", dtype=torch.bfloat16)
    gradient = torch.zeros(size, device="cuda", dtype=torch.bfloat16)
    weights[-tail:] = make(((tail,),), torch.bfloat16, 0)[0]
    gradient[-tail:] = make(((tail,),), torch.bfloat16, 1)[0]
    before, given = weights[-tail:].double(), gradient[-tail:].double()
    optimizer = AdamW([weights], weight_decay=DECAY, state_dtype=state, **FORMULA)
    optimizer.step(LR, update=1, gradients=[gradient])
    zero = torch.zeros_like(before)
    exact, m, _ = adamw_reference(before, given, zero, zero, lr=LR, weight_decay=DECAY, update=1, **FORMULA)
    drawn = draws(tail, weights.device, seed=0, tensor=0, update=1, purpose=FOR_PARAMETER, start=size - tail)
    assert (size - tail) % 2048 == 0
    assert float((weights[-tail:] != round_stochastically(exact.float(), drawn)).double().mean()) < 1e-3
    assert not weights[: 2**20].any()
    if state == torch.int8:
        scales = optimizer.first_scales[0][(size - tail) // 256 :]
        found = decode(optimizer.first_moments[0][-tail:], scales)
        assert float((found - m).abs().max()) < RATIO - 1
    else:
        torch.testing.assert_close(optimizer.first_moments[0][-tail:].double(), m, rtol=1e-6, atol=1e-7)


def test_nothing_waits_for_the_device() -> None:
    optimizer = AdamW(make(SMALL, torch.float32, 0), weight_decay=DECAY, **FORMULA)
    gradients = [make(SMALL, torch.float32, update) for update in (1, 2)]
    for update, some in enumerate(gradients, 1):
        if update == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            total, _ = gradient_norm(some)
            optimizer.step(LR, update=update, gradients=some, grad_scale=(1.0 / total).clamp(max=1.0))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_8_bit_states_take_a_quarter_of_the_memory() -> None:
    weights = [torch.zeros(2**26, device="cuda")]
    taken = {}
    for state in STATE_DTYPES:
        before = torch.cuda.memory_allocated()
        optimizer = AdamW(weights, weight_decay=DECAY, state_dtype=state, **FORMULA)
        optimizer.step(LR, update=1, gradients=weights)
        taken[state] = torch.cuda.memory_allocated() - before
        del optimizer
    assert taken[torch.int8] < 0.26 * taken[torch.float32]


VARIANTS = pytest.mark.parametrize(
    ("dtype", "gradient_dtype", "eight_bit"), list(itertools.product(DTYPES, DTYPES, (False, True))), ids=str
)


def arguments(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, gradient_dtype: torch.dtype, eight_bit: bool
) -> tuple[Any, ...]:
    """Of the registered operation, for the third update."""
    parameters, gradients = make(shapes, dtype, 0), make(shapes, gradient_dtype, 1)
    moments = [[torch.zeros_like(w, dtype=torch.float32) for w in parameters] for _ in range(2)]
    states = [*moments, [], []]
    if eight_bit:
        empty = [empty_states(w.numel(), w.device) for w in parameters]
        states = [[state[place] for state in empty] for place in range(4)]
    scale, lr = torch.tensor(0.5, device="cuda"), torch.tensor(LR, dtype=torch.float64)
    rest = (*FORMULA["betas"], FORMULA["eps"], 3, 2**33 + 1, True)
    return parameters, gradients, *states, [DECAY] * len(shapes), scale, lr, *rest


@VARIANTS
def test_registration(dtype: torch.dtype, gradient_dtype: torch.dtype, eight_bit: bool) -> None:
    torch.library.opcheck(adamw_step, arguments(SMALL, dtype, gradient_dtype, eight_bit))


def test_registration_of_no_tensors() -> None:
    torch.library.opcheck(adamw_step, arguments((), *DTYPES, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
def test_compiles_whole_and_once(state: torch.dtype, dtype: torch.dtype) -> None:
    """A layer of a Llama, updated with numbers that change: the same bits, and two graphs for all updates."""
    torch._dynamo.reset()
    graphs, results = [], []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for compiled in (False, True):
        optimizer = AdamW(make(LAYER, dtype, 0), weight_decay=DECAY, state_dtype=state, seed=3, **FORMULA)

        def step(gradients: list[Tensor], scale: Tensor, lr: float, update: int, to: AdamW = optimizer) -> None:
            to.step(lr, update=update, gradients=gradients, grad_scale=scale)

        call = torch.compile(step, fullgraph=True, backend=backend) if compiled else step
        for update in range(1, 5):
            call(make(LAYER, dtype, update), torch.tensor(1 / update, device="cuda"), LR / update, update)
        moments = [*optimizer.first_moments, *optimizer.second_moments]
        results.append([*optimizer.parameters, *moments, *optimizer.first_scales, *optimizer.second_scales])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert [graph.count("trine.adamw.default") for graph in graphs] == [1, 1]


def test_streams_have_tables_of_their_own() -> None:
    """What one stream uploads is not read by another, which does not wait for it."""
    weights, gradients = make(SMALL, torch.float32, 0), make(SMALL, torch.float32, 1)
    other = [w.clone() for w in weights]
    optimizer, twin = (AdamW(some, weight_decay=DECAY, **FORMULA) for some in (weights, other))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for update in (1, 2):
        optimizer.step(LR, update=update, gradients=gradients)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream if update == 2 else torch.cuda.current_stream()):
            twin.step(LR, update=update, gradients=gradients)
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(weights, other, strict=True))


def test_a_cuda_graph_is_refused() -> None:
    """Its replays would update what lay at the addresses of the capture, by the numbers of that update."""
    weights, gradients = make(((4099,),), torch.float32, 0), make(((4099,),), torch.float32, 1)
    start = weights[0].clone()
    optimizer = AdamW(weights, weight_decay=DECAY, **FORMULA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(8, device="cuda")  # torch warns of an empty graph
        with pytest.raises(RuntimeError, match="cannot be part of a CUDA graph"):
            optimizer.step(LR, update=1, gradients=gradients)
    torch.cuda.synchronize()
    assert torch.equal(weights[0], start)
    optimizer.step(LR, update=1, gradients=gradients)
    assert not torch.equal(weights[0], start)
