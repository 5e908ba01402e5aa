"""What the scripts that time steps share: ratios within one run, and an update in plain PyTorch to compare with."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_diffusionblocks import DiffusionBlocksTrainingArguments

Rounds = list[dict[str, float]]


def seconds(function: Callable[[], Any]) -> float:
    """Time of a call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def timed_rounds(functions: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> Rounds:
    """Seconds of each function, all in turn, round by round, so that a drift of the machine's speed cancels in ratios.

    Args:
        functions: by name.
        rounds: how many.
        warm_up: calls of each before.
    """
    for function in functions.values():
        for _ in range(warm_up):
            function()
    return [{name: seconds(function) for name, function in functions.items()} for _ in range(rounds)]


def median(rounds: Rounds, figure: Callable[[dict[str, float]], float]) -> float:
    """The median over rounds of a figure of each."""
    return statistics.median(figure(row) for row in rounds)


def silent_arguments(batch: int, **settings: Any) -> DiffusionBlocksTrainingArguments:
    """Arguments of a trainer that will never be asked to write anything."""
    return DiffusionBlocksTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        logging_steps=10**6,
        disable_tqdm=True,
        **settings,
    )


def bare_loop(
    parameters: Iterable[nn.Parameter], data: Any, batch: int, loss: Callable[[dict[str, Tensor]], Tensor]
) -> Callable[[], None]:
    """The arithmetic of one update in plain PyTorch: loss, backward, clip, AdamW, moving average.

    Args:
        parameters: that train.
        data: ``data[list of rows]`` is a batch.
        batch: rows per update.
        loss: of a batch.

    Returns:
        A function that makes an update with the next rows.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    shadow = [p.detach().clone() for p in parameters]
    position = 0

    def step() -> None:
        nonlocal position
        rows = [(position + i) % len(data) for i in range(batch)]
        position += batch
        loss(data[rows]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_sub_(shadow, torch._foreach_sub(shadow, parameters), alpha=0.01)

    return step
