"""The losses of a short run of a tiny DiT, which a refactoring must leave as they are.

After a change that is meant to alter training, write them anew and look at the difference::

    python tests/golden/regenerate.py && git diff tests/golden
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATH = HERE / "tiny_dit_losses.txt"


def run(output_dir: Path) -> list[tuple[str, float]]:
    """The first 20 of 21 updates over 3 blocks: ``("<iteration> <block>", loss)`` of each."""
    from hf_diffusionblocks import DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments
    from tiny import TinyImages, tiny_dit

    args = DiffusionBlocksTrainingArguments(
        output_dir=str(output_dir),
        max_steps=7,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        warmup_steps=2,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        gradient_accumulation_steps=2,
        seed=1,
        disable_tqdm=True,
        cpu=True,
    )
    DiffusionBlocksTrainer(tiny_dit(3), args, TinyImages()).train()
    rows = [json.loads(line) for line in (output_dir / "updates.jsonl").read_text().splitlines()]
    return [(f"{row['iteration']} {row['block']}", row["loss"]) for row in rows[:20]]


def read(path: Path = PATH) -> list[tuple[str, float]]:
    """The recorded losses."""
    lines = [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]
    return [(f"{iteration} {block}", float(loss)) for iteration, block, loss in lines]


def main() -> None:
    """Write the file."""
    import tempfile

    sys.path.insert(0, str(HERE.parent))
    with tempfile.TemporaryDirectory() as directory:
        losses = run(Path(directory))
    lines = ["# iteration, block, loss; written by tests/golden/regenerate.py"]
    PATH.write_text("\n".join(lines + [f"{key} {loss:.9g}" for key, loss in losses]) + "\n")
    print(f"wrote {PATH}")


if __name__ == "__main__":
    main()
