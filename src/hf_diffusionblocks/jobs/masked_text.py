"""What each command does with masked diffusion language models."""

from pathlib import Path, PurePath
from typing import Any

import torch

from ..evaluation.masked_text import fill_text, gap_tokens, score_masked_text
from ..families.masked_lm import BlockedForMaskedLM
from ..families.masked_lm_config import BlockedMaskedLMConfig
from ..recipes import Recipe
from ..recipes.sections import MaskedSampling
from .common import Say
from .planning import Plan, compute_lines, compute_values, planned_compute, planned_memory
from .run import Pictures
from .text_pieces import load_model
from .text_runs import TextRun, chosen_sampling, convert_text, evaluate_text, planned_text, shared_parts


def plan(recipe: Recipe) -> Plan:
    """What ``diffusionblocks plan`` prints: parameters by block, memory and compute."""
    recipe, config = planned_text(recipe)
    memory, cost = planned_memory(config, recipe), planned_compute(config, recipe)
    with torch.device("meta"):
        model = recipe.kind.model_class(config)
    return Plan(recipe, model, memory, shared_parts(model), compute_lines(cost), {"compute": compute_values(cost)})


class MaskedTextRun(TextRun):
    """A run of a masked language model."""

    loss_unit = "nats per hidden token"
    task = "fill-mask"

    def check_prompt(self, config: BlockedMaskedLMConfig, prompt: str) -> None:
        gap_tokens(config, self.tokenizer, prompt, self.recipe.sampling)

    def score(self, model: BlockedForMaskedLM) -> dict[str, Any]:
        seed = self.recipe.training_arguments().seed
        return score_masked_text(model, self.test_data, self.tokenizer, self.recipe.evaluation, seed=seed)

    def write_text(self, model: BlockedForMaskedLM, prompt: str, seed: int) -> str:
        return fill_text(model, self.tokenizer, prompt, self.recipe.sampling, seed=seed)

    def how(self, config: BlockedMaskedLMConfig) -> str:
        s = self.recipe.sampling
        top_k = "" if s.top_k is None else f", top-k {s.top_k}"
        return f"{s.steps} steps, order {s.order}, temperature {s.temperature:g}{top_k}, top-p {s.top_p:g}"

    def shown(self, prompt: str, text: str) -> str:
        return prompt if text.startswith(prompt) else ""  # where it had gaps, nothing stands in front

    def plot_bits(self, model: BlockedForMaskedLM, figures: dict[str, Any], folder: Path) -> Pictures:
        from .. import plots

        shares, unit = (
            figures["bound_bits_per_character_per_block"],
            "share in the likelihood bound, bits per character",
        )
        return [
            ("bound by block", plots.plot_block_bits(shares, model.partition, folder / "bound.png", None, unit)),
            ("the partition", plots.plot_partition(model.partition, folder / "partition.png")),
        ]

    def usage_lines(self, model: BlockedForMaskedLM, model_dir: PurePath) -> list[str]:
        return [
            "from transformers import AutoTokenizer",
            "from hf_diffusionblocks import BlockedForMaskedLM, unmask",
            f"model = BlockedForMaskedLM.from_pretrained({str(model_dir)!r}).eval()",
            f"tokenizer = AutoTokenizer.from_pretrained({str(model_dir)!r})",
            "print(tokenizer.decode(unmask(model, length=100, steps=50)[0]))",
        ]


def convert(
    base: str, output_dir: str, settings: dict[str, Any], say: Say = print, kind: Any = BlockedForMaskedLM
) -> Path:
    """``diffusionblocks convert``: cut a pretrained masked language model into blocks, saved with its tokenizer."""
    return convert_text(kind, base, output_dir, settings, say=say)


def sample_masked(
    model_dir: str,
    prompts: list[str] | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    block_streaming: str | None = None,
    say: Say = print,
    **settings: Any,
) -> list[str]:
    """``diffusionblocks sample`` of a masked language model: each prompt with its gaps filled.

    Args:
        model_dir: directory or Hub id of a blocked masked language model with its tokenizer.
        prompts: texts, ``<mask:12>`` for a gap of 12 tokens; by default those of the recipe.
        recipe: gives the settings that are not named; by default a recipe's defaults.
        seed: of everything random.
        block_streaming: ``host`` or ``disk``: keep one block on the device, the others there.
        say: prints.
        **settings: fields of ``MaskedSampling`` that are not None.

    Returns:
        The texts.
    """
    chosen = chosen_sampling(recipe.sampling if recipe is not None else MaskedSampling(), prompts, settings)
    model, tokenizer = load_model(model_dir, block_streaming)
    texts = []
    for i, prompt in enumerate(chosen.prompts):
        texts.append(fill_text(model, tokenizer, prompt, chosen, seed=seed + i))
        say(texts[-1])
    return texts


def evaluate(
    model_dir: str, recipe: Recipe, output: str | None = None, seed: int = 0, say: Say = print
) -> dict[str, Any]:
    """``diffusionblocks evaluate``; see ``hf_diffusionblocks.jobs.evaluate``."""
    return evaluate_text(score_masked_text, model_dir, recipe, output, seed, say)
