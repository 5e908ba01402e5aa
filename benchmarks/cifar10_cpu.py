"""The CIFAR-10 recipe on a CPU: updates of each block on the real files, time per update, projected time of the recipe.

    python benchmarks/cifar10_cpu.py --data ../shared/data/cifar10 --updates 50 --batch 8

The recipe (DiT-S/2, batch 512, 100 epochs) is the paper's; ``--batch`` replaces its batch size so that an update takes
seconds. The projection assumes that time is proportional to the number of images. Skips with a reason if the parquet
files are not there.
"""

import argparse
import datetime
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from hf_diffusionblocks.jobs import build_trainer, load_data
from hf_diffusionblocks.recipes import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "cifar10")
    parser.add_argument("--updates", type=int, default=50, help="of each block")
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    files = {split: args.data / f"{split}.parquet" for split in ("train", "test")}
    if not all(path.is_file() for path in files.values()):
        print(f"skipped: no CIFAR-10 parquet files in {args.data}; name their directory with --data")
        return
    recipe = load_recipe(
        "cifar10-dit-s2",
        [
            "data.name=parquet",
            f"data.train_files={files['train']}",
            f"data.test_files={files['test']}",
            "data.image_column=image",
            f"training.max_steps={args.updates}",
            f"training.per_device_train_batch_size={args.batch}",
            "training.save_steps=0",
            "training.block_order=round_robin",
            f"training.output_dir={tempfile.mkdtemp()}",
        ],
    )
    paper = load_recipe("cifar10-dit-s2").training_arguments()
    train, _ = load_data(recipe)
    trainer = build_trainer(recipe, train, None)
    times: dict[int, list[float]] = {block: [] for block in trainer.blocks}
    losses: dict[int, list[float]] = {block: [] for block in trainer.blocks}
    for done in range(args.updates):
        for block, one in trainer.trainers.items():
            start = time.perf_counter()
            record = one.step()
            losses[block].append(float(record["loss"]))
            times[block].append(time.perf_counter() - start)
        if (done + 1) % 10 == 0:
            print(f"{done + 1} updates of each block", flush=True)
    print(
        f"\nDiT-S/2, CIFAR-10 ({len(train)} real images), batch {args.batch}, {torch.get_num_threads()} threads, ",
        end="",
    )
    print(f"{platform.machine()}, {datetime.date.today()}")
    print("| block | seconds per update (median) | loss, first 10 updates | loss, last 10 updates |\n|---|---|---|---|")
    for block in trainer.blocks:
        first, last = statistics.mean(losses[block][:10]), statistics.mean(losses[block][-10:])
        print(f"| {block} | {statistics.median(times[block]):.2f} | {first:.3f} | {last:.3f} |")
    per_image = sum(statistics.median(t) for t in times.values()) / args.batch
    images = paper.num_train_epochs * len(train)
    days = per_image * images / 86400
    print(
        f"\nThe whole recipe, {paper.num_train_epochs} epochs of {len(train)} images for each block, would take "
        f"{days:.0f} days on this machine: it is for a GPU."
    )


if __name__ == "__main__":
    main()
