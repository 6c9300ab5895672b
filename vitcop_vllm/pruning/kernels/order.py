"""Ranks of tokens by value, and the first tokens by rank."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LAST_32 = tl.constexpr(2**31 - 1)
LAST_64 = tl.constexpr(2**63 - 1)


@triton.jit
def order_key(x):
    """Integers that sort like the floats ``x``; -0 equals 0, and NaN sorts last."""
    if x.dtype == tl.float64:
        bits = (x + 0.0).to(tl.int64, bitcast=True)
        return tl.where(x == x, bits ^ ((bits >> 63) & LAST_64), LAST_64)
    else:
        bits = (x + 0.0).to(tl.int32, bitcast=True)
        return tl.where(x == x, bits ^ ((bits >> 31) & LAST_32), LAST_32)


@triton.jit
def comes_before(other_key, other, key, index):
    """(BLOCK, CHUNK) bool: whether the chunk's element ranks before the block's element.

    Ties go to the lower index.
    """
    less = other_key[None, :] < key[:, None]
    equal = other_key[None, :] == key[:, None]
    return less | (equal & (other[None, :] < index[:, None]))


@triton.jit
def ranks(values, index, n, DESCENDING: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """(BLOCK,) int32 ranks among n float32 values; ties go to the lower index."""
    key = order_key(tl.load(values + index, mask=index < n, other=0.0))
    key = ~key if DESCENDING else key
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_key = order_key(tl.load(values + other, mask=other < n, other=0.0))
        other_key = ~other_key if DESCENDING else other_key
        before = comes_before(other_key, other, key, index) & (other < n)[None, :]
        rank += tl.sum(before.to(tl.int32), axis=1)
    return rank


@triton.jit(do_not_specialize=["n", "count"])
def _first_kernel(
    values, chosen, n, count, DESCENDING: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """Indices of the ``count`` smallest or largest of n float32 values, ascending."""
    values += tl.program_id(0).to(tl.int64) * n
    chosen += tl.program_id(0).to(tl.int64) * count
    index = tl.arange(0, BLOCK)
    rank = ranks(values, index, n, DESCENDING, BLOCK, CHUNK)
    is_chosen = (index < n) & (rank < count)
    place = tl.cumsum(is_chosen.to(tl.int32), axis=0) - 1
    tl.store(chosen + place, index.to(tl.int64), mask=is_chosen)


def block_of(n: int) -> int:
    """Length of a Triton range for n values: a power of two, at least 16."""
    return max(16, int(triton.next_power_of_2(n)))


def chunk_of(block: int) -> int:
    """How many values to compare with a whole block at once, so that registers suffice."""
    return max(1, min(block, 4096 // block))


def first(values: Tensor, count: int, *, descending: bool = False) -> Tensor:
    """Indices of the ``count`` smallest or largest values of each row.

    Args:
        values: (B, n) float32; ties go to the lower index.
        count: At most n.
        descending: Whether to select the largest.

    Returns:
        (B, count) int64, ascending.
    """
    images, n = values.shape
    chosen = torch.empty(images, count, dtype=torch.int64, device=values.device)
    block = block_of(n)
    _first_kernel[(images,)](
        values.float().contiguous(),
        chosen,
        n,
        count,
        descending,
        block,
        chunk_of(block),
        num_warps=8,
    )
    return chosen
