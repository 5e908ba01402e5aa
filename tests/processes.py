"""Training runs in several processes, over gloo on the CPU: launched by `launch`, run by this file as a script.

``python tests/processes.py DIRECTORY SCENARIO ...`` is one process of a run; rank and world size are in the
environment, as launchers put them there. All scenarios of a call run in the same processes, one after the other, each
in a directory of its own under DIRECTORY.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
os.environ["HF_HUB_OFFLINE"] = "1"

STEPS = 6
COMMON = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "adam_epsilon": 1e-4,  # a key bias has no gradient but rounding, which Adam would blow up
    "weight_decay": 0.01,
    "save_steps": 3,
    "logging_steps": 4,
    "disable_tqdm": True,
    "cpu": True,
}


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What launchers set for a process."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {**os.environ, **{k: str(v) for k, v in values.items()}}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(folder: Path, size: int, *scenarios: str) -> list[subprocess.Popen]:
    """The processes of a run."""
    command = [sys.executable, str(HERE / "processes.py"), str(folder), *scenarios]
    port = free_port()
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(command, env=environment(rank, size, port), **streams) for rank in range(size)]


def launch(folder: Path, size: int, *scenarios: str) -> None:
    """Run scenarios in so many processes, to the end."""
    outputs = [(p, p.communicate(timeout=300)[0]) for p in start(folder, size, *scenarios)]
    for process, output in outputs:
        assert process.returncode == 0, output


# -- scenarios ----------------------------------------------------------------------------------------------------


def trainer_of(folder: Path, kind: str, **settings: Any) -> Any:
    """A trainer of a tiny model: ``dit`` with three independent blocks; ``lm``, a cascade; ``streams``, two streams."""
    from hf_diffusionblocks import DiffusionBlocksTrainer, DiffusionBlocksTrainingArguments
    from tiny import TinyImages, tiny_dit
    from tiny_text import TokenRows, new_lm

    settings = dict(settings)
    blocks = settings.pop("num_blocks", 3)
    callbacks = settings.pop("callbacks", None)
    dataset = settings.pop("dataset", None)
    args = DiffusionBlocksTrainingArguments(output_dir=str(folder), **(COMMON | settings))
    if kind == "dit":
        model = tiny_dit(blocks, 6, base_config={"dropout": 0.1})
    elif kind == "lm":
        model = new_lm(num_blocks=blocks, auxiliary_layers=1)
    else:
        model = new_lm(num_blocks=blocks, readout="exact", context="independent")
        args.train_shared = "none"
    data = dataset or (TinyImages(30) if kind == "dit" else TokenRows(30))
    return DiffusionBlocksTrainer(model, args, data, data, callbacks=callbacks)


def train(folder: Path, kind: str, **settings: Any) -> Any:
    """Train and save the model in ``folder/model``."""
    trainer = trainer_of(folder, kind, **settings)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    return trainer


class DieAt:
    """A callback that kills this process, or sends it a signal, after some updates."""

    def __init__(self, iteration: int, number: int = signal.SIGKILL):
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == iteration:
                    os.kill(os.getpid(), number)

        self.callback = Callback()


class BadRow:
    """Images of which one row is not finite."""

    def __new__(cls, row: int) -> Any:
        from tiny import TinyImages

        images = TinyImages(30)
        images.pixel_values[row] = float("nan")
        return images


def with_fsdp(run: Any) -> Any:
    """As ``accelerate launch --use_fsdp --fsdp_version 2`` would have it."""
    given = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ.update(given)
    try:
        return run()
    finally:
        for name in given:
            del os.environ[name]


def run(folder: Path, scenario: str, rank: int) -> None:
    """One scenario; ``name`` is its directory as well."""
    target = folder / scenario
    if scenario in ("dit", "lm", "streams"):
        train(target, scenario)
    elif scenario == "two-blocks":
        train(target, "dit", num_blocks=2)
    elif scenario == "data":
        train(target, "dit", parallelism="data")
    elif scenario in ("released", "unclipped"):
        release = scenario == "released"
        train(target, "dit", parallelism="data", max_grad_norm=0, gradient_release=release)
    elif scenario == "residency":
        train(target, "dit", parallelism="data", residency="host")
    elif scenario == "accumulating":
        train(target, "dit", parallelism="data", gradient_accumulation_steps=2, per_device_train_batch_size=2)
    elif scenario == "resumed":
        train(folder / "stopped", "dit", parallelism="data")
    elif scenario == "other-number":  # of processes than the run had
        try:
            train(folder / "dit", "dit")
        except ValueError as error:
            (folder / f"other-number-{rank}.txt").write_text(str(error))
    elif scenario.startswith("fsdp-"):
        kind = scenario.removeprefix("fsdp-")
        settings = {} if kind == "lm" else {"parallelism": "data"}
        trainer = with_fsdp(lambda: train(target, kind, **settings))
        layer = next(trainer.model.layer_modules(trainer.blocks[0]))
        whole = sum(p.numel() for p in layer.parameters())
        here = sum(p.to_local().numel() for p in layer.parameters())
        moments = [s["exp_avg"] for t in trainer.trainers.values() for s in t.optimizer.state.values()]
        local = sum(m.to_local().numel() if hasattr(m, "to_local") else m.numel() for m in moments)
        note = {"whole": whole, "here": here, "moments": sum(m.numel() for m in moments), "moments_here": local}
        (target / f"shards-{rank}.json").write_text(json.dumps(note))
    elif scenario == "stopped":  # one of two processes gets SIGTERM: both stop after the same update
        callbacks = [DieAt(5, signal.SIGTERM).callback] if rank == 1 else None
        try:
            train(target, "dit", parallelism="data", callbacks=callbacks)
        except KeyboardInterrupt as error:
            (target / f"stopped-{rank}.txt").write_text(str(error))
    elif scenario == "bad":
        try:
            train(target, "dit", parallelism="data", dataset=BadRow(7))
        except ValueError as error:
            target.mkdir(parents=True, exist_ok=True)
            (target / f"bad-{rank}.txt").write_text(str(error))
    elif scenario == "killed":
        callbacks = [DieAt(5).callback] if rank == 1 and not (target / "died").exists() else None
        if callbacks:
            target.mkdir(parents=True, exist_ok=True)
            (target / "died").touch()
        train(target, "dit", callbacks=callbacks)
    else:
        raise SystemExit(f"no scenario {scenario!r}")


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        run(Path(sys.argv[1]), name, int(os.environ["RANK"]))
