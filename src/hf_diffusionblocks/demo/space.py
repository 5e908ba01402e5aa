"""The files of a Space on the Hub that shows a model: ``diffusionblocks demo user/model --space DIR``."""

import json
import os
import re
from functools import partial
from pathlib import Path

from .. import __version__, serialization

_APP = '''"""Samples {model} and shows which block works at each step."""

from hf_diffusionblocks import BlockedDiTPipeline
from hf_diffusionblocks.demo import make_app

demo = make_app(BlockedDiTPipeline.from_pretrained({quoted}), title={title})

if __name__ == "__main__":
    demo.launch()
'''

_README = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
app_file: app.py
models:
- {model}
tags:
- diffusion-blocks
- arxiv:2506.14202
---

Samples [{model}](https://huggingface.co/{model}) and shows which block works at each step: its noise level, the block,
and what the block makes of it. Made by `diffusionblocks demo {model} --space`.
"""


def write_space(model: str, directory: str | os.PathLike, title: str | None = None) -> list[Path]:
    """Write ``app.py``, ``requirements.txt`` and ``README.md`` with the front matter that Spaces read.

    Args:
        model: Hub id of the model that the Space loads; a directory of this machine means nothing there.
        directory: a new or empty one.
        title: of the Space; the model's name by default.

    Returns:
        The files, in that order.

    Raises:
        ValueError: if ``model`` is no Hub id, ``directory`` is not empty, or Gradio, whose version is written down, is
            not installed.
    """
    from .app import import_gradio

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise ValueError(
            f"a Space loads its model from the Hub, and {model!r} is no Hub id: push it first "
            "(`diffusionblocks push DIR user/model`), then give user/model."
        )
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not an empty directory: give a new one for the Space.")
    target.mkdir(parents=True, exist_ok=True)
    title = title or model.split("/")[1]
    quoted = json.dumps(title)  # a string of YAML and of Python as well
    contents = {
        "app.py": _APP.format(model=model, quoted=json.dumps(model), title=quoted),
        "requirements.txt": f"hf-diffusionblocks=={__version__}\n",
        "README.md": _README.format(model=model, title=quoted, gradio=import_gradio().__version__),
    }
    for name, text in contents.items():
        serialization.atomic_write(target / name, partial(Path.write_text, data=text, encoding="utf-8"))
    return [target / name for name in contents]


__all__ = ["write_space"]
