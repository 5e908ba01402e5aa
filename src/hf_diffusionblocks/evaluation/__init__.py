"""Scoring a trained model: the figures of each family."""

from .images import compare_images, sample_images, score
from .table import format_figures
from .text import generate_text, score_text

__all__ = ["compare_images", "format_figures", "generate_text", "sample_images", "score", "score_text"]
