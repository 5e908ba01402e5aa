"""Bytes and times as people read them."""


def human_bytes(count: float) -> str:
    """Bytes in binary units with three digits.

    Example:
        >>> human_bytes(1536), human_bytes(356515840)
        ('1.5 KiB', '340 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 999.5 or unit == "TiB":
            return f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def human_seconds(seconds: float) -> str:
    """A time in the two largest units of it.

    Example:
        >>> human_seconds(3.14), human_seconds(125), human_seconds(7260), human_seconds(100_000)
        ('3.1 s', '2 min 5 s', '2 h 1 min', '1 d 3 h')
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for size, unit, next_size, next_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // next_size
            return f"{whole // size} {unit}" + (f" {rest} {next_unit}" if rest else "")
    raise AssertionError("unreachable")


__all__ = ["human_bytes", "human_seconds"]
