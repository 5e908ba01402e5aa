"""What each command does with language models."""

from pathlib import Path, PurePath
from typing import Any

import torch
from transformers import TextStreamer

from ..compute import TrainingCompute
from ..evaluation import generate_text, prompt_tokens, score_text
from ..families.categorical_config import PLAIN
from ..families.causal_lm import BlockedForCausalLM
from ..families.causal_lm_config import BlockedCausalLMConfig
from ..families.recurrent_config import BlockedRecurrentConfig
from ..memory import MemoryPlan
from ..recipes import Recipe
from ..recipes.sections import TextSampling
from .advice import SmallModel, advice, advice_values, small_model
from .common import Say
from .planning import Plan, compute_lines, planned_compute, planned_memory
from .run import Pictures
from .text_pieces import load_model
from .text_runs import TextRun, chosen_sampling, convert_text, evaluate_text, planned_text, shared_parts


def plan(recipe: Recipe) -> Plan:
    """What ``diffusionblocks plan`` prints: parameters by block, memory, compute, and whether blocks pay."""
    recipe, config = planned_text(recipe)
    memory = planned_memory(config, recipe)
    read, lower = _tokens_read(recipe)
    cost = planned_compute(config, recipe, **lower)
    with torch.device("meta"):
        model = recipe.kind.model_class(config)
    layer = sum(p.numel() for p in model.block(0).model.layers[0].parameters())
    small = _small_model(config, recipe, layer, cost, read)
    advised = advice(config, cost, small)
    values = {"compute": dict(advice_values(cost, small)), "advice": advised}
    return Plan(recipe, model, memory, _parts(model), [*compute_lines(cost), "", advised], values)


def _tokens_read(recipe: Recipe) -> tuple[float | None, dict[str, Any]]:
    """Tokens that a block reads in the whole run, None if unknown; and how the lower blocks' output is counted."""
    args, rows = recipe.training_arguments(), recipe.data.max_samples
    updates = args.updates_per_block(rows) if args.max_steps > 0 or rows else None
    if updates is None:
        return None, {}
    per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps
    read = updates * per_update * recipe.data.block_length
    if args.lower_outputs == "disk" and updates and rows:
        return read, {"lower_outputs": "disk", "passes": read / recipe.data.block_length / rows}
    return read, {}


def _small_model(
    config: BlockedCausalLMConfig, recipe: Recipe, layer_parameters: int, cost: TrainingCompute, read: float | None
) -> SmallModel:
    """The ordinary decoder with as many layers as the block that holds most."""
    partition = config.make_partition()
    layers = max(len(partition.layers(b)) + config.auxiliary_layers_of(b) for b in range(config.num_blocks))
    layers = min(layers, config.num_layers)
    base = config.base_config | {"num_hidden_layers": layers}
    if base.get("layer_types"):
        base["layer_types"] = base["layer_types"][:layers]
    small_cost = planned_compute(BlockedCausalLMConfig(base_config=base, num_blocks=1, **PLAIN), recipe)
    return small_model(layer_parameters, cost, small_cost, layers, read)


def _parts(model: BlockedForCausalLM) -> list[str]:
    """Shared parts and auxiliary layers by name."""
    lines = shared_parts(model)
    extra = {
        b: sum(p.numel() for p in model.block(b).auxiliary.parameters())
        for b in model.resident_blocks
        if model.block(b).auxiliary is not None
    }
    if extra:
        named = ", ".join(f"block {b} {count:,}" for b, count in extra.items())
        lines.append(f"auxiliary layers, in these counts, used in training only: {named}")
    return lines


class CausalTextRun(TextRun):
    """A run of a causal language model."""

    loss_unit = "nats per token"
    task = "text-generation"

    def check_prompt(self, config: BlockedCausalLMConfig, prompt: str) -> None:
        prompt_tokens(config, self.tokenizer, prompt, self.recipe.sampling.max_new_tokens)

    def parts(self, model: BlockedForCausalLM) -> list[str]:
        return _parts(model)

    def score(self, model: BlockedForCausalLM) -> dict[str, Any]:
        seed = self.recipe.training_arguments().seed
        return score_text(model, self.test_data, self.tokenizer, self.recipe.evaluation, seed=seed)

    def write_text(self, model: BlockedForCausalLM, prompt: str, seed: int) -> str:
        return generate_text(model, self.tokenizer, prompt, self.recipe.sampling, seed=seed)

    def how(self, config: BlockedCausalLMConfig) -> str:
        s = self.recipe.sampling
        how = f"temperature {s.temperature:g}, top-p {s.top_p:g}" if s.do_sample else "the likeliest token"
        if isinstance(config, BlockedRecurrentConfig):
            times = s.steps if s.mode == "denoise" and s.steps else config.recurrences
            where = " along the noise grid" if s.mode == "denoise" and config.two_stream else ""
            how += f", {times} recurrence{'s' * (times > 1)} per token{where}"
        elif s.mode == "denoise":
            how += f", along the noise grid ({s.steps or 'B'} steps, {s.bridge})"
        return how

    def plot_bits(self, model: BlockedForCausalLM, figures: dict[str, Any], folder: Path) -> Pictures:
        from .. import plots

        bits, whole = figures["local_bits_per_character_per_block"], figures["bits_per_character"]
        unit = "bits per character that each block is trained on, on held-out text"
        picture = plots.plot_block_bits(bits, model.partition, folder / "bits.png", whole, unit)
        return [("bits per character by block", picture)]

    def plot(self, model: BlockedForCausalLM, figures: dict[str, Any], memory: MemoryPlan, folder: Path) -> Pictures:
        from .. import plots

        pictures = super().plot(model, figures, memory, folder)
        if "bound_bits_per_character" in figures:
            shares = figures["bound_bits_per_character_per_block"]
            unit = "share in the likelihood bound, bits per character"
            bound = plots.plot_block_bits(shares, model.partition, folder / "bound.png", None, unit)
            pictures.append(("likelihood bound by block", bound))
            pictures.append(("the partition", plots.plot_partition(model.partition, folder / "partition.png")))
        return pictures

    def usage_lines(self, model: BlockedForCausalLM, model_dir: PurePath) -> list[str]:
        prompt = self.recipe.sampling.prompts[0]
        call = f"pipeline('text-generation', {str(model_dir)!r})({prompt!r}, max_new_tokens=50)"
        return [
            "import hf_diffusionblocks",
            "from transformers import pipeline",
            f"print({call}[0]['generated_text'])",
        ]


def convert(
    base: str, output_dir: str, settings: dict[str, Any], say: Say = print, kind: Any = BlockedForCausalLM
) -> Path:
    """``diffusionblocks convert``: cut a pretrained language model into blocks and save it with its tokenizer."""
    return convert_text(kind, base, output_dir, settings, _parts, say)


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
    chosen = chosen_sampling(recipe.sampling if recipe is not None else TextSampling(), prompts, settings)
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
    return evaluate_text(score_text, model_dir, recipe, output, seed, say)
