"""Memory of a language model's training step by kind: predicted, counted on a real step, and over end to end.

    python benchmarks/text_memory.py
    python benchmarks/text_memory.py --layers 12 --width 384 --tokens 128 --batch-size 4 --mixed-precision bf16

Prints a markdown table for end to end (B = 1), a block of B on the clean stream without and with an auxiliary layer,
and one on two streams, each without and with checkpointing. Each measured row is one update of a model that holds the
shared embeddings and that block only. What all blocks share, and auxiliary layers, are named apart: how much of the
weights they are. Bytes are counted by tensor, so the table is the same each time; it depends on the machine only
through the kernels that torch chooses there.
"""

import argparse
import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hf_diffusionblocks import BlockedForCausalLM
from hf_diffusionblocks.memory import BLOCKED, CHECKPOINTING, END_TO_END, MemoryUse, measure_memory, plan_memory

KINDS = ("weights", "gradients", "moments", "ema", "activations", "total")
# What end to end is compared with: the settings of a block, the goal for its activations.
ARMS: dict[str, tuple[dict[str, Any], float]] = {
    "clean": ({"context": "cascade", "auxiliary_layers": 0}, 0.36),
    "clean, one auxiliary layer": ({"context": "cascade", "auxiliary_layers": 1}, 0.36),
    "two streams": ({"context": "independent", "readout": "exact"}, 0.7),
}
STATE_GOAL = CHECKPOINTING_GOAL = 0.36


@dataclass(frozen=True)
class Row:
    """A way to train, counted.

    Attributes:
        name: of the arm.
        checkpointing: whether activations are recomputed inside the block.
        predicted: by ``plan_memory``.
        measured: on a real step.
        shared: bytes of the weights that all blocks share.
        auxiliary: bytes of the auxiliary layers' weights.
        goal: for its activations over end to end's without checkpointing.
    """

    name: str
    checkpointing: bool
    predicted: MemoryUse
    measured: MemoryUse
    shared: int
    auxiliary: int
    goal: float

    @property
    def state(self) -> int:
        """Weights, gradients and moments, in bytes."""
        return self.measured.weights + self.measured.gradients + self.measured.moments

    @property
    def off(self) -> float:
        """The largest relative difference between prediction and count, over the kinds."""
        pairs = [(getattr(self.predicted, kind), getattr(self.measured, kind)) for kind in KINDS]
        return max(abs(predicted - counted) / counted for predicted, counted in pairs)


def rows(
    layers: int = 12,
    width: int = 384,
    vocab_size: int = 256,
    tokens: int = 128,
    batch_size: int = 4,
    num_blocks: int = 3,
    mixed_precision: str = "no",
) -> Iterator[Row]:
    """End to end, then the block of each arm that holds the most; each without and with checkpointing."""
    base = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 8 * width // 3 // 32 * 32,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "vocab_size": vocab_size,
        "max_position_embeddings": tokens,
    }
    arms = {END_TO_END: (1, {"auxiliary_layers": 0}, CHECKPOINTING_GOAL)}
    arms |= {name: (num_blocks, settings, goal) for name, (settings, goal) in ARMS.items()}
    for name, (count, settings, goal) in arms.items():
        config = BlockedForCausalLM.config_from(base, num_blocks=count, **settings)
        plan = plan_memory(config, batch_size=batch_size, tokens=tokens, mixed_precision=mixed_precision)
        for checkpointing in (False, True):
            predicted = plan.worst(BLOCKED + (CHECKPOINTING if checkpointing else ""))
            model = BlockedForCausalLM(config, blocks=[predicted.block])
            model.to("cuda" if torch.cuda.is_available() else "cpu")
            measured = measure_memory(
                model,
                predicted.block,
                model.dummy_batch(batch_size, tokens),
                mixed_precision=mixed_precision,
                gradient_checkpointing=checkpointing,
            )
            shared = sum(p.nbytes for _, p in model.shared_parameters())
            auxiliary = model.block(predicted.block).auxiliary
            extra = sum(p.nbytes for p in auxiliary.parameters()) if auxiliary is not None else 0
            yield Row(
                name, checkpointing, predicted, measured, shared, extra, CHECKPOINTING_GOAL if checkpointing else goal
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=384, help="a multiple of 64")
    parser.add_argument("--vocab-size", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16"])
    args = parser.parse_args()
    if args.width < 64 or args.width % 64:
        parser.error(f"--width {args.width} must be a multiple of 64")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU kernels"
    print(
        f"Llama, {args.layers} layers, width {args.width}, {args.vocab_size} tokens in the vocabulary, "
        f"{args.batch_size} x {args.tokens} tokens per step, B = {args.blocks}, AdamW, float32 weights, autocast "
        f"{args.mixed_precision}; {device}, torch {torch.__version__}, {datetime.date.today()}. MiB, predicted / "
        "measured; shared and auxiliary are in the weights. state: weights, gradients and moments over end to end's; "
        "activations over end to end's without checkpointing; in brackets the goal.\n"
    )
    head = ["one block", "checkpointing", *KINDS, "shared", "auxiliary", "state ratio", "activations ratio"]
    print(f"| {' | '.join(head)} |")
    print("|" + " --- |" * len(head))
    whole = None
    for row in rows(
        args.layers, args.width, args.vocab_size, args.tokens, args.batch_size, args.blocks, args.mixed_precision
    ):
        whole = whole or row
        cells = [f"{getattr(row.predicted, k) / 2**20:.1f} / {getattr(row.measured, k) / 2**20:.1f}" for k in KINDS]
        cells += [f"{row.shared / 2**20:.1f}", f"{row.auxiliary / 2**20:.1f}"]
        state, activations = row.state / whole.state, row.measured.activations / whole.measured.activations
        goals = row.name != END_TO_END
        cells.append(f"{state:.3f}" + (f" ({STATE_GOAL})" if goals and not row.auxiliary else ""))
        cells.append(f"{activations:.3f}" + (f" ({row.goal})" if goals else ""))
        print(f"| {row.name} | {'yes' if row.checkpointing else 'no'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
