"""Every code cell of every notebook runs, and the outputs that are kept belong to the code that is kept."""

import importlib.util
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = "DIFFUSIONBLOCKS_NOTEBOOK_FAST"

spec = importlib.util.spec_from_file_location("execute_notebooks", ROOT / "notebooks" / "execute.py")
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text_of(cell: dict[str, Any]) -> str:
    """What a cell printed or showed, as text."""
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell["outputs"]]
    return "".join("".join(text) for text in texts)


def run(path: Path, folder: Path, monkeypatch) -> dict[str, Any]:
    """The names that a notebook leaves, run in a folder as the module that its classes belong to."""
    monkeypatch.chdir(folder)
    module = types.ModuleType(f"notebook_{path.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    cells = code_cells(read(path))
    assert cells
    with torch.random.fork_rng(devices=[]):
        for number, cell in enumerate(cells):
            exec(compile("".join(cell["source"]), f"{path.name}[{number}]", "exec"), module.__dict__)
    return module.__dict__


def check_first_steps(left: dict[str, Any]) -> None:
    assert left["one"].resident_blocks == (1,)
    assert all(v < 1.5 for v in left["summary"]["last_losses"].values())


def check_convert_pretrained_llama(left: dict[str, Any]) -> None:
    assert left["same_logits"] and left["same_weights"] and left["one"].resident_blocks == (1,)
    nats = left["split"].nats_per_token
    assert left["split"].exact and sum(left["split"].nats_per_block) == pytest.approx(nats)
    # One f serves all noise levels: moving the edges moves the shares, not their sum.
    assert left["equal"].nats_per_token == pytest.approx(nats, rel=1e-3)
    if not left["FAST"]:  # a model of a few updates has no information to be shared equally
        assert max(left["equal"].nats_per_block) < 0.5 * nats < max(left["split"].nats_per_block)
    assert left["depth"][-1] == pytest.approx(nats / 0.6931472, rel=1e-4)
    assert left["bits"]["end to end"] < left["bits"]["not tuned"]
    assert left["bits"]["blocks, exact gradient"] < left["bits"]["not tuned"]


def check_larger_than_memory(left: dict[str, Any]) -> None:
    whole, block = left["plan"].worst("end to end"), left["plan"].worst("blocked")
    assert block.total < whole.total / 3
    assert left["disk"] and left["streamed"]["pixels"] == left["resident"]["pixels"]


def check_own_family(left: dict[str, Any]) -> None:
    assert left["untouched"] and left["one"].resident_blocks == (1,)
    assert left["trained"].total < left["untrained"]
    assert type(left["whole"]) is left["BlockedMixer"] and left["samples"].isfinite().all()
    for name, value in left["model"].state_dict().items():
        assert torch.equal(left["whole"].state_dict()[name].isfinite(), value.isfinite()), name


def check_partition_ablation(left: dict[str, Any]) -> None:
    assert {len(rows) for rows in left["scores"].values()} == {len(left["SEEDS"])} and len(left["SEEDS"]) > 1
    flat = [value for rows in left["scores"].values() for row in rows for value in row]
    assert len(set(flat)) == len(flat) and all(value > 0 for value in flat)  # no seed and no cut is another's copy


CHECKS = {name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")}


def test_every_notebook_has_its_check():
    assert sorted(CHECKS) == [path.stem for path in NOTEBOOKS]


def sized(path: Path) -> object:
    """A parameter: a notebook whose small size takes long starts processes of its own, and runs with the slow tests."""
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem == "larger_than_memory"))


@pytest.mark.parametrize("path", [sized(path) for path in NOTEBOOKS])
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv(SMALL, "1")
    CHECKS[path.stem](run(path, tmp_path, monkeypatch))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_at_its_full_size(path, tmp_path, monkeypatch):
    monkeypatch.delenv(SMALL, raising=False)
    CHECKS[path.stem](run(path, tmp_path, monkeypatch))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_outputs_are_of_one_run_of_the_kept_code(path):
    notebook = read(path)
    assert path.stat().st_size <= execute.LARGEST
    assert notebook["metadata"]["hf_diffusionblocks"]["code_sha256"] == execute.digest(notebook), "make notebooks"
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    said = "\n".join(text_of(cell) for cell in cells)
    assert not re.search(r"Traceback|Warning|/tmp/|/home/|/root/", said)


def test_a_changed_cell_would_be_found():
    notebook = read(NOTEBOOKS[0])
    before = execute.digest(notebook)
    code_cells(notebook)[-1]["source"].append("\n1 + 1")
    assert execute.digest(notebook) != before
    notebook = read(NOTEBOOKS[0])
    notebook["cells"][0]["source"] = ["# Another title"]  # words are free to change
    assert execute.digest(notebook) == before


def test_what_the_ablation_says_is_what_its_runs_gave():
    """The last cell's means are those of the lines that the training cell printed, and so is the text below it."""
    cells = code_cells(read(ROOT / "notebooks" / "partition_ablation.ipynb"))
    lines = re.findall(r"seed \d  (\w+) +held-out loss ([\d.]+)  Frechet distance ([\d.]+)", text_of(cells[-2]))
    means = re.findall(r"(\w+) +held-out loss ([\d.]+) \+- [\d.]+ +Frechet distance ([\d.]+)", text_of(cells[-1]))
    assert len(means) == 3 and len(lines) >= 2 * len(means)
    for name, loss, distance in means:
        of_name = [(float(a), float(b)) for n, a, b in lines if n == name]
        assert float(loss) == pytest.approx(sum(a for a, _ in of_name) / len(of_name), abs=1e-3)
        assert float(distance) == pytest.approx(sum(b for _, b in of_name) / len(of_name), abs=2e-2)
    for seed in range(3):
        of_seed = [(float(loss), name) for name, loss, _ in lines[3 * seed : 3 * seed + 3]]
        assert min(of_seed)[1] == "equal_probability"
    distances = [float(distance) for _, _, distance in means]
    spreads = [float(s) for s in re.findall(r"Frechet distance [\d.]+ \+- ([\d.]+)", text_of(cells[-1]))]
    assert max(distances) - min(distances) < max(spreads)
