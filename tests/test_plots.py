"""Pictures: what they show, what they refuse, and that drawing leaves no trace."""

import json
import math
import os
import runpy
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from hf_diffusionblocks import (
    BlockedDiTConfig,
    BlockedDiTModel,
    BlockedDiTPipeline,
    BlockPartition,
    DiffusionBlocksTrainer,
    DiffusionBlocksTrainingArguments,
    plots,
)
from hf_diffusionblocks.figures import charts, images
from hf_diffusionblocks.memory import END_TO_END, KINDS, MemoryPlan, MemoryRow


def texts(figure: Figure) -> list[str]:
    found = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        found += [text.get_text() for text in (*axes.texts, *axes.get_yticklabels(), axes.title)]
    return [text.replace("\N{NO-BREAK SPACE}", " ").replace("\n", " ") for text in found if text]


def read_png(path: Path) -> np.ndarray:
    """uint8 [height, width, 3]"""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def drawn_pixels(figure: Figure, png: np.ndarray, i: int) -> np.ndarray:
    """The i-th picture of a figure as it stands in the file."""
    picture = figure.images[i]
    height, width = picture.get_array().shape[:2]
    top, left = png.shape[0] - int(picture.oy) - height, int(picture.ox)
    return png[top : top + height, left : left + width]


def columns_and_rows(figure: Figure) -> list[tuple[int, int]]:
    lefts = sorted({picture.ox for picture in figure.images})
    bottoms = sorted({picture.oy for picture in figure.images}, reverse=True)
    return [(bottoms.index(picture.oy), lefts.index(picture.ox)) for picture in figure.images]


# -- sample grids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "size", "scale"), [(1, 8, 12), (3, 32, 3), (3, 100, 1)])
def test_a_sample_stands_in_the_file_pixel_by_pixel(tmp_path, channels, size, scale):
    samples = torch.rand(3, channels, size, size)
    path = plots.save_sample_grid(samples, [0, 1, 1], tmp_path / "grid.png", title="samples")
    assert path == tmp_path / "grid.png"
    png, figure = read_png(path), images.sample_grid_figure(samples, [0, 1, 1], title="samples")
    assert len(figure.images) == 3
    for i in range(3):
        wanted = (samples[i].expand(3, -1, -1) * 255).round().byte().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(drawn_pixels(figure, png, i), wanted.repeat(scale, axis=0).repeat(scale, axis=1))


def test_one_row_per_class_in_order_with_its_name():
    names = ["cat", r"a $\dog$ & co", "no", "owl"]
    figure = images.sample_grid_figure(torch.rand(5, 1, 8, 8), torch.tensor([3, 0, 3, 1, 3]), names)
    FigureCanvasAgg(figure).draw()  # a name is not read as mathematics, of which this one would be an error
    assert texts(figure) == ["cat", r"a $\dog$ & co", "owl"]
    assert columns_and_rows(figure) == [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2)]
    heights = [text.get_position()[1] for text in figure.texts]
    assert heights == sorted(heights, reverse=True)


def test_a_class_with_more_samples_than_columns_goes_on_in_the_next_row():
    figure = images.sample_grid_figure(torch.rand(6, 1, 8, 8), [0] * 5 + [1], columns=2)
    assert columns_and_rows(figure) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0)]
    assert texts(figure) == ["class 0", "class 1"]


def test_the_label_after_the_last_name_is_no_class():
    assert texts(images.sample_grid_figure(torch.rand(2, 1, 8, 8), [0, 2], ["cat", "dog"])) == ["cat", "no class"]
    assert texts(images.sample_grid_figure(torch.rand(1, 1, 8, 8), [7], {7: "seven"})) == ["seven"]


@pytest.mark.parametrize(
    ("samples", "labels", "settings", "message"),
    [
        (torch.rand(0, 1, 8, 8), [], {}, "at least one sample"),
        (torch.rand(2, 1, 8), [0, 1], {}, r"\[samples, channels, height, width\]"),
        (torch.rand(2, 4, 8, 8), [0, 1], {}, "decode latents"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), [0, 1], {}, "float"),
        ([[0.0]], [0], {}, "list"),
        (torch.rand(2, 1, 8, 8), [0, 1, 2], {}, "3 labels were given for 2 images"),
        (torch.rand(2, 1, 8, 8) * 2 - 1, [0, 1], {}, r"\[0, 1\]"),
        (torch.full((1, 1, 8, 8), math.nan), [0], {}, "finite"),
        (torch.rand(1, 1, 8, 8), [3], {"class_names": ["cat"]}, "label 3 has no name"),
        (torch.rand(1, 1, 8, 8), [-1], {"class_names": ["cat"]}, "label -1 has no name"),
        (torch.rand(1, 1, 8, 8), [3], {"class_names": {1: "cat"}}, "label 3 has no name"),
        (torch.rand(1, 1, 8, 8), [0], {"columns": 0}, "columns=0"),
        (torch.rand(700, 1, 8, 8), range(700), {}, "draw fewer"),
    ],
)
def test_sample_grids_that_cannot_be_drawn_are_refused(tmp_path, samples, labels, settings, message):
    with pytest.raises(ValueError, match=message):
        plots.save_sample_grid(samples, labels, tmp_path / "grid.png", **settings)
    assert not list(tmp_path.iterdir())


# -- denoising ---------------------------------------------------------------------------------------------------------

PARTITION = BlockPartition.equal_probability(3, 12)


def record(sigmas: list[float], samples: int = 2, channels: int = 1) -> list[dict]:
    return [
        {
            "sigma": sigma,
            "block": PARTITION.block_of(sigma),
            "z": sigma * torch.randn(samples, channels, 8, 8),
            "denoised": torch.rand(samples, channels, 8, 8) * 2 - 1,
        }
        for sigma in sigmas
    ]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=14), st.integers(1, 12))
def test_the_first_and_last_step_of_every_block_are_chosen(lengths, wanted):
    blocks = [b for b, length in enumerate(lengths) for _ in range(length)]
    chosen = images.choose_steps(blocks, wanted)
    ends = {blocks.index(b) for b in blocks} | {len(blocks) - 1 - blocks[::-1].index(b) for b in blocks}
    assert ends <= set(chosen)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == max(len(ends), min(wanted, len(blocks)))


def test_steps_between_are_chosen_evenly():
    assert images.choose_steps([0] * 17, 5) == [0, 4, 8, 12, 16]


def test_denoising_shows_state_and_estimate_of_each_chosen_step(tmp_path):
    sigmas = [80.0, 20.0, 3.0, 0.4, 0.3, 0.2, 0.1, 0.01, 0.002]
    steps = record(sigmas, channels=3)
    path = plots.plot_denoising(steps, PARTITION, tmp_path / "denoising.png", title="digits")
    figure, png = images.denoising_figure(steps, PARTITION, title="digits"), read_png(path)
    assert len(figure.images) == len(sigmas) * 2 * 2  # all steps, two rows, two samples
    assert len(set(columns_and_rows(figure))) == len(figure.images)
    places = columns_and_rows(figure)
    for i, step in enumerate(steps):
        for n in range(2):
            scaled = step["z"][n] * 0.5 / math.sqrt(step["sigma"] ** 2 + 0.25)
            for row, picture in ((2 * n, scaled), (2 * n + 1, step["denoised"][n])):
                shown = drawn_pixels(figure, png, places.index((row, i)))[::12, ::12]
                wanted = (picture / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy() * 255
                np.testing.assert_allclose(shown, wanted, atol=0.51)


def test_bands_name_the_blocks_and_noise_levels(tmp_path):
    figure = images.denoising_figure(record([80.0, 2.0, 0.4, 0.3, 0.1, 0.00212]), PARTITION)
    shown = texts(figure)
    for wanted in ("block 0, layers 0–3", "block 1, layers 4–7", "block 2, layers 8–11", "80", "0.3", "0.00212"):
        assert shown.count(wanted) == 1
    assert shown.count("noisy state z") == shown.count("denoised") == 2
    assert any("σ_data / √(σ² + σ_data²)" in text for text in shown)
    bands = [patch.get_facecolor() for patch in figure.patches + figure.artists]
    assert [to_hex(color).upper() for color in bands if to_hex(color) != "#ffffff"] == [
        plots.block_color(b) for b in range(3)
    ]


def test_a_narrow_band_carries_the_block_only():
    wide = BlockPartition.equal_probability(3, 300)
    figure = images.denoising_figure(record([80.0, 0.3, 0.1]), wide)
    assert {"block 0", "block 1", "block 2"} <= set(texts(figure))


def test_denoising_that_cannot_be_drawn_is_refused(tmp_path):
    path, steps = tmp_path / "denoising.png", record([80.0, 0.1])
    with pytest.raises(ValueError, match="steps is empty"):
        plots.plot_denoising([], PARTITION, path)
    with pytest.raises(ValueError, match=r"steps\[1\]\['z'\] has shape \[1, 1, 8, 8\]"):
        plots.plot_denoising([steps[0], steps[1] | {"z": steps[1]["z"][:1]}], PARTITION, path)
    with pytest.raises(ValueError, match=r"steps\[0\]\['denoised'\].*finite"):
        plots.plot_denoising([steps[0] | {"denoised": steps[0]["denoised"] / 0}], PARTITION, path)
    with pytest.raises(ValueError, match="block 3 does not exist"):
        plots.plot_denoising([steps[0] | {"block": 3}], PARTITION, path)
    assert not path.exists()


# -- partition ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.0, 0.1])
def test_partition_bars_span_each_blocks_range_and_its_overlap(tmp_path, overlap):
    partition = BlockPartition.log_uniform(4, 10, overlap=overlap)
    read_png(plots.plot_partition(partition, tmp_path / "partition.png"))
    top, bottom = charts.partition_figure(partition).axes
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bottom.patches]
    for b in range(4):
        assert bars[2 * b] == pytest.approx(partition.range(b, training=True))
        assert bars[2 * b + 1] == pytest.approx(partition.range(b))
        assert to_hex(bottom.patches[2 * b + 1].get_facecolor()).upper() == plots.block_color(b)
    assert [text.get_text() for text in top.texts] == ["0", "1", "2", "3"]
    assert [label.get_text() for label in bottom.get_yticklabels()][0] == "block 0, layers 0–2"
    mass = float(partition.noise.cdf(partition.range(1)[1]) - partition.noise.cdf(partition.range(1)[0]))
    assert bottom.texts[1].get_text() == f"σ 0.4–5.66, {100 * mass:.3g} % of the mass"


def test_the_density_of_the_partition_integrates_to_one():
    line = charts.partition_figure(PARTITION).axes[0].lines[0]
    assert np.trapezoid(line.get_ydata(), np.log(line.get_xdata())) == pytest.approx(1, abs=1e-3)


# -- memory ------------------------------------------------------------------------------------------------------------


def memory_row(method: str, block: int | None, *sizes: int) -> MemoryRow:
    return MemoryRow(*sizes, method=method, block=block, layers=4, parameters=1, ratio=0.0)


def test_memory_bars_stack_the_kinds_and_name_bytes_and_ratio(tmp_path):
    assert tuple(charts.MEMORY_KINDS) == KINDS
    whole = memory_row(END_TO_END, None, 2**20, 2**20, 2**21, 2**20, 3 * 2**20)
    part = memory_row("blocked, checkpointing", 1, 2**18, 2**18, 2**19, 0, 2**20)
    plan = MemoryPlan((whole, part), {})
    read_png(plots.plot_memory(plan, tmp_path / "memory.png"))
    figure = charts.memory_figure(plan)
    bars = figure.axes[0].patches
    for y, row in enumerate((whole, part)):
        mine = bars[5 * y : 5 * y + 5]
        assert [bar.get_width() for bar in mine] == [getattr(row, kind) for kind in KINDS]
        assert [bar.get_x() for bar in mine] == [sum(getattr(row, k) for k in KINDS[:i]) for i in range(5)]
        assert {bar.get_y() + bar.get_height() / 2 for bar in mine} == {y}
    assert {"8 MiB, 1.00×", "2 MiB, 0.25×", "blocked, checkpointing, block 1", "3 MiB"} <= set(texts(figure))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "weights",
        "gradients",
        "moments",
        "EMA",
        "activations",
    ]


def test_memory_without_an_end_to_end_row_names_no_ratio():
    shown = texts(charts.memory_figure([memory_row("blocked", 0, 1024, 0, 0, 0, 0)]))
    assert "1 KiB" in shown and not any("×" in text for text in shown)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1000, "0.977 KiB"), (1023, "0.999 KiB"), (1536, "1.5 KiB"), (3 * 2**40, "3 TiB")]
)
def test_human_bytes(size, text):
    assert charts.human_bytes(size) == text


def test_memory_plans_that_cannot_be_drawn_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        plots.plot_memory(MemoryPlan((), {}), tmp_path / "memory.png")
    with pytest.raises(ValueError, match="not negative"):
        plots.plot_memory([memory_row("blocked", 0, -1, 0, 0, 0, 0)], tmp_path / "memory.png")


# -- losses ------------------------------------------------------------------------------------------------------------


def write_run(run: Path, updates: list[dict], evaluations: list[dict] = ()) -> Path:
    run.mkdir(exist_ok=True)
    for name, rows in (("updates", updates), ("evaluations", evaluations)):
        if rows:
            (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


UPDATES = [
    {"block": i % 3, "update": i // 3 + 1, "loss": 1.0 + i % 3 + (10.0 if i % 41 == 0 else 0.0), "iteration": i + 1}
    for i in range(600)
]


def test_losses_have_a_smooth_line_and_points_per_block(tmp_path):
    run = write_run(tmp_path / "run", UPDATES)
    read_png(plots.plot_losses(run, tmp_path / "losses.png"))
    figure = charts.losses_figure(run)
    (axes,) = figure.axes
    for b in range(3):
        points, line = axes.lines[2 * b : 2 * b + 2]
        assert to_hex(points.get_color()).upper() == to_hex(line.get_color()).upper() == plots.block_color(b)
        assert list(points.get_xdata()) == list(range(1, 201))
        assert list(points.get_ydata()) == [row["loss"] for row in UPDATES if row["block"] == b]
        assert set(line.get_ydata()) == {1.0 + b}  # the median passes over the outliers
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["block 0", "block 1", "block 2"]


def test_held_out_losses_stand_beside_the_training_losses(tmp_path):
    evaluations = [
        {"iteration": i, "eval_loss": 2.0, "eval_loss/block_0": 1.0, "eval_loss/block_10": math.nan} for i in (300, 600)
    ]
    figure = charts.losses_figure(write_run(tmp_path / "run", UPDATES, evaluations))
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    assert list(lines) == ["block 0", "block 10", "all noise levels"]
    assert list(lines["all noise levels"].get_xdata()) == [300, 600]
    assert list(lines["block 0"].get_ydata()) == [1.0, 1.0]


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=60), st.integers(1, 70))
def test_running_median_is_the_median_of_the_window_around_each_point(values, window):
    x, medians = charts.running_median(range(len(values)), values, window)
    assert list(x) == list(range(len(values)))
    for i, median in enumerate(medians):
        start = i - window // 2
        assert median == pytest.approx(np.median(values[max(0, start) : start + window]))


def test_long_curves_are_thinned():
    x, medians = charts.running_median(range(100_000), list(range(100_000)), 101)
    assert len(x) == len(medians) == 400
    assert medians[200] == x[200]


def test_logs_that_cannot_be_drawn_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no updates.jsonl"):
        plots.plot_losses(tmp_path, tmp_path / "losses.png")
    run = write_run(tmp_path / "run", UPDATES[:3])
    log = run / "updates.jsonl"
    log.write_text(log.read_text() + '{"block": 0, "upda')  # a run that is being written
    assert len(charts.losses_figure(run).axes[0].lines) == 6
    log.write_text(log.read_text() + "\n" + json.dumps(UPDATES[4]) + "\n")
    with pytest.raises(ValueError, match="line 4 of .*updates.jsonl is not JSON"):
        plots.plot_losses(run, tmp_path / "losses.png")


# -- curves ------------------------------------------------------------------------------------------------------------


def test_curves_and_references_are_named_and_blocks_keep_their_colour(tmp_path):
    series = {"blocked": [(8, 30.0), (64, 7.0)], "block 0": [(8, 20.0)], r"$\end$": [(8, 33.0), (64, 8.0)]}
    settings = {"xlabel": "steps", "ylabel": "FID", "title": r"$\no$", "logx": True, "reference": {"real images": 3.2}}
    read_png(plots.plot_curves(series, tmp_path / "curves.png", **settings))
    figure = charts.curves_figure(series, **settings)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == [*series, "real images"]
    assert list(zip(*lines["blocked"].get_data(), strict=True)) == series["blocked"]
    colors = [to_hex(line.get_color()).upper() for line in axes.lines]
    assert colors[1] == plots.block_color(0)
    assert len(set(colors)) == 4
    assert set(lines["real images"].get_ydata()) == {3.2}
    assert (axes.get_xlabel(), axes.get_xscale(), axes.get_yscale()) == ("steps", "log", "linear")


@pytest.mark.parametrize("low_high", [(0.31, 0.38), (3.0, 30.0), (1e-3, 1e3)])
def test_a_logarithmic_axis_has_labels_whatever_its_range(low_high):
    figure = charts.curves_figure({"a": [(1, low_high[0]), (2, low_high[1])]}, "x", "y", logy=True)
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert sum(bool(t.get_text()) and low <= t.get_position()[1] <= high for t in axes.get_yticklabels()) >= 3


@pytest.mark.parametrize(
    ("series", "settings", "message"),
    [
        ({}, {}, "series is empty"),
        ({"a": []}, {}, "'a' must hold at least one point"),
        ({"a": [(1, 2, 3)]}, {}, "a pair"),
        ({"a": [(1, math.nan)]}, {}, "finite"),
        ({"a": [(0, 1)]}, {"logx": True}, "positive"),
        ({"a": [(1, -1)]}, {"logy": True}, "positive"),
        ({"a": [(1, 1)]}, {"logy": True, "reference": {"b": 0.0}}, "'b' has the point"),
    ],
)
def test_curves_that_cannot_be_drawn_are_refused(tmp_path, series, settings, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_curves(series, tmp_path / "curves.png", "x", "y", **settings)


# -- files and settings ------------------------------------------------------------------------------------------------


def test_blocks_have_eight_colours_and_then_another_line_style():
    assert len({plots.block_color(b) for b in range(8)}) == 8
    assert plots.block_color(8) == plots.block_color(0)
    assert charts.line_style(8) != charts.line_style(0)


def test_folders_are_made_and_other_formats_refused(tmp_path):
    assert plots.plot_partition(PARTITION, str(tmp_path / "a" / "b.PNG")) == tmp_path / "a" / "b.PNG"
    with pytest.raises(ValueError, match="must end in .png"):
        plots.plot_partition(PARTITION, tmp_path / "partition.pdf")


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(tmp_path, monkeypatch):
    path = plots.plot_curves({"a": [(1, 1)]}, tmp_path / "curves.png", "x", "y")
    before = path.read_bytes()

    def full_disk(self, name):
        Path(name).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(FigureCanvasAgg, "print_png", full_disk)
    with pytest.raises(OSError, match="no space left"):
        plots.plot_curves({"b": [(1, 2)]}, path, "x", "y")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["curves.png"]


def test_the_callers_style_backend_and_figures_stay_and_do_not_show(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    plain = plots.plot_partition(PARTITION, tmp_path / "plain.png").read_bytes()
    monkeypatch.setattr(plt, "show", lambda *_: pytest.fail("plt.show was called"))
    monkeypatch.setattr(plt, "switch_backend", lambda *_: pytest.fail("the backend was switched"))
    with plt.style.context("dark_background"), matplotlib.rc_context({"savefig.bbox": "tight", "figure.dpi": 40}):
        settings, figures = dict(matplotlib.rcParams), plt.get_fignums()
        styled = plots.plot_partition(PARTITION, tmp_path / "styled.png").read_bytes()
        assert dict(matplotlib.rcParams) == settings
        assert plt.get_fignums() == figures
    assert styled == plain


@pytest.mark.parametrize("module", ["plots", "figures.charts", "figures.images", "figures.style"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_importing_does_not_need_matplotlib(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "block_color" in runpy.run_module(f"hf_diffusionblocks.{module}")


# -- the callback ------------------------------------------------------------------------------------------------------


class Noise:
    """Random images with their classes."""

    def __init__(self, size: int = 16):
        generator = torch.Generator().manual_seed(1)
        self.pixel_values = torch.rand(size, 1, 8, 8, generator=generator) * 2 - 1
        self.class_labels = torch.arange(size) % 3

    def __len__(self) -> int:
        return len(self.class_labels)

    def __getitem__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixel_values[rows], "class_labels": self.class_labels[rows]}


def tiny_model(blocks: list[int] | None = None, channels: int = 1) -> BlockedDiTModel:
    base = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}
    base |= {"in_channels": channels, "patch_size": 4, "num_embeds_ada_norm": 3}
    torch.manual_seed(0)
    return BlockedDiTModel(BlockedDiTConfig(base_config=base, num_blocks=2), blocks=blocks)


def train(output_dir: Path, callbacks: list) -> DiffusionBlocksTrainer:
    args = DiffusionBlocksTrainingArguments(
        output_dir=str(output_dir), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        disable_tqdm=True, cpu=True,
    )  # fmt: skip
    trainer = DiffusionBlocksTrainer(tiny_model(), args, Noise(), callbacks=callbacks)
    trainer.train()
    return trainer


def test_sampling_during_training_changes_nothing_and_shows_the_averaged_weights(tmp_path, capfd):
    callback = plots.SampleGridCallback(2, [2, 0, 0], num_inference_steps=3, guidance_scale=1.5, seed=7)
    torch.manual_seed(5)
    plain = train(tmp_path / "plain", [])
    state_without = torch.get_rng_state()
    torch.manual_seed(5)
    capfd.readouterr()
    drawn = train(tmp_path / "drawn", [callback])
    captured = capfd.readouterr()
    assert "it/s" not in captured.err and "%|" not in captured.err

    logs = [(tmp_path / run / "updates.jsonl").read_text() for run in ("plain", "drawn")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 6
    assert torch.equal(torch.get_rng_state(), state_without)
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, drawn.model.state_dict()[name]), name
    assert drawn.model.training

    pictures = sorted(path.name for path in (tmp_path / "drawn" / "samples").iterdir())
    assert pictures == ["iteration-0000002.png", "iteration-0000004.png", "iteration-0000006.png"]

    def sampled_from(model: BlockedDiTModel) -> bytes:
        pipeline = BlockedDiTPipeline(model)
        pipeline.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": 3, "guidance_scale": 1.5, "output_type": "pt"}
        samples = pipeline([2, 0, 0], generator=torch.Generator().manual_seed(7), **settings).images
        path = plots.save_sample_grid(samples, [2, 0, 0], tmp_path / "again.png", title="iteration 6")
        return path.read_bytes()

    picture = (tmp_path / "drawn" / "samples" / pictures[-1]).read_bytes()
    averaged = BlockedDiTModel.from_pretrained(drawn.save_model(tmp_path / "model"))
    assert sampled_from(averaged) == picture
    assert sampled_from(drawn.model) != picture


def test_the_callback_keeps_the_random_state_when_sampling_draws_from_it(tmp_path, monkeypatch):
    denoise = BlockedDiTModel.denoise
    monkeypatch.setattr(BlockedDiTModel, "denoise", lambda self, z, *a, **k: torch.rand(1) * denoise(self, z, *a, **k))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(tmp_path, [plots.SampleGridCallback(1, [0], num_inference_steps=2)])
    model_made = torch.get_rng_state()
    train(tmp_path / "plain", [])
    assert (tmp_path / "samples" / "iteration-0000006.png").is_file()
    assert torch.equal(model_made, torch.get_rng_state()) and not torch.equal(before, model_made)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0, "class_labels": [0]}, "every=0"),
        ({"every": 2.0, "class_labels": [0]}, "every=2.0"),
        ({"every": 1, "class_labels": []}, "class_labels is empty"),
        ({"every": 1, "class_labels": [0], "num_inference_steps": 0}, "num_inference_steps=0"),
    ],
)
def test_callbacks_with_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        plots.SampleGridCallback(**settings)


@pytest.mark.parametrize(
    ("model", "labels", "message"),
    [
        ({}, [4], "allowed are 0 to 2, and 3 for no class"),
        ({"blocks": [1]}, [0], r"all 2 blocks, and this model holds \[1\]"),
        ({"channels": 4}, [0], "latents of 4 channels"),
    ],
)
def test_models_that_cannot_be_sampled_are_refused_before_training(model, labels, message):
    with pytest.raises(ValueError, match=message):
        plots.SampleGridCallback(1, labels).on_train_begin(None, None, None, model=tiny_model(**model), trainer=None)
