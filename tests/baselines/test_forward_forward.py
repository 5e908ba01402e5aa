"""Forward-Forward on a vision transformer: the losses by formula, layers that train alone, digits learnt."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import ViTConfig, ViTForImageClassification

from hf_diffusionblocks import DiffusionBlocksTrainingArguments
from hf_diffusionblocks.baselines.forward_forward import (
    BackpropViT,
    ForwardForwardViT,
    contrastive_loss,
    goodness,
    goodness_loss,
    normalised,
)
from hf_diffusionblocks.baselines.local_training import LocalTrainer, accuracy
from hf_diffusionblocks.data import load_image_dataset


def config(layers: int = 2, width: int = 48, **settings) -> ViTConfig:
    return ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        hidden_dropout_prob=0.0,
        **settings,
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 1, 8, 8), torch.arange(6) % 3


def test_the_goodness_loss_is_minus_the_log_of_the_right_answers():
    positive, negative = torch.tensor([3.0, 1.0]), torch.tensor([0.5, 2.5])
    p = torch.sigmoid(4.0 * (torch.cat([positive, negative]) - 2.0))  # Hinton, Eq. 1
    wanted = -(p[:2].log().mean() + (1 - p[2:]).log().mean())
    assert_close(goodness_loss(positive, negative, 2.0, 4.0), wanted)


def test_the_contrastive_loss_is_that_of_its_paper():
    hidden, labels = torch.randn(5, 3), torch.tensor([0, 1, 0, 0, 2])
    h = [v / v.norm() for v in hidden]
    total = 0.0
    for i in (0, 2, 3):  # the others are alone in their class
        others = [a for a in range(5) if a != i]
        below = sum(math.exp(h[i] @ h[a] / 0.5) for a in others)
        same = [a for a in others if labels[a] == labels[i]]
        total -= sum(math.log(math.exp(h[i] @ h[p] / 0.5) / below) for p in same) / len(same)
    assert_close(contrastive_loss(hidden, labels, 0.5), torch.tensor(total / 3))


def test_the_next_layer_cannot_read_the_goodness():
    hidden = torch.randn(2, 5, 8)
    assert_close(goodness(normalised(hidden)), torch.ones(2))
    assert_close(normalised(3.0 * hidden), normalised(hidden))


@pytest.mark.parametrize("objective", ["goodness", "contrastive"])
def test_a_layers_loss_gives_no_other_layer_a_gradient(objective):
    model = ForwardForwardViT(config(3, 16), 3, objective)
    seen = []
    for part, loss in model.losses(*some(), generator()):
        model.zero_grad()
        loss.backward()
        touched = {name for name, p in model.named_parameters() if p.grad is not None}
        own = {id(p) for p in model.parameters_of(part)}
        assert touched and touched <= {name for name, p in model.named_parameters() if id(p) in own}
        seen.append(part)
    assert seen == [0, 1, 2] + ([None] if objective == "contrastive" else [])


def test_labels_enter_at_the_class_token_and_negatives_have_another_label():
    model = ForwardForwardViT(config(1, 16), 3)
    images, labels = some()
    given = {}
    tokens = model.tokens

    def watched(images, labels=None):
        given["labels"] = labels
        return tokens(images, labels)

    model.tokens = watched
    list(model.losses(images, labels, generator()))
    positive, negative = given["labels"].chunk(2)
    assert torch.equal(positive, labels) and bool((negative != labels).all())
    assert bool(((negative >= 0) & (negative < 3)).all())
    change = (tokens(images, labels) - tokens(images)).abs().amax((0, 2)) > 0
    assert change.tolist() == [True] + [False] * 16


def test_the_class_is_the_label_of_largest_goodness_without_the_first_layer():
    model = ForwardForwardViT(config(3, 16), 3).eval()
    images, _ = some()
    scores = model.scores(images)
    hidden, total = model.tokens(images, torch.full((6,), 1)), 0.0
    for i, layer in enumerate(model.layers):
        hidden = layer(normalised(hidden))
        total = total + (i > 0) * hidden[:, 0].square().mean(-1)
    assert_close(scores[:, 1], total)
    assert torch.equal(model.predict(images, generator()), scores.argmax(-1))


def test_a_layer_needs_those_below_it_and_a_backpropagated_network_all(tmp_path):
    data = load_image_dataset("digits", "test")
    args = DiffusionBlocksTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=8)
    model = ForwardForwardViT(config(4, 16), 10)
    uses = LocalTrainer(model, args, data).measure()
    layer = sum(p.numel() for p in model.layers[3].parameters()) * 4
    assert uses[3].gradients == layer == uses[2].gradients
    assert uses[3].weights == uses[2].weights + layer == uses[None].weights
    whole = LocalTrainer(BackpropViT(ViTForImageClassification(config(4, 16, num_labels=10))), args, data).measure()
    assert whole[None].gradients > 3 * uses[None].gradients
    assert whole[None].activations > 1.5 * uses[None].activations  # two inputs per image against one


@pytest.mark.parametrize(("objective", "wanted"), [("goodness", 0.8), ("contrastive", 0.7)])
def test_learns_digits(objective, wanted, tmp_path):
    model = ForwardForwardViT(config(initializer_range=0.1), 10, objective)
    args = DiffusionBlocksTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=140,
        per_device_train_batch_size=64,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
    )
    LocalTrainer(model, args, load_image_dataset("digits", "train")).train()
    assert accuracy(model, load_image_dataset("digits", "test")) > wanted


def test_bad_settings_are_named():
    for settings, message in (
        ({"num_classes": 1}, "num_classes=1"),
        ({"objective": "contrast"}, "objective.*contrastive"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            ForwardForwardViT(config(1, 16), **{"num_classes": 3} | settings)
