"""Peak memory, time and growth of training with one block on the device (residency).

    python benchmarks/residency.py                       # all of the following
    python benchmarks/residency.py memory --blocks 2 3 4 6
    python benchmarks/residency.py time --steps-per-visit 8
    python benchmarks/residency.py growth --layers 6 12 24 48
    python benchmarks/residency.py trace --output trace.json     # open in ui.perfetto.dev

Every row is a process of its own. Its peak is the operating system's (VmHWM of /proc/self/status), above what the
process held after its imports and a warm-up run of a tiny model. The bound is
1.03 x ((4 P + A) L / B + shared + one prefetched block's weights and moments), with what a block holds as counted by
``plan_memory``. On a CPU ``host`` stands for what a GPU would do, and its peak contains the home in host memory, which
is named apart. What the kernel keeps of the files of ``disk`` in its cache is not the process's memory: other programs
can have it.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MIB = 2**20
MARGIN = 1.03


# -- in the child ----------------------------------------------------------------------------------------------------


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def make_config(job: dict[str, Any], width: int, layers: int, blocks: int) -> Any:
    from hf_diffusionblocks import BlockedDiTConfig

    heads = max(1, width // 64)
    base = {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "sample_size": job["sample_size"],
        "in_channels": 4,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
    }
    return BlockedDiTConfig(base_config=base, num_blocks=blocks)


class Images:
    """A data set of noise; the content does not matter here."""

    fingerprint = "noise"

    def __init__(self, size: int, count: int = 64):
        import torch

        self.pixel_values = torch.randn(count, 4, size, size).clamp(-1, 1)
        self.class_labels = torch.arange(count) % 10

    def __len__(self) -> int:
        return len(self.class_labels)

    def __getitem__(self, rows: list[int]) -> dict[str, Any]:
        return {"pixel_values": self.pixel_values[rows], "class_labels": self.class_labels[rows]}


def make_trainer(job: dict[str, Any], folder: str, config: Any, residency: str, only: list[int] | None = None) -> Any:
    import contextlib

    from hf_diffusionblocks import BlockedDiTModel, DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments
    from hf_diffusionblocks.streaming import stream_blocks

    args = DiffusionBlocksTrainingArguments(
        output_dir=folder,
        max_steps=job["updates"],
        steps_per_visit=job["steps_per_visit"],
        block_order="round_robin",
        per_device_train_batch_size=job["batch_size"],
        residency=residency,
        use_ema=job["ema"],
        logging_steps=10**6,
        disable_tqdm=True,
        cpu=True,
    )
    streamed = stream_blocks(residency, folder=folder) if residency != "device" else contextlib.nullcontext()
    with streamed:
        model = BlockedDiTModel(config, blocks=only)
    return DiffusionBlocksTrainer(model, args, Images(job["sample_size"]))


def iterate(trainer: Any, count: int) -> list[float]:
    """So many iterations of the trainer's loop; seconds of each."""
    from tqdm.auto import tqdm

    seconds = []
    trainer.output_dir.mkdir(parents=True, exist_ok=True)
    with tqdm(disable=True) as bar:
        for _ in range(count):
            begin = time.perf_counter()
            trainer._iterate(bar)
            seconds.append(time.perf_counter() - begin)
    trainer._flush()
    return seconds


def measure_peak(job: dict[str, Any]) -> dict[str, Any]:
    import ctypes
    import gc

    import torch

    from hf_diffusionblocks.memory import BLOCKED, measure_step, plan_memory

    torch.manual_seed(0)
    residency, blocks = job["residency"], job["blocks"]
    only = [0] if job.get("job") else None
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        tiny = make_trainer(job, f"{folder}/tiny", make_config(job, 64, blocks, blocks), residency, only)
        iterate(tiny, len(tiny.schedule))
        config = make_config(job, job["width"], job["layers"], blocks)
        plan = plan_memory(config, batch_size=job["batch_size"], use_ema=job["ema"]).worst(BLOCKED)
        del tiny
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        trainer = make_trainer(job, f"{folder}/run", config, residency, only)
        made = status("VmHWM") - before
        seconds = iterate(trainer, len(trainer.schedule))
        trainer.save_model(f"{folder}/model")
        peak = status("VmHWM") - before
        # Counted on a real step of the first block, with the next one fetched beside it.
        following = 1 if blocks > 1 and only is None else None
        trainer.residency.pin(0, following)
        counted = measure_step(trainer.trainers[0])
        streamer = trainer.model.streamer
        held = streamer.held_bytes() if streamer is not None else {}
        homes = sum(h.layout.nbytes for h in streamer._homes.values()) if streamer is not None else 0
        parameters = sum(p.numel() for p in trainer.model.parameters())
        trainer.residency.release()
    home = homes if residency == "host" else 0
    return {
        **job,
        "parameters": parameters,
        "counted": counted.to_dict(),
        "next": held.get("next pinned", 0),
        "planned": plan.total,
        "prefetched": plan.weights + plan.moments + plan.ema if blocks > 1 and residency != "device" else 0,
        "made": made,
        "peak": peak,
        "home": home,
        "seconds": statistics.median(seconds[len(trainer.blocks) * job["steps_per_visit"] :] or seconds),
    }


def measure_time(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds per update of each residency, visits taken in turn so that the machine's load hits all alike."""
    import torch

    torch.manual_seed(0)
    config = make_config(job, job["width"], job["layers"], job["blocks"])
    visit, result = job["steps_per_visit"], {}
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        job = job | {"updates": visit * (job["rounds"] + 1)}
        trainers = {}
        for residency in ("device", "host", "disk"):
            torch.manual_seed(0)
            trainers[residency] = make_trainer(job, f"{folder}/{residency}", config, residency)
        for trainer in trainers.values():  # first visits make the moments
            iterate(trainer, visit * job["blocks"])
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for _ in range(job["rounds"] * job["blocks"]):
            for name, trainer in trainers.items():
                begin, busy = time.perf_counter(), time.process_time()
                iterate(trainer, visit)
                seconds[name].append(time.perf_counter() - begin)
                result.setdefault("processor", {}).setdefault(name, []).append(time.process_time() - busy)
        for name, trainer in trainers.items():
            if trainer.model.streamer is not None:
                trace = list(trainer.model.streamer.trace)
                fetched = sum(t.end - t.start for t in trace if t.what == "fetch")
                waited = sum(t.end - t.start for t in trace if t.what == "wait")
                result.setdefault("hidden", {})[name] = 1 - min(1.0, waited / fetched)
    device = seconds["device"]
    result |= {name: sum(values) for name, values in seconds.items()}
    for name in ("host", "disk"):
        pairs = [mine / theirs for mine, theirs in zip(seconds[name], device, strict=True)]
        result[f"{name} ratio"] = statistics.median(pairs)
        processor = result["processor"]
        result[f"{name} processor ratio"] = sum(processor[name]) / sum(processor["device"])
    return {**job, **result, "updates_timed": len(device) * visit}


def record_trace(job: dict[str, Any]) -> dict[str, Any]:
    """Fetches, stores and updates as a trace of two threads, in the format of Chrome's and Perfetto's viewers."""
    import torch

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        config = make_config(job, job["width"], job["layers"], job["blocks"])
        trainer = make_trainer(job, folder, config, job["residency"])
        events = []
        for block in trainer.schedule:
            begin = time.perf_counter()
            iterate(trainer, 1)
            events.append(("update", block, begin, time.perf_counter(), 0))
        moves = list(trainer.model.streamer.trace)
        trainer.residency.release()
    start = events[0][2]
    events += [(t.what, t.block, t.start, t.end, t.nbytes) for t in moves if t.start >= start]
    threads = {"update": 1, "wait": 1, "fetch": 2, "store": 2}
    names = [
        {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for tid, name in ((1, "compute"), (2, "fetch and store"))
    ]
    trace = names + [
        {
            "ph": "X",
            "pid": 1,
            "tid": threads[what],
            "name": f"{what} block {block}",
            "ts": 1e6 * (begin - start),
            "dur": 1e6 * (end - begin),
            "args": {"bytes": nbytes},
        }
        for what, block, begin, end, nbytes in events
    ]
    Path(job["output"]).write_text(json.dumps({"traceEvents": trace}))
    fetched = sum(end - begin for what, _, begin, end, _ in events if what == "fetch")
    waited = sum(end - begin for what, _, begin, end, _ in events if what == "wait")
    return {**job, "fetched_seconds": fetched, "waited_seconds": waited}


# -- in the parent ---------------------------------------------------------------------------------------------------


def run(what: str, job: dict[str, Any]) -> dict[str, Any]:
    """A job in a process of its own. glibc gives freed memory back at once, so that the peak is what was in use."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(job["threads"]),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, "--child", what, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} {job} failed with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory(options: argparse.Namespace) -> None:
    job = common(options) | {"updates": 2 * options.visit, "steps_per_visit": options.visit}
    kinds = ("weights", "gradients", "moments", "EMA", "activations")
    head = ["B", "residency", *(f"counted {kind}" for kind in kinds), "next block", "bound", "peak", "host home"]
    head += ["(peak - home) / bound", "peak of construction"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    rows = [(1, "device", False)]
    for blocks in options.blocks:
        rows += [(blocks, "device", False), (blocks, "device", True), (blocks, "host", False), (blocks, "disk", False)]
    for blocks, residency, alone in rows:
        row = run("peak", job | {"blocks": blocks, "residency": residency, "job": alone})
        bound = MARGIN * (row["planned"] + row["prefetched"])
        counted = row["counted"]
        cells = [f"{counted[kind] / MIB:.1f}" for kind in ("weights", "gradients", "moments", "ema", "activations")]
        name = "one block's job" if alone else {"device": "device, all blocks"}.get(residency, residency)
        ratio = (row["peak"] - row["home"]) / bound
        print(
            f"| {blocks} | {name if blocks > 1 else 'end to end'} | {' | '.join(cells)} | {row['next'] / MIB:.1f} "
            f"| {bound / MIB:.1f} | {row['peak'] / MIB:.1f} | {row['home'] / MIB:.1f} | {ratio:.3f} "
            f"| {row['made'] / MIB:.1f} |",
            flush=True,
        )


def timing(options: argparse.Namespace) -> None:
    job = common(options) | {
        "blocks": options.time_blocks,
        "steps_per_visit": options.steps_per_visit,
        "rounds": options.rounds,
        "threads": options.time_threads,
    }
    row = run("time", job)
    print("| residency | seconds per update | over device (median of visits) | processor time over device | hidden |")
    print("| --- | --- | --- | --- | --- |")
    for name in ("device", "host", "disk"):
        ratio, busy = row.get(f"{name} ratio", 1.0), row.get(f"{name} processor ratio", 1.0)
        hidden = f"{100 * row['hidden'][name]:.0f} %" if name in row["hidden"] else ""
        print(f"| {name} | {row[name] / row['updates_timed']:.4f} | {ratio:.3f} | {busy:.3f} | {hidden} |", flush=True)


def growth(options: argparse.Namespace) -> None:
    job = common(options) | {"residency": "disk", "updates": 2 * options.visit, "steps_per_visit": options.visit}
    print("| L | B | parameters | state of all, MiB | peak, MiB | over the first | seconds per update |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    first = None
    for layers in options.layers:
        row = run("peak", job | {"layers": layers, "blocks": layers // options.layers_per_block})
        first = first or row["peak"]
        state = (16 if row["ema"] else 12) * row["parameters"] / MIB
        print(
            f"| {layers} | {row['blocks']} | {row['parameters']:,} | {state:.0f} | {row['peak'] / MIB:.1f} "
            f"| {row['peak'] / first:.3f} | {row['seconds']:.3f} |",
            flush=True,
        )


def trace(options: argparse.Namespace) -> None:
    job = common(options) | {
        "residency": "disk",
        "blocks": options.time_blocks,
        "updates": 3 * options.steps_per_visit,
        "steps_per_visit": options.steps_per_visit,
        "output": options.output,
    }
    row = run("trace", job)
    print(
        f"fetching took {row['fetched_seconds']:.3f} s beside the computation, which waited for it "
        f"{row['waited_seconds']:.3f} s; trace in {options.output}"
    )


def common(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "width": options.width,
        "layers": 12,
        "sample_size": options.sample_size,
        "batch_size": options.batch_size,
        "ema": options.ema,
        "threads": options.threads,
        "folder": options.folder,
    }


PARTS = {"memory": memory, "time": timing, "growth": growth, "trace": trace}
CHILDREN = {"peak": measure_peak, "time": measure_time, "trace": record_trace}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(CHILDREN[sys.argv[2]](json.loads(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--width", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--sample-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 3, 4, 6])
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 24, 48], help="of the growth table")
    parser.add_argument("--layers-per-block", type=int, default=3, help="of the growth table")
    parser.add_argument("--visit", type=int, default=2, help="updates per visit of the memory and growth tables")
    parser.add_argument("--steps-per-visit", type=int, default=8, help="of the time table and the trace")
    parser.add_argument("--rounds", type=int, default=4, help="of the time table: timed visits of each block")
    parser.add_argument("--time-blocks", type=int, default=4, help="B of the time table and the trace")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--time-threads", type=int, default=1, help="of the time table; leave a core for fetching")
    parser.add_argument("--ema", action="store_true", help="keep averages: one more copy of the weights per block")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on a real disk, not in memory")
    parser.add_argument("--output", default="residency-trace.json", help="of the trace")
    options = parser.parse_args()
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    print(
        f"DiT, width {options.width}, images 4 x {options.sample_size} x {options.sample_size}, patches of 2, batch "
        f"{options.batch_size}, AdamW, float32, {'with' if options.ema else 'without'} averages, {options.threads} "
        f"thread(s); {platform.machine()}, {os.cpu_count()} cores, {datetime.date.today()}. MiB.\n"
    )
    for part in options.parts or PARTS:
        print(f"## {part}\n")
        PARTS[part](options)
        print()


if __name__ == "__main__":
    main()
