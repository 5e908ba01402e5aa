"""The chunked cross-entropy of a linear head against torch's own, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_diffusionblocks.losses import linear_cross_entropy, linear_logits

VOCAB, WIDTH = 11, 5


def pairs(number: int, rows: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Features and weights that ask for gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return [(draw(rows, WIDTH), draw(VOCAB, WIDTH)) for _ in range(number)]


def gradients(given: list[tuple[Tensor, Tensor]], loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [tensor for pair in given for tensor in pair]))


def labels(rows: int) -> Tensor:
    values = torch.randint(VOCAB, (rows,), generator=torch.Generator().manual_seed(1))
    values[::3] = -100
    return values


@pytest.mark.parametrize("chunk_elements", [1, VOCAB, 3 * VOCAB, 4 * VOCAB + 1, 1 << 24])
@pytest.mark.parametrize("number", [1, 2])
def test_it_is_torchs_cross_entropy_in_value_and_gradient(number, chunk_elements):
    given, classes = pairs(number, 10), labels(10)
    weights = torch.arange(1.0, 7.0)  # a factor per token shows a wrong order
    mine = linear_cross_entropy(given, classes, chunk_elements=chunk_elements)
    logits = sum(x @ weight.T for x, weight in given)
    theirs = F.cross_entropy(logits, classes, reduction="none")[classes != -100]
    assert mine.dtype == torch.float32 and mine.shape == (6,)
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients(given, (weights * mine).sum()), gradients(given, (weights * theirs).sum()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_chunks_change_nothing():
    given, classes = pairs(2, 20, torch.float32), labels(20)
    whole = linear_cross_entropy(given, classes)
    expected = gradients(given, whole.sum())
    for rows in (1, 4, 7, 13):
        chunked = linear_cross_entropy(given, classes, chunk_elements=rows * VOCAB)
        torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)
        for a, b in zip(gradients(given, chunked.sum()), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_chunk_holds_more_logits_than_allowed(monkeypatch):
    sizes, original = [], F.cross_entropy

    def watched(logits: Tensor, *args, **kwargs) -> Tensor:
        sizes.append(logits.numel())
        return original(logits, *args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", watched)
    given, classes = pairs(1, 20), labels(20)
    linear_cross_entropy(given, classes, chunk_elements=5 * VOCAB).sum().backward()
    kept = int((classes != -100).sum())
    # Each chunk's logits are computed again in the backward pass, and no token is computed more often than that.
    assert max(sizes) == 5 * VOCAB and sum(sizes) == 2 * kept * VOCAB


def test_ignored_tokens_are_left_out_whatever_their_features_are():
    given, classes = pairs(2, 10), labels(10)
    with torch.no_grad():
        for x, _ in given:
            x[classes == -100] = float("nan")
    losses = linear_cross_entropy(given, classes)
    assert losses.isfinite().all()
    found = gradients(given, losses.sum())
    assert all(g.isfinite().all() for g in found)
    for x_gradient in found[::2]:
        assert (x_gradient[classes == -100] == 0).all() and (x_gradient[classes != -100] != 0).any(dim=1).all()


def test_another_ignore_index_and_nothing_but_ignored_tokens():
    given = pairs(1, 4)
    classes = torch.tensor([3, 7, 3, 1])
    kept = linear_cross_entropy(given, classes, ignore_index=3)
    torch.testing.assert_close(kept, linear_cross_entropy(given, classes)[[1, 3]])
    assert linear_cross_entropy(given, torch.full((4,), -100)).shape == (0,)


def test_several_pairs_are_summed_in_float32():
    given = pairs(2, 6, torch.bfloat16)
    (x, w), (z, e) = given
    logits = linear_logits(given)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, F.linear(x, w).float() + F.linear(z, e).float())
    assert linear_logits(given[:1]).dtype == torch.bfloat16
    # A float32 product next to a bfloat16 one keeps its precision: the known term of the exact readout is large.
    mixed = [(x, w), (1e4 * z.float(), e.float())]
    torch.testing.assert_close(linear_logits(mixed) - F.linear(x, w).float(), 1e4 * z.float() @ e.float().T)


def test_features_are_multiplied_in_their_weights_dtype():
    (x, weight), *_ = pairs(1, 6, torch.float32)
    half = weight.to(torch.bfloat16)
    assert torch.equal(linear_logits([(x, half)]), F.linear(x.to(torch.bfloat16), half))
    losses = linear_cross_entropy([(x, half)], torch.zeros(6, dtype=torch.int64))
    assert losses.dtype == torch.float32
