"""The loss of masked diffusion and its bound: exact on a source whose entropy is known, and one number everywhere."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from hf_diffusionblocks.likelihood import masked_likelihood_bound
from hf_diffusionblocks.masking import MaskNoise
from hf_diffusionblocks.objectives import MaskedDiffusion, default_objective
from hf_diffusionblocks.objectives.masked import range_nats
from hf_diffusionblocks.partition import BlockPartition
from tiny import as_users_run
from tiny_masked import MASK, blocked_mlm
from tiny_text import TokenRows, blocked_lm

# A Markov chain over three tokens, rows of four: all 81 rows and their probabilities.
START = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
STEP = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)
ROWS = torch.tensor(list(itertools.product(range(3), repeat=4)))
PROBABILITY = START[ROWS[:, 0]] * STEP[ROWS[:, :-1], ROWS[:, 1:]].prod(-1)
ENTROPY = float(-(PROBABILITY * PROBABILITY.log()).sum())
PARTITION = BlockPartition.equal_probability(3, 3, MaskNoise())


def posterior_losses(ids: Tensor, hidden: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """``-log p(x_i | what is shown)`` of each hidden token under the chain, and its row: the true posterior."""
    shown = (ROWS[None] == ids[:, None]) | hidden[:, None]  # row, candidate, token
    weight = PROBABILITY * shown.all(-1)
    hit = (ROWS[None] == ids[:, None]) * weight[..., None]
    p = hit.sum(1) / weight.sum(1)[:, None]
    where = torch.arange(len(ids))[:, None].expand(ids.shape)
    return -p.log()[hidden], where[hidden]


def shares(ids: Tensor, losses, num_draws: int) -> Tensor:
    """Each block's nats of each row and draw, [rows, draws, blocks]."""
    generator = torch.Generator().manual_seed(0)
    everywhere = torch.ones(ids.shape, dtype=torch.bool)
    ranges = [PARTITION.range(b) for b in range(3)]
    return torch.stack([range_nats(losses, everywhere, *r, num_draws, generator) for r in ranges], -1)


def test_of_the_true_posterior_the_bound_is_the_likelihood_of_each_row():
    chosen = PROBABILITY.topk(10).indices
    nats = shares(ROWS[chosen], partial(posterior_losses, ROWS[chosen]), 700).sum(-1)
    exact = -PROBABILITY[chosen].log()
    error = nats.std(-1) / 700**0.5
    assert bool(((nats.mean(-1) - exact).abs() < 4 * error).all())
    assert float(error.max()) < 0.06


def test_averaged_over_the_source_the_bound_is_its_entropy():
    nats = shares(ROWS, partial(posterior_losses, ROWS), 200)
    assert float((PROBABILITY * nats.sum(-1).mean(-1)).sum()) == pytest.approx(ENTROPY, abs=0.02)
    by_block = (PROBABILITY[:, None] * nats.mean(1)).sum(0)
    assert by_block[0] > by_block[1] > by_block[2]  # what is told by neighbours costs less, the more are shown


def test_of_a_source_without_memory_every_draw_is_exact():
    def losses(hidden: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(hidden))[:, None].expand(hidden.shape)[hidden]
        return torch.full(rows.shape, math.log(5), dtype=torch.float64), rows

    nats = range_nats(losses, torch.ones(7, 11, dtype=torch.bool), 0.2, 0.5, 3)
    torch.testing.assert_close(nats, torch.full((7, 3), 11 * math.log(5) * 0.3, dtype=torch.float64))


def test_a_wrong_denoiser_costs_more():
    def worse(hidden: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
        nats, rows = posterior_losses(ROWS, hidden, rates)
        return -torch.log(0.7 * (-nats).exp() + 0.1), rows  # mixed with the uniform distribution

    nats = shares(ROWS, worse, 200).sum(-1).mean(-1)
    assert float((PROBABILITY * nats).sum()) > ENTROPY + 0.1


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_loss_of_a_block_is_its_share_of_the_bound_over_the_width_of_its_range(schedule):
    model, rows = blocked_mlm(schedule=schedule, overlap=0.0), TokenRows(num_rows=16)
    bound = masked_likelihood_bound(model, rows, num_draws=12)
    batch = rows[list(range(16))]
    for block in range(3):
        for objective in (MaskedDiffusion(), MaskedDiffusion(at_least_one=False)):
            generator = torch.Generator().manual_seed(block)
            with torch.no_grad():
                losses = torch.stack([objective(model, block, batch, generator).loss for _ in range(30)])
            error = float(losses.std()) / 30**0.5 + 3 * bound.monte_carlo_error_per_block[block]
            assert abs(float(losses.mean()) - 3 * bound.nats_per_block[block]) < 4 * error


def test_the_bound_sums_its_shares_and_the_objective_gives_the_same():
    model, rows = blocked_mlm(), TokenRows(num_rows=8)
    bound = masked_likelihood_bound(model, rows, num_draws=2, batch_size=8, characters_per_token=2.0)
    assert bound.nats_per_token == pytest.approx(sum(bound.nats_per_block))
    known = int((rows.columns["input_ids"] != MASK).sum())  # what the data hide cannot be scored
    assert bound.num_tokens == known < 8 * 12 and bound.edges == model.partition.edges
    assert bound.bits_per_character == pytest.approx(bound.nats_per_token / math.log(2) / 2)
    assert 0 < bound.monte_carlo_error < 2 * bound.standard_error
    held_out = MaskedDiffusion().held_out(model, rows, num_draws=2, batch_size=8)
    assert held_out.total == pytest.approx(bound.nats_per_token, rel=1e-5)
    assert held_out.standard_error == pytest.approx(bound.standard_error, rel=1e-5)


def test_padding_and_ignored_tokens_are_neither_hidden_nor_scored():
    model = blocked_mlm("bert")
    batch = TokenRows(num_rows=4)[[0, 1, 2, 3]]
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 8:] = 0
    losses = []
    for filler in (0, 5):  # what stands at padding changes nothing
        ids = batch["input_ids"].masked_fill(mask == 0, filler)
        result = MaskedDiffusion()(
            model, 0, {"input_ids": ids, "attention_mask": mask}, torch.Generator().manual_seed(0)
        )
        losses.append(result.loss)
        assert int(result.parts["hidden_tokens"]) <= 4 * 8
    torch.testing.assert_close(losses[0], losses[1])
    labels = batch["input_ids"].clone()
    labels[:] = -100
    with pytest.raises(ValueError, match="no token of the batch can be hidden"):
        MaskedDiffusion()(model, 0, batch | {"labels": labels})
    labels[0, 3] = 0  # one token of one row
    result = MaskedDiffusion()(model, 0, batch | {"labels": labels}, torch.Generator().manual_seed(0))
    assert int(result.parts["hidden_tokens"]) == 1 and result.per_sample[1:].tolist() == [0.0] * 3
    assert float(result.loss.detach()) == pytest.approx(float(result.per_sample[0]))


def test_the_mask_token_takes_no_probability():
    model, batch = blocked_mlm("bert-untied", 1), TokenRows(num_rows=4)[[0, 1, 2, 3]]
    seed = torch.Generator().manual_seed
    before = MaskedDiffusion()(model, 0, batch, seed(0)).loss
    with torch.no_grad():
        model.block(0).head_bias[MASK] += 50.0
    torch.testing.assert_close(MaskedDiffusion()(model, 0, batch, seed(0)).loss, before)


def test_each_family_has_its_objective():
    assert isinstance(default_objective(blocked_mlm().config), MaskedDiffusion)
    assert not isinstance(default_objective(blocked_lm().config), MaskedDiffusion)
    with pytest.raises(ValueError, match="distillation_weight=0.5 has no meaning for blocked_masked_lm"):
        default_objective(blocked_mlm().config, distillation_weight=0.5)
    with as_users_run(), pytest.raises(ValueError, match="hides no tokens"):
        masked_likelihood_bound(blocked_lm(), TokenRows())
