"""Run notebooks from the top and keep their outputs: ``make notebooks``.

    python notebooks/execute.py                          # all of them
    python notebooks/execute.py own_family first_steps   # some

Each runs in a new kernel and an empty folder. What is written back: outputs without what differs between runs (times of
cells, and progress bars and logs, which go to stderr; an error ends the run), and in the metadata a digest of the code
that gave them, by which the tests see whether outputs belong to the code. A notebook of more than 200 KB is refused:
nobody can review it.

Needs ``pip install -e '.[notebooks]'``.
"""

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
LARGEST = 200 * 1024
SECONDS = 1200


def digest(notebook: dict[str, Any]) -> str:
    """SHA-256 of a notebook's code cells, in order."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


def execute(path: Path) -> float:
    """Run a notebook and write it back with its outputs; returns the seconds.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails; the file stays as it was.
        ValueError: if the outputs are too large; the file stays as it was.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": folder}})
        client.execute()
    seconds = time.perf_counter() - begin
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = kept(cell.outputs)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "hf_diffusionblocks": {"code_sha256": digest(notebook)},
    }
    text = nbformat.writes(notebook) + "\n"
    if len(text) > LARGEST:
        raise ValueError(f"{path.name} has {len(text):,} bytes, more than {LARGEST:,}: print less, or draw smaller.")
    path.write_text(text, encoding="utf-8")
    return seconds


def kept(outputs: list[Any]) -> list[Any]:
    """Outputs without stderr, and with the pieces of stdout, which come as they are flushed, as one."""
    found: list[Any] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if found and output.get("name") == found[-1].get("name") == "stdout":
            found[-1]["text"] += output["text"]
        else:
            found.append(output)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of notebooks, without .ipynb; default: all")
    options = parser.parse_args()
    known = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    for name in options.names or known:
        if name not in known:
            parser.error(f"there is no notebook {name!r}: give some of {', '.join(known)}")
        print(f"{name}: {execute(known[name]):.0f} s, {known[name].stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
