"""Distillation: how fast a converted DiT comes back to its base, with and without the base's denoiser as a target.

    python benchmarks/distill.py --base-updates 1000 --updates 300 --seeds 0 1 2

Trains a base on Fashion-MNIST end to end, saves it as a diffusers ``DiTTransformer2DModel``, converts it to B blocks,
and trains these with distillation weights 0, 0.5 and 1; beside them blocks from scratch. Prints held-out loss against
updates per block, and draws the curve to docs/figures/distill.png. Resumable: finished runs are not repeated.
"""

import argparse
import datetime
import json
import platform
import statistics
from pathlib import Path

import torch

from hf_diffusionblocks import BlockedDiTModel
from hf_diffusionblocks.baselines.end_to_end import resolve_method
from hf_diffusionblocks.jobs import build_trainer, load_data
from hf_diffusionblocks.plots import plot_curves
from hf_diffusionblocks.recipes import load_recipe, make_recipe

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent.parent / "docs" / "figures"


def train(recipe, every: int | None) -> list[tuple[int, float]]:
    """Train and return (updates per block, held-out loss), each with the averaged weights."""
    recipe = resolve_method(recipe)
    data, test = load_data(recipe)
    output = Path(recipe.training["output_dir"])
    done = output / "curve.json"
    if done.is_file():
        return [tuple(point) for point in json.loads(done.read_text())]
    trainer = build_trainer(recipe, data, test)
    start = trainer.evaluate().total if not (output / "evaluations.jsonl").is_file() else None
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    blocks = trainer.model.partition.num_blocks
    rows = [json.loads(line) for line in (output / "evaluations.jsonl").read_text().splitlines()]
    # The last update may be scored twice: as one of every ``every``, and at the end.
    curve = list({row["iteration"] // blocks: row["eval_loss"] for row in rows if row["iteration"]}.items())
    if start is not None:
        curve.insert(0, (0, start))
    done.write_text(json.dumps(curve))
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-updates", type=int, default=1000)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--num-blocks", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=8e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    bases = []
    every = max(1, args.updates // 10) * args.num_blocks
    for seed in args.seeds:
        work = RESULTS / "work-distill" / f"seed-{seed}"
        common = [f"training.seed={seed}", "training.disable_tqdm=true", "training.eval_samples=2000"]
        base = load_recipe(
            "fashion-mnist-dit",
            [*common, "method=end_to_end", f"training.max_steps={args.base_updates}"]
            + [f"training.output_dir={work / 'base'}"],
        )
        bases.append(train(base, None)[-1][1])
        base_dir = work / "base-dit"
        if not base_dir.is_dir():
            BlockedDiTModel.from_pretrained(work / "base" / "model").to_base().save_pretrained(base_dir)
        arms = {"from scratch": [], "converted, data loss only": [], "distillation 0.5": [], "distillation 1": []}
        weights = {"distillation 0.5": 0.5, "distillation 1": 1.0}
        for arm in arms:
            overrides = [
                *common,
                f"blocks.num_blocks={args.num_blocks}",
                f"training.max_steps={args.updates}",
                f"training.eval_steps={every}",
                f"training.output_dir={work / arm.replace(' ', '-').replace(',', '')}",
            ]
            recipe = load_recipe("fashion-mnist-dit", overrides)
            if arm != "from scratch":
                values = recipe.to_dict() | {"model": {"base": str(base_dir)}}
                values["training"] |= {
                    "learning_rate": args.learning_rate,
                    "distillation_weight": weights.get(arm, 0.0),
                }
                recipe = make_recipe(values)
            curves.setdefault(arm, []).append(train(recipe, every))
            print(f"seed {seed}, {arm}: {curves[arm][-1][-1]}", flush=True)
    mean = {
        arm: [(runs[0][i][0], statistics.mean(run[i][1] for run in runs)) for i in range(min(map(len, runs)))]
        for arm, runs in curves.items()
    }
    reference = {"the base (end to end)": statistics.mean(bases)}
    path = plot_curves(
        mean,
        FIGURES / "distill.png",
        "updates per block",
        "held-out denoising loss",
        title=f"DiT on Fashion-MNIST converted to {args.num_blocks} blocks",
        logy=True,
        reference=reference,
    )
    print(f"| updates per block | {' | '.join(mean)} |")
    print(f"|---|{'---|' * len(mean)}")
    for i in range(min(map(len, mean.values()))):
        print(f"| {mean['from scratch'][i][0]} | " + " | ".join(f"{c[i][1]:.4f}" for c in mean.values()) + " |")
    print(f"\nbase: {reference['the base (end to end)']:.4f} after {args.base_updates} updates of all layers. {path}")
    print(f"{len(args.seeds)} seeds; {platform.machine()}, {args.threads} thread(s), {datetime.date.today()}")


if __name__ == "__main__":
    main()
