"""What the rivals' trainer refuses before its first update, in one clear line."""

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_diffusionblocks import DiffusionBlocksTrainingArguments
from hf_diffusionblocks.baselines.blocked_cnn import BlockedCNN
from hf_diffusionblocks.baselines.forward_forward import BackpropViT, ForwardForwardViT
from hf_diffusionblocks.baselines.local_checks import check_kind
from hf_diffusionblocks.baselines.local_training import LocalTrainer
from hf_diffusionblocks.baselines.noprop import NoPropDT
from hf_diffusionblocks.baselines.noprop_network import CNNConfig
from hf_diffusionblocks.data import ImageDataset

CNN = {"num_classes": 3, "image_size": 8, "widths": (2, 2, 2), "hidden": 4}
VIT = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 8, "num_hidden_layers": 1}
VIT |= {"num_attention_heads": 2, "intermediate_size": 8}


def data(classes: int = 3) -> ImageDataset:
    return ImageDataset(torch.zeros(classes, 1, 8, 8), list(range(classes)))


def trainer(model, dataset, **settings) -> LocalTrainer:
    return LocalTrainer(model, DiffusionBlocksTrainingArguments(max_steps=1, **settings), dataset)


@pytest.mark.parametrize(
    "make",
    [
        lambda size, classes: NoPropDT(CNNConfig(**CNN | {"image_size": size, "num_classes": classes}), num_blocks=2),
        lambda size, classes: BlockedCNN(CNNConfig(**CNN | {"image_size": size, "num_classes": classes})),
        lambda size, classes: ForwardForwardViT(ViTConfig(**VIT | {"image_size": size}), classes),
        lambda size, classes: BackpropViT(
            ViTForImageClassification(ViTConfig(**VIT | {"image_size": size}, num_labels=classes))
        ),
    ],
    ids=["noprop", "blocks", "forward-forward", "backpropagation"],
)
def test_data_that_do_not_fit_are_refused_before_training(make):
    trainer(make(8, 3), data())
    with pytest.raises(ValueError, match=r"images have shape \[1, 8, 8\] and the classifier takes \[1, 16, 16\]"):
        trainer(make(16, 3), data())
    with pytest.raises(ValueError, match=r"label 4 .* 0 to 2: make it with num_classes=5"):
        trainer(make(8, 3), data(5))


@pytest.mark.parametrize(
    ("name", "value"),
    [("blocks", [1]), ("residency", "disk"), ("gradient_checkpointing", True), ("mixed_precision", "bf16")],
)
def test_settings_that_would_be_ignored_are_refused(name, value, tmp_path):
    where = {"residency_dir": str(tmp_path)} if value == "disk" else {}
    with pytest.raises(ValueError, match=f"{name}=.* is not for local classifiers: leave it at its default"):
        trainer(NoPropDT(CNNConfig(**CNN), num_blocks=2), data(), **{name: value}, **where)


def test_models_of_another_kind_are_refused():
    for make, message in (
        (lambda: check_kind("config", ViTConfig(), CNNConfig), "config is a ViTConfig: give a CNNConfig"),
        (lambda: ForwardForwardViT(ViTConfig(**VIT | {"num_hidden_layers": 0}), 3), "at least one layer"),
        (lambda: BackpropViT(nn.Linear(2, 2)), "give a ViTForImageClassification"),
        (lambda: trainer(nn.Linear(2, 2), data()), "a Linear is no LocalClassifier"),
        (lambda: trainer(NoPropDT(CNNConfig(**CNN), num_blocks=2), []), "train_dataset is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
