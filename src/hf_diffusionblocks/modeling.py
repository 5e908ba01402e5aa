"""What all blocked models have in common: blocks, routing, preconditioning, and files by block."""

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.hub import extract_commit_hash

from . import serialization
from .agreement import SAME_MODEL, first_difference
from .configuration import DiffusionBlocksConfig
from .loading_checks import check_files, checked_blocks
from .preconditioning import expand
from .repository import PushedBlocks
from .streaming import StreamedBlocks, StreamingRequest, requested_streaming


@dataclass
class DenoiserOutput(ModelOutput):
    """Output of a blocked denoiser.

    Args:
        sample: the estimate of the clean sample, the shape of the input.
    """

    sample: Tensor | None = None


class BlockedPreTrainedModel(StreamedBlocks, PushedBlocks, PreTrainedModel):
    """A residual network cut into blocks that are trained alone (arXiv 2506.14202).

    Args:
        config: the config, which alone rebuilds the model.
        blocks: allocate these blocks only; all by default.

    Attributes:
        partition: the ``BlockPartition``, the one road from a noise level to a block.
        preconditioning: from the raw network to the denoiser.
        blocks: the resident blocks, under their numbers.
    """

    config_class = DiffusionBlocksConfig
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

    # -- files ---------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write ``config.json``, one weight file per resident block, the shared file and the index.

        A new directory appears complete or not at all. In an existing one all files are written beside the old ones
        and then renamed, the index last; if anything fails, the old ones stay. A model that holds some blocks only
        leaves the others' files as they are; a whole model removes block files that are not its own.

        Args:
            save_directory: where to.
            is_main_process: write only if true.
            push_to_hub: upload afterwards, as in transformers (``repo_id``, ``token``, … in ``kwargs``).
            **kwargs: ``max_shard_size`` is held to: a block lies in one file, which must not be larger.

        Raises:
            NotADirectoryError: if the path is a file.
            ValueError: if this model holds some blocks only and the directory holds another model, or a block is
                larger than ``max_shard_size``.
            OSError: if the disk is full; nothing half written stays.
        """
        target = Path(save_directory)
        if target.is_file():
            raise NotADirectoryError(f"{target} is a file; give a directory to save the model in.")
        if is_main_process:
            self.config.architectures = [type(self).__name__]
            self.config.dtype = self.dtype
            state_dict = kwargs.pop("state_dict", None) or self._own_state_dict()
            limit = kwargs.pop("max_shard_size", None)
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target if target.exists() else target.parent
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=beside) as temporary:
                staging = Path(temporary) / "model"
                staging.mkdir()
                self._write_files(staging, state_dict, target, limit)
                if target.exists():
                    serialization.move_files(staging, target)
                else:
                    os.replace(staging, target)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", target.name), **kwargs)

    def _own_state_dict(self) -> dict[str, Tensor] | Iterator[dict[str, Tensor]]:
        if self.streamer is not None:
            return self._state_dict_parts()
        if "disk" in (getattr(self, "hf_device_map", None) or {}).values():
            from accelerate.utils.modeling import get_state_dict_offloaded_model

            return get_state_dict_offloaded_model(self)
        return self.state_dict()

    def _write_files(
        self,
        staging: Path,
        state_dict: dict[str, Tensor] | Iterator[dict[str, Tensor]],
        target: Path,
        limit: int | str | None,
    ) -> None:
        """Write the files of a save to ``target`` into an empty directory."""
        partial = len(self.resident_blocks) < self.partition.num_blocks
        config = self.config.to_dict()
        config.pop("_name_or_path", None)  # where it was loaded from is nobody else's business
        if partial and (target / "config.json").is_file():
            old = type(self.config).from_pretrained(target).to_dict()
            difference = first_difference(old, config, SAME_MODEL)
            if difference is not None:
                name, theirs, ours = difference
                raise ValueError(
                    f"{target} holds another model: its {name} is {theirs!r}, this one's {ours!r}. "
                    "Save these blocks in a directory of their own."
                )
        serialization.write_json(staging / "config.json", config)
        if self.can_generate():
            self.generation_config.save_pretrained(staging)
        serialization.write_weights(staging, state_dict, target if partial else None, limit)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        blocks: Sequence[int] | None = None,
        block_streaming: str | None = None,
        **kwargs: Any,
    ):
        """Load a model, or only some of its blocks.

        Args:
            pretrained_model_name_or_path: a directory or a Hub id.
            blocks: read and allocate these blocks and the shared parts only; the other files need not exist.
            block_streaming: ``host`` or ``disk``: load block by block, and keep one on the device while the others rest
                in host memory or in their files; see ``enable_block_streaming``.
            **kwargs: as in transformers: ``dtype``, ``device_map``, ``revision``, ``token``, …

        Raises:
            ValueError: for a missing, truncated or corrupted file, named with its block.
        """
        request = StreamingRequest(block_streaming) if block_streaming else requested_streaming()
        if request is not None:
            name = pretrained_model_name_or_path
            return cls._from_pretrained_streamed(request, name, *model_args, blocks=blocks, **kwargs)
        output_loading_info = kwargs.pop("output_loading_info", False)
        hub = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
        hub_kwargs = {name: kwargs[name] for name in hub if name in kwargs}
        find = serialization.FileFinder(pretrained_model_name_or_path, hub_kwargs)
        index_path = find(serialization.INDEX_NAME)
        if (commit := extract_commit_hash(str(index_path), None)) is not None:
            # All files of one commit, whatever is pushed meanwhile.
            find.kwargs["revision"] = kwargs["revision"] = commit
        index = serialization.read_index(index_path)
        if not isinstance(kwargs.get("config"), DiffusionBlocksConfig):
            find("config.json")  # transformers then finds it in the cache
        if blocks is not None:
            config: Any = kwargs.pop("config", None) or pretrained_model_name_or_path
            if not isinstance(config, DiffusionBlocksConfig):
                dtype: dict[str, Any] = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
                config, kwargs = cls.config_class.from_pretrained(config, return_unused_kwargs=True, **kwargs)
                kwargs |= dtype
            blocks = checked_blocks(config.make_partition(), blocks)
            kwargs |= {"config": config, "blocks": blocks}
        paths = [find(name) for name in serialization.files_for(index, blocks)]
        for path in paths:
            serialization.verify_file(path, index)
        if not kwargs.get("ignore_mismatched_sizes"):
            check_files(cls, find, kwargs.get("config"), blocks, paths)
        if blocks is None:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        else:
            # transformers resolves every file of an index: hand it a directory whose index names only these files.
            view, kept = Path(tempfile.mkdtemp(prefix="diffusionblocks-")), False
            try:
                for path in paths:
                    os.symlink(path.resolve(), view / path.name)
                part = {k: f for k, f in index["weight_map"].items() if f in {p.name for p in paths}}
                serialization.write_json(
                    view / serialization.INDEX_NAME, {"metadata": index["metadata"], "weight_map": part}
                )
                if cls.can_generate():
                    config.save_pretrained(view)  # generate's settings come from it if they have no file of their own
                    with contextlib.suppress(OSError, ValueError):
                        os.symlink(find("generation_config.json").resolve(), view / "generation_config.json")
                for name in hub_kwargs:
                    kwargs.pop(name, None)
                model, info = super().from_pretrained(view, *model_args, output_loading_info=True, **kwargs)
                if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
                    weakref.finalize(model, shutil.rmtree, view, ignore_errors=True)  # it reads from there
                    kept = True
            finally:
                if not kept:
                    shutil.rmtree(view, ignore_errors=True)
            model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        missing = sorted(info["missing_keys"])
        if missing:
            file = serialization.describe_file(serialization.file_of_key(missing[0]))
            raise ValueError(f"{file} lacks {len(missing)} weights of the model, {missing[0]!r} first.")
        return (model, info) if output_loading_info else model

    def print_block_parameters(self) -> None:
        """Print a table of the parameters of each block, in the manner of peft's ``print_trainable_parameters``."""
        print(format_block_parameters(self))


def format_block_parameters(model: BlockedPreTrainedModel) -> str:
    """The table that ``BlockedPreTrainedModel.print_block_parameters`` prints."""
    total = sum(p.numel() for p in model.parameters())
    lines = [f"{'block':<8}{'layers':<12}{model.partition.noise.symbol:<24}{'params':>14}{'share %':>10}"]
    for block in model.resident_blocks:
        layers, (low, high) = model.partition.layers(block), model.partition.range(block)
        count = sum(p.numel() for _, p in model.block_parameters(block))
        span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
        lines.append(f"{block:<8}{span:<12}{f'{high:.4g} to {low:.4g}':<24}{count:>14,}{100 * count / total:>10.2f}")
    shared = sum(p.numel() for _, p in model.shared_parameters())
    lines.append(f"{'shared':<44}{shared:>14,}{100 * shared / total:>10.2f}")
    lines.append(f"{'all':<44}{total:>14,}{100.0:>10.2f}")
    return "\n".join(lines)


def enable_checkpointing(model: PreTrainedModel, **kwargs: Any) -> None:
    """Recompute activations layer by layer, without reentry (gradients would vanish beside frozen parts)."""
    # transformers renamed it; both names mean this.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **kwargs})
