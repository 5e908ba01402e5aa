"""Time of a block's step, of the trainer around it, and of a sampling step, as ratios within one run.

    python benchmarks/speed.py [--width 128 --layers 12 --size 16 --batch 32 --rounds 15]

Every quantity is timed in turn, round by round, and the median of the per-round ratios is printed, so that a drift of
the machine's speed cancels. Stem and head (patch embedding, output head, objective) are named apart: the time of a
network of n layers is fitted as ``fixed + n * per_layer`` from the end-to-end and the one-layer network.
"""

import argparse
import datetime
import platform
from collections.abc import Callable
from typing import Any

import torch
from _timing import bare_loop, median, silent_arguments, timed_rounds

from hf_diffusionblocks import BlockedDiTModel, DiffusionBlocksTrainer
from hf_diffusionblocks.objectives import DenoisingScoreMatching
from hf_diffusionblocks.training.block_trainer import BlockTrainer


class Images:
    """Random images, read by a list of indices."""

    def __init__(self, count: int, channels: int, size: int):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(count, channels, size, size, generator=generator) * 2 - 1
        self.labels = torch.arange(count) % 10

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices):
        return {"pixel_values": self.images[indices], "class_labels": self.labels[indices]}


def build(args, num_layers: int, num_blocks: int) -> BlockedDiTModel:
    """A DiT of the benchmark's shape."""
    base = {
        "num_layers": num_layers,
        "num_attention_heads": args.width // 32,
        "attention_head_dim": 32,
        "sample_size": args.size,
        "in_channels": 3,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
        "attention_bias": True,
    }
    torch.manual_seed(0)
    return BlockedDiTModel.from_base(base, num_blocks=num_blocks)


def make_trainer(args, model: BlockedDiTModel, data: Images) -> DiffusionBlocksTrainer:
    """A trainer that will never be asked to write anything."""
    return DiffusionBlocksTrainer(model, silent_arguments(args.batch, max_steps=10**6), data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    data = Images(1024, 3, args.size)
    timed: dict[str, Callable[[], Any]] = {}
    models = {b: build(args, args.layers, b) for b in (1, 2, 3, 6)}
    for b, model in models.items():
        trainer: BlockTrainer = make_trainer(args, model, data).trainers[0]
        timed[f"train B={b}"] = trainer.step
    device = next(models[1].parameters()).device
    one_layer = make_trainer(args, build(args, 1, 1), data).trainers[0]
    timed["train one layer"] = one_layer.step
    looped = build(args, args.layers, 3).to(device).train()
    objective, generator = DenoisingScoreMatching(), torch.Generator().manual_seed(0)
    own = [p for _, p in looped.block_parameters(0)]
    timed["bare loop B=3"] = bare_loop(own, data, args.batch, lambda b: objective(looped, 0, b, generator).loss)
    again = make_trainer(args, build(args, args.layers, 3), data)
    timed["trainer B=3"] = lambda: again._iterate(_Bar())
    z = torch.randn(args.batch, 3, args.size, args.size, device=device)
    labels = (torch.arange(args.batch) % 10).to(device)
    single = build(args, 1, 1).to(device)

    def sampler(model):
        @torch.no_grad()
        def step():
            model.eval()
            sigma, sigma_next = 0.3, 0.25
            denoised = model.denoise(z, sigma, class_labels=labels)
            z + (sigma_next - sigma) * (z - denoised) / sigma
            model.train()

        return step

    for b, model in models.items():
        timed[f"sample B={b}"] = sampler(model)
    timed["sample one layer"] = sampler(single)
    rounds = timed_rounds(timed, args.rounds, warm_up=2)
    threads = torch.get_num_threads()
    print(
        f"DiT, {args.layers} layers, width {args.width}, {(args.size // 2) ** 2} tokens, batch {args.batch}; "
        f"{device.type}, {threads} threads, {platform.machine()}, {datetime.date.today()}; "
        f"medians of {args.rounds} rounds"
    )
    print()
    print("| what | step of one block over the end-to-end step | without stem and head | 1/B | 1.05/B |")
    print("|---|---|---|---|---|")
    for kind in ("train", "sample"):
        for b in (2, 3, 6):
            ratio = median(rounds, lambda r, k=kind, b=b: r[f"{k} B={b}"] / r[f"{k} B=1"])

            def layers_only(r, k=kind, b=b):
                per_layer = (r[f"{k} B=1"] - r[f"{k} one layer"]) / (args.layers - 1)
                fixed = r[f"{k} one layer"] - per_layer
                return (r[f"{k} B={b}"] - fixed) / (r[f"{k} B=1"] - fixed)

            print(f"| {kind}, B={b} | {ratio:.4f} | {median(rounds, layers_only):.4f} | {1 / b:.4f} | {1.05 / b:.4f} |")
    fixed = median(
        rounds,
        lambda r: (r["train one layer"] - (r["train B=1"] - r["train one layer"]) / (args.layers - 1)) / r["train B=1"],
    )
    print()
    print(f"stem, head and objective: {100 * fixed:.2f} % of the end-to-end training step")
    over = median(rounds, lambda r: r["trainer B=3"] / r["bare loop B=3"])
    print(f"trainer over a bare loop doing the same arithmetic: {over:.4f}")


class _Bar:
    def update(self) -> None:
        pass

    def set_postfix(self, values) -> None:
        pass


if __name__ == "__main__":
    main()
