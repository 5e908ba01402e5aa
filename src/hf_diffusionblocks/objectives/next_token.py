"""Next-token prediction, block by block: cross-entropy on the clean stream or on noisy targets.

``clean``: block b's own layers, then its auxiliary layers, norm and head, score the next token (a local loss; the
limit sigma -> infinity of the paper's). ``exact`` and ``edm``: every token is a noisy target with a noise level of its
own from the block's range, and the loss is the cross-entropy of the token (arXiv 2506.14202, App. B). EDM's weight is
derived for squared errors; a cross-entropy has none.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from ..batches import fetch
from ..families.causal_lm import BlockedForCausalLM
from ..families.causal_lm_checks import IGNORED, check_some_target
from ..losses import linear_cross_entropy, linear_divergence
from .result import HeldOutLoss, ObjectiveResult
from .teacher import freeze_teacher


def next_tokens(batch: dict[str, Tensor]) -> Int[Tensor, "batch tokens"]:
    """The token that each position predicts; -100 at the last position, across documents and at padding.

    Args:
        batch: ``input_ids`` [batch, tokens], and perhaps ``labels`` (as transformers', -100 is ignored),
            ``position_ids`` (restarts begin a document) and ``attention_mask``.
    """
    labels = batch.get("labels", batch["input_ids"])
    ahead = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if "position_ids" in batch:
        restarts = F.pad(batch["position_ids"][:, 1:] == 0, (0, 1))
        ahead = ahead.masked_fill(restarts, IGNORED)
    if "attention_mask" in batch:
        seen = batch["attention_mask"].bool()
        ahead = ahead.masked_fill(~(seen & F.pad(seen[:, 1:], (0, 1))), IGNORED)
    return ahead


@dataclass
class NextTokenPrediction:
    """Cross-entropy of the next token in one block.

    Args:
        teacher: a frozen causal language model over the same tokens, such as the base before it was cut.
        distillation_weight: share of the Kullback-Leibler divergence from the teacher's next-token distribution in the
            loss; the data's cross-entropy has the rest.
        hidden_weight: factor on the squared distance between the block's output and the teacher's hidden state at the
            same depth, relative to that state's mean square (``clean`` only).

    Raises:
        ValueError: for a weight outside its range, or one that needs a teacher and has none.
    """

    teacher: Any = None
    distillation_weight: float = 0.0
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        freeze_teacher(self.teacher, self.distillation_weight, self.hidden_weight)
        self._linear_head: bool | None = None

    def __call__(
        self,
        model: BlockedForCausalLM,
        block: int,
        batch: dict[str, Tensor],
        generator: torch.Generator | None = None,
    ) -> ObjectiveResult:
        """Loss of one block on one batch, in nats per token.

        Args:
            model: the blocked model. In a cascade the blocks below run forward only, unless ``batch`` holds their
                output.
            block: which block.
            batch: ``input_ids`` [batch, tokens]; perhaps ``labels``, ``position_ids``, ``attention_mask``, and
                ``hidden_states`` [batch, tokens, width], what the block's clean stream starts from.
            generator: CPU generator of the noise.
        """
        labels = next_tokens(batch)
        places = model.places(batch)
        hidden = model.start_of(block, batch)
        if model.config.two_stream:
            return self._noisy(model, block, batch, hidden, labels, places, generator)
        output = model.clean_block(hidden, block, **places)
        features = model.training_hidden(output, block, **places)
        flat, kept = labels.flatten(), labels.flatten() != IGNORED
        pairs = [(features.flatten(0, 1), model.head_weight(block))]
        losses = linear_cross_entropy(pairs, flat)
        check_some_target(losses)
        loss, parts = losses.mean(), dict[str, Tensor]()
        if self.distillation_weight or self.hidden_weight:
            loss, parts = self._distil(model, block, batch, places, output, pairs, kept, loss)
        return ObjectiveResult(loss, torch.zeros(0), _by_row(losses, labels), parts)

    def prepare(self, batch: dict[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        """The batch as it is trained on: as it is."""
        return batch

    def _noisy(
        self,
        model: BlockedForCausalLM,
        block: int,
        batch: dict[str, Tensor],
        hidden: Tensor,
        labels: Tensor,
        places: dict,
        generator: torch.Generator | None,
    ) -> ObjectiveResult:
        table = model.target_table().detach()
        z, sigma = noisy_targets(model, block, labels, table, generator)
        positions = places.get("position_ids")
        if positions is None:
            positions = torch.arange(labels.shape[1], device=labels.device)[None]
        features = model.two_streams(
            hidden, z, sigma, block, position_ids=positions, attention_mask=places.get("attention_mask")
        )[1]
        # The paper's readout trains the table through the logits; the exact term is a known function of z.
        trained = model.target_table() if model.config.readout == "edm" else table
        pairs = model.readout(features.flatten(0, 1), z.flatten(0, 1), sigma.flatten(), block, trained)
        losses = linear_cross_entropy(pairs, labels.flatten())
        check_some_target(losses)
        loss, parts = losses.mean(), dict[str, Tensor]()
        if self.distillation_weight:
            kept = labels.flatten() != IGNORED
            loss, parts = self._distil(model, block, batch, places, None, pairs, kept, loss)
        return ObjectiveResult(loss, sigma.flatten(), _by_row(losses, labels), parts)

    def _distil(
        self,
        model: BlockedForCausalLM,
        block: int,
        batch: dict[str, Tensor],
        places: dict,
        output: Tensor | None,
        pairs: list,
        kept: Tensor,
        loss: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        parts = {"data_loss": loss.detach()}
        whole = self.distillation_weight > 0 and not self._has_linear_head(batch["input_ids"])
        network = self.teacher if whole else self.teacher.base_model
        with torch.no_grad():
            known = network(
                input_ids=batch["input_ids"], output_hidden_states=self.hidden_weight > 0, use_cache=False, **places
            )
        if self.distillation_weight:
            own = [(x[kept], weight) for x, weight in pairs]
            if whole:
                theirs = known.logits.flatten(0, 1)[kept]
            else:
                head = self.teacher.get_output_embeddings().weight
                theirs = [(known.last_hidden_state.flatten(0, 1)[kept], head)]
            divergence = linear_divergence(own, theirs).mean()
            parts["distillation_loss"] = divergence.detach()
            loss = (1 - self.distillation_weight) * loss + self.distillation_weight * divergence
        if self.hidden_weight and block < model.config.num_blocks - 1 and output is not None:
            depth = model.partition.layers(block)[-1] + 1
            target = known.hidden_states[depth].float().flatten(0, 1)[kept]
            distance = (output.float().flatten(0, 1)[kept] - target).pow(2).mean() / target.pow(2).mean()
            parts["hidden_loss"] = distance.detach()
            loss = loss + self.hidden_weight * distance
        return loss, parts

    @torch.no_grad()
    def _has_linear_head(self, input_ids: Tensor) -> bool:
        """Whether the teacher's logits are its last hidden state times its head: then they are made in chunks."""
        if self._linear_head is None:
            head, one = self.teacher.get_output_embeddings(), {"input_ids": input_ids[:1, :1], "use_cache": False}
            plain = self.teacher.base_model is not self.teacher and hasattr(head, "weight")
            if plain:
                hidden = getattr(self.teacher.base_model(**one), "last_hidden_state", None)
                plain = hidden is not None and hidden.shape[-1] == head.weight.shape[-1]
                plain = plain and torch.allclose(F.linear(hidden, head.weight), self.teacher(**one).logits)
            self._linear_head = bool(plain)
        return self._linear_head

    @torch.no_grad()
    def held_out(
        self,
        model: BlockedForCausalLM,
        dataset: Any,
        *,
        num_draws: int = 1,
        max_samples: int | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> HeldOutLoss:
        """Cross-entropy on held-out rows, nats per token: of the language model, and of each block.

        ``total`` is that of the model's own logits (``BlockedForCausalLM.forward``): a cascade's last block, else
        block 0. ``per_range`` is each block's own loss: with its auxiliary layers (``clean``), or at noise levels drawn
        from its range (``exact``, ``edm``), which ranks nothing across models, because low noise is free.

        Args:
            model: with all blocks resident.
            dataset: ``dataset[list of indices]`` gives a batch.
            num_draws: unused; for the interface of other objectives.
            max_samples: use the first so many rows only.
            batch_size: rows per forward pass.
            seed: of the noise.
        """
        training = model.training
        device = model.embed_tokens.weight.device
        model.eval()
        generator = torch.Generator().manual_seed(seed)
        plain = NextTokenPrediction()
        total: list[Tensor] = []
        blocks: list[list[Tensor]] = [[] for _ in range(model.partition.num_blocks)]
        count = len(dataset) if max_samples is None else min(len(dataset), max_samples)
        for start in range(0, count, batch_size):
            batch = fetch(dataset, list(range(start, min(start + batch_size, count))))
            batch = {k: v.to(device) for k, v in batch.items()}
            places = model.places(batch)
            labels = next_tokens(batch)
            hidden = model.embed_tokens(batch["input_ids"])
            features = model.language_hidden(hidden, None, None, **_filled(places, hidden))
            pairs = [(features.flatten(0, 1), model.language_head())]
            total.append(linear_cross_entropy(pairs, labels.flatten()).cpu())
            scored = len(total[-1])
            for b in range(model.partition.num_blocks):
                state = {"hidden_states": hidden} if model.config.context == "cascade" and b else {}
                blocks[b].append(plain(model, b, batch | state, generator).loss.cpu() * scored)
                if model.config.context == "cascade":
                    hidden = model.clean_block(hidden, b, **places)
        model.train(training)
        losses = torch.cat(total)
        per_block = [float(torch.stack(values).sum() / len(losses)) for values in blocks]
        error = float(losses.std() / max(len(losses), 1) ** 0.5)
        return HeldOutLoss(float(losses.mean()), per_block, list(model.partition.edges), len(losses), error)


def _filled(places: dict, hidden: Tensor) -> dict:
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    return {"attention_mask": None, "position_ids": positions} | places


def noisy_targets(
    model: BlockedForCausalLM,
    block: int,
    labels: Int[Tensor, "batch tokens"],
    table: Tensor,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """``z = e_k + sigma eps`` for the tokens that each position predicts, sigma from the block's range: per token, or
    per row where the config says ``noise_per="row"``.

    Returns:
        z [batch, tokens, width] and sigma [batch, tokens]; positions without a label get noise alone.
    """
    drawn = labels if getattr(model.config, "noise_per", "token") == "token" else labels[:, :1]
    sigma = model.partition.sample(block, drawn.numel(), generator).to(labels.device, torch.float32)
    sigma = sigma.view(drawn.shape).expand(labels.shape)
    y = table[labels.clamp_min(0)] * (labels != IGNORED)[..., None]
    noise = torch.randn(y.shape, generator=generator, device="cpu").to(y.device, non_blocking=True)
    return y + sigma[..., None] * noise, sigma


def _by_row(losses: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of each row, detached."""
    kept = labels != IGNORED
    each = torch.zeros(labels.shape, device=losses.device).masked_scatter(kept, losses.detach())
    return each.sum(1) / kept.sum(1).clamp_min(1)
