"""Config of blocked recurrent-depth language models."""

import math
from typing import TYPE_CHECKING, Any

from ..partition import BlockPartition
from ..suggest import unknown_name
from .base_config import fields_of
from .causal_lm_config import BlockedCausalLMConfig

NOISE_PER = ("row", "token")

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # arXiv 2506.14202: one core for the whole noise range, the paper's readout and noise.
    "paper": {"readout": "edm", "overlap": 0.1, "noise": {"p_mean": -1.2, "p_std": 1.2}},
    # Huginn, arXiv 2502.05171, section 3: what DiffusionBlocks is compared with.
    "huginn": {"readout": "clean", "mean_recurrences": 32, "backprop_depth": 8},
}


class BlockedRecurrentConfig(BlockedCausalLMConfig):
    """Config of ``BlockedRecurrentForCausalLM``: a prelude, a core that is run again and again, a coda.

    Of the base's L layers the first ``prelude_layers`` are the prelude, the last ``coda_layers`` the coda, and those
    between them the core.

    Args:
        base_config: as in ``BlockedCausalLMConfig``.
        readout: ``exact`` or ``edm``: the core is a denoiser, trained by one pass at a random noise level.
            ``clean``: there is no noisy target; the state is unrolled, as in Huginn (arXiv 2502.05171).
        prelude_layers: a quarter of the layers by default.
        coda_layers: a quarter of the layers by default.
        core_norm: whether the core ends with a norm, as Huginn's does; a pretrained base keeps its function without.
        noise_per: whether the tokens of a ``row`` share a noise level in training, as the states of one recurrence do
            at inference, or each ``token`` has its own.
        num_recurrences: at inference, unless given there; by default 1 for a denoiser (its next token's logits at
            sigma_max), else ``mean_recurrences``.
        mean_recurrences: of the unrolled training's log-normal Poisson distribution, which is one more on average.
        recurrence_std: standard deviation of the logarithm of that distribution's rate.
        backprop_depth: the unrolled training's gradient goes through so many of the last recurrences.
        state_std: standard deviation of the unrolled state at the start.

    Raises:
        ValueError: for a value that is not allowed, or more than one block.

    Example:
        >>> base = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8,
        ...         "num_attention_heads": 4, "vocab_size": 100}
        >>> config = BlockedRecurrentConfig(base_config=base)
        >>> len(config.prelude), len(config.core), len(config.coda)
        (2, 4, 2)
    """

    model_type = "blocked_recurrent"

    num_blocks: int = 1
    readout: str = "exact"
    context: str = "independent"
    auxiliary_layers: int = 0
    initialization: str = "default"
    if TYPE_CHECKING:
        prelude_layers: int  # None only before ``__post_init__`` has set them
        coda_layers: int
    else:
        prelude_layers: int | None = None
        coda_layers: int | None = None
    core_norm: bool = True
    noise_per: str = "row"
    num_recurrences: int | None = None
    mean_recurrences: int = 32
    recurrence_std: float = 0.5
    backprop_depth: int = 8
    state_std: float = math.sqrt(2 / 5)

    def _make_partition(self) -> BlockPartition:
        if self.num_blocks != 1 or isinstance(self.num_blocks, bool):
            raise ValueError(
                f"num_blocks={self.num_blocks!r}: the core of a recurrent model is one block, which serves the whole "
                "noise range. Set num_blocks=1, or cut the base with BlockedForCausalLM."
            )
        quarter = self.num_layers // 4
        self.prelude_layers = quarter if self.prelude_layers is None else self.prelude_layers
        self.coda_layers = quarter if self.coda_layers is None else self.coda_layers
        return super()._make_partition()

    def _check_settings(self) -> None:
        super()._check_settings()
        if self.context != "independent":
            raise ValueError(f"context={self.context!r}: one block has none below it; use 'independent'.")
        if self.noise_per not in NOISE_PER:
            raise ValueError(unknown_name("noise_per", self.noise_per, NOISE_PER))
        for name, low in (("prelude_layers", 0), ("coda_layers", 0), ("mean_recurrences", 1), ("backprop_depth", 1)):
            _check_count(name, getattr(self, name), low)
        if self.num_recurrences is not None:
            check_recurrences(self.num_recurrences)
        if self.prelude_layers + self.coda_layers >= self.num_layers:
            raise ValueError(
                f"prelude_layers={self.prelude_layers} and coda_layers={self.coda_layers} leave no layer of "
                f"{self.num_layers} for the core: at least one is needed."
            )
        for name in ("recurrence_std", "state_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")

    @property
    def indivisible(self) -> bool:
        """Whether costs of the whole do not follow from those of fewer layers: the core's count more than once."""
        return True

    @property
    def prelude(self) -> range:
        """The layers that read the tokens."""
        return range(self.prelude_layers)

    @property
    def core(self) -> range:
        """The layers that are run again and again."""
        return range(self.prelude_layers, self.num_layers - self.coda_layers)

    @property
    def coda(self) -> range:
        """The layers between the state and the logits."""
        return range(self.num_layers - self.coda_layers, self.num_layers)

    @property
    def recurrences(self) -> int:
        """How often the core runs at inference, unless told otherwise."""
        return self.num_recurrences or (1 if self.two_stream else self.mean_recurrences)


def check_recurrences(value: Any) -> None:
    """Raise a ``ValueError`` for a number of recurrences that is none."""
    _check_count("num_recurrences", value, 1)


def _check_count(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        mend = ": without a recurrence nothing reads the prelude" if name == "num_recurrences" else ""
        raise ValueError(f"{name}={value!r} must be a whole number of at least {low}{mend}.")


def config_fields() -> frozenset[str]:
    """Settings of a recurrent model besides its base."""
    return fields_of(BlockedRecurrentConfig) | {"num_blocks"}


__all__ = ["PRESETS", "BlockedRecurrentConfig", "check_recurrences", "config_fields"]
