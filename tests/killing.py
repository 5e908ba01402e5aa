"""Kills training runs and starts them again. A process of its own, so that PyTorch is imported once and forked often.

``python tests/killing.py DIRECTORY --kills N`` trains a tiny model

- in ``DIRECTORY/whole`` without interruption,
- in ``DIRECTORY/random`` with N kills (SIGKILL) at random instants, resumed each time,
- in ``DIRECTORY/stopped`` with SIGTERM and SIGINT at random instants, resumed each time,
- in ``DIRECTORY/point-K`` killed at the K-th file operation of a checkpoint's writing, K = 0, S, 2 S, ...,

each time to the end, and writes what happened to ``DIRECTORY/report.json``. With ``--text`` the model is a cascade of
a language model, trained block after block on lower blocks' outputs kept on disk; then the last kind is

- in ``DIRECTORY/outputs-K`` killed at the K-th file operation or batch of writing these outputs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

from hf_diffusionblocks import DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments  # noqa: E402
from hf_diffusionblocks.training import cascade as cascade_module  # noqa: E402
from hf_diffusionblocks.training import checkpoint as checkpoint_module  # noqa: E402
from hf_diffusionblocks.training import trainer as trainer_module  # noqa: E402
from tiny import TinyImages, tiny_dit  # noqa: E402
from tiny_text import TokenRows, new_lm  # noqa: E402

torch.set_num_threads(1)  # no thread pool before the forks

INTERRUPTED = 3
TEXT = False  # set by --text


def trainer_of(output_dir: Path, **settings: Any) -> DiffusionBlocksTrainer:
    """A run with everything that has state: dropout, averages, warm-up and decay, accumulation, clipping, flips.

    With ``TEXT``: and lower blocks' outputs, and auxiliary layers that are handed over.
    """
    model = new_lm() if TEXT else tiny_dit(3, 3, base_config={"dropout": 0.1})
    own = {"lower_outputs": "disk", "hand_over": True} if TEXT else {"horizontal_flip": True}
    defaults = own | {
        "output_dir": str(output_dir),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.01,
        "save_steps": 3,
        "logging_steps": 4,
        "disable_tqdm": True,
        "cpu": True,
    }
    args = DiffusionBlocksTrainingArguments(**(defaults | settings))
    return DiffusionBlocksTrainer(model, args, TokenRows(30) if TEXT else TinyImages(30))


def fork(action: Callable[[], None]) -> int:
    """Run an action in a child process; its exit status is 0, `INTERRUPTED` for a KeyboardInterrupt, or 1."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except KeyboardInterrupt:
            status = INTERRUPTED
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def status_of(child: int) -> int:
    """Exit status of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(directory: Path, ready: int | None = None, **settings: Any) -> None:
    """Train from the newest checkpoint to the end; tell when it starts through a pipe."""
    trainer = trainer_of(directory, **settings)
    if ready is not None:
        os.write(ready, b"!")
    trainer.train(resume_from_checkpoint=True)


def start(directory: Path) -> int:
    """Start a run in a child and return when it begins to train."""
    reader, writer = os.pipe()
    child = fork(lambda: train(directory, ready=writer))
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    return child


def leftovers(directory: Path) -> list[str]:
    """Half-written checkpoints."""
    return sorted(p.name for p in directory.glob(".checkpoint-*")) if directory.is_dir() else []


def interrupt_at_random(directory: Path, count: int, seconds: float, signals: list[int], seed: int) -> dict[str, Any]:
    """Start the run, interrupt it `count` times, then let it finish. Uninterrupted, it takes about `seconds`."""
    draw = random.Random(seed)
    statuses, half_written, stops = [], [], []
    while len(statuses) < count:
        child = start(directory)
        time.sleep(draw.uniform(0, 2 * seconds / (count + 1)))
        os.kill(child, signals[len(statuses) % len(signals)])
        status = status_of(child)
        if status == 0:  # it was faster: begin again
            shutil.rmtree(directory)
            statuses, half_written, stops, seconds = [], [], [], seconds / 2
            continue
        statuses.append(status)
        half_written.append(leftovers(directory))
        stops.append([p.name for p in checkpoint_module.find_checkpoints(directory)][-1:])
    final = status_of(fork(lambda: train(directory)))
    return {"statuses": statuses, "half_written": half_written, "stops": stops, "final": final}


class KillAt:
    """Counts the operations that change files, from a given checkpoint's writing on, and dies at one of them."""

    NAMES = ("replace", "fsync", "mkdir", "unlink", "rmdir", "chmod")

    def __init__(self, at: int, iteration: int):
        self.at, self.iteration, self.count, self.armed = at, iteration, 0, False

    def install(self) -> None:
        for name in self.NAMES:
            original = getattr(os, name)
            setattr(os, name, lambda *a, original=original, **k: (self.step(), original(*a, **k))[1])
        write = checkpoint_module.write_checkpoint

        def armed(output_dir: Path, iteration: int, *args: Any) -> Path:
            self.armed = iteration >= self.iteration
            path = write(output_dir, iteration, *args)
            if self.armed:
                os._exit(0)  # nothing left to be killed at
            return path

        trainer_module.write_checkpoint = armed

    def install_for_outputs(self) -> None:
        """The same for the writing of lower blocks' outputs, and the batches of it."""
        for module, name in (*((os, name) for name in (*self.NAMES, "posix_fallocate")), (cascade_module, "fetch")):
            original = getattr(module, name)
            setattr(module, name, lambda *a, original=original, **k: (self.step(), original(*a, **k))[1])
        compute = trainer_module.lower_outputs

        def armed(*args: Any) -> Any:
            self.armed = True
            result = compute(*args)
            os._exit(0)  # nothing left to be killed at
            return result

        trainer_module.lower_outputs = armed

    def step(self) -> None:
        if self.armed:
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1


def kill_at_points(directory: Path, stride: int, **settings: Any) -> dict[str, Any]:
    """Kill runs at file operations of their second checkpoint's writing, every `stride`-th; resume each to the end."""
    points: dict[str, Any] = {}
    while True:
        at = len(points) * stride
        target = directory / f"point-{at}"

        def killed(target: Path = target, at: int = at) -> None:
            KillAt(at, iteration=6).install()
            train(target, **settings)

        status = status_of(fork(killed))
        if status != -signal.SIGKILL:
            assert status == 0, f"the run failed at point {at}"
            return points  # there is no such operation any more
        found = [p.name for p in checkpoint_module.find_checkpoints(target)]
        points[target.name] = {"status": status, "found": found, "half_written": leftovers(target)}
        points[target.name]["final"] = status_of(fork(lambda target=target: train(target, **settings)))


def kill_at_outputs(directory: Path, **settings: Any) -> dict[str, Any]:
    """Kill runs at each operation of the writing of block 0's outputs; resume each to the end."""
    points: dict[str, Any] = {}
    while True:
        at = len(points)
        target = directory / f"outputs-{at}"

        def killed(target: Path = target, at: int = at) -> None:
            KillAt(at, iteration=0).install_for_outputs()
            train(target, **settings)

        status = status_of(fork(killed))
        if status != -signal.SIGKILL:
            assert status == 0, f"the run failed at operation {at}"
            shutil.rmtree(target)
            return points
        found = sorted(p.name for p in (target / "lower-outputs").glob("*")) if target.is_dir() else []
        points[target.name] = {"status": status, "found": found}
        points[target.name]["final"] = status_of(fork(lambda target=target: train(target, **settings)))


def main() -> None:
    global TEXT
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--stops", type=int, default=2)
    parser.add_argument("--stride", type=int, default=1, help="S")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", action="store_true", help="a cascade of a language model")
    options = parser.parse_args()
    TEXT = options.text
    root = options.directory
    trainer_of(root / "unused")  # what is imported late is imported once
    report: dict[str, Any] = {}
    child = start(root / "whole")
    begin = time.perf_counter()
    report["whole"] = status_of(child)
    seconds = time.perf_counter() - begin
    report["random"] = interrupt_at_random(root / "random", options.kills, seconds, [signal.SIGKILL], options.seed)
    stops = [signal.SIGTERM, signal.SIGINT]
    report["stopped"] = interrupt_at_random(root / "stopped", options.stops, seconds, stops, options.seed + 1)
    settings = {"max_steps": 3, "save_total_limit": 1}
    report["short"] = status_of(fork(lambda: train(root / "short", **settings)))
    if TEXT:
        report["outputs"] = kill_at_outputs(root, **settings)
    else:
        report["points"] = kill_at_points(root, options.stride, **settings)
    (root / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
