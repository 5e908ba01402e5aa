"""Exact gradients: those of the whole network, of one block at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from devices import ON_CPU
from hf_diffusionblocks import DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments
from hf_diffusionblocks.families.causal_lm import BlockedForCausalLM
from hf_diffusionblocks.memory import measure_step
from hf_diffusionblocks.objectives import ExactNextTokenPrediction, default_objective
from runs import arguments, everything, make_trainer
from tiny import tiny_dit
from tiny_text import TokenRows, base_lm, blocked_lm, packed_positions, tokens


class Rows:
    """A data set of random tokens."""

    def __init__(self, count: int = 24, length: int = 12):
        self.ids = tokens(count, length)
        self.fingerprint = "rows"

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"input_ids": self.ids[rows]}


def end_to_end(model: BlockedForCausalLM, ids: Tensor, **places: Tensor) -> Tensor:
    """The loss of the chain of all blocks, in one piece."""
    hidden = model.embed_tokens(ids)
    for b in range(model.partition.num_blocks):
        hidden = model.clean_block(hidden, b, **places)
    logits = F.linear(model.block(b).norm(hidden), model.head_weight(b))
    labels = ids[:, 1:].clone()
    if places:
        labels[places["position_ids"][:, 1:] == 0] = -100
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied-biases", "qwen2-mixed-window"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_of_each_block_is_that_of_the_whole_network(architecture, packed):
    model = blocked_lm(architecture, auxiliary_layers=0).double()
    ids = tokens(3, 12)
    places = {"position_ids": packed_positions(12, 5, batch=3)} if packed else {}
    loss = end_to_end(model, ids, **places)
    loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    for block in range(3):
        model.zero_grad()
        result = ExactNextTokenPrediction()(model, block, {"input_ids": ids, **places})
        torch.testing.assert_close(result.loss.double(), loss.detach(), rtol=1e-6, atol=1e-6)  # in float32
        result.loss.backward()
        for name, parameter in model.named_parameters():
            mine = name.startswith(f"blocks.{block}.") or (block == 0 and name == "embed_tokens.weight")
            if not mine or wanted[name] is None:
                assert parameter.grad is None, name
            else:
                torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-5, atol=1e-7, msg=name)
        assert all(p.requires_grad for p in model.parameters())


def test_dropout_is_the_same_when_a_block_runs_again():
    model = blocked_lm(auxiliary_layers=0, num_layers=6)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    model.train()
    ids = tokens(3, 12)
    torch.manual_seed(5)
    end_to_end(model, ids).backward()
    wanted = {name: p.grad.clone() for name, p in model.block_parameters(0) if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(5)
    ExactNextTokenPrediction()(model, 0, {"input_ids": ids}).loss.backward()
    for name, parameter in model.block_parameters(0):
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)
    model.zero_grad()
    torch.manual_seed(6)  # a control: other masks, other gradients
    ExactNextTokenPrediction()(model, 0, {"input_ids": ids}).loss.backward()
    assert any(not torch.allclose(p.grad, wanted[n], rtol=1e-2) for n, p in model.block_parameters(0) if n in wanted)


def train(tmp_path, residency: str, **settings) -> DiffusionBlocksTrainer:
    model = blocked_lm(auxiliary_layers=0)
    settings = {"gradient": "exact", "steps_per_visit": 2, "max_steps": 4, "residency": residency} | settings
    trainer = DiffusionBlocksTrainer(model, arguments(tmp_path / residency, **settings), Rows())
    trainer.train()
    return trainer


def test_exact_training_lowers_the_loss_of_the_whole_network(tmp_path):
    trainer = train(tmp_path, "device", max_steps=20, use_ema=False)
    first = blocked_lm(auxiliary_layers=0)
    ids = Rows().ids
    with torch.no_grad():
        assert end_to_end(trainer.model.cpu(), ids) < end_to_end(first, ids) - 0.3
    assert not trainer.sequential


@pytest.mark.parametrize("home", ["host", "disk"])
def test_exact_training_with_one_block_at_a_time_gives_the_same_numbers(tmp_path, home):
    wanted = everything(train(tmp_path, "device"))
    trainer = train(tmp_path, home)
    for block in range(3):
        trainer.residency.pin(block)
        found = everything_of(trainer, block)
        for name, value in wanted[block].items():
            assert torch.equal(value, found[name]), (block, name)
    assert torch.equal(trainer.model.embed_tokens.weight, wanted["shared"]["embed_tokens.weight"])


def everything_of(trainer: DiffusionBlocksTrainer, block: int) -> dict[str, Tensor]:
    """All state of one block, which is on the device."""
    only = trainer.trainers
    try:
        trainer.trainers = {block: only[block]}
        return everything(trainer)[block]
    finally:
        trainer.trainers = only


def test_models_that_are_no_chain_are_refused():
    with pytest.raises(ValueError, match="blocked_dit.*gradient='local'"):
        default_objective(tiny_dit(3).config, "exact")
    with pytest.raises(ValueError, match="independent.*gradient='local'"):
        default_objective(blocked_lm(context="independent").config, "exact")
    with pytest.raises(ValueError, match="readout='clean'"):
        default_objective(blocked_lm(readout="exact").config, "exact")
    with pytest.raises(ValueError, match="auxiliary_layers=0"):
        default_objective(blocked_lm(auxiliary_layers=1).config, "exact")
    assert type(default_objective(tiny_dit(1).config, "exact")).__name__ == "DenoisingScoreMatching"


def test_settings_that_do_not_go_with_exact_gradients_are_refused(tmp_path):
    model = blocked_lm(auxiliary_layers=0)
    for name, value in (("train_shared", "all"), ("lower_outputs", "disk")):
        args = arguments(tmp_path, gradient="exact", **{name: value})
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            DiffusionBlocksTrainer(model, args, Rows())
    with pytest.raises(ValueError, match="gradient='maybe'|gradient"):
        make_trainer(tmp_path, gradient="maybe")


def test_one_blocks_activations_exist_at_a_time(tmp_path):
    def activations(num_blocks: int, **settings) -> int:
        model = blocked_lm(num_blocks=num_blocks, num_layers=12, auxiliary_layers=0)
        args = arguments(tmp_path, residency="host", max_steps=1, **settings)
        trainer = DiffusionBlocksTrainer(model, args, Rows())
        trainer.residency.pin(0)
        return measure_step(trainer.trainers[0]).activations

    whole, exact = activations(1), activations(6, gradient="exact")
    starts = 6 * 4 * 12 * 16 * 4  # what each block starts from: batch x tokens x width, float32
    assert exact - starts < 0.45 * whole  # a sixth of the layers, and the head's part, which does not divide


# -- the default ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "training", "gradient"),
    [
        ({}, {}, "exact"),
        ({"auxiliary_layers": 1}, {}, "local"),
        ({"context": "independent"}, {}, "local"),
        ({"readout": "exact"}, {}, "local"),
        ({"pretrained": False}, {}, "local"),
        ({}, {"gradient": "local"}, "local"),
        ({}, {"order": "sequential"}, "local"),
        ({}, {"train_shared": "all"}, "local"),
        ({}, {"lower_outputs": "disk", "order": "sequential"}, "local"),
    ],
)
def test_a_trained_base_is_trained_on_by_the_exact_gradient_wherever_that_is_possible(
    config, training, gradient, tmp_path
):
    model = BlockedForCausalLM.from_base(base_lm(), num_blocks=3, **config)
    args = DiffusionBlocksTrainingArguments(output_dir=str(tmp_path), max_steps=1, cpu=ON_CPU, **training)
    trainer = DiffusionBlocksTrainer(model, args, TokenRows(8))
    assert trainer.args.gradient == gradient
    assert isinstance(trainer.objective, ExactNextTokenPrediction) == (gradient == "exact")


def test_a_part_of_a_trained_base_is_trained_by_its_own_loss(tmp_path):
    BlockedForCausalLM.from_base(base_lm(), num_blocks=3).save_pretrained(tmp_path / "model")
    model = BlockedForCausalLM.from_pretrained(tmp_path / "model", blocks=[0, 1])
    args = DiffusionBlocksTrainingArguments(output_dir=str(tmp_path), max_steps=1, cpu=ON_CPU, blocks=[1])
    assert DiffusionBlocksTrainer(model, args, TokenRows(8)).args.gradient == "local"
