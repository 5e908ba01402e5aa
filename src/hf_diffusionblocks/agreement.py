"""Whether saved blocks belong to one model, and what differs if they do not."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

# Blocks belong to one model if their configs agree on these.
SAME_MODEL = (
    "model_type",
    "dtype",
    "base_class",
    "base_config",
    "base_revision",
    "num_blocks",
    "layers_per_block",
    "noise",
    "edges",
    "overlap",
    "preconditioning",
    "sigma_data",
    "noise_scale",
    "noise_schedule",
    "mask_token_id",
    "schedule",
    "time_conditioning",
)
# Settings of a config that say where and when it was written, or what was done so far, and not which model it is.
HISTORY = ("transformers_version", "_name_or_path", "base_model", "trained_blocks")


def first_difference(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], names: Collection[str] | None = None
) -> tuple[str, Any, Any] | None:
    """The first setting in which two configs differ.

    Args:
        theirs: one config as a mapping.
        ours: the other.
        names: the settings to compare; all but ``HISTORY`` by default.

    Returns:
        Its name (``base_config['num_layers']`` inside a mapping) and both values; None if there is no difference.
    """
    if names is None:
        names = [name for name in sorted(theirs.keys() | ours.keys()) if name not in HISTORY]
    for name in names:
        a, b = theirs.get(name), ours.get(name)
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            key = next(k for k in sorted(a.keys() | b.keys(), key=str) if a.get(k) != b.get(k))
            return f"{name}[{key!r}]", a.get(key), b.get(key)
        return name, a, b
    return None


def weights_digest(weights: Mapping[str, Tensor]) -> str | None:
    """SHA-256 of weights under their names, hexadecimal; None for weights without content (on the meta device)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        if tensor.device.type == "meta":
            return None
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hub_name(base: Any) -> str | None:
    """The Hub id of a base that was named by one; None for a directory or an object."""
    if not isinstance(base, str) or Path(base).exists():
        return None
    try:
        validate_repo_id(base)
    except HFValidationError:
        return None
    return base
