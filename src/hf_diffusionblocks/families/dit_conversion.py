"""Where a transformer that is to be cut comes from, and what its scheduler says about how it was trained."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, DiTTransformer2DModel, ModelMixin, SchedulerMixin

from .transformer_classes import TRANSFORMER_CLASSES, class_of, cuttable

FLOW_SETTINGS = ("num_train_timesteps", "shift")
SCHEDULE_SETTINGS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


def load_base(base: Any, dtype: Any = None, **hub: Any) -> tuple[ModelMixin, dict | None]:
    """The base network and, where there is one, its scheduler's config.

    Args:
        base: see ``BlockedDiTModel.from_base``.
        dtype: to load it in; by default the files'.
        **hub: ``revision``, ``token``, ``cache_dir``.
    """
    if isinstance(base, DiffusionPipeline):
        network = getattr(base, "transformer", None) or getattr(base, "unet", None)
        return checked_class(network), {"_class_name": type(base.scheduler).__name__, **base.scheduler.config}
    if isinstance(base, (str, os.PathLike)):
        root, name = Path(base), str(base)
        if root.is_absolute() and not root.is_dir():
            raise ValueError(f"{name} is not a directory. Give a saved DiT's directory or a Hub id.")
        place, config = find_dit(name, **hub)
        kind = class_of(config) if "_class_name" in config else None
        if kind is None:
            what = config.get("_class_name") or config.get("model_type") or "an unknown model"
            raise ValueError(
                f"{name} holds {what}, which BlockedDiTModel cannot cut: give a {cuttable()}, or a pipeline of one."
            )
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype.removeprefix("torch."))
        transformer = kind.model.from_pretrained(name, torch_dtype=dtype, **place, **hub)
        return checked_class(transformer), scheduler_config(name, **hub)
    return checked_class(base), None


def scheduler_config(name: str, **hub: Any) -> dict | None:
    """Config of the scheduler in a pipeline's directory or repository; None if it has none."""
    try:  # all of diffusers' schedulers keep their config in a file of the same name
        return DDPMScheduler.load_config(name, subfolder="scheduler", **hub)
    except OSError:
        return None


def base_preconditioning(settings: Mapping[str, Any], scheduler: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings with the preconditioning that a base's scheduler implies, where they give none.

    A scheduler that predicts epsilon belongs to a DDPM-style network: ``vp_epsilon`` with its noise schedule (EDM,
    arXiv 2206.00364, Table 1, VP); a flow-matching one to ``rectified_flow``. Without a scheduler nothing is known, and
    the class's own or ``edm`` stays the default.

    Raises:
        ValueError: for a scheduler of another prediction, which no preconditioning here stands for.
    """
    settings = dict(settings)
    if scheduler is None:
        return settings
    kind = scheduler.get("prediction_type", "epsilon")
    flow = "FlowMatch" in str(scheduler.get("_class_name")) or kind == "flow_prediction"
    if "preconditioning" not in settings:
        if not flow and kind != "epsilon":
            raise ValueError(
                f"the base's scheduler has prediction_type={kind!r}; only networks that predict epsilon or a velocity "
                "along a straight path can be converted as they are. Give preconditioning='edm' to train the converted "
                "network anew."
            )
        settings["preconditioning"] = "rectified_flow" if flow else "vp_epsilon"
    if scheduler.get("flow_shift") is not None:  # what multistep schedulers call it
        scheduler = {"shift": scheduler["flow_shift"], **scheduler}
    known = {"vp_epsilon": SCHEDULE_SETTINGS, "rectified_flow": FLOW_SETTINGS if flow else ()}
    names = known.get(settings["preconditioning"], ())
    if names and "noise_schedule" not in settings:
        settings["noise_schedule"] = {k: scheduler[k] for k in names if scheduler.get(k) is not None}
    return settings


def load_components(name: str, **hub: Any) -> tuple[SchedulerMixin | None, AutoencoderKL | None]:
    """Scheduler and VAE of a pipeline's directory or repository, each None if it has none."""
    config = scheduler_config(name, **hub)
    scheduler_class = getattr(diffusers, (config or {}).get("_class_name", ""), None)
    scheduler = None
    if isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin):
        scheduler = scheduler_class.from_config(config)  # type: ignore[attr-defined]  # diffusers' mixin has it
    try:  # of a directory without vae/, diffusers takes the config.json at the root
        config = AutoencoderKL.load_config(name, subfolder="vae", **hub)
    except OSError:
        return scheduler, None
    if config.get("_class_name") != "AutoencoderKL":
        return scheduler, None
    return scheduler, AutoencoderKL.from_pretrained(name, subfolder="vae", **hub)


def find_dit(name: str, **hub: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """Where a DiT lies in a directory or repository, at its root or in a pipeline's folder, and its config."""
    for place in ({}, {"subfolder": "transformer"}, {"subfolder": "unet"}):
        try:
            return place, DiTTransformer2DModel.load_config(name, **place, **hub)
        except OSError as error:
            problem = error
    raise ValueError(
        f"{name} holds neither a DiT (config.json) nor a DiTPipeline (transformer/config.json): {problem}"
    ) from problem


def checked_class(base: Any) -> ModelMixin:
    """A base whose class can be cut.

    Raises:
        ValueError: naming its class and those that can.
    """
    if type(base).__name__ not in TRANSFORMER_CLASSES:
        why = ""
        if "UNet" in type(base).__name__:
            why = " (the skip connections of a U-Net tie its first layers to its last)"
        raise ValueError(
            f"{type(base).__name__} cannot be cut by BlockedDiTModel{why}: give a diffusers {cuttable()}, a pipeline "
            "of one, or the directory or Hub id of one."
        )
    return base
