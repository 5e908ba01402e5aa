"""Tiny language models for the tests: one of each kind of decoder that can be cut, and tokens and text for them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig

from hf_diffusionblocks.families.causal_lm import BlockedForCausalLM
from tiny import perturbed

VOCAB_SIZE = 40
WIDTH = 16
WINDOW = 4
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped keys and values in all of them
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    **SPECIAL,
}
# What each adds. Qwen2's first three layers see everything, its last three a window: with three blocks, one is mixed.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied-biases": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral-window": {"model_type": "mistral", "sliding_window": WINDOW, "head_dim": 4},
    "qwen2-mixed-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 3,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
}
# Settings of the recipe pydoc-llama under which a command takes a second.
TEXT_RECIPE = [
    "model.hidden_size=16",
    "model.intermediate_size=24",
    "model.num_hidden_layers=3",
    "model.num_attention_heads=2",
    "model.max_position_embeddings=64",
    "data.block_length=32",
    "data.test_fraction=0.2",
    "training.max_steps=6",
    "training.warmup_steps=1",
    "training.save_steps=9",
    "training.per_device_train_batch_size=4",
    "training.disable_tqdm=true",
    "sampling.prompts=['alpha ', 'beta ']",
    "sampling.max_new_tokens=8",
    "evaluation.rows=8",
]
_WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")


def words_file(folder: Path, count: int = 1200) -> Path:
    """A text of so many Greek letters' names, the same each time."""
    path = folder / "words.txt"
    picks = torch.randint(len(_WORDS), (count,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text(" ".join(_WORDS[i] for i in picks))
    return path


def base_config(architecture: str = "llama", num_layers: int = 6, **settings: Any) -> dict[str, Any]:
    """The config of a decoder of width 16 with 6 layers, 40 tokens and 64 positions, as a mapping."""
    return SHAPE | ARCHITECTURES[architecture] | {"num_hidden_layers": num_layers} | settings


def base_lm(
    architecture: str = "llama", num_layers: int = 6, *, seed: int = 0, attention: str = "sdpa", **settings: Any
) -> PreTrainedModel:
    """A transformers model with random weights; norms and biases are random too."""
    config = AutoConfig.for_model(**base_config(architecture, num_layers, **settings))
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    return perturbed(model, 0.2, seed).eval()


def blocked_lm(
    architecture: str = "llama",
    num_blocks: int = 3,
    *,
    num_layers: int = 6,
    seed: int = 0,
    attention: str = "sdpa",
    perturbation: float = 0.1,
    base: dict[str, Any] | None = None,
    **settings: Any,
) -> BlockedForCausalLM:
    """A blocked language model cut from :func:`base_lm`, in which nothing is zero-initialised any more.

    A clean one has an auxiliary layer, as new models have and those cut from a trained base have not.
    """
    if settings.get("readout", "clean") == "clean" and "preset" not in settings:
        settings = {"auxiliary_layers": 1} | settings
    model = base_lm(architecture, num_layers, seed=seed, attention=attention, **(base or {}))
    return perturbed(BlockedForCausalLM.from_base(model, num_blocks, **settings), perturbation, seed).eval()


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Ordinary tokens, [batch, length]: none of the special ones."""
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


def packed_positions(length: int = 12, *starts: int, batch: int = 2) -> Tensor:
    """Positions that restart at 0 where documents start, [batch, length]."""
    index = torch.arange(length)
    first = torch.tensor([max(s for s in (0, *starts) if s <= i) for i in range(length)])
    return (index - first).expand(batch, length)


def left_padding(length: int = 12, *padded: int) -> dict[str, Tensor]:
    """Attention mask and positions of rows with so many padding tokens before them, each [rows, length]."""
    mask = (torch.arange(length) >= torch.tensor(padded)[:, None]).long()
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


class TokenRows:
    """Rows of tokens in which each follows from the one before, mostly; `rows[list]` gives a batch.

    Args:
        num_rows: how many.
        length: tokens per row.
        seed: of the draws.
        **columns: further tensors of the batches, one row each.
    """

    def __init__(self, num_rows: int = 32, length: int = 12, seed: int = 0, **columns: Tensor):
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randint(3, VOCAB_SIZE, (num_rows,), generator=generator)]
        for _ in range(length - 1):
            drawn = torch.randint(3, VOCAB_SIZE, (num_rows,), generator=generator)
            follows = torch.rand(num_rows, generator=generator) < 0.8
            rows.append(torch.where(follows, 3 + (5 * rows[-1] + 7) % (VOCAB_SIZE - 3), drawn))
        self.columns = {"input_ids": torch.stack(rows, dim=1), **columns}

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, rows: Any) -> dict[str, Tensor]:
        return {name: column[rows] for name, column in self.columns.items()}


def new_lm(architecture: str = "llama", num_blocks: int = 3, *, seed: int = 0, **settings: Any) -> BlockedForCausalLM:
    """A blocked language model as made from a config, untrained: with its identity and zero initialisations."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BlockedForCausalLM.from_base(base_config(architecture), num_blocks, **settings)
