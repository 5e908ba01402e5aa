"""Types and sizes of a config's values, checked before anything is computed from them.

A ``config.json`` may come from anyone. What these checks let through is cheap to build on the meta device, and the rest
of the config's own checks can rely on numbers being numbers.
"""

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from .suggest import as_number

# The largest DiTs and decoders have 100 to 200 layers, images of 4096 x 4096 latents and patches of 2 some 4e6 tokens.
MAX_LAYERS = 16_384
MAX_POSITIONS = 4_194_304
MAX_TIMESTEPS = 1_000_000
# Beyond this, JSON readers disagree on whole numbers.
_MAX_WHOLE = 2**53

_WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", list: "a list"}
_WORDS[dict] = "a mapping"


def check_fields(values: Mapping[str, Any], annotations: Mapping[str, Any]) -> None:
    """Check that fields hold what they are declared to hold.

    Args:
        values: the fields' values.
        annotations: the declared types: ``int``, ``float``, ``str``, ``bool``, ``list`` or ``dict``, or one of them and
            None. Whole numbers are numbers; true and false are not.

    Raises:
        ValueError: naming the field, its value and what it should be.
    """
    for name, annotation in annotations.items():
        kinds = typing.get_args(annotation) or (annotation,)
        if any(_holds(values.get(name), kind) for kind in kinds):
            continue
        words = " or ".join(_WORDS.get(kind, "None") for kind in kinds)
        raise ValueError(f"{name}={_short(values.get(name))} must be {words}.")


def settle(settings: Any, prefix: str = "") -> None:
    """Make the fields of a dataclass, which may come from YAML or a command line, what they are declared to be.

    Numbers given as text (YAML reads ``1e-4`` so) become numbers, and whole ones given with a point become whole. What
    then has another type is an error; whether a number is finite is left to the caller.

    Args:
        settings: the dataclass.
        prefix: before the fields' names in messages, such as ``data.``.

    Raises:
        ValueError: naming the field, its value and what it should be.
    """
    for entry in dataclasses.fields(settings):
        kinds = [typing.get_origin(kind) or kind for kind in _alternatives(entry.type)]
        value = getattr(settings, entry.name)
        if Any in kinds:
            continue
        if str not in kinds and isinstance(value, str):
            value = as_number(value, int if int in kinds else float) if {int, float} & {*kinds} else value
        if int in kinds and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not any(_is(value, kind) for kind in kinds):
            words = " or ".join(_WORDS.get(kind, "None") for kind in kinds)
            raise ValueError(f"{prefix}{entry.name}={_short(value)} must be {words}.")
        setattr(settings, entry.name, value)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types that a union stands for; of another annotation, that alone."""
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _is(value: Any, kind: Any) -> bool:
    """As ``_holds``, but for numbers that are not finite, paths, and sequences that are no lists."""
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, (str, os.PathLike))
    if kind is list:
        return isinstance(value, Sequence) and not isinstance(value, str)
    return _holds(value, kind)


def check_values(name: str, value: Any, depth: int = 0) -> None:
    """Check that everything inside a value is plain, finite and not nested too deeply.

    Raises:
        ValueError: naming the place.
    """
    if depth > 8:
        raise ValueError(f"{name} is nested too deeply: a config has a few levels.")
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_values(f"{name}[{key!r}]", item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check_values(f"{name}[{i}]", item, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value} must be a finite number.")
    elif isinstance(value, int) and abs(value) > _MAX_WHOLE:
        raise ValueError(f"{name}={_short(value)} is absurdly large.")


def check_numbers(name: str, values: list | Mapping[str, Any] | None, kind: type = float) -> None:
    """Check that a list or a mapping holds numbers only.

    Raises:
        ValueError: naming the first entry that is none.
    """
    entries = values.items() if isinstance(values, Mapping) else enumerate(values or ())
    for key, value in entries:
        if not _holds(value, kind):
            raise ValueError(f"{name}[{key!r}]={_short(value)} must be {_WORDS[kind]}.")


def check_number_of_layers(num_layers: Any) -> None:
    """Check that there is a sensible number of layers.

    Raises:
        ValueError: naming the number.
    """
    if not _holds(num_layers, int) or not 1 <= num_layers <= MAX_LAYERS:
        raise ValueError(f"the number of layers, {_short(num_layers)}, must lie between 1 and {MAX_LAYERS}.")


def check_sizes(base_config: Mapping[str, Any], names: Sequence[str], optional: bool = False) -> None:
    """Check that sizes in a base's config, where it has them, are positive whole numbers (or, if optional, None).

    Raises:
        ValueError: naming the size.
    """
    for name in names:
        if optional and base_config.get(name) is None:
            continue
        if name in base_config and not (_holds(base_config[name], int) and base_config[name] >= 1):
            raise ValueError(f"{name}={_short(base_config[name])} must be a whole number of at least 1.")


def check_dtype(dtype: Any) -> None:
    """Check that a dtype is one that weights can have.

    Raises:
        ValueError: naming it.
    """
    known = dtype if dtype is None or isinstance(dtype, torch.dtype) else None
    if isinstance(dtype, str):
        known = torch.float32 if dtype == "auto" else getattr(torch, dtype.removeprefix("torch."), None)
        known = known if isinstance(known, torch.dtype) else None
    if dtype is not None and (known is None or not known.is_floating_point):
        raise ValueError(f"dtype={_short(dtype)} must be a floating-point dtype, such as 'float32' or 'bfloat16'.")


def check_model_type(value: Any, place: Any, allowed: Collection[str]) -> None:
    """Check the ``model_type`` of a config that was written by anyone.

    Args:
        value: of the config.
        place: where it stands, for the message.
        allowed: the types that can be; many are not all named.

    Raises:
        ValueError: naming the value, where it stands, and what is allowed.
    """
    allowed = list(allowed)
    if isinstance(value, str) and value in allowed:
        return
    if len(allowed) <= 5:
        names, near = " or ".join(map(repr, allowed)), []
    else:
        names = "a type that transformers knows, such as 'llama' or 'blocked_dit'"
        near = difflib.get_close_matches(value, allowed, n=1) if isinstance(value, str) else []
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if isinstance(value, str) and value.startswith("blocked_"):
        hint += " A family of your own is known where its module was imported (on the command line --import MODULE)."
    raise ValueError(f"{place} has model_type={_short(value)}, which must be {names}.{hint}")


def _holds(value: Any, kind: Any) -> bool:
    if kind in (None, type(None), types.NoneType):
        return value is None
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is list:
        return isinstance(value, (list, tuple))
    return isinstance(value, kind)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
