"""The optimizers that a run can choose by ``optim``, and their step inside the backward pass.

``adamw_torch_fused`` and ``adamw_torch`` (foreach) are torch's AdamW; ``adafactor`` is ``torch.optim.Adafactor``, whose
learning rate is relative to a parameter's size and which has no first moment; ``adamw_8bit`` is bitsandbytes'
AdamW8bit, whose moments have eight bits and a scale per 256 values.

With gradient release (``gradient_release``; LOMO, arXiv 2306.09782, does so with plain SGD) each parameter is updated
as soon as the backward pass has its gradient, which is freed at once. Autograd does not need the old values any more: a
gradient is complete when every use of its parameter has been passed. All optimizers here update each parameter by
itself, so the weights are the same, bit for bit.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .arguments import DiffusionBlocksTrainingArguments

# bitsandbytes keeps the moments of parameters of so many elements in eight bits, with a float32 scale per group of 256;
# those of smaller ones in float32.
_SMALLEST_QUANTISED, _GROUP = 4096, 256


def make_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], args: DiffusionBlocksTrainingArguments
) -> torch.optim.Optimizer:
    """The optimizer of ``args.optim``. Weight decay is for parameters of two dimensions and more.

    Raises:
        ValueError: if its library is missing, or for an entry of ``optim_args`` that it does not take.
    """
    parameters = [p for _, p in named_parameters]
    groups = []
    for sharded in (False, True):  # kernels take whole parameters, or shards, but not both at once
        mine = [p for p in parameters if isinstance(p, DTensor) is sharded]
        if mine or not sharded:
            groups.append({"params": [p for p in mine if p.ndim > 1], "weight_decay": args.weight_decay})
            groups.append({"params": [p for p in mine if p.ndim <= 1], "weight_decay": 0.0})
    settings: dict[str, Any] = {"lr": args.learning_rate}
    if args.optim == "adafactor":
        make = torch.optim.Adafactor
    else:
        make = torch.optim.AdamW
        settings |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optim == "adamw_torch_fused":
        settings["fused"] = all(p.device.type in ("cpu", "cuda") for p in parameters)
    elif args.optim == "adamw_torch":
        settings["foreach"] = True
    elif args.optim == "adamw_8bit":
        make = _adamw_8bit()
    taken = sorted(args.optim_args.keys() & {"params", "weight_decay", *settings})
    if taken:
        raise ValueError(
            f"optim_args={args.optim_args} has {', '.join(taken)}, which other arguments set: leave it out and use "
            "learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon or optim."
        )
    try:
        return make(groups, **settings, **args.optim_args)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"optim={args.optim!r} cannot be made with optim_args={args.optim_args}: {error}. Give what "
            f"{make.__module__.partition('.')[0]}'s {make.__name__.lstrip('_')} takes."
        ) from error


def _adamw_8bit() -> type[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"optim='adamw_8bit' needs bitsandbytes ({error}): pip install 'hf-diffusionblocks[optim]', or set "
            "optim='adafactor'."
        ) from error
    return AdamW8bit


def check_optimizer(optim: str, optim_args: Mapping[str, Any]) -> None:
    """Make the optimizer of one small parameter, for a plan. An 8-bit one whose library is missing is not checked.

    Raises:
        ValueError: for an entry of ``optim_args`` that it does not take.
    """
    if not optim_args or (optim == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None):
        return
    args = DiffusionBlocksTrainingArguments(optim=optim, optim_args=dict(optim_args))
    make_optimizer([("weight", nn.Parameter(torch.zeros(2, 2)))], args)


def state_bytes(
    optim: str, shape: Sequence[int], dtype: torch.dtype, optim_args: Mapping[str, Any] | None = None
) -> int:
    """Bytes that an optimizer's state of one parameter takes, with its counter (in torch a tensor of four bytes).

    Of ``optim_args``, ``amsgrad`` of torch's AdamW is a third moment, and ``min_8bit_size`` of the 8-bit one says which
    parameters are too small to be quantised.
    """
    given = optim_args or {}
    count = math.prod(shape)
    size = count * dtype.itemsize
    if optim == "adafactor":
        rows_and_columns = (count // shape[-1] + count // shape[-2]) * dtype.itemsize if len(shape) > 1 else size
        return rows_and_columns + 4
    if optim == "adamw_8bit":
        smallest = given.get("min_8bit_size", _SMALLEST_QUANTISED)
        return 2 * (4 * count if count < smallest else count + 4 * math.ceil(count / _GROUP))
    return (3 if given.get("amsgrad") else 2) * size + 4


def plain_tensors(value: Any) -> Iterator[Tensor]:
    """The ordinary tensors that hold a value of an optimizer's state: a quantised one is made of several."""
    if not isinstance(value, Tensor):
        return
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(value, name))
    else:
        yield value


class GradientRelease:
    """A context in which the backward pass updates each parameter, and frees its gradient, as soon as it has it.

    Args:
        optimizer: of the parameters; its state is that of ordinary steps.
        average: averages a parameter's gradient over the processes that train it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, average: Callable[[Tensor], None] | None = None):
        self.optimizer, self._average = optimizer, average
        self._groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        self._norms: dict[Tensor, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "GradientRelease":
        self._hooks = [p.register_post_accumulate_grad_hook(self._update) for p in self._groups]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _update(self, parameter: Tensor) -> None:
        if self._average is not None:
            self._average(parameter)
        self._norms[parameter] = torch.nn.utils.get_total_norm([parameter.grad])
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [self._groups[parameter] | {"params": [parameter]}]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
        parameter.grad = None

    def total_norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """The norm of the gradient of all parameters, as ``torch.nn.utils.get_total_norm`` gives it."""
        norms = [self._norms[p] for p in parameters if p in self._norms]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


__all__ = ["GradientRelease", "check_optimizer", "make_optimizer", "plain_tensors", "state_bytes"]
