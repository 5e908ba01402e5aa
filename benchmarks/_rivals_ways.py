"""The ways to train of rivals_memory.py: each is built, makes updates and is counted, in a process of its own.

All ways train a DiT on the same noise with the same objective, through the library's trainer of a block; end to end is
the model in one block. What is not the library's own comes from its authors' package: GaLore from galore-torch, BAdam
from badam, LoRA from peft, 8-bit AdamW from bitsandbytes.
"""

import ctypes
import gc
import importlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from residency import Images, status
from torch import Tensor, nn

from hf_diffusionblocks import (
    BlockedDiTConfig,
    BlockedDiTModel,
    DiffusionBlocksTrainer,
    DiffusionBlocksTrainingArguments,
)
from hf_diffusionblocks.memory_alternatives import LORA_RANK, layers_of, matrices_of
from hf_diffusionblocks.memory_counting import MemoryUse, Precision, held_bytes, measure_step, set_mode
from hf_diffusionblocks.objectives import default_objective
from hf_diffusionblocks.streaming import stream_blocks
from hf_diffusionblocks.training.block_trainer import BlockTrainer

LAYERS, BLOCKS = 12, 3
WHOLE, JOB, DISK, HOST = "end to end", "one block of 3", "3 blocks in turn, disk", "3 blocks in turn, host"


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        name: for the table.
        planned: its name among the alternatives of a memory plan.
        optim: as in the training arguments.
        release: update each parameter as its gradient arrives.
        checkpointing: recompute activations.
        rival: ``galore``, ``badam`` or ``lora``; None for the library's own switches.
        scopes: with blocks or without.
    """

    name: str
    planned: str
    optim: str = "adamw_torch_fused"
    release: bool = False
    checkpointing: bool = False
    rival: str | None = None
    scopes: tuple[str, ...] = (WHOLE, JOB)


_ALL = (WHOLE, JOB, DISK, HOST)
WAYS = {
    way.name: way
    for way in (
        Way("AdamW", "AdamW", scopes=_ALL),
        Way("AdamW, checkpointing", "AdamW", checkpointing=True),
        Way("AdamW, gradient release", "AdamW, gradient release", release=True),
        Way("8-bit AdamW", "8-bit Adam", "adamw_8bit"),
        Way("8-bit AdamW, release, checkpointing", "8-bit Adam, gradient release", "adamw_8bit", True, True),
        Way("Adafactor", "Adafactor", "adafactor"),
        Way("Adafactor, release", "Adafactor, gradient release", "adafactor", True),
        Way("Adafactor, release, checkpointing", "Adafactor, gradient release", "adafactor", True, True, scopes=_ALL),
        Way("GaLore by layer", "GaLore by layer", release=True, rival="galore"),
        Way("GaLore by layer, checkpointing", "GaLore by layer", release=True, checkpointing=True, rival="galore"),
        Way("BAdam", "BAdam", rival="badam"),
        Way("BAdam, checkpointing", "BAdam", checkpointing=True, rival="badam"),
        Way("LoRA", "LoRA", rival="lora"),
        Way("LoRA, checkpointing", "LoRA", checkpointing=True, rival="lora"),
    )
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules are made in this type: no float32 copy of the weights exists at any time."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_config(width: int, layers: int, blocks: int) -> BlockedDiTConfig:
    """DiT on images of 4 x 16 x 16 in patches of 2."""
    heads = max(1, width // 64)
    base = {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "sample_size": 16,
        "in_channels": 4,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
    }
    return BlockedDiTConfig(base_config=base, num_blocks=blocks)


def import_rivals() -> None:
    """Have the packages of all ways in memory, so that every way starts from the same interpreter.

    Raises:
        SystemExit: if one is missing, with the command that installs it.
    """
    try:
        for name in ("badam", "bitsandbytes", "galore_torch", "peft"):
            importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(f"{error}: pip install --no-deps bitsandbytes galore-torch badam peft") from error


# -- rivals ----------------------------------------------------------------------------------------------------------


def galore(module: nn.Module, rank_divisor: int = 4) -> torch.optim.Optimizer:
    """GaLore's AdamW (arXiv 2403.03507, Alg. 2) on the layers' matrices, at a rank of a quarter of their shorter side.

    Stepped by the trainer's gradient release, one parameter at a time, it is GaLore by layer (section 4.3).
    """
    from galore_torch import GaLoreAdamW

    matrices = {id(m): m for m in matrices_of(module)}
    by_rank: dict[int, list[Tensor]] = {}
    for matrix in matrices.values():
        by_rank.setdefault(min(matrix.shape) // rank_divisor, []).append(matrix)
    groups: list[dict[str, Any]] = [{"params": [p for p in module.parameters() if id(p) not in matrices]}]
    groups += [
        {"params": values, "rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        for rank, values in by_rank.items()
    ]
    return GaLoreAdamW(groups, lr=1e-4, no_deprecation_warning=True)


def badam(module: nn.Module) -> torch.optim.Optimizer:
    """BAdam (arXiv 2404.02827, Alg. 1), a layer at a time. It is counted on the lowest layer, whose
    updates need the most: the activations of all layers above are kept."""
    from badam import BlockOptimizer

    names = list(module.named_parameters())
    ids = [{id(p) for p in layer.parameters()} for layer in layers_of(module)]
    prefixes = [[n for n, p in names if id(p) in own] for own in ids]
    base = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.0)
    return BlockOptimizer(base, names, prefixes, switch_block_every=100, start_block=0, verbose=0)


def add_lora(module: nn.Module) -> None:
    """LoRA (arXiv 2106.09685) on the layers' linear maps; everything else is frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    matrices = {id(m) for m in matrices_of(module)}
    names = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and id(m.weight) in matrices]
    inject_adapter_in_model(LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=names), module)


def rival_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    """Bytes of copies of weights, of gradients in a copy's type, and of moments, of GaLore's or BAdam's optimizer."""
    inner = getattr(optimizer, "base_optimizer", optimizer)
    states = [v for state in inner.state.values() for v in state.values()]
    moments = [v for v in states if isinstance(v, Tensor)]
    moments += [v.ortho_matrix for v in states if getattr(v, "ortho_matrix", None) is not None]
    copies = list(getattr(optimizer, "param_idx2hp", {}).values())
    return held_bytes(copies), held_bytes(p.grad for p in copies if p.grad is not None), held_bytes(moments)


# -- training and counting -------------------------------------------------------------------------------------------


def arguments(way: Way, batch: int, folder: str, **more: Any) -> DiffusionBlocksTrainingArguments:
    """Of a trainer that never writes a checkpoint."""
    return DiffusionBlocksTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch,
        use_ema=False,
        optim=way.optim,
        learning_rate=1e-3 if way.optim == "adafactor" else 1e-4,
        gradient_release=way.release,
        gradient_checkpointing=way.checkpointing,
        max_grad_norm=0.0 if way.release or way.rival == "badam" else 1.0,
        logging_steps=10**6,
        disable_tqdm=True,
        cpu=True,
        **more,
    )


class Single:
    """The whole model, or one block, in one trainer.

    Args:
        way: how.
        scope: ``WHOLE`` or ``JOB``.
        size: width and layers.
        batch: images per update.
        dtype: of the weights.
        folder: for the trainer; nothing is written.
    """

    def __init__(self, way: Way, scope: str, size: tuple[int, int], batch: int, dtype: torch.dtype, folder: str):
        self.way = way
        config = make_config(*size, 1 if scope == WHOLE else BLOCKS)
        with default_dtype(dtype):
            self.model = BlockedDiTModel(config, blocks=[0])
        set_mode(self.model, way.checkpointing)
        module = self.model.block(0)
        if way.rival == "lora":
            with default_dtype(dtype):
                add_lora(module)
        args = arguments(way, batch, folder)
        objective, accelerator = default_objective(config), Precision(self.model.device, "no")
        self.trainer = BlockTrainer(
            self.model, 0, objective, Images(16), args, accelerator, num_updates=100, shared=False
        )
        if way.rival in ("galore", "badam"):
            self.trainer.optimizer = {"galore": galore, "badam": badam}[way.rival](module)
            self.trainer.lr_scheduler = args.make_schedule(self.trainer.optimizer, 100)

    def updates(self, count: int) -> list[float]:
        """Seconds of so many updates."""
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            self.trainer.step()
            seconds.append(time.perf_counter() - begin)
        return seconds

    def count(self) -> tuple[MemoryUse, dict[str, int]]:
        """Bytes by kind of one more update."""
        optimizer, more = self.trainer.optimizer, {}
        if self.way.rival not in ("galore", "badam"):
            return measure_step(self.trainer), more
        found = (0, 0, 0)

        def at_step(*_: Any) -> None:  # BAdam's gradients have moved to float32 copies by now
            nonlocal found
            found = rival_bytes(optimizer)

        hook = getattr(optimizer, "base_optimizer", optimizer).register_step_post_hook(at_step)
        use = measure_step(self.trainer)
        hook.remove()
        copies, gradients, moments = found
        use = MemoryUse(use.weights + copies, max(use.gradients, gradients), moments, 0, use.activations)
        return use, {"copies": copies}


class Resident:
    """All blocks in turn in one process, one of them in memory and the next one fetched (``residency``)."""

    def __init__(self, way: Way, scope: str, size: tuple[int, int], batch: int, dtype: torch.dtype, folder: str):
        home = "disk" if scope == DISK else "host"
        config = make_config(*size, BLOCKS)
        settings = {"max_steps": 4, "steps_per_visit": 2, "block_order": "round_robin", "residency": home}
        with stream_blocks(home, folder=folder), default_dtype(dtype):
            model = BlockedDiTModel(config)
        self.trainer = DiffusionBlocksTrainer(model, arguments(way, batch, folder, **settings), Images(16))
        self.trainer.output_dir.mkdir(parents=True, exist_ok=True)
        self.model = model

    def updates(self, count: int) -> list[float]:
        """Seconds of the updates of two visits of each block; ``count`` is not used."""
        from tqdm.auto import tqdm

        seconds = []
        with tqdm(disable=True) as bar:
            for _ in self.trainer.schedule:
                begin = time.perf_counter()
                self.trainer._iterate(bar)
                seconds.append(time.perf_counter() - begin)
        return seconds[len(seconds) // 2 :]

    def count(self) -> tuple[MemoryUse, dict[str, int]]:
        """Bytes by kind of one more update of the first block, with the next one fetched beside it."""
        self.trainer.residency.pin(0, 1)
        use, streamer = measure_step(self.trainer.trainers[0]), self.model.streamer
        homes = 0 if streamer.to_disk else sum(h.layout.nbytes for h in streamer._homes.values())
        following = streamer.held_bytes().get("next pinned", 0)
        self.trainer.residency.release()
        return use, {"next": following, "home": homes}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train and count one way. ``peak`` is the operating system's, above an interpreter that has run a tiny model."""
    way, scope, dtype = WAYS[job["way"]], job["scope"], DTYPES[job["dtype"]]
    make = Single if scope in (WHOLE, JOB) else Resident
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        tiny = make(way, scope, (64, BLOCKS), job["batch"], dtype, f"{folder}/tiny")  # imports, kernels, caches
        tiny.updates(2)
        tiny.count()
        del tiny
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status("VmRSS")
        run = make(way, scope, (job["width"], LAYERS), job["batch"], dtype, f"{folder}/run")
        made = status("VmHWM") - before
        seconds = run.updates(job["updates"])
        peak = status("VmHWM") - before
        use, more = run.count()
    with torch.device("meta"):
        count = sum(p.numel() for p in BlockedDiTModel(make_config(job["width"], LAYERS, 1)).parameters())
    extra = {"next": 0, "home": 0, "shared": 0} | more
    counted = use.to_dict() | extra
    counted["total"] = use.total + extra["next"]
    return {
        "way": way.name,
        "scope": scope,
        "dtype": job["dtype"],
        "parameters": count,
        **counted,
        "made": made,
        "peak": peak,
        "seconds": statistics.median(seconds[1:] or seconds),
    }


def moved(way: Way, dtype: torch.dtype, width: int, batch: int, folder: str) -> float:
    """The share of a block's weights, of those that are not 0, that one update moves: the others' updates are rounded
    away."""
    torch.manual_seed(0)
    run = Single(way, JOB, (width, LAYERS), batch, dtype, folder)
    run.updates(5)
    before = [p.clone() for p in run.trainer.parameters]
    run.updates(1)
    pairs = list(zip(before, run.trainer.parameters, strict=True))
    held = sum(int((old != 0).sum()) for old, _ in pairs)
    return sum(int(((old != 0) & (old != new)).sum()) for old, new in pairs) / held
