"""Pictures of a partition, a run and its samples, written as PNG files.

Every function draws on a ``matplotlib.figure.Figure`` of its own with the Agg canvas: no window opens, and the backend,
the settings and the figures of the caller stay as they are. A block has the same colour in every picture. A file is
written beside its final name and renamed; missing folders are made. A path that does not end in ``.png`` is a
``ValueError``.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from . import figures
from .figures import block_color
from .partition import BlockPartition
from .serialization import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_sample_grid(
    images: Tensor,
    labels: Tensor | Sequence[int],
    path: str | os.PathLike,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    columns: int | None = None,
    title: str | None = None,
) -> Path:
    """Draw samples, one row per class, with the classes' names at the left.

    Args:
        images: float [samples, channels, height, width] in [0, 1]; 1 or 3 channels.
        labels: classes [samples]; the label after the last of a list of names is drawn as "no class".
        path: the PNG file to write.
        class_names: names of the classes; "class 3" and so on by default.
        columns: images per row; a class with more goes on in the next row. All of a class in one row by default.
        title: line above the picture.

    Returns:
        The path that was written.

    Raises:
        ValueError: for no images, another shape or range, a label per image missing, or a label without a name.
    """
    return _save(path, lambda: figures.sample_grid_figure(images, labels, class_names, columns, title))


def plot_denoising(
    steps: Sequence[Mapping[str, Any]],
    partition: BlockPartition,
    path: str | os.PathLike,
    title: str | None = None,
    sigma_data: float = 0.5,
) -> Path:
    """Draw how samples emerge: the noisy state and the denoised estimate along the blocks.

    About ten steps are drawn, among them the first and the last of every block. The state is shown times
    ``sigma_data / sqrt(sigma^2 + sigma_data^2)``, which gives it the data's variance at every noise level.

    Args:
        steps: in the order of sampling, ``{"sigma": float, "block": int, "z": [n, channels, height, width],
            "denoised": [n, channels, height, width]}``; data in [-1, 1], 1 or 3 channels (decode latents first).
        partition: names the layers of each block.
        path: the PNG file to write.
        title: line above the picture.
        sigma_data: standard deviation of the data.

    Returns:
        The path that was written.

    Raises:
        ValueError: for no steps, tensors of other shapes or a block that does not exist.
    """
    return _save(path, lambda: figures.denoising_figure(steps, partition, title, sigma_data))


def plot_partition(partition: BlockPartition, path: str | os.PathLike) -> Path:
    """Draw the density of ``ln sigma`` with each block's range, widened by the overlap in a lighter colour.

    Args:
        partition: the partition.
        path: the PNG file to write.

    Returns:
        The path that was written.
    """
    return _save(path, lambda: figures.partition_figure(partition))


def plot_memory(plan: Any, path: str | os.PathLike) -> Path:
    """Draw a memory plan: one bar per row, stacked by kind, with bytes and the ratio to end-to-end training.

    Args:
        plan: a memory plan (its ``rows``) or the rows themselves, with ``method``, ``block`` (None: of the whole
            method), ``total`` and the kinds ``weights``, ``gradients``, ``moments``, ``ema``, ``activations`` in bytes.
        path: the PNG file to write.

    Returns:
        The path that was written.

    Raises:
        ValueError: for a plan without rows or negative bytes.
    """
    return _save(path, lambda: figures.memory_figure(plan))


def plot_losses(
    run_dir: str | os.PathLike, path: str | os.PathLike, unit: str | None = None, whole: str = "all noise levels"
) -> Path:
    """Draw a run's losses: each block's training loss over its updates, and held-out losses where there are any.

    Args:
        run_dir: a trainer's output directory, with ``updates.jsonl`` and perhaps ``evaluations.jsonl``.
        path: the PNG file to write.
        unit: of the losses, for the axes.
        whole: what the held-out loss that belongs to no block is of.

    Returns:
        The path that was written.

    Raises:
        ValueError: if the log is missing, empty or broken (a last line that is cut short is passed over).
    """
    return _save(path, lambda: figures.losses_figure(Path(run_dir), unit, whole))


def plot_block_bits(
    bits: Sequence[float],
    partition: BlockPartition,
    path: str | os.PathLike,
    whole: float | None = None,
    xlabel: str = "bits per character",
) -> Path:
    """Draw what each block of a language model scores, and the whole model beside them.

    Args:
        bits: a figure per block.
        partition: names the layers of each block.
        path: the PNG file to write.
        whole: the model's figure.
        xlabel: what is drawn, with its unit.

    Returns:
        The path that was written.

    Raises:
        ValueError: unless there is one finite figure per block.
    """
    labels = [figures.name_block(partition, block) for block in range(partition.num_blocks)]
    return _save(path, lambda: figures.block_bits_figure(bits, whole, labels, xlabel))


def plot_text_samples(samples: Sequence[tuple[str, str]], path: str | os.PathLike, title: str | None = None) -> Path:
    """Draw generated text.

    Args:
        samples: pairs of a prompt and the text that begins with it.
        path: the PNG file to write.
        title: line above the picture.

    Returns:
        The path that was written.

    Raises:
        ValueError: for no samples.
    """
    with warnings.catch_warnings():  # scripts that the font has no glyphs for are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph")
        return _save(path, lambda: figures.text_samples_figure(samples, title))


def plot_curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    path: str | os.PathLike,
    xlabel: str,
    ylabel: str,
    title: str | None = None,
    logx: bool = False,
    logy: bool = False,
    reference: Mapping[str, float] | None = None,
) -> Path:
    """Draw curves with markers; a series named "block 2" has that block's colour.

    Args:
        series: points ``(x, y)`` under the name of each curve.
        path: the PNG file to write.
        xlabel: what x is, with its unit.
        ylabel: what y is, with its unit.
        title: line above the picture.
        logx: logarithmic x.
        logy: logarithmic y.
        reference: horizontal lines to compare with.

    Returns:
        The path that was written.

    Raises:
        ValueError: for no series, a series without points, numbers that are not finite, or values that are not
            positive on a logarithmic axis.
    """
    return _save(path, lambda: figures.curves_figure(series, xlabel, ylabel, title, logx, logy, reference or {}))


class SampleGridCallback(TrainerCallback):
    """Draws samples of the averaged weights during training, in ``output_dir/samples/iteration-0000100.png``.

    Sampling has a random stream of its own: a run with this callback has the losses and weights of one without.

    Args:
        every: iterations between pictures.
        class_labels: the classes to sample, one image each.
        num_inference_steps: steps of the sampler.
        guidance_scale: classifier-free guidance; 1 switches it off.
        seed: of the starting noise, the same for every picture.
        vae: decoder of latents; None for models of pixels.
        class_names: names of the classes.

    Raises:
        ValueError: when it is made, for numbers that are not positive; when training begins, for labels that the model
            does not have, blocks that are not loaded, or latents without a decoder.

    Example:
        >>> callback = SampleGridCallback(every=500, class_labels=[0, 1, 2], num_inference_steps=20)
    """

    def __init__(
        self,
        every: int,
        class_labels: Sequence[int],
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        seed: int = 0,
        vae: Any = None,
        class_names: Sequence[str] | Mapping[int, str] | None = None,
    ):
        for name, value in (("every", every), ("num_inference_steps", num_inference_steps)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
        self.class_labels = [int(label) for label in class_labels]
        if not self.class_labels:
            raise ValueError("class_labels is empty: name at least one class to sample.")
        self.every, self.num_inference_steps, self.guidance_scale = every, num_inference_steps, guidance_scale
        self.seed, self.vae, self.class_names = seed, vae, class_names

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Check that the model can be sampled, before any work."""
        config, blocks = model.config, model.partition.num_blocks
        if len(model.resident_blocks) < blocks:
            raise ValueError(
                f"samples need all {blocks} blocks, and this model holds {list(model.resident_blocks)}: "
                "load it with blocks=None, or train without SampleGridCallback."
            )
        if self.vae is None and config.in_channels not in (1, 3):
            raise ValueError(
                f"the model samples latents of {config.in_channels} channels: give SampleGridCallback their vae."
            )
        labels = torch.tensor(self.class_labels)
        model.check_input(
            torch.empty(len(labels), config.in_channels, config.sample_size, config.sample_size), class_labels=labels
        )

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, trainer: Any, **kwargs: Any) -> None:
        """Draw a picture every ``every`` iterations."""
        if state.global_step % self.every:
            return
        from .pipelines import BlockedDiTPipeline

        device = next(model.parameters()).device
        pipeline = BlockedDiTPipeline(model, vae=self.vae)
        pipeline.set_progress_bar_config(disable=True)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), trainer.averaged_weights():
            images = pipeline(
                self.class_labels,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                generator=torch.Generator().manual_seed(self.seed),
                output_type="pt",
            ).images
        save_sample_grid(
            images,
            self.class_labels,
            Path(args.output_dir) / "samples" / f"iteration-{state.global_step:07d}.png",
            class_names=self.class_names,
            title=f"iteration {state.global_step}",
        )


def _save(path: str | os.PathLike, build: "Callable[[], Figure]") -> Path:
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path={str(path)!r} must end in .png: pictures are written as PNG.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with figures.plot_style():
        canvas = FigureCanvasAgg(build())
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda temporary: canvas.print_png(str(temporary)))
    return path


__all__ = [
    "SampleGridCallback",
    "block_color",
    "plot_block_bits",
    "plot_curves",
    "plot_denoising",
    "plot_losses",
    "plot_memory",
    "plot_partition",
    "plot_text_samples",
    "save_sample_grid",
]
