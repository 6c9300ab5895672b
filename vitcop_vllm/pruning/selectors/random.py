"""A random subset, which depends on the image alone and not on its batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitcop_vllm.pruning.budgets import encoder_alone
from vitcop_vllm.pruning.selector import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from vitcop_vllm.pruning.views import EncoderView


_UINT32 = 0xFFFFFFFF


def random_subset(view: EncoderView, count: int) -> Tensor:
    """The tokens with the smallest pseudo-random keys.

    The seed of an image is the sum over its pixels of hash(bits ^ hash(place)). The key of a token
    is hash(seed ^ hash(token)). Both are modulo 2^32. Within an image no two keys are equal.
    """
    import torch

    pixels = view.pixels.flatten(1).contiguous()
    bits = pixels.view(torch.int32 if pixels.element_size() == 4 else torch.int16).long()
    place = torch.arange(bits.shape[1], device=bits.device)
    seed = _hash((bits & _UINT32) ^ _hash(place)).sum(dim=1) & _UINT32
    token = torch.arange(view.num_tokens, device=bits.device)
    keys = _hash(seed[:, None] ^ _hash(token))
    return keys.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values


def _hash(x: Tensor) -> Tensor:
    """A bijection of integers in [0, 2^32): MurmurHash3's finalizer."""
    # int64 wraps in a product past 2^63, but its low 32 bits stay right.
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _UINT32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _UINT32
    return x ^ (x >> 16)


SELECTOR = Selector(encoder_alone, encoder=random_subset)
