"""The two Triton kernels behind LoRALinear on a GPU. lora/kernels.py calls them, and says the same in plain
torch.

Both are torch operators of the kind whose inside torch.compile sees (`triton_op`): a compiled block launches
the kernel itself. Neither has a gradient: lora/kernels.py's autograd.Functions have.

Sums are float32's, whatever the tensors' type. Products of float32 are made of three of TF32's ("tf32x3"),
which is as exact as float32, whatever torch's precision is set to.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

# Where rows of a matrix with a border begin: at multiples of this many numbers, which Triton and
# torch.compile ask for before they read several at once.
ALIGNED = 16
# Rows, columns and ranks of a tile of effective_weight; ranks, columns and rows of one of adapter_gradients,
# whose float32 rows take more registers. Both without spilling: tests/test_triton_kernels.py compiles them.
TILES = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8}
SLABS = {"BLOCK_R": 64, "BLOCK_C": 64, "num_warps": 8}
ROWS = {2: 64, 4: 16}  # by bytes of a number
PROGRAMS = 108  # that adapter_gradients starts at least: one for each of an A100's multiprocessors


# ---- W + B A


@triton.jit
def effective_weight_kernel(
    weight, B, A, result, OUT, IN, RANK, BORDER,
    weight_row, weight_column, B_row, B_column, A_row, A_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of `result` (OUT + BORDER, IN + BORDER), see `effective_weight`. Strides: X_row, X_column."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # (BLOCK_M, 1)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # (1, BLOCK_N)
    inside = (rows < OUT) & (columns < IN)
    tile = tl.load(weight + rows * weight_row + columns * weight_column, inside, 0).to(tl.float32)
    for first in range(0, RANK, BLOCK_K):
        down = first + tl.arange(0, BLOCK_K)[:, None]  # (BLOCK_K, 1)
        across = first + tl.arange(0, BLOCK_K)[None, :]  # (1, BLOCK_K)
        b = tl.load(B + rows * B_row + across * B_column, (rows < OUT) & (across < RANK), 0)
        a = tl.load(A + down * A_row + columns * A_column, (down < RANK) & (columns < IN), 0)
        tile = tl.dot(b.to(tl.float32), a.to(tl.float32), tile, input_precision="tf32x3")
    if BORDER > 0:
        right, below = columns - IN, rows - OUT  # of the weight: there B's columns, and A's rows
        in_B = (rows < OUT) & (right >= 0) & (right < RANK)
        in_A = (columns < IN) & (below >= 0) & (below < RANK)
        tile += tl.load(B + rows * B_row + right * B_column, in_B, 0).to(tl.float32)
        tile += tl.load(A + below * A_row + columns * A_column, in_A, 0).to(tl.float32)
    place = result + rows * (IN + BORDER) + columns
    tl.store(place, tile.to(result.dtype.element_ty), (rows < OUT + BORDER) & (columns < IN + BORDER))


@triton_op("prelora::effective_weight", mutates_args=())
def effective_weight(weight: Tensor, B: Tensor, A: Tensor, dtype: torch.dtype, bordered: bool) -> Tensor:
    """W + B A, summed in float32 and then cast to `dtype`: (out, in), (out, ranks), (ranks, in) -> (out, in).

    With a border it is [[W + B A, B], [A, 0]], (out + r, in + r) with r the ranks, rounded up to a multiple
    of ALIGNED by zeros: x times its first `in` columns gives y and A x at once, dy times its first
    `out` rows gives dx and dy B.
    """
    OUT, IN, RANK = weight.shape[0], weight.shape[1], A.shape[0]
    border = (RANK + ALIGNED - 1) // ALIGNED * ALIGNED if bordered else 0
    result = torch.empty(OUT + border, IN + border, dtype=dtype, device=weight.device)
    grid = (triton.cdiv(OUT + border, TILES["BLOCK_M"]), triton.cdiv(IN + border, TILES["BLOCK_N"]))
    strides = *weight.stride(), *B.stride(), *A.stride()
    wrap_triton(effective_weight_kernel)[grid](weight, B, A, result, OUT, IN, RANK, border, *strides, **TILES)
    return result


# ---- the adapters' gradients


@triton.jit
def adapter_gradients_kernel(
    x, dy, ax, dy_B, result, N, IN, OUT, RANK, BORDER, STEPS,
    x_row, x_column, dy_row, dy_column, ax_row, ax_column, dy_B_row, dy_B_column,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of one slab of `result`, see `adapter_gradients`: STEPS × BLOCK_N rows of x with those of dy B,
    or of dy with those of A x, of which BORDER columns are read and RANK count. Strides: X_row, X_column.

    The blocks of ranks are the grid's first axis: programs that read the same columns start together, and all
    but one find them in the cache.
    """
    ranks = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
    tile, slab = tl.program_id(1), tl.program_id(2)
    left, left_row, left_column = dy_B, dy_B_row, dy_B_column
    right, right_row, right_column, width, offset = x, x_row, x_column, IN, 0
    tiles_of_x = (IN + BLOCK_C - 1) // BLOCK_C
    if tile >= tiles_of_x:
        tile -= tiles_of_x
        left, left_row, left_column = ax, ax_row, ax_column
        right, right_row, right_column, width, offset = dy, dy_row, dy_column, OUT, IN
    columns = tile * BLOCK_C + tl.arange(0, BLOCK_C)  # (BLOCK_C,)
    total = tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32)
    for step in range(STEPS):
        rows = (slab * STEPS + step) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        places = rows.to(tl.int64)  # a large batch has more than 2^31 elements
        a = tl.load(
            left + places[None, :] * left_row + ranks[:, None] * left_column,
            (rows < N)[None, :] & (ranks < BORDER)[:, None],
            0,
        )  # (BLOCK_R, BLOCK_N)
        b = tl.load(
            right + places[:, None] * right_row + columns[None, :] * right_column,
            (rows < N)[:, None] & (columns < width)[None, :],
            0,
        )  # (BLOCK_N, BLOCK_C)
        total = tl.dot(a, b, total, input_precision="tf32x3")
    place = result + (slab * RANK + ranks[:, None]) * (IN + OUT) + offset + columns[None, :]
    tl.store(place, total, (ranks < RANK)[:, None] & (columns < width)[None, :])


@triton_op("prelora::adapter_gradients", mutates_args=())
def adapter_gradients(x: Tensor, dy: Tensor, ax: Tensor, dy_B: Tensor, ranks: int) -> Tensor:
    """[dA, (dy' A x)'] in slabs of rows, which are to be added up: (slabs, ranks, in + out), float32.

    x (N, in) and dy (N, out), columns of them less than 2^31 numbers apart. ax = A x and dy_B = dy B, (N,
    ranks or more) each: what they have more is not used. dA = (dy B)' x. One launch reads x and dy once.
    Slabs instead of atomic additions: the same input gives the same bits.
    """
    (N, IN), OUT, BORDER = x.shape, dy.shape[1], ax.shape[1]
    tiles = triton.cdiv(IN, SLABS["BLOCK_C"]) + triton.cdiv(OUT, SLABS["BLOCK_C"])
    blocks = max(triton.cdiv(N, ROWS[x.element_size()]), 1)  # of rows
    steps = triton.cdiv(blocks, min(triton.cdiv(PROGRAMS, tiles), blocks))
    slabs = triton.cdiv(blocks, steps)
    result = torch.empty(slabs, ranks, IN + OUT, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(ranks, SLABS["BLOCK_R"]), tiles, slabs)
    strides = *x.stride(), *dy.stride(), *ax.stride(), *dy_B.stride()
    arguments = x, dy, ax, dy_B, result, N, IN, OUT, ranks, BORDER, steps, *strides
    wrap_triton(adapter_gradients_kernel)[grid](*arguments, BLOCK_N=ROWS[x.element_size()], **SLABS)
    return result
