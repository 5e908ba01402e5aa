"""One way to say that a name is not known: the value, the nearest allowed one, all allowed ones."""

import difflib
from collections.abc import Iterable


def as_number(text: str, kind: type = float) -> object:
    """A number that was given as text, as YAML reads ``1e-4``; other text comes back as it is.

    Example:
        >>> as_number("1e-3"), as_number("2e3", int), as_number("many", int)
        (0.001, 2000, 'many')
    """
    try:
        value = float(text)
    except ValueError:
        return text
    if kind is int:
        return int(value) if value.is_integer() else text
    return value


def unknown_name(what: str, name: object, allowed: Iterable[object]) -> str:
    """Message for an unknown name.

    Example:
        >>> unknown_name("partition", "unifrm", ["uniform", "explicit"])
        "unknown partition 'unifrm': did you mean 'uniform'? Allowed: explicit, uniform."
    """
    names = sorted(str(a) for a in allowed)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {str(name)!r}: {hint}Allowed: {', '.join(names) or 'none'}."
