"""Every code cell of every notebook runs."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert cells
    namespace: dict = {}
    for cell in cells:
        exec("".join(cell["source"]), namespace)
    if path.stem == "first_steps":
        assert namespace["one"].resident_blocks == (1,)
        assert all(v < 1.5 for v in namespace["summary"]["last_losses"].values())
