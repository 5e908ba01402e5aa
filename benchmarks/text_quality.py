"""Quality of blocked language models against end-to-end ones, at equal updates, memory and compute, over seeds.

    python benchmarks/text_quality.py run austen      # every arm and seed, resumable; results under benchmarks/results/
    python benchmarks/text_quality.py table austen    # markdown table: mean over seeds, paired differences
    python benchmarks/text_quality.py bound austen    # likelihood bound of the saved models, share of each block
    python benchmarks/text_quality.py plot crossing   # quality against total compute, a curve per memory budget

The text is Jane Austen's novels by character (``--text FILE`` for another one); the last 5 % are held out. Each job
runs with one thread. "Held" are the layers with gradients and moments in a step. FLOPs are counted on a real step of
every block (``torch.utils.flop_counter``, attention by its mathematical definition) and multiplied by the updates; a
cascade's forward pass through lower blocks, auxiliary layers, heads and both streams are in it. Memory is that of the
job that trains a block, of the block that holds most: weights, gradients, moments, activations (``plan_memory``).
"""

import datetime
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from _studies import FIGURES, RESULTS, add_row, file_name, mean, missing_jobs, read_rows, run_jobs, study_parser

TEXT = Path(__file__).parent.parent.parent / "shared" / "data" / "text" / "austen.txt"

LAYERS, LENGTH, BATCH = 6, 96, 8


def arm(layers: int = LAYERS, blocks: int = 1, updates: float = 1, lr: float = 1, order: str | None = None, **settings):
    """One way to train: layers, blocks, updates per block and learning rate (as factors on the study's), config.

    ``pilot`` is the part of the updates that a pilot run has, from which the equal-information partition is cut.
    """
    pilot = settings.pop("pilot", 0)
    training = {k: settings.pop(k) for k in ("hand_over", "lower_outputs", "train_shared") if k in settings}
    config = settings
    if "preset" not in settings:
        config = {"context": "cascade" if blocks > 1 else "independent", "auxiliary_layers": 0} | settings
    return {
        "layers": layers,
        "blocks": blocks,
        "updates": updates,
        "lr": lr,
        "pilot": pilot,
        "config": config,
        "training": training | ({"order": order} if order else {}),
    }


def _sequential(blocks: int = 3, auxiliary: int = 1, **settings) -> dict:
    return arm(blocks=blocks, order="sequential", auxiliary_layers=auxiliary, **settings)


_TEXT_NOISE = {"noise": {"p_mean": -0.35, "p_std": 0.7}, "noise_embedding_dim": 48}
_BALANCED = [1, 2, 3]  # with one auxiliary layer in all but the last block, each block holds at most 3 layers

# "at equal compute": as many FLOPs as "sequential, auxiliary, balanced" spends.
AUSTEN = {
    "end to end, L": arm(),
    "end to end, L, equal compute": arm(updates=1.58),
    "end to end, L/3": arm(layers=2),
    "end to end, L/3, equal compute": arm(layers=2, updates=4.51),
    "end to end, L/3+1": arm(layers=3),
    "end to end, L/3+1, equal compute": arm(layers=3, updates=3.08),
    "greedy local cross-entropy": arm(blocks=3, order="simultaneous", initialization="default"),
    "paper (edm, independent)": arm(blocks=3, preset="paper", noise_embedding_dim=48),
    "exact, independent": arm(blocks=3, readout="exact", context="independent", overlap=0.1, **_TEXT_NOISE),
    "exact, independent, equal information": arm(
        blocks=3, readout="exact", context="independent", overlap=0.1, pilot=0.1, **_TEXT_NOISE
    ),
    "exact, cascade": arm(blocks=3, readout="exact", order="simultaneous", initialization="default", **_TEXT_NOISE),
    "sequential": _sequential(auxiliary=0),
    "sequential, auxiliary": _sequential(layers_per_block=[2, 2, 2]),
    "sequential, auxiliary, balanced": _sequential(layers_per_block=_BALANCED),
}

# Long enough to see a small network saturate: a curve per memory budget.
CROSSING = {
    **{f"end to end, L, {k:g}x": arm(updates=k) for k in (1, 2, 4, 8)},
    **{f"end to end, L/3+1, {k:g}x": arm(layers=3, updates=k) for k in (2, 4, 8, 16, 32)},
    **{f"blocked, {k:g}x": _sequential(layers_per_block=_BALANCED, updates=k) for k in (1, 2, 4, 8)},
}

# Name: width, updates, peak learning rate, arms, seeds.
STUDIES: dict[str, tuple[int, int, float, dict[str, dict], tuple[int, ...]]] = {
    "austen": (48, 1200, 4e-3, AUSTEN, (0, 1, 2)),
    "crossing": (16, 700, 8e-3, CROSSING, (0, 1)),
}


def load(text: Path, length: int = LENGTH):
    """Training and held-out rows of a text by character, and the tokenizer."""
    from hf_diffusionblocks.data import load_documents, load_text_dataset, train_tokenizer

    if not text.is_file():
        raise SystemExit(f"there is no {text}: give a text file with --text.")
    tokenizer = train_tokenizer(load_documents(str(text), "train")["text"], "character")
    train, test = (
        load_text_dataset(str(text), split, tokenizer=tokenizer, block_length=length, disable_progress=True)
        for split in ("train", "test")
    )
    return train, test, tokenizer


def build(setting: dict, width: int, vocab_size: int, seed: int) -> Any:
    """A new model of an arm."""
    import torch

    from hf_diffusionblocks import BlockedForCausalLM

    base = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 8 * width // 3 // 16 * 16,
        "num_hidden_layers": setting["layers"],
        "num_attention_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(seed)
    return BlockedForCausalLM.from_base(base, num_blocks=setting["blocks"], **setting["config"])


def count(model: Any, batch: dict, objective: Any) -> list[int]:
    """FLOPs of a training step of each block, on real rows.

    ``hf_diffusionblocks.compute.training_flops`` counts the head at every position; here the last one of a row, which
    predicts nothing, is not counted, as in the results kept so far (0.02 to 0.04 % less).
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    flops = []
    for block in range(model.config.num_blocks):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            objective(model, block, batch, torch.Generator().manual_seed(0)).loss.backward()
        flops.append(counter.get_total_flops())
        model.zero_grad(set_to_none=True)
    return flops


def run_job(study: str, name: str, seed: int, out: Path, text: Path) -> None:
    """Train and score one arm with one seed; append the result to ``out``."""
    import torch

    torch.set_num_threads(1)
    from torch.utils.data import Subset

    from hf_diffusionblocks import DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments
    from hf_diffusionblocks.likelihood import equal_information_partition
    from hf_diffusionblocks.objectives import NextTokenPrediction

    width, updates, rate, arms, _ = STUDIES[study]
    setting = arms[name]
    train, test, tokenizer = load(text)
    objective = NextTokenPrediction()
    work = folder_of(study, name, seed)

    def trainer_of(model: Any, steps: int, folder: Path) -> DiffusionBlocksTrainer:
        args = DiffusionBlocksTrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate * setting["lr"],
            lr_scheduler_type="linear",
            warmup_steps=max(1, steps // 10),
            adam_beta2=0.99,
            weight_decay=0.01,
            ema_inv_gamma=20,
            logging_steps=100,
            seed=seed,
            disable_tqdm=True,
            **setting["training"],
        )
        return DiffusionBlocksTrainer(model, args, train, objective=objective)

    steps, start = round(updates * setting["updates"]), time.perf_counter()
    pilot_steps = round(steps * setting["pilot"])
    if pilot_steps:
        pilot = trainer_of(build(setting, width, len(tokenizer), seed), pilot_steps, work / "pilot")
        pilot.train(resume_from_checkpoint=True)
        with pilot.averaged_weights():  # on the last training rows: what is held out is for the score alone
            partition = equal_information_partition(pilot.model, Subset(train, range(len(train) - 64, len(train))))
        cut = {"partition": "equal_information", "edges": list(partition.edges)}
        setting = setting | {"config": setting["config"] | cut}
        print(f"edges {', '.join(f'{e:.4g}' for e in partition.edges)}", flush=True)
    model = build(setting, width, len(tokenizer), seed)
    flops = count(model, train[list(range(BATCH))], objective)
    trainer = trainer_of(model, steps, work)
    trainer.train(resume_from_checkpoint=True)
    seconds = time.perf_counter() - start
    with trainer.averaged_weights():
        held_out = objective.held_out(model, test, batch_size=64)
    trainer.save_model(work / "model")
    tokenizer.save_pretrained(work / "model")
    row = {
        "study": study,
        "arm": name,
        "seed": seed,
        "width": width,
        "bits_per_character": held_out.total / math.log(2),
        "standard_error": held_out.standard_error / math.log(2),
        "block_bits": [x / math.log(2) for x in held_out.per_range],
        "parameters": sum(p.numel() for n, p in model.named_parameters() if ".auxiliary." not in n),
        "held_layers": max(
            len(model.partition.layers(b)) + model.config.auxiliary_layers_of(b) for b in range(setting["blocks"])
        ),
        "flops": sum(flops) * (steps + pilot_steps),
        "updates_per_block": steps,
        "held_out_characters": held_out.num_samples,
        "train_seconds": seconds,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, 1 thread per job",
    }
    add_row(out, row)


def held_bytes(setting: dict, width: int, vocab_size: int = 83) -> int:
    """Weights, gradients, moments and activations of the job of an arm's largest block."""
    from hf_diffusionblocks import plan_memory

    config = build(setting, width, vocab_size, 0).config
    return plan_memory(config, batch_size=BATCH, use_ema=False, tokens=LENGTH).worst("blocked").total


def folder_of(study: str, name: str, seed: int) -> Path:
    """Where a run's checkpoints and model lie."""
    return RESULTS / f"work-text-{study}" / file_name(name, seed)


def results_of(study: str) -> Path:
    """Where the finished jobs of a study are."""
    return RESULTS / f"text-{study}.jsonl"


def run(study: str, workers: int, only: str | None, seeds: list[int] | None, text: Path) -> None:
    """Run what is not yet there, ``workers`` jobs side by side."""
    _, _, _, arms, all_seeds = STUDIES[study]
    todo = missing_jobs(read_rows(results_of(study)), arms, seeds or all_seeds, only)
    run_jobs(__file__, study, todo, workers, "--text", str(text))


def table(study: str, reference: str = "end to end, L") -> str:
    """Markdown: per arm the mean over seeds ± standard error, and the paired difference."""
    rows = read_rows(results_of(study))
    arms = [a for a in STUDIES[study][3] if any(r["arm"] == a for r in rows)]
    if not arms:
        return f"no results of study {study!r} yet: python benchmarks/text_quality.py run {study}"
    if study == "crossing":
        reference = "end to end, L, 1x"
    base = {r["seed"]: r for r in rows if r["arm"] == reference}
    lines = [
        f"| arm | seeds | bits per character | minus {reference} (paired) | local losses of blocks | held layers | "
        f"memory / {reference} | compute / {reference} | updates per block |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in arms:
        mine = [r for r in rows if r["arm"] == name]
        key = "bits_per_character"
        pairs = [r[key] - base[r["seed"]][key] for r in mine if r["seed"] in base]
        blocks = " / ".join(f"{statistics.mean(v):.3f}" for v in zip(*(r["block_bits"] for r in mine), strict=True))
        other = next(iter(base.values())) if base else mine[0]
        width, arms_of = STUDIES[study][0], STUDIES[study][3]
        memory = held_bytes(arms_of[name], width) / held_bytes(arm(), width)
        lines.append(
            f"| {name} | {len(mine)} | {mean([r[key] for r in mine])} | {mean(pairs) if pairs else ''} | {blocks} | "
            f"{mine[0]['held_layers']} | {memory:.2f} | "
            f"{mine[0]['flops'] / other['flops']:.2f} | {mine[0]['updates_per_block']} |"
        )
    first = rows[0]
    lines.append("")
    lines.append(
        f"Width {first['width']}, {LAYERS} layers, {BATCH} x {LENGTH} characters per update, scored on "
        f"{first['held_out_characters']} held-out characters. {first['machine']}, {first['date']}. "
        f"`python benchmarks/text_quality.py run {study}`"
    )
    return "\n".join(lines)


def bound(study: str, text: Path, rows: int = 256, draws: int = 4) -> None:
    """The likelihood bound of a study's blocked models, with each block's share, written and printed."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_diffusionblocks.likelihood import likelihood_bound

    torch.set_num_threads(1)
    _, test, _ = load(text)
    path = RESULTS / f"text-{study}-bound.jsonl"
    known = read_rows(path)
    done = {(row["arm"], row["seed"]) for row in known}
    for row in read_rows(results_of(study)):
        folder = folder_of(study, row["arm"], row["seed"]) / "model"
        if (row["arm"], row["seed"]) in done or len(row["block_bits"]) < 2 or not folder.is_dir():
            continue
        model = AutoModelForCausalLM.from_pretrained(folder)
        # What the blocks' own denoisers give, in one walk down the noise levels.
        result = likelihood_bound(model, test, denoiser="blocks", num_draws=draws, max_rows=rows).to_dict()
        known.append({"arm": row["arm"], "seed": row["seed"], "rows": rows, **result})
        add_row(path, known[-1])
    print(
        "| arm | seeds | bound, bits per character | noise error | share of each block | cross-entropy at sigma_max |"
    )
    print("|---|---|---|---|---|---|")
    for name in STUDIES[study][3]:
        if mine := [row for row in known if row["arm"] == name]:
            shares = zip(*(row["nats_per_block"] for row in mine), strict=True)
            bits = [row["nats_per_token"] / math.log(2) for row in mine]
            error = max(row["monte_carlo_error"] for row in mine) / math.log(2)
            print(
                f"| {name} | {len(mine)} | {mean(bits)} | {error:.4f} | "
                f"{' / '.join(f'{statistics.mean(s) / math.log(2):.3f}' for s in shares)} | "
                f"{mean([row['cross_entropy_at_sigma_max'] / math.log(2) for row in mine])} |"
            )


def plot(study: str) -> Path:
    """Bits per character against total compute: one curve per memory budget, mean over seeds."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    curves: dict[str, dict[str, list[dict]]] = {}
    for row in read_rows(results_of(study)):
        label, _, times = row["arm"].rpartition(", ")
        curves.setdefault(f"{label} ({row['held_layers']} layers held)", {}).setdefault(times, []).append(row)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, points in curves.items():
        xy = sorted((v[0]["flops"], statistics.mean(r["bits_per_character"] for r in v)) for v in points.values())
        axes.plot(*zip(*xy, strict=True), marker="o", label=label)
    axes.set(xscale="log", xlabel="total training FLOPs", ylabel="bits per character, held out")
    axes.set_title(f"Austen by character, width {STUDIES[study][0]}, {LAYERS} layers")
    axes.legend()
    axes.grid(alpha=0.3)
    path = FIGURES / f"text-{study}.png"
    figure.savefig(path, dpi=110)
    return path


def main() -> None:
    parser = study_parser(__doc__, ("run", "job", "table", "bound", "plot"), STUDIES)
    parser.add_argument("--text", type=Path, default=TEXT, help="a text file (default: %(default)s)")
    args = parser.parse_args()
    if args.command == "job":
        run_job(args.study, args.arm, args.seed, results_of(args.study), args.text)
    elif args.command == "run":
        run(args.study, args.workers, args.only, args.seeds, args.text)
    elif args.command == "bound":
        bound(args.study, args.text)
    elif args.command == "plot":
        print(plot(args.study))
    else:
        print(table(args.study))


if __name__ == "__main__":
    main()
