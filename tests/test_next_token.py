"""The objective of language models against formulas: what is predicted, the losses, distillation, held-out figures."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_diffusionblocks import DiffusionBlocksTrainer
from hf_diffusionblocks.objectives import default_objective, next_token
from hf_diffusionblocks.objectives.next_token import IGNORED, NextTokenPrediction, next_tokens, noisy_targets
from runs import arguments, reset_accelerate
from tiny import as_users_run, tiny_dit_config
from tiny_text import (
    ARCHITECTURES,
    VOCAB_SIZE,
    TokenRows,
    base_lm,
    blocked_lm,
    left_padding,
    new_lm,
    packed_positions,
    tokens,
)

READOUTS, CONTEXTS = ["clean", "exact", "edm"], ["independent", "cascade"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """The cross-entropy of the next token, as any language model's."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


# -- what each position predicts ---------------------------------------------------------------------------------


def test_each_position_predicts_the_next_token():
    ids = torch.tensor([[5, 6, 7, 8], [9, 5, 9, 5]])
    assert next_tokens({"input_ids": ids}).tolist() == [[6, 7, 8, IGNORED], [5, 9, 5, IGNORED]]


def test_nothing_is_predicted_across_documents():
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    batch = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])}
    assert next_tokens(batch).tolist() == [[6, 7, IGNORED, 9, IGNORED, IGNORED]]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([0, 0, 1, 1, 1], [IGNORED, IGNORED, 8, 9, IGNORED]),
        ([1, 1, 1, 0, 0], [6, 7, IGNORED, IGNORED, IGNORED]),
        ([1, 1, 1, 1, 1], [6, 7, 8, 9, IGNORED]),
    ],
)
def test_padding_neither_predicts_nor_is_predicted(mask, expected):
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "attention_mask": torch.tensor([mask])}
    assert next_tokens(batch).tolist() == [expected]


def test_labels_are_transformers_labels():
    """They stand at their own tokens and are shifted inside; -100 (a prompt, say) is not predicted."""
    ids = torch.tensor([[5, 6, 7, 8]])
    batch = {"input_ids": ids, "labels": torch.tensor([[IGNORED, IGNORED, 7, 8]])}
    assert next_tokens(batch).tolist() == [[IGNORED, 7, 8, IGNORED]]
    model = blocked_lm()
    theirs = model.to_base()(input_ids=ids, labels=batch["labels"]).loss
    torch.testing.assert_close(NextTokenPrediction()(model, 2, batch).loss, theirs)


# -- the clean readout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_block_of_a_cascade_has_the_bases_own_loss(architecture):
    base, model = base_lm(architecture), blocked_lm(architecture, perturbation=0.0)
    ids = tokens()
    result = NextTokenPrediction()(model, 2, {"input_ids": ids})
    torch.testing.assert_close(result.loss, base(input_ids=ids, labels=ids).loss)
    per_row = torch.stack([base(input_ids=row[None], labels=row[None]).loss for row in ids])
    torch.testing.assert_close(result.per_sample, per_row)
    assert result.sigma.numel() == 0 and result.parts == {}


@pytest.mark.parametrize("auxiliary_layers", [0, 1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_lower_block_has_the_loss_of_its_layers_then_its_auxiliary_layers(architecture, auxiliary_layers):
    model = blocked_lm(architecture, auxiliary_layers=auxiliary_layers)
    ids = tokens()
    hidden = model.clean_block(model.embed_tokens(ids), 0)
    module = model.block(0)
    if auxiliary_layers:
        assert len(module.auxiliary.layers) == auxiliary_layers
        hidden = module.auxiliary(inputs_embeds=hidden).last_hidden_state
    logits = module.norm(hidden) @ model.head_weight(0).T
    torch.testing.assert_close(NextTokenPrediction()(model, 0, {"input_ids": ids}).loss, plain_loss(logits, ids))


def test_an_independent_block_starts_from_the_embeddings_a_cascades_from_the_block_below():
    ids = tokens()
    for context in CONTEXTS:
        model = blocked_lm(context=context)
        start = model.embed_tokens(ids)
        if context == "cascade":
            start = model.clean_block(start, 0)
        logits = model.training_hidden(model.clean_block(start, 1), 1) @ model.head_weight(1).T
        result = NextTokenPrediction()(model, 1, {"input_ids": ids})
        torch.testing.assert_close(result.loss, plain_loss(logits, ids))
        result.loss.backward()
        assert all(p.grad is None for b in (0, 2) for p in model.block(b).parameters())


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("architecture", ["llama", "mistral-window"])
def test_packed_documents_give_the_losses_of_each_alone(architecture, readout):
    model = blocked_lm(architecture, readout=readout)
    ids = tokens(1, 12)
    batch = {"input_ids": ids, "position_ids": packed_positions(12, 5, batch=1)}
    noise = []

    def loss_of(batch: dict[str, Tensor], rows: slice) -> Tensor:
        """The sum of the losses, with the noise that these tokens had in the packed row."""
        result = _with_noise(model, 1, batch, noise, rows)
        return result.per_sample[0] * (next_tokens(batch) != IGNORED).sum()

    whole = loss_of(batch, slice(0, 12))
    alone = loss_of({"input_ids": ids[:, :5]}, slice(0, 5)) + loss_of({"input_ids": ids[:, 5:]}, slice(5, 12))
    torch.testing.assert_close(whole, alone)


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2-mixed-window"])
def test_padding_changes_no_loss(architecture, readout):
    model = blocked_lm(architecture, readout=readout)
    ids = tokens(1, 12)
    padded = {"input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)} | left_padding(15, 3)
    noise = []
    whole = _with_noise(model, 1, padded, noise, slice(0, 15))
    alone = _with_noise(model, 1, {"input_ids": ids}, noise, slice(3, 15))
    torch.testing.assert_close(whole.loss, alone.loss)


def _with_noise(model: Any, block: int, batch: dict[str, Tensor], kept: list, rows: slice) -> Any:
    """The objective's result; the first call keeps its noise, later ones use that of some of its positions."""
    original = next_token.noisy_targets

    def same(model: Any, block: int, labels: Tensor, table: Tensor, generator: Any) -> tuple[Tensor, Tensor]:
        if not kept:
            z, sigma = original(model, block, labels, table, generator)
            y = table[labels.clamp_min(0)] * (labels != IGNORED)[..., None]
            kept.append((z - y, sigma))
        noise, sigma = (value[:, rows] for value in kept[0])
        return table[labels.clamp_min(0)] * (labels != IGNORED)[..., None] + noise, sigma

    next_token.noisy_targets = same
    try:
        return NextTokenPrediction()(model, block, batch, generator())
    finally:
        next_token.noisy_targets = original


# -- noisy targets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 1, 2])
def test_targets_are_unit_embeddings_with_noise_of_the_blocks_range(block):
    model = blocked_lm(readout="exact", overlap=0.1)
    table = model.target_table()
    torch.testing.assert_close(table.norm(dim=-1), torch.ones(VOCAB_SIZE))
    labels = next_tokens({"input_ids": tokens(64, 32)})
    z, sigma = noisy_targets(model, block, labels, table, generator())
    low, high = model.partition.range(block, training=True)
    assert z.shape == (64, 32, 16) and sigma.shape == (64, 32)
    assert low <= sigma.min() and sigma.max() <= high and len(sigma.unique()) > 0.99 * sigma.numel()
    y = table[labels.clamp_min(0)] * (labels != IGNORED)[..., None]
    eps = (z - y) / sigma[..., None]
    # mean and variance of 32,768 standard normal draws, five standard errors
    assert abs(eps.mean()) < 5 / math.sqrt(eps.numel()) and abs(eps.var() - 1) < 5 * math.sqrt(2 / eps.numel())
    assert (y[:, -1] == 0).all()  # nothing follows the last token: its target is noise alone


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("readout", ["exact", "edm"])
def test_the_noisy_loss_is_the_cross_entropy_of_the_readout(readout, context):
    model = blocked_lm(readout=readout, context=context)
    ids = tokens()
    result = NextTokenPrediction()(model, 1, {"input_ids": ids}, generator(3))
    table = model.target_table()
    z, sigma = noisy_targets(model, 1, next_tokens({"input_ids": ids}), table, generator(3))
    features = model.two_streams(model.context_of(1, ids), z, sigma, 1, position_ids=torch.arange(ids.shape[1])[None])[
        1
    ]
    if readout == "exact":  # f + <z, e_k> / sigma^2
        logits = features @ model.head_weight(1).T + (z / sigma[..., None] ** 2) @ table.T
    else:  # exp(s) <D, e_k>, D = c_skip z + c_out F with sigma_data = 0.5
        total = sigma[..., None] ** 2 + 0.25
        denoised = 0.25 / total * z + 0.5 * sigma[..., None] / total.sqrt() * features
        logits = model.block(1).logit_scale.exp() * denoised @ table.T
    torch.testing.assert_close(result.loss, plain_loss(logits, ids), rtol=1e-4, atol=1e-5)
    assert torch.equal(result.sigma, sigma.flatten())
    # denoise() is the posterior mean of the same distribution
    denoised = model.denoise(z, sigma, block=1, input_ids=ids)
    torch.testing.assert_close(denoised, logits.softmax(-1) @ table, rtol=1e-4, atol=1e-5)


def test_only_the_papers_readout_trains_the_table_through_the_logits():
    """The exact term <z, e_k> / sigma^2 is a known function of z; z itself never carries a gradient."""
    batch = {"input_ids": tokens()}
    found = {}
    for readout in ("exact", "edm"):
        model = blocked_lm(readout=readout, context="independent")
        model.embed_tokens.requires_grad_(True)
        NextTokenPrediction()(model, 0, batch, generator()).loss.backward()
        never_read = sorted(set(range(VOCAB_SIZE)) - set(batch["input_ids"].flatten().tolist()))
        found[readout] = float(model.embed_tokens.weight.grad[never_read].abs().sum())
    assert found["exact"] == 0 and found["edm"] > 0


def test_another_draw_of_noise_gives_another_loss_the_same_draw_the_same():
    model, batch = blocked_lm(readout="exact"), {"input_ids": tokens()}
    first, again, other = (NextTokenPrediction()(model, 0, batch, generator(s)).loss for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


# -- distillation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("readout", READOUTS)
def test_the_loss_is_shared_between_the_data_and_the_teachers_distribution(readout, weight):
    model, teacher = blocked_lm(readout=readout), base_lm("qwen3", seed=5)
    batch = {"input_ids": tokens()} | left_padding(12, 0, 4)
    plain = NextTokenPrediction()(model, 0, batch, generator())
    objective = NextTokenPrediction(teacher=teacher, distillation_weight=weight)
    result = objective(model, 0, batch, generator())
    # the block's own distribution, from the pairs of features and matrices that the loss was made of
    kept = next_tokens(batch) != IGNORED
    mine = _logits_of(model, 0, batch)[kept].log_softmax(-1)
    p = teacher(**batch).logits[kept].softmax(-1)
    divergence = (p * (p.log() - mine)).sum(-1).mean()
    torch.testing.assert_close(result.loss, (1 - weight) * plain.loss + weight * divergence, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.parts["distillation_loss"], divergence.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.parts["data_loss"], plain.loss.detach())
    torch.testing.assert_close(result.per_sample, plain.per_sample)
    assert not result.parts["data_loss"].requires_grad


def _logits_of(model: Any, block: int, batch: dict[str, Tensor]) -> Tensor:
    places = {k: batch[k] for k in ("position_ids", "attention_mask")}
    hidden = model.context_of(block, batch["input_ids"], **places)
    if not model.config.two_stream:
        hidden = model.clean_block(hidden, block, **places)
        return model.training_hidden(hidden, block, **places) @ model.head_weight(block).T
    z, sigma = noisy_targets(model, block, next_tokens(batch), model.target_table(), generator())
    features = model.two_streams(hidden, z, sigma, block, **places)[1]
    return sum((x @ weight.T).float() for x, weight in model.readout(features, z, sigma, block))


@pytest.mark.parametrize("block", [0, 1, 2])
def test_the_hidden_state_is_pulled_to_the_teachers_at_the_same_depth(block):
    model, teacher, weight = blocked_lm(), base_lm(seed=5), 0.7
    batch = {"input_ids": tokens()}
    plain = NextTokenPrediction()(model, block, batch)
    result = NextTokenPrediction(teacher=teacher, hidden_weight=weight)(model, block, batch)
    if block == 2:  # the last block's output is not a hidden state but what the head reads
        torch.testing.assert_close(result.loss, plain.loss)
        assert "hidden_loss" not in result.parts
        return
    output = model.clean_block(model.context_of(block, batch["input_ids"]), block)[:, :-1]
    target = teacher(**batch, output_hidden_states=True).hidden_states[model.partition.layers(block)[-1] + 1][:, :-1]
    distance = (output - target).pow(2).sum() / target.pow(2).sum()
    torch.testing.assert_close(result.loss, plain.loss + weight * distance)
    torch.testing.assert_close(result.parts["hidden_loss"], distance.detach())


def test_a_block_of_the_base_itself_is_at_no_distance_from_it():
    model, teacher = blocked_lm(perturbation=0.0), base_lm()
    objective = NextTokenPrediction(teacher=teacher, hidden_weight=1.0, distillation_weight=0.5)
    for block in (0, 1):
        parts = objective(model, block, {"input_ids": tokens()}).parts
        assert parts["hidden_loss"] < 1e-10
    assert abs(objective(model, 2, {"input_ids": tokens()}).parts["distillation_loss"]) < 1e-6


def test_the_teacher_is_frozen_and_gets_no_gradient():
    teacher = base_lm(seed=5).train()
    objective = NextTokenPrediction(teacher=teacher, distillation_weight=0.5)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    objective(blocked_lm(), 0, {"input_ids": tokens()}).loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_the_trainer_distils_from_its_teacher(tmp_path):
    reset_accelerate()
    args = arguments(tmp_path, distillation_weight=0.5, hidden_weight=0.5, logging_steps=1)
    trainer = DiffusionBlocksTrainer(blocked_lm(), args, TokenRows(), teacher=base_lm(seed=5))
    trainer.train()
    names = {name.partition("/")[0] for entry in trainer.state.log_history for name in entry}
    assert {"data_loss", "distillation_loss", "hidden_loss"} <= names
    reset_accelerate()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distillation_weight": 1.5}, r"distillation_weight=1.5 must lie in \[0, 1\]"),
        ({"distillation_weight": float("nan")}, "distillation_weight=nan"),
        ({"hidden_weight": -1.0}, "hidden_weight=-1.0 must not be negative"),
        ({"hidden_weight": 0.5}, "without a teacher"),
        ({"distillation_weight": 0.5}, "without a teacher"),
    ],
    ids=str,
)
def test_weights_that_make_no_sense_say_so(settings, message):
    with pytest.raises(ValueError, match=message), as_users_run():
        NextTokenPrediction(**settings)


def test_the_family_chooses_the_objective():
    assert isinstance(default_objective(new_lm().config), NextTokenPrediction)
    with pytest.raises(ValueError, match="horizontal_flip=True has no meaning for blocked_causal_lm"):
        default_objective(new_lm().config, horizontal_flip=True)
    with pytest.raises(ValueError, match="hidden_weight=0.5 has no meaning"):
        default_objective(tiny_dit_config(), hidden_weight=0.5)


# -- held-out figures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("readout", READOUTS)
def test_held_out_figures_are_those_of_the_models_own_logits(readout, context):
    model, data = blocked_lm(readout=readout, context=context), TokenRows(20)
    found = NextTokenPrediction().held_out(model, data, batch_size=8)
    ids = data.columns["input_ids"]
    with torch.no_grad():
        losses = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    assert found.total == pytest.approx(float(losses.mean()), rel=1e-5)
    assert found.standard_error == pytest.approx(float(losses.std() / len(losses) ** 0.5), rel=1e-4)
    assert found.num_samples == 20 * 11 and found.edges == list(model.partition.edges)
    if readout == "clean":
        for block in range(3):
            with torch.no_grad():
                own = NextTokenPrediction()(model, block, {"input_ids": ids}).loss
            assert found.per_range[block] == pytest.approx(float(own), rel=0.02)  # batches of 8, 8 and 4 weigh the same
    few = NextTokenPrediction().held_out(model, data, max_samples=5)
    assert few.num_samples == 5 * 11 and few.total == pytest.approx(float(losses[: 5 * 11].mean()), rel=1e-5)
    assert not model.training
