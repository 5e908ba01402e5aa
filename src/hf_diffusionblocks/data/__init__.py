"""Data sets: images with labels, and text as rows of token ids. Batches are dicts of tensors."""

from .images import ImageDataset, cache_latents, load_image_dataset
from .lazy_images import LazyImageDataset, open_image_dataset
from .text import StreamingTextDataset, TextDataset, load_documents, load_text_dataset
from .tokenizing import load_tokenizer, train_tokenizer

__all__ = [
    "ImageDataset",
    "LazyImageDataset",
    "StreamingTextDataset",
    "TextDataset",
    "cache_latents",
    "load_documents",
    "load_image_dataset",
    "load_text_dataset",
    "load_tokenizer",
    "open_image_dataset",
    "train_tokenizer",
]
