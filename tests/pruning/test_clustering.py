import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pruning import oracle
from tests.pruning.places import patch_positions
from vitcop_vllm.pruning.clustering import _densities, _feature_distances, cluster_labels


def some_patches(count, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(height * width, generator=generator)[:count].sort().values


def checked(features, index, height, width, num_centres, **options):
    """Compare an image's labels with the oracle's. Returns the labels."""
    places = patch_positions(index[None], height, width)
    got = cluster_labels(features[None], places, num_centres, *options.values())[0].tolist()
    wanted = oracle.labels(
        features.numpy(), oracle.positions(index.tolist(), height, width), num_centres, **options
    )
    assert got == wanted
    return got


def clumps(count, channels, seed, spread=3.0):
    """Features around six means; with d_c = 8 their densities differ."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(6, channels, generator=generator) * 12 / channels**0.5
    which = torch.randint(6, (count,), generator=generator)
    noise = torch.randn(count, channels, generator=generator) * spread / channels**0.5
    return means[which] + noise


@pytest.mark.parametrize(("count", "num_centres"), [(172, 20), (230, 34), (288, 51)])
def test_labels_agree_with_the_oracle_at_published_sizes(count, num_centres):
    features = clumps(count, 1024, seed=count)
    got = checked(features, some_patches(count, 24, 24, seed=1), 24, 24, num_centres)
    assert set(got) == set(range(num_centres))


@pytest.mark.parametrize("seed", range(12))
def test_labels_agree_with_the_oracle_on_random_images(seed):
    torch.manual_seed(seed)
    height, width = (int(x) for x in torch.randint(2, 12, (2,)))
    count = int(torch.randint(1, height * width + 1, ()))
    num_centres = int(torch.randint(1, count + 1, ()))
    index = some_patches(count, height, width, seed)
    checked(clumps(count, 16, seed), index, height, width, num_centres)


@pytest.mark.parametrize(("density_scale", "radius"), [(2.0, 0.6), (30.0, 0.25), (8.0, 2.0)])
def test_labels_follow_scale_and_radius(density_scale, radius):
    index = some_patches(60, 10, 10, seed=3)
    features = clumps(60, 16, seed=3)
    checked(features, index, 10, 10, 7, density_scale=density_scale, radius=radius)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=25),
    st.data(),
)
def test_labels_agree_with_the_oracle_when_tokens_tie(points, data):
    num_centres = data.draw(st.integers(1, len(points)))
    radius = data.draw(st.sampled_from([0.0, 0.2, 0.4, 0.6, 2.0]))
    features = 4 * torch.tensor(points, dtype=torch.float32)
    checked(
        features, torch.arange(len(points)), 5, 5, num_centres, density_scale=8.0, radius=radius
    )


@pytest.mark.parametrize("num_centres", [1, 2, 7, 36])
def test_identical_features_are_labelled_by_index(num_centres):
    features = torch.full((36, 64), 0.1)
    got = checked(features, torch.arange(36), 6, 6, num_centres)
    assert set(got) == set(range(num_centres))


def test_with_as_many_centres_as_tokens_every_token_has_its_own_label():
    features = clumps(3 * 50, 16, seed=8).view(3, 50, 16)
    places = patch_positions(torch.arange(50).expand(3, 50), 5, 10)
    got = cluster_labels(features, places, 50)
    assert (got.sort(dim=1).values == torch.arange(50)).all()


def test_first_label_is_the_densest_token():
    features = torch.tensor([[0.0], [1.0], [1.5], [2.0], [90.0]])
    places = patch_positions(torch.arange(5)[None], 1, 5)
    assert cluster_labels(features[None], places, 1, spatial_radius=2.0).tolist() == [[0] * 5]
    assert cluster_labels(features[None], places, 2, spatial_radius=2.0)[0].tolist() == [
        0, 0, 0, 0, 1,
    ]  # fmt: skip


def test_a_distance_equal_to_the_radius_is_near():
    # Token 1 is the densest, token 0 the second densest. They are 0.6 apart.
    features = torch.tensor([[[0.0], [0.5], [6.0]]])
    places = torch.tensor([[[0.0, 0.0], [0.6, 0.0], [0.1, 0.0]]])
    assert cluster_labels(features, places, 2, spatial_radius=0.6).tolist() == [[0, 0, 1]]
    assert cluster_labels(features, places, 2, spatial_radius=0.55).tolist() == [[0, 1, 1]]


def test_a_token_without_near_tokens_joins_the_centre_with_the_nearest_features():
    # No two tokens are near each other, so all five deltas are infinite.
    features = torch.tensor([[0.0], [10.0], [9.0], [1.0], [5.0]])
    places = patch_positions(torch.arange(5)[None], 1, 5)
    got = cluster_labels(features[None], places, 2, spatial_radius=0.1)
    assert got.tolist() == [[0, 1, 1, 0, 0]]


def test_long_chains_end_at_their_centre():
    # Ten equal tokens and, far from them, 200 tokens whose gaps widen to the right. Except for
    # the first, the nearest denser token of each is its left neighbour.
    steps = torch.arange(200)
    chain = 100 + steps + steps.square() / 100
    features = torch.cat([torch.zeros(10), chain])[None, :, None]
    labels = cluster_labels(features, torch.zeros(1, 210, 2), 2, density_scale=1.0)
    assert labels.tolist() == [[0] * 10 + [1] * 200]


def test_densities_do_not_depend_on_the_order_of_the_distances():
    torch.manual_seed(0)
    distances = 20 * torch.rand(500)
    rows = torch.stack([distances[torch.randperm(500)] for _ in range(100)])[None]
    assert _densities(rows, 8.0).unique().numel() == 1


@pytest.mark.parametrize("num_centres", [1, 5])
def test_an_image_has_the_same_labels_in_any_batch(num_centres):
    features = torch.stack([clumps(40, 32, seed) for seed in range(4)])
    features[3] = 1.0
    index = torch.stack([some_patches(40, 8, 9, seed) for seed in range(4)])
    places = patch_positions(index, 8, 9)
    batch = cluster_labels(features, places, num_centres)
    for i in range(4):
        single = cluster_labels(features[i : i + 1], places[i : i + 1], num_centres)
        assert torch.equal(batch[i : i + 1], single)


def test_distances_between_equal_rows_are_exactly_zero():
    torch.manual_seed(0)
    row = 5 + 3 * torch.randn(1024)
    features = 5 + 3 * torch.randn(1, 33, 1024)
    for i in (0, 7, 15, 31, 32):
        features[0, i] = row
    same = _feature_distances(features)[0][[0, 7, 15, 31, 32]][:, [0, 7, 15, 31, 32]]
    assert (same == 0).all()
    assert _feature_distances(features).diagonal(dim1=1, dim2=2).eq(0).all()


def test_distances_within_the_rounding_of_the_features_are_zero():
    torch.manual_seed(0)
    features = (5 + 3 * torch.randn(1, 1, 1024)).repeat(1, 65, 1)
    for i in range(65):
        features[0, i, i] = features[0, i, i].nextafter(torch.tensor(torch.inf))
    assert (_feature_distances(features) == 0).all()


def test_distances_are_exact_to_float32():
    torch.manual_seed(1)
    features = 20 + torch.randn(1, 40, 1024)
    features[0, 1] = features[0, 0]
    features[0, 1, 3] += 1e-3
    wide = features[0].double()
    wanted = (wide[:, None] - wide[None]).square().sum(dim=2).sqrt().float()
    torch.testing.assert_close(_feature_distances(features)[0], wanted, rtol=2e-7, atol=1e-7)


def test_features_of_half_precision_are_clustered_in_float32():
    features = clumps(30, 16, seed=2).bfloat16()[None]
    places = patch_positions(torch.arange(30)[None], 5, 6)
    got = cluster_labels(features, places, 4)
    assert torch.equal(got, cluster_labels(features.float(), places, 4))


def test_labels_stay_in_range_when_features_are_not_finite():
    features = clumps(3 * 30, 16, seed=2).view(3, 30, 16)
    features[0, 4] = torch.nan
    features[1, 4, 3] = torch.inf
    features[2] = torch.nan
    places = patch_positions(torch.arange(30).expand(3, 30), 5, 6)
    got = cluster_labels(features, places, 6)
    for image in got:
        assert image.unique().tolist() == list(range(6))
