r"""Text from a masked language model: hidden tokens are revealed step by step, one block per step.

A step goes from the mask rate m to the next lower one m'. The partition gives m to its block, which gives each hidden
token a distribution. Two orders of revealing:

``random``
    ancestral sampling (MD4, arXiv 2406.04329, section 3): each hidden token is revealed with probability
    ``(m - m') / m``, whichever it is. With enough steps, the distribution that the model was trained to have.
``confidence``
    of the hidden tokens those whose drawn token is likeliest come first (MaskGIT, Chang et al. 2022, arXiv 2202.04200,
    section 3.2), so many that the share m' is left. Fewer steps give readable text, with less diversity.

Tokens that the input shows stay as they are. A row of which the share f is hidden at the start walks from m = f down
to 0: that is where the model met as many hidden tokens in training.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .families.masked_lm import BlockedForMaskedLM
from .losses import linear_logits
from .masking import MaskSchedule
from .suggest import unknown_name

ORDERS = ("random", "confidence")


@dataclass(frozen=True)
class UnmaskingConfig:
    """How hidden tokens are revealed.

    Args:
        steps: forward passes, at least 1. With as many as tokens, about one is revealed in each.
        order: ``random`` or ``confidence``.
        temperature: of the tokens' distributions; 0 takes the likeliest token.
        top_p: keep the likeliest tokens that hold so much probability.
        top_k: keep so many of the likeliest tokens, before ``top_p`` is applied; None keeps all.

    Raises:
        ValueError: for a value that is not allowed.
    """

    steps: int = 64
    order: str = "random"
    temperature: float | int = 1.0
    top_p: float | int = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps={self.steps!r} must be a whole number of at least 1.")
        if self.order not in ORDERS:
            raise ValueError(unknown_name("order", self.order, ORDERS))
        numbers = (int, float)
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, numbers):
            raise ValueError(f"temperature={self.temperature!r} must be a number of at least 0.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature!r} must be finite and at least 0, which is greedy.")
        if isinstance(self.top_p, bool) or not isinstance(self.top_p, numbers) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r} must lie in (0, 1]; 1 leaves all tokens in.")
        whole = isinstance(self.top_k, int) and not isinstance(self.top_k, bool)
        if self.top_k is not None and not (whole and self.top_k >= 1):
            raise ValueError(
                f"top_k={self.top_k!r} must be a whole number of at least 1, or None, which leaves all tokens in."
            )

    def rates(self, schedule: MaskSchedule) -> Float[Tensor, "levels"]:
        """Mask rates from 1 to 0 at even steps of t, ``steps + 1`` of them, float64."""
        t = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64, device="cpu")
        rates = 1 - schedule.alpha(t)
        rates[0], rates[-1] = 1.0, 0.0
        return rates


@torch.no_grad()
def unmask(
    model: BlockedForMaskedLM,
    input_ids: Int[Tensor, "batch tokens"] | None = None,
    *,
    length: int | None = None,
    batch_size: int = 1,
    steps: int = 64,
    order: str = "random",
    temperature: float | int = 1.0,
    top_p: float | int = 1.0,
    attention_mask: Int[Tensor, "batch tokens"] | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
    progress: bool = False,
    top_k: int | None = None,
) -> Int[Tensor, "batch tokens"]:
    """Reveal hidden tokens: write a text, or fill gaps in one.

    Args:
        model: with the blocks that are needed; in eval mode for repeatable results.
        input_ids: tokens with the mask token wherever one is to be found; by default all are hidden.
        length: tokens per row, without ``input_ids``; by default the model's positions, 256 at most.
        batch_size: number of rows, without ``input_ids``.
        steps: forward passes.
        order: ``random`` or ``confidence``, see the module.
        temperature: 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that hold so much probability.
        attention_mask: 0 at padding, which stays as it is.
        generator: a CPU generator of everything random; by default torch's own.
        callback: called as ``callback(step, tokens)`` after each step.
        progress: show a progress bar.
        top_k: draw from so many of the likeliest tokens; with ``top_p`` too, from those of them that it keeps.

    Returns:
        The tokens; no mask token is left but at padding.

    Raises:
        ValueError: for settings that are not allowed, or tokens that do not fit the model.

    Example:
        >>> base = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
        ...         "num_attention_heads": 4, "vocab_size": 100}
        >>> model = BlockedForMaskedLM.from_base(base, num_blocks=3, mask_token_id=99).eval()
        >>> tokens = unmask(model, torch.tensor([[1, 99, 99, 4]]), steps=2, generator=torch.Generator().manual_seed(0))
        >>> tokens[0, 0].item(), tokens[0, 3].item(), bool((tokens == 99).any())
        (1, 4, False)
    """
    settings = UnmaskingConfig(steps, order, temperature, top_p, top_k)
    ids = _start(model, input_ids, length, batch_size)
    model.check_tokens(ids, attention_mask)
    hidden = ids == model.config.mask_token_id
    if attention_mask is not None:
        hidden = hidden & attention_mask.bool().to(ids.device)
    begin = model.hidden_share(ids, attention_mask)  # f of each row
    gaps = hidden.sum(-1)
    rates = settings.rates(model.config.make_schedule())
    for step in _counted(settings.steps, progress):
        if not bool(hidden.any()):
            break
        now, then = rates[step].item(), rates[step + 1].item()
        tokens, chance = _draw(model, ids, begin * now, hidden, settings, attention_mask, generator)
        if settings.order == "random":
            u = torch.rand(ids.shape, generator=generator, dtype=torch.float64, device="cpu").to(ids.device)
            shown = hidden & (u < (now - then) / now)
        else:
            left = (gaps * then).floor().long()
            shown = _most_confident(chance.masked_fill(~hidden, -torch.inf), hidden.sum(-1) - left) & hidden
        ids = torch.where(shown, tokens, ids)
        hidden = hidden & ~shown
        if callback is not None:
            callback(step, ids)
    return ids


def _counted(steps: int, progress: bool):
    if not progress:
        return range(steps)
    from tqdm.auto import tqdm

    return tqdm(range(steps), desc="unmasking")


def _start(model: BlockedForMaskedLM, input_ids: Tensor | None, length: int | None, batch_size: int) -> Tensor:
    if input_ids is not None:
        if length is not None:
            raise ValueError(f"length={length} is for a text without input_ids: these have a length of their own.")
        return input_ids.to(model.device)
    length = min(256, model.config.max_position_embeddings) if length is None else length
    for name, value in (("length", length), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    return torch.full((batch_size, length), model.config.mask_token_id, device=model.device)


def _draw(
    model: BlockedForMaskedLM,
    ids: Tensor,
    rates: Tensor,
    hidden: Tensor,
    settings: UnmaskingConfig,
    attention_mask: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """A token for each hidden place and its log-probability; each row from the block of its mask rate."""
    tokens = ids.clone()
    chance = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    owners = model.partition.block_of(rates)
    for block in owners.unique().tolist():
        rows = (owners == block) & hidden.any(-1)
        if not bool(rows.any()):
            continue
        mask = None if attention_mask is None else attention_mask.to(ids.device)[rows]
        features = model.features(ids[rows], block, mask_rate=rates[rows], attention_mask=mask)
        weight, bias = model.denoising_head(block)
        where = hidden & rows[:, None]
        log_p = linear_logits([(features[hidden[rows]], weight)], bias).float().log_softmax(-1)
        found = _sample(log_p, settings, generator)
        tokens[where] = found
        chance[where] = log_p.gather(-1, found[:, None])[:, 0]
    return tokens, chance


def _sample(
    log_p: Float[Tensor, "places vocab"], settings: UnmaskingConfig, generator: torch.Generator | None
) -> Int[Tensor, "places"]:
    """A token of each distribution, by the Gumbel trick; the noise is drawn on the CPU."""
    if settings.temperature == 0:
        return log_p.argmax(-1)
    scores = log_p
    if settings.temperature != 1:
        scores = TemperatureLogitsWarper(float(settings.temperature))(None, scores)
    if settings.top_k is not None:
        scores = TopKLogitsWarper(settings.top_k)(None, scores)
    if settings.top_p < 1:
        scores = TopPLogitsWarper(float(settings.top_p))(None, scores)
    u = torch.rand(scores.shape, generator=generator, dtype=torch.float64, device="cpu").clamp_min(1e-300)
    return (scores.double() - (-u.log()).log().to(scores.device)).argmax(-1)


def _most_confident(chance: Float[Tensor, "rows tokens"], count: Int[Tensor, "rows"]) -> Tensor:
    """The ``count`` largest of each row, as booleans."""
    rank = chance.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return rank < count[:, None]


__all__ = ["ORDERS", "UnmaskingConfig", "unmask"]
