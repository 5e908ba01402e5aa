"""The model card: what a saved model is, how it was trained, what was measured, how to load it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import serialization
from ..modeling import BlockedPreTrainedModel, format_block_parameters
from ..units import human_seconds
from .card_texts import description, intended_use, settings, uses_noise

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

## Intended use and limits

{{ intended_use }}

## How to load

```python
{{ usage }}
```

In place of the name on the Hub, give the directory if the model lies on your disk.

Load some blocks only, for instance to go on training one: `{{ class_name }}.from_pretrained(path, blocks=[1])`.

## Training

{{ training }}

## Made with

{{ made }}

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
    made: Mapping[str, str] | None = None,
    license: str | None = None,
) -> ModelCard:
    """A card from the config and the measured figures.

    Args:
        model: the model.
        title: heading and name of the model in the metadata.
        usage: Python lines that load and use it.
        training: settings to list.
        figures: measured figures, names to values; numbers become results in the metadata.
        dataset: name of the training data; a Hub id goes into the metadata, of a path on this disk its last part only.
        pipeline_tag: the Hub's task.
        base_model: the pretrained network that was cut; a Hub id goes into the metadata.
        made: where, when and how it was made: command, hardware, date, versions.
        license: the Hub's identifier of the weights' licence, such as ``apache-2.0``; none is made up.
    """
    made, figures = dict(made or {}), dict(figures or {})
    local = dataset is not None and is_local(dataset)
    shown, data_name = (Path(dataset).name, Path(dataset).stem) if dataset and local else (dataset, dataset)
    if isinstance(seconds := figures.get("training_seconds"), (int, float)):
        made["training time"] = human_seconds(seconds)
    kept = {name: value for name, value in figures.items() if value is not None and not name.endswith(_NO_FIGURES)}
    figures = _sorted(kept)
    results = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type="unknown" if local else dataset or "unknown",
            dataset_name=data_name or "unknown",
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
        license=license,
        model_name=title if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=title,
        class_name=type(model).__name__,
        description=description(model, Path(base_model).name if base_model and is_local(base_model) else base_model),
        settings=settings(model),
        table=format_block_parameters(model, noise=uses_noise(model)),
        usage=usage,
        training=_table({**({"data": shown} if dataset else {}), **_sorted(training or {})}) or "Not recorded.",
        made=_table(made | ({"license": license} if license else {})) or "Not recorded.",
        intended_use=intended_use(model),
        figures=_table(figures) or "None were measured.",
    )


# What says how long something took, or how far a run came, and nothing of the model.
_NO_FIGURES = ("_seconds", "updates_per_block")
# Of the others, what belongs to a figure, and is none that ranks models.
_NO_METRICS = ("guidance_scale", "_standard_error", "_monte_carlo_error", "_std", "classifier_accuracy")


# Files that data may lie in; names on the Hub do not end so.
_DATA_FILES = (".txt", ".md", ".text", ".rst", ".tex", ".parquet", ".json", ".jsonl", ".csv", ".arrow")


def is_local(name: str) -> bool:
    """Whether data or a base are a path, there or no longer there, rather than a name or an id on the Hub."""
    looks = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.lower().endswith(_DATA_FILES)
    return looks or "\\" in name or Path(name).exists()


def _is_hub_id(name: str | None) -> bool:
    return name is not None and name.count("/") == 1 and not is_local(name)


def write_model_card(directory: str | Path, card: ModelCard) -> Path:
    """Write a card as the ``README.md`` of a saved model; or to a Markdown file, if one is named."""
    path = Path(directory) if Path(directory).suffix == ".md" else Path(directory) / "README.md"
    serialization.atomic_write(path, lambda temporary: temporary.write_text(f"{card}\n", encoding="utf-8"))
    return path


def _sorted(values: Mapping[str, Any]) -> dict[str, Any]:
    """By name, as the files of a run keep them; ``method`` first."""
    return dict(sorted(values.items(), key=lambda item: (item[0] != "method", item[0])))


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
