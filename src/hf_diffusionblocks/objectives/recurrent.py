"""Training of recurrent-depth models: one pass at a random noise level, or unrolled with a truncated gradient.

Huginn (arXiv 2502.05171, section 3) unrolls the core r times, r drawn for each update, and the gradient goes through
the last k = 8 recurrences only::

    tau ~ N(log r_mean - std^2 / 2, std),   r ~ Poisson(e^tau) + 1,   s_0 ~ N(0, state_std^2)
    s_i = core(A [x, s_{i-1}]),   loss = CE(coda(s_r), next token)

DiffusionBlocks (arXiv 2506.14202) replaces the r recurrences by one: the state is the target with noise,
``z = y + sigma eps``, and the loss is the cross-entropy of the target given z, as in ``next_token``.

In layer passes (forward 1, backward 2) with prelude, core and coda of 2, 4 and 2 layers and r = 33: 25 * 4 +
3 * (8 * 4 + 4) = 208 against 3 * 8 = 24 for an update, a ratio of 8.7; runs of the core alone are 33 to 1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..families.causal_lm_checks import check_some_target
from ..families.recurrent import BlockedRecurrentForCausalLM
from ..families.recurrent_block import has_values
from ..families.recurrent_config import BlockedRecurrentConfig
from ..losses import linear_cross_entropy
from .next_token import NextTokenPrediction, _by_row, next_tokens
from .result import ObjectiveResult


@dataclass
class RecurrentDenoising(NextTokenPrediction):
    """Cross-entropy of the next token given its noisy embedding as the state, in one pass through the core.

    Args: as ``NextTokenPrediction``.
    """

    def __call__(
        self,
        model: BlockedRecurrentForCausalLM,
        block: int,
        batch: dict[str, Tensor],
        generator: torch.Generator | None = None,
    ) -> ObjectiveResult:
        """Loss on one batch, in nats per token; the arguments are those of ``NextTokenPrediction``.

        Raises:
            ValueError: for a model without noisy targets.
        """
        if not model.config.two_stream:
            raise ValueError(
                "readout='clean' has no noisy target to denoise: train it with TruncatedBackpropagation, or set "
                "readout='exact' or 'edm'."
            )
        return super().__call__(model, block, batch, generator)


@dataclass
class TruncatedBackpropagation:
    """Cross-entropy of the next token after a random number of recurrences, with the gradient through the last ones.

    Args:
        recurrences: a fixed number in place of the drawn one.

    Raises:
        ValueError: for no recurrence.
    """

    recurrences: int | None = None

    def __post_init__(self) -> None:
        if self.recurrences is not None and (isinstance(self.recurrences, bool) or not self.recurrences >= 1):
            raise ValueError(f"recurrences={self.recurrences!r} must be a whole number of at least 1, or None.")

    def __call__(
        self,
        model: BlockedRecurrentForCausalLM,
        block: int,
        batch: dict[str, Tensor],
        generator: torch.Generator | None = None,
    ) -> ObjectiveResult:
        """Loss on one batch, in nats per token.

        Args:
            model: with ``readout="clean"``.
            block: 0, the only one.
            batch: ``input_ids`` [batch, tokens]; perhaps ``labels``, ``position_ids`` and ``attention_mask``.
            generator: CPU generator of the number of recurrences and of the state at the start.

        Raises:
            ValueError: for a model with noisy targets.
        """
        config = model.config
        if config.two_stream:
            raise ValueError(
                f"readout={config.readout!r} has a noisy target for a state: train it with RecurrentDenoising, or set "
                "readout='clean'."
            )
        ids, module = batch["input_ids"], model.block(block)
        recurrences = self.recurrences or draw_recurrences(config, generator, counting=not has_values(ids))
        labels, hidden = next_tokens(batch), model.embed_tokens(ids)
        positions = batch.get("position_ids")
        positions = torch.arange(ids.shape[1], device=ids.device)[None] if positions is None else positions
        places = model.make_places(hidden, positions, attention_mask=batch.get("attention_mask"))
        x = module.run_prelude(hidden, places)
        state = config.state_std * torch.randn(x.shape, generator=generator, device="cpu").to(x.device, x.dtype)
        deep = max(recurrences - config.backprop_depth, 0)
        with torch.no_grad():
            for _ in range(deep):
                state = module.run_core(x, state, places)
        for _ in range(recurrences - deep):
            state = module.run_core(x, state, places)
        features = module.norm(module.run_coda(state, places))
        losses = linear_cross_entropy([(features.flatten(0, 1), model.head_weight(block))], labels.flatten())
        check_some_target(losses)
        parts = {"recurrences": torch.tensor(float(recurrences))}
        return ObjectiveResult(losses.mean(), torch.zeros(0), _by_row(losses, labels), parts)

    def held_out(self, model: BlockedRecurrentForCausalLM, dataset: Any, **settings: Any) -> Any:
        """Cross-entropy on held-out rows after the config's number of recurrences; see
        ``NextTokenPrediction.held_out``."""
        return NextTokenPrediction().held_out(model, dataset, **settings)


def draw_recurrences(
    config: BlockedRecurrentConfig, generator: torch.Generator | None = None, *, counting: bool = False
) -> int:
    """A number of recurrences from Huginn's log-normal Poisson distribution (arXiv 2502.05171, section 3.3).

    Args:
        config: of the model.
        generator: CPU generator.
        counting: give the distribution's mean, ``mean_recurrences + 1``, to count what an update costs on average.
    """
    if counting:
        return config.mean_recurrences + 1
    std = config.recurrence_std
    mean = torch.tensor([float(config.mean_recurrences)], dtype=torch.float64, device="cpu").log() - std**2 / 2
    tau = mean + std * torch.randn(1, generator=generator, dtype=torch.float64, device="cpu")
    return int(torch.poisson(tau.exp(), generator=generator).item()) + 1
