"""Versions of this library and of what it stands on, without importing any of it."""

from importlib import metadata

PACKAGES = ("hf-diffusionblocks", "torch", "transformers", "diffusers", "accelerate")


def versions() -> dict[str, str]:
    """The version of each package that is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


__all__ = ["PACKAGES", "versions"]
