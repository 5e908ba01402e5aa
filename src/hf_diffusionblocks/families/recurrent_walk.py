"""Recurrences at inference: the walk along the noise grid, unrolled states, and their caches.

A denoiser's recurrence r runs the core at the r-th noise level of a grid from sigma_max down (arXiv 2506.14202,
section 3): ``z <- (sigma_next / sigma) z + (1 - sigma_next / sigma) D``, with D the posterior mean of the target.
States of a prompt are known: there z is the next token's embedding with noise of that level, as in training. At
sigma_max a state carries nothing, known or not, so the first recurrence treats all alike: one is a language model.

Every recurrence has keys and values of its own. A cache holds x of all columns, the prelude's layers, and core and coda
once for each recurrence; those of the walking states are dropped after each, and computed again, as known ones, when
the token has come.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ..losses import Pairs, linear_logits
from ..noise import equal_probability_grid

if TYPE_CHECKING:
    from .recurrent import BlockedRecurrentForCausalLM


class RecurrentCache:
    """A transformers cache as a recurrent model uses it.

    Args:
        model: the model.
        cache: of any number of layers while it is empty.
        recurrences: how many.

    Raises:
        ValueError: for a cache of another number of recurrences, or one whose layers cannot grow.
    """

    def __init__(self, model: "BlockedRecurrentForCausalLM", cache: Cache, recurrences: int):
        config = model.config
        self.seen = int(cache.get_seq_length())
        prelude, core, coda = len(config.prelude), len(config.core), len(config.coda)
        step = core + coda if config.two_stream else core
        count = 1 + prelude + recurrences * step + (0 if config.two_stream else coda)
        if self.seen == 0:
            if any(getattr(layer, "max_cache_len", None) and not layer.is_sliding for layer in cache.layers):
                raise ValueError(
                    f"a {type(cache).__name__} of fixed size has no room for {recurrences} recurrences: use a "
                    "DynamicCache, or leave cache_implementation out."
                )
            cache.layers[:] = [DynamicLayer() for _ in range(count)]
        elif len(cache.layers) != count:
            raise ValueError(
                f"past_key_values has {len(cache.layers)} layers; {recurrences} recurrences of this model need "
                f"{count}: it is a cache of another number of recurrences, or of another model. Start with "
                "past_key_values=None."
            )
        self.x, layers = cache.layers[0], cache.layers[1:]
        self.prelude = layers[:prelude]
        steps = [layers[prelude + r * step : prelude + (r + 1) * step] for r in range(recurrences)]
        self.core = [layers[:core] for layers in steps]
        self.coda = [layers[core:] for layers in steps] if config.two_stream else [layers[len(layers) - coda :]]

    def all_x(self, x: Float[Tensor, "batch new width"]) -> Float[Tensor, "batch columns width"]:
        """The prelude's output of all columns, the new ones included."""
        return self.x.update(x[:, None], x[:, None, :, :0])[0][:, 0]


@functools.lru_cache(maxsize=1 << 14)
def _draw(seed: int, position: int, rows: int, width: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed * 0x9E3779B1 + position)
    return torch.randn(rows, width, generator=generator, device="cpu")


def fixed_noise(
    positions: Int[Tensor, "batch tokens"], width: int, seed: int | None
) -> Float[Tensor, "batch tokens width"]:
    """The noise of each position: a function of the seed and the position, so that caches and padding change nothing.

    Args:
        positions: of the tokens.
        width: of a state.
        seed: each row has noise of its own; None for one fixed draw, the same in all rows.
    """
    if positions.numel() == 0:
        return torch.zeros(*positions.shape, width, device=positions.device)
    rows = 1 if seed is None else len(positions)
    low, high = int(positions.min()), int(positions.max())
    drawn = torch.stack([_draw(seed or 0, p, rows, width) for p in range(low, high + 1)]).to(positions.device)
    row = torch.zeros_like(positions) if seed is None else torch.arange(rows, device=positions.device)[:, None]
    return drawn[positions - low, row]


def walk(
    model: "BlockedRecurrentForCausalLM",
    hidden: Float[Tensor, "batch new width"],
    position_ids: Int[Tensor, "batch new"],
    *,
    recurrences: int = 1,
    keep: int = 0,
    cache: Cache | None = None,
    attention_mask: Int[Tensor, "batch columns"] | None = None,
    seed: int | None = None,
) -> Pairs:
    """The next token's logits after a walk of so many recurrences, as pairs of features and matrices.

    After one recurrence they are f at sigma_max; after more, all that the state says counts as well.

    Args:
        model: a denoiser.
        hidden: embeddings of the new tokens.
        position_ids: their positions.
        recurrences: noise levels to visit.
        keep: logits of the last so many tokens; 0 for all of the new ones.
        cache: of the columns before, to which the new ones are added.
        attention_mask: of all columns, 0 at padding.
        seed: of the noise, see ``fixed_noise``.
    """
    held = None if cache is None else RecurrentCache(model, cache, recurrences)
    module, width, new = model.block(0), hidden.shape[-1], hidden.shape[1]
    seen = 0 if held is None else held.seen
    make = functools.partial(model.make_places, attention_mask=attention_mask)
    places = make(hidden, position_ids, earlier=seen)
    x = module.run_prelude(hidden, places, held.prelude if held else ())
    noise: Any = model.partition.noise  # of sigma
    sigmas = equal_probability_grid(recurrences + 1, noise)[:recurrences].tolist()
    z = sigmas[0] * fixed_noise(position_ids, width, seed)
    features = model.features(x, z, sigmas[0], places, *_layers(held, 0))
    x_all = x if held is None else held.all_x(x)
    last = keep or new
    features, z = features[:, -last:], z[:, -last:]
    pairs = _pairs(model, features, z, sigmas[0], first=True)
    if recurrences == 1:
        return pairs
    # Known states: of all columns whose next token is there. Of them, a cache has the first seen - 1.
    before = max(seen - 1, 0)
    known = seen + new - 1 - before
    columns = torch.cat([torch.arange(before, seen + new - 1), torch.arange(seen + new - last, seen + new)])
    walking = torch.arange(known + last) >= known
    shifted = torch.cat([(position_ids[:, :1] - 1).clamp_min(0), position_ids], dim=1) if seen else position_ids
    positions = torch.cat([shifted[:, :known], position_ids[:, -last:]], dim=1)
    places = make(hidden, positions, earlier=before, columns=columns, walking=walking, documents_of=position_ids)
    x = torch.cat([x_all[:, before : before + known], x[:, -last:]], dim=1)
    y = torch.nn.functional.normalize(hidden[:, new - known :].float(), dim=-1)
    eps = fixed_noise(positions[:, :known], width, seed)
    table = model.target_table()
    for r in range(1, recurrences):
        ratio = sigmas[r] / sigmas[r - 1]
        z = ratio * z + (1 - ratio) * (linear_logits(pairs).float().softmax(-1) @ table)
        states = torch.cat([y + sigmas[r] * eps, z], dim=1)
        layers = _layers(held, r)
        features = model.features(x, states, sigmas[r], places, *layers)[:, -last:]
        for layer in (layer for part in layers for layer in part):
            layer.crop(-last)  # the walking states: their tokens have not come yet
        pairs = _pairs(model, features, z, sigmas[r])
    return pairs


def _layers(held: RecurrentCache | None, recurrence: int) -> tuple[list[CacheLayerMixin], ...]:
    return () if held is None else (held.core[recurrence], held.coda[recurrence])


def _pairs(
    model: "BlockedRecurrentForCausalLM", features: Tensor, z: Tensor, sigma: float, first: bool = False
) -> Pairs:
    levels = torch.full((1, 1), sigma, device=z.device).expand(z.shape[:2])
    pairs = model.readout(features, z, levels, 0)
    return pairs[:1] if first else pairs  # at sigma_max the state carries nothing: f alone


def unrolled(
    model: "BlockedRecurrentForCausalLM",
    hidden: Float[Tensor, "batch new width"],
    position_ids: Int[Tensor, "batch new"],
    *,
    recurrences: int,
    cache: Cache | None = None,
    attention_mask: Int[Tensor, "batch columns"] | None = None,
    seed: int | None = None,
) -> Float[Tensor, "batch new width"]:
    """The last recurrence's state through the coda, before the norm (Huginn, arXiv 2502.05171, section 3).

    Args:
        model: one without noisy targets.
        hidden: embeddings of the new tokens.
        position_ids: their positions.
        recurrences: how often the core runs.
        cache: of the columns before, to which the new ones are added.
        attention_mask: of all columns, 0 at padding.
        seed: of the states at the start, see ``fixed_noise``.
    """
    held = None if cache is None else RecurrentCache(model, cache, recurrences)
    module = model.block(0)
    places = model.make_places(
        hidden, position_ids, earlier=0 if held is None else held.seen, attention_mask=attention_mask
    )
    x = module.run_prelude(hidden, places, held.prelude if held else ())
    state = (model.config.state_std * fixed_noise(position_ids, hidden.shape[-1], seed)).to(x.dtype)
    for r in range(recurrences):
        state = module.run_core(x, state, places, held.core[r] if held else ())
    if held is not None:
        held.all_x(x)
    return module.run_coda(state, places, held.coda[0] if held else ())
