"""Two streams: who sees whom, proved by perturbation, and against the base's own layers.

Noisy target j stands for token j + 1. It sees the clean tokens 0 to j of its document and itself.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from hf_diffusionblocks.families import causal_lm_targets
from hf_diffusionblocks.families.causal_lm import BlockedForCausalLM
from hf_diffusionblocks.families.two_stream import TwoStreamMasks, document_numbers, make_masks
from hf_diffusionblocks.objectives.next_token import NextTokenPrediction
from tiny_text import (
    ARCHITECTURES,
    VOCAB_SIZE,
    WIDTH,
    WINDOW,
    blocked_lm,
    left_padding,
    packed_positions,
    tokens,
)

LENGTH = 12
START = 5  # where the second of two packed documents begins
PADDED = 3  # padding tokens before the first row
WINDOWED = [name for name in ARCHITECTURES if "window" in name]
LAYOUTS = {
    "plain": {},
    "packed": {"position_ids": packed_positions(LENGTH, START)},
    "padded": left_padding(LENGTH, PADDED, 0),
}

model_of = cache(blocked_lm)


def noisy(seed: int = 0, batch: int = 2, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Noisy targets and a noise level for each, in the middle of the range."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, length, WIDTH, generator=generator)
    return z, 0.5 + torch.rand(batch, length, generator=generator)


def places(layout: str) -> dict[str, Tensor]:
    """Positions, and a mask where there is padding, as `two_streams` takes them."""
    return {"position_ids": torch.arange(LENGTH)[None]} | LAYOUTS[layout]


def one_of(arrangement: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in arrangement.items()}


# -- the perturbation proof --------------------------------------------------------------------------------------


@torch.no_grad()
def changed_targets(run: Callable[[Tensor], Tensor], ids: Tensor, i: int) -> Tensor:
    """Which targets' outputs change in any bit when clean token i does, [batch, targets]."""
    other = ids.clone()
    other[:, i] = 3 + (ids[:, i] - 3 + 7) % (VOCAB_SIZE - 3)
    return (run(ids) != run(other)).any(dim=-1)


def leaks(run: Callable[[Tensor], Tensor], ids: Tensor, layout: str) -> list[tuple[int, int, int]]:
    """(row, clean token i, target j) where a target that must not see token i changes with it."""
    positions = places(layout)["position_ids"].expand(ids.shape)
    documents = (positions == 0).cumsum(1) if layout == "packed" else torch.zeros_like(positions)
    found = []
    for i in range(LENGTH):
        seen = changed_targets(run, ids, i)
        allowed = (torch.arange(LENGTH) >= i) & (documents == documents[:, i : i + 1])
        found += [(row, i, j) for row, j in (seen & ~allowed).nonzero().tolist()]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("context", ["independent", "cascade"])
@pytest.mark.parametrize("readout", ["clean", "exact", "edm"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_target_sees_its_own_token_or_later_ones(architecture, readout, context, layout):
    model = model_of(architecture, readout=readout, context=context)
    z, sigma = noisy()
    ids = tokens()
    for block in (0, 2):

        def run(ids: Tensor, block: int = block) -> Tensor:
            return model.denoise(z, sigma, block=block, input_ids=ids, **LAYOUTS[layout])

        assert leaks(run, ids, layout) == []
        # The control: the first targets that may see a token do change with it.
        for i in (0, 1, 6, 9):
            later = torch.zeros(2, LENGTH, dtype=torch.bool)
            later[:, i : i + 2] = True
            if layout == "padded":
                later[0] &= i >= PADDED
            assert changed_targets(run, ids, i)[later].all()


def leaky_masks(*args, **kwargs) -> TwoStreamMasks:
    """Masks that let every target see its own clean token as well."""
    masks = make_masks(*args, **kwargs)
    count = masks.noisy.shape[2]
    clean = masks.noisy[..., :count]
    masks.noisy = torch.cat([clean | torch.roll(clean, 1, dims=-1), masks.noisy[..., count:]], dim=-1)
    return masks


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("readout", ["clean", "exact", "edm"])
def test_the_probe_detects_a_leak(readout, layout, monkeypatch):
    model = model_of("llama", readout=readout, context="cascade")
    z, sigma = noisy()
    if readout == "clean":  # no masks of ours: read the features one position too late
        original = BlockedForCausalLM.clean_block
        monkeypatch.setattr(
            BlockedForCausalLM, "clean_block", lambda self, *a, **k: original(self, *a, **k).roll(-1, dims=1)
        )
    else:
        monkeypatch.setattr(causal_lm_targets, "make_masks", leaky_masks)
    found = leaks(lambda ids: model.denoise(z, sigma, block=0, input_ids=ids, **LAYOUTS[layout]), tokens(), layout)
    assert {(row, j + 1, j) for row in (0, 1) for j in range(PADDED, LENGTH - 1) if j != START - 1} <= set(found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_noisy_target_sees_no_other_and_the_clean_stream_sees_none(architecture, layout):
    model = model_of(architecture, readout="exact", context="independent")
    z, sigma = noisy()
    hidden = model.embed_tokens(tokens())
    clean, targets = model.two_streams(hidden, z, sigma, 1, **places(layout))
    for j in (0, 4, LENGTH - 1):
        for what in ("z", "sigma"):
            other_z, other_sigma = z.clone(), sigma.clone()
            (other_z if what == "z" else other_sigma)[:, j] += 0.5
            other_clean, other = model.two_streams(hidden, other_z, other_sigma, 1, **places(layout))
            changed = (other != targets).any(dim=-1)
            assert changed.nonzero()[:, 1].tolist() == [j, j]
            assert torch.equal(other_clean, clean)


# -- against the base's own layers -------------------------------------------------------------------------------


@torch.no_grad()
def one_by_one(model: BlockedForCausalLM, ids: Tensor, z: Tensor, sigma: Tensor, block: int) -> Tensor:
    """Each target on its own, after the clean tokens before it, through transformers' forward pass."""
    module = model.block(block)
    noisy_in, _ = model._noisy_input(module, z, sigma, model.dtype)
    hidden = model.context_of(block, ids)
    result = []
    for j in range(ids.shape[1]):
        sequence = torch.cat([hidden[:, : j + 1], noisy_in[:, j : j + 1]], dim=1)
        result.append(module.norm(model.clean_block(sequence, block)[:, -1]))
    return torch.stack(result, dim=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_target_is_the_next_token_of_its_own_sequence(architecture, attention):
    """Positions, windows, norms, biases: all as if the target stood behind the tokens that it sees."""
    model = model_of(architecture, readout="exact", context="cascade", perturbation=0.0, attention=attention)
    ids, (z, sigma) = tokens(), noisy()
    for block in range(3):
        hidden = model.context_of(block, ids)
        found = model.two_streams(hidden, z, sigma, block, **places("plain"))[1]
        torch.testing.assert_close(found, one_by_one(model, ids, z, sigma, block), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_documents_in_one_row_are_as_each_alone(architecture):
    model = model_of(architecture, readout="exact", context="cascade")
    ids, (z, sigma) = tokens(), noisy()
    together = model.denoise(z, sigma, block=2, input_ids=ids, **LAYOUTS["packed"])
    for part in (slice(0, START), slice(START, LENGTH)):
        alone = model.denoise(z[:, part], sigma[:, part], block=2, input_ids=ids[:, part])
        torch.testing.assert_close(together[:, part], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("readout", ["clean", "exact", "edm"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_padded_row_is_as_the_row_without_its_padding(architecture, readout):
    model = model_of(architecture, readout=readout, context="cascade")
    ids, (z, sigma) = tokens(), noisy()
    padded = model.denoise(z, sigma, block=2, input_ids=ids, **LAYOUTS["padded"])
    assert padded.isfinite().all()
    alone = model.denoise(z[:1, PADDED:], sigma[:1, PADDED:], block=2, input_ids=ids[:1, PADDED:])
    torch.testing.assert_close(padded[:1, PADDED:], alone, rtol=1e-5, atol=1e-5)
    whole = model.denoise(z[1:], sigma[1:], block=2, input_ids=ids[1:])
    torch.testing.assert_close(padded[1:], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", WINDOWED)
def test_a_layers_window_counts_the_target_itself(architecture):
    layers = 4 if architecture == "qwen2-mixed-window" else 1  # its fourth layer has a window
    model = model_of(architecture, layers, num_layers=layers, readout="exact", context="independent")
    z, sigma = noisy()

    def run(ids: Tensor) -> Tensor:
        hidden = model.embed_tokens(ids)
        return model.two_streams(hidden, z, sigma, layers - 1, **places("plain"))[1]

    for i in (0, 3, 7):  # token i stands within the window of the tokens i to i + WINDOW - 1
        seen = changed_targets(run, tokens(), i)
        assert all(row.nonzero()[:, 0].tolist() == list(range(i, i + WINDOW - 1)) for row in seen)


# -- the cached path ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["plain", "padded"])
@pytest.mark.parametrize("context", ["independent", "cascade"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_targets_after_a_cache_are_those_of_two_streams(architecture, context, layout):
    model = model_of(architecture, readout="exact", context=context)
    ids, (z, sigma) = tokens(), noisy()
    arrangement = {k: v.expand(2, LENGTH) for k, v in places(layout).items()}
    past = DynamicCache(config=model.config)
    chunks = [slice(0, 4), slice(4, 5), slice(5, 9), slice(9, LENGTH)]
    for chunk in chunks:
        hidden = model.embed_tokens(ids[:, chunk])
        seen = {k: v[:, : chunk.stop] for k, v in arrangement.items()}
        for block in range(3):
            start = model.embed_tokens(ids[:, chunk]) if context == "independent" else hidden
            here = {"position_ids": arrangement["position_ids"][:, chunk]}
            hidden = model.clean_block(
                start, block, past_key_values=past, attention_mask=seen.get("attention_mask"), **here
            )
            last = slice(chunk.stop - 1, chunk.stop)
            found = model.noisy_targets(z[:, last], sigma[:, last], block, past, **seen)
            whole = model.context_of(block, ids[:, : chunk.stop], **seen)
            expected = model.two_streams(whole, z[:, : chunk.stop], sigma[:, : chunk.stop], block, **seen)[1]
            torch.testing.assert_close(found, expected[:, -1:], rtol=1e-5, atol=1e-5)
            if architecture not in WINDOWED:
                found = model.noisy_targets(z[:, chunk], sigma[:, chunk], block, past, **seen)
                torch.testing.assert_close(found, expected[:, chunk], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_targets_whose_keys_a_window_has_dropped_are_refused():
    model = model_of("mistral-window", readout="exact", context="independent")
    past, (z, sigma) = DynamicCache(config=model.config), noisy()
    model.clean_block(model.embed_tokens(tokens()), 1, past_key_values=past)
    positions = torch.arange(LENGTH)[None]
    with pytest.raises(ValueError, match="dropped keys that the first of 2 noisy targets see: give the target of the"):
        model.noisy_targets(z[:, -2:], sigma[:, -2:], 1, past, position_ids=positions)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("readout", ["exact", "edm"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_the_language_models_logits_are_f_at_the_highest_noise(architecture, readout, layout):
    model = model_of(architecture, readout=readout, context="independent")
    ids = tokens()
    whole = model(ids, **LAYOUTS[layout]).logits
    generator = torch.Generator().manual_seed(0)
    z = 80 * torch.randn(WIDTH, generator=generator).expand(2, LENGTH, WIDTH)
    sigma = torch.full((2, LENGTH), 80.0)
    features = model.two_streams(model.embed_tokens(ids), z, sigma, 0, **places(layout))[1]
    features, head = model.readout(features, z, sigma, 0)[0]
    torch.testing.assert_close(whole, features @ head.T, rtol=1e-5, atol=1e-5)
    if layout == "plain":  # with a cache, also where a window has dropped what the first targets saw
        output = model(ids[:, :7], use_cache=True)
        torch.testing.assert_close(output.logits, whole[:, :7], rtol=1e-5, atol=1e-5)
        for t in range(7, LENGTH):
            step = model(ids[:, t : t + 1], past_key_values=output.past_key_values)
            torch.testing.assert_close(step.logits, whole[:, t : t + 1], rtol=1e-4, atol=1e-4)


# -- attention implementations, checkpointing, gradients ---------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_eager_attention_gives_what_sdpa_gives(layout):
    results = []
    for attention in ("sdpa", "eager"):
        model = model_of("qwen2-mixed-window", readout="exact", context="independent", attention=attention)
        assert model.block(1).model.config._attn_implementation == attention
        results.append(model.two_streams(model.embed_tokens(tokens()), *noisy(), 1, **places(layout)))
    rows = slice(PADDED, None) if layout == "padded" else slice(None)
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast[:, rows], slow[:, rows], rtol=1e-5, atol=1e-5)


def test_attention_that_takes_no_mask_is_refused():
    model = blocked_lm(readout="exact")
    model.block(0).model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' cannot run two streams.*use 'sdpa' or 'eager'"):
        model.denoise(*noisy(), block=0, input_ids=tokens())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpointing_inside_a_block_recomputes_and_gives_the_same_gradients(layout):
    model = blocked_lm("qwen3", readout="exact", context="cascade").train()
    batch = {"input_ids": tokens()} | LAYOUTS[layout]
    calls, gradients = [], []
    model.block(1).model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(None))
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls.clear()
        model.zero_grad()
        NextTokenPrediction()(model, 1, batch, torch.Generator().manual_seed(0)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.block_parameters(1)})
        assert len(calls) == (4 if enable else 2)  # of both streams, and again in the backward pass
    for name, gradient in gradients[0].items():
        assert gradient.any()
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize("context", ["independent", "cascade"])
@pytest.mark.parametrize("readout", ["clean", "exact", "edm"])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied-biases"])
def test_a_blocks_loss_moves_that_block_only(architecture, readout, context):
    model = blocked_lm(architecture, readout=readout, context=context).train()
    for block in range(3):
        model.zero_grad(set_to_none=True)
        NextTokenPrediction()(model, block, {"input_ids": tokens()}, torch.Generator().manual_seed(0)).loss.backward()
        moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        own = {name for name, _ in model.block_parameters(block)}
        # The embedding: what the first block reads; the head, where tied; what the paper's readout compares with.
        tied = architecture == "llama-tied-biases" and readout != "edm"
        shared = block == 0 or context == "independent" or tied or readout == "edm"
        # The paper's readout compares with the embeddings themselves, so its blocks hold no heads that would stay idle.
        assert own <= moved
        assert moved - own == ({"embed_tokens.weight"} if shared else set())


# -- the masks themselves ----------------------------------------------------------------------------------------


def test_masks_in_full():
    masks = make_masks(
        4, 2, documents=torch.tensor([[0, 0, 1, 1]]), attention_mask=torch.tensor([[0, 1, 1, 1]]), window=2
    )
    clean = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]  # the padding sees itself, or it would give NaN
    assert masks.clean.int().tolist() == [[clean]]
    # The targets of tokens 2 and 3; a window of two holds one clean token besides the target.
    assert masks.noisy.int().tolist() == [[[[0, 0, 1, 0, 1, 0], [0, 0, 0, 1, 0, 1]]]]


def test_plain_causal_attention_needs_no_mask():
    assert make_masks(5).clean is None and make_masks(5, window=5).clean is None
    assert make_masks(5, window=4).clean is not None
    assert make_masks(5, attention_mask=torch.ones(2, 5, dtype=torch.int64)).clean.shape == (2, 1, 5, 5)
    assert make_masks(3).noisy.shape == (1, 1, 3, 6)


def test_restarts_of_positions_number_the_documents():
    assert document_numbers(torch.tensor([[0, 1, 2, 0, 1, 0]])).tolist() == [[0, 0, 0, 1, 1, 2]]
    assert document_numbers(torch.tensor([[4, 5, 6]])) is None
    both = document_numbers(torch.tensor([[0, 1, 2], [0, 1, 0]]))
    assert both.tolist() == [[0, 0, 0], [0, 0, 1]]


def test_no_mask_over_both_streams_is_built():
    masks = make_masks(100, window=10)
    assert masks.clean.numel() + masks.noisy.numel() == 100 * 100 + 100 * 200
