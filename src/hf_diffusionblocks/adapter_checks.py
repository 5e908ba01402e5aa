"""Adapters that a model holds beside its weights: where they are, and what cannot be done before they are merged.

peft is not imported: if it has not been, there is no adapter.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

# Of an adapter's settings, what does not change what is trained.
_ELSEWHERE = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")


def adapted_blocks(blocks: nn.ModuleDict) -> tuple[int, ...]:
    """Numbers of the blocks with an adapter that is not merged, ascending."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return ()
    return tuple(
        sorted(
            int(b) for b, block in blocks.items() if any(isinstance(m, tuners.BaseTunerLayer) for m in block.modules())
        )
    )


def check_no_adapter(blocks: nn.ModuleDict, task: str, among: Sequence[int] | None = None) -> None:
    """Refuse what takes a block's weights by their own names, while an adapter's stand beside them.

    Args:
        blocks: a model's, under their numbers.
        task: what is refused, such as ``save``.
        among: look at these blocks only.

    Raises:
        ValueError: naming the block, how to merge its adapter, and how to save it alone.
    """
    found = [b for b in adapted_blocks(blocks) if among is None or b in among]
    if found:
        raise ValueError(
            f"cannot {task}: block {found[0]} holds an adapter that is not merged, so its weights do not have the "
            f"model's names. Merge it first, with merge_block_adapter(model, {found[0]}), or save it alone, with "
            f"save_block_adapter(model, {found[0]}, directory); both are in hf_diffusionblocks.adapters."
        )


def blocks_of_keys(keys: Iterable[str]) -> tuple[int, ...]:
    """Numbers of the blocks that names in a state dict belong to, of those that an adapter has renamed."""
    named = (key.split(".") for key in keys if key.startswith("blocks.") and ".base_layer." in key)
    return tuple(sorted({int(pieces[1]) for pieces in named}))


def adapter_settings(blocks: nn.ModuleDict) -> dict[str, Any]:
    """What each block's adapters are, by block and name, as JSON has it: a run goes on with the same ones only."""
    found: dict[str, Any] = {}
    for block in adapted_blocks(blocks):
        for name, config in sorted(getattr(blocks[str(block)], "peft_config", {}).items()):
            given = {
                k: v for k, v in config.to_dict().items() if k not in _ELSEWHERE and v not in (None, False, [], {})
            }
            found[f"block {block}, {name!r}"] = json.loads(json.dumps(given, default=_plain, sort_keys=True))
    return found


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


__all__ = ["adapted_blocks", "adapter_settings", "blocks_of_keys", "check_no_adapter"]
