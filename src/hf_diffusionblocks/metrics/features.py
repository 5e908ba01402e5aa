"""Feature networks: from images to the vectors that distances between image sets are made of.

A distance between image sets is a distance between features, so a figure means nothing without the network's name. Only
the Inception of Heusel et al. (arXiv 1706.08500) gives a "FID"; every other network lends its own name to the figure.

Images are floats [N, C, H, W] in [-1, 1]. They are clamped to that range before a network sees them, as they would be
when saved; NaN and infinity are errors.
"""

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn


@runtime_checkable
class IndexedImages(Protocol):
    """Anything indexed like a Hugging Face dataset: ``ds[[0, 1]]`` is ``{"pixel_values": [2, C, H, W], ...}``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Any: ...


def as_tensor(value: Any) -> Tensor:
    """A CPU tensor of a tensor, an array (also read-only or flipped), or a list of either."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        value = torch.stack(list(value))
    if isinstance(value, Tensor):
        return value.detach().cpu()
    return torch.from_numpy(np.require(value, requirements=["C", "W"]))


def check_images(images: Tensor | np.ndarray, *, channels: tuple[int, ...] | None = None) -> Tensor:
    """``images`` as a float32 CPU tensor [N, C, H, W], clamped to [-1, 1]; ``channels`` are the allowed C.

    Raises ValueError for a wrong number of dimensions or channels, an empty set, integers, values that look like
    0..255, and NaN or infinity (naming how many images hold them).
    """
    images = as_tensor(images)
    if images.ndim != 4:
        raise ValueError(f"images must have four dimensions [N, C, H, W], not shape {tuple(images.shape)}")
    if images.numel() == 0:
        raise ValueError(f"images of shape {tuple(images.shape)} are empty; at least one image is needed")
    if not images.is_floating_point():
        raise ValueError(f"images must be floats in [-1, 1], not {images.dtype}; for 0..255 use x / 127.5 - 1")
    if channels is not None and images.shape[1] not in channels:
        raise ValueError(f"images have {images.shape[1]} channels; the network takes {' or '.join(map(str, channels))}")
    images = images.float()
    broken = int((~images.flatten(1).isfinite().all(dim=1)).sum())
    if broken:
        raise ValueError(f"{broken} of {len(images)} images hold NaN or infinity; mend or drop them first")
    if images.min() >= 0 and images.max() > 2:
        raise ValueError(f"images reach {images.max():.4g}, which looks like 0..255; use x / 127.5 - 1 for [-1, 1]")
    return images.clamp(-1, 1)


class FeatureNetwork:
    """A named map from images to feature vectors. The module is put in eval mode and stays there.

    Args:
        name: goes into the name of every figure computed with this network, e.g. "digits-cnn".
        module: maps a prepared batch to [B, F]; runs on the device its parameters are on.
        batch_size: images per forward pass.
        channels: numbers of channels the network takes; None leaves that to the module.
    """

    def __init__(
        self, name: str, module: nn.Module, *, batch_size: int = 256, channels: tuple[int, ...] | None = None
    ) -> None:
        if not name or not name.strip():
            raise ValueError(f"name={name!r}: a feature network needs a name, because figures are called after it")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.name = name
        self.module = module.eval()
        self.batch_size = batch_size
        self.channels = channels

    @property
    def fingerprint(self) -> str:
        """16 hex digits of a SHA-256 over the weights and the module's layout. Read anew each time, so that training
        the network further never leaves old statistics standing."""
        digest = hashlib.sha256(f"{type(self).__name__}\n{self.module!r}\n{self._settings()}".encode())
        for key, value in sorted(self.module.state_dict().items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def __call__(self, images: Tensor | np.ndarray) -> Tensor:
        """Features of ``images`` [N, C, H, W] in [-1, 1]: float32 [N, F] on the CPU. Raises ValueError for bad images
        (see ``check_images``), and when the module does not return one finite vector per image."""
        images = check_images(images, channels=self.channels)
        features = torch.cat([self._forward(batch, self._features) for batch in images.split(self.batch_size)])
        broken = int((~features.isfinite().all(dim=1)).sum())
        if broken:
            raise ValueError(
                f"{self.name} gave NaN or infinity for {broken} of {len(images)} images; check its weights"
            )
        return features

    def _forward(self, batch: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        self.module.eval()
        device = next((parameter.device for parameter in self.module.parameters()), batch.device)
        output = function(batch.to(device)).float().cpu()
        if output.ndim > 2 and output.shape[2:].numel() == 1:
            output = output.flatten(1)  # [N, F, 1, 1], as convolutional backbones pool
        if output.ndim != 2 or len(output) != len(batch):
            raise ValueError(f"{self.name} returned shape {tuple(output.shape)} for {len(batch)} images, not [N, F]")
        return output

    def _features(self, batch: Tensor) -> Tensor:
        return self.module(batch)

    def _settings(self) -> str:
        """What changes the features besides weights and layout."""
        return ""


class ModuleFeatures(FeatureNetwork):
    """Any module that maps images to features: a timm model with ``num_classes=0``, DINOv2 from the Hub, ...

    Args:
        name, module, batch_size: as for ``FeatureNetwork``. A module that returns a model output of transformers must
            have a ``pooler_output``, which is taken. Results [B, F, 1, 1] are flattened.
        preprocess: from a float batch [B, C, H, W] in [-1, 1] to what the module takes (resizing, normalisation). Its
            code is part of the fingerprint.

    The fingerprint sees the module's weights and its ``repr``. Plain attributes that change the features must show in
    the latter (``extra_repr``), or statistics cached for another setting would be taken.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        *,
        batch_size: int = 64,
    ) -> None:
        super().__init__(name, module, batch_size=batch_size)
        self.preprocess = preprocess

    def _features(self, batch: Tensor) -> Tensor:
        output = self.module(batch if self.preprocess is None else self.preprocess(batch))
        if isinstance(output, Tensor):
            return output
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise ValueError(
                f"{self.name} returned {type(output).__name__} without a pooler_output; wrap it in a module that "
                "returns one tensor [N, F]"
            )
        return pooled

    def _settings(self) -> str:
        if self.preprocess is None:
            return ""
        from datasets.fingerprint import Hasher

        return Hasher.hash(self.preprocess)


def _load_inception() -> nn.Module:
    from torchmetrics.image.fid import NoTrainInceptionV3

    return NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])


class InceptionFeatures(FeatureNetwork):
    """The 2048 pool features of the Inception that "FID" stands for, through torchmetrics and torch-fidelity.

    One or three channels; images are brought to 0..255 and resized by torchmetrics (with antialiasing).

    Raises ImportError when torch-fidelity or torchvision cannot be imported, and OSError when the weights cannot be
    downloaded or read.
    """

    def __init__(self, *, batch_size: int = 64) -> None:
        try:
            module = _load_inception()
        except (ImportError, OSError, RuntimeError) as error:
            kind = ImportError if isinstance(error, ImportError) else OSError
            raise kind(
                f"Inception features cannot be had here ({type(error).__name__}: {error}). Install torch-fidelity "
                "and a torchvision that fits torch (pip install 'hf-diffusionblocks[metrics]'), and let its weights be "
                "downloaded once (or copy them into torch.hub's checkpoints folder); or pass another feature network, "
                "such as ClassifierFeatures or ModuleFeatures: its figures are called after it, not 'fid'."
            ) from error
        super().__init__("inception", module, batch_size=batch_size, channels=(1, 3))

    def _features(self, batch: Tensor) -> Tensor:
        pixels = ((batch + 1) * 127.5).round().to(torch.uint8)  # the inverse of x / 127.5 - 1
        return self.module(pixels.expand(-1, 3, -1, -1))


def prefer_inception(fallback: FeatureNetwork) -> FeatureNetwork:
    """``InceptionFeatures`` where they can be had; otherwise ``fallback``, with a warning that says why."""
    try:
        return InceptionFeatures()
    except (ImportError, OSError) as error:
        warnings.warn(f"using {fallback.name} instead of Inception: {error}", stacklevel=2)
        return fallback


class SmallCNN(nn.Module):
    """A classifier small enough to train on a CPU: three convolutions, mean over positions, one linear layer.

    Takes [B, channels, H, W] with H, W of 8 or more; returns logits [B, num_classes]. ``features`` returns the pooled
    vector [B, feature_dim] from which the logits are read. Widths are multiples of 8 (groups of GroupNorm).
    """

    def __init__(
        self, channels: int, num_classes: int, *, width: int = 32, feature_dim: int = 64, stride: int = 1
    ) -> None:
        super().__init__()
        if channels < 1 or num_classes < 2:
            raise ValueError(f"channels={channels} must be at least 1 and num_classes={num_classes} at least 2")
        if width < 8 or feature_dim < 8 or width % 8 or feature_dim % 8:
            raise ValueError(f"width={width} and feature_dim={feature_dim} must be positive multiples of 8")
        self.config = {
            "channels": channels,
            "num_classes": num_classes,
            "width": width,
            "feature_dim": feature_dim,
            "stride": stride,
        }
        layers: list[nn.Module] = []
        for inputs, outputs, step in ((channels, width, stride), (width, 2 * width, 2), (2 * width, feature_dim, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, step, 1, bias=False), nn.GroupNorm(8, outputs), nn.SiLU()]
        self.backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(feature_dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        if min(images.shape[2:]) < 8:
            raise ValueError(f"images of {tuple(images.shape[2:])} pixels are too small; SmallCNN takes 8 x 8 or more")
        return self.backbone(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class ClassifierFeatures(FeatureNetwork):
    """A trained ``SmallCNN`` as a feature network [N, feature_dim] and as a classifier of stated accuracy.

    ``accuracy`` is the share of held-out images it labels rightly, None when nobody measured it.
    """

    def __init__(self, name: str, model: SmallCNN, *, accuracy: float | None = None, batch_size: int = 256) -> None:
        super().__init__(name, model, batch_size=batch_size, channels=(model.config["channels"],))
        self.model = model
        self.accuracy = accuracy

    @property
    def num_classes(self) -> int:
        return self.model.config["num_classes"]

    def _features(self, batch: Tensor) -> Tensor:
        return self.model.features(batch)

    @torch.no_grad()
    def predict(self, images: Tensor | np.ndarray) -> Tensor:
        """The likeliest class of each image [N, C, H, W]: int64 [N] on the CPU."""
        images = check_images(images, channels=self.channels)
        return torch.cat([self._forward(batch, self.model).argmax(dim=1) for batch in images.split(self.batch_size)])

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``classifier.json``, each beside its final name and then renamed."""
        folder = Path(directory)
        weights = {key: value.detach().cpu().contiguous() for key, value in self.model.state_dict().items()}
        write_atomically(folder / "model.safetensors", save(weights))
        # The fingerprint tells load() when one of the two files is from another save.
        content = {"name": self.name, "accuracy": self.accuracy, "fingerprint": self.fingerprint, **self.model.config}
        write_atomically(folder / "classifier.json", (json.dumps(content, indent=2) + "\n").encode())

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, batch_size: int = 256) -> "ClassifierFeatures":
        """What ``save`` wrote. Raises FileNotFoundError for a folder without it, ValueError for files that are damaged
        or do not belong together."""
        folder = Path(directory)
        try:
            content = json.loads((folder / "classifier.json").read_text())
            name, accuracy, fingerprint = (content.pop(key) for key in ("name", "accuracy", "fingerprint"))
            model = SmallCNN(**content)
            model.load_state_dict(load_file(folder / "model.safetensors"))
            classifier = cls(name, model, accuracy=accuracy, batch_size=batch_size)
            if classifier.fingerprint != fingerprint:
                raise ValueError("classifier.json describes other weights than model.safetensors holds")
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder} does not hold a classifier that save() wrote: {error}") from error
        return classifier


def train_classifier(
    dataset: IndexedImages,
    num_classes: int,
    *,
    eval_dataset: IndexedImages,
    name: str = "small-cnn",
    epochs: int = 20,
    seed: int = 0,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    shift: bool = True,
    width: int = 32,
    feature_dim: int = 64,
    stride: int = 1,
    device: str | torch.device = "cpu",
) -> ClassifierFeatures:
    """Train a ``SmallCNN`` with AdamW on a one-cycle schedule, and measure its accuracy on ``eval_dataset``.

    scikit-learn's digits (1437 of 8 x 8, 20 epochs): 99 % in about 4 s on one CPU core.

    Args:
        dataset, eval_dataset: batches hold ``pixel_values`` [B, C, H, W] in [-1, 1] and ``class_labels`` int64 [B].
            Both are read into memory. They must not share images, or the stated accuracy means nothing.
        num_classes: labels lie in 0 .. num_classes - 1.
        seed: fixes the initial weights, the order and the shifts; the global random state is left as it was.
        width, feature_dim, stride: of the ``SmallCNN``; a stride of 2 suits images of 24 pixels or more.
        shift: move every training image by up to one pixel each way, repeating its border.

    Raises ValueError for labels out of range, bad images, and settings below 1.
    """
    if min(epochs, batch_size) < 1 or learning_rate <= 0:
        raise ValueError(f"epochs={epochs}, batch_size={batch_size}, learning_rate={learning_rate} must be positive")
    images, labels = _labelled(dataset, num_classes)
    eval_images, eval_labels = _labelled(eval_dataset, num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators too
        model = SmallCNN(images.shape[1], num_classes, width=width, feature_dim=feature_dim, stride=stride)
    model.to(device).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    total = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=total)
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).split(batch_size):
            batch = _shifted(images[index], generator) if shift else images[index]
            loss = nn.functional.cross_entropy(model(batch.to(device)), labels[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    classifier = ClassifierFeatures(name, model)
    classifier.accuracy = (classifier.predict(eval_images) == eval_labels).double().mean().item()
    return classifier


def _labelled(dataset: IndexedImages, num_classes: int) -> tuple[Tensor, Tensor]:
    batch = dataset[list(range(len(dataset)))]
    images, labels = check_images(batch["pixel_values"]), as_tensor(batch["class_labels"]).long()
    if labels.shape != images.shape[:1]:
        raise ValueError(f"class_labels have shape {tuple(labels.shape)}, not [{len(images)}], one for each image")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"class_labels reach from {labels.min()} to {labels.max()}, outside 0 .. {num_classes - 1}")
    return images, labels


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    padded = nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    down, right = torch.randint(0, 3, (2, count, 1), generator=generator)
    rows = (down + torch.arange(height))[:, :, None]
    columns = (right + torch.arange(width))[:, None, :]
    return padded[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2).contiguous()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its final name and rename it, making its folder where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
