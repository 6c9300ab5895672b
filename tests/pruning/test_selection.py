import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pruning import oracle
from vitcop_vllm.pruning.selection import (
    StageTwoSelection,
    _quotas,
    mean_key_norm,
    merge_tokens,
    select_stage_three,
    select_stage_two,
)

PUBLISHED = [(172, 20, 77, 15), (230, 34, 165, 33), (288, 51, 253, 51)]


def rows(selection: StageTwoSelection, image: int):
    """An image's selection in the oracle's form."""
    members = {}
    group_of = selection.groups[image].tolist()
    for group, row in enumerate(selection.merged[image].tolist()):
        assert row not in members
        members[row] = [token for token, its in enumerate(group_of) if its == group]
    return [
        (source, members.get(row)) for row, source in enumerate(selection.index[image].tolist())
    ]


def some_labels(n1, num_centres, seed, skew=0.0):
    """Labels without an empty cluster; ``skew`` makes the first clusters larger."""
    generator = torch.Generator().manual_seed(seed)
    odds = torch.arange(1, num_centres + 1).float() ** -skew
    free = torch.multinomial(odds, n1, replacement=True, generator=generator)
    free[torch.randperm(n1, generator=generator)[:num_centres]] = torch.arange(num_centres)
    return free


def assert_agrees(key_norm, labels, num_centres, n2):
    got = select_stage_two(key_norm[None], labels[None], num_centres, n2)
    assert got.index.shape == (1, n2)
    assert got.index.dtype == torch.int64
    assert got.groups.shape == (1, len(labels))
    assert got.groups.dtype == torch.int64
    assert got.merged.shape[1] == min(num_centres, n2)
    wanted = oracle.stage_two(key_norm.tolist(), labels.tolist(), num_centres, n2)
    assert len(wanted) == n2
    assert rows(got, 0) == wanted


def test_mean_key_norm_averages_heads_before_the_norm():
    torch.manual_seed(0)
    key = torch.randn(2, 5, 4, 8)
    wanted = np.linalg.norm(key.numpy().astype(np.float64).mean(axis=2), axis=2)
    np.testing.assert_allclose(mean_key_norm(key).numpy(), wanted, rtol=1e-5)
    assert mean_key_norm(key[0, 0]).shape == ()


def test_mean_key_norm_of_half_precision_is_float32():
    key = torch.full((3, 2, 4), 60000.0, dtype=torch.float16)
    torch.testing.assert_close(mean_key_norm(key), torch.full((3,), 120000.0))


@pytest.mark.parametrize(("n1", "num_centres", "n2", "n3"), PUBLISHED)
@pytest.mark.parametrize("skew", [0.0, 1.5])
def test_segments_agree_with_the_oracle_at_published_sizes(n1, num_centres, n2, n3, skew):
    torch.manual_seed(n1)
    assert_agrees(torch.rand(n1), some_labels(n1, num_centres, n1, skew), num_centres, n2)
    norms = torch.rand(n2)
    assert select_stage_three(norms[None], n3)[0].tolist() == oracle.smallest(norms.tolist(), n3)


@pytest.mark.parametrize("seed", range(60))
def test_stage_two_agrees_with_the_oracle_on_random_images(seed):
    torch.manual_seed(seed)
    n1 = int(torch.randint(1, 60, ()))
    num_centres = int(torch.randint(1, n1 + 1, ()))
    n2 = int(torch.randint(1, n1 + 1, ()))
    norms = torch.rand(n1) if seed % 2 else torch.randint(1, 4, (n1,)).float()
    assert_agrees(norms, some_labels(n1, num_centres, seed, skew=seed % 3), num_centres, n2)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_stage_two_agrees_with_the_oracle_when_sums_and_norms_tie(data):
    num_centres = data.draw(st.integers(1, 9))
    rest = data.draw(st.lists(st.integers(0, num_centres - 1), max_size=18))
    labels = data.draw(st.permutations([*range(num_centres), *rest]))
    n2 = data.draw(st.integers(1, len(labels)))
    norms = data.draw(st.lists(st.integers(1, 3), min_size=len(labels), max_size=len(labels)))
    assert_agrees(torch.tensor(norms, dtype=torch.float32), torch.tensor(labels), num_centres, n2)


@pytest.mark.parametrize("n2", [1, 2, 6, 7, 8, 20, 29, 30])
def test_stage_two_breaks_ties_of_norms_by_label_and_index(n2):
    assert_agrees(torch.ones(30), some_labels(30, 7, seed=n2), 7, n2)


@pytest.mark.parametrize("n2", [40, 52, 100, 165, 253, 287, 288])
def test_stage_two_breaks_ties_of_many_sums_by_label(n2):
    # Many elements: a sort of few elements is stable even without ``stable=True``.
    pairs = torch.arange(48).repeat_interleave(6)
    assert_agrees(torch.ones(288), pairs[torch.randperm(288)], 48, n2)


def test_with_more_clusters_than_rows_the_last_row_merges_the_remaining_clusters():
    norms = torch.tensor([[1.0, 1.0, 9.0, 4.0, 5.0, 2.0]])
    labels = torch.tensor([[0, 0, 1, 2, 2, 3]])
    # Sums are 2, 9, 9, 2: clusters 0 and 3 are groups of their own, 1 and 2 form one group.
    got = select_stage_two(norms, labels, 4, 3)
    assert rows(got, 0) == [(1, [0, 1]), (3, [2, 3, 4]), (5, [5])]


def test_tokens_with_the_smallest_norms_of_a_cluster_are_not_merged():
    norms = torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0]])
    got = select_stage_two(norms, torch.zeros(1, 5, dtype=torch.int64), 1, 3)
    assert rows(got, 0) == [(1, None), (2, [0, 2, 4]), (3, None)]


def test_missing_rows_go_to_the_clusters_with_the_smallest_sums():
    # Six clusters of two tokens share three rows: each quota is 0.5 and rounds to zero.
    labels = torch.arange(6).repeat_interleave(2)
    sums = torch.tensor([4.0, 1.0, 5.0, 3.0, 6.0, 2.0])
    got = select_stage_two((sums / 2).repeat_interleave(2)[None], labels[None], 6, 9)
    assert got.index[0].tolist() == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert [source for source, members in rows(got, 0) if members is None] == [2, 6, 10]


def test_surplus_rows_are_taken_from_the_clusters_with_the_largest_sums():
    # Four clusters of four tokens have quotas of 1.5, rounded to two. The last cluster has one
    # token and a quota of zero.
    labels = torch.cat([torch.arange(4).repeat_interleave(4), torch.tensor([4])])
    norms = torch.tensor([1.0, 4.0, 3.0, 2.0, 99.0])[labels]
    got = rows(select_stage_two(norms[None], labels[None], 5, 11), 0)
    whole = [source // 4 for source, members in got if members is None]
    assert [whole.count(k) for k in range(4)] == [2, 1, 1, 2]


@pytest.mark.parametrize("sums", [[1, 2, 3, 4, 5, 6, 7], [3, 3, 3, 1, 1, 1, 3]])
def test_quotas_sum_to_the_rows_when_one_cluster_is_large(sums):
    # For n2 = 18, quotas are (13 - 1) / 18 * 11 = 7.33 and 1 / 18 * 11 = 0.6.
    sizes = [13, 2, 2, 2, 2, 2, 2]
    labels = torch.tensor([k for k, size in enumerate(sizes) for _ in range(size)])
    norms = torch.tensor([sums[k] / sizes[k] for k in labels.tolist()])
    for n2 in range(7, 26):
        assert_agrees(norms, labels, 7, n2)


HALVES = [  # cluster sizes, n2, unmerged tokens: (size - 1) / (n1 - K) * (n2 - K)
    # ViTCoP at 8/9 on LLaVA-1.5-7B: 31.5 is 31 in float32 and 32 in float64; 13.5 is 14 in both.
    ((85, 37, 33, *[1] * 17), 77, (31, 14, 12, *[0] * 17)),
    # 3.5: wrongly 4 in float64, with the divisor's reciprocal, or with the product first.
    ((8, 40), 25, (3, 20)),
    # 7.5: wrongly 7 in float64, or with a product that is not rounded to float32.
    ((16, 38), 28, (8, 18)),
    # 4.5: wrongly 5 with the divisor's reciprocal.
    ((10, 20), 16, (4, 10)),
    # 0.5: wrongly 1 with a product that is not rounded.
    ((2, 12), 8, (0, 6)),
]


def tokens_of_clusters(sizes, sums):
    """(1, n1) norms and labels of clusters with the given sizes and sums of norms."""
    size = torch.tensor(sizes)
    labels = torch.arange(len(sizes)).repeat_interleave(size)
    return (torch.tensor(sums) / size)[labels][None], labels[None]


@pytest.mark.parametrize("step", [1.0, -1.0], ids=["ascending", "descending"])
@pytest.mark.parametrize(("sizes", "n2", "whole"), HALVES)
def test_exact_halves_of_quotas_round_as_in_float32(sizes, n2, whole, step):
    # The rounded quotas sum to n2 - K, so no correction depends on the order of the sums.
    sums = [100.0 + step * k for k in range(len(sizes))]
    norms, labels = tokens_of_clusters(sizes, sums)
    got = select_stage_two(norms, labels, len(sizes), n2)
    kept = labels[got.groups == len(sizes)]
    assert kept.bincount(minlength=len(sizes)).tolist() == list(whole)


@st.composite
def halves(draw):
    """Cluster sizes, sums and n2 such that the first cluster's quota is an exact half.

    (size - 1) / (n1 - K) * (n2 - K) = a c / (2 g a) * g b = b c / 2, with odd b and c.
    """
    a, g = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    b = 2 * draw(st.integers(0, a - 1)) + 1
    c = 2 * draw(st.integers(0, g - 1)) + 1
    spare, left = [a * c], 2 * g * a - a * c
    for _ in range(draw(st.integers(0, 4))):
        spare.append(draw(st.integers(0, left)))
        left -= spare[-1]
    sizes = [1 + s for s in (*spare, left)]
    sums = draw(st.lists(st.integers(1, 4), min_size=len(sizes), max_size=len(sizes)))
    return sizes, sums, g * b + len(sizes)


@settings(max_examples=500, deadline=None)
@given(halves())
def test_quotas_with_an_exact_half_agree_with_the_oracle(case):
    sizes, sums, n2 = case
    n1 = sum(sizes)
    got = _quotas(torch.tensor([sums]).double(), torch.tensor([sizes]), n1, n2)
    assert got.tolist() == [oracle.quotas(sizes, sums, n1, n2)]


def test_quotas_are_zero_if_every_row_is_merged():
    ones = torch.ones(1, 5, dtype=torch.int64)
    assert _quotas(ones.double(), ones, 5, 5).tolist() == [[0] * 5]
    assert _quotas(ones.double(), 3 * ones, 15, 5).tolist() == [[0] * 5]


def test_a_single_row_merges_everything():
    got = select_stage_two(torch.rand(1, 9), some_labels(9, 4, 0)[None], 4, 1)
    assert rows(got, 0) == [(4, list(range(9)))]


def test_with_as_many_clusters_as_tokens_every_group_has_one_member():
    got = select_stage_two(torch.rand(1, 5), torch.tensor([[3, 1, 0, 4, 2]]), 5, 5)
    assert rows(got, 0) == [(i, [i]) for i in range(5)]


def test_an_image_of_one_token():
    assert_agrees(torch.ones(1), torch.zeros(1, dtype=torch.int64), 1, 1)
    assert select_stage_three(torch.ones(1, 1), 1).tolist() == [[0]]


@pytest.mark.parametrize("n2", [1, 5, 12, 30, 40])
def test_an_image_has_the_same_selection_in_any_batch(n2):
    torch.manual_seed(n2)
    norms = torch.rand(4, 40)
    norms[2] = 1.0
    labels = torch.stack([some_labels(40, 12, seed, skew=seed) for seed in range(4)])
    hidden = torch.randn(4, 40, 16)
    batch = select_stage_two(norms, labels, 12, n2)
    merged = merge_tokens(hidden, batch)
    third = select_stage_three(norms[:, :n2], 1)
    for i in range(4):
        one = slice(i, i + 1)
        single = select_stage_two(norms[one], labels[one], 12, n2)
        assert torch.equal(batch.index[one], single.index)
        assert torch.equal(batch.merged[one], single.merged)
        assert torch.equal(batch.groups[one], single.groups)
        torch.testing.assert_close(merged[one], merge_tokens(hidden[one], single))
        assert torch.equal(third[one], select_stage_three(norms[one, :n2], 1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("n2", [3, 12, 25])
def test_counts_hold_when_norms_are_not_finite(bad, n2):
    norms = torch.rand(3, 40)
    norms[1, ::3] = bad
    norms[2] = bad
    labels = torch.stack([some_labels(40, 12, seed) for seed in range(3)])
    got = select_stage_two(norms, labels, 12, n2)
    assert (got.index.diff(dim=1) > 0).all()
    for groups in got.groups:
        assert groups.unique().tolist() == list(range(min(12, n2) + (n2 > 12)))
        assert (groups == 12).sum() == max(n2 - 12, 0)
    assert (got.merged.sort(dim=1).values.diff(dim=1) > 0).all()
    assert (select_stage_three(norms, n2).diff(dim=1) > 0).all()


def test_merging_adds_a_group_s_mean_to_its_middle_row_only():
    norms = torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0]])
    hidden = torch.tensor([[[1.0], [20.0], [4.0], [30.0], [7.0]]])
    got = merge_tokens(hidden, select_stage_two(norms, torch.zeros_like(norms).long(), 1, 3))
    assert got.flatten().tolist() == [20.0, 4.0 + 4.0, 30.0]


@pytest.mark.parametrize(("num_centres", "n2"), [(20, 77), (20, 12)])
def test_merging_agrees_with_the_oracle(num_centres, n2):
    torch.manual_seed(n2)
    norms, hidden = torch.rand(172), torch.randn(172, 33)
    labels = some_labels(172, num_centres, n2, skew=1.0)
    selection = select_stage_two(norms[None], labels[None], num_centres, n2)
    wanted = oracle.merged(
        hidden.numpy(), oracle.stage_two(norms.tolist(), labels.tolist(), num_centres, n2)
    )
    np.testing.assert_allclose(
        merge_tokens(hidden[None], selection)[0].numpy(), wanted, rtol=1e-5, atol=1e-6
    )


def test_merging_accumulates_half_precision_in_float32():
    norms = torch.arange(4096.0)[None]
    hidden = torch.ones(1, 4096, 3, dtype=torch.bfloat16)
    selection = select_stage_two(norms, torch.zeros(1, 4096, dtype=torch.int64), 1, 1)
    got = merge_tokens(hidden, selection)
    assert got.dtype == torch.bfloat16
    assert (got == 2).all()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_stage_three_keeps_the_smallest_norms_in_order(values, data):
    n3 = data.draw(st.integers(1, len(values)))
    got = select_stage_three(torch.tensor([values], dtype=torch.float32), n3)
    assert got.dtype == torch.int64
    assert got[0].tolist() == oracle.smallest(values, n3)
