"""Tiny masked language models for the tests: one of each kind of base that can be cut."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig

from hf_diffusionblocks.families.masked_lm import BlockedForMaskedLM
from tiny import perturbed

VOCAB_SIZE = 40
MASK = 39
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert"},
    "bert-untied": {"model_type": "bert", "tie_word_embeddings": False},
    "roberta": {"model_type": "roberta"},
    "modernbert": {"model_type": "modernbert", "cls_token_id": 1, "sep_token_id": 2, "local_attention": 32},
    "electra": {"model_type": "electra", "embedding_size": 16},
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
}
ENCODERS = [name for name in ARCHITECTURES if name != "llama"]


def base_config(architecture: str = "llama", num_layers: int = 6, **settings: Any) -> dict[str, Any]:
    """The config of a base of width 16 with 6 layers, 40 tokens and 64 positions, as a mapping."""
    return SHAPE | ARCHITECTURES[architecture] | {"num_hidden_layers": num_layers} | settings


def base_mlm(architecture: str = "bert", num_layers: int = 6, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A transformers model with random weights; norms and biases are random too."""
    config = AutoConfig.for_model(**base_config(architecture, num_layers, **settings))
    kind = AutoModelForCausalLM if architecture == "llama" else AutoModelForMaskedLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.from_config(config)
    return perturbed(model, 0.2, seed).eval()


def blocked_mlm(
    architecture: str = "llama", num_blocks: int = 3, *, num_layers: int = 6, seed: int = 0, **settings: Any
) -> BlockedForMaskedLM:
    """A blocked masked language model cut from :func:`base_mlm`, in which no block starts as another."""
    base = base_mlm(architecture, num_layers, seed)
    settings = {"mask_token_id": MASK} | settings
    return perturbed(BlockedForMaskedLM.from_base(base, num_blocks, **settings), 0.1, seed).eval()


def hidden_rows(shares: tuple[float, ...] = (0.1, 0.5, 0.9), length: int = 20, seed: int = 0) -> Tensor:
    """Rows of tokens of which such shares are hidden, [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, MASK, (len(shares), length), generator=generator)
    order = torch.rand(ids.shape, generator=generator).argsort(-1)
    return ids.masked_fill(order < torch.tensor(shares)[:, None] * length, MASK)
