"""Scoring a trained model: the figures of each family."""

from .classification import predict, score_classifier
from .images import check_scoring, compares_samples, sample_images, score
from .table import format_figures
from .text import generate_text, prompt_tokens, score_text

__all__ = [
    "check_scoring",
    "compares_samples",
    "format_figures",
    "generate_text",
    "predict",
    "prompt_tokens",
    "sample_images",
    "score",
    "score_classifier",
    "score_text",
]
