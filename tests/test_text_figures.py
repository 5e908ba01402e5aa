"""Pictures of language models."""

import math

import pytest
from PIL import Image

from hf_diffusionblocks import plots
from hf_diffusionblocks.figures import block_bits_figure, text_samples_figure
from hf_diffusionblocks.partition import BlockPartition


def test_a_bar_per_block_is_as_long_as_its_figure(tmp_path):
    partition = BlockPartition.equal_probability(3, 6)
    path = plots.plot_block_bits([2.0, 1.5, 1.0], partition, tmp_path / "bits.png", whole=1.0)
    with Image.open(path) as picture:
        assert min(picture.size) > 100
    axes = block_bits_figure([2.0, 1.5, 1.0], None, ["a", "b", "c"], "bits").axes[0]
    assert [bar.get_width() for bar in axes.patches] == [2.0, 1.5, 1.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]


def test_samples_are_drawn_whole_as_they_are_with_what_they_began_with():
    text = "The $x$ of\n" + "word " * 40
    drawn = [t.get_text() for t in text_samples_figure([("The ", text)], "title").texts]
    assert drawn[:3] == ["title", "prompt: The ", "The $x$ of"]
    assert " ".join(drawn[3:]).split() == ["word"] * 40
    assert max(map(len, drawn)) <= 96


def test_a_long_sample_is_cut_and_says_so():
    drawn = [t.get_text() for t in text_samples_figure([("a", "line\n" * 100)], None).texts]
    assert "[cut]" in drawn and drawn.count("line") == 40


def test_what_cannot_be_drawn(tmp_path):
    partition = BlockPartition.equal_probability(2, 6)
    with pytest.raises(ValueError, match="one of each per block"):
        plots.plot_block_bits([1.0], partition, tmp_path / "a.png")
    with pytest.raises(ValueError, match="finite"):
        plots.plot_block_bits([1.0, math.nan], partition, tmp_path / "a.png")
    with pytest.raises(ValueError, match="no samples"):
        plots.plot_text_samples([], tmp_path / "a.png")
    with pytest.raises(ValueError, match=".png"):
        plots.plot_text_samples([("a", "ab")], tmp_path / "a.jpg")
