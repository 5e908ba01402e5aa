"""A blocked model in the place of a diffusers pipeline's transformer: each call goes to the block of its timestep."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

if TYPE_CHECKING:
    from .dit import BlockedDiTModel


class RoutedTransformer(nn.Module):
    """Looks to a pipeline like the base's transformer; see ``BlockedDiTModel.as_transformer``.

    A call is handed on as it is to the block that owns the noise level of its timestep, and that block's raw output is
    given back. So nothing is rescaled, and with B = 1 a pipeline computes what it computes with the base, bit for bit.
    Timesteps beyond the model's noise range (t = 1 of a rectified flow, which is pure noise) go to the nearest block.

    Args:
        model: the blocked model, with the blocks that the pipeline's timesteps need.
    """

    def __init__(self, model: "BlockedDiTModel"):
        super().__init__()
        self.model = model
        self._signature = inspect.signature(model.config.transformer_class.model.forward)

    @property
    def config(self) -> FrozenDict:
        """The base's config, as a pipeline reads it."""
        config = self.model.config
        return FrozenDict({"_class_name": config.base_class, **config.transformer_class.defaults, **config.base_config})

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.model.device

    @contextlib.contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """What Flux's pipeline opens around each call; nothing is cached between steps here."""
        yield

    def block_of(self, timestep: Tensor | float) -> int:
        """The block that owns a pipeline's timesteps.

        Raises:
            ValueError: if a batch's timesteps belong to several blocks.
        """
        model, unit = self.model, self.model.config.transformer_class.timestep_unit
        timestep = torch.as_tensor(timestep).reshape(-1)
        noise = model.partition.noise
        sigma = model.preconditioning.sigma_of(timestep.double() * unit).clamp(noise.sigma_min, noise.sigma_max)
        owners = model.partition.block_of(sigma).unique().tolist()
        if len(owners) != 1:
            raise ValueError(
                f"the timesteps of a batch, {timestep.tolist()}, belong to blocks {owners}: give one timestep per call."
            )
        return owners[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's ``forward``.

        Raises:
            ValueError: without a timestep, for timesteps of several blocks, or for arguments that count the layers of
                the whole network (ControlNets, skipped layers), which a block does not have.
        """
        given = self._signature.bind(self, *args, **kwargs).arguments
        given.pop("self")
        timestep = given.get("timestep")
        if timestep is None:
            raise ValueError("timestep is missing: it says which block is to be called.")
        if self.model.partition.num_blocks > 1:
            for name in self.model.config.transformer_class.whole_network:
                if given.get(name) is not None:
                    raise ValueError(
                        f"{name} refers to layers of the whole network, and a block has its own alone: leave it out."
                    )
        scale = getattr(self.model.preconditioning, "noise_scale", 1)
        if scale != 1:
            given["timestep"] = timestep * scale
        given |= given.pop("kwargs", {})
        block = self.model.block(self.block_of(timestep))
        return block(**_with_text_per_image(block, given))


def _with_text_per_image(block: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """A call with one prompt for several images, expanded for a Flux block that joins text and images at once.

    A double-stream layer broadcasts the one prompt; in a block without any, nothing does before the two are joined.
    """
    images, text = given.get("hidden_states"), given.get("encoder_hidden_states")
    joins = isinstance(block, FluxTransformer2DModel) and not len(block.transformer_blocks)
    if joins and images is not None and text is not None and len(text) == 1 < len(images):
        given = given | {"encoder_hidden_states": text.expand(len(images), -1, -1)}
    return given


__all__ = ["RoutedTransformer"]
