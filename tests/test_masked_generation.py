"""Text from masked language models: gaps only, one block per step, the model's own distribution."""

import itertools

import pytest
import torch

from hf_diffusionblocks import unmask
from hf_diffusionblocks.families.masked_lm import BlockedForMaskedLM
from hf_diffusionblocks.masked_generation import UnmaskingConfig
from hf_diffusionblocks.masking import CosineSchedule, LinearSchedule
from tiny import perturbed
from tiny_masked import MASK, base_config, blocked_mlm, hidden_rows


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def visits(model, monkeypatch) -> list[tuple[int, int, int]]:
    """(block, rows, hidden tokens) of each pass from now on."""
    seen, features = [], model.features

    def watched(ids, block, **places):
        seen.append((block, len(ids), int((ids == MASK).sum())))
        return features(ids, block, **places)

    monkeypatch.setattr(model, "features", watched)
    return seen


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_gaps_are_filled_and_the_rest_stays(order, schedule):
    model, ids = blocked_mlm(schedule=schedule), hidden_rows((0.2, 0.6, 1.0, 0.0))
    given = ids.clone()
    tokens = unmask(model, ids, steps=7, order=order, generator=seeded())
    assert torch.equal(ids, given) and not bool((tokens == MASK).any())
    shown = ids != MASK
    assert torch.equal(tokens[shown], ids[shown])
    assert torch.equal(tokens, unmask(model, ids, steps=7, order=order, generator=seeded()))
    assert not torch.equal(tokens, unmask(model, ids, steps=7, order=order, generator=seeded(1)))


def test_padding_stays_hidden_and_is_not_counted():
    model, ids = blocked_mlm(), hidden_rows((0.5, 0.5))
    mask = torch.ones_like(ids)
    mask[:, 14:] = 0
    ids[:, 14:] = MASK
    tokens = unmask(model, ids, steps=4, attention_mask=mask, generator=seeded())
    assert bool((tokens[:, 14:] == MASK).all()) and not bool((tokens[:, :14] == MASK).any())


def test_a_text_from_nothing_runs_one_block_per_step_noisiest_first(monkeypatch):
    model = blocked_mlm()
    seen = visits(model, monkeypatch)
    counts = []
    tokens = unmask(
        model,
        length=18,
        batch_size=2,
        steps=6,
        order="confidence",
        callback=lambda i, t: counts.append(int((t == MASK).sum())),
    )
    assert tokens.shape == (2, 18)
    assert [block for block, _, _ in seen] == [0, 0, 0, 1, 1, 2]  # mask rates 1, 5/6, 2/3, 1/2, 1/3, 1/6
    assert [hidden for _, _, hidden in seen] == [36, 30, 24, 18, 12, 6]
    assert counts == [30, 24, 18, 12, 6, 0]


def test_a_gap_is_read_by_the_block_of_its_own_share(monkeypatch):
    model = blocked_mlm()
    seen = visits(model, monkeypatch)
    unmask(model, hidden_rows((0.3,)), steps=5, generator=seeded())
    assert {block for block, _, _ in seen} == {2}
    seen.clear()
    unmask(model, hidden_rows((0.3, 0.9)), steps=1, generator=seeded())
    assert seen == [(0, 1, 18), (2, 1, 6)]


def test_confidence_shows_the_likeliest_first():
    model, ids = blocked_mlm(num_blocks=1), hidden_rows((0.5,))
    p = model.denoise(ids)[0].max(-1)
    steps = []
    unmask(model, ids, steps=10, order="confidence", temperature=0, callback=lambda i, t: steps.append(t.clone()))
    shown = (steps[0] != ids)[0].nonzero()[:, 0].tolist()
    hidden = (ids[0] == MASK).nonzero()[:, 0]
    assert shown == [int(hidden[p.values[hidden].argmax()])]
    assert int(steps[0][0, shown[0]]) == int(p.indices[shown[0]])


def test_no_temperature_and_a_narrow_nucleus_take_the_likeliest_token():
    model, ids = blocked_mlm(), hidden_rows((0.5, 0.5))
    greedy = unmask(model, ids, steps=1, temperature=0)
    assert torch.equal(greedy, model.denoise(ids).argmax(-1))
    assert torch.equal(greedy, unmask(model, ids, steps=1, top_p=1e-6))
    assert torch.equal(greedy, unmask(model, ids, steps=1, temperature=1e-3))
    assert torch.equal(greedy, unmask(model, ids, steps=1, top_k=1))


def test_top_k_draws_from_so_many_of_the_likeliest_tokens_and_from_all_of_them():
    model, ids = blocked_mlm(), hidden_rows((0.5,))
    likeliest = model.denoise(ids)[0].topk(3).indices
    drawn = [unmask(model, ids, steps=1, temperature=5.0, top_k=3, generator=seeded(i))[0] for i in range(60)]
    for place in (ids[0] == MASK).nonzero()[:, 0].tolist():
        assert {int(tokens[place]) for tokens in drawn} == set(likeliest[place].tolist())
    narrow = unmask(model, ids, steps=1, temperature=5.0, top_k=3, top_p=1e-6, generator=seeded())
    assert torch.equal(narrow, unmask(model, ids, steps=1, temperature=0))


@torch.no_grad()
def test_ancestral_sampling_draws_what_the_model_says():
    """Two tokens: with small steps one is drawn first, each as often, and the other given it."""
    base = base_config(vocab_size=6, num_layers=1)
    model = BlockedForMaskedLM.from_base(base, 1, mask_token_id=5)
    model = perturbed(model, 0.5, 3).eval()
    nothing = model.denoise(torch.tensor([[5, 5]]))[0]
    wanted = torch.zeros(6, 6)
    for a, b in itertools.product(range(5), repeat=2):
        after_a, after_b = (
            model.denoise(torch.tensor([[a, 5]]))[0, 1, b],
            model.denoise(torch.tensor([[5, b]]))[0, 0, a],
        )
        wanted[a, b] = (nothing[0, a] * after_a + nothing[1, b] * after_b) / 2
    torch.testing.assert_close(wanted.sum(), torch.tensor(1.0))
    together = nothing[0][:, None] * nothing[1]
    rows = 4000
    tokens = unmask(model, length=2, batch_size=rows, steps=100, generator=seeded())
    found = torch.zeros(36).index_add(0, tokens[:, 0] * 6 + tokens[:, 1], torch.ones(rows)).view(6, 6) / rows
    distance = float((found - wanted).abs().sum() / 2)
    assert distance < 0.04 < float((together - wanted).abs().sum() / 2)


def test_mask_rates_fall_from_one_to_nothing_by_the_schedule():
    rates = UnmaskingConfig(steps=4).rates(LinearSchedule())
    torch.testing.assert_close(rates, torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))
    rates = UnmaskingConfig(steps=2).rates(CosineSchedule())
    torch.testing.assert_close(rates, torch.tensor([1, 0.5**0.5, 0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"order": "left"}, "order 'left'"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": 0}, "top_k=0 must be a whole number of at least 1, or None"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_k": True}, "top_k=True"),
        ({"length": 65}, "64 positions"),
        ({"length": 0}, "length=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        unmask(blocked_mlm(), **settings)
