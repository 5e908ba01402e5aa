"""What each command does with masked diffusion language models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import serialization
from ..baselines.end_to_end import resolve_method
from ..compute import training_flops
from ..evaluation import format_figures
from ..evaluation.masked_text import fill_text, gap_tokens, score_masked_text
from ..families.masked_lm import BlockedForMaskedLM
from ..hub import model_card, write_model_card
from ..memory import plan_memory
from ..modeling import format_block_parameters
from ..recipes import Recipe
from ..recipes.sections import MaskedSampling
from .common import (
    FIGURES_DIR,
    FIGURES_NAME,
    MODEL_DIR,
    Say,
    check_output,
    planned,
    say_figures,
    say_where,
)
from .text_pieces import load_held_out, load_model, planned_vocabulary
from .text_runs import TextRun, convert_text, train_text


def plan(recipe: Recipe, say: Say = print) -> dict[str, Any]:
    """``diffusionblocks plan``: parameters by block, memory and compute."""
    vocab_size = planned_vocabulary(recipe)
    recipe = resolve_method(recipe, vocab_size)
    config, args = recipe.config(vocab_size), recipe.training_arguments()
    tokens = recipe.data.block_length
    if tokens > config.max_position_embeddings:
        raise ValueError(
            f"data.block_length={tokens} tokens are more than the model's {config.max_position_embeddings} positions: "
            "set a smaller data.block_length."
        )
    table = plan_memory(config, **planned(args), tokens=tokens)
    cost = training_flops(
        config,
        batch_size=args.per_device_train_batch_size,
        gradient_checkpointing=args.gradient_checkpointing,
        tokens=tokens,
    )
    with torch.device("meta"):
        model = BlockedForMaskedLM(config)
    compute = "compute: FLOPs of an update of each block; ratio to an end-to-end update of all layers"
    ratio = f"A run of blocks costs {cost.ratio:.2f} times the end-to-end run of as many updates."
    for line in (format_block_parameters(model), *_parts(model), "", str(table), "", compute, str(cost), ratio):
        say(line)
    values = {
        "flops_per_update_of_every_block": cost.flops,
        "flops_per_end_to_end_update": cost.end_to_end,
        "compute_ratio": cost.ratio,
        "flops_per_block": [block.flops for block in cost.blocks],
    }
    return table.to_dict() | {"compute": values}


def _parts(model: BlockedForMaskedLM) -> list[str]:
    """Shared parts by name."""
    shared = ", ".join(f"{name} {parameter.numel():,}" for name, parameter in model.shared_parameters())
    return [f"shared by all blocks: {shared}"]


def train(recipe: Recipe, **settings: Any) -> Path:
    """``diffusionblocks train``; see ``hf_diffusionblocks.jobs.train``."""
    return train_text(recipe, TextRun(gap_tokens, write_report, _write_card, _parts), **settings)


def write_report(
    model: BlockedForMaskedLM,
    tokenizer: Any,
    recipe: Recipe,
    test_data: Any,
    output: Path,
    summary: dict[str, Any],
    say: Say = print,
) -> dict[str, Any]:
    """Pictures, samples and a table of figures of a trained model, under ``output/figures``."""
    from .. import plots

    folder = output / FIGURES_DIR
    folder.mkdir(parents=True, exist_ok=True)
    args = recipe.training_arguments()
    figures = score_masked_text(model, test_data, tokenizer, recipe.evaluation, seed=args.seed)
    figures |= {"training_seconds": summary["training_seconds"], "updates_per_block": summary["updates_per_block"]}
    serialization.write_figures(folder / FIGURES_NAME, figures)
    samples = [
        (prompt, fill_text(model, tokenizer, prompt, recipe.sampling, seed=args.seed + i))
        for i, prompt in enumerate(recipe.sampling.prompts)
    ]
    lines = "\n\n".join(text for _, text in samples) + "\n"
    serialization.atomic_write(folder / "samples.txt", lambda path: path.write_text(lines, encoding="utf-8"))
    table = plan_memory(model.config, **planned(args), alternatives=False, tokens=recipe.data.block_length)
    shares = figures["bound_bits_per_character_per_block"]
    title, unit = f"{recipe.name}: {_how(recipe)}", "share in the likelihood bound, bits per character"
    pictures = [
        ("losses", plots.plot_losses(output, folder / "losses.png", "nats per hidden token", "whole model")),
        ("bound by block", plots.plot_block_bits(shares, model.partition, folder / "bound.png", None, unit)),
        ("the partition", plots.plot_partition(model.partition, folder / "partition.png")),
        ("memory", plots.plot_memory(table, folder / "memory.png")),
        ("samples", plots.plot_text_samples(_drawn(samples), folder / "samples.png", title)),
    ]
    _write_card(model, recipe, output / MODEL_DIR, figures)
    for line in ("", str(table), "", format_figures(figures), "", f"sample ({_how(recipe)}):", "", samples[0][1], ""):
        say(line)
    say_where(pictures, output / MODEL_DIR, usage_lines(output / MODEL_DIR), say)
    return figures


def _drawn(samples: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Samples for a picture, which shows a prompt in front of what was written: nothing where it had gaps."""
    return [(prompt if text.startswith(prompt) else "", text) for prompt, text in samples]


def _how(recipe: Recipe) -> str:
    """How samples were drawn, in words."""
    s = recipe.sampling
    return f"{s.steps} steps, order {s.order}, temperature {s.temperature:g}, top-p {s.top_p:g}"


def usage_lines(model_dir: Path) -> list[str]:
    """The lines of Python that load a saved model and write a text."""
    return [
        "from transformers import AutoTokenizer",
        "from hf_diffusionblocks import BlockedForMaskedLM, unmask",
        f"model = BlockedForMaskedLM.from_pretrained({str(model_dir)!r}).eval()",
        f"tokenizer = AutoTokenizer.from_pretrained({str(model_dir)!r})",
        "print(tokenizer.decode(unmask(model, length=100, steps=50)[0]))",
    ]


def _write_card(model: BlockedForMaskedLM, recipe: Recipe, model_dir: Path, figures: dict[str, Any]) -> None:
    card = model_card(
        model,
        title=recipe.name,
        usage="\n".join(usage_lines(model_dir)),
        training={"method": recipe.method, **{k: v for k, v in recipe.training.items() if k != "output_dir"}},
        figures=figures,
        dataset=recipe.data.name if isinstance(recipe.data.name, str) else None,
        pipeline_tag="fill-mask",
        base_model=recipe.model.get("base"),
    )
    write_model_card(model_dir, card)


def convert(base: str, output_dir: str, settings: dict[str, Any], say: Say = print) -> Path:
    """``diffusionblocks convert``: cut a pretrained masked language model into blocks, saved with its tokenizer."""
    return convert_text(BlockedForMaskedLM, _parts, base, output_dir, settings, say)


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
    given = {name: value for name, value in settings.items() if value is not None}
    if prompts is not None:
        given["prompts"] = prompts
    chosen = replace(recipe.sampling if recipe is not None else MaskedSampling(), **given)
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
    check_output(output)
    model, tokenizer = load_model(model_dir)
    test_data = load_held_out(recipe, tokenizer)
    model.check_batch(test_data[[0]])
    figures = score_masked_text(model, test_data, tokenizer, recipe.evaluation, seed=seed)
    say_figures(figures, output, say)
    return figures
