"""How far a run is and where its blocks are, in a small file beside its logs: ``diffusionblocks watch`` reads it."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..likelihood.shares import is_shared_out
from ..run_names import STATUS_NAME
from ..strict_json import known, to_json

_SECONDS_BETWEEN = 1.0


class RunStatus(TrainerCallback):
    """Writes ``status.json`` when the trainer logs, at most once a second, and at the ends of a run.

    Times are seconds; ``updated`` counts from 1970. A full disk does not end the run here: the checkpoint will say so.
    """

    def __init__(self) -> None:
        self.begun, self.first, self.written, self.over = time.time(), 0, 0.0, False

    def on_train_begin(self, args: Any, state: Any, control: Any, *, trainer: Any, **kwargs: Any) -> None:
        self.begun, self.first = time.time(), trainer.iteration
        nothing_to_do = trainer.iteration == len(trainer.schedule)
        self.over = nothing_to_do and (Path(trainer.output_dir) / STATUS_NAME).is_file()
        self._write(trainer, "training")

    def on_log(self, args: Any, state: Any, control: Any, *, trainer: Any, **kwargs: Any) -> None:
        if time.time() - self.written >= _SECONDS_BETWEEN:
            self._write(trainer, "training")

    def on_stop(self, trainer: Any) -> None:
        """The run was asked to stop, and has saved what it learned."""
        self._write(trainer, "stopped")

    def on_train_end(self, args: Any, state: Any, control: Any, *, trainer: Any, **kwargs: Any) -> None:
        self._write(trainer, "finished" if trainer.iteration == len(trainer.schedule) else "stopped")

    def _write(self, trainer: Any, state: str) -> None:
        if not trainer.group.is_leader or self.over:  # a finished run stays as it is
            return
        self.written = time.time()
        path = Path(trainer.output_dir) / STATUS_NAME
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text(to_json(known(self.values(trainer, state)), indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def values(self, trainer: Any, state: str) -> dict[str, Any]:
        """What the file holds."""
        residency, active = trainer.args.residency, trainer.residency.active
        done = trainer.iteration - self.first
        blocks = []
        for row in trainer.model.partition.describe():
            block = row["block"]
            if block in trainer.trainers:
                here = residency == "device" or block == active
                blocks.append(
                    {
                        "block": block,
                        "layers": row["layers"],
                        "range": row["range"],
                        "updates": trainer.trainers[block].updates,
                        "of": trainer.num_updates,
                        "place": "device" if here else residency,
                    }
                )
        return {
            "state": state,
            "iteration": trainer.iteration,
            "iterations": len(trainer.schedule),
            "seconds": self.written - self.begun,
            "seconds_per_update": (self.written - self.begun) / done if done else None,
            "logging_steps": trainer.args.logging_steps,
            "updated": self.written,
            "device": str(trainer.accelerator.device),
            "active": trainer.schedule[trainer.iteration - 1] if trainer.iteration else None,  # made the last update
            "likelihood_shares": is_shared_out(trainer.model.config),
            "blocks": blocks,
        }
