"""The likelihood bound against exact answers: a Markov source of known entropy, random logits, models' own paths."""

import json
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from hf_diffusionblocks.families.causal_lm import BlockedForCausalLM
from hf_diffusionblocks.likelihood import (
    SAMPLINGS,
    denoising_bound,
    equal_information_partition,
    information_profile,
    language_model_likelihood,
    likelihood_bound,
)
from hf_diffusionblocks.likelihood.bound import NoiseSampling
from hf_diffusionblocks.likelihood.rows import posterior_errors
from hf_diffusionblocks.objectives.next_token import IGNORED, next_tokens
from tiny import as_users_run
from tiny_text import VOCAB_SIZE, base_config, base_lm, blocked_lm, left_padding, packed_positions, tokens

EDGES = [80.0, 0.8, 0.4, 0.002]


# -- a Markov source ---------------------------------------------------------------------------------------------


class Markov:
    """A source of ``classes`` symbols in which each depends on the one before."""

    def __init__(self, classes: int = 6, width: int = 8, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.transition = (2 * torch.randn(classes, classes, generator=generator, dtype=torch.float64)).softmax(-1)
        values, vectors = torch.linalg.eig(self.transition.T)
        self.stationary = vectors[:, values.real.argmax()].real
        self.stationary = self.stationary / self.stationary.sum()
        self.entropy = float(-(self.stationary[:, None] * self.transition * self.transition.log()).sum())
        self.table = torch.nn.functional.normalize(torch.randn(classes, width, generator=generator), dim=-1)

    def sample(self, rows: int, length: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        symbols = [torch.multinomial(self.stationary.expand(rows, -1), 1, generator=generator)]
        for _ in range(length - 1):
            symbols.append(torch.multinomial(self.transition[symbols[-1][:, 0]], 1, generator=generator))
        return torch.cat(symbols, dim=1)

    def cross_entropy(self, symbols: Tensor, transition: Tensor | None = None) -> float:
        transition = self.transition if transition is None else transition
        return float(-transition[symbols[:, :-1], symbols[:, 1:]].log().mean())

    def posterior(self, symbols: Tensor, transition: Tensor | None = None):
        """The denoiser of the symbols after the first: p(k | past) N(z; e_k, sigma^2 I), normalised."""
        prior = (self.transition if transition is None else transition)[symbols[:, :-1]].log()
        return lambda z, sigma: (prior + (z @ self.table.T / sigma[..., None] ** 2).double()).log_softmax(-1)


SOURCE = Markov()


@pytest.fixture(scope="module")
def symbols() -> Tensor:
    return SOURCE.sample(200, 41)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_with_the_true_posterior_the_bound_is_the_entropy(symbols, sampling):
    bound = denoising_bound(
        SOURCE.posterior(symbols), symbols[:, 1:], SOURCE.table, EDGES, num_draws=16, sampling=sampling
    )
    # Against the information of these very symbols only the noise is left; against the source's entropy, the draw of
    # symbols as well.
    assert abs(bound.nats_per_token - SOURCE.cross_entropy(symbols)) < 4 * bound.monte_carlo_error
    assert bound.monte_carlo_error < 0.02
    assert abs(bound.nats_per_token - SOURCE.entropy) < 4 * bound.standard_error
    assert bound.standard_error < 0.03
    assert 0.5 < SOURCE.entropy < math.log(6)
    assert bound.cross_entropy_at_sigma_max == pytest.approx(SOURCE.cross_entropy(symbols), abs=0.005)
    assert bound.num_tokens == 200 * 40 and bound.num_draws == 16


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_errors_are_as_large_as_they_say(sampling):
    noise, both = [], []
    for seed in range(60):
        symbols = SOURCE.sample(80, 9, seed)
        bound = denoising_bound(
            SOURCE.posterior(symbols), symbols[:, 1:], SOURCE.table, EDGES, num_draws=3, sampling=sampling, seed=seed
        )
        noise.append((bound.nats_per_token - SOURCE.cross_entropy(symbols)) / bound.monte_carlo_error)
        both.append((bound.nats_per_token - SOURCE.entropy) / bound.standard_error)
    for scores in (torch.tensor(noise), torch.tensor(both)):  # standard normal, to within the error of 60 of them
        assert 0.75 < float(scores.square().mean().sqrt()) < 1.25
        assert abs(float(scores.mean())) < 4 / 60**0.5


def test_a_wrong_denoiser_pays_its_divergence(symbols):
    # One wrong distribution at every noise level: its cross-entropy, by the same identity.
    wrong = SOURCE.transition.roll(1, 0) * 0.5 + 0.5 / 6
    bound = denoising_bound(SOURCE.posterior(symbols, wrong), symbols[:, 1:], SOURCE.table, EDGES, num_draws=16)
    expected = SOURCE.cross_entropy(symbols, wrong)
    assert abs(bound.nats_per_token - expected) < 4 * bound.monte_carlo_error < 0.1
    assert expected > SOURCE.entropy + 0.3


def test_a_denoiser_that_is_wrong_in_one_range_only_pays_there(symbols):
    true, wrong = SOURCE.posterior(symbols), SOURCE.posterior(symbols, SOURCE.transition.roll(1, 0))

    def mixed(z: Tensor, sigma: Tensor) -> Tensor:
        inside = (sigma < EDGES[1]) & (sigma > EDGES[2])
        return torch.where(inside[..., None], wrong(z, sigma), true(z, sigma))

    good, bad = (
        denoising_bound(denoiser, symbols[:, 1:], SOURCE.table, EDGES, num_draws=8) for denoiser in (true, mixed)
    )
    assert good.nats_per_block[0] == bad.nats_per_block[0] and good.nats_per_block[2] == bad.nats_per_block[2]
    assert bad.nats_per_block[1] > good.nats_per_block[1] + 0.05
    assert bad.nats_per_token > SOURCE.entropy + 4 * bad.monte_carlo_error


def test_blocks_share_the_total_and_each_share_is_a_difference_of_cross_entropies(symbols):
    posterior, y = SOURCE.posterior(symbols), symbols[:, 1:]
    bound = denoising_bound(posterior, y, SOURCE.table, EDGES, num_draws=16)
    assert_close(sum(bound.nats_per_block), bound.nats_per_token, rtol=1e-12, atol=0)
    at_edges = [SOURCE.cross_entropy(symbols)]
    for sigma in EDGES[1:]:
        draws = []
        for _ in range(16):
            z = SOURCE.table[y] + sigma * torch.randn(*y.shape, SOURCE.table.shape[1])
            draws.append(-posterior(z, torch.full(y.shape, sigma)).gather(-1, y[..., None]).mean())
        at_edges.append(float(torch.stack(draws).mean()))
    for b, (share, error) in enumerate(zip(bound.nats_per_block, bound.monte_carlo_error_per_block, strict=True)):
        difference = at_edges[b] - at_edges[b + 1] + (at_edges[-1] if b == 2 else 0)
        assert share == pytest.approx(difference, abs=4 * error + 0.02) and share > 0.01


def test_another_split_leaves_the_total(symbols):
    posterior, y = SOURCE.posterior(symbols), symbols[:, 1:]
    one, many = (
        denoising_bound(posterior, y, SOURCE.table, edges, num_draws=16)
        for edges in ([80.0, 0.002], [80.0, 1.0, 0.5, 0.3, 0.1, 0.002])
    )
    assert len(one.nats_per_block) == 1 and len(many.nats_per_block) == 5
    difference = abs(one.nats_per_token - many.nats_per_token)
    assert difference < 4 * math.hypot(one.monte_carlo_error, many.monte_carlo_error)


@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
def test_random_logits_over_76_classes_cost_their_own_cross_entropy(scale):
    """One f at every noise level: the bound is no bound."""
    f = scale * torch.randn(40, 32, 76)
    table = torch.nn.functional.normalize(torch.randn(76, 48), dim=-1)
    y = torch.randint(76, (40, 32))
    exact = float(torch.nn.functional.cross_entropy(f.flatten(0, 1), y.flatten()))
    bound = denoising_bound(
        lambda z, sigma: (f + z @ table.T / sigma[..., None] ** 2).log_softmax(-1), y, table, EDGES, num_draws=8
    )
    assert abs(bound.nats_per_token - exact) < 4 * bound.monte_carlo_error < 0.1 * exact


def test_a_denoiser_that_knows_the_answer_pays_the_prior_only():
    table = torch.nn.functional.normalize(torch.randn(5, 4), dim=-1) * 2
    y = torch.randint(5, (3, 7))
    known = torch.nn.functional.one_hot(y, 5).double().clamp_min(1e-30).log()
    bound = denoising_bound(lambda z, sigma: known, y, table, [10.0, 1.0, 0.01])
    assert bound.prior_nats == pytest.approx(4 / (2 * 100), rel=1e-6)
    assert bound.nats_per_block == pytest.approx((0.02, 0.0), abs=1e-6)
    assert bound.cross_entropy_at_sigma_min == pytest.approx(0, abs=1e-12)


def test_what_the_last_draw_costs_counts_to_the_last_block():
    table, y = torch.eye(4), torch.randint(4, (50, 20))

    def never_sure(z: Tensor, sigma: Tensor) -> Tensor:
        return torch.full((*y.shape, 4), -math.log(4), dtype=torch.float64)

    bound = denoising_bound(never_sure, y, table, [10.0, 1.0, 0.5], num_draws=100)
    error = 3 / 4  # ||e_y - (1, 1, 1, 1) / 4||^2
    high, low = error * (1 - 0.01) / 2 + 1 / 200, error * (4 - 1) / 2 + math.log(4)
    assert bound.nats_per_block[0] == pytest.approx(high, abs=5 * bound.monte_carlo_error_per_block[0])
    assert bound.nats_per_block[1] == pytest.approx(low, abs=5 * bound.monte_carlo_error_per_block[1])
    assert bound.cross_entropy_at_sigma_min == bound.cross_entropy_at_sigma_max == pytest.approx(math.log(4))
    assert bound.monte_carlo_error < 0.005


# -- noise levels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("low, high", [(0.002, 80.0), (0.5, 80.0), (0.002, 0.1), (0.3, 0.31)])
def test_weights_make_the_integral(sampling, low, high):
    sigma, weight = NoiseSampling(low, high, sampling)(40, 512, torch.Generator().manual_seed(0))
    assert low * (1 - 1e-9) <= float(sigma.min()) and float(sigma.max()) <= high * (1 + 1e-9)
    for power in (2, 3):  # int sigma^-3 sigma^power dsigma
        exact = math.log(high / low) / 1 if power == 2 else high - low
        estimate = weight * sigma**power
        error = float(estimate.mean(1).std() / 40**0.5)
        assert float(estimate.mean()) == pytest.approx(exact, abs=5 * error + 1e-9 * exact)
        assert error < 0.02 * exact


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_each_row_has_one_level_in_each_part_of_equal_mass(sampling):
    draw = NoiseSampling(0.1, 10.0, sampling)
    sigma, _ = draw(5, 16, None)
    position = torch.searchsorted(draw.log_sigma, sigma.log()).clamp(1, 512) - 1
    inside = (sigma.log() - draw.log_sigma[position]) / draw.width
    u = draw.ends[position] + inside * (draw.ends[position + 1] - draw.ends[position])
    assert (u * 16 + 1e-9).long().sort(-1).values.tolist() == [list(range(16))] * 5
    assert not torch.equal(sigma[0].argsort(), sigma[1].argsort())  # in an order of its own


# -- blocked language models -------------------------------------------------------------------------------------


class Rows:
    """A data set of one batch."""

    characters_per_token = 2.5

    def __init__(self, **batch: Tensor):
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, indices: list[int]) -> dict[str, Tensor]:
        return {name: value[indices] for name, value in self.batch.items()}


def rows(kind: str = "plain", batch: int = 6, length: int = 12) -> Rows:
    extra = {
        "plain": {},
        "packed": {"position_ids": packed_positions(length, 5, batch=batch)},
        "padded": left_padding(length, *(i % 4 for i in range(batch))),
    }[kind]
    return Rows(input_ids=tokens(batch, length), **extra)


READOUTS = [(r, c) for r in ("clean", "exact", "edm") for c in ("cascade", "independent")]


@pytest.mark.parametrize("readout, context", READOUTS)
@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
def test_the_bound_of_a_model_is_that_of_its_denoise(readout, context, kind):
    """Drawn anew with ``model.denoise``, which routes by sigma: one block, one draw, the same noise."""
    model, data = blocked_lm(readout=readout, context=context), rows(kind)
    bound = likelihood_bound(model, data, denoiser="blocks", estimator="integral", num_draws=2, batch_size=6, seed=3)
    generator, table = torch.Generator().manual_seed(3), model.target_table().detach()
    labels = next_tokens(data.batch)
    kept = labels != IGNORED
    y = table[labels.clamp_min(0)] * kept[..., None]
    shares = []
    for block in range(3):
        low, high = model.partition.range(block)
        draws = []
        for _ in range(2):
            sigma, weight = NoiseSampling(low, high)(*labels.shape, generator)
            z = y + sigma.float()[..., None] * torch.randn(y.shape, generator=generator)
            assert model.partition.block_of(sigma).unique().tolist() == [block]
            with torch.no_grad():
                denoised = model.denoise(z, sigma.float(), **data.batch)
            draws.append((weight * (y - denoised).square().sum(-1) * kept).sum() / kept.sum())
            if block == 2:
                torch.randn(y.shape, generator=generator)  # of the cross-entropy at sigma_min
        shares.append(float(torch.stack(draws).mean()))
    shares[0] += bound.prior_nats
    shares[2] += bound.cross_entropy_at_sigma_min
    assert_close(torch.tensor(bound.nats_per_block), torch.tensor(shares), rtol=1e-4, atol=1e-5)
    assert bound.prior_nats == pytest.approx(1 / (2 * 80**2), rel=1e-5)
    assert bound.num_tokens == int(kept.sum()) and bound.denoiser == "blocks" and not bound.exact


@pytest.mark.parametrize("readout, context", READOUTS)
def test_the_cross_entropy_at_sigma_max_is_that_of_the_models_own_logits(readout, context):
    model, data = blocked_lm(readout=readout, context=context), rows("padded")
    with torch.no_grad():
        logits = model(**data.batch).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), next_tokens(data.batch).flatten())
    bound = likelihood_bound(model, data, num_draws=1, batch_size=4)
    assert bound.cross_entropy_at_sigma_max == pytest.approx(float(expected), rel=1e-5)
    assert language_model_likelihood(model, data, batch_size=5).nats_per_token == pytest.approx(float(expected), 1e-5)


@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
def test_a_clean_cascades_bound_is_its_language_model(kind):
    model, data = blocked_lm(), rows(kind)
    exact = likelihood_bound(model, data, num_draws=60)
    drawn = likelihood_bound(model, data, num_draws=60, estimator="integral")
    assert exact.exact and exact.monte_carlo_error == pytest.approx(0, abs=1e-9) and exact.denoiser == "language_model"
    assert exact.nats_per_token == pytest.approx(language_model_likelihood(model, data).nats_per_token, rel=1e-9)
    assert not drawn.exact and 0 < drawn.monte_carlo_error < 0.1
    assert abs(exact.nats_per_token - drawn.nats_per_token) < 4 * drawn.monte_carlo_error
    for bound in (exact, drawn):
        assert_close(sum(bound.nats_per_block), bound.nats_per_token, rtol=1e-9, atol=0)
    for b in range(3):
        error = math.hypot(exact.monte_carlo_error_per_block[b], drawn.monte_carlo_error_per_block[b])
        assert abs(exact.nats_per_block[b] - drawn.nats_per_block[b]) < 4 * error + 3e-4


@pytest.mark.parametrize("context", ["cascade", "independent"])
def test_edges_and_integral_agree_where_each_block_has_an_f_of_its_own(context):
    model, data = blocked_lm(context=context, perturbation=0.3), rows()
    edges, integral = (
        likelihood_bound(model, data, denoiser="blocks", estimator=estimator, num_draws=60)
        for estimator in ("edges", "integral")
    )
    assert not edges.exact and 0 < edges.monte_carlo_error < integral.monte_carlo_error < 0.1
    assert abs(edges.nats_per_token - integral.nats_per_token) < 4 * integral.monte_carlo_error + 3e-4
    for b in range(3):
        error = math.hypot(edges.monte_carlo_error_per_block[b], integral.monte_carlo_error_per_block[b])
        assert abs(edges.nats_per_block[b] - integral.nats_per_block[b]) < 4 * error + 3e-4


def test_the_control_variate_leaves_nothing_to_draw_where_the_denoiser_is_the_reference():
    model, data = blocked_lm(), rows()
    controlled = likelihood_bound(model, data, estimator="controlled", num_draws=4)
    exact = language_model_likelihood(model, data).nats_per_token
    assert not controlled.exact and controlled.monte_carlo_error < 0.005  # z at sigma_max and sigma_min only
    assert controlled.nats_per_token == pytest.approx(exact, abs=4 * controlled.monte_carlo_error + 1.5 / 80**2)
    blocks, drawn = (
        likelihood_bound(model, data, denoiser="blocks", estimator=e, num_draws=16) for e in ("controlled", "integral")
    )
    assert blocks.monte_carlo_error < drawn.monte_carlo_error / 2
    assert abs(blocks.nats_per_token - drawn.nats_per_token) < 4 * drawn.monte_carlo_error


@pytest.mark.parametrize("readout, context", [("exact", "cascade"), ("exact", "independent"), ("edm", "independent")])
def test_the_control_variate_does_not_change_the_figure(readout, context):
    model, data = blocked_lm(readout=readout, context=context), rows()
    if readout == "edm":  # near certain at low noise, where random weights would cost hundreds of nats
        with torch.no_grad():
            for block in range(3):
                model.block(block).logit_scale.fill_(4.0)
    plain, controlled = (
        likelihood_bound(model, data, estimator=e, num_draws=16, seed=seed)
        for seed, e in enumerate(("integral", "controlled"))
    )
    assert plain.denoiser == controlled.denoiser == "blocks"
    pairs = [(plain.nats_per_token, plain.monte_carlo_error, controlled.nats_per_token, controlled.monte_carlo_error)]
    pairs += zip(
        plain.nats_per_block,
        plain.monte_carlo_error_per_block,
        controlled.nats_per_block,
        controlled.monte_carlo_error_per_block,
        strict=True,
    )
    for one, its_error, other, other_error in pairs:
        assert abs(one - other) < 4 * math.hypot(its_error, other_error)
    assert plain.monte_carlo_error < 0.15 * plain.nats_per_token
    assert likelihood_bound(model, data, num_draws=1).estimator == "controlled"


def test_a_single_clean_block_is_exact_too():
    model, data = blocked_lm(num_blocks=1, context="independent"), rows()
    bound = likelihood_bound(model, data)
    assert bound.exact and len(bound.nats_per_block) == 1
    assert bound.nats_per_block[0] == pytest.approx(language_model_likelihood(model, data).nats_per_token, rel=1e-9)


@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
def test_a_converted_model_and_its_base_have_the_same_likelihood(kind):
    base, data = base_lm(), rows(kind)
    model = BlockedForCausalLM.from_base(base, 3).eval()
    ordinary, blocked = language_model_likelihood(base, data, batch_size=4), likelihood_bound(model, data, batch_size=4)
    assert blocked.nats_per_token == pytest.approx(ordinary.nats_per_token, rel=1e-6)
    assert blocked.standard_error == pytest.approx(ordinary.standard_error, rel=1e-6)
    assert blocked.num_tokens == ordinary.num_tokens == int((next_tokens(data.batch) != IGNORED).sum())


def test_batches_do_not_change_the_figure_and_rows_can_be_left_out():
    model, data = blocked_lm(), rows()
    whole = language_model_likelihood(model, data)
    assert language_model_likelihood(model, data, batch_size=1).nats_per_token == pytest.approx(whole.nats_per_token)
    first = language_model_likelihood(model, data, max_rows=2)
    assert first.num_tokens == 22
    assert first.nats_per_token == pytest.approx(
        language_model_likelihood(model, rows(batch=6), max_rows=2).nats_per_token
    )
    assert first.nats_per_token != whole.nats_per_token
    assert math.isnan(language_model_likelihood(model, data, max_rows=1).standard_error)
    assert likelihood_bound(model, data, batch_size=2, num_draws=1).nats_per_token == pytest.approx(
        whole.nats_per_token
    )


def test_units():
    model, data = blocked_lm(), rows()
    bound = likelihood_bound(model, data)
    assert bound.bits_per_token == pytest.approx(bound.nats_per_token / math.log(2))
    assert bound.bits_per_character == pytest.approx(bound.nats_per_token / math.log(2) / 2.5)
    assert bound.perplexity == pytest.approx(math.exp(bound.nats_per_token))
    assert sum(bound.bits_per_character_per_block) == pytest.approx(bound.bits_per_character)
    other = likelihood_bound(model, data, characters_per_token=5)
    assert other.bits_per_character == pytest.approx(bound.bits_per_character / 2)
    table = json.loads(json.dumps(bound.to_dict()))
    assert table["bits_per_character"] == bound.bits_per_character and table["exact"] is True
    assert table["nats_per_block"] == list(bound.nats_per_block)
    unknown = denoising_bound(SOURCE.posterior(s := SOURCE.sample(2, 3)), s[:, 1:], SOURCE.table, EDGES, num_draws=1)
    assert unknown.bits_per_character is unknown.bits_per_character_per_block is None
    assert math.isnan(unknown.monte_carlo_error)


def test_the_seed_fixes_the_draws_and_the_mode_is_put_back():
    model, data = blocked_lm(readout="exact", context="independent").train(), rows()
    first, again = (likelihood_bound(model, data, num_draws=1, seed=5) for _ in range(2))
    assert first.nats_per_token == again.nats_per_token and model.training
    assert likelihood_bound(model, data, num_draws=1, seed=6).nats_per_token != first.nats_per_token


class _LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_the_posterior_mean_never_holds_all_logits():
    x, head, z = torch.randn(50, 8), torch.randn(300, 8), torch.randn(50, 8)
    table = torch.nn.functional.normalize(torch.randn(300, 8), dim=-1)
    labels, pairs = torch.randint(300, (50,)), [(x, head), (z, table)]
    p = (x @ head.T + z @ table.T).softmax(-1)
    with _LargestTensor() as largest:
        squared, losses = posterior_errors(pairs, labels, table, chunk_elements=1000)
    assert_close(squared, (table[labels] - p @ table).square().sum(-1))
    assert_close(losses, -p[torch.arange(50), labels].log())
    assert largest.elements <= max(1000, 300 * 8) < 50 * 300
    with _LargestTensor() as largest:  # the probe sees what it should
        posterior_errors(pairs, labels, table)
    assert largest.elements == 50 * 300


# -- equal information -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pilot() -> tuple[BlockedForCausalLM, Rows]:
    """A clean model of three blocks that was trained on a Markov source for a moment."""
    torch.manual_seed(0)
    data = Rows(input_ids=Markov(VOCAB_SIZE, seed=1).sample(64, 16))
    model = BlockedForCausalLM.from_base(base_config(num_layers=3), 3, auxiliary_layers=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(**data.batch, labels=data.batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.config.trained_blocks = [0, 1, 2]
    return model.eval(), data


def test_a_profiles_bins_sum_to_the_bound(pilot):
    model, data = pilot
    profile = information_profile(model, data, num_draws=4, num_bins=32)
    bound = likelihood_bound(model, data, num_draws=4, estimator="integral")
    assert len(profile.nats) == 32 and (profile.edges[0], profile.edges[-1]) == (80.0, 0.002)
    assert profile.total == pytest.approx(bound.nats_per_token, abs=1e-9)  # the same draws
    for b, share in enumerate(bound.nats_per_block):
        low, high = model.partition.range(b)
        assert profile.above(low) - profile.above(high) == pytest.approx(share, abs=0.1 * bound.nats_per_token)


def test_each_block_of_the_partition_gets_the_same_information(pilot):
    model, data = pilot
    partition = equal_information_partition(model, data, num_draws=12)
    assert partition.layers_per_block == (1, 1, 1) and partition.noise == model.partition.noise
    settings = {"edges": list(partition.edges), "partition": "equal_information", "auxiliary_layers": 0}
    moved = BlockedForCausalLM.from_base(base_config(num_layers=3), 3, **settings)
    moved.load_state_dict(model.state_dict())
    assert moved.partition == partition and moved.config.partition == "equal_information"
    before, after = (likelihood_bound(m.eval(), data, num_draws=24) for m in (model, moved))
    assert after.nats_per_token == pytest.approx(before.nats_per_token, rel=1e-6)
    third = after.nats_per_token / 3
    assert max(abs(share - third) for share in after.nats_per_block) < 0.05 * third
    assert max(abs(share - third) for share in before.nats_per_block) > 0.2 * third


def test_another_number_of_blocks_layers_and_overlap(pilot):
    model, data = pilot
    partition = equal_information_partition(model, data, 2, layers_per_block=[1, 2], overlap=0.1, max_rows=8)
    assert partition.num_blocks == 2 and partition.layers_per_block == (1, 2) and partition.overlap == 0.1


@pytest.mark.parametrize("readout, context", [("exact", "independent"), ("edm", "cascade")])
def test_profiles_of_two_streams(readout, context):
    # Random weights, under which an even guess among so many tokens would be worse.
    model = blocked_lm(readout=readout, context=context, trained_blocks=[0, 1, 2])
    model.config.base_config["vocab_size"] = 10**6
    profile = information_profile(model, rows(), num_draws=2, num_bins=16)
    bound = likelihood_bound(model, rows(), num_draws=2, estimator="integral")
    assert profile.total == pytest.approx(bound.nats_per_token, rel=1e-6)  # the same draws


def test_a_model_that_was_not_trained_is_refused():
    data, message = rows(), r"have not been trained \(config.trained_blocks="
    for settings in ({}, {"readout": "exact", "context": "independent"}, {"context": "independent"}):
        model = BlockedForCausalLM.from_base(base_config(), 3, **settings)
        for measure in (information_profile, equal_information_partition):
            with pytest.raises(ValueError, match=r"blocks \[0, 1, 2\] " + message):
                measure(model, data)
    # pretrained layers under new noise conditioning, or cut off from those below, are not a trained denoiser
    for settings in ({"readout": "exact"}, {"context": "independent"}):
        with pytest.raises(ValueError, match=r"blocks \[0, 1, 2\] " + message):
            information_profile(BlockedForCausalLM.from_base(base_lm(), 3, **settings), data)
    with pytest.raises(ValueError, match=r"blocks \[1, 2\] " + message):
        information_profile(BlockedForCausalLM.from_base(base_config(), 3, trained_blocks=[0]), data)
    # and what the config says is not believed against the figures
    with pytest.raises(ValueError, match="an even guess among 40 tokens 3.689: it has learned nothing"):
        information_profile(BlockedForCausalLM.from_base(base_lm(), 3), data)


def test_a_pretrained_cascade_needs_no_pilot(pilot):
    model, data = pilot
    converted = BlockedForCausalLM.from_base(model.to_base(), 3)
    assert converted.config.pretrained and not converted.config.trained_blocks
    assert information_profile(converted, data, max_rows=8, num_draws=1).total > 0


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"denoiser": "block"}, "unknown denoiser 'block': did you mean 'blocks'"),
        ({"estimator": "integrl"}, "unknown estimator 'integrl': did you mean 'integral'"),
        ({"sampling": "uniform"}, "unknown sampling 'uniform'"),
        ({"num_draws": 0}, "num_draws=0 must be a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be"),
        ({"max_rows": 0}, "max_rows=0 must be"),
        ({"characters_per_token": 0}, "characters_per_token=0 must be positive"),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings, message):
    with as_users_run(), pytest.raises(ValueError, match=message):
        likelihood_bound(blocked_lm(), rows(), **settings)


def test_what_two_streams_cannot_have_is_refused():
    model = blocked_lm(readout="exact", context="independent")
    with pytest.raises(
        ValueError, match="denoiser='language_model' with readout='exact': f depends on the noise level"
    ):
        likelihood_bound(model, rows(), denoiser="language_model")
    with pytest.raises(ValueError, match="estimator='edges' with readout='exact'"):
        likelihood_bound(model, rows(), estimator="edges")


def test_models_and_rows_that_do_not_fit_are_refused():
    model = blocked_lm()
    with as_users_run(), pytest.raises(ValueError, match="LlamaForCausalLM has no denoising bound"):
        likelihood_bound(base_lm(), rows())
    for measure in (likelihood_bound, language_model_likelihood):
        with pytest.raises(ValueError, match="the data set has no rows"):
            measure(model, Rows(input_ids=tokens(0)))
        with pytest.raises(ValueError, match="a batch holds .'pixels'.; 'input_ids' are needed"):
            measure(model, type("Images", (), {"__len__": lambda s: 1, "__getitem__": lambda s, i: {"pixels": i}})())
        with pytest.raises(ValueError, match="no token is scored"):
            measure(model, Rows(input_ids=tokens(2, 4), labels=torch.full((2, 4), IGNORED)))
    with pytest.raises(ValueError, match="token 40 is not in the model's vocabulary, 0 to 39"):
        language_model_likelihood(base_lm(), Rows(input_ids=tokens() * 0 + 40))
    with pytest.raises(ValueError, match="40"):
        language_model_likelihood(model, Rows(input_ids=tokens() * 0 + 40))


@pytest.mark.parametrize("edges", [[80.0], [0.002, 80.0], [80.0, 1.0, 1.0], [80.0, 0.0], [math.inf, 1.0]])
def test_edges_that_do_not_descend_are_refused(edges):
    with pytest.raises(ValueError, match="strictly descending"):
        denoising_bound(lambda z, sigma: z, torch.zeros(1, 1, dtype=torch.long), torch.eye(2), edges)


def test_denoisers_and_classes_that_are_none_are_refused():
    y, table = torch.zeros(2, 3, dtype=torch.long), torch.eye(4)
    with pytest.raises(ValueError, match=r"the denoiser gave \[2, 3\]; expected log-probabilities \[2, 3, 4\]"):
        denoising_bound(lambda z, sigma: sigma, y, table, EDGES)
    with pytest.raises(ValueError, match="probabilities sum to 4 instead of 1"):
        denoising_bound(lambda z, sigma: torch.zeros(2, 3, 4), y, table, EDGES)
    with pytest.raises(ValueError, match="probabilities sum to nan"):
        denoising_bound(lambda z, sigma: torch.full((2, 3, 4), math.nan), y, table, EDGES)
    with pytest.raises(ValueError, match="y has classes from 0 to 4; table has rows 0 to 3"):
        denoising_bound(lambda z, sigma: z, torch.tensor([[0, 4]]), table, EDGES)
    with as_users_run(), pytest.raises(ValueError, match=r"y is torch.int64 \[3\]"):
        denoising_bound(lambda z, sigma: z, y[0], table, EDGES)
