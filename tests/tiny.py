"""What tests build without a network: a tiny model of every family, tiny data, and a Gaussian with known answers."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import jaxtyping
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from hf_diffusionblocks.configuration import DiffusionBlocksConfig
from hf_diffusionblocks.families.dit import BlockedDiTConfig, BlockedDiTModel
from hf_diffusionblocks.modeling import BlockedPreTrainedModel

NUM_CLASSES = 10
IMAGE_SIZE = 8

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def as_users_run() -> Iterator[None]:
    """Without the run-time type checks of the tests: what a user's wrong argument meets is the code's own error."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


# -- families ----------------------------------------------------------------------------------------------------


def tiny_dit_config(num_blocks: int = 3, num_layers: int = 6, **settings: Any) -> BlockedDiTConfig:
    """Width 16 (2 heads of 8), images of 8 x 8 x 1, patches of 2, 10 classes. `base_config` in settings overrides."""
    base_config = {
        "num_layers": num_layers,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "sample_size": IMAGE_SIZE,
        "in_channels": 1,
        "patch_size": 2,
        "num_embeds_ada_norm": NUM_CLASSES,
    } | settings.pop("base_config", {})
    return BlockedDiTConfig(base_config=base_config, num_blocks=num_blocks, **settings)


def tiny_dit(
    num_blocks: int = 3,
    num_layers: int = 6,
    *,
    blocks: Sequence[int] | None = None,
    seed: int = 0,
    perturbation: float = 0.1,
    **settings: Any,
) -> BlockedDiTModel:
    """A tiny blocked DiT in which nothing is zero-initialised; a block's weights depend on `seed` and its number."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BlockedDiTModel(tiny_dit_config(num_blocks, num_layers, **settings), blocks=blocks)
    return perturbed(model, perturbation, seed)


@torch.no_grad()
def perturbed(model: Model, scale: float = 0.1, seed: int = 0) -> Model:
    """Add `scale` times standard normal noise to every parameter, each from a stream of its own name."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def tiny_vae(latent_channels: int = 4, **settings: Any) -> AutoencoderKL:
    """A VAE of RGB images with random weights, which halves their sides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=latent_channels,
            **settings,
        ).eval()


# -- data --------------------------------------------------------------------------------------------------------


class TinyImages:
    """Images of 8 x 8 in [-1, 1], a pattern per class and noise; `ds[list]` gives a batch, as `datasets` does."""

    def __init__(self, num_samples: int = 64, seed: int = 0, channels: int = 1, size: int = IMAGE_SIZE):
        generator = torch.Generator().manual_seed(seed)
        always = torch.Generator().manual_seed(17)  # the patterns are the same whatever the seed is
        patterns = torch.rand(NUM_CLASSES, channels, size, size, generator=always) * 1.6 - 0.8
        self.class_labels = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
        noise = 0.1 * torch.randn(num_samples, channels, size, size, generator=generator)
        self.pixel_values = (patterns[self.class_labels] + noise).clamp(-1, 1)

    def __len__(self) -> int:
        return len(self.class_labels)

    def __getitem__(self, indices: int | slice | Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values": self.pixel_values[indices], "class_labels": self.class_labels[indices]}


# -- a distribution whose denoiser is known ----------------------------------------------------------------------


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, std^2), each element alone. Its denoiser, its ODE and its losses have closed forms."""

    mean: float = 0.2
    std: float = 0.4

    def denoise(self, z: Tensor, sigma: Tensor | float) -> Tensor:
        """E[y | z] = (std^2 z + sigma^2 mean) / (std^2 + sigma^2)."""
        if isinstance(sigma, Tensor):
            sigma = sigma.reshape(-1, *[1] * (z.ndim - 1)).to(z.dtype)
        return (self.std**2 * z + sigma**2 * self.mean) / (self.std**2 + sigma**2)

    def solution(self, z: Tensor, start: float, end: float) -> Tensor:
        """The ODE's solution at `end` through z at `start`: mean + (z - mean) sqrt((s^2 + end^2) / (s^2 + start^2))."""
        return self.mean + (z - self.mean) * ((self.std**2 + end**2) / (self.std**2 + start**2)) ** 0.5

    def error(self, sigma: Any) -> Any:
        """E (E[y | z] - y)^2, the variance of y given z."""
        return self.std**2 * sigma**2 / (self.std**2 + sigma**2)

    def sample(self, *shape: int, seed: int = 0) -> Tensor:
        """Draws of the data."""
        return self.mean + self.std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class GaussianImages:
    """Images of 8 x 8 whose pixels follow a :class:`Gaussian`."""

    def __init__(self, num_samples: int, gaussian: Gaussian, seed: int = 0):
        self.pixel_values = gaussian.sample(num_samples, 1, IMAGE_SIZE, IMAGE_SIZE, seed=seed)
        self.class_labels = torch.arange(num_samples) % NUM_CLASSES

    __len__ = TinyImages.__len__
    __getitem__ = TinyImages.__getitem__


class GaussianConfig(DiffusionBlocksConfig):
    """Config of :class:`GaussianModel`."""

    model_type = "gaussian_of_the_tests"

    mean: float = 0.2
    std: float = 0.4
    label_dropout: float = 0.0

    @property
    def num_classes(self) -> int:
        return NUM_CLASSES


class _Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))


class GaussianModel(BlockedPreTrainedModel):
    """A blocked model whose blocks all hold the exact denoiser, plus a parameter each (0) on the network's output.

    Attributes:
        seen: (block, z, sigma, class_labels) of every call of `denoise` that named its block.
    """

    config_class = GaussianConfig

    def __init__(self, config: GaussianConfig, blocks: Sequence[int] | None = None):
        super().__init__(config, blocks)
        self.gaussian = Gaussian(config.mean, config.std)
        self.seen: list[tuple[int | None, Tensor, Tensor, Tensor]] = []

    def make_block(self, block: int) -> nn.Module:
        return _Shift()

    def conditioning(self, batch: dict[str, Tensor], drop: Tensor | None = None, null: Any = None) -> dict[str, Tensor]:
        labels = batch["class_labels"]
        return {"class_labels": labels if drop is None else torch.where(drop, NUM_CLASSES, labels)}

    def denoise(self, z: Tensor, sigma: Tensor | float, *, block: int | None = None, **conditioning: Any) -> Tensor:
        self.seen.append((block, z, sigma, conditioning["class_labels"]))
        return super().denoise(z, sigma, block=block, **conditioning)

    def run_block(self, block: int, scaled: Tensor, c_noise: Tensor, class_labels: Tensor) -> Tensor:
        sigma = (4 * c_noise.double()).exp()
        c = self.preconditioning(sigma)
        c_skip, c_out, c_in = (v.double().reshape(-1, 1, 1, 1) for v in (c.c_skip, c.c_out, c.c_in))
        z = scaled.double() / c_in
        # F of D = c_skip z + c_out F
        return (self.gaussian.denoise(z, sigma) - c_skip * z) / c_out + self.block(block).shift


def gaussian_model(num_blocks: int = 3, gaussian: Gaussian | None = None, **settings: Any) -> GaussianModel:
    """A blocked model that holds the exact denoiser of a Gaussian in every block."""
    gaussian = gaussian or Gaussian()
    settings = {"num_blocks": num_blocks, "mean": gaussian.mean, "std": gaussian.std} | settings
    return GaussianModel(GaussianConfig(base_config={"num_layers": 6}, **settings))
