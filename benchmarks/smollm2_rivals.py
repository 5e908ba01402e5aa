"""What a user would pick instead of blocks, for smollm2.py: LoRA, block-coordinate descent (BAdam), GaLore by layer.

All have the data order, schedule, clipping and loss of the other arms; GaLore updates a matrix as soon as it has its
gradient, so that no gradient norm exists to be clipped.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from hf_diffusionblocks.baselines.block_coordinate import BlockCoordinate, badam
from hf_diffusionblocks.losses import linear_cross_entropy
from hf_diffusionblocks.objectives.next_token import next_tokens
from hf_diffusionblocks.training.data_stream import SampleOrder


def batches(train: Any, batch: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """The rows in the order that the library's trainer gives to block 0."""
    order = SampleOrder(len(train), seed, 0)
    position = 0
    while True:
        yield train[order.indices(position, batch)]
        position += batch


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the next token, the logits in chunks."""
    hidden = model.model(input_ids=batch["input_ids"], use_cache=False)[0]
    pairs = [(hidden.flatten(0, 1), model.lm_head.weight)]
    return linear_cross_entropy(pairs, next_tokens(batch).flatten()).mean()


def adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(parameters), lr=lr, weight_decay=0.0, fused=True)


class GaLore(torch.optim.Optimizer):
    """Adam on gradients projected to a low rank (Zhao et al. 2024, arXiv 2403.03507, Alg. 2), one matrix at a time.

    The projector is made of the ``rank`` leading singular vectors, on the shorter side, of the gradient at every
    ``gap``-th update. Embeddings and norms have ordinary moments.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, rank: int, gap: int, scale: float, full: set[int]
    ):
        super().__init__(list(parameters), {"lr": lr})
        self.rank, self.gap, self.scale, self.full = rank, gap, scale, full
        for group in self.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(self.update)

    @torch.no_grad()
    def update(self, p: nn.Parameter) -> None:
        """Called by autograd when a parameter has its gradient, which is freed afterwards."""
        state, grad = self.state[p], p.grad
        step = state["step"] = state.get("step", 0) + 1
        projected = p.ndim == 2 and id(p) not in self.full
        if projected:
            if (step - 1) % self.gap == 0:
                u, _, vh = torch.linalg.svd(grad, full_matrices=False)
                left = p.shape[0] < p.shape[1]
                state["projector"] = u[:, : self.rank].clone() if left else vh[: self.rank].clone()
            left = p.shape[0] < p.shape[1]
            grad = state["projector"].T @ grad if left else grad @ state["projector"].T
        if step == 1:
            state["m"], state["v"] = torch.zeros_like(grad), torch.zeros_like(grad)
        m, v = state["m"].lerp_(grad, 0.1), state["v"].mul_(0.999).addcmul_(grad, grad, value=0.001)
        change = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        if projected:
            change = self.scale * (state["projector"] @ change if left else change @ state["projector"])
        p.sub_(change, alpha=self.param_groups[0]["lr"])
        p.grad = None

    def step(self, closure: Any = None) -> None:
        """Nothing is left to do: each parameter was updated in the backward pass."""


def with_adapters(base: Any, rank: int) -> Any:
    """The base with LoRA (Hu et al. 2021, arXiv 2106.09685) on every linear layer but the head, alpha = 2 rank."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def badam_of(base: Any, blocks: int, switch: int, lr: float) -> BlockCoordinate:
    """BAdam on blocks of equally many layers; embedding, last norm and head stay frozen."""
    count = len(base.model.layers) // blocks
    parts = [base.model.layers[b * count : (b + 1) * count] for b in range(blocks)]
    return badam([[p for layer in part for p in layer.parameters()] for part in parts], partial(adamw, lr=lr), switch)


def make_rival(settings: dict, base: Any, lr: float) -> tuple[Any, torch.optim.Optimizer | None]:
    """What is to be scored, and its optimizer, of which ``badam`` makes one per visit (:func:`badam_of`).

    Args:
        settings: of the method, by its ``name``.
        base: trained in place.
        lr: learning rate.
    """
    base.train()
    base.requires_grad_(False)
    if settings["name"] == "lora":
        model = with_adapters(base, settings["rank"])
        return model, adamw((p for p in model.parameters() if p.requires_grad), lr)
    if settings["name"] == "galore":
        base.requires_grad_(True)
        full = {id(base.model.embed_tokens.weight)}
        return base, GaLore(base.parameters(), lr, settings["rank"], settings["gap"], settings["scale"], full)
    return base, None


def train_rival(arm: Any, base: Any, train: Any, seed: int, after: Callable[[], None], batch: int) -> Any:
    """Train the base in place; returns what is to be scored."""
    settings = arm.rival
    model, optimizer = make_rival(settings, base, arm.lr)
    blocks = badam_of(base, settings["blocks"], settings["switch"], arm.lr) if optimizer is None else None
    total = arm.updates * settings.get("blocks", 1)
    clock = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=arm.lr)  # outlives the optimizers of BAdam's blocks
    schedule = get_scheduler("linear", clock, max(1, round(total * arm.warmup)), total)
    data = batches(train, batch, seed)
    for update in range(total):
        if blocks is not None:
            blocks.start(update)
            optimizer = blocks.optimizer
        for group in optimizer.param_groups:
            group["lr"] = schedule.get_last_lr()[0]
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(base, next(data))
        loss.backward()
        if settings["name"] != "galore":
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.step()
        schedule.step()
        after()
    return model
