"""Products of few rows with a weight on a CPU: y = x w^T + bias, at the speed of reading the weight.

Compiled loops where the table (`table.py`) found them faster, torch's products elsewhere. The loops read weights of
fp32, bf16 or int8 and sum in fp32 (codes of int8 with codes: exact); activations are not rounded to bf16 on the way.

Shapes: M rows, K inputs, N outputs. Bytes: N K b for weights of b bytes; 2 M N K FLOPs. For inference: where a gradient
is wanted, torch computes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.kernels.cpu.compiled import address, array, single, use_torch_threads
from trine.kernels.cpu.projection import SHORTEST
from trine.kernels.cpu.table import PLAIN_PATHS, choose

_FLOATS = (torch.float32, torch.bfloat16)
# Sums of more products of two int8 than this may not fit 32 bits.
_MAX_CODES = (2**31 - 1) // 128**2


def matvec(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x w^T + bias in the dtype of x: x and weight fp32 or bf16, not necessarily the same; bias of any float dtype.

    Raises ValueError for other dtypes, or shapes that do not fit.
    """
    _check(x_MK, weight_NK, bias_N)
    for name, x in (("x", x_MK), ("weight", weight_NK)):
        if x.dtype not in _FLOATS:
            raise ValueError(f"{name} is {x.dtype}; supported are float32 and bfloat16")
    if _torch_only(x_MK, weight_NK, bias_N) or not _loops(_name(weight_NK), len(x_MK)):
        work = x_MK.dtype if x_MK.dtype == weight_NK.dtype else torch.float32
        return F.linear(x_MK.to(work), weight_NK.to(work), _cast(bias_N, work)).to(x_MK.dtype)
    return compiled_matvec(x_MK, weight_NK, None, bias_N)


def by_loops(x_MK: Tensor, *weights_NK: Tensor) -> bool:
    """Whether `matvec` takes compiled loops for such rows with each of these weights, all of one dtype."""
    alike = all(weight.dtype == x_MK.dtype and not _torch_only(x_MK, weight, None) for weight in weights_NK)
    return alike and x_MK.dtype in _FLOATS and len(x_MK) > 0 and _loops(_name(x_MK), len(x_MK))


def int8_matvec(x_MK: Tensor, codes_NK: Tensor, scales_N: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """(x codes^T) scales + bias in the dtype of x: weights of int8 with one scale a row, x in fp32 or bf16.

    Raises ValueError for other dtypes, or shapes that do not fit.
    """
    _check(x_MK, codes_NK, bias_N)
    _check_scales(codes_NK, scales_N)
    if x_MK.dtype not in _FLOATS:
        raise ValueError(f"x is {x_MK.dtype}; supported are float32 and bfloat16")
    if not _torch_only(x_MK, codes_NK, bias_N) and _loops(f"int8 by {_name(x_MK)}", len(x_MK)):
        return compiled_matvec(x_MK, codes_NK, scales_N, bias_N)
    if x_MK.dtype == torch.bfloat16 and codes_NK.shape[1] % 32 == 0 and 0 not in codes_NK.shape and len(x_MK):
        y_MN = torch._weight_int8pack_mm(x_MK.contiguous(), codes_NK.contiguous(), scales_N.bfloat16())
        return y_MN if bias_N is None else y_MN + bias_N.to(y_MN.dtype)
    weight_NK = codes_NK.float() * scales_N.float()[:, None]
    return F.linear(x_MK.float(), weight_NK, _cast(bias_N, torch.float32)).to(x_MK.dtype)


def int8_codes_matvec(
    x_codes_MK: Tensor, x_scales_M: Tensor, codes_NK: Tensor, scales_N: Tensor, bias_N: Tensor | None = None
) -> Tensor:
    """(x_codes codes^T) x_scales scales + bias in fp32, with int8 on both sides (x_codes: `quantize_rows`).

    The sums are exact in int32, so that every path gives the same. Raises ValueError for what does not fit.
    """
    _check(x_codes_MK, codes_NK, bias_N)
    _check_scales(codes_NK, scales_N)
    if x_codes_MK.dtype != torch.int8:
        raise ValueError(f"x_codes is {x_codes_MK.dtype}; it must be int8")
    if x_scales_M.shape != x_codes_MK.shape[:1] or not x_scales_M.is_floating_point():
        raise ValueError(f"x_scales is {x_scales_M.dtype} {tuple(x_scales_M.shape)}; expected ({len(x_codes_MK)},)")
    if codes_NK.shape[1] > _MAX_CODES:
        raise ValueError(f"rows have {codes_NK.shape[1]} codes; sums of more than {_MAX_CODES} may not fit 32 bits")
    plain = _torch_only(x_codes_MK, codes_NK, bias_N) or codes_NK.shape[1] < SHORTEST
    if plain or not _loops("int8 by int8", len(x_codes_MK)):
        sums_MN = torch._int_mm(x_codes_MK, codes_NK.t()).float()
        y_MN = sums_MN.mul_(x_scales_M.float()[:, None]).mul_(scales_N.float())
        return y_MN if bias_N is None else y_MN + bias_N.float()
    return compiled_codes_matvec(x_codes_MK, x_scales_M, codes_NK, scales_N, bias_N)


def compiled_matvec(x_MK: Tensor, weight_NK: Tensor, scales_N: Tensor | None, bias_N: Tensor | None) -> Tensor:
    """(x w^T) scales + bias in the dtype of x, by the loops whatever the table says."""
    from trine.kernels.cpu.matvec_loops import multiply

    use_torch_threads()
    y_MN = torch.empty(len(x_MK), len(weight_NK))
    multiply(array(weight_NK), single(scales_N), single(x_MK), single(bias_N), array(y_MN))
    return y_MN.to(x_MK.dtype)


def compiled_codes_matvec(
    x_codes_MK: Tensor,
    x_scales_M: Tensor,
    codes_NK: Tensor,
    scales_N: Tensor,
    bias_N: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`int8_codes_matvec` by the loops whatever the table says, in fp32 or bf16, of at least `SHORTEST` inputs."""
    from trine.kernels.cpu.tokens_loops import lay_tokens, multiply_tokens

    use_torch_threads()
    (M, K), N = x_codes_MK.shape, len(codes_NK)
    assert K >= SHORTEST
    width = -(-K // SHORTEST) * SHORTEST
    x = x_codes_MK.contiguous()
    laid = x if width == K else torch.empty(M, width, dtype=torch.int8)
    x_scales, scales, bias = single(x_scales_M), single(scales_N), single(bias_N)
    factors, y_MN = torch.empty(M, 2), torch.empty(M, N, dtype=dtype)
    lay_tokens(x.data_ptr(), M, K, width, x_scales.ctypes.data, laid.data_ptr(), factors.data_ptr())
    multiply_tokens(
        codes_NK.data_ptr(), N, K, laid.data_ptr(), width, factors.data_ptr(), M, scales.ctypes.data, address(bias),
        y_MN.data_ptr(), dtype == torch.bfloat16,
    )  # fmt: skip
    return y_MN


def _loops(kind: str, rows: int) -> bool:
    return choose(kind, rows, PLAIN_PATHS) == "loops"


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _torch_only(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Where the loops cannot be used at all: for gradients, when traced, elsewhere than in a CPU's plain memory."""
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    plain = weight.device.type == "cpu" and weight.is_contiguous()
    return gradient or not plain or torch.compiler.is_compiling()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x and the weight have shapes {tuple(x.shape)} and {tuple(weight.shape)}; expected [M, K] and [N, K]"
        )
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({len(weight)},)")


def _check_scales(codes: Tensor, scales: Tensor) -> None:
    if codes.dtype != torch.int8:
        raise ValueError(f"codes are {codes.dtype}; they must be int8")
    if tuple(scales.shape) != (len(codes),) or not scales.is_floating_point():
        raise ValueError(f"scales are {scales.dtype} {tuple(scales.shape)}; expected floating point ({len(codes)},)")
