"""NoProp and DiffusionBlocks on its network: schedules in closed form, losses by formula, gradients of one block."""

import math

import pytest
import torch
from torch.testing import assert_close

from hf_diffusionblocks import BlockPartition, DiffusionBlocksTrainingArguments
from hf_diffusionblocks.baselines.blocked_cnn import BlockedCNN
from hf_diffusionblocks.baselines.local_training import LocalTrainer, accuracy
from hf_diffusionblocks.baselines.noprop import BackpropCNN, NoPropCT, NoPropDT, NoPropFM
from hf_diffusionblocks.baselines.noprop_network import CNNConfig, DenoisingCNN, LabelEmbedding
from hf_diffusionblocks.baselines.noprop_schedules import (
    LearnedSchedule,
    cosine_alpha_bar,
    divergence_from_prior,
    noised,
    signal_to_noise,
    step_coefficients,
)
from hf_diffusionblocks.data import load_image_dataset

SMALL = CNNConfig(num_classes=3, image_size=8, widths=(2, 3, 4), hidden=8)
DIGITS = CNNConfig(num_classes=10, image_size=8, widths=(16, 32, 64), hidden=64, dropout=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arguments(tmp_path, **settings) -> DiffusionBlocksTrainingArguments:
    common = {"learning_rate": 5e-3, "lr_scheduler_type": "cosine", "warmup_steps": 10, "weight_decay": 1e-3}
    return DiffusionBlocksTrainingArguments(output_dir=str(tmp_path), **common | settings)


def some(size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 1, 8, 8), torch.arange(size) % 3


# Schedules


def test_the_cosine_schedule_goes_from_noise_to_a_finite_snr():
    alpha_bar = cosine_alpha_bar(10)
    assert alpha_bar.shape == (11,) and bool((alpha_bar.diff() > 0).all())
    assert alpha_bar[0] < 1e-30
    for t in range(11):
        wanted = (1 + math.cos(math.pi * (1 - t / 10 + 0.008) / 1.008)) / 2
        assert math.isclose(alpha_bar[t], wanted, rel_tol=1e-9, abs_tol=1e-12)
    snr = signal_to_noise(alpha_bar)
    assert math.isclose(snr[-1], 1 / math.tan(0.008 / 1.008 * math.pi / 2) ** 2, rel_tol=1e-9)
    for settings in ({"num_blocks": 0}, {"num_blocks": 3, "offset": 0}):
        with pytest.raises(ValueError, match="must be"):
            cosine_alpha_bar(**settings)


def test_a_step_from_the_true_embedding_has_the_next_marginal():
    """If z_{t-1} ~ q(z_{t-1} | y), then a u + b z + sqrt(c) noise ~ q(z_t | y), mean and variance."""
    alpha_bar = cosine_alpha_bar(7)
    a, b, c = step_coefficients(alpha_bar)
    before, after = alpha_bar[:-1], alpha_bar[1:]
    assert_close(a + b * before.sqrt(), after.sqrt())
    assert_close(b**2 * (1 - before) + c, 1 - after)
    assert bool((c > 0).all())


def test_the_divergence_is_that_of_torch():
    u, alpha_bar = torch.randn(4, 5), torch.tensor(0.3)
    q = torch.distributions.Normal(alpha_bar.sqrt() * u, (1 - alpha_bar).sqrt())
    wanted = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    assert_close(divergence_from_prior(u, alpha_bar), wanted)


def test_the_learned_schedule_grows_between_its_learned_ends_and_knows_its_slope():
    schedule = LearnedSchedule(hidden=5, gamma_0=-3.0, gamma_1=2.0)
    t = torch.linspace(0, 1, 21, requires_grad=True)
    snr = signal_to_noise(schedule.alpha_bar(t))
    assert_close(snr[[0, -1]].log(), torch.tensor([-2.0, 3.0]), atol=1e-5, rtol=1e-5)
    assert bool((snr.diff() > 0).all())
    (slope,) = torch.autograd.grad(snr.sum(), t)
    assert_close(schedule.snr_slope(t), slope, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="gamma_0=1.0"):
        LearnedSchedule(gamma_0=1.0, gamma_1=0.0)


# Losses


def test_the_losses_of_discrete_time_are_equation_8():
    model = NoPropDT(SMALL, num_blocks=3, eta=0.2).eval()
    images, labels = some()
    losses = dict(model.losses(images, labels, generator()))
    assert list(losses) == [0, 1, 2, None]
    noise, u, alpha_bar = generator(), torch.eye(3)[labels], cosine_alpha_bar(3)
    for t in range(3):
        z = alpha_bar[t].sqrt() * u + (1 - alpha_bar[t]).sqrt() * torch.randn(6, 3, generator=noise)
        estimate = model.blocks[t](images, z.float()).softmax(-1)  # one-hot embeddings
        snr = alpha_bar / (1 - alpha_bar)
        wanted = 3 / 2 * 0.2 * (snr[t + 1] - snr[t]).float() * ((estimate - u) ** 2).sum() / 6
        assert_close(losses[t], wanted)
    z = alpha_bar[3].sqrt() * u + (1 - alpha_bar[3]).sqrt() * torch.randn(6, 3, generator=noise)
    logits = model.classifier(z.float())
    wanted = -logits.log_softmax(-1)[range(6), labels].mean() + divergence_from_prior(u, alpha_bar[0]).mean()
    assert_close(losses[None], wanted)


def test_the_loss_of_flow_matching_vanishes_at_the_true_velocity():
    model = NoPropFM(SMALL)
    images, labels = some()
    noise = generator()
    u, t = torch.eye(3)[labels], torch.rand(6, generator=noise)
    z_0 = torch.randn(6, 3, generator=noise)
    asked = {}

    class Velocity(torch.nn.Module):
        def forward(self, images, z, time):
            asked.update(z=z, time=time)
            return u - z_0

    model.network = Velocity()
    ((part, loss),) = model.losses(images, labels, generator())
    assert part == 0 and loss == 0
    assert_close(asked["z"], t[:, None] * u + (1 - t[:, None]) * z_0)
    assert_close(asked["time"], t)


def test_the_loss_of_continuous_time_weighs_the_error_by_the_slope_of_the_snr():
    model = NoPropCT(SMALL, eta=2.0).eval()
    images, labels = some()
    ((_, loss),) = model.losses(images, labels, generator())
    noise, u = generator(), torch.eye(3)[labels]
    t = torch.rand(6, generator=noise)
    z = noised(u, model.schedule.alpha_bar(t), torch.randn(6, 3, generator=noise))
    error = (model.network(images, z, t).softmax(-1) - u).square().sum(-1)
    ends = model.schedule.alpha_bar(torch.tensor([0.0, 1.0]))
    z_1 = noised(u, ends[1:], torch.randn(6, 3, generator=noise))
    entropy = torch.nn.functional.cross_entropy(model.classifier(z_1), labels)
    wanted = entropy + divergence_from_prior(u, ends[0]).mean() + (model.schedule.snr_slope(t) * error).mean()
    assert_close(loss, wanted)


@pytest.mark.parametrize("loss", ["edm", "cross_entropy"])
def test_blocks_of_the_cnn_have_the_methods_loss(loss):
    model = BlockedCNN(SMALL, loss=loss).eval()
    images, labels = some()
    noise, y = generator(), torch.eye(3)[labels]
    for b, value in model.losses(images, labels, generator()):
        low, high = model.partition.range(b, training=True)
        sigma = model.partition.sample(b, 6, noise).float()
        assert bool(((sigma >= low) & (sigma <= high)).all())
        z = y + sigma[:, None] * torch.randn(6, 3, generator=noise)
        s2, d2 = sigma**2, 1 / 3  # sigma_data^2 of a one-hot vector in three dimensions
        output = model.blocks[b](images, z / (s2 + d2).sqrt()[:, None], sigma.log() / 4)
        if loss == "cross_entropy":
            wanted = -output.log_softmax(-1)[range(6), labels].mean()
        else:
            c_skip, c_out = d2 / (s2 + d2), sigma * d2**0.5 / (s2 + d2).sqrt()
            denoised = c_skip[:, None] * z + c_out[:, None] * output
            wanted = (((denoised - y) ** 2).mean(-1) / c_out**2).mean()
        assert_close(value, wanted)


# Locality


@pytest.mark.parametrize(
    "make", [lambda: NoPropDT(SMALL, num_blocks=3), lambda: BlockedCNN(SMALL), lambda: BackpropCNN(SMALL, 3)]
)
def test_a_blocks_loss_gives_no_other_block_a_gradient(make):
    model = make()
    local = not isinstance(model, BackpropCNN)
    for part, loss in model.losses(*some(), generator()):
        model.zero_grad()
        loss.backward()
        for b, block in enumerate(model.blocks):
            touched = any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in block.parameters())
            assert touched == (b == part or not local)


def test_an_update_of_a_part_leaves_the_others_as_they_were(tmp_path):
    model = NoPropDT(SMALL, num_blocks=2)
    data = load_image_dataset("digits", "test").select(range(30))
    data.labels.remainder_(3)
    trainer = LocalTrainer(model, arguments(tmp_path, per_device_train_batch_size=8, warmup_steps=0), data)
    before = [p.clone() for p in model.blocks[1].parameters()]
    losses = model.losses(*trainer.batch(0))
    part, loss = next(losses)
    loss.backward()
    trainer.apply(part)
    assert part == 0 and all(torch.equal(p, q) for p, q in zip(before, model.blocks[1].parameters(), strict=True))
    part, loss = next(losses)
    loss.backward()
    trainer.apply(part)
    assert not all(torch.equal(p, q) for p, q in zip(before, model.blocks[1].parameters(), strict=True))


def test_learned_embeddings_train_by_every_loss_and_fixed_ones_by_none():
    learned = CNNConfig(num_classes=3, image_size=8, widths=(2, 3, 4), hidden=8, embedding="learned", embedding_dim=5)
    model = NoPropDT(learned, num_blocks=2)
    assert_close(model.embedding.weight @ model.embedding.weight.T, torch.eye(3))  # orthogonal start
    assert any(p is model.embedding.weight for p in model.parameters_of(None))
    for _, loss in model.losses(*some(), generator()):
        model.embedding.weight.grad = None
        loss.backward()
        assert model.embedding.weight.grad is not None
    assert NoPropFM(learned).classifier is not None
    assert not list(LabelEmbedding(SMALL).parameters())


# Inference


def test_samplers_reach_the_label_if_every_block_knows_it():
    """Blocks that give the right label exactly: all four samplers end at it."""
    images, labels = some()

    def known(config, out=None, timed=False):
        block = DenoisingCNN(config, timed=timed)
        block.encode = lambda images: labels
        block.head = lambda features, z, time=None: 100.0 * torch.eye(3)[features]
        return block

    discrete, continuous = NoPropDT(SMALL, num_blocks=4), NoPropCT(SMALL, num_steps=20)
    flow, blocked = NoPropFM(SMALL, num_steps=20), BlockedCNN(SMALL, loss="cross_entropy")
    discrete.blocks = torch.nn.ModuleList(known(SMALL) for _ in range(4))
    continuous.network = known(SMALL, timed=True)
    blocked.blocks = torch.nn.ModuleList(known(SMALL, timed=True) for _ in range(3))
    flow.network = known(SMALL, timed=True)
    # the velocity of a straight line to u_y
    flow.network.head = lambda features, z, time: (torch.eye(3)[features] - z) / (1 - time[:, None])
    for model in (discrete, continuous, flow, blocked):
        with torch.no_grad():
            assert torch.equal(model.eval().predict(images, generator(1)), labels)


def test_every_block_of_the_cnn_is_visited_at_inference():
    model = BlockedCNN(SMALL, partition=BlockPartition.equal_probability(3, 3, overlap=0.1)).eval()
    visited = []
    for b, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, b=b: visited.append(b))
    model.predict(*some()[:1], generator())
    assert visited == [0, 0, 1, 2]  # an inner edge belongs to the noisier block


# Training


@pytest.mark.parametrize(
    ("make", "updates", "wanted"),
    [
        (lambda: NoPropDT(DIGITS, num_blocks=2), 150, 0.8),
        (lambda: NoPropCT(DIGITS, num_steps=30), 250, 0.8),
        (lambda: NoPropFM(DIGITS, num_steps=30), 250, 0.8),
        (lambda: BlockedCNN(DIGITS, loss="cross_entropy"), 120, 0.9),
    ],
    ids=["DT", "CT", "FM", "blocks"],
)
def test_learns_digits(make, updates, wanted, tmp_path):
    model = make()
    args = arguments(tmp_path, max_steps=updates, per_device_train_batch_size=48)
    result = LocalTrainer(model, args, load_image_dataset("digits", "train")).train()
    assert result.updates == updates and result.seconds_per_epoch > 0
    assert accuracy(model, load_image_dataset("digits", "test")) > wanted


def test_a_job_for_one_block_holds_a_block_and_the_process_all(tmp_path):
    model = NoPropDT(DIGITS, num_blocks=4)
    trainer = LocalTrainer(model, arguments(tmp_path, per_device_train_batch_size=8), load_image_dataset("digits"))
    uses = trainer.measure()
    block = sum(p.numel() for p in model.blocks[2].parameters()) * 4
    outside = sum(p.numel() for p in model.classifier.parameters()) * 4
    assert uses[2].gradients == block and uses[2].moments >= 2 * (block + outside)
    buffers = sum(b.nbytes for b in model.blocks[2].buffers())
    assert uses[2].weights == block + outside + buffers
    assert uses[None].moments > 3.5 * uses[2].moments and uses[None].activations == max(
        uses[b].activations for b in range(4)
    )
    end_to_end = BackpropCNN(DIGITS, 4)
    whole = LocalTrainer(end_to_end, trainer.args, trainer.dataset).measure()[None]
    assert whole.gradients > 3.5 * uses[None].gradients and whole.activations > 3 * uses[None].activations
    assert trainer.update == 1


def test_bad_settings_are_named(tmp_path):
    for settings, message in (
        ({"embedding": "onehot"}, "embedding.*one_hot"),
        ({"image_size": 4}, "image_size=4"),
        ({"widths": (1, 2)}, "widths"),
        ({"embedding_dim": 7}, "embedding_dim=7"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_classes": 1}, "num_classes=1"),
    ):
        with pytest.raises(ValueError, match=message):
            CNNConfig(**{"num_classes": 3, "image_size": 8} | settings)
    with pytest.raises(ValueError, match="eta=0"):
        NoPropDT(SMALL, eta=0)
    with pytest.raises(ValueError, match="num_steps=0"):
        NoPropFM(SMALL, num_steps=0)
    with pytest.raises(ValueError, match="loss"):
        BlockedCNN(SMALL, loss="l2")
    with pytest.raises(ValueError, match="learned"):
        BlockedCNN(CNNConfig(num_classes=3, image_size=8, embedding="learned"))
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2"):
        LocalTrainer(NoPropFM(SMALL), args, load_image_dataset("digits"))
