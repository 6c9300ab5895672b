"""The table of selectors: what the engine must know of each before a forward pass.

A *selector* is a way of choosing which visual tokens survive. Its row here says how many
that are in each stage, and names the functions of ``selectors`` that choose them.

To add one: a function in ``selectors``, a row here, and its name in
``settings.SelectorName``; in :data:`READ_HIDDEN` too, where it reads the residual stream at a
boundary. Tests hold them together.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from vitcop_vllm.pruning.settings import FractionRow, PruningSettings, SelectorName

_ROW_SNAP = 5e-4
"""A ratio rounded to three decimals (0.889 for 8/9) still means the published row."""

_MIN_SECOND_STAGE = 0.1
"""Smallest n2/n1 that very high ratios are planned with, before Stage I gives way."""


class Budget(NamedTuple):
    """Tokens of one image: K cluster centres (0: no clusters), and n1, n2, n3."""

    centres: int
    stages: tuple[int, int, int]


class BudgetInputs(NamedTuple):
    """What a budget rule is asked for.

    Attributes:
        keep: r, layer-averaged keep fraction, in (0, 1).
        encoder_tokens: V.
        num_layers: L.
        shallow, deep: S and D, first layers of the second and third stage.
    """

    keep: float
    encoder_tokens: int
    num_layers: int
    shallow: int
    deep: int


BudgetRule = Callable[[PruningSettings, BudgetInputs], Budget]


def three_stages(settings: PruningSettings, asked: BudgetInputs) -> Budget:
    """ViTCoP's counts (arXiv 2601.17818), with Stage I's fractions from the settings."""
    keep = asked.keep
    encoder_fraction, centre_fraction = _stage_one_fractions(settings.fractions, keep)
    # Stage I may not leave less than the budget (v >= r), nor spend it all before S.
    budget_limit = asked.num_layers * keep / (asked.shallow + _MIN_SECOND_STAGE * _weight(asked))
    v = min(max(encoder_fraction, keep), budget_limit, 1.0)
    n1 = max(1, int(v * asked.encoder_tokens))
    centres = max(1, int(min(max(centre_fraction, 0.0), 1.0) * n1))
    return Budget(centres, (n1, *_after_stage_one(asked, v, n1)))


def both_boundaries(settings: PruningSettings, asked: BudgetInputs) -> Budget:
    """ViTCoP's counts without its Stage I and without clusters: v = 1, n1 = V."""
    n1 = asked.encoder_tokens
    return Budget(0, (n1, *_after_stage_one(asked, 1.0, n1)))


def encoder_alone(settings: PruningSettings, asked: BudgetInputs) -> Budget:
    """n1 = n2 = n3 = round(r V): every layer sees the same tokens."""
    n = max(1, round(asked.keep * asked.encoder_tokens))
    return Budget(0, (n, n, n))


def shallow_boundary_alone(settings: PruningSettings, asked: BudgetInputs) -> Budget:
    """n1 = V, n2 = n3 = round((L r - S) / (L - S) V)."""
    v, layers, shallow = asked.encoder_tokens, asked.num_layers, asked.shallow
    n = max(1, round((layers * asked.keep - shallow) / (layers - shallow) * v))
    return Budget(0, (v, n, n))


def _stage_one_fractions(rows: tuple[FractionRow, ...], keep: float) -> tuple[float, float]:
    """Encoder and centre fractions at ``keep``: on, between or past the given rows."""
    for row in rows:
        if abs(row.keep - keep) < _ROW_SNAP:
            return row.encoder, row.centres
    if len(rows) == 1:
        return rows[0].encoder, rows[0].centres
    upper = min(max(bisect_right([row.keep for row in rows], keep), 1), len(rows) - 1)
    low, high = rows[upper - 1], rows[upper]
    t = (keep - low.keep) / (high.keep - low.keep)
    return (
        low.encoder + t * (high.encoder - low.encoder),
        low.centres + t * (high.centres - low.centres),
    )


def _weight(asked: BudgetInputs) -> float:
    """Layers that Stage II pays for, when Stage III keeps a fifth of its tokens."""
    return (asked.deep - asked.shallow) + (asked.num_layers - asked.deep) / 5


def _after_stage_one(asked: BudgetInputs, v: float, n1: int) -> tuple[int, int]:
    """n2 and n3 where Stage I keeps n1 tokens, the fraction v."""
    n2 = round((asked.num_layers * asked.keep / v - asked.shallow) / _weight(asked) * n1)
    n3 = round(n2 / 5)
    if n2 > n1:
        n2 = n1
        left = asked.num_layers * asked.keep * asked.encoder_tokens - asked.deep * n1
        n3 = round(left / (asked.num_layers - asked.deep))
    n2 = min(max(n2, 1), n1)
    n3 = min(max(n3, 1), n2)
    return n2, n3


READ_HIDDEN = ("cluster_merging", "least_duplicated")
"""Functions at a boundary that read the residual stream of tokens, or change it."""


@dataclass(frozen=True)
class Selector:
    """A row of the table.

    Attributes:
        budget: How many tokens live in each stage.
        encoder: Function that chooses n1 of V patches; ``None`` where all stay.
        shallow: Function that chooses n2 of n1 tokens at the shallow boundary, likewise.
        deep: Function that chooses n3 of n2 tokens at the deep boundary, likewise.
        reads_question: Whether the choice depends on tokens after the image. It is then
            no function of the prefix: nothing of it can be cached for another prompt, and
            a prompt is computed in one step.
        reads_embeddings: Whether the choice in the encoder depends on what it makes of the
            patches, and so can only be made when all are encoded.
    """

    budget: BudgetRule
    encoder: str | None = None
    shallow: str | None = None
    deep: str | None = None
    reads_question: bool = False
    reads_embeddings: bool = False

    def drops_before_mlp(self, stage: int) -> bool:
        """Whether tokens that do not enter ``stage``, 1 or 2, spare the MLP of the layer before.

        Its keys are there before its MLP is computed; most functions read no more.
        """
        function = (self.shallow, self.deep)[stage - 1]
        return function is not None and function not in READ_HIDDEN

    def saliency_source(self, *, has_cls: bool) -> Literal["cls", "received"] | None:
        """What the function in the encoder ranks visual tokens by.

        ``cls``: the attention that [CLS] pays to each. ``received``: the attention that each
        gets from all. ``None``: it does not rank them.

        Args:
            has_cls: Whether the encoder has [CLS].
        """
        match self.encoder:
            case "cls_attention":
                return "cls"
            case "received_attention":
                return "received"
            case "encoder_attention":
                return "cls" if has_cls else "received"
        return None

    def max_ratio(self, boundaries: tuple[int, int], num_layers: int) -> float:
        """Largest pruning ratio in reach: what the encoder does not cut lives S layers whole."""
        return 1.0 if self.encoder else 1.0 - boundaries[0] / num_layers


SELECTORS: dict[SelectorName, Selector] = {
    "vitcop": Selector(
        three_stages, encoder="encoder_attention", shallow="cluster_merging", deep="key_norm"
    ),
    "cls": Selector(encoder_alone, encoder="cls_attention"),
    "received": Selector(encoder_alone, encoder="received_attention"),
    "random": Selector(encoder_alone, encoder="random_subset"),
    "grid": Selector(encoder_alone, encoder="even_grid"),
    "divprune": Selector(encoder_alone, encoder="max_min_diversity", reads_embeddings=True),
    "key_norm": Selector(both_boundaries, shallow="key_norm", deep="key_norm"),
    "fastv": Selector(shallow_boundary_alone, shallow="last_token_attention", reads_question=True),
    "dart": Selector(shallow_boundary_alone, shallow="least_duplicated"),
}


def why_uncacheable(settings: PruningSettings) -> str | None:
    """Why no request may reuse a prefix that another computed with these settings, if so."""
    if SELECTORS[settings.selector].reads_question:
        return (
            f"selector {settings.selector} reads the question, so what survives of an image "
            "is good for one prompt only"
        )
    if settings.positions == "reference":
        return (
            "positions: reference numbers an answer's tokens differently once they are part of "
            "the next prompt; set positions: original"
        )
    return None
