"""Image classifiers: blocks against end-to-end training, at equal updates and at equal compute, over seeds.

    python benchmarks/classification.py run digits      # every arm and seed, resumable; benchmarks/results/
    python benchmarks/classification.py table digits    # markdown table: mean over seeds, paired differences

Every job runs with one thread; ``--workers`` of them run side by side. An arm is a recipe with overrides; its baselines
go through the same trainer. ``fashion-short`` is a ViT with L=12 and B=3, narrow, with few updates and main arms only;
``digits`` takes minutes in all. Longer runs on Fashion-MNIST stand beside their rivals in ``classification_rivals.py``.
"""

import datetime
import platform
import time
from pathlib import Path

from _studies import RESULTS, add_row, file_name, mean, missing_jobs, read_rows, run_jobs, study_parser

SEEDS = (0, 1, 2)
REFERENCE = "end to end, L"
_EXACT = ["blocks.auxiliary_layers=0", "blocks.initialization=default", "training.gradient=exact"]
MAIN = {
    REFERENCE: ["method=end_to_end"],
    "end to end, L/3, equal updates": ["method=shallow", "match=updates"],
    "end to end, L/3, equal compute": ["method=shallow", "match=compute"],
    "blocked, default": [],
    "blocked, paper": ["blocks.preset=paper"],
}
ARMS = MAIN | {
    "blocked, exact gradient": _EXACT,
    "blocked, independent and clean": ["blocks.context=independent", "blocks.auxiliary_layers=0"],
    "blocked, exact readout": ["blocks.readout=exact", "blocks.context=independent"],
}
_SHORT = [
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "training.max_steps=400",
    "training.warmup_steps=40",
    "training.learning_rate=2e-3",
]

# A study: recipe, overrides of every arm, arms, seeds.
STUDIES = {
    "fashion-short": ("fashion-mnist-vit", _SHORT, MAIN, SEEDS),
    "digits": ("digits-vit", ["training.max_steps=200"], ARMS, SEEDS),
}


def run_job(study: str, arm: str, seed: int, out: Path) -> None:
    """Train and score one arm with one seed; append the result to ``out``."""
    import torch

    torch.set_num_threads(1)
    from hf_diffusionblocks.baselines.end_to_end import resolve_method
    from hf_diffusionblocks.compute import training_flops
    from hf_diffusionblocks.evaluation import score_classifier
    from hf_diffusionblocks.jobs.classification import build_trainer, load_data
    from hf_diffusionblocks.memory import plan_memory
    from hf_diffusionblocks.recipes import load_recipe

    name, common, arms, _ = STUDIES[study]
    work = out.parent / f"work-classification-{study}" / file_name(arm, seed)
    overrides = [*common, *arms[arm], f"training.seed={seed}", f"training.output_dir={work}"]
    recipe = resolve_method(load_recipe(name, [*overrides, "training.disable_tqdm=true", "training.cpu=true"]))
    train, test = load_data(recipe)
    trainer = build_trainer(recipe, train, None)
    start = time.perf_counter(), time.process_time()
    trainer.train(resume_from_checkpoint=True)
    seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    with trainer.averaged_weights():
        figures = score_classifier(trainer.model, test, recipe.sampling, recipe.evaluation, seed=seed)
    config, batch_size = trainer.model.config, trainer.args.per_device_train_batch_size
    plan = plan_memory(config, batch_size=batch_size, alternatives=False, device="cpu")
    exact = {"exact_gradient": True} if trainer.args.gradient == "exact" and config.num_blocks > 1 else {}
    row = {
        "study": study,
        "arm": arm,
        "seed": seed,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "layers_per_block": config.layers_per_block,
        "updates_per_block": trainer.num_updates,
        "flops": training_flops(config, batch_size=batch_size).total(trainer.num_updates),
        "held_bytes": plan.worst("blocked").total,
        "train_seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, 1 thread per job",
        **exact,
        **figures,
    }
    add_row(out, row)


def results_of(study: str) -> Path:
    """Where the finished jobs of a study are."""
    return RESULTS / f"classification-{study}.jsonl"


def table(study: str) -> str:
    """Markdown: per arm the mean over seeds ± standard error, and the paired difference of the accuracy."""
    rows = read_rows(results_of(study))
    arms = [arm for arm in STUDIES[study][2] if any(r["arm"] == arm for r in rows)]
    if not arms:
        return f"no results of study {study!r} yet: python benchmarks/classification.py run {study}"
    base = {r["seed"]: r for r in rows if r["arm"] == REFERENCE}
    lines = [
        f"| arm | seeds | accuracy | minus {REFERENCE} (paired) | negative log-likelihood | calibration error | held, "
        "MiB | compute | updates per block | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        mine = [r for r in rows if r["arm"] == arm]
        pairs = [r["accuracy"] - base[r["seed"]]["accuracy"] for r in mine if r["seed"] in base]
        cost = mine[0]["flops"] / next(iter(base.values()))["flops"] if base else float("nan")
        exact = mine[0].get("exact_gradient", False)
        lines.append(
            f"| {arm} | {len(mine)} | {mean([r['accuracy'] for r in mine])} | {mean(pairs) if pairs else ''} | "
            f"{mean([r['negative_log_likelihood'] for r in mine])} | {mean([r['calibration_error'] for r in mine])} | "
            f"{mine[0]['held_bytes'] / 2**20:.1f} | {'not counted' if exact else f'{cost:.2f}'} | "
            f"{mine[0]['updates_per_block']} | {sum(r['cpu_seconds'] for r in mine) / len(mine):.0f} |"
        )
    first = rows[0]
    lines += [
        "",
        f"{first['num_predictions']} held-out images. {first['machine']}, {first['date']}. "
        f"`python benchmarks/classification.py run {study}`",
    ]
    return "\n".join(lines)


def main() -> None:
    args = study_parser(__doc__, ("run", "job", "table"), STUDIES).parse_args()
    out = results_of(args.study)
    if args.command == "job":
        run_job(args.study, args.arm, args.seed, out)
    elif args.command == "run":
        _, _, arms, seeds = STUDIES[args.study]
        todo = missing_jobs(read_rows(out), arms, args.seeds or seeds, args.only)
        run_jobs(__file__, args.study, todo, args.workers)
    else:
        print(table(args.study))


if __name__ == "__main__":
    main()
