"""The trainer: one block moves at a time, budgets, schedules, averages, logs, and what it refuses."""

import copy
import json
import math
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import TrainerCallback

from hf_diffusionblocks import BlockedDiTModel, DiffusionBlocksTrainer
from hf_diffusionblocks.objectives import DenoisingScoreMatching, ObjectiveResult, held_out_loss, weighted_error
from hf_diffusionblocks.serialization import same_tensors
from hf_diffusionblocks.training.checkpoint import find_checkpoints
from hf_diffusionblocks.training.data_stream import SampleOrder, derive_seed
from hf_diffusionblocks.training.run_files import overwrite_run
from hf_diffusionblocks.training.trainer import NonFiniteLossError, block_schedule
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


# -- averages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inv_gamma, power, highest", [(8.0, 1.0, 0.9999), (1.0, 2 / 3, 0.9999), (8.0, 1.0, 0.4)])
def test_the_average_follows_the_ramp_of_its_decay(tmp_path, inv_gamma, power, highest):
    trainer = make_trainer(
        tmp_path, tiny_dit(1, 1), ema_inv_gamma=inv_gamma, ema_power=power, ema_max_decay=highest, learning_rate=0.05
    )
    one = trainer.trainers[0]
    average: list[Tensor] = []
    for update in range(12):
        one.step()
        current = [p.detach().double() for p in one.parameters]
        decay = min(highest, 1 - (1 + update / inv_gamma) ** -power)
        old = current if update == 0 else average
        average = [decay * a + (1 - decay) * c for a, c in zip(old, current, strict=True)]
    for mine, expected in zip(one.ema.shadow_params, average, strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-6)
    assert any((a - c).abs().max() > 0.01 for a, c in zip(average, current, strict=True))


def test_averaged_weights_are_put_in_place_and_taken_back_exactly(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=0.05)
    trainer.train()
    trained = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    averages = {n: v.clone() for one in trainer.trainers.values() for n, v in one.ema_tensors().items()}
    assert averages.keys() == trained.keys() and not same_tensors(averages, trained)
    with trainer.averaged_weights():
        assert same_tensors(trainer.model.state_dict(), averages)
    assert same_tensors(trainer.model.state_dict(), trained)
    with pytest.raises(RuntimeError, match="inside"), trainer.averaged_weights():
        raise RuntimeError("inside")
    assert same_tensors(trainer.model.state_dict(), trained)
    path = trainer.save_model()
    assert path == tmp_path / "model"
    assert same_tensors(BlockedDiTModel.from_pretrained(path).state_dict(), averages)
    assert same_tensors(trainer.model.state_dict(), trained)


def test_without_an_average_the_trained_weights_are_saved(tmp_path):
    trainer = make_trainer(tmp_path, use_ema=False)
    trainer.train()
    path = trainer.save_model(tmp_path / "elsewhere")
    assert same_tensors(BlockedDiTModel.from_pretrained(path).state_dict(), trainer.model.state_dict())


def test_held_out_figures_are_those_of_the_averaged_weights(tmp_path):
    data = TinyImages(32, seed=1)
    trainer = make_trainer(tmp_path, eval_dataset=data, eval_steps=4, learning_rate=0.05, eval_samples=16)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [4, 8, 9]
    with trainer.averaged_weights():
        expected = held_out_loss(trainer.model, data, max_samples=16, seed=0)
    assert rows[-1]["eval_loss"] == expected.total
    assert [rows[-1][f"eval_loss/block_{b}"] for b in range(3)] == expected.per_range
    assert expected.total != held_out_loss(trainer.model, data, max_samples=16, seed=0).total
    assert trainer.model.training
    with pytest.raises(ValueError, match="no held-out data"):
        make_trainer(tmp_path).evaluate()


# -- logs, trackers, callbacks -----------------------------------------------------------------------------------


def test_every_update_is_logged_once(tmp_path):
    summary = make_trainer(tmp_path, logging_steps=4).train()
    rows = updates(tmp_path)
    assert [row["iteration"] for row in rows] == list(range(1, 10))
    for block in range(3):
        assert [row["update"] for row in rows if row["block"] == block] == [1, 2, 3]
        losses = [row["loss"] for row in rows if row["block"] == block]
        assert summary["last_losses"][block] == pytest.approx(sum(losses) / 3)
    assert summary["iterations"] == 9 and summary["updates_per_block"] == {0: 3, 1: 3, 2: 3}
    assert summary["training_seconds"] > 0


def test_tensorboard_gets_the_means_of_each_block(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(
        tmp_path, report_to="tensorboard", logging_steps=9, eval_dataset=TinyImages(16), block_order="sequential"
    )
    trainer.train()
    (directory,) = {p.parent for p in tmp_path.rglob("events.out.tfevents.*") if "loss/block_0" in tags_of(p.parent)}
    events = EventAccumulator(str(directory)).Reload()
    for block in range(3):
        (event,) = events.Scalars(f"loss/block_{block}")
        rows = [row["loss"] for row in updates(tmp_path) if row["block"] == block]
        assert event.step == 9 and event.value == pytest.approx(sum(rows) / 3)
    assert events.Scalars("eval_loss")[0].value > 0


def tags_of(directory: Path) -> list[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(directory)).Reload().Tags()["scalars"]


class Recorder(TrainerCallback):
    """Writes down the events that it gets, and acts at some iterations."""

    def __init__(self, **acts: int):
        self.events: list[str] = []
        self.acts = acts

    def note(self, name: str, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        assert isinstance(kwargs["model"], BlockedDiTModel) and isinstance(kwargs["trainer"], DiffusionBlocksTrainer)
        self.events.append(f"{name}@{state.global_step}")
        for act, iteration in self.acts.items():
            if name == "on_step_end" and state.global_step == iteration:
                setattr(control, act, True)

    def on_train_begin(self, args, state, control, **kwargs):
        self.note("on_train_begin", args, state, control, kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        self.note("on_step_end", args, state, control, kwargs)

    def on_log(self, args, state, control, **kwargs):
        assert any(name.startswith("loss/block_") for name in kwargs["logs"])
        self.note("on_log", args, state, control, kwargs)

    def on_evaluate(self, args, state, control, **kwargs):
        assert kwargs["metrics"]["eval_loss"] > 0
        self.note("on_evaluate", args, state, control, kwargs)

    def on_save(self, args, state, control, **kwargs):
        assert (Path(args.output_dir) / f"checkpoint-{state.global_step}").is_dir()
        self.note("on_save", args, state, control, kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        self.note("on_train_end", args, state, control, kwargs)


def test_callbacks_are_called_in_order(tmp_path):
    recorder = Recorder()
    make_trainer(
        tmp_path, callbacks=[recorder], max_steps=1, logging_steps=2, save_steps=2, eval_dataset=TinyImages(8)
    ).train()
    assert recorder.events == [
        "on_train_begin@0",
        "on_step_end@1",
        "on_step_end@2",
        "on_log@2",
        "on_save@2",
        "on_step_end@3",
        "on_log@3",
        "on_save@3",
        "on_evaluate@3",
        "on_train_end@3",
    ]


def test_callbacks_can_save_evaluate_and_stop(tmp_path):
    recorder = Recorder(should_save=2, should_evaluate=3, should_training_stop=5)
    summary = make_trainer(tmp_path, callbacks=[recorder], eval_dataset=TinyImages(8)).train()
    assert summary["iterations"] == 5
    assert {"on_save@2", "on_evaluate@3", "on_save@5"} <= set(recorder.events)
    assert [p.name for p in find_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-5"]


# -- what goes wrong ---------------------------------------------------------------------------------------------


class Spoiled(DenoisingScoreMatching):
    """Spoils one update of one block."""

    def __init__(self, block: int, update: int, how: str):
        super().__init__()
        self.block, self.update, self.how = block, update, how
        self.count = 0

    def __call__(self, model, block, batch, generator=None):
        result = super().__call__(model, block, batch, generator)
        self.count += block == self.block
        if block == self.block and self.count == self.update:
            if self.how == "gradient":
                parameter = next(p for _, p in model.block_parameters(block))
                result.loss = result.loss + (parameter * 0).abs().sqrt().sum()  # finite, with an infinite slope
            else:
                result.loss = result.loss * float(self.how)
        return result


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path, how, max_grad_norm):
    trainer = make_trainer(
        tmp_path,
        objective=Spoiled(block=1, update=3, how=how),
        block_order="round_robin",
        max_steps=6,
        save_steps=3,
        save_total_limit=None,
        max_grad_norm=max_grad_norm,
    )
    low, high = trainer.model.partition.range(1, training=True)
    with pytest.raises(NonFiniteLossError, match=r"block 1 .* in its update 3 \(iteration 8\)") as caught:
        trainer.train()
    message = str(caught.value)
    noise = [float(word.rstrip(".")) for word in message.split("from ")[1].split(". ")[0].split(" to ")]
    assert low * 0.99 <= noise[0] <= noise[1] <= high * 1.01
    assert f"{tmp_path / 'checkpoint-6'}" in message
    assert [p.name for p in find_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-6"]
    assert all(math.isfinite(row["loss"]) for row in updates(tmp_path))
    # the last checkpoint is good: a run without the fault goes on from it
    resumed = make_trainer(
        tmp_path, block_order="round_robin", max_steps=6, save_steps=3, max_grad_norm=max_grad_norm
    ).train(resume_from_checkpoint=True)
    assert resumed["iterations"] == 18 and all(math.isfinite(row["loss"]) for row in updates(tmp_path))


def test_before_the_first_checkpoint_the_message_says_that_there_is_none(tmp_path):
    with pytest.raises(NonFiniteLossError, match="The last good checkpoint is none yet"):
        make_trainer(tmp_path, objective=Spoiled(0, 1, "nan")).train()
    assert find_checkpoints(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_named(tmp_path, value):
    data = TinyImages(8)
    data.pixel_values[5, 0, 3, 3] = value
    with pytest.raises(ValueError, match="1 of 4 samples in a batch have non-finite pixel_values"):
        make_trainer(tmp_path, dataset=data).train()
    assert find_checkpoints(tmp_path) == []


class Columns:
    """A data set of other columns."""

    def __init__(self, **columns: Tensor):
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, indices: list[int]) -> dict[str, Tensor]:
        return {name: value[indices] for name, value in self.columns.items()}


IMAGES, LABELS = torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.long)


@pytest.mark.parametrize(
    "dataset, message",
    [
        (TinyImages(0), "is empty"),
        (Columns(image=IMAGES, label=LABELS), r"holds \['image', 'label'\]; the trainer needs 'pixel_values'"),
        (Columns(pixel_values=IMAGES), r"holds \['pixel_values'\]"),
        (torch.utils.data.TensorDataset(IMAGES, LABELS), "holds (tuple|list)"),
        (TinyImages(size=10), r"does not fit the model: the input has shape \[4, 1, 10, 10\]"),
        (TinyImages(channels=3), r"does not fit the model: the input has shape \[4, 3, 8, 8\]"),
        (Columns(pixel_values=IMAGES, class_labels=LABELS + 11), "class_labels run from 11 to 11"),
        (Columns(pixel_values=IMAGES, class_labels=LABELS - 1), "class_labels run from -1 to -1"),
        (Columns(pixel_values=IMAGES, class_labels=LABELS.float()), "give whole numbers"),
        (Columns(pixel_values=IMAGES.flatten(1), class_labels=LABELS), r"the input has shape \[4, 64\]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("role", ["training", "held-out"])
def test_data_that_does_not_fit_is_refused_before_any_work(tmp_path, dataset, message, role):
    data = {"dataset": dataset} if role == "training" else {"eval_dataset": dataset}
    with pytest.raises(ValueError, match=f"the {role} data set .*{message}"):
        make_trainer(tmp_path / "run", **data)
    assert not (tmp_path / "run").exists()


def test_a_label_out_of_range_anywhere_stops_the_run(tmp_path):
    data = TinyImages(16)
    data.class_labels[9] = 11
    with pytest.raises(ValueError, match="class_labels run from .* to 11; allowed are 0 to 9, and 10 for no class"):
        make_trainer(tmp_path, dataset=data, max_steps=4).train()


def test_a_data_set_that_knows_single_samples_only_is_collated(tmp_path):
    class Single(torch.utils.data.Dataset):
        data = TinyImages(16)

        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            if not isinstance(index, int):
                raise TypeError("one at a time")
            return {"pixel_values": self.data.pixel_values[index], "class_labels": self.data.class_labels[index]}

    single = make_trainer(tmp_path / "a", dataset=Single())
    batched = make_trainer(tmp_path / "b", dataset=TinyImages(16))
    single.train()
    batched.train()
    assert same_tensors(single.model.state_dict(), batched.model.state_dict())


def test_worker_processes_change_nothing(tmp_path):
    trainers = []
    for workers in (0, 1):
        trainers.append(make_trainer(tmp_path / str(workers), dataloader_num_workers=workers))
        trainers[-1].train()
    assert all(same_tensors(everything(trainers[0])[b], everything(trainers[1])[b]) for b in range(3))


@pytest.mark.parametrize("blocks, message", [([3], "block 3 does not exist"), ([0], "block 0 is not loaded")])
def test_blocks_that_cannot_be_trained(tmp_path, blocks, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny_dit(3, blocks=[1, 2]), blocks=blocks)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"2 processes were launched; this trainer runs in one.*blocks=\[b\]"):
        make_trainer(tmp_path)


def test_a_run_in_another_thread_is_the_same_run(tmp_path):
    trainers = [make_trainer(tmp_path / name) for name in "ab"]
    thread = threading.Thread(target=trainers[0].train)
    thread.start()
    thread.join()
    trainers[1].train()
    assert all(same_tensors(everything(trainers[0])[b], everything(trainers[1])[b]) for b in range(3))


def test_training_no_block_is_refused(tmp_path):
    with pytest.raises(ValueError, match="blocks"):
        make_trainer(tmp_path, blocks=[]).train()


def test_runs_of_other_precisions_follow_each_other_in_one_process(tmp_path):
    make_trainer(tmp_path / "a").train()
    make_trainer(tmp_path / "b", mixed_precision="bf16").train()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_steps": 0}, "max_steps=0 must be at least 1"),
        ({"max_steps": -1, "num_train_epochs": 0.0}, "num_train_epochs=0.0 must be positive"),
        ({"max_steps": -1, "num_train_epochs": float("inf")}, "num_train_epochs=inf must be positive"),
        ({"block_order": "randm"}, "unknown block_order 'randm': did you mean 'random'"),
        ({"steps_per_visit": 0}, "steps_per_visit=0 must be a whole number of at least 1"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size=2.5 must be a whole number"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps=True must be a whole number"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a positive number"),
        ({"learning_rate": "1e-4"}, "learning_rate='1e-4' must be a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a positive number"),
        ({"lr_scheduler_type": "cosin"}, "unknown lr_scheduler_type 'cosin': did you mean 'cosine'"),
        ({"mixed_precision": "fp16"}, "unknown mixed_precision 'fp16'.*Allowed: bf16, no"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must not be negative"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 must not be negative"),
        ({"adam_beta2": 1.0}, r"adam_beta2=1.0 must lie in \[0, 1\)"),
        ({"ema_max_decay": 1.0}, r"ema_max_decay=1.0 must lie in \[0, 1\)"),
        ({"save_total_limit": 0}, "save_total_limit=0 must be at least 1"),
        ({"save_steps": -1}, "save_steps=-1 must be a whole number of at least 0"),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        arguments("unused", **settings)


def test_one_tracker_may_be_named_without_a_list():
    assert arguments("unused", report_to="tensorboard").report_to == ["tensorboard"]
    assert arguments("unused", report_to="none").report_to == []


# -- the output directory ----------------------------------------------------------------------------------------


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    make_trainer(tmp_path, save_steps=2, save_total_limit=3).train()
    assert [p.name for p in find_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-8", "checkpoint-9"]


@pytest.mark.parametrize("save_steps", [0, 3])
def test_a_new_run_in_the_directory_of_a_longer_one_keeps_its_own_checkpoints(tmp_path, save_steps):
    make_trainer(tmp_path, max_steps=4, save_steps=2).train()
    trainer = make_trainer(tmp_path, max_steps=2, save_steps=save_steps, learning_rate=1e-2)
    trainer.train()
    newest = find_checkpoints(tmp_path)[-1]
    assert newest.name == "checkpoint-6"
    assert same_tensors(BlockedDiTModel.from_pretrained(newest).state_dict(), trainer.model.state_dict())


def test_a_new_run_of_the_same_length_saves_its_end(tmp_path):
    make_trainer(tmp_path).train()
    trainer = make_trainer(tmp_path, learning_rate=1e-2)
    trainer.train()
    newest = find_checkpoints(tmp_path)[-1]
    assert same_tensors(BlockedDiTModel.from_pretrained(newest).state_dict(), trainer.model.state_dict())


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    trainer = make_trainer(tmp_path, save_steps=3, eval_dataset=TinyImages(8))
    trainer.train()
    trainer.save_model()
    (tmp_path / "notes.txt").write_text("mine")
    overwrite_run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
