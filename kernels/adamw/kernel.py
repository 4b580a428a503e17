"""The Triton kernel of AdamW: one program updates one chunk of one tensor.

A chunk is ROWS groups of 2048 numbers (see `rounding.py`), worked on in eight parts of [ROWS, 256]: a row of a part is
one block of 8-bit states, and the eight draws of a lane go to its eight parts. bf16 is read and written as 16-bit
integers, because rounding is done here.

The kernel finds its tensors by tables on the device: `addresses` int64, a row of T each for w, g, m, v and with 8-bit
states the scales of m and v; by tensor its weight decay, fp32, and its number, int32, which the draws depend on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trine.kernels.adamw.formula import Step, formula_of
from trine.kernels.adamw.rounding import (
    FOR_MOMENTS,
    FOR_PARAMETER,
    GROUP,
    LANES,
    PARTS,
    bf16_bits,
    draw,
    draw_words,
    from_bf16_bits,
    half_to_even,
)
from trine.kernels.adamw.states import FIRST, SECOND, decode_levels, encode_levels
from trine.kernels.launch import launch
from trine.kernels.multi_tensor import addresses, chunks_of, kept_upload
from trine.kernels.target import Target, target_of
from trine.kernels.tuning import Config, Shape, Tunable

_LANES = tl.constexpr(LANES)
_PARTS = tl.constexpr(PARTS)
_GROUP = tl.constexpr(GROUP)
_PARAMETER = tl.constexpr(FOR_PARAMETER)
_MOMENTS = tl.constexpr(FOR_MOMENTS)


@triton.jit
def _load(pointer, places, left, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointer + places)
    return tl.load(pointer + places, mask=places < left, other=0)


@triton.jit
def _store(pointer, places, left, value, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointer + places, value)
    else:
        tl.store(pointer + places, value, mask=places < left)


@triton.jit
def _float(value, BF16: tl.constexpr):
    return from_bf16_bits(value) if BF16 else value


@triton.jit
def _chunk(
    parameter_ptr,
    gradient_ptr,
    first_ptr,
    second_ptr,
    first_scales_ptr,
    second_scales_ptr,
    left,
    group,
    tensor,
    scale,
    lr_decay,
    step,
    root,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    seed,
    update,
    PARAMETER_BF16: tl.constexpr,
    GRADIENT_BF16: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Update the chunk that the pointers point to, of which `left` numbers exist (all if WHOLE)."""
    rows = tl.arange(0, ROWS)
    lanes = tl.arange(0, _LANES)
    counters = (group + rows)[:, None] * _LANES + lanes[None, :]
    if STOCHASTIC:
        p0, p1, p2, p3 = draw_words(seed, counters, tensor, update, _PARAMETER)
    if EIGHT_BIT:
        m0, m1, m2, m3 = draw_words(seed, counters, tensor, update, _MOMENTS)
    for part in tl.static_range(_PARTS):
        places = rows[:, None] * _GROUP + (lanes + part * _LANES)[None, :]
        w = _float(_load(parameter_ptr, places, left, WHOLE), PARAMETER_BF16)
        g = _float(_load(gradient_ptr, places, left, WHOLE), GRADIENT_BF16) * scale
        m = _load(first_ptr, places, left, WHOLE)
        v = _load(second_ptr, places, left, WHOLE)
        if EIGHT_BIT:
            blocks = rows * _PARTS + part
            num_blocks = tl.cdiv(left, _LANES)
            m = decode_levels(m, _load(first_scales_ptr, blocks, num_blocks, WHOLE), FIRST)
            v = decode_levels(v, _load(second_scales_ptr, blocks, num_blocks, WHOLE), SECOND)
        w -= w * lr_decay
        m = m * beta1 + g * rest1
        v = v * beta2 + g * g * rest2
        w -= m * step / (tl.sqrt_rn(v) * root + eps)
        if PARAMETER_BF16:
            added = draw(p0, p1, p2, p3, part) if STOCHASTIC else half_to_even(w)
            _store(parameter_ptr, places, left, bf16_bits(w, added), WHOLE)
        else:
            _store(parameter_ptr, places, left, w, WHOLE)
        if EIGHT_BIT:
            drawn = draw(m0, m1, m2, m3, part)
            first_codes, first_scales = encode_levels(m, drawn, FIRST)
            second_codes, second_scales = encode_levels(v, drawn, SECOND)
            _store(first_scales_ptr, blocks, num_blocks, first_scales, WHOLE)
            _store(second_scales_ptr, blocks, num_blocks, second_scales, WHOLE)
            # Through int32: the conversion of floats to 8 bits is not defined beyond them on every device.
            _store(first_ptr, places, left, first_codes.to(tl.int32).to(tl.int8), WHOLE)
            _store(second_ptr, places, left, second_codes.to(tl.int32).to(tl.uint8), WHOLE)
        else:
            _store(first_ptr, places, left, m, WHOLE)
            _store(second_ptr, places, left, v, WHOLE)


@triton.jit(do_not_specialize=["num_tensors", "seed", "update"])
def adamw_kernel(
    addresses_ptr,
    sizes_ptr,
    pieces_ptr,
    decays_ptr,
    numbers_ptr,
    scale_ptr,
    num_tensors,
    lr,
    step,
    root,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    seed,
    update,
    PARAMETER_BF16: tl.constexpr,
    GRADIENT_BF16: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program updates one chunk. The address table has a row each for w, g, m, v and the scales of m and v."""
    place = tl.load(pieces_ptr + 2 * tl.program_id(0))
    group = tl.load(pieces_ptr + 2 * tl.program_id(0) + 1) * ROWS
    start = group.to(tl.int64) * _GROUP
    left = tl.load(sizes_ptr + place) - start
    tensor = tl.load(numbers_ptr + place)
    lr_decay = tl.load(decays_ptr + place) * lr
    scale = 1.0 if scale_ptr is None else tl.load(scale_ptr)
    w_address = tl.load(addresses_ptr + place)
    g_address = tl.load(addresses_ptr + num_tensors + place)
    m_address = tl.load(addresses_ptr + num_tensors * 2 + place)
    v_address = tl.load(addresses_ptr + num_tensors * 3 + place)
    w_ptr = w_address.to(tl.pointer_type(tl.uint16 if PARAMETER_BF16 else tl.float32)) + start
    g_ptr = g_address.to(tl.pointer_type(tl.uint16 if GRADIENT_BF16 else tl.float32)) + start
    m_ptr = m_address.to(tl.pointer_type(tl.int8 if EIGHT_BIT else tl.float32)) + start
    v_ptr = v_address.to(tl.pointer_type(tl.uint8 if EIGHT_BIT else tl.float32)) + start
    m_scales_ptr = m_ptr
    v_scales_ptr = v_ptr
    if EIGHT_BIT:
        m_scales_address = tl.load(addresses_ptr + num_tensors * 4 + place)
        v_scales_address = tl.load(addresses_ptr + num_tensors * 5 + place)
        m_scales_ptr = m_scales_address.to(tl.pointer_type(tl.float32)) + start // _LANES
        v_scales_ptr = v_scales_address.to(tl.pointer_type(tl.float32)) + start // _LANES
    misaligned = (w_address | g_address | m_address | v_address) % 16
    if (left >= ROWS * _GROUP) & (misaligned == 0):
        _chunk(
            tl.multiple_of(w_ptr, 16), tl.multiple_of(g_ptr, 16), tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16),
            m_scales_ptr, v_scales_ptr, 0, group, tensor,
            scale, lr_decay, step, root, beta1, beta2, rest1, rest2, eps, seed, update,
            PARAMETER_BF16, GRADIENT_BF16, EIGHT_BIT, STOCHASTIC, True, ROWS,
        )  # fmt: skip
    else:
        here = tl.minimum(left, ROWS * _GROUP).to(tl.int32)
        _chunk(
            w_ptr, g_ptr, m_ptr, v_ptr, m_scales_ptr, v_scales_ptr, here, group, tensor,
            scale, lr_decay, step, root, beta1, beta2, rest1, rest2, eps, seed, update,
            PARAMETER_BF16, GRADIENT_BF16, EIGHT_BIT, STOCHASTIC, False, ROWS,
        )  # fmt: skip


def _rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    if target.interpreted:
        return Config({"ROWS": 1})
    # Four numbers to the thread: vectors of 16 bytes of fp32, and registers for many loads in flight. 8-bit states wait
    # for the largest of a row, so few warps share a program. Two rows: one spills with triton 3.6.
    return Config({"ROWS": 2}, num_warps=2 if target.is_amd else 4, num_stages=1)


def _candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    # At most four numbers to the thread: with eight, a kernel took 20 s to compile.
    fewest = 1 if target.is_amd else 2
    return [
        Config({"ROWS": rows}, warps, 1)
        for rows in (1, 2, 4)
        for warps in (1, 2, 4, 8)
        if fewest * rows <= warps <= 4 * fewest * rows
    ]


ADAMW = Tunable("adamw", _rule, _candidates)


def launch_adamw(step: Step) -> None:
    """Update parameters and moments in place: one launch for each pair of dtypes of parameter and gradient."""
    for indices in step.groups():
        _launch_group(step, indices)


def _launch_group(step: Step, indices: list[int]) -> None:
    parameters = [step.parameters[i] for i in indices]
    # Kept alive until the launch is in the stream.
    gradients = [step.gradients[i].contiguous() for i in indices]
    states = [[tensors[i] for i in indices] for tensors in step.states]
    places = [address for tensors in (parameters, gradients, *states) for address in addresses(tensors)]
    sizes = tuple(parameter.numel() for parameter in parameters)
    device, dtype = parameters[0].device, parameters[0].dtype
    # First, because it refuses CUDA graphs before anything else breaks the capture.
    table = kept_upload(places, torch.int64, device)
    config = ADAMW.pick(dtype, target_of(parameters[0]), N=sum(sizes), exact_states=1 if step.eight_bit else 4)
    chunks = chunks_of(sizes, config.blocks["ROWS"] * GROUP, device)
    arguments = {
        "addresses_ptr": table,
        "sizes_ptr": chunks.sizes_T,
        "pieces_ptr": chunks.pieces_K2,
        "decays_ptr": kept_upload([step.weight_decays[i] for i in indices], torch.float32, device),
        "numbers_ptr": kept_upload(indices, torch.int32, device),
        "scale_ptr": step.grad_scale,
        "num_tensors": len(sizes),
        **vars(formula_of(step.lr, step.betas, step.eps, step.update)),
        "seed": step.seed,
        "update": step.update,
        "PARAMETER_BF16": dtype == torch.bfloat16,
        "GRADIENT_BF16": gradients[0].dtype == torch.bfloat16,
        "EIGHT_BIT": step.eight_bit,
        "STOCHASTIC": step.stochastic_rounding and dtype == torch.bfloat16,
    }
    launch(adamw_kernel, (chunks.num_chunks,), config, arguments)
