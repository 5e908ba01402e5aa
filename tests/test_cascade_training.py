"""Training language models block by block: who moves in a step, in which order, and on what the upper blocks build."""

import contextlib
import copy
import signal
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

from devices import ON_CPU
from hf_diffusionblocks import BlockedForCausalLM, DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments
from hf_diffusionblocks.objectives.next_token import NextTokenPrediction
from hf_diffusionblocks.serialization import same_tensors
from hf_diffusionblocks.training.checkpoint import find_checkpoints
from hf_diffusionblocks.training.data_stream import fetch
from hf_diffusionblocks.training.trainer import NonFiniteLossError
from runs import everything, make_trainer, reset_accelerate, updates
from test_resume import At, assert_same_run
from tiny_text import ARCHITECTURES, TokenRows, base_lm, blocked_lm, new_lm, tokens

READOUTS, CONTEXTS = ["clean", "exact", "edm"], ["independent", "cascade"]
SHARED = "embed_tokens.weight"


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()
    yield
    reset_accelerate()


def text_trainer(directory: Any, model: BlockedForCausalLM | None = None, **settings: Any) -> DiffusionBlocksTrainer:
    """A trainer of a tiny language model on rows of tokens; see :func:`runs.make_trainer`."""
    settings = {"dataset": TokenRows(), "learning_rate": 1e-2} | settings
    return make_trainer(directory, new_lm() if model is None else model, **settings)


def weights(model: BlockedForCausalLM, block: int) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.block_parameters(block)}


# -- a step stays in its block -----------------------------------------------------------------------------------


@pytest.mark.parametrize("train_shared", ["first", "all", "none"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("readout", READOUTS)
def test_a_step_leaves_every_other_block_as_it_was_bit_for_bit(tmp_path, readout, context, train_shared):
    model = blocked_lm("llama-tied-biases", readout=readout, context=context)
    trainer = text_trainer(tmp_path, model, train_shared=train_shared, order="simultaneous")
    for one in trainer.trainers.values():  # moments and averages that are not zero
        one.step()
    for block in range(3):
        before = everything(trainer)
        trainer.trainers[block].step()
        after = everything(trainer)
        for other in set(range(3)) - {block}:
            # With train_shared="all" the embeddings are in every block's optimizer; their average is each block's own.
            assert same_tensors(before[other], after[other]), (block, other)
        assert not same_tensors(before[block], after[block])
        moves = train_shared == "all" or (train_shared == "first" and block == 0)
        assert same_tensors(before["shared"], after["shared"]) is not moves
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("readout", READOUTS)
def test_another_blocks_step_leaves_no_gradient_in_what_the_blocks_share(tmp_path, readout):
    """Independent blocks read the embeddings; their gradients must not pile up until block 0 steps."""
    settings = {"readout": readout, "context": "independent"}
    alone = text_trainer(tmp_path / "a", blocked_lm(**settings), order="simultaneous")
    beside = text_trainer(tmp_path / "b", blocked_lm(**settings), order="simultaneous")
    for _ in range(2):
        beside.trainers[1].step()
        assert beside.model.embed_tokens.weight.grad is None
        assert beside.model.embed_tokens.weight.requires_grad
        for trainer in (alone, beside):
            trainer.trainers[0].step()
    assert same_tensors(everything(alone)[0], everything(beside)[0])
    assert same_tensors(everything(alone)["shared"], everything(beside)["shared"])


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_job_per_block_equals_all_blocks_in_one_process(tmp_path, architecture, readout):
    settings = {"readout": readout, "context": "independent", "auxiliary_layers": 0}
    new_lm(architecture, **settings).save_pretrained(tmp_path / "start")
    load = BlockedForCausalLM.from_pretrained
    given = {"train_shared": "none", "gradient_accumulation_steps": 2, "warmup_steps": 1}
    together = text_trainer(tmp_path / "all", load(tmp_path / "start"), **given)
    together.train()
    expected = everything(together)
    for block in range(3):
        job = text_trainer(tmp_path / f"{block}", load(tmp_path / "start", blocks=[block]), **given)
        assert job.model.resident_blocks == (block,)
        job.train()
        assert same_tensors(everything(job)[block], expected[block])
        assert same_tensors(everything(job)["shared"], expected["shared"])
        mine = [(row["update"], row["loss"]) for row in updates(tmp_path / f"{block}")]
        assert mine == [(r["update"], r["loss"]) for r in updates(tmp_path / "all") if r["block"] == block]


def test_the_averaged_weights_leave_no_trace_in_what_several_blocks_train(tmp_path):
    trainer = text_trainer(tmp_path, blocked_lm(context="independent"), train_shared="all")
    trainer.train()
    before = everything(trainer)
    with trainer.averaged_weights():
        average = trainer.trainers[2].ema_tensors()[SHARED]
        assert torch.equal(trainer.model.embed_tokens.weight, average)
        assert not torch.equal(average, before["shared"][SHARED])
    after = everything(trainer)
    assert all(same_tensors(before[key], after[key]) for key in before)


# -- block after block -------------------------------------------------------------------------------------------


class Watch(At):
    """Keeps a copy of block 0's weights before the first and after the last update of block 1."""

    def __init__(self, updates: int):
        super().__init__()
        self.updates, self.kept = updates, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.kept[state.global_step] = weights(kwargs["model"], 0)


@pytest.mark.parametrize("use_ema", [True, False])
def test_sequential_order_builds_on_the_weights_that_will_be_saved(tmp_path, use_ema):
    watch = Watch(3)
    trainer = text_trainer(tmp_path, callbacks=[watch], use_ema=use_ema)
    assert trainer.sequential and trainer.schedule == [0] * 3 + [1] * 3 + [2] * 3
    trainer.train()
    kept = watch.kept
    # Block 0 changes with its own updates, jumps to its average before block 1's first, and then never again.
    assert not same_tensors(kept[1], kept[2])
    assert same_tensors(kept[3], kept[4]) is not use_ema
    assert all(same_tensors(kept[4], kept[step]) for step in range(5, 10))
    if use_ema:
        average = {n: v for n, v in trainer.trainers[0].ema_tensors().items() if n != SHARED}
        assert same_tensors(average, kept[4])
    saved = BlockedForCausalLM.from_pretrained(trainer.save_model())
    assert same_tensors(weights(saved, 0), kept[4])
    assert saved.config.trained_blocks == [0, 1, 2]


@pytest.mark.parametrize("settings", [{}, {"hand_over": True}, {"lower_outputs": "disk"}, {"use_ema": False}], ids=str)
def test_a_chain_of_jobs_equals_one_sequential_run(tmp_path, settings):
    """Each job loads what the one before saved: the same blocks, moments and averages, bit for bit."""
    new_lm().save_pretrained(tmp_path / "model-0")
    load = BlockedForCausalLM.from_pretrained
    whole = text_trainer(tmp_path / "whole", load(tmp_path / "model-0"), **settings)
    whole.train()
    expected = everything(whole)
    for block in range(3):
        model = load(tmp_path / f"model-{block}")
        job = text_trainer(tmp_path / f"job-{block}", model, blocks=[block], **settings)
        job.train()
        with job.averaged_weights() if block < 2 else contextlib.nullcontext():  # as block 1 finds block 0
            assert same_tensors(everything(job)[block], expected[block])
        job.save_model(tmp_path / f"model-{block + 1}")
    for block in range(3):
        mine = [row["loss"] for row in updates(tmp_path / f"job-{block}")]
        assert mine == [row["loss"] for row in updates(tmp_path / "whole") if row["block"] == block]
    saved, chained = load(whole.save_model()), load(tmp_path / "model-3")
    assert same_tensors(saved.state_dict(), chained.state_dict())
    assert chained.config.trained_blocks == [0, 1, 2]


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_a_cascade_learns(tmp_path, order):
    data = TokenRows(256)
    trainer = text_trainer(
        tmp_path, dataset=data, eval_dataset=TokenRows(64, seed=1), order=order, max_steps=60,
        per_device_train_batch_size=16, ema_max_decay=0.9,
    )  # fmt: skip
    untrained = trainer.evaluate()
    trainer.train()
    trained = trainer.evaluate()
    # uniform over 37 tokens: 3.61 nats; the rule's entropy: H(0.8) + 0.2 ln 37 = 1.2 nats, about
    assert abs(untrained.total - 3.69) < 0.1 and trained.total < 2.3
    assert all(loss < 2.4 for loss in trained.per_range)


def test_begin_block_starts_from_the_block_below():
    model = blocked_lm(pretrained=False, auxiliary_layers=2, num_layers=9)
    before = weights(model, 1)
    model.begin_block(1)
    after, below = weights(model, 1), weights(model, 0)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"blocks.1.norm.weight", "blocks.1.lm_head.weight"}
    assert all(torch.equal(after[name], below[name.replace("s.1.", "s.0.")]) for name in changed)
    model.begin_block(1, hand_over=True)
    handed = weights(model, 1)
    taken = {n for n in handed if not torch.equal(handed[n], after[n])}
    # two auxiliary layers become the first two of block 1's three layers
    assert taken == {n for n in handed if n.startswith(("blocks.1.model.layers.0.", "blocks.1.model.layers.1."))}
    for name in taken:
        assert torch.equal(handed[name], below[name.replace("s.1.model", "s.0.auxiliary")])
    assert same_tensors(weights(model, 0), below)


@pytest.mark.parametrize("settings", [{"pretrained": True}, {"pretrained": False, "context": "independent"}], ids=str)
def test_begin_block_leaves_a_trained_base_and_independent_blocks_alone(settings):
    model = blocked_lm(**settings)
    before = copy.deepcopy(model.state_dict())
    for block in range(3):
        model.begin_block(block, hand_over=True)
    assert same_tensors(before, model.state_dict())


def test_a_new_upper_block_starts_as_the_identity():
    model = new_lm()
    hidden = torch.randn(2, 12, model.config.hidden_size)
    assert not torch.equal(model.clean_block(hidden, 0), hidden)
    for block in (1, 2):
        assert torch.equal(model.clean_block(hidden, block), hidden)
    # and the auxiliary layers change nothing yet: block 0's loss starts at that of its own output
    assert torch.equal(model.training_hidden(hidden, 0), model.block(0).norm(hidden))
    # so block 1 starts where block 0 ended: the same loss, up to block 0's auxiliary layers
    model.begin_block(1)
    batch = {"input_ids": tokens()}
    first, second = (NextTokenPrediction()(model, block, batch).loss for block in (0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_block_of_a_job_is_built_on_the_base_it_was_cut_from(tmp_path):
    """A pretrained cascade may train any block alone: what lies below is the base's."""
    model = blocked_lm()
    before = {block: weights(model, block) for block in range(3)}
    trainer = text_trainer(tmp_path, model, blocks=[2])
    trainer.train()
    assert same_tensors(weights(model, 0), before[0]) and same_tensors(weights(model, 1), before[1])
    assert not same_tensors(weights(model, 2), before[2])
    with torch.no_grad():
        hidden = model.context_of(2, tokens())
        expected = model.clean_block(model.clean_block(model.embed_tokens(tokens()), 0), 1)
    assert torch.equal(hidden, expected) and not hidden.requires_grad


# -- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"lower_outputs": "disk", "hand_over": True}], ids=str)
@pytest.mark.parametrize("iteration", [1, 3, 4, 6, 8])
def test_a_stopped_sequential_run_goes_on_to_the_same_bits(tmp_path, iteration, settings):
    """At a block's last update (3, 6) nothing of the next block has begun yet."""
    settings = {"warmup_steps": 1, "lr_scheduler_type": "linear"} | settings
    whole = text_trainer(tmp_path / "whole", **settings)
    whole.train()
    stop = At(**{f"i{iteration}": lambda: signal.raise_signal(signal.SIGTERM)})
    stopped = text_trainer(tmp_path / "stopped", callbacks=[stop], **settings)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    other = text_trainer(tmp_path / "stopped", **settings)
    other.train(resume_from_checkpoint=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    assert all(same_tensors(everything(other)[b], everything(whole)[b]) for b in range(3))


@pytest.mark.parametrize("settings", [{}, {"lower_outputs": "disk"}], ids=str)
def test_the_same_trainer_may_go_back_to_where_a_block_began(tmp_path, settings):
    trainer = text_trainer(tmp_path, save_steps=1, save_total_limit=None, **settings)
    trainer.train()
    expected = everything(trainer)
    assert len(find_checkpoints(tmp_path)) == 9
    for iteration in (7, 6, 3, 4):
        trainer.train(resume_from_checkpoint=tmp_path / f"checkpoint-{iteration}")
        found = everything(trainer)
        assert all(same_tensors(found[key], expected[key]) for key in expected), iteration


# -- precision, accumulation, compilation ------------------------------------------------------------------------


def test_accumulation_gives_the_gradient_of_the_large_batch(tmp_path):
    """Rows of one length: the mean over two halves is the mean over all."""
    found = []
    for name, settings in (("a", {"per_device_train_batch_size": 8}), ("b", {"gradient_accumulation_steps": 2})):
        trainer = text_trainer(tmp_path / name, max_steps=1, max_grad_norm=0.0, use_ema=False, **settings)
        trainer.train()
        found.append((everything(trainer), updates(tmp_path / name)))
    (a, first), (b, second) = found
    for one, other in zip(first, second, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    # the first moments are 0.1 times the gradients; the weights' signs of tiny gradients may differ
    for block in range(3):
        for name in a[block]:
            if name.startswith("exp_avg "):
                torch.testing.assert_close(a[block][name], b[block][name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("readout", READOUTS)
def test_bf16_keeps_float32_weights_and_nearly_the_same_losses(tmp_path, readout, context):
    losses = []
    for precision in ("no", "bf16"):
        model = blocked_lm(readout=readout, context=context)
        trainer = text_trainer(tmp_path / precision, model, mixed_precision=precision, learning_rate=1e-3)
        trainer.train()
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert all(v.dtype == torch.float32 for v in trainer.trainers[0].ema_tensors().values())
        losses.append([row["loss"] for row in updates(tmp_path / precision)])
    assert losses[0] != losses[1]  # it did run in another precision
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("readout", READOUTS)
def test_checkpointing_changes_no_bit(tmp_path, readout, context):
    found = []
    for on in (False, True):
        model = blocked_lm(readout=readout, context=context)
        trainer = text_trainer(tmp_path / str(on), model, gradient_checkpointing=on, max_steps=2)
        trainer.train()
        found.append(everything(trainer))
    assert all(same_tensors(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("readout", ["clean", "exact"])
def test_a_compiled_block_trains_as_one_that_is_not(tmp_path, monkeypatch, readout):
    compiled, original = [], torch.nn.Module.compile

    def watched(module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        compiled.append(type(module).__name__)
        original(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", watched)
    losses = []
    for on in (False, True):
        model = blocked_lm(readout=readout)
        trainer = text_trainer(tmp_path / str(on), model, torch_compile=on, max_steps=2, learning_rate=1e-3)
        trainer.train()
        losses.append(torch.tensor([row["loss"] for row in updates(tmp_path / str(on))]))
        if on:  # the state dict's names stay, and every layer runs its compiled form
            assert model.state_dict().keys() == blocked_lm(readout=readout).state_dict().keys()
            assert len(compiled) == (8 if readout == "clean" else 6)  # two of them auxiliary
            layers = [layer for block in range(3) for layer in model.block(block).model.layers]
            parts = layers if readout == "clean" else [layer.mlp for layer in layers]
            assert all(part._compiled_call_impl is not None for part in parts)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains(tmp_path, architecture):
    trainer = text_trainer(tmp_path, new_lm(architecture), max_steps=2, eval_dataset=TokenRows(8, seed=1))
    summary = trainer.train()
    assert summary["updates_per_block"] == {0: 2, 1: 2, 2: 2}
    loaded = BlockedForCausalLM.from_pretrained(trainer.save_model())
    ids = tokens()
    with trainer.averaged_weights(), torch.no_grad():
        trainer.model.eval()
        expected = trainer.model(ids).logits
    assert torch.equal(loaded.eval()(ids).logits, expected)


# -- jobs that cannot be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"context": "independent"}, {"blocks": [1], "train_shared": "all"}, r"train_shared='all'.*blocks \[1\] of 3"),
        ({"context": "independent"}, {"blocks": [0, 2]}, r"train_shared='first'.*Use train_shared='none'"),
        ({"context": "independent"}, {"lower_outputs": "disk"}, "lower_outputs='disk' is for a cascade"),
        ({}, {"lower_outputs": "disk", "order": "simultaneous"}, "needs order='sequential'"),
        ({}, {"blocks": [1]}, r"block 1 of a cascade.*\[0\] have not been trained.*blocks=\[0, 1\]"),
        ({}, {"blocks": [0, 2]}, r"block 2 of a cascade.*\[1\] have not been trained.*blocks=\[1, 2\]"),
        ({"trained_blocks": [0]}, {"blocks": [2]}, r"\[1\] have not been trained"),
        ({}, {"blocks": [0], "train_shared": "all"}, "the token embeddings would change"),
    ],
    ids=str,
)
def test_a_job_that_cannot_train_says_why(tmp_path, model, settings, message):
    with pytest.raises(ValueError, match=message):
        text_trainer(tmp_path, new_lm(**model), **settings)
    assert not list(Path(tmp_path).rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({"context": "independent"}, {"blocks": [1]}),
        ({"context": "independent"}, {"blocks": [0], "train_shared": "none"}),
        ({"trained_blocks": [0, 1]}, {"blocks": [2]}),
        ({"trained_blocks": [0]}, {"blocks": [1, 2]}),
        ({}, {"blocks": [0]}),
        ({}, {"order": "simultaneous", "train_shared": "all"}),
    ],
    ids=str,
)
def test_a_job_that_can_train_does(tmp_path, model, settings):
    trainer = text_trainer(tmp_path, new_lm(**model), max_steps=1, **settings)
    trainer.train()
    assert set(trainer.save_model().glob("block-*.safetensors"))


# -- what the trainer says ---------------------------------------------------------------------------------------


def test_blocks_are_marked_as_trained_when_training_ends(tmp_path):
    trainer = text_trainer(tmp_path, blocks=[0], train_shared="none")
    trainer.train()
    assert trainer.model.config.trained_blocks == [0]
    text_trainer(tmp_path / "next", trainer.model, blocks=[1])  # without a detour over a directory


def test_handing_over_needs_an_order(tmp_path):
    with pytest.raises(ValueError, match="hand_over=True needs order='sequential'"):
        text_trainer(tmp_path, hand_over=True, order="simultaneous")


@pytest.mark.parametrize("indexed", ["one by one", "datasets", "datasets as torch"])
@pytest.mark.parametrize("lengths", [(12, 9, 12), (12, 12, 12)])
def test_rows_are_lists_or_tensors_of_one_length(tmp_path, indexed, lengths):
    rows = [list(range(3, 3 + n)) for n in lengths]
    if indexed == "one by one":
        data = [{"input_ids": row} for row in rows]
    else:
        data = datasets.Dataset.from_dict({"input_ids": rows})
        data = data.with_format("torch") if indexed == "datasets as torch" else data
    if len(set(lengths)) == 1:
        trainer = text_trainer(tmp_path, dataset=data)
        trainer.train()
        assert fetch(data, [2, 0])["input_ids"].tolist() == [rows[2], rows[0]]
        return
    message = f"training data set .*rows of 'input_ids' have lengths {', '.join(map(str, lengths))}: .*load_text"
    with pytest.raises(ValueError, match=message):
        text_trainer(tmp_path, dataset=data)


def test_a_learning_rate_that_explodes_is_named_without_noise_levels(tmp_path):
    """A clean readout draws none."""
    trainer = text_trainer(tmp_path, learning_rate=1e30, warmup_steps=0, max_steps=4)
    with pytest.raises(
        NonFiniteLossError, match=r"the loss of block 0 became .* \(iteration \d\)\. .*Lower the learning"
    ):
        trainer.train()


def test_a_model_without_blocks_is_refused(tmp_path):
    args = DiffusionBlocksTrainingArguments(output_dir=str(tmp_path), cpu=ON_CPU)
    with pytest.raises(ValueError, match=r"a LlamaForCausalLM has no blocks: cut it with .*from_base"):
        DiffusionBlocksTrainer(base_lm(), args, TokenRows(8))


def test_an_ordinary_checkpoint_is_not_called_damaged(tmp_path):
    base_lm().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not cut into blocks: cut it with from_base"):
        BlockedForCausalLM.from_pretrained(tmp_path)
