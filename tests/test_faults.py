"""Ten kills, a full disk, broken bytes, dropped connections: nothing is lost. The long form is benchmarks/faults.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HARNESS = Path(__file__).resolve().parents[1] / "benchmarks" / "faults.py"


def run(directory: Path, *options: str) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HARNESS), "--output", str(directory / "report.json"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((directory / "report.json").read_text())


def assert_nothing_was_lost(report: dict[str, Any], kills: int, broken: int) -> None:
    assert {name: part["lost"] for name, part in report.items()} == dict.fromkeys(report, 0)
    assert report["kills"]["faults"] == kills and report["bytes"]["faults"] == broken
    assert report["full disk"]["faults"] >= 3
    # every request of a push and of a download was hit: at least the reads, the upload and the commit
    assert report["push"]["faults"] >= 5 * 8 and report["fetch"]["faults"] >= 3 * 6


@pytest.mark.timeout(600)
def test_ten_kills_and_every_other_fault_lose_nothing(tmp_path):
    assert_nothing_was_lost(run(tmp_path, "--kills", "10", "--bytes", "20"), 10, 20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_kills_lose_nothing(tmp_path):
    assert_nothing_was_lost(run(tmp_path, "--kills", "200", "--bytes", "400", "--seed", "1"), 200, 400)
