"""Cases of `trine bench kernels`: what only inference runs, the paged cache and quantized weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.benchmarks.kernel_problem import Cost, Forward, Inputs, Problem, cases
from trine.kernels.paged_attention.op import paged_attention
from trine.kernels.paged_attention.reference import paged_attention_reference
from trine.kernels.quantized.activations import QuantizedRows, quantize_reference
from trine.kernels.quantized.op import Weight, quantize_rows, quantized_linear
from trine.kernels.quantized.packing import pack
from trine.kernels.quantized.reference import dequantize_reference
from trine.kernels.quantized.scaled_weight import scaled_weight

GROUP, SLOTS = 128, 16
KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@cases(
    "paged_attention",
    gpu=[
        {"R": 64, "L": 4096, "H": 32, "K": 8, "D": 128},
        {"R": 1, "L": 65536, "H": 32, "K": 8, "D": 128},
        {"R": 256, "L": 1024, "H": 32, "K": 8, "D": 128},
    ],
    cpu=[{"R": 3, "L": 80, "H": 8, "K": 2, "D": 64}],
)
def paged_attention_case(new: Inputs, R: int, L: int, H: int, K: int, D: int) -> Problem:
    """Decoding: one new token of each of R requests, over L keys in scattered blocks."""
    q = new.normal(R, H, D, grad=False)
    blocks = L // SLOTS
    k, v = (new.normal(R * blocks, SLOTS, K, D, grad=False) for _ in range(2))
    table_RM = torch.randperm(R * blocks, device=new.device, generator=new.generator).view(R, blocks)
    k_dense, v_dense = (x[table_RM].view(R, L, K, D).transpose(1, 2).contiguous() for x in (k, v))
    places: dict[str, Any] = {
        "block_table_RM": table_RM.to(torch.int32),
        "lengths_R": torch.full((R,), L, dtype=torch.int32, device=new.device),
        "query_starts": torch.arange(R + 1, dtype=torch.int32, device=new.device),
    }

    def contiguous() -> Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], k_dense, v_dense, enable_gqa=True)[:, :, 0]

    return Problem(
        ours=lambda: paged_attention(q, k, v, **places, max_queries=1, max_length=L),
        plain=lambda: paged_attention_reference(q, k, v, **places),
        peers={"torch SDPA, no pages": contiguous} if new.on_gpu else {},
        forward=Cost(4.0 * R * L * H * D, 2.0 * R * L * K * D * new.itemsize),
        cut=(q, k, v),
        exact=lambda q, k, v: paged_attention_reference(q, k, v, **places),
    )


@cases(
    "quantized_linear",
    gpu=[
        {"M": 16, "N": 8192, "K": 8192, "kind": "w4"},
        {"M": 1, "N": 8192, "K": 8192, "kind": "w4"},
        {"M": 128, "N": 8192, "K": 8192, "kind": "w4"},
        {"M": 4096, "N": 8192, "K": 8192, "kind": "w4"},
        {"M": 16, "N": 8192, "K": 8192, "kind": "w8"},
        {"M": 4096, "N": 8192, "K": 8192, "kind": "int8"},
        {"M": 4096, "N": 8192, "K": 8192, "kind": "fp8"},
    ],
    cpu=[{"M": 4, "N": 256, "K": 256, "kind": "w4"}, {"M": 4, "N": 256, "K": 256, "kind": "int8"}],
)
def quantized_linear_case(new: Inputs, M: int, N: int, K: int, kind: str) -> Problem:
    """A linear layer: 4- or 8-bit weights in groups of 128 (`w4`, `w8`), or codes on both sides (`int8`, `fp8`)."""
    x = new.normal(M, K, grad=False)
    weight, dense, exact = _weight(new, N, K, kind)
    rounded = dense.to(new.dtype)
    peers: dict[str, Forward] = {"cuBLAS": lambda: F.linear(x, rounded)} if new.on_gpu else {}
    if kind == "fp8" and new.on_gpu:
        codes, scales = quantize_rows(x, KINDS[kind]), new.normal(1, N, grad=False, dtype=torch.float32).abs()
        columns = rounded.to(KINDS[kind]).t()
        peers["_scaled_mm, x quantized"] = lambda: torch._scaled_mm(
            codes.codes, columns, scale_a=codes.scales, scale_b=scales, out_dtype=new.dtype
        )
    bits = 4 if kind == "w4" else 8
    return Problem(
        ours=lambda: quantized_linear(x, weight),
        plain=lambda: F.linear(_rows(x, KINDS[kind]).dequantize(new.dtype) if kind in KINDS else x, rounded),
        peers=peers,
        forward=Cost(2.0 * M * N * K, new.itemsize * M * (K + N) + N * K * bits / 8),
        cut=(x,),
        exact=exact,
    )


def _weight(new: Inputs, N: int, K: int, kind: str) -> tuple[Weight, Tensor, Any]:
    """The weight, what its codes stand for, and the exact product with them."""
    scales_NG = new.normal(N, 1 if kind in KINDS else K // GROUP, grad=False, dtype=torch.float32).abs() * K**-0.5
    if kind == "fp8":
        codes_NK = new.normal(N, K, grad=False).to(torch.float8_e4m3fn)
    else:
        low, high = (-8, 8) if kind == "w4" else (-128, 128)
        codes_NK = (new.integers(high - low, N, K) + low).to(torch.int8)
        scales_NG = scales_NG / high
    dense = dequantize_reference(codes_NK, scales_NG, None, torch.float32)
    if kind in KINDS:
        weight: Weight = scaled_weight(codes_NK, scales_NG)
        return weight, dense, lambda x: _rows(x, KINDS[kind]).dequantize(torch.float64) @ dense.double().t()
    weight = pack(codes_NK, scales_NG.to(new.dtype), bits=4 if kind == "w4" else 8)
    used = dequantize_reference(codes_NK, scales_NG.to(new.dtype), None)
    return weight, dense, lambda x: x @ used.t()


def _rows(x: Tensor, kind: torch.dtype) -> QuantizedRows:
    return quantize_reference(x.float(), kind)
