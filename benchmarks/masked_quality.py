"""Quality of blocked masked diffusion language models against end-to-end ones, at equal updates and compute.

    python benchmarks/masked_quality.py run austen      # every arm and seed, resumable; benchmarks/results/masked.jsonl
    python benchmarks/masked_quality.py table austen    # markdown table: mean over seeds, each block's share

The text is Jane Austen's novels by character (``--text FILE`` for another one); the last 5 % are held out. The network
is a Qwen2 that reads both sides, every second layer 4 tokens to each side only: without such layers none of the arms
leaves the frequencies of single characters within these few updates. Scores are likelihood bounds in bits per
character, of all tokens of rows without context. Each job runs with one thread. FLOPs are counted on a real step
(``hf_diffusionblocks.compute``).
"""

import datetime
import math
import platform
import time
from pathlib import Path

from _studies import RESULTS, add_row, file_name, mean, missing_jobs, read_rows, run_jobs, study_parser

TEXT = Path(__file__).parent.parent.parent / "shared" / "data" / "text" / "austen.txt"
OUT = RESULTS / "masked.jsonl"

LAYERS, BLOCKS, LENGTH, BATCH = 6, 3, 64, 16
# Layers, blocks, updates (per block; as a factor on the study's), settings of the training.
ARMS = {
    "end to end, L": (LAYERS, 1, 1, {}),
    "end to end, L/B, equal updates": (LAYERS // BLOCKS, 1, 1, {}),
    "end to end, L/B, equal compute": (LAYERS // BLOCKS, 1, BLOCKS, {}),
    "blocks": (LAYERS, BLOCKS, 1, {"train_shared": "all"}),
}
# Width, updates, learning rate, seeds, held-out rows.
STUDIES = {"austen": (64, 800, 6e-3, (0, 1, 2), 512), "austen long": (64, 6000, 6e-3, (0, 1, 2), 512)}


def load(text: Path):
    """Training rows, held-out rows and the tokenizer, with a mask token."""
    from hf_diffusionblocks.data import load_documents, load_text_dataset, load_tokenizer
    from hf_diffusionblocks.data.tokenizing import with_mask_token

    documents = load_documents(str(text), "train", test_fraction=0.05)["text"]
    tokenizer = with_mask_token(load_tokenizer(None, documents, kind="character"))
    common = {"tokenizer": tokenizer, "block_length": LENGTH, "test_fraction": 0.05, "disable_progress": True}
    return *(load_text_dataset(str(text), split, **common) for split in ("train", "test")), tokenizer


def base_of(width: int, layers: int, vocab_size: int) -> dict:
    """The config of the network that is cut."""
    return {
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": round(8 / 3 * width),
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "initializer_range": 0.06,
        "vocab_size": vocab_size,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": False,
    }


def run_job(study: str, name: str, seed: int, text: Path) -> None:
    """Train and score one arm with one seed; append the result."""
    import torch

    torch.set_num_threads(1)
    from hf_diffusionblocks import BlockedForMaskedLM, DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments
    from hf_diffusionblocks.compute import training_flops
    from hf_diffusionblocks.likelihood import masked_likelihood_bound

    width, updates, rate, _, rows = STUDIES[study]
    layers, blocks, factor, training = ARMS[name]
    steps = updates * factor
    train, test, tokenizer = load(text)
    base = base_of(width, layers, len(tokenizer))
    torch.manual_seed(seed)
    model = BlockedForMaskedLM.from_base(base, blocks, mask_token_id=tokenizer.mask_token_id)
    work = RESULTS / "work-masked" / file_name(f"{study} {name}", seed)
    args = DiffusionBlocksTrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=steps // 10,
        adam_beta2=0.99,
        weight_decay=0.01,
        ema_inv_gamma=20,
        logging_steps=100,
        seed=seed,
        disable_tqdm=True,
        **training,
    )
    start = time.perf_counter()
    trainer = DiffusionBlocksTrainer(model, args, train)
    trainer.train(resume_from_checkpoint=True)
    seconds = time.perf_counter() - start
    with trainer.averaged_weights():
        bound = masked_likelihood_bound(model, test, num_draws=8, max_rows=rows, batch_size=64, seed=1)
    add_row(
        OUT,
        {
            "study": study,
            "arm": name,
            "seed": seed,
            "width": width,
            "bits_per_character": bound.nats_per_token / math.log(2),
            "standard_error": bound.standard_error / math.log(2),
            "monte_carlo_error": bound.monte_carlo_error / math.log(2),
            "block_bits": [nats / math.log(2) for nats in bound.nats_per_block],
            "parameters": sum(p.numel() for p in model.parameters()),
            "held_layers": layers // blocks,
            "flops": training_flops(model.config, batch_size=BATCH, tokens=LENGTH).flops * steps,
            "updates_per_block": steps,
            "held_out_characters": bound.num_tokens,
            "train_seconds": seconds,
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.processor() or platform.machine()}, 1 thread per job",
        },
    )


def table(study: str) -> str:
    """The study as a markdown table: means over seeds with standard errors, compute relative to end to end."""
    rows = [row for row in read_rows(OUT) if row["study"] == study]
    if not rows:
        raise SystemExit(f"no result of {study!r} in {OUT}: run it first.")
    whole = next((row["flops"] for row in rows if row["arm"] == "end to end, L"), float("nan"))
    lines = [
        "| arm | updates per block | held | compute | seeds | bits per character | of each block |",
        "|---" * 7 + "|",
    ]
    for arm in ARMS:
        own = [row for row in rows if row["arm"] == arm]
        if not own:
            continue
        first, bits = own[0], mean([row["bits_per_character"] for row in own])
        shares = [sum(x) / len(own) for x in zip(*(row["block_bits"] for row in own), strict=True)]
        split = ", ".join(f"{x:.3f}" for x in shares) if len(shares) > 1 else ""
        cells = (arm, first["updates_per_block"], first["held_layers"], f"{first['flops'] / whole:.2f}", len(own), bits)
        lines.append(f"| {' | '.join(map(str, cells))} | {split} |")
    return "\n".join(lines)


def main() -> None:
    parser = study_parser(__doc__, ("run", "job", "table"), STUDIES)
    parser.add_argument("--text", type=Path, default=TEXT, help="a text file (default: %(default)s)")
    args = parser.parse_args()
    if args.command == "job":
        run_job(args.study, args.arm, args.seed, args.text)
    elif args.command == "run":
        rows = [row for row in read_rows(OUT) if row["study"] == args.study]
        todo = missing_jobs(rows, ARMS, args.seeds or STUDIES[args.study][3], args.only)
        run_jobs(__file__, args.study, todo, args.workers, "--text", str(args.text))
        print(table(args.study))
    else:
        print(table(args.study))


if __name__ == "__main__":
    main()
