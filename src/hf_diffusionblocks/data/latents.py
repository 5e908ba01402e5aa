"""Latents of a VAE, cached on disk: written shard by shard, and read back."""

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..serialization import atomic_write
from ..suggest import unknown_name
from .image_dataset import class_indices, first_not_finite


def cache_latents(
    dataset: Any,
    vae: Any,
    output_dir: str | os.PathLike,
    *,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    posterior: str = "sample",
    seed: int = 0,
    shard_size: int = 8192,
    disable_progress: bool = False,
) -> Path:
    """Encode images with a VAE and keep the latents in ``output_dir/latents-00000.safetensors``, ...

    What is stored, in float16, is ``(z - shift_factor) * scaling_factor`` with the VAE's own factors, the space in
    which a latent diffusion model works. ``load_image_dataset(output_dir)`` reads it back. Each file is complete or
    absent, and a second call with the same arguments goes on after the last finished file.

    Args:
        dataset: an ``ImageDataset`` of pixels, or anything with ``len``, ``ds[list]`` giving ``pixel_values`` and
            ``class_labels``, and a ``fingerprint``: a ``datasets.Dataset`` with a transform serves for sets that do not
            fit into memory.
        vae: a diffusers ``AutoencoderKL``; moved to ``device`` and ``dtype`` and left there, in eval mode.
        output_dir: directory of one split's latents, made if need be.
        batch_size: images per call of the encoder. It does not change the noise of ``posterior="sample"``.
        device: where to encode; by default where the VAE is.
        dtype: precision of the encoder; by default the VAE's.
        posterior: z is a ``"sample"`` of the posterior N(mean, std^2), as in DiT's training, or its ``"mode"``.
        seed: of the samples' noise, which is drawn on the CPU per file: the same on every device.
        shard_size: rows per file.
        disable_progress: no progress bar.

    Returns:
        ``output_dir``.

    Raises:
        ValueError: if the images do not fit the VAE, a latent is not finite, or the directory holds the latents of
            another data set, VAE or setting.
    """
    if posterior not in ("sample", "mode"):
        raise ValueError(unknown_name("posterior", posterior, ("sample", "mode")))
    if batch_size < 1 or shard_size < 1:
        raise ValueError(f"batch_size={batch_size} and shard_size={shard_size} must be positive.")
    fingerprint = _check_images(dataset, vae)
    vae = vae.to(device or vae.device).eval()
    if dtype is not None and dtype != vae.dtype:  # diffusers warns of a cast even where it changes nothing
        vae = vae.to(dtype)
    starts = range(0, len(dataset), shard_size)
    settings = {
        "dataset": fingerprint, "vae": _weights_fingerprint(vae), "dtype": str(vae.dtype), "posterior": posterior,
        "seed": seed, "scaling_factor": vae.config.scaling_factor, "shift_factor": _shift(vae), "rows": len(dataset),
        "shard_size": shard_size, "num_shards": len(starts),
    }  # fmt: skip
    # Class names are of the data set, hence in its fingerprint. safetensors' metadata are strings.
    metadata = {"settings": json.dumps(settings), "class_names": json.dumps(getattr(dataset, "class_names", None))}
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    done = _finished_shards(output_dir, settings)
    bar = tqdm(total=len(dataset), desc="encoding", unit="img", delay=2, disable=disable_progress)
    for shard, start in enumerate(starts):
        file = output_dir / f"latents-{shard:05d}.safetensors"
        rows = range(start, min(start + shard_size, len(dataset)))
        if file.name in done:
            bar.update(len(rows))
            continue
        tensors = _encode(dataset, rows, vae, batch_size, seed + shard if posterior == "sample" else None, bar)
        atomic_write(file, partial(save_file, tensors, metadata=metadata))
    bar.close()
    return output_dir


def _check_images(dataset: Any, vae: Any) -> str:
    """The fingerprint of images that fit a VAE; otherwise a ``ValueError``."""
    if len(dataset) == 0:
        raise ValueError("the data set is empty: at least one image is needed. Check the split and any filter.")
    channels, *size = dataset[[0]]["pixel_values"].shape[1:]
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if getattr(dataset, "is_latent", False):
        raise ValueError("the data set holds latents already: give the images.")
    if channels != vae.config.in_channels or any(side % factor for side in size):
        raise ValueError(
            f"images {[channels, *size]} do not fit the VAE, which takes {vae.config.in_channels} channels and sides "
            f"that are multiples of {factor}: load them with channels= and image_size=."
        )
    fingerprint = getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)
    if fingerprint is None:
        raise ValueError(f"{type(dataset).__name__} needs a fingerprint, by which a resumed run knows its data.")
    return fingerprint


def _finished_shards(output_dir: Path, settings: dict[str, Any]) -> set[str]:
    """Names of the files that an earlier call with the same settings has written."""
    done = set()
    for file in output_dir.glob("latents*.safetensors"):
        theirs = json.loads(_read_latents(file, header_only=True).get("settings", "{}"))
        if theirs != settings:
            names = sorted(k for k in settings if theirs.get(k) != settings[k])
            raise ValueError(
                f"{file} was written with another {', '.join(names)}: give an empty output_dir or remove the old files."
            )
        done.add(file.name)
    return done


def _encode(dataset: Any, rows: range, vae: Any, batch_size: int, seed: int | None, bar: tqdm) -> dict[str, Tensor]:
    """Latents [rows, C, H, W] and labels [rows] of one file; without a seed, the modes of the posteriors."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    latents, labels, noise = [], [], None
    for i in range(0, len(rows), batch_size):
        batch = dataset[list(rows[i : i + batch_size])]
        with torch.no_grad():
            distribution = vae.encode(batch["pixel_values"].to(vae.device, vae.dtype)).latent_dist
        z = distribution.mode().float().cpu()
        if generator is not None:
            # Drawn for the whole file at once: the same noise for a row whatever the batch size.
            noise = torch.randn((len(rows), *z.shape[1:]), generator=generator) if noise is None else noise
            z = z + distribution.std.float().cpu() * noise[i : i + batch_size]
        latents.append(((z - _shift(vae)) * vae.config.scaling_factor).half())
        labels.append(class_indices(batch["class_labels"]))
        if (bad := first_not_finite(latents[-1])) is not None:
            raise ValueError(
                f"the latent of row {rows[i + bad]} is not finite in {vae.dtype}: use dtype=torch.float32."
            )
        bar.update(len(z))
    return {"latents": torch.cat(latents).contiguous(), "labels": torch.cat(labels)}


def _shift(vae: Any) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0


def latent_files(path: Path, split: str) -> list[Path]:
    """The latent files of a split: those in the folder of its name, or for ``train`` in the directory itself."""
    files = sorted((path / split).glob("latents*.safetensors"))
    flat = sorted(path.glob("latents*.safetensors"))
    if flat and not files and split != "train":
        raise ValueError(f"{path} holds latents of split 'train' only; those of {split!r} belong into {path / split}.")
    return files or flat


def _read_latents(file: Path, header_only: bool = False) -> Any:
    """Metadata of a latent file; with tensors: (latents, labels, metadata)."""
    try:
        with safe_open(file, "pt") as f:
            metadata = f.metadata() or {}
            if missing := {"latents", "labels"} - set(f.keys()):
                raise ValueError(f"{file} has no {', '.join(sorted(missing))}, only {', '.join(f.keys())}.")
            return metadata if header_only else (f.get_tensor("latents"), f.get_tensor("labels"), metadata)
    except (SafetensorError, OSError) as err:
        raise ValueError(f"{file} is truncated or not a safetensors file ({err}): remove it and encode again.") from err


def load_latents(files: list[Path]) -> tuple[Tensor, Tensor, list[str] | None]:
    latents, labels, metadata = zip(*[_read_latents(f) for f in files], strict=True)
    for file, tensor, meta in zip(files, latents, metadata, strict=True):
        expected = json.loads(meta.get("settings", "{}")).get("num_shards", len(files))
        if expected != len(files):
            raise ValueError(f"{file.parent} holds {len(files)} of {expected} latent files: run cache_latents again.")
        if tensor.shape[1:] != latents[0].shape[1:] or meta.get("settings") != metadata[0].get("settings"):
            raise ValueError(f"{file} does not belong to {files[0]}: shape or settings differ.")
        if tensor.dtype == torch.uint8:
            raise ValueError(f"{file} holds uint8, not latents: expected float16, bfloat16 or float32.")
        if (row := first_not_finite(tensor)) is not None:
            raise ValueError(f"{file}: the latent of row {row} is not finite. Encode again, with the VAE in float32.")
    return torch.cat(latents), torch.cat(labels), json.loads(metadata[0].get("class_names", "null"))


def _weights_fingerprint(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
