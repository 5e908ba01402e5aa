"""``diffusionblocks convert`` of transformers' models: cut one into blocks and save it with what belongs beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..families.base_loading import hub_settings
from ..modeling import BlockedPreTrainedModel, format_block_parameters
from .common import Say, new_directory


def convert_base(
    kind: type[BlockedPreTrainedModel],
    base: str,
    output_dir: str,
    settings: dict[str, Any],
    *,
    beside: str,
    save_beside: Callable[..., None],
    parts: Callable[..., list[str]] = lambda model: [],
    say: Say = print,
) -> Path:
    """Cut a pretrained model into blocks and save it.

    Args:
        kind: of the blocked model.
        base: directory or Hub id.
        output_dir: a new directory.
        settings: of the blocks, and of loading.
        beside: what belongs beside the model, in words.
        save_beside: loads it from the base, with keywords for the Hub, and saves it in a directory; what cannot be
            loaded is said, and no more.
        parts: lines that name a model's parts besides its blocks.
        say: prints.

    Raises:
        ValueError: if the base cannot be loaded or cut.
    """
    target, hub = new_directory(output_dir), hub_settings(settings)
    if PreTrainedConfig.get_config_dict(base, **hub)[0].get("model_type") == kind.config_class.model_type:
        raise ValueError(f"{base} has been cut into blocks already: give the base that it was made from.")
    try:
        model = kind.from_base(base, **settings)
    except OSError as error:
        raise ValueError(f"{base} cannot be loaded: {error}") from error
    model.save_pretrained(target)
    try:
        save_beside(base, target, **hub)
    except (OSError, ValueError, KeyError, ImportError) as error:
        say(f"no {beside} could be loaded from {base} ({' '.join(str(error).split())}): none was saved.")
    for line in (format_block_parameters(model), *parts(model), f"saved in {target}"):
        say(line)
    return target
