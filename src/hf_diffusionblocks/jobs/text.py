"""What each command does with language models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from .. import serialization
from ..baselines.end_to_end import resolve_method
from ..compute import TrainingCompute, training_flops
from ..evaluation import format_figures, generate_text, prompt_tokens, score_text
from ..families.causal_lm import BlockedForCausalLM
from ..families.causal_lm_config import BlockedCausalLMConfig
from ..hub import model_card, write_model_card
from ..memory import MemoryPlan, plan_memory
from ..modeling import format_block_parameters
from ..recipes import Recipe
from ..recipes.sections import TextSampling
from .advice import advice, advice_values, small_model
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
from .text_pieces import (
    load_held_out,
    load_model,
    planned_vocabulary,
)
from .text_runs import TextRun, convert_text, train_text


def plan(recipe: Recipe, say: Say = print) -> dict[str, Any]:
    """``diffusionblocks plan``: parameters by block, memory, compute, and whether blocks pay."""
    vocab_size = planned_vocabulary(recipe)
    recipe = resolve_method(recipe, vocab_size)
    config, args = recipe.config(vocab_size), recipe.training_arguments()
    if recipe.data.block_length > config.max_position_embeddings:
        raise ValueError(
            f"data.block_length={recipe.data.block_length} tokens are more than the model's "
            f"{config.max_position_embeddings} positions: set a smaller data.block_length."
        )
    table = _memory(config, recipe, True)
    tokens = {"tokens": recipe.data.block_length}
    batch_size = args.per_device_train_batch_size
    rows = recipe.data.max_samples
    updates = args.updates_per_block(rows) if args.max_steps > 0 or rows else None
    read = None if updates is None else updates * batch_size * args.gradient_accumulation_steps * tokens["tokens"]
    lower = {}
    if args.lower_outputs == "disk" and (updates and rows):
        lower = {"lower_outputs": "disk", "passes": read / tokens["tokens"] / rows}
    checkpointing = {"gradient_checkpointing": args.gradient_checkpointing}
    cost = training_flops(config, batch_size=batch_size, **lower, **checkpointing, **tokens)
    layers = max(
        len(config.make_partition().layers(b)) + config.auxiliary_layers_of(b) for b in range(config.num_blocks)
    )
    layers = min(layers, config.num_layers)
    plain = {"readout": "clean", "context": "independent", "auxiliary_layers": 0}
    base = config.base_config | {"num_hidden_layers": layers}
    if base.get("layer_types"):
        base["layer_types"] = base["layer_types"][:layers]
    small_config = BlockedCausalLMConfig(base_config=base, num_blocks=1, **plain)
    small_cost = training_flops(small_config, batch_size=batch_size, **checkpointing, **tokens)
    with torch.device("meta"):
        model = recipe.kind.model_class(config)
    layer = sum(p.numel() for p in model.block(0).model.layers[0].parameters())
    small = small_model(layer, cost, small_cost, layers, read)
    advised = advice(config, cost, small)
    say(format_block_parameters(model))
    for line in (*_parts(model), "", str(table), "", *_compute(cost), "", advised):
        say(line)
    return table.to_dict() | {"compute": dict(advice_values(cost, small)), "advice": advised}


def _memory(config: BlockedCausalLMConfig, recipe: Recipe, alternatives: bool) -> MemoryPlan:
    args = recipe.training_arguments()
    return plan_memory(config, **planned(args), alternatives=alternatives, tokens=recipe.data.block_length)


def _parts(model: BlockedForCausalLM) -> list[str]:
    """Shared parts and auxiliary layers by name."""
    shared = ", ".join(f"{name} {parameter.numel():,}" for name, parameter in model.shared_parameters())
    lines = [f"shared by all blocks: {shared}"]
    extra = {
        b: sum(p.numel() for p in model.block(b).auxiliary.parameters())
        for b in model.resident_blocks
        if model.block(b).auxiliary is not None
    }
    if extra:
        named = ", ".join(f"block {b} {count:,}" for b, count in extra.items())
        lines.append(f"auxiliary layers, in these counts, used in training only: {named}")
    return lines


def _compute(cost: TrainingCompute) -> list[str]:
    return [
        "compute: FLOPs of an update of each block; ratio to an end-to-end update of all layers",
        str(cost),
        f"A run of blocks costs {cost.ratio:.2f} times the end-to-end run of as many updates.",
    ]


def train(recipe: Recipe, **settings: Any) -> Path:
    """``diffusionblocks train``; see ``hf_diffusionblocks.jobs.train``."""
    return train_text(recipe, TextRun(_check_prompt, write_report, _write_card, _parts), **settings)


def _check_prompt(
    config: BlockedCausalLMConfig, tokenizer: PreTrainedTokenizerBase, prompt: str, settings: TextSampling
) -> None:
    prompt_tokens(config, tokenizer, prompt, settings.max_new_tokens)


def write_report(
    model: BlockedForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
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
    figures = score_text(model, test_data, tokenizer, recipe.evaluation, seed=args.seed)
    figures |= {"training_seconds": summary["training_seconds"], "updates_per_block": summary["updates_per_block"]}
    serialization.write_figures(folder / FIGURES_NAME, figures)
    samples = [
        (prompt, generate_text(model, tokenizer, prompt, recipe.sampling, seed=args.seed + i))
        for i, prompt in enumerate(recipe.sampling.prompts)
    ]
    lines = "\n\n".join(text for _, text in samples) + "\n"
    serialization.atomic_write(folder / "samples.txt", lambda path: path.write_text(lines, encoding="utf-8"))
    table = _memory(model.config, recipe, False)
    pictures = [
        ("losses", plots.plot_losses(output, folder / "losses.png", "nats per token", "whole model")),
        (
            "bits per character by block",
            plots.plot_block_bits(
                figures["local_bits_per_character_per_block"],
                model.partition,
                folder / "bits.png",
                figures["bits_per_character"],
                "bits per character that each block is trained on, on held-out text",
            ),
        ),
        ("memory", plots.plot_memory(table, folder / "memory.png")),
        ("samples", plots.plot_text_samples(samples, folder / "samples.png", f"{recipe.name}: {_how(recipe)}")),
    ]
    if "bound_bits_per_character" in figures:
        shares = figures["bound_bits_per_character_per_block"]
        bound = (
            shares,
            model.partition,
            folder / "bound.png",
            None,
            "share in the likelihood bound, bits per character",
        )
        pictures.append(("likelihood bound by block", plots.plot_block_bits(*bound)))
        pictures.append(("the partition", plots.plot_partition(model.partition, folder / "partition.png")))
    _write_card(model, recipe, output / MODEL_DIR, figures)
    for line in ("", str(table), "", format_figures(figures), "", f"sample ({_how(recipe)}):", "", samples[0][1], ""):
        say(line)
    say_where(pictures, output / MODEL_DIR, usage_lines(output / MODEL_DIR, recipe.sampling.prompts[0]), say)
    return figures


def _how(recipe: Recipe) -> str:
    """How samples were drawn, in words."""
    s = recipe.sampling
    how = f"temperature {s.temperature:g}, top-p {s.top_p:g}" if s.do_sample else "the likeliest token"
    if s.mode == "denoise":
        how += f", along the noise grid ({s.steps or 'B'} steps, {s.bridge})"
    return how


def usage_lines(model_dir: Path, prompt: str) -> list[str]:
    """The lines of Python that load a saved model and go on with a prompt."""
    return [
        "import hf_diffusionblocks",
        "from transformers import pipeline",
        f"print(pipeline('text-generation', {str(model_dir)!r})({prompt!r}, max_new_tokens=50)[0]['generated_text'])",
    ]


def _write_card(model: BlockedForCausalLM, recipe: Recipe, model_dir: Path, figures: dict[str, Any]) -> None:
    card = model_card(
        model,
        title=recipe.name,
        usage="\n".join(usage_lines(model_dir, recipe.sampling.prompts[0])),
        training={"method": recipe.method, **{k: v for k, v in recipe.training.items() if k != "output_dir"}},
        figures=figures,
        dataset=recipe.data.name if isinstance(recipe.data.name, str) else None,
        pipeline_tag="text-generation",
        base_model=recipe.model.get("base"),
    )
    write_model_card(model_dir, card)


def convert(
    base: str, output_dir: str, settings: dict[str, Any], say: Say = print, kind: Any = BlockedForCausalLM
) -> Path:
    """``diffusionblocks convert``: cut a pretrained language model into blocks and save it with its tokenizer."""
    return convert_text(kind, _parts, base, output_dir, settings, say)


def sample_text(
    model_dir: str,
    prompts: list[str] | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    stream: bool = True,
    block_streaming: str | None = None,
    say: Say = print,
    **settings: Any,
) -> list[str]:
    """``diffusionblocks sample`` of a language model: each prompt's continuation, printed as it comes.

    Args:
        model_dir: directory or Hub id of a blocked language model with its tokenizer.
        prompts: what to begin with; by default those of the recipe.
        recipe: gives the settings that are not named; by default a recipe's defaults.
        seed: of everything random.
        stream: print tokens as they come; otherwise each text at its end.
        block_streaming: ``host`` or ``disk``: keep one block on the device, the others there.
        say: prints.
        **settings: fields of ``TextSampling`` that are not None.

    Returns:
        The texts, prompts included.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if prompts is not None:
        given["prompts"] = prompts
    chosen = replace(recipe.sampling if recipe is not None else TextSampling(), **given)
    model, tokenizer = load_model(model_dir, block_streaming)
    texts = []
    for i, prompt in enumerate(chosen.prompts):
        streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
        texts.append(generate_text(model, tokenizer, prompt, chosen, seed=seed + i, streamer=streamer))
        if not stream:
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
    figures = score_text(model, test_data, tokenizer, recipe.evaluation, seed=seed)
    say_figures(figures, output, say)
    return figures
