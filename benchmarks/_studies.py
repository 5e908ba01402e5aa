"""What studies over arms and seeds share: finished jobs as lines of JSON, jobs side by side, means over seeds."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent.parent / "docs" / "figures"


def read_rows(path: Path) -> list[dict]:
    """The rows of a results file; none if there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def add_row(path: Path, row: dict) -> None:
    """Append a row to a results file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def file_name(arm: str, seed: int) -> str:
    """A folder's name for a job."""
    return f"{arm}-{seed}".replace(" ", "_").replace("/", "_").replace(",", "")


def missing_jobs(
    rows: Iterable[dict], arms: Iterable[str], seeds: Sequence[int], only: str | None = None
) -> list[tuple[str, int]]:
    """(arm, seed) of what is not among the rows, seed by seed; of the arms whose name contains ``only``."""
    arms, done = list(arms), {(row["arm"], row["seed"]) for row in rows}
    return [(arm, seed) for seed in seeds for arm in arms if (arm, seed) not in done and (not only or only in arm)]


def run_jobs(script: str, study: str, todo: list[tuple[str, int]], workers: int, *options: str) -> None:
    """Run ``script job STUDY --arm ARM --seed SEED`` for each, so many side by side, one thread each.

    Raises:
        SystemExit: naming the jobs that failed, when all have ended.
    """
    RESULTS.mkdir(exist_ok=True)
    todo = list(todo)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    running: list[tuple[subprocess.Popen, str]] = []
    failed = []
    while todo or running:
        while todo and len(running) < workers:
            arm, seed = todo.pop(0)
            command = [sys.executable, script, "job", study, "--arm", arm, "--seed", str(seed), *options]
            running.append((subprocess.Popen(command, env=environment), f"{arm}, seed {seed}"))
            print(f"start  {arm}, seed {seed} ({len(todo)} left)", flush=True)
        for job in list(running):
            if job[0].poll() is not None:
                running.remove(job)
                print(f"{'done ' if job[0].returncode == 0 else 'FAILED'}  {job[1]}", flush=True)
                if job[0].returncode:
                    failed.append(job[1])
        time.sleep(0.5)
    if failed:
        raise SystemExit(f"failed: {failed}")


def mean(values: list[float]) -> str:
    """Mean ± standard error over seeds, with four decimals."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def study_parser(description: str | None, commands: Sequence[str], studies: Iterable[str]) -> argparse.ArgumentParser:
    """The options of a script with studies."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=commands)
    parser.add_argument("study", choices=list(studies))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", help="arms whose name contains this")
    parser.add_argument("--arm")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seeds", type=int, nargs="*")
    return parser
