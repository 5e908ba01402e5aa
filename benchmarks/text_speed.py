"""Time of a language model's block step, of the trainer around it, and of generation, as ratios within one run.

    python benchmarks/text_speed.py [training] [generation] [--width 192 --layers 12 --batch 8 --rounds 9]

Every quantity is timed in turn, round by round, and the median of the per-round ratios is printed, so that a drift of
the machine's speed cancels. A cascade's forward pass of the lower blocks is timed alone and named apart.
"""

import argparse
import datetime
import platform
from collections.abc import Callable
from typing import Any

import torch
from _timing import bare_loop, median, silent_arguments, timed_rounds
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hf_diffusionblocks import (
    BlockedForCausalLM,
    DiffusionBlocksTrainer,
    NextTokenPrediction,
    denoising_generate,
)

NUM_BLOCKS = 3
# Settings of the blocks that are timed, and the goal for a step over end to end's.
ARMS: dict[str, tuple[dict[str, Any], float]] = {
    "clean, independent": ({"context": "independent"}, 1.05 / NUM_BLOCKS),
    "two streams, independent": ({"context": "independent", "readout": "exact"}, 2.2 / NUM_BLOCKS),
}


class Rows:
    """Random tokens, read by a list of indices."""

    def __init__(self, count: int, tokens: int, vocab_size: int):
        generator = torch.Generator().manual_seed(0)
        self.input_ids = torch.randint(3, vocab_size, (count, tokens), generator=generator)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[rows]}


def base_config(args: argparse.Namespace) -> dict[str, Any]:
    """A Llama whose layers dominate."""
    return {
        "model_type": "llama",
        "hidden_size": args.width,
        "intermediate_size": 8 * args.width // 3 // 32 * 32,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.width // 64,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": 1024,
    }


def make_trainer(
    args: argparse.Namespace, data: Rows, num_blocks: int = NUM_BLOCKS, **settings: Any
) -> DiffusionBlocksTrainer:
    """A trainer that will never be asked to write anything."""
    torch.manual_seed(0)
    model = BlockedForCausalLM.from_base(base_config(args), num_blocks, **({"auxiliary_layers": 0} | settings))
    arguments = silent_arguments(args.batch, max_steps=10**4, order="simultaneous")
    return DiffusionBlocksTrainer(model, arguments, data)


def bare_update(args: argparse.Namespace, trainer: DiffusionBlocksTrainer, data: Rows, block: int) -> Callable:
    """One update of a block in plain PyTorch."""
    model, objective = trainer.model, NextTokenPrediction()
    model.embed_tokens.requires_grad_(False)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        return objective(model, block, {name: value.to(model.device) for name, value in batch.items()}).loss

    return bare_loop((p for _, p in model.block_parameters(block)), data, args.batch, loss)


def median_ratio(functions: dict[str, Callable[[], Any]], rounds: int) -> Callable[[str, str], float]:
    """Times everything in turn; gives the median ratio of two names."""
    table = timed_rounds(functions, rounds)
    return lambda a, b: median(table, lambda row: row[a] / row[b])


def training(args: argparse.Namespace) -> None:
    """Print the ratios of training steps."""
    data = Rows(512, args.tokens, args.vocab_size)
    functions = {"end to end": make_trainer(args, data, 1).trainers[0].step}
    middle = NUM_BLOCKS // 2
    for name, (settings, _) in ARMS.items():
        functions[name] = make_trainer(args, data, **settings).trainers[middle].step
    cascade = make_trainer(args, data, context="cascade")
    functions["cascade"] = cascade.trainers[NUM_BLOCKS - 1].step
    ids = data.input_ids[: args.batch].to(cascade.model.device)
    functions["lower blocks"] = lambda: cascade.model.context_of(NUM_BLOCKS - 1, ids)
    independent = make_trainer(args, data, context="independent")
    functions["trainer"] = independent.trainers[middle].step
    functions["bare loop"] = bare_update(args, make_trainer(args, data, context="independent"), data, middle)
    ratio = median_ratio(functions, args.rounds)
    print(f"| a step of one of {NUM_BLOCKS} blocks | over end to end | goal |\n|---|---|---|")
    for name, (_, goal) in ARMS.items():
        print(f"| {name} | {ratio(name, 'end to end'):.4f} | {goal:.4f} |")
    print(f"| clean, cascade, last block | {ratio('cascade', 'end to end'):.4f} | |")
    print(f"| of it the forward pass of {NUM_BLOCKS - 1} lower blocks | {ratio('lower blocks', 'end to end'):.4f} | |")
    print(f"\ntrainer over a bare loop doing the same arithmetic: {ratio('trainer', 'bare loop'):.4f} (goal 1.03)")


def generation(args: argparse.Namespace) -> None:
    """Print the ratios of decoding: cached, the base's own, and along the noise grid."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**base_config(args))).eval()
    clean = BlockedForCausalLM.from_base(base, NUM_BLOCKS, auxiliary_layers=0).eval()
    exact = BlockedForCausalLM.from_base(base, NUM_BLOCKS, readout="exact", context="cascade").eval()
    ids = torch.randint(3, args.vocab_size, (1, 16))
    given = {"max_new_tokens": args.new_tokens, "do_sample": False, "eos_token_id": None}

    def run(model: Any, **more: Any) -> Callable[[], Any]:
        return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **given, **more)

    walk = {"custom_generate": denoising_generate, "steps": NUM_BLOCKS, "seed": 0}
    ratio = median_ratio(
        {
            "base": run(base),
            "f": run(clean),
            "uncached": run(clean, use_cache=False),
            "walk, clean": run(clean, **walk),
            "walk, exact": run(exact, **walk),
        },
        max(1, args.rounds // 3),
    )
    print(f"\n| generation of {args.new_tokens} tokens | ratio | goal |\n|---|---|---|")
    print(f"| uncached over cached | {ratio('uncached', 'f'):.2f} | at least 5 |")
    print(f"| decoding from f over the base's own cached generate | {ratio('f', 'base'):.4f} | 1.05 |")
    print(f"| one noisy step per block over decoding from f, clean readout | {ratio('walk, clean', 'f'):.4f} | 1.1 |")
    print(f"| the same, two streams, exact readout | {ratio('walk, exact', 'f'):.4f} | 1.1 |")


PARTS = {"training": training, "generation": generation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="part", help="training, generation")
    parser.add_argument("--width", type=int, default=384, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab-size", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    print(
        f"Llama, {args.layers} layers, width {args.width}, {args.batch} x {args.tokens} tokens per step; {device}, "
        f"{platform.machine()}, torch {torch.__version__}, {datetime.date.today()}; medians of {args.rounds} rounds\n"
    )
    for part in args.parts or PARTS:
        PARTS[part](args)


if __name__ == "__main__":
    main()
