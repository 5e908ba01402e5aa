"""Generation with transformers' own `generate`: the base's tokens, with and without a cache."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, StaticCache, pipeline

from hf_diffusionblocks.data import train_tokenizer
from hf_diffusionblocks.families.causal_lm import BlockedForCausalLM
from hf_diffusionblocks.generation import denoising_generate
from tiny_text import ARCHITECTURES, VOCAB_SIZE, base_lm, blocked_lm, left_padding, tokens

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.95},
}


def generated(model: Any, ids: Tensor, **given: Any) -> list[list[int]]:
    torch.manual_seed(0)
    return model.generate(ids, **({"max_new_tokens": 8} | given)).tolist()


def prompts() -> tuple[Tensor, Tensor]:
    """Two prompts, the first with three padding tokens before it, and their mask."""
    ids, mask = tokens(2, 9), left_padding(9, 3, 0)["attention_mask"]
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_gives_the_bases_tokens_cached_and_uncached(architecture, mode):
    base = base_lm(architecture)
    model = BlockedForCausalLM.from_base(base)
    ids, mask = prompts()
    expected = generated(base, ids, attention_mask=mask, **MODES[mode])
    assert len(expected[0]) > 9 and expected != generated(base, ids.flip(0), attention_mask=mask.flip(0))
    assert generated(model, ids, attention_mask=mask, **MODES[mode]) == expected
    assert generated(model, ids, attention_mask=mask, use_cache=False, **MODES[mode]) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_left_padding_does_not_change_the_tokens(architecture):
    model = BlockedForCausalLM.from_base(base_lm(architecture))
    ids, mask = prompts()
    together = generated(model, ids, attention_mask=mask, eos_token_id=VOCAB_SIZE, do_sample=False)
    for row, start in ((0, 3), (1, 0)):
        alone = generated(model, ids[row : row + 1, start:], eos_token_id=VOCAB_SIZE, do_sample=False)
        assert together[row][start:] == alone[0]


@pytest.mark.parametrize("readout", ["clean", "exact", "edm"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_static_caches_give_the_same_tokens(architecture, readout):
    model = blocked_lm(architecture, readout=readout, context="cascade")
    ids, mask = prompts()
    given = {"attention_mask": mask, "do_sample": False, "eos_token_id": VOCAB_SIZE}
    expected = generated(model, ids, **given)
    assert generated(model, ids, cache_implementation="static", **given) == expected
    own = StaticCache(config=model.config, max_cache_len=20)
    assert generated(model, ids, past_key_values=own, **given) == expected


@pytest.mark.parametrize("context", ["independent", "cascade"])
@pytest.mark.parametrize("readout", ["exact", "edm"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_streams_generate_the_same_with_and_without_a_cache(architecture, readout, context):
    model = blocked_lm(architecture, readout=readout, context=context)
    ids, mask = prompts()
    expected = generated(model, ids, attention_mask=mask, use_cache=False, do_sample=False)
    assert generated(model, ids, attention_mask=mask, do_sample=False) == expected


@pytest.mark.parametrize("readout", ["clean", "exact"])
@pytest.mark.parametrize("architecture", ["llama", "mistral-window"])
def test_every_independent_block_generates(architecture, readout):
    model = blocked_lm(architecture, readout=readout, context="independent")
    ids, mask = prompts()
    found = []
    for block in range(3):
        given = {"attention_mask": mask, "block": block, "do_sample": False, "eos_token_id": VOCAB_SIZE}
        found.append(generated(model, ids, **given))
        assert generated(model, ids, use_cache=False, **given) == found[-1]
    assert found[0] != found[1] != found[2]


@pytest.mark.parametrize("readout", ["clean", "exact"])
@pytest.mark.parametrize("architecture", ["llama", "mistral-window"])
def test_a_cache_goes_on_where_it_ended(architecture, readout):
    """A conversation: the second turn's tokens come in one piece, after a cache that holds the first."""
    model = blocked_lm(architecture, readout=readout)
    given = {"do_sample": False, "eos_token_id": VOCAB_SIZE, "max_new_tokens": 5}
    first = model.generate(tokens(2, 9), return_dict_in_generate=True, **given)
    longer = torch.cat([first.sequences, tokens(2, 4, seed=1)], dim=1)
    given["attention_mask"] = torch.ones_like(longer)  # a generated padding token is a token like any other
    expected = generated(model, longer, **given)
    assert generated(model, longer, past_key_values=first.past_key_values, **given) == expected


def test_the_generation_config_is_carried_over(tmp_path):
    base = base_lm("llama-tied-biases")
    base.generation_config = GenerationConfig(
        do_sample=True, temperature=1.3, top_k=11, max_new_tokens=6, pad_token_id=0, eos_token_id=[2, 7]
    )
    ids = tokens(2, 9)
    torch.manual_seed(0)
    expected = base.generate(ids).tolist()
    model = BlockedForCausalLM.from_base(base)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    part = BlockedForCausalLM.from_pretrained(tmp_path / "model", blocks=[0, 1, 2])
    for other in (model, loaded, part, loaded.to_base()):
        torch.manual_seed(0)
        assert other.generate(ids).tolist() == expected
        assert other.generation_config.eos_token_id == [2, 7] and other.generation_config.top_k == 11


def test_a_model_without_a_base_stops_at_the_configs_end():
    model = blocked_lm()
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    ended = generated(model, tokens(8, 3), do_sample=True, temperature=2.0, max_new_tokens=40)
    stops = [row.index(2) for row in ended if 2 in row[3:]]
    assert stops and all(set(row[row.index(2) + 1 :]) <= {0} for row in ended if 2 in row)


@pytest.mark.parametrize("readout", ["clean", "exact"])
def test_the_text_generation_pipeline_runs(readout):
    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", bos_token="w1", eos_token="w2", padding_side="left"
    )
    model = BlockedForCausalLM.from_base(base_lm(), readout=readout)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False, "batch_size": 2}
    texts = ["w5 w6 w7", "w9 w10 w11 w12 w13"]
    found = pipeline("text-generation", model=model, tokenizer=tokenizer)(texts, **settings)
    said = [answer[0]["generated_text"].split() for answer in found]
    assert all(1 <= len(words) <= 6 for words in said)
    if readout == "clean":
        base = pipeline("text-generation", model=base_lm(), tokenizer=tokenizer)(texts, **settings)
        assert found == base


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_single_step_gives_the_decoders_logits_bit_for_bit(architecture, attention, monkeypatch):
    """Without padding or a window, one new token runs through the layers alone; otherwise through the decoders."""
    model = BlockedForCausalLM.from_base(base_lm(architecture, attention=attention)).eval()
    steps, ids, single = [], tokens(2, 9), BlockedForCausalLM.single_step

    def logits() -> Tensor:
        with torch.no_grad():
            cache = model(ids[:, :6]).past_key_values
            return torch.cat(
                [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(6, 9)]
            )

    monkeypatch.setattr(BlockedForCausalLM, "single_step", lambda *args: steps.append(single(*args)) or steps[-1])
    fast = logits()
    windowed = bool(model.config.base_config.get("sliding_window"))
    assert [step is not None for step in steps] == [False] + [not windowed] * 3  # the prompt is not one token
    monkeypatch.setattr(BlockedForCausalLM, "single_step", lambda *args: None)
    assert torch.equal(fast, logits())


def test_padding_takes_the_decoders_way(monkeypatch):
    model = BlockedForCausalLM.from_base(base_lm()).eval()
    found, single = [], BlockedForCausalLM.single_step
    monkeypatch.setattr(BlockedForCausalLM, "single_step", lambda *args: found.append(single(*args)) or found[-1])
    ids, mask = prompts()
    generated(model, ids, attention_mask=mask, do_sample=False, eos_token_id=VOCAB_SIZE)
    assert len(found) == 8 and all(step is None for step in found)


@pytest.mark.parametrize("walk", [False, True])
def test_stop_strings_end_the_text_as_they_do_with_the_base(walk):
    tokenizer = train_tokenizer(["abcdefghijklmnopqrstuvwxyz "], "character")
    assert len(tokenizer) <= VOCAB_SIZE
    base = base_lm()
    model = BlockedForCausalLM.from_base(base)
    ids, more = tokens(1, 6), {"custom_generate": denoising_generate, "seed": 0} if walk else {}
    given = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": VOCAB_SIZE}
    whole = model.generate(ids, **given, **more)[0, 6:].tolist()
    letters = [(i, tokenizer.decode([t])) for i, t in enumerate(whole)]
    stop, letter = next(
        (i, c) for i, c in letters if i > 0 and len(c) == 1 and c.isalpha() and whole.index(whole[i]) == i
    )
    given |= {"stop_strings": [letter], "tokenizer": tokenizer}
    found = model.generate(ids, **given, **more)
    assert found[0, 6:].tolist() == whole[: stop + 1]
    if not walk:
        assert torch.equal(found, base.generate(ids, **given))
