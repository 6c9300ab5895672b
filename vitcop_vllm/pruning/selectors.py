"""Which visual tokens survive: the functions that the table in ``budgets`` names.

All have one interface. They see B images (or G spans) of equal token count and return
exactly ``count`` indices of each, ascending, whatever the values; equals go to the lower
index. Arithmetic is float32. Nothing here waits for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcop_vllm.pruning.budgets import Selector
from vitcop_vllm.pruning.kernel_set import KernelSet
from vitcop_vllm.pruning.saliency import attention_received, cls_saliency
from vitcop_vllm.pruning.selection import StageTwoSelection, mean_key_norm

NUM_PIVOTS = 8
"""Pivots of DART, as published for LLaVA-1.5."""

_UINT32 = 0xFFFFFFFF


@dataclass(frozen=True)
class EncoderView:
    """The last encoder layer on B images of one grid; V visual tokens, D head size.

    A visual token is made of P patches, which are neighbours among the keys. ``heads`` are
    this rank's.

    Attributes:
        queries: Makes (B, Q, heads, D), the queries that attention received is averaged over.
        keys: (B, C + V * P, heads, D) keys, after rotary embedding; C is 1 with [CLS], else 0.
        cls_query: (B, heads, D) query of [CLS]; ``None`` in encoders without it.
        features: Makes (B, V, heads * D), what tokens are clustered by: their keys before
            rotary embedding, averaged over patches.
        scale: Factor on the scores of query and key.
        grid: Rows and columns of visual tokens; row-major, V in all.
        pixels: (B, ...) the images as they enter the encoder.
        embed: Makes (B, V, H), the tokens as the decoder would get them.
        mean_over_ranks: Averages a tensor over tensor-parallel ranks.
        concat_over_ranks: Joins the last dimensions of a tensor that all ranks have.
        kernels: Implementation of the functions that choose tokens.
    """

    queries: Callable[[], Tensor]
    keys: Tensor
    cls_query: Tensor | None
    features: Callable[[], Tensor]
    scale: float
    grid: tuple[int, int]
    pixels: Tensor
    embed: Callable[[], Tensor]
    mean_over_ranks: Callable[[Tensor], Tensor]
    concat_over_ranks: Callable[[Tensor], Tensor]
    kernels: KernelSet
    # Not cached_property: in Python 3.11 it has one lock for all views, and ranks wait for others.
    _saliency: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of_embeddings(cls, embeddings: Tensor, grid: tuple[int, int], kernels: KernelSet) -> Self:
        """A view for selectors that read (B, V, H) embeddings, and nothing of the layer."""
        nothing = embeddings.new_empty(0)
        return cls(
            queries=lambda: nothing,
            keys=nothing,
            cls_query=None,
            features=lambda: nothing,
            scale=1.0,
            grid=grid,
            pixels=nothing,
            embed=lambda: embeddings,
            mean_over_ranks=lambda x: x,
            concat_over_ranks=lambda x: x,
            kernels=kernels,
        )

    def attention_of_cls(self) -> Tensor:
        """(B, V) float32: attention of [CLS], summed over heads. Computed once."""
        assert self.cls_query is not None, "this encoder has no [CLS]"
        if "cls" not in self._saliency:
            saliency = cls_saliency(self.cls_query, self.keys, self.scale)
            self._saliency["cls"] = self.mean_over_ranks(saliency)
        return self._saliency["cls"]

    def attention_received(self) -> Tensor:
        """(B, V) float32: attention of all queries, averaged over a token's patches.

        Computed once.
        """
        if "received" not in self._saliency:
            self._saliency["received"] = self._attention_received()
        return self._saliency["received"]

    def _attention_received(self) -> Tensor:
        received = attention_received(self.queries(), self.keys, self.scale)
        per_patch = received[:, self.cls_query is not None :]
        num_tokens = self.grid[0] * self.grid[1]
        return self.mean_over_ranks(per_patch.unflatten(1, (num_tokens, -1)).mean(dim=2))


@dataclass(frozen=True)
class BoundaryView:
    """What there is to see at a boundary: G spans of n tokens in a step of T rows.

    Attributes:
        rows: (G, n) int64, the spans' rows.
        queries: (T, heads, D) queries of the layer before, after rotary embedding; the heads
            are this rank's.
        keys: (T, kv_heads, D) keys of that layer, likewise.
        scale: Factor on the scores of query and key.
        hidden: Makes (G, n, H), the spans' residual stream after the layer before; for
            functions that ``budgets.READ_HIDDEN`` names, the others are asked sooner.
        norm_weight: (H,), of the norm that ends the decoder.
        prompt_rows: (2, G) int64, first and last row of each span's prompt. Only selectors
            that read the question are sure that all of it is in the step.
        labels: (G, n) int64 cluster labels; ``None`` where there are no clusters.
        num_centres: K.
        mean_over_ranks: Averages a tensor over tensor-parallel ranks.
        kernels: Implementation of the functions that choose tokens.
    """

    rows: Tensor
    queries: Tensor
    keys: Tensor
    scale: float
    hidden: Callable[[], Tensor]
    norm_weight: Tensor
    prompt_rows: Tensor
    labels: Tensor | None
    num_centres: int
    mean_over_ranks: Callable[[Tensor], Tensor]
    kernels: KernelSet


def select_patches(selector: Selector, view: EncoderView, count: int) -> Tensor:
    """(B, count) int64: the tokens that the selector keeps in the encoder."""
    assert selector.encoder is not None
    chosen: Tensor = _function(selector.encoder)(view, count)
    return chosen


def saliency_of(selector: Selector, view: EncoderView) -> Tensor | None:
    """(B, V) float32 that Stage I ranks tokens by; ``None`` if the selector ranks by none.

    Costs nothing after :func:`select_patches`: ``view`` keeps what it has computed.
    """
    source = selector.saliency_source(has_cls=view.cls_query is not None)
    if source is None:
        return None
    return view.attention_of_cls() if source == "cls" else view.attention_received()


def select_tokens(
    selector: Selector, stage: int, view: BoundaryView, count: int
) -> Tensor | StageTwoSelection:
    """(G, count) int64: the tokens that enter ``stage``, 1 or 2; merged ones with their groups."""
    name = selector.shallow if stage == 1 else selector.deep
    assert name is not None, f"no token may be lost before stage {stage}"
    chosen: Tensor | StageTwoSelection = _function(name)(view, count)
    return chosen


def _function(name: str) -> Any:
    return globals()[name]


# In the encoder: (B, count) of V patches.


def encoder_attention(view: EncoderView, count: int) -> Tensor:
    """The tokens that [CLS] attends to most; without [CLS], those that all attend to most.

    ViTCoP's Stage I (arXiv 2601.17818), which was published for an encoder with [CLS].
    """
    function = received_attention if view.cls_query is None else cls_attention
    return function(view, count)


def cls_attention(view: EncoderView, count: int) -> Tensor:
    """The tokens that [CLS] attends to most, summed over heads.

    VisionZip (arXiv 2412.04467) calls them dominant tokens.
    """
    return view.kernels.most_salient(view.attention_of_cls(), count)


def received_attention(view: EncoderView, count: int) -> Tensor:
    """The tokens that receive most attention from all tokens, summed over heads."""
    return view.kernels.most_salient(view.attention_received(), count)


def random_subset(view: EncoderView, count: int) -> Tensor:
    """A random subset that depends on the image alone, not on when or with whom it comes.

    An image's seed is the sum over its pixels of hash(bits ^ hash(place)), the key of a
    patch is hash(seed ^ hash(patch)), both modulo 2^32, and the smallest keys stay. With one
    seed no two patches have one key.
    """
    pixels = view.pixels.flatten(1).contiguous()
    bits = pixels.view(torch.int32 if pixels.element_size() == 4 else torch.int16).long()
    place = torch.arange(bits.shape[1], device=bits.device)
    seed = _hash((bits & _UINT32) ^ _hash(place)).sum(dim=1) & _UINT32
    patch = torch.arange(view.grid[0] * view.grid[1], device=bits.device)
    keys = _hash(seed[:, None] ^ _hash(patch))
    return keys.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values


def even_grid(view: EncoderView, count: int) -> Tensor:
    """Patches spread evenly over the image, the same ones in each.

    They come in the order of ordered dithering (Bayer, 1973): with any count, two aligned
    squares of 2^k patches a side never differ by more than one.
    """
    height, width = view.grid
    patch = torch.arange(height * width, device=view.pixels.device)
    row, column = patch.div(width, rounding_mode="floor"), patch.remainder(width)
    order = torch.zeros_like(patch)
    # The lowest bits of a place, whether it is odd, weigh most in its threshold.
    for bit in range((max(height, width) - 1).bit_length()):
        down, right = (row >> bit) & 1, (column >> bit) & 1
        order = 4 * order + 2 * (down ^ right) + down
    index = order.argsort(stable=True)[:count].sort().values
    return index.expand(view.pixels.shape[0], -1)


_ROWS = 1024
"""Tokens whose distances to all others are held at once."""


def _to_nearest(unit: Tensor, first: int) -> Tensor:
    """(B, n) cosine distance from tokens ``first`` and following to their nearest other."""
    some = unit[:, first : first + _ROWS]
    token = torch.arange(unit.shape[1], device=unit.device)
    itself = token[first : first + _ROWS, None] == token
    return (1.0 - some @ unit.mT).masked_fill_(itself, torch.inf).amin(dim=2)


def _row(unit: Tensor, index: Tensor) -> Tensor:
    """(B, V, H) rows at (B, 1) indices: (B, H)."""
    return unit.gather(1, index[:, :, None].expand(-1, -1, unit.shape[2])).squeeze(1)


def max_min_diversity(view: EncoderView, count: int) -> Tensor:
    """The tokens that lie far from each other in cosine distance.

    DivPrune (arXiv 2503.02175), on the tokens as the decoder gets them: begins with the
    token whose nearest neighbour is farthest, then adds the token that is farthest from the
    nearest of those chosen.
    """
    unit = F.normalize(view.embed().float(), dim=-1)
    num_tokens = unit.shape[1]
    # No (V, V) matrix of distances: an image may have 16,384 tokens.
    to_chosen = torch.cat([_to_nearest(unit, first) for first in range(0, num_tokens, _ROWS)], 1)
    taken = torch.zeros_like(to_chosen, dtype=torch.bool)
    for number in range(count):
        farthest = to_chosen.masked_fill(taken, -torch.inf).argmax(dim=1, keepdim=True)
        taken = taken.scatter(1, farthest, True)
        row = 1.0 - torch.einsum("bvh,bh->bv", unit, _row(unit, farthest))
        to_chosen = torch.minimum(to_chosen, row) if number else row
    return _indices(taken, count)


# At a boundary: (G, count) of n tokens.


def cluster_merging(view: BoundaryView, count: int) -> StageTwoSelection:
    """ViTCoP's Stage II (arXiv 2601.17818): small keys stay whole, clusters are merged."""
    assert view.labels is not None
    return view.kernels.select_stage_two(_key_norms(view), view.labels, view.num_centres, count)


def key_norm(view: BoundaryView, count: int) -> Tensor:
    """The tokens of smallest mean key norm: ViTCoP's Stage III (arXiv 2601.17818)."""
    return view.kernels.select_stage_three(_key_norms(view), count)


def last_token_attention(view: BoundaryView, count: int) -> Tensor:
    """The tokens that the prompt's last token attends to most, averaged over heads.

    FastV (arXiv 2403.06764): attention probabilities of the layer before, with the softmax
    over the whole prompt.
    """
    first, last = view.prompt_rows
    # Query heads h * share .. (h + 1) * share - 1 look at KV head h.
    query = view.queries[last].float().unflatten(1, (view.keys.shape[1], -1))
    scores = torch.einsum("gksd,tkd->gkst", query, view.keys.float()) * view.scale
    row = torch.arange(view.keys.shape[0], device=view.keys.device)
    prompt = (row >= first[:, None]) & (row <= last[:, None])
    attention = scores.masked_fill(~prompt[:, None, None], -torch.inf).softmax(dim=-1)
    received = view.mean_over_ranks(attention.mean(dim=(1, 2)).gather(1, view.rows))
    return view.kernels.most_salient(received, count)


def least_duplicated(view: BoundaryView, count: int) -> Tensor:
    """Pivots, and the tokens least similar to them.

    DART (arXiv 2502.11494): the :data:`NUM_PIVOTS` tokens of largest key, in L1 norm over
    all heads, are pivots. Each in turn keeps, of the tokens that are left, those of smallest
    cosine similarity to it, in the hidden state after the decoder's last norm. Published
    with four pivots from the question and four from the image; here all are the image's,
    so that the choice does not depend on the question. What does not divide by the pivots
    goes one each to the largest.
    """
    sizes = view.mean_over_ranks(view.keys[view.rows].float().abs().sum(dim=(2, 3)))
    num_pivots = min(NUM_PIVOTS, count)
    pivots = sizes.argsort(dim=1, descending=True, stable=True)[:, :num_pivots]
    taken = torch.zeros_like(sizes, dtype=torch.bool).scatter(1, pivots, True)
    # The norm's division by a token's length is none of the cosine's business.
    unit = F.normalize(view.hidden().float() * view.norm_weight.float(), dim=-1)
    similarity = unit.gather(1, pivots[:, :, None].expand(-1, -1, unit.shape[2])) @ unit.mT
    share, rest = divmod(count - num_pivots, num_pivots)
    for pivot in range(num_pivots):
        left = similarity[:, pivot].masked_fill(taken, torch.inf)
        quota = share + (pivot < rest)
        taken = taken.scatter(1, left.argsort(dim=1, stable=True)[:, :quota], True)
    return _indices(taken, count)


def _key_norms(view: BoundaryView) -> Tensor:
    """(G, n) norm of the key averaged over the KV heads of all ranks; smaller is more salient."""
    return mean_key_norm(view.keys[view.rows], view.mean_over_ranks)


def _indices(taken: Tensor, count: int) -> Tensor:
    """(B, count) int64 ascending: where (B, n) ``taken`` is set, ``count`` times per row.

    Where it is set less often, as values that are not finite can bring about, the lowest
    others join.
    """
    # A stable sort stands in for nonzero, whose shape depends on data.
    first = taken.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    return first.sort(dim=1).values


def _hash(x: Tensor) -> Tensor:
    """A bijection of integers in [0, 2^32) that scatters them: MurmurHash3's finalizer."""
    # int64 wraps in a product past 2^63, and its low 32 bits are right all the same.
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _UINT32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _UINT32
    return x ^ (x >> 16)
