"""What training, converting and evaluating is for every family of language models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from .. import serialization
from ..baselines.end_to_end import resolve_method
from ..configuration import DiffusionBlocksConfig
from ..data.tokenizing import tokenizer_size
from ..memory import MemoryPlan
from ..modeling import BlockedPreTrainedModel
from ..recipes import Recipe
from ..training import DiffusionBlocksTrainer
from .common import Say, check_output, say_figures
from .conversion import convert_base
from .run import Pictures, Run
from .text_pieces import (
    build_trainer,
    load_data,
    load_held_out,
    load_model,
    make_tokenizer,
    planned_vocabulary,
    save_tokenizer,
)


class TextRun(Run):
    """A run of a language model. Its samples continue, or fill, the prompts of the recipe."""

    loss_unit: str  # of the curves of a report
    task: str  # of the Hub

    # -- what a family defines -----------------------------------------------------------------------------------

    def check_prompt(self, config: DiffusionBlocksConfig, prompt: str) -> None:
        """Raise a ``ValueError`` for a prompt that cannot be gone on from."""
        raise TypeError(f"{type(self).__name__} must define check_prompt().")

    def write_text(self, model: BlockedPreTrainedModel, prompt: str, seed: int) -> str:
        """A sample of a trained model."""
        raise TypeError(f"{type(self).__name__} must define write_text().")

    def how(self, config: DiffusionBlocksConfig) -> str:
        """How samples are drawn, in words."""
        raise TypeError(f"{type(self).__name__} must define how().")

    def shown(self, prompt: str, text: str) -> str:
        """What of a sample's beginning is the prompt, for a picture."""
        return prompt

    def plot_bits(self, model: BlockedPreTrainedModel, figures: dict[str, Any], folder: Path) -> Pictures:
        """Pictures of bits per character by block."""
        raise TypeError(f"{type(self).__name__} must define plot_bits().")

    # -- the steps of a run --------------------------------------------------------------------------------------

    def load(self) -> None:
        recipe = self.recipe
        self.tokenizer = make_tokenizer(recipe)
        self.train_data, self.test_data = load_data(recipe, self.tokenizer)
        vocab_size = recipe.model.get("vocab_size") or tokenizer_size(self.tokenizer)
        self.recipe = resolve_method(recipe, vocab_size, len(self.train_data))

    def build_trainer(self) -> DiffusionBlocksTrainer:
        data = (self.train_data, self.test_data, self.tokenizer)
        return build_trainer(self.recipe, *data, blocks=self.blocks, lower=self.lower)

    def check(self, model: BlockedPreTrainedModel) -> None:
        for prompt in self.recipe.sampling.prompts if self.reports else ():
            self.check_prompt(model.config, prompt)

    def data_lines(self, model: BlockedPreTrainedModel) -> list[str]:
        rows = f"{len(self.train_data)} rows of {self.recipe.data.block_length} tokens"
        return [f"text: {rows}, vocabulary {model.config.vocab_size}; held out: {len(self.test_data)} rows"]

    def parts(self, model: BlockedPreTrainedModel) -> list[str]:
        return shared_parts(model)

    def save_beside(self, model: BlockedPreTrainedModel, directory: Path) -> None:
        save_tokenizer(self.tokenizer, directory)

    def plot(
        self, model: BlockedPreTrainedModel, figures: dict[str, Any], memory: MemoryPlan, folder: Path
    ) -> Pictures:
        from .. import plots

        seed = self.recipe.training_arguments().seed
        prompts = enumerate(self.recipe.sampling.prompts)
        self.drawn_by = self.how(model.config)
        self.samples = [(prompt, self.write_text(model, prompt, seed + i)) for i, prompt in prompts]
        lines = "\n\n".join(text for _, text in self.samples) + "\n"
        serialization.atomic_write(folder / "samples.txt", lambda path: path.write_text(lines, encoding="utf-8"))
        drawn = [(self.shown(prompt, text), text) for prompt, text in self.samples]
        title = f"{self.recipe.name}: {self.drawn_by}"
        return [
            ("losses", plots.plot_losses(self.output, folder / "losses.png", self.loss_unit, "whole model")),
            *self.plot_bits(model, figures, folder),
            ("memory", plots.plot_memory(memory, folder / "memory.png")),
            ("samples", plots.plot_text_samples(drawn, folder / "samples.png", title)),
        ]

    def sample_lines(self) -> list[str]:
        return [f"sample ({self.drawn_by}):", "", self.samples[0][1], ""]

    def card_settings(self) -> dict[str, Any]:
        return {"pipeline_tag": self.task, "base_model": self.recipe.model.get("base")}


def shared_parts(model: BlockedPreTrainedModel) -> list[str]:
    """A line that names a model's shared parts."""
    shared = ", ".join(f"{name} {parameter.numel():,}" for name, parameter in model.shared_parameters())
    return [f"shared by all blocks: {shared}"]


def planned_text(recipe: Recipe) -> tuple[Recipe, DiffusionBlocksConfig]:
    """The recipe that really runs and its model's config, for a plan.

    Raises:
        ValueError: for rows that are longer than the model's positions.
    """
    vocab_size = planned_vocabulary(recipe)
    recipe = resolve_method(recipe, vocab_size)
    config = recipe.config(vocab_size)
    if recipe.data.block_length > config.max_position_embeddings:
        raise ValueError(
            f"data.block_length={recipe.data.block_length} tokens are more than the model's "
            f"{config.max_position_embeddings} positions: set a smaller data.block_length."
        )
    return recipe, config


def chosen_sampling(sampling: Any, prompts: list[str] | None, settings: dict[str, Any]) -> Any:
    """A recipe's section ``sampling`` with the prompts and settings that are given."""
    given = {name: value for name, value in settings.items() if value is not None}
    if prompts is not None:
        given["prompts"] = prompts
    return replace(sampling, **given)


def convert_text(
    kind: type[BlockedPreTrainedModel],
    base: str,
    output_dir: str,
    settings: dict[str, Any],
    parts: Callable[..., list[str]] = shared_parts,
    say: Say = print,
) -> Path:
    """``diffusionblocks convert`` of a language model: cut it into blocks and save it with its tokenizer."""

    def save_beside(base: str, directory: Path, **hub: Any) -> None:
        save_tokenizer(AutoTokenizer.from_pretrained(base, **hub), directory)

    return convert_base(
        kind, base, output_dir, settings, beside="tokenizer", save_beside=save_beside, parts=parts, say=say
    )


def evaluate_text(
    score: Callable[..., dict[str, Any]], model_dir: str, recipe: Recipe, output: str | None, seed: int, say: Say
) -> dict[str, Any]:
    """``diffusionblocks evaluate`` of a language model; ``score`` is of model, rows, tokenizer and settings."""
    check_output(output)
    model, tokenizer = load_model(model_dir)
    test_data = load_held_out(recipe, tokenizer)
    model.check_batch(test_data[[0]])
    figures = score(model, test_data, tokenizer, recipe.evaluation, seed=seed)
    say_figures(figures, output, say)
    return figures
