"""The matrix product whose bits for a row depend on that row alone.

    c[m, n] = sum over k of a[m, k] b[n, k] (+ bias[n])

Why the bits hold. A number of c is one chain of fp32 additions, in one order:

- K is never split. A program takes pieces of BLOCK_K in their order, and within one the tensor cores are given slices
  of 16 (bf16, fp16) in their order; each instruction adds its slice to the accumulator of the same number. Rows,
  columns, their place in a tile and the number of tiles do not occur in this.
- What remains is how one instruction adds up its slice, which no vendor documents. So one kind of instruction is kept
  for each target (`configs.py`): m16n8k16 on sm_80; wgmma of 64 rows on sm_90, never the older one for few rows;
  tcgen05 of 128 rows on sm_100; the 32 x 32 matrix instruction on gfx942. Tiles differ in how many of them lie side by
  side, and on Hopper in how many columns one has. `keeps_row_bits` compares the bits of every tile on the device.
- fp32 is multiplied without tensor cores: one chain of fused multiply-adds for each number, k ascending.

How fast. As many programs as the device holds at one time, each walking over tiles (`flatten`: the loads of the next
tile begin while this one ends), in groups that share rows in the L2 cache. On Hopper and later, aligned operands
are fetched by TMA. Operations: 2 M N K; bytes of b-byte numbers: b (M K + N K + M N).
"""

from __future__ import annotations

import triton
import triton.language as tl

from trine.kernels.language import dot
from trine.kernels.mlp.projection import _tile_of as tile_of


@triton.jit
def _load(
    ptr,
    line,
    start,
    num_lines,
    width,
    line_stride,
    inner_stride,
    TRANSPOSED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    EVEN: tl.constexpr,
    FAR: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """LINES lines of an operand [lines, K] from `line` on, numbers from `start` on: [LINES, BLOCK_K].

    TRANSPOSED: it lies in memory as [K, lines], and the piece is [BLOCK_K, LINES]. What hangs over is zero, or repeats
    the last line.
    """
    if DESCRIBED:
        piece = ptr.load([start, line]) if TRANSPOSED else ptr.load([line, start])
    else:
        inner, lines = tl.arange(0, BLOCK_K), tl.arange(0, LINES)
        if FAR:
            inner, lines = inner.to(tl.int64), lines.to(tl.int64)
        first = tl.cast(line, tl.int64) * line_stride + tl.cast(start, tl.int64) * inner_stride
        if TRANSPOSED:
            # A clamp would hide from the compiler that the numbers of neighbouring lines lie side by side.
            wanted = (lines < num_lines - line)[None, :]
            inside = wanted if EVEN else wanted & (inner < width - start)[:, None]
            places = inner[:, None] * inner_stride + lines[None, :] * line_stride
            piece = tl.load(ptr + first + places, mask=inside, other=0.0)
        else:
            lines = tl.minimum(lines, num_lines - 1 - line)
            inside = None if EVEN else (inner < width - start)[None, :]
            places = lines[:, None] * line_stride + inner[None, :] * inner_stride
            piece = tl.load(ptr + first + places, mask=inside, other=None if EVEN else 0.0)
    return piece


@triton.jit
def invariant_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    c_ptr,
    num_rows,
    num_columns,
    width,
    a_row_stride,
    a_inner_stride,
    b_column_stride,
    b_inner_stride,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    EVEN: tl.constexpr,
    FAR: tl.constexpr,
    FLATTEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Every tile of a program: the first by its number, then one in as many as there are programs.

    FAR: the lines of an operand or of c lie so far apart that offsets within a tile need 64 bits.
    """
    tiles = tl.cdiv(num_rows, ROWS) * tl.cdiv(num_columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = tile_of(tile, num_rows, num_columns, ROWS, COLUMNS, GROUP)
        sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for start in range(0, width, BLOCK_K):
            a = _load(
                a_ptr, row, start, num_rows, width, a_row_stride, a_inner_stride, A_TRANSPOSED, DESCRIBED, EVEN,
                FAR, ROWS, BLOCK_K,
            )  # fmt: skip
            b = _load(
                b_ptr, column, start, num_columns, width, b_column_stride, b_inner_stride, B_TRANSPOSED, DESCRIBED,
                EVEN, FAR, COLUMNS, BLOCK_K,
            )  # fmt: skip
            sums = dot(a.T if A_TRANSPOSED else a, b if B_TRANSPOSED else b.T, sums)
        rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        if FAR:
            rows = rows.to(tl.int64)
        if bias_ptr is not None:
            wanted = columns < num_columns - column
            sums += tl.load(bias_ptr + column + columns, mask=wanted, other=0.0).to(tl.float32)
        inside = (rows < num_rows - row) & (columns < num_columns - column)
        first, places = tl.cast(row, tl.int64) * num_columns + column, rows * num_columns + columns
        tl.store(c_ptr + first + places, sums.to(c_ptr.dtype.element_ty), mask=inside)
