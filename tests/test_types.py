"""The type check passes, and finds what is wrong."""

import os
import subprocess
import sys
from pathlib import Path

from needed import needed

ROOT = Path(__file__).parents[1]


def mypy(*arguments: str) -> subprocess.CompletedProcess:
    needed("mypy")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"MYPYPATH": str(ROOT / "src")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_package_is_well_typed():
    done = mypy()
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_call_is_found(tmp_path):
    source = tmp_path / "user.py"
    source.write_text(
        "from hf_diffusionblocks.partition import BlockPartition\n"
        "partition = BlockPartition.equal_probability(3, 12)\n"
        "block: int = partition.block_of(0.5)\n"
        "wrong: str = partition.block_of(0.5)\n"
    )
    done = mypy(str(source))
    assert done.returncode == 1 and "user.py:4: error" in done.stdout and "user.py:3" not in done.stdout, done.stdout
