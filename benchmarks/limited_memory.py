"""A model that is too big for a memory limit end to end, trained and sampled under it: ``make demo-memory``.

    python benchmarks/limited_memory.py
    python benchmarks/limited_memory.py --train-limit 352 --sample-limit 96 --blocks 6

Each step is a process whose address space is limited (RLIMIT_AS), after its imports, to so many MiB more than that:

1. end to end: refused by the limit, because weights, gradients, moments and averages of all layers are too much;
2. all blocks in one process that keeps them on the device: refused as well, it saves gradients and activations only;
3. one block at a time, the others on disk (``residency="disk"``): trains and saves the model;
4. sampling with all weights in memory, under a limit that is smaller than they are: refused;
5. sampling with one block at a time: works under it, and gives bit by bit the images that
6. sampling without a limit gives.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MIB = 2**20
REFUSED = 3


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}: this demonstration needs Linux")


def set_limit(job: dict[str, Any]) -> int:
    """Limit the address space to what there is and the job's limit more. Returns what there was."""
    before = status("VmSize")
    if job["limit"]:
        resource.setrlimit(resource.RLIMIT_AS, (before + job["limit"] * MIB,) * 2)
    return before


def train(job: dict[str, Any]) -> None:
    import torch
    from tqdm import tqdm

    from hf_diffusionblocks import (
        BlockedDiTConfig,
        BlockedDiTModel,
        BlockedDiTPipeline,
        DiffusionBlocksTrainer,
        DiffusionBlocksTrainingArguments,
    )
    from hf_diffusionblocks.data import load_image_dataset
    from hf_diffusionblocks.streaming import stream_blocks

    data = load_image_dataset("digits", "train")
    base = {
        "num_layers": job["layers"],
        "num_attention_heads": job["width"] // 64,
        "attention_head_dim": 64,
        "sample_size": 8,
        "in_channels": 1,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
    }
    config = BlockedDiTConfig(base_config=base, num_blocks=job["blocks"])
    args = DiffusionBlocksTrainingArguments(
        output_dir=job["folder"],
        max_steps=job["updates"],
        steps_per_visit=8,
        per_device_train_batch_size=32,
        block_order="round_robin",
        residency=job["residency"],
        report_to=[],
        cpu=True,
    )
    tqdm.monitor_interval = 0  # its thread would take address space
    before = set_limit(job)
    torch.manual_seed(0)
    streamed = stream_blocks("disk", folder=job["folder"]) if job["residency"] == "disk" else contextlib.nullcontext()
    with streamed:
        model = BlockedDiTModel(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"parameters": parameters}), flush=True)
    trainer = DiffusionBlocksTrainer(model, args, data)
    summary = trainer.train()
    BlockedDiTPipeline(model).save_index(trainer.save_model(Path(job["folder"]) / "model"))
    print(
        json.dumps(
            {
                "parameters": parameters,
                "iterations": summary["iterations"],
                "seconds": summary["training_seconds"],
                "last losses": {str(b): round(v, 4) for b, v in summary["last_losses"].items()},
                "address space": status("VmPeak") - before,
                "resident": status("VmHWM"),
            }
        )
    )


def sample(job: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    from hf_diffusionblocks import BlockedDiTPipeline

    before = set_limit(job)
    pipe = BlockedDiTPipeline.from_pretrained(Path(job["folder"]) / "model", block_streaming=job["streaming"])
    pipe.set_progress_bar_config(disable=True)
    images = pipe(list(range(10)), 12, generator=torch.Generator().manual_seed(0), output_type="pt").images
    save_file({"images": images}, job["images"])
    print(json.dumps({"address space": status("VmPeak") - before, "resident": status("VmHWM")}))


def run(what: str, job: dict[str, Any]) -> dict[str, Any] | None:
    """A step in a process of its own; None if the limit refused it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "TQDM_DISABLE": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    command = [sys.executable, __file__, "--child", what, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == REFUSED or done.returncode < 0:
        print(f"    refused by the limit: {(done.stderr.strip().splitlines() or [f'signal {-done.returncode}'])[-1]}")
        return None
    if done.returncode:
        raise RuntimeError(f"{what} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child(what: str, job: dict[str, Any]) -> None:
    try:
        {"train": train, "sample": sample}[what](job)
    except (MemoryError, RuntimeError, OSError) as error:
        text = str(error) or type(error).__name__
        if isinstance(error, MemoryError) or "memory" in text.lower():
            print(f"{type(error).__name__}: {text.splitlines()[0]}", file=sys.stderr)
            os._exit(REFUSED)
        raise


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], json.loads(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-limit", type=int, default=352, help="MiB above the imports (default: %(default)s)")
    parser.add_argument("--sample-limit", type=int, default=96, help="MiB above the imports (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=384, help="a multiple of 64")
    parser.add_argument("--updates", type=int, default=16, help="of each block")
    options = parser.parse_args()
    shape = {"layers": options.layers, "width": options.width}
    failures = []

    def expect(good: bool, what: str) -> None:
        if not good:
            failures.append(what)
            print(f"    UNEXPECTED: {what}")

    with tempfile.TemporaryDirectory() as folder:
        job = shape | {"limit": options.train_limit, "updates": options.updates}
        print(f"limit for training: {options.train_limit} MiB above the imports\n")
        print(f"1. end to end, {options.layers} layers at once:", flush=True)
        row = run("train", job | {"folder": f"{folder}/whole", "blocks": 1, "residency": "device", "updates": 1})
        expect(row is None, "end to end fitted under the limit; lower --train-limit")
        print(f"2. {options.blocks} blocks, all of them kept in memory:", flush=True)
        row = run(
            "train", job | {"folder": f"{folder}/kept", "blocks": options.blocks, "residency": "device", "updates": 8}
        )
        expect(row is None, "all blocks fitted under the limit; lower --train-limit")
        print(f"3. {options.blocks} blocks, one in memory, the others on disk:", flush=True)
        row = run("train", job | {"folder": f"{folder}/blocks", "blocks": options.blocks, "residency": "disk"})
        expect(row is not None, "one block at a time does not fit; raise --train-limit or --blocks")
        if row is None:
            sys.exit(1)
        size = row["parameters"]
        print(
            f"    {size:,} parameters trained, {row['iterations']} updates in {row['seconds']:.0f} s; "
            f"weights, gradients, moments and averages of all: {20 * size / MIB:.0f} MiB; "
            f"used {row['address space'] / MIB:.0f} MiB of address space above the imports"
        )
        job = {"folder": f"{folder}/blocks", "limit": options.sample_limit}
        print(f"\nlimit for sampling: {options.sample_limit} MiB; the weights alone are {4 * size / MIB:.0f} MiB\n")
        print("4. all weights in memory:", flush=True)
        row = run("sample", job | {"streaming": None, "images": f"{folder}/refused.safetensors"})
        expect(row is None, "all weights fitted under the limit; lower --sample-limit")
        print("5. one block in memory:", flush=True)
        row = run("sample", job | {"streaming": "disk", "images": f"{folder}/streamed.safetensors"})
        expect(row is not None, "one block at a time does not fit; raise --sample-limit or --blocks")
        if row is None:
            sys.exit(1)
        print(f"    10 images; used {row['address space'] / MIB:.0f} MiB of address space above the imports")
        print("6. without a limit, all weights in memory:", flush=True)
        row = run("sample", job | {"streaming": None, "limit": 0, "images": f"{folder}/resident.safetensors"})
        same = (
            Path(f"{folder}/streamed.safetensors").read_bytes() == Path(f"{folder}/resident.safetensors").read_bytes()
        )
        print(f"    used {row['address space'] / MIB:.0f} MiB; images {'the same, bit for bit' if same else 'DIFFER'}")
        expect(same, "streamed images differ from resident ones")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
