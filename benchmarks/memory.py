"""Memory of a training step by kind: predicted from the config, counted on a real step, over end to end.

    python benchmarks/memory.py
    python benchmarks/memory.py --layers 12 --width 384 --batch-size 8 --mixed-precision bf16
    python benchmarks/memory.py --optim adafactor --gradient-release

Prints a markdown table for end to end (B = 1) and one of B blocks, without and with checkpointing. Each measured row is
one update of a model that holds that block only. Bytes are counted by tensor, so the table is the same each time; it
depends on the machine only through the kernels that torch chooses there.
"""

import argparse
import datetime
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from hf_diffusionblocks import BlockedDiTConfig, BlockedDiTModel
from hf_diffusionblocks.memory import BLOCKED, CHECKPOINTING, MemoryUse, measure_memory, plan_memory
from hf_diffusionblocks.training.arguments import OPTIMIZERS

KINDS = ("weights", "gradients", "moments", "ema", "activations", "total")


def processor() -> str:
    """The GPU's name, or the CPU's as far as it is known."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2] for line in lines if "model name" in line]
    return (names[0].strip() if names else platform.processor()) or platform.machine()


def rows(args: argparse.Namespace) -> Iterator[tuple[int, bool, MemoryUse, MemoryUse]]:
    """(B, checkpointing, predicted, measured) of the block that holds the most."""
    base = {
        "num_layers": args.layers,
        "num_attention_heads": args.width // 64,
        "attention_head_dim": 64,
        "sample_size": args.sample_size,
        "in_channels": 4,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for num_blocks in args.blocks:
        config = BlockedDiTConfig(base_config=base, num_blocks=num_blocks)
        how = {
            "mixed_precision": args.mixed_precision,
            "optim": args.optim,
            "gradient_release": args.gradient_release,
        }
        plan = plan_memory(config, batch_size=args.batch_size, alternatives=False, **how)
        for checkpointing in (False, True):
            predicted = plan.worst(BLOCKED + (CHECKPOINTING if checkpointing else ""))
            model = BlockedDiTModel(config, blocks=[predicted.block]).to(device)
            measured = measure_memory(
                model,
                predicted.block,
                model.dummy_batch(args.batch_size),
                gradient_checkpointing=checkpointing,
                **how,
            )
            yield num_blocks, checkpointing, predicted, measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=384, help="a multiple of 64")
    parser.add_argument("--sample-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--optim", default="adamw_torch_fused", choices=OPTIMIZERS)
    parser.add_argument("--gradient-release", action="store_true")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 3, 6])
    args = parser.parse_args()
    if args.width < 64 or args.width % 64:
        parser.error(f"--width {args.width} must be a multiple of 64")
    if args.blocks[0] != 1:
        args.blocks = [1, *args.blocks]  # what the ratios are over
    print(
        f"DiT, {args.layers} layers, width {args.width}, images 4 x {args.sample_size} x {args.sample_size}, patches "
        f"of 2, batch {args.batch_size}, {args.optim}{', gradient release' * args.gradient_release}, float32 weights, "
        f"autocast {args.mixed_precision}; {processor()}, torch {torch.__version__}, {datetime.date.today()}. MiB, "
        "predicted / measured; ratio: measured over B = 1 without checkpointing.\n"
    )
    print(f"| B | checkpointing | {' | '.join(KINDS)} | ratio |")
    print("|" + " --- |" * (len(KINDS) + 3))
    whole = None
    for num_blocks, checkpointing, predicted, measured in rows(args):
        whole = whole or measured.total
        cells = [f"{getattr(predicted, k) / 2**20:.1f} / {getattr(measured, k) / 2**20:.1f}" for k in KINDS]
        mode = "yes" if checkpointing else "no"
        print(f"| {num_blocks} | {mode} | {' | '.join(cells)} | {measured.total / whole:.3f} |", flush=True)


if __name__ == "__main__":
    main()
