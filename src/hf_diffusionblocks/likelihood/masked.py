r"""The bound of masked diffusion: bits per character of a blocked masked language model, split by block.

MD4 (arXiv 2406.04329, Eq. 4; arXiv 2506.14202, App. D), with the mask rate ``m = 1 - alpha``:

.. math:: -\log p(x) \le \int_0^1 \frac{1}{m}\, E\Big[\sum_{i\ masked} -\log p(x_i | z_m)\Big]\, dm

for any denoiser p that gives each hidden token a distribution of its own. Cut at the edges, it is the sum of the
blocks' shares. For the true posterior it is ``-log p(x)`` itself, for every x: hiding by m and letting m fall reveals
the tokens one by one in a random order, and ``sum_i -log p(x_i | revealed before)`` is ``-log p(x)`` in each order. So
it is on one scale with an ordinary language model's bits per character, of rows that begin without context: all T
tokens of a row are scored, the first one too.
"""

from typing import Any

import torch

from ..families.masked_lm import BlockedForMaskedLM
from ..objectives.masked import block_nats, maskable_tokens
from .bound import check_draws, summarise_shares
from .language_models import known_characters_per_token
from .result import LikelihoodBound, RowSums
from .rows import batches, evaluating


def masked_likelihood_bound(
    model: BlockedForMaskedLM,
    dataset: Any,
    *,
    num_draws: int = 4,
    max_rows: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    characters_per_token: float | int | None = None,
) -> LikelihoodBound:
    """The bound on held-out rows, with the share of each block.

    One block is on the device at a time, if they are streamed: each block passes over a batch before the next one.

    Args:
        model: with all blocks resident.
        dataset: ``dataset[list of indices]`` gives ``input_ids`` and perhaps ``attention_mask``, ``labels``,
            ``position_ids``.
        num_draws: mask rates per row and block; 2 at least for an error of the masks alone. A row's are stratified, so
            that error is an upper estimate.
        max_rows: use the first so many rows only.
        batch_size: rows per forward pass.
        seed: of mask rates and masks.
        characters_per_token: for bits per character; by default what the data set says.

    Raises:
        ValueError: for another kind of model, tokens that do not fit, rows without a token to hide, or a block that is
            not loaded.
    """
    if not isinstance(model, BlockedForMaskedLM):
        instead = f"call {model.scored_by}" if hasattr(model, "scored_by") else "give a BlockedForMaskedLM"
        raise ValueError(f"a {type(model).__name__} hides no tokens: {instead}.")
    check_draws(num_draws)
    generator, blocks = torch.Generator().manual_seed(seed), range(model.partition.num_blocks)
    sums = RowSums()
    with evaluating(model):
        for batch in batches(dataset, batch_size, max_rows, model.device):
            model.check_batch(batch)
            shares = [block_nats(model, block, batch, num_draws, generator) for block in blocks]
            sums.add(torch.stack(shares, -1), maskable_tokens(model, batch).sum(-1))
    return summarise_shares(
        sums,
        model.partition.edges,
        num_draws=num_draws,
        estimator="masked",
        characters_per_token=known_characters_per_token(dataset, characters_per_token),
    )
