"""The model card: what a saved model is, how it was trained, what was measured, how to load it."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import serialization
from ..families.categorical_config import CategoricalConfig
from ..families.masked_lm_config import BlockedMaskedLMConfig
from ..families.recurrent_config import BlockedRecurrentConfig
from ..modeling import BlockedPreTrainedModel, format_block_parameters
from ..repository import register_task

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ description }}

## Blocks

```
{{ table }}
```

{{ settings }}

## How to load

```python
{{ usage }}
```

Load some blocks only, for instance to go on training one: `{{ class_name }}.from_pretrained(path, blocks=[1])`.

## Training

{{ training }}

## Figures

{{ figures }}
"""


def model_card(
    model: BlockedPreTrainedModel,
    *,
    title: str,
    usage: str,
    training: dict[str, Any] | None = None,
    figures: dict[str, Any] | None = None,
    dataset: str | None = None,
    pipeline_tag: str = "unconditional-image-generation",
    base_model: str | None = None,
) -> ModelCard:
    """A card from the config and the measured figures.

    Args:
        model: the model.
        title: heading and name of the model in the metadata.
        usage: Python lines that load and use it.
        training: settings to list.
        figures: measured figures, names to values; numbers become results in the metadata.
        dataset: name of the training data; a Hub id goes into the metadata.
        pipeline_tag: the Hub's task.
        base_model: the pretrained network that was cut; a Hub id goes into the metadata.
    """
    figures = figures or {}
    results = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=dataset or "unknown",
            dataset_name=dataset or "unknown",
            metric_type=name,
            metric_value=float(f"{value:.6g}"),
        )
        for name, value in figures.items()
        if isinstance(value, float) and not name.endswith(_NO_METRICS)
    ]
    data = ModelCardData(
        library_name="hf-diffusionblocks",
        pipeline_tag=pipeline_tag,
        tags=["diffusion-blocks", "block-wise-training", "arxiv:2506.14202"],
        datasets=[dataset] if _is_hub_id(dataset) else None,
        base_model=base_model if _is_hub_id(base_model) else None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=title,
        class_name=type(model).__name__,
        description=_description(model, base_model),
        settings=_settings(model),
        table=format_block_parameters(model),
        usage=usage,
        training=_table({**({"data": dataset} if dataset else {}), **(training or {})}) or "Not recorded.",
        figures=_table(figures) or "None were measured.",
    )


# Figures that say what was done, and how long it took, but not how good the model is.
_NO_METRICS = ("_seconds", "guidance_scale")


def _is_hub_id(name: str | None) -> bool:
    return name is not None and name.count("/") == 1 and not Path(name).exists()


# Target, input and name of a family of categorical targets.
_TARGETS = {
    "blocked_causal_lm": ("next token", "clean tokens", "language model"),
    "blocked_image_classification": ("label", "image", "classifier"),
}


def register_card(model_type: str, like: str) -> None:
    """Describe models of a family of your own, and name their task on the Hub, as those of another ``model_type``."""
    register_task(model_type, like)
    if like in _TARGETS:
        _TARGETS[model_type] = _TARGETS[like]


def _description(model: BlockedPreTrainedModel, base_model: str | None) -> str:
    """What the model is and how its blocks were trained."""
    config, count = model.config, model.partition.num_blocks
    source = "(DiffusionBlocks, [arXiv 2506.14202](https://arxiv.org/abs/2506.14202))"
    blocks = f"{count} blocks" if count > 1 else "one block"
    if isinstance(config, BlockedMaskedLMConfig):
        made = base_model or f"A {config.base_config['model_type']} network"
        return (
            f"{made} that reads both sides, cut into {blocks} and trained block by block by masked diffusion {source}. "
            "Each block knows rows of its own range of mask rates, block 0 those with most tokens hidden; sampling "
            "reveals tokens step by step and runs one block per step."
        )
    if not isinstance(config, CategoricalConfig):
        return (
            f"A {type(model).__name__} cut into {blocks} and trained block by block with denoising score matching "
            f"{source}. Each block is a denoiser for its own range of noise levels; sampling runs one block per step."
        )
    kind = config.base_config["model_type"]
    target, inputs, name = _TARGETS.get(config.model_type, _TARGETS["blocked_causal_lm"])
    made = f"{base_model or f'A pretrained {kind} model'}" if config.pretrained else f"A {kind} {name}"
    if isinstance(config, BlockedRecurrentConfig):
        parts = f"{len(config.prelude)} prelude, {len(config.core)} core and {len(config.coda)} coda layers"
        how = (
            "as one denoiser for all noise levels, in one pass at a random one"
            if config.two_stream
            else f"unrolled, {config.mean_recurrences + 1} recurrences on average, with the gradient through the last "
            f"{config.backprop_depth}"
        )
        return f"{made} of recurrent depth ({parts}), its core trained {how}, with the library of {source}."
    if count == 1:
        return f"{made} in one block, trained end to end with the library of {source}."
    how = f"trained block by block with the cross-entropy of the {target}"
    context = (
        "Each block reads what the blocks below it give, without a gradient; the last one's head gives the logits."
        if config.context == "cascade"
        else f"Each block reads the {inputs} through its own layers only and is a {name} by itself."
    )
    noise = (
        f" Each block denoises the {target}'s embedding in its own range of noise levels."
        if config.two_stream
        else " No block needs noise to be trained; the noise levels below are those that sampling along the grid uses."
    )
    auxiliary = (
        f" In training, {config.auxiliary_layers} auxiliary layer(s) stand between a block and its loss; they are not "
        "used afterwards."
        if config.auxiliary_layers_of(0)
        else ""
    )
    return f"{made} cut into {blocks}, {how} {source}. {context}{auxiliary}{noise}"


def _settings(model: BlockedPreTrainedModel) -> str:
    config = model.config
    edges = ", ".join(f"{edge:.6g}" for edge in model.partition.edges)
    if isinstance(config, BlockedMaskedLMConfig):
        told = "are told" if config.time_conditioning else "are not told"
        return (
            f"Edges (mask rates, descending): {edges}. Partition: {config.partition}, overlap {config.overlap}. "
            f"Schedule: {config.schedule}. The layers {told} the mask rate. Mask token: {config.mask_token_id}."
        )
    text = f"Edges (noise levels, descending): {edges}. Partition: {config.partition}, overlap {config.overlap}, "
    text += f"preconditioning {config.preconditioning}."
    if isinstance(config, CategoricalConfig):
        text += f" Readout: {config.readout}. Context: {config.context}."
    return text


def write_model_card(directory: str | Path, card: ModelCard) -> Path:
    """Write a card as the ``README.md`` of a saved model."""
    path = Path(directory) / "README.md"
    serialization.atomic_write(path, lambda temporary: temporary.write_text(str(card), encoding="utf-8"))
    return path


def _table(values: dict[str, Any]) -> str:
    if not values:
        return ""
    rows = []
    for name, value in values.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        elif isinstance(value, (list, dict)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            value = ", ".join(f"{k}: {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in items)
        rows.append(f"| {name.replace('_', ' ')} | {value} |")
    return "\n".join(["| | |", "|---|---|", *rows])
