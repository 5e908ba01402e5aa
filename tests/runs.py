"""Short training runs for the tests of the trainer."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from devices import ON_CPU
from hf_diffusionblocks import BlockedDiTModel, DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments
from tiny import TinyImages, tiny_dit


def reset_accelerate() -> None:
    """Forget Accelerate's process-wide state, which keeps the first run's precision."""
    AcceleratorState._reset_state(reset_partial_state=True)


def arguments(output_dir: Any, **settings: Any) -> DiffusionBlocksTrainingArguments:
    defaults = {
        "output_dir": str(output_dir),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
        "cpu": ON_CPU,
    }
    return DiffusionBlocksTrainingArguments(**(defaults | settings))


def make_trainer(output_dir: Any, model: BlockedDiTModel | None = None, **settings: Any) -> DiffusionBlocksTrainer:
    """A trainer of a tiny model on tiny images; keyword arguments of the trainer and of its settings mixed."""
    own = {k: settings.pop(k) for k in ("objective", "teacher", "callbacks", "eval_dataset") if k in settings}
    dataset = settings.pop("dataset", None)
    return DiffusionBlocksTrainer(
        tiny_dit(3) if model is None else model,
        arguments(output_dir, **settings),
        TinyImages() if dataset is None else dataset,
        **own,
    )


def updates(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "updates.jsonl").read_text().splitlines()]


def everything(trainer: DiffusionBlocksTrainer) -> dict[int | str, dict[str, Tensor]]:
    """All state by block: weights, buffers, moments, averages, learning rate and counters."""
    result: dict[int | str, dict[str, Tensor]] = {"shared": dict(trainer.model.shared_parameters())}
    for block, one in trainer.trainers.items():
        state = {f"weight {n}": v for n, v in trainer.model.block(block).state_dict().items()}
        state |= {f"buffer {n}": v for n, v in trainer.model.block(block).named_buffers()}
        for number, values in one.optimizer.state_dict()["state"].items():
            state |= {f"{kind} {number}": value for kind, value in values.items()}
        state |= {f"average {n}": v for n, v in one.ema_tensors().items()}
        state["rate"] = torch.tensor(one.lr_scheduler.get_last_lr())
        state["counters"] = torch.tensor([one.updates, one.ema.optimization_step if one.ema else 0])
        result[block] = state
    return {key: {n: v.detach().clone() for n, v in value.items()} for key, value in result.items()}
