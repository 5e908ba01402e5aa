"""The figures that `diffusionblocks evaluate --table` prints, made of the kept results.

    python benchmarks/paper_tables.py write    # after new lines in benchmarks/results/: makes the shipped file again
    python benchmarks/paper_tables.py check    # says whether it is up to date; the tests ask the same

A run at a setting of the paper goes into ``benchmarks/results/paper-settings.jsonl``, a line per seed: ``table``,
``setting`` and ``label`` as ``diffusionblocks evaluate --table NAME`` prints them, ``figures`` (one per column),
``seed``, ``machine``, ``date``.
"""

import argparse
import json
from typing import Any

from _studies import RESULTS, read_rows

import hf_diffusionblocks.paper_tables as paper_tables
from hf_diffusionblocks.paper_tables.aggregation import measure_paper, measure_study

OUT = RESULTS.parent.parent / "src" / "hf_diffusionblocks" / "paper_tables" / paper_tables.MEASURED_NAME


def build() -> dict[str, Any]:
    """The content of the shipped file."""
    found = {study.name: measure_study(study, read_rows(RESULTS / f"{study.file}.jsonl")) for study in studies()}
    paper = measure_paper(read_rows(RESULTS / "paper-settings.jsonl"))
    return {"studies": {name: figures for name, figures in found.items() if figures}, "paper": paper}


def studies() -> tuple[paper_tables.Study, ...]:
    """All small settings of the tables."""
    return paper_tables.studies()


def text(content: dict[str, Any]) -> str:
    """As JSON with a line per row, so that a new seed changes few lines."""
    lines = ['{\n "studies": {']
    blocks = []
    for name, study in content["studies"].items():
        rows = ",\n".join(f"    {json.dumps(row)}" for row in study["rows"])
        origin = f'"machines": {json.dumps(study["machines"])}, "dates": {json.dumps(study["dates"])}'
        blocks.append(f'  {json.dumps(name)}: {{{origin}, "rows": [\n{rows}\n  ]}}')
    lines.append(",\n".join(blocks))
    lines.append(f' }},\n "paper": {json.dumps(content["paper"], indent=1)}\n}}\n')
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("write", "check"))
    wanted = text(build())
    if parser.parse_args().command == "write":
        OUT.write_text(wanted, encoding="utf-8")
        print(f"wrote {OUT.name}")
    elif not OUT.is_file() or OUT.read_text(encoding="utf-8") != wanted:
        raise SystemExit(f"{OUT.name} is not what the kept results give: python benchmarks/paper_tables.py write")


if __name__ == "__main__":
    main()
