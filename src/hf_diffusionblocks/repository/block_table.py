"""The card of a repository that is filled block by block: metadata, and a table of the blocks that are there."""

import re
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..serialization import block_file

CARD_NAME = "README.md"
LIBRARY_NAME = "hf-diffusionblocks"
_TAGS = ["diffusion-blocks", "block-wise-training", "arxiv:2506.14202"]
_TASKS = {
    "blocked_dit": "unconditional-image-generation",
    "blocked_causal_lm": "text-generation",
    "blocked_image_classification": "image-classification",
    "blocked_masked_lm": "fill-mask",
    "blocked_recurrent": "text-generation",
}


def register_task(model_type: str, like: str) -> None:
    """Give models of a family of your own the task on the Hub of those of another ``model_type``."""
    if like in _TASKS:
        _TASKS[model_type] = _TASKS[like]


_BEGIN, _END = "<!-- blocks in this repository -->", "<!-- end of blocks -->"
_USAGE = re.compile(r"^## How to load$.*?^## ", re.DOTALL | re.MULTILINE)
_SECTION = re.compile(rf"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)

_TEXT = """---
{metadata}
---

# Blocks of a {model_type} model

A residual network cut into {num_blocks} blocks that are trained alone (DiffusionBlocks,
[arXiv 2506.14202](https://arxiv.org/abs/2506.14202)), with the library `hf-diffusionblocks`.

```python
import hf_diffusionblocks
from transformers import AutoModel

model = AutoModel.from_pretrained("path/or/name")  # all blocks; blocks=[1] loads one
```
"""


def stand_in(name: str) -> PurePosixPath:
    """The id in a card's lines that load the model, before a push knows the repository: ``user/name``."""
    return PurePosixPath("user", re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model")


def name_repository(text: str, repo_id: str) -> str:
    """A card whose lines that load the model name a repository, in place of the ``stand_in``."""
    return _USAGE.sub(lambda found: re.sub(r"'user/[\w.-]+'", f"'{repo_id}'", found[0]), text)


def complete_card(text: str | None, config: dict[str, Any], index: dict[str, Any]) -> str:
    """A card with its metadata completed and the table of blocks brought up to date.

    Args:
        text: the card so far; None for a new one.
        config: of the model, as a mapping.
        index: of the repository, after the push.

    Raises:
        ValueError: if the card's metadata are not valid.
    """
    if text is None:
        data = ModelCardData(pipeline_tag=_TASKS.get(config["model_type"]), tags=list(_TAGS), library_name=LIBRARY_NAME)
        text = _TEXT.format(metadata=data.to_yaml(), model_type=config["model_type"], num_blocks=config["num_blocks"])
    card = ModelCard(text)
    wanted = {"library_name": LIBRARY_NAME, "base_model": config.get("base_model")}
    missing = {name: value for name, value in wanted.items() if value and not getattr(card.data, name, None)}
    if missing:
        for name, value in missing.items():
            setattr(card.data, name, value)
        text = str(card)
    section = _blocks_section(config, index)
    if _SECTION.search(text):
        return _SECTION.sub(lambda _: section, text, count=1)
    return f"{text.rstrip()}\n\n{section}\n"


def _blocks_section(config: dict[str, Any], index: dict[str, Any]) -> str:
    digests, sizes = (index["metadata"].get(kind, {}) for kind in ("sha256", "bytes"))
    present = set(index["weight_map"].values())
    rows = [_BEGIN, "", "| block | bytes | sha256 |", "|---|---|---|"]
    for block in range(config["num_blocks"]):
        name = block_file(block)
        if name in present:
            rows.append(f"| {block} | {sizes.get(name, 0):,} | `{digests.get(name, '')[:16]}` |")
        else:
            rows.append(f"| {block} | not here yet | |")
    return "\n".join([*rows, "", _END])
