"""The one road from a noise level to a block: orientation, edges, layers, overlap, errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.testing import assert_close

from hf_diffusionblocks.configuration import DiffusionBlocksConfig
from hf_diffusionblocks.layer_counts import balanced_layers
from hf_diffusionblocks.noise import LogNormalNoise, equal_probability_grid
from hf_diffusionblocks.partition import BlockPartition, InformationProfile
from test_noise import noises, reference
from tiny import as_users_run

KINDS = ("equal_probability", "uniform", "log_uniform")

# Defaults: p_mean -1.2, p_std 1.2, [0.002, 80]; ascending.
GOLDEN_EDGES = {
    2: [0.002, 0.301200103, 80],
    3: [0.002, 0.179632472, 0.505041464, 80],
    4: [0.002, 0.134076095, 0.301200103, 0.676648643, 80],
    6: [0.002, 0.0943401356, 0.179632472, 0.301200103, 0.505041464, 0.961665134, 80],
}


@st.composite
def partitions(draw: st.DrawFn) -> BlockPartition:
    num_layers = draw(st.integers(1, 30))
    num_blocks = draw(st.integers(1, num_layers))
    make = getattr(BlockPartition, draw(st.sampled_from(KINDS)))
    return make(num_blocks, num_layers, noise=draw(noises()), overlap=draw(st.floats(0, 0.5)))


# -- orientation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_high_noise_runs_the_first_layers(kind):
    partition = getattr(BlockPartition, kind)(3, 12)
    assert partition.block_of(80.0) == 0 and partition.layers(0) == range(4)
    assert partition.block_of(0.002) == 2 and partition.layers(2) == range(8, 12)
    assert partition.range(0)[1] == 80.0 and partition.range(2)[0] == 0.002


@given(partitions())
def test_falling_noise_visits_the_blocks_in_the_order_of_their_layers(partition):
    levels = torch.linspace(math.log(partition.edges[0]), math.log(partition.edges[-1]), 200, dtype=torch.float64).exp()
    levels = levels.clamp(partition.edges[-1], partition.edges[0])
    visited = partition.block_of(levels)
    assert visited[0] == 0 and visited[-1] == partition.num_blocks - 1
    assert bool((visited.diff() >= 0).all())


@given(partitions())
def test_every_level_belongs_to_the_block_whose_range_holds_it(partition):
    for block in range(partition.num_blocks):
        low, high = partition.range(block)
        assert low < high
        inside = [low + share * (high - low) for share in (0.1, 0.5, 0.9)]
        assert [partition.block_of(sigma) for sigma in inside] == [block] * 3
        assert partition.block_of(torch.tensor(inside, dtype=torch.float64)).tolist() == [block] * 3


@pytest.mark.parametrize("num_blocks", [2, 3, 4, 6, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_a_level_on_an_inner_edge_belongs_to_the_noisier_block(kind, num_blocks):
    partition = getattr(BlockPartition, kind)(num_blocks, 12)
    inner = partition.edges[1:-1]
    noisier = list(range(num_blocks - 1))
    assert [partition.block_of(edge) for edge in inner] == noisier
    assert partition.block_of(torch.tensor(inner, dtype=torch.float64)).tolist() == noisier
    assert partition.block_of(torch.tensor(inner, dtype=torch.float64).float()).tolist() == noisier
    # and just below it the next one begins
    below = torch.tensor(inner, dtype=torch.float64) * (1 - 3e-5)
    assert partition.block_of(below).tolist() == [b + 1 for b in noisier]
    assert partition.block_of(below.float()).tolist() == [b + 1 for b in noisier]
    assert [partition.block_of(sigma) for sigma in below.tolist()] == [b + 1 for b in noisier]


@pytest.mark.parametrize("num_blocks", [2, 3, 4, 6, 12])
def test_an_edge_of_a_float32_grid_read_back_as_a_number_belongs_to_the_noisier_block(num_blocks):
    partition = BlockPartition.equal_probability(num_blocks, 12)
    grid = torch.tensor(partition.edges[1:-1], dtype=torch.float64).float()
    assert [partition.block_of(sigma) for sigma in grid.tolist()] == list(range(num_blocks - 1))
    assert partition.block_of(grid.double()).tolist() == list(range(num_blocks - 1))


@pytest.mark.parametrize("num_blocks", [2, 3, 4, 5, 6, 7, 12])
@pytest.mark.parametrize("steps_per_block", [1, 2, 3, 5, 8])
def test_points_of_the_equal_probability_grid_on_edges_belong_to_the_noisier_block(num_blocks, steps_per_block):
    partition = BlockPartition.equal_probability(num_blocks, 12)
    grid = equal_probability_grid(num_blocks * steps_per_block + 1, partition.noise)
    on_edges = grid[steps_per_block:-1:steps_per_block]
    assert_close(on_edges, torch.tensor(partition.edges[1:-1], dtype=torch.float64), rtol=1e-12, atol=0)
    noisier = list(range(num_blocks - 1))
    assert partition.block_of(on_edges).tolist() == noisier
    assert partition.block_of(on_edges.float()).tolist() == noisier
    assert [partition.block_of(sigma) for sigma in on_edges.tolist()] == noisier


def test_levels_of_any_shape_keep_it():
    partition = BlockPartition.equal_probability(3, 6)
    owners = partition.block_of(torch.tensor([[80.0, 1.0], [0.3, 0.01]]))
    assert owners.tolist() == [[0, 0], [1, 2]] and owners.dtype == torch.int64
    assert partition.block_of(torch.tensor(0.3)).shape == ()
    assert partition.block_of(torch.zeros(0)).shape == (0,)
    assert partition.block_of(torch.tensor([10.0, 0.25], dtype=torch.float16)).tolist() == [0, 1]
    assert isinstance(partition.block_of(0.3), int)


def test_whole_numbers_are_levels_too():
    noise = LogNormalNoise(p_mean=-1, p_std=1, sigma_min=0.01, sigma_max=100)
    partition = BlockPartition.explicit([100, 10, 1, 0.01], 3, noise=noise, overlap=0)
    assert [partition.block_of(sigma) for sigma in (100, 10, 9, 1)] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="sigma=101"):
        partition.block_of(101)


def test_one_block_owns_everything():
    partition = BlockPartition.equal_probability(1, 5)
    assert partition.edges == (80.0, 0.002) and partition.layers(0) == range(5)
    assert partition.block_of(torch.tensor([80.0, 1.0, 0.002])).tolist() == [0, 0, 0]
    assert partition.range(0, training=True) == partition.range(0) == (0.002, 80.0)


# -- edges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_blocks", GOLDEN_EDGES)
def test_equal_probability_edges_of_the_defaults(num_blocks):
    edges = BlockPartition.equal_probability(num_blocks, 12).edges
    np.testing.assert_allclose(edges[::-1], GOLDEN_EDGES[num_blocks], rtol=0, atol=1e-6)


@given(noises(), st.integers(1, 30), st.data())
def test_every_block_holds_the_same_mass(noise, num_layers, data):
    num_blocks = data.draw(st.integers(1, num_layers))
    partition = BlockPartition.equal_probability(num_blocks, num_layers, noise)
    masses = -np.diff(reference(noise).cdf(np.log(partition.edges)))
    np.testing.assert_allclose(masses, 1 / num_blocks, rtol=0, atol=1e-8)
    assert [row["mass"] for row in partition.describe()] == pytest.approx([1 / num_blocks] * num_blocks, abs=1e-8)


def test_uniform_edges_are_equidistant_in_sigma():
    edges = BlockPartition.uniform(4, 8).edges
    np.testing.assert_allclose(edges, [80, 60.0005, 40.001, 20.0015, 0.002], rtol=1e-12)


def test_log_uniform_edges_are_equidistant_in_log_sigma():
    edges = BlockPartition.log_uniform(4, 8, LogNormalNoise(sigma_min=0.01, sigma_max=100.0)).edges
    np.testing.assert_allclose(edges, [100, 10, 1, 0.1, 0.01], rtol=1e-12)


def test_explicit_edges_are_kept_and_span_the_noise_range():
    partition = BlockPartition.explicit([10.0, 1.0, 0.2, 0.05], 7)
    assert partition.edges == (10.0, 1.0, 0.2, 0.05) and partition.num_blocks == 3 and partition.num_layers == 7
    assert (partition.noise.sigma_max, partition.noise.sigma_min) == (10.0, 0.05)
    assert [partition.block_of(sigma) for sigma in (10.0, 1.0, 0.99, 0.1)] == [0, 0, 1, 2]


@given(partitions())
def test_the_outer_edges_are_the_ends_of_the_noise_range(partition):
    assert partition.edges[0] == partition.noise.sigma_max
    assert partition.edges[-1] == partition.noise.sigma_min
    assert all(high > low for high, low in zip(partition.edges, partition.edges[1:], strict=False))


def test_edges_do_not_depend_on_the_default_device():
    with torch.device("meta"):
        assert BlockPartition.equal_probability(4, 8) == BlockPartition.equal_probability(4, 8)
        assert BlockPartition.uniform(4, 8).block_of(79.0) == 0
    with torch.device("meta"):
        inside = BlockPartition.equal_probability(4, 8)
    assert inside == BlockPartition.equal_probability(4, 8)


# -- equal information -------------------------------------------------------------------------------------------


@st.composite
def profiles(draw: st.DrawFn) -> tuple[InformationProfile, LogNormalNoise]:
    noise = draw(noises())
    num_bins = draw(st.integers(1, 20))
    edges = np.geomspace(noise.sigma_max, noise.sigma_min, num_bins + 1)
    edges[0], edges[-1] = noise.sigma_max, noise.sigma_min
    nats = draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 10)), min_size=num_bins, max_size=num_bins))
    nats[draw(st.integers(0, num_bins - 1))] = 1.0
    return InformationProfile(tuple(edges), tuple(nats)), noise


@given(profiles(), st.integers(1, 12), st.data())
def test_every_block_owns_the_same_information(measured, num_layers, data):
    profile, noise = measured
    num_blocks = data.draw(st.integers(1, num_layers))
    partition = BlockPartition.equal_information(profile, num_blocks, num_layers, noise)
    assert (partition.edges[0], partition.edges[-1]) == (profile.edges[0], profile.edges[-1])
    assert partition.layers_per_block == BlockPartition.uniform(num_blocks, num_layers).layers_per_block
    above = [profile.above(edge) for edge in partition.edges]
    np.testing.assert_allclose(np.diff(above), profile.total / num_blocks, rtol=0, atol=1e-6 * profile.total)


def test_equal_information_edges_of_a_profile_by_hand():
    """Information grows evenly in log sigma within a bin."""
    edges, nats = [100.0, 1.0, 0.01, 0.0001], [2.0, 1.0, 1.0]
    partition = BlockPartition.equal_information((edges, nats), 4, 8, overlap=0.1)
    np.testing.assert_allclose(partition.edges, [100, 10, 1, 0.01, 0.0001], rtol=1e-12)
    assert partition.overlap == 0.1 and partition.layers_per_block == (2, 2, 2, 2)
    assert BlockPartition.equal_information((edges, nats), 2, 8).edges == (100.0, 1.0, 0.0001)
    uneven = BlockPartition.equal_information((edges, nats), 2, 8, layers_per_block=(5, 3))
    assert uneven.layers_per_block == (5, 3)


def test_a_range_without_information_goes_to_the_noisier_block():
    profile = InformationProfile((100.0, 10.0, 1.0, 0.1), (1.0, 0.0, 1.0))
    assert profile.level(1.0) == pytest.approx(1.0) and profile.above(3.0) == pytest.approx(1.0)
    assert BlockPartition.equal_information(profile, 2, 2).edges == pytest.approx((100.0, 1.0, 0.1))


def test_equal_information_is_equal_probability_where_information_is_the_training_distribution():
    noise = LogNormalNoise()
    edges = np.geomspace(80.0, 0.002, 2001)
    edges[0], edges[-1] = 80.0, 0.002
    mass = -np.diff(noise.cdf(torch.tensor(edges)).numpy())
    partition = BlockPartition.equal_information((edges.tolist(), mass.clip(0).tolist()), 4, 8, noise)
    np.testing.assert_allclose(partition.edges, BlockPartition.equal_probability(4, 8).edges, rtol=1e-4)


@pytest.mark.parametrize(
    "edges, nats, message",
    [
        ([80.0, 1.0, 0.002], [1.0], "a profile of 1 nats has 3 edges: N bins have N . 1 edges"),
        ([80.0], [], "a profile of 0 nats has 1 edges"),
        ([0.002, 1.0, 80.0], [1.0, 1.0], "strictly descending"),
        ([80.0, 1.0, 0.0], [1.0, 1.0], "positive and strictly descending"),
        ([math.inf, 1.0, 0.002], [1.0, 1.0], "finite"),
        ([80.0, math.nan, 0.002], [1.0, 1.0], "strictly descending"),
        ([80.0, 1.0, 0.002], [1.0, -0.5], "a bin of -0.5 nats"),
        ([80.0, 1.0, 0.002], [math.nan, 1.0], "a bin of nan nats"),
        ([80.0, 1.0, 0.002], [0.0, 0.0], "bins are all 0: there is no information to share"),
    ],
)
def test_profiles_that_are_none_are_refused(edges, nats, message):
    with pytest.raises(ValueError, match=message):
        BlockPartition.equal_information((edges, nats), 2, 4)


def test_a_profile_of_another_noise_range_is_refused():
    profile = InformationProfile((80.0, 1.0, 0.002), (1.0, 1.0))
    with pytest.raises(ValueError, match="the profile ends at 80.0, the noise range at sigma_max=60.0"):
        BlockPartition.equal_information(profile, 2, 4, LogNormalNoise(sigma_max=60.0))
    with pytest.raises(ValueError, match="the profile ends at 0.002, the noise range at sigma_min=0.01"):
        BlockPartition.equal_information(profile, 2, 4, LogNormalNoise(sigma_min=0.01))
    with pytest.raises(ValueError, match="num_blocks=5 is more than the 4 layers"):
        BlockPartition.equal_information(profile, 5, 4)


def test_a_config_holds_the_edges_of_equal_information():
    partition = BlockPartition.equal_information(([80.0, 1.0, 0.2, 0.002], [1.0, 2.0, 0.5]), 3, 6)
    settings = {"base_config": {"num_layers": 6}, "partition": "equal_information"}
    config = DiffusionBlocksConfig(**settings, edges=list(partition.edges))
    assert config.make_partition() == partition
    assert DiffusionBlocksConfig(**config.to_dict()).make_partition() == partition
    with pytest.raises(ValueError, match="partition='equal_information' needs edges: those of the partition that"):
        DiffusionBlocksConfig(**settings)


# -- layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", range(1, 31))
def test_blocks_partition_the_layers_exactly(num_layers):
    for num_blocks in range(1, num_layers + 1):
        partition = BlockPartition.uniform(num_blocks, num_layers)
        assert [i for b in range(num_blocks) for i in partition.layers(b)] == list(range(num_layers))
        sizes = partition.layers_per_block
        assert max(sizes) - min(sizes) <= 1 and list(sizes) == sorted(sizes, reverse=True)
        assert partition.num_blocks == num_blocks and partition.num_layers == num_layers


@pytest.mark.parametrize("kind", KINDS)
def test_explicit_numbers_of_layers(kind):
    partition = getattr(BlockPartition, kind)(3, 12, layers_per_block=(3, 6, 3))
    assert [partition.layers(b) for b in range(3)] == [range(3), range(3, 9), range(9, 12)]
    assert partition.edges == getattr(BlockPartition, kind)(3, 12).edges
    explicit = BlockPartition.explicit([80.0, 1.0, 0.5, 0.002], 12, layers_per_block=[3, 6, 3])
    assert explicit.layers(1) == range(3, 9)


# -- overlap -----------------------------------------------------------------------------------------------------


def test_training_ranges_of_the_defaults():
    partition = BlockPartition.equal_probability(3, 12)
    ranges = [partition.range(b, training=True) for b in (2, 1, 0)]
    np.testing.assert_allclose(
        ranges, [[0.002, 0.224932696], [0.170583781, 0.531831608], [0.39204768, 80]], rtol=0, atol=1e-6
    )


@given(partitions())
def test_overlap_widens_training_only(partition):
    plain = BlockPartition(partition.edges, partition.layers_per_block, partition.noise, overlap=0.0)
    for block in range(partition.num_blocks):
        low, high = partition.range(block)
        assert (low, high) == plain.range(block) == plain.range(block, training=True)
        wide_low, wide_high = partition.range(block, training=True)
        assert partition.noise.sigma_min <= wide_low <= low < high <= wide_high <= partition.noise.sigma_max
        widening = partition.overlap * math.log(high / low)
        if wide_low > partition.noise.sigma_min:
            assert math.log(low / wide_low) == pytest.approx(widening, abs=1e-9)
        if wide_high < partition.noise.sigma_max:
            assert math.log(wide_high / high) == pytest.approx(widening, abs=1e-9)
    levels = torch.tensor(partition.edges, dtype=torch.float64).log()
    levels = torch.cat([levels, (levels[1:] + levels[:-1]) / 2]).exp()
    levels = levels.clamp(partition.edges[-1], partition.edges[0])
    assert torch.equal(partition.block_of(levels), plain.block_of(levels))


@pytest.mark.parametrize("block", range(3))
@pytest.mark.parametrize("overlap", [0.0, 0.05, 0.3])
def test_training_samples_follow_the_distribution_renormalised_to_the_training_range(block, overlap):
    partition = BlockPartition.equal_probability(3, 12, overlap=overlap)
    sigma = partition.sample(block, 4000, torch.Generator().manual_seed(2))
    low, high = partition.range(block, training=True)
    assert low <= sigma.min() and sigma.max() <= high
    assert stats.kstest(sigma.log().numpy(), reference(partition.noise, low, high).cdf).pvalue > 0.01
    if overlap:  # the test must see the overlap
        plain = reference(partition.noise, *partition.range(block))
        assert stats.kstest(sigma.log().numpy(), plain.cdf).pvalue < 0.01


@given(partitions(), st.data())
def test_training_samples_stay_in_the_training_range(partition, data):
    block = data.draw(st.integers(0, partition.num_blocks - 1))
    sigma = partition.sample(block, (4, 5), torch.Generator().manual_seed(3))
    low, high = partition.range(block, training=True)
    assert sigma.shape == (4, 5) and low <= sigma.min() and sigma.max() <= high


# -- tables ------------------------------------------------------------------------------------------------------


def test_description_has_a_row_for_each_block():
    rows = BlockPartition.equal_probability(3, 7).describe()
    assert [row["block"] for row in rows] == [0, 1, 2]
    assert [row["layers"] for row in rows] == [[0, 1, 2], [3, 4], [5, 6]]
    assert rows[0]["range"] == pytest.approx((0.505041464, 80), abs=1e-6)
    assert rows[0]["training_range"] == pytest.approx((0.39204768, 80), abs=1e-6)
    assert sum(row["mass"] for row in rows) == pytest.approx(1, abs=1e-12)


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_blocks", [0, -1, True, 2.0, "3", None])
def test_numbers_of_blocks_that_are_none_are_refused(kind, num_blocks):
    with as_users_run(), pytest.raises(ValueError, match=f"num_blocks={num_blocks!r}"):
        getattr(BlockPartition, kind)(num_blocks, 6)


@pytest.mark.parametrize("num_layers", [0, -6, True, 6.0])
def test_numbers_of_layers_that_are_none_are_refused(num_layers):
    with as_users_run(), pytest.raises(ValueError, match=f"num_layers={num_layers!r}"):
        BlockPartition.equal_probability(1, num_layers)


@pytest.mark.parametrize("kind", KINDS)
def test_more_blocks_than_layers_are_refused(kind):
    with pytest.raises(ValueError, match="num_blocks=7 .* 6 layers .* between 1 and 6"):
        getattr(BlockPartition, kind)(7, 6)
    with pytest.raises(ValueError, match="num_blocks=2"):
        BlockPartition.explicit([80.0, 1.0, 0.002], 1)


@pytest.mark.parametrize(
    "layers", [(3, 6), (3, 6, 4), (3, 6, 2), (4, 4, 4, 0), (12,), (), (0, 6, 6), (-1, 7, 6), (3.5, 5.5, 3.0)]
)
def test_numbers_of_layers_that_do_not_add_up_are_refused(layers):
    with as_users_run(), pytest.raises(ValueError, match="layers_per_block"):
        BlockPartition.equal_probability(3, 12, layers_per_block=layers)


@pytest.mark.parametrize(
    "edges",
    [
        [0.002, 0.3, 80.0],
        [80.0, 90.0, 0.002],
        [80.0, 0.001, 0.002],
        [80.0, 1.0, 1.0, 0.002],
        [80.0, 80.0, 0.002],
        [80.0, math.nan, 0.002],
        [math.inf, 1.0, 0.002],
        [80.0, 1.0, 0.0],
        [80.0, 1.0, -0.002],
        [80.0],
        [],
    ],
)
@pytest.mark.parametrize("noise", [None, LogNormalNoise()])
def test_edges_out_of_order_or_outside_are_refused(edges, noise):
    with pytest.raises(ValueError, match=r"edge|sigma_max"):
        BlockPartition.explicit(edges, 12, noise=noise)


@pytest.mark.parametrize("edges", [[90.0, 1.0, 0.002], [70.0, 1.0, 0.002], [80.0, 1.0, 0.001], [80.0, 1.0, 0.01]])
def test_edges_that_do_not_span_the_noise_range_are_refused(edges):
    with pytest.raises(ValueError, match="outer edge"):
        BlockPartition.explicit(edges, 12, noise=LogNormalNoise())


def test_a_wrong_number_of_edges_is_refused():
    with pytest.raises(ValueError, match="3 edges were given for 3 blocks"):
        BlockPartition((80.0, 1.0, 0.002), (1, 1, 1))


@pytest.mark.parametrize("overlap", [-0.01, 1.0, math.nan, math.inf, "0.1", None])
def test_overlaps_outside_their_range_are_refused(overlap):
    with as_users_run(), pytest.raises(ValueError, match="overlap="):
        BlockPartition.equal_probability(3, 12, overlap=overlap)


@pytest.mark.parametrize("sigma", [math.nan, math.inf, -math.inf, 0.0, -1.0, 80.1, 1e6, 0.0019, 1e-12])
def test_levels_outside_the_range_are_refused(sigma):
    partition = BlockPartition.equal_probability(3, 6)
    with pytest.raises(ValueError, match=r"outside the noise range \[0.002, 80.0\]") as refused:
        partition.block_of(sigma)
    assert f"sigma={sigma}" in str(refused.value)
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match="outside the noise range"):
            partition.block_of(torch.tensor([1.0, sigma], dtype=dtype))
        with pytest.raises(ValueError, match="outside the noise range"):
            partition.check_sigma(torch.tensor([1.0, sigma], dtype=dtype))


def test_a_rounding_error_outside_the_range_is_forgiven():
    partition = BlockPartition.equal_probability(3, 6)
    above, below = 80.0 * (1 + 5e-6), 0.002 * (1 - 5e-6)
    assert [partition.block_of(sigma) for sigma in (above, below)] == [0, 2]
    assert partition.block_of(torch.tensor([above, below])).tolist() == [0, 2]


@pytest.mark.parametrize("block", [-1, 3, True, 1.0, "0", None])
def test_blocks_that_do_not_exist_are_refused(block):
    partition = BlockPartition.equal_probability(3, 6)
    for use in (partition.check_block, partition.layers, partition.range, lambda b: partition.sample(b, 2)):
        with as_users_run(), pytest.raises(ValueError, match="does not exist: the model has blocks 0 to 2"):
            use(block)


@given(num_layers=st.integers(1, 60), extra=st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_balanced_layers_lose_none_and_even_out_what_is_held(num_layers, extra):
    layers = balanced_layers(num_layers, extra)
    held = [n + e for n, e in zip(layers or [], extra, strict=False)]
    if layers is None:  # not so many layers that each block could have one of its own
        assert num_layers + sum(extra) < len(extra) * (max(extra) + 1)
        return
    assert sum(layers) == num_layers and min(layers) >= 1
    assert max(held) - min(held) <= 1 and held == sorted(held)
