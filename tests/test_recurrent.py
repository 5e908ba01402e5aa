"""Recurrent depth: who sees whom, walks with and without caches, the unrolled baseline, and what both cost.

Position j's state is a noisy version of token j + 1; it sees the states of positions up to j.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hf_diffusionblocks import (
    BlockedRecurrentConfig,
    BlockedRecurrentForCausalLM,
    DiffusionBlocksTrainer,
    DiffusionBlocksTrainingArguments,
    denoising_generate,
    plan_memory,
)
from hf_diffusionblocks.baselines.end_to_end import baseline_recipe
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.compute import training_flops
from hf_diffusionblocks.evaluation.text import recurrent_options
from hf_diffusionblocks.families.recurrent_block import Places, RecurrentBlock
from hf_diffusionblocks.likelihood import language_model_likelihood, likelihood_bound
from hf_diffusionblocks.memory import measure_memory
from hf_diffusionblocks.modeling import enable_checkpointing
from hf_diffusionblocks.objectives import RecurrentDenoising, TruncatedBackpropagation, default_objective
from hf_diffusionblocks.objectives.recurrent import draw_recurrences
from hf_diffusionblocks.recipes import load_recipe
from tiny import perturbed
from tiny_text import (
    ARCHITECTURES,
    TEXT_RECIPE,
    VOCAB_SIZE,
    WIDTH,
    TokenRows,
    base_config,
    base_lm,
    left_padding,
    packed_positions,
    tokens,
    words_file,
)

LENGTH, START, PADDED = 12, 5, 3
LAYOUTS = {
    "plain": {},
    "packed": {"position_ids": packed_positions(LENGTH, START)},
    "padded": left_padding(LENGTH, PADDED, 0),
}
READOUTS = ("exact", "edm", "clean")


@cache
def model_of(readout: str = "exact", architecture: str = "llama", **settings) -> BlockedRecurrentForCausalLM:
    """Of 1, 2 and 1 layers, in eval mode, nothing zero-initialised; unrolled ones run three times by default."""
    settings = {"mean_recurrences": 3, "backprop_depth": 2} | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BlockedRecurrentForCausalLM.from_base(base_config(architecture, 4), readout=readout, **settings)
    return perturbed(model, 0.1, 0).eval()


def noisy(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, LENGTH, WIDTH, generator=generator), 0.5 + torch.rand(2, LENGTH, generator=generator)


# -- causality ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def leaks(run: Callable[[Tensor], Tensor], given: Tensor, layout: str) -> list[tuple[int, int, int]]:
    """(row, i, j) where position j < i, or of another document, changes in any bit with what is given at i."""
    positions = LAYOUTS[layout].get("position_ids", torch.arange(LENGTH)[None]).expand(2, LENGTH)
    documents = (positions == 0).cumsum(1) if layout == "packed" else torch.zeros_like(positions)
    found = []
    for i in range(LENGTH):
        other = given.clone()
        other[:, i] = 3 + (given[:, i] + 4) % (VOCAB_SIZE - 3) if given.ndim == 2 else given[:, i] + 0.5
        changed = (run(given) != run(other)).any(dim=-1)
        allowed = (torch.arange(LENGTH) >= i) & (documents == documents[:, i : i + 1])
        found += [(row, i, j) for row, j in (changed & ~allowed).nonzero().tolist()]
        if layout == "plain":  # the control: the position itself does change
            assert changed[:, i].all()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2-mixed-window"])
@pytest.mark.parametrize("readout", ["exact", "edm"])
def test_no_state_sees_its_own_token_or_later_ones(readout, architecture, layout):
    model, (z, sigma) = model_of(readout, architecture), noisy()
    assert leaks(lambda ids: model.denoise(z, sigma, input_ids=ids, **LAYOUTS[layout]), tokens(), layout) == []
    # z of position j is token j + 1: only positions from j on may see it.
    assert leaks(lambda z: model.denoise(z, sigma, input_ids=tokens(), **LAYOUTS[layout]), z, layout) == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("recurrences", [1, 3])
def test_the_next_tokens_logits_know_the_past_alone(readout, recurrences, layout):
    model = model_of(readout)
    how = {"num_recurrences": recurrences, "use_cache": False, **LAYOUTS[layout]}
    assert leaks(lambda ids: model(ids, **how).logits, tokens(), layout) == []


@pytest.mark.parametrize("recurrences", [1, 3])
def test_the_probe_detects_a_leak(recurrences, monkeypatch):
    model, plain = model_of(), Places._make
    with_columns = torch.arange(LENGTH + 1)

    def leaky(self: Places, window: int | None) -> Tensor:
        mask = plain(self, window)
        if mask is None:
            mask = torch.ones(len(self.columns), len(self.columns), dtype=torch.bool).tril()[None, None]
        return mask | mask.roll(1, dims=-1)

    monkeypatch.setattr(Places, "_make", leaky)
    found = leaks(lambda ids: model(ids, num_recurrences=recurrences, use_cache=False).logits, tokens(), "padded")
    assert {(1, i + 1, i) for i in with_columns[: LENGTH - 2].tolist()} <= set(found)


# -- walks and caches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recurrences", [1, 3])
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2-mixed-window"])
@torch.no_grad()
def test_a_cache_changes_nothing(architecture, readout, recurrences):
    model, ids = model_of(readout, architecture), tokens()
    whole = model(ids, num_recurrences=recurrences, use_cache=False).logits
    cache, parts = None, []
    for low, high in pairwise([0, 1, 2, 7, 8, LENGTH]):
        part = model(ids[:, low:high], num_recurrences=recurrences, past_key_values=cache, use_cache=True)
        cache = part.past_key_values
        parts.append(part.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    # Tokens may be taken back, as assisted decoding does.
    cache.crop(-4)
    again = model(ids[:, -4:], num_recurrences=recurrences, past_key_values=cache, logits_to_keep=2).logits
    torch.testing.assert_close(again, whole[:, -2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("readout", READOUTS)
@torch.no_grad()
def test_generation_with_a_cache_is_as_without_and_padding_changes_nothing(readout):
    model, ids = model_of(readout), tokens(length=8)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_recurrences": 3}
    found = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, use_cache=False, **settings), found)
    padded = torch.nn.functional.pad(ids[:1], (PADDED, 0))
    mask = (torch.arange(8 + PADDED) >= PADDED).long()[None]
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, PADDED:], found[:1])
    assert model.generate(ids, num_beams=2, **settings).shape == found.shape


@torch.no_grad()
def test_documents_in_one_row_are_as_each_alone():
    model, ids = model_of(), tokens()
    together = model(ids, num_recurrences=3, **LAYOUTS["packed"]).logits
    for part in (slice(0, START), slice(START, LENGTH)):
        alone = model(ids[:, part], num_recurrences=3).logits
        torch.testing.assert_close(together[:, part], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sampling_draws_other_noise_for_every_row_and_follows_the_seed():
    model, ids = model_of(), tokens(batch=1, length=4)
    settings = {"max_new_tokens": 10, "do_sample": True, "num_recurrences": 3, "num_return_sequences": 4}
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.generate(ids, **settings))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert len(runs[0].unique(dim=0)) == 4


@torch.no_grad()
def test_the_walk_of_an_exact_denoiser_samples_its_next_token_distribution():
    """A converted base is the exact denoiser of its own p: f = log p(token | past) whatever the state is. So the walk's
    ends are draws from p, up to the grid's steps; and far more recurrences than any training had are fine."""
    base = base_lm("llama")
    base.get_output_embeddings().weight.mul_(6)
    model = BlockedRecurrentForCausalLM.from_base(base, noise={"sigma_max": 20.0}).eval()
    rows = 1200
    ids = tokens(batch=1, length=3).expand(rows, 3)
    logits = model(ids, num_recurrences=48, noise_seed=1, logits_to_keep=1, use_cache=False).logits[:, -1]
    found = torch.bincount(logits.argmax(-1), minlength=VOCAB_SIZE) / rows
    wanted = base(ids[:1]).logits[0, -1].softmax(-1)
    assert (wanted - 1 / VOCAB_SIZE).abs().sum() / 2 > 0.3  # p is far from uniform
    draws = torch.multinomial(wanted, rows, replacement=True, generator=torch.Generator().manual_seed(0))
    chance = (torch.bincount(draws, minlength=VOCAB_SIZE) / rows - wanted).abs().sum() / 2
    assert (found - wanted).abs().sum() / 2 < chance + 0.03


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("readout", ["exact", "clean"])
@torch.no_grad()
def test_a_converted_base_starts_as_itself(architecture, readout):
    base = base_lm(architecture)
    model = BlockedRecurrentForCausalLM.from_base(base, readout=readout, mean_recurrences=3)
    torch.testing.assert_close(model(tokens()).logits, base(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("readout", READOUTS)
@torch.no_grad()
def test_save_and_load_give_the_same_model(readout, tmp_path):
    model = model_of(readout)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert type(loaded) is BlockedRecurrentForCausalLM
    ours, theirs = (m.config.to_dict() | {"_name_or_path": None} for m in (model, loaded))
    assert ours == theirs
    state = loaded.state_dict()
    assert all(torch.equal(state.pop(name), tensor) for name, tensor in model.state_dict().items()) and not state
    found, wanted = (m(tokens(), num_recurrences=2).logits for m in (loaded, model))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


# -- training ----------------------------------------------------------------------------------------------------


def test_recurrences_are_huginns_log_normal_poisson():
    config, generator = BlockedRecurrentConfig(base_config=base_config()), torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw_recurrences(config, generator) for _ in range(4000)], dtype=torch.float64)
    # r - 1 ~ Poisson(e^tau): mean 32, variance 32 + 32^2 (e^(1/4) - 1)
    variance = 32 + 32**2 * (torch.tensor(0.25).exp().item() - 1)
    assert abs(float(drawn.mean()) - 33) < 4 * (variance / len(drawn)) ** 0.5
    assert abs(float(drawn.var()) / variance - 1) < 0.2
    assert float(drawn.min()) >= 1


@pytest.mark.parametrize("recurrences", [2, 5])
def test_the_gradient_goes_through_the_last_recurrences_only(recurrences):
    model, batch = model_of("clean", backprop_depth=3).train(), {"input_ids": tokens()}
    model.zero_grad()
    TruncatedBackpropagation(recurrences)(model, 0, batch, torch.Generator().manual_seed(0)).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    # The same by hand: the state is a constant before the last three recurrences.
    model.zero_grad()
    module, hidden = model.block(0), model.embed_tokens(tokens())
    places = model.make_places(hidden, torch.arange(LENGTH)[None])
    x = module.run_prelude(hidden, places)
    state = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * model.config.state_std
    for i in range(recurrences):
        state = module.run_core(x, state if i > recurrences - 3 else state.detach(), places)
    logits = module.lm_head(module.norm(module.run_coda(state, places)))[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    model.eval()


def test_a_rows_targets_share_a_noise_level_unless_each_has_its_own():
    batch = {"input_ids": tokens(batch=4)}
    for noise_per, levels in (("row", 4), ("token", 4 * LENGTH)):
        result = RecurrentDenoising()(model_of(noise_per=noise_per), 0, batch, torch.Generator().manual_seed(0))
        assert len(result.sigma) == 4 * LENGTH and len(result.sigma.unique()) == levels


@pytest.mark.parametrize("readout", ["exact", "clean"])
def test_training_learns_and_its_likelihood_is_the_bounds(readout, tmp_path):
    torch.manual_seed(0)
    settings = {"readout": readout, "mean_recurrences": 4, "backprop_depth": 2}
    model = BlockedRecurrentForCausalLM.from_base(base_config(num_layers=4), **settings)
    args = DiffusionBlocksTrainingArguments(
        output_dir=str(tmp_path), max_steps=70, per_device_train_batch_size=16, learning_rate=1e-2, disable_tqdm=True
    )
    rows, other = TokenRows(64), TokenRows(64, seed=5)
    before = language_model_likelihood(model, other).nats_per_token
    DiffusionBlocksTrainer(model, args, rows).train()
    after = language_model_likelihood(model, other).nats_per_token
    assert before > 3.5 and after < 2.4
    bound = likelihood_bound(model, other, num_draws=4)
    assert bound.cross_entropy_at_sigma_max == pytest.approx(after, rel=1e-4)
    # One f that hardly depends on z: the bound is nearly its cross-entropy (method's section on the exact form).
    assert bound.nats_per_token == pytest.approx(after, abs=0.2)


def test_the_bound_of_a_converted_base_is_its_cross_entropy():
    model, rows = BlockedRecurrentForCausalLM.from_base(base_lm(num_layers=3)), TokenRows(128)
    plain = language_model_likelihood(model, rows).nats_per_token
    bound = likelihood_bound(model, rows, num_draws=16, estimator="integral")
    assert bound.nats_per_token == pytest.approx(plain, abs=5 * bound.monte_carlo_error)
    assert bound.monte_carlo_error < 0.15


# -- cost --------------------------------------------------------------------------------------------------------


def test_an_update_costs_what_its_layer_passes_say(monkeypatch):
    """Parts of 2, 4 and 2 layers: 25 * 4 + 3 * (8 * 4 + 4) = 208 layer passes to 24; 33 runs of the core to 1."""
    base = base_config(num_layers=8, hidden_size=64, intermediate_size=256, vocab_size=10, num_key_value_heads=4)
    config = BlockedRecurrentConfig(base_config=base)
    runs, core = [], RecurrentBlock.run_core
    monkeypatch.setattr(RecurrentBlock, "run_core", lambda *a, **k: (runs.append(1), core(*a, **k))[1])
    cost = training_flops(config, tokens=64)
    assert cost.end_to_end / cost.flops == pytest.approx(208 / 24, rel=0.05)
    assert len(runs) == 33 + 1
    # The paper's "about 10": runs of the core, 5 epochs against 15. In FLOPs the truncated gradient makes it 3.
    assert 5 * (len(runs) - 1) / 15 == 11
    assert 5 * cost.end_to_end / (15 * cost.flops) == pytest.approx(208 / 24 / 3, rel=0.05)


@pytest.mark.parametrize("readout", ["exact", "clean"])
def test_the_plan_is_what_a_step_holds(readout):
    model = model_of(readout, mean_recurrences=6, backprop_depth=4)
    plan = plan_memory(model.config, batch_size=4, tokens=LENGTH, device="cpu", alternatives=False)
    batch = {"input_ids": tokens(batch=4)}
    objective = TruncatedBackpropagation(7) if readout == "clean" else default_objective(model.config)
    for checkpointing, method in ((False, "blocked"), (True, "blocked, checkpointing")):
        use = measure_memory(model, 0, batch, objective=objective, gradient_checkpointing=checkpointing)
        row = plan.worst(method)
        assert (use.weights, use.gradients, use.moments) == (row.weights, row.gradients, row.moments)
        assert use.activations == pytest.approx(row.activations, rel=0.02)
    ratio = plan.worst("blocked").activations / plan.worst("end to end").activations
    assert ratio == 1 if readout == "clean" else ratio < 0.75


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_recurrences_of_zero_are_refused(value):
    for call in (
        lambda: model_of()(tokens(), num_recurrences=value),
        lambda: model_of().generate(tokens(), num_recurrences=value, max_new_tokens=2),
        lambda: BlockedRecurrentConfig(base_config=base_config(), num_recurrences=value),
    ):
        with pytest.raises(ValueError, match="num_recurrences"):
            call()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_blocks": 3}, "num_blocks=3: the core .* BlockedForCausalLM"),
        ({"context": "cascade"}, "context='cascade'"),
        ({"prelude_layers": 4, "coda_layers": 2}, "leave no layer of 6 for the core"),
        ({"backprop_depth": 0}, "backprop_depth=0 must be a whole number of at least 1"),
        ({"mean_recurrences": 0}, "mean_recurrences=0 must"),
        ({"noise_per": "batch"}, "noise_per"),
        ({"state_std": 0.0}, "state_std=0.0 must be positive"),
        ({"preset": "hugin"}, "huginn"),
        ({"prelude_layer": 2}, "prelude_layers"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BlockedRecurrentForCausalLM.from_base(base_config(), **settings)


def test_what_does_not_fit_is_refused():
    model = model_of()
    cache = model(tokens(), num_recurrences=2, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="another number of recurrences"):
        model(tokens()[:, :1], num_recurrences=3, past_key_values=cache)
    with pytest.raises(ValueError, match="StaticCache of fixed size"):
        model(tokens(), past_key_values=StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises(ValueError, match="leave custom_generate out and give num_recurrences"):
        model.generate(tokens(), custom_generate=denoising_generate, max_new_tokens=2)
    with pytest.raises(ValueError, match="cannot be given back as a decoder"):
        model.to_base()
    with pytest.raises(ValueError, match="TruncatedBackpropagation"):
        RecurrentDenoising()(model_of("clean"), 0, {"input_ids": tokens()})
    with pytest.raises(ValueError, match="RecurrentDenoising"):
        TruncatedBackpropagation()(model, 0, {"input_ids": tokens()})
    with pytest.raises(ValueError, match="recurrences=0"):
        TruncatedBackpropagation(0)
    assert (
        len(model(tokens(), past_key_values=DynamicCache(), num_recurrences=2).past_key_values.layers) == 1 + 1 + 2 * 3
    )


# -- commands ----------------------------------------------------------------------------------------------------


def test_the_recipe_trains_samples_and_evaluates(tmp_path, capsys):
    short = [setting for setting in TEXT_RECIPE if "num_hidden_layers" not in setting]
    command = ["train", "pydoc-recurrent", *short, f"data.name={words_file(tmp_path)}", "blocks.mean_recurrences=3"]
    assert main([*command, "--no-report", "--output-dir", str(tmp_path / "run")]) == 0
    model_dir = str(tmp_path / "run" / "model")
    assert type(AutoModelForCausalLM.from_pretrained(model_dir)) is BlockedRecurrentForCausalLM
    assert main(["sample", model_dir, "--prompt", "alpha "]) == 0
    assert main(["evaluate", model_dir]) == 0
    assert "bound bits per character" in capsys.readouterr().out
    # The baseline of the same recipe is the unrolled core.
    unrolled = baseline_recipe(load_recipe("pydoc-recurrent"), "end_to_end").config()
    assert (unrolled.readout, unrolled.mean_recurrences, len(unrolled.core)) == ("clean", 32, 2)


def test_the_unrolled_baseline_says_what_it_ran_and_steps_are_recurrences(tmp_path, capsys, monkeypatch):
    run, words = tmp_path / "run", words_file(tmp_path)
    short = [s for s in TEXT_RECIPE if "num_hidden_layers" not in s and "max_steps" not in s and "prompts" not in s]
    command = [
        "train",
        "pydoc-recurrent",
        *short,
        f"data.name={words}",
        "blocks.mean_recurrences=3",
        "sampling.prompts=[a]",
    ]
    assert main([*command, "training.max_steps=1", "--method", "end_to_end", "--output-dir", str(run)]) == 0
    said = capsys.readouterr().out
    assert "3 recurrences per token)" in said and "noise grid" not in said
    ran = []
    run_core = RecurrentBlock.run_core
    monkeypatch.setattr(RecurrentBlock, "run_core", lambda *args: (ran.append(1), run_core(*args))[1])
    for options, recurrences in (([], 3), (["--denoise", "--steps", "5"], 5)):
        ran.clear()
        assert main(["sample", str(run / "model"), "--prompt", "a", "--max-new-tokens", "1", *options]) == 0
        assert len(ran) == recurrences


def test_the_papers_setting_stands_in_its_recipe():
    recipe = load_recipe("lm1b-huginn")
    config = recipe.config()
    assert (len(config.prelude), len(config.core), len(config.coda)) == (2, 4, 2)
    assert (config.hidden_size, config.base_config["num_attention_heads"], config.num_blocks) == (512, 8, 1)
    assert recipe.training_arguments().num_train_epochs == 15
    with pytest.raises(ValueError, match="recurrent model's walk has grid='equal_probability'"):
        recurrent_options(replace(recipe.sampling, grid="karras"))


# -- precision and attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("readout", READOUTS)
def test_checkpointing_and_eager_attention_change_nothing(readout):
    batch, results = {"input_ids": tokens()}, []
    for attention, checkpointing in (("sdpa", False), ("sdpa", True), ("eager", False)):
        model = BlockedRecurrentForCausalLM.from_base(base_lm(attention=attention), readout=readout, backprop_depth=2)
        model = perturbed(model, 0.1, 0).train()
        assert model.config._attn_implementation == attention
        if checkpointing:
            enable_checkpointing(model)
        objective = TruncatedBackpropagation(4) if readout == "clean" else RecurrentDenoising()
        objective(model, 0, batch, torch.Generator().manual_seed(0)).loss.backward()
        logits = model.eval()(tokens(), num_recurrences=3, **LAYOUTS["padded"]).logits[:, PADDED:]
        results.append((logits.detach(), *(p.grad for p in model.parameters())))
    for other in results[1:]:
        for found, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("readout", READOUTS)
@torch.no_grad()
def test_weights_in_bfloat16_give_nearly_the_same_model(readout):
    model = model_of(readout)
    half = BlockedRecurrentForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16).eval()
    found, wanted = (m(tokens(), num_recurrences=1).logits.float().softmax(-1) for m in (half, model))
    assert (found - wanted).abs().sum(-1).mean() < 0.1
    assert half.generate(tokens(), num_recurrences=3, max_new_tokens=3, min_new_tokens=3).shape == (2, LENGTH + 3)
