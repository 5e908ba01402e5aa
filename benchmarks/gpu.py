"""What training holds and takes on a GPU, end to end and in blocks, with and without a limit on its memory.

    python benchmarks/gpu.py                     # DiT-XL/2 under 12 GiB, then a Llama of 1.1 billion parameters
    python benchmarks/gpu.py dit --limit 16 --blocks 7
    python benchmarks/gpu.py llama --layers 8
    python benchmarks/gpu.py table               # what was kept of earlier runs, in markdown

Each way is a process of its own. If the plan says that it fits, it runs under the limit
(``torch.cuda.set_per_process_memory_fraction``): the allocator then refuses what a smaller card could not hold. Others
run without; "no" stands where tensors took more than the limit.

peak: the most bytes of tensors at any time (``torch.cuda.max_memory_allocated``), from before the model is made until
the last update; reserved: what the allocator took from the card for them. planned: ``plan_memory`` for the block that
holds the most, and with blocks that rest elsewhere the next block's weights, moments and averages besides, and of a
cascade the weights of two of the lower blocks, which pass through. The exact gradient is planned for as the local one.

Times are per update: the median over the visits of all blocks after the first ones, in which optimizers make their
state. An update of a block computes a B-th of the layers (with the exact gradient: all of them), so an end-to-end
update is compared with B updates, one of each block.
"""

import argparse
import datetime
import gc
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else asking for a GPU starts CUDA, which does not survive a fork

import torch
from _studies import RESULTS, add_row, read_rows
from residency import Images, iterate
from text_speed import Rows

from hf_diffusionblocks import (
    BlockedDiTConfig,
    BlockedDiTModel,
    BlockedForCausalLM,
    DiffusionBlocksTrainer,
    DiffusionBlocksTrainingArguments,
)
from hf_diffusionblocks.memory import ALL_BLOCKS, BLOCKED, CHECKPOINTING, plan_memory
from hf_diffusionblocks.training.residency import construction

GIB = 2**30
FILE = RESULTS / "gpu.jsonl"


@dataclass(frozen=True)
class Way:
    """A way to train: into how many blocks, where they rest, and switches of the training arguments."""

    name: str
    cut: bool = True
    residency: str = "device"
    checkpointing: bool = False
    gradient: str | None = None
    optim: str = "adamw_torch_fused"
    release: bool = False


WAYS = {
    "dit": (
        Way("end to end", cut=False),
        Way("end to end, checkpointing", cut=False, checkpointing=True),
        Way("blocks, all on the device"),
        Way("blocks, the others in host memory", residency="host"),
        Way("the same, checkpointing", residency="host", checkpointing=True),
    ),
    "llama": (
        Way("end to end", cut=False),
        Way("end to end, checkpointing", cut=False, checkpointing=True),
        Way("blocks, local gradient, host", residency="host"),
        Way("blocks, exact gradient, host, checkpointing", residency="host", gradient="exact", checkpointing=True),
        Way("blocks, exact gradient, host", residency="host", gradient="exact"),
    ),
}


def make_config(job: dict[str, Any], num_blocks: int) -> Any:
    """DiT of patches of 2 on latents of 4 x 32 x 32, or a Llama with a tied table of 32000 tokens."""
    if job["model"] == "dit":
        base = {
            "num_layers": job["layers"],
            "num_attention_heads": job["width"] // 72 if job["width"] % 72 == 0 else job["width"] // 64,
            "attention_head_dim": 72 if job["width"] % 72 == 0 else 64,
            "sample_size": 32,
            "in_channels": 4,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
            "attention_bias": True,
        }
        return BlockedDiTConfig(base_config=base, num_blocks=num_blocks)
    base = {
        "model_type": "llama",
        "hidden_size": job["width"],
        "intermediate_size": 4 * job["width"],
        "num_hidden_layers": job["layers"],
        "num_attention_heads": job["width"] // 64,
        "vocab_size": 32000,
        "max_position_embeddings": job["tokens"],
        "tie_word_embeddings": True,
    }
    return BlockedForCausalLM.config_from(base, num_blocks, readout="clean", context="cascade", auxiliary_layers=0)


def arguments(job: dict[str, Any], way: Way, folder: str) -> DiffusionBlocksTrainingArguments:
    """Of a trainer that never writes a checkpoint, in visits of each block in turn."""
    settings: dict[str, Any] = {"use_ema": True}
    if job["model"] == "llama":
        settings = {
            "use_ema": False,
            "order": "simultaneous",
            "train_shared": "first",
            "gradient": way.gradient or "local",
        }
    return DiffusionBlocksTrainingArguments(
        output_dir=folder,
        max_steps=job["visit"] * job["visits"],
        steps_per_visit=job["visit"],
        block_order="round_robin",
        per_device_train_batch_size=job["batch"],
        mixed_precision="bf16",
        residency=way.residency,
        gradient_checkpointing=way.checkpointing,
        optim=way.optim,
        gradient_release=way.release,
        max_grad_norm=0.0 if way.release else 1.0,
        logging_steps=10**6,
        disable_tqdm=True,
        cpu=not torch.cuda.is_available(),
        **settings,
    )


def planned(job: dict[str, Any], way: Way, config: Any, use_ema: bool) -> int:
    """Bytes of ``plan_memory``, and of the next block that is fetched meanwhile."""
    tokens = {"tokens": job["tokens"]} if job["model"] == "llama" else {}
    plan = plan_memory(
        config,
        batch_size=job["batch"],
        mixed_precision="bf16",
        use_ema=use_ema,
        optim=way.optim,
        gradient_release=way.release,
        alternatives=False,
        **tokens,
    )
    suffix = CHECKPOINTING if way.checkpointing else ""
    if way.cut and way.residency == "device":
        return plan.worst(ALL_BLOCKS + suffix).total
    row = plan.worst(BLOCKED + suffix)
    if not way.cut:
        return row.total
    passing = 2 * row.weights if job["model"] == "llama" else 0  # lower blocks, for their forward pass
    return row.total + row.weights + row.moments + row.ema + passing


def train(job: dict[str, Any], way: Way, limit: float, folder: str) -> dict[str, Any]:
    """Make the model, train it and give its figures; under the limit if the plan says that it fits."""
    torch.manual_seed(0)
    config = make_config(job, job["blocks"] if way.cut else 1)
    args = arguments(job, way, folder)
    kind = BlockedDiTModel if job["model"] == "dit" else BlockedForCausalLM
    data = Images(32, 256) if job["model"] == "dit" else Rows(256, job["tokens"], 32000)
    expected = planned(job, way, config, args.use_ema)
    limited = expected < limit * GIB
    if limited:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * GIB / total))
    with construction(args):
        model = kind(config)
    trainer = DiffusionBlocksTrainer(model, args, data)
    iterate(trainer, len(trainer.blocks) * job["visit"])
    torch.cuda.synchronize()
    seconds = []
    for _ in range(len(trainer.blocks) * (job["visits"] - 1)):
        begin = time.perf_counter()
        iterate(trainer, job["visit"])
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begin) / job["visit"])
    row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "limited": limited,
        "seconds": statistics.median(seconds),
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "planned": expected,
    }
    if model.streamer is not None:
        trace = list(model.streamer.trace)
        row["waited"] = sum(t.end - t.start for t in trace if t.what == "wait")
        row["moved"] = sum(t.nbytes for t in trace)
    return row


def child(job: dict[str, Any], way: Way, limit: float) -> dict[str, Any]:
    """A row, or ``refused``."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return train(job, way, limit, folder)
        except torch.OutOfMemoryError as error:
            return {"refused": str(error).splitlines()[0]}


def forked(job: dict[str, Any], way: Way, limit: float) -> dict[str, Any]:
    """What a child makes of a way. It is forked from a process that has imported everything and not touched CUDA."""
    read, write = os.pipe()
    gc.collect()
    process = os.fork()
    if process == 0:
        try:
            found = child(job, way, limit)
        except BaseException as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        found = json.loads(pipe.read() or '{"error": "ended without a row"}')
    os.waitpid(process, 0)
    return found


HEAD = "| way | under {limit:g} GiB | peak GiB | reserved GiB | planned GiB | s per update | of end to end |\n|"
HEAD += 7 * "---|"


def line(row: dict[str, Any], whole: dict[str, Any]) -> str:
    """A row of the table; ``whole`` is that of end to end."""
    if "peak" not in row:
        return f"| {row['name']} | {'refused' if 'refused' in row else row['error']} | | | | | |"
    updates = 1 if not row["cut"] or row["gradient"] == "exact" else row["blocks"]
    fits = "trains" if row["limited"] else "no" if row["peak"] > row["limit"] * GIB else "not tried"
    cells = [fits, *(f"{row[kind] / GIB:.2f}" for kind in ("peak", "reserved", "planned"))]
    cells += [f"{row['seconds']:.3f}", f"{updates * row['seconds'] / whole['seconds']:.2f}"]
    return f"| {row['name']} | {' | '.join(cells)} |"


def title(job: dict[str, Any]) -> str:
    """What a table is of."""
    return (
        f"{job['model']}: {job['layers']} layers, width {job['width']}, batch {job['batch']} of {job['tokens']} "
        f"tokens, {job['blocks']} blocks, float32 weights, autocast bf16; {job['card']}, {job['date']}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """All kept rows as tables, one of each model and batch."""
    found = []
    for _, group in groupby(rows, lambda row: (row["model"], row["batch"], row["date"])):
        members = list(group)
        found.append(f"{title(members[0])}\n\n{HEAD.format(limit=members[0]['limit'])}")
        found[-1] += "".join("\n" + line(row, members[0]) for row in members)
    return "\n\n".join(found)


def run(job: dict[str, Any], output: Path) -> None:
    """Print the rows of a model as they come, and keep them."""
    print(f"\n{title(job)}\n\n{HEAD.format(limit=job['limit'])}")
    whole: dict[str, Any] = {}
    for way in WAYS[job["model"]]:
        row = job | asdict(way) | forked(job, way, job["limit"])
        whole = whole or row
        print(line(row, whole), flush=True)
        add_row(output, row)


def card() -> str:
    """The GPU's name, asked in a process of its own."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, torch.cuda.get_device_name().encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        return pipe.read()


SIZES = {
    "dit": {"layers": 28, "width": 1152, "batch": 128, "tokens": 256, "blocks": 4},
    "llama": {"layers": 16, "width": 2048, "batch": 4, "tokens": 1024, "blocks": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="model", help=f"of {', '.join(SIZES)}, or table; default: both")
    for name in ("layers", "width", "batch", "tokens", "blocks"):
        parser.add_argument(f"--{name}", type=int, help="default: the model's")
    parser.add_argument("--visit", type=int, default=8, help="updates per visit of a block")
    parser.add_argument("--visits", type=int, default=2, help="visits of each block; the first is not timed")
    parser.add_argument("--limit", type=float, default=12.0, help="GiB of the smaller card")
    parser.add_argument("--output", type=Path, default=FILE, help="a file for the rows, JSON lines")
    options = parser.parse_args()
    if options.models == ["table"]:
        print(table(read_rows(options.output)))
        return
    unknown = sorted(set(options.models) - set(SIZES))
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}: choose from {', '.join(SIZES)}, or table")
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a GPU")
    common = {"visit": options.visit, "visits": options.visits, "limit": options.limit, "card": card()}
    for model in options.models or SIZES:
        given = {key: getattr(options, key) for key in SIZES[model] if getattr(options, key) is not None}
        date = {"date": datetime.date.today().isoformat()}
        run({"model": model} | SIZES[model] | given | common | date, options.output)


if __name__ == "__main__":
    main()
