"""Table and chart of smollm2.py's results."""

import re
import statistics
from typing import Any

REFERENCE = "full"
RIVALS = {"lora": "LoRA, r=16", "badam": "BAdam, B=3, block 0", "galore": "GaLore by layer, r=128"}
_RATE = re.compile(r", lr \S+")


def method(name: str) -> str:
    """An arm without its learning rate."""
    return _RATE.sub("", name)


def probes_of(name: str, arm: Any) -> list[str]:
    """The probe of each stage of an arm; what a teacher adds is not in them."""
    name = method(name)
    if name.startswith("full"):
        return ["full"]
    if arm.rival:
        return [
            {"lora": "LoRA, r=16", "badam": "BAdam, B=3, block 0", "galore": "GaLore by layer, r=128"}[
                arm.rival["name"]
            ]
        ]
    last = arm.blocks - 1
    exact = arm.above == "model" or arm.training.get("gradient") == "exact"
    kind = "exact" if exact else "emulator" if arm.above else "local"
    if kind == "local" and arm.config.get("auxiliary_layers"):
        kind = "local, auxiliary"
    blocks = [b for stage in arm.stages for b in stage]
    return [f"{'exact' if b == last else kind}, B={arm.blocks}, block {b}" for b in blocks]


def costs(name: str, arm: Any, probes: dict[str, dict]) -> dict[str, float] | None:
    """Of an arm's largest stage: bytes held; of all stages: FLOPs."""
    found = []
    for probe in probes_of(name, arm):
        # a middle block without a probe of its own costs less forward and more backward than block 0
        found.append(probes.get(probe) or probes.get(re.sub(r"block \d", "block 0", probe)))
    if not found or None in found:
        return None
    worst = max(found, key=lambda p: p["total"])
    updates = arm.updates * (arm.rival or {}).get("blocks", 1)
    return {
        "held": worst["total"],
        "streamed": worst["total"] - worst["weights"] + worst["streamed_weights"],
        "flops": sum(p["flops"] for p in found) * updates,
        **{k: worst[k] for k in ("weights", "gradients", "moments", "activations")},
    }


def best(rows: list[dict]) -> dict[str, str]:
    """Per method the arm with the learning rate that did best on seed 0, and the reference's."""
    found: dict[str, dict] = {}
    for row in rows:
        key = method(row["arm"])
        if row["seed"] == 0 and (
            key not in found or row["austen"]["nats_per_token"] < found[key]["austen"]["nats_per_token"]
        ):
            found[key] = row
    return {key: row["arm"] for key, row in found.items()}


def _paired(mine: list[dict], other: dict[int, dict], text: str) -> tuple[float, float] | None:
    """Mean difference in nats per token to the runs of the same seed, and its standard error over held-out rows."""
    pairs = [(row, other[row["seed"]]) for row in mine if row["seed"] in other]
    if not pairs:
        return None
    # Rows are averaged over seeds first: the error is that of the held-out text.
    each = [
        statistics.mean(a - b for a, b in zip(values[: len(pairs)], values[len(pairs) :], strict=True))
        for values in zip(*(a[text]["rows"] for a, _ in pairs), *(b[text]["rows"] for _, b in pairs), strict=True)
    ]
    return statistics.mean(each), statistics.stdev(each) / len(each) ** 0.5


def table(
    rows: list[dict], arms: dict[str, Any], probes: dict[str, dict], every: bool = False, updates: int | None = None
) -> str:
    """Markdown: the best learning rate of each method, or with ``every`` all arms; of ``updates`` per layer only."""
    rows = [row for row in rows if row["arm"] in arms]
    if updates is not None:
        rows = [row for row in rows if row["arm"] == "base" or row["updates_per_layer"] == updates]
    chosen = best(rows)
    names = list(dict.fromkeys(row["arm"] for row in rows)) if every else list(chosen.values())
    names.sort(key=lambda n: list(arms).index(n))
    full = next((name for key, name in chosen.items() if key.startswith(REFERENCE)), None)
    reference = {row["seed"]: row for row in rows if row["arm"] == full}
    base = {
        row["seed"]: row
        for row in rows
        for row in [next(r for r in rows if r["arm"] == "base") | {"seed": row["seed"]}]
    }
    whole = costs(full, arms[full], probes) if full else None
    lines = [
        "| way | seeds | Austen, bits per character | perplexity per token | nats minus full (paired) | "
        "pydoc, nats minus base | held, MB | held / full | streamed / full | FLOPs / full | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        mine = [row for row in rows if row["arm"] == name]
        difference, forgotten = _paired(mine, reference, "austen"), _paired(mine, base, "pydoc")
        cost = costs(name, arms[name], probes) if name != "base" else None
        figures = ["", "", "", ""]
        if cost and whole:
            figures = [
                f"{cost['held'] / 1e6:.0f}",
                *(f"{cost[k] / whole[w]:.2f}" for k, w in (("held", "held"), ("streamed", "held"), ("flops", "flops"))),
            ]
        lines.append(
            f"| {name} | {len(mine)} | {statistics.mean(r['austen']['bits_per_character'] for r in mine):.4f} | "
            f"{statistics.mean(r['austen']['perplexity'] for r in mine):.2f} | "
            f"{f'{difference[0]:+.4f} ± {difference[1]:.4f}' if difference else ''} | "
            f"{f'{forgotten[0]:+.4f} ± {forgotten[1]:.4f}' if forgotten else ''} | {' | '.join(figures)} | "
            f"{statistics.mean(r['cpu_seconds'] for r in mine):.0f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict], arms: dict[str, Any], probes: dict[str, dict], path: Any) -> None:
    """Held-out bits per character against bytes held, one point per way at its best learning rate."""
    from matplotlib.figure import Figure

    figure = Figure((8.0, 4.8), dpi=128, layout="constrained")
    axes = figure.subplots()
    colors = {"full": "#000000", "exact": "#0072B2", "last": "#56B4E9", "local": "#D55E00", "emulator": "#CC79A7"}
    for key, name in best([row for row in rows if row["arm"] in arms]).items():
        mine = [row["austen"]["bits_per_character"] for row in rows if row["arm"] == name]
        cost = costs(name, arms[name], probes) if name != "base" else None
        if key == "base":
            axes.axhline(statistics.mean(mine), color="#8D8D8D", lw=1, ls="--")
            axes.annotate("the base", (0.02, statistics.mean(mine)), xycoords=("axes fraction", "data"), va="bottom")
        elif cost:
            color = next((c for k, c in colors.items() if key.startswith(k)), "#009E73")
            axes.plot(cost["held"] / 1e6, statistics.mean(mine), "o", color=color)
            axes.annotate(
                key, (cost["held"] / 1e6, statistics.mean(mine)), xytext=(5, 3), textcoords="offset points", fontsize=7
            )
    axes.set_xlabel("weights, gradients, moments and activations held in a step, MB (float32, all weights resident)")
    axes.set_ylabel("held-out Austen, bits per character")
    axes.set_title("SmolLM2-135M fine-tuned: quality against memory")
    axes.grid(color="#DDDDDD")
    figure.savefig(path)
