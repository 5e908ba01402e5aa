"""Recurrent depth: the core as a denoiser, one pass per update, against Huginn's unrolled training (BPTT 8).

    python benchmarks/recurrent.py run austen     # every arm and seed, resumable; results/recurrent.jsonl
    python benchmarks/recurrent.py table austen   # markdown: bits per character, compute, memory
    python benchmarks/recurrent.py paper austen   # counted cost at the paper's setting, 15 epochs against 5

The text is Jane Austen's novels by character (``--text FILE`` for another one); the last 5 % are held out. Prelude,
core and coda have 1, 2 and 1 layers; recurrences are drawn as Huginn's, 33 on average. FLOPs are those of
``training_flops`` times the updates; memory is that of ``plan_memory``: weights, gradients, moments and activations.
"Equal compute" is the unrolled arm's. A denoiser's bits are those of one recurrence, at sigma_max; its bound is that of
``likelihood_bound`` on the first rows. One job runs at a time by default, with one thread.
"""

import argparse
import datetime
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from _studies import RESULTS, add_row, file_name, mean, missing_jobs, read_rows, run_jobs, study_parser
from text_quality import TEXT, load

LENGTH, BATCH, UPDATES, RATE, WIDTH, LAYERS = 96, 8, 300, 4e-3, 48, 4
SEEDS = (0, 1, 2)
BOUND_ROWS = 256
SCORED = {"unrolled": (1, 4, 8, 16, 32, 64), "denoiser": (1, 2, 4, 8)}  # recurrences at inference
_TEXT_NOISE = {"noise": {"p_mean": -0.35, "p_std": 0.7}, "noise_embedding_dim": 48}
UNROLLED = {"readout": "clean"}
EXACT = {"readout": "exact", "overlap": 0.0, **_TEXT_NOISE}
EDM = {"preset": "paper", "noise_embedding_dim": 48}

# Name: config (None for an ordinary decoder of the same layers) and updates; None for as much compute as "unrolled".
ARMS: dict[str, tuple[dict[str, Any] | None, float | None]] = {
    "unrolled, BPTT 8": (UNROLLED, 1),
    "exact, equal updates": (EXACT, 1),
    "edm, equal updates": (EDM, 1),
    "plain decoder, equal updates": (None, 1),
    "exact, 3x updates": (EXACT, 3),
    "edm, 3x updates": (EDM, 3),
    "exact, noise per token, 3x updates": (EXACT | {"noise_per": "token"}, 3),
    "plain decoder, 3x updates": (None, 3),
    "exact, equal compute": (EXACT, None),
    "edm, equal compute": (EDM, None),
    "plain decoder, equal compute": (None, None),
}
OUT = RESULTS / "recurrent.jsonl"


def base_of(vocab_size: int, width: int = WIDTH, layers: int = LAYERS) -> dict[str, Any]:
    """The base's config."""
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 8 * width // 3 // 16 * 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def config_of(settings: dict[str, Any] | None, vocab_size: int) -> Any:
    """The config of an arm."""
    from hf_diffusionblocks import BlockedForCausalLM, BlockedRecurrentForCausalLM

    if settings is None:
        plain = {"readout": "clean", "context": "independent", "auxiliary_layers": 0}
        return BlockedForCausalLM.config_from(base_of(vocab_size), 1, **plain)
    return BlockedRecurrentForCausalLM.config_from(base_of(vocab_size), **settings)


def updates_of(settings: dict[str, Any] | None, factor: float | None, vocab_size: int) -> tuple[int, float]:
    """Updates of an arm, and the FLOPs of one."""
    from hf_diffusionblocks.compute import training_flops

    flops = training_flops(config_of(settings, vocab_size), batch_size=BATCH, tokens=LENGTH).flops
    if factor is None:
        unrolled = training_flops(config_of(UNROLLED, vocab_size), batch_size=BATCH, tokens=LENGTH).flops
        factor = unrolled / flops
    return round(UPDATES * factor), flops


def run_job(name: str, seed: int, text: Path) -> None:
    """Train and score one arm with one seed; append the result."""
    import torch

    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM

    from hf_diffusionblocks import DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments, plan_memory

    settings, factor = ARMS[name]
    train, test, tokenizer = load(text, LENGTH)
    steps, flops = updates_of(settings, factor, len(tokenizer))
    work = RESULTS / "work-recurrent" / file_name(name, seed)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(settings, len(tokenizer)))
    args = DiffusionBlocksTrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        warmup_steps=max(1, steps // 10),
        adam_beta2=0.99,
        weight_decay=0.01,
        ema_inv_gamma=20,
        logging_steps=100,
        seed=seed,
        disable_tqdm=True,
    )
    trainer = DiffusionBlocksTrainer(model, args, train)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=True)
    seconds = time.perf_counter() - start
    with trainer.averaged_weights():
        scores = score(model, test)
    memory = plan_memory(model.config, batch_size=BATCH, use_ema=False, alternatives=False, tokens=LENGTH)
    row = {
        "arm": name,
        "seed": seed,
        "width": WIDTH,
        "layers": LAYERS,
        **scores,
        "parameters": sum(p.numel() for p in model.parameters()),
        "updates": steps,
        "flops": flops * steps,
        "held_bytes": memory.worst("blocked").total,
        "held_bytes_checkpointing": memory.worst("blocked, checkpointing").total,
        "train_seconds": seconds,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, 1 thread, shared with other work",
    }
    add_row(OUT, row)
    print(row, flush=True)


def score(model: Any, test: Any) -> dict[str, Any]:
    """Bits per character of the language model, by recurrences at inference, and a denoiser's bound."""
    import torch

    from hf_diffusionblocks.likelihood import language_model_likelihood, likelihood_bound

    whole = language_model_likelihood(model, test, batch_size=64, max_rows=2000)
    bits = 1 / math.log(2)
    scores: dict[str, Any] = {
        "bits_per_character": whole.nats_per_token * bits,
        "standard_error": whole.standard_error * bits,
        "held_out_characters": whole.num_tokens,
    }
    if model.config.model_type != "blocked_recurrent":
        return scores
    model.eval()
    kind = "denoiser" if model.config.two_stream else "unrolled"
    ids = test[list(range(BOUND_ROWS))]["input_ids"]
    by_count = {}
    with torch.no_grad():
        for count in SCORED[kind]:
            losses = [float(model(part, labels=part, num_recurrences=count).loss) for part in ids.split(64)]
            by_count[str(count)] = statistics.mean(losses) * bits
    scores["bits_by_recurrences"] = by_count
    if kind == "denoiser":
        bound = likelihood_bound(model, test, num_draws=4, max_rows=BOUND_ROWS, batch_size=64)
        scores |= {
            "bound_bits": bound.nats_per_token * bits,
            "bound_error": bound.standard_error * bits,
            "bound_noise": bound.monte_carlo_error * bits,
        }
    return scores


def table() -> str:
    """Markdown: per arm the mean over seeds, compute relative to the unrolled arm, and counted memory."""
    rows = read_rows(OUT)
    reference = next(r["flops"] for r in rows if r["arm"] == "unrolled, BPTT 8")
    lines = [
        "| arm | updates | compute | held, MiB (checkpointing) | bits per character | bound | seconds | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        mine = [r for r in rows if r["arm"] == arm]
        if not mine:
            continue
        bound = mean([r["bound_bits"] for r in mine]) if "bound_bits" in mine[0] else ""
        held = f"{mine[0]['held_bytes'] / 2**20:.1f} ({mine[0]['held_bytes_checkpointing'] / 2**20:.1f})"
        bits, seconds = mean([r["bits_per_character"] for r in mine]), statistics.mean(r["train_seconds"] for r in mine)
        compute = mine[0]["flops"] / reference
        cells = (arm, mine[0]["updates"], f"{compute:.2f}", held, bits, bound, f"{seconds:.0f}", len(mine))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "Bits per character by recurrences at inference, on the first rows:", ""]
    for arm in ARMS:
        mine = [r for r in rows if r["arm"] == arm and "bits_by_recurrences" in r]
        if mine:
            counts = mine[0]["bits_by_recurrences"]
            figures = ", ".join(
                f"{k}: {statistics.mean(r['bits_by_recurrences'][k] for r in mine):.3f}" for k in counts
            )
            lines.append(f"- {arm}: {figures}")
    return "\n".join(lines)


def paper() -> str:
    """Counted cost at the paper's setting: layers 2, 4, 2, width 512, 8 heads, Llama-2's vocabulary, 256 tokens."""
    from hf_diffusionblocks import BlockedRecurrentForCausalLM
    from hf_diffusionblocks.compute import training_flops
    from hf_diffusionblocks.recipes import load_recipe

    recipe = load_recipe("lm1b-huginn")
    head = recipe.model["hidden_size"] * recipe.model["vocab_size"]
    lines = [
        "| readout | core passes | FLOPs of an update | without the head | whole run, 15 epochs to 5 |",
        "|---|---|---|---|---|",
    ]
    for readout in ("edm", "exact"):
        config = BlockedRecurrentForCausalLM.config_from(recipe.model, **recipe.blocks | {"readout": readout})
        cost = training_flops(config, batch_size=1, tokens=recipe.data.block_length)
        product = 2 * head * recipe.data.block_length  # a head's: forward, and backward to features and to weights
        extra = 1 if readout == "exact" else 0  # <z, e_k> / sigma^2, forward only
        layers = (cost.end_to_end - 3 * product) / (cost.flops - (3 + extra) * product)
        whole = 5 * cost.end_to_end / (15 * cost.flops)
        lines.append(
            f"| {readout} | {config.mean_recurrences + 1} to 1 | {1 / cost.ratio:.2f} to 1 | about {layers:.1f} to 1 | "
            f"{whole:.2f} to 1 |"
        )
    passes = 5 * (config.mean_recurrences + 1) / 15
    return "\n".join([*lines, "", f"Core passes of the whole run: {passes:.1f} to 1."])


def main() -> None:
    parser: argparse.ArgumentParser = study_parser(__doc__, ("run", "job", "table", "paper"), ["austen"])
    parser.add_argument("--text", type=Path, default=TEXT, help="a text file (default: %(default)s)")
    parser.set_defaults(workers=1)
    args = parser.parse_args()
    if args.command == "job":
        run_job(args.arm, args.seed, args.text)
    elif args.command == "run":
        todo = missing_jobs(read_rows(OUT), ARMS, args.seeds or SEEDS, args.only)
        run_jobs(__file__, args.study, todo, args.workers, "--text", str(args.text))
    else:
        print(table() if args.command == "table" else paper())


if __name__ == "__main__":
    main()
