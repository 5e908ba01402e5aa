"""JSON as RFC 8259 has it: no NaN and no infinity, which Python's ``json`` writes and other readers refuse.

Figures may be unknown (the standard error of a single row, the distinct pairs of a text of one word): ``known`` makes
these null. What a run goes on from must not have such values: ``to_json`` refuses them and names the place.
"""

import json
import math
from collections.abc import Mapping
from typing import Any


def known(value: Any) -> Any:
    """The value with None for every float that is NaN or infinite, at any depth.

    Example:
        >>> known({"standard_error": float("nan"), "shares": (0.5, float("inf"))})
        {'standard_error': None, 'shares': [0.5, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: known(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [known(entry) for entry in value]
    return value


def to_json(value: Any, **layout: Any) -> str:
    """JSON text.

    Args:
        value: to write.
        **layout: for ``json.dumps``, such as ``indent``.

    Raises:
        ValueError: naming the first value that is NaN or infinite.
    """
    try:
        return json.dumps(value, allow_nan=False, **layout)
    except ValueError as error:
        place = _not_finite(value, "")
        if place is None:
            raise
        raise ValueError(
            f"{place}: JSON has no NaN and no infinity. Give a finite number, or None where there is none."
        ) from error


def _not_finite(value: Any, place: str) -> str | None:
    """Where the first float that is not finite stands, and its value."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{place or 'the value'} is {value}"
    entries: Any = ()
    if isinstance(value, Mapping):
        entries = ((f"{place}.{name}" if place else str(name), entry) for name, entry in value.items())
    elif isinstance(value, (list, tuple)):
        entries = ((f"{place}[{i}]", entry) for i, entry in enumerate(value))
    return next((found for name, entry in entries if (found := _not_finite(entry, name)) is not None), None)


__all__ = ["known", "to_json"]
