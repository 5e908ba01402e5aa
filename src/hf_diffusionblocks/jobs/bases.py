"""Which family a base is cut by, what ``convert`` would make of it, and why another base cannot be cut."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig

from ..base_names import what_can_be_cut
from ..configuration import DiffusionBlocksConfig, read_config
from ..families.base_loading import LOADING, hub_settings
from ..families.dit_conversion import base_preconditioning, find_dit, scheduler_config
from ..families.masked_lm_conversion import mask_token_of
from ..modeling import format_block_parameters
from ..recipes.families import FAMILIES
from ..suggest import unknown_name
from ..units import human_bytes
from .common import Say, family_of

_REFUSALS = ("cannot be cut", "cannot cut", "Unrecognized configuration class", "neither a DiT")


def family_for(base: str, family: str | None, **hub: Any) -> str:
    """The family that a base is cut by: the one asked for, or that of its kind.

    Args:
        base: directory or Hub id of a base.
        family: a name of ``FAMILIES``, or None.
        **hub: where on the Hub it lies.

    Raises:
        ValueError: for a base of no family, or one that the family asked for is not cut from.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(unknown_name("--family", family, FAMILIES))
    own = family_of(base, **hub)
    try:
        values, _ = read_config(base, **hub)
    except (OSError, ValueError):
        values = {}
    of = values.get("model_type") if isinstance(values.get("model_type"), str) else None
    if of in {kind.model_type for kind in FAMILIES.values()}:
        raise ValueError(f"{base} has been cut into blocks already: give the base that it was made from.")
    named = [name for name in values.get("architectures") or () if isinstance(name, str)]
    ends = tuple(end for kind in FAMILIES.values() for end in kind.bases)
    if of in CONFIG_MAPPING and named and not any(name.endswith(ends) for name in named):
        raise ValueError(f"{base} holds a {named[0]}, which is of no family that can be cut. {what_can_be_cut()}")
    if family is None or family == own:
        return own
    if FAMILIES[family].bases_of != own:
        allowed = [own, *(name for name, kind in FAMILIES.items() if kind.bases_of == own)]
        raise ValueError(
            f"--family {family} is not cut from {base}, which is of family {own}: leave --family out, or give "
            f"{' or '.join(allowed)}. {what_can_be_cut()}"
        )
    return family


@contextlib.contextmanager
def refusals_name_the_families() -> Iterator[None]:
    """Add what can be cut to an error that says that a base cannot."""
    try:
        yield
    except ValueError as error:
        text = " ".join(str(error).split())
        if not any(words in text for words in _REFUSALS) or what_can_be_cut() in text:
            raise
        if "Unrecognized configuration class" in text:  # followed by all classes that transformers has
            text = text.partition(" for this kind of AutoModel")[0] + "."
        raise ValueError(f"{text} {what_can_be_cut()}") from error


def converted_config(base: str, family: str, settings: dict[str, Any]) -> DiffusionBlocksConfig:
    """The config that ``convert`` would write, from the base's config alone.

    Raises:
        ValueError: for settings that are not allowed, or a base that cannot be read.
    """
    hub, kind = hub_settings(settings), FAMILIES[family].model_class
    given = {name: value for name, value in settings.items() if name not in LOADING}
    if family == "dit":
        _, config = find_dit(base, **hub)
        return kind.config_from(config, **base_preconditioning(given, scheduler_config(base, **hub)))
    try:
        config = AutoConfig.from_pretrained(base, **hub)
    except OSError as error:
        raise ValueError(f"{base} cannot be loaded: {error}") from error
    if FAMILIES[family].hides_tokens:
        given.setdefault("mask_token_id", mask_token_of(base, hub))
    return kind.config_from(config, pretrained=True, **given)


def preview(base: str, output_dir: str, family: str, settings: dict[str, Any], say: Say) -> dict[str, Any]:
    """``diffusionblocks convert --dry-run``: what would be written, without loading a weight.

    Returns:
        Family, layers per block, parameters, bytes and directory, for ``--json``.
    """
    config = converted_config(base, family, settings)
    with torch.device("meta"):
        model = FAMILIES[family].model_class(config)
    named = settings.get("dtype")
    dtype = getattr(torch, str(named), None) if named not in (None, "auto") else None
    size = (dtype or torch.float32).itemsize
    count = sum(p.numel() for p in model.parameters())
    layers = list(config.layers_per_block)
    say(f"{base} is cut by family {family}: {config.num_layers} layers in {config.num_blocks} block(s) of {layers}")
    say(format_block_parameters(model))
    say(
        f"dry run: would write {count:,} parameters, {human_bytes(count * size)} in "
        f"{str(dtype or torch.float32).removeprefix('torch.')}, to {Path(output_dir)}; nothing was loaded or written."
    )
    return {
        "model": str(Path(output_dir)),
        "family": family,
        "layers_per_block": layers,
        "parameters": count,
        "bytes": count * size,
        "dry_run": True,
    }


__all__ = ["converted_config", "family_for", "preview", "refusals_name_the_families"]
