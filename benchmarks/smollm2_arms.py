"""Arms of smollm2.py: ways to fine-tune, and what a block's loss reads above its layers."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_diffusionblocks.losses import linear_cross_entropy
from hf_diffusionblocks.objectives.next_token import next_tokens
from hf_diffusionblocks.objectives.result import ObjectiveResult

BATCH, LENGTH = 1, 256  # rows per update, tokens per row
LAYERS = 30
UPDATES = 40  # of each layer
WARMUP = 0.1  # part of the updates


class Above:
    """A block's loss with layers above it that carry the gradient and do not change.

    Args:
        base: the frozen base.
        keep: every so many of the base's upper layers stand above; 0 for the model's own upper blocks as they are now:
            then the gradient is that of the whole network, one block at a time.
    """

    def __init__(self, base: Any, keep: int = 0):
        self.base, self.keep = base.requires_grad_(False), keep

    def __call__(self, model: Any, block: int, batch: dict[str, Tensor], generator: Any = None) -> ObjectiveResult:
        ids = batch["input_ids"]
        hidden = model.context_of(block, ids) if block else model.embed_tokens(ids)
        hidden = model.clean_block(hidden, block)
        last = model.partition.num_blocks - 1
        if self.keep:
            decoder = self.base.model
            positions = torch.arange(ids.shape[1])[None]
            rope = decoder.rotary_emb(hidden, positions)
            above = range(model.partition.layers(block)[-1] + 1, model.config.num_layers)
            kept = sorted({*above[self.keep - 1 :: self.keep], *above[-1:]})
            for i in kept:
                hidden = decoder.layers[i](hidden, position_embeddings=rope, position_ids=positions)
            features = decoder.norm(hidden)
        else:
            for upper in range(block + 1, last + 1):
                hidden = model.clean_block(hidden, upper)
            features = model.block(last).norm(hidden)
        labels = next_tokens(batch)
        losses = linear_cross_entropy([(features.flatten(0, 1), model.head_weight(last))], labels.flatten())
        return ObjectiveResult(losses.mean(), torch.zeros(0), losses.detach().view(len(ids), -1).mean(1), {})


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        lr: peak learning rate.
        blocks: B.
        stages: the blocks of each job, in order; each gets ``updates``.
        config: of the blocked model.
        training: further arguments of the trainer.
        path: makes the objective from the base; None for the library's.
        rival: name of another method, and its settings.
        fresh_rows: every stage has rows of its own, in place of the same ones.
        rates: factors on ``lr``, per stage.
        updates: of each layer.
        curve: score every so many updates.
    """

    lr: float = 5e-5
    blocks: int = 1
    stages: tuple[list[int], ...] = ()
    config: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    above: str | None = None
    keep: int = 0
    rival: dict | None = None
    rates: tuple[float, ...] = ()
    fresh_rows: bool = False
    warmup: float = WARMUP
    updates: int = UPDATES
    curve: int = UPDATES // 2

    @property
    def path(self) -> Callable[[Any], Above] | None:
        """Makes the objective from the base; None for the library's own."""
        return None if self.above is None else lambda base: Above(base, keep=self.keep)

    def to_dict(self) -> dict:
        return asdict(self)


def _full(lr: float, **more: Any) -> Arm:
    return Arm(lr=lr, blocks=1, stages=([0],), training={"train_shared": "all"}, **more)


def _stages(order: str, blocks: int) -> tuple[list[int], ...]:
    if order == "simultaneous":
        return (list(range(blocks)),)
    up = tuple([b] for b in range(blocks))
    return {"bottom-up": up, "top-down": up[::-1], "last": up[-1:]}[order]


def _blocked(order: str, lr: float, blocks: int = 3, *, training: dict | None = None, **more: Any) -> Arm:
    training = {"train_shared": "none"} | (training or {})
    more["config"] = {"layers_per_block": [LAYERS // blocks] * blocks} | more.get("config", {})
    if order == "simultaneous":
        training["order"] = "simultaneous"
    curve = more.pop("curve", UPDATES if order != "last" else UPDATES // 2)
    return Arm(lr=lr, blocks=blocks, stages=_stages(order, blocks), training=training, curve=curve, **more)


ARMS: dict[str, Arm] = {"base": Arm()}
ARMS |= {f"full, lr {lr:.0e}": _full(lr) for lr in (2e-5, 5e-5, 1e-4, 2e-4, 4e-4)}
ARMS |= {f"last block of 3, lr {lr:.0e}": _blocked("last", lr) for lr in (5e-5, 1e-4, 2e-4, 4e-4)}
ARMS |= {
    f"LoRA, r={r}, lr {lr:.0e}": Arm(lr=lr, rival={"name": "lora", "rank": r})
    for r in (8, 16)
    for lr in (5e-4, 1e-3, 2e-3, 4e-3)
}
for _lr in (5e-5, 1e-4, 2e-4, 4e-4):
    ARMS |= {
        f"exact, top-down, B=3, lr {_lr:.0e}": _blocked("top-down", _lr, above="model"),
        f"exact, top-down, B=2, lr {_lr:.0e}": _blocked("top-down", _lr, 2, above="model"),
        f"exact, bottom-up, B=3, lr {_lr:.0e}": _blocked("bottom-up", _lr, above="model"),
        f"emulator, top-down, B=3, lr {_lr:.0e}": _blocked("top-down", _lr, above="base", keep=4),
        f"BAdam, B=3, lr {_lr:.0e}": Arm(lr=_lr, rival={"name": "badam", "blocks": 3, "switch": 10}, curve=UPDATES),
    }
for _lr in (1e-4, 2e-4, 4e-4):
    # The earlier a layer, the smaller its steps; stages see rows of their own in "fresh rows".
    ARMS |= {
        f"exact, top-down, falling rates, B=3, lr {_lr:.0e}": _blocked(
            "top-down", _lr, above="model", rates=(1.0, 0.5, 0.25)
        ),
        f"exact, top-down, falling rates, fresh rows, B=3, lr {_lr:.0e}": _blocked(
            "top-down", _lr, above="model", rates=(1.0, 0.5, 0.25), fresh_rows=True
        ),
    }
ARMS |= {
    f"GaLore by layer, r=128, lr {lr:.0e}": Arm(lr=lr, rival={"name": "galore", "rank": 128, "gap": 200, "scale": 0.25})
    for lr in (1e-4, 2e-4, 4e-4)
}
for _lr in (1e-5, 5e-5, 1e-4):
    for _order in ("bottom-up", "simultaneous"):
        ARMS |= {
            f"local, {_order}, B=3, lr {_lr:.0e}": _blocked(_order, _lr),
            f"local, {_order}, B=3, auxiliary, lr {_lr:.0e}": _blocked(_order, _lr, config={"auxiliary_layers": 1}),
            f"local, {_order}, B=3, hidden, lr {_lr:.0e}": _blocked(_order, _lr, training={"hidden_weight": 10.0}),
            f"local, {_order}, B=3, auxiliary and hidden, lr {_lr:.0e}": _blocked(
                _order, _lr, config={"auxiliary_layers": 1}, training={"hidden_weight": 10.0}
            ),
            f"local, {_order}, B=3, auxiliary and distillation, lr {_lr:.0e}": _blocked(
                _order, _lr, config={"auxiliary_layers": 1}, training={"distillation_weight": 0.5}
            ),
        }
# Independent blocks: a language model's logits come from block 0, so that block alone is trained here. With the clean
# readout and no teacher it is the base cut to its first L/3 layers.
for _lr in (3e-4, 1e-3):
    for _readout, _weight in (("clean", 0.0), ("clean", 0.5), ("exact", 0.5), ("edm", 0.5)):
        _name = "cut to L/3" if not _weight else f"independent, {_readout}, distillation, block 0 of 3"
        ARMS[f"{_name}, lr {_lr:.0e}"] = Arm(
            lr=_lr,
            blocks=3,
            stages=([0],),
            config={"readout": _readout, "context": "independent", "layers_per_block": [10, 10, 10]},
            training={"train_shared": "none", "distillation_weight": _weight},
        )
# Blocks in turn, each with moments of its own that rest while the others train; the gradient is the whole network's.
for _lr in (5e-5, 1e-4, 2e-4):
    for _visit in (1, 10):
        ARMS[f"exact, in turn, {_visit} per visit, B=3, lr {_lr:.0e}"] = _blocked(
            "simultaneous",
            _lr,
            training={"gradient": "exact", "block_order": "round_robin", "steps_per_visit": _visit},
            curve=3 * UPDATES // 2,
        )
# Four times as many updates on four times as many rows: where a low rank may not be enough.
_LONG = {"updates": 4 * UPDATES, "curve": 2 * UPDATES}
ARMS |= {f"full, 160 updates, lr {lr:.0e}": _full(lr, **_LONG) for lr in (5e-5, 1e-4)}
ARMS |= {
    f"LoRA, r={r}, 160 updates, lr {lr:.0e}": Arm(lr=lr, rival={"name": "lora", "rank": r}, **_LONG)
    for r in (16, 64)
    for lr in (1e-3, 2e-3)
}
ARMS |= {
    f"exact, in turn, 1 per visit, B=3, 160 updates, lr {lr:.0e}": _blocked(
        "simultaneous",
        lr,
        training={"gradient": "exact", "block_order": "round_robin", "steps_per_visit": 1},
        updates=4 * UPDATES,
        curve=6 * UPDATES,
    )
    for lr in (5e-5, 1e-4)
}
