"""Where, when and by which command a run was made: kept beside its logs, for its model's card."""

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from .. import serialization
from ..run_names import RECORD_NAME, find_jobs
from ..versions import versions


def hardware(device: torch.device) -> str:
    """The device in words, such as ``AMD EPYC, 2 cores, 1 thread``, or ``NVIDIA H100 (AMD EPYC, ...)``."""
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    words = f"{_processor()}, {cores} core{'s' * (cores > 1)}, {threads} thread{'s' * (threads > 1)}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({words})"
    return words if device.type == "cpu" else f"{device.type} ({words})"


def _processor() -> str:
    """The processor's name, which Python itself does not know on Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            named = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        named = []
    return next(iter(named), "") or platform.processor() or platform.machine() or "unknown processor"


def record_run(directory: Path, device: torch.device, command: str | None = None, resumed: bool = False) -> None:
    """Write ``run.json`` of a process: at its start, and again at its end, for the date.

    Args:
        directory: of the process's run.
        device: that it trains on.
        command: that began it, if it was one.
        resumed: keep what is recorded of the processes before it; where they ran stays in the record.
    """
    known = _read(directory) if resumed else {}
    machines = [m for m in known.get("hardware", []) if isinstance(m, str)]
    here = hardware(device)
    values = {
        "command": command or known.get("command"),
        "hardware": machines if here in machines else [*machines, here],
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
    }
    serialization.write_json(directory / RECORD_NAME, values)


def read_record(*output_dirs: Path) -> dict[str, str]:
    """What is recorded of runs and of their jobs, in words: ``command``, ``hardware``, ``date``, ``versions``."""
    records = [record for run in output_dirs for path in (run, *find_jobs(run)) if (record := _read(path))]
    commands = list(dict.fromkeys(c for r in records if isinstance(c := r.get("command"), str)))
    machines = list(dict.fromkeys(m for r in records for m in r.get("hardware", []) if isinstance(m, str)))
    dates = [date for r in records if isinstance(date := r.get("date"), str)]
    found: dict[str, str] = next((r["versions"] for r in reversed(records) if isinstance(r.get("versions"), dict)), {})
    made = {
        "command": ", ".join(f"`{command}`" for command in commands),
        "hardware": "; ".join(machines),
        "date": max(dates, default=""),
        "versions": ", ".join(f"{name} {version}" for name, version in found.items()),
    }
    return {name: value for name, value in made.items() if value}


def _read(directory: Path) -> dict[str, Any]:
    """A record; empty where there is none that can be read."""
    try:
        values = serialization.read_json(directory / RECORD_NAME)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) and isinstance(values.get("hardware", []), list) else {}
