"""Cross-entropy of a linear head, and its divergence from a teacher's, in chunks: never the logits of all tokens.

The logits of N tokens over V classes in float32 take 4 N V bytes (8 x 1024 tokens at a vocabulary of 49k: 1.6 GB), more
than all activations of a block. Here a chunk's logits are computed, used and dropped, and computed again in the
backward pass. Where all fit into one chunk they are kept: the backward pass, which begins with the head, would hold as
much anyway.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Features and the matrix that they are multiplied with; logits are the sum over pairs.
Pairs = Sequence[tuple[Float[Tensor, "*tokens width"], Float[Tensor, "vocab width"]]]

CHUNK_ELEMENTS = 1 << 24  # 64 MiB of float32 logits at a time


def linear_logits(pairs: Pairs, bias: Float[Tensor, "vocab"] | None = None) -> Float[Tensor, "*tokens vocab"]:
    """``sum_i x_i W_i^T``, plus a bias. A pair is multiplied in its weight's dtype; several are summed in float32."""
    if len(pairs) == 1:
        x, weight = pairs[0]
        return F.linear(x.to(weight.dtype), weight, bias)
    start = 0 if bias is None else bias.float()
    return sum((F.linear(x.to(weight.dtype), weight).float() for x, weight in pairs), start)


def linear_cross_entropy(
    pairs: Pairs,
    labels: Int[Tensor, "tokens"],
    *,
    bias: Float[Tensor, "vocab"] | None = None,
    ignore_index: int = -100,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Float[Tensor, "kept"]:
    """Cross-entropy in nats of each token that is not ignored.

    Args:
        pairs: features [tokens, width] and weights [vocab, width]; the logits are the sum of their products.
        labels: classes [tokens]; ``ignore_index`` where there is none.
        bias: added to the logits, [vocab]; -inf for a class that does not occur.
        ignore_index: label of tokens to leave out, before any product is computed.
        chunk_elements: largest number of logits to hold at a time.

    Returns:
        float32 [kept], in the order of the tokens.
    """
    kept = labels != ignore_index
    if not bool(kept.all()):
        labels = labels[kept]
        pairs = [(x[kept], weight) for x, weight in pairs]
    size = max(1, chunk_elements // pairs[0][1].shape[0])
    if len(labels) <= size:
        return _cross_entropy(labels, bias, *(tensor for pair in pairs for tensor in pair))
    losses = []
    for start in range(0, len(labels), size):
        rows = slice(start, start + size)
        tensors = [tensor for x, weight in pairs for tensor in (x[rows], weight)]
        losses.append(checkpoint(_cross_entropy, labels[rows], bias, *tensors, use_reentrant=False))
    return torch.cat(losses)


def linear_divergence(
    pairs: Pairs, teacher: Pairs | Float[Tensor, "tokens vocab"], *, chunk_elements: int = CHUNK_ELEMENTS
) -> Float[Tensor, "tokens"]:
    """Kullback-Leibler divergence ``KL(teacher || own)`` in nats of each token, without gradient for the teacher.

    Args:
        pairs: features [tokens, width] and weights [vocab, width] of the own logits.
        teacher: the same of the teacher's; or its logits, where they are not a product.
        chunk_elements: largest number of logits to hold at a time.

    Returns:
        float32 [tokens].
    """
    tokens = pairs[0][0].shape[0]
    size = max(1, chunk_elements // pairs[0][1].shape[0])
    divergences = []
    for start in range(0, tokens, size):
        rows = slice(start, start + size)
        mine = [tensor for x, weight in pairs for tensor in (x[rows], weight)]
        whole = teacher if isinstance(teacher, Tensor) else None
        theirs = [whole[rows]] if whole is not None else [t for x, weight in teacher for t in (x[rows], weight)]
        divergences.append(checkpoint(_divergence, len(mine), *mine, *theirs, use_reentrant=False))
    return torch.cat(divergences)


def _divergence(count: int, *tensors: Tensor) -> Tensor:
    mine, theirs = tensors[:count], tensors[count:]
    own = linear_logits(list(zip(mine[::2], mine[1::2], strict=True))).float().log_softmax(-1)
    with torch.no_grad():
        logits = theirs[0] if len(theirs) == 1 else linear_logits(list(zip(theirs[::2], theirs[1::2], strict=True)))
        target = logits.float().log_softmax(-1)
    return F.kl_div(own, target, log_target=True, reduction="none").sum(-1)


def _cross_entropy(labels: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
    logits = linear_logits(list(zip(tensors[::2], tensors[1::2], strict=True)), bias)
    return F.cross_entropy(logits.float(), labels, reduction="none")
