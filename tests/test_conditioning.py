"""Noise conditioning: the embedding tells noise levels apart, and modulation starts as nothing at all."""

import pytest
import torch

from hf_diffusionblocks.conditioning import Modulation, NoiseEmbedding
from hf_diffusionblocks.noise import LogNormalNoise
from hf_diffusionblocks.preconditioning import EDMPreconditioning
from tiny_text import WIDTH, blocked_lm, tokens

C_NOISE = EDMPreconditioning()(torch.logspace(-2.69, 1.9, 200)).c_noise  # sigma from 0.002 to 80


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_noise_levels_of_any_shape(shape):
    embedding = NoiseEmbedding(8)
    levels = torch.randn(shape)
    embedded = embedding(levels)
    assert embedded.shape == (*shape, 8)
    one_by_one = torch.stack([embedding(level) for level in levels.flatten()]).view(*shape, 8)
    torch.testing.assert_close(embedded, one_by_one)


def test_features_are_cosines_and_sines_of_frequencies_from_a_quarter_to_64():
    embedding = NoiseEmbedding(33, num_frequencies=16)
    seen = []
    embedding.linear_1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    level = torch.tensor(0.7)
    embedding(level)
    frequencies = 0.25 * 256 ** (torch.arange(16) / 15)
    expected = torch.cat([(0.7 * frequencies).cos(), (0.7 * frequencies).sin(), level[None]])
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-5)


def test_neighbouring_noise_levels_differ_and_far_ones_are_not_confused():
    features = []
    embedding = NoiseEmbedding(4)
    embedding.linear_1.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    embedding(C_NOISE)
    distance = torch.cdist(features[0], features[0])
    neighbours = distance.diagonal(1)
    assert neighbours.min() > 0.1
    far = (C_NOISE[:, None] - C_NOISE[None, :]).abs() > 0.5
    assert distance[far].min() > 1.0


def test_the_embedding_takes_the_dtype_of_its_weights_but_its_angles_are_float32():
    embedding, features = NoiseEmbedding(8), []
    embedding.linear_1.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    embedding(C_NOISE)
    assert embedding.to(torch.bfloat16)(C_NOISE).dtype == torch.bfloat16
    exact, rounded = features
    assert rounded.dtype == torch.bfloat16
    # Angles reach 100 radians: in bfloat16 the fastest would be a quarter of a radian off, here it is rounding alone.
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-8, atol=1e-6)


def test_modulation_gives_shift_scale_and_gate_twice():
    modulation = Modulation(3, WIDTH)
    embedded = torch.randn(2, 5, 3)
    parts = modulation(embedded)
    assert len(parts) == 6 and all(part.shape == (2, 5, WIDTH) for part in parts)
    whole = embedded @ modulation.weight.T + modulation.bias
    torch.testing.assert_close(torch.cat(parts, dim=-1), whole)


def test_modulation_is_zero_at_the_start_of_a_model_and_takes_part_afterwards():
    model = blocked_lm("llama", readout="exact", perturbation=0.0)
    modulations = [m for m in model.modules() if isinstance(m, Modulation)]
    assert len(modulations) == 6
    assert all(not m.weight.any() and not m.bias.any() for m in modulations)
    assert all(part.eq(0).all() for part in modulations[0](torch.randn(2, model.config.noise_embedding_dim)))
    hidden, z = model.embed_tokens(tokens()), torch.randn(2, 12, WIDTH)

    def noisy() -> torch.Tensor:
        return model.two_streams(hidden, z, torch.ones(2, 12), 0, position_ids=torch.arange(12)[None])[1]

    before = noisy()
    for part in range(6):  # shift, scale and gate of attention, then of the MLP: each acts
        with torch.no_grad():
            modulations[0].bias.view(6, WIDTH)[part] = 0.5 * torch.randn(WIDTH)
        assert not torch.allclose(noisy(), before, atol=1e-4)
        with torch.no_grad():
            modulations[0].bias.zero_()
    assert torch.equal(noisy(), before)


def test_embedded_levels_cover_the_range_that_training_draws_from():
    sigma = LogNormalNoise().sample(1000, 0.002, 80.0, generator=torch.Generator().manual_seed(0)).float()
    c_noise = EDMPreconditioning()(sigma).c_noise
    assert C_NOISE.min() <= c_noise.min() + 1e-3 and c_noise.max() <= C_NOISE.max() + 2e-3
