"""Faults by the hundred: what is killed, full, broken or dropped, what was lost (nothing), and what it said.

``python benchmarks/faults.py [--kills 200] [--bytes 200] [--output faults.json]`` trains a tiny model as three jobs,
one per block, and disturbs them:

- kills: SIGKILL at random instants, resumed each time; the merged model against an undisturbed run, bit for bit;
- full disk: the system refuses bytes in the middle of each file (a limit on the size of files); then room again;
- bytes: a file of a saved model or a checkpoint is truncated, or one byte flipped; loading must name it;
- push and fetch: the connection is dropped at each request in turn, before, in the middle of and after it.

It needs no network and no GPU.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

from hub_server import HubServer  # noqa: E402

HUB = HubServer()
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none"}
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": tempfile.mkdtemp(prefix="faults-home-")}

import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from transformers.utils import logging  # noqa: E402

from hf_diffusionblocks import (  # noqa: E402
    BlockedDiTModel,
    DiffusionBlocksTrainer,
    DiffusionBlocksTrainingArguments,
    retrying,
)
from hf_diffusionblocks.merging import merge_blocks  # noqa: E402
from hf_diffusionblocks.repository import push_directory  # noqa: E402
from hf_diffusionblocks.serialization import INDEX_NAME, block_file  # noqa: E402
from hf_diffusionblocks.training.checkpoint import find_checkpoints, read_state  # noqa: E402
from killing import fork, status_of  # noqa: E402
from tiny import TinyImages, tiny_dit  # noqa: E402

BLOCKS = 3
REPO = "someone/tiny"


def train(directory: Path, blocks: list[int], ready: int | None = None) -> None:
    """Train blocks from the newest checkpoint to the end, and save the model."""
    AcceleratorState._reset_state(reset_partial_state=True)
    model = tiny_dit(BLOCKS, BLOCKS, base_config={"dropout": 0.1}, blocks=blocks)
    args = DiffusionBlocksTrainingArguments(
        output_dir=str(directory),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        horizontal_flip=True,
        save_steps=2,
        logging_steps=4,
        disable_tqdm=True,
        cpu=True,
    )
    trainer = DiffusionBlocksTrainer(model, args, TinyImages(30))
    if ready is not None:
        os.write(ready, b"!")
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.is_file()}


def said(action: Callable[[], Any]) -> str | None:
    """The one line with which an action ended, None if it went well. Anything but these errors is a bug."""
    try:
        action()
    except (ValueError, OSError) as error:
        text = str(error)
        assert text and "\n" not in text, text
        return text
    return None


def kills(root: Path, whole: Path, count: int, draw: random.Random) -> dict[str, Any]:
    """Kill the jobs at random instants, `count` times in all, each resumed until it is done; then merge."""
    begin = time.perf_counter()
    status_of(fork(lambda: train(root / "timing", [0])))
    seconds = time.perf_counter() - begin
    done, saved_by_then = 0, []
    for block in range(BLOCKS):
        goal = count * (block + 1) // BLOCKS
        directory = root / f"job-{block}"
        while done < goal:
            reader, writer = os.pipe()
            child = fork(lambda directory=directory, block=block, writer=writer: train(directory, [block], writer))
            os.close(writer)
            os.read(reader, 1)
            os.close(reader)
            time.sleep(draw.uniform(0, 1.2 * seconds))
            os.kill(child, signal.SIGKILL)
            if status_of(child) == -signal.SIGKILL:
                done += 1
                saved_by_then.append(len(find_checkpoints(directory)) > 0)
            else:  # it had finished: the job begins again
                shutil.rmtree(directory)
        assert status_of(fork(lambda directory=directory, block=block: train(directory, [block]))) == 0
        assert not list(directory.glob(".checkpoint-*")), "something half written was left"
    merged = merge_blocks([root / f"job-{b}" for b in range(BLOCKS)], root / "merged")
    same = contents(merged) == contents(whole)
    return {"faults": done, "lost": 0 if same else 1, "after a checkpoint": sum(saved_by_then)}


def full_disk(root: Path, whole: Path) -> dict[str, Any]:
    """No file may grow beyond a limit, for several limits; each run ends in one line, and goes on with room again."""
    lines = []
    for limit in (1_000, 20_000, 60_000, 90_000, 120_000):
        directory = root / f"full-{limit}"

        def limited(directory: Path = directory, limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                train(directory, [1])
            except OSError as error:
                assert "\n" not in str(error)
                os._exit(7)

        status = status_of(fork(limited))
        lines.append(status == 7)
        if status not in (0, 7):
            return {"faults": len(lines), "lost": 1, "limit": limit, "status": status}
        assert status_of(fork(lambda directory=directory: train(directory, [1]))) == 0
        if (directory / "model" / block_file(1)).read_bytes() != (whole / block_file(1)).read_bytes():
            return {"faults": len(lines), "lost": 1, "limit": limit}
    return {"faults": sum(lines), "lost": 0}


def broken_bytes(root: Path, whole: Path, count: int, draw: random.Random) -> dict[str, Any]:
    """Truncate or flip a byte of a random file of a model or a checkpoint; loading must refuse it and name it."""
    checkpoint = find_checkpoints(root / "job-1")[-1]
    undetected = 0
    for number in range(count):
        source = (whole, checkpoint)[number % 2]
        copy = Path(shutil.copytree(source, root / "broken"))
        names = [
            p.name for p in sorted(copy.iterdir()) if p.is_file() and (source is checkpoint or p.name != "config.json")
        ]
        if source is whole:
            names = [n for n in names if n not in ("shared.safetensors", INDEX_NAME)]
        name = draw.choice(names)
        content = bytearray((copy / name).read_bytes())
        at = draw.randrange(len(content))
        if draw.random() < 0.5:
            del content[at:]
        else:
            content[at] ^= 1 << draw.randrange(8)
        (copy / name).write_bytes(content)
        line = said(partial(BlockedDiTModel.from_pretrained if source is whole else read_state, copy))
        undetected += line is None or name not in line
        shutil.rmtree(copy)
    return {"faults": count, "lost": undetected}


def dropped_pushes(root: Path) -> dict[str, Any]:
    """Drop the connection at each request of a push in turn; repeat it if it ended; nothing of the others is lost."""
    retrying._SECONDS = 0.01
    models = [root / f"job-{b}" / "model" for b in range(BLOCKS)]
    faults = lost = gave_up = at = 0
    reached = True
    while reached:
        reached = False
        for how in ("drop", "half", "after", 503, 412):
            HUB.repositories.clear()
            HUB.objects.clear()
            HUB.faults.clear()
            push_directory(models[0], REPO)
            push_directory(models[1], REPO)
            left = [at]

            def fault(request: Any, left: list[int] = left, how: Any = how) -> Any:
                left[0] -= 1
                return how if left[0] == -1 else None

            HUB.faults.append(fault)
            line = said(lambda: push_directory(models[2], REPO))
            if left[0] >= 0:
                continue
            reached = True
            faults += 1
            gave_up += line is not None
            if line is not None:
                push_directory(models[2], REPO)
            files = HUB.files(REPO)
            want = {block_file(b): (models[b] / block_file(b)).read_bytes() for b in range(BLOCKS)}
            held = set(json.loads(files[INDEX_NAME])["weight_map"].values())
            whole = all(files.get(name) == content for name, content in want.items()) and want.keys() <= held
            lost += not whole or len(HUB.repositories[REPO].history()) != 4
        at += 1
    HUB.faults.clear()
    return {"faults": faults, "lost": lost, "repeated by hand": gave_up}


def dropped_fetches(root: Path) -> dict[str, Any]:
    """Drop the connection at each request of a download in turn; repeat it if it ended."""
    faults = lost = gave_up = at = 0
    reached = True
    while reached:
        reached = False
        for how in ("drop", "half", 503):
            left = [at]

            def fault(request: Any, left: list[int] = left, how: Any = how) -> Any:
                left[0] -= 1
                return how if left[0] == -1 else None

            HUB.faults[:] = [fault]
            cache = root / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            load = partial(BlockedDiTModel.from_pretrained, REPO, blocks=[1], cache_dir=cache)
            line = said(load)
            if left[0] >= 0:
                continue
            reached = True
            faults += 1
            gave_up += line is not None
            model = load()
            lost += model.resident_blocks != (1,)
        at += 1
    HUB.faults.clear()
    return {"faults": faults, "lost": lost, "repeated by hand": gave_up}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--bytes", type=int, default=200, help="files to break")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)  # no thread pool before the forks
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    draw = random.Random(options.seed)
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    report: dict[str, Any] = {}
    try:
        assert status_of(fork(lambda: train(root / "whole", list(range(BLOCKS))))) == 0
        whole = root / "whole" / "model"
        for name, action in (
            ("kills", lambda: kills(root, whole, options.kills, draw)),
            ("full disk", lambda: full_disk(root, whole)),
            ("bytes", lambda: broken_bytes(root, whole, options.bytes, draw)),
        ):
            report[name] = action()
            print(f"{name:<12}{report[name]}", flush=True)
        with HUB.running():  # threads: after the last fork
            for name, action in (("push", dropped_pushes), ("fetch", dropped_fetches)):
                report[name] = action(root)
                print(f"{name:<12}{report[name]}", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(any(part["lost"] for part in report.values()))


if __name__ == "__main__":
    main()
