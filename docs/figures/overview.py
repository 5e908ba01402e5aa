"""Draws overview.png: the layers in blocks, the noise levels that each owns, and what training one holds.

    python docs/figures/overview.py

The curve and the edges are the library's own; the bars are counted (`plan_memory`) for the README's DiT.
"""

from pathlib import Path

import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from hf_diffusionblocks import BlockedDiTConfig, plan_memory
from hf_diffusionblocks.figures.style import axes_figure, block_color, plot_style, text_color
from hf_diffusionblocks.noise import LogNormalNoise

L, B = 12, 3
BASE = {"num_layers": L, "num_attention_heads": 6, "attention_head_dim": 64, "in_channels": 4, "sample_size": 16}


def layers(axes, partition) -> None:
    axes.set(xlim=(-0.4, 2.1), ylim=(L + 1.2, -1.6), title="12 layers in 3 blocks")
    axes.axis("off")
    axes.grid(False)
    for block in range(B):
        for layer in partition.layers(block):
            y = layer + 0.35 * block
            box = FancyBboxPatch((0, y), 1, 0.7, boxstyle="round,pad=0.02", color=block_color(block))
            axes.add_patch(box)
        top = partition.layers(block)[0] + 0.35 * block
        axes.text(1.15, top + 1.8, f"block {block}", color="black", va="center", fontweight="bold")
        axes.text(1.15, top + 2.6, ("much noise", "some", "little noise")[block], color="#444444", va="center")
    axes.text(0.5, -0.75, "noise", ha="center")
    axes.text(0.5, L + 1.35, "sample", ha="center", va="top")
    axes.add_patch(
        FancyArrowPatch((-0.25, -0.5), (-0.25, L + 0.8), arrowstyle="-|>", mutation_scale=14, color="#444444")
    )


def noise_levels(axes, partition) -> None:
    noise = LogNormalNoise()
    x = np.linspace(np.log(0.01), np.log(20), 400)
    density = np.exp(-((x - noise.p_mean) ** 2) / (2 * noise.p_std**2))
    for block in range(B):
        low, high = partition.range(block)
        inside = (x >= np.log(max(low, 0.01))) & (x <= np.log(min(high, 20)))
        axes.fill_between(x[inside], density[inside], color=block_color(block), linewidth=0)
        middle = float(np.average(x[inside], weights=density[inside]))
        color = text_color(block_color(block))
        axes.text(middle, 0.25, f"{block}", ha="center", va="center", color=color, fontweight="bold")
    axes.plot(x, density, color="#333333", linewidth=1)
    ticks = [0.01, 0.18, 0.505, 10]
    axes.set_xticks(np.log(ticks), [f"{t:g}" for t in ticks])
    axes.set(yticks=[], ylim=(0, 1.15), xlabel="noise level sigma", title="each owns a third of the noise levels")
    axes.invert_xaxis()
    axes.grid(False)
    axes.spines["left"].set_visible(False)


def memory(axes) -> None:
    kinds = ("weights", "gradients", "moments", "ema", "activations")
    shades = ("#222222", "#555555", "#888888", "#AAAAAA", "#D0D0D0")
    config = BlockedDiTConfig(base_config=BASE, num_blocks=B)
    counted = plan_memory(config, batch_size=8, alternatives=False).to_dict()["rows"]
    rows = {
        "end to end": next(row for row in counted if row["method"] == "end to end"),
        "one of 3 blocks": next(row for row in counted if row["method"] == "blocked"),
    }
    for i, row in enumerate(rows.values()):
        left = 0.0
        for kind, shade in zip(kinds, shades, strict=True):
            size = row[kind] / 2**20
            axes.barh(i, size, left=left, color=shade, height=0.55, label=kind if i == 0 else None)
            left += size
        axes.text(left + 15, i, f"{left:.0f} MiB", va="center")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlim=(0, 1150), ylim=(1.6, -0.6), xticks=[], title="what a training step holds")
    axes.grid(False)
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.02), ncols=3)


def main() -> None:
    partition = BlockedDiTConfig(base_config=BASE, num_blocks=B).make_partition()
    with plot_style():
        figure, axes = axes_figure(11.0, 3.6, ncols=3, width_ratios=(1, 1.5, 1.7))
        layers(axes[0], partition)
        noise_levels(axes[1], partition)
        memory(axes[2])
        figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
