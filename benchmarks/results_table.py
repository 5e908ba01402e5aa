"""The README's table of results over all families, from the kept results of the studies.

    python benchmarks/results_table.py            # print it
    python benchmarks/results_table.py --write    # put it into README.md
    python benchmarks/results_table.py --count    # count anew what arms hold whose studies did not write it down

A row is an arm: its figure (mean over seeds ± standard error), what the job that trains its largest block holds
(weights, gradients, moments, average if it has one, and activations, counted) and what its training computes (counted
FLOPs), both over the arm that trains all layers at once, and seconds of one thread (median over seeds): of the process
where its study notes them, else of the clock. What is not there yet has no row; new ones appear when the table is built
again.
"""

import argparse
import datetime
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _studies import RESULTS, add_row, read_rows

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- results: python benchmarks/results_table.py --write -->", "<!-- end of results -->"
HELD = RESULTS / "held.jsonl"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """The arms of one study that the table shows.

    Attributes:
        title: the model and the data.
        figure: what ranks, and in which direction.
        file: of the results.
        arms: those to show, and what the table calls them; the first trains all layers at once.
        command: that makes the results.
        study: in the file; None if it has one only.
        ours: arms that are this library's defaults, in bold.
        value: the figure of a row.
        digits: of the figure.
        held: bytes of a row, if it has them; otherwise those of ``held.jsonl``.
        flops: of a row; None where they were not counted.
        seconds: of a row's training; None where they say nothing.
    """

    title: str
    figure: str
    file: str
    arms: Mapping[str, str]
    command: str
    study: str | None = None
    ours: tuple[str, ...] = ()
    value: Callable[[Row], float] = lambda row: row["bits_per_character"]
    digits: int = 3
    held: Callable[[Row], float | None] = lambda row: row.get("held_bytes")
    flops: Callable[[Row], float | None] = lambda row: row.get("flops")
    seconds: Callable[[Row], float | None] = lambda row: row.get("cpu_seconds", row.get("train_seconds"))

    def rows(self) -> list[dict]:
        """Of its study."""
        found = read_rows(RESULTS / self.file)
        return [row for row in found if self.study is None or row.get("study") == self.study]


def _smollm2(kind: str) -> Callable[[Row], float | None]:
    """What a step of a way to fine-tune holds, or what it computes per update of every layer."""
    ways = {
        "full": ["full"],
        "LoRA": ["LoRA, r=16"],
        "exact, in turn": [f"exact, B=3, block {b}" for b in range(3)],
        "BAdam": ["BAdam, B=3, block 0"] * 3,
        "GaLore": ["GaLore by layer, r=128"],
    }

    def read(row: Row) -> float | None:
        probes = {probe["probe"]: probe for probe in read_rows(RESULTS / "smollm2-memory.jsonl")}
        names = next((names for start, names in ways.items() if row["arm"].startswith(start)), [])
        values = [probes[name][kind] for name in names if name in probes]
        return None if not values else max(values) if kind == "total" else sum(values)

    return read


def _held_of_a_job(row: Row) -> float:
    return row["memory_of_a_job"]["total"]


_RIVALS = {
    "value": lambda row: 100 * row["accuracy"],
    "digits": 1,
    "file": "classification-rivals.jsonl",
    "held": _held_of_a_job,
}

GROUPS = (
    Group(
        "DiT, Fashion-MNIST, 1000 updates",
        "held-out denoising loss, lower is better",
        "quality-fashion.jsonl",
        {
            "end to end, L": "end to end, L = 6",
            "end to end, L/3, equal updates": "end to end, L/3",
            "end to end, L/3, 3x updates": "end to end, L/3, 3 times the updates",
            "blocked, B=3": "blocks, B = 3",
        },
        "python benchmarks/quality.py run fashion",
        ours=("blocked, B=3",),
        value=lambda row: row["held_out_loss"],
        digits=4,
    ),
    Group(
        "Llama, Austen by character, 1200 updates",
        "bits per character, lower is better",
        "text-austen.jsonl",
        {
            "end to end, L": "end to end, L = 6",
            "end to end, L/3+1": "end to end, L/3 + 1",
            "end to end, L/3+1, equal compute": "end to end, L/3 + 1, 3.1 times the updates",
            "greedy local cross-entropy": "greedy local cross-entropy",
            "paper (edm, independent)": "blocks, B = 3, the paper's setting",
            "sequential, auxiliary, balanced": "blocks, B = 3, default",
        },
        "python benchmarks/text_quality.py run austen",
        ours=("sequential, auxiliary, balanced",),
    ),
    Group(
        "ViT, Fashion-MNIST, 1500 updates",
        "accuracy in %",
        arms={
            "ViT, backpropagation": "end to end, L = 12",
            "ViT, backpropagation, checkpointing": "end to end, L = 12, checkpointing",
            "ViT, backpropagation, L/B": "end to end, L/3",
            "ViT, backpropagation, L/B, equal compute": "end to end, L/3, 4.3 times the updates",
            "ViT, greedy local cross-entropy": "greedy local cross-entropy",
            "ViT, Forward-Forward": "Forward-Forward",
            "ViT, Contrastive Forward-Forward": "Contrastive Forward-Forward",
            "ViT, DiffusionBlocks, the paper's": "blocks, B = 3, the paper's setting",
            "ViT, DiffusionBlocks, the paper's, noise higher": "blocks, B = 3, the paper's with higher noise",
            "ViT, DiffusionBlocks, exact readout": "blocks, B = 3, the paper's in its exact form",
            "ViT, blocks, exact gradient": "blocks, B = 3, exact gradient",
            "ViT, blocks, the library's default": "blocks, B = 3, default",
        },
        command="python benchmarks/classification_rivals.py run fashion-vit",
        study="fashion-vit",
        ours=("ViT, blocks, the library's default",),
        **_RIVALS,
    ),
    Group(
        "NoProp's CNN, 3000 images of CIFAR-10",
        "accuracy in %",
        arms={
            "CNN, backpropagation, T=5": "end to end",
            "CNN, NoProp-DT, T=5": "NoProp-DT",
            "CNN, NoProp-CT": "NoProp-CT",
            "CNN, NoProp-FM": "NoProp-FM",
            "CNN, DiffusionBlocks, B=3": "blocks, B = 3",
        },
        command="python benchmarks/classification_rivals.py run cifar10",
        study="cifar10",
        ours=("CNN, DiffusionBlocks, B=3",),
        **_RIVALS,
    ),
    Group(
        "Masked diffusion, Austen by character, 800 updates",
        "bits per character, a bound",
        "masked.jsonl",
        {
            "end to end, L": "end to end, L = 6",
            "end to end, L/B, equal updates": "end to end, L/3",
            "end to end, L/B, equal compute": "end to end, L/3, 3 times the updates",
            "blocks": "blocks, B = 3",
        },
        "python benchmarks/masked_quality.py run austen",
        study="austen",
        ours=("blocks",),
        seconds=lambda row: None,  # other jobs ran on the same cores, as many as there were
    ),
    Group(
        "Recurrent depth, Austen by character, 300 updates unrolled",
        "bits per character",
        "recurrent.jsonl",
        {
            "unrolled, BPTT 8": "unrolled, gradient through 8",
            "plain decoder, equal compute": "plain decoder of as many layers, 9 times the updates",
            "exact, equal updates": "one pass of a denoiser",
            "exact, equal compute": "one pass of a denoiser, 8.6 times the updates",
        },
        "python benchmarks/recurrent.py run austen",
        ours=("exact, equal compute",),
        seconds=lambda row: None,  # some arms were paused
    ),
    Group(
        "SmolLM2-135M, fine-tuned on 10,240 tokens of Austen",
        "bits per character",
        "smollm2.jsonl",
        {
            "full, lr 1e-04": "all of it",
            "LoRA, r=16, lr 2e-03": "LoRA, r = 16",
            "BAdam, B=3, lr 1e-04": "BAdam",
            "GaLore by layer, r=128, lr 4e-04": "GaLore, r = 128",
            "exact, in turn, 1 per visit, B=3, lr 1e-04": "blocks in turn, exact gradient, B = 3",
        },
        "python benchmarks/smollm2.py run",
        ours=("exact, in turn, 1 per visit, B=3, lr 1e-04",),
        value=lambda row: row["austen"]["bits_per_character"],
        digits=4,
        held=_smollm2("total"),
        flops=_smollm2("flops"),
    ),
)


def table() -> str:
    """Markdown: the rows of all groups, and how each was made."""
    lines = ["| how it is trained | figure | memory | compute | seconds | seeds |", "|---|---|---|---|---|---|"]
    notes = []
    counted = {(row["group"], row["arm"]): row for row in read_rows(HELD)}
    for number, group in enumerate(GROUPS, start=1):
        rows = group.rows()
        by_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in group.arms}
        first = next(iter(group.arms))
        if not by_arm[first]:
            continue
        lines.append(f"| **{group.title}** ({number}): {group.figure} | | | | | |")
        costs = {arm: _costs(group, found, counted) for arm, found in by_arm.items() if found}
        for arm, (held, flops) in costs.items():
            name = f"**{group.arms[arm]}**" if arm in group.ours else group.arms[arm]
            cells = (
                name,
                _mean([group.value(row) for row in by_arm[arm]], group.digits),
                _ratio(held, costs[first][0]),
                _ratio(flops, costs[first][1]),
                _seconds([group.seconds(row) for row in by_arm[arm]]),
                str(len(by_arm[arm])),
            )
            lines.append(f"| {' | '.join(cells)} |")
        dates = sorted({row["date"] for found in by_arm.values() for row in found})
        notes.append(f"({number}) `{group.command}`, {dates[0]}" + (f" to {dates[-1]}" if dates[1:] else ""))
    return "\n".join([*lines, "", *(f"{note}{';' if note is not notes[-1] else '.'}" for note in notes)])


def _costs(group: Group, rows: list[dict], counted: Mapping) -> tuple[float | None, float | None]:
    also = counted.get((group.title, rows[0]["arm"]), {})
    return group.held(rows[0]) or also.get("held_bytes"), group.flops(rows[0]) or also.get("flops")


def _seconds(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.0f}" if known else ""


def _ratio(value: float | None, whole: float | None) -> str:
    return f"{value / whole:.2f}" if value and whole else ""


def _mean(values: list[float], digits: int) -> str:
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def count() -> None:
    """Count what arms hold whose studies did not write it down, and what DiT arms compute, into ``held.jsonl``."""
    import masked_quality
    import quality
    import text_quality

    from hf_diffusionblocks import BlockedForMaskedLM, plan_memory
    from hf_diffusionblocks.baselines.end_to_end import resolve_method
    from hf_diffusionblocks.compute import training_flops
    from hf_diffusionblocks.recipes import load_recipe

    HELD.unlink(missing_ok=True)
    dit, llama, masked = (next(g for g in GROUPS if g.title.startswith(start)) for start in ("DiT", "Llama", "Masked"))
    recipe_name, common, arms, _ = quality.STUDIES["fashion"]
    width = masked_quality.STUDIES["austen"][0]
    for group in (dit, llama, masked):
        for arm in group.arms:
            if group is dit:
                recipe = resolve_method(load_recipe(recipe_name, [*common, *arms[arm]]))
                size = recipe.training_arguments().per_device_train_batch_size
                held = plan_memory(recipe.config(), batch_size=size, alternatives=False, device="cpu")
                held = held.worst("blocked").total
                flops = training_flops(recipe.config(), batch_size=size).total(recipe.training_arguments().max_steps)
            elif group is llama:
                held = text_quality.held_bytes(text_quality.AUSTEN[arm], text_quality.STUDIES["austen"][0])
            else:
                layers, blocks, *_ = masked_quality.ARMS[arm]
                base = masked_quality.base_of(width, layers, 84)
                config = BlockedForMaskedLM.config_from(base, blocks, mask_token_id=83)
                sizes = {"batch_size": masked_quality.BATCH, "tokens": masked_quality.LENGTH}
                held = plan_memory(config, alternatives=False, device="cpu", **sizes).worst("blocked").total
            row = {"group": group.title, "arm": arm, "held_bytes": held, "date": str(datetime.date.today())}
            add_row(HELD, row | ({"flops": flops} if group is dit else {}))


def written(text: str) -> str:
    """The README's text with the table of today between its marks."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    parser.add_argument("--count", action="store_true", help="count anew what arms hold")
    args = parser.parse_args()
    if args.count:
        count()
    if args.write:
        README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
