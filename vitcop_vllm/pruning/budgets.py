"""How many tokens of an image live in each run of decoder layers: rules that selectors choose from.

Plain arithmetic, without torch: scheduler and server plan with it.
"""

from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

from vitcop_vllm.pruning.settings import FractionRow, PruningSettings

_ROW_SNAP = 5e-4
"""A ratio rounded to three decimals (0.889 for 8/9) still means the published row."""

_MIN_SECOND_STAGE = 0.1
"""Smallest n2/n1 that very high ratios are planned with, before Stage I gives way."""


class Budget(NamedTuple):
    """Tokens of one image: K cluster centres (0: no clusters), and n1, n2, n3."""

    centres: int
    stages: tuple[int, int, int]


class BudgetInputs(NamedTuple):
    """What a budget rule computes counts from.

    Attributes:
        keep: r, layer-averaged keep fraction, in (0, 1).
        encoder_tokens: V.
        num_layers: L.
        shallow, deep: S and D, first layers of the second and third segment.
    """

    keep: float
    encoder_tokens: int
    num_layers: int
    shallow: int
    deep: int


BudgetRule = Callable[[PruningSettings, BudgetInputs], Budget]


def three_stages(settings: PruningSettings, inputs: BudgetInputs) -> Budget:
    """ViTCoP's counts (arXiv 2601.17818), with Stage I's fractions from the settings."""
    keep = inputs.keep
    encoder_fraction, centre_fraction = _stage_one_fractions(settings.fractions, keep)
    # Stage I may not leave less than the budget (v >= r), nor spend it all before S.
    budget_limit = inputs.num_layers * keep / (inputs.shallow + _MIN_SECOND_STAGE * _weight(inputs))
    v = min(max(encoder_fraction, keep), budget_limit, 1.0)
    n1 = max(1, int(v * inputs.encoder_tokens))
    centres = max(1, int(min(max(centre_fraction, 0.0), 1.0) * n1))
    return Budget(centres, (n1, *_after_stage_one(inputs, v, n1)))


def both_boundaries(settings: PruningSettings, inputs: BudgetInputs) -> Budget:
    """ViTCoP's counts without its Stage I and without clusters: v = 1, n1 = V."""
    n1 = inputs.encoder_tokens
    return Budget(0, (n1, *_after_stage_one(inputs, 1.0, n1)))


def encoder_alone(settings: PruningSettings, inputs: BudgetInputs) -> Budget:
    """n1 = n2 = n3 = round(r V): every layer sees the same tokens."""
    n = max(1, round(inputs.keep * inputs.encoder_tokens))
    return Budget(0, (n, n, n))


def deep_boundary_alone(settings: PruningSettings, inputs: BudgetInputs) -> Budget:
    """n1 = n2, and n3 = n2 / 5, with ViTCoP's share of Stage III; without clusters."""
    v, layers, deep = inputs.encoder_tokens, inputs.num_layers, inputs.deep
    n = round(layers * inputs.keep / (deep + (layers - deep) / 5) * v)
    n3 = round(n / 5)
    if n > v:
        n = v
        n3 = round((layers * inputs.keep - deep) / (layers - deep) * v)
    n = max(n, 1)
    return Budget(0, (n, n, min(max(n3, 1), n)))


def shallow_boundary_alone(settings: PruningSettings, inputs: BudgetInputs) -> Budget:
    """n1 = V, n2 = n3 = round((L r - S) / (L - S) V)."""
    v, layers, shallow = inputs.encoder_tokens, inputs.num_layers, inputs.shallow
    n = max(1, round((layers * inputs.keep - shallow) / (layers - shallow) * v))
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


def _weight(inputs: BudgetInputs) -> float:
    """Layers that Stage II pays for, when Stage III keeps a fifth of its tokens."""
    return (inputs.deep - inputs.shallow) + (inputs.num_layers - inputs.deep) / 5


def _after_stage_one(inputs: BudgetInputs, v: float, n1: int) -> tuple[int, int]:
    """n2 and n3 where Stage I keeps n1 tokens, the fraction v."""
    n2 = round((inputs.num_layers * inputs.keep / v - inputs.shallow) / _weight(inputs) * n1)
    n3 = round(n2 / 5)
    if n2 > n1:
        n2 = n1
        left = inputs.num_layers * inputs.keep * inputs.encoder_tokens - inputs.deep * n1
        n3 = round(left / (inputs.num_layers - inputs.deep))
    n2 = min(max(n2, 1), n1)
    n3 = min(max(n3, 1), n2)
    return n2, n3
