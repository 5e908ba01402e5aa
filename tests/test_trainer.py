"""The trainer: one block moves at a time, a bare loop does the same, budgets, accumulation, clipping, schedules."""

import copy
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_diffusionblocks.objectives import DenoisingScoreMatching, ObjectiveResult, held_out_loss, weighted_error
from hf_diffusionblocks.serialization import same_tensors
from hf_diffusionblocks.training.data_stream import SampleOrder, derive_seed
from hf_diffusionblocks.training.trainer import block_schedule
from runs import arguments, everything, make_trainer, reset_accelerate, updates
from tiny import NUM_CLASSES, TinyImages, tiny_dit

GOLDEN = Path(__file__).parent / "golden" / "tiny_dit_losses.txt"


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()
    yield
    reset_accelerate()


# -- one block moves at a time -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_step_changes_its_own_block_and_nothing_else(tmp_path, block, mixed_precision):
    trainer = make_trainer(tmp_path, mixed_precision=mixed_precision, weight_decay=0.1, warmup_steps=2)
    for one in trainer.trainers.values():
        one.step()
        one.step()
    before = everything(trainer)
    trainer.trainers[block].step()
    after = everything(trainer)
    for key in ("shared", *({0, 1, 2} - {block})):
        assert same_tensors(after[key], before[key])
    own, old = after[block], before[block]
    moved = {name for name in own if not torch.equal(own[name], old[name])}
    for kind in ("weight", "average", "exp_avg", "exp_avg_sq", "step", "counters"):
        names = {n for n in own if n.split(" ")[0] == kind}
        assert len(names & moved) > 0.9 * len(names), kind
    assert not any(name.startswith("buffer") for name in moved)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_autocast_trains_float32_weights_to_other_values(tmp_path):
    weights = {}
    for mixed_precision in ("no", "bf16"):
        reset_accelerate()
        trainer = make_trainer(tmp_path / mixed_precision, mixed_precision=mixed_precision)
        trainer.train()
        weights[mixed_precision] = trainer.model.state_dict()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert not same_tensors(*weights.values())
    for key, value in weights["no"].items():
        assert (value - weights["bf16"][key]).abs().max() < 0.01


@pytest.mark.parametrize("loading", ["blocks=[1]", "args.blocks=[1]"])
def test_a_block_trained_alone_becomes_what_it_becomes_among_the_others(tmp_path, loading):
    together = make_trainer(tmp_path / "all", max_steps=5)
    together.train()
    if loading == "blocks=[1]":
        alone = make_trainer(tmp_path / "one", tiny_dit(3, blocks=[1]), max_steps=5)
    else:
        alone = make_trainer(tmp_path / "one", blocks=[1], max_steps=5)
        others = {k: v.clone() for k, v in alone.model.state_dict().items() if not k.startswith("blocks.1.")}
    alone.train()
    assert list(alone.trainers) == [1]
    assert same_tensors(everything(alone)[1], everything(together)[1])
    mine = [r for r in updates(tmp_path / "all") if r["block"] == 1]
    for a, b in zip(mine, updates(tmp_path / "one"), strict=True):
        assert {k: v for k, v in a.items() if k != "iteration"} == {k: v for k, v in b.items() if k != "iteration"}
    if loading != "blocks=[1]":
        assert same_tensors({k: v for k, v in alone.model.state_dict().items() if k in others}, others)


def test_the_order_of_blocks_changes_no_weight(tmp_path):
    results = []
    for number, settings in enumerate(
        [
            {"block_order": "random"},
            {"block_order": "random", "steps_per_visit": 2},
            {"block_order": "round_robin"},
            {"block_order": "sequential"},
        ]
    ):
        trainer = make_trainer(tmp_path / str(number), **settings)
        trainer.train()
        results.append((trainer.schedule, everything(trainer)))
    assert len({tuple(schedule) for schedule, _ in results}) == 4
    for _, state in results[1:]:
        assert all(same_tensors(state[key], results[0][1][key]) for key in state)


def test_the_global_random_state_neither_matters_nor_changes(tmp_path):
    results = []
    for seed in (1, 2):
        trainer = make_trainer(tmp_path / str(seed), tiny_dit(3, base_config={"dropout": 0.3}), horizontal_flip=True)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        trainer.train()
        assert torch.equal(torch.get_rng_state(), before)
        results.append(everything(trainer))
    assert all(same_tensors(results[0][key], results[1][key]) for key in results[0])


# -- against a bare loop -----------------------------------------------------------------------------------------


def test_one_block_trains_as_a_bare_loop_does_bitwise(tmp_path):
    seed, batch_size, steps, rate, warmup, label_dropout = 3, 4, 20, 2e-3, 5, 0.1
    data = TinyImages(num_samples=28)
    trainer = make_trainer(
        tmp_path,
        tiny_dit(1, 2),
        dataset=data,
        seed=seed,
        max_steps=steps,
        learning_rate=rate,
        warmup_steps=warmup,
        weight_decay=0.05,
        max_grad_norm=0.5,
        logging_steps=7,
    )
    trainer.train()

    network = tiny_dit(1, 2).train().blocks["0"]
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=True,
    )
    noise = tiny_dit(1, 2).partition.noise
    averages = [p.detach().clone() for p in parameters]
    losses, order = [], []
    for update in range(steps):
        while len(order) < (update + 1) * batch_size:
            shuffle = torch.Generator().manual_seed(derive_seed(seed, "order", 0, len(order) // len(data)))
            order += torch.randperm(len(data), generator=shuffle).tolist()
        batch = data[order[update * batch_size : (update + 1) * batch_size]]
        y, labels = batch["pixel_values"], batch["class_labels"]
        generator = torch.Generator().manual_seed(derive_seed(seed, "update", 0, update))
        q = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        sigma = noise.icdf(q).float()[:, None, None, None]
        z = y + sigma * torch.randn(y.shape, generator=generator)
        labels = torch.where(torch.rand(batch_size, generator=generator) < label_dropout, NUM_CLASSES, labels)
        total = sigma**2 + 0.5**2
        network_output = network(
            (1 / total.sqrt()) * z, timestep=(1.0 * sigma.log() / 4).flatten(), class_labels=labels
        ).sample
        denoised = (0.5**2 / total) * z + (sigma * 0.5 / total.sqrt()) * network_output
        weight = ((sigma**2 + 0.5**2) / (sigma * 0.5) ** 2).flatten()
        loss = (weight * (denoised - y).pow(2).flatten(1).mean(1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, update / warmup)
        optimizer.step()
        optimizer.zero_grad()
        decay = 1 - (1 + update / 8.0) ** -1.0 if update > 0 else 0.0
        with torch.no_grad():
            for average, parameter in zip(averages, parameters, strict=True):
                average.sub_(average - parameter, alpha=1 - decay)
        losses.append(loss.item())

    assert [row["loss"] for row in updates(tmp_path)] == losses
    assert same_tensors(trainer.model.blocks["0"].state_dict(), network.state_dict())
    for mine, theirs in zip(trainer.trainers[0].ema.shadow_params, averages, strict=True):
        assert torch.equal(mine, theirs)
    assert not same_tensors(network.state_dict(), tiny_dit(1, 2).blocks["0"].state_dict())


def test_golden_losses(tmp_path):
    from golden.regenerate import read, run

    recorded, now = read(GOLDEN), run(tmp_path)
    assert [key for key, _ in now] == [key for key, _ in recorded]
    torch.testing.assert_close(
        torch.tensor([loss for _, loss in now]), torch.tensor([loss for _, loss in recorded]), rtol=1e-4, atol=0
    )


def test_training_learns(tmp_path):
    model = tiny_dit(2, 2, perturbation=0.0)
    held_out = TinyImages(128, seed=1)
    before = held_out_loss(model, held_out)
    trainer = make_trainer(
        tmp_path, model, max_steps=100, per_device_train_batch_size=16, learning_rate=1e-2, dataset=TinyImages(256)
    )
    trainer.train()
    after = trainer.evaluate(held_out)
    assert after.total < before.total - 4 * after.standard_error
    assert after.per_range[0] < 0.85 * before.per_range[0]  # the noisiest range is the easiest to learn


# -- which block steps next --------------------------------------------------------------------------------------


@given(
    num_blocks=st.integers(1, 5),
    num_updates=st.integers(1, 40),
    steps_per_visit=st.integers(1, 12),
    order=st.sampled_from(["random", "round_robin", "sequential"]),
    seed=st.integers(0, 3),
)
def test_every_block_gets_exactly_its_budget(num_blocks, num_updates, steps_per_visit, order, seed):
    args = arguments("unused", block_order=order, steps_per_visit=steps_per_visit, seed=seed)
    blocks = list(range(1, num_blocks + 1))
    schedule = block_schedule(blocks, num_updates, args)
    assert Counter(schedule) == dict.fromkeys(blocks, num_updates)
    assert schedule == block_schedule(blocks, num_updates, args)
    if order == "sequential":
        assert schedule == sorted(schedule)
    if order == "round_robin":
        visits = math.ceil(num_updates / steps_per_visit)
        for visit in range(visits):
            length = min(steps_per_visit, num_updates - visit * steps_per_visit)
            start = visit * steps_per_visit * num_blocks
            assert schedule[start : start + length * num_blocks] == [b for b in blocks for _ in range(length)]


def test_the_random_order_follows_the_seed_and_is_no_fixed_turn():
    schedules = [block_schedule([0, 1, 2], 30, arguments("unused", seed=seed)) for seed in range(5)]
    assert len({tuple(s) for s in schedules}) == 5
    assert [0, 1, 2] * 30 not in schedules and all(sorted(s) == sorted([0, 1, 2] * 30) for s in schedules)
    # a run of one block longer than two turns would mean that it is not shuffled evenly; this seed has some repeats
    assert any(a == b for a, b in zip(schedules[0], schedules[0][1:], strict=False))


def test_epochs_are_turned_into_updates_of_each_block(tmp_path):
    trainer = make_trainer(
        tmp_path, dataset=TinyImages(22), max_steps=-1, num_train_epochs=1.5, gradient_accumulation_steps=2
    )
    assert trainer.num_updates == math.ceil(1.5 * 22 / 8) == 5
    summary = trainer.train()
    assert summary["updates_per_block"] == {0: 5, 1: 5, 2: 5} and summary["iterations"] == 15


@pytest.mark.parametrize("workers", [0, 2])
def test_every_epoch_shows_every_sample_once_in_an_order_of_its_own(tmp_path, workers):
    class Recording(TinyImages):
        def __getitem__(self, indices):
            batch = super().__getitem__(indices)
            batch["class_labels"] = batch["class_labels"] * 0
            batch["pixel_values"][:, 0, 0, 0] = torch.as_tensor(indices) / 100
            return batch

    seen: dict[int, list[int]] = {0: [], 1: []}

    def objective(model, block, batch, generator) -> ObjectiveResult:
        seen[block] += (batch["pixel_values"][:, 0, 0, 0] * 100).round().int().tolist()
        return DenoisingScoreMatching()(model, block, batch, generator)

    make_trainer(
        tmp_path,
        tiny_dit(2, 2),
        dataset=Recording(12),
        objective=objective,
        max_steps=6,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        dataloader_num_workers=workers,
    ).train()
    for block, indices in seen.items():
        epochs = [indices[:12], indices[12:]]
        assert [sorted(e) for e in epochs] == [list(range(12))] * 2 and epochs[0] != epochs[1]
        assert indices == SampleOrder(12, 0, block).indices(0, 24)
    assert seen[0] != seen[1]


# -- accumulation, clipping, checkpointing, schedules -------------------------------------------------------------


def fixed_noise(model, block: int, batch: dict[str, Tensor], generator: torch.Generator) -> ObjectiveResult:
    """An objective whose noise depends on the sample alone, so that batches can be split."""
    y = batch["pixel_values"]
    low, high = model.partition.range(block)
    share = (y.flatten(1).sum(1).abs() * 7) % 1
    sigma = low * (high / low) ** share
    seeds = [torch.Generator().manual_seed(int(s * 1e6)) for s in share]
    epsilon = torch.stack([torch.randn(y.shape[1:], generator=seed) for seed in seeds])
    z = y + sigma[:, None, None, None] * epsilon
    denoised = model.denoise(z, sigma, block=block, class_labels=batch["class_labels"])
    loss = weighted_error(denoised, y, model.preconditioning.weight(sigma))
    return ObjectiveResult(loss.mean(), sigma, loss.detach())


def test_accumulating_small_batches_equals_one_large_batch(tmp_path):
    trainers = []
    for size, count in ((16, 1), (8, 2), (2, 8)):
        trainers.append(
            make_trainer(
                tmp_path / str(count),
                objective=fixed_noise,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=count,
                adam_epsilon=1e-2,  # else Adam's first steps are the gradient's sign, and rounding may decide it
                learning_rate=0.05,
            )
        )
        trainers[-1].train()
    reference = [(r["block"], r["loss"], r["grad_norm"]) for r in updates(tmp_path / "1")]
    for count in (2, 8):
        rows = [(r["block"], r["loss"], r["grad_norm"]) for r in updates(tmp_path / str(count))]
        torch.testing.assert_close(torch.tensor(rows), torch.tensor(reference), rtol=1e-4, atol=1e-5)
    for trainer in trainers[1:]:
        for key, value in trainer.model.state_dict().items():
            torch.testing.assert_close(value, trainers[0].model.state_dict()[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_grad_norm", [1e-3, 0.0, 1e6])
def test_the_gradient_norm_of_a_block_is_clipped(tmp_path, max_grad_norm):
    trainer = make_trainer(tmp_path, max_grad_norm=max_grad_norm)
    used = []
    for one in trainer.trainers.values():
        one.optimizer.register_step_pre_hook(
            lambda *_, one=one: used.append(float(torch.nn.utils.get_total_norm([p.grad for p in one.parameters])))
        )
    trainer.train()
    reported = [row["grad_norm"] for row in updates(tmp_path)]
    assert min(reported) > 1e-2
    expected = [min(norm, max_grad_norm or math.inf) for norm in reported]
    assert used == pytest.approx(expected, rel=1e-4)


def test_checkpointing_changes_no_bit_even_with_dropout(tmp_path):
    results = {}
    for checkpointing in (False, True):
        model = tiny_dit(3, base_config={"dropout": 0.2})
        passes = []
        model.block(0).transformer_blocks[1].ff.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        trainer = make_trainer(tmp_path / str(checkpointing), model, gradient_checkpointing=checkpointing)
        trainer.train()
        results[checkpointing] = everything(trainer)
        assert len(passes) == (6 if checkpointing else 3)
    assert all(same_tensors(results[True][key], results[False][key]) for key in results[True])


@pytest.mark.parametrize("kind", ["constant_with_warmup", "linear", "cosine"])
def test_warm_up_and_decay_count_the_updates_of_each_block(tmp_path, kind):
    make_trainer(tmp_path, max_steps=8, warmup_steps=4, lr_scheduler_type=kind, learning_rate=0.01).train()
    after = {
        "constant_with_warmup": [1, 1, 1, 1],
        "linear": [1, 0.75, 0.5, 0.25],
        "cosine": [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)],
    }
    expected = [0.01 * f for f in (0, 0.25, 0.5, 0.75, *after[kind])]
    for block in range(3):
        assert [r["learning_rate"] for r in updates(tmp_path) if r["block"] == block] == pytest.approx(expected)


@pytest.mark.parametrize(
    "kind",
    [
        *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"),
        *(
            kind
            for kind in (
                "reduce_lr_on_plateau",
                "cosine_with_min_lr",
                "cosine_warmup_with_min_lr",
                "warmup_stable_decay",
                "greedy",
            )
        ),
    ],
)
def test_a_schedule_works_or_is_refused_by_the_settings(tmp_path, kind):
    try:
        settings = {"lr_scheduler_type": kind, "warmup_steps": 1}
        arguments(tmp_path, **settings)
    except ValueError:
        return
    assert make_trainer(tmp_path, **settings).train()["iterations"] == 9


def test_weight_decay_shrinks_matrices_only(tmp_path):
    trainer = make_trainer(tmp_path, weight_decay=0.5)
    for one in trainer.trainers.values():
        decayed, others = one.optimizer.param_groups
        assert decayed["weight_decay"] == 0.5 and others["weight_decay"] == 0.0
        assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim <= 1 for p in others["params"])
        assert len(decayed["params"]) + len(others["params"]) == len(one.parameters)


def test_frozen_parameters_stay(tmp_path):
    model = tiny_dit(3)
    model.block(1).pos_embed.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items() if ".1.pos_embed" in k}
    make_trainer(tmp_path, model).train()
    assert before and same_tensors({k: v for k, v in model.state_dict().items() if k in before}, before)
    model.block(2).requires_grad_(False)
    with pytest.raises(ValueError, match="block 2 has no parameter to train: all are frozen"):
        make_trainer(tmp_path, model)


def test_a_teacher_is_frozen_and_both_losses_are_logged(tmp_path):
    teacher = tiny_dit(1, 2, seed=5)
    before = copy.deepcopy(teacher.state_dict())
    make_trainer(tmp_path, teacher=teacher, distillation_weight=0.25).train()
    assert same_tensors(teacher.state_dict(), before) and not teacher.training
    for row in updates(tmp_path):
        assert row["loss"] == pytest.approx(0.75 * row["data_loss"] + 0.25 * row["distillation_loss"], rel=1e-5)
