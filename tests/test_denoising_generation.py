"""Tokens denoised along the noise grid: the walk against its formula, its distribution, caches, rows, stops, errors."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from hf_diffusionblocks import BlockedForCausalLM
from hf_diffusionblocks import generation as generation_module
from hf_diffusionblocks.generation import DenoisingConfig, denoising_generate
from hf_diffusionblocks.sampling import make_grid
from tiny_text import ARCHITECTURES, VOCAB_SIZE, blocked_lm, left_padding, tokens

READOUTS, CONTEXTS = ["clean", "exact", "edm"], ["independent", "cascade"]


def walked(model: BlockedForCausalLM, ids: Tensor, **given: Any) -> Any:
    """The whole sequences: 6 new tokens, drawn with noise of seed 1, no token ends them."""
    defaults = {"max_new_tokens": 6, "do_sample": True, "top_k": 0, "seed": 1, "eos_token_id": None}
    found = model.generate(ids, custom_generate=denoising_generate, **(defaults | given))
    return found.tolist() if isinstance(found, Tensor) else found


def prompts() -> tuple[Tensor, Tensor]:
    """Two prompts, the first with three padding tokens before it, and their mask."""
    ids, mask = tokens(2, 9), left_padding(9, 3, 0)["attention_mask"]
    return ids.masked_fill(mask == 0, 0), mask


# -- caches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_and_uncached_give_the_same_tokens(architecture, readout, context):
    model = blocked_lm(architecture, readout=readout, context=context)
    ids, mask = prompts()
    seen = set()
    for given in (
        {"steps": 1, "bridge": "argmax_row", "do_sample": False},
        {"steps": 5, "temperature": 1.3, "top_k": 10, "top_p": 0.9},
    ):
        given = {"attention_mask": mask, "max_new_tokens": 5, **given}
        expected = walked(model, ids, use_cache=False, **given)
        assert walked(model, ids, **given) == expected, given
        seen.add(str(expected))
    assert len(seen) == 2
    assert walked(model, ids, cache_implementation="static", **given) == expected


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("architecture", ["llama", "mistral-window", "qwen2-mixed-window"])
def test_a_cache_goes_on_where_it_ended(architecture, readout):
    model = blocked_lm(architecture, readout=readout)
    first = walked(model, tokens(2, 9), return_dict_in_generate=True)
    longer = torch.cat([first.sequences, tokens(2, 4, seed=1)], dim=1)
    given = {"attention_mask": torch.ones_like(longer)}
    expected = walked(model, longer, use_cache=False, **given)
    assert walked(model, longer, past_key_values=first.past_key_values, **given) == expected


@pytest.mark.parametrize("architecture", ["llama", "mistral-window"])
def test_noisy_targets_leave_nothing_in_the_cache(architecture):
    """It holds the clean tokens' keys and values only: what a model that reads them without targets has."""
    model = blocked_lm(architecture, readout="exact", context="cascade")
    found = walked(model, tokens(2, 9), steps=5, return_dict_in_generate=True)
    clean = DynamicCache(config=model.config.make_base_config())
    hidden = model.embed_tokens(found.sequences[:, :-1])
    for block in range(3):
        hidden = model.clean_block(hidden, block, past_key_values=clean)
    for mine, theirs in zip(found.past_key_values.layers, clean.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-5)


# -- the walk ----------------------------------------------------------------------------------------------------


def by_formula(
    model: BlockedForCausalLM, ids: Tensor, noise: Tensor, steps: int, grid: str, bridge: str
) -> tuple[Tensor, list[int]]:
    """The last step's logits of the next token, on whole sequences through public methods, and the blocks asked."""
    levels = make_grid(model.partition, steps, grid).tolist()
    table, blocks = model.target_table(), []
    z = model.partition.edges[0] * noise
    with torch.no_grad():
        for sigma, after in pairwise(levels):
            block = model.partition.block_of(sigma)
            blocks.append(block)
            hidden = model.context_of(block, ids)
            everywhere, each = z[:, None].expand(hidden.shape), torch.full(ids.shape, sigma)
            if model.config.two_stream:
                positions = torch.arange(ids.shape[1])[None]
                features = model.two_streams(hidden, everywhere, each, block, position_ids=positions)[1]
            else:
                features = model.block(block).norm(model.clean_block(hidden, block))
            pairs = model.readout(features[:, -1], z, each[:, -1], block)
            logits = sum((x @ weight.T).float() for x, weight in pairs)
            p = logits.softmax(-1)
            denoised = p @ table if bridge == "posterior_mean" else table[p.argmax(-1)]
            if bridge == "posterior_mean":  # what denoise() is
                same = model.denoise(everywhere, sigma, input_ids=ids)[:, -1]
                torch.testing.assert_close(denoised, same, rtol=1e-4, atol=1e-5)
            # EDM, arXiv 2206.00364, Alg. 1, z + (after - sigma) (z - D) / sigma, in the form that rounds at the size of
            # the result: a rounding at 80 would be amplified by sigma^-2 at the levels where tokens are told apart.
            z = (after / sigma) * z + (1 - after / sigma) * denoised
    return logits, blocks


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("architecture", ["llama", "mistral-window", "qwen3"])
def test_each_token_is_eulers_walk_through_the_blocks(monkeypatch, architecture, readout, context):
    noise = torch.randn(8, 3, 16, generator=torch.Generator().manual_seed(5))
    model = blocked_lm(architecture, readout=readout, context=context)
    given: list[Tensor] = []

    def drawn(self: Any) -> tuple[Tensor, Tensor]:
        given.append(model.partition.edges[0] * noise[len(given)])
        return given[-1], torch.zeros(3)

    monkeypatch.setattr(generation_module._RowNoise, "next", drawn)
    for steps, grid, bridge, expected_blocks in (
        (5, "equal_probability", "posterior_mean", [0, 0, 1, 2, 2]),
        (4, "equal_probability", "argmax_row", [0, 0, 1, 2]),
    ):
        given.clear()
        out = walked(
            model, tokens(3, 7), steps=steps, grid=grid, bridge=bridge, do_sample=False, max_new_tokens=2,
            return_dict_in_generate=True, output_logits=True, output_scores=True,
        )  # fmt: skip
        for n in range(2):
            logits, blocks = by_formula(model, out.sequences[:, : 7 + n], noise[n], steps, grid, bridge)
            assert blocks == expected_blocks
            # The known term is <z, e_k> / 0.002^2 in the end: rounding is relative to the largest logit, up to 1e6.
            scale = max(1.0, float(logits.abs().max()))
            torch.testing.assert_close(out.logits[n], logits, rtol=1e-4, atol=1e-4 * scale)
            assert torch.equal(out.sequences[:, 7 + n], logits.argmax(-1))
            torch.testing.assert_close(out.scores[n], out.logits[n])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9, 30])
def test_every_block_is_visited_in_order_and_never_returned_to(steps):
    model = blocked_lm(readout="exact", context="independent")
    visits = DenoisingConfig(steps=steps).visits(model.partition)
    assert [visit.block for visit in visits] == sorted({visit.block for visit in visits})
    pairs = [pair for visit in visits for pair in visit.steps]
    assert len(pairs) == steps and pairs[0][0] == pytest.approx(80.0) and pairs[-1][1] == 0
    assert all(a[1] == b[0] and a[0] > b[0] for a, b in pairwise(pairs))
    asked: list[int] = []
    for block in range(3):
        model.block(block).norm.register_forward_hook(lambda *_, block=block: asked.append(block))
    walked(model, tokens(2, 5), steps=steps, max_new_tokens=2)
    assert asked == [visit.block for visit in visits for _ in visit.steps] * 2


@pytest.mark.parametrize("context", CONTEXTS)
def test_only_the_blocks_that_a_walk_needs_must_be_loaded(tmp_path, context):
    blocked_lm(readout="exact", context=context).save_pretrained(tmp_path)
    whole = BlockedForCausalLM.from_pretrained(tmp_path)
    part = BlockedForCausalLM.from_pretrained(tmp_path, blocks=[0])
    assert walked(part, tokens(), steps=1) == walked(whole, tokens(), steps=1)  # at sigma_max alone: block 0
    with pytest.raises(ValueError, match="block 1 is not loaded"):
        walked(part, tokens())


# -- its distribution --------------------------------------------------------------------------------------------


def chi_square(found: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """Pearson's statistic of drawn tokens and its degrees of freedom; tokens expected fewer than 5 times together."""
    expected = len(found) * probabilities.double()
    counts = torch.bincount(found, minlength=len(expected)).double()
    often = expected >= 5
    cells = [(counts[often], expected[often])]
    if expected[~often].sum() >= 1:
        cells.append((counts[~often].sum()[None], expected[~often].sum()[None]))
    elif counts[~often].sum() > 5:
        return float("inf"), 1
    counts, expected = (torch.cat(values) for values in zip(*cells, strict=True))
    return float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1


def assert_drawn_from(found: Tensor, probabilities: Tensor) -> None:
    """Pearson's test at five standard deviations of the chi-square distribution."""
    statistic, degrees = chi_square(found, probabilities)
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5, (statistic, degrees)


def many(model: BlockedForCausalLM, ids: Tensor, **given: Any) -> Tensor:
    """4000 draws of the next token after one prompt, each walked in 96 steps."""
    settings = {"max_new_tokens": 1, "steps": 96} | given
    return torch.tensor(walked(model, ids.expand(4000, -1), **settings))[:, -1]


def one_f(**settings: Any) -> tuple[BlockedForCausalLM, Tensor, Tensor]:
    """Three blocks with the same layers, so that one f serves every noise level; a prompt and its f."""
    model = blocked_lm(context="independent", num_layers=3, **settings)
    for block in (1, 2):
        model.block(block).load_state_dict(model.block(0).state_dict())
    ids = tokens(1, 6)
    with torch.no_grad():
        return model, ids, model(ids).logits[0, -1].float()


@pytest.mark.parametrize("grid", ["equal_probability", "karras"])
def test_many_steps_of_the_clean_readout_draw_from_softmax_f(grid):
    model, ids, f = one_f()
    assert f.softmax(-1).max() < 0.5 and f.softmax(-1).max() > 2 / VOCAB_SIZE
    found = many(model, ids, grid=grid)
    assert_drawn_from(found, f.softmax(-1))
    # the noise alone decides: a walk of many steps ends in a point
    assert torch.equal(many(model, ids, grid=grid, do_sample=False), found)
    # and the test would see another distribution
    for other in ((f / 1.5).softmax(-1), torch.full_like(f, 1 / VOCAB_SIZE)):
        with pytest.raises(AssertionError):
            assert_drawn_from(found, other)


def test_the_arg_max_bridge_is_another_less_diverse_distribution():
    model, ids, f = one_f()
    found = many(model, ids, bridge="argmax_row")
    with pytest.raises(AssertionError):
        assert_drawn_from(found, f.softmax(-1))
    counts = torch.bincount(found, minlength=VOCAB_SIZE).double() / len(found)
    entropy = -(counts[counts > 0] * counts[counts > 0].log()).sum()
    p = f.softmax(-1)
    assert entropy < -(p * p.log()).sum() - 0.2
    assert int(counts.argmax()) == int(f.argmax())


@pytest.mark.parametrize(
    "given",
    [{"temperature": 0.7}, {"top_k": 6}, {"top_p": 0.6}, {"temperature": 1.4, "top_k": 12, "top_p": 0.8}],
    ids=str,
)
def test_temperature_and_truncation_act_on_f(given):
    """The walk's distribution is the one that ordinary decoding draws from with the same processors."""
    model, ids, f = one_f()
    found = many(model, ids, **given)
    f = f / given.get("temperature", 1.0)
    if "top_k" in given:
        f = f.masked_fill(f < f.topk(given["top_k"]).values[-1], -torch.inf)
    if "top_p" in given:  # the likeliest tokens whose probabilities reach top_p
        p, order = f.softmax(-1).sort(descending=True)
        outside = p.cumsum(-1) - p >= given["top_p"]
        f = f.masked_fill(outside[order.argsort()], -torch.inf)
    assert_drawn_from(found, f.softmax(-1))
    assert set(found.tolist()) <= set((f > -torch.inf).nonzero()[:, 0].tolist())


def test_one_step_at_sigma_max_is_ordinary_sampling():
    """There z carries nothing: <z, e_k> / sigma^2 has the standard deviation 1 / 80."""
    model, ids, f = one_f()
    assert_drawn_from(many(model, ids, steps=1), f.softmax(-1))
    found = torch.tensor(walked(model, tokens(8, 9), steps=1, do_sample=False))
    with torch.no_grad():
        f = model(found).logits[:, 8:-1].float()
    chosen = f.gather(-1, found[:, 9:, None])[..., 0]
    assert (chosen > f.max(-1).values - 8 * 2**0.5 / 80).all()  # the likeliest, up to the noise's part
    assert (found[:, 9:] == f.argmax(-1)).float().mean() > 0.8


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("steps", [1, 3, 12])
def test_scores_are_minus_infinity_where_tokens_were_left_out(readout, steps):
    model = blocked_lm(readout=readout)
    out = walked(
        model, tokens(), steps=steps, top_k=5, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    assert len(out.scores) == len(out.logits) == 6
    for n, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        assert (scores > -torch.inf).sum(-1).tolist() == [5, 5] and logits.isfinite().all()
        chosen = out.sequences[:, 12 + n]
        assert (scores.gather(1, chosen[:, None]) > -torch.inf).all()
        finite = scores > -torch.inf
        torch.testing.assert_close(scores[finite], logits[finite], rtol=1e-4, atol=1e-3)


# -- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("architecture", ["llama", "mistral-window"])
def test_padding_and_the_rows_beside_change_no_token(architecture, readout, context):
    model = blocked_lm(architecture, readout=readout, context=context)
    ids, mask = prompts()
    together = walked(model, ids, attention_mask=mask, steps=4)
    assert walked(model, ids[:1, 3:], steps=4)[0] == together[0][3:]
    assert walked(model, ids[1:], steps=4)[0] == together[1]
    turned = walked(model, ids.flip(0), attention_mask=mask.flip(0), steps=4)
    assert turned == together[::-1]


def test_each_copy_of_a_prompt_has_noise_of_its_own():
    model = blocked_lm(readout="exact")
    found = walked(model, tokens(2, 7), num_return_sequences=3)
    assert len(found) == 6 and len({tuple(row[7:]) for row in found}) > 4
    assert walked(model, tokens(2, 7)) == [found[0], found[3]]  # the first copy of each
    assert walked(model, tokens(2, 7).repeat_interleave(3, dim=0)) == found


def test_the_seed_decides_and_torchs_own_where_there_is_none():
    model, ids = blocked_lm(readout="exact"), tokens(2, 7)
    assert walked(model, ids, seed=3) == walked(model, ids, seed=3) != walked(model, ids, seed=4)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(walked(model, ids, seed=None))
    assert found[0] == found[1] != found[2]
    assert walked(model, ids, seed=None, do_sample=False) == walked(model, ids, seed=0, do_sample=False)


def test_settings_may_stand_in_the_generation_config():
    model, ids = blocked_lm(readout="exact"), tokens(2, 7)
    expected = walked(model, ids, steps=5, grid="karras", bridge="argmax_row", seed=9)
    model.generation_config = GenerationConfig(
        max_new_tokens=6, do_sample=True, top_k=0, steps=5, grid="karras", bridge="argmax_row", seed=9
    )
    assert model.generate(ids, custom_generate=denoising_generate).tolist() == expected
    assert model.generate(ids, custom_generate=denoising_generate, seed=10).tolist() != expected


# -- stops and streams -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("readout", READOUTS)
def test_a_row_ends_at_its_stop_token_and_is_padded(readout, use_cache):
    model = blocked_lm(readout=readout)
    free = walked(model, tokens(4, 7), max_new_tokens=12, use_cache=use_cache)
    stop = free[1][7 + 3]
    found = walked(model, tokens(4, 7), max_new_tokens=12, eos_token_id=stop, pad_token_id=0, use_cache=use_cache)
    length = len(found[0])
    for row, whole in zip(found, free, strict=True):
        new = whole[7:]
        end = new.index(stop) + 1 if stop in new else 12
        assert row == (whole[: 7 + end] + [0] * 12)[:length]
    ends = [row[7:].index(stop) + 1 if stop in row[7:] else 12 for row in free]
    assert length == 7 + max(ends)


def test_other_stopping_criteria_are_asked_after_every_token():
    class After(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 10)

    model, ids = blocked_lm(readout="exact"), tokens(2, 7)
    found = walked(model, ids, stopping_criteria=StoppingCriteriaList([After()]))
    assert found == [row[:10] for row in walked(model, ids)]


def test_tokens_are_streamed_as_they_come():
    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.values, self.ended = [], 0

        def put(self, value: Tensor) -> None:
            self.values.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended += 1

    model, ids, streamer = blocked_lm(readout="exact"), tokens(1, 7), Kept()
    found = walked(model, ids, streamer=streamer)
    assert streamer.ended == 1
    assert streamer.values[0] == found[0][:7] and streamer.values[1:] == [[token] for token in found[0][7:]]


def test_a_penalty_acts_on_f_at_every_step():
    """With one that forbids whatever stood in the prompt, no such token is drawn, however many steps there are."""
    model, ids = blocked_lm(), tokens(4, 12)
    free = walked(model, ids, no_repeat_ngram_size=0, steps=6)
    assert any(token in row[:12] for row in free for token in row[12:])
    found = walked(model, ids, no_repeat_ngram_size=1, steps=6)
    assert all(len(set(row[12:])) == 6 and not set(row[12:]) & set(row[:12]) for row in found)


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"steps": True}, "steps=True"),
        ({"seed": -1}, "seed=-1 must be a whole number of at least 0"),
        ({"bridge": "mean"}, "unknown bridge 'mean'.*posterior_mean"),
        ({"grid": "karas"}, "unknown grid 'karas'.*karras"),
        ({"num_beams": 2, "do_sample": False}, "cannot walk the noise grid"),
        ({"block": 1}, "'block' has no meaning"),
        ({"max_new_tokens": 60}, r"12 tokens of prompt and 60 new ones.*at most 52"),
        ({"attention_mask": torch.ones(2, 3, dtype=torch.long)}, "are of 3 tokens, input_ids of 12"),
        ({"attention_mask": torch.tensor([[1] * 12, [0] * 12])}, "row 1 of attention_mask is all padding"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_say_so(given, message):
    with pytest.raises(ValueError, match=message):
        walked(blocked_lm(), tokens(), **given)


def test_an_empty_prompt_and_foreign_tokens_are_refused():
    model = blocked_lm()
    with pytest.raises(ValueError, match="input_ids is empty"):
        walked(model, torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="vocabulary has 40 tokens"):
        walked(model, torch.tensor([[5, 40]]))


@pytest.mark.parametrize("readout", READOUTS)
def test_another_cache_is_refused(readout):
    model, ids = blocked_lm(readout=readout), tokens(2, 9)
    cache = walked(model, ids, return_dict_in_generate=True).past_key_values
    longer = torch.cat([tokens(3, 15), tokens(3, 1)], dim=1)
    with pytest.raises(ValueError, match="holds a batch of 2, input_ids one of 3"):
        walked(model, longer, past_key_values=cache)
    with pytest.raises(ValueError, match="at least the last token is not in the cache"):
        walked(model, ids, past_key_values=cache)
    with pytest.raises(ValueError, match="another model's cache"):
        walked(
            model, tokens(2, 20), past_key_values=StaticCache(config=blocked_lm(num_layers=3).config, max_cache_len=30)
        )


def test_a_cache_that_lacks_a_blocks_tokens_is_refused():
    """Decoding from f of an independent block fills that block's layers only."""
    model, ids = blocked_lm(context="independent"), tokens(2, 9)
    given = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(ids, **given)
    longer = torch.cat([first.sequences, tokens(2, 3)], dim=1)
    with pytest.raises(ValueError, match=r"tokens of blocks \[0, 1, 2\]: decoding from f or another walk filled it"):
        walked(model, longer, past_key_values=first.past_key_values)
