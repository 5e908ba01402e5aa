"""The figures behind ``plots``, before they are written to a file.

matplotlib is imported where it is used, and ``pyplot``, which keeps figures and picks a backend, is not used at all.
"""

from .charts import curves_figure, losses_figure, memory_figure, partition_figure
from .images import denoising_figure, sample_grid_figure
from .style import block_color, name_block, plot_style
from .text import block_bits_figure, text_samples_figure

__all__ = [
    "block_bits_figure",
    "block_color",
    "curves_figure",
    "denoising_figure",
    "losses_figure",
    "memory_figure",
    "name_block",
    "partition_figure",
    "plot_style",
    "sample_grid_figure",
    "text_samples_figure",
]
