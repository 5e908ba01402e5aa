"""How a base that is named by a directory or a Hub id is loaded."""

import os
from collections.abc import Mapping
from typing import Any

from ..config_checks import check_dtype

HUB = ("revision", "token", "cache_dir")
LOADING = ("dtype", *HUB)


def hub_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``from_base``'s settings that say where on the Hub a base lies."""
    return {name: settings[name] for name in HUB if name in settings}


def part_settings(base: Any, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of ``from_base`` in two: how to load the base, and fields of the blocked model's config.

    Raises:
        ValueError: for settings of loading where nothing is loaded, or a dtype that weights cannot have.
    """
    loading = {name: settings[name] for name in LOADING if name in settings}
    if loading and not isinstance(base, (str, os.PathLike)):
        raise ValueError(
            f"{', '.join(loading)}: no setting for a base that is given as a {type(base).__name__}, only for one that "
            "is loaded by name. Convert it before (.to(torch.bfloat16)), or the blocked model afterwards."
        )
    named = os.fspath(base) if isinstance(base, (str, os.PathLike)) else ""
    if (named.startswith((".", "/", "~")) or named.count("/") > 1) and not os.path.isdir(named):
        raise ValueError(f"there is no directory {named}: give a pretrained model's directory or its id on the Hub.")
    check_dtype(loading.get("dtype"))
    return loading, {name: value for name, value in settings.items() if name not in LOADING}
