"""DivPrune (arXiv 2503.02175): tokens that lie far from each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitcop_vllm.pruning.budgets import encoder_alone
from vitcop_vllm.pruning.selector import Selector, indices_of

if TYPE_CHECKING:
    from torch import Tensor

    from vitcop_vllm.pruning.views import EncoderView


_ROWS = 1024
"""Tokens whose distances to all others are in memory at once."""


def max_min_diversity(view: EncoderView, count: int) -> Tensor:
    """Tokens far from each other in cosine distance, as the decoder gets them.

    The first is the token whose nearest neighbour is farthest. Each next one is the token that is
    farthest from its nearest selected token.
    """
    import torch
    import torch.nn.functional as F

    unit = F.normalize(view.embed().float(), dim=-1)
    num_tokens = unit.shape[1]
    # No (V, V) matrix of distances: an image may have 16,384 tokens.
    to_selected = torch.cat([_to_nearest(unit, first) for first in range(0, num_tokens, _ROWS)], 1)
    taken = torch.zeros_like(to_selected, dtype=torch.bool)
    for number in range(count):
        farthest = to_selected.masked_fill(taken, -torch.inf).argmax(dim=1, keepdim=True)
        taken = taken.scatter(1, farthest, True)
        vector = unit.gather(1, farthest[:, :, None].expand(-1, -1, unit.shape[2])).squeeze(1)
        distance = 1.0 - torch.einsum("bvh,bh->bv", unit, vector)
        to_selected = torch.minimum(to_selected, distance) if number else distance
    return indices_of(taken, count)


def _to_nearest(unit: Tensor, first: int) -> Tensor:
    """(B, n) cosine distance of tokens ``first`` and following to their nearest other token."""
    import torch

    some = unit[:, first : first + _ROWS]
    token = torch.arange(unit.shape[1], device=unit.device)
    itself = token[first : first + _ROWS, None] == token
    return (1.0 - some @ unit.mT).masked_fill_(itself, torch.inf).amin(dim=2)


SELECTOR = Selector(encoder_alone, encoder=max_min_diversity, reads_embeddings=True)
