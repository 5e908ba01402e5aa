r"""Sampling text along the noise grid (arXiv 2506.14202, App. B): each new token is denoised, one block per step.

The next token's target starts as ``z ~ sigma_max N(0, I)`` and walks down a grid of noise levels; the partition gives
each level to its block. At noise level sigma the block gives ``p = softmax(logits)`` over the tokens, and the step of
Euler's method (EDM, arXiv 2206.00364, Alg. 2)

.. math:: z' = (\sigma' / \sigma)\, z + (1 - \sigma' / \sigma)\, D

takes D from one of two bridges: ``posterior_mean``, ``D = sum_k p_k e_k``, what the ODE asks for; ``argmax_row``, the
row ``e_k`` of the likeliest token, which gives less diverse text. The token is drawn from the last step's p, or is its
arg-max. The e_k have norm 1, so the walk decides at noise levels around 1 to 0.1 which token it will be: two levels
far apart, say 80 and 0.002, skip that, and ``posterior_mean`` then ends at the token nearest to the mean embedding.

Temperature, top-k, top-p and all other logits processors act on ``f``, the model's own part of the logits, at every
step. For ``clean`` and ``exact``, p is ``softmax(f + <z, e_k> / sigma^2)``: the second term is the known likelihood of
z, and where it dominates, the warped f changes nothing. So they act where entropy is left, and the walk's
distribution is, in the limit of many steps, the one that ordinary decoding draws from with the same processors. ``edm``
has no such split; there they act on all of the logits.

Where the noise comes from: each row has a stream of its own, seeded by the ``seed``, the row's prompt without padding,
and how many equal prompts stand above it in the batch. The n-th new token takes the n-th noise vector of the stream.
Tokens therefore depend neither on caching, nor on the rows beside them or their order, nor on padding.

Order of computation: for a prompt as for every new token, blocks are visited in sequence, and a block is never
returned to before the next token. A cascade runs all blocks up to the last that the grid visits, independent blocks
only those visited; each keeps its own layers of the cache.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, TopKLogitsWarper
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput, GenerationMode

from .families.causal_lm import BlockedForCausalLM
from .families.causal_lm_checks import STOP_STRING_TOOLS, check_generated_length
from .families.causal_lm_streams import NoiseStep, TokenStreams
from .losses import linear_logits
from .partition import BlockPartition
from .sampling import GRIDS, make_grid
from .suggest import unknown_name

BRIDGES = ("posterior_mean", "argmax_row")

_CHUNK = 32  # noise vectors drawn at a time; another number gives other samples for a seed


class Visit(NamedTuple):
    """A block and the steps it takes: pairs of noise levels (sigma, next sigma); the walk's last ends at 0."""

    block: int
    steps: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class DenoisingConfig:
    """How a token is denoised.

    Each field may also be an argument of ``denoising_generate`` or an extra field of a ``GenerationConfig``.

    Args:
        steps: noise levels per token, at least 1; by default one per block.
        grid: ``equal_probability`` (with one step per block it visits every block once, if the partition is the
            equal-probability one) or ``karras``.
        bridge: ``posterior_mean`` or ``argmax_row``.
        seed: of the noise; by default drawn from torch's global generator, or 0 with ``do_sample=False``.

    Raises:
        ValueError: for a value that is not allowed.
    """

    steps: int | None = None
    grid: str = "equal_probability"
    bridge: str = "posterior_mean"
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ValueError(f"{name}={value!r} must be a whole number of at least {low}.")
        for name, allowed in (("grid", GRIDS), ("bridge", BRIDGES)):
            if getattr(self, name) not in allowed:
                raise ValueError(unknown_name(name, getattr(self, name), allowed))

    def visits(self, partition: BlockPartition) -> list[Visit]:
        """The blocks that a token's walk visits, in order, with their steps.

        Example:
            >>> partition = BlockPartition.equal_probability(3, 12)
            >>> [(v.block, len(v.steps)) for v in DenoisingConfig(steps=5).visits(partition)]
            [(0, 2), (1, 1), (2, 2)]
        """
        levels = make_grid(partition, self.steps or partition.num_blocks, self.grid).tolist()
        pairs = zip(levels, levels[1:], strict=False)
        return [Visit(b, tuple(steps)) for b, steps in groupby(pairs, key=lambda pair: partition.block_of(pair[0]))]


def denoising_generate(
    model: BlockedForCausalLM,
    input_ids: Int[Tensor, "batch tokens"],
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    streamer: BaseStreamer | None = None,
    steps: int | None = None,
    grid: str | None = None,
    bridge: str | None = None,
    seed: int | None = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Int[Tensor, "batch more_tokens"]:
    """Generate by denoising each token: give it to ``generate`` as ``custom_generate``.

    What ``generate`` prepares is honoured: logits processors, stopping criteria, cache, left padding,
    ``num_return_sequences``, ``return_dict_in_generate`` with ``output_scores`` and ``output_logits`` (those of the
    last step). There are no beams and no assistants: the walk is a way of sampling. With ``do_sample=False`` the noise
    still decides, as the ODE maps it to a token; ``seed`` fixes it.

    Args:
        model: the model.
        input_ids: prompts, padded on the left.
        logits_processor: acts on f at every step.
        stopping_criteria: as in transformers.
        generation_config: as in transformers; ``steps``, ``grid``, ``bridge`` and ``seed`` may be fields of it.
        streamer: gets the new tokens.
        steps: see ``DenoisingConfig``, as for ``grid``, ``bridge`` and ``seed``.
        grid: see there.
        bridge: see there.
        seed: see there.
        **model_kwargs: ``attention_mask``, ``position_ids``, ``past_key_values`` and ``use_cache``.

    Raises:
        ValueError: for settings, tokens or a cache that do not fit, or a block that is needed and not loaded.

    Example:
        >>> base = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
        ...         "num_attention_heads": 4, "vocab_size": 100}
        >>> model = BlockedForCausalLM.from_base(base, num_blocks=3)
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> settings = {"steps": 4, "bridge": "posterior_mean", "do_sample": True, "top_k": 50, "max_new_tokens": 5}
        >>> model.generate(ids, custom_generate=denoising_generate, eos_token_id=None, **settings).shape
        torch.Size([1, 8])
    """
    given: dict[str, Any] = {"steps": steps, "grid": grid, "bridge": bridge, "seed": seed}
    fields = {n: getattr(generation_config, n, None) if v is None else v for n, v in given.items()}
    settings = DenoisingConfig(**{n: v for n, v in fields.items() if v is not None})
    if not isinstance(model, BlockedForCausalLM):
        raise ValueError(
            f"a {type(model).__name__} has no blocks to walk through: cut it with BlockedForCausalLM.from_base()."
        )
    walk = _Walk(model, settings, logits_processor)
    mask, positions, cache, seen = _checked(walk, input_ids, generation_config, model_kwargs)
    sample = bool(generation_config.do_sample)
    seed = settings.seed
    if seed is None:
        seed = int(torch.randint(2**31, ())) if sample else 0
    noise = _RowNoise(seed, input_ids, mask, model)
    pad, as_dict = generation_config._pad_token_tensor, generation_config.return_dict_in_generate
    stops_at_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    scores: tuple[Tensor, ...] | None = () if as_dict and generation_config.output_scores else None
    logits: tuple[Tensor | None, ...] | None = () if as_dict and generation_config.output_logits else None
    text_config = model.config.get_text_config()
    unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
    while bool(unfinished.any()):
        # Noisy targets read the clean tokens' keys from a cache: without a lasting one, from one for this token.
        of_token = DynamicCache(config=text_config) if cache is None and model.config.two_stream else cache
        streams = TokenStreams(model, of_token, positions, mask, input_ids.shape[1] - seen)
        z, uniform = noise.next()
        step_scores, step_logits = walk(streams, input_ids.to(model.device), seen, z, logits is not None)
        scores = None if scores is None else (*scores, step_scores)
        logits = None if logits is None else (*logits, step_logits)
        token = (_draw(step_scores, uniform) if sample else step_scores.argmax(-1)).to(input_ids.device)
        if stops_at_eos:
            token = token * unfinished + pad.to(token.device) * (1 - unfinished)
        seen = 0 if cache is None else input_ids.shape[1]
        input_ids = torch.cat([input_ids, token[:, None]], dim=-1)
        positions = torch.cat([positions, positions[:, -1:] + 1], dim=-1)
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
        if streamer is not None:
            streamer.put(token.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, scores)
    if streamer is not None:
        streamer.end()
    if as_dict:
        return GenerateDecoderOnlyOutput(sequences=input_ids, scores=scores, logits=logits, past_key_values=cache)
    return input_ids


class _Walk:
    """From the clean tokens and a start z to the next token's scores, block by block."""

    def __init__(self, model: BlockedForCausalLM, settings: DenoisingConfig, process: LogitsProcessorList):
        self.model, self.bridge, self.process = model, settings.bridge, process
        visits = settings.visits(model.partition)
        self.cascade = model.config.context == "cascade"
        self.blocks = list(range(visits[-1].block + 1)) if self.cascade else [visit.block for visit in visits]
        for block in self.blocks:
            model.check_loaded(block)  # all that are needed, or nothing is computed
        self.steps = {visit.block: [NoiseStep(model, visit.block, *pair) for pair in visit.steps] for visit in visits}
        self.table = model.target_table()
        # Top-k leaves that many tokens, so the walk's products run over those rows of the table only.
        self.count = min((p.top_k for p in process if isinstance(p, TopKLogitsWarper)), default=None)

    def __call__(
        self,
        streams: TokenStreams,
        input_ids: Int[Tensor, "batch tokens"],
        seen: int,
        z: Float[Tensor, "batch width"],
        want_logits: bool,
    ) -> tuple[Float[Tensor, "batch vocab"], Float[Tensor, "batch vocab"] | None]:
        """Scores of the next token at the last step, and the logits before the processors if they are wanted."""
        with self.model.expect_blocks(self.blocks):  # the same for every token
            return self._scores(streams, input_ids, seen, z, want_logits)

    def _scores(
        self, streams: TokenStreams, input_ids: Tensor, seen: int, z: Tensor, want_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        two_stream = self.model.config.two_stream
        hidden = embedded = self.model.embed_tokens(input_ids[:, seen:])
        features: Any = None
        for block in self.blocks:
            hidden = hidden if self.cascade else embedded
            steps = self.steps.get(block, ())
            if not (steps and two_stream):
                hidden = streams.clean(block, hidden)
            for i, step in enumerate(steps):
                if not two_stream:
                    features = self.model.block(block).norm(hidden[:, -1]) if i == 0 else features
                elif i == 0:
                    hidden, features = streams.both(block, step, hidden, z)
                else:
                    features = streams.noisy(block, step, z)
                pairs = self.model.readout(features, z, step.sigma.expand(len(z)), block, self.table)
                if i == 0 or two_stream:  # the clean stream's f is that of all steps of its block
                    f = linear_logits(pairs[:1]).float()
                    candidates = _Candidates(self.process(input_ids, f.clone()), self.table, self.count)
                scores = candidates.scores + (candidates.products(pairs[1][0]) if pairs[1:] else 0)
                if step.ratio == 0:
                    logits = f + linear_logits(pairs[1:]) if want_logits and pairs[1:] else f
                    return candidates.of_all(scores), logits
                denoised = candidates.denoised(scores, self.bridge)
                z = step.ratio * z + (1 - step.ratio) * denoised  # EDM, Alg. 2, lines 7-8
        raise AssertionError("a grid ends at 0")


class _Candidates:
    """The tokens that the processors left: all, or the so many best, with their rows of the table."""

    def __init__(self, scores: Float[Tensor, "batch vocab"], table: Float[Tensor, "vocab width"], count: int | None):
        self.scores, self.table, self.size, self.index = scores, table, scores.shape[-1], None
        if count is not None and count < self.size:
            self.scores, self.index = scores.topk(count, dim=-1)
            self.table = table[self.index]  # [batch, count, width]

    def products(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch count"]:
        """<x, e_k>."""
        return x @ self.table.T if self.index is None else (self.table @ x[:, :, None])[:, :, 0]

    def denoised(self, scores: Float[Tensor, "batch count"], bridge: str) -> Float[Tensor, "batch width"]:
        """D, from logits back to where z lives."""
        if bridge == "posterior_mean":  # sum_k p_k e_k
            p = scores.softmax(-1)
            return p @ self.table if self.index is None else (p[:, None] @ self.table)[:, 0]
        best = scores.argmax(-1)
        return self.table[best] if self.index is None else self.table[torch.arange(len(best), device=best.device), best]

    def of_all(self, scores: Float[Tensor, "batch count"]) -> Float[Tensor, "batch vocab"]:
        """Scores of all tokens, -inf at those left out."""
        if self.index is None:
            return scores
        return scores.new_full((len(scores), self.size), -torch.inf).scatter(1, self.index, scores)


def _checked(
    walk: _Walk, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> tuple[Tensor | None, Tensor, Cache | None, int]:
    """Attention mask, positions, cache and the number of tokens in it, or a ``ValueError`` if they do not fit."""
    model, values, tokens = walk.model, dict(model_kwargs), input_ids.shape[1]
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise ValueError(
            f"generation mode {mode.value!r} cannot walk the noise grid: leave out num_beams, penalty_alpha "
            "and the like."
        )
    names = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")
    mask, positions, cache, use_cache, _ = (values.pop(name, None) for name in names)
    for name in STOP_STRING_TOOLS:
        values.pop(name, None)
    extra = [name for name, value in values.items() if value is not None and value is not False]
    if extra:
        raise ValueError(f"{extra[0]!r} has no meaning when tokens are denoised: leave it out.")
    if mask is not None and mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, input_ids {list(input_ids.shape)}: give both of the whole "
            "sequence, with the tokens that a cache holds."
        )
    model.check_tokens(input_ids, mask)
    if mask is not None and not bool(mask[:, -1].all()):
        raise ValueError(
            "the prompts are padded on the right (the last column of attention_mask has zeros): pad them on the left, "
            "tokenizer.padding_side = 'left'."
        )
    check_generated_length(model.config, tokens, generation_config.max_length)
    cache, seen = (cache, _tokens_in(cache, walk, input_ids)) if use_cache and cache is not None else (None, 0)
    if positions is not None and positions.shape[-1] != tokens:  # generate makes them from the mask
        raise ValueError(
            f"attention_mask or position_ids are of {positions.shape[-1]} tokens, input_ids of {tokens}: give them of "
            "the whole sequence, with the tokens that a cache holds."
        )
    if positions is None:
        positions = torch.arange(tokens).expand(input_ids.shape) if mask is None else mask.long().cumsum(-1) - 1
    return None if mask is None else mask.to(model.device), positions.clamp_min(0).to(model.device), cache, seen


def _tokens_in(cache: Cache, walk: _Walk, input_ids: Tensor) -> int:
    """Number of tokens that a cache holds of every block that the walk needs."""
    views = [walk.model._cache_of(cache, block) for block in walk.blocks]
    counts = [int(view.get_seq_length()) for view in views]
    if len(set(counts)) > 1:
        raise ValueError(
            f"past_key_values holds {counts} tokens of blocks {walk.blocks}: decoding from f or another walk filled "
            "it. Start with past_key_values=None."
        )
    if counts[0] >= input_ids.shape[1]:
        raise ValueError(
            f"past_key_values holds {counts[0]} tokens, input_ids {input_ids.shape[1]}: give the whole sequence, of "
            "which at least the last token is not in the cache yet."
        )
    walk.model.check_tokens(input_ids[:, counts[0] :], None, views[0])
    return counts[0]


class _RowNoise:
    """Each row's own stream of noise, drawn on the CPU so that it is the same on every device."""

    def __init__(self, seed: int, input_ids: Tensor, attention_mask: Tensor | None, model: BlockedForCausalLM):
        self.width, self.device, self.sigma_max = model.config.hidden_size, model.device, model.partition.edges[0]
        self.used, self.generators = _CHUNK, []
        seen: Sequence = [slice(None)] * len(input_ids) if attention_mask is None else attention_mask.bool().cpu()
        copies: dict[bytes, int] = {}
        for row, where in zip(input_ids.cpu().long(), seen, strict=True):
            prompt = row[where].numpy().tobytes()
            copy = copies[prompt] = copies.get(prompt, -1) + 1
            digest = hashlib.blake2b(f"{seed}/{copy}/".encode() + prompt, digest_size=4).digest()
            self.generators.append(torch.Generator().manual_seed(int.from_bytes(digest, "little")))

    def next(self) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch"]]:
        """``z ~ sigma_max N(0, I)`` and a uniform number in [0, 1) for the next token of each row."""
        if self.used == _CHUNK:
            self.used = 0
            z = torch.stack([torch.randn(_CHUNK, self.width, generator=g) for g in self.generators])
            uniform = torch.stack([torch.rand(_CHUNK, generator=g) for g in self.generators])
            self.z, self.uniform = (self.sigma_max * z).to(self.device), uniform.to(self.device)
        self.used += 1
        return self.z[:, self.used - 1], self.uniform[:, self.used - 1]


def _draw(scores: Float[Tensor, "batch vocab"], uniform: Float[Tensor, "batch"]) -> Int[Tensor, "batch"]:
    """The token at which the cumulative distribution passes a uniform number."""
    cumulative = scores.softmax(-1).cumsum(-1)
    # Strictly below the sum, so that no token of probability 0 is drawn however the sum was rounded.
    target = uniform[:, None] * (1 - 1e-6) * cumulative[:, -1:]
    return (cumulative <= target).sum(-1)


__all__ = ["BRIDGES", "DenoisingConfig", "Visit", "denoising_generate"]
