"""A small page that samples a blocked DiT and shows which block works at each step: ``diffusionblocks demo``.

Gradio is needed to show it (``pip install 'hf-diffusionblocks[demo]'``); the steps that it shows, ``denoising_steps``,
do without.
"""

from .app import launch_app, make_app, serve
from .space import write_space
from .steps import DenoisingStep, denoising_steps

__all__ = ["DenoisingStep", "denoising_steps", "launch_app", "make_app", "serve", "write_space"]
