"""``diffusionblocks sample``: images, text, or text with gaps, by the kind of the saved model."""

import argparse
from collections.abc import Callable
from typing import Any

Say = Callable[[str], None]

_IMAGE_OPTIONS = ("output_dir", "classes", "per_class", "guidance_scale", "solver")
_TEXT_OPTIONS = ("prompt", "max_new_tokens", "temperature", "top_k", "top_p", "denoise", "bridge", "order")
_NOT_OF_MASKED = ("grid", "denoise", "bridge")


def sample(args: argparse.Namespace, say: Say = print) -> list[str]:
    """Sample from a saved model; returns the files' paths, or the texts."""
    from .. import jobs
    from ..recipes import make_recipe
    from ..recipes.families import FAMILIES

    jobs.check_model_path(args.model)
    family = jobs.family_of(args.model)
    if FAMILIES[family].job == "classification":
        raise ValueError(
            f"{args.model} is a classifier, which draws no samples: score it with evaluate, or classify files with "
            f"transformers' pipeline('image-classification', {args.model!r})."
        )
    text = FAMILIES[family].has_text
    for name in _IMAGE_OPTIONS if text else _TEXT_OPTIONS:
        if getattr(args, name) not in (None, False):
            kind, option = "language" if text else "DiT", "--" + name.replace("_", "-")
            raise ValueError(f"{option} has no meaning for {args.model}, a {kind} model: leave it out.")
    if not text:
        return _sample_images(args, say)
    values = jobs.read_recipe_of(args.model)
    recipe = make_recipe(values) if values is not None and values.get("family") == family else None
    for name in _NOT_OF_MASKED if FAMILIES[family].hides_tokens else ("order",):
        if getattr(args, name) not in (None, False):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} has no meaning for {args.model}, a {family} model: leave it out.")
    if FAMILIES[family].hides_tokens:
        names = ("max_new_tokens", "steps", "order", "temperature", "top_k", "top_p", "block_streaming")
        given = {name: getattr(args, name) for name in names}
        return jobs.sample_masked(args.model, args.prompt, recipe, args.seed, say=say, **given)
    return _sample_text(args, recipe, say)


def _sample_images(args: argparse.Namespace, say: Say) -> list[str]:
    from .. import jobs

    given = {
        "class_labels": args.classes,
        "per_class": args.per_class,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "solver": args.solver,
        "grid": args.grid,
        "block_streaming": args.block_streaming,
    }
    given = {name: value for name, value in given.items() if value is not None}
    paths = jobs.sample(args.model, args.output_dir or "samples", seed=args.seed, say=say, **given)
    return [str(path) for path in paths]


def _sample_text(args: argparse.Namespace, recipe: Any, say: Say) -> list[str]:
    """Continue prompts; options that would have no effect are errors."""
    from .. import jobs

    walk = {name: getattr(args, name) for name in ("steps", "grid", "bridge")}
    if not args.denoise and any(value is not None for value in walk.values()):
        name = next(name for name, value in walk.items() if value is not None)
        raise ValueError(f"--{name} has no meaning without --denoise: add it, or leave --{name} out.")
    greedy = args.temperature == 0
    draws = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    for name in ("top_k", "top_p"):
        if greedy and draws[name] is not None:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is for drawing tokens, --temperature 0 takes the likeliest: leave one out.")
    drawn = any(value is not None for value in draws.values())
    return jobs.sample_text(
        args.model,
        args.prompt,
        recipe,
        args.seed,
        stream=say is print,
        say=say,
        block_streaming=args.block_streaming,
        max_new_tokens=args.max_new_tokens,
        do_sample=False if greedy else (True if drawn else None),
        **draws | ({"temperature": None} if greedy else {}),
        mode="denoise" if args.denoise else None,
        **walk,
    )
