"""What training and converting is for every family of language models."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from .. import serialization
from ..baselines.end_to_end import resolve_method
from ..data.tokenizing import tokenizer_size
from ..families.base_loading import hub_settings
from ..modeling import BlockedPreTrainedModel, format_block_parameters
from ..recipes import Recipe
from ..training.checkpoint import find_checkpoints
from .common import MODEL_DIR, RECIPE_NAME, Say, merge_jobs, new_directory, trainer_says
from .text_pieces import build_trainer, load_data, make_tokenizer, save_tokenizer


@dataclass(frozen=True)
class TextRun:
    """What a family does at the ends of a run.

    Attributes:
        check_prompt: raises a ``ValueError`` for a prompt that cannot be gone on from, before any training: of config,
            tokenizer, prompt and the recipe's section ``sampling``.
        write_report: of model, tokenizer, recipe, held-out rows, the run's directory, its summary, and what prints.
        write_card: of model, recipe, the model's directory and figures.
        parts: lines that name parts of a model.
    """

    check_prompt: Callable[..., None]
    write_report: Callable[..., dict[str, Any]]
    write_card: Callable[..., None]
    parts: Callable[..., list[str]]


def train_text(
    recipe: Recipe,
    run: TextRun,
    *,
    blocks: list[int] | None = None,
    lower: str | None = None,
    resume: bool = True,
    report: bool = True,
    say: Say = print,
) -> Path:
    """``diffusionblocks train`` of a language model; see ``hf_diffusionblocks.jobs.train``."""
    tokenizer, kind = make_tokenizer(recipe), recipe.kind.model_class
    train_data, test_data = load_data(recipe, tokenizer)
    recipe = resolve_method(recipe, recipe.model.get("vocab_size") or tokenizer_size(tokenizer), len(train_data))
    output = Path(recipe.training_arguments().output_dir)
    trainer = build_trainer(recipe, train_data, test_data, tokenizer, blocks=blocks, lower=lower)
    for prompt in recipe.sampling.prompts if report and (blocks is None or lower is not None) else ():
        run.check_prompt(trainer.model.config, tokenizer, prompt, recipe.sampling)
    say = trainer_says(trainer, say)
    output.mkdir(parents=True, exist_ok=True)
    resumed = resume and bool(find_checkpoints(trainer.output_dir))
    say(f"{'going on with' if resumed else 'training'} {recipe.name} ({recipe.method}) in {trainer.output_dir}")
    rows = f"{len(train_data)} rows of {recipe.data.block_length} tokens"
    say(f"text: {rows}, vocabulary {trainer.model.config.vocab_size}; held out: {len(test_data)} rows")
    for line in (format_block_parameters(trainer.model), *run.parts(trainer.model)):
        say(line)
    if trainer.group.is_leader:
        serialization.write_json(output / RECIPE_NAME, recipe.to_dict())
    summary = trainer.train(resume_from_checkpoint=resume)
    model_dir = trainer.save_model(trainer.output_dir / MODEL_DIR)
    if not trainer.group.is_leader:
        return model_dir
    save_tokenizer(tokenizer, model_dir)
    seconds = summary["training_seconds"]
    run.write_card(trainer.model, recipe, model_dir, {"training_seconds": seconds})
    say(f"trained {summary['iterations']} updates in {seconds:.0f} s; model saved in {model_dir}")
    whole = len(trainer.model.resident_blocks) == trainer.model.partition.num_blocks
    reported = (tokenizer, recipe, test_data, output, summary, say)
    if trainer.is_job:
        merged = merge_jobs(output, summary, say)
        if merged is None:
            return model_dir
        model_dir, model = merged, kind.from_pretrained(merged).to(trainer.model.device)
        if report:
            run.write_report(model.eval(), *reported)
    elif report and whole and (blocks is None or lower is not None):
        if trainer.group.sharded:
            run.write_report(kind.from_pretrained(model_dir).to(trainer.model.device).eval(), *reported)
        else:
            with trainer.averaged_weights():
                run.write_report(trainer.model, *reported)
    return model_dir


def convert_text(
    kind: type[BlockedPreTrainedModel],
    parts: Callable[..., list[str]],
    base: str,
    output_dir: str,
    settings: dict[str, Any],
    say: Say = print,
) -> Path:
    """``diffusionblocks convert`` of a language model: cut it into blocks and save it with its tokenizer."""
    target = new_directory(output_dir)
    hub = hub_settings(settings)
    if PreTrainedConfig.get_config_dict(base, **hub)[0].get("model_type") == kind.config_class.model_type:
        raise ValueError(f"{base} has been cut into blocks already: give the base that it was made from.")
    try:
        model = kind.from_base(base, **settings)
    except OSError as error:
        raise ValueError(f"{base} cannot be loaded: {error}") from error
    model.save_pretrained(target)
    try:
        save_tokenizer(AutoTokenizer.from_pretrained(base, **hub), target)
    except (OSError, ValueError, KeyError) as error:
        say(f"no tokenizer could be loaded from {base} ({' '.join(str(error).split())}): none was saved.")
    for line in (format_block_parameters(model), *parts(model), f"saved in {target}"):
        say(line)
    return target
