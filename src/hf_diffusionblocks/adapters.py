"""Adapters per block (LoRA, arXiv 2106.09685, and what else peft injects): train, save, load and merge one block's.

An adapter belongs to one block and is trained as the block is: alone, by the block's own loss on its own noise range,
so B people can train B adapters that never meet before sampling. Besides the frozen block a step then holds gradients
and moments of the adapter only::

    from peft import LoraConfig
    from hf_diffusionblocks.adapters import add_block_adapter, merge_block_adapter, save_block_adapter

    model = BlockedDiTModel.from_pretrained("blocked-sd3", blocks=[1])
    add_block_adapter(model, 1, LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    trainer = DiffusionBlocksTrainer(model, DiffusionBlocksTrainingArguments("run", blocks=[1]), dataset)
    trainer.train()
    with trainer.averaged_weights():
        save_block_adapter(model, 1, "adapters")

Of a language model, ``train_shared="none"`` in the training arguments keeps the embedding as it is too.

Elsewhere ``load_block_adapter(model, 1, "adapters")`` puts it into its block, and ``merge_block_adapter`` into the
block's weights, after which the model is saved and pushed as any other. (A model that holds an adapter beside its
weights has other names than its config promises: ``save_pretrained``, ``save_model`` and ``to_base`` refuse it. The
trainer's checkpoints hold the adapters, and a run goes on with the same ones only.)

On disk a block's adapter is a folder ``block-NN`` in peft's own format (``PeftModel.from_pretrained`` puts it on
``model.to_base(block=b)`` too) and ``block_adapter.json``: the block, what its model must agree on, and hashes.

peft is not needed for anything else: ``pip install peft``.
"""

import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import serialization
from .agreement import SAME_MODEL, first_difference
from .modeling import BlockedPreTrainedModel

if TYPE_CHECKING:
    from peft import PeftConfig

CARD_NAME = "block_adapter.json"
_CONFIG_NAME, _WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of every name in peft's files
# What an adapter's model must agree on with the one it is put on; a cast to another dtype does not matter.
_AGREE = tuple(name for name in SAME_MODEL if name != "dtype")


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"adapters need peft ({error}): pip install 'hf-diffusionblocks[adapters]'.") from error
    return peft


def adapter_folder(directory: str | os.PathLike, block: int) -> Path:
    """Where a block's adapter lies in a directory of adapters."""
    return Path(directory) / Path(serialization.block_file(block)).stem


def add_block_adapter(
    model: BlockedPreTrainedModel, block: int, adapter_config: "PeftConfig", adapter_name: str = "default"
) -> int:
    """Put a new adapter on a block and freeze the block's own weights. It changes nothing before it is trained.

    Args:
        model: the blocked model; other blocks stay as they are.
        block: a loaded block.
        adapter_config: peft's, such as ``LoraConfig(r=8, target_modules=["to_q", "to_v"])``.
        adapter_name: to tell several on one block apart.

    Returns:
        The number of parameters that the block now trains.

    Raises:
        ValueError: without peft, for a block that is not loaded or has an adapter of that name, if blocks are streamed,
            or for modules that the block does not have.
    """
    peft = _peft()
    module = _block(model, block)
    if adapter_name in getattr(module, "peft_config", {}):
        raise ValueError(f"block {block} has an adapter {adapter_name!r} already: choose another adapter_name.")
    if not isinstance(adapter_config, peft.PeftConfig):
        raise ValueError(f"adapter_config is a {type(adapter_config).__name__}: give one of peft, such as LoraConfig.")
    peft.inject_adapter_in_model(adapter_config, module, adapter_name)
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def save_block_adapter(
    model: BlockedPreTrainedModel, block: int, directory: str | os.PathLike, adapter_name: str = "default"
) -> Path:
    """Write a block's adapter into ``directory/block-NN``, which appears complete or not at all.

    Args:
        model: the blocked model.
        block: the block with the adapter.
        directory: of adapters; those of other blocks stay.
        adapter_name: which one.

    Returns:
        The folder.

    Raises:
        ValueError: if the block has no such adapter.
        OSError: if the disk is full; an adapter that was there before stays.
    """
    peft = _peft()
    module = _adapted(model, block, adapter_name)
    weights = peft.get_peft_model_state_dict(module, adapter_name=adapter_name, save_embedding_layers=False)
    target = adapter_folder(directory, block)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        staging = Path(temporary) / target.name
        staging.mkdir()
        serialization.write_tensors(staging / _WEIGHTS_NAME, {_PREFIX + key: value for key, value in weights.items()})
        module.peft_config[adapter_name].save_pretrained(staging)
        card = {
            "block": block,
            "model": _identity(model),
            "sha256": {name: serialization.sha256(staging / name) for name in (_CONFIG_NAME, _WEIGHTS_NAME)},
        }
        serialization.write_json(staging / CARD_NAME, card)
        serialization.remove_tree(target)
        os.replace(staging, target)
    return target


def load_block_adapter(
    model: BlockedPreTrainedModel,
    block: int,
    directory: str | os.PathLike,
    adapter_name: str = "default",
    trainable: bool = False,
) -> None:
    """Put a saved adapter on its block.

    Args:
        model: a blocked model that agrees with the adapter's in base, layers and noise ranges.
        block: the block; the adapter must have been trained on it.
        directory: as given to ``save_block_adapter``.
        adapter_name: the name that it gets here.
        trainable: go on training it; otherwise it is frozen, as the block is.

    Raises:
        ValueError: for an adapter that is missing, broken or of another block or model.
    """
    peft = _peft()
    module = _block(model, block)
    folder = adapter_folder(directory, block)
    weights = {key.removeprefix(_PREFIX): value for key, value in _read(model, block, folder).items()}
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not trainable
    if adapter_name in getattr(module, "peft_config", {}):
        raise ValueError(f"block {block} has an adapter {adapter_name!r} already: choose another adapter_name.")
    peft.inject_adapter_in_model(config, module, adapter_name)
    wanted = peft.get_peft_model_state_dict(module, adapter_name=adapter_name, save_embedding_layers=False)
    shapes, found = ({key: tuple(t.shape) for key, t in part.items()} for part in (wanted, weights))
    if shapes != found:
        odd = next(k for k in sorted(shapes.keys() | found.keys()) if shapes.get(k) != found.get(k))
        _remove(module, adapter_name)
        raise ValueError(
            f"the adapter in {folder} does not fit block {block}: {odd!r} has shape {found.get(odd)} there and "
            f"{shapes.get(odd)} here. Load it on the model that it was trained on."
        )
    peft.set_peft_model_state_dict(module, weights, adapter_name=adapter_name)


def merge_block_adapter(model: BlockedPreTrainedModel, block: int, adapter_name: str = "default") -> None:
    """Add an adapter to its block's weights and take it off: the block then is an ordinary one, and trains as such.

    Args:
        model: the blocked model.
        block: the block with the adapter.
        adapter_name: which one.

    Raises:
        ValueError: if the block has no such adapter, another one besides, or the merged weights are not finite.
    """
    module = _adapted(model, block, adapter_name)
    others = sorted(module.peft_config.keys() - {adapter_name})
    if others:
        raise ValueError(f"block {block} has the adapters {others} besides: merge into a model that holds one alone.")
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in [m for m in module.modules() if isinstance(m, BaseTunerLayer)]:
        layer.merge(safe_merge=True, adapter_names=[adapter_name])
    _remove(module, adapter_name)


def _remove(module: nn.Module, adapter_name: str) -> None:
    """Take an adapter's layers out of a block; with its last one, the block is as it was before the first."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    del module.peft_config[adapter_name]
    for name, layer in [(n, m) for n, m in module.named_modules() if isinstance(m, BaseTunerLayer)]:
        if module.peft_config:
            layer.delete_adapter(adapter_name)
        else:
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, layer.get_base_layer())
    if not module.peft_config:
        del module.peft_config
        module.requires_grad_(True)


def _read(model: BlockedPreTrainedModel, block: int, folder: Path) -> dict[str, Tensor]:
    """An adapter's weights, after checking that its files are whole and that it belongs to the block of this model."""
    if not (folder / CARD_NAME).is_file():
        raise ValueError(f"{folder} holds no adapter of block {block}: {CARD_NAME} is missing. Save or copy it again.")
    card = serialization.read_json(folder / CARD_NAME)
    if card.get("block") != block:
        raise ValueError(
            f"the adapter in {folder} is of block {card.get('block')!r}, which has other layers and noise levels than "
            f"block {block}."
        )
    hashes = card.get("sha256")
    for name in (_CONFIG_NAME, _WEIGHTS_NAME):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: copy or download the adapter again.")
        if not isinstance(hashes, dict) or serialization.sha256(path) != hashes.get(name):
            raise ValueError(f"{path} is corrupted: its SHA-256 is not the one in {CARD_NAME}. Download it again.")
    theirs = card.get("model")
    difference = first_difference(theirs if isinstance(theirs, dict) else {}, _identity(model), _AGREE)
    if difference is not None:
        name, value, ours = difference
        raise ValueError(
            f"the adapter in {folder} belongs to another model: its {name} is {value!r}, this one's {ours!r}."
        )
    return serialization.read_tensors(folder / _WEIGHTS_NAME)


def _identity(model: BlockedPreTrainedModel) -> dict[str, Any]:
    config = model.config.to_dict()
    return {name: config[name] for name in _AGREE if name in config}


def _block(model: BlockedPreTrainedModel, block: int) -> nn.Module:
    model.check_loaded(block)
    if model.streamer is not None:
        raise ValueError("adapters are put on blocks that rest in one place: call disable_block_streaming() first.")
    return model.block(block)


def _adapted(model: BlockedPreTrainedModel, block: int, adapter_name: str) -> nn.Module:
    model.check_loaded(block)
    module = model.block(block)
    names = sorted(getattr(module, "peft_config", {}))
    if adapter_name not in names:
        raise ValueError(f"block {block} has no adapter {adapter_name!r}; it has {names or 'none'}.")
    return module


__all__ = ["add_block_adapter", "adapter_folder", "load_block_adapter", "merge_block_adapter", "save_block_adapter"]
