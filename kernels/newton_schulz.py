"""Newton-Schulz iteration: moves the singular values of a matrix close to 1, for Muon.

`ROUNDS` times the quintic, on X / ||X|| (Frobenius), of a matrix or, where it is taller than wide, its transpose:

    A = X X^T        P = b A + c A A        X <- a X + P X

Coefficients that trade exactness for speed: singular values land in about [0.7, 1.2]. A and P are symmetric: on a GPU
only tiles on and above the diagonal are computed and written to both places; both scalings and sums happen on the fp32
accumulator. All matrices of a batch are done in the same launches.

Shapes: B matrices, R rows, C columns, R <= C. FLOPs of a round: 3 R^2 C + R^3; whole products take 4 R^2 C + 2 R^3.
Bytes of a round in b-byte numbers, beside what does not fit in the L2 cache: b (3 R C + 4 R^2).
Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024 (coefficients).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.kernels.language import dot
from trine.kernels.launch import ceil_div, launch, result_dtype, rounded
from trine.kernels.operation import run
from trine.kernels.samples import HALF_AND_SINGLE, Sample, meta
from trine.kernels.target import Target, target_of, uses_triton
from trine.kernels.tuning import Config, Shape, Tunable

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
# Places within a tile of up to 256 rows stay within 32 bits.
MAX_COLUMNS = 2**23
# Keeps a matrix of zeros at zero.
_FLOOR = 1e-7


def newton_schulz_reference(update_BRC: Tensor, *, rounds: int = ROUNDS) -> Tensor:
    """The formula in the dtype of its input, by torch; also what a CPU computes."""
    a, b, c = COEFFICIENTS
    tall = update_BRC.size(-2) > update_BRC.size(-1)
    x = update_BRC.mT if tall else update_BRC
    # The Frobenius norm bounds the spectral norm.
    norm = x.double() if x.dtype == torch.float64 else x.float()
    x = x / (norm.norm(dim=(-2, -1), keepdim=True) + _FLOOR).to(x.dtype)
    for _ in range(rounds):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def newton_schulz(update_BRC: Tensor, *, rounds: int = ROUNDS) -> Tensor:
    """Move the singular values of each matrix in a batch [B, rows, cols] close to 1, in the batch's dtype.

    Raises ValueError for another number of dimensions, or on a GPU for dtypes other than fp32, bf16 and fp16
    or more than `MAX_COLUMNS` rows or columns.
    """
    if update_BRC.dim() != 3 or not update_BRC.is_floating_point():
        raise ValueError(
            f"update is {update_BRC.dtype} {tuple(update_BRC.shape)}; expected a batch of matrices [B, rows, cols] "
            "in floating point"
        )
    if rounds < 0:
        raise ValueError(f"rounds is {rounds}; it must not be negative")
    if not uses_triton(update_BRC):
        return newton_schulz_reference(update_BRC, rounds=rounds)
    if update_BRC.dtype not in HALF_AND_SINGLE:
        raise ValueError(f"update is {update_BRC.dtype}; supported are float32, bfloat16 and float16")
    if max(update_BRC.shape[1:]) > MAX_COLUMNS:
        raise ValueError(f"update has shape {tuple(update_BRC.shape)}; rows and columns may be at most {MAX_COLUMNS}")
    tall = update_BRC.size(-2) > update_BRC.size(-1)
    result: Tensor = run(newton_schulz_forward, update_BRC.mT if tall else update_BRC, rounds)
    return result.mT if tall else result


# --- Triton -----------------------------------------------------------------------------------------------------------


@triton.jit
def _product(
    left_ptr,
    right_ptr,
    left_places,
    right_places,
    right_stride,
    right_inside,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum over k of left[:, k] right[k, :]; left moves by 1 with k, right by `right_stride`; BLOCK_K divides depth.

    `right_inside`: what of right is read, or None for all of it.
    """
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for _ in range(0, depth, BLOCK_K):
        if right_inside is None:
            right = tl.load(right_ptr + right_places)
        else:
            right = tl.load(right_ptr + right_places, mask=right_inside, other=0.0)
        total = dot(tl.load(left_ptr + left_places), right, total)
        left_ptr += BLOCK_K
        right_ptr += BLOCK_K * right_stride
    return total


@triton.jit
def symmetric_kernel(
    x_ptr,
    result_ptr,
    num_rows,
    depth,
    tiles,
    b,
    c,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of x x^T on or above the diagonal, also written below; with ADD of b x + c x x^T, x symmetric.

    Tiles are numbered by columns: column j begins at j (j + 1) / 2. A tile over an edge repeats the last row inside.
    """
    program = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    j = (tl.sqrt(8.0 * program + 1.0) * 0.5 - 0.5).to(tl.int32)
    # The root may be one off.
    j = tl.where(j * (j + 1) // 2 > program, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= program, j + 1, j)
    i = program - j * (j + 1) // 2
    row, column = i * TILE, j * TILE
    x_ptr += batch * num_rows * depth
    result_ptr += batch * num_rows * num_rows
    inner, lanes = tl.arange(0, BLOCK_K), tl.arange(0, TILE)
    rows = tl.minimum(lanes, num_rows - 1 - row)
    columns = tl.minimum(lanes, num_rows - 1 - column)
    total = _product(
        x_ptr + row.to(tl.int64) * depth, x_ptr + column.to(tl.int64) * depth,
        rows[:, None] * depth + inner[None, :], columns[None, :] * depth + inner[:, None],
        1, None, depth, TILE, TILE, BLOCK_K,
    )  # fmt: skip
    here = row.to(tl.int64) * num_rows + column
    inside = (lanes < num_rows - row)[:, None] & (lanes < num_rows - column)[None, :]
    if ADD:
        x = tl.load(x_ptr + here + rows[:, None] * num_rows + columns[None, :]).to(tl.float32)
        total = b * x + c * total
    value = total.to(result_ptr.dtype.element_ty)
    tl.store(result_ptr + here + lanes[:, None] * num_rows + lanes[None, :], value, mask=inside)
    if i != j:
        mirrored = column.to(tl.int64) * num_rows + row
        places = lanes[:, None] * num_rows + lanes[None, :]
        tl.store(result_ptr + mirrored + places, tl.trans(value), mask=tl.trans(inside))


@triton.jit
def apply_kernel(
    p_ptr,
    x_ptr,
    result_ptr,
    num_rows,
    num_columns,
    a,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of a x + p x. Tiles run in groups of GROUP tiles of rows, columns inside, to share the L2 cache."""
    row_tiles, column_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, COLUMNS)
    program = tl.program_id(0) % (row_tiles * column_tiles)
    batch = (tl.program_id(0) // (row_tiles * column_tiles)).to(tl.int64)
    group, within = program // (GROUP * column_tiles), program % (GROUP * column_tiles)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    row, column = (group * GROUP + within % size) * ROWS, within // size * COLUMNS
    p_ptr += batch * num_rows * num_rows
    x_ptr += batch * num_rows * num_columns
    result_ptr += batch * num_rows * num_columns
    inner, row_lanes, column_lanes = tl.arange(0, BLOCK_K), tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    rows = tl.minimum(row_lanes, num_rows - 1 - row)
    # Not clamped as rows are: places that do not follow each other are loaded one by one.
    inside_columns = (column_lanes < num_columns - column)[None, :]
    total = _product(
        p_ptr + row.to(tl.int64) * num_rows, x_ptr + column,
        rows[:, None] * num_rows + inner[None, :], inner[:, None] * num_columns + column_lanes[None, :],
        num_columns, inside_columns, num_rows, ROWS, COLUMNS, BLOCK_K,
    )  # fmt: skip
    here = row.to(tl.int64) * num_columns + column
    inside = (row_lanes < num_rows - row)[:, None] & inside_columns
    x = tl.load(x_ptr + here + row_lanes[:, None] * num_columns + column_lanes[None, :], mask=inside, other=0.0)
    value = (a * x.to(tl.float32) + total).to(result_ptr.dtype.element_ty)
    tl.store(result_ptr + here + row_lanes[:, None] * num_columns + column_lanes[None, :], value, mask=inside)


# --- configurations ---------------------------------------------------------------------------------------------------


def shared_estimate(config: Config, dtype: torch.dtype) -> int:
    """Bytes of shared memory that the pipelined loop holds at most."""
    blocks = config.blocks
    lines = 2 * blocks["TILE"] if "TILE" in blocks else blocks["ROWS"] + blocks["COLUMNS"]
    return config.num_stages * lines * blocks["BLOCK_K"] * dtype.itemsize


def _config(target: Target, dtype: torch.dtype, blocks: dict[str, int], warps: int) -> Config:
    """With as many stages, up to four, as fit in shared memory beside 16 KiB."""
    stages = (target.shared_bytes - 16 * 1024) // shared_estimate(Config(blocks, warps, 1), dtype)
    return Config(blocks, warps, max(1, min(2 if target.is_amd else 4, stages)))


def _symmetric_rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    if target.interpreted:
        return Config({"TILE": 16, "BLOCK_K": 16})
    if dtype == torch.float32 or shape["R"] <= 64:
        return _config(target, dtype, {"TILE": 64, "BLOCK_K": 32}, 8 if dtype == torch.float32 else 4)
    return _config(target, dtype, {"TILE": 128, "BLOCK_K": 32 if target.is_amd else 64}, 8)


def _symmetric_candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    configs = [
        _config(target, dtype, {"TILE": tile, "BLOCK_K": inner}, warps)
        for tile in (64, 128)
        for inner in (32, 64)
        for warps in (4, 8)
        if tile * tile <= 128 * 32 * warps
    ]
    return [config for config in configs if shared_estimate(config, dtype) <= target.shared_bytes]


def _apply_rule(shape: Shape, dtype: torch.dtype, target: Target) -> Config:
    if target.interpreted:
        return Config({"ROWS": 16, "COLUMNS": 16, "BLOCK_K": 16, "GROUP": 2})
    if dtype == torch.float32 or shape["R"] <= 64:
        return _config(
            target, dtype, {"ROWS": 64, "COLUMNS": 64, "BLOCK_K": 32, "GROUP": 8}, 8 if dtype == torch.float32 else 4
        )
    # 256 columns spill with triton 3.6; tuning tries them.
    return _config(target, dtype, {"ROWS": 128, "COLUMNS": 128, "BLOCK_K": 32 if target.is_amd else 64, "GROUP": 8}, 8)


def _apply_candidates(shape: Shape, dtype: torch.dtype, target: Target) -> list[Config]:
    configs = [
        _config(target, dtype, {"ROWS": rows, "COLUMNS": columns, "BLOCK_K": inner, "GROUP": 8}, warps)
        for rows in (64, 128)
        for columns in (64, 128, 256)
        for inner in (32, 64)
        for warps in (4, 8)
        if rows * columns <= 128 * 32 * warps
    ]
    return [config for config in configs if shared_estimate(config, dtype) <= target.shared_bytes]


SYMMETRIC = Tunable("newton_schulz_symmetric", _symmetric_rule, _symmetric_candidates)
APPLY = Tunable("newton_schulz_apply", _apply_rule, _apply_candidates)


def padding(target: Target) -> int:
    """What rows and columns of the kernels' matrices are a multiple of: every BLOCK_K divides it."""
    return 16 if target.interpreted else 64


# --- launchers --------------------------------------------------------------------------------------------------------


def launch_symmetric(x_BRK: Tensor, add: tuple[float, float] | None = None) -> Tensor:
    """x x^T [B, R, R]; with `add` = (b, c) of a symmetric x: b x + c x x. Sizes are multiples of `padding`."""
    batch, num_rows, depth = x_BRK.shape
    result_BRR = x_BRK.new_empty(batch, num_rows, num_rows, dtype=result_dtype(x_BRK.dtype))
    config = SYMMETRIC.pick(x_BRK.dtype, target_of(x_BRK), B=batch, R=num_rows, C=depth)
    side = ceil_div(num_rows, config.blocks["TILE"])
    tiles = side * (side + 1) // 2
    b, c = add or (0.0, 1.0)
    arguments = {
        "x_ptr": x_BRK,
        "result_ptr": result_BRR,
        "num_rows": num_rows,
        "depth": depth,
        "tiles": tiles,
        "b": b,
        "c": c,
        "ADD": add is not None,
    }
    launch(symmetric_kernel, (batch * tiles,), config, arguments)
    return rounded(result_BRR, x_BRK.dtype)


def launch_apply(p_BRR: Tensor, x_BRC: Tensor, a: float) -> Tensor:
    """a x + p x. Sizes are multiples of `padding`."""
    batch, num_rows, num_columns = x_BRC.shape
    result_BRC = torch.empty_like(x_BRC, dtype=result_dtype(x_BRC.dtype))
    config = APPLY.pick(x_BRC.dtype, target_of(x_BRC), B=batch, R=num_rows, C=num_columns)
    tiles = ceil_div(num_rows, config.blocks["ROWS"]) * ceil_div(num_columns, config.blocks["COLUMNS"])
    arguments = {
        "p_ptr": p_BRR,
        "x_ptr": x_BRC,
        "result_ptr": result_BRC,
        "num_rows": num_rows,
        "num_columns": num_columns,
        "a": a,
    }
    launch(apply_kernel, (batch * tiles,), config, arguments)
    return rounded(result_BRC, x_BRC.dtype)


def _launch(x_BRC: Tensor, rounds: int) -> Tensor:
    """All rounds on matrices that are no taller than wide; contiguous [B, R, C].

    Rows and columns of zeros are added up to a multiple of `padding`; they stay zero and change nothing else.
    """
    a, b, c = COEFFICIENTS
    batch, rows, columns = x_BRC.shape
    norm_B11 = torch.linalg.vector_norm(x_BRC, dim=(-2, -1), keepdim=True, dtype=torch.float32) + _FLOOR
    multiple = padding(target_of(x_BRC))
    padded = [ceil_div(size, multiple) * multiple for size in (rows, columns)]
    result = x_BRC.new_zeros(batch, *padded)
    result[:, :rows, :columns] = x_BRC / norm_B11.to(x_BRC.dtype)
    for _ in range(rounds):
        gram_BRR = launch_symmetric(result)
        result = launch_apply(launch_symmetric(gram_BRR, (b, c)), result, a)
    return result[:, :rows, :columns].contiguous()


@torch.library.custom_op("trine::newton_schulz", mutates_args=())
def newton_schulz_forward(x_BRC: Tensor, rounds: int) -> Tensor:
    """The registered operation, on matrices that are no taller than wide."""
    return _launch(x_BRC, rounds)


@newton_schulz_forward.register_fake
def _(x_BRC: Tensor, rounds: int) -> Tensor:
    return torch.empty(x_BRC.shape, dtype=x_BRC.dtype, device=x_BRC.device)


def samples() -> Iterator[Sample]:
    """Launches of usual size, for compiling ahead of time."""
    a, b, c = COEFFICIENTS
    for dtype in HALF_AND_SINGLE:
        for rows, columns in ((4096, 14336), (64, 256)):
            x_BRC, p_BRR = meta(4, rows, columns, dtype=dtype), meta(4, rows, rows, dtype=dtype)
            shape, cores = f"{rows}x{columns}", dtype != torch.float32
            yield Sample(f"newton_schulz x x' {shape}", dtype, partial(launch_symmetric, x_BRC), cores)
            yield Sample(f"newton_schulz b a + c a a {shape}", dtype, partial(launch_symmetric, p_BRR, (b, c)), cores)
            yield Sample(f"newton_schulz a x + p x {shape}", dtype, partial(launch_apply, p_BRR, x_BRC, a), cores)
