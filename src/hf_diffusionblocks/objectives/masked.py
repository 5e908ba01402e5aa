r"""The loss of masked diffusion, block by block (MD4, arXiv 2406.04329, Eq. 4; arXiv 2506.14202, App. D).

Block b owns the mask rates m in ``[low, high]``; its loss is the mean over m, uniform in its range, of

.. math:: \frac{1}{T}\, \frac{1}{m}\, E\Big[\sum_{i\ masked} -\log p_b(x_i | z_m)\Big]

in nats per token: what a hidden token costs on average. A block's share in the bound of ``-log p(x)`` is that times
``high - low``, and with edges from 1 to 0 the shares sum to the bound (``hf_diffusionblocks.likelihood.masked``).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..batches import fetch
from ..families.causal_lm_checks import IGNORED
from ..families.masked_lm import BlockedForMaskedLM
from ..losses import linear_cross_entropy
from ..masking import draw_masks, stratified_rates
from .result import HeldOutLoss, ObjectiveResult


def maskable_tokens(model: BlockedForMaskedLM, batch: dict[str, Tensor]) -> Bool[Tensor, "batch tokens"]:
    """Tokens that may be hidden and are scored: not padding, not labelled -100, not hidden in the data already."""
    ids = batch["input_ids"]
    found = ids != model.config.mask_token_id
    if "attention_mask" in batch:
        found = found & batch["attention_mask"].bool()
    if "labels" in batch:
        found = found & (batch["labels"] != IGNORED)
    return found


def places_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a batch holds for the blocks besides its tokens."""
    return {k: batch[k] for k in ("attention_mask", "position_ids", "token_type_ids") if k in batch}


def hidden_token_losses(
    model: BlockedForMaskedLM,
    block: int,
    batch: dict[str, Tensor],
    hidden: Bool[Tensor, "batch tokens"],
    mask_rate: Tensor,
) -> tuple[Tensor, Tensor]:
    """``-log p_b(x_i | z)`` of each hidden token in nats, float32 [hidden], and the row that it stands in."""
    ids = batch["input_ids"]
    z = ids.masked_fill(hidden, model.config.mask_token_id)
    features = model.features(z, block, mask_rate=mask_rate, **places_of(batch))
    weight, bias = model.denoising_head(block)
    labels = ids.masked_fill(~hidden, IGNORED).flatten()
    losses = linear_cross_entropy([(features.flatten(0, 1), weight)], labels, bias=bias)
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand(ids.shape).flatten()
    kept = labels != IGNORED
    return losses, rows if bool(kept.all()) else rows[kept]


@dataclass
class MaskedDiffusion:
    """The bound of masked diffusion in one block's range of mask rates.

    Args:
        at_least_one: hide one token of each row for sure, which leaves the expectation as it is and takes out the
            factor 1 / m; see ``draw_masks``. False for the loss as it is written.
    """

    at_least_one: bool = True

    def __call__(
        self,
        model: BlockedForMaskedLM,
        block: int,
        batch: dict[str, Tensor],
        generator: torch.Generator | None = None,
    ) -> ObjectiveResult:
        """Loss of one block on one batch, in nats per hidden token.

        Args:
            model: the blocked model.
            block: which block.
            batch: ``input_ids`` [batch, tokens]; perhaps ``labels`` (-100: neither hidden nor scored),
                ``attention_mask``, ``position_ids``, ``token_type_ids``.
            generator: CPU generator of mask rates and masks.

        Raises:
            ValueError: if no token of the batch can be hidden.
        """
        maskable = maskable_tokens(model, batch)
        counts = maskable.sum(-1)
        if not bool(counts.any()):
            raise ValueError("no token of the batch can be hidden: all are padding, mask tokens or labelled -100.")
        low, high = model.partition.range(block, training=True)
        rates, weights = stratified_rates(model.config.make_schedule(), low, high, len(maskable), generator)
        hidden, factors = draw_masks(rates, maskable, generator, at_least_one=self.at_least_one)
        rates = rates.to(maskable.device)
        losses, rows = hidden_token_losses(model, block, batch, hidden, rates)
        scale = (weights.to(factors.device) * factors).float()
        sums = losses.new_zeros(len(maskable)).index_add(0, rows, losses) * scale
        per_row = (sums / counts.clamp_min(1)).detach()
        return ObjectiveResult(sums.sum() / counts.sum(), rates, per_row, {"hidden_tokens": hidden.sum().detach()})

    @torch.no_grad()
    def held_out(
        self,
        model: BlockedForMaskedLM,
        dataset: Any,
        *,
        num_draws: int = 1,
        max_samples: int | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> HeldOutLoss:
        """The bound on held-out rows, nats per token; each block's own loss, nats per hidden token, in ``per_range``.

        Args:
            model: with all blocks resident.
            dataset: ``dataset[list of indices]`` gives a batch.
            num_draws: mask rates per row and block.
            max_samples: use the first so many rows only.
            batch_size: rows per forward pass.
            seed: of the masks.
        """
        training, device = model.training, model.embed_tokens.weight.device
        generator, blocks = torch.Generator().manual_seed(seed), range(model.partition.num_blocks)
        count = len(dataset) if max_samples is None else min(len(dataset), max_samples)
        nats, tokens = [], []
        model.eval()
        for start in range(0, count, batch_size):
            batch = fetch(dataset, list(range(start, min(start + batch_size, count))))
            batch = {k: v.to(device) for k, v in batch.items()}
            shares = [block_nats(model, b, batch, num_draws, generator).mean(-1) for b in blocks]
            nats.append(torch.stack(shares, -1).cpu())
            tokens.append(maskable_tokens(model, batch).sum(-1).cpu())
        model.train(training)
        rows, counts = torch.cat(nats), torch.cat(tokens).double()
        widths = torch.tensor([high - low for low, high in map(model.partition.range, blocks)], dtype=torch.float64)
        per_range = rows.sum(0) / counts.sum() / widths
        total = float(rows.sum() / counts.sum())
        residuals = rows.sum(-1) - counts * total
        error = float((residuals.square().sum() * count / max(count - 1, 1)).sqrt() / counts.sum())
        samples = count * num_draws * len(blocks)
        return HeldOutLoss(total, per_range.tolist(), list(model.partition.edges), samples, error)


# The cross-entropies of hidden tokens and the rows they stand in, from what is hidden [rows, tokens] and m [rows].
HiddenLosses = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def range_nats(
    losses: HiddenLosses,
    maskable: Bool[Tensor, "rows tokens"],
    low: float,
    high: float,
    num_draws: int = 1,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "rows draws"]:
    r"""``int_low^high 1 / m E[sum_{i masked} -log p(x_i | z_m)] dm`` of each row in nats, a column per draw; float64.

    Args:
        losses: of the denoiser.
        maskable: tokens that may be hidden.
        low: smallest mask rate.
        high: largest mask rate.
        num_draws: mask rates per row; a row's are stratified over the range, one in each part of equal width.
        generator: CPU generator.
    """
    rows = len(maskable)
    order = torch.rand(rows, num_draws, generator=generator, dtype=torch.float64, device="cpu").argsort(-1)
    inside = torch.rand(rows, num_draws, generator=generator, dtype=torch.float64, device="cpu")
    rates = low + (high - low) * (order + inside) / num_draws
    columns = []
    for draw in range(num_draws):
        hidden, factors = draw_masks(rates[:, draw], maskable, generator)
        nats, where = losses(hidden, rates[:, draw].to(maskable.device))
        columns.append(factors.new_zeros(rows).index_add(0, where, nats.double()) * factors * (high - low))
    return torch.stack(columns, -1)


def block_nats(
    model: BlockedForMaskedLM,
    block: int,
    batch: dict[str, Tensor],
    num_draws: int = 1,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "rows draws"]:
    """A block's share in the bound of each row, over its plain range; see ``range_nats``."""
    losses = functools.partial(hidden_token_losses, model, block, batch)
    low, high = model.partition.range(block)
    return range_nats(losses, maskable_tokens(model, batch), low, high, num_draws, generator)
