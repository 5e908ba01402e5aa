"""The config of every blocked model: base config, partition and preconditioning. `config.json` is the whole truth."""

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from .config_checks import (
    MAX_TIMESTEPS,
    check_dtype,
    check_fields,
    check_model_type,
    check_number_of_layers,
    check_numbers,
    check_sizes,
    check_values,
)
from .noise import LogNormalNoise
from .partition import BlockPartition
from .preconditioning import (
    PRECONDITIONINGS,
    EDMPreconditioning,
    Preconditioning,
    RectifiedFlowPreconditioning,
    VPEpsilonPreconditioning,
)
from .suggest import unknown_name

PARTITIONS = ("equal_probability", "uniform", "log_uniform", "equal_information", "explicit")
_FLOW_SCHEDULE = ("num_train_timesteps", "shift")
# What has to be stored with partitions whose edges do not follow from the other settings.
_NEED_EDGES = {
    "explicit": "B + 1 noise levels from sigma_max down to sigma_min.",
    "equal_information": "those of the partition that equal_information_partition makes from a trained pilot model.",
}


def read_config(
    name: Any, read: Callable[..., Any] = PreTrainedConfig.get_config_dict, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings in a ``config.json`` and what is left of the arguments, as transformers reads them.

    Raises:
        OSError: if there is none.
        ValueError: if it holds no settings.
    """
    try:
        values, kwargs = read(name, **kwargs)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"config.json in {name} holds no settings: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"config.json in {name} holds no settings, but {values!r:.60}.")
    return values, kwargs


class DiffusionBlocksConfig(PreTrainedConfig):
    """Config of a blocked model (arXiv 2506.14202, section 3).

    Args:
        base_config: the config of the model that is cut, as a dict.
        num_blocks: B, the number of blocks.
        layers_per_block: number of layers of each block; by default an even spread, the remainder to the first blocks.
        partition: how the noise range is cut: ``equal_probability``, ``uniform``, ``log_uniform``,
            ``equal_information`` or ``explicit``; the last two need ``edges``.
        edges: B + 1 noise levels, descending. Computed from ``partition`` unless given; stored, so that a saved model
            never depends on how they were computed.
        overlap: gamma of App. C, by which training ranges reach over the edges.
        noise: ``p_mean``, ``p_std``, ``sigma_min``, ``sigma_max`` of the training distribution.
        preconditioning: ``edm``, ``vp_epsilon`` (pretrained DDPM-style networks) or ``rectified_flow`` (networks that
            predict a velocity, as SD3 and Flux do).
        sigma_data: standard deviation of the data (``edm``).
        noise_scale: factor on ``c_noise`` (``edm``).
        noise_schedule: ``num_train_timesteps``, ``beta_start``, ``beta_end``, ``beta_schedule``, ``trained_betas`` of
            the base's diffusers scheduler (``vp_epsilon``); ``num_train_timesteps`` and ``shift`` of a flow-matching
            one (``rectified_flow``; optional). Then ``noise`` defaults to SD3's logit-normal t (arXiv 2403.03206,
            section 3.1) from 0.001 to 0.999: ``p_mean = ln shift``, ``p_std = 1``, because logit t = ln sigma and a
            shift multiplies sigma.
        base_model: Hub id of the pretrained base, if it was loaded from there.
        base_revision: SHA-256 of the pretrained base's weights; blocks of one model come from the same.

    Raises:
        ValueError: for a value that is not allowed; the message names it, what is allowed and how to mend it.
    """

    model_type = "diffusion_blocks"
    has_no_defaults_at_init = True  # what is cut has to be given; older transformers ask, before they print a config

    if TYPE_CHECKING:
        base_config: dict[str, Any]  # these are None only before ``__post_init__`` has checked and filled them
        num_blocks: int
        layers_per_block: list
    else:
        base_config: dict | None = None
        num_blocks: int = 3
        layers_per_block: list | None = None
    partition: str = "equal_probability"
    edges: list | None = None
    overlap: float = 0.05
    noise: dict | None = None
    preconditioning: str = "edm"
    sigma_data: float = 0.5
    noise_scale: float = 1.0
    noise_schedule: dict | None = None
    base_model: str | None = None
    base_revision: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_types()
        try:
            super().__post_init__(**kwargs)
        except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
            raise ValueError(f"a setting of transformers' configs (id2label, say) is malformed: {error}.") from error
        self.base_config = self.complete_base_config(dict(self.base_config or {}))
        check_number_of_layers(self.num_layers)
        if self.partition not in PARTITIONS:
            raise ValueError(unknown_name("partition", self.partition, PARTITIONS))
        if self.preconditioning not in PRECONDITIONINGS:
            raise ValueError(unknown_name("preconditioning", self.preconditioning, PRECONDITIONINGS))
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data={self.sigma_data} must be positive: the standard deviation of the data.")
        if not self.noise_scale > 0:
            raise ValueError(f"noise_scale={self.noise_scale} must be positive.")
        if self.preconditioning == "vp_epsilon" and not self.noise_schedule:
            raise ValueError(
                "preconditioning='vp_epsilon' needs noise_schedule, the base's diffusers scheduler config "
                "(num_train_timesteps, beta_start, beta_end, beta_schedule)."
            )
        partition = self._make_partition()
        self.noise = asdict(partition.noise)
        self.edges = list(partition.edges)
        self.layers_per_block = list(partition.layers_per_block)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; a ``ValueError`` for a config of another type of model, which transformers would take."""
        name = pretrained_model_name_or_path
        values, kwargs = read_config(name, super().get_config_dict, **kwargs)
        if "model_type" in values:
            check_model_type(values["model_type"], f"config.json in {name}", (cls.model_type,))
        return values, kwargs

    def _check_types(self) -> None:
        """A config may come from anyone: everything has its type, numbers are finite, nothing is nested without end."""
        fields: dict[str, Any] = {}
        for kind in reversed(type(self).__mro__):
            if issubclass(kind, DiffusionBlocksConfig):
                fields |= kind.__dict__.get("__annotations__", {})
        check_dtype(self.dtype)
        check_fields(vars(self), {k: a for k, a in fields.items() if k != "model_type"})
        for name in fields:
            check_values(name, getattr(self, name, None))
        check_numbers("edges", self.edges)
        check_numbers("layers_per_block", self.layers_per_block, int)
        check_numbers("noise", self.noise)
        schedule = self.noise_schedule or {}
        steps = schedule.get("num_train_timesteps", 1000)
        check_sizes(schedule, ("num_train_timesteps",))
        if steps > MAX_TIMESTEPS:
            raise ValueError(f"num_train_timesteps={steps} must be at most {MAX_TIMESTEPS}.")

    def complete_base_config(self, base_config: dict) -> dict:
        """The base config with its defaults filled in. Families override it."""
        return base_config

    @property
    def num_layers(self) -> int:
        """L, the number of layers that are cut. Families override it."""
        return int(self.base_config["num_layers"])

    def _make_partition(self) -> BlockPartition:
        settings = dict(self.noise or {})
        if self.preconditioning == "vp_epsilon":
            sigmas = VPEpsilonPreconditioning(self._schedule_alphas).sigmas
            settings = {"sigma_min": float(sigmas[0]), "sigma_max": float(sigmas[-1]), **settings}
        elif self.preconditioning == "rectified_flow":
            settings = self._flow_noise() | settings
        known = ("p_mean", "p_std", "sigma_min", "sigma_max")
        for name in settings:
            if name not in known:
                raise ValueError(unknown_name("noise setting", name, known))
        noise = LogNormalNoise(**settings)
        shape: dict[str, Any] = {"noise": noise, "overlap": self.overlap, "layers_per_block": self.layers_per_block}
        if self.edges is not None:
            if len(self.edges) != self.num_blocks + 1:
                raise ValueError(
                    f"edges={self.edges} has {len(self.edges)} values for num_blocks={self.num_blocks}: "
                    "B blocks need B + 1 edges."
                )
            return BlockPartition.explicit(self.edges, self.num_layers, **shape)
        if self.partition in _NEED_EDGES:
            raise ValueError(f"partition={self.partition!r} needs edges: {_NEED_EDGES[self.partition]}")
        return getattr(BlockPartition, self.partition)(self.num_blocks, self.num_layers, **shape)

    def _flow_noise(self) -> dict[str, float]:
        """What the training distribution of a rectified flow is unless ``noise`` says otherwise."""
        schedule = self.noise_schedule or {}
        for name in schedule:
            if name not in _FLOW_SCHEDULE:
                raise ValueError(unknown_name("noise_schedule setting", name, _FLOW_SCHEDULE))
        shift = schedule.get("shift", 1.0)
        if not isinstance(shift, (int, float)) or isinstance(shift, bool) or not shift > 0:
            raise ValueError(f"noise_schedule has shift={shift!r}; it must be a positive number, 1 for none.")
        return {"p_mean": math.log(shift), "p_std": 1.0, "sigma_min": 1 / 999, "sigma_max": 999.0}

    @cached_property
    def _schedule_alphas(self) -> tuple[float, ...]:
        from diffusers import DDPMScheduler

        known = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        schedule = self.noise_schedule or {}
        for name in schedule:
            if name not in known:
                raise ValueError(unknown_name("noise_schedule setting", name, known))
        with torch.device("cpu"):  # models, and so configs, may be built under the meta device
            return tuple(DDPMScheduler(**schedule).alphas_cumprod.double().tolist())

    def make_partition(self) -> BlockPartition:
        """The partition of layers and noise levels that this config describes."""
        return self._make_partition()

    def make_preconditioning(self) -> Preconditioning:
        """The preconditioning that this config describes."""
        if self.preconditioning == "edm":
            return EDMPreconditioning(self.sigma_data, self.noise_scale)
        if self.preconditioning == "rectified_flow":
            return RectifiedFlowPreconditioning((self.noise_schedule or {}).get("num_train_timesteps", 1000))
        return VPEpsilonPreconditioning(self._schedule_alphas)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without cached values."""
        output = super().to_dict()
        output.pop("_schedule_alphas", None)
        return output
