"""The files of a run beside its checkpoints: logs, and what a new run does with those of an earlier one."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..run_names import EVALUATIONS_NAME, JOB_PREFIX, RECORD_NAME, REPORT_NAME, STATUS_NAME, UPDATES_NAME, find_jobs
from .checkpoint import find_checkpoints


def flat_values(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them: numbers, text, and everything else as text."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}


def truncate_logs(directory: Path, iteration: int) -> None:
    """Drop what a run logged after the checkpoint (and a last line that a kill cut short)."""
    for name in (UPDATES_NAME, EVALUATIONS_NAME):
        _truncate(directory / name, iteration)


def _truncate(path: Path, iteration: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line + "\n")
        except ValueError:
            break
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def set_aside(output_dir: Path) -> None:
    """Move an earlier run's checkpoints and logs into ``previous-<n>``, so that a new run does not mix with them."""
    earlier = [*find_checkpoints(output_dir), *(output_dir / name for name in (UPDATES_NAME, EVALUATIONS_NAME))]
    earlier = [path for path in earlier if path.exists()]
    if not earlier:
        return
    number = 1 + sum(1 for _ in output_dir.glob("previous-*"))
    while (folder := output_dir / f"previous-{number}").exists():
        number += 1
    folder.mkdir()
    told = [path for name in (STATUS_NAME, REPORT_NAME) if (path := output_dir / name).exists()]
    for path in [*earlier, *told]:
        os.replace(path, folder / path.name)


def overwrite_run(output_dir: Path) -> None:
    """Remove a run's files so that it starts anew. Only what a run writes is removed.

    Raises:
        ValueError: if a folder that a run would remove is there, but no run.
    """
    jobs = find_jobs(output_dir)
    logs = [output_dir / name for name in (UPDATES_NAME, EVALUATIONS_NAME)]
    others = [name for name in ("model", "samples") if (output_dir / name).exists()]
    if others and not any(path.exists() for path in (*find_checkpoints(output_dir), *logs, *jobs)):
        raise ValueError(
            f"{output_dir} holds {' and '.join(others)}, but no run (no {UPDATES_NAME}, no checkpoint): it may be "
            "someone's, and is not removed. Give another directory, or remove it yourself."
        )
    for path in [*find_checkpoints(output_dir), *jobs, output_dir / "model", output_dir / "samples"]:
        shutil.rmtree(path, ignore_errors=True)
    for name in (UPDATES_NAME, EVALUATIONS_NAME, STATUS_NAME, RECORD_NAME, REPORT_NAME):
        (output_dir / name).unlink(missing_ok=True)


def job_directory(output_dir: Path, blocks: list[int]) -> Path:
    """Where a process that owns some of a run's blocks keeps its checkpoints, logs and model."""
    return output_dir / f"{JOB_PREFIX}{'-'.join(f'{block:02d}' for block in blocks)}"


def check_other_jobs(output_dir: Path, mine: Path, resume: bool) -> None:
    """Raise a ``ValueError`` if the same blocks were begun in another division over processes; else clear the way.

    A model that an earlier run left in this job's directory would pass for this run's.
    """
    blocks = set(mine.name.removeprefix(JOB_PREFIX).split("-"))
    for other in find_jobs(output_dir):
        if other != mine and blocks & set(other.name.removeprefix(JOB_PREFIX).split("-")):
            raise ValueError(
                f"{other} holds some of the blocks that this process is to train: an earlier run had another number of "
                "processes. Use as many as it had, another output_dir, or --overwrite to start anew."
            )
    if not resume or not find_checkpoints(mine):
        shutil.rmtree(mine / "model", ignore_errors=True)
