"""What a step of each way to fine-tune SmolLM2 holds, in bytes by kind, and its FLOPs, for smollm2.py.

Counted on a step in float32 without autocast, 1 row of 256 tokens, of the real modules on fake tensors, which have
shapes but no memory. "Weights" are those of the whole model, which
every way here holds in memory; ``streamed_weights`` are what a job needs at a time: its block, the token embeddings and
one other layer, passed through. FLOPs are ``torch.utils.flop_counter``'s, attention by its mathematical definition.
"""

from collections.abc import Callable
from typing import Any

import torch
from smollm2_arms import BATCH, LAYERS, LENGTH, Above
from smollm2_rivals import adamw, badam_of, loss_of, make_rival, with_adapters
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from hf_diffusionblocks import BlockedForCausalLM
from hf_diffusionblocks.memory_counting import MemoryUse, SavedTensors, held_bytes, state_of
from hf_diffusionblocks.memory_fake_steps import AnyValue
from hf_diffusionblocks.modeling import enable_checkpointing
from hf_diffusionblocks.objectives import NextTokenPrediction


def freeze_others(model: Any, blocks: list[int], recompute: bool = False) -> None:
    """The gradient passes through the blocks above and changes nothing there.

    Args:
        model: a blocked model.
        blocks: those that train.
        recompute: keep no activations of the other blocks' layers but their inputs.
    """
    model.requires_grad_(False)
    for number in model.resident_blocks:
        own = number in blocks
        model.block(number).requires_grad_(own)
        if recompute and not own:
            enable_checkpointing(model.block(number).model, preserve_rng_state=False)  # there is no dropout


def measure(loss: Callable[[], Tensor], modules: list[Any], optimizer: torch.optim.Optimizer) -> MemoryUse:
    """One update with learning rate 0."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with SavedTensors(modules) as saved:
        loss().backward()
    gradients = held_bytes(p.grad for p in parameters if p.grad is not None)
    if gradients == 0:  # freed one by one in the backward pass: the tied embeddings' lives through all of it
        sizes = sorted(p.numel() * p.element_size() for p in parameters)
        gradients = sum(sizes[-2:])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    moments = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    return MemoryUse(
        weights=held_bytes(tensor for module in modules for tensor in state_of(module)),
        gradients=gradients,
        moments=held_bytes(moments),
        ema=0,
        activations=saved.peak,
    )


def flops(loss: Callable[[], Tensor], modules: list[Any]) -> int:
    """Of the forward and backward pass of one update."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss().backward()
    for module in modules:
        module.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def blocked(config: Any, blocks: int, block: int, path: str, *, layers: bool = False, **settings: Any) -> dict:
    """A job of one block.

    Args:
        config: the base's.
        blocks: B.
        block: which.
        path: ``exact`` (through the blocks above), ``emulator`` (through every 4th layer of the base), ``local``.
        layers: recompute the own layers as well.
        **settings: of the blocked model.
    """
    settings = {"auxiliary_layers": 0, "layers_per_block": [LAYERS // blocks] * blocks, "pretrained": True, **settings}
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        model = BlockedForCausalLM(BlockedForCausalLM.config_from(config, blocks, **settings)).train()
    with FakeTensorMode(allow_non_fake_inputs=True), AnyValue():
        base.to_empty(device="cpu")
        model.to_empty(device="cpu")
        modules = [model]
        freeze_others(model, [block], recompute=True)
        if blocks == 1:
            model.requires_grad_(True)
        if layers:
            enable_checkpointing(model, preserve_rng_state=False)
        objective: Any = NextTokenPrediction() if path == "local" else Above(base, keep=4 if path == "emulator" else 0)
        if path == "emulator":
            above = range(model.partition.layers(block)[-1] + 1, LAYERS)
            modules += [base.model.layers[i] for i in sorted({*above[3::4], *above[-1:]})]
        batch = {"input_ids": torch.zeros(BATCH, LENGTH, dtype=torch.int64)}
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)

        def loss() -> Tensor:
            return objective(model, block, batch, None).loss

        use = measure(loss, modules, optimizer)
        own = held_bytes(state_of(model.block(block))) + model.embed_tokens.weight.nbytes
        layer = held_bytes(state_of(model.block(block).model.layers[0])) if blocks > 1 else 0
        return use.to_dict() | {"streamed_weights": own + layer, "flops": flops(loss, modules)}


def rival(config: Any, checkpointing: bool = False, **settings: Any) -> dict:
    """A step of another method; of BAdam, on its first block, whose gradient has the longest way."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        model = with_adapters(base, settings["rank"]) if settings["name"] == "lora" else base
    with FakeTensorMode(allow_non_fake_inputs=True), AnyValue():
        model.to_empty(device="cpu")
        base.tie_weights()
        if settings["name"] == "lora":
            optimizer = adamw((p for p in model.parameters() if p.requires_grad), 0.0)
        else:
            _, optimizer = make_rival(settings, base, 0.0)
        if optimizer is None:
            blocks = badam_of(base, settings["blocks"], 1, 0.0)
            blocks.activate([0])
            optimizer = blocks.optimizer
        if checkpointing:
            base.enable_input_require_grads()
            enable_checkpointing(base, preserve_rng_state=False)
        batch = {"input_ids": torch.zeros(BATCH, LENGTH, dtype=torch.int64)}

        def loss() -> Tensor:
            return loss_of(base, batch)

        use = measure(loss, [model], optimizer)
        return use.to_dict() | {"streamed_weights": use.weights, "flops": flops(loss, [model])}


# What stands between a block and the loss: auxiliary layers (the base's next), or every so many of the layers above.
TARGETS = {
    "norm and head": {"auxiliary_layers": 0},
    "1 auxiliary layer": {"auxiliary_layers": 1},
    "2 auxiliary layers": {"auxiliary_layers": 2},
    "every 4th layer above": {"keep": 4},
    "every 2nd layer above": {"keep": 2},
}


def alignment(make_base: Callable[[], Any], rows: Tensor) -> list[dict]:
    """How far each local target's gradient points where that of the whole network does, at the base's weights.

    Args:
        make_base: loads the base.
        rows: [rows, tokens] of the text to fine-tune on; the gradients are sums over them.

    Returns:
        For blocks 0 and 1 of 3 and each target: the local loss in nats per token, the cosine of its gradient with the
        whole network's, and how much of the first-order gain of a step along the gradient's signs is kept.
    """
    found = []
    base = make_base()
    for block in (0, 1):
        exact: list[Tensor] = []
        for name, settings in {"whole network": {}, **TARGETS}.items():
            config = {"auxiliary_layers": settings.get("auxiliary_layers", 0)}
            model = BlockedForCausalLM.from_base(base, num_blocks=3, layers_per_block=[10, 10, 10], **config).train()
            freeze_others(model, [block])
            objective = NextTokenPrediction() if "auxiliary_layers" in settings else Above(base, **settings)
            total = 0.0
            for row in rows:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = objective(model, block, {"input_ids": row[None]}, None).loss
                loss.backward()
                total += loss.item() / len(rows)
            mine = [p.grad for p in model.block(block).model.parameters()]
            exact = exact or mine
            products = [
                (float((a * b).sum()), float(a.square().sum()), float(b.square().sum()))
                for a, b in zip(mine, exact, strict=True)
            ]
            dot, mine_norm, exact_norm = (sum(values) for values in zip(*products, strict=True))
            kept = sum(float((a.sign() * b).sum()) for a, b in zip(mine, exact, strict=True))
            kept /= sum(float(b.abs().sum()) for b in exact)
            found.append(
                {
                    "block": block,
                    "target": name,
                    "loss": total,
                    "cosine": dot / (mine_norm * exact_norm) ** 0.5,
                    "sign_gain": kept,
                    "gradient_norm": mine_norm**0.5,
                }
            )
            print(found[-1], flush=True)
    return found


PROBES: dict[str, Callable[[Any], dict]] = {
    "full": lambda config: blocked(config, 1, 0, "local"),
    "full, checkpointing": lambda config: blocked(config, 1, 0, "local", layers=True),
    **{f"exact, B=3, block {b}": lambda config, b=b: blocked(config, 3, b, "exact") for b in range(3)},
    "exact, B=3, block 0, checkpointing": lambda config: blocked(config, 3, 0, "exact", layers=True),
    **{f"exact, B=2, block {b}": lambda config, b=b: blocked(config, 2, b, "exact") for b in range(2)},
    **{f"emulator, B=3, block {b}": lambda config, b=b: blocked(config, 3, b, "emulator") for b in range(2)},
    **{f"local, B=3, block {b}": lambda config, b=b: blocked(config, 3, b, "local") for b in range(2)},
    **{
        f"local, auxiliary, B=3, block {b}": lambda config, b=b: blocked(config, 3, b, "local", auxiliary_layers=1)
        for b in range(2)
    },
    "LoRA, r=16": lambda config: rival(config, name="lora", rank=16),
    "LoRA, r=16, checkpointing": lambda config: rival(config, name="lora", rank=16, checkpointing=True),
    "BAdam, B=3, block 0": lambda config: rival(config, name="badam", blocks=3),
    "GaLore by layer, r=128": lambda config: rival(config, name="galore", rank=128, gap=200, scale=0.25),
}
