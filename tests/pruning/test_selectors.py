"""Every selector against the slow oracle, and what all of them promise."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.pruning import oracle
from tests.pruning.every_selector import SELECTORS
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.kernel_set import TORCH
from vitcop_vllm.pruning.selection import StageTwoSelection
from vitcop_vllm.pruning.selectors.dart import NUM_PIVOTS
from vitcop_vllm.pruning.settings import SELECTOR_NAMES, SelectorName, SignalName
from vitcop_vllm.pruning.signals import SIGNALS
from vitcop_vllm.pruning.views import BoundaryView, EncoderView

NAMES = SELECTOR_NAMES
IN_ENCODER = [name for name in NAMES if SELECTORS[name].prunes_encoder]
AT_SHALLOW = [name for name in NAMES if SELECTORS[name].shallow]
AT_DEEP = [name for name in NAMES if SELECTORS[name].deep]


def images(batch: int = 3, grid: tuple[int, int] = (5, 7), seed: int = 0) -> EncoderView:
    generator = torch.Generator().manual_seed(seed)
    patches = grid[0] * grid[1]
    embeddings = torch.randn(batch, patches, 16, generator=generator)
    queries = torch.randn(batch, 1 + patches, 4, 8, generator=generator)
    keys = torch.randn(batch, 1 + patches, 4, 8, generator=generator)
    return EncoderView(
        queries=lambda: queries,
        cls_query=queries[:, 0],
        to_tokens=lambda of_patches: of_patches,
        keys=keys,
        features=lambda: keys[:, 1:].flatten(2),
        scale=8**-0.5,
        grids=(Grid(*grid),),
        pixels=torch.randn(batch, 3, 10, 14, generator=generator),
        embed=lambda: embeddings,
        mean_over_ranks=lambda x: x,
        concat_over_ranks=lambda x: x,
        kernels=TORCH,
    )


def one_image(view: EncoderView, i: int) -> EncoderView:
    embeddings, queries = view.embed()[i : i + 1], view.queries()[i : i + 1]
    return replace(
        view,
        queries=lambda: queries,
        cls_query=queries[:, 0],
        keys=view.keys[i : i + 1],
        pixels=view.pixels[i : i + 1],
        embed=lambda: embeddings,
    )


def step(
    n: int = 30, seed: int = 0, kv_heads: int = 2, signal: SignalName = "keys"
) -> BoundaryView:
    """Two prompts between others' rows: one of one image, one of two."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [(3, 5 + n + 4), (5 + n + 9, 5 + n + 9 + 2 + n + 3 + n + 5)]
    offsets = [5, prompts[1][0] + 2, prompts[1][0] + 2 + n + 3]
    rows = torch.tensor([list(range(offset, offset + n)) for offset in offsets])
    total = prompts[1][1] + 8
    stream = torch.randn(total, 24, generator=generator)
    raw_keys = torch.randn(total, kv_heads, 8, generator=generator)
    return BoundaryView(
        rows=rows,
        queries=torch.randn(total, 4, 8, generator=generator),
        keys=torch.randn(total, kv_heads, 8, generator=generator),
        values=torch.randn(total, kv_heads, 8, generator=generator),
        raw_keys=lambda: raw_keys[rows],
        scale=0.7,
        hidden=lambda: stream[rows],
        norm_weight=torch.rand(24, generator=generator) + 0.5,
        prompt_rows=torch.tensor([prompts[0], prompts[1], prompts[1]]).T,
        labels=torch.stack([torch.arange(n) % 7 for _ in offsets]),
        num_centres=7,
        mean_over_ranks=lambda x: x,
        kernels=TORCH,
        signal=SIGNALS[signal],
    )


def prompts_of(view: BoundaryView) -> torch.Tensor:
    assert view.prompt_rows is not None
    return view.prompt_rows


def one_span(view: BoundaryView, i: int) -> BoundaryView:
    stream = view.hidden()[i : i + 1]
    raw_keys = view.raw_keys()[i : i + 1]
    assert view.labels is not None
    return replace(
        view,
        rows=view.rows[i : i + 1],
        raw_keys=lambda: raw_keys,
        hidden=lambda: stream,
        prompt_rows=prompts_of(view)[:, i : i + 1],
        labels=view.labels[i : i + 1],
    )


def chosen_tokens(name: SelectorName, segment: int, view: BoundaryView, count: int) -> torch.Tensor:
    chosen = SELECTORS[name].select_at(segment, view, count)
    return chosen.index if isinstance(chosen, StageTwoSelection) else chosen


def expected_patches(name: str, view: EncoderView, i: int, count: int) -> list[int]:
    ((height, width, _),) = view.grids
    match name:
        case "random":
            return oracle.random_subset(view.pixels[i].numpy(), height * width, count)
        case "grid":
            return oracle.even_grid(height, width, count)
        case "divprune":
            return oracle.max_min_diversity(view.embed()[i].numpy(), count)
        case "contrast":
            attention = oracle.saliency(
                view.queries()[i, 0].numpy(), view.keys[i].numpy(), view.scale
            )
            return oracle.contrasting(view.embed()[i].numpy(), attention, height, width, count)
    queries, keys = view.queries()[i].numpy(), view.keys[i].numpy()
    if name == "received":
        each = [oracle.saliency(query, keys, view.scale) for query in queries]
        return oracle.largest(list(np.mean(each, axis=0)), count)
    return oracle.largest(list(oracle.saliency(queries[0], keys, view.scale)), count)


def expected_tokens(name: str, view: BoundaryView, i: int, count: int) -> list[int]:
    rows = view.rows[i].tolist()
    keys = view.keys[rows].numpy()
    match name:
        case "vitcop":
            assert view.labels is not None
            labels, scores = view.labels[i].tolist(), expected_scores(view, i)
            return [at for at, _ in oracle.stage_two(scores, labels, view.num_centres, count)]
        case "fastv":
            first, last = prompts_of(view)[:, i].tolist()
            visual = [row - first for row in rows]
            context = view.keys[first : last + 1].numpy()
            query = view.queries[last].numpy()
            return oracle.last_token_attention(query, context, view.scale, visual, count)
        case "dart":
            states = view.hidden()[i].numpy()
            length = np.sqrt((states**2).mean(axis=1, keepdims=True) + 1e-5)
            normed = states / length * view.norm_weight.numpy()
            return oracle.least_duplicated(keys, normed, count)
    assert name == "key_norm"
    return oracle.smallest(expected_scores(view, i), count)


def expected_scores(view: BoundaryView, i: int) -> list[float]:
    """Scores of one span's tokens; a smaller score is more salient."""
    rows = view.rows[i].tolist()
    queries, keys, values = (
        x[rows].double().numpy() for x in (view.queries, view.keys, view.values)
    )
    (name,) = (name for name, signal in SIGNALS.items() if signal is view.signal)
    scores = {
        "keys": lambda: oracle.key_norms(keys),
        "raw_keys": lambda: oracle.key_norms(view.raw_keys()[i].double().numpy()),
        "values": lambda: oracle.value_scores(values),
        "image_attention": lambda: oracle.image_attention_scores(queries, keys, view.scale),
    }
    return [float(score) for score in scores[name]()]


@pytest.mark.parametrize("name", IN_ENCODER)
@pytest.mark.parametrize("count", [1, 2, 9, 34, 35])
@pytest.mark.parametrize("grid", [(5, 7), (7, 5), (1, 35)])
def test_patches_are_the_oracle_s(name, grid, count):
    view = images(grid=grid, seed=count)
    got = SELECTORS[name].select_in_encoder(view, count)[0]
    assert got.dtype == torch.int64
    assert got.tolist() == [expected_patches(name, view, i, count) for i in range(3)]


@pytest.mark.parametrize("name", AT_SHALLOW)
@pytest.mark.parametrize("count", [1, 5, 8, 9, 20, 29, 30])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_tokens_at_the_shallow_boundary_are_the_oracle_s(name, count, kv_heads):
    view = step(seed=count, kv_heads=kv_heads)
    got = chosen_tokens(name, 1, view, count)
    assert got.dtype == torch.int64
    assert got.tolist() == [expected_tokens(name, view, i, count) for i in range(3)]


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("n", [5, 16, 30])
def test_scores_are_the_oracle_s(signal, kv_heads, n):
    view = step(n, seed=n, kv_heads=kv_heads, signal=signal)
    scores = view.scores()
    assert scores.dtype == torch.float32
    assert (scores >= 0).all()
    wanted = np.array([expected_scores(view, i) for i in range(3)])
    np.testing.assert_allclose(scores.numpy(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if SELECTORS[name].ranks_by_signal])
@pytest.mark.parametrize("signal", SIGNALS)
def test_tokens_are_ranked_by_the_signal(name, signal):
    view = step(seed=3, signal=signal)
    wanted = [expected_tokens(name, view, i, 9) for i in range(3)]
    assert chosen_tokens(name, 1, view, 9).tolist() == wanted
    assert wanted != [expected_tokens(name, step(seed=4), i, 9) for i in range(3)]


def test_each_signal_ranks_otherwise():
    rankings = {
        tuple(step(seed=3, signal=signal).scores().argsort(dim=1).flatten().tolist())
        for signal in SIGNALS
    }
    assert len(rankings) == len(SIGNALS)


def test_a_selector_tells_the_stages_that_drop_tokens():
    stages = {name: SELECTORS[name].stages for name in ("vitcop", "key_norm", "fastv", "received")}
    assert stages == {
        "vitcop": ("I", "II", "III"),
        "key_norm": ("II", "III"),
        "fastv": ("II",),
        "received": ("I",),
    }
    assert [name for name in NAMES if not SELECTORS[name].prunes_decoder] == [
        *("cls", "divprune", "grid", "random", "received"),
    ]


def test_settings_name_every_signal():
    assert set(get_args(SignalName)) == set(SIGNALS)


@pytest.mark.parametrize("signal", SIGNALS)
def test_other_rows_of_the_step_do_not_change_a_score(signal):
    """So a cached prefix, and another batch, get the same selection."""
    view = step(seed=3, signal=signal)
    others = torch.ones(view.keys.shape[0], dtype=torch.bool)
    others[view.rows] = False
    queries, keys, values = (
        torch.where(others[:, None, None], 100.0, x) for x in (view.queries, view.keys, view.values)
    )
    changed = replace(view, queries=queries, keys=keys, values=values)
    assert torch.equal(changed.scores(), view.scores())


@pytest.mark.parametrize("name", AT_DEEP)
@pytest.mark.parametrize("count", [1, 8, 30])
def test_tokens_at_the_deep_boundary_are_those_of_smallest_scores(name, count):
    own = SELECTORS[name].ranks_by_signal
    view = step(seed=count, signal="keys" if own else "image_attention")
    wanted = [expected_tokens("key_norm", view, i, count) for i in range(3)]
    assert chosen_tokens(name, 2, view, count).tolist() == wanted


@pytest.mark.parametrize("name", IN_ENCODER)
def test_an_image_alone_gets_the_selection_of_the_batch(name):
    view = images(batch=4)
    batch = SELECTORS[name].select_in_encoder(view, 11)[0]
    for i in range(4):
        alone = SELECTORS[name].select_in_encoder(one_image(view, i), 11)[0]
        assert torch.equal(batch[i : i + 1], alone)


@pytest.mark.parametrize("name", AT_SHALLOW)
def test_a_span_alone_gets_the_selection_of_its_group(name):
    view = step()
    group = chosen_tokens(name, 1, view, 11)
    for i in range(3):
        assert torch.equal(group[i : i + 1], chosen_tokens(name, 1, one_span(view, i), 11))


def exactly(count: int, got: torch.Tensor, total: int) -> None:
    assert got.shape[1] == count
    assert (got.diff(dim=1) > 0).all()
    assert (got >= 0).all()
    assert (got < total).all()


@given(st.sampled_from(IN_ENCODER), st.integers(1, 9), st.integers(1, 9), st.data())
def test_patches_are_exactly_as_many_as_planned(name, height, width, data):
    count = data.draw(st.integers(1, height * width))
    view = images(batch=2, grid=(height, width))
    exactly(count, SELECTORS[name].select_in_encoder(view, count)[0], height * width)


@given(st.sampled_from(AT_SHALLOW), st.integers(7, 40), st.data())
def test_tokens_are_exactly_as_many_as_planned(name, n, data):
    count = data.draw(st.integers(1, n))
    exactly(count, chosen_tokens(name, 1, step(n=n), count), n)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
@pytest.mark.parametrize("count", [1, 7, 12, 30])
def test_counts_do_not_depend_on_the_values(bad, count):
    view = images()
    spoilt = view.embed().clone()
    spoilt[1, ::3] = bad
    spoilt[2] = bad
    keys = torch.full_like(view.keys, bad)
    for name in IN_ENCODER:
        got = SELECTORS[name].select_in_encoder(
            replace(view, keys=keys, embed=lambda: spoilt), count
        )[0]
        exactly(count, got, 35)
    tokens = step()
    stream = torch.full_like(tokens.hidden(), bad)
    keys = torch.full_like(tokens.keys, bad)
    keys[::2] = 1.0
    for name in AT_SHALLOW:
        spoilt_tokens = replace(tokens, keys=keys, hidden=lambda: stream)
        exactly(count, chosen_tokens(name, 1, spoilt_tokens, count), 30)


@pytest.mark.parametrize("count", [1, 4, 8, 20])
def test_equals_go_to_the_lower_index(count):
    view = images()
    embeddings = torch.eye(16)[torch.arange(35) % 5].expand(3, -1, -1)
    equal = replace(view, keys=torch.ones_like(view.keys), embed=lambda: embeddings)
    assert SELECTORS["cls"].select_in_encoder(equal, count)[0][0].tolist() == list(range(count))
    diverse = SELECTORS["divprune"].select_in_encoder(equal, count)[0]
    assert diverse[0].tolist() == oracle.max_min_diversity(embeddings[0].numpy(), count)
    assert diverse[0].tolist() == list(range(count))
    tokens = step()
    same = replace(tokens, keys=torch.ones_like(tokens.keys), hidden=lambda: torch.ones(3, 30, 24))
    for name in ("key_norm", "fastv", "dart"):
        assert chosen_tokens(name, 1, same, count)[0].tolist() == list(range(count))


def test_half_precision_is_computed_in_float32():
    view = images()
    embeddings, queries = view.embed().bfloat16(), view.queries().bfloat16()
    half = replace(
        view,
        queries=lambda: queries,
        cls_query=queries[:, 0],
        keys=view.keys.bfloat16(),
        embed=lambda: embeddings,
    )
    wide = replace(
        half,
        queries=lambda: queries.float(),
        cls_query=queries[:, 0].float(),
        keys=half.keys.float(),
        embed=lambda: embeddings.float(),
    )
    for name in ("cls", "received", "divprune", "contrast"):
        a, b = (SELECTORS[name].select_in_encoder(v, 12)[0] for v in (half, wide))
        assert torch.equal(a, b)
    tokens = step()
    stream = tokens.hidden().half()
    low = replace(
        tokens,
        queries=tokens.queries.half(),
        keys=tokens.keys.half(),
        norm_weight=tokens.norm_weight.half(),
        hidden=lambda: stream,
    )
    high = replace(
        low,
        queries=low.queries.float(),
        keys=low.keys.float(),
        norm_weight=low.norm_weight.float(),
        hidden=lambda: stream.float(),
    )
    for name in AT_SHALLOW:
        assert torch.equal(chosen_tokens(name, 1, low, 12), chosen_tokens(name, 1, high, 12))


# One by one.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_random_subset_is_the_image_s_own(dtype):
    view = images(batch=2, grid=(24, 24))
    pixels = torch.cat((view.pixels, view.pixels.flip(0), view.pixels[:1])).to(dtype)
    # Strides are no property of the image.
    strided = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    pixels[4, 2, 9, 13] = pixels[4, 2, 9, 13] + 1  # the last of all
    got = SELECTORS["random"].select_in_encoder(replace(view, pixels=pixels), 100)[0]
    again = SELECTORS["random"].select_in_encoder(replace(view, pixels=strided), 100)[0]
    assert torch.equal(got[:4], again[:4])
    assert torch.equal(got[0], got[3])
    assert torch.equal(got[1], got[2])
    assert not torch.equal(got[0], got[1])
    assert not torch.equal(got[0], got[4])


def test_random_subsets_prefer_no_patch_and_no_pair():
    generator = torch.Generator().manual_seed(0)
    view = replace(images(grid=(6, 6)), pixels=torch.rand(4000, 3, 4, 4, generator=generator))
    got = SELECTORS["random"].select_in_encoder(view, 12)[0]
    chosen = torch.zeros(4000, 36).scatter(1, got, 1.0)
    share = chosen.mean(dim=0)  # a third, with a standard deviation of 0.0075
    assert ((share - 1 / 3).abs() < 0.04).all()
    pairs = (chosen.T @ chosen / 4000)[~torch.eye(36, dtype=torch.bool)]
    assert ((pairs - 12 * 11 / (36 * 35)).abs() < 0.03).all()


@pytest.mark.parametrize("grid", [(24, 24), (16, 16), (8, 24)])
def test_the_grid_is_even_for_every_count(grid):
    height, width = grid
    view = images(batch=1, grid=grid)
    for count in range(1, height * width + 1):
        index = SELECTORS["grid"].select_in_encoder(view, count)[0]
        chosen = torch.zeros(height * width).scatter(0, index[0], 1.0).view(1, 1, height, width)
        for side in (2, 4, 8):
            held = torch.nn.functional.avg_pool2d(chosen, side) * side * side
            assert held.max() - held.min() <= 1.001


def test_the_first_diverse_token_is_the_loneliest():
    # Angles in degrees: the nearest neighbour of 90 is farthest.
    angles = torch.tensor([0.0, 10.0, 90.0, 160.0, 170.0]).deg2rad()
    embeddings = torch.stack((angles.cos(), angles.sin()), dim=1)[None]
    view = replace(images(batch=1, grid=(1, 5)), embed=lambda: embeddings)
    chosen = [SELECTORS["divprune"].select_in_encoder(view, n)[0][0].tolist() for n in (1, 2, 3)]
    assert chosen == [[2], [0, 2], [0, 2, 4]]


def test_lengths_are_no_diversity():
    view = images()
    scaled = view.embed() * torch.rand(3, 35, 1).add(0.1)
    a, b = (
        SELECTORS["divprune"].select_in_encoder(replace(view, embed=embed), 9)[0]
        for embed in (view.embed, lambda: scaled)
    )
    assert torch.equal(a, b)


def two_kinds(num_high: int) -> EncoderView:
    """Images of 8 x 8 tokens, all alike but for the last ``num_high``."""
    embeddings = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(1))
    embeddings *= 0.05
    embeddings[:, :, 0] += 1.0
    embeddings[:, -num_high:, 1] += 3.0
    view = images(batch=2, grid=(8, 8))
    return replace(view, embed=lambda: embeddings, keys=torch.zeros_like(view.keys))


@pytest.mark.parametrize("num_high", [5, 15])
def test_tokens_that_stand_out_are_kept_and_the_others_are_an_even_grid(num_high):
    high = list(range(64 - num_high, 64))
    rest = [patch for patch in oracle.even_grid(8, 8, 64) if patch not in high]
    rest.sort(key=oracle.thresholds(8, 8).__getitem__)
    for count in (num_high, 20, 33):
        kept = SELECTORS["contrast"].select_in_encoder(two_kinds(num_high), count)[0]
        assert kept.tolist() == 2 * [sorted(high + rest[: count - num_high])]


def test_attention_makes_tokens_stand_out_too():
    view = two_kinds(15)
    alike = torch.ones(2, 64, 16)
    keys = torch.zeros_like(view.keys)
    keys[:, [8, 31]] = 9.0 * view.queries()[:, :1]  # of patches 7 and 30: [CLS] comes first
    seen = replace(view, embed=lambda: alike, keys=keys)
    kept = SELECTORS["contrast"].select_in_encoder(seen, 2)[0]
    assert kept.tolist() == [[7, 30], [7, 30]]


def test_without_cls_the_attention_of_all_tokens_counts():
    view = replace(images(), reads_cls=False)
    queries, keys = view.queries()[0].numpy(), view.keys[0].numpy()
    each = [oracle.saliency(query, keys, view.scale) for query in queries]
    wanted = oracle.contrasting(view.embed()[0].numpy(), np.mean(each, axis=0), 5, 7, 9)
    assert SELECTORS["contrast"].select_in_encoder(view, 9)[0][0].tolist() == wanted
    assert wanted != expected_patches("contrast", images(), 0, 9)


def test_few_tokens_that_stand_out_are_those_that_do_most():
    view = two_kinds(15)
    embeddings = view.embed().clone()
    embeddings[:, [50, 60], 1] += 3.0
    kept = SELECTORS["contrast"].select_in_encoder(replace(view, embed=lambda: embeddings), 2)[0]
    assert kept.tolist() == [[50, 60], [50, 60]]


def test_attention_is_of_the_prompt_s_last_token_alone():
    view = step()
    before = chosen_tokens("fastv", 1, view, 9)
    queries, keys = view.queries.clone(), view.keys.clone()
    others = torch.ones(len(queries), dtype=torch.bool)
    others[prompts_of(view)[1]] = False
    queries[others] = torch.randn(int(others.sum()), 4, 8)
    outside = torch.ones(len(keys), dtype=torch.bool)
    for first, last in prompts_of(view).T.tolist():
        outside[first : last + 1] = False
    assert outside.sum() > 8
    keys[outside] = 1e3
    assert torch.equal(
        chosen_tokens("fastv", 1, replace(view, queries=queries, keys=keys), 9), before
    )
    queries[prompts_of(view)[1]] = torch.randn(3, 4, 8)
    assert not torch.equal(chosen_tokens("fastv", 1, replace(view, queries=queries), 9), before)


def test_text_that_takes_all_of_a_head_s_attention_takes_its_vote():
    """Why the softmax is over the whole context: heads do not weigh the same."""
    view = one_span(step(), 0)
    first, last = prompts_of(view)[:, 0].tolist()
    keys, queries = torch.zeros_like(view.keys), torch.zeros_like(view.queries)
    queries[last] = 1.0
    keys[view.rows[0, 4], 0] = 2.0  # KV head 0 looks at visual token 4,
    keys[view.rows[0, 9], 1] = 9.0  # KV head 1 at visual token 9, and more so,
    keys[first, 1] = 20.0  # but most of all at the text before.
    spoilt = replace(view, keys=keys, queries=queries)
    assert chosen_tokens("fastv", 1, spoilt, 1).tolist() == [[4]]
    keys[first, 1] = 0.0
    assert chosen_tokens("fastv", 1, spoilt, 1).tolist() == [[9]]


def test_pivots_are_the_largest_keys_and_dissimilar_tokens_are_kept():
    view = one_span(step(), 0)
    keys = torch.full_like(view.keys, 0.1)
    keys[view.rows[0, [3, 17]]] = torch.tensor([5.0, 7.0])[:, None, None]
    image = replace(view, keys=keys)
    assert chosen_tokens("dart", 1, image, 2).tolist() == [[3, 17]]
    # Tokens 0 and 1 oppose the pivots, all others are like them.
    stream = torch.ones(1, 30, 24)
    stream[0, [0, 1]] = -1.0
    many = replace(image, hidden=lambda: stream)
    kept = chosen_tokens("dart", 1, many, NUM_PIVOTS + 2)[0].tolist()
    assert {0, 1, 3, 17} <= set(kept)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_of_half_the_heads_select_the_tokens_of_one_rank(name):
    row = SELECTORS[name]
    view: Any = images() if row.prunes_encoder else step()
    heads = ("cls_query", "keys") if row.prunes_encoder else ("queries", "keys")
    held: dict[int, torch.Tensor] = {}
    together = Barrier(2)

    def choose(view: Any) -> torch.Tensor:
        return (
            row.select_in_encoder(view, 11)[0]
            if row.prunes_encoder
            else chosen_tokens(name, 1, view, 11)
        )

    def on_rank(rank: int) -> torch.Tensor:
        def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
            held[rank] = x
            together.wait()
            return (held[0] + held[1]) / 2

        mine = {field: getattr(view, field).chunk(2, dim=-2)[rank] for field in heads}
        if row.prunes_encoder:
            mine["queries"] = lambda: view.queries().chunk(2, dim=-2)[rank]
        return choose(replace(view, **mine, mean_over_ranks=mean_over_ranks))

    with ThreadPoolExecutor(2) as ranks:
        first, second = ranks.map(on_rank, range(2))
    assert torch.equal(first, choose(view))
    assert torch.equal(second, first)


@pytest.mark.parametrize(
    ("name", "segment"),
    [
        (name, segment)
        for name, row in SELECTORS.items()
        for segment, function in enumerate((row.shallow, row.deep), start=1)
        if function
    ],
)
def test_selectors_that_run_before_the_mlp_do_not_read_its_output(name, segment):
    def not_yet() -> torch.Tensor:
        raise LookupError

    early = replace(step(), hidden=not_yet)
    if SELECTORS[name].drops_before_mlp(segment):
        chosen = chosen_tokens(name, segment, early, 9)
        assert torch.equal(chosen, chosen_tokens(name, segment, step(), 9))
    elif name == "vitcop":  # chooses by keys too, but merges
        assert isinstance(SELECTORS[name].select_at(segment, early, 9), StageTwoSelection)
    else:
        with pytest.raises(LookupError):
            chosen_tokens(name, segment, early, 9)


def test_a_boundary_without_drops_runs_the_mlp_on_all_rows():
    assert not any(SELECTORS["cls"].drops_before_mlp(segment) for segment in (1, 2))
