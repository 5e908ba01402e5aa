"""BAdam and LISA: which blocks train when, with which moments, and that the loss falls."""

from functools import partial
from itertools import islice

import pytest
import torch
from torch import nn

from hf_diffusionblocks.baselines.block_coordinate import BlockCoordinate, badam, lisa

adam = partial(torch.optim.Adam, lr=0.01)


def network(depth: int = 4) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(depth)))


def parameters(model: nn.Sequential) -> list[list[nn.Parameter]]:
    return [list(layer.parameters()) for layer in model]


def visited(method: BlockCoordinate, updates: int) -> list[tuple[int, ...]]:
    seen = []
    for update in range(updates):
        method.start(update)
        seen.append(method.active)
    return seen


def test_badam_goes_from_the_last_block_to_the_first_and_again():
    method = badam(parameters(network(3)), adam, switch=2)
    assert visited(method, 8) == [(2,), (2,), (1,), (1,), (0,), (0,), (2,), (2,)]
    assert visited(badam(parameters(network(3)), adam, 1, "ascending"), 4) == [(0,), (1,), (2,), (0,)]


def test_a_random_order_visits_every_block_once_a_round():
    seen = visited(badam(parameters(network(4)), adam, 1, "random", seed=1), 40)
    rounds = [seen[i : i + 4] for i in range(0, 40, 4)]
    assert all(sorted(r) == [(0,), (1,), (2,), (3,)] for r in rounds) and len({tuple(r) for r in rounds}) > 3
    assert seen == visited(badam(parameters(network(4)), adam, 1, "random", seed=1), 40)


def test_lisa_draws_every_layer_equally_often():
    method = lisa(parameters(network(5)), adam, switch=1, active=2)
    seen = [b for active in islice(method.visits, 1000) for b in active]
    counts = [seen.count(b) for b in range(5)]
    assert sum(counts) == 2000 and all(abs(c - 400) < 60 for c in counts)  # four standard deviations


def test_only_active_blocks_move_and_their_moments_are_new():
    model = network()
    method = badam(parameters(model), adam, switch=1)
    x = torch.randn(8, 3)
    for update in range(8):
        assert method.start(update)
        (active,) = method.active
        assert not method.optimizer.state
        before = [[p.clone() for p in block] for block in method.blocks]
        model(x).square().mean().backward()
        assert [p.grad is not None for block in method.blocks for p in block] == [
            b == active for b in range(4) for _ in "wb"
        ]
        method.step()
        for b, block in enumerate(method.blocks):
            moved = any(not torch.equal(p, q) for p, q in zip(before[b], block, strict=True))
            assert moved == (b == active)
            assert all(p.grad is None for p in block)


def test_what_always_trains_keeps_its_moments():
    model, head = network(), nn.Linear(3, 1)
    method = lisa(parameters(model), adam, switch=2, active=1, always=head.parameters())
    x = torch.randn(8, 3)
    for update in range(6):
        method.start(update)
        head(model(x)).square().mean().backward()
        method.step()
    assert {int(s["step"]) for s in method.lasting.state.values()} == {6}
    assert {int(s["step"]) for s in method.optimizer.state.values()} == {2}
    assert len(method.parameters) == 4
    method.set_learning_rate(0.5)
    assert all(group["lr"] == 0.5 for one in method.optimizers for group in one.param_groups)


def test_one_block_is_plain_adam():
    torch.manual_seed(1)
    first, second = network(2), network(2)
    second.load_state_dict(first.state_dict())
    method, plain = badam([list(first.parameters())], adam, switch=100), adam(second.parameters())
    x = torch.randn(8, 3)
    for update in range(5):
        method.start(update)
        first(x).square().mean().backward()
        method.step()
        plain.zero_grad()
        second(x).square().mean().backward()
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_bad_settings_are_named():
    blocks = parameters(network(2))
    for make, message in (
        (lambda: badam(blocks, adam, 0), "switch=0"),
        (lambda: badam(blocks, adam, 1, "down"), "order"),
        (lambda: badam([], adam, 1), "at least one"),
        (lambda: badam([blocks[0], []], adam, 1), "at least one"),
        (lambda: badam([blocks[0], blocks[0]], adam, 1), "two blocks"),
        (lambda: lisa(blocks, adam, 1, 3), "active=3"),
        (lambda: lisa(blocks, adam, 1, 1, always=blocks[0]), "two blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("make", [partial(badam, switch=2), partial(lisa, switch=2, active=1)])
def test_step_alone_does_what_start_and_step_do(make):
    ends = []
    for counted in (True, False):
        torch.manual_seed(0)
        model, x = network(3), torch.randn(8, 3)
        method = make(parameters(model), adam)
        before = [p.clone() for p in model.parameters()]
        for update in range(6):
            if counted:
                method.start(update)
            method.zero_grad()
            model(x).square().mean().backward()
            method.step()
        assert any(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
        assert all(p.grad is None for p in model.parameters())
        ends.append(list(model.parameters()))
    torch.testing.assert_close(*ends, rtol=0, atol=0)
