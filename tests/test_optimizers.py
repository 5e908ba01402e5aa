"""Optimizers as switches, and the step inside the backward pass: the same bits wherever and however they are run."""

import importlib.util
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_diffusionblocks import DiffusionBlocksTrainer
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.memory import measure_memory, plan_memory
from hf_diffusionblocks.memory_counting import held_bytes, measure_step
from hf_diffusionblocks.training.arguments import OPTIMIZERS
from hf_diffusionblocks.training.optimizers import make_optimizer, plain_tensors, state_bytes
from runs import arguments, make_trainer, reset_accelerate, updates
from test_exact_gradient import Rows
from tiny import tiny_dit
from tiny_text import blocked_lm

WITHOUT = "bitsandbytes is not installed (pip install bitsandbytes)"
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason=WITHOUT)
EACH = [pytest.param(name, marks=needs_bitsandbytes if name == "adamw_8bit" else ()) for name in OPTIMIZERS]
RELEASE = {"gradient_release": True, "max_grad_norm": 0}
# Wide enough that a block has parameters of more than 4096 elements, which 8-bit moments are for.
WIDE = {"base_config": {"num_attention_heads": 4, "attention_head_dim": 8}}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()
    yield
    reset_accelerate()


def dit_trainer(folder: Any, **settings: Any) -> DiffusionBlocksTrainer:
    return make_trainer(folder, tiny_dit(2, 2, **WIDE), **settings)


def text_trainer(folder: Any, **settings: Any) -> DiffusionBlocksTrainer:
    shape = {"auxiliary_layers": 0} if settings.get("gradient") == "exact" else {}
    model = blocked_lm("llama-tied-biases", 2, num_layers=4, **shape)
    return DiffusionBlocksTrainer(model, arguments(folder, **settings), Rows(), Rows(8))


MAKERS = {"dit": dit_trainer, "causal_lm": text_trainer}


def state_of(trainer: DiffusionBlocksTrainer) -> dict[Any, Tensor]:
    """Weights, averages and the optimizer's state of every block, copied while it is on the device."""
    found: dict[Any, Tensor] = {}
    for block, one in trainer.trainers.items():
        trainer.residency.pin(block)
        found |= {(block, "weight", n): p for n, p in zip(one.names, one.parameters, strict=True)}
        found |= {(block, "average", n): p for n, p in one.ema_tensors().items()}
        for number, p in enumerate(one.parameters):
            for kind, value in one.optimizer.state[p].items():
                tensors = list(plain_tensors(value)) or [torch.tensor(value)]
                found |= {(block, kind, number, i): tensor for i, tensor in enumerate(tensors)}
        found = {key: value.detach().clone() for key, value in found.items()}
    trainer.residency.release()
    return found


def assert_same(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key, value in one.items() if not torch.equal(value, other[key])] == []


# -- which optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", EACH)
def test_an_optimizer_learns_with_its_own_update(optim, tmp_path):
    trainers = [
        dit_trainer(tmp_path / name, optim=name, learning_rate=1e-2, max_steps=8, weight_decay=0.1)
        for name in ("adamw_torch_fused", optim)
    ]
    for trainer in trainers:
        trainer.train()
    losses = [row["loss"] for row in updates(tmp_path / optim) if row["block"] == 0]
    assert sum(losses[-3:]) < 0.98 * sum(losses[:3])
    usual, other = (state_of(trainer) for trainer in trainers)
    weights = [key for key in other if key[1] == "weight"]
    if optim == "adamw_torch":
        for key in weights:  # of vectors, those of keys have no gradient but rounding, which Adam makes large
            if usual[key].ndim > 1:
                torch.testing.assert_close(other[key], usual[key], rtol=1e-2, atol=1e-3)
    elif optim != "adamw_torch_fused":
        assert not any(torch.equal(other[key], usual[key]) for key in weights if other[key].numel() > 4096)
    groups = trainers[1].trainers[0].optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.ndim > 1 for p in groups[0]["params"]) and all(p.ndim <= 1 for p in groups[1]["params"])
    if optim == "adamw_8bit":
        assert torch.uint8 in {value.dtype for key, value in other.items() if key[1] == "state1"}
    if optim == "adafactor":
        assert {key[1] for key in other} == {"weight", "average", "step", "row_var", "col_var", "variance"}


@pytest.mark.parametrize(
    ("family", "optim", "homes"),
    [
        ("dit", "adamw_torch", ["host"]),
        ("dit", "adafactor", ["host", "disk"]),
        ("causal_lm", "adafactor", ["host"]),
        pytest.param("dit", "adamw_8bit", ["host", "disk"], marks=needs_bitsandbytes),
        pytest.param("causal_lm", "adamw_8bit", ["host"], marks=needs_bitsandbytes),
    ],
)
def test_resumed_and_moved_runs_end_with_the_same_bits(family, optim, homes, tmp_path):
    settings = {"optim": optim, "max_steps": 3, "save_steps": 3, "save_total_limit": None, "steps_per_visit": 2}
    whole = MAKERS[family](tmp_path / "whole", **settings)
    whole.train()
    wanted = state_of(whole)
    resumed = MAKERS[family](tmp_path / "whole", **settings)
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-3")
    assert_same(state_of(resumed), wanted)
    for home in homes:
        moved = MAKERS[family](tmp_path / home, residency=home, **settings)
        moved.train()
        assert_same(state_of(moved), wanted)
        assert (tmp_path / home / "updates.jsonl").read_bytes() == (tmp_path / "whole" / "updates.jsonl").read_bytes()
        again = MAKERS[family](tmp_path / home, residency=home, **settings)
        again.train(resume_from_checkpoint=tmp_path / home / "checkpoint-3")
        assert_same(state_of(again), wanted)


def test_another_optimizer_cannot_take_a_run_up(tmp_path):
    dit_trainer(tmp_path, max_steps=1).train()
    message = "has optim='adamw_torch_fused', this one optim='adafactor'"
    with pytest.raises(ValueError, match=message):
        dit_trainer(tmp_path, max_steps=1, optim="adafactor").train(resume_from_checkpoint=True)


STATES = [
    *(pytest.param(name, {}, marks=needs_bitsandbytes if name == "adamw_8bit" else ()) for name in OPTIMIZERS),
    ("adamw_torch_fused", {"amsgrad": True}),
    ("adamw_torch", {"amsgrad": True}),
    pytest.param("adamw_8bit", {"min_8bit_size": 100_000}, marks=needs_bitsandbytes),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("optim", "optim_args"), STATES)
def test_the_state_takes_as_many_bytes_as_is_said(optim, optim_args, dtype):
    shapes = [(64, 96), (1000, 7), (10, 3, 2, 2), (5000,), (17,), (1,)]
    parameters = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    optimizer = make_optimizer(
        [(str(i), p) for i, p in enumerate(parameters)], arguments("unused", optim=optim, optim_args=optim_args)
    )
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p in parameters:
        named = {name: value for name, value in optimizer.state[p].items() if "qmap" not in name}  # one for all
        held = held_bytes(tensor for value in named.values() for tensor in plain_tensors(value))
        assert held == state_bytes(optim, p.shape, dtype, optim_args), p.shape


def test_a_plan_and_a_real_step_count_the_moments_that_optim_args_add(capsys):
    config, model = tiny_dit(2, 2, **WIDE).config, tiny_dit(2, 2, **WIDE)
    given = {"optim_args": {"amsgrad": True}, "use_ema": False}
    row = plan_memory(config, alternatives=False, **given).worst("blocked")
    use = measure_memory(model, 0, model.dummy_batch(1), **given)
    assert (
        row.moments
        == use.moments
        > 1.4 * plan_memory(config, alternatives=False, use_ema=False).worst("blocked").moments
    )
    with pytest.raises(ValueError, match="optim='adafactor' cannot be made with optim_args={'amsgrad': True}"):
        plan_memory(config, optim="adafactor", optim_args={"amsgrad": True})
    assert main(["plan", "digits-dit", "training.optim_args={amsgrda: true}"]) == 2
    assert "amsgrda" in capsys.readouterr().err


def test_further_arguments_reach_the_optimizer(tmp_path):
    one = dit_trainer(tmp_path, optim="adafactor", optim_args={"beta2_decay": -0.5}).trainers[0]
    assert {group["beta2_decay"] for group in one.optimizer.param_groups} == {-0.5}


def test_the_command_trains_with_another_optimizer(tmp_path, capsys):
    recipe = ["digits-dit", "model.num_layers=3", "model.num_attention_heads=2", "model.attention_head_dim=8"]
    recipe += ["training.max_steps=2", "training.save_steps=0", "training.cpu=true", "training.disable_tqdm=true"]
    recipe += ["training.optim=adafactor", "training.gradient_release=true", "training.max_grad_norm=0"]
    assert main(["train", *recipe, "--no-report", "--output-dir", str(tmp_path)]) == 0, capsys.readouterr().err
    state = torch.load(tmp_path / "checkpoint-6" / "optimizer-00.pt", weights_only=True)["state"]
    assert "row_var" in state[0] and "exp_avg" not in state[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "adamw"}, "unknown optim 'adamw'.*adamw_torch"),
        ({"optim_args": "amsgrad"}, "optim_args='amsgrad' must be a mapping"),
        ({"gradient_release": True}, "gradient_release=True with max_grad_norm=1.0.*Set max_grad_norm=0"),
        (
            {**RELEASE, "gradient_accumulation_steps": 2},
            "gradient_release=True with gradient_accumulation_steps=2.*Set gradient_accumulation_steps=1",
        ),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        arguments("unused", **settings)


def test_what_an_optimizer_does_not_take_is_named(tmp_path):
    with pytest.raises(ValueError, match="has lr, which other arguments set.*learning_rate"):
        dit_trainer(tmp_path, optim_args={"lr": 1.0})
    with pytest.raises(ValueError, match="optim='adafactor' cannot be made with optim_args.*amsgrad.*Adafactor takes"):
        dit_trainer(tmp_path, optim="adafactor", optim_args={"amsgrad": True})


def test_a_missing_library_is_named_with_its_installation(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    needs = r"optim='adamw_8bit' needs bitsandbytes .*pip install 'hf-diffusionblocks\[optim\]'"
    with pytest.raises(ValueError, match=needs):
        dit_trainer(tmp_path, optim="adamw_8bit")


# -- gradient release --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("dit", {}),
        ("dit", {"gradient_checkpointing": True, "mixed_precision": "bf16"}),
        ("dit", {"optim": "adafactor"}),
        pytest.param("dit", {"optim": "adamw_8bit"}, marks=needs_bitsandbytes),
        ("causal_lm", {}),
        ("causal_lm", {"order": "simultaneous", "train_shared": "all", "gradient_checkpointing": True}),
        ("causal_lm", {"gradient": "exact"}),
    ],
    ids=str,
)
def test_released_gradients_give_the_same_bits(family, settings, tmp_path):
    begun_either_way = not settings
    settings = {"max_steps": 3, "max_grad_norm": 0, "save_steps": 3, "save_total_limit": None} | settings
    settings |= {"weight_decay": 0.1, "warmup_steps": 2}
    usual = MAKERS[family](tmp_path / "usual", **settings)
    usual.train()
    wanted = state_of(usual)
    places = [("released", {})] + [("host", {"residency": "host"})] * begun_either_way
    for name, place in places:
        released = MAKERS[family](tmp_path / name, gradient_release=True, **settings, **place)
        released.train()
        assert_same(state_of(released), wanted)
        log = (tmp_path / name / "updates.jsonl").read_bytes()
        assert log == (tmp_path / "usual" / "updates.jsonl").read_bytes()  # losses and gradient norms
    for release in (True, False) if begun_either_way else (True,):
        resumed = MAKERS[family](tmp_path / "released", gradient_release=release, **settings)
        resumed.train(resume_from_checkpoint=tmp_path / "released" / "checkpoint-3")
        assert_same(state_of(resumed), wanted)
    assert all(p.grad is None for p in released.model.parameters())


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("release", [True, False])
def test_released_gradients_do_not_exist_all_at_once(family, release, tmp_path):
    trainer = MAKERS[family](tmp_path, gradient_release=release, max_grad_norm=0)
    one = trainer.trainers[1]
    alive: dict[int, tuple[weakref.ref, int]] = {}
    most = 0

    def count(parameter: Tensor) -> None:
        nonlocal most
        storage = parameter.grad.untyped_storage()
        alive[id(parameter)] = weakref.ref(storage), storage.nbytes()
        most = max(most, sum(size for storage, size in alive.values() if storage() is not None))

    hooks = [p.register_post_accumulate_grad_hook(count) for p in one.parameters]
    use = measure_step(one)
    for hook in hooks:
        hook.remove()
    sizes = sorted(p.nbytes for p in one.parameters)
    assert len(alive) == len(sizes)
    if release:
        assert most == sizes[-1]  # the largest parameter's
        # Beside it, its bias's, from the same node. DiT's is the noise level's embedder, which is used twice: the part
        # that comes first waits for the other.
        parts = 2 if family == "dit" else 1
        assert parts * sizes[-1] <= use.gradients <= 1.05 * parts * sizes[-1]
        assert use.gradients < 0.6 * sum(sizes)
    else:
        assert most == use.gradients == sum(sizes)


def test_a_tied_table_s_gradient_counts_while_it_waits_for_the_embedding(tmp_path):
    """It comes from the head first and is complete last: until then every other gradient is held beside it."""
    trainer = text_trainer(tmp_path, **RELEASE)
    uses = [measure_step(trainer.trainers[b]).gradients for b in (0, 1)]  # block 0 trains the table
    sizes = {n: p.nbytes for n, p in zip(trainer.trainers[0].names, trainer.trainers[0].parameters, strict=True)}
    table = sizes.pop("embed_tokens.weight")
    assert uses[0] >= table + max(sizes.values()) > uses[1] >= max(sizes.values())


def test_an_error_in_a_step_leaves_no_hook(tmp_path):
    one = dit_trainer(tmp_path, **RELEASE).trainers[0]
    objective, one.objective = one.objective, lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        one.step()
    one.objective = objective
    assert all(not p._post_accumulate_grad_hooks for p in one.parameters)
    before = one.parameters[0].detach().clone()
    objective(one.model, 0, one._next_batch(0), torch.Generator()).loss.backward()
    assert torch.equal(one.parameters[0], before) and one.parameters[0].grad is not None
