"""Objectives against closed forms: for Gaussian data the exact denoiser's weighted error is known at every sigma."""

import copy
import math
import warnings

import jaxtyping
import pytest
import torch
from scipy import integrate, stats
from torch.testing import assert_close

from hf_diffusionblocks.noise import LogNormalNoise
from hf_diffusionblocks.objectives import DenoisingScoreMatching, denoise_routed, held_out_loss, weighted_error
from test_noise import reference
from tiny import Gaussian, GaussianImages, TinyImages, as_users_run, gaussian_model, tiny_dit

GAUSSIAN = Gaussian(mean=0.2, std=0.3)  # of another size than sigma_data = 0.5, so that the loss varies with sigma


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(sigma: float) -> float:
    """EDM's, written as 1 / sigma^2 + 1 / sigma_data^2."""
    return 1 / sigma**2 + 4


def expected(value, low: float = 0.002, high: float = 80.0) -> float:
    """E value(sigma), ln sigma from the default distribution renormalised to [low, high]."""
    density = reference(LogNormalNoise(), low, high)
    integral, _ = integrate.quad(
        lambda s: value(math.exp(s)) * density.pdf(s), math.log(low), math.log(high), limit=200, points=[-2, -1, 0]
    )
    return integral


def exact_loss(low: float = 0.002, high: float = 80.0, gaussian: Gaussian = GAUSSIAN) -> float:
    return expected(lambda sigma: weight(sigma) * gaussian.error(sigma), low, high)


# -- weighted_error ----------------------------------------------------------------------------------------------


def test_weighted_error_by_hand():
    denoised = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    target = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[1.0, 1.0], [1.0, 3.0]]])
    # mean over elements: (1 + 4 + 1 + 0) / 4 and (0 + 0 + 0 + 4) / 4
    got = weighted_error(denoised, target, torch.tensor([10.0, 3.0]))
    assert got.tolist() == [15.0, 3.0]


def test_weights_of_shape_batch_by_1_are_refused():
    denoised, target = torch.randn(2, 4, 3)
    with pytest.raises(jaxtyping.TypeCheckError):
        weighted_error(denoised, target, torch.rand(4, 1))
    with as_users_run(), pytest.raises(ValueError, match=r"weights of shape \[4, 1\] for errors of shape \[4\]"):
        weighted_error(denoised, target, torch.rand(4, 1))


@pytest.mark.parametrize("shape", [(1,), (3,), (), (1, 4)])
def test_weights_that_would_broadcast_are_refused(shape):
    denoised, target = torch.randn(2, 4, 3)
    with as_users_run(), pytest.raises(ValueError, match="one weight per sample"):
        weighted_error(denoised, target, torch.ones(shape))


@pytest.mark.parametrize("shape", [(4, 1), (1, 3), (3,), (4, 2), (5, 3)])
def test_targets_of_another_shape_are_refused(shape):
    with as_users_run(), pytest.raises(ValueError, match="target"):
        weighted_error(torch.zeros(4, 3), torch.zeros(shape), torch.ones(4))


def test_the_mean_of_weighted_errors_keeps_the_weighting():
    # What the trap computes, mean(loss) * mean(weight), must be another number.
    denoised, target, w = torch.randn(64, 5), torch.randn(64, 5), torch.rand(64) ** 4
    denoised[w > 0.5] *= 10
    error = (denoised - target).square().mean(1)
    got = weighted_error(denoised, target, w).mean()
    assert_close(got, (w * error).mean())
    assert abs(float(got / (w.mean() * error.mean())) - 1) > 0.5


# -- denoising score matching ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_blocks", [1, 3])
@pytest.mark.parametrize("overlap", [0.0, 0.2])
def test_noise_levels_come_from_the_blocks_training_range(num_blocks, overlap):
    model = gaussian_model(num_blocks, overlap=overlap)
    batch = TinyImages(500)[list(range(500))]
    for block in range(num_blocks):
        result = DenoisingScoreMatching()(model, block, batch, generator(block))
        low, high = model.partition.range(block, training=True)
        assert low * (1 - 1e-6) <= result.sigma.min() and result.sigma.max() <= high * (1 + 1e-6)
        assert stats.kstest(result.sigma.log().numpy(), reference(model.partition.noise, low, high).cdf).pvalue > 0.01
        asked, z, sigma, _ = model.seen[-1]
        assert asked == block and torch.equal(sigma, result.sigma)
        residual = (z - batch["pixel_values"]) / sigma[:, None, None, None]
        assert float(residual.mean()) == pytest.approx(0, abs=0.03)
        assert float(residual.std()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("block", range(3))
def test_gradients_reach_the_whole_block_and_no_other(block):
    model = tiny_dit()
    batch = TinyImages(32)[list(range(32))]
    DenoisingScoreMatching()(model, block, batch, generator()).loss.backward()
    inside = dict(model.block_parameters(block))
    for name, parameter in model.named_parameters():
        if name not in inside:
            assert parameter.grad is None, f"{name} of another block has a gradient"
        elif "to_k.bias" not in name:  # attention does not depend on it
            assert parameter.grad is not None and float(parameter.grad.abs().max()) > 1e-8, f"{name} learns nothing"


@pytest.mark.parametrize("block", range(3))
def test_the_loss_of_the_exact_denoiser_is_its_analytic_value(block):
    model = gaussian_model(3, GAUSSIAN)
    batch = GaussianImages(6000, GAUSSIAN)[list(range(6000))]
    result = DenoisingScoreMatching()(model, block, batch, generator(5))
    value = exact_loss(*model.partition.range(block, training=True))
    error = float(result.per_sample.std()) / 6000**0.5
    assert error < 0.01 * value, "the test must see a difference of a few per cent"
    assert float(result.loss.detach()) == pytest.approx(value, abs=4 * error)
    assert_close(result.loss.detach(), result.per_sample.mean())
    assert not result.per_sample.requires_grad and result.parts == {}


def test_the_loss_is_weighted_sample_by_sample():
    model = gaussian_model(1, GAUSSIAN)
    batch = GaussianImages(200, GAUSSIAN)[list(range(200))]
    result = DenoisingScoreMatching()(model, 0, batch, generator())
    _, z, sigma, _ = model.seen[-1]
    s = sigma.double()
    error = (GAUSSIAN.denoise(z.double(), s) - batch["pixel_values"]).square().flatten(1).mean(1)
    assert_close(result.per_sample.double(), (1 / s**2 + 4) * error, rtol=1e-3, atol=0)


def test_everything_random_comes_from_the_generator():
    model = tiny_dit(label_dropout=0.5)
    batch = TinyImages(16)[list(range(16))]
    objective = DenoisingScoreMatching(horizontal_flip=True)
    first = objective(model, 1, batch, generator(7))
    torch.rand(3)
    before = torch.get_rng_state()
    again = objective(model, 1, batch, generator(7))
    assert torch.equal(first.loss, again.loss) and torch.equal(first.sigma, again.sigma)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first.sigma, objective(model, 1, batch, generator(8)).sigma)


# -- label dropout and flips -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_about_the_share_of_labels_is_dropped(share):
    model = gaussian_model(3, label_dropout=share)
    batch = TinyImages(5000)[list(range(5000))]
    DenoisingScoreMatching()(model, 0, batch, generator())
    labels = model.seen[-1][3]
    dropped = labels == 10
    assert float(dropped.double().mean()) == pytest.approx(share, abs=4 * (share * (1 - share) / 5000) ** 0.5)
    assert torch.equal(labels[~dropped], batch["class_labels"][~dropped])
    assert labels.dtype == torch.int64


def test_no_label_is_dropped_at_a_share_of_0():
    model = gaussian_model(3, label_dropout=0.0)
    batch = TinyImages(5000)[list(range(5000))]
    DenoisingScoreMatching()(model, 0, batch, generator())
    assert torch.equal(model.seen[-1][3], batch["class_labels"])


@pytest.mark.parametrize("flip", [False, True])
def test_half_of_the_images_are_mirrored_and_their_targets_with_them(flip):
    n = 2000
    images = torch.ones(n, 1, 8, 8)
    images[..., 4:] = -1
    model = gaussian_model(3, Gaussian(0.0, 1.0))
    batch = {"pixel_values": images, "class_labels": torch.zeros(n, dtype=torch.int64)}
    result = DenoisingScoreMatching(horizontal_flip=flip)(model, 2, batch, generator())
    _, z, sigma, _ = model.seen[-1]
    mirrored = z[..., :4].mean((1, 2, 3)) < 0  # sigma is at most 0.23 in block 2
    assert float(mirrored.double().mean()) == pytest.approx(0.5 if flip else 0, abs=0.05)
    # against unmirrored targets the loss would be about w(sigma) * 4
    assert float((result.per_sample / model.preconditioning.weight(sigma)).max()) < 0.2
    assert torch.equal(images[..., 4:], -torch.ones(n, 1, 8, 4)), "the data set's own tensor was changed"


# -- distillation ------------------------------------------------------------------------------------------------


def test_distilling_a_model_from_itself_costs_nothing():
    model = tiny_dit(num_blocks=1)
    objective = DenoisingScoreMatching(teacher=copy.deepcopy(model), distillation_weight=1.0)
    batch = TinyImages(16)[list(range(16))]
    result = objective(model, 0, batch, generator())
    assert float(result.loss.detach()) == pytest.approx(0, abs=1e-9)
    assert float(result.per_sample.mean()) > 0.1, "the error against the data stays in the log"
    plain = DenoisingScoreMatching()(model, 0, batch, generator())
    assert torch.equal(result.per_sample, plain.per_sample)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_distillation_loss_is_the_weighted_distance_to_the_teacher(share):
    student, teacher = gaussian_model(3, Gaussian(0.2, 0.3)), gaussian_model(1, Gaussian(-0.1, 0.3))
    objective = DenoisingScoreMatching(teacher=teacher, distillation_weight=share)
    batch = GaussianImages(300, Gaussian(0.2, 0.3))[list(range(300))]
    result = objective(student, 1, batch, generator())
    s = result.sigma.double()
    distance = s**2 * 0.3 / (0.3**2 + s**2)  # of the two denoisers, the same everywhere
    distilled = ((1 / s**2 + 4) * distance**2).mean()
    assert_close(result.parts["distillation_loss"].double(), distilled, rtol=1e-3, atol=0)
    assert_close(result.parts["data_loss"], result.per_sample.mean())
    mixed = (1 - share) * result.parts["data_loss"] + share * result.parts["distillation_loss"]
    assert_close(result.loss.detach(), mixed)


def test_the_teacher_is_frozen_and_routes_by_its_own_partition():
    student, teacher = tiny_dit(num_blocks=2, label_dropout=0.3), gaussian_model(6).train()
    objective = DenoisingScoreMatching(teacher=teacher, distillation_weight=0.5)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    batch = TinyImages(64)[list(range(64))]
    result = objective(student, 1, batch, generator())
    result.loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in student.parameters())
    blocks = {block for block, *_ in teacher.seen}
    assert blocks == set(teacher.partition.block_of(result.sigma).tolist()) and len(blocks) > 1
    for block, _, sigma, labels in teacher.seen:
        assert bool((teacher.partition.block_of(sigma) == block).all())
        assert labels.max() == 10, "the teacher sees the labels that the student sees, dropped ones included"


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
def test_distillation_weights_outside_0_to_1_are_refused(share):
    with pytest.raises(ValueError, match=f"distillation_weight={share}"):
        DenoisingScoreMatching(teacher=gaussian_model(1), distillation_weight=share)


def test_distillation_without_a_teacher_is_refused():
    with pytest.raises(ValueError, match="distillation_weight=0.5 without a teacher"):
        DenoisingScoreMatching(distillation_weight=0.5)


# -- denoise_routed ----------------------------------------------------------------------------------------------


def test_each_sample_goes_to_the_block_that_owns_its_level():
    model = tiny_dit().eval()
    sigma = torch.tensor([0.01, 70.0, 0.3, 1.0, 0.1, 0.25])
    z, labels = torch.randn(6, 1, 8, 8) * sigma[:, None, None, None], torch.arange(6)
    with torch.no_grad():
        mixed = denoise_routed(model, z, sigma, class_labels=labels)
        for i, block in enumerate([2, 0, 1, 0, 2, 1]):
            alone = model.denoise(z[i : i + 1], sigma[i : i + 1], block=block, class_labels=labels[i : i + 1])
            assert_close(mixed[i : i + 1], alone)
            other = model.denoise(z[i : i + 1], sigma[i : i + 1], block=(block + 1) % 3, class_labels=labels[i : i + 1])
            assert float((other - alone).abs().max()) > 1e-4 * float(sigma[i]), "blocks must differ for this to tell"


# -- the held-out loss -------------------------------------------------------------------------------------------


def test_the_held_out_loss_of_the_exact_denoiser_is_its_analytic_value():
    model = gaussian_model(3, GAUSSIAN)
    result = held_out_loss(model, GaussianImages(2000, GAUSSIAN), num_draws=2, seed=3)
    assert result.num_samples == 4000
    assert result.standard_error < 0.01 * result.total
    assert result.total == pytest.approx(exact_loss(), abs=4 * result.standard_error)
    assert result.edges == list(model.partition.edges)
    for b in range(3):
        # a third of the draws lies in each range
        value = exact_loss(*model.partition.range(b))
        assert result.per_range[b] == pytest.approx(value, abs=4 * 3**0.5 * result.standard_error)
    assert result.per_range == sorted(result.per_range), "block 0, the highest noise, has the smallest of these losses"
    assert sum(result.per_range) / 3 == pytest.approx(result.total, rel=1e-3)


def test_the_held_out_loss_is_the_same_whatever_the_number_of_blocks():
    data = GaussianImages(300, GAUSSIAN)
    edges = [80.0, 1.0, 0.1, 0.002]
    one, three, six = (held_out_loss(gaussian_model(b, GAUSSIAN), data, edges=edges) for b in (1, 3, 6))
    assert one == three == six


def test_ranges_follow_the_edges_that_are_asked_for():
    model = gaussian_model(3, GAUSSIAN)
    data = GaussianImages(3000, GAUSSIAN)
    edges = [80.0, 2.0, 0.3, 0.05, 0.002]
    result = held_out_loss(model, data, edges=edges)
    assert result.edges == edges and len(result.per_range) == 4
    for (high, low), loss in zip(zip(edges, edges[1:], strict=False), result.per_range, strict=True):
        assert loss == pytest.approx(exact_loss(low, high), rel=0.03)
    assert result.total == held_out_loss(model, data).total
    # a range without any draw has no loss
    assert math.isnan(held_out_loss(model, GaussianImages(5, GAUSSIAN), edges=[80.0, 79.0, 0.002]).per_range[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(held_out_loss(model, GaussianImages(1, GAUSSIAN), num_draws=1).standard_error)


def test_the_seed_alone_decides_the_noise():
    model = tiny_dit(label_dropout=0.9)
    data = TinyImages(40)
    first = held_out_loss(model, data, seed=1)
    torch.rand(5)
    before = torch.get_rng_state()
    assert held_out_loss(model, data, seed=1) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert held_out_loss(model, data, seed=2).total != first.total
    assert held_out_loss(model, data, seed=1, batch_size=7).total == pytest.approx(first.total, rel=1e-5)


def test_noise_levels_are_spread_evenly_over_the_training_distribution():
    model = gaussian_model(3)
    held_out_loss(model, GaussianImages(50, GAUSSIAN), num_draws=4)
    sigma = torch.cat([s for _, _, s, _ in model.seen])
    shares = model.partition.noise.cdf(sigma).sort().values
    # one in each of the 200 strata
    assert (shares * 200 - 1e-4).ceil().tolist() == list(range(1, 201))
    for block, _, s, _ in model.seen:
        assert bool((model.partition.block_of(s) == block).all()), "scored by another block than the one that owns it"


def test_labels_are_not_dropped_and_each_image_gets_its_draws():
    model = gaussian_model(2, label_dropout=0.9)
    data = TinyImages(60)
    held_out_loss(model, data, num_draws=3, max_samples=50)
    labels = torch.cat([labels for *_, labels in model.seen])
    assert labels.bincount(minlength=10).tolist() == (3 * data.class_labels[:50].bincount(minlength=10)).tolist()


def test_the_mode_of_the_model_is_kept_and_nothing_gets_a_gradient():
    for training in (True, False):
        model = tiny_dit().train(training)
        held_out_loss(model, TinyImages(8))
        assert model.training is training
        assert all(p.grad is None for p in model.parameters())


def test_the_standard_error_falls_with_the_root_of_the_draws_and_bounds_the_spread():
    model = gaussian_model(1, GAUSSIAN)
    small, large = (held_out_loss(model, GaussianImages(n, GAUSSIAN)).standard_error for n in (500, 8000))
    assert small / large == pytest.approx(4, rel=0.25)
    runs = [held_out_loss(model, GaussianImages(100, GAUSSIAN, seed=s), seed=s) for s in range(30)]
    spread = float(torch.tensor([run.total for run in runs]).std())
    error = sum(run.standard_error for run in runs) / 30
    # stratified noise levels take away a part of the spread, never add to it
    assert 0.25 * error < spread < 1.3 * error
