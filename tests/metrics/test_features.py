"""Feature networks: what they accept, how they are named and recognised, and the classifier trained on a CPU."""

import hashlib
import json
import subprocess
import sys
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from hf_diffusionblocks import metrics
from hf_diffusionblocks.metrics import (
    ClassifierFeatures,
    InceptionFeatures,
    ModuleFeatures,
    features,
    prefer_inception,
    train_classifier,
)
from hf_diffusionblocks.metrics.features import SmallCNN, as_tensor, check_images


class Labelled:
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "class_labels": self.labels[index]}


def digits() -> tuple[Labelled, Labelled]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:1437], order[1437:]
    return Labelled(images[train], labels[train]), Labelled(images[held_out], labels[held_out])


@pytest.fixture(scope="module")
def classifier() -> ClassifierFeatures:
    train, held_out = digits()
    return train_classifier(train, 10, eval_dataset=held_out, name="digits-cnn", epochs=10)


@pytest.fixture
def small() -> ClassifierFeatures:
    return ClassifierFeatures("small", SmallCNN(1, 3, width=8, feature_dim=16), accuracy=0.5)


def images(count: int = 5, channels: int = 1, size: int = 8) -> torch.Tensor:
    return torch.rand(count, channels, size, size) * 2 - 1


def test_classifier_learns_digits_and_states_the_accuracy_it_has_on_held_out_images(classifier):
    _, held_out = digits()
    right = (classifier.predict(held_out.images) == held_out.labels).double().mean().item()
    assert classifier.accuracy == right > 0.97
    assert classifier.predict(held_out.images).dtype == torch.int64


def test_training_repeats_bitwise_and_leaves_the_global_random_state_alone():
    train, held_out = digits()
    train = Labelled(train.images[:128], train.labels[:128])
    state = torch.get_rng_state()
    runs = [train_classifier(train, 10, eval_dataset=held_out, epochs=1, seed=s).fingerprint for s in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0] == runs[1] != runs[2]


def test_shifting_moves_each_image_by_at_most_one_pixel_and_repeats_its_border():
    image = torch.arange(64.0).reshape(8, 8)
    steps = [(torch.arange(8) + step).clamp(0, 7) for step in (-1, 0, 1)]
    allowed = [image[rows][:, columns] for rows in steps for columns in steps]
    moved = features._shifted(image.expand(60, 1, 8, 8), torch.Generator().manual_seed(0))[:, 0]
    hits = torch.tensor([[torch.equal(one, other) for other in allowed] for one in moved])
    assert (hits.sum(dim=1) == 1).all() and hits.any(dim=0).all()


def test_features_are_the_vectors_the_logits_are_read_from(classifier):
    batch = digits()[1].images[:20]
    vectors = classifier(batch)
    assert vectors.shape == (20, 64) and vectors.dtype == torch.float32 and not vectors.requires_grad
    logits = vectors @ classifier.model.head.weight.T + classifier.model.head.bias
    assert torch.equal(logits.argmax(dim=1), classifier.predict(batch))


def test_batching_does_not_change_features(small):
    batch = images(11)
    whole = small(batch)
    small.batch_size = 3
    torch.testing.assert_close(small(batch), whole)


def test_arrays_lists_and_flipped_or_read_only_views_give_the_same_features(small):
    batch = images()
    array = batch.numpy().copy()
    torch.testing.assert_close(small(array[..., ::-1]), small(batch.flip(-1)), rtol=0, atol=0)
    array.flags.writeable = False
    torch.testing.assert_close(small(array), small(batch), rtol=0, atol=0)
    assert torch.equal(as_tensor(list(batch)), batch) and torch.equal(as_tensor(list(array)), batch)


def test_pixels_beyond_the_range_count_as_if_saved(small):
    batch = images() * 3
    torch.testing.assert_close(small(batch), small(batch.clamp(-1, 1)), rtol=0, atol=0)


def test_the_network_is_in_eval_mode_even_after_training_mode_was_set():
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))
    network = ModuleFeatures("pixels", module)
    module.train()
    batch = images()
    assert torch.equal(network(batch), batch.flatten(1))


def test_any_size_from_eight_pixels_and_any_number_of_channels():
    for channels, size in ((1, 8), (3, 9), (4, 32)):
        network = ClassifierFeatures("any", SmallCNN(channels, 2, width=8, feature_dim=24))
        assert network(images(2, channels, size)).shape == (2, 24)


def test_save_and_load_are_bitwise(classifier, tmp_path):
    classifier.save(tmp_path / "new")
    loaded = ClassifierFeatures.load(tmp_path / "new")
    batch = digits()[1].images
    assert torch.equal(loaded(batch), classifier(batch))
    assert (loaded.name, loaded.accuracy) == ("digits-cnn", classifier.accuracy)
    assert loaded.fingerprint == classifier.fingerprint
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["classifier.json", "model.safetensors"]


def test_a_save_that_fails_leaves_the_old_files_whole_and_nothing_beside_them(small, tmp_path, monkeypatch):
    small.save(tmp_path)
    before = {p.name: hashlib.sha256(p.read_bytes()).digest() for p in tmp_path.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(features.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        ClassifierFeatures("other", SmallCNN(1, 3, width=8, feature_dim=16)).save(tmp_path)
    assert {p.name: hashlib.sha256(p.read_bytes()).digest() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", ["weights", "width", "key", "json", "list", "other weights"])
def test_loading_damaged_files_says_which_folder(small, tmp_path, damage):
    small.save(tmp_path)
    if damage == "weights":
        (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    elif damage in ("json", "list"):
        (tmp_path / "classifier.json").write_text("{" if damage == "json" else "[]")
    elif damage == "other weights":
        description = (tmp_path / "classifier.json").read_bytes()
        ClassifierFeatures("other", SmallCNN(1, 3, width=8, feature_dim=16)).save(tmp_path)
        (tmp_path / "classifier.json").write_bytes(description)
    else:
        description = json.loads((tmp_path / "classifier.json").read_text())
        description["width" if damage == "width" else "colour"] = 16
        (tmp_path / "classifier.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=str(tmp_path)):
        ClassifierFeatures.load(tmp_path)


def test_loading_from_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"classifier\.json"):
        ClassifierFeatures.load(tmp_path)


def test_fingerprint_follows_weights_layout_and_preprocessing_but_not_the_name():
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
    base = ModuleFeatures("a", module).fingerprint
    assert len(base) == 16 and ModuleFeatures("b", module).fingerprint == base
    assert ModuleFeatures("a", nn.Sequential(*module, nn.ReLU())).fingerprint != base
    halves, thirds = (ModuleFeatures("a", module, lambda x, f=f: x * f).fingerprint for f in (0.5, 0.3))
    assert len({base, halves, thirds}) == 3
    network = ModuleFeatures("a", module)
    with torch.no_grad():
        module[1].bias[0] += 1
    assert network.fingerprint != base


def test_module_outputs_of_transformers_and_of_convolutions_become_vectors():
    class Pooled(nn.Module):
        def forward(self, x):
            return SimpleNamespace(pooler_output=x.mean(dim=(2, 3), keepdim=True))

    batch = images(4, 3)
    torch.testing.assert_close(ModuleFeatures("pooled", Pooled())(batch), batch.mean(dim=(2, 3)))
    doubled = ModuleFeatures("pooled", Pooled(), preprocess=lambda x: 2 * x)
    torch.testing.assert_close(doubled(batch), 2 * batch.mean(dim=(2, 3)))


def test_modules_that_return_no_vectors_are_refused():
    class Other(nn.Module):
        def forward(self, x):
            return SimpleNamespace(last_hidden_state=x)

    with pytest.raises(ValueError, match="without a pooler_output"):
        ModuleFeatures("other", Other())(images())
    with pytest.raises(ValueError, match=r"returned shape \(5, 1, 8, 8\)"):
        ModuleFeatures("maps", nn.Identity())(images())


def test_non_finite_features_are_counted():
    class Broken(nn.Module):
        def forward(self, x):
            vectors = x.flatten(1).clone()
            vectors[:2, 0] = float("inf")
            return vectors

    with pytest.raises(ValueError, match="NaN or infinity for 2 of 5 images"):
        ModuleFeatures("broken", Broken())(images())


def test_non_finite_images_are_counted(small):
    batch = images(6)
    batch[1, 0, 2, 2], batch[4, 0, 0, 0], batch[4, 0, 1, 0] = float("nan"), float("inf"), float("nan")
    for call in (small, small.predict):
        with pytest.raises(ValueError, match="2 of 6 images"):
            call(batch)


@pytest.mark.parametrize(
    "bad, words",
    [
        (torch.zeros(3, 8, 8), "four dimensions"),
        (torch.zeros(0, 1, 8, 8), "empty"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "127.5"),
        (torch.arange(128.0).reshape(2, 1, 8, 8), "looks like 0..255"),
        (torch.zeros(2, 3, 8, 8), "3 channels; the network takes 1"),
        (torch.zeros(2, 1, 7, 8), "too small"),
    ],
)
def test_bad_images_are_named(small, bad, words):
    with pytest.raises(ValueError, match=words):
        small(bad)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="name=' '"):
        ModuleFeatures(" ", nn.Identity())
    with pytest.raises(ValueError, match="batch_size=0"):
        ModuleFeatures("x", nn.Identity(), batch_size=0)
    with pytest.raises(ValueError, match="width=12"):
        SmallCNN(1, 2, width=12)
    with pytest.raises(ValueError, match="num_classes=1"):
        SmallCNN(1, 1)


@pytest.mark.parametrize(
    "labels, words", [([0, 1, 2], "outside 0 .. 1"), ([0, -1, 1], "outside 0 .. 1"), ([[0], [1], [1]], "one for each")]
)
def test_bad_labels_are_named(labels, words):
    good, bad = Labelled(images(3), torch.tensor([0, 1, 1])), Labelled(images(3), torch.tensor(labels))
    for train, held_out in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match=words):
            train_classifier(train, 2, eval_dataset=held_out, epochs=1)


class TinyInception(nn.Module):
    """Takes what torchmetrics' Inception takes: bytes, three channels."""

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return x.float().flatten(1)


def test_inception_sees_the_bytes_the_images_were_made_from(monkeypatch):
    monkeypatch.setattr(features, "_load_inception", TinyInception)
    pixels = torch.arange(256).reshape(1, 1, 16, 16)
    seen = InceptionFeatures()((pixels / 127.5 - 1).float())
    assert torch.equal(seen.reshape(3, 256), pixels.reshape(1, 256).expand(3, 256).float())
    with pytest.raises(ValueError, match="2 channels; the network takes 1 or 3"):
        InceptionFeatures()(images(2, 2))


@pytest.mark.parametrize(
    "cause, kind",
    [
        (ModuleNotFoundError("No module named 'torchvision'"), ImportError),
        (urllib.error.URLError("no route"), OSError),
        (RuntimeError("invalid hash value"), OSError),
    ],
)
def test_without_inception_the_error_says_what_to_do_and_the_fallback_serves(monkeypatch, small, cause, kind):
    def fail():
        raise cause

    monkeypatch.setattr(features, "_load_inception", fail)
    with pytest.raises(kind, match="pass another feature network") as raised:
        InceptionFeatures()
    assert str(cause) in str(raised.value)
    with pytest.warns(UserWarning, match="using small instead of Inception"):
        assert prefer_inception(small) is small
    monkeypatch.setattr(features, "_load_inception", TinyInception)
    assert prefer_inception(small).name == "inception"


def test_images_are_checked_in_float32():
    checked = check_images(np.linspace(-1, 1, 64).reshape(1, 1, 8, 8))
    assert checked.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_network_on_the_accelerator_gives_the_same_answers_on_the_cpu():
    train, held_out = digits()
    classifier = train_classifier(train, 10, eval_dataset=held_out, epochs=10, device="cuda")
    vectors, classes = classifier(held_out.images.cuda()), classifier.predict(held_out.images)
    assert vectors.device.type == classes.device.type == "cpu" and classifier.accuracy > 0.97
    fingerprint = classifier.fingerprint
    classifier.model.cpu()
    assert classifier.fingerprint == fingerprint
    torch.testing.assert_close(classifier(held_out.images), vectors, rtol=1e-2, atol=1e-2)


def test_another_process_imports_nothing_slow_and_finds_the_same_fingerprint():
    code = """
import sys, hf_diffusionblocks
before = set(sys.modules)
from hf_diffusionblocks import metrics
import hf_diffusionblocks.metrics.statistics
slow = {"evaluate", "torchmetrics", "sklearn"} & (set(sys.modules) - before)
import torch
def half(x): return x / 2
linear = torch.nn.Linear(2, 2)
torch.nn.init.ones_(linear.weight), torch.nn.init.zeros_(linear.bias)
fingerprint = metrics.ModuleFeatures("a", linear, half).fingerprint
print(sorted(slow), fingerprint)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = {"__name__": "__main__"}
    exec(code, here)
    assert result.stdout.splitlines()[-1] == f"[] {here['fingerprint']}"


def test_every_public_name_can_be_had():
    assert all(getattr(metrics, name).__name__ == name for name in metrics.__all__)
    assert set(metrics.__all__) <= set(dir(metrics))


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'FID'"):
        metrics.FID  # noqa: B018
