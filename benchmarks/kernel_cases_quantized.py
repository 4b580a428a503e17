"""Cases of `trine bench kernels`: quantized weights and activations, in linear layers and in experts.

The ceiling of products is that of the run's own dtype: int8 and float8 tensor cores do twice as many operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.benchmarks.kernel_check import as_tuple
from trine.benchmarks.kernel_peers import compiled, grouped_experts
from trine.benchmarks.kernel_peers_inference import chosen_experts, int4_product, scaled_products
from trine.benchmarks.kernel_problem import Cost, Forward, Inputs, Problem, Results, cases, merged_otherwise
from trine.kernels.hardware import device_name
from trine.kernels.mlp.activation import gated_reference
from trine.kernels.mlp.op import gated_mlp_reference
from trine.kernels.moe.op import moe_mlp_reference
from trine.kernels.quantized import hopper
from trine.kernels.quantized.activations import BLOCK, QuantizedRows, quantize_reference
from trine.kernels.quantized.decode import dequantize
from trine.kernels.quantized.op import quantize_rows, quantized_gated, quantized_linear
from trine.kernels.quantized.packing import pack
from trine.kernels.quantized.reference import block_scales, dequantize_reference
from trine.kernels.quantized.registered import MANY_ROWS
from trine.kernels.quantized.scaled_weight import ScaledWeight, scaled_weight
from trine.kernels.quantized.weight_only import launch_weight_only
from trine.kernels.quantized_moe.experts import PackedExperts, float8_experts, mxfp4_experts, pack_experts
from trine.kernels.quantized_moe.op import quantized_moe_mlp
from trine.kernels.quantized_moe.reference import float8_reference, mxfp4_reference, packed_reference
from trine.kernels.verified import is_verified

# Numbers of a row that share a scale of 4 or 8 bits.
GROUP = 128
# Rows of products with packed weights up to which their inner dimension is split between programs.
SPLIT = 64
# Rows whose error is measured; of experts, tokens.
ROWS, TOKENS = 256, 16
# Tokens times slots up to which experts are gathered by a peer.
GATHERED = 64
CODES = {"int8": torch.int8, **dict.fromkeys(("fp8", "fp8, fast", "fp8, blocks", "fp8, static"), torch.float8_e4m3fn)}


@cases(
    "quantized_linear",
    gpu=[
        {"M": 16, "N": 8192, "K": 8192, "kind": "w4"},
        {"M": 1, "N": 8192, "K": 8192, "kind": "w4"},
        {"M": 64, "N": 8192, "K": 8192, "kind": "w4"},
        {"M": 256, "N": 8192, "K": 8192, "kind": "w4"},
        {"M": 512, "N": 8192, "K": 8192, "kind": "w4"},
        {"M": 1024, "N": 8192, "K": 8192, "kind": "w4"},
        {"M": 4096, "N": 8192, "K": 8192, "kind": "w4"},
        {"M": 16, "N": 16384, "K": 16384, "kind": "w4"},
        {"M": 16, "N": 4096, "K": 4096, "kind": "w4"},
        {"M": 16, "N": 8192, "K": 8192, "kind": "w8"},
        {"M": 4096, "N": 4096, "K": 4096, "kind": "fp8"},
        {"M": 8192, "N": 8192, "K": 8192, "kind": "fp8"},
        {"M": 4096, "N": 4096, "K": 4096, "kind": "fp8, fast"},
        {"M": 8192, "N": 8192, "K": 8192, "kind": "fp8, fast"},
        {"M": 8192, "N": 8192, "K": 8192, "kind": "fp8, blocks"},
        {"M": 16, "N": 8192, "K": 8192, "kind": "fp8"},
        {"M": 4096, "N": 8192, "K": 8192, "kind": "int8"},
    ],
    cpu=[
        {"M": 4, "N": 256, "K": 256, "kind": kind} for kind in ("w4", "w8", "int8", "fp8", "fp8, fast", "fp8, blocks")
    ],
)
def quantized_linear_case(new: Inputs, M: int, N: int, K: int, kind: str) -> Problem:
    """A linear layer: 4- or 8-bit weights in groups of 128 (`w4`, `w8`), or codes on both sides (`int8`, `fp8`)."""
    x = new.normal(M, K, grad=False)
    return _of_codes(new, x, N, kind) if kind in CODES else _packed(new, x, N, 4 if kind == "w4" else 8)


def _packed(new: Inputs, x: Tensor, N: int, bits: int) -> Problem:
    (M, K), half = x.shape, 1 << (bits - 1)
    codes_NK = new.integers(2 * half, N, K, dtype=torch.int8 if bits == 4 else torch.int16).sub_(half).to(torch.int8)
    scales_NG = (new.normal(N, K // GROUP, scale=K**-0.5 / half, grad=False, dtype=torch.float32).abs()).to(new.dtype)
    weight = pack(codes_NK, scales_NG, bits=bits)

    def dense(dtype: torch.dtype) -> Tensor:
        return dequantize_reference(codes_NK, scales_NG, None, torch.promote_types(dtype, torch.float32)).to(dtype)

    same = dense(new.dtype)
    peers: dict[str, Forward] = {"cuBLAS": lambda: F.linear(x, same)}
    if bits == 4:
        peers["torch int4"] = int4_product(x, codes_NK, scales_NG)

    def ours() -> Tensor:
        return quantized_linear(x, weight)

    # Few rows are split; of many it has to be measured from how many on a weight is better dequantized as a whole.
    variants: dict[str, Forward] = {}
    if M <= SPLIT:
        variants = merged_otherwise(new, ours)
    elif new.on_gpu and M < MANY_ROWS:
        variants["dequantized"] = lambda: F.linear(x, dequantize(weight, x.dtype))
    elif new.on_gpu:
        parts = (weight.words, weight.scales, weight.zeros)
        variants["decoded"] = lambda: launch_weight_only(x, None, parts, None, None, bits, "none", None)
    return Problem(
        ours=ours,
        variants=variants,
        plain=lambda: F.linear(x, same),
        peers=peers if new.on_gpu else {},
        forward=Cost(2.0 * M * N * K, new.itemsize * M * (K + N) + N * K * bits / 8 + scales_NG.nbytes),
        cut=(x[:ROWS],),
        exact=lambda x: x @ dense(x.dtype).t(),
        part=lambda x: x[:ROWS],
    )


def _of_codes(new: Inputs, x: Tensor, N: int, kind: str) -> Problem:
    """The product of codes alone is timed, of ours and of others; the variant makes the codes of x too.

    Float8 has scales of rows or of blocks; `fast` lets tensor cores keep less exact sums.
    """
    (M, K), dtype, blocks, fast = x.shape, CODES[kind], "blocks" in kind, "fast" in kind
    weight, dense = _coded(new, N, K, kind)
    rows, scales = quantize_rows(x, dtype, blocks=blocks), weight.scales

    def exact(x: Tensor) -> Tensor:
        return quantize_reference(x.float(), dtype, blocks=blocks).dequantize(x.dtype) @ dense(x.dtype).t()

    def ours() -> Tensor:
        return quantized_linear(rows, weight, fast_sums=fast)

    same = dense(torch.float32).to(new.dtype)
    return Problem(
        ours=ours,
        plain=lambda: F.linear(rows.dequantize(new.dtype), same),
        variants={
            "quantizing x": lambda: quantized_linear(x, weight, fast_sums=fast),
            **_plain_kernel(new, rows, None, weight, ours),
        },
        peers={"cuBLAS": lambda: F.linear(x, same), **dict(scaled_products(new, rows, weight))} if new.on_gpu else {},
        forward=Cost(
            2.0 * M * N * K, M * K + N * K + new.itemsize * M * N + 4.0 * (rows.scales.numel() + scales.numel())
        ),
        cut=(x[:ROWS],),
        exact=exact,
        part=lambda x: x[:ROWS],
    )


def _coded(new: Inputs, N: int, K: int, kind: str) -> tuple[ScaledWeight, Callable[[torch.dtype], Tensor]]:
    """A weight of codes, and its numbers in a dtype."""
    dtype, blocks = CODES[kind], "blocks" in kind
    if dtype == torch.int8:
        codes_NK = new.integers(255, N, K, dtype=torch.int16).sub_(127).to(torch.int8)
    else:
        codes_NK = new.normal(N, K, grad=False).to(dtype)
    shape = (N // BLOCK, K // BLOCK) if blocks else (N, 1)
    size = K**-0.5 / (64 if dtype == torch.int8 else 1)
    scales = new.normal(*shape, scale=size, grad=False, dtype=torch.float32).abs()

    def dense(work: torch.dtype) -> Tensor:
        return codes_NK.to(work) * (block_scales(scales, N, K, BLOCK) if blocks else scales).to(work)

    return scaled_weight(codes_NK, scales), dense


def _plain_kernel(
    new: Inputs, rows: QuantizedRows, gate: ScaledWeight | None, up: ScaledWeight, ours: Forward
) -> dict[str, Forward]:
    """Where ours goes to the Hopper kernel, its twin beside it."""
    if not (new.on_gpu and is_verified(hopper.OPERATION, device_name(new.device))):
        return {}
    other, activation = (None, "none") if gate is None else ((gate.codes, gate.scales), "silu")
    if not hopper.selected(rows.codes, other, (up.codes, up.scales), activation, new.dtype):
        return {}

    def on_twin() -> Results:
        with hopper.EXPERIMENTAL.force(False):
            return ours()

    return {"plain": on_twin}


@cases(
    "quantized_gated",
    gpu=[{"M": 4096, "N": 14336, "K": 4096, "kind": kind} for kind in ("fp8", "fp8, blocks")],
    cpu=[{"M": 4, "N": 256, "K": 256, "kind": kind} for kind in ("int8", "fp8", "fp8, blocks")],
)
def quantized_gated_case(new: Inputs, M: int, N: int, K: int, kind: str) -> Problem:
    """silu(gate) * up of a feed-forward layer, codes on both sides."""
    x, blocks = new.normal(M, K, grad=False), "blocks" in kind
    (gate, gate_dense), (up, up_dense) = (_coded(new, N, K, kind) for _ in range(2))
    rows = quantize_rows(x, CODES[kind], blocks=blocks)

    def ours() -> Tensor:
        return quantized_gated(rows, gate, up, activation="silu")

    def unit(gate_product: Forward, up_product: Forward) -> Forward:
        def both() -> Tensor:
            (gate_MN,), (up_MN,) = as_tuple(gate_product()), as_tuple(up_product())
            return F.silu(gate_MN) * up_MN

        return both

    def exact(x: Tensor) -> Tensor:
        x = quantize_reference(x.float(), CODES[kind], blocks=blocks).dequantize(x.dtype)
        return gated_reference(x @ gate_dense(x.dtype).t(), x @ up_dense(x.dtype).t(), "silu")

    numbers = rows.dequantize(new.dtype)
    gate_NK, up_NK = (dense(torch.float32).to(new.dtype) for dense in (gate_dense, up_dense))
    plain = unit(lambda: F.linear(numbers, gate_NK), lambda: F.linear(numbers, up_NK))
    peers = {"cuBLAS": plain}
    if new.on_gpu:
        products = zip(scaled_products(new, rows, gate), scaled_products(new, rows, up), strict=True)
        peers |= {name: unit(first, second) for (name, first), (_, second) in products}
    return Problem(
        ours=ours,
        plain=plain,
        variants=_plain_kernel(new, rows, gate, up, ours),
        peers=peers if new.on_gpu else {},
        forward=Cost(4.0 * M * N * K, M * K + 2.0 * N * K + new.itemsize * M * N),
        cut=(x[:ROWS],),
        exact=exact,
        part=lambda x: x[:ROWS],
    )


@cases(
    "quantize_rows",
    gpu=[
        {"M": 8192, "K": 8192, "kind": "fp8"},
        {"M": 8192, "K": 8192, "kind": "fp8, blocks"},
        {"M": 8192, "K": 8192, "kind": "fp8, static"},
        {"M": 8192, "K": 8192, "kind": "int8"},
    ],
    cpu=[{"M": 16, "K": 256, "kind": kind} for kind in ("fp8", "fp8, blocks", "fp8, static", "int8")],
)
def quantize_rows_case(new: Inputs, M: int, K: int, kind: str) -> Problem:
    """Activations as codes, with a scale for each row or each 128 numbers of it, or one that was measured ahead."""
    x = new.normal(M, K, grad=False)
    blocks = "blocks" in kind
    scale = torch.full((1,), 1 / 64, device=new.device) if "static" in kind else None

    def formula(x: Tensor) -> tuple[Tensor, ...]:
        rows = quantize_reference(x, CODES[kind], blocks=blocks, scale=scale)
        return (rows.codes, rows.scales) if scale is None else (rows.codes,)

    def ours() -> tuple[Tensor, ...]:
        rows = quantize_rows(x, CODES[kind], blocks=blocks, scale=scale)
        return (rows.codes, rows.scales) if scale is None else (rows.codes,)

    return Problem(
        ours=ours,
        plain=lambda: formula(x),
        peers=dict([("torch", lambda: formula(x)), *compiled(formula, new, x)]) if new.on_gpu else {},
        forward=Cost(bytes=x.nbytes + M * K + 4.0 * M * (K // BLOCK if blocks else scale is None)),
        cut=(x[:ROWS],),
        exact=formula,
        part=lambda x: x[:ROWS],
    )


QWEN3_MOE: dict[str, int] = {"C": 2048, "F": 768, "E": 128, "top": 8}
GPT_OSS: dict[str, int] = {"C": 2880, "F": 2880, "E": 32, "top": 4}


@cases(
    "quantized_moe_mlp",
    gpu=[
        {"N": 64, **QWEN3_MOE, "kind": "w4"},
        {"N": 1, **QWEN3_MOE, "kind": "w4"},
        {"N": 4096, **QWEN3_MOE, "kind": "w4"},
        {"N": 64, **QWEN3_MOE, "kind": "fp8, blocks"},
        {"N": 1, **GPT_OSS, "kind": "mxfp4"},
        {"N": 64, **GPT_OSS, "kind": "mxfp4"},
        {"N": 4096, **GPT_OSS, "kind": "mxfp4"},
    ],
    cpu=[{"N": 8, "C": 128, "F": 256, "E": 4, "top": 2, "kind": kind} for kind in ("w4", "fp8, blocks", "mxfp4")],
)
def quantized_moe_case(new: Inputs, N: int, C: int, F: int, E: int, top: int, kind: str) -> Problem:
    """A layer of gated experts with quantized weights; the peers have the same numbers in the run's dtype."""
    x = new.normal(N, C, grad=False)
    chosen = new.normal(N, E, grad=False, dtype=torch.float32).softmax(dim=-1).topk(top)
    ids, weights = chosen.indices, chosen.values.to(new.dtype)
    experts, numbers = zip(*(_experts(new, E, *shape, kind) for shape in ((F, C), (F, C), (C, F))), strict=True)

    def exact(x: Tensor, weights: Tensor) -> Tensor:
        """Expert by expert, for all of them in float64 are large."""
        y, few = torch.zeros_like(x), ids[: len(x)]
        for expert in torch.unique(few).tolist():
            rows, slots = torch.where(few == expert)
            layer = (of(slice(expert, expert + 1), x.dtype)[0] for of in numbers)
            part = gated_mlp_reference(x[rows], *layer, activation="silu")
            y = y.index_add(0, rows, part * weights[rows, slots, None])
        return y

    def same() -> list[Tensor]:
        """The experts in the run's dtype."""
        return [torch.cat([of(slice(e, e + 1), torch.float32).to(new.dtype) for e in range(E)]) for of in numbers]

    def peers() -> dict[str, Forward]:
        dense = same()
        found = {"grouped_mm": grouped_experts(x, ids, weights, *dense)}
        return found | dict(chosen_experts(new, x, ids, weights, *dense) if N * top <= GATHERED else ())

    used = len(torch.unique(ids))
    return Problem(
        ours=lambda: quantized_moe_mlp(x, ids, weights, *experts, activation="silu"),
        plain=lambda: moe_mlp_reference(x, ids, weights, *same(), activation="silu"),
        peers=peers() if new.on_gpu else {},
        forward=Cost(6.0 * N * top * C * F, 2.0 * x.nbytes + sum(of.num_bytes for of in experts) * used / E),
        cut=(x[:TOKENS], weights[:TOKENS]),
        exact=exact,
        part=lambda x: x[:TOKENS],
    )


def _experts(
    new: Inputs, E: int, N: int, K: int, kind: str
) -> tuple[PackedExperts, Callable[[slice, torch.dtype], Tensor]]:
    """Weights of E experts, and the numbers of some of them in a dtype."""
    if kind == "w4":
        codes = new.integers(16, E, N, K, dtype=torch.int8).sub_(8)
        scales = new.normal(E, N, K // GROUP, scale=K**-0.5 / 8, grad=False, dtype=torch.float32).abs().to(new.dtype)
        return pack_experts(codes, scales, bits=4), lambda some, work: packed_reference(
            codes[some], scales[some], None, work
        )
    if kind == "mxfp4":
        codes = new.integers(256, E, N, K // 32, 16, dtype=torch.uint8)
        scales = new.integers(3, E, N, K // 32, dtype=torch.uint8).add_(119)  # 2^-8 to 2^-6
        return mxfp4_experts(codes, scales), lambda some, work: mxfp4_reference(codes[some], scales[some], work)
    codes = new.normal(E, N, K, grad=False).to(torch.float8_e4m3fn)
    scales = new.normal(E, N // BLOCK, K // BLOCK, scale=K**-0.5, grad=False, dtype=torch.float32).abs()
    return float8_experts(codes, scales), lambda some, work: float8_reference(codes[some], scales[some], work)
