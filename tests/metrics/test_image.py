"""The ``evaluate.Metric`` face: what goes in, what it is called when it comes out, and what stays on disk."""

import evaluate
import numpy as np
import pytest
import torch
from torch import nn

from hf_diffusionblocks.metrics import (
    ClassAgreement,
    ClassifierFeatures,
    FeatureStatistics,
    FrechetDistance,
    InceptionFeatures,
    KernelDistance,
    ModuleFeatures,
    PrecisionRecall,
    feature_statistics,
    features,
    image,
)
from hf_diffusionblocks.metrics.features import SmallCNN
from hf_diffusionblocks.metrics.statistics import frechet_distance, kernel_distance, precision_recall

FEATURE_METRICS = (FrechetDistance, KernelDistance, PrecisionRecall)


class Pixels(nn.Module):
    """Each image's 16 pixels through a fixed map to three features."""

    def forward(self, x):
        return x.flatten(1) @ torch.arange(48.0).cos().reshape(16, 3)


@pytest.fixture
def network() -> ModuleFeatures:
    return ModuleFeatures("pixels", Pixels())


@pytest.fixture
def classifier() -> ClassifierFeatures:
    return ClassifierFeatures("tiny", SmallCNN(1, 4, width=8, feature_dim=8), accuracy=0.75)


def images(count: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.rand(count, 1, 4, 4) * 2 - 1) * scale


def files(folder) -> list[str]:
    """What lies in a metric's cache, besides the locks that evaluate leaves there."""
    return [str(p) for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_results_are_those_of_the_formulas_under_the_networks_name(network, tmp_path):
    x, y = images(30), images(40, 0.8)
    f, g = network(x), network(y)
    exact = frechet_distance(*(FeatureStatistics.from_batches([s], "pixels") for s in (f, g)))
    assert FrechetDistance(network, cache_dir=tmp_path).compute(predictions=x, references=y) == {
        "frechet_distance_pixels": pytest.approx(exact, rel=1e-9),
        "name": "frechet_distance_pixels",
        "feature_network": "pixels",
    }
    mean, deviation = kernel_distance(f, g, subsets=7, subset_size=20, seed=5)
    kernel = KernelDistance(network, subsets=7, subset_size=20, seed=5, cache_dir=tmp_path)
    assert kernel.compute(predictions=x, references=y) == {
        "kernel_distance_pixels": mean,
        "kernel_distance_pixels_std": deviation,
        "name": "kernel_distance_pixels",
        "feature_network": "pixels",
    }
    precision, recall = precision_recall(f, g, k=2)
    assert PrecisionRecall(network, k=2, cache_dir=tmp_path).compute(predictions=x, references=y) == {
        "precision_pixels": precision,
        "recall_pixels": recall,
        "k": 2,
        "feature_network": "pixels",
    }


def test_only_inception_gives_fid_and_kid(network, monkeypatch, tmp_path):
    class Bytes(nn.Module):
        def forward(self, x):
            return x.float().flatten(2).mean(dim=2)

    monkeypatch.setattr(features, "_load_inception", Bytes)
    x, y = images(30), images(30)
    for made in (FrechetDistance(cache_dir=tmp_path), FrechetDistance(InceptionFeatures(), cache_dir=tmp_path)):
        result = made.compute(predictions=x, references=y)
        assert set(result) == {"fid", "name", "feature_network"} and result["name"] == "fid"
        assert result["feature_network"] == "inception"
    result = KernelDistance(cache_dir=tmp_path).compute(predictions=x, references=y)
    assert set(result) == {"kid", "kid_std", "name", "feature_network"} and result["name"] == "kid"
    named = FrechetDistance("inception", cache_dir=tmp_path).compute(predictions=network(x), references=network(y))
    assert "fid" not in named and "frechet_distance_inception" in named


def test_without_inception_the_default_says_what_to_do(monkeypatch, tmp_path):
    def fail():
        raise ModuleNotFoundError("No module named 'torch_fidelity'")

    monkeypatch.setattr(features, "_load_inception", fail)
    for metric in FEATURE_METRICS:
        with pytest.raises(ImportError, match="pass another feature network"):
            metric(cache_dir=tmp_path)


@pytest.mark.parametrize("metric", FEATURE_METRICS)
@pytest.mark.parametrize("in_memory", [True, False])
def test_all_ways_of_giving_the_same_samples_agree(metric, in_memory, network, tmp_path, monkeypatch):
    monkeypatch.setattr(image, "_ROWS_PER_WRITE", 8)  # so that one batch spans several writes
    x, y = images(30), images(21)
    f, g = network(x), network(y)
    made = metric(network, cache_dir=tmp_path, keep_in_memory=in_memory)
    base = made.compute(predictions=x, references=y)
    assert made.compute(predictions=x.numpy(), references=y.double().numpy()) == base
    assert made.compute(predictions=list(x), references=[row.numpy() for row in y]) == base
    assert made.compute(predictions=f.numpy(), references=g.tolist()) == base
    made.add_batch(predictions=x[:10], references=g[:20])  # images and features may be mixed, and numbers differ
    made.add_batch(references=y[20:])
    made.add_batch(predictions=f[10:29])
    assert made.compute(predictions=x[29:]) == base
    for row in x:
        made.add(prediction=row)
    for row in g:
        made.add(reference=row)
    assert made.compute() == base
    assert files(tmp_path) == []


def test_the_store_does_not_mix_up_rows_of_unequal_numbers(network, tmp_path):
    seen = {}

    class Spy(FrechetDistance):
        def _compare(self, predictions, references):
            seen.update(predictions=predictions, references=references)
            return super()._compare(predictions, references)

    f, g = torch.randn(9, 3), torch.randn(5, 3)
    made = Spy(network, cache_dir=tmp_path)
    made.add_batch(predictions=f[:2], references=g)
    made.add_batch(predictions=f[2:])
    made.compute()
    assert torch.equal(seen["predictions"], f.double()) and torch.equal(seen["references"], g.double())


def test_more_noise_is_farther_away(network, tmp_path):
    real = images(400, 0.5)
    for metric, key in ((FrechetDistance, "frechet_distance_pixels"), (KernelDistance, "kernel_distance_pixels")):
        made = metric(network, cache_dir=tmp_path)
        noisy = [images(400, 0.5) + level * torch.randn(400, 1, 4, 4) for level in (0, 0.1, 0.2, 0.4)]
        values = [made.compute(predictions=x, references=real)[key] for x in noisy]
        assert values == sorted(values) and values[-1] > 10 * abs(values[0])


def test_equal_sets(network, tmp_path):
    x = images(50)
    same = {"predictions": x, "references": x}
    assert FrechetDistance(network, cache_dir=tmp_path).compute(**same)["frechet_distance_pixels"] < 1e-6
    result = PrecisionRecall(network, cache_dir=tmp_path).compute(**same)
    assert (result["precision_pixels"], result["recall_pixels"]) == (1.0, 1.0)


def test_reference_statistics_stand_in_for_reference_images(network, tmp_path):
    x, y = images(30), images(40)
    cached = feature_statistics(y, network, tmp_path / "statistics")
    made = FrechetDistance(network, cache_dir=tmp_path / "store")
    base = made.compute(predictions=x, references=y)
    assert base == pytest.approx(made.compute(predictions=x, references=cached))
    made.add_batch(predictions=x[:7], references=cached)
    made.add_batch(predictions=x[7:])
    assert base == pytest.approx(made.compute())
    made.add_batch(references=cached)
    assert base == pytest.approx(made.compute(predictions=x))
    with pytest.raises(ValueError, match="missing"):  # and they are forgotten once used
        made.compute(predictions=x)


def test_reference_statistics_of_another_network_or_beside_samples_are_refused(network, tmp_path):
    x = images(30)
    made = FrechetDistance(network, cache_dir=tmp_path)
    other = ModuleFeatures("other", Pixels())
    changed = ModuleFeatures("pixels", nn.Sequential(Pixels(), nn.ReLU()))
    for wrong, name in ((other, "'other'"), (changed, "'pixels'")):
        with pytest.raises(ValueError, match=f"reference statistics come from {name}"):
            made.compute(predictions=x, references=feature_statistics(x, wrong, tmp_path / "statistics"))
    right = feature_statistics(x, network, tmp_path / "statistics")
    made.add_batch(predictions=x, references=x)
    with pytest.raises(ValueError, match="both as samples and as FeatureStatistics"):
        made.compute(references=right)
    named = FrechetDistance("pixels", cache_dir=tmp_path)  # a name cannot be checked beyond itself
    assert named.compute(predictions=network(x), references=right)["frechet_distance_pixels"] < 1e-6


def test_few_samples_warn_and_fewer_than_two_are_refused(network, tmp_path):
    made = FrechetDistance(network, cache_dir=tmp_path)
    with pytest.warns(UserWarning, match="covariance of 3 samples in 3 dimensions is rank deficient"):
        made.compute(predictions=images(3), references=images(50))
    for metric in FEATURE_METRICS:
        with pytest.raises(ValueError, match="1 references are too few"):
            metric(network, cache_dir=tmp_path).compute(predictions=images(9), references=images(1))


@pytest.mark.parametrize(
    "predictions, words",
    [
        (torch.full((4, 1, 4, 4), float("nan")), "4 of 4 images"),
        (torch.tensor([[0.0, 1, 2], [0, float("inf"), 1]]), "1 of 2 feature vectors of predictions"),
        (torch.zeros(4, 1, 4, 4, dtype=torch.uint8), "127.5"),
        (torch.zeros(4, 4, 4), r"not shape \(4, 4, 4\)"),
        (torch.zeros(0, 1, 4, 4), "predictions of shape .* are empty"),
        ([], "predictions of shape .* are empty"),
        (torch.randn(9, 5), r"different widths: \[3, 5\]"),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_bad_input_is_named_and_leaves_the_metric_usable(network, tmp_path, predictions, words, in_memory):
    x, y = images(30), images(30)
    made = FrechetDistance(network, cache_dir=tmp_path, keep_in_memory=in_memory)
    base = made.compute(predictions=x, references=y)
    made.add_batch(predictions=images(5), references=images(5))
    with pytest.raises(ValueError, match=words):
        made.compute(predictions=predictions, references=y)
    assert files(tmp_path) == [] and len(made) == 0
    assert made.compute(predictions=x, references=y) == base


def test_a_refused_batch_leaves_what_was_added_before(network, tmp_path):
    x, y = images(30), images(30)
    made = FrechetDistance(network, cache_dir=tmp_path)
    made.add_batch(predictions=x, references=y)
    with pytest.raises(ValueError, match="NaN"):
        made.add_batch(predictions=images(3), references=torch.full((3, 3), float("nan")))
    assert made.compute() == made.compute(predictions=x, references=y)


@pytest.mark.parametrize("metric", FEATURE_METRICS)
def test_predictions_and_references_of_different_widths_are_refused(metric, tmp_path):
    with pytest.raises(ValueError, match="features of width 5, references of width 3"):
        metric("somewhere", cache_dir=tmp_path).compute(predictions=torch.randn(9, 5), references=torch.randn(9, 3))


def test_images_need_a_network_and_a_network_needs_to_be_one(tmp_path):
    with pytest.raises(ValueError, match="images, but only the name of a feature network, 'somewhere'"):
        FrechetDistance("somewhere", cache_dir=tmp_path).compute(predictions=images(5), references=images(5))
    with pytest.raises(ValueError, match=r"ModuleFeatures\(name, module\)"):
        FrechetDistance(Pixels(), cache_dir=tmp_path)


@pytest.mark.parametrize("in_memory", [True, False])
def test_computing_with_nothing_or_half_is_refused(network, tmp_path, in_memory):
    for metric in FEATURE_METRICS:
        made = metric(network, cache_dir=tmp_path, keep_in_memory=in_memory)
        for inputs in ({}, {"predictions": images(5)}, {"references": images(5)}):
            with pytest.raises(ValueError, match="missing"):
                made.compute(**inputs)
        with pytest.raises(ValueError, match="neither predictions nor references"):
            made.add_batch()


def test_bad_settings_are_named(network, tmp_path):
    with pytest.raises(ValueError, match="k=0"):
        PrecisionRecall(network, k=0, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="subset_size=1"):
        KernelDistance(network, subset_size=1, cache_dir=tmp_path)


def test_two_metrics_share_a_cache_without_harm(network, tmp_path):
    x, y = images(30), images(30)
    first, second = (FrechetDistance(network, cache_dir=tmp_path) for _ in range(2))
    base = first.compute(predictions=x, references=y)
    second.add_batch(predictions=x)
    with pytest.raises(ValueError, match="NaN"):  # must not take the other's file with it
        first.compute(predictions=images(3) * float("nan"), references=y)
    second.add_batch(references=y)
    assert second.compute() == base and files(tmp_path) == []


def test_processes_put_their_shares_together(network, tmp_path):
    import threading

    x, y = images(30), images(31)
    base = FrechetDistance(network, cache_dir=tmp_path).compute(predictions=x, references=y)
    made = [
        FrechetDistance(network, cache_dir=tmp_path, num_process=2, process_id=i, experiment_id="two") for i in (0, 1)
    ]
    results: list = [None, None]

    def work(rank: int) -> None:
        results[rank] = made[rank].compute(predictions=x[rank::2], references=y[rank::2])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results[1] is None and results[0] == pytest.approx(base)


def test_metrics_combine_as_evaluate_combines_them(network, tmp_path):
    x, y = images(30), images(30)
    parts = [metric(network, cache_dir=tmp_path) for metric in FEATURE_METRICS]
    combined = evaluate.combine(parts).compute(predictions=x, references=y)
    for part in parts:
        assert isinstance(part, evaluate.Metric)
        alone = part.compute(predictions=x, references=y)
        assert all(combined[key] == value for key, value in alone.items() if isinstance(value, float))


# --- class agreement --------------------------------------------------------------------------------------------


def test_class_agreement_is_the_share_of_equal_classes(classifier, tmp_path):
    made = ClassAgreement(classifier, cache_dir=tmp_path)
    result = made.compute(predictions=[0, 1, 2, 3, 3], references=np.array([0, 1, 2, 2, 0], dtype=np.uint8))
    assert result == {"class_agreement": 3 / 5, "classifier": "tiny", "classifier_accuracy": 0.75}
    assert files(tmp_path) == []


def test_class_agreement_of_images_is_that_of_their_predicted_classes(classifier, tmp_path):
    pictures = torch.rand(12, 1, 8, 8) * 2 - 1
    classes = classifier.predict(pictures)
    wanted = classes.clone()
    wanted[:3] = (wanted[:3] + 1) % 4
    made = ClassAgreement(classifier, cache_dir=tmp_path)
    assert made.compute(predictions=pictures, references=wanted)["class_agreement"] == 9 / 12
    made.add_batch(predictions=pictures.numpy()[:5], references=wanted[:5])
    made.add_batch(predictions=classes[5:11], references=wanted[5:11])
    made.add(prediction=pictures[11], reference=int(wanted[11]))
    assert made.compute()["class_agreement"] == 9 / 12


@pytest.mark.parametrize(
    "predictions, references, words",
    [
        ([0, 4], [0, 1], "predictions reach from 0 to 4, outside the classes 0 .. 3 of 'tiny'"),
        ([0, 1], [0, -1], "references reach from -1"),
        ([0.0, 1.0], [0, 1], "predictions must be integers"),
        ([0, 1], [[0], [1]], "references must be integers"),
        ([], [], "predictions must be integers"),
        ([0, 1, 2], [0, 1], "3 predictions have 2 references"),
        ([0, 1], None, "missing"),
        (torch.full((2, 1, 8, 8), float("nan")), [0, 1], "2 of 2 images"),
    ],
)
def test_class_agreement_names_bad_input(classifier, tmp_path, predictions, references, words):
    made = ClassAgreement(classifier, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=words):
        made.compute(predictions=predictions, references=references)
    assert files(tmp_path) == [] and made.compute(predictions=[1], references=[1])["class_agreement"] == 1.0


def test_class_agreement_needs_a_classifier_of_known_accuracy(tmp_path):
    unknown = ClassifierFeatures("unknown", SmallCNN(1, 4, width=8, feature_dim=8))
    with pytest.raises(ValueError, match="accuracy of classifier 'unknown' is unknown"):
        ClassAgreement(unknown, cache_dir=tmp_path)
