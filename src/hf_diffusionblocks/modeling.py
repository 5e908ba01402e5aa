"""What all blocked models have in common: blocks, routing, preconditioning, and files by block."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from . import serialization
from .block_files import BlockFiles
from .configuration import DiffusionBlocksConfig
from .loading_checks import checked_blocks
from .preconditioning import expand
from .repository import PushedBlocks
from .streaming import StreamedBlocks, requested_streaming


@dataclass
class DenoiserOutput(ModelOutput):
    """Output of a blocked denoiser.

    Args:
        sample: the estimate of the clean sample, the shape of the input.
    """

    sample: Tensor | None = None


class BlockedPreTrainedModel(BlockFiles, StreamedBlocks, PushedBlocks, PreTrainedModel):
    """A residual network cut into blocks that are trained alone (arXiv 2506.14202).

    Args:
        config: the config, which alone rebuilds the model.
        blocks: allocate these blocks only; all by default.

    Attributes:
        partition: the ``BlockPartition``, the one road from a noise level to a block.
        preconditioning: from the raw network to the denoiser.
        blocks: the resident blocks, under their numbers.
        scored_by: of a class: the functions of this library that score it on held-out data, for errors of the others.
    """

    config_class = DiffusionBlocksConfig
    scored_by = "the held_out of its objective"
    base_model_prefix = ""
    supports_gradient_checkpointing = True

    def __init__(self, config: DiffusionBlocksConfig, blocks: Sequence[int] | None = None):
        super().__init__(config)
        self.partition = config.make_partition()
        self.preconditioning = config.make_preconditioning()
        resident = range(config.num_blocks) if blocks is None else checked_blocks(self.partition, blocks)
        # A block's initial weights depend on this draw and on its number, not on which other blocks are resident.
        real = torch.get_default_device().type != "meta"
        self._init_seed = int(torch.randint(2**62, ()).item()) if real else 0
        self.make_shared()
        self.blocks = nn.ModuleDict()
        request = requested_streaming() if real else None
        streamer = None if request is None else request.make(self.blocks, torch.get_default_device())
        self._made_by_block = streamer is not None
        for b in resident:
            self.blocks[str(b)] = self.make_block(b)
            if streamer is not None:
                self._initialize_part(b, self.blocks[str(b)])
                streamer.adopt(b)
        self.post_init()
        if streamer is not None:
            self._begin_streaming(streamer)

    # -- what a family defines -----------------------------------------------------------------------------------

    def make_shared(self) -> None:
        """Build what all blocks share, as attributes of the model. Nothing unless a family overrides it."""

    def make_block(self, block: int) -> nn.Module:
        """Build a block: its layers with its own stem and head. Weights are initialised afterwards."""
        raise TypeError(f"{type(self).__name__} must define make_block().")

    def run_block(self, block: int, scaled: Tensor, c_noise: Tensor, **conditioning: Any) -> Tensor:
        """The raw network F of a block on the scaled input, in the shape of the input."""
        raise TypeError(f"{type(self).__name__} must define run_block().")

    def layer_modules(self, block: int) -> Iterator[nn.Module]:
        """The modules that hold most of a block's weights, each called as a whole: what FSDP2 shards."""
        raise TypeError(f"{type(self).__name__} must define layer_modules().")

    def dummy_batch(self, batch_size: int, **settings: Any) -> dict[str, Tensor]:
        """A batch of the right shapes and dtypes for the objective, to count memory with; the values mean nothing."""
        raise TypeError(f"{type(self).__name__} must define dummy_batch().")

    def check_batch(self, batch: dict[str, Tensor]) -> None:
        """Raise a ``ValueError`` for a training batch that does not fit the model. Families override it."""

    def check_dataset(self, dataset: Any) -> None:
        """Raise a ``ValueError`` for what is wrong anywhere in a data set and cheap to see. Families override it."""

    def wrong_rows(self, batch: dict[str, Tensor]) -> Tensor:
        """Which samples of a training batch cannot be learned from, as booleans [batch]: those that are not finite."""
        first = next(iter(batch.values()))
        wrong = torch.zeros(len(first), dtype=torch.bool, device=first.device)
        for value in batch.values():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                wrong |= ~torch.isfinite(value).flatten(1).all(1)
        return wrong

    def begin_block(self, block: int, hand_over: bool = False) -> None:
        """Prepare a block whose training begins after that of the blocks below it. Families override it."""

    def check_input(self, z: Tensor, **conditioning: Any) -> None:
        """Raise a ``ValueError`` for inputs that do not fit the model. Families override it."""

    @classmethod
    def config_from(
        cls, base_config: Mapping[str, Any], num_blocks: int | None = None, **settings: Any
    ) -> DiffusionBlocksConfig:
        """The config of a blocked model from the base's config and fields of ``config_class``.

        Args:
            base_config: of the network that is cut.
            num_blocks: B, default 3.
            **settings: fields of the config.
        """
        if num_blocks is None:
            num_blocks = len(settings["layers_per_block"]) if settings.get("layers_per_block") else 3
        return cls.config_class(base_config=dict(base_config), num_blocks=num_blocks, **settings)

    # -- blocks --------------------------------------------------------------------------------------------------

    @property
    def resident_blocks(self) -> tuple[int, ...]:
        """Numbers of the blocks that are allocated."""
        return tuple(int(name) for name in self.blocks)

    def block(self, block: int) -> nn.Module:
        """The module of a loaded block; if blocks are streamed, it is on the device until another one is asked for.

        Raises:
            ValueError: if it does not exist or was not loaded.
        """
        self.check_loaded(block)
        if self.streamer is not None:
            self.streamer.visit(block)
        return self.blocks[str(block)]

    def check_loaded(self, block: int) -> None:
        """Raise a ``ValueError`` if a block does not exist or was not loaded."""
        self.partition.check_block(block)
        if str(block) not in self.blocks:
            raise ValueError(
                f"block {block} is not loaded: this model holds blocks {list(self.resident_blocks)}. "
                f"Load it with from_pretrained(..., blocks=[{block}])."
            )

    def block_parameters(self, block: int) -> Iterator[tuple[str, nn.Parameter]]:
        """Names (as in the state dict) and parameters of a block."""
        return self.block(block).named_parameters(prefix=f"blocks.{block}")

    def shared_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that belong to no block."""
        return ((n, p) for n, p in self.named_parameters() if serialization.file_of_key(n) == serialization.SHARED_NAME)

    # -- the denoiser --------------------------------------------------------------------------------------------

    def denoise(self, z: Tensor, sigma: Tensor | float, *, block: int | None = None, **conditioning: Any) -> Tensor:
        """D_b(x, z, sigma): the estimate of the clean sample (EDM, arXiv 2206.00364, Eq. 7).

        Args:
            z: noisy samples ``y + sigma * eps``, [batch, ...].
            sigma: noise level, a number or [batch].
            block: the block to use; by default the one that owns sigma.
            **conditioning: what the family conditions on, such as ``class_labels``.

        Returns:
            float32 (float64 for float64 input) tensor of the shape of ``z``.

        Raises:
            ValueError: for noise levels out of range, a batch whose noise levels span blocks (split it by block),
                a block that is not loaded, or inputs that do not fit the model.
        """
        self.check_input(z, **conditioning)
        try:
            sigma = torch.as_tensor(sigma, device=z.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"sigma={sigma!r} is not a noise level: give a number or a tensor [{len(z)}].") from error
        sigma = sigma if sigma.is_floating_point() else sigma.float()
        if sigma.ndim == 0:
            sigma = sigma.expand(z.shape[0])
        if sigma.shape != z.shape[:1]:
            raise ValueError(f"sigma has shape {list(sigma.shape)}: give a number or one value per sample, [{len(z)}].")
        if len(z) == 0:
            raise ValueError("the batch is empty: give at least one sample to denoise.")
        if block is None:
            block = self._single_block(sigma)
        else:
            self.partition.check_sigma(sigma)
        return self._denoise(z, sigma, block, **conditioning)

    def _denoise(self, z: Tensor, sigma: Tensor, block: int, **conditioning: Any) -> Tensor:
        compute_dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        z = z.to(compute_dtype)
        c = self.preconditioning(sigma)
        scaled = (expand(c.c_in, z) * z).to(self.dtype)
        f = self.run_block(block, scaled, c.c_noise, **conditioning).to(compute_dtype)
        # D = c_skip z + c_out F(c_in z, c_noise)   (EDM, arXiv 2206.00364, Eq. 7)
        return expand(c.c_skip, z) * z + expand(c.c_out, z) * f

    def _single_block(self, sigma: Tensor) -> int:
        owners = self.partition.block_of(sigma).unique().tolist()
        if len(owners) != 1:
            raise ValueError(
                f"the batch's noise levels span blocks {owners}: call denoise once per block, or name the block."
            )
        return owners[0]

    def forward(
        self,
        sample: Tensor,
        sigma: Tensor | float,
        block: int | None = None,
        return_dict: bool = True,
        **conditioning: Any,
    ) -> DenoiserOutput | tuple[Tensor]:
        """``denoise`` in the manner of diffusers' models; returns a ``DenoiserOutput`` or a tuple."""
        denoised = self.denoise(sample, sigma, block=block, **conditioning)
        return DenoiserOutput(sample=denoised) if return_dict else (denoised,)

    # -- initialisation ------------------------------------------------------------------------------------------

    def initialize_weights(self) -> None:
        """Initialise each block, and what they share, from a random stream of its own: one block alone gets the same
        weights."""
        self._initialize_part(-1, nn.ModuleList(self._shared_children()))
        if not self._made_by_block:
            for name, module in self.blocks.items():
                self._initialize_part(int(name), module)

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def _initialize_part(self, stream: int, module: nn.Module) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self._init_seed + stream) % 2**63)
            self._initialize_tree(module)

    def _initialize_tree(self, module: nn.Module) -> None:
        for child in module.children():
            self._initialize_tree(child)
        self._initialize_weights(module)

    def print_block_parameters(self) -> None:
        """Print a table of the parameters of each block, in the manner of peft's ``print_trainable_parameters``."""
        print(format_block_parameters(self))


def format_block_parameters(model: BlockedPreTrainedModel, noise: bool = True) -> str:
    """The table that ``BlockedPreTrainedModel.print_block_parameters`` prints; ``noise``: with the noise levels."""
    total = sum(p.numel() for p in model.parameters())
    width = 24 if noise else 0
    symbol = model.partition.noise.symbol if noise else ""
    lines = [f"{'block':<8}{'layers':<12}{symbol:<{width}}{'params':>14}{'share %':>10}"]
    for block in model.resident_blocks:
        layers, (low, high) = model.partition.layers(block), model.partition.range(block)
        count = sum(p.numel() for _, p in model.block_parameters(block))
        span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
        levels = f"{high:.4g} to {low:.4g}" if noise else ""
        lines.append(f"{block:<8}{span:<12}{levels:<{width}}{count:>14,}{100 * count / total:>10.2f}")
    shared = sum(p.numel() for _, p in model.shared_parameters())
    lines.append(f"{'shared':<{20 + width}}{shared:>14,}{100 * shared / total:>10.2f}")
    lines.append(f"{'all':<{20 + width}}{total:>14,}{100.0:>10.2f}")
    return "\n".join(lines)


def enable_checkpointing(model: PreTrainedModel, **kwargs: Any) -> None:
    """Recompute activations layer by layer, without reentry (gradients would vanish beside frozen parts)."""
    # transformers renamed it; both names mean this.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **kwargs})
