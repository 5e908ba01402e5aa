"""Memory of every way to train one model, with blocks and without: counted by kind, and the operating system's peak.

    pip install bitsandbytes galore-torch badam peft matplotlib
    python benchmarks/rivals_memory.py run        # one process per way; goes on where it stopped
    python benchmarks/rivals_memory.py table      # markdown
    python benchmarks/rivals_memory.py chart      # docs/figures/rivals-memory.png
    python benchmarks/rivals_memory.py plan       # what plan_memory says beside what was counted
    python benchmarks/rivals_memory.py rounding   # the share of the weights that an update moves

Each way really makes updates of a DiT of 12 layers, end to end or in a job of one block of 3, or with all three in turn
and one in memory. Its peak is VmHWM of /proc/self/status above what the process held after its imports and two updates
of a tiny model. No average of the weights is kept. DiT's blocks share nothing.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _studies import FIGURES, RESULTS, add_row, read_rows

FILE = RESULTS / "rivals-memory.jsonl"
PICTURE = FIGURES / "rivals-memory.png"
MIB = 2**20


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    """What names a row: type of the weights, way, with blocks or without."""
    return row["dtype"], row["way"], row["scope"]


def serve(jobs: list[dict[str, Any]]) -> None:
    """Import everything once, then fork a process for each job, which prints its row or why there is none."""
    from _rivals_ways import import_rivals, measure

    import_rivals()
    for job in jobs:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            print(json.dumps(measure(job)), flush=True)
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"} | job), flush=True)
        finally:
            os._exit(0)


def rows_of(jobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of some jobs as they come. glibc gives freed memory back at once, so that a peak is what was in use."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, "serve", json.dumps(jobs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        for line in server.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    if server.returncode:
        raise SystemExit(f"the process that starts the ways ended with {server.returncode}: see above")


def run(options: argparse.Namespace) -> None:
    """Run what has no row yet."""
    from _rivals_ways import DTYPES, WAYS

    RESULTS.mkdir(exist_ok=True)
    done = {key(row) for row in read_rows(options.results)}
    size = {"width": options.width, "batch": options.batch_size, "updates": options.updates}
    jobs = [
        {"way": way.name, "scope": scope, "dtype": dtype, "folder": options.folder, **size}
        for dtype in reversed(DTYPES)
        for way in WAYS.values()
        for scope in way.scopes
    ]
    todo = [j for j in jobs if key(j) not in done and (not options.only or options.only in ", ".join(key(j)))]
    missing = {key(job) for job in todo}
    for row in rows_of(todo):
        if "error" in row:
            print(f"{' | '.join(key(row))}: {row['error']}", flush=True)
            continue
        row |= {"width": options.width, "batch": options.batch_size, "date": datetime.date.today().isoformat()}
        add_row(options.results, row)
        missing.remove(key(row))
        print(
            f"{' | '.join(key(row))}: {row['total'] / MIB:.1f} MiB counted "
            f"({row['total'] / row['parameters']:.3f} bytes per parameter), peak {row['peak'] / MIB:.1f} MiB, "
            f"{row['seconds']:.2f} s",
            flush=True,
        )
    if missing:
        raise SystemExit(f"no row for {sorted(missing)}")


def rounding(options: argparse.Namespace) -> None:
    """What bf16 weights without float32 copies cost: updates that are smaller than their last bit are lost."""
    from _rivals_ways import DTYPES, WAYS, moved

    for dtype, kind in DTYPES.items():
        share = moved(WAYS["AdamW"], kind, options.width, options.batch_size, options.folder)
        print(f"AdamW at 1e-4, {dtype}: an update moves {100 * share:.1f} % of the weights", flush=True)


def main() -> None:
    """Parse the options and run a command."""
    if sys.argv[1:2] == ["serve"]:
        serve(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table", "chart", "plan", "rounding"])
    parser.add_argument("--results", type=Path, default=FILE)
    parser.add_argument("--output", type=Path, default=PICTURE, help="of the chart")
    parser.add_argument("--only", help="run ways whose type, name or scope contains this")
    parser.add_argument("--width", type=int, default=640, help="a multiple of 64")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on a real disk, not in memory")
    options = parser.parse_args()
    if options.command in ("run", "rounding"):
        {"run": run, "rounding": rounding}[options.command](options)
        return
    import _rivals_tables

    rows = read_rows(options.results)
    if not rows:
        parser.error(f"{options.results} has no rows: run `python {sys.argv[0]} run` first")
    if options.command == "chart":
        _rivals_tables.chart(rows).savefig(options.output)
        print(f"chart in {options.output}")
    else:
        print({"table": _rivals_tables.table, "plan": _rivals_tables.against_plan}[options.command](rows))


if __name__ == "__main__":
    main()
