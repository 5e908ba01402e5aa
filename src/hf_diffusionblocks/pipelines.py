"""Pipelines: class labels in, images out, one block of the model per step."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_MAPPING

from . import serialization
from .auto_classes import CONFIGS
from .configuration import read_config
from .families.dit import BlockedDiTModel
from .modeling import BlockedPreTrainedModel
from .sampling import StepEnd, guided, make_grid, make_solver, sample_with_scheduler
from .suggest import unknown_name

_MODEL_INDEX = "model_index.json"

logger = logging.get_logger(__name__)


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images [batch, channels, height, width] in about [-1, 1] of latents as a latent model works with them.

    Those are ``(z - shift_factor) * scaling_factor``, with the factors of the VAE's config.
    """
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    z = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + shift
    return vae.decode(z).sample


def _model_class(name: str | os.PathLike, hub: dict[str, Any]) -> type[BlockedPreTrainedModel]:
    """The class of a saved model of images: of a blocked DiT, or of a family that a user has registered."""
    try:
        kind = read_config(name, **hub)[0].get("model_type")
    except (OSError, ValueError):
        return BlockedDiTModel  # which says what is missing or broken
    if not isinstance(kind, str) or kind in CONFIGS or kind not in CONFIG_MAPPING:
        return BlockedDiTModel
    found = MODEL_MAPPING.get(CONFIG_MAPPING[kind], None)
    return found if isinstance(found, type) and issubclass(found, BlockedPreTrainedModel) else BlockedDiTModel


class BlockedDiTPipeline(DiffusionPipeline):
    """Samples images from a blocked DiT (arXiv 2506.14202, section 4.2), or a model that is asked as one is.

    Args:
        model: the blocked DiT; or one of a family of your own whose config has ``num_classes``, ``in_channels`` and
            ``sample_size``, and whose ``denoise`` takes ``class_labels``, the last one more for no class.
        scheduler: a diffusers scheduler (EDM-style, sigma-based, DDIM or DDPM); None for the built-in solvers.
        vae: decoder of latents; None for models of pixels.

    Example:
        >>> from hf_diffusionblocks import BlockedDiTPipeline
        >>> pipe = BlockedDiTPipeline.from_pretrained("runs/digits-dit/model")  # doctest: +SKIP
        >>> images = pipe([0, 1, 2, 3], num_inference_steps=50).images  # doctest: +SKIP
    """

    model_cpu_offload_seq = "model->vae"
    _optional_components = ["scheduler", "vae"]
    _callback_tensor_inputs = ["latents", "noisy", "denoised"]

    def __init__(self, model: BlockedPreTrainedModel, scheduler: Any = None, vae: AutoencoderKL | None = None):
        super().__init__()
        if not model.config.num_classes:
            raise ValueError(
                f"this model is of a {model.config.base_class}, which takes prompts: give model.as_transformer() to "
                "the diffusers pipeline of its base in the place of its transformer."
            )
        self.register_modules(model=model, scheduler=scheduler, vae=vae)

    def enable_block_streaming(self, *args: Any, **kwargs: Any) -> None:
        """Keep one block of the model on the device and the others in host memory or on disk, fetched in the order of
        the grid; see ``BlockedDiTModel.enable_block_streaming``. Images are the same, bit for bit."""
        self.model.enable_block_streaming(*args, **kwargs)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the model samples."""
        config = self.model.config
        return config.in_channels, config.sample_size, config.sample_size

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        solver: str = "euler",
        grid: str = "karras",
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample one image per label.

        Args:
            class_labels: classes, 0 to ``num_classes - 1``; ``num_classes`` stands for no class.
            num_inference_steps: steps; with ``euler`` one evaluation of one block each, with ``heun`` two.
            guidance_scale: classifier-free guidance; 1 switches it off.
            generator: for reproducible samples.
            solver: ``euler`` or ``heun``; unused with a scheduler.
            grid: ``karras`` or ``equal_probability``; unused with a scheduler.
            latents: standard normal noise [batch, channels, size, size] to start from.
            output_type: ``pil``, ``np`` ([batch, height, width, channels] in [0, 1]), ``pt`` ([batch, channels,
                height, width] in [0, 1]) or ``latent`` (what the model itself samples, not decoded or clamped).
            return_dict: return an ``ImagePipelineOutput``, else a tuple.
            callback_on_step_end: ``callback(pipe, step, timestep, callback_kwargs)`` after each step, as in diffusers;
                ``timestep`` is the scheduler's, of the built-in solvers the noise level that the step began with. It
                returns a dict, whose ``latents`` are gone on with, or None.
            callback_on_step_end_tensor_inputs: what ``callback_kwargs`` holds: ``latents`` (the state after the step),
                ``noisy`` and ``denoised`` (z and D(z) with which it began).

        Raises:
            ValueError: for labels out of range, an unknown solver, grid or output type, or blocks that are not loaded.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} must be 'pil', 'np', 'pt' or 'latent'.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                unknown_name("callback_on_step_end_tensor_inputs", unknown.pop(), self._callback_tensor_inputs)
            )
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale={guidance_scale} must be a finite number; 1 switches guidance off.")
        on_step_end = self._step_end(callback_on_step_end, callback_on_step_end_tensor_inputs)
        model, device = self.model, self._execution_device
        labels = torch.as_tensor(class_labels, device=device).reshape(-1)
        if len(labels) == 0:
            raise ValueError("class_labels is empty: give at least one label.")
        latents = self._starting_noise(latents, len(labels), guidance_scale, generator)
        training = model.training
        model.eval()
        try:
            denoise = guided(model.denoise, labels, model.config.num_classes, guidance_scale)
            if self.scheduler is not None:
                z = sample_with_scheduler(
                    denoise,
                    self.scheduler,
                    model.partition,
                    latents.to(device),
                    num_inference_steps,
                    generator=generator,
                    progress=self.progress_bar,
                    on_step_end=on_step_end,
                )
            else:
                z = self._solve(denoise, latents.to(device), num_inference_steps, solver, grid, on_step_end)
        finally:
            model.train(training)
        images = self._decode(z, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _starting_noise(
        self,
        latents: Tensor | None,
        count: int,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:
        """Standard normal noise of so many samples: what was given, checked, or a new draw."""
        model = self.model
        missing = set(range(model.partition.num_blocks)) - set(model.resident_blocks)
        if missing:
            raise ValueError(f"sampling needs every block; not loaded: {sorted(missing)}. Load them with blocks=None.")
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} labels: give one, or one per label.")
        shape = (count, *self.sample_shape)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=model.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {list(latents.shape)}; give standard normal noise of {list(shape)}.")
        if guidance_scale != 1 and model.config.label_dropout == 0:
            logger.warning(
                f"guidance_scale={guidance_scale} needs the null class, which a model with label_dropout=0 never "
                "trained. Use guidance_scale=1."
            )
        if not bool(torch.isfinite(latents).all()):  # once per call; denoise itself does not look at every z
            raise ValueError("latents holds values that are not finite; give standard normal noise.")
        return latents

    def _step_end(self, callback: Callable[..., Any] | None, names: Sequence[str]) -> StepEnd | None:
        """diffusers' callback as the samplers call it."""
        if callback is None:
            return None

        def after(step: int, timestep: Any, tensors: dict[str, Tensor]) -> Tensor:
            changed = callback(self, step, timestep, {name: tensors[name] for name in names}) or {}
            return changed.get("latents", tensors["latents"])

        return after

    def _solve(
        self, denoise: Any, noise: Tensor, steps: int, solver: str, grid: str, on_step_end: StepEnd | None
    ) -> Tensor:
        solve = make_solver(solver)
        sigmas = make_grid(self.model.partition, steps, grid)
        with self.progress_bar(total=steps) as bar:

            def after_step(step: int, sigma: float, z: Tensor, denoised: Tensor) -> None:
                bar.update()

            with self.model.expect_blocks([self.model.partition.block_of(sigma) for sigma in sigmas[:-1].tolist()]):
                # z ~ sigma_max N(0, I)   (EDM, arXiv 2206.00364, Alg. 2)
                return solve(denoise, sigmas[0].item() * noise.float(), sigmas, after_step, on_step_end)

    def _decode(self, z: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return z
        if self.vae is not None:
            z = decode_latents(self.vae, z)
        images = (z.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images

    # -- files: the model at the root of the directory, the other components in folders ---------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write the model's files at the root, ``scheduler/`` and ``vae/`` where there are any.

        Args:
            save_directory: where to.
            **kwargs: passed to the model's ``save_pretrained``.
        """
        root = Path(save_directory)
        self.model.save_pretrained(root, **kwargs)
        self.save_components(root)

    def save_components(self, save_directory: str | os.PathLike) -> None:
        """Write what belongs to a model that is saved already: ``scheduler/``, ``vae/`` and ``model_index.json``."""
        root = Path(save_directory)
        for name in ("scheduler", "vae"):
            if getattr(self, name) is not None:
                getattr(self, name).save_pretrained(root / name)
        self.save_index(root)

    def save_index(self, save_directory: str | os.PathLike) -> None:
        """Write ``model_index.json`` alone, into the directory of a saved model."""
        library = type(self.model).__module__.split(".")[0]
        index: dict[str, Any] = {"_class_name": type(self).__name__, "model": [library, type(self.model).__name__]}
        for name in ("scheduler", "vae"):
            if getattr(self, name) is not None:
                index[name] = ["diffusers", type(getattr(self, name)).__name__]
        serialization.write_json(Path(save_directory) / _MODEL_INDEX, index)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "BlockedDiTPipeline":
        """Load a pipeline, or a bare model's directory, from a directory or the Hub.

        Args:
            pretrained_model_name_or_path: directory or Hub id.
            **kwargs: ``scheduler``, ``vae`` to replace the saved ones; everything else goes to the model
                (``dtype``, ``device_map``, ``revision``, ``block_streaming``, …).

        Raises:
            ValueError: if files are missing or broken.
        """
        import diffusers
        from transformers.utils import cached_file

        components: dict[str, Any] = {name: kwargs.pop(name) for name in ("scheduler", "vae") if name in kwargs}
        model = kwargs.pop("model", None)
        hub: dict[str, Any] = {
            k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in kwargs
        }
        if model is None:
            kind = _model_class(pretrained_model_name_or_path, hub)
            model = kind.from_pretrained(pretrained_model_name_or_path, **kwargs)
        path = cached_file(
            str(pretrained_model_name_or_path), _MODEL_INDEX, _raise_exceptions_for_missing_entries=False, **hub
        )
        index = serialization.read_json(Path(path)) if path else {}
        for name, base in (("scheduler", diffusers.SchedulerMixin), ("vae", diffusers.ModelMixin)):
            if name in components or name not in index:
                continue
            entry = index[name]
            library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, entry)
            component = getattr(diffusers, str(class_name), None) if library == "diffusers" else None
            if not (isinstance(component, type) and issubclass(component, base)):
                raise ValueError(f"{_MODEL_INDEX} names {library}.{class_name} as {name}: not a diffusers {name}.")
            safe = {"use_safetensors": True} if name == "vae" else {}  # never a pickle
            load = component.from_pretrained  # type: ignore[attr-defined]  # diffusers' mixins have it
            components[name] = load(pretrained_model_name_or_path, subfolder=name, **hub, **safe)
        return cls(model, **components)


__all__ = ["BlockedDiTPipeline", "decode_latents"]
