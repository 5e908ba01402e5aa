"""The model card: what a saved model is, how it was trained, what was measured, how to load it."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import serialization
from ..modeling import BlockedPreTrainedModel, format_block_parameters

PAPER = "https://arxiv.org/abs/2506.14202"

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A {{ family }} cut into {{ num_blocks }} blocks and trained block by block with denoising score matching
(DiffusionBlocks, [arXiv 2506.14202](https://arxiv.org/abs/2506.14202)). Each block is a denoiser for its own range of
noise levels; sampling runs one block per step.

## Blocks

```
{{ table }}
```

Edges (noise levels, descending): {{ edges }}. Partition: {{ partition }}, overlap {{ overlap }}, preconditioning
{{ preconditioning }}.

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
    """
    figures = figures or {}
    results = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=dataset or "unknown",
            dataset_name=dataset or "unknown",
            metric_type=name,
            metric_value=value,
        )
        for name, value in figures.items()
        if isinstance(value, float)
    ]
    data = ModelCardData(
        library_name="hf-diffusionblocks",
        pipeline_tag=pipeline_tag,
        tags=["diffusion-blocks", "block-wise-training", "arxiv:2506.14202"],
        datasets=[dataset] if dataset and dataset.count("/") == 1 and not Path(dataset).exists() else None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    config = model.config
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=title,
        family=type(model).__name__,
        class_name=type(model).__name__,
        num_blocks=model.partition.num_blocks,
        table=format_block_parameters(model),
        edges=", ".join(f"{edge:.6g}" for edge in model.partition.edges),
        partition=config.partition,
        overlap=config.overlap,
        preconditioning=config.preconditioning,
        usage=usage,
        training=_table({**({"data": dataset} if dataset else {}), **(training or {})}) or "Not recorded.",
        figures=_table(figures) or "None were measured.",
    )


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
