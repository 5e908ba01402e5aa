"""Feature statistics, their cache, and the distances between sets of features, against exact answers."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hf_diffusionblocks.metrics import FeatureNetwork, FeatureStatistics, feature_statistics, statistics
from hf_diffusionblocks.metrics.statistics import (
    dataset_fingerprint,
    frechet_distance,
    kernel_distance,
    precision_recall,
)


class Counting(FeatureNetwork):
    """Pixels through a linear map; counts the images it has seen."""

    def __init__(self, scale: float = 1.0, name: str = "counting", batch_size: int = 7):
        linear = nn.Linear(16, 4, bias=False)
        with torch.no_grad():
            linear.weight.copy_(scale * torch.arange(64.0).sin().reshape(4, 16))
        super().__init__(name, nn.Sequential(nn.Flatten(), linear), batch_size=batch_size)
        self.seen = 0

    def _features(self, batch):
        self.seen += len(batch)
        return super()._features(batch)


class Indexed:
    """Images indexed as a dataset is."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "class_labels": torch.zeros(len(index), dtype=torch.int64)}


def images(count: int = 20) -> torch.Tensor:
    return torch.rand(count, 1, 4, 4) * 2 - 1


def gaussian(mean: list[float], cov: list[list[float]], **kwargs) -> FeatureStatistics:
    return FeatureStatistics(torch.tensor(mean).double(), torch.tensor(cov).double(), 1000, "exact", **kwargs)


def normalised(count: int, width: int, mean, root) -> torch.Tensor:
    """Samples whose empirical mean is ``mean`` and empirical covariance ``root @ root.T``, both exactly."""
    raw = torch.randn(count, width, dtype=torch.float64)
    raw = raw - raw.mean(dim=0)
    raw = raw @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(raw.T))).T
    return raw @ torch.as_tensor(root).double().T + torch.as_tensor(mean).double()


# --- statistics and their cache ---------------------------------------------------------------------------------


def test_statistics_are_mean_and_unbiased_covariance_whatever_the_batches():
    features = torch.randn(50, 6, dtype=torch.float64) + 1e6  # a large mean would cancel in sums of squares
    for sizes in ([50], [1, 49], [20, 0, 30], [1] * 50):
        found = FeatureStatistics.from_batches(features.split(sizes), "exact")
        torch.testing.assert_close(found.mean, features.mean(dim=0), rtol=1e-14, atol=0)
        torch.testing.assert_close(found.cov, torch.cov(features.T), rtol=1e-6, atol=1e-9)
        assert found.num_samples == 50


def test_statistics_of_a_dataset_are_those_of_its_images_and_cover_every_batch(tmp_path):
    data, network = images(20), Counting()
    found = feature_statistics(Indexed(data), network, tmp_path)
    whole = FeatureStatistics.from_batches([network(data)], "counting")
    torch.testing.assert_close(found.mean, whole.mean)
    torch.testing.assert_close(found.cov, whole.cov)
    assert (found.num_samples, found.network, found.network_fingerprint) == (20, "counting", network.fingerprint)


def test_the_second_time_the_cache_answers_bitwise_and_the_network_rests(tmp_path):
    data, network = images(), Counting()
    first = feature_statistics(Indexed(data), network, tmp_path)
    assert network.seen == 20
    for same in (Indexed(data), data, data.numpy(), data.double()):
        again = feature_statistics(same, network, tmp_path)
        assert torch.equal(again.mean, first.mean) and torch.equal(again.cov, first.cov)
        assert again.data_fingerprint == first.data_fingerprint
    assert network.seen == 20
    assert len(list(tmp_path.rglob("*"))) == 2  # the folder and one file, nothing temporary


def test_other_images_another_order_and_other_weights_are_computed(tmp_path):
    data, network = images(), Counting()
    feature_statistics(data, network, tmp_path)
    feature_statistics(data[:19], network, tmp_path)
    feature_statistics(data.flip(0), network, tmp_path)
    assert network.seen == 20 + 19 + 20
    other = Counting(scale=2.0)
    assert feature_statistics(data, other, tmp_path).network_fingerprint == other.fingerprint and other.seen == 20


def test_a_renamed_network_finds_its_statistics_under_its_new_name(tmp_path):
    data, renamed = images(), Counting(name="renamed")
    feature_statistics(data, Counting(), tmp_path)
    assert feature_statistics(data, renamed, tmp_path).network == "renamed" and renamed.seen == 0


@pytest.mark.parametrize("damage", ["nonsense", "truncated", "empty", "nan", "shape", "metadata", "other data"])
def test_a_damaged_cache_file_is_computed_anew_with_a_warning(tmp_path, damage):
    data, network = images(), Counting()
    first = feature_statistics(data, network, tmp_path)
    mean = first.mean.clone()
    (path,) = (tmp_path / "feature_statistics").iterdir()
    content = path.read_bytes()
    if damage in ("nonsense", "truncated", "empty"):
        path.write_bytes({"nonsense": b"x" * 500, "truncated": content[:-8], "empty": b""}[damage])
    elif damage == "other data":
        statistics.replace(first, data_fingerprint="0" * 32).save(path)
    elif damage == "metadata":
        save_file(load_file(path), path)
    else:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        wrong = mean[:3] if damage == "shape" else mean * float("nan")
        save_file({"mean": wrong, "cov": first.cov}, path, metadata=metadata)
    with pytest.warns(UserWarning, match="computing the statistics anew"):
        again = feature_statistics(data, network, tmp_path)
    assert network.seen == 40 and torch.equal(again.mean, mean)
    assert torch.equal(feature_statistics(data, network, tmp_path).mean, mean)
    assert network.seen == 40


def test_a_cache_that_cannot_be_written_costs_a_warning_not_the_result(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="could not be cached"):
        assert feature_statistics(images(), Counting(), tmp_path / "file").num_samples == 20


def test_the_default_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DIFFUSIONBLOCKS_CACHE", str(tmp_path / "mine"))
    feature_statistics(images(), Counting())
    assert len(list((tmp_path / "mine" / "feature_statistics").glob("*.safetensors"))) == 1
    monkeypatch.delenv("HF_DIFFUSIONBLOCKS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert statistics.default_cache_dir() == tmp_path / ".cache" / "hf_diffusionblocks"


def test_save_and_load_are_bitwise(tmp_path):
    first = FeatureStatistics.from_batches([torch.randn(9, 3)], "exact", "abc")
    first.save(tmp_path / "deep" / "x.safetensors")
    again = FeatureStatistics.load(tmp_path / "deep" / "x.safetensors")
    assert torch.equal(again.mean, first.mean) and torch.equal(again.cov, first.cov)
    assert (again.num_samples, again.network, again.network_fingerprint) == (9, "exact", "abc")
    with pytest.raises(FileNotFoundError, match="no such file"):
        FeatureStatistics.load(tmp_path / "nowhere")


def test_dataset_fingerprint_ignores_batches_and_sees_every_pixel():
    data = images()
    base = dataset_fingerprint(data)
    assert dataset_fingerprint(Indexed(data), batch_size=3) == base
    changed = data.clone()
    changed[17, 0, 3, 3] += 1e-3
    assert dataset_fingerprint(changed) != base != dataset_fingerprint(data.reshape(20, 1, 2, 8))


def test_too_few_broken_and_ill_shaped_features_are_named():
    with pytest.raises(ValueError, match="1 samples have no covariance"):
        FeatureStatistics.from_batches([torch.zeros(1, 3)], "exact")
    with pytest.raises(ValueError, match="0 samples"):
        FeatureStatistics.from_batches([], "exact")
    with pytest.raises(ValueError, match="2 of 4 feature vectors"):
        FeatureStatistics.from_batches([np.array([[0.0], [np.nan], [np.inf], [1.0]])], "exact")
    with pytest.raises(ValueError, match=r"\[n, 3\], not \(2, 4\)"):
        FeatureStatistics.from_batches([torch.zeros(2, 3), torch.zeros(2, 4)], "exact")
    with pytest.raises(ValueError, match="empty"):
        feature_statistics(Indexed(images(0)), Counting())


# --- Frechet distance -------------------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_with_commuting_covariances():
    # |m1 - m2|^2 + sum (s1_i - s2_i)^2 for diagonal covariances s^2.
    first = gaussian([1, 2, 3], [[4, 0, 0], [0, 9, 0], [0, 0, 1]])
    second = gaussian([0, 0, 1], [[1, 0, 0], [0, 16, 0], [0, 0, 1]])
    assert frechet_distance(first, second) == pytest.approx((1 + 4 + 4) + (1 + 1 + 0), abs=1e-12)
    assert frechet_distance(second, first) == pytest.approx(11, abs=1e-12)


def test_frechet_distance_of_gaussians_whose_covariances_do_not_commute():
    # In two dimensions Tr (A B)^(1/2) = sqrt(Tr(A B) + 2 sqrt(det(A B))).
    first, second = gaussian([0, 0], [[2, 1], [1, 3]]), gaussian([1, -1], [[5, -2], [-2, 1]])
    product = first.cov @ second.cov
    root = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt().item()
    assert frechet_distance(first, second) == pytest.approx(2 + 5 + 6 - 2 * root, rel=1e-12)


def test_frechet_distance_is_zero_for_equal_sets_also_of_deficient_rank():
    for count, width in ((500, 8), (5, 20)):
        features = torch.randn(count, width)
        same = FeatureStatistics.from_batches([features], "exact")
        if count <= width:
            with pytest.warns(UserWarning, match="rank deficient"):
                distance = frechet_distance(same, same)
        else:
            distance = frechet_distance(same, same)
        assert 0 <= distance < 1e-6


def test_frechet_distance_of_samples_with_exact_moments():
    rotation = [[0.8, -0.6], [0.6, 0.8]]
    first = normalised(200, 2, [0.0, 0.0], [[1.0, 0.0], [0.0, 2.0]])
    second = normalised(300, 2, [3.0, 4.0], np.array(rotation) * 3)  # a rotation leaves the ball of radius 3 alone
    fitted = [FeatureStatistics.from_batches(x.split(64), "exact") for x in (first, second)]
    assert frechet_distance(*fitted) == pytest.approx(25 + (3 - 1) ** 2 + (3 - 2) ** 2, rel=1e-10)


def test_statistics_of_different_networks_or_widths_are_not_compared():
    base = gaussian([0.0], [[1.0]], network_fingerprint="aa")
    assert frechet_distance(base, gaussian([1.0], [[1.0]])) == pytest.approx(1)  # unknown weights, same name
    with pytest.raises(ValueError, match="'exact' .aa. cannot be compared with those of 'exact' .bb."):
        frechet_distance(base, gaussian([0.0], [[1.0]], network_fingerprint="bb"))
    with pytest.raises(ValueError, match="'other'"):
        frechet_distance(base, statistics.replace(base, network="other"))
    with pytest.raises(ValueError, match="width 1 cannot be compared with width 2"):
        frechet_distance(base, gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]))


# --- kernel distance --------------------------------------------------------------------------------------------


def test_kernel_distance_equals_its_definition():
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    kernel = lambda a, b: (float(a @ b) / 3 + 1) ** 3  # noqa: E731
    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(6) for j in range(6) if i != j) / 30
    between = sum(kernel(a, b) for a in x for b in y) / 36
    assert kernel_distance(x, y) == (pytest.approx(within - 2 * between, rel=1e-12), 0.0)


def test_kernel_distance_of_one_distribution_is_zero_on_average_and_takes_both_signs():
    values = torch.tensor([kernel_distance(torch.randn(60, 4), torch.randn(60, 4))[0] for _ in range(200)])
    assert abs(values.mean()) < 4 * values.std() / 200**0.5
    assert values.min() < 0 < values.max()


def test_kernel_distance_averages_subsets_without_bias_and_repeats_by_seed():
    x, y = torch.randn(500, 4), torch.randn(700, 4) + 0.5
    whole = kernel_distance(x, y[:500])[0]
    mean, deviation = kernel_distance(x, y, subsets=200, subset_size=50, seed=1)
    assert abs(mean - whole) < 5 * deviation / 200**0.5 + 0.1 * whole and deviation > 0
    assert kernel_distance(x, y, subset_size=50, seed=1) == kernel_distance(x, y, subset_size=50, seed=1)
    assert kernel_distance(x, y, subset_size=50, seed=1) != kernel_distance(x, y, subset_size=50, seed=2)


@pytest.mark.parametrize("settings", [{"subsets": 0}, {"subset_size": 1}])
def test_kernel_distance_names_bad_settings(settings):
    with pytest.raises(ValueError, match="at least one subset of two samples"):
        kernel_distance(torch.zeros(5, 2), torch.zeros(5, 2), **settings)


# --- precision and recall ---------------------------------------------------------------------------------------


def test_precision_and_recall_on_a_line_counted_by_hand():
    # References 0, 1, 2, 10 with k = 1 own balls of radius 1, 1, 1, 8; predictions 3, 4, 19 own radii 1, 1, 15.
    references = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    predictions = torch.tensor([[3.0], [4.0], [19.0]])
    # 3 lies within 1 of 2; 4 within 8 of 10; 19 is 9 from 10. Of the references 2 lies within 1 of 3, 10 within 15 of
    # 19; 0 and 1 are farther than 1 from 3 and 4, and than 15 from 19.
    assert precision_recall(predictions, references, k=1) == (2 / 3, 2 / 4)
    assert precision_recall(references, predictions, k=1) == (2 / 4, 2 / 3)


def test_precision_and_recall_equal_their_definition():
    x, y = torch.randn(40, 6), torch.randn(60, 6) * 1.2
    between, of_x, of_y = torch.cdist(x, y), torch.cdist(x, x), torch.cdist(y, y)
    radius = lambda distances: distances.sort(dim=1).values[:, 3]  # noqa: E731  the 0th neighbour is the point itself
    precision = (between <= radius(of_y)).any(dim=1).double().mean().item()
    recall = (between <= radius(of_x)[:, None]).any(dim=0).double().mean().item()
    assert 0 < precision < 1 and 0 < recall < 1
    assert precision_recall(x, y, k=3) == (precision, recall)


def test_equal_sets_have_full_precision_and_recall_even_of_repeated_points_whose_balls_have_no_radius():
    for same in (torch.randn(50, 64), torch.randn(20, 64).repeat(4, 1), torch.randn(1, 64).expand(10, 64)):
        assert precision_recall(same, same.flip(0)) == (1.0, 1.0)


def test_collapsed_samples_have_no_recall():
    references = torch.randn(200, 16)
    collapsed = references[:1] + 1e-3 * torch.randn(50, 16)
    precision, recall = precision_recall(collapsed, references)
    assert precision == 1.0 and recall <= 1 / 200
    assert precision_recall(references.mean(dim=0).expand(50, 16), references) == (1.0, 0.0)


def test_samples_far_away_have_neither():
    assert precision_recall(torch.randn(50, 8) + 100, torch.randn(60, 8)) == (0.0, 0.0)


@pytest.mark.parametrize("k", [0, 5])
def test_k_must_fit_both_sets(k):
    with pytest.raises(ValueError, match=f"k={k} must be at least 1 and below"):
        precision_recall(torch.randn(5, 2), torch.randn(9, 2), k=k)
