"""Quality of blocked training against end-to-end training, at matched updates and matched compute, over seeds.

    python benchmarks/quality.py run digits           # every arm and seed, resumable; results under benchmarks/results/
    python benchmarks/quality.py table digits         # markdown table: mean over seeds, paired differences

Every job runs with one thread; ``--workers`` of them run side by side. An arm is a recipe with overrides; its
end-to-end and shallow baselines go through the same trainer. Every arm of a study is scored on the same noisy held-out
images (figure that ranks), and by a Fréchet distance and a class agreement at guidance 1 whose feature network is a
small classifier trained on the training split, of the accuracy that the table states.
"""

import datetime
import platform
import statistics
import time
from pathlib import Path

from _studies import RESULTS, add_row, file_name, mean, missing_jobs, read_rows, run_jobs, study_parser

SEEDS = (0, 1, 2)


def _arms(num_blocks_list, ablation=()):
    arms = {"end to end, L": ["method=end_to_end"]}
    for b in num_blocks_list:
        arms[f"blocked, B={b}"] = [f"blocks.num_blocks={b}"]
        arms[f"end to end, L/{b}, equal updates"] = ["method=shallow", "match=updates", f"blocks.num_blocks={b}"]
        arms[f"end to end, L/{b}, {b}x updates"] = ["method=shallow", "match=compute", f"blocks.num_blocks={b}"]
    for name, overrides in ablation:
        arms[name] = overrides
    return arms


_UNIFORM = (
    ("blocked, B=3, uniform in log sigma", ["blocks.num_blocks=3", "blocks.partition=log_uniform"]),
    ("blocked, B=3, uniform in sigma", ["blocks.num_blocks=3", "blocks.partition=uniform"]),
)


def _layer_ablation():
    arms = {}
    for layers in ((4, 4, 4), (3, 6, 3), (6, 4, 2), (2, 4, 6)):
        text = "-".join(map(str, layers))
        for partition in ("equal_probability", "uniform"):
            arms[f"{partition}, layers {text}"] = [
                "model.num_layers=12",
                f"blocks.layers_per_block={list(layers)}",
                f"blocks.partition={partition}",
            ]
    return arms


def _capacity(updates):
    arms = {}
    for k in updates:
        step = [f"training.max_steps={k}"]
        arms[f"end to end, L, {k} updates"] = ["method=end_to_end", *step]
        arms[f"blocked, B=3, {k} updates per block"] = step
        arms[f"end to end, L/3, {3 * k} updates"] = ["method=shallow", "match=compute", *step]
    return arms


_SMALLER = ["evaluation.num_samples=1000", "evaluation.held_out_samples=4000", "sampling.num_inference_steps=30"]

# A study: recipe, overrides of every arm, arms, seeds.
STUDIES = {
    "digits": ("digits-dit", ["training.max_steps=1000"], _arms((2, 3)), SEEDS),
    "fashion": (
        "fashion-mnist-dit",
        ["training.max_steps=1000", *_SMALLER],
        _arms((2, 3), _UNIFORM),
        SEEDS,
    ),
    "layers": (
        "fashion-mnist-dit",
        [
            "model.num_attention_heads=2",
            "training.max_steps=600",
            *_SMALLER,
        ],
        _layer_ablation(),
        SEEDS,
    ),
    "capacity": (
        "fashion-mnist-dit",
        [
            "model.num_attention_heads=2",
            *_SMALLER,
        ],
        _capacity((500, 2000, 5000)),
        SEEDS,
    ),
}


def run_job(study: str, arm: str, seed: int, out: Path) -> None:
    """Train and score one arm with one seed; append the result to ``out``."""
    import torch

    torch.set_num_threads(1)
    from hf_diffusionblocks.baselines.end_to_end import resolve_method
    from hf_diffusionblocks.evaluation import score
    from hf_diffusionblocks.jobs import build_trainer, load_data
    from hf_diffusionblocks.partition import BlockPartition
    from hf_diffusionblocks.recipes import load_recipe

    name, common, arms, _ = STUDIES[study]
    work = out.parent / f"work-{study}" / file_name(arm, seed)
    overrides = [
        *common,
        *arms[arm],
        f"training.seed={seed}",
        f"training.output_dir={work}",
        "training.disable_tqdm=true",
    ]
    recipe = resolve_method(load_recipe(name, overrides))
    train, test = load_data(recipe)
    trainer = build_trainer(recipe, train, None)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=True)
    seconds = time.perf_counter() - start
    with trainer.averaged_weights():
        edges = list(BlockPartition.equal_probability(3, 3).edges)  # the same three ranges for every arm
        cache = out.parent / f"work-{study}"
        figures = score(trainer.model, recipe, train, test, cache_dir=cache, seed=seed, edges=edges)
    row = {
        "study": study,
        "arm": arm,
        "seed": seed,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "updates_per_block": trainer.num_updates,
        "train_seconds": seconds,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, 1 thread per job",
        **figures,
    }
    add_row(out, row)


def results_of(study: str) -> Path:
    """Where the finished jobs of a study are."""
    return RESULTS / f"quality-{study}.jsonl"


def run(study: str, workers: int, only: str | None, seeds: list[int] | None) -> None:
    """Run what is not yet there, ``workers`` jobs side by side."""
    _, _, arms, all_seeds = STUDIES[study]
    run_jobs(__file__, study, missing_jobs(read_rows(results_of(study)), arms, seeds or all_seeds, only), workers)


def table(study: str, reference: str = "end to end, L") -> str:
    """Markdown: per arm the mean over seeds ± standard error, and the paired difference of the held-out loss."""
    rows = read_rows(results_of(study))
    arms = [a for a in STUDIES[study][2] if any(r["arm"] == a for r in rows)]
    if not arms:
        return f"no results of study {study!r} yet: python benchmarks/quality.py run {study}"
    frechet = next((k for k in rows[0] if k.startswith("frechet_distance_") or k == "fid"), None)
    base = {r["seed"]: r["held_out_loss"] for r in rows if r["arm"] == reference}
    lines = [
        f"| arm | seeds | held-out loss | minus {reference} (paired) | high / middle / low noise | {frechet} | "
        "class agreement | parameters | updates per block |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        mine = [r for r in rows if r["arm"] == arm]
        pairs = [r["held_out_loss"] - base[r["seed"]] for r in mine if r["seed"] in base]
        ranges = " / ".join(f"{statistics.mean(r['held_out_loss_per_range'][i] for r in mine):.3f}" for i in range(3))
        lines.append(
            f"| {arm} | {len(mine)} | {mean([r['held_out_loss'] for r in mine])} | "
            f"{mean(pairs) if pairs else ''} | {ranges} | {mean([r[frechet] for r in mine])} | "
            f"{mean([r['class_agreement'] for r in mine])} | {mine[0]['parameters']:,} | "
            f"{mine[0]['updates_per_block']} |"
        )
    first = rows[0]
    lines.append("")
    lines.append(
        f"Feature network and classifier: {first['classifier']}, accuracy {first['classifier_accuracy']:.4f}. "
        f"{first['num_samples']} samples, guidance {first['guidance_scale']}. {first['machine']}, {first['date']}. "
        f"`python benchmarks/quality.py run {study}`"
    )
    return "\n".join(lines)


def main() -> None:
    args = study_parser(__doc__, ("run", "job", "table"), STUDIES).parse_args()
    if args.command == "job":
        run_job(args.study, args.arm, args.seed, results_of(args.study))
    elif args.command == "run":
        run(args.study, args.workers, args.only, args.seeds)
    else:
        print(table(args.study))


if __name__ == "__main__":
    main()
