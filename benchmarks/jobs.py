"""Jobs of one block each, side by side: how much more two cores do with two jobs than with one.

    python benchmarks/jobs.py [--jobs 2 --width 256 --layers 12 --updates 40 --rounds 3]

Each job is a process with one thread that holds and trains one block of a DiT on random images. First one runs alone,
then so many at once, which start their clocks together. The figure is the updates per second
of all jobs at once over those of the one alone; the jobs exchange nothing, so only caches and memory are shared.
"""

import argparse
import datetime
import platform
import statistics
import subprocess
import sys
import tempfile
import time

from speed import Images


def job(args: argparse.Namespace) -> None:
    """Train one block; say ``ready`` after a warm-up, wait for a line, and print the seconds of the updates."""
    import torch

    torch.set_num_threads(1)
    from hf_diffusionblocks import BlockedDiTModel, DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments

    base = {
        "num_layers": args.layers,
        "num_attention_heads": args.width // 32,
        "attention_head_dim": 32,
        "in_channels": 4,
        "sample_size": 16,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
    }
    model = BlockedDiTModel(BlockedDiTModel.config_from(base, num_blocks=3), blocks=[args.block])
    with tempfile.TemporaryDirectory() as folder:
        settings = {"output_dir": folder, "max_steps": 10**6, "per_device_train_batch_size": 8, "disable_tqdm": True}
        trainer = DiffusionBlocksTrainer(
            model, DiffusionBlocksTrainingArguments(**settings, cpu=True), Images(256, 4, 16)
        )
        step = trainer.trainers[args.block].step
        for _ in range(5):
            step()
        print("ready", flush=True)
        sys.stdin.readline()
        start = time.perf_counter()
        for _ in range(args.updates):
            step()
        print(time.perf_counter() - start, flush=True)


def seconds(args: argparse.Namespace, count: int) -> list[float]:
    """Seconds of the updates of so many jobs at once."""
    command = [sys.executable, __file__, "--width", str(args.width), "--layers", str(args.layers)]
    command += ["--updates", str(args.updates), "--block"]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    jobs = [subprocess.Popen([*command, str(block)], **streams) for block in range(count)]
    for one in jobs:
        if one.stdout.readline().strip() != "ready":
            raise SystemExit("a job ended before it was ready: see above.")
    for one in jobs:
        one.stdin.write("go\n")
        one.stdin.flush()
    return [float(one.communicate()[0]) for one in jobs]


def main() -> None:
    """Parse the options; run as a job, or time jobs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, choices=(2, 3))
    parser.add_argument("--width", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.block is not None:
        job(args)
        return
    ratios = []
    for _ in range(args.rounds):
        alone, together = seconds(args, 1)[0], seconds(args, args.jobs)
        ratios.append(sum(alone / t for t in together))
    print(
        f"DiT, {args.layers} layers, width {args.width}, a job per block of 3, one thread each; {platform.machine()}, "
        f"{datetime.date.today().isoformat()}: {args.jobs} jobs at once do {statistics.median(ratios):.2f} times the "
        f"updates of one (rounds: {', '.join(f'{r:.2f}' for r in ratios)})"
    )


if __name__ == "__main__":
    main()
